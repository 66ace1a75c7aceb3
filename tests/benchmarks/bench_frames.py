#!/usr/bin/env python3
"""Microseconds for a 63 × 63 stamp: stampworker's frames, astropy's ``.section`` and fitsio, kept open, interleaved.

    python tests/benchmarks/bench_frames.py [--stamps N]

fitsio comes from PyPI (``pip install fitsio``); without it its columns are empty. stampworker and each of the others
take turns at `TURN` stamps of the frame, as a worker reads those of a batch; what they read is compared. "by one": the
ratio to fitsio where they take turns at every stamp, so that each finds the processor's caches full of what the other
left. Ratios are of medians: above 1 stampworker is faster.

"ours" drops the decoded tiles before every stamp; "kept" has them, as the later stamps of a batch do. A gzip file is
inflated as a whole by stampworker and fitsio when they open it, which has a row of its own, and by astropy for every
stamp.

Then what `stampworker.enrich.Enricher` leaves in memory, with the default settings (cache_bytes 2 GiB), frames of
2048 × 2048 and a batch of 20 alerts a frame set: RssAnon of a process of its own after 2 and after 20 frame sets.
"""

import argparse
import gzip
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from stampworker.config import FrameSettings
from stampworker.frames import FrameStore

sys.path.insert(0, str(Path(__file__).parents[1]))
from helpers import resident

try:
    import fitsio
except ModuleNotFoundError:
    fitsio = None

SHAPE = (3080, 3072)
SIZE = 63
TURN = 20

Read = Callable[[slice, slice], Any]


def make_frames(folder: Path) -> dict[str, tuple[Path, int]]:
    """Write the same noise in every form; return name → file and HDU."""
    data = np.random.default_rng(1).normal(1000, 20, SHAPE).astype("f4")
    quantised = {"compression_type": "RICE_1", "quantize_level": 4, "quantize_method": 1, "dither_seed": 42}
    forms: dict[str, Any] = {
        "RICE rows": fits.CompImageHDU(data, **quantised),
        "RICE 128x128": fits.CompImageHDU(data, tile_shape=(128, 128), **quantised),
        "RICE rows, int16": fits.CompImageHDU(data.astype("i2"), compression_type="RICE_1"),
        "GZIP_2 rows": fits.CompImageHDU(data, compression_type="GZIP_2", quantize_level=0),
    }
    fits.PrimaryHDU(data).writeto(folder / "plain.fits")
    fits.PrimaryHDU(data.astype("i2")).writeto(folder / "int16.fits")
    (folder / "plain.fits.gz").write_bytes(gzip.compress((folder / "plain.fits").read_bytes(), 1))
    frames = {"plain": (folder / "plain.fits", 0), "plain int16": (folder / "int16.fits", 0)}
    for i, (name, hdu) in enumerate(forms.items()):
        fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(folder / f"{i}.fits.fz")
        frames[name] = folder / f"{i}.fits.fz", 1
    return frames | {"gz": (folder / "plain.fits.gz", 0)}


def measure(readers: dict[str, Read], stamps: int, turn: int = TURN) -> dict[str, float]:
    """Return the median time of each reader, microseconds a stamp, on the same random stamps.

    They take turns in being first, which pays for bringing the pixels into the processor's caches.
    """
    rng = np.random.default_rng(2)
    taken: dict[str, list[float]] = {name: [] for name in readers}
    names = list(readers)
    for i in range(max(stamps // turn, 1)):
        corners = rng.integers(0, (SHAPE[0] - SIZE, SHAPE[1] - SIZE), (turn, 2)).tolist()
        sections = [(slice(y, y + SIZE), slice(x, x + SIZE)) for y, x in corners]
        for k in range(len(names)):
            name = names[(i + k) % len(names)]
            read = readers[name]
            start = time.perf_counter()
            for rows, columns in sections:
                read(rows, columns)
            taken[name].append((time.perf_counter() - start) / turn)
        for one, other in itertools.pairwise(readers.values()):  # the first stamp of each turn, outside of the timing
            np.testing.assert_array_equal(np.asarray(one(*sections[0]), "f4"), np.asarray(other(*sections[0]), "f4"))
    return {name: statistics.median(times) * 1e6 for name, times in taken.items()}


def compare(path: Path, hdu: int, store: FrameStore, stamps: int) -> dict[str, float]:
    """Measure one file with every reader."""
    frame = store.open(path.as_uri())
    release: Any = getattr(frame._pixels, "release", None)  # of tiles

    def cold(rows: slice, columns: slice) -> Any:
        release()
        return frame[rows, columns]

    def kept(rows: slice, columns: slice) -> Any:
        return frame[rows, columns]

    ours: Read = cold if release else kept
    with fits.open(path) as hdus:
        section = hdus[hdu].section
        inflates = path.suffix == ".gz"
        times = measure({"ours": ours, "astropy": lambda *s: section[s]}, *((1, 1) if inflates else (stamps,)))
        times["/astropy"] = times["astropy"] / times["ours"]
    if fitsio is not None:
        opened = fitsio.FITS(str(path))[hdu]
        pair: dict[str, Read] = {"ours": ours, "fitsio": lambda *s: opened[s]}
        times |= measure(pair, stamps)
        times["/fitsio"] = times["fitsio"] / times["ours"]
        by_one = measure(pair, stamps, 1)
        times["by one"] = by_one["fitsio"] / by_one["ours"]
    if release is not None:
        frame[0 : SHAPE[0], 0 : SHAPE[1]]
        times["kept"] = measure({"ours": kept}, stamps)["ours"]
    return times


def compare_opening(path: Path, hdu: int) -> dict[str, float]:
    """Measure opening a file and reading one stamp."""

    def ours(rows: slice, columns: slice) -> Any:
        with FrameStore(FrameSettings(frame_roots=(str(path.parent),))) as store:
            return store.open(path.as_uri())[rows, columns]

    def opened(*section: slice) -> Any:
        with fitsio.FITS(str(path)) as hdus:
            return hdus[hdu][section]

    if fitsio is None:
        return measure({"ours": ours}, 3, 1)
    times = measure({"ours": ours, "fitsio": opened}, 3, 1)
    return times | {"/fitsio": times["fitsio"] / times["ours"]}


COLUMNS = ("ours", "kept", "astropy", "fitsio", "/astropy", "/fitsio", "by one")


def show(name: str, times: dict[str, float]) -> None:
    """Print a row of the table."""
    cells = [f"{times[column]:.1f}" if column in times else "-" for column in COLUMNS]
    print(f"{name:18}" + "".join(f"{cell:>11}" for cell in cells))


def show_memory() -> None:
    """Print what is held after 2 and after 20 frame sets."""
    print(f"\n{'RssAnon, MB':18}{'2 sets':>11}{'20 sets':>11}{'ratio':>11}")
    for form in ("plain", "rice", "tiles", "gz"):
        with tempfile.TemporaryDirectory() as folder:
            held = resident.measure(Path(folder), form, side=2048)
        print(f"{form:18}{held[1] / 1e6:11.1f}{held[-1] / 1e6:11.1f}{held[-1] / held[1]:11.2f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stamps", type=int, default=400)
    stamps = parser.parse_args().stamps
    print(f"{'us per stamp':18}" + "".join(f"{column:>11}" for column in COLUMNS))
    with tempfile.TemporaryDirectory() as folder, FrameStore(FrameSettings(frame_roots=(folder,))) as store:
        for name, (path, hdu) in make_frames(Path(folder)).items():
            show(name, compare(path, hdu, store, stamps))
            if name == "gz":
                show("gz, opened", compare_opening(path, hdu))
    show_memory()


if __name__ == "__main__":
    main()
