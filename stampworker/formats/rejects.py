"""Rejects: alerts that cannot become packets. Operators of Kafka call such a record a dead letter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reject:
    """An alert that cannot become a packet, with the reason: a dead letter.

    Attributes
    ----------
    alert_id : str or None
        The alert's identifier; None if it could not be decoded.
    stage : str
        The step that failed: ``decode``, ``frames``, ``enrich`` or ``publish``.
    error : Exception
        The reason.
    """

    alert_id: str | None
    stage: str
    error: Exception

    def to_record(self) -> dict[str, Any]:
        """Return ``alertId``, ``stage``, ``error`` (the exception's class) and ``message``."""
        name = type(self.error).__name__
        return {"alertId": self.alert_id, "stage": self.stage, "error": name, "message": str(self.error)}
