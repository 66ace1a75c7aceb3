"""Every exception of stampworker.

::

    StampworkerError
    ├── AlertError              reject the alert
    │   └── UnknownSchema       reject the alert
    ├── ConfigError             stop with exit code 2
    ├── FrameError              has the URL
    │   ├── FrameMissing        retry, because the frame may be late; then reject the alert
    │   ├── FrameRefused        outside the allowed roots, or above a limit: reject the alert
    │   ├── FrameCorrupt        reject the alert
    │   ├── FrameMismatch       shape or grid does not fit: reject the alert
    │   └── FrameUnavailable    retry later; then reject the alert
    ├── BrokerUnavailable       stop with exit code 1
    └── PublishError
        ├── TransactionAborted  read again from the last commit
        └── ProducerFenced      stop this worker

A message names the thing, the value found and the value wanted. A wrong argument of a function is a ``ValueError``.
"""

from __future__ import annotations


class StampworkerError(Exception):
    """Base of every error that stampworker raises on purpose."""


class AlertError(StampworkerError):
    """An alert cannot be read or lacks what is required: reject it.

    Parameters
    ----------
    problem : str
        What was found and what was expected.
    alert_id : str, optional
        The alert's identifier, if it could be read.
    """

    def __init__(self, problem: str, alert_id: str | None = None) -> None:
        super().__init__(problem)
        self.alert_id = alert_id


class UnknownSchema(AlertError):
    """An alert in wire format has an unknown schema id."""


class ConfigError(StampworkerError):
    """A setting is unknown, malformed or missing: stop with exit code 2."""


class FrameError(StampworkerError):
    """A frame cannot serve an alert.

    Parameters
    ----------
    url : str
        URL of the frame, without credentials.
    problem : str
        What was found and what was expected.
    """

    def __init__(self, url: str, problem: str) -> None:
        super().__init__(f"{url}: {problem}")
        self.url = url
        self.problem = problem


class FrameMissing(FrameError):
    """The frame does not exist; it may be late."""


class FrameRefused(FrameError):
    """The frame is outside the allowed roots or exceeds a limit."""


class FrameCorrupt(FrameError):
    """The file is not a FITS image that can be read."""


class FrameMismatch(FrameError):
    """The frame's shape or grid does not fit the science frame's."""


class FrameUnavailable(FrameError):
    """The frame could not be read; the reason may pass."""


class BrokerUnavailable(StampworkerError):
    """No broker answers; the reason may pass."""


class PublishError(StampworkerError):
    """A batch could not be published."""


class TransactionAborted(PublishError):
    """The transaction was aborted: read again from the last commit.

    Parameters
    ----------
    problem : str
        The reason.
    too_large : bool, optional
        The topic refused records because of their size; it would refuse the same batch again.
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
