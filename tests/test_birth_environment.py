"""The environment that a new agent gets, as bytes (`birth/agent.py`)."""

import os

from hypothesis import given
from hypothesis import strategies as st

from aiosd.birth.agent import environment_of
from aiosd.ipc.letter import Letter
from libaios import wire

VALUES = st.binary(max_size=6).filter(lambda value: b"\0" not in value)
NAMES = VALUES.filter(lambda name: name and b"=" not in name and not name.startswith(b"AIOS_"))


@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_each_variable_arrives_with_its_bytes(wanted: dict[bytes, bytes]) -> None:
    sent = {wire.os_text(os.fsdecode(name)): wire.os_text(os.fsdecode(value)) for name, value in wanted.items()}
    found, _ = environment_of(Letter("file", "x.py", [], sent, "/"), 1, "/home", 8, 9)
    assert {name: value for name, value in found.items() if not name.startswith(b"AIOS_")} == wanted
    assert found[b"AIOS_HOME"] == b"/home"
