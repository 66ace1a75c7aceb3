"""librdkafka's mock cluster, for tests of the loop's shape that need no broker: in memory, and no proof of anything.

What Python's client does not offer is called through the client's own library.
"""

from __future__ import annotations

import ctypes
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, Message, Producer, TopicPartition

PRODUCE = 0
INIT_PRODUCER_ID = 22
PARTITIONS = 4
TOPIC, VALUE, MSGFLAGS, HEADERS = 1, 4, 7, 10  # kinds of arguments of rd_kafka_producev
COPY = 2


def library() -> ctypes.CDLL:
    """Return the librdkafka that the client has loaded; skips where it is linked in some other way."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    found = next((line.split()[-1] for line in lines if "librdkafka" in line), None)
    if found is None:
        pytest.skip("the client's library is not a file of its own here")
    lib = ctypes.CDLL(found)
    lib.rd_kafka_handle_mock_cluster.restype = ctypes.c_void_p
    return lib


def handle(client: Any) -> ctypes.c_void_p:
    """Return the client's handle in the library: the first member behind the head of a Python object."""
    return ctypes.c_void_p(ctypes.c_void_p.from_address(id(client) + object.__basicsize__).value)


def make_fatal(client: Any, code: int = KafkaError.FENCED_INSTANCE_ID) -> None:
    """Give a client a fatal error, as a broker would."""
    library().rd_kafka_test_fatal_error(handle(client), ctypes.c_int(code), b"injected")


class MockCluster:
    """One broker in this process, whose groups form at once."""

    def __init__(self) -> None:
        self._owner = Producer({"bootstrap.servers": "", "test.mock.num.brokers": 1, "log_level": 0})
        brokers = self._owner.list_topics(timeout=10).brokers.values()
        self.address = ",".join(f"{b.host}:{b.port}" for b in brokers)
        self._library = library()
        self._cluster = ctypes.c_void_p(self._library.rd_kafka_handle_mock_cluster(handle(self._owner)))
        self._library.rd_kafka_mock_group_initial_rebalance_delay_ms(self._cluster, ctypes.c_int32(0))

    def topic(self, name: str = "topic") -> str:
        """Make a topic of four partitions and return its unique name."""
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        self._owner.list_topics(unique, timeout=10)  # asking for a topic makes it
        return unique

    def fail_next(self, request: int, code: int, times: int = 1) -> None:
        """Answer the next requests of a kind by an error."""
        errors = (ctypes.c_int * times)(*[code] * times)
        push = self._library.rd_kafka_mock_push_request_errors_array
        push(self._cluster, ctypes.c_int16(request), ctypes.c_size_t(times), errors)

    def produce(self, topic: str, values: Iterable[bytes], partition: int = 0, headers: Any = None) -> None:
        """Send records, each acknowledged."""
        producer = Producer({"bootstrap.servers": self.address, "log_level": 0})
        for value in values:
            producer.produce(topic, value, b"key", partition=partition, headers=headers)
        assert producer.flush(10) == 0

    def produce_with_header(self, topic: str, value: bytes, name: bytes) -> None:
        """Send a record with a header whose name need not be text."""
        producer = Producer({"bootstrap.servers": self.address, "log_level": 0})
        lib = self._library
        lib.rd_kafka_headers_new.restype = ctypes.c_void_p
        headers = ctypes.c_void_p(lib.rd_kafka_headers_new(ctypes.c_size_t(1)))
        lib.rd_kafka_header_add(headers, name, ctypes.c_ssize_t(len(name)), b"value", ctypes.c_ssize_t(5))
        # Pairs of what follows and itself, to an end of 0.
        what = (TOPIC, topic.encode(), VALUE, ctypes.c_char_p(value), ctypes.c_size_t(len(value)))
        assert lib.rd_kafka_producev(handle(producer), *what, MSGFLAGS, COPY, HEADERS, headers, 0) == 0
        assert producer.flush(10) == 0

    def committed(self, group: str, topic: str) -> int:
        """Return a group's committed offset of the topic's first partition; -1001 where there is none."""
        reader = Consumer({"bootstrap.servers": self.address, "group.id": group, "log_level": 0})
        found = reader.committed([TopicPartition(topic, 0)], timeout=10)[0].offset
        reader.close()
        return int(found)

    def read(self, topic: str, number: int) -> list[Message]:
        """Read a topic until there are so many records, and then for a moment more."""
        reader = Consumer({"bootstrap.servers": self.address, "group.id": uuid.uuid4().hex, "log_level": 0})
        assignment = reader.list_topics(topic, timeout=10).topics[topic].partitions
        reader.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in assignment])
        found: list[Message] = []
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            message = reader.poll(0.2)
            if message is not None and message.error() is None:
                found.append(message)
            elif message is None and len(found) >= number:
                break
        reader.close()
        return found
