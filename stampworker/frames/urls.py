"""URLs of frames: what they name, beneath which root, and how they are shown.

A URL is beneath a root when scheme, host and port are equal and its path begins with the root's, folder by folder,
after percent-decoding. Anything that servers are known to read differently from what it looks like is refused:
``..`` in any disguise, an encoded slash, a backslash.

A URL is shown without what might be a secret: name and password, every value of the query, whatever follows a ``;`` in
the path. ``https://jane:pw@host/a.fits;v=1?id=7&sig=x`` is shown as ``https://host/a.fits;***?id=***&sig=***``.
"""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

from stampworker.errors import ConfigError, FrameRefused

WEB = {"http": 80, "https": 443}
"""Schemes of the web with their ports."""
BUCKETS = ("s3", "gs", "abfs")
"""Schemes of buckets: Amazon's and whatever speaks S3, Google's, Azure's containers."""
REMOTE = (*WEB, *BUCKETS, "memory")
"""Schemes of frames that are not files."""

Origin = tuple[str, str, int]
"""Scheme, host and port."""

_SCHEME = re.compile(rf"({'|'.join(REMOTE)}|file)(?=:)|[A-Z][A-Z0-9+.:-]*(?=://)", re.IGNORECASE)
_UNREADABLE = "<unreadable URL>"  # not its text, where a piece might be a password
_HIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\ud800-\udfff]")
_PARAMETER = re.compile(r";[^/]*")
_VALUE = re.compile(r"(?<==)[^&]+|(?:^|(?<=&))[^&=]+(?=&|$)")  # after its name, or without one
_BEFORE_HOST = re.compile(r"(^\w[\w+.-]*:(?://)?|//).*@", re.DOTALL)  # some URLs lack the slashes
_SAFE = "/%:=&?~+!$,;'@()*[]"  # as in the URL already: whoever wrote it has decided


@dataclass(frozen=True)
class FrameURL:
    """A remote URL, taken apart."""

    scheme: str  # in lower case
    host: str  # in lower case; the bucket; empty for memory:
    port: int  # the scheme's own where the URL names none
    folders: tuple[str, ...]  # the path's segments, decoded except those of a key
    target: str  # path and query as they are asked for; the key
    authorization: str | None  # value of the header, from a name and password in the URL
    display_url: str  # as messages and packets show it: see `without_credentials`

    @property
    def origin(self) -> Origin:
        """Scheme, host and port."""
        return self.scheme, self.host, self.port

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What tells one file from another: origin and target."""
        return *self.origin, self.target

    def beneath(self, root: FrameURL) -> bool:
        """Return True if this is beneath a root."""
        folders = root.folders[:-1] if root.folders[-1] == "" else root.folders
        return self.origin == root.origin and self.folders[: len(folders)] == folders


def scheme_of(url: str) -> str | None:
    """Return the scheme of a URL in lower case; None for a path."""
    match = _SCHEME.match(url)
    return match[0].lower() if match else None


def parse(url: str) -> FrameURL:
    """Take a URL apart that has no fragment and whose scheme is one of `REMOTE`.

    `FrameRefused` where it is not a URL, or its path could be read as leaving its folder.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise FrameRefused(_UNREADABLE, "not a URL") from None
    display_url = redact(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    if _HIDDEN.search(url if scheme in WEB else url.replace(" ", "")) or "\\" in url:
        raise FrameRefused(ascii(display_url), "blanks, control characters or backslashes, wanted a URL")
    if scheme not in WEB:
        return _keyed(url, scheme, host, port)
    if not host.isascii():
        raise FrameRefused(ascii(display_url), "a host in other letters than ASCII's, wanted its xn-- form")
    if not host:
        raise FrameRefused(display_url, "no host, wanted scheme://host/path")
    path = parts.path.removeprefix("/")
    folders = tuple(map(unquote, _checked(path, display_url)))
    target = "/" + quote(path, safe=_SAFE) + ("?" + quote(parts.query, safe=_SAFE) if parts.query else "")
    user, at, _ = parts.netloc.rpartition("@")
    authorization = "Basic " + b64encode(unquote(user).encode()).decode() if at else None
    port = WEB[scheme] if port is None else port
    return FrameURL(scheme, host, port, folders, target, authorization, without_credentials(url))


def _keyed(url: str, scheme: str, host: str, port: int | None) -> FrameURL:
    """Take ``scheme://bucket/key`` or ``memory://key`` apart; a question mark is a letter of a key."""
    display_url = redact(url)
    key = url.partition("://")[2]
    if scheme == "memory":
        host, key = "", key.removeprefix("/")
    else:
        bucket, _, key = key.partition("/")
        wanted = f"wanted {scheme}://bucket/folder/name"
        if "@" in bucket:
            problem = f"an @ before the path, {wanted}: account and credentials are set by the operator"
            raise FrameRefused(display_url, problem)
        if not host or not host.isascii() or port is not None:
            raise FrameRefused(ascii(display_url), f"no bucket, {wanted}")
    if "" in key.split("/")[:-1]:
        raise FrameRefused(display_url, "an empty folder in the key")
    return FrameURL(scheme, host, 0, tuple(_checked(key, display_url)), key, None, without_credentials(url))


def parse_root(root: str) -> FrameURL:
    """Take a root apart, a URL prefix: ``https://host/path/``, ``s3://bucket/prefix/``, ``memory://prefix/``.

    `ConfigError` where it is of an unknown scheme, no URL, or holds credentials, a query or a fragment.
    """
    display_url = redact(root)
    if scheme_of(root) not in REMOTE:
        wanted = f"wanted a folder or a URL: file:, {':, '.join(REMOTE)}:"
        raise ConfigError(f"frames.frame_roots: found {display_url!r}, {wanted}")
    try:
        found, parts = parse(root), urlsplit(root)
    except FrameRefused as exc:
        raise ConfigError(f"frames.frame_roots: {exc}") from exc
    if "@" in parts.netloc or parts.query or parts.fragment:
        problem = "has credentials, a query or a fragment, wanted a prefix only"
        raise ConfigError(f"frames.frame_roots: {display_url!r} {problem}")
    return found


def join(base: str, reference: str) -> str:
    """Return the URL of a ``Location`` header, seen from the URL that gave it; `FrameRefused` where it is none."""
    try:
        return urljoin(base, reference)
    except ValueError:
        raise FrameRefused(_UNREADABLE, "not a URL") from None


def without_credentials(url: str) -> str:
    """Return a URL without name and password, values of its query and parameters in its path: ``?id=***``."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return _UNREADABLE
    if parts.scheme.lower() == "memory":  # whose names are neither secret nor split at a question mark
        return url
    query = _VALUE.sub("***", parts.query)
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, path=_PARAMETER.sub(";***", parts.path), query=query).geturl()


def redact(url: str) -> str:
    """Return a URL that is not known to be beneath a root, for messages.

    It may not be what it looks like: anything before an @ might be a password that has a slash in it, or that of a URL
    in a URL.
    """
    return _BEFORE_HOST.sub(r"\1***@", without_credentials(url))


def _checked(path: str, display_url: str) -> list[str]:
    """Return the segments of a path; refuse one that leaves its folder, however often it is decoded."""
    segments = path.split("/")
    for segment in segments:
        decoded, named = segment, segment.rpartition("@")[2].partition(";")[0]
        for _ in range(4):
            if decoded.split(";")[0] in (".", ".."):
                raise FrameRefused(display_url, f"{named!r} in the path, wanted one that does not leave its folder")
            if "/" in decoded or "\\" in decoded or "\0" in decoded:
                raise FrameRefused(display_url, f"an encoded slash, backslash or NUL in {named!r}")
            decoded, before = unquote(decoded), decoded
            if decoded == before:
                break
        else:
            raise FrameRefused(display_url, f"{named!r} is percent-encoded again and again")
    return segments


def file_url(path: str | Path) -> str:
    """Return the ``file:`` URL of a path, which may end in ``#HDU``; a URL as it is."""
    text = str(path)
    if scheme_of(text) is not None:
        return text
    name, mark, fragment = text.rpartition("#")
    if not mark or Path(text).exists():  # the name of a file may have the mark
        return Path(text).resolve().as_uri()
    return Path(name).resolve().as_uri() + (f"#{quote(fragment, safe=',')}" if fragment else "")
