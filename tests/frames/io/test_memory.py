"""Frames in this process's memory."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from astropy.table import Table
from fsspec.implementations.memory import MemoryFileSystem

from stampworker import enrich_table
from stampworker.config import FrameSettings
from stampworker.errors import ConfigError, FrameMissing, FrameRefused, FrameUnavailable
from stampworker.formats.packets import Packet
from stampworker.frames import FrameStore

ALL = (slice(None), slice(None))


@pytest.fixture
def files() -> Iterator[MemoryFileSystem]:
    """Give the memory filesystem, empty before and after."""
    files = MemoryFileSystem()
    files.store.clear()
    yield files
    files.store.clear()


@pytest.fixture
def store(files: MemoryFileSystem, write: Callable[..., Path], pixels: np.ndarray) -> Iterator[FrameStore]:
    """Open a store on ``memory://Night/``, with two frames, a long one, and one beside the root."""
    files.pipe_file("/Night/a.fits", write("a.fits", pixels).read_bytes())
    files.pipe_file("/Night/a 1.fits.gz", gzip.compress(files.cat_file("/Night/a.fits")))
    files.pipe_file("/Night/long.fits", write("long.fits", np.tile(pixels, (10, 1))).read_bytes())
    files.pipe_file("/secret.fits", files.cat_file("/Night/a.fits"))
    with FrameStore(FrameSettings(frame_roots=("memory://Night/",))) as opened:
        yield opened


@pytest.mark.parametrize("name", ["a.fits", "a 1.fits.gz", "long.fits"])
def test_same_pixels(store: FrameStore, pixels: np.ndarray, name: str) -> None:
    """By URL and by a path beneath the root: the pixels that were put there."""
    frame = store.open(f"memory://Night/{name}#0")
    np.testing.assert_array_equal(frame[:61, :], pixels)
    np.testing.assert_array_equal(store.open(name)[-5:, 70:90], pixels[-5:, 70:90])
    assert frame.url == f"memory://Night/{name}#0"


@pytest.mark.parametrize(
    "url",
    [
        "memory://secret.fits",
        "memory://Night/../secret.fits",
        "memory://night/a.fits",
        "memory://Nights/a.fits",
        "memory://",
        "memory:secret.fits",
        "../secret.fits",
        "file:///etc/hostname",
    ],
)
def test_outside_the_root(store: FrameStore, url: str) -> None:
    """Other folders, in another case too, and parents are refused."""
    with pytest.raises(FrameRefused, match=r"outside the frame roots|in the path"):
        store.open(url)


def test_missing(store: FrameStore, files: MemoryFileSystem) -> None:
    """What is not there is missing, a folder too; once it is there, it is found."""
    for name in ("b.fits", ""):
        with pytest.raises(FrameMissing, match=rf"memory://Night/{name}: no such file in memory"):
            store.open(f"memory://Night/{name}")
    files.pipe_file("/Night/b.fits", files.cat_file("/Night/a.fits"))
    assert store.open("b.fits").shape == (61, 83)


def test_frame_that_changes(
    store: FrameStore, files: MemoryFileSystem, write: Callable[..., Path], pixels: np.ndarray
) -> None:
    """A frame that was replaced is never mixed with the old one; opened again it is the new one, at once."""
    frame = store.open("long.fits")
    files.pipe_file("/Night/long.fits", write("new.fits", np.tile(pixels + 1, (10, 1))).read_bytes())
    with pytest.raises(FrameUnavailable, match="another one than when it was opened"):
        frame[500:550, :]
    np.testing.assert_array_equal(store.open("long.fits")[:61, :], pixels + 1)
    files.rm("/Night/long.fits")
    with pytest.raises(FrameMissing, match=r"long\.fits"):
        store.open("long.fits")


def test_table_with_frames_in_memory(files: MemoryFileSystem, write: Callable[..., Path], pixels: np.ndarray) -> None:
    """A notebook names what it has put there, without a root."""
    files.pipe_file("/sci.fits", write("a.fits", pixels).read_bytes())
    table = Table({"x": [40.0, 20.0], "y": [30.0, 20.0]})
    _, packets = enrich_table(table, frames={"science": "memory://sci.fits#0"}, radius=4)
    assert isinstance(packets[0], Packet)
    np.testing.assert_array_equal(packets[0].stamps["science"].data, pixels[26:35, 36:45])


def test_without_fsspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the library a memory: root stops the start and names the extra."""
    monkeypatch.setitem(sys.modules, "fsspec.implementations.memory", None)
    with pytest.raises(ConfigError, match=r"pip install 'stampworker\[memory\]'"):
        FrameStore(FrameSettings(frame_roots=("memory://night/",)))
