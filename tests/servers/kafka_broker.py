"""A real Kafka broker in a container, and plain ways to put records in and read them back."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import docker
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

LABEL = "stampworker-test"
HERE = Path(__file__).parent
EXTERNAL = 19092


@dataclass(frozen=True)
class Record:
    """A Kafka record: what a test sends, and what it reads back (then with the last four fields)."""

    value: bytes | None = None
    key: bytes | None = None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None
    offset: int | None = None
    timestamp: int | None = None
    topic: str | None = None


class KafkaBroker(DockerContainer):
    """One broker that is its own controller, with the settings that transactions need on a single broker.

    Its port on the host is picked beforehand, so that the advertised listener is known before the start and stays the
    same when the container is started again.
    """

    def __init__(self, image: str) -> None:
        # Ryuk, testcontainers' own sweeper, needs an image that can't always be pulled; `sweep` does its work by label.
        testcontainers_config.ryuk_disabled = True
        super().__init__(image)
        self.port = free_port()
        self.ports[str(EXTERNAL)] = ("127.0.0.1", self.port)  # type: ignore[assignment]
        self.with_kwargs(labels={LABEL: owner()})
        self.with_envs(
            KAFKA_NODE_ID="1",
            KAFKA_PROCESS_ROLES="broker,controller",
            KAFKA_CONTROLLER_QUORUM_VOTERS="1@localhost:9093",
            KAFKA_LISTENERS=f"INTERNAL://:9092,CONTROLLER://:9093,EXTERNAL://:{EXTERNAL}",
            KAFKA_ADVERTISED_LISTENERS=f"INTERNAL://localhost:9092,EXTERNAL://{self.address}",
            KAFKA_LISTENER_SECURITY_PROTOCOL_MAP="INTERNAL:PLAINTEXT,CONTROLLER:PLAINTEXT,EXTERNAL:PLAINTEXT",
            KAFKA_INTER_BROKER_LISTENER_NAME="INTERNAL",
            KAFKA_CONTROLLER_LISTENER_NAMES="CONTROLLER",
            # With their defaults (3, 2) a single broker never makes these topics, and init_transactions times out.
            KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR="1",
            KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR="1",
            KAFKA_TRANSACTION_STATE_LOG_MIN_ISR="1",
            KAFKA_SHARE_COORDINATOR_STATE_TOPIC_REPLICATION_FACTOR="1",
            KAFKA_SHARE_COORDINATOR_STATE_TOPIC_MIN_ISR="1",
            # Fewer partitions make start and recovery fast.
            KAFKA_OFFSETS_TOPIC_NUM_PARTITIONS="8",
            KAFKA_TRANSACTION_STATE_LOG_NUM_PARTITIONS="8",
            KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS="0",
            # Sessions as short as a test asks for (the default minimum is 6 s), and timed-out transactions ended soon.
            KAFKA_GROUP_MIN_SESSION_TIMEOUT_MS="1000",
            KAFKA_TRANSACTION_ABORT_TIMED_OUT_TRANSACTION_CLEANUP_INTERVAL_MS="1000",
            # A broker that was killed may not register again before its old session has ended (9 s by default).
            KAFKA_BROKER_SESSION_TIMEOUT_MS="6000",
            KAFKA_BROKER_HEARTBEAT_INTERVAL_MS="1000",
            # A misspelt topic is an error, not a new topic.
            KAFKA_AUTO_CREATE_TOPICS_ENABLE="false",
        )

    @property
    def address(self) -> str:
        """Bootstrap address, as seen from this machine."""
        return f"127.0.0.1:{self.port}"

    def start(self) -> KafkaBroker:
        """Start the container and wait until the broker answers."""
        super().start()
        self.wait_ready()
        return self

    def kill(self) -> None:
        """Kill the broker as kill -9 does; its data stay."""
        self.get_wrapped_container().kill()

    def start_again(self) -> None:
        """Start the killed broker: same port, same data."""
        self.get_wrapped_container().start()
        self.wait_ready()

    def wait_ready(self, timeout: float = 150) -> None:
        """Wait until the broker answers for itself; on failure the error carries the end of its log."""
        deadline = time.monotonic() + timeout
        admin = AdminClient({"bootstrap.servers": self.address, "log_level": "0"})
        while time.monotonic() < deadline:
            self.reload()
            if self.status == "exited":
                break
            # Where no broker answers yet, this has waited for a second.
            with suppress(KafkaException):
                if admin.list_topics(timeout=1).brokers:
                    return
        raise RuntimeError(f"Kafka is {self.status} and does not answer at {self.address}:\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """Return the end of the broker's log."""
        return str(self.get_wrapped_container().logs(tail=lines), errors="replace")

    def create_topic(self, partitions: int = 1, name: str = "topic", **config: str) -> str:
        """Create a topic of its own name (``name`` and something unique) and return that name."""
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        admin = AdminClient({"bootstrap.servers": self.address})
        new = NewTopic(unique, num_partitions=partitions, replication_factor=1, config=config)
        admin.create_topics([new])[unique].result(30)
        deadline = time.monotonic() + 30
        while len(admin.list_topics(topic=unique, timeout=10).topics[unique].partitions) < partitions:
            assert time.monotonic() < deadline, f"{unique} is not there after 30 s"
            time.sleep(0.05)
        return unique

    def produce(self, topic: str, records: Iterable[Record | bytes]) -> list[Record]:
        """Send records (or bare values), each acknowledged, and return them with partition and offset."""
        settings = {"enable.idempotence": True, "linger.ms": 5, "topic.metadata.propagation.max.ms": 2000}
        producer = Producer({"bootstrap.servers": self.address, **settings})
        sent: list[Record] = []
        for item in records:
            record = Record(item) if isinstance(item, bytes) else item
            send(producer, topic, record, sent)
        assert producer.flush(30) == 0, f"records to {topic} are not acknowledged after 30 s"
        producer.close()
        return sent

    @contextmanager
    def transaction(self, transactional_id: str) -> Iterator[Producer]:
        """Give a producer inside a begun transaction, for the caller to commit or abort."""
        producer = Producer({"bootstrap.servers": self.address, "transactional.id": transactional_id})
        producer.init_transactions(30)
        producer.begin_transaction()
        yield producer

    def read_all(self, topic: str, isolation: str = "read_committed", timeout: float = 30) -> list[Record]:
        """Read every partition of a topic from its first to its end, as a reader of this isolation sees it.

        The end is where the broker says so (EOF events): under ``read_committed`` that is before the first transaction
        still open. Records come in the order of each partition.
        """
        consumer = Consumer(
            {
                "bootstrap.servers": self.address,
                "group.id": f"reader-{uuid.uuid4().hex}",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": isolation,
            }
        )
        try:
            left = set(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
            consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in left])
            records = []
            deadline = time.monotonic() + timeout
            while left:
                assert time.monotonic() < deadline, f"no end of {topic}, partitions {left}, in {timeout} s"
                message = consumer.poll(0.2)
                if message is None:
                    continue
                error = message.error()
                if error is None:
                    records.append(as_record(message))
                elif error.code() == KafkaError._PARTITION_EOF:
                    left.discard(message.partition())
                else:
                    raise KafkaException(error)
            return records
        finally:
            consumer.close()

    def committed(self, group: str, topic: str) -> dict[int, int]:
        """Return a group's committed offsets of a topic, per partition; -1001 where there is none."""
        consumer = Consumer({"bootstrap.servers": self.address, "group.id": group, "enable.auto.commit": False})
        try:
            partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
            found = consumer.committed([TopicPartition(topic, p) for p in partitions], timeout=10)
            return {tp.partition: tp.offset for tp in found}
        finally:
            consumer.close()


def send(producer: Producer, topic: str, record: Record, sent: list[Record] | None = None) -> None:
    """Queue one record; once it is acknowledged it is appended to ``sent``, and a delivery error is raised."""

    def delivered(error: Any, message: Message) -> None:
        if error is not None:
            raise KafkaException(error)
        if sent is not None:
            sent.append(replace(as_record(message), headers=record.headers))

    where: dict[str, Any] = {} if record.partition is None else {"partition": record.partition}
    producer.produce(topic, record.value, record.key, on_delivery=delivered, headers=list(record.headers), **where)
    producer.poll(0)


def as_record(message: Message) -> Record:
    """Return a message that was read, or acknowledged, as a record."""
    headers: Any = message.headers() or ()
    return Record(
        value=message.value(),
        key=message.key(),
        headers=tuple(headers),
        partition=message.partition(),
        offset=message.offset(),
        timestamp=message.timestamp()[1],
        topic=message.topic(),
    )


def find_image() -> str:
    """Return the name of the Kafka image that is here; fails, saying what to do, where there is no engine or image.

    Neither is installed from within the tests: `make test` does that, in sight.
    """
    if shutil.which("docker") is None or subprocess.run(["docker", "info"], capture_output=True).returncode != 0:
        pytest.fail(
            "no Docker engine answers. Run: deploy/engine.sh && tests/servers/kafka/image.sh (or: make test)", False
        )
    found = subprocess.run([HERE / "kafka/image.sh", "--find"], capture_output=True, text=True)
    if found.returncode != 0:
        pytest.fail(found.stderr.strip(), pytrace=False)
    return found.stdout.strip()


def owner() -> str:
    """Name this test run, for the label of its containers."""
    return f"{socket.gethostname()}/{os.getpid()}"


def sweep() -> None:
    """Remove the containers of test runs on this machine that ended without doing so (killed, say)."""
    client = docker.from_env()
    try:
        for container in client.containers.list(all=True, filters={"label": LABEL}):
            host, _, pid = container.labels[LABEL].rpartition("/")
            if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
                container.remove(force=True, v=True)
    finally:
        client.close()


def free_port() -> int:
    """Return a port of the loopback address that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
