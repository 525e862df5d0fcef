"""Kinds of budgets: read from flags and files, described in words, translated to limits of Linux."""

from __future__ import annotations

import resource
from collections.abc import Callable

import pytest

from aiosd.budgets import limits
from aiosd.config import Settings
from aiosd.errors import UsageError
from libaios.wire import Limits
from tests.test_cli_aiosd import load

__all__ = ["load"]  # a fixture

Load = Callable[..., Settings]


def test_each_kind_has_a_field_of_its_own() -> None:
    fields = {kind.field for kind in limits.KINDS} | {"soft"}
    assert fields == set(Limits.__struct_fields__)


@pytest.mark.parametrize(
    ("name", "given", "amount"),
    [
        ("tokens", "10k", 10_000),
        ("tokens", 7, 7),
        ("time", "1h30m", 5400.0),
        ("time", "2.5", 2.5),
        ("cpu", 3, 3.0),
        ("memory", "512M", 512 << 20),
        ("context", 4096, 4096),
        ("tool_calls", "0", 0),
        ("children", 0, 0),
        ("processes", "64", 64),
        ("disk", "1G", 1 << 30),
    ],
)
def test_valid_budgets(name: str, given: object, amount: float) -> None:
    assert limits.READERS[name](given) == amount


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("tokens", -1, "out of range"),
        ("tokens", True, "no whole number"),
        ("tokens", "many", "whole number"),
        ("time", "soon", "no length of time"),
        ("time", float("nan"), "no length of time"),
        ("cpu", -1, "no length of time"),
        ("memory", 0, "no size"),
        ("context", 0, "out of range"),
        ("processes", 0, "out of range"),
        ("soft_limit", 101, "out of range"),
    ],
)
def test_invalid_budgets(name: str, given: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        limits.READERS[name](given)


def test_the_smaller_amount_of_each_kind() -> None:
    both = limits.least(Limits(tokens=10, time_s=5, soft=50), Limits(tokens=20, memory_bytes=7, soft=80))
    assert both == Limits(tokens=10, time_s=5, memory_bytes=7, soft=50)
    assert limits.least(Limits(), Limits()) == Limits()


def test_sentences_name_kind_amount_and_group() -> None:
    assert limits.sentence(Limits(tool_calls=3), "tool_calls", "web") == "tool call budget of 3 used up by group web"
    assert limits.sentence(Limits(disk_bytes=10 << 20), "disk") == "disk budget of 10.0M exceeded"
    assert limits.sentence(Limits(tokens=3), "time") == ""


def test_linux_gets_the_least_of_all_shared_budgets() -> None:
    shared = [Limits(memory_bytes=1 << 30, cpu_s=10), Limits(memory_bytes=1 << 20, disk_bytes=5000, cpu_s=2.5)]
    assert dict(limits.bounds(shared)) == {
        resource.RLIMIT_DATA: (2 << 20) + limits.DATA_BYTES,
        resource.RLIMIT_FSIZE: 5000,
        resource.RLIMIT_CPU: 4,
    }
    assert limits.bounds([Limits(tokens=5)]) == []


# ── aiosd.toml ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_group_has_budgets_of_its_own_and_for_each_agent(load: Load) -> None:
    toml = "soft_limit = 90\n[[group]]\nname = 'web'\ntokens = '1M'\ncpu = 60\neach = { time = '10m', memory = '1G' }\n"
    settings = load(toml)
    assert settings.soft_limit == 90
    assert settings.budgets["web"].all == Limits(tokens=1_000_000, cpu_s=60)
    assert settings.budgets["web"].each == Limits(time_s=600, memory_bytes=1 << 30)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[[group]]\nname = 'web'\ntoken = 5\n", "line 3: unknown key 'token' (did you mean 'tokens'?)"),
        ("[[group]]\nname = 'web'\ntokens = -5\n", "line 3: tokens: -5 is out of range"),
        ("[[group]]\nname = 'web'\neach = { toke = 5 }\n", "line 3: each: unknown key 'toke'"),
        ("[[group]]\nname = 'web'\neach = { time = 'soon' }\n", "line 3: each: time: 'soon' is no length of time"),
        ("[[agent]]\nfile = 'a.py'\ndisk = 0\n", "line 3: disk: '0' is no size"),
        ("soft_limit = 200\n", "line 1: soft_limit: 200 is out of range"),
    ],
)
def test_wrong_budgets_are_named_with_their_line(load: Load, toml: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(toml)
    assert words in str(caught.value)
