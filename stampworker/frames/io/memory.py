"""Frames in this process's memory: in fsspec's memory filesystem, where a notebook or a test has put them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from stampworker.errors import ConfigError, FrameMissing, FrameUnavailable
from stampworker.frames.io.ranges import FIRST_BYTES, FirstRead

if TYPE_CHECKING:
    from stampworker.frames.urls import FrameURL


def open_memory() -> Any:
    """Return the process's memory filesystem; `ConfigError` where fsspec is not installed."""
    try:
        from fsspec.implementations.memory import MemoryFileSystem
    except ImportError as exc:
        problem = "frames need fsspec, which is not installed: pip install 'stampworker[memory]'"
        raise ConfigError(f"memory: {problem}") from exc
    return MemoryFileSystem()


class MemoryFile:
    """One file of the memory filesystem that `open_memory` returns; its URL is beneath a root."""

    def __init__(self, files: Any, frame_url: FrameURL) -> None:
        self._files, self._path, self._display_url = files, "/" + frame_url.target, frame_url.display_url
        self._opened: object = None

    @property
    def changed(self) -> bool:
        """Whether another one was put there since it was opened."""
        return self._opened is not None and self._opened != self._written()

    def open(self) -> FirstRead:
        """Return the first bytes."""
        self._opened = self._written()
        return FirstRead(bytearray(self._read(0, FIRST_BYTES)), self._files.size(self._path))

    def read_range(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes from ``offset`` on."""
        data = self._read(offset, offset + length)
        if self.changed:
            raise FrameUnavailable(self._display_url, "the file is another one than when it was opened")
        return data

    def read_all(self) -> bytearray:
        """Return all bytes."""
        return bytearray(self.read_range(0, sys.maxsize))

    def _written(self) -> object:
        file = self._files.store.get(self._path)
        return None if file is None else (id(file), file.modified)

    def _read(self, start: int, stop: int) -> bytes:
        try:
            data: bytes = self._files.cat_file(self._path, start, stop)
        except FileNotFoundError:
            raise FrameMissing(self._display_url, "no such file in memory") from None
        return data
