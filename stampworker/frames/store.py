"""Frames by URL: what may be read, what is kept open, what each gives."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import logging
import os
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self, TypeVar
from urllib.parse import quote, unquote

from stampworker.errors import FrameCorrupt, FrameRefused
from stampworker.frames.cache import CacheBudget
from stampworker.frames.fits.gunzip import InflateLimits, inflate
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


class FrameKey(NamedTuple):
    """What names a frame: its URL or path, and whether it is opened as a mask."""

    url: str
    is_mask: bool


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
_MUCH = 4 << 20  # freed bytes that are worth a millisecond
_MOST_KNOWN = 4096  # URLs, of which a file may have any number
_LONGEST = 8192  # characters of a URL; Linux has 4096 for a path, most servers 8192
_LONGEST_FRAGMENT = 100  # a card has room for 68 characters of EXTNAME
_SURROGATE = re.compile(r"[\ud800-\udfff]")


class _File:
    """An open file: its bytes, its HDUs as far as they were asked for (the cards of the first alone), and its images.

    ``key`` is its resolved path or its URL; ``signature`` tells it from another file there; ``is_stale`` says that it
    must be opened again.
    """

    def __init__(
        self,
        key: str,
        opener: Callable[[str], Source],
        signature: tuple[int, ...] = (),
        is_stale: Callable[[], bool] = lambda: False,
    ) -> None:
        self.key = key
        self.signature = signature
        self.is_stale = is_stale
        self._opener = opener
        self.lock = threading.Lock()
        self.images: dict[tuple[int, bool], Image] = {}
        self.source: Source | None = None
        self._walked: list[Hdu] = []

    def load(self, url: str, settings: FrameSettings, budget: CacheBudget) -> Source:
        """Open the file, once."""
        if self.source is None:
            source = self._opener(url)
            if source.read(0, min(2, source.size)) == GZIP_MAGIC:
                size, setting = min(
                    (settings.max_decompressed_bytes, "max_decompressed_bytes"),
                    (settings.max_alert_bytes, "max_alert_bytes"),
                )
                limits = InflateLimits(size, setting, settings.max_header_bytes, settings.total_s)
                source = CachedBytes(partial(inflate, source, url, limits), url, budget, packed=source.bytes_upfront)
            self.source = source
        return self.source

    @property
    def primary(self) -> Hdu:
        """The first HDU, when one has been asked for."""
        return self._walked[0]

    def hdus(self, source: Source, url: str, max_header_bytes: int) -> Iterator[Hdu]:
        """Yield the HDUs, those that were passed before bare, reading headers only as far as needed."""
        yield from self._walked
        for hdu in iter_hdus(source, url, max_header_bytes, self._walked.copy()):
            self._walked.append(hdu.without_cards() if hdu.index else hdu)
            yield hdu


class FrameStore:
    """Opens frames and keeps a bounded number of them open.

    Parameters
    ----------
    settings : FrameSettings
        Roots and limits.
    allowed : iterable of str
        URLs of frames that may be read wherever they lie, such as those that a command's flags name.
    base : Path, optional
        Where relative paths start; by default at the first root.

    Raises
    ------
    ConfigError
        A root is neither a folder nor a URL prefix that can be read, or what reads it is not installed.

    Notes
    -----
    Threads may share a store. ``with`` closes it. What was opened is kept by last use: at most ``max_open_frames``
    files, one descriptor each, and ``cache_bytes`` of data that was decompressed or came from a server. A local file
    that was replaced or rewritten is opened again; a remote one when ``remote_ttl_s`` have passed, or a range shows
    that it is another one.
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
        self._known: OrderedDict[FrameKey, tuple[_File, Callable[[], bool], Frame]] = OrderedDict()
        self._lock = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of every file; frames still referred to stay readable."""
        with self._lock:
            self._closed = True
            self._files.clear()
            self._known.clear()
        self._web.close()

    def evict_unused(self) -> None:
        """Forget data (decompressed, or from a server) that was not used since the last call; call it once a batch."""
        self._failures.sweep()
        before = self._budget.nbytes
        self._budget.evict_unused()
        if _malloc_trim is not None and before - self._budget.nbytes > _MUCH:
            # glibc keeps what is freed between other things, without end where frames come and go.
            _malloc_trim(0)

    @property
    def cached_bytes(self) -> int:
        """Data held now, decompressed or from a server, bytes."""
        return self._budget.nbytes

    @contextlib.contextmanager
    def allowance(self) -> Iterator[None]:
        """Let what the block reads, in this thread, take ``total_s`` and cost ``max_alert_bytes`` at most: an alert."""
        with time_limit(self._settings.total_s), byte_limit(self._settings.max_alert_bytes):
            yield

    def open_many(self, wanted: Iterable[FrameKey]) -> dict[FrameKey, Future[Frame]]:
        """Open remote frames, several at a time.

        Parameters
        ----------
        wanted : iterable of FrameKey
            In the order of their use: the first ``max_open_frames`` count. Local ones,
            which open at once, are passed over.

        Returns
        -------
        opened : dict of Future
            What `open` returned or raised for each that was not passed over. All are done.
        """
        listed = [key for key in dict.fromkeys(wanted) if self._is_remote(split_fragment(key.url)[0])]
        del listed[self._settings.max_open_frames :]  # more would push each other out
        done = self._in_parallel([partial(self.open, key.url, mask=key.is_mask) for key in listed])
        return dict(zip(listed, done, strict=True))

    def prefetch_sections(self, wanted: Iterable[tuple[Iterable[Frame], Iterable[Section]]]) -> None:
        """FetchTask what sections of remote frames need, with few requests, several at a time.

        Rows or tiles that sections share, or that lie close together, are asked for once. What fails, fails again when
        the section is read.

        Parameters
        ----------
        wanted : iterable of (frames, boxes)
            Sets of frames, in the order of their use, and ``y0, y1, x0, x1`` that will be sliced of each frame of the
            set, one box an alert; they may hang over the edge. A box that costs more than ``max_alert_bytes`` is left
            to be refused, and so is what half of ``cache_bytes`` does not hold to be read when it is sliced: the other
            half is for what is worked on meanwhile.
        """
        sections: dict[Frame, list[Section]] = {}
        for frames, boxes in wanted:
            listed = list(frames)
            for box in boxes:
                for frame, section in self._affordable(listed, box):
                    sections.setdefault(frame, []).append(section)
        fetches = [fetch for frame, needed in sections.items() for fetch in frame.fetch_tasks(needed)]
        total = itertools.accumulate(fetch.size for fetch in fetches)
        fitting = sum(size <= self._settings.cache_bytes // 2 for size in total)
        self._in_parallel([fetch.run for fetch in fetches[:fitting]])

    def _affordable(self, frames: list[Frame], box: Section) -> list[tuple[Frame, Section]]:
        """Return what a box needs of frames; nothing where one alert may not have it."""
        with contextlib.suppress(Exception):  # told when the section is read: a fault of ours, too, is one alert's
            needs = [need for frame in frames if (need := frame.section_for(box)) is not None]
            if sum(frame.bytes_needed(section) for frame, section in needs) <= self._settings.max_alert_bytes:
                return needs
        return []

    def _in_parallel(self, tasks: list[Callable[[], T]]) -> list[Future[T]]:
        """Return what came of tasks that were done several at a time."""
        if not tasks:
            return []
        with ThreadPoolExecutor(min(len(tasks), self._settings.prefetch_threads), "frames") as threads:
            return [threads.submit(task) for task in tasks]

    def open(self, url: str, *, mask: bool = False) -> Frame:
        """Return the frame at a URL or path.

        Parameters
        ----------
        url : str
            Path or URL (``file:``, ``http:``, ``https:``, ``s3:``, ``gs:``, ``abfs:``, ``memory:``), with an optional
            fragment: EXTNAME in any case, ``NAME,ver`` or a number. Without one: the first HDU that holds a 2-D image.
        mask : bool
            The plane is a mask: integers stay integers.

        Returns
        -------
        frame : Frame

        Raises
        ------
        FrameMissing
            There is no such file.
        FrameRefused
            It is no path or URL, lies outside the roots, redirects out of them, or is above a limit.
        FrameUnavailable
            It cannot be read now: permission, input/output error, a server that is down, busy or slow.
        FrameCorrupt
            It is not FITS, is cut off, or has no such 2-D image.
        """
        key = FrameKey(url, mask)
        recalled = self._recall(key)
        if recalled is not None:
            return recalled
        given, fragment = _checked(url)
        file, shown, is_fresh = self._remote(given) if self._is_remote(given) else self._local(given, url, fragment)
        shown += f"#{quote(fragment, safe=',')}" if fragment else ""
        try:
            # Two threads that want the same file wait here, and for no other.
            with file.lock, time_limit(self._settings.total_s):
                frame = Frame(shown, self._load(file, shown, fragment, mask))
        except BaseException:
            if not file.images:
                self._forget(file)
            raise
        with self._lock:
            if self._files.get(file.key) is file:
                known = self._known.get(key)
                if known is not None and known[0] is file:  # another thread was first
                    return known[2]
                self._known[key] = file, is_fresh, frame
                if len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        return frame

    def _is_remote(self, given: str) -> bool:
        scheme = scheme_of(given)
        return scheme in REMOTE or (
            scheme is None and self._base_url is not None and bool(given) and not given.startswith("/")
        )

    def _local(self, given: str, url: str, fragment: str) -> tuple[_File, str, Callable[[], bool]]:
        """Return the file of a path or ``file:`` URL, how it is shown, and what says whether it is still that file."""
        path = self._folders.path(given, url)
        shown = "file://" + quote(str(path))
        named = shown + (f"#{quote(fragment, safe=',')}" if fragment else "")
        resolved = self._folders.resolve(path, named)
        try:
            signature = _signature(Path(resolved).stat())
        except OSError as exc:
            raise sort_error(exc, named) from exc
        file = self._file(_File(resolved, partial(open_local, resolved, self._folders), signature))

        def is_fresh() -> bool:
            try:
                return _signature(path.stat()) == file.signature
            except OSError:  # opening it says what is wrong
                return False

        return file, shown, is_fresh

    def _remote(self, given: str) -> tuple[_File, str, Callable[[], bool]]:
        """Return the file of a URL, how it is shown, and what says whether it may still be used."""
        if self._base_url is not None and scheme_of(given) is None:
            path = quote(given) if scheme_of(self._base_url) in WEB else given
            given = self._base_url + ("" if self._base_url.endswith("/") else "/") + path
        address = parse(given)
        if not any(address.beneath(root) for root in self._urls):
            roots = ", ".join(root.display_url for root in self._urls) or "no URL configured"
            raise FrameRefused(redact(given), f"outside the frame roots; frame_roots: {roots}")
        remote = self._protocol(address)
        opened, age = time.monotonic(), self._settings.remote_ttl_s
        file = self._file(
            _File(
                given,
                lambda shown: open_remote(remote, shown, self._budget, self._settings.max_alert_bytes),
                is_stale=lambda: remote.changed or time.monotonic() - opened > age,
            )
        )
        return file, address.display_url, lambda: not file.is_stale()

    def _protocol(self, address: FrameURL) -> Remote:
        if address.scheme in WEB:
            return WebFile(self._web, address)
        if address.scheme in BUCKETS:
            return BucketFile(self._buckets, address)
        return MemoryFile(self._memory, address)

    def _recall(self, key: FrameKey) -> Frame | None:
        """Return a frame that is open already, unless its file has changed."""
        with self._lock:
            if self._closed:
                raise ValueError("this FrameStore is closed")
            known = self._known.get(key)
            if known is None:
                return None
            file, is_fresh, frame = known
            self._files.move_to_end(file.key)
            self._known.move_to_end(key)
        if is_fresh():
            return frame
        self._forget(file)
        return None

    def _load(self, file: _File, url: str, fragment: str, mask: bool) -> Image:
        settings, whole = self._settings, url.partition("#")[0]
        source = file.load(whole, settings, self._budget)
        hdu = find(file.hdus(source, url, settings.max_header_bytes), fragment, url)
        known = file.images.get((hdu.index, mask))
        if known is not None:
            return known
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
        image = Image(with_inherited(hdu, file.primary), self._pixels(source, hdu, whole, mask), source, whole)
        file.images[hdu.index, mask] = image
        return image

    def _pixels(self, source: Source, hdu: Hdu, url: str, mask: bool) -> Pixels:
        if hdu.kind == "image":
            return PlainImage(source, hdu, url, mask=mask)
        limit = self._settings.max_decompressed_bytes
        return TiledImage(source, hdu, url, mask=mask, budget=self._budget, limit=limit)

    def _file(self, new: _File) -> _File:
        """Return the open file of the same key, or the new one, which is still to be loaded."""
        with self._lock:
            file = self._files.get(new.key)
            if file is None or file.signature != new.signature or file.is_stale():
                if file is not None:
                    self._drop(file)
                file = self._files[new.key] = new
            self._files.move_to_end(file.key)
            while len(self._files) > self._settings.max_open_frames:
                self._drop(next(iter(self._files.values())))
        return file

    def _forget(self, file: _File) -> None:
        with self._lock:
            self._drop(file)

    def _drop(self, file: _File) -> None:
        """Take a file out of the store; the caller holds the lock."""
        if self._files.get(file.key) is file:
            del self._files[file.key]
        for key in [key for key, (other, _, _) in self._known.items() if other is file]:
            del self._known[key]


def split_fragment(url: str) -> tuple[str, str]:
    """Return a URL or path without its fragment, and the fragment decoded."""
    given, _, fragment = url.partition("#")
    return given, unquote(fragment)


def _checked(url: str) -> tuple[str, str]:
    """Return what `split_fragment` does, of what can be a URL or path."""
    if len(url) > _LONGEST:
        raise FrameRefused(
            ascii(redact(url)[:100]), f"{len(url)} characters, wanted a URL or path of at most {_LONGEST}"
        )
    if _SURROGATE.search(url):
        raise FrameRefused(ascii(redact(url)), "half of a character (a surrogate), wanted text")
    given, fragment = split_fragment(url)
    if len(fragment) > _LONGEST_FRAGMENT:
        raise FrameRefused(redact(given), f"a fragment of {len(fragment)} characters, wanted an HDU's name or number")
    if "@" in fragment and scheme_of(given) is not None:  # a password with a # in it
        raise FrameRefused(redact(url), "an @ after the #, wanted name or number of an HDU there")
    return given, fragment


def _signature(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
