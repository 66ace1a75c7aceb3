"""Connections to the servers of frames.

urllib3 keeps the connections and speaks HTTP, TLS and the proxies' protocol. Two things are added. A connection leads
to the very address that was checked: a host may resolve to another one the next time. And every single wait, those for
headers and for TLS included, ends by the thread's time limit. A proxy looks servers up by itself, so no address is
checked there: whoever sets a proxy vouches for where it leads.
"""

from __future__ import annotations

import http.client
import ipaddress
import logging
import math
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from urllib.request import getproxies, proxy_bypass

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.exceptions import HTTPError

from stampworker.errors import ConfigError, FrameRefused
from stampworker.frames.limits import end_within
from stampworker.frames.urls import WEB, FrameURL, Origin, parse, scheme_of, without_credentials

if TYPE_CHECKING:
    from stampworker.config import FrameSettings

_IDLE_CONNECTIONS = 16  # of one server
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Where clouds answer their machines' questions for credentials: AWS over IPv6, Alibaba, Oracle, Azure.
_METADATA = {"fd00:ec2::254", "100.100.100.200", "192.0.0.192", "168.63.129.16"}
_NO_RETRIES = urllib3.Retry(total=False, redirect=False)
_AGENT = f"stampworker/{version('stampworker')}"

_lookups = threading.BoundedSemaphore(16)

# urllib3 logs whole URLs, signatures included. Inside a time limit a thread makes requests for frames.
for _name in ("urllib3.connection", "urllib3.connectionpool"):
    logging.getLogger(_name).addFilter(lambda record: end_within(math.inf) == math.inf)


class NotConnected(Exception):
    """No connection could be made; the message, where there is one, says which step failed, the cause says why."""


class AddressRefused(Exception):
    """Every address of a host is one that frames must not come from."""


class _Closed(Exception):
    """The server closed a kept connection before it answered."""


class _Timed:
    """A socket whose every wait ends by the thread's time limit, too."""

    _wait_s: float = math.inf

    def settimeout(self, value: float | None) -> None:
        self._wait_s = math.inf if value is None else value
        super().settimeout(value)  # type: ignore[misc]

    def recv_into(self, *args: Any) -> int:
        super().settimeout(_left(self._wait_s))  # type: ignore[misc]
        received: int = super().recv_into(*args)  # type: ignore[misc]
        return received


class _PlainSocket(_Timed, socket.socket):
    pass


class _TlsSocket(_Timed, ssl.SSLSocket):
    def do_handshake(self, block: bool = False) -> None:
        self.settimeout(_left(self._wait_s))
        super().do_handshake(block)


class _Connection(HTTPConnection):
    """A connection to an address that was checked."""

    _is_reused = False

    def connect(self) -> None:
        self._is_reused = False
        try:
            super().connect()
        except (OSError, UnicodeError, http.client.HTTPException, HTTPError) as exc:
            self.close()
            raise NotConnected from exc

    def getresponse(self) -> urllib3.HTTPResponse:  # type: ignore[override]
        is_reused, self._is_reused = self._is_reused, True
        try:
            return super().getresponse()
        except (ConnectionError, ssl.SSLEOFError) as exc:
            if is_reused:
                raise _Closed from exc
            raise

    def _new_conn(self) -> socket.socket:
        problem: OSError | None = None
        for family, sockaddr in self._addresses():
            sock = _PlainSocket(family, socket.SOCK_STREAM)
            try:
                sock.settimeout(_left(self.timeout or math.inf))
                sock.connect(sockaddr)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
            except OSError as exc:
                sock.close()
                problem = exc
        raise problem or OSError("no address")

    def _addresses(self) -> list[tuple[int, Any]]:
        """Return the host's addresses that frames may come from."""
        try:
            found = _look_up(self.host, self.port, _left(self.timeout or math.inf))
        except (OSError, UnicodeError) as exc:
            raise NotConnected(f"host {self.host!r} is not found") from exc
        allowed, refused = [], ""
        for family, _, _, _, sockaddr in found:
            ip = str(sockaddr[0])
            kind = None if self.proxy is not None or _names(self.host, ip) else forbidden(ip)
            if kind is None:
                allowed.append((family, sockaddr))
            else:
                refused = f"host {self.host!r} is at {ip}, {kind} address"
        if refused and not allowed:
            raise AddressRefused(refused)
        return allowed


class _TlsConnection(_Connection, HTTPSConnection):
    pass


class _Pool(urllib3.HTTPConnectionPool):
    ConnectionCls = _Connection


class _TlsPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = _TlsConnection


class Connections:
    """Connections to the servers of the roots; ``proxies`` are those of each server, None where there is none.

    `ConfigError` where a proxy of the environment cannot be used.
    """

    def __init__(self, settings: FrameSettings, roots: Sequence[FrameURL]) -> None:
        self._options: dict[str, Any] = {
            "maxsize": _IDLE_CONNECTIONS,
            "timeout": urllib3.Timeout(connect=settings.connect_s, read=settings.read_s),
        }
        if any(root.scheme == "https" for root in roots):
            context = ssl.create_default_context()  # with the system's certificates (SSL_CERT_FILE, SSL_CERT_DIR)
            context.sslsocket_class = _TlsSocket
            self._options["ssl_context"] = context
        proxies = {scheme: _proxy(scheme) for scheme in WEB} if roots else {}
        self.proxies = {root.origin: None if proxy_bypass(netloc(root)) else proxies[root.scheme] for root in roots}
        self._pools = self._make_pools()

    def close(self) -> None:
        """Close the connections that are kept; frames that are still referred to make new ones."""
        pools, self._pools = self._pools, self._make_pools()
        for pool in pools.values():
            pool.close()

    def _make_pools(self) -> dict[Origin, urllib3.HTTPConnectionPool]:
        managers = {proxy: _manager(proxy, self._options) for proxy in self.proxies.values()}
        return {
            (scheme, host, port): managers[proxy].connection_from_host(host, port, scheme)
            for (scheme, host, port), proxy in self.proxies.items()
        }

    def send(self, url: FrameURL, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """Send a GET and return the answer, its body unread; errors are those of `_Connection` and of urllib3."""
        pool, target = self._pools[url.origin], url.target
        if self.proxies[url.origin] is not None and url.scheme == "http":
            target = f"http://{netloc(url).removesuffix(':80')}{target}"
        while True:
            try:
                return pool.urlopen(
                    "GET",
                    target,
                    headers={"User-Agent": _AGENT, "Accept-Encoding": "identity", **headers},
                    retries=_NO_RETRIES,
                    redirect=False,
                    assert_same_host=False,  # through a proxy it is another one
                    preload_content=False,
                    decode_content=False,
                    enforce_content_length=False,  # io.http does it
                )
            except _Closed:  # each turn uses up one kept connection
                continue


def forbidden(ip: str) -> str | None:
    """Return the kind of an address that no frame may come from unless a root names it; None for any other."""
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
        "a cloud metadata": str(address) in _METADATA,
    }
    return next((name for name, applies in kinds.items() if applies), None)


def _names(host: str, ip: str) -> bool:
    """Return True if a host of a URL, which a root has too, is that very address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host) == ipaddress.ip_address(ip)
    except ValueError:
        return False


def _look_up(host: str, port: int, seconds: float) -> list[Any]:
    """Return what `socket.getaddrinfo` returns or raises; `TimeoutError` where it takes longer.

    It has no time limit of its own, so a thread that hangs in it is left behind: at most as many as `_lookups` allows.
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


def _manager(proxy: FrameURL | None, options: dict[str, Any]) -> urllib3.PoolManager:
    manager = urllib3.PoolManager(**options)
    if proxy is not None:
        headers = {"Proxy-Authorization": proxy.authorization} if proxy.authorization else {}
        manager = urllib3.ProxyManager(f"http://{netloc(proxy)}", proxy_headers=headers, **options)
    manager.pool_classes_by_scheme = {"http": _Pool, "https": _TlsPool}
    return manager


def _left(seconds: float) -> float:
    """Return how long a wait of at most ``seconds`` may take; `TimeoutError` where the time limit is over."""
    left = end_within(seconds) - time.monotonic()
    if left <= 0:
        raise TimeoutError("the total time is over")
    return left


def netloc(url: FrameURL) -> str:
    """Return ``host:port``, an IPv6 address in brackets."""
    host = f"[{url.host}]" if ":" in url.host else url.host
    return f"{host}:{url.port}"
