"""Frames in buckets (S3 and what speaks it, Google's, Azure's), through obstore.

Settings and environment alone say where a bucket is and which credentials are used; an alert can choose only a key
beneath a root. What is not set here obstore takes from the environment variables that each vendor's own tools know.
An endpoint that the operator named is trusted: obstore follows its redirects, over TLS never to plain HTTP.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Sequence
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
# The message for missing credentials says where they come from. Without any, obstore asks a cloud machine's metadata
# service; elsewhere nobody answers, and only the text of the error shows that this request failed.
_NO_CREDENTIALS = re.compile(r"//169\.254\.|/latest/(?:api/token|meta-data/)|performing token request")
# A server that cannot be connected to is not asked for other frames (frames.failure_ttl_s). obstore says only in what
# it appends for debugging that the connection failed.
_DOWN = re.compile(r"ConnectError\(|kind: Connect\b")
_ENDPOINT = re.compile(r"https?://[^?#@\s]+")
# obstore's class, its name of the endpoint, and the environment's names of it.
_STORES = {
    "s3": ("S3Store", "endpoint", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GCSStore", "base_url", "GOOGLE_BASE_URL"),
    "abfs": ("AzureStore", "endpoint", "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
# Where an operator looks when a bucket does not open: for credentials, and for its location.
_HINTS = {
    "s3": ("AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a role", "frames.s3_endpoint and frames.s3_region"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, a machine's account", "frames.gs_endpoint"),
    "abfs": (
        "AZURE_STORAGE_ACCOUNT_KEY, AZURE_STORAGE_SAS_TOKEN, an identity",
        "frames.abfs_account and frames.abfs_endpoint",
    ),
}
_OTHER_OBJECT = "the object is another one than when it was opened"


class _Changed(FrameUnavailable):
    """The object is another one than when it was opened, or has no byte of the range."""


class BucketClient:
    """The buckets of the roots; roots of other schemes than `BUCKETS` are passed over.

    `ConfigError` where obstore is not installed, an endpoint is no URL, an account is missing, or credentials cannot be
    read.
    """

    def __init__(self, settings: FrameSettings, roots: Sequence[FrameURL], failures: FailureCache) -> None:
        self.settings, self.failures = settings, failures
        self._buckets = {root.origin: self._open(root) for root in roots if root.scheme in BUCKETS}

    def get(self, frame_url: FrameURL, options: dict[str, Any], limit: int) -> tuple[bytearray, int, str | None]:
        """Return the bytes of an object that are asked for, at most ``limit``, the object's size and its ETag.

        `_Changed` where ``if_match`` or the range does not fit the object.
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

    def _open(self, root: FrameURL) -> ObjectStore:
        try:
            import obstore.store
        except ImportError as exc:
            problem = f"needs obstore, which is not installed: pip install 'stampworker[{root.scheme}]'"
            raise ConfigError(f"frames.frame_roots: {root.display_url} {problem}") from exc
        store, option, *names = _STORES[root.scheme]
        endpoint = self._endpoint(root.scheme, names)
        config: dict[str, Any] = {
            option: endpoint,
            "region": self.settings.s3_region if root.scheme == "s3" else None,
            "account_name": self.settings.abfs_account if root.scheme == "abfs" else None,
            "skip_signature": getattr(self.settings, f"{root.scheme}_anonymous") or None,
        }
        try:
            opened: ObjectStore = getattr(obstore.store, store)(
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

    def _endpoint(self, scheme: str, names: list[str]) -> str | None:
        given: str | None = getattr(self.settings, f"{scheme}_endpoint")
        endpoint = given or next(filter(None, map(os.environ.get, names)), None)
        if endpoint and not _ENDPOINT.fullmatch(endpoint):
            raise ConfigError(f"{names[0]}: not an address, wanted https://host:port")
        return endpoint

    def _failure(self, frame_url: FrameURL, exc: Exception, since: float) -> FrameError:
        """Return the frame's error for one of obstore's, and remember it."""
        from obstore import exceptions as problems

        said, waited = _first_words(exc), time.monotonic() - since
        url, key, origin, note = frame_url.display_url, frame_url.key, frame_url.origin, self.failures.note
        if isinstance(exc, FileNotFoundError):
            self.failures.note_answer(origin)
            return note(key, FrameMissing(url, "no such bucket or key"))
        if isinstance(exc, problems.PreconditionError):
            return _Changed(url, _OTHER_OBJECT)
        no_credentials = _NO_CREDENTIALS.search(said) is not None
        if no_credentials or isinstance(exc, problems.PermissionDeniedError | problems.UnauthenticatedError):
            problem = f"access denied ({said}); {_hint(frame_url)}"
            log.error("%s: %s", url, problem)
            return note(origin if no_credentials else key, FrameUnavailable(url, problem))
        if "status code: 416" in said:
            return _Changed(url, f"no byte of the range: {said}")
        if waited < min(self.settings.connect_s, self.settings.read_s, self.settings.total_s):
            return note(origin if _DOWN.search(str(exc)) else key, FrameUnavailable(url, said))
        # obstore has one exception for a wait in vain and for an answer that says no. The clock tells them apart.
        error = FrameUnavailable(url, f"not answered in {waited:.1f} s: {said}")
        return self.failures.note_late(origin, key, error, since)


class BucketFile:
    """One object of a bucket; its URL is beneath a root."""

    def __init__(self, client: BucketClient, frame_url: FrameURL) -> None:
        self.changed = False
        self._client, self._frame_url = client, frame_url
        self._tag: str | None = None
        self._size = 0

    def open(self) -> FirstRead:
        """Ask for the first bytes."""
        try:
            data, self._size, self._tag = self._client.get(self._frame_url, {"range": (0, FIRST_BYTES)}, FIRST_BYTES)
        except _Changed as exc:  # no byte of the range
            data, self._size, _ = self._client.get(self._frame_url, {"head": True}, sys.maxsize)
            if self._size > 0:
                raise FrameUnavailable(exc.url, exc.problem) from exc
        return FirstRead(data, self._size)

    def read_range(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        return bytes(self._same({"range": (offset, offset + length)}, length))

    def read_all(self) -> bytearray:
        """Return all bytes."""
        return self._same({}, self._size)

    def _same(self, options: dict[str, Any], length: int) -> bytearray:
        url, limit = self._frame_url.display_url, self._client.settings.max_download_bytes
        check_length(url, length, limit)
        if self._tag is not None:
            options["if_match"] = self._tag
        try:
            data, size, tag = self._client.get(self._frame_url, options, limit)
            if self._tag and tag and tag != self._tag:  # a server that ignores the condition
                raise _Changed(url, _OTHER_OBJECT)
            if size != self._size or len(data) != length:
                found = f"{len(data)} of {size} bytes, wanted {length} of {self._size}, as when it was opened"
                raise _Changed(url, found)
        except _Changed as exc:
            self.changed = True
            raise FrameUnavailable(url, exc.problem) from exc
        return data


def _hint(frame_url: FrameURL) -> str:
    credentials, location = _HINTS[frame_url.scheme]
    return f"credentials come from the environment ({credentials}), the bucket's location from {location}"


def _first_words(exc: Exception) -> str:
    """Return the first line of a message, without the server's page and what obstore appends for debugging."""
    text = str(exc).strip().partition("\n")[0].partition("Debug source:")[0].partition("<")[0]
    return text.strip(" :")[:300] or type(exc).__name__
