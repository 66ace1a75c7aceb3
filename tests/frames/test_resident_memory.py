"""Memory over many frame sets."""

from pathlib import Path

import pytest
from helpers import resident


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "rice", "gz"])
def test_memory_does_not_grow(tmp_path: Path, form: str) -> None:
    """From the second frame set to the twentieth, the memory of a process grows by less than 10 %."""
    held = resident.measure(tmp_path, form, side=1024)
    assert len(held) == 20
    assert max(held) <= 1.1 * held[1], [round(size / 1e6, 1) for size in held]
