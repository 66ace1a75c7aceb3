"""The README's examples run as written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from astropy.table import Table

from stampworker.simulation.night import simulate

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with three frames and a list of candidates, as an astronomer has them."""
    folder = tmp_path_factory.mktemp("desk")
    night = simulate(folder / "night", size=512, candidates=12, seed=2)
    for plane in ("science", "template", "difference"):
        (night.frames[0] / f"{plane}.fits").rename(folder / f"{plane}.fits")
    night.candidates.rename(folder / "candidates.ecsv")
    return folder


def run(desk: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=desk, capture_output=True, text=True, timeout=60, env={**os.environ})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def enriched(desk: Path) -> Path:
    """Run the command of the first example."""
    text = next(block for block in blocks("console") if "stampworker enrich" in block).replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "stampworker enrich" in line)
    words = shlex.split(line.removeprefix("$ "))
    assert words[0] == "stampworker"
    assert "12 packets" in run(desk, sys.executable, "-m", *words)
    return desk


@pytest.mark.slow
def test_command_for_three_images_and_a_list(enriched: Path) -> None:
    """The packets and the table are there, with a fit."""
    table = Table.read(enriched / "out.ecsv")
    assert len(table) == 12
    assert len(list((enriched / "out").glob("*.avro"))) == 12
    assert sum(status in ("ok", "at_bound") for status in table["adjust_status"]) > 6


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_examples(enriched: Path, number: int) -> None:
    """Each example runs as written, and the packet's does without stampworker."""
    code = blocks("python")[number]
    printed = run(enriched, sys.executable, "-c", code)
    assert printed.strip()
    if "import stampworker" not in code:
        assert "stampworker" not in code
        assert "(63, 63) SCIENCE" in printed.upper()


def test_alert_example_is_an_alert() -> None:
    """The JSON example is accepted."""
    from stampworker.formats.alerts import decode

    (text,) = blocks("json")
    assert decode(text.encode()).frames["science"] == "night/science.fits"


def test_resolver_example_fills_its_templates(tmp_path: Path) -> None:
    """The TOML example is a configuration, and its templates are filled."""
    from stampworker import Alert, load_resolver
    from stampworker.config import load

    (text,) = (block for block in blocks("toml") if "[resolve]" in block)
    (tmp_path / "s.toml").write_text(text, encoding="utf-8")
    alert = Alert("a", mjd=61368.06, extra={"visit": 4711, "ccd": 7})
    assert load_resolver(load(tmp_path / "s.toml").resolve).frames(alert) == {
        "science": "nights/20261124/4711-07.fits.fz",
        "difference": "nights/20261124/4711-07_diff.fits.fz#1",
    }


@pytest.mark.slow
def test_every_command_and_target_named_exists() -> None:
    """Commands of the README are the command line's, and make targets the Makefile's."""
    text = README.read_text(encoding="utf-8")
    usage = run(README.parent, sys.executable, "-m", "stampworker", "--help")
    for command in set(re.findall(r"^\$ stampworker (\w+)", text, re.M)):
        assert re.search(rf"^    {command} ", usage, re.M), command
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"(?:^\$|`)\s*make ([a-z-]+)", text, re.M)):
        assert re.search(rf"^{target}:", makefile, re.M), target
