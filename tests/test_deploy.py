"""What deploy/ ships fits the program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from stampworker import config

DEPLOY = Path(__file__).parents[1] / "deploy"


@pytest.fixture
def services() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


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
