"""Frames on other grids: a plane whose shape or WCS differs is brought onto the science frame's pixels.

Images are interpolated by cubic B-splines (Unser 1999, IEEE Signal Processing Magazine 16, 22), which reproduce the
samples and blur less than local cubic kernels; errors linearly; a mask is taken from the nearest pixel and grown by the
4 × 4 pixels that the cubic interpolation touches. Values are flux per pixel, so they are multiplied by the local ratio
of the pixel areas, the determinant of the mapping's Jacobian, unless BUNIT says per solid angle.
"""

from __future__ import annotations

import re
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from astropy.coordinates import SkyCoord
from astropy.io import fits
from scipy.interpolate import RectBivariateSpline
from scipy.ndimage import distance_transform_edt, map_coordinates

from stampworker.errors import FrameMismatch
from stampworker.frames.frame import Frame
from stampworker.frames.wcs import celestial_frame, is_celestial_card

if TYPE_CHECKING:
    from astropy.wcs import WCS
    from numpy.typing import NDArray

    from stampworker.frames.fits.section import Section

PlaneKind = Literal["image", "mask", "error", "variance"]

TOLERANCE = 0.01
"""Pixels to which two grids agree that are one."""

_NODES = 9  # a side, on which a stamp's positions are computed; between them the mapping is a polynomial
_MARGIN = 12  # a cubic spline forgets a pixel by a factor 0.27 a pixel: 1e-7 of it is left
_MAX_PIXELS = 1 << 24  # of another frame for one section: a frame of far smaller pixels would be read as a whole
_JUMP = 1.0  # pixels a pixel, by which no mapping changes from one pixel to the next
_ALIGNED = 1e-3  # pixels; nearer than this to a pixel's centre its neighbours do not count
_SOLID_ANGLE = re.compile(
    r"/.*\b(sr|steradian|sq\w*|arcsec\w*|arcmin\w*|deg\w*|mas\w*|beam)"
    r"|\b(sr|steradian|arcsec|arcmin|deg|mas|beam)\s*(\*\*|\^)?\s*\(?-",
    re.IGNORECASE,
)

_one_grid: weakref.WeakKeyDictionary[Frame, weakref.WeakKeyDictionary[Frame, bool]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def on_grid(frame: Frame, science: Frame, kind: PlaneKind = "image") -> Frame:
    """Return the frame on the science frame's grid.

    Parameters
    ----------
    frame : Frame
        The plane's frame; opened with ``mask=True`` where ``kind`` is ``mask``.
    science : Frame
        Whose pixels are wanted.
    kind : {"image", "mask", "error", "variance"}
        How it is interpolated, if it must be, and how its values scale with the area of a pixel: an image and an error
        in proportion, a variance with the square.

    Returns
    -------
    frame : Frame
        ``frame`` itself where the shapes are equal and the WCS's agree to 0.01 pixel, or one of the two has no usable
        WCS. Else a `Regridded`, which maps what is sliced when it is sliced.

    Raises
    ------
    FrameMismatch
        The shapes differ and a WCS is wanting, or lookup-table distortions forbid to compare them.
    """
    if frame is science or _same(frame, science):
        return frame
    return Regridded(frame, science, kind if frame.dtype.kind == "f" else "mask")


class Regridded(Frame):
    """A frame seen through the pixels of another; slicing reads and maps only what the slice needs.

    Shape, WCS and its cards are the science frame's; url, dtype and bunit the frame's own, and so is the header but for
    the WCS. Where the frame has no data: NaN, in a mask 1.

    Parameters
    ----------
    frame, science : Frame
        Both with a usable WCS.
    kind : {"image", "mask", "error", "variance"}
        See `on_grid`.
    """

    resampled = True

    def __init__(self, frame: Frame, science: Frame, kind: PlaneKind) -> None:
        here, there = science.wcs, frame.wcs
        if here is None or there is None:
            raise ValueError(f"{frame.url} and {science.url} both need a WCS")
        self._current, self._there = here, there
        self._frame, self._science, self._kind = frame, science, kind
        self.url, self.dtype = frame.url, frame.dtype
        self.shape = science.shape
        self._ny, self._nx = science.shape
        self._power = 0 if _SOLID_ANGLE.search(frame.bunit or "") else {"variance": 2, "mask": 0}.get(kind, 1)

    @property
    def bunit(self) -> str | None:
        """BUNIT of the frame's header."""
        return self._frame.bunit

    @property
    def header(self) -> fits.Header:
        """The frame's header with the science frame's WCS; a new one each time."""
        own = [card.image for card in self._frame.header.cards if not is_celestial_card(card.keyword)]
        return fits.Header.fromstring("".join(own + self.wcs_cards()))

    @property
    def wcs(self) -> WCS | None:
        """The science frame's."""
        return self._science.wcs

    @property
    def wcs_problem(self) -> str | None:
        """None."""
        return None

    def wcs_cards(self) -> list[str]:
        """Return the science frame's."""
        return self._science.wcs_cards()

    def section_for(self, box: Section) -> tuple[Frame, Section] | None:
        """Return the frame itself and its section that a box of the science grid needs; see `Frame.section_for`.

        Raises
        ------
        FrameMismatch
            As `window`.
        """
        if self._frame.is_whole or not self._frame.is_fetched:  # which pixels it is makes no difference
            return self._frame.section_for((0, 1, 0, 1))
        mapped = self._map(*box)
        return None if mapped is None else self._frame.section_for(mapped.section)

    def _read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        return self.window(y0, y1, x0, x1)

    @np.errstate(over="ignore", invalid="ignore")  # a hostile WCS gives infinities, not warnings
    def window(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Return rows ``y0:y1``, columns ``x0:x1`` of the science grid, which may hang over the science frame's edge.

        Parameters
        ----------
        y0, y1, x0, x1 : int
            Half-open rectangle, 0-based; may be negative or beyond the science frame's shape.

        Returns
        -------
        values : ndarray, shape (y1 - y0, x1 - x0)
            Data wherever the frame itself has some; elsewhere NaN, in a mask 1.

        Raises
        ------
        FrameMismatch
            The section needs too many of the frame's pixels.
        """
        values = np.full((y1 - y0, x1 - x0), 1 if self._kind == "mask" else np.nan, self.dtype)
        mapped = self._map(y0, y1, x0, x1)
        if mapped is None:
            return values
        inside, (bottom, top, left, right) = mapped.inside, mapped.section
        section = self._frame[bottom:top, left:right]
        y = np.where(inside, mapped.y - bottom, 0)
        x = np.where(inside, mapped.x - left, 0)
        if self._kind == "mask":
            found = _touched(section, y, x, reach=2)
        else:
            found = _interpolate(section, y, x, cubic=self._kind == "image") * mapped.area**self._power
        values[inside] = found[inside]
        return values

    @np.errstate(over="ignore", invalid="ignore")  # a hostile WCS gives infinities, not warnings
    def _map(self, y0: int, y1: int, x0: int, x1: int) -> _Mapped | None:
        """Return where pixels of the science grid lie on the frame; None where all lie beyond it."""
        py, px, area = _positions(self._current, self._there, (y0, y1, x0, x1))
        ny, nx = self._frame.shape
        inside = (py >= -_ALIGNED) & (py <= ny - 1 + _ALIGNED) & (px >= -_ALIGNED) & (px <= nx - 1 + _ALIGNED)
        if not inside.any():
            return None
        # What is outside takes part at the frame's edge and is not used.
        py = np.where(inside, py, 0).clip(0, ny - 1)
        px = np.where(inside, px, 0).clip(0, nx - 1)
        bottom, left = (max(int(p[inside].min()) - _MARGIN, 0) for p in (py, px))
        top = min(int(py[inside].max()) + _MARGIN + 2, ny)
        right = min(int(px[inside].max()) + _MARGIN + 2, nx)
        if (top - bottom) * (right - left) > _MAX_PIXELS:
            raise FrameMismatch(
                self.url,
                f"rows {y0}:{y1}, columns {x0}:{x1} of {self._science.url} need rows {bottom}:{top}, "
                f"columns {left}:{right}, wanted at most {_MAX_PIXELS} pixels",
            )
        return _Mapped(py, px, area, inside, (bottom, top, left, right))


@dataclass(frozen=True)
class _Mapped:
    """Pixels of the science grid as seen from the frame.

    Position and area are in the frame's pixels; those that are not ``inside`` it mean nothing. ``section`` is what is
    read of the frame, y0, y1, x0, x1.
    """

    y: NDArray[Any]
    x: NDArray[Any]
    area: NDArray[Any]
    inside: NDArray[np.bool_]
    section: Section


def _same(frame: Frame, science: Frame) -> bool:
    """Say whether two frames are on one grid; the answer is kept as long as both are."""
    with _lock:
        known = _one_grid.setdefault(frame, weakref.WeakKeyDictionary()).get(science)
    if known is None:
        known = _compare(frame, science)
        with _lock:
            _one_grid.setdefault(frame, weakref.WeakKeyDictionary())[science] = known
    return known


def _compare(frame: Frame, science: Frame) -> bool:
    here, there = science.wcs, frame.wcs
    for one in (frame, science):
        if one.lookup_cards() and (frame.shape != science.shape or frame.lookup_cards() != science.lookup_cards()):
            raise FrameMismatch(
                frame.url,
                f"shape {frame.shape}; its grid cannot be compared with that of {science.url}, shape {science.shape}: "
                f"{one.wcs_problem}",
            )
    if here is None or there is None:
        if frame.shape == science.shape:
            return True
        lacking = science if here is None else frame
        raise FrameMismatch(
            frame.url,
            f"shape {frame.shape}, wanted {science.shape} as {science.url} has, or a WCS on both sides; "
            f"{lacking.url}: {lacking.wcs_problem}",
        )
    if _system(here) != _system(there):
        for one, wcs in ((science, here), (frame, there)):
            if celestial_frame(wcs) is None:
                system = " ".join(_system(wcs))
                raise FrameMismatch(
                    frame.url,
                    f"its grid cannot be compared with that of {science.url}: the WCS of {one.url} is in {system}, "
                    "wanted RA or GLON, and RADESYS and EQUINOX in use",
                )
    if frame.shape != science.shape:
        return False
    if frame.wcs_cards() == science.wcs_cards():
        return True
    ny, nx = science.shape
    y, x = np.meshgrid(np.linspace(0, ny - 1, _NODES), np.linspace(0, nx - 1, _NODES), indexing="ij")
    py, px = _through(here, there, y, x)
    return bool(np.hypot(py - y, px - x).max() <= TOLERANCE)  # a NaN is no agreement


def _through(here: WCS, there: WCS, y: NDArray[Any], x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the positions on ``there`` of positions on ``here``, 0-based; NaN where there is none."""
    world = here.all_pix2world(x, y, 0)
    lon, lat = world[here.wcs.lng], world[here.wcs.lat]
    if _system(here) != _system(there):
        sky = SkyCoord(lon, lat, unit="deg", frame=celestial_frame(here))
        sky = sky.transform_to(celestial_frame(there)).spherical
        lon, lat = sky.lon.deg, sky.lat.deg
    world = (lon, lat) if there.wcs.lng < there.wcs.lat else (lat, lon)
    px, py = there.all_world2pix(*world, 0, tolerance=1e-6, quiet=True)
    return py, px


def _system(wcs: WCS) -> tuple[str, str]:
    """Return the celestial system; FK5 J2000 is as good as ICRS: 23 mas, less than the care with which headers tell."""
    axis, system = wcs.wcs.ctype[wcs.wcs.lng][:4], wcs.wcs.radesys.strip() or "FK5"
    if system == "ICRS" or (system == "FK5" and not abs(wcs.wcs.equinox - 2000) > 0):
        return axis, "J2000"
    return axis, f"{system} {wcs.wcs.equinox}"


def _positions(
    here: WCS, there: WCS, box: tuple[int, int, int, int]
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Return y, x on ``there`` of the box's pixels, and the area of each in pixels of ``there``."""
    y0, y1, x0, x1 = box
    y, x = np.arange(y0, y1, dtype=float), np.arange(x0, x1, dtype=float)
    # One pixel around the box, so that a box of one pixel has a Jacobian.
    rows, columns = (np.linspace(a - 1, b, max(_NODES, (b - a) // 16)) for a, b in ((y0, y1), (x0, x1)))
    nodes = _through(here, there, *np.meshgrid(rows, columns, indexing="ij"))
    if all(map(_is_smooth, nodes)):
        along_y, along_x = (RectBivariateSpline(rows, columns, node) for node in nodes)
        area = along_y(y, x, dx=1) * along_x(y, x, dy=1) - along_y(y, x, dy=1) * along_x(y, x, dx=1)
        return along_y(y, x), along_x(y, x), np.abs(area)
    around = np.meshgrid(np.arange(y0 - 1, y1 + 1.0), np.arange(x0 - 1, x1 + 1.0), indexing="ij")
    py, px = _through(here, there, *around)
    (yy, yx), (xy, xx) = (tuple(_slope(p, axis) for axis in (0, 1)) for p in (py, px))
    return py[1:-1, 1:-1], px[1:-1, 1:-1], np.abs(yy * xx - yx * xy)


def _is_smooth(nodes: NDArray[Any]) -> bool:
    """Say whether a cubic spline through the nodes keeps to `TOLERANCE`: not where a map's edge lies between them.

    Its error is 5/384 of the fourth difference, and some times that beside the outermost nodes. NaN is not smooth.
    """
    return all(bool(np.abs(np.diff(nodes, 4, axis)).max() < 16 * TOLERANCE) for axis in (0, 1))


def _slope(positions: NDArray[Any], axis: int) -> NDArray[Any]:
    """Return the derivative inside the rim along an axis: where the two sides differ by a jump, that of the other."""
    inner: list[slice] = [slice(1, -1), slice(1, -1)]
    inner[axis] = slice(None)
    steps = np.diff(positions[tuple(inner)], axis=axis)
    below, above = np.take(steps, range(steps.shape[axis] - 1), axis), np.take(steps, range(1, steps.shape[axis]), axis)
    smaller = np.where(np.abs(above) < np.abs(below), above, below)
    return np.where(np.abs(above - below) > _JUMP, smaller, (above + below) / 2)


def _interpolate(section: NDArray[Any], y: NDArray[Any], x: NDArray[Any], *, cubic: bool) -> NDArray[Any]:
    """Interpolate at positions inside the section; NaN where a pixel that counts has no data."""
    bad = ~np.isfinite(section)
    data = section.astype(np.float64)
    if bad.all():
        return np.full(y.shape, np.nan)
    if bad.any():  # the spline rings around a jump, so the hole takes the value beside it
        nearest = distance_transform_edt(bad, return_distances=False, return_indices=True)
        data = data[tuple(nearest)]
    values = map_coordinates(data, [y, x], order=3 if cubic else 1, mode="mirror" if cubic else "nearest")
    if bad.any():
        values[_touched(bad, y, x, reach=2 if cubic else 1)] = np.nan
    return np.asarray(values)


def _touched(flags: NDArray[Any], y: NDArray[Any], x: NDArray[Any], *, reach: int) -> NDArray[Any]:
    """Combine (or) the flags of the pixels that count at each position: ``2·reach`` along an axis, 1 where aligned."""
    rows, columns = (_neighbours(p, n, reach) for p, n in zip((y, x), flags.shape, strict=True))
    combined = np.zeros(y.shape, flags.dtype)
    for row in rows:
        for column in columns:
            combined |= flags[row, column]
    return combined


def _neighbours(p: NDArray[Any], n: int, reach: int) -> list[NDArray[np.intp]]:
    nearest = np.floor(p + 0.5).astype(np.intp)
    aligned = np.abs(p - nearest) < _ALIGNED
    lower = np.floor(p).astype(np.intp)
    steps = range(1 - reach, reach + 1)
    return [np.where(aligned, nearest, lower + step).clip(0, n - 1) for step in steps]
