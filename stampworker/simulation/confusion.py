"""How often each kind of candidate is called an artefact: verdicts against the truth of a simulated night."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from astropy.table import Table

BINS = (0.0, 5.0, 10.0, 20.0, math.inf)
"""Edges of the bins of S/N."""

BINNED = ("transient-sky", "transient-galaxy", "dipole", "scale-error")
"""Classes that are split by S/N; each of the others is one row."""

Results = Mapping[str, Mapping[str, Any]]
"""``alertId`` → the packet's metrics (``adjust_chi2_0``, ...) and ``adjust_artefact``."""


def stdweb_rule(metrics: Mapping[str, Any]) -> bool:
    """Return True if STDWeb's thresholds alone would call a candidate with these metrics of a fit an artefact.

    They are: p > 0.01 or chi2 < 0.33 chi2_0, and the scale within 0.8 and 1.2. False without a fit.
    """
    if metrics.get("adjust_chi2") is None:
        return False
    explained = metrics["adjust_pval"] > 0.01 or metrics["adjust_chi2"] < 0.33 * metrics["adjust_chi2_0"]
    return bool(explained and 0.8 < metrics["adjust_scale"] < 1.2)


def confusion(truth: Table, results: Results) -> Table:
    """Count the verdicts by class and S/N, from the ``alertId``, ``class`` and ``snr`` of a night's truth.

    The table has a row per class and bin with candidates: ``class``, ``snr`` (the bin), and the counts ``number``
    (candidates), ``fitted``, ``artefact`` (verdict of the worker) and ``stdweb`` (verdict of STDWeb's thresholds
    alone). A candidate without a result is a KeyError.
    """
    rows = []
    for kind in dict.fromkeys([*BINNED, *(str(name) for name in truth["class"])]):
        ours = truth[np.asarray(truth["class"]) == kind]
        for low, high in pairwise(BINS) if kind in BINNED else [(-math.inf, math.inf)]:
            chosen = [str(row["alertId"]) for row in ours if kind not in BINNED or low <= row["snr"] < high]
            if chosen:
                rows.append((kind, _label(low, high), len(chosen), *_count([results[name] for name in chosen])))
    return Table(rows=rows, names=("class", "snr", "number", "fitted", "artefact", "stdweb"))


def _label(low: float, high: float) -> str:
    if low == -math.inf:
        return "all"
    return f"{low:g} and more" if high == math.inf else f"below {high:g}" if low == 0 else f"{low:g} to {high:g}"


def _count(results: list[Mapping[str, Any]]) -> tuple[int, int, int]:
    fitted = sum(r.get("adjust_chi2") is not None for r in results)
    return fitted, sum(bool(r.get("adjust_artefact")) for r in results), sum(stdweb_rule(r) for r in results)


def format_confusion(table: Table) -> str:
    """Write the table of `confusion` in Markdown, with verdicts in per cent; aligned, to read well on a terminal."""
    rows = [["called artefact", "S/N", "candidates", "fitted", "stampworker", "STDWeb's rule alone"]]
    for row in table:
        shares = (f"{100 * row[name] / row['number']:.1f} %" for name in ("artefact", "stdweb"))
        rows.append([*(str(row[name]) for name in ("class", "snr", "number", "fitted")), *shares])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)])
    lines = [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def recovery(truth: Table, results: Results, min_snr: float = 10.0) -> dict[str, float]:
    """Compare fitted shifts and scales with the ``dx``, ``dy`` and ``scale`` of a night's truth.

    Candidates without a fit or with a residual of a smaller S/N are left out. ``dipoles``, ``scale_errors``: numbers of
    candidates compared. ``shift``: median distance between the fitted and the true shift of dipoles, pixels.
    ``dx_bias``, ``dy_bias``: medians of fitted minus true. ``scale``: median of |fitted minus true| of scale errors
    between 1/1.1 and 1.1, the default bounds of the fit. NaN if nothing can be compared.
    """
    fits = [
        (row, results[str(row["alertId"])])
        for row in truth
        if row["snr"] >= min_snr and results[str(row["alertId"])].get("adjust_chi2") is not None
    ]
    shifts = np.array(
        [(fit["adjust_dx"] - row["dx"], fit["adjust_dy"] - row["dy"]) for row, fit in fits if row["class"] == "dipole"]
    ).reshape(-1, 2)
    scales = [
        abs(fit["adjust_scale"] - row["scale"])
        for row, fit in fits
        if row["class"] == "scale-error" and 1 / 1.1 < row["scale"] < 1.1
    ]
    return {
        "dipoles": len(shifts),
        "shift": _median(np.hypot(*shifts.T)),
        "dx_bias": _median(shifts[:, 0]),
        "dy_bias": _median(shifts[:, 1]),
        "scale_errors": len(scales),
        "scale": _median(np.array(scales)),
    }


def _median(values: np.ndarray[Any, Any]) -> float:
    return float(np.median(values)) if values.size else math.nan
