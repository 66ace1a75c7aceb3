"""Frames in buckets that speak S3, through obstore.

Where the bucket is and who asks is the operator's word alone (settings and environment), so an alert can choose only a
key beneath a root.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from stampworker.errors import ConfigError, FrameCorrupt, FrameError, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames.address import Address
from stampworker.frames.allowance import end_within
from stampworker.frames.remote import FIRST, Beginning, Memory, collect

if TYPE_CHECKING:
    from obstore.store import S3Store

    from stampworker.config import FrameSettings

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_ENDPOINT = re.compile(r"https?://[^/?#@\s]+/?")


class _Changed(FrameUnavailable):
    """The object is another one than when it was opened."""


class BucketClient:
    """Buckets, opened when first asked for.

    Parameters
    ----------
    settings : FrameSettings
        Endpoint, timeouts and limits.
    memory : Memory
        Where failures are remembered.

    Raises
    ------
    ConfigError
        obstore is not installed, or the endpoint is no address.
    """

    def __init__(self, settings: FrameSettings, memory: Memory) -> None:
        try:
            import obstore
        except ImportError as exc:
            raise ConfigError(
                "frames.frame_roots: an s3: root needs obstore, which is not installed: pip install 'stampworker[s3]'"
            ) from exc
        self.settings, self.memory, self._obstore = settings, memory, obstore
        self._lock = threading.Lock()
        self._buckets: dict[str, S3Store] = {}
        self._endpoint = settings.s3_endpoint or os.environ.get("AWS_ENDPOINT_URL") or os.environ.get("AWS_ENDPOINT")
        if self._endpoint and not _ENDPOINT.fullmatch(self._endpoint):
            raise ConfigError("AWS_ENDPOINT_URL: not an address, wanted https://host:port")

    def get(self, address: Address, options: dict[str, Any], limit: int) -> tuple[bytearray, int, str | None]:
        """Return what is asked for of an object, the object's size and its ETag.

        Raises
        ------
        FrameMissing
            No such bucket or key.
        FrameRefused
            More than ``limit`` bytes.
        FrameUnavailable
            Any other failure; `_Changed` where ``if_match`` does not.
        """
        key = (*address.origin, address.target)
        self.memory.check(address.shown, key, address.origin)
        end = end_within(self.settings.total_s)
        try:
            found = self._obstore.get(self._bucket(address), address.target, options=options)  # type: ignore[arg-type]
            start, stop = found.range
            if stop - start > limit:
                raise self._too_long(address, f"{stop - start} bytes, above the {limit} allowed")
            data = collect(_chunks(found), limit, lambda problem: self._too_long(address, problem), end)
            return data, found.meta["size"], found.meta["e_tag"]
        except FrameError:
            raise
        except Exception as exc:
            raise self._failure(address, exc, end) from exc

    def _bucket(self, address: Address) -> S3Store:
        from obstore.store import S3Store

        with self._lock:
            bucket = self._buckets.get(address.host)
            if bucket is None:
                settings = self.settings
                endpoint = self._endpoint
                config: dict[str, Any] = {"skip_signature": True} if settings.s3_anonymous else {}
                config |= {"endpoint": endpoint} if endpoint else {}
                config |= {"region": settings.s3_region} if settings.s3_region else {}
                bucket = self._buckets[address.host] = S3Store(
                    address.host,
                    **config,
                    client_options={
                        "connect_timeout": timedelta(seconds=settings.connect_s),
                        "read_timeout": timedelta(seconds=settings.read_s),
                        "timeout": timedelta(seconds=settings.total_s),
                        "allow_http": bool(endpoint and endpoint.startswith("http://")),
                    },
                    # A failure is told at once; whoever reads the alert again is the one that waits.
                    retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=settings.total_s)},
                )
            return bucket

    def _too_long(self, address: Address, problem: str) -> FrameRefused:
        return FrameRefused(address.shown, problem)

    def _failure(self, address: Address, exc: Exception, end: float) -> FrameError:
        """Return the error of ours that an exception of obstore's, which is a text, stands for."""
        problems = self._obstore.exceptions
        key = (*address.origin, address.target)
        said = _first_words(exc)
        if isinstance(exc, FileNotFoundError):
            missing = FrameMissing(address.shown, "no such bucket or key")
            self.memory.note(key, missing)
            return missing
        if isinstance(exc, problems.PreconditionError):
            return _Changed(address.shown, "the object is another one than when it was opened")
        # Without credentials obstore asks a cloud machine's metadata service for some, and elsewhere there is none.
        denied = isinstance(exc, problems.PermissionDeniedError | problems.UnauthenticatedError)
        nobody = "://169.254.169.254/" in said
        if denied or nobody:
            problem = (
                f"access denied ({said}); credentials come from the environment (AWS_ACCESS_KEY_ID, "
                "AWS_SECRET_ACCESS_KEY, a role), the place from frames.s3_endpoint and frames.s3_region"
            )
            log.error("%s: %s", address.shown, problem)
            error = FrameUnavailable(address.shown, problem)
            self.memory.note(address.origin if nobody else key, error)
            return error
        if "status code: 416" in said:
            return FrameCorrupt(address.shown, "the file is empty, wanted FITS")
        late = isinstance(exc, TimeoutError) or time.monotonic() >= end or "timed out" in said or "TimedOut" in said
        error = FrameUnavailable(address.shown, f"not answered in time: {said}" if late else said)
        self.memory.note(address.origin if late or "error sending request" in said else key, error)
        return error


class BucketFile:
    """One object of a bucket.

    Parameters
    ----------
    client : BucketClient
        The buckets.
    address : Address
        Beneath a root.
    """

    def __init__(self, client: BucketClient, address: Address) -> None:
        self.changed = False
        self._client, self._address = client, address
        self._tag: str | None = None
        self._size = 0

    def begin(self) -> Beginning:
        """Ask for the first bytes."""
        data, self._size, self._tag = self._client.get(self._address, {"range": (0, FIRST)}, FIRST)
        return Beginning(data, self._size)

    def range(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        return bytes(self._same({"range": (offset, offset + length)}, length))

    def whole(self) -> bytearray:
        """Return all bytes."""
        return self._same({}, self._size)

    def _same(self, options: dict[str, Any], length: int) -> bytearray:
        limit = self._client.settings.max_download_bytes
        if length > limit:
            raise FrameRefused(
                self._address.shown, f"{length} bytes at once, above the {limit} allowed (frames.max_download_bytes)"
            )
        if self._tag is not None:
            options["if_match"] = self._tag
        try:
            data, size, _ = self._client.get(self._address, options, limit)
        except _Changed:
            self.changed = True
            raise
        if size != self._size or len(data) != length:
            self.changed = True
            raise FrameUnavailable(
                self._address.shown,
                f"{len(data)} of {size} bytes, wanted {length} of {self._size}, as when it was opened",
            )
        return data


def _chunks(found: Any) -> Iterator[bytes]:
    return (bytes(chunk) for chunk in found.stream(min_chunk_size=_CHUNK))


def _first_words(exc: Exception) -> str:
    """Return the first line of a message, without the server's page and what obstore appends for debugging."""
    text = str(exc).strip().partition("\n")[0].partition("Debug source:")[0].partition("<")[0]
    return text.strip(" :")[:300] or type(exc).__name__
