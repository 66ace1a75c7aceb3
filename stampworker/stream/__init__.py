"""Kafka: a worker reads alerts, publishes packets and commits, exactly once."""
