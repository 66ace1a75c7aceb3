"""URLs of frames: what they name, beneath which root, and how they are shown.

A URL lies beneath a root when scheme, host and port are equal and its path begins with the root's, folder by folder,
after percent-decoding. Anything that servers are known to read differently from what it looks like is refused:
``..`` in any disguise, an encoded slash, a backslash.
"""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass
from urllib.parse import quote, unquote, urljoin, urlsplit

from stampworker.errors import ConfigError, FrameRefused

WEB = {"http": 80, "https": 443}
"""Schemes of the web with their ports."""
BUCKETS = ("s3", "gs", "abfs")
"""Schemes of buckets: Amazon's and whatever speaks S3, Google's, Azure's containers."""
REMOTE = (*WEB, *BUCKETS, "memory")
"""Schemes of frames that are not files."""

_SCHEME = re.compile(rf"({'|'.join(REMOTE)}|file)(?=:)|[A-Z][A-Z0-9+.:-]*(?=://)", re.IGNORECASE)
_HIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\ud800-\udfff]")
# Names of parameters that carry, or accompany, a signature or a key: S3, GCS, CloudFront, Azure's SAS, and the like.
# Words anywhere in a name, and whole names, which may follow a prefix as in my_key.
_WORDS = "signature|token|secret|passw|sessid|credential|hmac|bearer"
_NAMES = (
    r"sig|key|pass|pwd|pw|auth(?:key|token|orization)?|creds?|policy|session(?:-?_?id)?"
    r"|jwt|ticket|saml\w*|login|md5|code"
)
_SIGNED = re.compile(
    rf"(?:^|[&;])(?:x-(?:amz|goog|ms)-[^=&;]*|s[a-z]|[^=&;]*(?:{_WORDS})[^=&;]*"
    rf"|(?:[^=&;]*[-_.])?(?:{_NAMES})|(?:api|aws|access)\w*key\w*|key-pair-id)="
    r"|=eyJ",  # a token in JSON
    re.IGNORECASE,
)
_BEFORE_HOST = re.compile(r"(^\w[\w+.-]*:(?://)?|//).*@", re.DOTALL)  # some URLs lack the slashes
_SAFE = "/%:=&?~+!$,;'@()*[]"  # as in the URL already: whoever wrote it has decided


@dataclass(frozen=True)
class FrameURL:
    """A remote URL, taken apart.

    Attributes
    ----------
    scheme, host : str
        In lower case; a bucket is a host. That of ``memory:`` is empty.
    port : int
        The scheme's own where the URL names none.
    folders : tuple of str
        The path's segments, decoded (those of buckets and of memory as they are: a key is not encoded).
    target : str
        Path and query as they are asked for; the key.
    authorization : str or None
        Value of the header, from a name and password in the URL.
    display_url : str
        The URL without credentials, for messages and packets.
    """

    scheme: str
    host: str
    port: int
    folders: tuple[str, ...]
    target: str
    authorization: str | None
    display_url: str

    @property
    def origin(self) -> tuple[str, str, int]:
        """Scheme, host and port."""
        return self.scheme, self.host, self.port

    def beneath(self, root: FrameURL) -> bool:
        """Say whether this lies beneath a root."""
        folders = root.folders[:-1] if root.folders[-1] == "" else root.folders
        return self.origin == root.origin and self.folders[: len(folders)] == folders


def scheme_of(url: str) -> str | None:
    """Return the scheme of a URL in lower case; None for a path."""
    match = _SCHEME.match(url)
    return match[0].lower() if match else None


def parse(url: str) -> FrameURL:
    """Take a remote URL without fragment apart.

    Parameters
    ----------
    url : str
        Its scheme is one of `REMOTE`.

    Returns
    -------
    address : FrameURL

    Raises
    ------
    FrameRefused
        It is not a URL, or its path could be read as leaving its folder.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise _unreadable() from None
    shown = redact(url)
    scheme, host = parts.scheme.lower(), (parts.hostname or "").rstrip(".")
    if _HIDDEN.search(url if scheme in WEB else url.replace(" ", "")) or "\\" in url:
        raise FrameRefused(ascii(shown), "blanks, control characters or backslashes, wanted a URL")
    if scheme not in WEB:
        return _keyed(url, scheme, host, port)
    if not host.isascii():
        raise FrameRefused(ascii(shown), "a host in other letters than ASCII's, wanted its xn-- form")
    if not host:
        raise FrameRefused(shown, "no host, wanted scheme://host/path")
    if port is None:
        port = WEB[scheme]
    segments = parts.path.removeprefix("/").split("/")
    for segment in segments:
        _check(segment, shown)
    target = quote("/" + parts.path.removeprefix("/"), safe=_SAFE)
    if parts.query:
        target += "?" + quote(parts.query, safe=_SAFE)
    return FrameURL(
        scheme, host, port, tuple(map(unquote, segments)), target, _authorization(url), without_credentials(url)
    )


def _unreadable() -> FrameRefused:
    return FrameRefused("<unreadable URL>", "not a URL")  # which might show a piece of a password


def _keyed(url: str, scheme: str, host: str, port: int | None) -> FrameURL:
    """Take ``scheme://bucket/key`` or ``memory://key`` apart; a question mark is a letter of a key."""
    shown = redact(url)
    key = url.partition("://")[2]
    if scheme == "memory":
        host, key = "", key.removeprefix("/")
    else:
        bucket, _, key = key.partition("/")
        wanted = f"wanted {scheme}://bucket/folder/name"
        if "@" in bucket:
            raise FrameRefused(
                shown, f"an @ before the path, {wanted}: account and credentials are set by the operator"
            )
        if not host or not host.isascii() or port is not None:
            raise FrameRefused(ascii(shown), f"no bucket, {wanted}")
    segments = key.split("/")
    if "" in segments[:-1]:
        raise FrameRefused(shown, "an empty folder in the key")
    for segment in segments:
        _check(segment, shown)
    return FrameURL(scheme, host, 0, tuple(segments), key, None, without_credentials(url))


def parse_root(root: str) -> FrameURL:
    """Take a root apart.

    Parameters
    ----------
    root : str
        A URL prefix: ``https://host/path/``, ``s3://bucket/prefix/``, ``memory://prefix/``.

    Returns
    -------
    root : FrameURL

    Raises
    ------
    ConfigError
        It is of an unknown scheme, no URL, or holds credentials, a query or a fragment.
    """
    shown = redact(root)
    if scheme_of(root) not in REMOTE:
        raise ConfigError(
            f"frames.frame_roots: found {shown!r}, wanted a folder or a URL: file:, {':, '.join(REMOTE)}:"
        )
    parts = urlsplit(root)
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"frames.frame_roots: {shown!r} has credentials, a query or a fragment, wanted a prefix only")
    try:
        return parse(root)
    except FrameRefused as exc:
        raise ConfigError(f"frames.frame_roots: {exc}") from exc


def join(base: str, reference: str) -> str:
    """Return the URL of a ``Location`` header, seen from the URL that gave it; `FrameRefused` where it is none."""
    try:
        return urljoin(base, reference)
    except ValueError:
        raise _unreadable() from None


def without_credentials(url: str) -> str:
    """Return a URL without name and password, and without its query where that is, or looks, signed."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "<unreadable URL>"
    if parts.scheme.lower() == "memory":  # which knows neither
        return url
    query = "" if _SIGNED.search(parts.query) else parts.query
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl()


def redact(url: str) -> str:
    """Return a URL that is not known to lie beneath a root, for messages.

    It may not be what it looks like, so that anything before an @ might be a password: one with a slash in it, or that
    of a URL in a URL.
    """
    return _BEFORE_HOST.sub(r"\1***@", without_credentials(url))


def _check(segment: str, shown: str) -> None:
    """Refuse a path segment that is, or might decode to, something that leaves its folder."""
    decoded = segment
    for _ in range(4):
        if decoded.split(";")[0] in (".", ".."):
            raise FrameRefused(shown, f"{segment!r} in the path, wanted one that does not leave its folder")
        if "/" in decoded or "\\" in decoded or "\0" in decoded:
            raise FrameRefused(shown, f"an encoded slash, backslash or NUL in {segment.rpartition('@')[2]!r}")
        decoded, before = unquote(decoded), decoded
        if decoded == before:
            return
    raise FrameRefused(shown, f"{segment.rpartition('@')[2]!r} is percent-encoded again and again")


def _authorization(url: str) -> str | None:
    user, at, _ = urlsplit(url).netloc.rpartition("@")
    return "Basic " + b64encode(unquote(user).encode()).decode() if at else None
