"""A worker as users run it: a process of its own, with its settings in the environment and its log in a file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType


class WorkerProcess:
    """A running ``python -m stampworker run``; a context manager that kills what still runs.

    Parameters
    ----------
    log : Path
        File for its standard output and error.
    settings : mapping
        ``section.key`` → value, handed over as ``STAMPWORKER_SECTION_KEY``; ``kafka.…`` too.
    args : str
        Further arguments of ``run``.
    """

    def __init__(self, log: Path, settings: Mapping[str, object], *args: str, command: str = "run") -> None:
        self.log_file = log
        with log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "stampworker", command, *args],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(settings),
            )

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.kill()
        # pytest shows what a failed test has printed.
        print(f"--- worker {self.process.pid}, exit {self.process.returncode}\n{self.log}")

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    @property
    def log(self) -> str:
        """What it has written until now."""
        return self.log_file.read_text(errors="replace")

    def wait_for(self, text: str, timeout: float = 30) -> None:
        """Wait until its log has this text."""
        deadline = time.monotonic() + timeout
        while text not in self.log:
            assert self.process.poll() is None, (
                f"exit {self.process.returncode} without {text!r} in the log:\n{self.log}"
            )
            assert time.monotonic() < deadline, f"no {text!r} in the log after {timeout} s:\n{self.log}"
            time.sleep(0.02)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def terminate(self) -> None:
        """Ask it to end (SIGTERM)."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it as kill -9 does, where it still runs."""
        self.process.kill()
        self.process.wait()

    def wait(self, timeout: float = 60) -> int:
        """Wait until it ends, and return its exit code; the failure to end in time shows its log."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {timeout} s:\n{self.log}") from None


def environment(settings: Mapping[str, object]) -> dict[str, str]:
    """Return this environment without the settings that stand in it, and with these."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("STAMPWORKER_")}
    given = {f"STAMPWORKER_{name.upper().replace('.', '_')}": str(value) for name, value in settings.items()}
    # As in the image: parallel workers, not parallel linear algebra.
    return kept | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | given
