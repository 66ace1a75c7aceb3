"""Frames in buckets (S3 and what speaks it, Google's, Azure's), through obstore.

Where the bucket is and who asks is the operator's word alone (settings and environment), so an alert can choose only a
key beneath a root. What is not set here obstore takes from the environment variables that each vendor's own tools know.

obstore follows redirects and has no option against it. Over TLS they cannot lead to plain HTTP. And where an endpoint
is set, and credentials come from nowhere but the environment, obstore is confined to the endpoint's host: all others
it has to ask through a proxy that does not exist. What is left, another port of that host and what a vendor's own
servers redirect to, is the operator's to trust.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from stampworker.errors import ConfigError, FrameError, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames.io.failures import Memory
from stampworker.frames.io.ranges import FIRST, FirstRead, collect
from stampworker.frames.limits import end_within
from stampworker.frames.urls import BUCKETS, FrameURL

if TYPE_CHECKING:
    from obstore.store import ObjectStore

    from stampworker.config import FrameSettings

log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_NOBODY = re.compile(r"//169\.254\.|/latest/(?:api/token|meta-data/)|performing token request")
# In what obstore appends for debugging, which is not shown: it says more than the message.
_LATE = re.compile(r"timed out|TimedOut|kind: Timeout")
_DOWN = re.compile(r"ConnectError\(|kind: Connect\b")
_NOWHERE = "http://127.0.0.1:0"  # no server can have this port
_ASKED_NOWHERE = re.compile(r"ConnectError\(\s*\"[^\"]*\",\s*127\.0\.0\.1:0,")
_ENDPOINT = re.compile(r"https?://[^?#@\s]+")


@dataclass(frozen=True)
class _Vendor:
    """What differs between vendors: obstore's class and name of the endpoint, and where an operator looks."""

    store: str
    endpoint: str
    environment: tuple[str, ...]
    keys: tuple[tuple[str, ...], ...]  # credentials for which nobody has to be asked
    credentials: str
    place: str


_VENDORS = {
    "s3": _Vendor(
        "S3Store",
        "endpoint",
        ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
        (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),),
        "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, a role",
        "frames.s3_endpoint and frames.s3_region",
    ),
    "gs": _Vendor(
        "GCSStore",
        "base_url",
        ("GOOGLE_BASE_URL",),
        (("GOOGLE_BEARER_TOKEN",),),
        "GOOGLE_APPLICATION_CREDENTIALS, GOOGLE_SERVICE_ACCOUNT, a machine's account",
        "frames.gs_endpoint",
    ),
    "abfs": _Vendor(
        "AzureStore",
        "endpoint",
        ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
        (("AZURE_STORAGE_ACCOUNT_KEY",), ("AZURE_STORAGE_SAS_TOKEN",)),
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
        Those of other schemes than `BUCKETS` are passed over.
    memory : Memory
        Where failures are remembered.

    Raises
    ------
    ConfigError
        obstore is not installed, an endpoint is no address, an account is missing, credentials cannot be read.
    """

    def __init__(self, settings: FrameSettings, roots: Sequence[FrameURL], memory: Memory) -> None:
        self.settings, self.memory = settings, memory
        self._buckets = {root.origin: self._open(root) for root in roots if root.scheme in BUCKETS}

    def get(self, address: FrameURL, options: dict[str, Any], limit: int) -> tuple[bytearray, int, str | None]:
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

        key = (*address.origin, address.target)
        self.memory.check(address.display_url, key, address.origin)
        since, end = time.monotonic(), end_within(self.settings.total_s)
        try:
            found = obstore.get(self._buckets[address.origin], address.target, options=options)  # type: ignore[arg-type]
            start, stop = found.range
            if stop - start > limit:
                raise self._too_long(address, f"{stop - start} bytes, above the {limit} allowed")
            data = collect(_chunks(found), limit, lambda problem: self._too_long(address, problem), end)
            self.memory.note_answer(address.origin)
            return data, found.meta["size"], found.meta["e_tag"]
        except FrameError:
            raise
        except Exception as exc:
            raise self._failure(address, exc, since, end) from exc

    def size(self, address: FrameURL) -> int:
        """Return the size of an object; errors as of `get`."""
        import obstore

        since, end = time.monotonic(), end_within(self.settings.total_s)
        try:
            return obstore.head(self._buckets[address.origin], address.target)["size"]
        except Exception as exc:
            raise self._failure(address, exc, since, end) from exc

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
                    **self._confinement(root.scheme, endpoint),
                },
                # A failure is told at once; whoever reads the alert again is the one that waits.
                retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=self.settings.total_s)},
            )
        except Exception as exc:
            raise ConfigError(f"frames.frame_roots: {root.display_url}: {_first_words(exc)}; {_look(root)}") from exc
        return opened

    def _confinement(self, scheme: str, endpoint: str | None) -> dict[str, str]:
        """Return the options that confine obstore to an endpoint's host; none where it must ask others, or a proxy."""
        is_told = getattr(self.settings, f"{scheme}_anonymous") or any(
            all(map(os.environ.get, names)) for names in _VENDORS[scheme].keys
        )
        has_proxy = not getproxies().keys().isdisjoint(("http", "https", "all"))
        host = urlsplit(endpoint).hostname if endpoint and is_told and not has_proxy else None
        return {"proxy_url": _NOWHERE, "proxy_excludes": host} if host else {}

    def _endpoint(self, scheme: str) -> str | None:
        names = _VENDORS[scheme].environment
        given: str | None = getattr(self.settings, f"{scheme}_endpoint")
        endpoint = given or next(filter(None, map(os.environ.get, names)), None)
        if endpoint and not (_ENDPOINT.fullmatch(endpoint) and _is_plain(urlsplit(endpoint).hostname)):
            raise ConfigError(f"{names[0]}: not an address, wanted https://host:port, a number in its usual form")
        return endpoint

    def _too_long(self, address: FrameURL, problem: str) -> FrameRefused:
        return FrameRefused(address.display_url, problem)

    def _failure(self, address: FrameURL, exc: Exception, since: float, end: float) -> FrameError:
        """Return the error of ours that an exception of obstore's, which is a text, stands for."""
        from obstore import exceptions as problems

        key = (*address.origin, address.target)
        said = _first_words(exc)
        if isinstance(exc, FileNotFoundError):
            missing = FrameMissing(address.display_url, "no such bucket or key")
            self.memory.note_answer(address.origin)
            self.memory.note(key, missing)
            return missing
        if isinstance(exc, problems.PreconditionError):
            return _Changed(address.display_url, "the object is another one than when it was opened")
        if _ASKED_NOWHERE.search(str(exc)):
            refused = FrameRefused(address.display_url, "the endpoint redirects to another host")
            self.memory.note(key, refused)
            return refused
        # Without credentials obstore asks a cloud machine's metadata service for some, and elsewhere there is none.
        denied = isinstance(exc, problems.PermissionDeniedError | problems.UnauthenticatedError)
        nobody = _NOBODY.search(said) is not None
        if denied or nobody:
            problem = f"access denied ({said}); {_look(address)}"
            log.error("%s: %s", address.display_url, problem)
            error = FrameUnavailable(address.display_url, problem)
            self.memory.note(address.origin if nobody else key, error)
            return error
        if "status code: 416" in said:
            return _BeyondEnd(address.display_url, f"no byte of the range: {said}")
        late = isinstance(exc, TimeoutError) or time.monotonic() >= end or _LATE.search(str(exc)) is not None
        error = FrameUnavailable(address.display_url, f"not answered in time: {said}" if late else said)
        if late:
            self.memory.note_late(address.origin, key, error, since)
        else:
            self.memory.note(address.origin if _DOWN.search(str(exc)) else key, error)
        return error


class BucketFile:
    """One object of a bucket.

    Parameters
    ----------
    client : BucketClient
        The buckets.
    address : FrameURL
        Beneath a root.
    """

    def __init__(self, client: BucketClient, address: FrameURL) -> None:
        self.changed = False
        self._client, self._address = client, address
        self._tag: str | None = None
        self._size = 0

    def open(self) -> FirstRead:
        """Ask for the first bytes."""
        try:
            data, self._size, self._tag = self._client.get(self._address, {"range": (0, FIRST)}, FIRST)
        except _BeyondEnd:
            if self._client.size(self._address) > 0:
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
        if length > limit:
            raise FrameRefused(
                self._address.display_url,
                f"{length} bytes at once, above the {limit} allowed (frames.max_download_bytes)",
            )
        if self._tag is not None:
            options["if_match"] = self._tag
        try:
            data, size, tag = self._client.get(self._address, options, limit)
        except (_Changed, _BeyondEnd):
            self.changed = True
            raise
        if self._tag and tag and tag != self._tag:  # a server that does not heed the condition
            self.changed = True
            raise _Changed(self._address.display_url, "the object is another one than when it was opened")
        if size != self._size or len(data) != length:
            self.changed = True
            raise FrameUnavailable(
                self._address.display_url,
                f"{len(data)} of {size} bytes, wanted {length} of {self._size}, as when it was opened",
            )
        return data


def _is_plain(host: str | None) -> bool:
    """Say whether a host is written as those that compare hosts write it: obstore takes 127.1 for 127.0.0.1."""
    if not host or not host.isascii():
        return False
    is_number = host.rpartition(".")[2].isdigit() or host.rpartition(".")[2].startswith("0x") or ":" in host
    try:
        return not is_number or str(ipaddress.ip_address(host)) == host
    except ValueError:
        return False


def _chunks(found: Any) -> Iterator[bytes]:
    return (bytes(chunk) for chunk in found.stream(min_chunk_size=_CHUNK))


def _look(address: FrameURL) -> str:
    """Return where an operator looks when a bucket does not open."""
    vendor = _VENDORS[address.scheme]
    return f"credentials come from the environment ({vendor.credentials}), the place from {vendor.place}"


def _first_words(exc: Exception) -> str:
    """Return the first line of a message, without the server's page and what obstore appends for debugging."""
    text = str(exc).strip().partition("\n")[0].partition("Debug source:")[0].partition("<")[0]
    return text.strip(" :")[:300] or type(exc).__name__
