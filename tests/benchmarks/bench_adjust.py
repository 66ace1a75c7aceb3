"""Speed of adjust_cutout, in C and in numpy, against STDPipe's, and who finds the lower chi2.

    make bench, or: python tests/benchmarks/bench_adjust.py [--n 40]    (where stampworker and stdpipe are installed)

The three run interleaved in one process with BLAS at one thread; medians over stamps. Real stamps are those of ZTF's
alerts beside the checkout where they are; simulated ones are always there. "worse": stamps on which STDPipe's chi2 is
lower by 1e-5; "1 % lower": share of stamps on which STDPipe's is higher by over 1 %.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import gzip
import io
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
from astropy.io import fits
from scipy.ndimage import shift

from stampworker.cutouts import adjust

DATA = Path(__file__).resolve().parents[3] / "shared/data/ztf_alerts"
CASES = {"whole stamp": {}, "inner": {"inner": True}, "fit_bg": {"fit_bg": True}}


def real_stamps(n: int) -> Iterator[dict[str, Any]]:
    """Whole ZTF stamps without holes: convolved = science - difference, err = robust noise and Poisson noise."""
    for path in sorted(DATA.glob("*.avro")):
        with path.open("rb") as file:
            alert: Any = next(iter(fastavro.reader(file)))
        planes = {}
        for name in ("Science", "Difference"):
            with fits.open(io.BytesIO(gzip.decompress(alert[f"cutout{name}"]["stampData"]))) as hdus:
                planes[name] = hdus[0].data.astype(np.float32)
        sign = 1 if alert["candidate"]["isdiffpos"] in ("t", "1") else -1
        image, convolved = planes["Science"], planes["Science"] - sign * planes["Difference"]
        if image.shape != (63, 63) or not (np.isfinite(image) & np.isfinite(convolved)).all():
            continue
        sigma = 1.4826 * np.median(np.abs(image - np.median(image)))
        err = np.sqrt(sigma**2 + np.clip(image - np.median(image), 0, None) / 6.2).astype(np.float32)
        yield cutout_of(image, convolved, err, float(alert["candidate"].get("fwhm") or 2))
        n -= 1
        if n == 0:
            return


def dipoles(n: int, size: int) -> Iterator[dict[str, Any]]:
    """Stars on size × size pixels that have moved by up to 1.5 pixels and changed by up to 7 %."""
    rng = np.random.default_rng(1)
    yy, xx = np.mgrid[0:size, 0:size]
    for _ in range(n):
        width, sky, (dx, dy) = rng.uniform(1.1, 1.9), rng.uniform(3, 15), rng.uniform(-1.5, 1.5, 2)
        places = [(size // 2, size // 2, 10 ** rng.uniform(1, 2.5) * sky)]
        places += [(*rng.uniform(0, size, 2), 10 ** rng.uniform(0.5, 2) * sky) for _ in range(3)]
        template, image = (
            sum(f * np.exp(-((xx - x - mx) ** 2 + (yy - y - my) ** 2) / (2 * width**2)) for x, y, f in places)
            for mx, my in ((0, 0), (dx, dy))
        )
        err = np.sqrt(sky**2 + image / 3)
        image = rng.uniform(0.93, 1.07) * image + 150 + rng.normal(0, 1, err.shape) * err
        template = template + 120 + rng.normal(0, 0.1 * sky, err.shape)
        image, template, err = (plane.astype(np.float32) for plane in (image, template, err))
        yield cutout_of(image, template, err, 2.355 * width)


def cutout_of(image: Any, convolved: Any, err: Any, fwhm: float) -> dict[str, Any]:
    """Return the cutout that all fit; STDPipe wants a mask."""
    planes = {"image": image, "convolved": convolved, "err": err, "mask": np.zeros(image.shape, bool)}
    return {**planes, "meta": {"fwhm": fwhm}}


def timed(fit: Callable[..., Any], cutout: dict[str, Any], repeats: int, **kwargs: Any) -> tuple[float, dict[str, Any]]:
    """Return the median time of a fit of fresh copies, ms, and the metrics."""
    times = []
    for _ in range(repeats):
        fresh = {key: value.copy() for key, value in cutout.items()}
        start = time.perf_counter()
        fit(fresh, **kwargs)
        times.append(1e3 * (time.perf_counter() - start))
    return float(np.median(times)), fresh["meta"]


def chi2(cutout: dict[str, Any], meta: dict[str, Any], inner: int | None, dx: float, dy: float) -> float:
    """Evaluate an answer by scipy's own shift."""
    ny, nx = cutout["image"].shape
    yy, xx = np.mgrid[0:ny, 0:nx]
    half = (inner or ny + nx) / 2
    box = (np.abs(yy - ny / 2 + 0.5) <= half) & (np.abs(xx - nx / 2 + 0.5) <= half)
    image, convolved, err = (cutout[name].astype(float) for name in ("image", "convolved", "err"))
    moved = shift(convolved - meta["adjust_tbg"], (dy, dx), order=3, mode="reflect")
    return float((((image - meta["adjust_bg"] - meta["adjust_scale"] * moved) / err)[box] ** 2).sum())


def compare(name: str, stamps: list[dict[str, Any]], reference: Callable[..., Any], **case: Any) -> None:
    """Print one line of the table."""
    times: dict[str, list[float]] = {"reference": [], "c": [], "numpy": []}
    cores = {"numpy": adjust.fit_numpy} | ({"c": adjust.fit_compiled} if adjust.CORE == "c" else {})
    worse = lower = 0
    for stamp in stamps:
        kwargs = dict(case)
        if case.get("inner"):
            kwargs["inner"] = int(np.clip(5 * stamp["meta"]["fwhm"], 10, 20))
        best: dict[str, Any] = {}
        for core, function in cores.items():
            adjust.core = function
            took, best = timed(adjust.adjust_cutout, stamp, 5, **kwargs)
            times[core].append(took)
        took, theirs = timed(reference, stamp, 1, **kwargs)
        times["reference"].append(took)
        ours = chi2(stamp, best, kwargs.get("inner"), best["adjust_dx"], best["adjust_dy"])
        other = chi2(
            stamp, theirs, kwargs.get("inner"), theirs["adjust_dy"], theirs["adjust_dx"]
        )  # their dx is along y
        worse += ours > other * (1 + 1e-5)
        lower += ours < other * 0.99
    median = {core: float(np.median(took)) if took else np.nan for core, took in times.items()}
    line = f"{name:26s}{len(stamps):4d}{median['reference']:12.1f}"
    for core in ("c", "numpy"):
        line += f"{median[core]:10.3f}{median['reference'] / median[core]:8.0f} ×"
    print(f"{line}{worse:8d}{100 * lower / len(stamps):10.0f} %")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=40, help="stamps of each kind")
    n = parser.parse_args().n
    warnings.simplefilter("ignore")
    from stdpipe.cutouts import adjust_cutout as reference

    kinds = {"ZTF": list(real_stamps(n))} | {f"dipoles {size}²": list(dipoles(n, size)) for size in (63, 41)}
    header = f"{'':26s}{'n':>4s}{'STDPipe, ms':>12s}{'C, ms':>10s}{'':10s}{'numpy, ms':>10s}"
    print(f"{header}{'':10s}{'worse':>8s}{'1 % lower':>12s}")
    for kind, stamps in kinds.items():
        for case, kwargs in CASES.items():
            if stamps:
                compare(f"{kind}, {case}", stamps, reference, **kwargs)
    if not kinds["ZTF"]:
        print(f"no ZTF alerts in {DATA.parent.name}/{DATA.name} beside the checkout")


if __name__ == "__main__":
    main()
