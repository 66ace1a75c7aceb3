"""The broker that the other tests rely on behaves as a Kafka in production does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from confluent_kafka import KafkaException
from servers.kafka_broker import KafkaBroker, Record, send


def values(records: list[Record]) -> list[bytes | None]:
    return [record.value for record in records]


def test_records_come_back_as_they_were_sent(broker: KafkaBroker, topic: Callable[..., str]) -> None:
    """Key, value, headers, partition and order survive; what was acknowledged is what is read."""
    name = topic(partitions=3)
    sent = broker.produce(
        name, [Record(b"%d" % i, b"key-%d" % (i % 5), (("n", b"%d" % i), ("n", b"again"))) for i in range(50)]
    )
    read = broker.read_all(name)
    assert sorted(read, key=lambda r: (r.partition, r.offset)) == sorted(sent, key=lambda r: (r.partition, r.offset))
    assert len({record.partition for record in read}) > 1
    assert len({(record.key, record.partition) for record in read}) == 5
    assert [r.value for r in read if r.key == b"key-3"] == [
        b"3",
        b"8",
        b"13",
        b"18",
        b"23",
        b"28",
        b"33",
        b"38",
        b"43",
        b"48",
    ]


def test_partition_can_be_chosen_and_values_may_be_bare(broker: KafkaBroker, topic: Callable[..., str]) -> None:
    """A record goes to the partition it names, and a bare value is a record without key."""
    name = topic(partitions=4)
    broker.produce(name, [Record(b"a", partition=2), Record(None, b"tombstone", partition=2)])
    broker.produce(name, [b"bare"])
    read = broker.read_all(name)
    assert [(r.key, r.value) for r in read if r.partition == 2 and r.value != b"bare"] == [
        (None, b"a"),
        (b"tombstone", None),
    ]
    assert [r.key for r in read if r.value == b"bare"] == [None]


def test_transaction_is_invisible_until_its_commit(broker: KafkaBroker, topic: Callable[..., str]) -> None:
    """A read_committed reader sees records of a transaction from its commit on, and none before."""
    name = topic()
    with broker.transaction(f"{name}-writer") as producer:
        send(producer, name, Record(b"one"))
        send(producer, name, Record(b"two"))
        producer.flush(30)
        assert values(broker.read_all(name)) == []
        assert values(broker.read_all(name, isolation="read_uncommitted")) == [b"one", b"two"]
        producer.commit_transaction(30)
    assert values(broker.read_all(name)) == [b"one", b"two"]


def test_aborted_records_stay_hidden(broker: KafkaBroker, topic: Callable[..., str]) -> None:
    """A read_committed reader never sees what was aborted, and the commit after it is seen."""
    name = topic()
    with broker.transaction(f"{name}-writer") as producer:
        send(producer, name, Record(b"aborted"))
        producer.flush(30)
        producer.abort_transaction(30)
        producer.begin_transaction()
        send(producer, name, Record(b"committed"))
        producer.commit_transaction(30)
    assert values(broker.read_all(name)) == [b"committed"]
    assert values(broker.read_all(name, isolation="read_uncommitted")) == [b"aborted", b"committed"]


def test_second_producer_of_one_transactional_id_fences_the_first(
    broker: KafkaBroker, topic: Callable[..., str]
) -> None:
    """Of two producers with one transactional id the younger works, and the elder's commit fails for good."""
    name = topic()
    with broker.transaction(f"{name}-writer") as elder:
        send(elder, name, Record(b"elder"))
        elder.flush(30)
        with broker.transaction(f"{name}-writer") as younger:
            send(younger, name, Record(b"younger"))
            with pytest.raises(KafkaException, match="_FENCED"):
                elder.commit_transaction(30)
            younger.commit_transaction(30)
    assert values(broker.read_all(name)) == [b"younger"]


def test_unknown_topic_is_an_error(broker: KafkaBroker) -> None:
    """A misspelt topic is refused instead of created."""
    with pytest.raises(KafkaException, match="UNKNOWN_TOPIC"):
        broker.produce("no-such-topic", [b"x"])


def test_killed_broker_comes_back_with_its_port_and_data(broker: KafkaBroker, topic: Callable[..., str]) -> None:
    """After kill -9 and a start the same address serves the records that were acknowledged before."""
    name, before = topic(), broker.address
    broker.produce(name, [b"%d" % i for i in range(100)])
    broker.kill()
    broker.start_again()
    assert broker.address == before
    assert values(broker.read_all(name)) == [b"%d" % i for i in range(100)]
    broker.produce(name, [b"after"])
    assert values(broker.read_all(name))[-1] == b"after"
