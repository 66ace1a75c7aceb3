from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import given
from hypothesis import strategies as st

from stampworker.cutouts import downscale_image

REFERENCE = json.loads((Path(__file__).parents[1] / "reference/cutouts.json").read_text())
LINEAR = ("CD1_1", "CD1_2", "CD2_1", "CD2_2")
PC_CDELT = {"PC1_1": 0.8, "PC1_2": -0.6, "PC2_1": 0.6, "PC2_2": 0.8, "CDELT1": -1.4e-4, "CDELT2": 1.6e-4}
SIP = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 3, "A_2_0": 3e-5, "A_1_1": -2e-5, "A_0_3": 1e-7}
SIP |= {"B_ORDER": 2, "B_2_0": -1e-5, "B_0_2": 4e-5}
INVERSE = {
    "AP_ORDER": 2,
    "AP_0_0": 0.02,
    "AP_1_0": 1e-4,
    "AP_2_0": -3e-5,
    "BP_ORDER": 2,
    "BP_0_1": 2e-4,
    "BP_0_2": -4e-5,
}
TPV = {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV1_0": 0.0, "PV1_1": 1.001, "PV1_4": 0.2, "PV2_1": 0.999}


@pytest.mark.parametrize("case", REFERENCE["blocks"], ids=lambda c: f"{c['mode']}-{c['scale']}")
def test_blocks_are_the_references(case: dict[str, Any]) -> None:
    """Each mode combines blocks like the independent code; rows and columns that fill no block are left out."""
    image = ((np.arange(7)[:, None] * 100.0 + np.arange(11)) * 7 % 64).astype("i4")
    np.testing.assert_array_equal(downscale_image(image, case["scale"], case["mode"]), case["blocks"])


@given(st.integers(1, 20), st.integers(1, 30), st.data())
def test_block_is_the_sum_of_its_pixels(ny: int, nx: int, data: st.DataObject) -> None:
    """Each block has the sum, or the mean, of its own pixels, for any shape."""
    image = np.random.default_rng(ny * 100 + nx).normal(size=(ny, nx))
    scale = data.draw(st.integers(1, min(ny, nx)))
    y, x = data.draw(st.integers(0, ny // scale - 1)), data.draw(st.integers(0, nx // scale - 1))
    block = image[y * scale : (y + 1) * scale, x * scale : (x + 1) * scale]
    found = downscale_image(image, scale)
    assert found.shape == (ny // scale, nx // scale)
    assert found[y, x] == pytest.approx(block.sum(), abs=1e-12)
    assert downscale_image(image, scale, mode="mean")[y, x] == pytest.approx(block.mean(), abs=1e-12)


def test_anything_that_slices_is_downscaled(tmp_path: Path) -> None:
    """A frame on disk that is not an array, such as an HDU's section, is read and combined."""
    image = np.arange(35.0).reshape(5, 7)
    fits.PrimaryHDU(image).writeto(tmp_path / "frame.fits")
    with fits.open(tmp_path / "frame.fits") as hdus:
        found = downscale_image(hdus[0].section, 2)
    np.testing.assert_array_equal(found, downscale_image(image, 2))


def test_masks_are_joined() -> None:
    """A boolean mask stays boolean: bad where all pixels of a block are bad, or where any is."""
    mask = np.zeros((4, 6), bool)
    mask[:2, :2] = True
    mask[2, 4] = True
    both, either = downscale_image(mask, 2, "and"), downscale_image(mask, 2, "or")
    assert both.dtype == either.dtype == bool
    np.testing.assert_array_equal(both, [[1, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(either, [[1, 0, 0], [0, 0, 1]])


def test_nan_spoils_its_block_alone() -> None:
    """A block with an undefined pixel is undefined; other blocks are not affected."""
    image = np.ones((4, 4), "f4")
    image[0, 3] = np.nan
    found = downscale_image(image, 2)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[4, np.nan], [4, 4]])


@pytest.mark.parametrize(
    ("change", "cards"),
    [
        ((), {}),
        (LINEAR, PC_CDELT),
        (LINEAR, {"PC1_1": -1.4e-4, "PC1_2": 3e-5, "PC2_1": 2e-5, "PC2_2": 1.5e-4}),
        (LINEAR, {"CDELT1": -1.4e-4, "CDELT2": 1.6e-4, "CROTA2": 30.0}),
        (LINEAR, {"CDELT1": -1.4e-4, "CDELT2": 1.6e-4}),
        ((), {"CDELT1": 7.0, "CDELT2": 9.0}),
        (("CRPIX1", "CRPIX2"), {}),
        ((), SIP),
        (LINEAR, PC_CDELT | SIP | INVERSE),
        ((), TPV),
    ],
    ids=["CD", "PC+CDELT", "PC", "CDELT+CROTA", "CDELT", "CD+CDELT", "no-CRPIX", "CD+SIP", "PC+CDELT+SIP", "TPV"],
)
@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.filterwarnings("ignore:cdelt will be ignored since cd is present:RuntimeWarning")
def test_place_on_the_sky_survives(frame: Any, change: tuple[str, ...], cards: dict[str, Any], scale: int) -> None:
    """The corners and the centre of each block keep their sky positions, in every form of WCS."""
    header = frame.header
    for name in change:
        del header[name]
    header.update(cards)
    before = header.tostring()
    image, small = downscale_image(frame.data, scale, header=header)
    assert header.tostring() == before
    assert (small["NAXIS1"], small["NAXIS2"]) == image.shape[::-1]
    assert small["OBJECT"] == "test field"
    y, x = np.mgrid[-0.5 : image.shape[0] : 5.5, -0.5 : image.shape[1] : 5.5]
    whole = ((x + 0.5) * scale - 0.5, (y + 0.5) * scale - 0.5)
    found, wanted = WCS(small).all_pix2world(x, y, 0), WCS(header).all_pix2world(*whole, 0)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-10)


def test_inverse_sip_survives(frame: Any) -> None:
    """The polynomials from the sky to pixels are converted to new pixels."""
    frame.header.update(SIP | INVERSE)
    _, small = downscale_image(frame.data, 3, header=frame.header)
    focal = np.array([[5.0, 7.0], [-11.0, 20.0]])
    whole, scaled = WCS(frame.header).sip, WCS(small).sip
    wanted = whole.foc2pix(focal, 1)
    np.testing.assert_allclose((scaled.foc2pix(focal / 3, 1) - scaled.crpix) * 3, wanted - whole.crpix, atol=1e-9)


def test_repeated_cards_survive(frame: Any) -> None:
    """If a header has CRPIX or CD twice, each card is converted to new pixels once."""
    frame.header.append(("CRPIX1", 12.5), end=True)
    frame.header.append(("CD1_1", -2e-4), end=True)
    _, small = downscale_image(frame.data, 4, header=frame.header)
    found = WCS(small).all_pix2world(3, 5, 0)
    np.testing.assert_allclose(found, WCS(frame.header).all_pix2world(13.5, 21.5, 0), rtol=0, atol=3e-10)
    assert [small["CD1_1", copy] for copy in (0, 1)] == pytest.approx([-5.6e-4, -8e-4], rel=1e-12)


def test_alternative_wcs_survives(frame: Any) -> None:
    """An alternative WCS is scaled like the primary one."""
    for name in ("CTYPE", "CRVAL", "CRPIX"):
        for axis in "12":
            frame.header[f"{name}{axis}B"] = frame.header[name + axis]
    frame.header["CDELT1B"], frame.header["CDELT2B"] = -1e-4, 2e-4
    _, small = downscale_image(frame.data, 4, header=frame.header)
    found = WCS(small, key="B").all_pix2world(3, 5, 0)
    np.testing.assert_allclose(found, WCS(frame.header, key="B").all_pix2world(13.5, 21.5, 0), rtol=0, atol=3e-10)


def test_header_without_wcs() -> None:
    """A header without WCS gets none."""
    _, small = downscale_image(np.zeros((6, 8)), 2, header=fits.Header([("OBJECT", "M 31")]))
    assert dict(small) == {"OBJECT": "M 31", "NAXIS1": 4, "NAXIS2": 3}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mode": "median"}, "mode: found 'median', wanted one of sum, mean, and, or"),
        ({"mode": "SUM"}, "mode: found 'SUM'"),
        ({"mode": "or"}, "mode: found 'or' for float64, which joins bits of integers or booleans only"),
        ({"scale": 0}, "scale: found 0, wanted a whole number from 1 to 6"),
        ({"scale": 7}, "scale: found 7"),
        ({"scale": 1.5}, "scale: found 1.5"),
        ({"header": fits.Header([("CPDIS1", "LOOKUP")])}, "header: found CPDIS1, a lookup-table distortion"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], match: str) -> None:
    """The error about a wrong argument names it, the value found and the value wanted."""
    with pytest.raises(ValueError, match=match):
        downscale_image(np.zeros((6, 8)), **arguments)


def test_image_must_have_two_axes() -> None:
    """A cube is refused."""
    with pytest.raises(ValueError, match=r"image: found the shape \(2, 6, 8\), wanted two axes"):
        downscale_image(np.zeros((2, 6, 8)), 2)
