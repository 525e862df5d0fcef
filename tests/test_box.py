"""Which agent gets which sandbox; the seccomp program, run here as Linux runs it; the tables of aiosd.toml."""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import struct
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiosd.kernel.sandboxes import Sandboxes
from aiosd.sandbox import box, boxgroups, cage, filter, landlock, places, plan, probe
from aiosd.sandbox.box import Box, SandboxSettings
from aiosd.sandbox.confine import load
from aiosd.sandbox.places import Machine
from aiosd.sandbox.probe import Offer
from libaios import sandbox, wire

PARENT = Box("flat", "none", "/w/mine", ["/r"], ["/rw"])

# ── boxes ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_options_a_box_follows_the_rules() -> None:
    rules = SandboxSettings("flat", "none", read=("/data",), write=("/out",))
    assert box.of_person(wire.Sandbox(own=["/app"]), rules, "/w") == Box(
        "flat", "none", "/w", ["/data", "/app"], ["/out"]
    )
    wish = wire.Sandbox(net="all", read=["/more"])
    assert box.of_person(wish, rules, "/w") == Box("flat", "all", "/w", ["/data", "/more"], ["/out"])
    assert box.of_person(wire.Sandbox(level="none"), rules, "/w") is None


def test_grants_without_a_sandbox_are_a_mistake() -> None:
    for wish in (wire.Sandbox(read=["/x"]), wire.Sandbox(write=["/x"]), wire.Sandbox(net="none")):
        with pytest.raises(OSError, match="need a sandbox"):
            box.of_person(wish, SandboxSettings(), "/w")


def test_a_child_has_its_parents_box() -> None:
    assert box.of_child(wire.Sandbox(own=["/elsewhere"]), PARENT) == PARENT
    assert box.of_child(wire.Sandbox(level="flat", net="none", read=["/r/a"], write=["/w/mine/x"]), PARENT) == PARENT
    open_ = Box("flat", "all", "/w/mine")
    assert box.of_child(wire.Sandbox(net="none"), open_) == Box("flat", "none", "/w/mine")


@pytest.mark.parametrize(
    "wish",
    [
        wire.Sandbox(level="none"),
        wire.Sandbox(net="all"),
        wire.Sandbox(read=["/"]),
        wire.Sandbox(read=["/rx"]),
        wire.Sandbox(write=["/r"]),
        wire.Sandbox(write=["/w"]),
    ],
)
def test_a_child_has_no_more_than_its_parent(wish: wire.Sandbox) -> None:
    with pytest.raises(PermissionError):
        box.of_child(wish, PARENT)


def sandboxes(tmp_path: Path) -> Sandboxes:
    return Sandboxes(SandboxSettings("flat"), {}, Offer("flat"), str(tmp_path / "home/data/workspaces"))


@pytest.mark.parametrize("path", ["home/data", "home/data/store", "home", "."])
@pytest.mark.parametrize("kind", ["read", "write"])
def test_the_data_of_aiosd_cannot_be_granted(path: str, kind: str, tmp_path: Path) -> None:
    """There are the approvals, the audit, and other agents' files."""
    wish = wire.Sandbox(**{kind: [os.path.normpath(tmp_path / path)]})
    with pytest.raises(OSError, match="aiosd's own data is there"):
        sandboxes(tmp_path).decide(wire.Spawn("file", "a.py", sandbox=wish), None)
    wish = wire.Sandbox(**{kind: [str(tmp_path / "home/data/workspaces/x"), str(tmp_path / "home/database")]})
    assert sandboxes(tmp_path).decide(wire.Spawn("file", "a.py", sandbox=wish), None) is not None


def test_a_script_beside_the_data_of_aiosd_may_read_only_itself(tmp_path: Path) -> None:
    script = str(tmp_path / "a.py")
    wish = wire.Sandbox(own=[str(tmp_path)], program=script)
    found = sandboxes(tmp_path).decide(wire.Spawn("file", script, sandbox=wish), None)
    assert found is not None
    assert found.read == [script]


@pytest.mark.parametrize("path", ["x", "../x", "/a/../b", "/a/", "/a//b", "//a", "", "\0", "\0/\xff/.."])
def test_only_plain_absolute_paths_are_granted(path: str) -> None:
    for wish in (wire.Sandbox(read=[path]), wire.Sandbox(write=[path]), wire.Sandbox(own=[path])):
        with pytest.raises(OSError, match="no plain absolute path") as caught:
            box.check(wish)
        assert caught.value.errno == errno.EINVAL


def test_names_that_are_no_utf8_are_granted() -> None:
    box.check(wire.Sandbox(read=[wire.os_text(b"/a/\xff")]))


def test_of_the_environment_only_what_is_listed() -> None:
    env = {"PATH": "/bin", "LC_ALL": "C", "API_KEY": "x", "OPENAI_KEY": "y", "PYTHONPATH": "/p"}
    assert set(box.environment(env, [])) == {"PATH", "LC_ALL", "PYTHONPATH"}
    assert set(box.environment(env, ["OPENAI_*"])) == {"PATH", "LC_ALL", "PYTHONPATH", "OPENAI_KEY"}
    proxies = {"HTTPS_PROXY": "http://proxy:3128", "http_proxy": "http://me:secret@proxy:3128", "no_proxy": "localhost"}
    assert set(box.environment(proxies, [])) == {"HTTPS_PROXY", "no_proxy"}


@given(
    st.lists(st.text("AZ*?[]!-\n_", max_size=5), max_size=3),
    st.dictionaries(st.text("ABPATHLC_Zz\n", max_size=6), st.just("x")),
)
def test_a_variable_passes_as_one_pattern_after_the_other_would_let_it(allowed: list[str], env: dict[str, str]) -> None:
    passing = {name for name in env if any(fnmatchcase(name, one) for one in (*box.VARIABLES, *allowed))}
    assert set(box.environment(env, allowed)) == passing


def test_the_patterns_are_not_tried_one_by_one_for_every_variable() -> None:
    env = {f"VARIABLE_{number}": "" for number in range(100)}
    box.environment(env, ["OTHER_*"])
    with counted_calls() as calls:
        box.environment(env, ["OTHER_*"])
    assert len(calls) < 5 * len(env)


@contextlib.contextmanager
def counted_calls() -> Iterator[list[str]]:
    """Count all calls of functions in this block, also of those in C."""
    calls: list[str] = []
    sys.setprofile(lambda frame, event, arg: calls.append(event) if event.endswith("call") else None)
    try:
        yield calls
    finally:
        sys.setprofile(None)


PROGRAMS = st.binary(min_size=1, max_size=40).map(lambda path: wire.os_text(os.fsdecode(path)))  # as they are sent


@given(PROGRAMS, PROGRAMS)
def test_a_workspace_lies_below_its_folder_whatever_the_program_is_called(program: str, other: str) -> None:
    one = box.workspace("/w", "g", program, "")
    assert os.path.dirname(os.path.dirname(os.path.normpath(one))) == "/w/g"
    assert program == other or box.workspace("/w", "g", other, "") != one
    assert box.workspace("/w", "g", program, "x") != one


# ── what a person's program may read without a grant ──────────────────────────────────────────────────────


def test_a_script_may_read_its_folder_and_at_home_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "project").mkdir(parents=True)
    (home / "project" / "a.py").touch()
    (home / "b.py").touch()
    (tmp_path / "link.py").symlink_to(home / "project" / "a.py")
    monkeypatch.setenv("HOME", str(home))
    wish = sandbox.wish("file", "a.py", str(home / "project"), {})
    assert (wish.own, wish.alone) == ([str(home / "project")], False)
    assert wish.program == str(home / "project" / "a.py")
    for cwd, target in ((home, "b.py"), (home / "project", "../b.py")):
        wish = sandbox.wish("file", target, str(cwd), {})
        assert (wish.own, wish.alone) == ([str(home / "b.py")], True)
    wish = sandbox.wish("file", "link.py", str(tmp_path), {})
    assert wish.own == [str(home / "project")], "the folder of the link is above the home"
    assert sandbox.wish("module", "m", str(home), {}).own == []
    assert sandbox.wish("module", "m", str(home / "project"), {}).own == [str(home / "project")]
    assert sandbox.wish("file", "-", str(home), {}).own == []
    assert sandbox.wish("file", "a.py", str(home / "project"), {"PYTHONPATH": str(tmp_path)}).own == [
        str(home / "project")
    ]
    assert sandbox.wish("exec", "sh", "/", {"PATH": "/bin"}).program == os.path.realpath("/bin/sh")


def test_a_program_may_read_the_folder_that_it_starts_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    project = tmp_path / "home" / "project"
    project.mkdir(parents=True)
    assert sandbox.wish("exec", "/bin/sh", str(project), {}).own[-1] == str(project)
    for broad in (tmp_path, tmp_path / "home"):
        assert str(broad) not in sandbox.wish("exec", "/bin/sh", str(broad), {}).own


def test_a_script_of_an_interpreter_counts_as_the_program_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    (home / "project").mkdir(parents=True)
    for script in (home / "project" / "a.py", home / "b.py"):
        script.touch()
    (home / "python3").touch(0o755)
    monkeypatch.setenv("HOME", str(home))

    def own(*args: str, program: str = str(home / "python3"), cwd: Path = home) -> set[str]:
        found = sandbox.wish("exec", program, str(cwd), {}, args=args).own
        return {os.path.relpath(path, home) for path in found if path.startswith(str(home))} - {"python3"}

    script = sandbox.wish("exec", str(home / "python3"), str(home), {}, args=["-u", "project/a.py"]).script
    assert script == str(home / "project" / "a.py"), "and has a workspace of its own"
    assert own("-u", "project/a.py") == own("../home/project/a.py") == {"project"}
    assert own("b.py", "project/a.py") == {"b.py"}, "at home alone; other arguments grant nothing"
    assert own("-c", "b.py") == own("-m", "b.py") == own("-", "b.py") == own("print", "b.py") == set()
    assert own("b.py", program="/bin/cat") == set(), "what it reads is granted by --read"
    for program in (home / ".pyenv" / "shims" / "python3", home / ".nvm" / "v24" / "bin" / "node"):
        program.parent.mkdir(parents=True)
        program.touch(0o755)
    (home / ".nvm" / "v24" / "lib" / "node_modules").mkdir(parents=True)
    assert ".pyenv" in own(program=str(home / ".pyenv" / "shims" / "python3"), cwd=Path("/"))
    assert ".nvm/v24" in own(program=str(home / ".nvm" / "v24" / "bin" / "node"), cwd=Path("/"))
    monkeypatch.delenv("AIOS_HOME", raising=False)
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for shared in ("/tmp", "/", str(home), str(home / ".config" / "aios")):
        assert sandbox.is_broad(shared)
    assert not sandbox.is_broad(str(home / ".config" / "aios" / "agents"))


def test_a_child_is_confined_as_its_parent_but_one_of_a_program_from_outside_as_a_persons(tmp_path: Path) -> None:
    rooms = Sandboxes(SandboxSettings("cage"), {}, Offer("cage"), str(tmp_path / "workspaces"))
    spawn = wire.Spawn("exec", "/bin/true", env={"PATH": "/bin", "KEY": "k"}, sandbox=wire.Sandbox(own=["/own"]))
    mine = Box("cage", "all", "/w")

    def child(parent: Any) -> tuple[Box | None, bool]:
        found = rooms.decide(spawn, parent)
        return found, "KEY" in rooms.environment(spawn, parent, found)

    assert child(SimpleNamespace(box=mine, group="default", outside=False)) == (mine, True)
    assert child(SimpleNamespace(box=None, group="default", outside=False)) == (None, True)
    own, has_key = child(SimpleNamespace(box=mine, group="default", outside=True))
    assert own is not None
    assert (own.level, own.read, own.workspace != mine.workspace, has_key) == ("cage", ["/own"], True, False)


def test_packages_of_the_user_and_certificates_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sandbox.user_base({}) == ""
    packages = tmp_path / ".local" / "lib" / "python3.13" / "site-packages"
    packages.mkdir(parents=True)
    base = sandbox.user_base({})
    assert base == str(tmp_path / ".local")
    assert sandbox.wish("exec", "/bin/sh", "/", {"PYTHONUSERBASE": base}).own[-1] == str(packages)
    assert sandbox.user_base({"PYTHONUSERBASE": "/x"}) == ""
    (tmp_path / "ca.pem").touch()
    trusted = {"SSL_CERT_FILE": str(tmp_path / "ca.pem"), "PIP_CERT": str(tmp_path / "gone.pem")}
    assert sandbox.wish("file", "-", "/", trusted).own == [str(tmp_path / "ca.pem")]


def test_a_program_of_an_environment_of_python_may_read_all_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    base, venv = home / ".versions" / "3.13", home / "venv"
    for folder in (base / "bin", base / "lib" / "python3.13", venv / "bin", home / ".tool" / "bin", home / "bin"):
        folder.mkdir(parents=True)
    (base / "lib" / "python3.13" / "os.py").touch()
    (base / "bin" / "python3").touch(0o755)
    (venv / "bin" / "python").symlink_to(base / "bin" / "python3")
    (venv / "pyvenv.cfg").write_text(f"home = {base}/bin\nversion = 3.13\n")
    for program in (venv / "bin" / "tool", home / ".tool" / "bin" / "tool", home / "bin" / "tool"):
        program.touch(0o755)

    def own(program: Path) -> set[str]:
        return {path for path in sandbox.wish("exec", str(program), "/", {}).own if path.startswith(str(home))}

    both = {str(venv), str(base)}
    assert own(venv / "bin" / "python") >= both, "through the link"
    assert own(venv / "bin" / "tool") >= both, "its first line names the interpreter"
    assert own(base / "bin" / "python3") >= {str(base)}
    assert own(home / ".tool" / "bin" / "tool") == {str(home / ".tool" / "bin")}, "what lies beside may be secret"
    assert own(home / "bin" / "tool") == {str(home / "bin")}
    (home / "pyvenv.cfg").touch()
    assert str(home) not in own(home / "bin" / "tool"), "an environment is not a reason to grant all"


# ── the filter ────────────────────────────────────────────────────────────────────────────────────────────


def run(program: bytes, number: int, *args: int, arch: int = 0xC000003E) -> int:
    """Run the filter program as Linux's virtual machine does; returns its answer."""
    instructions = [struct.unpack("=HBBI", program[at : at + 8]) for at in range(0, len(program), 8)]
    words = [arg & (1 << 64) - 1 for arg in (*args, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("=iIQ6Q", number - (1 << 32) if number >= 1 << 31 else number, arch, 0, *words)
    value = at = 0
    while True:
        code, yes, no, operand = instructions[at]
        at += 1
        match code:
            case 0x20:
                (value,) = struct.unpack_from("=I", data, operand)
            case 0x54:
                value &= operand
            case 0x05:
                at += operand
            case 0x15:
                at += yes if value == operand else no
            case 0x25:
                at += yes if value > operand else no
            case 0x35:
                at += yes if value >= operand else no
            case 0x45:
                at += yes if value & operand else no
            case 0x06:
                return int(operand)
            case _:
                raise AssertionError(hex(code))


ALLOW, KILL, ASK = 0x7FFF0000, 0x80000000, 0x7FC00000
EPERM, ENOSYS, EAFNOSUPPORT = (0x50000 | number for number in (errno.EPERM, errno.ENOSYS, errno.EAFNOSUPPORT))


@given(st.integers(0, 480), st.lists(st.integers(0, (1 << 64) - 1), max_size=6), st.booleans(), st.booleans())
def test_the_search_leads_to_the_block_of_the_call(number: int, args: list[int], network: bool, doors: bool) -> None:
    load_number = (0x20, 0, 0, 0)
    block = [load_number, *filter.actions(network, doors).get(number, [filter._return(ALLOW)])]
    alone = b"".join(struct.pack("=HBBI", *one) for one in block)
    assert run(filter.program(network, doors), number, *args) == (run(alone, number, *args) if number < 470 else ENOSYS)


def test_the_program_is_short_because_linux_translates_it_for_every_agent() -> None:
    assert all(len(filter.program(network, True)) // 8 < 256 for network in (False, True))


def test_what_is_too_far_for_a_jump_is_reached_nevertheless() -> None:
    """With as many ranges as numbers, each with a block of its own."""
    actions = {number: [filter._return(0x50000 | number)] for number in range(470)}
    load_number = struct.pack("=HBBI", 0x20, 0, 0, 0)
    program = load_number + b"".join(struct.pack("=HBBI", *one) for one in filter._search(actions))
    assert all(run(program, number) == 0x50000 | number for number in range(470))


def test_every_call_gets_the_answer_of_the_table() -> None:
    for network in (False, True):
        program = filter.program(network, doors=True)
        looked_into = {56, 16, 41, 53, 302, 141, 251, 133, 259, *filter._SCHEDULING.values()}
        for number in set(range(480)) - looked_into:
            denied = EPERM if number in filter._DENIED.values() else ALLOW
            missing = number in filter._MISSING.values() or number > 469
            assert run(program, number) == (ENOSYS if missing else denied), number
        assert run(program, 0x40000000) == run(program, 0xFFFFFFFF) == ENOSYS
        assert run(program, 0, arch=0x40000003) == KILL


HIGH = 1 << 32  # in an int argument, Linux does not look at it


@pytest.mark.parametrize(
    ("number", "args", "offline", "online"),
    [
        (41, (1, 1, 0), ASK, ASK),
        (41, (1 | HIGH, 0x80801, 0), ASK, ASK),
        (41, (1, 2, 0), EAFNOSUPPORT, EAFNOSUPPORT),
        (41, (1, 5, 0), EAFNOSUPPORT, EAFNOSUPPORT),
        (41, (2, 1, 0), ASK, ALLOW),
        (41, (2 | HIGH, 1, 6), ASK, ALLOW),
        (41, (10, 2, 17), ASK, ALLOW),
        (41, (2, 1, 262), EAFNOSUPPORT, EAFNOSUPPORT),
        (41, (2, 3, 1), EAFNOSUPPORT, EAFNOSUPPORT),
        (41, (2, 2, 1), EAFNOSUPPORT, EAFNOSUPPORT),
        (41, (16, 3, 0), EAFNOSUPPORT, ALLOW),
        (41, (16, 3, 9), EAFNOSUPPORT, EAFNOSUPPORT),
        (41, (17, 3, 0), EAFNOSUPPORT, EAFNOSUPPORT),
        (53, (1, 1, 0), ALLOW, ALLOW),
        (53, (1, 0x80005, 0), ALLOW, ALLOW),
        (53, (1, 2, 0), EPERM, EPERM),
        (53, (2, 1, 0), EPERM, EPERM),
        (56, (0x01200011,), ALLOW, ALLOW),
        (56, (0x10000000,), EPERM, EPERM),
        (56, (0x00020000 | HIGH,), EPERM, EPERM),
        (16, (0, 0x5401), ALLOW, ALLOW),
        (16, (0, 0x5412), EPERM, EPERM),
        (16, (0, 0x5412 | HIGH), EPERM, EPERM),
        (302, (0, 7, 1), ALLOW, ALLOW),
        (302, (9, 7, 0), ALLOW, ALLOW),
        (302, (9, 7, 1), EPERM, EPERM),
        (302, (9, 7, HIGH), EPERM, EPERM),
        (203, (0,), ALLOW, ALLOW),
        (203, (9,), EPERM, EPERM),
        (144, (0, 3), ALLOW, ALLOW),
        (144, (9, 3), EPERM, EPERM),
        (144, (9, HIGH), 0x50000, 0x50000),  # the call returns 0 and does nothing
        (141, (0, 0), ALLOW, ALLOW),
        (141, (0, 9), EPERM, EPERM),
        (141, (2, 0), EPERM, EPERM),
        (141, (1, 0), ALLOW, ALLOW),
        (251, (3, 0), EPERM, EPERM),
        (251, (1, 0), ALLOW, ALLOW),
        (251, (1, 9), EPERM, EPERM),
        (133, (0, 0o10644), ALLOW, ALLOW),
        (133, (0, 0o20644), EPERM, EPERM),
        (259, (0, 0, 0o60644), EPERM, EPERM),
        (259, (0, 0, 0o140644), ALLOW, ALLOW),
    ],
)  # fmt: skip
def test_calls_that_depend_on_their_arguments(number: int, args: tuple[int, ...], offline: int, online: int) -> None:
    assert run(filter.program(False, doors=True), number, *args) == offline
    assert run(filter.program(True, doors=True), number, *args) == online


def test_without_a_door_no_listener_is_notified() -> None:
    assert run(filter.program(False, doors=False), 41, 2, 1, 0) == EAFNOSUPPORT
    assert run(filter.program(True, doors=False), 41, 1, 1, 0) == EAFNOSUPPORT


# ── plans ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("version", "files", "net", "scoped", "size"), [
    (1, 0x1FFF, 0, 0, 8), (2, 0x3FFF, 0, 0, 8), (3, 0x7FFF, 0, 0, 8), (4, 0x7FFF, 3, 0, 16), (6, 0xFFFF, 3, 3, 24),
    (9, 0xFFFF, 3, 3, 24),
])  # fmt: skip
def test_an_older_linux_gets_only_rights_that_it_has(
    version: int, files: int, net: int, scoped: int, size: int
) -> None:
    assert landlock.ruleset(version) == landlock.Ruleset(files, net, scoped, size)


def test_what_is_opened_ahead_has_the_same_rights_and_nothing_twice(tmp_path: Path) -> None:
    (tmp_path / "usr" / "bin").mkdir(parents=True)
    (tmp_path / "bin").symlink_to("usr/bin")
    (tmp_path / "etc").touch()
    read, device = landlock.READ, landlock.DEVICE
    names = (("usr", read), ("bin", read), ("usr/bin", read), ("usr/bin/../bin", device), ("etc", read), ("none", read))
    common = tuple((str(tmp_path / name), rights) for name, rights in names)
    ground = plan.Ground(landlock.ruleset(6), b"", 0, {}, Machine(()), None, common)
    ahead, fds = plan.opened(ground)
    try:
        rules = [struct.unpack_from("=Q3Ii", ahead.rules, at) for at in range(0, len(ahead.rules), 32)]
        found = {os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path)): rights for rights, *_, fd in rules}
        assert ahead.count == len(rules) == len(fds)
        on_file = landlock.EXECUTE | landlock.READ_FILE
        assert found == {"/usr": read, "/usr/bin": read | device, "/etc": on_file}
    finally:
        for fd in fds:
            os.close(fd)


def test_no_rule_grants_more_than_is_governed() -> None:
    for version in range(1, 8):
        ruleset = landlock.ruleset(version)
        ground = plan.Ground(ruleset, b"", 0, {(True, False): b""}, Machine(()))
        one = plan.plan(ground, Box("flat", "all", "/w", ["/r"], ["/rw"]), doors=False)
        count, _, _, _, _, _, governed, net, _, *cage = struct.unpack_from("=6I3Q5iI", one)
        at, rights = 72, []
        assert cage[-1] == 0
        for _ in range(count):
            right, _, _, length, _ = struct.unpack_from("=Q4I", one, at)
            rights.append(right)
            at += 24 + length
        assert (at, count, net) == (len(one), 3, 0)
        assert all(right & ~governed == 0 and not right & landlock.MAKE_DEVICES for right in rights)
        assert rights[0] == landlock.READ < rights[1] == rights[2]


# ── places in the cage ────────────────────────────────────────────────────────────────────────────────────

MACHINE = Machine(("/etc", "/home/u/venv", "/usr"), ("/dev", "/etc", "/home", "/proc", "/sys", "/tmp", "/usr", "/work"))
_NAMES = st.lists(st.sampled_from(["home", "u", "venv", "w", "x", "usr", "tmp"]), min_size=1, max_size=4)
_PATHS = _NAMES.map(lambda names: "/" + "/".join(names))


def shown(read: list[str], write: list[str]) -> dict[str, bool]:
    """The attached paths, and whether each is writable after the last step."""
    steps = places.of_agent(MACHINE, "/home/u/w", read, write)
    return {step.target: not step.attributes & places.READ_ONLY for step in steps if step.kind == places.ATTACH}


def test_a_workspace_is_attached_where_it_lies_and_the_system_beside_it() -> None:
    assert shown([], []) == {"/home/u/venv": False, "/home/u/w": True}
    kinds = [(step.kind, step.target) for step in places.of_agent(MACHINE, "/home/u/w", [], [])]
    assert kinds[0] == (places.MEMORY, "/home")
    assert kinds[-1] == (places.SEAL, "/home")


def test_programs_are_found_over_the_links_that_lead_to_them(tmp_path: Path) -> None:
    """/home/me may be a link to another disk, while an environment contains paths with that name."""
    (tmp_path / "disk" / "me" / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "me").symlink_to("disk/me")
    (tmp_path / "me" / "venv" / "lib").symlink_to("bin")
    (tmp_path / "disk" / "me" / "other").symlink_to(tmp_path / "me" / "venv")
    found = cage.look([f"{tmp_path}/me/venv", f"{tmp_path}/me/venv/lib", f"{tmp_path}/me/other"], ["/etc/passwd"])
    venv = f"{tmp_path}/disk/me/venv"
    assert venv in found.system
    assert found.ways == {f"{tmp_path}/me": f"{tmp_path}/disk/me", f"{tmp_path}/disk/me/other": venv}
    top = "/" + str(tmp_path).split("/")[1]
    for steps, begin in (
        (places.of_cage(found), (places.FOLDER, top)),
        (places.of_agent(found, f"{tmp_path}/w", [], []), (places.MEMORY, top)),
    ):
        order = [(step.kind, step.target) for step in steps]
        way = order.index((places.LINK, f"{tmp_path}/me"))
        assert order.index(begin) < order.index((places.FOLDER, str(tmp_path))) < way
        assert way < order.index((places.ATTACH, venv))


def test_visible_paths_are_not_attached_again() -> None:
    assert "/usr/lib/x" not in shown(["/usr/lib/x"], [])
    assert shown([], ["/usr/lib/x"])["/usr/lib/x"]
    assert "/srv/a/b" not in shown(["/srv/a", "/srv/a/b"], [])
    both = shown(["/srv/a"], ["/srv/a/b"])
    assert (both["/srv/a"], both["/srv/a/b"]) == (False, True)
    assert "/srv/a/b" not in shown(["/srv/a/b"], ["/srv/a"])


def test_the_whole_root_is_all_that_lies_there_but_devices() -> None:
    assert set(shown(["/"], [])) == {"/home", "/home/u/w", "/tmp", "/work"}


@given(st.lists(_PATHS, max_size=4), st.lists(_PATHS, max_size=4))
def test_all_that_was_granted_can_be_seen_and_nothing_else_be_changed(read: list[str], write: list[str]) -> None:
    attached = {"/etc": False, "/usr": False} | shown(read, write)
    for path in (*read, *write):
        assert places.inside(path, attached)
    for path in write:
        nearest = max((folder for folder in attached if places.inside(path, (folder,))), key=len)
        assert attached[nearest]
    for path, writable in attached.items():
        assert writable == (path in (*write, "/home/u/w"))
        assert places.inside(path, (*read, *write, "/home/u/w", *MACHINE.system))


@given(st.lists(_PATHS, max_size=4), st.lists(_PATHS, max_size=4))
def test_no_memory_covers_an_attached_path(read: list[str], write: list[str]) -> None:
    steps = places.of_agent(MACHINE, "/home/u/w", read, write)
    for number, step in enumerate(steps):
        if step.kind == places.MEMORY:
            before = [other.target for other in steps[:number] if other.kind == places.ATTACH]
            assert not any(places.inside(other, (step.target,)) for other in before)


# ── aiosd.toml ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_groups_table_overrides_single_defaults(tmp_path: Path) -> None:
    general = SandboxSettings("flat", "none")
    values = {"name": "web", "net": "all", "read": ["data"], "env": ["KEY"]}
    name, rules = boxgroups.read(values, str(tmp_path), general)
    assert (name, rules) == ("web", SandboxSettings("flat", "all", read=(str(tmp_path / "data"),), env=("KEY",)))
    with pytest.raises(ValueError, match="without name"):
        boxgroups.read({}, "/", general)
    for key, value in (("sandbox", "cave"), ("net", "hosts"), ("read", "x"), ("env", [1]), ("name", "a/b")):
        with pytest.raises(ValueError, match="is no"):
            boxgroups.READERS[key](value)


# ── a machine that cannot do it ───────────────────────────────────────────────────────────────────────────


def test_an_impossible_level_is_replaced_by_the_next_lower_one_and_reported_in_a_line() -> None:
    lacking = Offer("none", "Linux has no Landlock; boot with it")
    rooms = Sandboxes(
        SandboxSettings("flat"), {"web": SandboxSettings("flat", env=("K",)), "free": SandboxSettings()}, lacking, "/w"
    )
    assert [rooms.of_group(name).level for name in ("", "web", "free")] == ["none"] * 3
    assert rooms.of_group("web").env == ("K",)
    assert len(rooms.warnings()) == 2
    assert all(line.endswith(lacking.reason) for line in rooms.warnings())
    assert rooms.notes() == rooms.warnings()
    default = Sandboxes(
        SandboxSettings("cage"),
        {"web": SandboxSettings("cage"), "few": SandboxSettings("flat")},
        lacking,
        "/w",
        chosen=False,
    )
    assert default.notes()[0] == f"agents run without a sandbox: {lacking.reason}"
    assert (len(default.notes()), len(default.warnings())) == (2, 1), "what groups have by default is the same"
    assert rooms.shown()["why_no_more"] == lacking.reason
    spawn = wire.Spawn("exec", "true", sandbox=wire.Sandbox(level="flat"))
    with pytest.raises(OSError, match="Linux has no Landlock") as caught:
        rooms.decide(spawn, None)
    assert caught.value.errno == errno.ENOTSUP
    assert rooms.decide(wire.Spawn("exec", "true", sandbox=wire.Sandbox(read=["/r"])), None) is None


def test_modules_that_lie_in_a_home_grant_no_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """If a folder of sys.path is the root, a home or above one, an agent may read only aiosd in it."""
    (home := tmp_path / "me").mkdir()
    monkeypatch.setenv("HOME", str(home))
    account = os.path.realpath(pwd.getpwuid(os.getuid()).pw_dir)
    broad = {"/", str(home), os.path.dirname(home), account}
    granted = {path for path, _ in plan.common_rules([*broad, str(home / "lib")])}
    assert not granted & broad
    assert {f"{home}/lib", f"{home}/aiosd", f"{home}/libaios", f"{account}/libaios"} <= granted


def test_what_is_missing_is_found_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    ground = plan.ground(sys.path)

    def fork(child: Callable[[], int]) -> int:
        pid = os.fork()
        if pid == 0:
            os._exit(child())
        return pid

    def offered(native: Any) -> Offer:
        return probe.offer(native, ground, fork)[0]

    idle: Any = SimpleNamespace(confine=lambda plan: 0)
    assert "C compiler" in offered(None).reason
    assert (offered(idle).level, offered(idle).reason) == ("none", "Landlock is in force, but denies nothing")
    monkeypatch.setattr(landlock, "abi", lambda: 0)
    assert "no Landlock" in offered(idle).reason
    monkeypatch.setattr(filter, "MACHINE", "another")
    assert "processor" in offered(idle).reason


@pytest.mark.parametrize(
    ("number", "settings", "words"),
    [
        (errno.ENOSPC, {}, "sysctl user.max_user_namespaces=10000 allows"),
        (errno.EPERM, {"kernel/apparmor_restrict_unprivileged_userns": "1"}, "apparmor_restrict_unprivileged_userns=0"),
        (errno.EPERM, {"kernel/unprivileged_userns_clone": "0"}, "kernel.unprivileged_userns_clone=1 allows"),
        (errno.EINVAL, {}, "no cage: the root cannot be exchanged"),
    ],
)
def test_without_a_cage_the_remedy_is_named(
    number: int, settings: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "_reads", lambda name: settings.get(name, ""))
    assert words in probe._no_cage(OSError(number, "sandbox: the root cannot be exchanged"))


def test_every_failure_of_the_c_function_has_a_sentence() -> None:
    native = load()
    if native is None:
        pytest.skip("not compiled")
    for wrong in (b"", b"\xff" * 71, b"\xff" * 72):
        with pytest.raises(OSError, match="the plan is wrong"):
            native.confine(wrong)
