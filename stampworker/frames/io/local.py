"""Local frames: whether a path, and then the file that was opened, is beneath a root.

A path is resolved and checked before it is opened: no file outside the roots is touched. In between, a folder may be
swapped for a link: so the location of the opened file is checked again.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from stampworker.errors import ConfigError, FrameCorrupt, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.frames.io.sources import open_file
from stampworker.frames.urls import REMOTE, redact, scheme_of

if TYPE_CHECKING:
    from stampworker.frames.io.sources import Source

_GONE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class LocalRoots:
    """What may be read of the local file system.

    ``roots`` are folders, ``allowed`` files that may be read wherever they are: paths or ``file:`` URLs. Relative paths
    start at ``base``, by default the first root. `ConfigError` where a root is not a folder that exists.
    """

    def __init__(self, roots: Iterable[str], allowed: Iterable[str], base: Path | None) -> None:
        self._roots = [_root(root) for root in roots]
        self._allowed = {os.path.realpath(_local(url)) for url in allowed}
        start = base or next(iter(self._roots), None)
        self._base = None if start is None else Path(start).absolute()

    def path(self, given: str, url: str) -> Path:
        """Return the absolute path of a URL or path without fragment; `FrameRefused` for another host or scheme."""
        scheme = scheme_of(given)
        if scheme == "file":
            try:
                given = _local(given)
            except ValueError as exc:
                raise FrameRefused(redact(url), str(exc)) from None
        elif scheme is not None:
            wanted = f"wanted a path or a URL: file:, {':, '.join(REMOTE)}:"
            raise FrameRefused(redact(url), f"scheme {scheme!r}, {wanted}")
        elif given.startswith("//"):
            raise FrameRefused(redact(url), "a host without a scheme, wanted a path or a URL")
        if "\0" in given or not given:
            raise FrameRefused(ascii(url), "not a path")
        if self._base is None and not Path(given).is_absolute():
            raise FrameRefused(url, "a relative path, and no frame root is configured (frame_roots)")
        # Not normpath: "link/.." is the parent of what the link points to.
        return Path(self._base or "/", given)

    def resolve(self, path: Path, url: str) -> str:
        """Return the path with symlinks resolved; `FrameRefused` outside the roots."""
        resolved = os.path.realpath(path)
        self.check(resolved, "" if resolved == str(path) else f" (it resolves to {resolved})", url)
        return resolved

    def check(self, resolved: str, where: str, url: str) -> None:
        """Raise `FrameRefused`, with ``where`` in its message, unless a path without links is beneath a root."""
        if resolved in self._allowed or any(_beneath(resolved, root) for root in self._roots):
            return
        roots = ", ".join(self._roots) or "none configured"
        raise FrameRefused(url, f"outside the frame roots{where}; frame_roots: {roots}")


def open_local(path: str, roots: LocalRoots, url: str) -> Source:
    """Return a source over a local file; ``path`` is what `LocalRoots.resolve` returns, ``url`` names it in messages.

    Raises
    ------
    FrameMissing, FrameUnavailable
        It cannot be opened.
    FrameCorrupt
        It is a folder, or empty.
    FrameRefused
        It is neither file nor folder, or is outside the roots by now.
    """
    try:
        # Opening a pipe would block. O_NONBLOCK does not change how regular files are read.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        raise sort_error(exc, url) from exc
    try:
        location = _location(fd, path)
        roots.check(location, f" (the opened file is at {location})", url)
        found = os.fstat(fd)
        if stat.S_ISDIR(found.st_mode):
            raise FrameCorrupt(url, "a directory, wanted a FITS file")
        if not stat.S_ISREG(found.st_mode):
            raise FrameRefused(url, "neither file nor directory, wanted a FITS file")
        if found.st_size == 0:
            raise FrameCorrupt(url, "the file is empty, wanted FITS")
        return open_file(fd, url)
    finally:
        os.close(fd)


def sort_error(exc: OSError, url: str) -> FrameMissing | FrameUnavailable:
    """Return the frame's error for an error of the system."""
    if exc.errno in _GONE:
        return FrameMissing(url, f"no such file ({exc.strerror})")
    return FrameUnavailable(url, f"cannot be opened: {exc.strerror}")


def _location(fd: int, path: str) -> str:
    """Return the location of an open file; on systems without /proc, where its path leads now."""
    try:
        location = str(Path(f"/proc/self/fd/{fd}").readlink())
        return location if os.fstat(fd).st_nlink else location.removesuffix(" (deleted)")
    except OSError:
        return os.path.realpath(path)


def _root(root: str) -> str:
    wanted = "wanted a folder that is there, or a URL prefix"
    try:
        folder = _local(root)
        if not folder or not Path(folder).is_dir():
            raise ConfigError(f"frames.frame_roots: found {redact(root)!r}, which is no folder, {wanted}")
    except (ValueError, OSError) as exc:
        raise ConfigError(f"frames.frame_roots: found {redact(root)!r}: {exc}, {wanted}") from None
    return os.path.realpath(folder)


def _local(url: str) -> str:
    """Return a path as it is, and that of a ``file:`` URL; `ValueError` where it is another host's."""
    if scheme_of(url) is None:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # whose text might show a piece of a password
        raise ValueError("not a URL") from None
    if parts.netloc.lower() not in ("", "localhost"):
        raise ValueError(f"file on host {parts.hostname!r}, wanted a local one")
    return unquote(parts.path)


def _beneath(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)
