#!/usr/bin/env python3
"""Microseconds for a 63 × 63 stamp: stampworker's frames, astropy's ``.section`` and fitsio, kept open, interleaved.

    python tests/benchmarks/bench_frames.py [--stamps N]

fitsio comes from PyPI (``pip install fitsio``); without it its column is empty. "cold" drops the decoded tiles before
every stamp; "kept" has them, as the later stamps of a batch do. Ratios are of medians: above 1 stampworker is faster.
"""

import argparse
import gzip
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from stampworker.config import FrameSettings
from stampworker.frames import FrameStore

try:
    import fitsio
except ModuleNotFoundError:
    fitsio = None

SHAPE = (3080, 3072)
SIZE = 63


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


def measure(readers: dict[str, Callable[[slice, slice], Any]], stamps: int) -> dict[str, float]:
    """Return the median time of each reader, microseconds, on the same random stamps.

    They take turns in being first, which pays for bringing the pixels into the processor's caches.
    """
    rng = np.random.default_rng(2)
    taken: dict[str, list[float]] = {name: [] for name in readers}
    names = list(readers)
    for turn in range(stamps):
        y, x = (int(n) for n in rng.integers(0, (SHAPE[0] - SIZE, SHAPE[1] - SIZE)))
        section = slice(y, y + SIZE), slice(x, x + SIZE)
        results = []
        for i in range(len(names)):
            name = names[(turn + i) % len(names)]
            start = time.perf_counter()
            results.append(readers[name](*section))
            taken[name].append(time.perf_counter() - start)
        for result in results[1:]:
            np.testing.assert_array_equal(np.asarray(result, "f4"), results[0])
    return {name: statistics.median(times) * 1e6 for name, times in taken.items()}


def compare(path: Path, hdu: int, store: FrameStore, stamps: int) -> dict[str, float]:
    """Measure one file with every reader."""
    frame = store.open(path.as_uri())
    release = getattr(frame._pixels, "release", None)  # of tiles; gz is inflated once, before

    def ours(rows: slice, columns: slice) -> Any:
        return frame[rows, columns]

    with fits.open(path) as hdus:
        section = hdus[hdu].section
        readers: dict[str, Callable[[slice, slice], Any]] = {"ours": ours, "astropy": lambda *s: section[s]}
        if fitsio is not None:
            opened = fitsio.FITS(str(path))[hdu]
            readers["fitsio"] = lambda *s: opened[s]
        if release is None:
            return measure(readers, stamps)

        def cold(rows: slice, columns: slice) -> Any:
            release()
            return frame[rows, columns]

        times = measure({**readers, "ours": cold}, stamps)
        frame[0 : SHAPE[0], 0 : SHAPE[1]]
        return times | {"kept": measure({"ours": ours}, stamps)["ours"]}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stamps", type=int, default=200)
    stamps = parser.parse_args().stamps
    print(f"{'us per stamp':18}{'ours':>9}{'kept':>9}{'astropy':>9}{'fitsio':>9}{'/astropy':>10}{'/fitsio':>9}")
    with tempfile.TemporaryDirectory() as folder, FrameStore(FrameSettings(frame_roots=(folder,))) as store:
        for name, (path, hdu) in make_frames(Path(folder)).items():
            times = compare(path, hdu, store, 3 if name == "gz" else stamps)  # the others inflate it for every stamp
            row = [times.get(column) for column in ("ours", "kept", "astropy", "fitsio")]
            ratios = [other and other / times["ours"] for other in row[2:]]
            cells = "".join(f"{value:9.1f}" if value else " " * 8 + "-" for value in row)
            print(f"{name:18}{cells} " + "".join(f"{r:9.1f}" if r else " " * 8 + "-" for r in ratios))


if __name__ == "__main__":
    main()
