"""Real servers for tests: a Docker engine, Kafka, nginx, buckets."""
