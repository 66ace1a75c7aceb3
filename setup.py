"""The C core of the fit, which pyproject.toml has no settled way to declare; all else is there.

Without a compiler the package installs all the same, and fits in numpy.
"""

from pathlib import Path

from setuptools import Extension, setup

CORE = Path("stampworker/cutouts/core")

setup(
    ext_modules=[
        Extension(
            "stampworker.cutouts._adjust",
            sorted(map(str, CORE.glob("*.c"))),
            depends=sorted(map(str, CORE.glob("*.h"))),
            optional=True,
            py_limited_api=True,
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            # Every machine rounds alike without fused multiplication and addition: see core.h.
            extra_compile_args=["-O3", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"],
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
