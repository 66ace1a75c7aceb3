"""What several tests share: data, processes and clusters that they make."""

from collections.abc import Callable
from pathlib import Path

Write = Callable[..., Path]
"""The fixture ``write``: writes an image HDU with further cards and returns the file's path."""
