"""How much memory of its own a process holds while it works through frame sets.

Each set is a science, a template and a difference frame of noise, and a batch of 20 alerts for
`stampworker.enrich.Enricher` with the default settings. The work is done by this file as a program, which does
nothing else: ``python tests/frames/resident.py FOLDER`` prints RssAnon after each batch, bytes, as a JSON list.
"""

import gzip
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from astropy.io import fits

from stampworker.config import FrameSettings, Settings
from stampworker.enrich import Enricher
from stampworker.formats.alerts import Alert
from stampworker.formats.packets import Packet, encode
from stampworker.frames import FrameStore

PLANES = ("science", "template", "difference")
SKY = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN", "CRVAL1": 10.0, "CRVAL2": 5.0, "CDELT1": -1e-4, "CDELT2": 1e-4}


def write_set(folder: Path, form: str, side: int) -> None:
    """Write the three frames of a set."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(8)
    header = fits.Header(SKY | {"CRPIX1": side / 2, "CRPIX2": side / 2, "GAIN": 1.5})
    template = rng.normal(100, 3, (side, side))
    planes = {"science": template + rng.normal(0, 3, (side, side)), "template": template}
    planes["difference"] = planes["science"] - template
    for plane, data in planes.items():
        path = folder / f"{plane}.fits"
        image = data.astype("f4")
        if form in ("plain", "gz"):
            fits.PrimaryHDU(image, header).writeto(path)
        if form == "gz":
            path.write_bytes(gzip.compress(path.read_bytes(), 1))
        if form in ("rice", "tiles"):
            tile = (1, side) if form == "rice" else (128, 128)
            packed = fits.CompImageHDU(image, header, compression_type="RICE_1", tile_shape=tile, dither_seed=1)
            fits.HDUList([fits.PrimaryHDU(), packed]).writeto(path)


def measure(folder: Path, form: str, side: int, sets: int = 20) -> list[int]:
    """Return RssAnon, bytes, of a new process after each of its frame sets.

    Parameters
    ----------
    folder : Path
        Empty; where the frames are written.
    form : {"plain", "rice", "tiles", "gz"}
        Of the files; rice has a tile a row, tiles are of 128 × 128 pixels.
    side : int
        Rows and columns of a frame.
    sets : int
        How many; their pixels are the same, their files are not.
    """
    write_set(folder / "000", form, side)
    for i in range(1, sets):
        shutil.copytree(folder / "000", folder / f"{i:03}")
    done = subprocess.run([sys.executable, __file__, str(folder)], check=True, stdout=subprocess.PIPE)
    return [int(held) for held in json.loads(done.stdout)]


def rss_anon() -> int:
    """Return the process's anonymous resident memory, bytes: files that are mapped do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def after_sets(root: Path) -> Iterator[int]:
    """Yield RssAnon after each set."""
    rng = np.random.default_rng(9)
    with FrameStore(FrameSettings(frame_roots=(str(root),))) as store:
        for folder in sorted(root.iterdir()):
            frames = {plane: str(folder / f"{plane}.fits") for plane in PLANES}
            ny, nx = store.open(frames["science"]).shape
            places = rng.uniform(0, (nx, ny), (20, 2)).tolist()
            alerts = [Alert(f"{folder.name}-{x}", x=x, y=y, frames=frames) for x, y in places]
            for packet in Enricher(Settings(), store).packets(alerts):
                if not isinstance(packet, Packet):
                    raise packet.error
                encode(packet)
            yield rss_anon()


if __name__ == "__main__":
    print(json.dumps(list(after_sets(Path(sys.argv[1])))))
