"""Rejects."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reject:
    """An alert that cannot become a packet.

    Attributes
    ----------
    alert_id : str or None
        The alert's identifier; None where it could not be decoded.
    stage : str
        ``decode``, ``frames`` or ``enrich``.
    error : Exception
        Why.
    """

    alert_id: str | None
    stage: str
    error: Exception

    def to_record(self) -> dict[str, Any]:
        """Return ``alertId, stage, error, message``."""
        name = type(self.error).__name__
        return {"alertId": self.alert_id, "stage": self.stage, "error": name, "message": str(self.error)}
