"""The package installs, and works, without a compiler."""

import ast
import functools
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "stampworker", "schemas")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    """A wheel is built where compiling fails; its fit is numpy's, and it has the schemas."""
    source = tmp_path / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skipped = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=skipped, symlinks=True)
        else:
            shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--no-deps", "-w", str(tmp_path), "."]
    no_compiler = os.environ | {"CC": "/bin/false", "CXX": "/bin/false"}
    run = subprocess.run(build, cwd=source, env=no_compiler, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(installed)
    code = (
        "from stampworker.formats import schema; from stampworker.cutouts import adjust;"
        "print(adjust.__file__, adjust.CORE)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.split() == [str(installed / "stampworker" / "cutouts" / "adjust.py"), "numpy"]


found_distributions = functools.cache(packages_distributions)  # it takes a second


def normal(name: str) -> str:
    """Return the name of a distribution as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def declared(*extras: str) -> set[str]:
    """Return the distributions that pyproject.toml asks for, those of some extras included."""
    asked = sum((PROJECT["optional-dependencies"][extra] for extra in extras), PROJECT["dependencies"])
    return {normal(re.split(r"[^\w.-]", requirement)[0]) for requirement in asked}


def imported(path: Path) -> set[str]:
    """Return the first names of the modules that a file imports, but for Python's own."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module).partition(".")[0])
    return found - sys.stdlib_module_names


@pytest.mark.parametrize(
    ("folder", "extras"),
    [("stampworker", ("s3", "memory", "viewer")), ("tests", ("test",)), ("tests/benchmarks", ("test", "bench"))],
)
def test_every_import_is_declared(folder: str, extras: tuple[str, ...]) -> None:
    """What a folder imports is asked for by name, and does not come by chance with something else."""
    programs = ("benchmarks", "reference")  # of these some run beside STDPipe, in the environment of `make bench`
    distributions, asked = found_distributions(), declared(*extras)
    missing = {}
    for path in sorted((ROOT / folder).rglob("*.py")):
        if folder == "tests" and path.relative_to(ROOT / folder).parts[0] in programs:
            continue
        own = {"stampworker", *(other.stem for other in [*path.parent.iterdir(), *(ROOT / "tests").iterdir()])}
        for name in imported(path) - own:
            if not {normal(made_by) for made_by in distributions.get(name, [name])} & asked:
                missing[path.name] = name
    assert not missing
