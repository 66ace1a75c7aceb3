"""The promised quality of the verdicts, on a night of 2 200 candidates with known truth."""

from __future__ import annotations

import pytest
from study import study


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_night_is_judged_as_promised(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The fit recovers shifts to 0.05 px; dipoles and scale errors are called artefacts, transients are not."""
    table, found = study(tmp_path_factory.mktemp("study") / "night", candidates=2200, seed=1)
    counts = {(row["class"], row["snr"]): (int(row["artefact"]), int(row["number"])) for row in table}

    def share(kind: str, *bins: str) -> float:
        called, number = (sum(values) for values in zip(*(counts[kind, b] for b in bins), strict=True))
        assert number >= 50
        return called / number

    bright = ("5 to 10", "10 to 20", "20 and more")
    assert found["shift"] < 0.05
    assert abs(found["dx_bias"]) < 0.01
    assert abs(found["dy_bias"]) < 0.01
    assert found["scale"] < 0.01
    assert share("transient-sky", *bright) <= 0.01
    assert share("transient-galaxy", "5 to 10") <= 0.125
    assert share("transient-galaxy", "20 and more") <= 0.01
    for kind in ("dipole", "scale-error"):
        assert share(kind, "10 to 20", "20 and more") >= 0.95
