"""What adjust_cutout promises: axes, minimum, fixed pixels, backgrounds, errors, and an answer to any input."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import shift
from scipy.stats import chi2 as chi2_distribution

from stampworker.cutouts import adjust_cutout

SHAPE = (29, 33)
METRICS = ("chi2_0", "chi2", "df", "pval", "dx", "dy", "scale", "bg", "tbg")


def stars(dx: float, dy: float, width: float = 1.4, shape: tuple[int, int] = SHAPE) -> NDArray[np.float64]:
    """Return three stars, moved."""
    yy, xx = np.mgrid[: shape[0], : shape[1]]
    return sum(
        flux * np.exp(-((xx - x - dx) ** 2 + (yy - y - dy) ** 2) / (2 * width**2))
        for x, y, flux in ((16.2, 13.7, 900.0), (9.5, 18.1, 250.0), (22.0, 9.0, 120.0))
    )


def cutout_of(
    dx: float = 0.8, dy: float = -0.3, scale: float = 1.03, seed: int = 1, noise: float = 1.0
) -> dict[str, Any]:
    """Return a cutout whose image is the template moved and scaled, with noise that the err plane tells."""
    rng = np.random.default_rng(seed)
    image = scale * stars(dx, dy)
    err = np.sqrt(25 + image / 3)
    image = image + 150 + noise * rng.normal(0, 1, SHAPE) * err
    return {"image": image, "convolved": stars(0, 0) + 120, "err": err, "meta": {}}


def copied(cutout: dict[str, Any], **planes: Any) -> dict[str, Any]:
    """Return a copy with other planes."""
    return {**cutout, **planes, "meta": {}}


def metrics(cutout: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Fit a copy that must succeed, and return its metrics without their prefix."""
    cutout = copied(cutout)
    assert adjust_cutout(cutout, **kwargs)
    return {key.removeprefix("adjust_"): value for key, value in cutout["meta"].items()}


def holed(plane: NDArray[Any], value: float, seed: int = 2, n: int = 12) -> NDArray[Any]:
    """Return the plane with a value in some pixels."""
    plane = plane.copy()
    plane.ravel()[np.random.default_rng(seed).choice(plane.size, n, replace=False)] = value
    return plane


PROPERTY = settings(max_examples=40, deadline=None)
SEEDS = st.integers(0, 10**6)
HOW = st.fixed_dictionaries(
    {"inner": st.sampled_from([None, 9, 14]), "fit_bg": st.booleans(), "max_shift": st.sampled_from([0.7, 1, 2])}
)


def random_cutout(seed: int, n: int = 0) -> dict[str, Any]:
    """Return a cutout moved and scaled at random, with a mask that has ``n`` bad pixels where there are any."""
    rng = np.random.default_rng(seed)
    dx, dy = rng.uniform(-1.5, 1.5, 2)
    cutout = cutout_of(dx, dy, scale=rng.uniform(0.95, 1.05), seed=seed)
    if n == 0:
        return cutout
    cutout["mask"] = holed(np.zeros(SHAPE, "u1"), 1, seed, n)
    assume(adjust_cutout(copied(cutout), inner=9, fit_bg=True))  # not all within reach of a bad one
    return cutout


def test_dx_is_along_columns_and_dy_along_rows() -> None:
    """The shift that is applied to the template comes back, x in dx and y in dy."""
    m = metrics(cutout_of(1.2, -0.4), fit_bg=True)
    assert m["dx"] == pytest.approx(1.2, abs=0.03)
    assert m["dy"] == pytest.approx(-0.4, abs=0.03)
    assert m["scale"] == pytest.approx(1.03, abs=0.02)


@pytest.mark.parametrize(
    "kwargs", [{}, {"inner": 11}, {"fit_bg": True}, {"max_shift": 0.7}, {"max_shift": 5, "inner": 9}]
)
def test_chi2_is_that_of_scipys_shift(kwargs: dict[str, Any]) -> None:
    """Both chi2, df and p-value follow from the reported numbers by scipy's own shift over the same pixels."""
    cutout = cutout_of()
    m = metrics(cutout, **kwargs)
    yy, xx = np.mgrid[: SHAPE[0], : SHAPE[1]]
    half = kwargs.get("inner", 99) / 2
    box = (np.abs(yy - SHAPE[0] / 2 + 0.5) <= half) & (np.abs(xx - SHAPE[1] / 2 + 0.5) <= half)
    moved = shift(cutout["convolved"] - m["tbg"], (m["dy"], m["dx"]), order=3, mode="reflect")
    after = (((cutout["image"] - m["bg"] - m["scale"] * moved) / cutout["err"])[box] ** 2).sum()
    image_bg, template_bg = (2.5 * np.median(cutout[p]) - 1.5 * cutout[p].mean() for p in ("image", "convolved"))
    before = (((cutout["image"] - image_bg - cutout["convolved"] + template_bg) / cutout["err"])[box] ** 2).sum()
    assert m["chi2"] == pytest.approx(after, rel=1e-9)
    assert m["chi2_0"] == pytest.approx(before, rel=1e-9)
    assert m["df"] == box.sum() - (4 if kwargs.get("fit_bg") else 3)
    assert m["pval"] == pytest.approx(chi2_distribution.sf(after, m["df"]), rel=1e-6)
    assert m["tbg"] == pytest.approx(template_bg, rel=1e-12)
    if not kwargs.get("fit_bg"):
        assert m["bg"] == pytest.approx(image_bg, rel=1e-12)


def test_adjusted_is_the_residual_of_the_whole_stamp() -> None:
    """The adjusted plane is image - bg - scale * moved template, outside the box too, and keeps float32."""
    cutout = copied(cutout_of())
    cutout = {k: v.astype("f4") if k != "meta" else v for k, v in cutout.items()}
    assert adjust_cutout(cutout, inner=9)
    m = {key.removeprefix("adjust_"): value for key, value in cutout["meta"].items()}
    moved = shift(cutout["convolved"].astype(float) - m["tbg"], (m["dy"], m["dx"]), order=3, mode="reflect")
    want = cutout["image"] - m["bg"] - m["scale"] * moved
    np.testing.assert_allclose(cutout["adjusted"], want, atol=1e-3)
    assert cutout["adjusted"].dtype == np.float32


def test_normalize_divides_by_err_once() -> None:
    """With normalize the adjusted plane is in units of err, and NaN where err is unusable."""
    plain, normal = cutout_of(), copied(cutout_of())
    normal["err"] = holed(normal["err"], 0.0, n=3)
    plain["err"] = normal["err"]
    assert adjust_cutout(plain)
    assert adjust_cutout(normal, normalize=True)
    good = normal["err"] > 0
    np.testing.assert_allclose(normal["adjusted"][good], (plain["adjusted"] / np.where(good, plain["err"], 1))[good])
    assert np.isnan(normal["adjusted"][~good]).all()


def test_results_are_python_values() -> None:
    """Meta holds Python floats, an int and strings, finite, or None."""
    for key, value in metrics(cutout_of(), fit_bg=True).items():
        assert type(value) in (float, int, str, type(None)), key
        assert not isinstance(value, float) or np.isfinite(value), key


def test_parameter_at_its_bound_is_named_and_has_no_error() -> None:
    """Beyond the bound the status says so, the bound is named, and the others keep their errors."""
    m = metrics(cutout_of(dx=1.6), max_shift=1, fit_bg=True)
    assert (m["status"], m["bound"], m["dx"], m["dx_err"]) == ("at_bound", "dx", 1.0, None)
    assert m["dy_err"] > 0
    assert m["bg_err"] > 0
    m = metrics(cutout_of(scale=1.5), fit_bg=True)
    assert (m["status"], m["bound"], m["scale_err"]) == ("at_bound", "scale", None)
    assert m["scale"] == pytest.approx(1.1)
    m = metrics(cutout_of(dx=0, dy=-2.9, scale=0.5), fit_bg=True)
    assert m["bound"] == "dy,scale"
    assert m["scale"] == pytest.approx(1 / 1.1)


def test_inside_the_bounds_is_ok() -> None:
    """An inner minimum has status ok, no bound and three errors; bg has one only where it is fitted."""
    m = metrics(cutout_of())
    assert (m["status"], m["bound"], m["bg_err"]) == ("ok", None, None)
    assert min(m["dx_err"], m["dy_err"], m["scale_err"]) > 0
    assert metrics(cutout_of(), fit_bg=True)["bg_err"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("inner", [None, 15])
def test_errors_are_honest(inner: int | None) -> None:
    """Over 2000 simulations nothing is biased, and deviations over quoted errors have unit width within 10 %."""
    template, pulls = stars(0, 0) + 120, []
    rng = np.random.default_rng(11)
    for _ in range(2000):
        dx, dy, scale = *rng.uniform(-1.5, 1.5, 2), rng.uniform(0.97, 1.03)
        image = scale * stars(dx, dy)
        err = np.sqrt(25 + image / 3)
        image = image + 150 + rng.normal(0, 1, SHAPE) * err
        cutout = {"image": image, "convolved": template, "err": err, "meta": {}}
        m = metrics(cutout, inner=inner, fit_bg=True)
        truth = {"dx": dx, "dy": dy, "scale": scale, "bg": 150 + scale * (m["tbg"] - 120)}
        pulls.append([(m[key] - value) / m[f"{key}_err"] for key, value in truth.items()])
    np.testing.assert_allclose(np.std(pulls, axis=0), 1, atol=0.1)
    np.testing.assert_allclose(np.mean(pulls, axis=0), 0, atol=0.15)


@PROPERTY
@given(SEEDS, HOW, st.sampled_from([0.0, -1e9, 3e7, 1e-300, np.nan, np.inf, -np.inf]))
def test_a_masked_pixel_never_matters(seed: int, how: dict[str, Any], value: float) -> None:
    """Whatever stands in a masked pixel of any plane, the metrics are the same to the last bit."""
    cutout = random_cutout(seed, 8)
    planes = {name: np.where(cutout["mask"], value, cutout[name]) for name in ("image", "convolved", "err")}
    assert metrics(copied(cutout, **planes), **how) == metrics(cutout, **how)


def test_a_bad_template_pixel_takes_out_what_it_could_reach() -> None:
    """A bad template pixel removes a square of ceil(max_shift) + 1 about it; a bad image or err pixel only itself."""
    cutout = cutout_of()
    planes = {name: cutout[name].copy() for name in ("image", "convolved", "err")}
    for plane in planes.values():
        plane[20, 25] = np.nan
    everything = SHAPE[0] * SHAPE[1] - 3
    assert metrics(copied(cutout, image=planes["image"]))["df"] == everything - 1
    assert metrics(copied(cutout, err=planes["err"]))["df"] == everything - 1
    assert metrics(copied(cutout, convolved=planes["convolved"]))["df"] == everything - 7**2
    assert metrics(copied(cutout, convolved=planes["convolved"]), max_shift=1)["df"] == everything - 5**2
    assert metrics(copied(cutout, convolved=planes["convolved"]), max_shift=1.2)["df"] == everything - 7**2


def test_a_bad_template_pixel_does_not_ring() -> None:
    """A NaN beside a star, filled from around, leaves the fit of the rest what it was."""
    cutout = cutout_of()
    whole = metrics(cutout, fit_bg=True)
    template = cutout["convolved"].copy()
    template[18, 10] = np.nan
    m = metrics(copied(cutout, convolved=template), fit_bg=True)
    assert m["chi2"] / m["df"] < 1.1 * whole["chi2"] / whole["df"]
    assert m["dx"] == pytest.approx(whole["dx"], abs=0.02)


def test_any_non_zero_mask_value_is_bad() -> None:
    """Boolean, integer and float masks say the same."""
    mask = np.zeros(SHAPE, bool)
    mask[5:7, 20:30] = True
    want = metrics(copied(cutout_of(), mask=mask))
    for other in (mask.astype("i4") * 4, mask.astype(">i2") * -1, mask * 0.5, mask.astype("u1")):
        assert metrics(copied(cutout_of(), mask=other)) == want


def test_dtype_byte_order_and_layout_do_not_matter() -> None:
    """float64 of either order, strided views and float32 of the same values give the same metrics."""
    cutout = {k: v.astype("f4") if k != "meta" else v for k, v in cutout_of().items()}
    want = metrics(cutout)
    for change in (
        lambda plane: plane.astype("f8"),
        lambda plane: plane.astype(">f8"),
        lambda plane: plane.astype(">f4"),
        np.asfortranarray,
        lambda plane: np.repeat(plane, 2, axis=1)[:, ::2],
    ):
        assert metrics({k: change(v) if k != "meta" else v for k, v in cutout.items()}) == want
    counts = copied(cutout, convolved=np.round(cutout["convolved"]).astype(">i2"))
    assert metrics(counts) == metrics(copied(cutout, convolved=np.round(cutout["convolved"])))


@PROPERTY
@given(SEEDS, st.integers(0, 32), st.integers(0, 32))
def test_moving_both_planes_changes_nothing(seed: int, y: int, x: int) -> None:
    """Image and template moved together, inside an empty border, give the same fit."""
    found: list[Any] = []
    for bottom, left in ((16, 16), (y, x)):
        cutout: dict[str, Any] = {
            name: np.full((61, 65), fill) for name, fill in (("image", 150.0), ("convolved", 120.0), ("err", 5.0))
        }
        for name, plane in cutout.items():
            plane[bottom : bottom + SHAPE[0], left : left + SHAPE[1]] = random_cutout(seed)[name]
        m = metrics({**cutout, "meta": {}})
        found.append([m[key] for key in METRICS])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-7, atol=1e-7)


@PROPERTY
@given(SEEDS, st.sampled_from([0, 5]), HOW)
def test_flipping_x_negates_dx_only(seed: int, masked: int, how: dict[str, Any]) -> None:
    """Mirrored stamps give mirrored shifts; swapped axes swap them."""
    cutout = random_cutout(seed, masked)
    m = metrics(cutout, **how)
    flipped = metrics({k: v[:, ::-1] if k != "meta" else v for k, v in cutout.items()}, **how)
    swapped = metrics({k: v.T if k != "meta" else v for k, v in cutout.items()}, **how)
    for key in METRICS:
        assert flipped[key] == pytest.approx(-m[key] if key == "dx" else m[key], rel=1e-7, abs=1e-7), key
        assert swapped[{"dx": "dy", "dy": "dx"}.get(key, key)] == pytest.approx(m[key], rel=1e-7, abs=1e-7), key


@PROPERTY
@given(SEEDS, st.sampled_from([0, 5]), HOW, st.floats(-9, 9).map(lambda power: 10.0**power))
def test_units_do_not_matter(seed: int, masked: int, how: dict[str, Any], factor: float) -> None:
    """Image, template and err in other units leave chi2, shift and scale."""
    cutout = random_cutout(seed, masked)
    m = metrics(cutout, **how)
    other = metrics({k: v * factor if k not in ("meta", "mask") else v for k, v in cutout.items()}, **how)
    for key in METRICS:
        unit = factor if key in ("bg", "tbg") else 1
        assert other[key] == pytest.approx(m[key] * unit, rel=1e-7, abs=1e-7 * unit), key


def test_nothing_usable_is_said() -> None:
    """False with the reason in meta; nothing of an earlier fit stays."""
    cutout = cutout_of()
    nans = np.full(SHAPE, np.nan)
    cases: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("too_few_pixels", {"image": nans}, {}),
        ("too_few_pixels", {"convolved": nans}, {}),
        ("too_few_pixels", {"err": nans}, {}),
        ("too_few_pixels", {"err": np.zeros(SHAPE)}, {}),
        ("too_few_pixels", {"err": -cutout["err"]}, {}),
        ("too_few_pixels", {"mask": np.ones(SHAPE, int)}, {}),
        ("too_few_pixels", {}, {"inner": 1}),
        ("no_signal", {"convolved": np.full(SHAPE, 7.0)}, {}),
        ("no_signal", {"convolved": np.full(SHAPE, 7, "i2")}, {"fit_bg": True}),
        ("no_signal", {"convolved": np.zeros(SHAPE)}, {"inner": 9}),
    ]
    for status, planes, kwargs in cases:
        again = copied(cutout)
        assert adjust_cutout(again)
        again.update(planes)
        again["meta"]["x"] = 5
        assert not adjust_cutout(again, **kwargs), (status, list(planes))
        assert again["meta"] == {"x": 5, "adjust_status": status}
        assert "adjusted" not in again


def test_least_number_of_pixels() -> None:
    """Parameters plus one pixels are fitted, one fewer are not."""
    cutout = cutout_of()
    for wanted, fit_bg in ((4, False), (5, True)):
        for n in (wanted - 1, wanted):
            err = np.zeros(SHAPE)
            err[13, 14 : 14 + n] = 5.0
            again = copied(cutout, err=err)
            assert adjust_cutout(again, fit_bg=fit_bg) == (n == wanted)
            if n == wanted:
                assert again["meta"]["adjust_df"] == 1


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (2, 3), (11, 11), (5, 201), (201, 201)])
@pytest.mark.parametrize(
    "kwargs", [{}, {"inner": 9, "max_shift": 5}, {"fit_bg": True}, {"max_shift": 0, "max_scale": 1}]
)
def test_any_shape(shape: tuple[int, int], kwargs: dict[str, Any]) -> None:
    """Any shape is fitted or refused with a reason, without an exception."""
    rng = np.random.default_rng(6)
    cutout: dict[str, Any] = {name: rng.normal(50, 3, shape) for name in ("image", "convolved", "err")}
    cutout["meta"] = {}
    fitted = adjust_cutout(cutout, **kwargs)
    assert fitted == (cutout["meta"]["adjust_status"] in ("ok", "at_bound"))
    if fitted:
        rounding = 1e-9 if min(shape) > 8 else 1e-3  # scipy's prefilter is that far off on short axes
        assert cutout["meta"]["adjust_chi2"] <= cutout["meta"]["adjust_chi2_0"] * (1 + rounding)
        assert np.isfinite(cutout["adjusted"]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300, -1e300])
@pytest.mark.parametrize("plane", ["image", "convolved", "err"])
def test_values_that_are_none_leave_the_fit(plane: str, value: float) -> None:
    """Infinite and absurd values are no more than bad pixels, and undefined in the adjusted plane."""
    cutout = cutout_of()
    bad = copied(cutout, **{plane: holed(cutout[plane], value, n=3)})
    assert adjust_cutout(bad)
    assert all(np.isfinite(v) for k, v in bad["meta"].items() if isinstance(v, float)), bad["meta"]
    undefined = bad[plane] == value if np.isfinite(value) or np.isinf(value) else np.isnan(bad[plane])
    assert np.isnan(bad["adjusted"]).sum() == (0 if plane == "err" else 3)
    assert plane == "err" or np.isnan(bad["adjusted"][undefined]).all()


def test_input_planes_are_left_alone() -> None:
    """Nothing is written to the planes that are fitted, whatever their dtype."""
    mask = np.zeros(SHAPE, bool)
    mask[3, 4] = True
    cutout = copied(cutout_of(), mask=mask)
    before = {k: v.copy() for k, v in cutout.items() if k != "meta"}
    assert adjust_cutout(cutout, normalize=True, fit_bg=True)
    for name, plane in before.items():
        np.testing.assert_array_equal(cutout[name], plane)


def test_threads_and_repeats_give_the_same_bits() -> None:
    """The same cutout gives the same metrics and plane in any thread at any time."""
    cutouts = [cutout_of(seed=n) for n in range(8)] * 8

    def run(cutout: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        again = copied(cutout)
        assert adjust_cutout(again, fit_bg=True)
        return again["meta"], again["adjusted"].tobytes()

    alone = [run(cutout) for cutout in cutouts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, cutouts)) == alone


def test_verbose_says_the_result() -> None:
    """A callable gets one line about the fit, or the reason of its failure."""
    lines: list[str] = []
    assert adjust_cutout(copied(cutout_of()), verbose=lines.append)
    assert not adjust_cutout(copied(cutout_of(), convolved=np.zeros(SHAPE)), verbose=lines.append)
    assert "dx 0.8" in lines[0]
    assert "no_signal" in lines[1]


def test_verbose_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """True prints that line."""
    assert adjust_cutout(copied(cutout_of()), verbose=True)
    assert "chi2" in capsys.readouterr().out


@pytest.mark.parametrize("plane", ["image", "convolved", "err"])
def test_a_missing_plane_is_named(plane: str) -> None:
    """KeyError names the plane that is not there."""
    cutout = cutout_of()
    del cutout[plane]
    with pytest.raises(KeyError, match=plane):
        adjust_cutout(cutout)


@pytest.mark.parametrize("plane", ["convolved", "err", "mask"])
def test_a_plane_of_another_shape_is_named(plane: str) -> None:
    """ValueError names the plane and both shapes."""
    with pytest.raises(ValueError, match=rf"'{plane}' has shape \(29, 32\), plane 'image' \(29, 33\)"):
        adjust_cutout(copied(cutout_of(), **{plane: np.ones((29, 32))}))


@pytest.mark.parametrize(
    "plane", [np.ones(9), np.ones((2, 3, 4)), np.ones((0, 5)), np.ones(SHAPE, complex), np.full(SHAPE, "a")]
)
def test_a_plane_that_is_none_is_named(plane: NDArray[Any]) -> None:
    """ValueError names what is no plane of real numbers."""
    with pytest.raises(ValueError, match="plane 'image' has"):
        adjust_cutout(copied(cutout_of(), image=plane))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_shift", -1),
        ("max_shift", 17),
        ("max_shift", np.nan),
        ("max_scale", 0.9),
        ("max_scale", 1000.5),
        ("max_scale", np.inf),
        ("inner", -3),
    ],
)
def test_an_argument_out_of_range_is_named(name: str, value: Any) -> None:
    """ValueError names the argument and the value."""
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        adjust_cutout(cutout_of(), **{name: value})


def test_masked_values_of_masked_arrays_are_bad() -> None:
    """A masked array's masked pixels leave the fit, of whichever plane and dtype; those of a mask are bad."""
    cutout = cutout_of()
    holes = np.zeros(SHAPE, bool)
    holes[13, 16] = holes[3, 4] = True
    for name, dtype in (("image", "i4"), ("image", "f4"), ("err", "f8"), ("convolved", "f8")):
        plane = cutout[name].astype(dtype)
        want = metrics(copied(cutout, **{name: np.where(holes, np.nan, plane)}))
        assert metrics(copied(cutout, **{name: np.ma.MaskedArray(plane, holes)})) == want
    want = metrics(copied(cutout, mask=holes))
    assert metrics(copied(cutout, mask=np.ma.MaskedArray(np.zeros(SHAPE, "i2"), holes))) == want


def test_parameters_without_room_are_none() -> None:
    """Where a bound leaves a parameter no room it is not fitted and does not count."""
    pixels = SHAPE[0] * SHAPE[1]
    for parameters, kwargs in (
        (1, {"max_shift": 0}),
        (2, {"max_scale": 1}),
        (1, {"max_shift": 0, "max_scale": 1, "fit_bg": True}),
        (0, {"max_shift": 0, "max_scale": 1}),
    ):
        assert metrics(cutout_of(), **kwargs)["df"] == pixels - parameters


@pytest.mark.parametrize(
    ("bound", "kwargs"), [("dx", {"max_shift": 0.6}), ("scale", {"max_scale": 1.01}), ("none", {"max_shift": 2})]
)
@pytest.mark.parametrize("fit_bg", [False, True])
def test_errors_are_those_of_the_free_parameters(bound: str, kwargs: dict[str, Any], fit_bg: bool) -> None:
    """Errors are the inverse of half the curvature of chi2, by scipy's shift, in the parameters that are free."""
    cutout = cutout_of()
    m = metrics(cutout, fit_bg=fit_bg, **kwargs)
    assert bound == "none" or bound in m["bound"].split(",")

    def chi2(dx: float, dy: float, scale: float, bg: float) -> float:
        moved = scale * shift(cutout["convolved"] - m["tbg"], (dy, dx), order=3, mode="reflect")
        return float((((cutout["image"] - bg - moved) / cutout["err"]) ** 2).sum())

    at = np.array([m[name] for name in ("dx", "dy", "scale", "bg")])
    free = [name for name in ("dx", "dy", "scale", "bg") if m[f"{name}_err"] is not None]
    assert len(free) == 4 - (not fit_bg) - (bound != "none")
    steps = np.diag([1e-3, 1e-3, 1e-4, 1e-2])[[("dx", "dy", "scale", "bg").index(name) for name in free]]
    curvature = [
        [(chi2(*(at + a + b)) - chi2(*(at + a - b)) - chi2(*(at - a + b)) + chi2(*(at - a - b))) / 4 for b in steps]
        for a in steps
    ]
    size = steps.sum(axis=1)
    covariance = np.linalg.inv(np.array(curvature) / 2) * np.outer(size, size)
    np.testing.assert_allclose([m[f"{name}_err"] for name in free], np.sqrt(np.diag(covariance)), rtol=1e-3)


def test_a_minimum_on_a_bound_is_one_along_the_bound() -> None:
    """Where a tilted valley ends at a bound that no grid holds exactly, the other shift is at its best there."""
    yy, xx = np.mgrid[:31, :31]
    for seed in (3, 11, 37):
        rng = np.random.default_rng(seed)
        angle, (x, y) = rng.uniform(0, np.pi), rng.uniform(-1.4, 1.4, 2)
        template, image = (
            900
            * np.exp(
                -(((xx - 15 - u) * np.cos(angle) + (yy - 15 - v) * np.sin(angle)) ** 2) / 32
                - ((yy - 15 - v) * np.cos(angle) - (xx - 15 - u) * np.sin(angle)) ** 2 / 3.6
            )
            + 120
            for u, v in ((0.0, 0.0), (x, y))
        )
        image = image + rng.normal(0, 5, image.shape)
        cutout = {"image": image, "convolved": template, "err": np.full(image.shape, 5.0)}
        for max_shift in (0.7, 1.4, 2.8):
            m = metrics(cutout, max_shift=max_shift)

            def chi2(dx: float, dy: float, m: dict[str, Any] = m, cutout: dict[str, Any] = cutout) -> float:
                moved = shift(cutout["convolved"] - m["tbg"], (dy, dx), order=3, mode="reflect")
                scale = np.clip((moved * (cutout["image"] - m["bg"])).sum() / (moved**2).sum(), 1 / 1.1, 1.1)
                return float((((cutout["image"] - m["bg"] - scale * moved) / 5) ** 2).sum())

            for dx, dy in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
                there = np.clip((m["dx"] + dx, m["dy"] + dy), -max_shift, max_shift)
                assert m["chi2"] <= chi2(*there) * (1 + 1e-9)


@pytest.mark.parametrize("value", ["1", None, [1, 2], np.nan])
def test_an_argument_of_another_kind_is_named(value: Any) -> None:
    """ValueError names an argument that is no number; None is only for inner."""
    for name in ("max_shift", "max_scale", "inner"):
        if not (name == "inner" and value is None):
            with pytest.raises(ValueError, match=rf"{name} is .*, wanted"):
                adjust_cutout(cutout_of(), **{name: value})


def test_rows_of_different_lengths_are_no_plane() -> None:
    """ValueError names the plane."""
    with pytest.raises(ValueError, match="plane 'image'"):
        adjust_cutout(copied(cutout_of(), image=[[1.0], [1.0, 2.0]]))
