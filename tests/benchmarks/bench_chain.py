"""Packets per second of the whole chain, against the same chain written plainly with STDPipe, astropy and fastavro.

    make bench, or: python tests/benchmarks/bench_chain.py [--quick]    (where stampworker and stdpipe are installed)

Both chains take alerts as Avro containers and return packets as Avro containers with gzip-compressed FITS stamps, of a
simulated night, in one process and one thread, with the frames open already. They take turns: in every block each of
ours makes a batch of all alerts, the plain one the block's share of them, so that it makes every packet once. Rates are
medians over the blocks; ratios are medians of each block's ratio, with the quartiles.

"per CPU-s": CPU time of the process, which other programs on the machine disturb less than the wall clock. It is also
what the stages show; asking for it costs about a microsecond, some 5 % of the time of stampworker in all.
"""

from __future__ import annotations

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"

import argparse
import gzip
import io
import json
import math
import sys
import tempfile
import time
import uuid
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
from astropy.io import fits
from isal import igzip
from stdpipe import cutouts as stdpipe

from stampworker import enrich
from stampworker.config import FrameSettings, Settings, VerdictSettings
from stampworker.cutouts import adjust
from stampworker.formats import alerts, packets
from stampworker.formats.schema import PACKET, parsed_schema
from stampworker.frames import FrameStore
from stampworker.simulation.night import simulate

RADIUS = 31
STAMPS = {
    "image": "cutoutScience",
    "template": "cutoutTemplate",
    "diff": "cutoutDifference",
    "convolved": "cutoutConvolved",
    "err": "cutoutError",
    "mask": "cutoutMask",
    "adjusted": "cutoutAdjusted",
}
VERDICT = {f"artefact_{name}": value for name, value in VerdictSettings()}


# The chain of the package.


def our_chain(messages: list[bytes], store: FrameStore, settings: Settings) -> list[bytes]:
    """Make packets as the worker does."""
    decoded = [alerts.decode(message) for message in messages]
    made = enrich.Enricher(settings, store).packets(decoded)
    return [packets.encode(packet) for packet in made if isinstance(packet, packets.Packet)]


# The same, as one would write it with STDPipe.


def plain_chain(messages: list[bytes], folder: Path) -> list[bytes]:
    """Make packets one by one."""
    return [write_packet(alert, fit(cut(alert, folder))) for alert in map(read_alert, messages)]


def read_alert(message: bytes) -> dict[str, Any]:
    reader: Any = fastavro.reader(io.BytesIO(message))
    return next(iter(reader))


@cache
def frame(path: Path) -> tuple[Any, fits.Header]:
    """Read a frame once; it stays in memory, as native float32 or, a mask, bool."""
    with fits.open(path, memmap=False) as hdus:
        data = hdus[0].data
        return data != 0 if data.dtype.kind in "iu" else data.astype(np.float32), hdus[0].header


def cut(alert: dict[str, Any], folder: Path) -> dict[str, Any]:
    planes = {plane: frame(folder / path) for plane, path in alert["frames"].items()}
    image, header = planes["science"]
    cutout = stdpipe.get_cutout(
        image,
        {name: alert[name] for name in ("x", "y", "ra", "dec", "fwhm")},
        RADIUS,
        header=header,
        template=planes["template"][0],
        diff=planes["difference"][0],
        convolved=planes["convolved"][0],
        err=planes["error"][0],
        mask=planes["mask"][0],
    )
    cutout["mask"] |= ~np.isfinite(cutout["image"])  # off the frame
    return cutout


def fit(cutout: dict[str, Any]) -> dict[str, Any]:
    stdpipe.adjust_cutout(cutout, max_shift=1, max_scale=1.1, inner=inner_box(cutout["meta"]))
    return cutout


def inner_box(meta: dict[str, Any]) -> int:
    side = max(math.ceil(2 * meta["fwhm"]), 7)
    return side + 1 - side % 2


def write_packet(alert: dict[str, Any], cutout: dict[str, Any]) -> bytes:
    meta = cutout["meta"]
    record = {
        "packetId": str(uuid.uuid5(uuid.NAMESPACE_OID, alert["alertId"])),
        "alertId": alert["alertId"],
        "objectId": alert["objectId"],
        "candidate": {name: alert[name] for name in ("x", "y", "ra", "dec", "mjd", "mjdScale", "fwhm", "extra")},
        "frames": alert["frames"],
        "adjust_status": "ok" if "adjusted" in cutout else "too_few_pixels",
        "adjust_artefact": None,
        "adjustSettings": {"max_shift": 1.0, "max_scale": 1.1, "inner": inner_box(meta), "fit_bg": False, **VERDICT},
        "convolvedOrigin": "frame",
        "errOrigin": "error",
        "resampledPlanes": [],
        "workerVersion": "plain",
    }
    if "adjusted" in cutout:
        fits_well = meta["adjust_pval"] > 0.01 or meta["adjust_chi2"] < 0.33 * meta["adjust_chi2_0"]
        record["adjust_artefact"] = bool(fits_well and 0.8 < meta["adjust_scale"] < 1.2)
        record |= {name: float(value) for name, value in meta.items() if name.startswith("adjust_")}
        record["adjust_df"] = int(meta["adjust_df"])
    for plane, name in STAMPS.items():
        if plane in cutout:
            record[name] = write_stamp(alert["alertId"], plane, cutout)
    out = io.BytesIO()
    fastavro.writer(out, parsed_schema(*PACKET), [record])
    return out.getvalue()


def write_stamp(alert_id: str, plane: str, cutout: dict[str, Any]) -> dict[str, Any]:
    data = cutout[plane].astype(np.uint8 if plane == "mask" else np.float32)
    hdu = fits.PrimaryHDU(data, header=cutout["header"])
    hdu.header["EXTNAME"] = plane
    out = io.BytesIO()
    hdu.writeto(out)
    return {"fileName": f"{alert_id}_{plane}.fits.gz", "stampData": gzip.compress(out.getvalue())}


# Timing.

Rates = tuple[float, float]  # packets per second, and per second of CPU time
Chain = Callable[[list[bytes]], list[bytes]]


def rates(chain: Chain, messages: list[bytes]) -> tuple[Rates, list[bytes]]:
    wall, cpu = time.perf_counter(), time.process_time()
    made = chain(messages)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return (len(made) / wall, len(made) / cpu), made


def take_turns(
    chains: dict[str, Chain], messages: list[bytes], blocks: int
) -> tuple[dict[str, list[Rates]], list[bytes]]:
    """Return the rates of every chain in every block, and the plain chain's packets.

    The chain that begins changes from block to block.
    """
    measured: dict[str, list[Rates]] = defaultdict(list)
    plain: list[bytes] = []
    names = list(chains)
    for block in range(blocks):
        for i in range(len(names)):
            name = names[(block + i) % len(names)]
            rate, made = rates(chains[name], messages[block::blocks] if name == "plain" else messages)
            measured[name].append(rate)
            if name == "plain":
                plain += made
    return measured, plain


@contextmanager
def stopwatch(owner: Any, name: str, stage: str, spent: dict[str, float], inside: list[float]) -> Iterator[None]:
    """Add up the CPU time of a function while it is watched, less that of the watched functions that it calls."""
    function = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        inside.append(0.0)
        start = time.process_time()
        result = function(*args, **kwargs)
        took = time.process_time() - start
        spent[stage] += took - inside.pop()
        inside[-1] += took
        return result

    setattr(owner, name, watched)
    try:
        yield
    finally:
        setattr(owner, name, function)


def stages(
    chain: Chain, messages: list[bytes], watched: dict[str, tuple[Any, str]], passes: int = 1
) -> dict[str, float]:
    """Return milliseconds of CPU time per packet of each stage, the medians of a few passes."""
    taken: dict[str, list[float]] = defaultdict(list)
    for _ in range(passes):
        spent, inside = dict.fromkeys(watched, 0.0), [0.0]
        with ExitStack() as stack:
            for stage, (owner, name) in watched.items():
                stack.enter_context(stopwatch(owner, name, stage, spent, inside))
            start = time.process_time()
            made = len(chain(messages))
            spent["all"] = time.process_time() - start
        for stage, seconds in spent.items():
            taken[stage].append(1e3 * seconds / made)
    return {stage: float(np.median(took)) for stage, took in taken.items()}


OUR_STAGES = {
    "decode the alert": (alerts, "decode"),
    "open frames": (FrameStore, "open"),
    "read and crop": (enrich, "get_cutout"),
    "fit": (enrich, "adjust_cutout"),
    "compare a point": (enrich, "compare_point_source"),
    "write FITS": (packets.StampWriter, "write"),
    "gzip": (igzip, "compress"),
    "encode the packet": (packets, "encode"),
    "the rest": (enrich.Enricher, "packets"),
}
PLAIN_STAGES = {
    "decode the alert": (sys.modules[__name__], "read_alert"),
    "read and crop": (sys.modules[__name__], "cut"),
    "fit": (sys.modules[__name__], "fit"),
    "write FITS": (sys.modules[__name__], "write_stamp"),
    "gzip": (gzip, "compress"),
    "encode the packet": (sys.modules[__name__], "write_packet"),
}


def show_rates(measured: dict[str, list[Rates]]) -> None:
    columns = (("", 18), ("packets/s", 12), ("per CPU-s", 12), ("ratio", 12), ("quartiles", 14), ("CPU ratio", 12))
    print("".join(f"{name:>{width}}" for name, width in (*columns, ("quartiles", 14))))
    plain = np.array(measured["plain"])
    for name, found in measured.items():
        line = f"{name:18}" + "".join(f"{value:12.1f}" for value in np.median(found, axis=0))
        for low, middle, high in np.percentile(np.array(found) / plain, (25, 50, 75), axis=0).T:
            line += f"{middle:10.1f} ×{f'{low:.1f} - {high:.1f}':>14}" if name != "plain" else ""
        print(line)


def show_stages(ours: dict[str, float], plain: dict[str, float]) -> None:
    print(f"{'CPU ms per packet':18}{'ours':>12}{'share':>12}{'plain':>10}")
    for stage, took in ours.items():
        other = f"{plain[stage]:10.3f}" if stage in plain else f"{'-':>10}"
        print(f"{stage:18}{took:12.4f}{100 * took / ours['all']:10.1f} %{other}")


def check(ours: list[bytes], plain: list[bytes]) -> str:
    """Say what was made, having seen that both chains put the same pixels into their packets.

    Not where the candidate lies halfway between two pixels: STDPipe rounds a half to the even one.
    """
    others = {packet.alert_id: packet for packet in map(packets.Packet.read, plain)}
    fitted = same = 0
    for packet in map(packets.Packet.read, ours):
        other = others.pop(packet.alert_id)
        fitted += "adjusted" in packet.stamps and "adjusted" in other.stamps
        if 0.5 in (packet.candidate["x"] % 1, packet.candidate["y"] % 1):
            continue
        same += 1
        for plane in ("science", "template", "difference", "convolved", "error"):
            np.testing.assert_array_equal(packet.stamps[plane].data, other.stamps[plane].data, packet.alert_id)
    if others:
        raise AssertionError(f"found no packet of stampworker for {', '.join(others)}")
    size, other_size = (sum(map(len, made)) / len(made) / 1000 for made in (ours, plain))
    return f"same pixels in {same} packets, {fitted} fitted by both; {size:.1f} kB a packet, plain {other_size:.1f} kB"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="about a tenth of the work")
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    candidates, frames, size, blocks = (40, 1, 512, 5) if quick else (240, 2, 1024, 20)
    with tempfile.TemporaryDirectory() as folder:
        night = simulate(Path(folder) / "night", frames=frames, size=size, candidates=candidates)
        records = map(json.loads, night.alerts.read_text().splitlines())
        messages = [alerts.encode(alerts.from_record(record)) for record in records]
        settings = Settings(frames=FrameSettings(frame_roots=(str(night.directory),)))
        print(f"{candidates} candidates on {frames} frames of {size} × {size} pixels, radius {RADIUS}; ", end="")
        with FrameStore(settings.frames) as store:
            run(
                messages,
                blocks,
                partial(our_chain, store=store, settings=settings),
                partial(plain_chain, folder=night.directory),
            )


def run(messages: list[bytes], blocks: int, ours: Chain, plain: Chain) -> None:
    def in_numpy(messages: list[bytes]) -> list[bytes]:
        usual, adjust.core = adjust.core, adjust.fit_numpy
        try:
            return ours(messages)
        finally:
            adjust.core = usual

    chains = {"plain": plain, "ours, numpy core": in_numpy} | ({"ours, C core": ours} if adjust.CORE == "c" else {})
    made = ours(messages)  # both chains open their frames before the clock starts
    plain([messages[0], messages[-1]])
    measured, others = take_turns(chains, messages, blocks)
    print(check(made, others) + "\n")
    show_rates(measured)
    print()
    show_stages(stages(ours, messages, OUR_STAGES, passes=5), stages(plain, messages[::4], PLAIN_STAGES))


if __name__ == "__main__":
    main()
