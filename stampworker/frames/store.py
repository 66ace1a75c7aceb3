"""The store of frames: it checks which may be read, opens them by URL, and keeps the last ones open."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar
from urllib.parse import quote, unquote

from stampworker.errors import FrameCorrupt, FrameRefused
from stampworker.frames.cache import CacheBudget
from stampworker.frames.fits.gunzip import inflate
from stampworker.frames.fits.header import Hdu, find, iter_hdus, reload
from stampworker.frames.fits.inherit import with_inherited
from stampworker.frames.fits.plain import PlainImage
from stampworker.frames.fits.section import Section
from stampworker.frames.fits.tiles import TiledImage
from stampworker.frames.frame import Frame, Image, Pixels
from stampworker.frames.io.buckets import BucketClient, BucketFile
from stampworker.frames.io.failures import FailureCache
from stampworker.frames.io.http import WebClient, WebFile
from stampworker.frames.io.local import LocalRoots, open_local, sort_error
from stampworker.frames.io.memory import MemoryFile, open_memory
from stampworker.frames.io.ranges import Remote, open_remote
from stampworker.frames.io.sources import GZIP_MAGIC, CachedBytes, Source
from stampworker.frames.limits import byte_limit, time_limit
from stampworker.frames.urls import BUCKETS, REMOTE, WEB, FrameURL, parse, parse_root, redact, scheme_of

if TYPE_CHECKING:
    from stampworker.config import FrameSettings

log = logging.getLogger(__name__)

T = TypeVar("T")


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_WORTH_TRIMMING = 4 << 20  # freed bytes that are worth a millisecond
_MAX_OPENED = 4096  # frames that are found again by their URL; one file can have any number of URLs
_MAX_URL = 8192  # characters; Linux has 4096 for a path, most servers 8192
_MAX_FRAGMENT = 100  # characters; a card has room for 68 of EXTNAME
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class FrameKey(NamedTuple):
    """What names a frame: its URL or path, and whether it is opened as a mask."""

    url: str
    is_mask: bool


IsFresh = Callable[[], bool]
"""Returns False if a URL or path no longer leads to the state of the file that was opened."""


@dataclass(eq=False)
class _File:
    """A file that is open, or to be opened."""

    key: str  # its resolved path or its URL
    open_source: Callable[[str], Source]
    is_fresh: IsFresh
    lock: threading.Lock = field(default_factory=threading.Lock)
    images: dict[tuple[int, bool], Image] = field(default_factory=dict)  # by the HDU's index and whether it is a mask
    source: Source | None = None  # of a gzip file the decompressed bytes
    hdus: list[Hdu] = field(default_factory=list)  # as far as they were needed; with the cards of the first one only

    def iter_hdus(self, source: Source, url: str, max_header_bytes: int) -> Iterator[Hdu]:
        """Yield the HDUs, known ones without cards; headers are read only as far as needed."""
        yield from self.hdus
        for hdu in iter_hdus(source, url, max_header_bytes, self.hdus.copy()):
            self.hdus.append(hdu.without_cards() if hdu.index else hdu)
            yield hdu


class FrameStore:
    """Opens frames and keeps a bounded number of them open.

    Parameters
    ----------
    settings : FrameSettings
        Roots and limits.
    allowed : iterable of str
        URLs of frames that may be read outside the roots too, such as those that a command's flags name.
    base : Path, optional
        Folder that relative paths start from; by default the first root.

    Raises
    ------
    ConfigError
        A root is neither a folder nor a URL prefix that can be read, or the package that reads it is not installed.

    Notes
    -----
    Threads may share a store. ``with`` closes it. The most recently used files stay open: at most ``max_open_frames``,
    one descriptor each, and ``cache_bytes`` of data that was decompressed or came from a server. A local file is opened
    again after it was replaced or rewritten; a remote file after ``remote_ttl_s``, or when the answer to a range shows
    that the file has changed.
    """

    def __init__(self, settings: FrameSettings, *, allowed: Iterable[str] = (), base: Path | None = None) -> None:
        self._settings = settings
        local = [root for root in settings.frame_roots if scheme_of(root) in (None, "file")]
        named = [split_fragment(url)[0] for url in allowed]
        self._folders = LocalRoots(local, [url for url in named if scheme_of(url) not in REMOTE], base)
        self._urls = [parse_root(root) for root in settings.frame_roots if root not in local]
        self._urls += [parse(url) for url in named if scheme_of(url) in REMOTE]
        first = settings.frame_roots[0] if settings.frame_roots else ""
        self._base_url = first if base is None and scheme_of(first) in REMOTE else None
        self._failures = FailureCache(settings.failure_ttl_s)
        self._web = WebClient(settings, self._urls, self._failures)
        self._buckets = BucketClient(settings, self._urls, self._failures)
        self._memory = open_memory() if any(root.scheme == "memory" for root in self._urls) else None
        self._budget = CacheBudget(settings.cache_bytes)
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._opened: OrderedDict[FrameKey, tuple[_File, IsFresh, Frame]] = OrderedDict()
        self._lock = threading.RLock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the store: it opens nothing more, and frames that are still referred to stay readable."""
        with self._lock:
            self._closed = True
            self._files.clear()
            self._opened.clear()
        self._web.close()

    def evict_unused(self) -> None:
        """Forget data (decompressed, or from a server) not used since the last call; call it once per batch."""
        self._failures.sweep()
        before = self._budget.nbytes
        self._budget.evict_unused()
        if _malloc_trim is not None and before - self._budget.nbytes > _WORTH_TRIMMING:
            # glibc keeps freed memory that is between other allocations; with changing frames it would grow endlessly.
            _malloc_trim(0)

    @property
    def cached_bytes(self) -> int:
        """Bytes of data held now, decompressed or from a server."""
        return self._budget.nbytes

    @contextlib.contextmanager
    def allowance(self) -> Iterator[None]:
        """Limit what this thread reads in the block to ``total_s`` and ``max_alert_bytes``, as for one alert."""
        with time_limit(self._settings.total_s), byte_limit(self._settings.max_alert_bytes):
            yield

    def open_many(self, wanted: Iterable[FrameKey]) -> dict[FrameKey, Future[Frame]]:
        """Open remote frames, several at a time.

        Parameters
        ----------
        wanted : iterable of FrameKey
            Frames in the order of their use. Local frames, which open at once, are skipped, and so are remote ones
            beyond the first ``max_open_frames``.

        Returns
        -------
        opened : dict of FrameKey to Future
            What `open` returned or raised for each frame that was not skipped. All are done.
        """
        keys = [key for key in dict.fromkeys(wanted) if self._is_remote(split_fragment(key.url)[0])]
        del keys[self._settings.max_open_frames :]  # more would evict each other
        futures = self._in_parallel([partial(self.open, key.url, mask=key.is_mask) for key in keys])
        return dict(zip(keys, futures, strict=True))

    def prefetch_sections(self, wanted: Iterable[tuple[Iterable[Frame], Iterable[Section]]]) -> None:
        """Fetch what sections of remote frames need, with few requests, several at a time.

        Rows or tiles that sections share, or that are close together, are requested once. An error is raised again
        when the section is sliced.

        Parameters
        ----------
        wanted : iterable of (frames, sections)
            Sets of frames, in the order of their use, and the sections that will be sliced of each frame of a set, one
            per alert; sections may hang over the edge. Two kinds are not fetched: a section that costs more than
            ``max_alert_bytes``, which is refused when it is sliced, and what does not fit in half of ``cache_bytes``,
            which is read when it is sliced. The other half is for the batch that is worked on meanwhile.
        """
        sections: dict[Frame, list[Section]] = {}
        for frames, alert_sections in wanted:
            frame_set = list(frames)
            for alert_section in alert_sections:
                for frame, section in self._affordable(frame_set, alert_section):
                    sections.setdefault(frame, []).append(section)
        tasks = [task for frame, needed in sections.items() for task in frame.fetch_tasks(needed)]
        totals = itertools.accumulate(task.size for task in tasks)
        fitting = sum(total <= self._settings.cache_bytes // 2 for total in totals)
        self._in_parallel([task.run for task in tasks[:fitting]])

    def _affordable(self, frames: list[Frame], section: Section) -> list[tuple[Frame, Section]]:
        """Return what must be fetched of frames for one alert's section; nothing if that is above its limit."""
        with contextlib.suppress(Exception):  # raised again when the section is sliced, and costs that alert only
            needs = [need for frame in frames if (need := frame.section_for(section)) is not None]
            if sum(frame.bytes_needed(needed) for frame, needed in needs) <= self._settings.max_alert_bytes:
                return needs
        return []

    def _in_parallel(self, tasks: list[Callable[[], T]]) -> list[Future[T]]:
        """Run tasks, several at a time, and return their results when all are done."""
        with ThreadPoolExecutor(self._settings.prefetch_threads, "frames") as threads:
            return [threads.submit(task) for task in tasks]

    def open(self, url: str, *, mask: bool = False) -> Frame:
        """Return the frame at a URL or path.

        Parameters
        ----------
        url : str
            Path or URL (``file:``, ``http:``, ``https:``, ``s3:``, ``gs:``, ``abfs:``, ``memory:``), with an optional
            fragment: EXTNAME in any case, ``NAME,ver`` or a number. Without a fragment, the first HDU with a 2-D image.
        mask : bool
            True for a mask: its integers are not converted to floats.

        Returns
        -------
        frame : Frame
            The same one while it is open and its file is unchanged.

        Raises
        ------
        FrameMissing
            There is no such file.
        FrameRefused
            The URL is not a path or URL, is outside the roots or redirects out of them, or the frame is above a limit.
        FrameUnavailable
            The file cannot be read now: permission, input/output error, a server that is down, busy or slow.
        FrameCorrupt
            The file is not FITS, is cut off, or has no such 2-D image.
        """
        key = FrameKey(url, mask)
        frame = self._opened_before(key)
        if frame is not None:
            return frame
        given, fragment = _checked(url)
        anchor = f"#{quote(fragment, safe=',')}" if fragment else ""
        locate = self._locate_remote if self._is_remote(given) else self._locate_local
        file, is_fresh, display_url = locate(given, anchor)
        try:
            # Threads that want the same file wait for each other here; other files are opened at the same time.
            with file.lock, time_limit(self._settings.total_s):
                frame = Frame(display_url, self._load(file, display_url, fragment, mask))
        except BaseException:
            if not file.images:
                self._forget(file)
            raise
        with self._lock:
            if self._files.get(file.key) is file:
                *_, frame = self._opened.setdefault(key, (file, is_fresh, frame))  # another thread may have been first
                if len(self._opened) > _MAX_OPENED:
                    self._opened.popitem(last=False)
        return frame

    def _opened_before(self, key: FrameKey) -> Frame | None:
        """Return a frame that is open already, unless its file has changed."""
        with self._lock:
            if self._closed:
                raise ValueError("this FrameStore is closed")
            opened = self._opened.get(key)
            if opened is None:
                return None
            file, is_fresh, frame = opened
            self._files.move_to_end(file.key)
            self._opened.move_to_end(key)
        if is_fresh():
            return frame
        self._forget(file)
        return None

    def _is_remote(self, given: str) -> bool:
        """Return True for a remote URL, and for a relative path if the first root is a remote URL."""
        scheme = scheme_of(given)
        return scheme in REMOTE or (scheme is None and self._base_url is not None and given[:1] not in ("", "/"))

    def _locate_local(self, given: str, anchor: str) -> tuple[_File, IsFresh, str]:
        path = self._folders.path(given, given + anchor)
        display_url = "file://" + quote(str(path)) + anchor
        resolved = self._folders.resolve(path, display_url)
        try:
            signature = _signature(Path(resolved))
        except OSError as exc:
            raise sort_error(exc, display_url) from exc
        open_source = partial(open_local, resolved, self._folders)
        file = self._file(_File(resolved, open_source, partial(_is_unchanged, Path(resolved), signature)))
        # The path may have links, which may lead elsewhere later.
        return file, partial(_is_unchanged, path, signature), display_url

    def _locate_remote(self, given: str, anchor: str) -> tuple[_File, IsFresh, str]:
        if self._base_url is not None and scheme_of(given) is None:
            path = quote(given) if scheme_of(self._base_url) in WEB else given
            given = self._base_url + ("" if self._base_url.endswith("/") else "/") + path
        frame_url = parse(given)
        if not any(frame_url.beneath(root) for root in self._urls):
            roots = ", ".join(root.display_url for root in self._urls) or "no URL configured"
            raise FrameRefused(redact(given), f"outside the frame roots; frame_roots: {roots}")
        remote = self._protocol(frame_url)
        expires = time.monotonic() + self._settings.remote_ttl_s

        def open_source(url: str) -> Source:
            return open_remote(remote, url, self._budget, self._settings.max_alert_bytes)

        file = self._file(_File(given, open_source, lambda: not remote.changed and time.monotonic() <= expires))
        return file, file.is_fresh, frame_url.display_url + anchor

    def _protocol(self, frame_url: FrameURL) -> Remote:
        if frame_url.scheme in WEB:
            return WebFile(self._web, frame_url)
        if frame_url.scheme in BUCKETS:
            return BucketFile(self._buckets, frame_url)
        return MemoryFile(self._memory, frame_url)

    def _load(self, file: _File, url: str, fragment: str, mask: bool) -> Image:
        """Return the image that a fragment names, made once per file; the caller holds the file's lock."""
        settings, file_url = self._settings, url.partition("#")[0]
        source = file.source = file.source or self._open_source(file, file_url)
        hdu = find(file.iter_hdus(source, url, settings.max_header_bytes), fragment, url)
        image = file.images.get((hdu.index, mask))
        if image is not None:
            return image
        if not hdu.cards:
            hdu = reload(source, url, hdu, settings.max_header_bytes)
        if max(hdu.axes) > settings.max_axis:
            raise FrameRefused(url, f"{hdu} has shape {hdu.axes}, above max_axis ({settings.max_axis})")
        if hdu.offset + hdu.size > source.size:
            raise FrameCorrupt(
                url,
                f"truncated: the data of {hdu}, shape {hdu.axes}, end at byte {hdu.offset + hdu.size}, "
                f"the file at {source.size}",
            )
        pixels = self._pixels(source, hdu, file_url, mask)
        image = file.images[hdu.index, mask] = Image(with_inherited(hdu, file.hdus[0]), pixels, source, file_url)
        return image

    def _open_source(self, file: _File, url: str) -> Source:
        source = file.open_source(url)
        if source.read(0, min(2, source.size)) != GZIP_MAGIC:
            return source
        unpack = partial(inflate, source, url, self._settings)
        return CachedBytes(unpack, url, self._budget, packed=source.bytes_upfront)

    def _pixels(self, source: Source, hdu: Hdu, url: str, mask: bool) -> Pixels:
        if hdu.kind == "image":
            return PlainImage(source, hdu, url, mask=mask)
        limit = self._settings.max_decompressed_bytes
        return TiledImage(source, hdu, url, mask=mask, budget=self._budget, limit=limit)

    def _file(self, new: _File) -> _File:
        """Return the open file of the same key if it is fresh, else the new one."""
        with self._lock:
            file = self._files.get(new.key)
            if file is None or not file.is_fresh():
                if file is not None:
                    self._forget(file)
                file = self._files[new.key] = new
            self._files.move_to_end(file.key)
            while len(self._files) > self._settings.max_open_frames:
                self._forget(next(iter(self._files.values())))
        return file

    def _forget(self, file: _File) -> None:
        with self._lock:
            if self._files.get(file.key) is file:
                del self._files[file.key]
            for key in [key for key, (of, *_) in self._opened.items() if of is file]:
                del self._opened[key]


def split_fragment(url: str) -> tuple[str, str]:
    """Return a URL or path without its fragment, and the fragment decoded."""
    given, _, fragment = url.partition("#")
    return given, unquote(fragment)


def _checked(url: str) -> tuple[str, str]:
    """Return what `split_fragment` returns; raise `FrameRefused` for what cannot be a URL or path."""
    if len(url) > _MAX_URL:
        problem = f"{len(url)} characters, wanted a URL or path of at most {_MAX_URL}"
        raise FrameRefused(ascii(redact(url)[:100]), problem)
    if _SURROGATE.search(url):
        raise FrameRefused(ascii(redact(url)), "half of a character (a surrogate), wanted text")
    given, fragment = split_fragment(url)
    if len(fragment) > _MAX_FRAGMENT:
        raise FrameRefused(redact(given), f"a fragment of {len(fragment)} characters, wanted an HDU's name or number")
    if "@" in fragment and scheme_of(given) is not None:  # a password with a # in it
        raise FrameRefused(redact(url), "an @ after the #, wanted name or number of an HDU there")
    return given, fragment


def _signature(path: Path) -> tuple[int, ...]:
    """Return what tells a file from another one, or from another state, at the same path."""
    found = path.stat()
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _is_unchanged(path: Path, signature: tuple[int, ...]) -> bool:
    try:
        return _signature(path) == signature
    except OSError:  # raised again, as the frame's error, when the file is opened
        return False
