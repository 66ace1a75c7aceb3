"""The demo: a simulated night, an embedded broker, the real worker, a table and a picture."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from astropy.table import Table
from confluent_kafka import Consumer, Producer, TopicPartition
from tqdm import tqdm

from stampworker.config import Settings
from stampworker.errors import ConfigError, PublishError
from stampworker.formats import files
from stampworker.formats.alerts import Alert, encode
from stampworker.formats.packets import Packet
from stampworker.formats.packets import encode as encode_packet
from stampworker.simulation.confusion import confusion, format_confusion, recovery
from stampworker.simulation.night import Night, simulate
from stampworker.stream.kafka import Record, check_topics, consumer, publish_all
from stampworker.stream.worker import Totals, Worker
from stampworker.viewer.picture import picture as draw

_MARK = "stampworker-demo"
_QUIET_S = 20.0
_STALL_S = 240.0  # a busy machine is slow, but a worker that runs makes progress within this time


def run(directory: Path, *, candidates: int, seed: int, settings: Settings) -> int:
    """Run the demo and print its result; return 0 if every alert came back as a packet, else 1.

    The folder gets the night, the packets and the picture; the files of an earlier demo are replaced. Raises
    ConfigError if the folder has files that no demo made, or if matplotlib is not installed, and PublishError if the
    alerts cannot be published, or if no further packet comes back within a time limit.
    """
    if importlib.util.find_spec("matplotlib") is None:  # checked before the work, not after it
        raise ConfigError("the demo draws a picture with matplotlib: pip install 'stampworker[viewer]'")
    _clear_folder(directory)
    print(f"1. simulating a survey night of {candidates} candidates in {directory}/night")
    night = simulate(directory / "night", candidates=candidates, seed=seed, progress=True)
    alerts = [alert for alert in files.read_alerts(night.alerts)[0] if isinstance(alert, Alert)]
    print("2. starting the embedded broker: Kafka's protocol in memory, at-least-once")
    # The broker ends with the client that started it.
    broker = Producer({"bootstrap.servers": "", "test.mock.num.brokers": 1, "log_level": 3})
    settings = _settings(settings, night, _address(broker))
    broker.list_topics(settings.worker.packet_topic, timeout=_QUIET_S)  # asking for a topic makes it
    print(f"3. publishing {len(alerts)} alerts to the topic 'alerts'")
    publish_all(settings, (Record("alerts", a.key.encode(), encode(a)) for a in alerts))
    print("4. running the worker until the input is drained, and reading its packets back from the topic 'packets'")
    packets = _work(settings, len(alerts))
    del broker
    return _show(directory, night, packets, len(alerts))


def _clear_folder(directory: Path) -> None:
    mark = directory / f".{_MARK}"
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory}: found a file, wanted a folder")
    if directory.exists() and any(directory.iterdir()):
        if not mark.exists():
            raise ConfigError(f"{directory} is there and not empty, and no demo made it; give another folder")
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark.touch()


def _settings(settings: Settings, night: Night, address: str) -> Settings:
    worker = settings.worker.model_copy(
        update={"guarantee": "at-least-once", "group": "demo", "batch_count": 20, "input_topic": ("alerts",)}
    )
    frames = settings.frames.model_copy(update={"frame_roots": (str(night.directory.resolve()),)})
    # The metadata refresh keeps its default of 5 minutes. A refresh that arrives while the consumer group forms makes
    # the worker join again, and the embedded broker holds that second join for 44 s (the session timeout less 1 s).
    kafka = {"bootstrap.servers": address, "log_level": "3"}
    return settings.model_copy(update={"worker": worker, "frames": frames, "kafka": kafka})


def _address(broker: Producer) -> str:
    brokers = broker.list_topics(timeout=10).brokers.values()
    return ",".join(f"{b.host}:{b.port}" for b in brokers)


def _work(settings: Settings, number: int) -> dict[str, Packet]:
    """Run the worker in a thread and read its packets meanwhile: the embedded broker keeps 5 MiB of a partition."""
    worker = Worker(settings, drained=True)
    with ThreadPoolExecutor(1, "worker") as thread:
        running = thread.submit(worker.run)
        reader = consumer(
            settings.model_copy(update={"worker": settings.worker.model_copy(update={"group": "reader"})})
        )
        try:
            packets = _read_back(reader, running, number, settings)
        finally:
            reader.close()
            worker.stop()
        running.result()
    return packets


def _read_back(reader: Consumer, running: Future[Totals], number: int, settings: Settings) -> dict[str, Packet]:
    packets: dict[str, Packet] = {}
    topic = settings.worker.packet_topic
    # No subscription, because no group is needed: this reader reads every partition from its start.
    partitions = range(check_topics(settings, [topic])[topic])
    reader.assign([TopicPartition(topic, partition, 0) for partition in partitions])
    last = time.monotonic()
    with tqdm(total=number, unit="packet", disable=None, leave=False) as bar:
        while len(packets) < number:
            message = reader.poll(0.2)
            if message is not None and message.error() is None:
                packet = Packet.read(message.value() or b"")
                packets[packet.alert_id] = packet
                bar.update()
                last = time.monotonic()
            elif running.done() and running.exception() is not None:
                break
            elif time.monotonic() - last > (limit := _QUIET_S if running.done() else _STALL_S):
                raise PublishError(f"no packet for {limit:g} s, after {len(packets)} of {number}")
    return packets


def _show(directory: Path, night: Night, packets: Mapping[str, Packet], number: int) -> int:
    truth = Table.read(night.truth, format="ascii.ecsv")
    rows = [row for row in truth if row["alertId"] in packets]
    shown = [packets[row["alertId"]] for row in rows]
    print(_table(rows, shown), end="\n\n")
    if len(packets) == number:
        results = {p.alert_id: {**p.metrics, "adjust_artefact": p.adjust_artefact} for p in packets.values()}
        print("Called artefact, by true class and S/N, beside STDWeb's thresholds alone:")
        print(format_confusion(confusion(truth, results)), end="\n\n")
        found = recovery(truth, results)
        print(f"shifts of {found['dipoles']} dipoles recovered to {found['shift']:.3f} px (median)", end=", ")
        print(f"scales of {found['scale_errors']} scale errors to {found['scale']:.4f}")
    folder = directory / "packets"
    folder.mkdir()
    for packet in packets.values():
        (folder / f"{packet.packet_id}.avro").write_bytes(encode_packet(packet))
    picture = directory / "gallery.png"
    draw(shown, picture, labels=[str(row["class"]) for row in rows])
    print(f"{len(packets)} packets of {number} alerts in {folder}; the stamps of each candidate in {picture}")
    return 0 if len(packets) == number else 1


def _table(rows: Sequence[Any], packets: Sequence[Packet]) -> str:
    """Return a table with one line per candidate: true class, fit and verdict."""
    columns = {"dx": "7.3f", "dy": "7.3f", "scale": "6.3f", "chi2_0": "9.1f", "chi2": "9.1f", "pval": "8.2g"}
    names = " ".join(f"{'p' if name == 'pval' else name:>{spec[0]}}" for name, spec in columns.items())
    head = f"{'alert':14} {'true class':17} {'S/N':>6} {names}  verdict"
    lines = [head, "-" * len(head)]
    for row, packet in zip(rows, packets, strict=True):
        values = (format(packet.metrics[f"adjust_{name}"], spec) for name, spec in columns.items())
        fit = " ".join(values) if packet.metrics else " " * len(names)
        verdict = {True: "artefact", False: "not an artefact", None: packet.adjust_status}[packet.adjust_artefact]
        lines.append(f"{packet.alert_id:14} {row['class']!s:17} {float(row['snr']):6.1f} {fit}  {verdict}")
    return "\n".join(lines)
