"""Frames in buckets (S3 and what speaks it, Google's, Azure's), through obstore.

Settings and environment alone say where a bucket is and which credentials are used; an alert can choose only a key
beneath a root. What is not set here obstore takes from the environment variables that each vendor's own tools know.
An endpoint that the operator named is trusted: obstore follows its redirects, over TLS never to plain HTTP.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from stampworker.errors import ConfigError, FrameError, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames.io.failures import FailureCache
from stampworker.frames.io.ranges import FIRST_BYTES, FirstRead, check_length, collect
from stampworker.frames.limits import end_within
from stampworker.frames.urls import BUCKETS, FrameURL

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from stampworker.config import FrameSettings

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
# An operator who forgot the credentials is to be told where they come from. obstore asks a cloud machine's metadata
# service for them, elsewhere nobody answers, and only the message shows that it was this that failed.
_NO_CREDENTIALS = re.compile(r"//169\.254\.|/latest/(?:api/token|meta-data/)|performing token request")
# A server that cannot be connected to is not asked for other frames (frames.failure_ttl_s). That it was the connection
# that failed, obstore says only in what it appends for debugging.
_DOWN = re.compile(r"ConnectError\(|kind: Connect\b")
_ENDPOINT = re.compile(r"https?://[^?#@\s]+")


@dataclass(frozen=True)
class _Vendor:
    """What differs between vendors: obstore's class and name of the endpoint, and where an operator looks."""

    store: str
    endpoint: str
    environment: tuple[str, ...]
    credentials: str
    location: str


_VENDORS = {
    "s3": _Vendor(
        "S3Store",
        "endpoint",
        ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a role",
        "frames.s3_endpoint and frames.s3_region",
    ),
    "gs": _Vendor(
        "GCSStore",
        "base_url",
        ("GOOGLE_BASE_URL",),
        "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, a machine's account",
        "frames.gs_endpoint",
    ),
    "abfs": _Vendor(
        "AzureStore",
        "endpoint",
        ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, an identity",
        "frames.abfs_account and frames.abfs_endpoint",
    ),
}


class _Changed(FrameUnavailable):
    """The object is another one than when it was opened."""


class _BeyondEnd(FrameUnavailable):
    """The object has no byte of the range."""


class BucketClient:
    """The buckets of the roots.

    Parameters
    ----------
    settings : FrameSettings
        Endpoints, timeouts and limits.
    roots : sequence of FrameURL
        Roots of other schemes than `BUCKETS` are passed over.
    failures : FailureCache
        Where failures are remembered.

    Raises
    ------
    ConfigError
        obstore is not installed, an endpoint is no address, an account is missing, credentials cannot be read.
    """

    def __init__(self, settings: FrameSettings, roots: Sequence[FrameURL], failures: FailureCache) -> None:
        self.settings, self.failures = settings, failures
        self._buckets = {root.origin: self._open(root) for root in roots if root.scheme in BUCKETS}

    def get(self, frame_url: FrameURL, options: dict[str, Any], limit: int) -> tuple[bytearray, int, str | None]:
        """Return what is asked for of an object, the object's size and its ETag.

        Raises
        ------
        FrameMissing
            No such bucket or key.
        FrameRefused
            More than ``limit`` bytes.
        FrameUnavailable
            Any other failure; `_Changed` where ``if_match`` does not, `_BeyondEnd` where the range does not.
        """
        import obstore

        self.failures.check(frame_url.display_url, frame_url.key, frame_url.origin)
        since, end = time.monotonic(), end_within(self.settings.total_s)
        try:
            found = obstore.get(self._buckets[frame_url.origin], frame_url.target, options=options)  # type: ignore[arg-type]
            start, stop = found.range
            if stop - start > limit:
                raise FrameRefused(frame_url.display_url, f"{stop - start} bytes, above the {limit} allowed")
            chunks = map(bytes, found.stream(min_chunk_size=_CHUNK))
            data = collect(chunks, limit, frame_url.display_url, end)
            self.failures.note_answer(frame_url.origin)
            return data, found.meta["size"], found.meta["e_tag"]
        except FrameError:
            raise
        except Exception as exc:
            raise self._failure(frame_url, exc, since) from exc

    def size(self, frame_url: FrameURL) -> int:
        """Return the size of an object; errors as of `get`."""
        import obstore

        since = time.monotonic()
        try:
            return obstore.head(self._buckets[frame_url.origin], frame_url.target)["size"]
        except Exception as exc:
            raise self._failure(frame_url, exc, since) from exc

    def _open(self, root: FrameURL) -> ObjectStore:
        try:
            import obstore.store
        except ImportError as exc:
            raise ConfigError(
                f"frames.frame_roots: {root.display_url} needs obstore, which is not installed: "
                f"pip install 'stampworker[{root.scheme}]'"
            ) from exc
        vendor, endpoint = _VENDORS[root.scheme], self._endpoint(root.scheme)
        config: dict[str, Any] = {
            vendor.endpoint: endpoint,
            "region": self.settings.s3_region if root.scheme == "s3" else None,
            "account_name": self.settings.abfs_account if root.scheme == "abfs" else None,
            "skip_signature": getattr(self.settings, f"{root.scheme}_anonymous") or None,
        }
        try:
            opened: ObjectStore = getattr(obstore.store, vendor.store)(
                root.host,
                **{name: value for name, value in config.items() if value is not None},
                client_options={
                    "connect_timeout": timedelta(seconds=self.settings.connect_s),
                    "read_timeout": timedelta(seconds=self.settings.read_s),
                    "timeout": timedelta(seconds=self.settings.total_s),
                    "allow_http": bool(endpoint and endpoint.startswith("http://")),
                },
                # No retries here: the worker's retry topic does the waiting.
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=self.settings.total_s)},
            )
        except Exception as exc:
            raise ConfigError(f"frames.frame_roots: {root.display_url}: {_first_words(exc)}; {_hint(root)}") from exc
        return opened

    def _endpoint(self, scheme: str) -> str | None:
        names = _VENDORS[scheme].environment
        given: str | None = getattr(self.settings, f"{scheme}_endpoint")
        endpoint = given or next(filter(None, map(os.environ.get, names)), None)
        if endpoint and not _ENDPOINT.fullmatch(endpoint):
            raise ConfigError(f"{names[0]}: not an address, wanted https://host:port")
        return endpoint

    def _failure(self, frame_url: FrameURL, exc: Exception, since: float) -> FrameError:
        """Return the frame's error for one of obstore's, and remember it."""
        from obstore import exceptions as problems

        said, waited = _first_words(exc), time.monotonic() - since
        if isinstance(exc, FileNotFoundError):
            missing = FrameMissing(frame_url.display_url, "no such bucket or key")
            self.failures.note_answer(frame_url.origin)
            self.failures.note(frame_url.key, missing)
            return missing
        if isinstance(exc, problems.PreconditionError):
            return _Changed(frame_url.display_url, "the object is another one than when it was opened")
        no_credentials = _NO_CREDENTIALS.search(said) is not None
        if no_credentials or isinstance(exc, problems.PermissionDeniedError | problems.UnauthenticatedError):
            problem = f"access denied ({said}); {_hint(frame_url)}"
            log.error("%s: %s", frame_url.display_url, problem)
            error = FrameUnavailable(frame_url.display_url, problem)
            self.failures.note(frame_url.origin if no_credentials else frame_url.key, error)
            return error
        if "status code: 416" in said:
            return _BeyondEnd(frame_url.display_url, f"no byte of the range: {said}")
        if waited < min(self.settings.connect_s, self.settings.read_s, self.settings.total_s):
            error = FrameUnavailable(frame_url.display_url, said)
            self.failures.note(frame_url.origin if _DOWN.search(str(exc)) else frame_url.key, error)
            return error
        # obstore has one exception for a wait in vain and for an answer that says no. The clock tells them apart.
        error = FrameUnavailable(frame_url.display_url, f"not answered in {waited:.1f} s: {said}")
        self.failures.note_late(frame_url.origin, frame_url.key, error, since)
        return error


class BucketFile:
    """One object of a bucket.

    Parameters
    ----------
    client : BucketClient
        The buckets.
    frame_url : FrameURL
        Beneath a root.
    """

    def __init__(self, client: BucketClient, frame_url: FrameURL) -> None:
        self.changed = False
        self._client, self._frame_url = client, frame_url
        self._tag: str | None = None
        self._size = 0

    def open(self) -> FirstRead:
        """Ask for the first bytes."""
        try:
            data, self._size, self._tag = self._client.get(self._frame_url, {"range": (0, FIRST_BYTES)}, FIRST_BYTES)
        except _BeyondEnd:
            if self._client.size(self._frame_url) > 0:
                raise
            return FirstRead(bytearray(), 0)
        return FirstRead(data, self._size)

    def read_range(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        return bytes(self._same({"range": (offset, offset + length)}, length))

    def read_all(self) -> bytearray:
        """Return all bytes."""
        return self._same({}, self._size)

    def _same(self, options: dict[str, Any], length: int) -> bytearray:
        limit = self._client.settings.max_download_bytes
        check_length(self._frame_url.display_url, length, limit)
        if self._tag is not None:
            options["if_match"] = self._tag
        try:
            data, size, tag = self._client.get(self._frame_url, options, limit)
        except (_Changed, _BeyondEnd):
            self.changed = True
            raise
        if self._tag and tag and tag != self._tag:  # a server that ignores the condition
            self.changed = True
            raise _Changed(self._frame_url.display_url, "the object is another one than when it was opened")
        if size != self._size or len(data) != length:
            self.changed = True
            raise FrameUnavailable(
                self._frame_url.display_url,
                f"{len(data)} of {size} bytes, wanted {length} of {self._size}, as when it was opened",
            )
        return data


def _hint(frame_url: FrameURL) -> str:
    """Return where an operator looks when a bucket does not open."""
    vendor = _VENDORS[frame_url.scheme]
    return f"credentials come from the environment ({vendor.credentials}), the bucket's location from {vendor.location}"


def _first_words(exc: Exception) -> str:
    """Return the first line of a message, without the server's page and what obstore appends for debugging."""
    text = str(exc).strip().partition("\n")[0].partition("Debug source:")[0].partition("<")[0]
    return text.strip(" :")[:300] or type(exc).__name__
