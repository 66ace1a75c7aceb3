"""What the worker's tests need: alerts to send, their topics, and what must come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from servers.kafka_broker import KafkaBroker, Record

from stampworker.config import Settings, load
from stampworker.enrich import Enricher
from stampworker.formats.alerts import Alert, encode
from stampworker.formats.packets import Packet
from stampworker.formats.packets import encode as encode_packet
from stampworker.frames import FrameStore


@dataclass(frozen=True)
class Chain:
    """Three topics, a group and the alerts sent to the first."""

    broker: KafkaBroker
    alerts: Sequence[Alert]
    roots: Sequence[Path | str]
    input: str
    packets: str
    rejects: str

    @property
    def group(self) -> str:
        """Consumer group of its workers."""
        return f"group-{self.input}"

    def options(self, **more: object) -> dict[str, object]:
        """Return settings of a worker: ``section.key`` → value; names in ``more`` have ``__`` for the dot."""
        return {
            "kafka.bootstrap.servers": self.broker.address,
            "kafka.session.timeout.ms": "6000",
            "kafka.heartbeat.interval.ms": "500",
            "kafka.topic.metadata.refresh.interval.ms": "1000",
            "worker.input_topic": self.input,
            "worker.packet_topic": self.packets,
            "worker.reject_topic": self.rejects,
            "worker.group": self.group,
            "worker.slot": 0,
            "worker.batch_count": 10,
            "worker.batch_s": 0.2,
            "frames.frame_roots": ",".join(str(root) for root in self.roots),
            "enrich.radius": 9,
            **{name.replace("__", "."): value for name, value in more.items()},
        }

    def settings(self, **more: object) -> Settings:
        """Return the same, checked."""
        return load(flags=self.options(**more))

    def send(self) -> None:
        """Publish the alerts."""
        self.broker.produce(self.input, [Record(encode(alert), alert.key.encode()) for alert in self.alerts])

    def expected(self) -> dict[str, bytes]:
        """Return what `enrich` makes of the alerts, by alertId."""
        settings = self.settings()
        with FrameStore(settings.frames) as store:
            made = Enricher(settings, store).packets(self.alerts)
        assert all(isinstance(packet, Packet) for packet in made), [m for m in made if not isinstance(m, Packet)][:3]
        return {packet.alert_id: encode_packet(packet) for packet in made if isinstance(packet, Packet)}

    def check(self, topic: str | None = None) -> list[Record]:
        """Each alert is in the packets' topic once, with the bytes that `enrich` makes; return the records."""
        records = self.broker.read_all(topic or self.packets)
        by_id = [(Packet.read(record.value or b"").alert_id, record) for record in records]
        counts = Counter(alert_id for alert_id, _ in by_id)
        missing = {alert.alert_id for alert in self.alerts} - counts.keys()
        doubled = {alert_id: n for alert_id, n in counts.items() if n > 1}
        assert (missing, doubled) == (set(), {}), f"lost {sorted(missing)[:5]}, doubled {doubled}"
        expected = self.expected()
        assert counts.keys() == expected.keys()
        differ = [alert_id for alert_id, record in by_id if record.value != expected[alert_id]]
        assert differ == []
        return records


MakeChain = Callable[..., Chain]
