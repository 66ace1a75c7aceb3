"""Stream worker for real-time astronomical alerts.

Candidate alerts in, Avro packets with FITS stamps and the metrics of the adjusted template out.
"""

import os

# Parallel workers, not parallel linear algebra: the matrices are small, and workers share the machine. numpy reads this
# when it is loaded. A value that is set already stays.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

from importlib.metadata import version

from stampworker.config import Settings
from stampworker.enrich import Enricher, enrich_table
from stampworker.errors import (
    AlertError,
    BrokerUnavailable,
    ConfigError,
    FrameCorrupt,
    FrameError,
    FrameMismatch,
    FrameMissing,
    FrameRefused,
    FrameUnavailable,
    ProducerFenced,
    PublishError,
    StampworkerError,
    TransactionAborted,
    UnknownSchema,
)
from stampworker.formats.alerts import Alert
from stampworker.formats.packets import Packet, Stamp
from stampworker.formats.rejects import Reject
from stampworker.frames import Frame, FrameStore
from stampworker.resolve import Resolver, load_resolver
from stampworker.stream.worker import Worker

__version__ = version("stampworker")

__all__ = [
    "Alert",
    "AlertError",
    "BrokerUnavailable",
    "ConfigError",
    "Enricher",
    "Frame",
    "FrameCorrupt",
    "FrameError",
    "FrameMismatch",
    "FrameMissing",
    "FrameRefused",
    "FrameStore",
    "FrameUnavailable",
    "Packet",
    "ProducerFenced",
    "PublishError",
    "Reject",
    "Resolver",
    "Settings",
    "Stamp",
    "StampworkerError",
    "TransactionAborted",
    "UnknownSchema",
    "Worker",
    "enrich_table",
    "load_resolver",
]
