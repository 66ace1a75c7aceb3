"""FITS frames, read by the section: which file, which HDU, which bytes, on which grid.

A `FrameStore` opens frames by URL or path and keeps a bounded number of them; a `Frame` is sliced like an array and
reads only what is sliced; `on_grid` brings a frame onto the grid of another.
"""

from stampworker.frames.frame import Frame
from stampworker.frames.grid import PlaneKind, Regridded, on_grid
from stampworker.frames.sky import celestial_frame
from stampworker.frames.store import FrameStore

__all__ = ["Frame", "FrameStore", "PlaneKind", "Regridded", "celestial_frame", "on_grid"]
