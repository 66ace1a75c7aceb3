"""Outgoing packets: stamps as FITS files, `Packet` to Avro and back."""

from __future__ import annotations

import io
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from isal import igzip
from numpy.typing import NDArray

from stampworker.cutouts.crop import j2000_name
from stampworker.errors import brief
from stampworker.formats.schema import PACKET, parsed_schema, write_container

_STAMPS = ("science", "template", "difference", "convolved", "error", "mask", "adjusted")
STAMP_FIELDS = {plane: f"cutout{plane.capitalize()}" for plane in _STAMPS}
"""Plane → field of the schema."""
CUTOUT_KEYS = {"science": "image", "difference": "diff", "error": "err"}
"""Planes with another name in the cutouts of `stampworker.cutouts`."""
METRICS = (
    "adjust_chi2_0",
    "adjust_chi2",
    "adjust_df",
    "adjust_pval",
    "adjust_dx",
    "adjust_dy",
    "adjust_scale",
    "adjust_bg",
    "adjust_tbg",
    "adjust_dx_err",
    "adjust_dy_err",
    "adjust_scale_err",
    "adjust_bg_err",
    "adjust_bound",
    "adjust_point_delta_chi2",
)
_FIELDS = {  # other field of the schema: attribute
    "packetId": "packet_id",
    "alertId": "alert_id",
    "objectId": "object_id",
    "candidate": "candidate",
    "frames": "frames",
    "adjust_status": "adjust_status",
    "adjust_artefact": "adjust_artefact",
    "adjustSettings": "adjust_settings",
    "convolvedOrigin": "convolved_origin",
    "errOrigin": "err_origin",
    "resampledPlanes": "resampled_planes",
    "workerVersion": "worker_version",
}
_BITPIX = {"u1": 8, "i2": 16, "i4": 32, "i8": 64, "f4": -32, "f8": -64}
_BLOCK = 2880
_GZIP_MAGIC = b"\x1f\x8b"
# isa-l's level 1 compresses FITS stamps as well as zlib's level 6.
_GZIP_LEVEL = 1


@dataclass(frozen=True)
class Stamp:
    """One plane of a cutout as a FITS file of one HDU, gzip-compressed or plain.

    Attributes
    ----------
    file_name : str
        ``<alertId>_<plane>.fits`` or ``.fits.gz``.
    content : bytes
        Bytes of the file.
    """

    file_name: str
    content: bytes

    @cached_property
    def _hdu(self) -> tuple[NDArray[Any], fits.Header]:
        compressed = self.content[:2] == _GZIP_MAGIC
        plain = igzip.decompress(self.content) if compressed else self.content  # type: ignore[no-untyped-call]
        with fits.open(io.BytesIO(plain), memmap=False) as hdus:
            data = hdus[0].data
            return np.ascontiguousarray(data, dtype=data.dtype.newbyteorder("=")), hdus[0].header.copy()

    @property
    def data(self) -> NDArray[Any]:
        """Pixels, shape (ny, nx), native byte order, in units of BUNIT."""
        return self._hdu[0]

    @property
    def header(self) -> fits.Header:
        """Header of the stamp."""
        return self._hdu[1]

    @cached_property
    def wcs(self) -> WCS | None:
        """Celestial WCS of the stamp; None if the frame had none."""
        wcs = WCS(self.header)
        return wcs.celestial if wcs.has_celestial else None


class StampWriter:
    """Writes the stamps of one plane of one frame.

    It formats the header's cards once, not once per stamp, which is a hundred times faster than astropy.io.fits. The
    plane is the EXTNAME of its stamps. The frame's WCS comes as cards of 80 characters; CRPIX is shifted for each
    stamp, the other cards are copied.
    """

    def __init__(self, plane: str, wcs_cards: Sequence[str], bunit: str | None, gzip: bool = True) -> None:
        self._suffix = f"_{plane}.fits.gz" if gzip else f"_{plane}.fits"
        self._gzip = gzip
        self._crpix = [0.0, 0.0]
        kept = []
        for card in wcs_cards:
            if card.startswith(("CRPIX1", "CRPIX2")):
                self._crpix[int(card[5]) - 1] = float(fits.Card.fromstring(card).value)
            else:
                kept.append(card)
        # A FITS card must be ASCII; the frame's may not be.
        unit = (bunit or "").encode("ascii", "replace").decode()
        head = [_string_card("EXTNAME", plane)] + ([_string_card("BUNIT", unit)] if unit else [])
        self._cards = "".join(head + kept)
        self._has_wcs = bool(wcs_cards)
        self._headers: dict[tuple[int, int, int], tuple[bytes, bytes]] = {}

    def write(self, alert_id: str, data: NDArray[Any], x1: int, y1: int) -> Stamp:
        """Write one stamp of the shape (ny, nx): float32, float64 or an integer type, in any byte order.

        Its first pixel has the position (x1, y1) on the frame, 0-based.
        """
        if data.dtype.kind == "b" or data.dtype.str[1:] not in _BITPIX:
            # FITS has no such type. The values of a mask fit into the next larger one.
            data = data.astype("u1" if data.dtype.kind == "b" else "i4" if data.dtype.itemsize < 4 else "i8")
        bitpix = _BITPIX[data.dtype.str[1:]]
        before, after = self._header(bitpix, *data.shape)
        crpix = b""
        if self._has_wcs:
            cards = _float_card("CRPIX1", self._crpix[0] - x1) + _float_card("CRPIX2", self._crpix[1] - y1)
            crpix = cards.encode("ascii")
        pixels = data.astype(data.dtype.newbyteorder(">"), copy=False).tobytes()
        content = b"".join((before, crpix, after, pixels, _fill(len(pixels), b"\0")))
        if self._gzip:
            content = igzip.compress(content, _GZIP_LEVEL, mtime=0)
        return Stamp(alert_id.replace("/", "_") + self._suffix, content)

    def _header(self, bitpix: int, ny: int, nx: int) -> tuple[bytes, bytes]:
        """Return the header before and after CRPIX1 and CRPIX2, the only cards that differ between stamps."""
        known = self._headers.get((bitpix, ny, nx))
        if known is None:
            before = f"{'SIMPLE  =                    T':<80}" + "".join(
                f"{name:<8}= {value:>20}".ljust(80)
                for name, value in (("BITPIX", bitpix), ("NAXIS", 2), ("NAXIS1", nx), ("NAXIS2", ny))
            )
            after = self._cards + f"{'END':<80}"
            size = len(before) + len(after) + (2 * 80 if self._has_wcs else 0)
            known = before.encode("ascii"), after.encode("ascii") + _fill(size, b" ")
            self._headers[bitpix, ny, nx] = known
        return known


@dataclass(frozen=True)
class Packet:
    """The published result for one alert: a candidate with its stamps and metrics.

    Attributes
    ----------
    packet_id : str
        UUID of the alert's content; see `Alert.packet_id`.
    alert_id : str
        The alert's identifier.
    object_id : str or None
        The object's identifier.
    candidate : dict
        ``x, y`` (pixels, 0-based, as used), ``ra, dec`` (degrees), ``mjd, mjdScale, fwhm, extra``.
    frames : dict
        Plane → URL of the frame, without credentials.
    stamps : dict
        Plane (``science``, ``template``, ``difference``, ``convolved``, ``error``, ``mask``, ``adjusted``) → `Stamp`.
    metrics : dict
        The results ``adjust_*`` of the fit; empty without a fit.
    adjust_status : str
        Status of the fit: ``ok``, ``at_bound``, ``no_convolved``, ``no_signal``, ``too_few_pixels`` or ``off_frame``.
    adjust_artefact : bool or None
        The verdict; None without a fit.
    adjust_settings : dict
        The settings of fit and verdict.
    convolved_origin, err_origin : str or None
        Origin of the convolved plane and of the noise.
    resampled_planes : tuple of str
        Planes that were resampled onto the science frame's grid.
    worker_version : str
        Version of the package that made the packet.
    """

    packet_id: str
    alert_id: str
    object_id: str | None
    candidate: Mapping[str, Any]
    frames: Mapping[str, str]
    stamps: Mapping[str, Stamp]
    metrics: Mapping[str, Any]
    adjust_status: str
    adjust_artefact: bool | None
    adjust_settings: Mapping[str, Any]
    convolved_origin: str | None = None
    err_origin: str | None = None
    resampled_planes: tuple[str, ...] = ()
    worker_version: str = ""

    @property
    def key(self) -> str:
        """Key of the packet's Kafka record: ``object_id``, or ``alert_id`` if that is None."""
        return self.object_id if self.object_id is not None else self.alert_id

    @classmethod
    def read(cls, data: bytes) -> Packet:
        """Read a packet from an Avro object container of one record.

        Parameters
        ----------
        data : bytes
            The container.

        Returns
        -------
        packet : Packet
            The packet.

        Raises
        ------
        ValueError
            The bytes are not a container of one packet.
        """
        packets = read_packets(data)
        if len(packets) != 1:
            raise ValueError(f"data: found a container of {len(packets)} packets, wanted 1")
        return packets[0]

    @classmethod
    def read_file(cls, path: str | Path) -> Packet:
        """Read a packet from a file; see `read`."""
        try:
            return cls.read(Path(path).read_bytes())
        except ValueError as exc:
            raise ValueError(f"{path}: {exc}") from exc

    def to_record(self) -> dict[str, Any]:
        """Return the packet as a record of the schema ``stampworker.packet``."""
        record: dict[str, Any] = {name: getattr(self, attribute) for name, attribute in _FIELDS.items()}
        record["resampledPlanes"] = list(self.resampled_planes)
        for plane, name in STAMP_FIELDS.items():
            stamp = self.stamps.get(plane)
            record[name] = None if stamp is None else {"fileName": stamp.file_name, "stampData": stamp.content}
        return record | {name: self.metrics.get(name) for name in METRICS}

    def to_cutout(self) -> dict[str, Any]:
        """Convert the packet to a dict of the form that `stampworker.cutouts.get_cutout` returns.

        Returns
        -------
        cutout : dict
            The planes ``image, template, diff, convolved, err, mask, adjusted`` that the packet has; ``header`` and
            ``wcs`` of the science stamp; ``meta`` with the candidate's fields, its ``name`` and the metrics.
        """
        cutout: dict[str, Any] = {CUTOUT_KEYS.get(plane, plane): s.data.copy() for plane, s in self.stamps.items()}
        science = self.stamps["science"]
        cutout["header"] = science.header.copy()
        if science.wcs is not None:
            cutout["wcs"] = science.wcs.deepcopy()
        known = {k: v for k, v in self.candidate.items() if k != "extra" and v is not None}
        meta = dict(self.candidate["extra"]) | known
        if "ra" in known and "dec" in known and "name" not in meta:
            meta["name"] = j2000_name(known["ra"], known["dec"])
        cutout["meta"] = meta | dict(self.metrics) | {"id": self.alert_id, "adjust_status": self.adjust_status}
        if self.adjust_artefact is not None:
            cutout["meta"]["adjust_artefact"] = self.adjust_artefact
        return cutout


def encode(packet: Packet) -> bytes:
    """Return a packet as an Avro object container of one record.

    The same packet gives the same bytes, because the container's sync marker is the packet's id.
    """
    record = packet.to_record()
    for name in STAMP_FIELDS.values():
        if record[name] is not None:  # with the name of the branch, fastavro does not search the union
            record[name] = ("stampworker.stamp", record[name])
    return write_container(*PACKET, record, uuid.UUID(packet.packet_id).bytes)


def read_packets(data: bytes) -> list[Packet]:
    """Read every packet of an Avro object container; a ValueError is raised if the bytes are not one of packets."""
    try:
        reader = fastavro.reader(io.BytesIO(data), reader_schema=parsed_schema(*PACKET))
        return [_from_record(record) for record in reader]  # type: ignore[arg-type]
    except fastavro.read.SchemaResolutionError as exc:
        written: Any = fastavro.schema.parse_schema(fastavro.reader(io.BytesIO(data)).writer_schema)
        name = written.get("name", "") if isinstance(written, dict) else written
        raise ValueError(f"data: found an Avro container of {name!r}, wanted {' '.join(PACKET)}") from exc
    except Exception as exc:  # malformed bytes raise many kinds of errors, and fastavro's have no common base
        raise ValueError(f"data: found no Avro container of {' '.join(PACKET)}: {brief(exc)}") from exc


def _from_record(record: dict[str, Any]) -> Packet:
    stamps = {
        plane: Stamp(record[name]["fileName"], record[name]["stampData"])
        for plane, name in STAMP_FIELDS.items()
        if record[name] is not None
    }
    values = {attribute: record[name] for name, attribute in _FIELDS.items()}
    values["resampled_planes"] = tuple(record["resampledPlanes"])
    metrics = {name: record[name] for name in METRICS if record[name] is not None}
    return Packet(stamps=stamps, metrics=metrics, **values)


def _string_card(name: str, value: str) -> str:
    card = str(fits.Card(name, value))
    if len(card) != 80:
        raise ValueError(f"{name}: found {value!r}, wanted a string that fits one FITS card")
    return card


def _float_card(name: str, value: float) -> str:
    # repr is the shortest string that gives the same double back; FITS wants a capital exponent.
    return f"{name:<8}= {value!r:>20}".upper().ljust(80)


def _fill(size: int, fill: bytes) -> bytes:
    return fill * (-size % _BLOCK)
