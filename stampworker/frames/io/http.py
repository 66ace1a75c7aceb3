"""Frames over HTTP, by range requests.

On the standard library's ``http.client``, because three things must be certain that the usual clients leave to chance:
the address that is connected to is the one that was checked (a name may resolve to another one the next time); every
single wait, TLS's and the headers' included, ends by the request's end; and nothing is followed, sent or decoded that
was not asked for. What it lacks is here: a few kept connections, redirects within the roots, one repetition where a
kept connection turns out to be closed, the environment's proxies. A proxy finds a server's address by itself, so there
no address is checked: whoever sets one vouches for where it leads.
"""

from __future__ import annotations

import contextlib
import email.utils
import functools
import http.client
import ipaddress
import logging
import netrc
import os
import re
import select
import socket
import ssl
import threading
import time
from base64 import b64encode
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

from stampworker.errors import ConfigError, FrameError, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames.io.failures import Memory
from stampworker.frames.io.ranges import FIRST, FirstRead, collect
from stampworker.frames.limits import end_within
from stampworker.frames.urls import WEB, FrameURL, join, parse, redact, scheme_of, without_credentials

if TYPE_CHECKING:
    from stampworker.config import FrameSettings

log = logging.getLogger(__name__)

_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_LONGEST_RETRY_AFTER_S = 300.0  # a server's word, not more: it may be wrong by hours
_IDLE_CONNECTIONS = 16
_CHUNK = 1 << 18
_CONTENT_RANGE = re.compile(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.IGNORECASE)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_AGENT = f"stampworker/{version('stampworker')}"

_lookups = threading.BoundedSemaphore(16)

Origin = tuple[str, str, int]


class _Timed:
    """A socket whose every wait ends by the read timeout and by the request's end."""

    end: float
    read_s: float

    def recv_into(self, *args: Any) -> int:
        self.settimeout(_remaining(self.end, self.read_s))  # type: ignore[attr-defined]
        received: int = super().recv_into(*args)  # type: ignore[misc]
        return received


class _PlainSocket(_Timed, socket.socket):
    pass


class _TlsSocket(_Timed, ssl.SSLSocket):
    pass


class _Reset(Exception):
    """A kept connection was closed by the server."""


class WebClient:
    """Connections to the servers of frames.

    Parameters
    ----------
    settings : FrameSettings
        Timeouts and limits.
    roots : sequence of FrameURL
        Where redirects may lead, and which addresses are named on purpose.
    memory : Memory
        Where failures are remembered.

    Raises
    ------
    ConfigError
        A proxy of the environment is none that can be used.
    """

    def __init__(self, settings: FrameSettings, roots: Sequence[FrameURL], memory: Memory) -> None:
        self.settings, self.roots, self.memory = settings, roots, memory
        self._proxies = {scheme: _proxy(scheme) for scheme in WEB} if any(r.scheme in WEB for r in roots) else {}
        self._lock = threading.Lock()
        self._idle: list[tuple[Origin, http.client.HTTPConnection]] = []

    @functools.cached_property
    def _tls(self) -> ssl.SSLContext:
        """The system's certificates (SSL_CERT_FILE, SSL_CERT_DIR), read when first needed."""
        context = ssl.create_default_context()
        context.sslsocket_class = _TlsSocket
        return context

    def close(self) -> None:
        """Close the connections that are kept."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def request(self, address: FrameURL, headers: dict[str, str], end: float) -> Answer:
        """Send a GET, follow redirects within the roots, and return the answer with its body unread.

        Raises
        ------
        FrameMissing
            404, 410.
        FrameUnavailable
            Any other status but 200, 206, 416; no connection; a time limit.
        FrameRefused
            A redirect out of the roots, or an address that frames must not come from.
        """
        first = address
        for _ in range(_MOST_REDIRECTS + 1):
            self.memory.check(first.display_url, address.origin)
            answer = self._ask(address, headers, end, first)
            if answer.status not in _REDIRECTS:
                return answer
            answer.close()
            address = self._redirect(address, answer.header("Location"), first)
        raise self.failed(first, f"more than {_MOST_REDIRECTS} redirects")

    def failed(
        self, address: FrameURL, problem: str, *, server: Origin | None = None, wait: float | None = None
    ) -> FrameError:
        """Return the error for a failure that may pass, and remember it: of the URL, or of a whole server."""
        error = FrameUnavailable(address.display_url, problem)
        self.memory.note(server or (*address.origin, address.target), error, wait)
        return error

    def late(self, address: FrameURL, problem: str, server: Origin, since: float) -> FrameError:
        """Return the error for an answer that did not come in time, and remember it; see `Memory.note_late`."""
        error = FrameUnavailable(address.display_url, problem)
        self.memory.note_late(server, (*address.origin, address.target), error, since)
        return error

    def give_back(self, origin: Origin, connection: http.client.HTTPConnection) -> None:
        """Keep a connection for the next request."""
        with self._lock:
            self._idle.append((origin, connection))
            spare = self._idle.pop(0)[1] if len(self._idle) > _IDLE_CONNECTIONS else None
        if spare is not None:
            spare.close()

    def _redirect(self, address: FrameURL, location: str | None, first: FrameURL) -> FrameURL:
        try:
            return self._target(address, location)
        except FrameRefused as exc:
            error = FrameRefused(first.display_url, f"redirects to {exc}")
            self.memory.note((*first.origin, first.target), error)
            raise error from exc

    def _target(self, address: FrameURL, location: str | None) -> FrameURL:
        """Return where a redirect leads, if frames may come from there."""
        target = join(f"{address.scheme}://{_netloc(address)}{address.target}", (location or "").partition("#")[0])
        shown = redact(target)
        if not location or scheme_of(target) not in WEB:
            raise FrameRefused(shown if location else "nowhere", "wanted http: or https:")
        found = parse(target)
        if not any(found.beneath(root) for root in self.roots):
            raise FrameRefused(shown, "outside the frame roots (frames.frame_roots)")
        return found

    def _ask(self, address: FrameURL, headers: dict[str, str], end: float, first: FrameURL) -> Answer:
        headers = {"Host": _host(address), "User-Agent": _AGENT, "Accept-Encoding": "identity", **headers}
        credentials = address.authorization or _from_netrc(address.host)
        if credentials:
            headers["Authorization"] = credentials
        target, proxy = address.target, self._proxy(address)
        if proxy is not None and address.scheme == "http":
            target = f"http://{_host(address)}{target}"
            headers |= _authorize(proxy)
        since = time.monotonic()
        if since >= end:  # which is no fault of the server's
            raise FrameUnavailable(first.display_url, f"no time is left of total_s ({self.settings.total_s:g} s)")
        while True:
            connection, fresh = self._connection(address, proxy, end, first)
            try:
                response = self._send(connection, target, headers, end, fresh)
                break
            except _Reset:
                continue
            except TimeoutError:
                connection.close()
                raise self.late(first, f"no answer {self.patience(end)}", address.origin, since) from None
            except (OSError, http.client.HTTPException) as exc:
                connection.close()
                raise self.failed(first, f"the connection failed: {_said(exc)}") from exc
        answer = Answer(self, address, connection, response, end, first)
        self._judge(answer, first)
        return answer

    def _send(
        self,
        connection: http.client.HTTPConnection,
        target: str,
        headers: dict[str, str],
        end: float,
        fresh: bool,
    ) -> http.client.HTTPResponse:
        sock: Any = connection.sock
        sock.end, sock.read_s = end, self.settings.read_s
        sock.settimeout(_remaining(end, self.settings.read_s))
        try:
            connection.request("GET", target, headers=headers)
            return connection.getresponse()
        except (ConnectionError, http.client.RemoteDisconnected, ssl.SSLEOFError):
            if fresh:
                raise
            connection.close()
            raise _Reset from None

    def _proxy(self, address: FrameURL) -> FrameURL | None:
        proxy = self._proxies.get(address.scheme)
        return None if proxy is None or proxy_bypass(_netloc(address)) else proxy

    def _connection(
        self, address: FrameURL, proxy: FrameURL | None, end: float, first: FrameURL
    ) -> tuple[http.client.HTTPConnection, bool]:
        """Return a connection, and whether it is a new one."""
        while (kept := self._take(address.origin)) is not None:
            if _is_quiet(kept.sock):
                return kept, False
            kept.close()
        connection = http.client.HTTPConnection(address.host, address.port)
        connection.sock = self._connect(address, proxy, end, first)
        # http.client would reconnect by itself, to an address that nobody checked.
        connection.auto_open = 0
        return connection, True

    def _take(self, origin: Origin) -> http.client.HTTPConnection | None:
        with self._lock:
            for i in range(len(self._idle) - 1, -1, -1):
                if self._idle[i][0] == origin:
                    return self._idle.pop(i)[1]
        return None

    def _connect(self, address: FrameURL, proxy: FrameURL | None, end: float, first: FrameURL) -> socket.socket:
        problem: Exception | None = None
        for family, sockaddr in self._resolve(address, proxy, end, first):
            sock = _PlainSocket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(_remaining(end, self.settings.connect_s))
                sock.connect(sockaddr)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if address.scheme == "http":
                    return sock
                if proxy is not None:
                    self._tunnel(sock, address, proxy, end)
                return self._tls.wrap_socket(sock, server_hostname=address.host)
            except (OSError, UnicodeError, http.client.HTTPException) as exc:
                sock.close()
                problem = exc
        if isinstance(problem, ssl.SSLCertVerificationError):
            log.error("%s: certificate not trusted: %s", first.display_url, problem.verify_message)
        via = f" through the proxy {_netloc(proxy)}" if proxy is not None else ""
        raise self._unconnected(first, f"no connection to {_netloc(address)}{via}", problem, address, end) from problem

    def _unconnected(
        self, first: FrameURL, what: str, problem: Exception | None, address: FrameURL, end: float
    ) -> FrameError:
        """Return the error for a server that cannot be connected to, and remember it: of it, if it had its time."""
        if not isinstance(problem, TimeoutError):
            return self.failed(first, f"{what}: {_said(problem) if problem else 'no address'}", server=address.origin)
        if time.monotonic() < end:
            within = f"connect_s ({self.settings.connect_s:g} s)"
            return self.failed(first, f"{what} within {within}", server=address.origin)
        return self.failed(first, f"{what} in the time left of total_s ({self.settings.total_s:g} s)")

    def _tunnel(self, sock: _PlainSocket, address: FrameURL, proxy: FrameURL, end: float) -> None:
        """Ask a proxy for a connection to the server itself."""
        sock.end, sock.read_s = end, self.settings.connect_s
        lines = {"Host": _netloc(address), "User-Agent": _AGENT, **_authorize(proxy)}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        sock.sendall(f"CONNECT {_netloc(address)} HTTP/1.1\r\n{head}\r\n".encode("ascii"))
        with contextlib.closing(http.client.HTTPResponse(sock, method="CONNECT")) as response:
            response.begin()
        if response.status != 200:
            raise OSError(f"it says {response.status} {ascii(response.reason)[1:-1]}")

    def _resolve(
        self, address: FrameURL, proxy: FrameURL | None, end: float, first: FrameURL
    ) -> Iterator[tuple[int, Any]]:
        """Yield the addresses of a host that frames may come from, each checked just before it is connected to."""
        host, port = (proxy or address).host, (proxy or address).port
        try:
            found = _look_up(host, port, _remaining(end, self.settings.connect_s))
        except (OSError, UnicodeError) as exc:
            raise self._unconnected(first, f"host {host!r} is not found", exc, address, end) from exc
        allowed, refused = [], "no"
        for family, _, _, _, sockaddr in found:
            ip = str(sockaddr[0])
            if proxy is not None or _names(host, ip) or not (what := forbidden(ip)):
                allowed.append((family, sockaddr))
            else:
                refused = f"{ip}, {what}"
        if not allowed:
            raise FrameRefused(
                first.display_url,
                f"host {host!r} is at {refused} address: only a root in frames.frame_roots, and a URL, that name it "
                "instead of the host lead there",
            )
        yield from allowed

    def _judge(self, answer: Answer, first: FrameURL) -> None:
        """Raise the error that a status stands for; 200, 206, 416 and redirects are the caller's."""
        status, said = answer.status, f"the server says {answer.status} {answer.reason}".rstrip()
        if status in (200, 206, 416, *_REDIRECTS):
            return
        wait = _retry_after(answer.header("Retry-After"))
        answer.close()
        if status in (404, 410):
            error = FrameMissing(first.display_url, said)
            self.memory.note_answer(answer.origin)
            self.memory.note((*first.origin, first.target), error)
            raise error
        if status in (401, 403, 407):
            source = f"the netrc file (~/.netrc, or where NETRC points), machine {first.host}"
            problem = f"{said}; credentials come from {source if status != 407 else 'the URL in HTTP_PROXY'}"
            log.error("%s: %s", first.display_url, problem)
            raise self.failed(first, problem)
        if wait is not None:
            said += f", to try again after {wait:g} s"
        is_busy = status == 429 or wait is not None
        raise self.failed(first, said, server=answer.origin if is_busy else None, wait=wait)

    def patience(self, end: float) -> str:
        """Return for how long was waited in vain."""
        if time.monotonic() < end - 0.01:
            return f"for read_s ({self.settings.read_s:g} s)"
        return f"within total_s ({self.settings.total_s:g} s)"


class Answer:
    """Status, headers and body of one answer."""

    def __init__(
        self,
        client: WebClient,
        address: FrameURL,
        connection: http.client.HTTPConnection,
        response: http.client.HTTPResponse,
        end: float,
        first: FrameURL,
    ) -> None:
        self.status, self.reason = response.status, ascii(response.reason)[1:-1][:80]
        self.origin = address.origin
        self._client, self._first, self._end = client, first, end
        self._since = time.monotonic()
        self._connection, self._response = connection, response
        self._kept = False

    def header(self, name: str) -> str | None:
        """Return a header."""
        return self._response.getheader(name)

    @property
    def version(self) -> tuple[str | None, str | None]:
        """What tells one content of a URL from another."""
        return self.header("ETag"), self.header("Last-Modified")

    def close(self) -> None:
        """Let go of the connection, unless its body was read to the end and it is kept for another request."""
        self._response.close()
        if not self._kept:
            self._connection.close()

    def body(self, wanted: int | None = None) -> bytearray:
        """Return the body.

        Parameters
        ----------
        wanted : int, optional
            Its length, where that is known.

        Raises
        ------
        FrameRefused
            It is, or says it is, longer than is allowed.
        FrameUnavailable
            It is not as long as wanted, ends early, or does not come in time.
        """
        client, first, length = self._client, self._first, self._response.length
        limit = client.settings.max_download_bytes if wanted is None else wanted
        if wanted is not None and length not in (None, wanted):
            raise client.failed(first, f"an answer of {length} bytes, wanted {wanted}")
        if length is not None and length > limit:
            raise self._too_long(f"{length} bytes, above the {limit} allowed (frames.max_download_bytes)")
        try:
            data = collect(self._chunks(), limit, self._too_long)
        except TimeoutError:
            problem = f"no end of the answer {client.patience(self._end)}"
            raise client.late(first, problem, self.origin, self._since) from None
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise client.failed(first, f"the connection failed: {_said(exc)}") from exc
        expected = length if wanted is None else wanted
        if expected is not None and len(data) < expected:
            raise client.failed(first, f"the answer ends after {len(data)} of {expected} bytes")
        client.memory.note_answer(self.origin)
        if not self._response.will_close:
            self._response.close()
            self._kept = True
            client.give_back(self.origin, self._connection)
        return data

    def _too_long(self, problem: str) -> FrameRefused:
        return FrameRefused(self._first.display_url, problem)

    def _chunks(self) -> Iterator[bytes]:
        while chunk := self._response.read1(_CHUNK):
            yield chunk


class WebFile:
    """One file of a server.

    Parameters
    ----------
    client : WebClient
        The connections.
    address : FrameURL
        Beneath a root.
    """

    def __init__(self, client: WebClient, address: FrameURL) -> None:
        self._client, self._address = client, address
        self.changed = False
        self._version: tuple[str | None, str | None] = None, None
        self._size = 0

    def open(self) -> FirstRead:
        """Ask for the first bytes; take all where the server serves no ranges."""
        with self._answer(f"bytes=0-{FIRST - 1}") as answer:
            self._version = answer.version
            if answer.status == 416:
                if (answer.header("Content-Range") or "").split() == ["bytes", "*/0"]:
                    return FirstRead(bytearray(), 0)
                problem = f"status 416 with Content-Range {answer.header('Content-Range')!r}"
                raise self._client.failed(self._address, f"{problem} to bytes 0-{FIRST - 1}")
            if answer.status == 200:
                body = answer.body()
                self._size = len(body)
                return FirstRead(body, len(body))
            start, stop, size = self._content_range(answer)
            if size is None or (start, stop) != (0, min(FIRST, size)):
                raise self._client.failed(
                    self._address, f"Content-Range is {answer.header('Content-Range')!r}, wanted bytes 0-{FIRST - 1}"
                )
            self._size = size
            return FirstRead(answer.body(stop), size)

    def read_range(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        self._fits(length)
        with self._answer(f"bytes={offset}-{offset + length - 1}") as answer:
            self._unchanged(answer)
            if answer.status != 206:  # the file shrank, or another server answers: begin again
                raise self._other(f"status {answer.status} to a range, after it has served some")
            start, stop, size = self._content_range(answer)
            if size != self._size:
                raise self._other(f"{size} bytes, {self._size} when it was opened")
            if (start, stop) != (offset, offset + length):
                raise self._client.failed(self._address, f"bytes {start}:{stop}, wanted {offset}:{offset + length}")
            return bytes(answer.body(length))

    def read_all(self) -> bytearray:
        """Return all bytes."""
        self._fits(self._size)
        with self._answer(None) as answer:
            self._unchanged(answer)
            if answer.status != 200:
                raise self._client.failed(self._address, f"status {answer.status} to a request without a range")
            data = answer.body()
        if len(data) != self._size:
            raise self._other(f"{len(data)} bytes, {self._size} when it was opened")
        return data

    @contextlib.contextmanager
    def _answer(self, ranges: str | None) -> Iterator[Answer]:
        """Ask, and leave no connection behind that is half read."""
        address = self._address
        self._client.memory.check(address.display_url, (*address.origin, address.target))
        end = end_within(self._client.settings.total_s)
        answer = self._client.request(address, {"Range": ranges} if ranges else {}, end)
        with contextlib.closing(answer):
            yield answer

    def _fits(self, length: int) -> None:
        limit = self._client.settings.max_download_bytes
        if length > limit:
            raise FrameRefused(
                self._address.display_url,
                f"{length} bytes at once, above the {limit} allowed (frames.max_download_bytes)",
            )

    def _unchanged(self, answer: Answer) -> None:
        # A validator that only one of two answers has says nothing.
        for before, now in zip(self._version, answer.version, strict=True):
            if before and now and before != now:
                raise self._other(f"the file is another one than when it was opened ({before}, {now})")

    def _other(self, problem: str) -> FrameUnavailable:
        self.changed = True
        return FrameUnavailable(self._address.display_url, problem)

    def _content_range(self, answer: Answer) -> tuple[int, int, int | None]:
        """Return start, stop and size of a 206."""
        said = answer.header("Content-Range") or ""
        match = _CONTENT_RANGE.fullmatch(said.strip())
        if match is None:
            raise self._client.failed(self._address, f"206 with Content-Range {said!r}, wanted bytes start-end/size")
        return int(match[1]), int(match[2]) + 1, None if match[3] == "*" else int(match[3])


def forbidden(ip: str) -> str | None:
    """Say what kind of address it is that no frame may come from unless a root names it; None for any other."""
    address = ipaddress.ip_address(ip.partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            address = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        else:
            address = address.ipv4_mapped or address.sixtofour or address
    kinds = {
        "a loopback": address.is_loopback,
        "a link-local": address.is_link_local,
        "an unspecified": address.is_unspecified or int(address) >> 24 == 0,
        "a multicast": address.is_multicast,
    }
    return next((name for name, applies in kinds.items() if applies), None)


def _names(host: str, ip: str) -> bool:
    """Say whether a host of a URL, which a root has too, is that very address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host) == ipaddress.ip_address(ip)
    except ValueError:
        return False


def _look_up(host: str, port: int, seconds: float) -> list[Any]:
    """Return what `socket.getaddrinfo` returns or raises; `TimeoutError` where it takes longer.

    It knows no limit of its own, so a thread that hangs in it is left behind; there are a few of them at most.
    """
    end = time.monotonic() + seconds
    found: Future[list[Any]] = Future()

    def ask() -> None:
        try:
            found.set_result(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, ValueError) as exc:  # UnicodeError is a ValueError
            found.set_exception(exc)
        finally:
            _lookups.release()

    if not _lookups.acquire(timeout=seconds):
        raise TimeoutError("every thread that looks up hosts is waiting")
    threading.Thread(target=ask, name="lookup", daemon=True).start()
    return found.result(max(end - time.monotonic(), 0.0))


def _proxy(scheme: str) -> FrameURL | None:
    """Return the environment's proxy for a scheme: HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, in lower case, too."""
    found = getproxies()
    given = found.get(scheme) or found.get("all")
    if not given:
        return None
    url = given if "://" in given else f"http://{given}"
    if scheme_of(url) != "http":
        raise ConfigError(f"{scheme.upper()}_PROXY: found {without_credentials(url)}, wanted http://host:port")
    try:
        return parse(url)
    except FrameRefused as exc:
        raise ConfigError(f"{scheme.upper()}_PROXY: {exc}") from exc


def _authorize(proxy: FrameURL) -> dict[str, str]:
    return {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}


def _is_quiet(sock: socket.socket) -> bool:
    """Say whether nothing has come since the last answer: neither the end nor, as some servers do before it, a 408."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return not poll.poll(0)


def _remaining(end: float, most: float) -> float:
    left = min(most, end - time.monotonic())
    if left <= 0:
        raise TimeoutError("the total time is over")
    return left


def _retry_after(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, at most a few minutes."""
    if value is None:
        return None
    if value.strip().isascii() and value.strip().isdigit():
        seconds = float(value.strip()[:9])
    else:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER_S)


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
    if found is None:
        return None
    return "Basic " + b64encode(f"{found[0]}:{found[2]}".encode()).decode()


def _said(exc: BaseException) -> str:
    """Return what an exception says, on one line."""
    text = getattr(exc, "strerror", None) or str(exc) or type(exc).__name__
    return " ".join(str(text).split())[:200]


def _netloc(address: FrameURL) -> str:
    host = f"[{address.host}]" if ":" in address.host else address.host
    return f"{host}:{address.port}"


def _host(address: FrameURL) -> str:
    """Return host and port as the Host header has them: without the scheme's own port."""
    return _netloc(address).removesuffix(f":{WEB[address.scheme]}")
