"""The samples beside the schemas: their content, and how they are made.

    python tests/samples.py

writes the samples of the current versions. Run it before the release of a version, never afterwards: a sample is what
that version wrote. The frames come from `night.py`; the sample names them by made-up URLs.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

from helpers.night import alert_record, write_night

from stampworker.config import EnrichSettings, FrameSettings, Settings
from stampworker.enrich import Enricher
from stampworker.formats.alerts import encode as encode_alert
from stampworker.formats.alerts import from_record
from stampworker.formats.packets import Packet
from stampworker.formats.packets import encode as encode_packet
from stampworker.formats.schema import ALERT, PACKET
from stampworker.frames import FrameStore

SCHEMAS = Path(__file__).parents[1] / "schemas"
ALERT_FOLDER = SCHEMAS.joinpath(*ALERT)
PACKET_FOLDER = SCHEMAS.joinpath(*PACKET)

_FIELDS: dict[str, Any] = {
    "alertId": "20261124-17",
    "objectId": "J1001-3330",
    "ra": 150.24981,
    "dec": -33.50042,
    "mjd": 61368.25,
    "mjdScale": "tai",
    "fwhm": 3.5,
    "gain": 1.6,
    "extra": {"snr": 17.25, "band": "r", "visit": 4711, "known": False},
}
_PLANES = ("science", "template", "difference", "convolved", "error", "mask")


def sample_alert() -> dict[str, Any]:
    """Return the record of the sample alert."""
    return alert_record({plane: f"file:///nights/20261124/{plane}.fits" for plane in _PLANES}, **_FIELDS)


def sample_packet(folder: Path) -> Packet:
    """Make the sample packet from frames that are written to a folder: a star that moved, radius 5."""
    alert = from_record(sample_alert() | {"frames": write_night(folder, planes=_PLANES)})
    with FrameStore(FrameSettings(frame_roots=(str(folder),))) as store:
        packet = Enricher(Settings(enrich=EnrichSettings(radius=5)), store).packets([alert])[0]
    assert isinstance(packet, Packet), packet
    released = from_record(sample_alert())
    return dataclasses.replace(packet, packet_id=released.packet_id(), frames=released.frames)


def main() -> None:
    """Write the samples."""
    (ALERT_FOLDER / "sample.json").write_text(json.dumps(sample_alert(), indent=2) + "\n", encoding="utf-8")
    (ALERT_FOLDER / "sample.avro").write_bytes(encode_alert(from_record(sample_alert())))
    with tempfile.TemporaryDirectory() as folder:
        (PACKET_FOLDER / "sample.avro").write_bytes(encode_packet(sample_packet(Path(folder))))


if __name__ == "__main__":
    main()
