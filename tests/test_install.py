"""The package installs, and works, without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "stampworker", "schemas")


@pytest.mark.timeout(300)
def test_wheel_without_a_compiler(tmp_path: Path) -> None:
    """Where compiling fails the wheel is built all the same; the fit is numpy's, and the schemas are there."""
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
