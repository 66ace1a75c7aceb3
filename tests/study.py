"""Verdicts on a simulated night against its truth.

``python tests/study.py [--candidates 2600] [--seed 11] [--set verdict.max_point_delta_chi2=6]`` prints them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

from astropy.table import Table

from stampworker import Enricher, FrameStore, Packet
from stampworker.config import load
from stampworker.formats.files import read_alerts
from stampworker.simulation.confusion import confusion, format_confusion, recovery
from stampworker.simulation.night import simulate


def study(
    folder: Path, candidates: int, seed: int, flags: Mapping[str, object] | None = None
) -> tuple[Table, dict[str, float]]:
    """Simulate a night in ``folder``, make its packets, and compare them with the truth."""
    night = simulate(folder, frames=-(-candidates // 440), candidates=candidates, seed=seed)
    settings = load(flags={"frames.frame_roots": str(night.directory), **(flags or {})})
    alerts, _ = read_alerts(night.alerts)
    with FrameStore(settings.frames) as store:
        packets = [packet for packet in Enricher(settings, store).packets(alerts) if isinstance(packet, Packet)]
    assert len(packets) == len(alerts)
    results = {str(p.alert_id): {**p.metrics, "adjust_artefact": p.adjust_artefact} for p in packets}
    truth = Table.read(night.truth, format="ascii.ecsv")
    return confusion(truth, results), recovery(truth, results)


def main() -> None:
    """Print the table and what was recovered."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, default=2600)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE")
    args = parser.parse_args()
    flags = dict(text.split("=", 1) for text in args.set)
    with tempfile.TemporaryDirectory() as folder:
        table, found = study(Path(folder) / "night", args.candidates, args.seed, flags)
    print(format_confusion(table))
    print(", ".join(f"{name} {value:.3g}" for name, value in found.items()))


if __name__ == "__main__":
    main()
