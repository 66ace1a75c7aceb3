"""Kafka.

``worker`` has the exactly-once loop, ``intake`` reads batches and rewinds, ``outcomes`` says what an alert becomes,
``kafka`` builds the clients and publishes a batch in one transaction, ``replay`` runs a retained topic again.
"""
