"""Frames over HTTP, by range requests.

What the answers mean: ranges, redirects within the roots, statuses, bodies of the right length. Failures are
remembered. The connections are those of `stampworker.frames.io.connections`.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import math
import netrc
import os
import re
import ssl
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import urllib3
from urllib3.exceptions import HTTPError, InvalidHeader, ReadTimeoutError

from stampworker.errors import FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames.io.connections import AddressRefused, Connections, NotConnected, netloc
from stampworker.frames.io.ranges import FIRST_BYTES, FirstRead, check_length, collect
from stampworker.frames.limits import end_within, time_limit
from stampworker.frames.urls import WEB, FrameURL, Origin, join, parse, redact, scheme_of

if TYPE_CHECKING:
    from stampworker.config import FrameSettings
    from stampworker.frames.io.failures import FailureCache

log = logging.getLogger(__name__)

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_LONGEST_RETRY_AFTER_S = 300.0  # a server's clock may be wrong by hours
_CHUNK = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)


class WebClient:
    """The servers of the roots. Redirects may lead beneath ``roots``; ``failures`` are those of all frames.

    `ConfigError` where a proxy of the environment cannot be used.
    """

    def __init__(self, settings: FrameSettings, roots: Sequence[FrameURL], failures: FailureCache) -> None:
        self.settings, self.roots, self.failures = settings, roots, failures
        self.connections = Connections(settings, [root for root in roots if root.scheme in WEB])
        self.close = self.connections.close


class WebFile:
    """One file of a server; its URL is beneath a root."""

    def __init__(self, client: WebClient, url: FrameURL) -> None:
        self._client, self._settings, self._failures = client, client.settings, client.failures
        self._url, self._display_url = url, url.display_url
        self.changed = False
        self._version: tuple[str | None, str | None] = None, None
        self._size = 0

    def open(self) -> FirstRead:
        """Ask for the first bytes; take all where the server serves no ranges."""
        with self._ask(f"bytes=0-{FIRST_BYTES - 1}") as (response, server):
            self._version = _version(response)
            said = response.headers.get("Content-Range")
            if response.status == 416:
                if (said or "").split() == ["bytes", "*/0"]:
                    return FirstRead(bytearray(), 0)
                raise self._failed(f"status 416 with Content-Range {said!r} to bytes 0-{FIRST_BYTES - 1}")
            if response.status == 200:
                body = self._body(response, server)
                self._size = len(body)
                return FirstRead(body, len(body))
            start, stop, size = self._content_range(response)
            if size is None or (start, stop) != (0, min(FIRST_BYTES, size)):
                raise self._failed(f"Content-Range is {said!r}, wanted bytes 0-{FIRST_BYTES - 1}")
            self._size = size
            return FirstRead(self._body(response, server, stop), size)

    def read_range(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        check_length(self._display_url, length, self._settings.max_download_bytes)
        with self._ask(f"bytes={offset}-{offset + length - 1}") as (response, server):
            self._check_version(response)
            if response.status != 206:  # the file shrank, or another server answers: open it again
                raise self._has_changed(f"status {response.status} to a range, after it has served some")
            start, stop, size = self._content_range(response)
            if size != self._size:
                raise self._has_changed(f"{size} bytes, {self._size} when it was opened")
            if (start, stop) != (offset, offset + length):
                raise self._failed(f"bytes {start}:{stop}, wanted {offset}:{offset + length}")
            return bytes(self._body(response, server, length))

    def read_all(self) -> bytearray:
        """Return all bytes."""
        check_length(self._display_url, self._size, self._settings.max_download_bytes)
        with self._ask(None) as (response, server):
            self._check_version(response)
            if response.status != 200:
                raise self._failed(f"status {response.status} to a request without a range")
            data = self._body(response, server)
        if len(data) != self._size:
            raise self._has_changed(f"{len(data)} bytes, {self._size} when it was opened")
        return data

    @contextlib.contextmanager
    def _ask(self, ranges: str | None) -> Iterator[tuple[urllib3.BaseHTTPResponse, Origin]]:
        """Ask within the time limit, follow redirects, and give the answer, its body unread, and who gave it."""
        self._failures.check(self._display_url, self._url.key)
        url, headers = self._url, {"Range": ranges} if ranges else {}
        with time_limit(self._settings.total_s):
            for _ in range(_MOST_REDIRECTS + 1):
                self._failures.check(self._display_url, url.origin)
                response = self._request(url, headers)
                with contextlib.closing(response):  # the connection, too, unless the body was read to its end
                    if response.status not in _REDIRECTS:
                        self._check_status(response, url.origin)
                        yield response, url.origin
                        return
                    url = self._redirect(url, response.headers.get("Location"))
        raise self._failed(f"more than {_MOST_REDIRECTS} redirects")

    def _request(self, url: FrameURL, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        credentials = url.authorization or _from_netrc(url.host)
        if credentials:
            headers = headers | {"Authorization": credentials}
        since = time.monotonic()
        if since >= end_within(math.inf):  # the server is not to blame
            raise FrameUnavailable(self._display_url, f"no time is left of total_s ({self._settings.total_s:g} s)")
        try:
            return self._client.connections.send(url, headers)
        except NotConnected as exc:
            raise self._unconnected(url, str(exc), exc.__cause__) from exc.__cause__
        except AddressRefused as exc:
            allowed = "only a root in frames.frame_roots, and a URL, that name it instead of the host lead there"
            raise FrameRefused(self._display_url, f"{exc}: {allowed}") from exc
        except ReadTimeoutError:
            raise self._late("no answer", url.origin, since) from None
        except (OSError, http.client.HTTPException, HTTPError) as exc:
            raise self._failed(f"the connection failed: {_said(exc)}") from exc

    def _redirect(self, url: FrameURL, location: str | None) -> FrameURL:
        """Return where a redirect leads, if frames may come from there."""
        try:
            target = join(f"{url.scheme}://{netloc(url)}{url.target}", (location or "").partition("#")[0])
            if not location or scheme_of(target) not in WEB:
                raise FrameRefused(redact(target) if location else "nowhere", "wanted http: or https:")
            found = parse(target)
            if not any(found.beneath(root) for root in self._client.roots):
                raise FrameRefused(redact(target), "outside the frame roots (frames.frame_roots)")
            return found
        except FrameRefused as exc:
            raise self._failures.note(self._url.key, FrameRefused(self._display_url, f"redirects to {exc}")) from exc

    def _check_status(self, response: urllib3.BaseHTTPResponse, server: Origin) -> None:
        """Raise the error for a status other than 200, 206 and 416."""
        status = response.status
        said = f"the server says {status} {ascii(response.reason or '')[1:-1][:80]}".rstrip()
        if status in (200, 206, 416):
            return
        if status in (404, 410):
            self._failures.note_answer(server)
            raise self._failures.note(self._url.key, FrameMissing(self._display_url, said))
        if status in (401, 403, 407):
            source = f"the netrc file (~/.netrc, or where NETRC points), machine {self._url.host}"
            said += f"; credentials come from {source if status != 407 else 'the URL in HTTP_PROXY'}"
            log.error("%s: %s", self._display_url, said)
            raise self._failed(said)
        wait = _retry_after(response.headers.get("Retry-After"))
        if wait is not None:
            said += f", to try again after {wait:g} s"
        is_busy = status == 429 or wait is not None
        raise self._failed(said, server=server if is_busy else None, wait=wait)

    def _body(self, response: urllib3.BaseHTTPResponse, server: Origin, wanted: int | None = None) -> bytearray:
        """Return the body; raise `FrameUnavailable` if it does not have ``wanted`` bytes, where a number is given."""
        since, length, limit = time.monotonic(), response.length_remaining, self._settings.max_download_bytes
        if wanted is not None and length not in (None, wanted):
            raise self._failed(f"an answer of {length} bytes, wanted {wanted}")
        check_length(self._display_url, length or 0, limit)
        expected = length if wanted is None else wanted
        # read1 returns what has come of a body in chunks. read would believe any size of a chunk, one below zero, too.
        read = response.read1 if length is None else response.read
        try:
            data = collect(iter(partial(read, _CHUNK), b""), limit if wanted is None else wanted, self._display_url)
        except ReadTimeoutError:
            raise self._late("no end of the answer", server, since) from None
        except (OSError, http.client.HTTPException, HTTPError, ValueError) as exc:
            raise self._failed(f"the connection failed: {_said(exc)}") from exc
        if expected is not None and len(data) < expected:
            raise self._failed(f"the answer ends after {len(data)} of {expected} bytes")
        self._failures.note_answer(server)
        return data

    def _content_range(self, response: urllib3.BaseHTTPResponse) -> tuple[int, int, int | None]:
        """Return start, stop and size of a 206."""
        said = response.headers.get("Content-Range") or ""
        match = _CONTENT_RANGE.fullmatch(said.strip())
        if match is None:
            raise self._failed(f"206 with Content-Range {said!r}, wanted bytes start-end/size")
        return int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])

    def _check_version(self, response: urllib3.BaseHTTPResponse) -> None:
        # A validator that only one of two answers has says nothing.
        for before, now in zip(self._version, _version(response), strict=True):
            if before and now and before != now:
                raise self._has_changed(f"the file is another one than when it was opened ({before}, {now})")

    def _has_changed(self, problem: str) -> FrameUnavailable:
        self.changed = True
        return FrameUnavailable(self._display_url, problem)

    def _failed(self, problem: str, *, server: Origin | None = None, wait: float | None = None) -> FrameUnavailable:
        """Return the error for a failure that may pass, and remember it: of the file, or of a whole server."""
        return self._failures.note(server or self._url.key, FrameUnavailable(self._display_url, problem), wait)

    def _late(self, missing: str, server: Origin, since: float) -> FrameUnavailable:
        """Return the error for what did not come in time, and remember it; see `FailureCache.note_late`."""
        is_over = end_within(math.inf) - time.monotonic() < 0.01
        total, read = self._settings.total_s, self._settings.read_s
        limit = f"within total_s ({total:g} s)" if is_over else f"for read_s ({read:g} s)"
        error = FrameUnavailable(self._display_url, f"{missing} {limit}")
        return self._failures.note_late(server, self._url.key, error, since)

    def _unconnected(self, url: FrameURL, what: str, problem: BaseException | None) -> FrameUnavailable:
        """Return the error for a failed connection, and remember it: of the server, unless its time was cut short."""
        proxy = self._client.connections.proxies[url.origin]
        via = f" through the proxy {netloc(proxy)}" if proxy is not None else ""
        what = what or f"no connection to {netloc(url)}{via}"
        if isinstance(problem, ssl.SSLCertVerificationError):
            log.error("%s: certificate not trusted: %s", self._display_url, problem.verify_message)
        if not isinstance(problem, TimeoutError):
            return self._failed(f"{what}: {_said(problem)}", server=url.origin)
        if time.monotonic() < end_within(math.inf):
            return self._failed(f"{what} within connect_s ({self._settings.connect_s:g} s)", server=url.origin)
        return self._failed(f"{what} in the time left of total_s ({self._settings.total_s:g} s)")


def _version(response: urllib3.BaseHTTPResponse) -> tuple[str | None, str | None]:
    """Return what tells one content of a URL from another."""
    return response.headers.get("ETag"), response.headers.get("Last-Modified")


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, at most 300; None without a valid header."""
    try:
        return min(urllib3.Retry().parse_retry_after(value), _LONGEST_RETRY_AFTER_S) if value else None
    except (InvalidHeader, ValueError, OverflowError):
        return None


def _from_netrc(host: str) -> str | None:
    """Return the Authorization header for a host from the user's netrc file, read at each request: it may change."""
    path = Path(os.environ.get("NETRC") or "~/.netrc")
    try:
        found = netrc.netrc(path.expanduser()).authenticators(host)
    except (FileNotFoundError, RuntimeError):  # no file, or no home that it could be in
        return None
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as exc:
        log.error("%s cannot be used: %s", path, exc)
        return None
    return None if found is None else "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def _said(exc: BaseException | None) -> str:
    """Return what an exception, or the one that urllib3 wraps in it, says, on one line."""
    if isinstance(exc, HTTPError) and exc.args and isinstance(exc.args[-1], Exception):
        exc = exc.args[-1]
    text = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return ascii(" ".join(str(text).split()))[1:-1][:200]
