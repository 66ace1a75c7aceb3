"""A worker that is killed, as kill -9 does, at a call of its producer: ``dying_worker.py STEP NUMBER ARGUMENTS…``.

STEP is ``before-<method>`` or ``after-<method>`` of confluent-kafka's Producer; NUMBER counts that method's calls.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from confluent_kafka import Producer

import stampworker.stream.kafka
from stampworker.cli import main

step, number = sys.argv[1], int(sys.argv[2])
when, method = step.split("-", 1)


class DyingProducer(Producer):
    """Dies at its step."""

    calls = 0


def dying(self: Producer, *args: Any, **kwargs: Any) -> Any:
    DyingProducer.calls += 1
    if when == "before" and DyingProducer.calls == number:
        self.flush(10)  # so that the broker has what is in the open transaction
        os.kill(os.getpid(), signal.SIGKILL)
    result = getattr(Producer, method)(self, *args, **kwargs)
    if when == "after" and DyingProducer.calls == number:
        os.kill(os.getpid(), signal.SIGKILL)
    return result


setattr(DyingProducer, method, dying)
stampworker.stream.kafka.Producer = DyingProducer  # type: ignore[attr-defined]
sys.exit(main(sys.argv[3:]))
