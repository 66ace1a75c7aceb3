"""What CONTRIBUTING.md says of the code is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:stampworker|tests|schemas|deploy)/[\w./-]*)`", TEXT))))
def test_files_named_exist(path: str) -> None:
    """Every file and folder that the guide names is there."""
    assert (ROOT / path).exists()


@pytest.mark.parametrize(
    ("path", "names"),
    re.findall(r"`(stampworker/[\w./]+\.py)`: ((?:`[^`]+`(?:, | and )?)+)", TEXT),
)
def test_names_are_in_the_files_named(path: str, names: str) -> None:
    """Behind a file, the guide names classes, methods, functions or constants of that file."""
    source = (ROOT / path).read_text(encoding="utf-8")
    for name in re.findall(r"`([\w.]+)", names):
        for part in name.split("."):
            assert re.search(rf"^\s*(?:class|def) {part}\b|^{part}\b.*=", source, re.M), f"{path} has no {part}"


def test_every_target_named_exists() -> None:
    """Targets of make that the guide names are in the Makefile."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in re.findall(r"^\$ make (.*?)(?: +#.*)?$", TEXT, re.M):
        for target in line.split():
            assert re.search(rf"^{target}:", makefile, re.M), target
