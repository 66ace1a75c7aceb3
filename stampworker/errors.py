"""Every exception of stampworker.

::

    StampworkerError
    ├── AlertError              set the alert aside
    │   └── UnknownSchema       set the alert aside
    ├── ConfigError             stop, exit 2
    ├── FrameError              carries the URL
    │   ├── FrameMissing        retry while it may only be late, then set the alert aside
    │   ├── FrameRefused        outside the allowed roots, or over a limit: set the alert aside
    │   ├── FrameCorrupt        set the alert aside
    │   ├── FrameMismatch       shape or grid does not fit: set the alert aside
    │   └── FrameUnavailable    retry later
    └── PublishError
        ├── TransactionAborted  read again from the last commit
        └── ProducerFenced      stop this worker

Messages name the thing, the value found and the value wanted. Wrong arguments of a function are ``ValueError``.
"""

from __future__ import annotations


class StampworkerError(Exception):
    """Base of every error that stampworker raises on purpose."""


class AlertError(StampworkerError):
    """An alert cannot be read or lacks what is required: set it aside.

    Parameters
    ----------
    problem : str
        What was found and what was expected.
    alert_id : str, optional
        The alert's identifier, where it could be read.
    """

    def __init__(self, problem: str, alert_id: str | None = None) -> None:
        super().__init__(problem)
        self.alert_id = alert_id


class UnknownSchema(AlertError):
    """An alert in wire format names a schema id that is not known here."""


class ConfigError(StampworkerError):
    """A setting is unknown, malformed or missing: stop, exit 2."""


class FrameError(StampworkerError):
    """A frame cannot serve an alert.

    Parameters
    ----------
    url : str
        Address of the frame, without credentials.
    problem : str
        What was found and what was expected.
    """

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"{url}: {problem}")
        self.url = url
        self.problem = problem


class FrameMissing(FrameError):
    """There is no such frame, now; it may only be late."""


class FrameRefused(FrameError):
    """The frame lies outside the allowed roots or exceeds a limit."""


class FrameCorrupt(FrameError):
    """The file is not the FITS image that it should be."""


class FrameMismatch(FrameError):
    """The frame's shape or grid does not fit the science frame's."""


class FrameUnavailable(FrameError):
    """The frame could not be read for a reason that may pass."""


class BrokerUnavailable(StampworkerError):
    """No broker answers, for a reason that may pass."""


class PublishError(StampworkerError):
    """A batch could not be published."""


class TransactionAborted(PublishError):
    """The transaction was aborted: read again from the last commit.

    Parameters
    ----------
    problem : str
        Why.
    too_large : bool, optional
        The topic refused a record, or several that went together, for their size: it would refuse the same
        batch again.
    """

    def __init__(self, problem: str, *, too_large: bool = False) -> None:
        super().__init__(problem)
        self.too_large = too_large


class ProducerFenced(PublishError):
    """Another worker took this worker's transactional id: stop."""


def shown(value: object) -> str:
    """Return at most 200 characters of a value for a message, in ASCII; the value may be anything."""
    return ascii(value)[:200]


def brief(exc: BaseException) -> str:
    """Return the class and at most 200 characters of another library's error, which may quote whole schemas."""
    return f"{type(exc).__name__}: {str(exc)[:200]}"
