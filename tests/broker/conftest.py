from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers.chain import Chain, MakeChain
from helpers.worker_process import WorkerProcess
from servers.kafka_broker import KafkaBroker, find_image, sweep

from stampworker.formats.alerts import Alert
from stampworker.formats.files import read_alerts
from stampworker.simulation.night import simulate

HERE = Path(__file__).parent
TIME_LIMIT = 180
"""Seconds for a test with a broker, its start (4 s) included: a busy machine may be ten times slower."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker("broker")
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TIME_LIMIT))


@pytest.fixture(scope="session")
def broker() -> Iterator[KafkaBroker]:
    """Start a Kafka broker, once for all tests; one that kills it must start it again."""
    image = find_image()
    sweep()
    with KafkaBroker(image) as running:
        yield running


@pytest.fixture(scope="session")
def kafka(broker: KafkaBroker) -> str:
    """Return the bootstrap address of the broker."""
    return broker.address


@pytest.fixture
def topic(broker: KafkaBroker) -> Callable[..., str]:
    """Create a topic: ``topic(partitions=1, name="topic", **config)`` returns its unique name."""
    return broker.create_topic


@pytest.fixture
def start_worker(kafka: str, tmp_path: Path) -> Iterator[Callable[..., WorkerProcess]]:
    """Start a worker process: ``start_worker({"worker.group": …}, "--flag", …)``; killed at the end of the test."""
    numbers = itertools.count()
    with ExitStack() as running:

        def start(settings: Mapping[str, object], *args: str, command: str = "run") -> WorkerProcess:
            log = tmp_path / f"worker-{next(numbers)}.log"
            settings = {"kafka.bootstrap.servers": kafka, **settings}
            return running.enter_context(WorkerProcess(log, settings, *args, command=command))

        yield start


@pytest.fixture(scope="session")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Alert], list[Path]]:
    """Simulate a night; its alerts and the folder of its frames."""
    made = simulate(tmp_path_factory.mktemp("night") / "night", size=512, candidates=60, seed=3)
    alerts = [alert for alert in read_alerts(made.alerts)[0] if isinstance(alert, Alert)]
    assert len(alerts) == 60
    return alerts, [made.directory]


@pytest.fixture
def make_chain(broker: KafkaBroker, night: tuple[list[Alert], list[Path]]) -> MakeChain:
    """Make the topics of a chain and send it the night's alerts, or others."""

    def make(
        alerts: Sequence[Alert] | None = None, roots: Sequence[Path] = (), partitions: int = 3, **config: str
    ) -> Chain:
        topics = [
            broker.create_topic(partitions, "alerts"),
            broker.create_topic(2, "packets", **config),
            broker.create_topic(1, "rejects"),
        ]
        chain = Chain(broker, alerts if alerts is not None else night[0], [*roots, *night[1]], *topics)
        chain.send()
        return chain

    return make
