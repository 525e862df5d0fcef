"""Errors name arguments as in the caller's function."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from aiosd.kernel.explain import explain
from libaios import wire


@pytest.mark.parametrize(
    ("sys", "args", "said"),
    [
        (wire.Sys.KILL, ["x"], "pid: expected `int`, got `str`"),
        (wire.Sys.KILL, [1, 99], "signal: expected `int` <= 64"),
        (wire.Sys.GENERATE, [None, "x", None, [None, 0.8, 1.5]], "top_p: expected `float` <= 1.0"),
        (wire.Sys.GENERATE, [None, "x", None, [None, 0.8, 1, 0, 0, 1, 0, False, [""]]], "stop[0]: it is empty"),
        (wire.Sys.GENERATE, [None, [1, -1]], "prompt"),
        (wire.Sys.SPAWN, ["file", "x", [1]], "args[0]: expected `str`, got `int`"),
        (wire.Sys.SPAWN, ["none", "x"], "kind: expected `str` matching"),
        (wire.Sys.SPAWN, ["file", "x", [], {}, "/", "two words"], "name: no blanks"),
        (wire.Sys.SPAWN, ["file", "x", [], {}, "/", "x" * 65], "name: at most 64 characters are allowed"),
        (wire.Sys.SPAWN, [], "expected `array` of at least length"),
        (wire.Sys.KILL, {"pid": 1}, "expected `array`"),
    ],
)
def test_names_the_argument(sys: wire.Sys, args: Any, said: str) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        wire.decode_args[sys](msgspec.msgpack.encode(args))
    assert said.lower() in explain(caught.value, wire.TABLE[sys].args).lower()
