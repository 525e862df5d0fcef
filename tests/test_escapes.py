"""Deeds that a sandbox must prevent. They are in `deeds`; each is first shown to succeed outside."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiosd.sandbox.box import LEVELS
from tests.conftest import System
from tests.deeds.accepted import ACCEPTED, WITH_HOSTS, WITH_NETWORK
from tests.deeds.stage import RUN, Stage

#: Counted although it fails in the run outside, where it finds no aiosd; a person may do it.
ALWAYS = {"door_as_person"}
FEWEST = 90  # least number of deeds that must succeed outside


@pytest.fixture
def stage(aiosd: System, tmp_path: Path) -> Iterator[Stage]:
    supervisor = next(entry["ospid"] for entry in aiosd.ps() if entry["name"] == "supervisor")
    with Stage(tmp_path, aiosd.home / "data", supervisor) as stage:
        yield stage


def inside(system: System, stage: Stage, *options: str) -> dict[str, str]:
    """Run the deeds in an agent; returns the outcome of each."""
    with stage.for_inside() as inherited:
        done = system.run(
            "aios-run", *options, "--processes", "5000", "--read", stage.path.parent, RUN, stage.path,
            cwd=stage.folder, check=True, pass_fds=[inherited], timeout=100,
        )  # fmt: skip
    found = json.loads(done.stdout)
    return Stage.survivor(found, Path(found.pop("workspace")))


def test_all_deeds_are_prevented_but_those_that_are_accepted(aiosd: System, stage: Stage) -> None:
    """In each level that this machine offers, without a network, with one, and with single hosts."""
    offered = aiosd.status()["sandbox"]
    levels = LEVELS[1 : LEVELS.index(offered["possible"]) + 1]
    if not levels:
        pytest.skip(offered["why_no_more"])
    possible = {name for name, outcome in stage.outside().items() if outcome == "done"} | ALWAYS
    assert len(possible) >= FEWEST
    for level in levels:
        accepted = set(ACCEPTED[level])
        found = inside(aiosd, stage, "--sandbox", level, "--net", "none")
        assert {name for name in possible if found[name] == "done"} <= accepted, level
        assert found["call_of_32_bits"] == "killed by SIGSYS"
        with_network = inside(aiosd, stage, "--sandbox", level, "--net", "all")
        assert {name for name in possible if with_network[name] == "done"} <= accepted | set(WITH_NETWORK), level
        assert with_network["tcp_local"] == "done"
        if level == "cage":
            with_hosts = inside(aiosd, stage, "--sandbox", level, "--net", "example.org")
            assert {name for name in possible if with_hosts[name] == "done"} <= accepted | set(WITH_HOSTS)
            assert with_hosts["tcp_local"] != "done"
