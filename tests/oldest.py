"""Print pip's constraints to the oldest versions that pyproject.toml allows: ``oldest.py [EXTRA]…``."""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path


def oldest(*extras: str) -> Iterator[str]:
    """Yield ``name==version`` for each dependency that has a lower bound, those of the extras included."""
    with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    for requirement in sum((project["optional-dependencies"][extra] for extra in extras), project["dependencies"]):
        if bound := re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement):
            yield f"{bound[1]}=={bound[2]}"


if __name__ == "__main__":
    print(*sorted(set(oldest(*sys.argv[1:]))), sep="\n")
