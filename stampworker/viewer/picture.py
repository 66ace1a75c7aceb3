"""A packet for the eye: its stamps as a picture, its fields as text.

Stamps are shown as they are on the frame, x to the right and y up, every pixel as a square; nothing is flipped, rotated
or smoothed. matplotlib (the extra ``viewer``) is imported only when a picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from astropy.stats import mad_std
from numpy.typing import NDArray

from stampworker.errors import ConfigError
from stampworker.formats.packets import Packet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("science", "template", "convolved", "difference", "adjusted")
"""Planes of a row, from left to right."""
MOST_PIXELS = 60_000_000
"""Largest picture, screen pixels: some 500 packets with stamps of 63 × 63."""

_STAMP, _LARGE_STAMP = 132, 252  # approximate side of a stamp, of many and of one or two packets, screen pixels
_LABEL = 196  # width of a row's text
_GAP = 6
_HEAD, _FOOT = 26, 24
_DPI = 100
_LINE = 15  # height of a line of text, screen pixels

# Data are grey. Colours are for everything else.
_PAPER = (255, 255, 255)
_NO_PLANE = (238, 238, 238)
_NO_DATA = (72, 104, 168)
_MASKED = (226, 132, 36)
_MARK = (214, 39, 40)
_VERDICTS = {True: ("artefact", "#b22222"), False: ("not an artefact", "#1f7a3a"), None: ("no fit", "#666666")}

Floats = NDArray[np.floating[Any]]
_Stretch = Callable[[Floats], Floats]
"""From values of a plane to grey: 0 is black, 1 is white."""


def picture(packets: Sequence[Packet], path: str | Path, labels: Sequence[str] | None = None) -> None:
    """Draw the stamps of packets as a PNG, one row per packet, and beside its id its label, such as its true class.

    Many rows are laid out in several blocks side by side, each read downwards. Raises ValueError if there are no
    packets, too many for a picture of 60 million pixels, or not as many labels, and ConfigError if matplotlib is not
    installed.

    Black is low, white is high. Science and convolved share a stretch; the template, on its own flux scale, has its
    own. Both are asinh stretches from 3 sigma below the sky to the brightest pixels, linear over the noise. Difference
    and adjusted share a linear stretch that is symmetric about zero, so they show what the adjustment removes. Pixels
    without data are blue, masked pixels have an orange tint, planes that the packet lacks are light grey. Ticks point
    at the candidate's pixel.
    """
    if not packets:
        raise ValueError("packets: found none, wanted at least 1")
    if labels is not None and len(labels) != len(packets):
        raise ValueError(f"labels: found {len(labels)}, wanted one for each of {len(packets)} packets")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ConfigError("pictures need matplotlib: pip install 'stampworker[viewer]'") from exc

    cell, (width, height), corners = _layout(packets)
    if width * height > MOST_PIXELS:
        raise ValueError(
            f"packets: found {len(packets)}, a picture of {width} × {height}; wanted at most {MOST_PIXELS:.0e} pixels"
        )
    canvas = np.full((height, width, 3), _PAPER, np.uint8)
    figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for packet, label, (left, top) in zip(packets, labels or [""] * len(packets), corners, strict=True):
        _paint_row(canvas, packet, left + _LABEL, top, cell)
        _write_row(axes, packet, label, left, top + cell / 2)
    for left in dict.fromkeys(left for left, _ in corners):  # of each block
        for column, name in enumerate(COLUMNS):
            middle = left + _LABEL + column * (cell + _GAP) + cell / 2
            axes.text(middle, _HEAD / 2, name, ha="center", va="center", fontsize=9, color="#333333")
    _write_legend(axes, height - _FOOT / 2)
    # figimage, unlike imshow, resamples nothing: a screen pixel is a pixel of the array.
    figure.figimage(canvas, origin="upper", zorder=-1)
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    # Without a date and the software's version, the same packets give the same file.
    figure.savefig(path, format="png", dpi=_DPI, metadata={"Software": None})


def _layout(packets: Sequence[Packet]) -> tuple[int, tuple[int, int], list[tuple[int, int]]]:
    """Arrange the rows: up to 8 in one block, more so that the picture is about as high as wide.

    Return the side of a stamp's cell, width and height of the picture, and left and top of each row, screen pixels.
    """
    number = len(packets)
    side = max((max(stamp.data.shape) for packet in packets for stamp in packet.stamps.values()), default=1)
    cell = side * max(1, round((_LARGE_STAMP if number <= 2 else _STAMP) / side))
    width = _LABEL + len(COLUMNS) * (cell + _GAP) + 3 * _GAP
    blocks = max(1, round(math.sqrt(number * (cell + _GAP) / width))) if number > 8 else 1
    rows = math.ceil(number / blocks)
    corners = [(_GAP + i // rows * width, _HEAD + i % rows * (cell + _GAP)) for i in range(number)]
    return cell, (_GAP + blocks * width, _HEAD + rows * (cell + _GAP) + _FOOT), corners


def _paint_row(canvas: NDArray[np.uint8], packet: Packet, left: int, top: int, cell: int) -> None:
    planes = {name: packet.stamps[name].data for name in COLUMNS if name in packet.stamps}
    stamp = packet.stamps.get("mask")
    mask = None if stamp is None else stamp.data != 0
    stretches = _stretches(planes, mask)
    for column, name in enumerate(COLUMNS):
        x = left + column * (cell + _GAP)
        if name not in planes:
            canvas[top : top + cell, x : x + cell] = _NO_PLANE
            continue
        image = _colours(planes[name], mask, stretches[name])
        zoom = max(1, cell // max(image.shape[:2]))
        image = image[::-1].repeat(zoom, axis=0).repeat(zoom, axis=1)  # a picture's first row is the upper one
        height, width = image.shape[:2]
        y0, x0 = top + (cell - height) // 2, x + (cell - width) // 2
        canvas[y0 : y0 + height, x0 : x0 + width] = image
        _mark(canvas, x0 + width // 2, y0 + height // 2, cell)


def _stretches(planes: Mapping[str, Floats], mask: NDArray[np.bool_] | None) -> dict[str, _Stretch]:
    """Choose the stretch of each plane."""
    stretches = {name: _sky_stretch(_usable(plane, mask)) for name, plane in planes.items()}
    if "science" in stretches:
        stretches["convolved"] = stretches["science"]
    residual = planes.get("difference", planes.get("adjusted"))
    if residual is not None:
        values = _usable(residual, mask)
        span = max(5 * float(mad_std(values)), float(np.percentile(np.abs(values), 99.9))) if values.size else 1.0
        stretches |= dict.fromkeys(("difference", "adjusted"), _stretch(-span or -1.0, span or 1.0))
    return stretches


def _usable(plane: Floats, mask: NDArray[np.bool_] | None) -> Floats:
    """Return the finite pixels as float64, without the masked ones if others are left."""
    finite = np.isfinite(plane)
    good = finite if mask is None or mask.shape != plane.shape else finite & ~mask
    return plane[good if good.any() else finite].astype(np.float64)


def _sky_stretch(values: Floats) -> _Stretch:
    """Stretch from 3 sigma below the sky to the brightest thousandth, at least 10 sigma above it."""
    if not values.size:
        return _stretch(0.0, 1.0)
    sky = float(np.median(values))
    sigma = float(mad_std(values)) or float(values.std()) or 1.0
    return _stretch(sky - 3 * sigma, max(sky + 10 * sigma, float(np.percentile(values, 99.9))), 5 * sigma)


def _stretch(low: float, high: float, soft: float | None = None) -> _Stretch:
    """Map low to 0 and high to 1: linearly, or by an asinh that is linear up to about ``soft`` above low."""
    from astropy.visualization import AsinhStretch, LinearStretch, ManualInterval  # this imports matplotlib

    shape = LinearStretch() if soft is None else AsinhStretch(soft / (high - low))
    stretch: _Stretch = shape + ManualInterval(low, high)
    return stretch


def _colours(plane: Floats, mask: NDArray[np.bool_] | None, stretch: _Stretch) -> NDArray[np.uint8]:
    """Turn a plane into red, green, blue, shape (ny, nx, 3); the first row is still the lowest."""
    finite = np.isfinite(plane)
    grey = np.repeat(255 * stretch(np.where(finite, plane, 0.0))[:, :, None], 3, axis=2)
    if mask is not None and mask.shape == plane.shape:
        grey[mask] = 0.6 * grey[mask] + 0.4 * np.array(_MASKED)
    grey[~finite] = _NO_DATA
    return np.asarray(np.rint(grey), np.uint8)


def _mark(canvas: NDArray[np.uint8], x: int, y: int, cell: int) -> None:
    """Draw ticks that point at the candidate's pixel from the left and from below, without covering it."""
    near, far = round(0.09 * cell), round(0.17 * cell)
    half = cell // 200  # the line is one screen pixel wide on small stamps, three on large ones
    canvas[y - half : y + half + 1, x - far : x - near] = _MARK
    canvas[y + near : y + far, x - half : x + half + 1] = _MARK


def _write_row(axes: Axes, packet: Packet, label: str, left: float, middle: float) -> None:
    verdict, colour = _VERDICTS[packet.adjust_artefact]
    status = "" if packet.adjust_status == "ok" else f" ({packet.adjust_status})"
    lines: list[tuple[str, dict[str, Any]]] = [(packet.alert_id, {"weight": "bold"})]
    lines += [(label, {})] if label else []
    lines.append((verdict + status, {"color": colour, "weight": "bold"}))
    m = packet.metrics
    if m.get("adjust_chi2") is not None:
        lines.append((f"χ² {_short(m['adjust_chi2_0'])} → {_short(m['adjust_chi2'])}, {m['adjust_df']} d.o.f.", {}))
        lines.append((f"p {m['adjust_pval']:.2g}   scale {m['adjust_scale']:.3f}", {}))
        lines.append((f"dx {m['adjust_dx']:+.2f}   dy {m['adjust_dy']:+.2f} px".replace("-", "−"), {}))
    top = middle - _LINE * (len(lines) - 1) / 2
    for number, (text, style) in enumerate(lines):
        fitting = text if len(text) <= 31 else text[:30] + "…"
        axes.text(left, top + _LINE * number, fitting, fontsize=8, va="center", parse_math=False, **style)


def _short(value: float) -> str:
    return f"{value:.0f}" if 99.5 <= abs(value) < 1e6 else f"{value:.3g}"


def _write_legend(axes: Axes, y: float) -> None:
    from matplotlib.patches import Rectangle

    x = float(_GAP)
    for colour, text, width in ((_NO_DATA, "no data", 54), (_MASKED, "masked", 54), (_NO_PLANE, "no such plane", 88)):
        shade = tuple(c / 255 for c in colour)
        axes.add_patch(Rectangle((x, y - 5), 10, 10, facecolor=shade, edgecolor="#999999", linewidth=0.5))
        axes.text(x + 15, y, text, fontsize=8, va="center", color="#555555")
        x += width + 20
    axes.text(x, y, "x right, y up; difference and adjusted share a stretch", fontsize=8, va="center", color="#555555")


def describe(packet: Packet) -> str:
    """Write a packet as text: a line per field (identifiers, candidate, fit, verdict, settings) and one per stamp."""
    record = packet.to_record()
    candidate = dict(packet.candidate)
    extra = candidate.pop("extra", None) or {}
    fit = {name: record[name] for name in ("adjust_status", "adjust_artefact")} | dict(packet.metrics)
    fit |= {name: record[name] for name in ("convolvedOrigin", "errOrigin")}
    groups: dict[str, Mapping[str, object]] = {
        "packet": {name: record[name] for name in ("alertId", "objectId", "packetId", "workerVersion")},
        "candidate": candidate | {f"extra.{name}": value for name, value in sorted(extra.items())},
        "adjustment": fit | {"resampledPlanes": ", ".join(packet.resampled_planes) or None},
        "settings": packet.adjust_settings,
    }
    width = max(len(name) for fields in groups.values() for name in fields)
    text = []
    for title, fields in groups.items():
        text += [title, *(f"  {name:<{width}}  {_value(name, value)}" for name, value in fields.items())]
    return "\n".join([*text, *_describe_stamps(packet)])


_UNITS = {"x": "pixel", "y": "pixel", "ra": "deg", "dec": "deg", "mjd": "d", "fwhm": "pixel"} | {
    f"adjust_d{axis}{error}": "pixel" for axis in "xy" for error in ("", "_err")
}


def _value(name: str, value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        # Positions and times need every digit, all other values six.
        value = f"{value:.7f}".rstrip("0").rstrip(".") if name in ("x", "y", "ra", "dec", "mjd") else f"{value:.6g}"
    return f"{value} {_UNITS[name]}" if name in _UNITS else str(value)


def _describe_stamps(packet: Packet) -> list[str]:
    rows = [("stamp", "pixels", "type", "unit", "no data", "frame")]
    for name, stamp in packet.stamps.items():
        data = stamp.data
        pixels = f"{data.shape[1]} × {data.shape[0]}"
        missing = f"{np.count_nonzero(data)} masked" if name == "mask" else str(np.count_nonzero(~np.isfinite(data)))
        unit, frame = str(stamp.header.get("BUNIT", "–")), packet.frames.get(name, "–")
        rows.append((name, pixels, str(data.dtype), unit, missing, frame))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
