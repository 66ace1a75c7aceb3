"""The demo, end to end, with few candidates."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from stampworker.config import Settings
from stampworker.errors import ConfigError
from stampworker.formats.packets import Packet
from stampworker.simulation import demo


@pytest.mark.slow
def test_demo_shows_each_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every candidate comes back as a packet, in the table and in the picture; a second demo replaces the first."""
    folder = tmp_path / "demo"
    demo._make_room(folder)
    (folder / "left-over").touch()
    assert demo.run(folder, candidates=6, seed=2, settings=Settings()) == 0
    out = capsys.readouterr().out
    assert "in memory, at-least-once" in out
    assert f"6 packets of 6 alerts in {folder}/packets" in out
    packets = [Packet.read_file(path) for path in (folder / "packets").iterdir()]
    assert len(packets) == 6
    for packet in packets:
        assert sum(line.startswith(packet.alert_id) for line in out.splitlines()) == 1
    assert (folder / "gallery.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder / "left-over").exists()
    assert [t.name for t in threading.enumerate() if t.name.startswith(("worker", "publish"))] == []


def test_folder_that_no_demo_made_is_refused(tmp_path: Path) -> None:
    """What lies in a folder of somebody else's stays."""
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="no demo made it; give another folder"):
        demo.run(tmp_path, candidates=1, seed=1, settings=Settings())
    assert (tmp_path / "mine").read_text() == "precious"


def test_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    """A file is no folder to write to, and stays."""
    (tmp_path / "demo").write_text("precious")
    with pytest.raises(ConfigError, match="found a file, wanted a folder"):
        demo.run(tmp_path / "demo", candidates=1, seed=1, settings=Settings())
    assert (tmp_path / "demo").read_text() == "precious"


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    """An empty folder is as good as none."""
    demo._make_room(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".stampworker-demo"]
