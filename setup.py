"""The C core of the fit, which pyproject.toml has no settled way to declare; all else is there.

Without a compiler the package installs all the same, and fits in numpy.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "stampworker.cutouts._adjust",
            ["stampworker/cutouts/_adjust.c"],
            optional=True,
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            extra_compile_args=["-O3", "-ffp-contract=off", "-Wno-psabi"],  # every machine rounds alike: see _adjust.c
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
