from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import pytest
from kafka_broker import KafkaBroker, find_image, sweep
from worker_process import WorkerProcess

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
