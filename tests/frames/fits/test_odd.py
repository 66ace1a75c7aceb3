"""Each frame of the collection gives the right pixels, or an error that says what is wrong."""

import warnings
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

from stampworker.config import FrameSettings
from stampworker.errors import FrameCorrupt, FrameMissing
from stampworker.frames import FrameStore, on_grid

RIGHT = {
    "science_rice_int.fits.fz": "base",
    "science_rice_float.fits.fz": "astropy",
    "difference_gzip2_nan.fits.fz": "astropy",
    "science.fits.gz": "base",
    "science_gzip_named.fits": "base",
    "science_mef.fits": "base",
    "science_mef_table_first.fits": "base",
    "science_int16_scaled.fits": "astropy",
    "science_uint16.fits": "base",
    "science_int16_blank.fits": "blank",
    "difference_int16_blank.fits": "astropy",
    "science_float64.fits": "astropy",
    "science_cube1.fits": "base",
    "science_nan_border.fits": "astropy",
    "science_all_nan.fits": "astropy",
    "template_all_zero.fits": "astropy",
    "err_bad_values.fits": "astropy",
    "err_wrong_shape.fits": "astropy",
    "science_corrupt_cards.fits": "base",
    "science_unpadded.fits": "base",
    "science_no_wcs.fits": "base",
    "science_singular_wcs.fits": "base",
    "science_pc_cdelt.fits": "base",
    "template_other_grid.fits": "astropy",
    "template_native_grid.fits": "astropy",
    "template_small_corner.fits": "astropy",
}
WRONG = {
    "science_truncated.fits": "end at byte 165760, the file at 100224",
    "science_truncated_header.fits": "ends after 2000 bytes of header, wanted an END card",
    "science_truncated.fits.gz": "gzip stream ends early",
    "science_corrupt_naxis.fits": "NAXIS1 is 'abcde', wanted an integer",
    "science_no_end.fits": "wanted an END card",
    "science_bad_magic.fits": "wanted 'SIMPLE  ='",
    "science_html_error.fits": "begins with '<!DOCTYPE html.*wanted 'SIMPLE  ='",
    "science_empty.fits": "the file is empty, wanted FITS",
}
NO_WCS = {
    "science_no_wcs.fits": "no WCS",
    "science_singular_wcs.fits": "singular",
    "science_corrupt_cards.fits": "CRVAL1 is '2.7x38e.2', wanted a number",
}


def truth(path: Path) -> np.ndarray:
    """Return the first image as astropy reads it."""
    with warnings.catch_warnings(), fits.open(path) as hdus:
        warnings.simplefilter("ignore")
        data = next(
            h.data for h in hdus if isinstance(h, fits.CompImageHDU | fits.ImageHDU | fits.PrimaryHDU) and h.size
        )
        return np.squeeze(np.array(data))


@pytest.fixture
def odd_store(odd: Path) -> FrameStore:
    return FrameStore(FrameSettings(frame_roots=(str(odd),)))


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_right_pixels(odd: Path, odd_store: FrameStore, name: str) -> None:
    """Every section of a readable variant equals astropy's, or what the collection's README says."""
    frame = odd_store.open(name)
    want = truth(odd / (name if RIGHT[name] == "astropy" else "base_science.fits"))
    if RIGHT[name] == "blank":
        want = want.astype("f4")
        want[:, :20] = np.nan
    assert frame.shape == want.shape
    assert frame.dtype == (np.float64 if "float64" in name else np.float32)
    for rows, columns in [
        (slice(0, None), slice(0, None)),
        (slice(13, 44), slice(5, 36)),
        (slice(40, 55), slice(0, 9)),
    ]:
        got = frame[rows, columns]
        assert got.dtype == frame.dtype
        assert got.dtype.isnative
        assert got.flags.c_contiguous
        np.testing.assert_array_equal(got.astype("f8"), want[rows, columns].astype("f8"))


@pytest.mark.parametrize("name", sorted(WRONG))
def test_wrong_files_are_named(odd: Path, odd_store: FrameStore, name: str) -> None:
    """A damaged file is corrupt, and the message names the file and what was expected."""
    with pytest.raises(FrameCorrupt, match=rf"{name}: .*{WRONG[name]}"):
        odd_store.open((odd / name).as_uri())


def test_every_variant_is_tried(odd: Path) -> None:
    """No file of the collection is left out."""
    there = {p.name for p in odd.iterdir() if ".fits" in p.name and not p.name.startswith("base_")}
    assert there == set(RIGHT) | set(WRONG)
    assert len(there) == 34


def test_missing(odd: Path, odd_store: FrameStore) -> None:
    """A file that does not exist is missing."""
    with pytest.raises(FrameMissing, match=r"none\.fits: no such file"):
        odd_store.open((odd / "none.fits").as_uri())


@pytest.mark.parametrize("name", sorted(NO_WCS))
def test_frames_without_usable_wcs_serve(odd_store: FrameStore, name: str) -> None:
    """An absent, singular or unreadable WCS is None with a reason; the pixels can be read."""
    frame = odd_store.open(name)
    assert frame.wcs is None
    assert frame.wcs_cards() == []
    assert NO_WCS[name].split("'")[0] in str(frame.wcs_problem)
    assert np.isfinite(frame[50:60, 50:60]).all()
    assert on_grid(frame, odd_store.open("base_science.fits")) is frame


def test_same_grid_by_other_keywords(odd_store: FrameStore) -> None:
    """PC with CDELT is the same grid as CD."""
    frame = odd_store.open("science_pc_cdelt.fits")
    assert on_grid(frame, odd_store.open("base_science.fits")) is frame


def test_mef_fragments(odd: Path, odd_store: FrameStore) -> None:
    """Each extension is read by name or number; a table is not an image."""
    for fragment, base in [("SCI", "science"), ("err", "err"), ("DQ", "mask"), ("2", "err"), ("DQ,1", "mask")]:
        got = odd_store.open(f"science_mef.fits#{fragment}", mask=base == "mask")[0:200, 0:200]
        np.testing.assert_array_equal(got, truth(odd / f"base_{base}.fits"))
    with pytest.raises(FrameCorrupt, match=r"HDU 1.* is a table, wanted a 2-D image"):
        odd_store.open("science_mef_table_first.fits#1")
