"""Cutouts: crop, write, load, adjust and downscale."""

from stampworker.cutouts.adjust import adjust_cutout
from stampworker.cutouts.verdict import is_artefact

__all__ = ["adjust_cutout", "is_artefact"]
