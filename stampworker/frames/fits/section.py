"""Sections: half-open rectangles of a frame's pixels."""

from __future__ import annotations

Section = tuple[int, int, int, int]
"""y0, y1, x0, x1 of rows ``y0:y1`` and columns ``x0:x1``."""
