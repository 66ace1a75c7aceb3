"""What deploy/ ships fits the program."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stampworker import config

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return found


def settings_of(service: dict[str, Any]) -> config.Settings:
    return config.load(environ=service["environment"])


def test_compose_settings_are_known_and_agree(services: dict[str, Any]) -> None:
    """Every setting in the compose file exists, and source and workers use one broker and one input topic."""
    found = [settings_of(services[name]) for name in ("publish", "worker-0", "worker-1")]
    assert {settings.kafka["bootstrap.servers"] for settings in found} == {"kafka:9092"}
    assert {settings.worker.input_topic for settings in found} == {("alerts",)}
    assert {settings.frames.frame_roots for settings in found} == {("/data/night",)}


def test_compose_topics_are_made_before_they_are_used(services: dict[str, Any]) -> None:
    """The topics that the workers name are those that the service ``topics`` makes."""
    worker = settings_of(services["worker-0"]).worker
    made = services["topics"]["command"][0].partition("for topic in ")[2].partition(";")[0].split()
    assert set(made) == {*worker.input_topic, worker.packet_topic, worker.reject_topic, worker.retry_topic}


def test_compose_workers_have_slots_of_their_own(services: dict[str, Any]) -> None:
    """Two workers of one group never share a transactional id."""
    ids = [settings_of(services[name]).worker.transactional_id() for name in services if name.startswith("worker-")]
    assert sorted(ids) == ["stampworker-0", "stampworker-1"]


def test_compose_waits_longer_than_a_worker_may_take_to_stop(services: dict[str, Any]) -> None:
    """Docker kills a stopping worker only after the deadline for its last batch."""
    for name in ("worker-0", "worker-1"):
        grace = float(services[name]["stop_grace_period"].removesuffix("s"))
        assert grace > settings_of(services[name]).worker.deadline_s


def apt_get(folder: Path, message: str, failures: int) -> subprocess.CompletedProcess[str]:
    """Run ``apt_get.sh`` with an apt-get that fails a few times with a message, and counts its calls in a file."""
    program = folder / "apt-get"
    calls = folder / "calls"
    program.write_text(
        f"#!/bin/sh\necho $* >>{calls}\n[ $(wc -l <{calls}) -gt {failures} ] || {{ echo '{message}'; exit 100; }}\n"
    )
    program.chmod(0o755)
    environ = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
    return subprocess.run([DEPLOY / "apt_get.sh", "update"], env=environ, capture_output=True, text=True, timeout=30)


@pytest.mark.slow
def test_another_apt_is_waited_for(tmp_path: Path) -> None:
    """Where another process has a lock, apt-get is tried again until the lock is free; one line says so."""
    done = apt_get(tmp_path, "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 1 (apt)", failures=2)
    assert done.returncode == 0
    assert (tmp_path / "calls").read_text() == "update\n" * 3
    assert done.stderr == "stampworker: another apt is at work; waiting for it to end\n"


def test_other_failures_of_apt_are_not_waited_for(tmp_path: Path) -> None:
    """Any other failure ends the script at once, with what apt-get printed."""
    done = apt_get(tmp_path, "E: Unable to locate package", failures=9)
    assert done.returncode == 1
    assert (tmp_path / "calls").read_text() == "update\n"
    assert done.stderr == "E: Unable to locate package\n"
