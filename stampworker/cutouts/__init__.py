"""What is cut and measured.

``crop`` (planes around a position), ``files`` (cutouts as FITS), ``adjust`` (the fit, with ``search`` for its minimum;
core/ has the same in C), ``verdict`` (artefact or not), ``keywords`` (which FITS keywords belong to a WCS).
"""

from stampworker.cutouts.adjust import adjust_cutout
from stampworker.cutouts.crop import crop_image, crop_image_centered, downscale_image, get_cutout
from stampworker.cutouts.files import load_cutout, write_cutout
from stampworker.cutouts.verdict import compare_point_source, is_artefact

__all__ = [
    "adjust_cutout",
    "compare_point_source",
    "crop_image",
    "crop_image_centered",
    "downscale_image",
    "get_cutout",
    "is_artefact",
    "load_cutout",
    "write_cutout",
]
