"""The cores: numpy and C agree, both find the lowest of close minima, and the C core keeps to its memory."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cutouts.random_stamps import field, trail
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.ndimage import shift, spline_filter
from scipy.optimize import minimize

from stampworker.cutouts import adjust
from stampworker.cutouts.search import Minimum, newton_step

SOURCES = sorted(Path(adjust.__file__).with_name("core").glob("*.c"))
CORES = [
    pytest.param(adjust.fit_numpy, id="numpy"),
    pytest.param(
        adjust.fit_compiled, id="c", marks=pytest.mark.skipif(adjust.CORE != "c", reason="the C core was not compiled")
    ),
]
ANSWERING = [adjust.fit_numpy] + ([adjust.fit_compiled] if adjust.CORE == "c" else [])
needs_c = pytest.mark.skipif(adjust.CORE != "c", reason="the C core was not compiled")


@pytest.mark.slow
@needs_c
@settings(max_examples=150)
@example(23052, 9, 9, 0.0, 5.0, 1.3, True, False, 0.01, 1.0, False)  # minima on either side of the scale's bound
@given(
    seed=st.integers(0, 10**9),
    ny=st.integers(3, 41),
    nx=st.integers(3, 41),
    inner=st.sampled_from([0.0, 5.0, 8.0, 11.5, 20.0]),
    max_shift=st.sampled_from([0.0, 0.4, 0.7, 1.0, 1.4, 2.0, 2.5, 5.0]),
    max_scale=st.sampled_from([1.0, 1.1, 1.3, 3.0]),
    fit_bg=st.booleans(),
    normalize=st.booleans(),
    bad=st.sampled_from([0.0, 0.01, 0.1]),
    signal=st.sampled_from([0.0, 1.0]),
    single=st.booleans(),
)
def test_c_and_numpy_give_the_same_answer(
    seed: int,
    ny: int,
    nx: int,
    inner: float,
    max_shift: float,
    max_scale: float,
    fit_bg: bool,
    normalize: bool,
    bad: float,
    signal: float,
    single: bool,
) -> None:
    """Failure, pixels and backgrounds agree, and chi2 to rounding; the rest where no two minima are equal."""
    rng = np.random.default_rng(seed)
    planes = [plane.astype("f4" if single else "f8") for plane in field(seed, (ny, nx), signal)]
    for plane in planes:
        plane[rng.random(plane.shape) < bad / 3] = rng.choice([np.nan, np.inf, 0.0])
    mask = (rng.random((ny, nx)) < bad / 3).astype(np.uint8) if bad else None
    arguments: tuple[Any, ...] = (*planes, mask, inner, max_shift, max_scale, fit_bg, normalize)
    adjusted = [np.full((ny, nx), -9.0, planes[0].dtype) for _ in range(2)]
    cores: tuple[Any, ...] = (adjust.fit_numpy, adjust.fit_compiled)
    ours, theirs = (core(*arguments, plane) for core, plane in zip(cores, adjusted, strict=True))
    assert ours[:2] == theirs[:2]
    assert ours.failure or theirs.chi2 == pytest.approx(ours.chi2, rel=1e-8, abs=1e-9)
    assert ours.failure or theirs.chi2_0 == pytest.approx(ours.chi2_0, rel=1e-9)
    if abs(ours.dx - theirs.dx) + abs(ours.dy - theirs.dy) < 0.01:
        assert theirs.at_bound == ours.at_bound
        np.testing.assert_allclose(theirs[3:10], ours[3:10], rtol=1e-6, atol=2e-5)
        np.testing.assert_allclose(adjusted[1], adjusted[0], rtol=1e-4, atol=0.02)
    assert (np.isnan(adjusted[0]) == np.isnan(adjusted[1])).all()


@needs_c
@pytest.mark.parametrize("seed", range(20))
def test_errors_and_bounds_agree(seed: int) -> None:
    """On stamps with signal, both cores name the same bounds and quote the same errors."""
    planes = field(seed, (31, 27))
    for how in ((0.0, 2.0, 1.1, False, False), (15.0, 1.0, 1.1, True, False)):
        arguments: tuple[Any, ...] = (*planes, None, *how, np.empty((31, 27)))
        ours, theirs = (core(*arguments) for core in (adjust.fit_numpy, adjust.fit_compiled))
        assert ours.at_bound == theirs.at_bound
        np.testing.assert_allclose(theirs[3:], ours[3:], rtol=1e-5, atol=1e-7)


@needs_c
def test_every_width_of_vectors_gives_the_same_bits() -> None:
    """SSE2, AVX2 and AVX-512 answer alike to the last bit, so machines of one cluster make the same packets."""
    fit = adjust._compiled
    assert fit is not None
    answers: dict[int, list[Any]] = {0: [], 2: []}
    for width in (4, 8):
        if can_run(width):
            answers[width] = []
    for width, results in answers.items():
        for seed in range(5):
            adjusted = np.empty((63, 63))
            found = fit(*field(seed, (63, 63)), None, 0.0, 2.0, 1.1, True, False, adjusted, width)
            results.append((repr(found), adjusted.tobytes()))
    assert all(results == answers[0] for results in answers.values())


def can_run(width: int) -> bool:
    """Return whether this machine has vectors of so many doubles."""
    assert adjust._compiled is not None
    planes = field(1, (9, 9))
    try:
        adjust._compiled(*planes, None, 0.0, 2.0, 1.1, True, False, np.empty((9, 9)), width)
    except ValueError:
        return False
    return True


@needs_c
def test_c_refuses_what_is_no_plane() -> None:
    """Called past adjust_cutout, the C core raises instead of reading what is not there."""
    image, template, err = field(1, (9, 9))
    with pytest.raises(ValueError, match="no vectors of that width"):
        adjust.fit_compiled(image, template, err, None, 0.0, 2.0, 1.1, False, False, np.empty((9, 9)), 3)
    good = (image, template, err, None, 0.0, 2.0, 1.1, False, False, np.empty((9, 9)))
    cases: list[tuple[int, Any]] = [
        (0, image.astype(int)),
        (1, template[:, :8]),
        (2, err.astype(">f8")),
        (3, np.zeros((9, 9), "i4")),
        (9, np.empty((8, 9))),
    ]
    for place, value in cases:
        with pytest.raises(ValueError, match="contiguous"):
            adjust.fit_compiled(*good[:place], value, *good[place + 1 :])
    for place, number in ((4, -1.0), (5, 17.0), (5, np.nan), (6, 0.5), (6, 1001.0)):
        with pytest.raises(ValueError, match="out of range"):
            adjust.fit_compiled(*good[:place], number, *good[place + 1 :])


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("err", [1e-47, 1e-25, 1.0, 1e49])
@pytest.mark.parametrize("template", [1e-49, 1.0, 1e25, 9e49])
@pytest.mark.parametrize("image", [1e-49, 1.0, 1e25, 9e49])
def test_no_size_of_values_overflows(
    core: Callable[..., adjust.Fit], image: float, template: float, err: float
) -> None:
    """Planes of any size that counts as usable are fitted, though no float holds the square of their square."""
    planes = field(1, (19, 21))
    sizes = (image / 1e4, template / 1e4, err / 1e2)
    adjusted = np.empty((19, 21))
    for fit_bg in (False, True):
        fit = core(
            *(p * size for p, size in zip(planes, sizes, strict=True)), None, 0.0, 2.0, 1.1, fit_bg, False, adjusted
        )
        assert not fit.failure
        assert np.isfinite([fit.chi2, fit.chi2_0, fit.dx, fit.dy, fit.scale, fit.bg]).all()
        assert fit.chi2 <= fit.chi2_0 * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("group", range(10))
def test_nothing_lower_is_found_by_brute_force(group: int) -> None:
    """A dense grid and scipy's polish, by scipy's shift, find nothing lower by 1e-6 on a hundred stamps."""
    points = np.linspace(-2, 2, 41)
    for seed in range(10 * group, 10 * group + 10):
        inner, fit_bg = (0.0, 7.0, 12.0)[seed % 3], seed % 2 == 1
        planes = field(seed, (21, 19), signal=(0.0, 0.1, 0.3, 1.0)[seed % 4])
        fits = [core(*planes, None, inner, 2.0, 1.1, fit_bg, False, np.empty((21, 19))) for core in ANSWERING]
        chi2 = objective(*planes, inner, 1.1, fit_bg, fits[0])
        starts = sorted((chi2((x, y)), x, y) for x in points for y in points)[:4]
        found = min(minimize(chi2, s[1:], bounds=((-2, 2), (-2, 2)), method="L-BFGS-B").fun for s in starts)
        for fit in fits:
            assert fit.chi2 == pytest.approx(chi2((fit.dx, fit.dy)), rel=1e-9)
            assert fit.chi2 <= found * (1 + 1e-6)


def objective(
    image: Any, template: Any, err: Any, inner: float, max_scale: float, fit_bg: bool, fit: adjust.Fit
) -> Callable[[Any], float]:
    """Return chi2 of a shift (dx, dy), by scipy's shift, at the best scale and offset."""
    coefficients = spline_filter(template - fit.tbg, 3, mode="reflect")
    half = (inner or sum(image.shape)) / 2
    box = np.ix_(*(np.abs(np.arange(n) - n / 2 + 0.5) <= half for n in image.shape))
    weight = err[box] ** -2

    def freed(plane: Any) -> Any:
        return plane - np.average(plane, weights=weight) if fit_bg else plane

    residual = freed((image if fit_bg else image - fit.bg)[box])

    def chi2(at: Any) -> float:
        moved = freed(shift(coefficients, (at[1], at[0]), order=3, mode="reflect", prefilter=False)[box])
        scale = np.clip((weight * moved * residual).sum() / (weight * moved**2).sum(), 1 / max_scale, max_scale)
        return float((weight * (residual - scale * moved) ** 2).sum())

    return chi2


HARD = [  # of many thousand random fits, those in which a search that is easily satisfied goes astray
    # seed, shape, inner, max_shift, max_scale, fit_bg, signal; dx and dy of something lower than it finds
    (111, (14, 24), 11.5, 2.5, 1.02, False, 0.1, -1.4, -1.16),
    (994, (17, 22), 7.0, 2.0, 1.1, True, 0.0, -1.74, -1.6),
    (100286, (16, 9), 8.0, 1.0, 1.3, True, 0.0, -0.32, 1.0),
    (100395, (27, 21), 11.5, 1.0, 1.3, True, 0.0, -0.34, 0.66),
    (100801, (28, 30), 7.0, 2.0, 1.3, False, 1.0, 1.86, -0.24),
    (101075, (28, 10), 20.0, 2.5, 1.3, False, 0.0, 1.18, -1.62),
    (101408, (20, 15), 20.0, 2.0, 1.1, False, 0.0, -0.86, 1.86),
    (101561, (30, 22), 8.0, 2.5, 1.0, False, 0.0, -1.86, -2.42),
    # those with minima within a tenth of a pixel of each other, one on the bound
    (17819, (15, 15), 0.0, 2.0, 1.3, False, 0.05, -1.9411, 0.6526),
    (31313, (15, 15), 0.0, 2.0, 1.3, False, 0.05, 2.0, 0.4895),
    (50953, (15, 15), 0.0, 2.0, 3.0, True, 0.05, -2.0, 0.4719),
    (79735, (15, 15), 0.0, 2.0, 1.3, False, 0.05, 1.6720, 1.9187),
    (84965, (15, 15), 0.0, 2.0, 3.0, True, 0.05, -1.3544, 1.9257),
]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("case", HARD, ids=lambda case: str(case[0]))
def test_no_minimum_is_overlooked(core: Callable[..., adjust.Fit], case: Any) -> None:
    """Of two minima a fraction of a pixel apart, at a bound of the scale or of the shift, the lower one is found."""
    seed, shape, inner, max_shift, max_scale, fit_bg, signal, dx, dy = case
    image, template, err = field(seed, shape, signal)
    fit = core(image, template, err, None, inner, max_shift, max_scale, fit_bg, False, np.empty(shape))
    chi2 = objective(image, template, err, inner, max_scale, fit_bg, fit)
    assert fit.chi2 == pytest.approx(chi2((fit.dx, fit.dy)), rel=1e-9)
    assert fit.chi2 <= chi2((dx, dy)) * (1 + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize(
    ("seed", "how", "lower"),
    [
        (39, (7.0, 2.0, 1.3, True), (-2.0, 0.0390)),
        (288, (5.0, 3.0, 1.1, False), (-2.9433, -2.9798)),
        (638, (7.0, 2.0, 1.3, True), (1.7580, -0.8060)),
        (686, (5.0, 3.0, 1.1, False), (-3.0, 0.0513)),
    ],
)
def test_of_a_hundred_minima_the_lowest_is_found(
    core: Callable[..., adjust.Fit],
    seed: int,
    how: tuple[float, float, float, bool],
    lower: tuple[float, float],
) -> None:
    """Of the hundred minima of a bright trail with hot pixels the lowest is found."""
    planes = trail(seed)
    inner, _, max_scale, fit_bg = how
    fit = core(*planes, None, *how, False, np.empty((16, 17)))
    chi2 = objective(*planes, inner, max_scale, fit_bg, fit)
    assert fit.chi2 == pytest.approx(chi2((fit.dx, fit.dy)), rel=1e-9)
    assert fit.chi2 <= chi2(lower) * (1 + 1e-6)


def test_newtons_step_along_a_bound() -> None:
    """Where chi2 falls beyond a bound, the step is Newton's along the bound, whatever the curvature across it."""
    here = Minimum(2.0, 0.3, 1.0, 1.0, False, (-1.0, 0.4), (-3.0, 0.5, 2.0), 1.0, (0.0, 0.0))
    assert newton_step(here, 2.0) == pytest.approx((0.0, -0.2, True))
    assert newton_step(here._replace(u=-2.0, gradient=(1.0, 0.4)), 2.0) == pytest.approx((0.0, -0.2, True))


VALLEYS = {
    "stripes": lambda x, y: 200 * np.exp(-((x - 20.6) ** 2) / 8),
    "diagonal": lambda x, y: 200 * np.exp(-((x + y - 40.6) ** 2) / 8),
    "period of a pixel": lambda x, y: 50 * np.cos(2 * np.pi * x / 1.0001),
    "checkers": lambda x, y: 50 * np.cos(np.pi * x) * np.cos(np.pi * y),
    "ramp": lambda x, y: x + y,
}


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("name", VALLEYS)
def test_a_valley_has_an_end(core: Callable[..., adjust.Fit], name: str, noise: float) -> None:
    """Where chi2 hardly depends on the shift along a line, or is the same at many shifts, the search ends, and low."""
    y, x = np.mgrid[:41, :41].astype(float)
    image = VALLEYS[name](x, y) + 100 + noise * np.random.default_rng(1).normal(size=x.shape)
    template, err = VALLEYS[name](x, y) + 80, np.full(x.shape, 5.0)
    fit = core(image, template, err, None, 0.0, 2.0, 1.1, False, False, np.empty(x.shape))
    chi2 = objective(image, template, err, 0.0, 1.1, False, fit)
    sample = min(chi2((dx, dy)) for dx in np.linspace(-2, 2, 9) for dy in np.linspace(-2, 2, 9))
    assert fit.chi2 == pytest.approx(chi2((fit.dx, fit.dy)), rel=1e-9, abs=1e-9)
    assert fit.chi2 <= sample * (1 + 1e-6) + 1e-9


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("excess", [5e-16, 1e-9, 1e-4])
def test_a_bound_that_cuts_a_sliver_of_a_cell(core: Callable[..., adjust.Fit], excess: float) -> None:
    """A bound just above whole pixels gives what the whole pixels give, at the bound and within."""
    for seed in range(8):
        planes = field(seed, (17, 16))
        for bound in (0.0, 1.0, 2.0):
            want, fit = (
                core(*planes, None, 0.0, max_shift, 1.1, False, False, np.empty((17, 16)))
                for max_shift in (bound, bound + excess)
            )
            assert fit.at_bound == want.at_bound or not bound
            np.testing.assert_allclose(fit[5:10], want[5:10], rtol=30 * excess + 1e-9, atol=2 * excess + 1e-9)
            if bound:
                np.testing.assert_allclose(fit[10:], want[10:], rtol=30 * excess + 1e-3)


@pytest.mark.parametrize("core", CORES)
def test_pixels_of_the_box(core: Callable[..., adjust.Fit]) -> None:
    """The box holds the pixels with |x - nx/2 + 0.5| <= inner/2, for odd and even sizes and widths."""
    for shape in ((20, 21), (21, 20), (7, 30)):
        planes = field(3, shape)
        for inner in (4.0, 5.0, 6.5, 19.0, 20.0, 21.0, 100.0):
            within = [np.abs(np.arange(n) - n / 2 + 0.5) <= inner / 2 for n in shape]
            fit = core(*planes, None, inner, 1.0, 1.1, False, False, np.empty(shape))
            assert fit.npix == within[0].sum() * within[1].sum()


@pytest.mark.parametrize("core", CORES)
def test_background_is_two_and_a_half_medians_less_one_and_a_half_means(core: Callable[..., adjust.Fit]) -> None:
    """Of even and odd numbers of values, with many equal ones, sorted, and with outliers."""
    rng = np.random.default_rng(4)
    for shape in ((21, 21), (20, 21), (5, 5), (63, 63)):
        image, template, err = field(4, shape)
        for values in (
            image,
            np.round(image / 20),
            np.sort(image.ravel()).reshape(shape),
            np.where(rng.random(shape) < 0.5, 0.0, 1.0),
            np.where(np.arange(image.size).reshape(shape) % 7 == 0, 1e30, image),
            np.full(shape, 3.0),
        ):
            fit = core(values, template, err, None, 0.0, 1.0, 1.1, False, False, np.empty(shape))
            assert fit.bg == pytest.approx(2.5 * np.median(values) - 1.5 * values.mean(), rel=1e-12)
            assert fit.tbg == pytest.approx(2.5 * np.median(template) - 1.5 * template.mean(), rel=1e-12)


@pytest.mark.slow
def test_numpy_core_runs_where_c_is_missing() -> None:
    """Without the compiled module the package imports, says so, and fits."""
    code = (
        "import sys; sys.modules['stampworker.cutouts._adjust'] = None\n"
        "import numpy as np; from stampworker.cutouts import adjust_cutout; from stampworker.cutouts import adjust\n"
        "a = np.random.default_rng(1).normal(0, 1, (15, 15)) + 9 * np.eye(15)\n"
        "c = dict(image=a, convolved=a, err=a * 0 + 1, meta={})\n"
        "assert adjust_cutout(c) and adjust.CORE == 'numpy' and c['meta']['adjust_chi2'] < 1e-9, c\n"
        "try: adjust.fit_compiled()\n"
        "except ImportError as exc: assert 'not compiled' in str(exc)\n"
        "else: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)


DRIVER = """
import importlib.util, sys
import numpy as np

spec = importlib.util.spec_from_file_location("_adjust", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
rng = np.random.default_rng(5)
for n in range(400):
    shape = tuple(rng.integers(1, 40, 2))
    planes = [rng.normal(20, 5, shape).astype(rng.choice(["f4", "f8"])) for _ in range(3)]
    for plane in planes:
        share = rng.choice([0, 0.05, 1], p=[0.5, 0.45, 0.05])
        plane[rng.random(shape) < share] = rng.choice([np.nan, np.inf, 0, 1e30, -4])
    if n % 7 == 0:
        planes[1][:] = planes[1][0]
    mask = None if n % 3 else (rng.random(shape) < 0.1).astype("u1")
    inner, max_shift = float(rng.choice([0, 1, 7, 12.5, 99])), float(rng.choice([0, 0.3, 1, 2, 3.5, 5]))
    max_shift = 16.0 if n % 100 == 1 else max_shift
    for width in (2, 0):
        adjusted = np.empty(shape, rng.choice(["f4", "f8"]))
        module.fit(*planes, mask, inner, max_shift, 1.1, n % 2, n % 5 == 0, adjusted, width)
"""


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_c_core_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    """Random shapes, values and settings read and write nothing out of bounds, and do nothing undefined."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build the sanitized core with")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        pytest.skip(f"no {header.name} to build the sanitized core with")
    library = tmp_path / "_adjust.so"
    flags = [
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=all",
        "-DONE_CLONE",
    ]
    flags += ["-ffp-contract=off", "-Wno-psabi", "-DPy_LIMITED_API=0x030B0000", f"-I{header.parent}"]
    build = subprocess.run(
        [compiler, *flags, *map(str, SOURCES), "-o", str(library), "-lm"], capture_output=True, text=True, check=False
    )
    if build.returncode and "asan" in build.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert not build.returncode, build.stderr
    runtime = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(library)],
        env={
            "LD_PRELOAD": ":".join(runtime),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter keeps what it has at exit
            "PYTHONMALLOC": "malloc",
            "OPENBLAS_NUM_THREADS": "1",
            "PYTHONPATH": ":".join(path for path in sys.path if path),
        },
        capture_output=True,
        text=True,
        timeout=170,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
