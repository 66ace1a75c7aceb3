"""The demo, end to end, with few candidates."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path

import pytest
from confluent_kafka import Producer
from helpers.mock_cluster import handle, library

from stampworker.config import Settings
from stampworker.errors import ConfigError
from stampworker.formats import files
from stampworker.formats.alerts import Alert, encode
from stampworker.formats.packets import Packet
from stampworker.simulation import demo
from stampworker.simulation.night import simulate
from stampworker.stream.kafka import Record, publish_all

METADATA = 3  # the kind of request


@pytest.mark.slow
def test_demo_shows_each_candidate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every candidate comes back as a packet, in the table and in the picture; a second demo replaces the first."""
    folder = tmp_path / "demo"
    demo._clear_folder(folder)
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


@pytest.mark.slow
def test_slow_metadata_does_not_disturb_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker gets its partitions although the embedded broker takes 0.4 s for each answer about metadata.

    An answer that arrives while the group forms makes the worker join again and wait 44 s. With answers this slow and
    a refresh every 0.5 s that happens every time.
    """
    monkeypatch.setattr(demo, "_STALL_S", 30.0)
    night = simulate(tmp_path / "night", candidates=1, seed=2, progress=False)
    (alert,) = files.read_alerts(night.alerts)[0]
    assert isinstance(alert, Alert)
    broker = Producer({"bootstrap.servers": "", "test.mock.num.brokers": 1, "log_level": 0})
    settings = demo._settings(Settings(), night, demo._address(broker))
    broker.list_topics(settings.worker.packet_topic, timeout=10)
    publish_all(settings, [Record("alerts", alert.key.encode(), encode(alert))])
    delay_answers(broker, METADATA, milliseconds=400, times=100)
    assert demo._work(settings, 1).keys() == {alert.alert_id}


def delay_answers(broker: Producer, request: int, milliseconds: int, times: int) -> None:
    """Let the embedded broker wait before each of its next answers to one kind of request."""
    lib = library()
    cluster = ctypes.c_void_p(lib.rd_kafka_handle_mock_cluster(handle(broker)))
    answers = [ctypes.c_int(value) for _ in range(times) for value in (0, milliseconds)]  # pairs of error and delay
    push = lib.rd_kafka_mock_broker_push_request_error_rtts
    assert push(cluster, ctypes.c_int32(1), ctypes.c_int16(request), ctypes.c_size_t(times), *answers) == 0


def test_folder_that_no_demo_made_is_refused(tmp_path: Path) -> None:
    """The demo refuses a folder with files that no demo made, and leaves the files alone."""
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(ConfigError, match="no demo made it; give another folder"):
        demo.run(tmp_path, candidates=1, seed=1, settings=Settings())
    assert (tmp_path / "mine").read_text() == "precious"


def test_file_instead_of_a_folder_is_refused(tmp_path: Path) -> None:
    """The demo refuses a path that is a file, and leaves the file alone."""
    (tmp_path / "demo").write_text("precious")
    with pytest.raises(ConfigError, match="found a file, wanted a folder"):
        demo.run(tmp_path / "demo", candidates=1, seed=1, settings=Settings())
    assert (tmp_path / "demo").read_text() == "precious"


def test_empty_folder_is_taken(tmp_path: Path) -> None:
    """The demo takes an empty folder and marks it as its own."""
    demo._clear_folder(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".stampworker-demo"]
