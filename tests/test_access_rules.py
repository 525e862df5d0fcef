"""Rules about deeds: how they are read, which one decides, what an approval binds. Nothing runs here."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aiosd.access import patterns, table
from aiosd.access.deed import ALL_CHARS, DETAIL_CHARS, KINDS, Deed, Subject, detail, details_of, program_key
from aiosd.access.rules import AccessPolicy, Act, Rule, lasting
from aiosd.config import load, reload
from aiosd.errors import UsageError
from aiosd.kernel.deeds import FREE, OF_SERVICES
from aiosd.tools import builtin, held
from aiosd.tools.concerns import MOST
from aiosd.tools.concerns import deed as deed_of
from aiosd.tools.definition import functions_of
from aiosd.tools.messages import Tool
from aiosd.tools.spec import BUILT_IN_KINDS
from libaios import tool as libtool
from libaios import wire
from libaios.home import Home

ME = Subject("web")

# ── patterns ──────────────────────────────────────────────────────────────────────────────────────────────

PATHS = [
    ("a", "a", True),
    ("a", "a/b/c", True),
    ("a", "ab", False),
    ("a/*.txt", "a/b.txt", True),
    ("a/*.txt", "a/b/c.txt", False),  # `*` stands within one name
    ("*", "x/y", True),
    (".", "x", True),
    ("/etc", "/etc/passwd", True),
    ("/etc", "etc/passwd", False),
    ("etc", "/etc/passwd", False),
    ("a[b]", "a[b]", True),  # only the star is special
    ("a[b]", "ab", False),
    ("a?", "ab", False),
]
HOSTS = [
    ("example.org", "example.org", True),
    ("example.org", "www.example.org", False),
    ("*.example.org", "www.example.org", True),
    ("*.example.org", "a.b.example.org", True),
    ("*.example.org", "example.org", False),
    ("*.example.org", "badexample.org", False),
    ("*", "192.0.2.1", True),
    ("192.0.2.1", "192.0.2.10", False),
]


@pytest.mark.parametrize(
    ("kind", "pattern", "value", "expected"),
    [*(("path", *row) for row in PATHS), *(("host", *row) for row in HOSTS), ("signal", "KILL", "TERM", False)],
)
def test_what_a_pattern_matches(kind: str, pattern: str, value: str, expected: bool) -> None:
    assert patterns.matches(kind, pattern, value) is expected


def test_a_relative_path_is_seen_from_the_callers_folder() -> None:
    assert patterns.matches("path", "keep", "/ws/keep/a", "/ws")
    assert not patterns.matches("path", "keep", "/elsewhere/keep/a", "/ws")
    assert patterns.matches("path", "/ws", "/ws/keep/a", "/ws")


@pytest.mark.parametrize(
    ("kind", "text", "kept"),
    [
        ("signal", "sigkill", "KILL"),
        ("host", "ExAmple.ORG.", "example.org"),
        ("host", "*.bücher.example", "*.xn--bcher-kva.example"),
        ("path", "a//b/../c/", "a/c"),
    ],
)
def test_patterns_are_kept_in_one_form(kind: str, text: str, kept: str) -> None:
    assert patterns.checked(kind, text) == kept


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *(("signal", text) for text in ("KILLER", "")),
        *(("host", text) for text in ("a/b", "a.*.b", "a b")),
        *(("path", text) for text in ("../x", "a/**", "")),
    ],
)
def test_what_is_no_pattern(kind: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"is no|a path names"):
        patterns.checked(kind, text)


# ── which rule decides ────────────────────────────────────────────────────────────────────────────────────

NAMES = ["a", "b", "s__x", "s__y"]
GROUPS = ["web", "dev"]
VALUES = {
    "path": ["x", "x/y", "x/z", "/w"],
    "host": ["e.org", "a.e.org", "b.a.e.org"],
    "group": GROUPS,
    "signal": ["TERM", "KILL"],
}
WANTED = {
    "path": [".", "x", "x/y", "x/*", "/w", "/"],
    "host": ["*", "e.org", "*.e.org", "*.a.e.org", "a.e.org"],
    "group": ["*", *GROUPS],
    "signal": ["*", "KILL"],
}
resources = st.lists(
    st.sampled_from(KINDS).flatmap(lambda kind: st.tuples(st.just(kind), st.sampled_from(VALUES[kind]))), max_size=3
)
deeds = st.builds(
    Deed,
    what=st.sampled_from(NAMES),
    tool=st.booleans(),
    resources=resources,
    default=st.sampled_from(["", "asks"]),
    unknown=st.lists(st.sampled_from(KINDS), max_size=1),
)
subjects = st.builds(Subject, st.sampled_from([*GROUPS, "other"]), st.sampled_from([b"", b"p"]))
wanted = st.dictionaries(st.sampled_from(KINDS), st.none(), max_size=2).flatmap(
    lambda kinds: st.tuples(
        *(st.tuples(st.just(k), st.lists(st.sampled_from(WANTED[k]), min_size=1, max_size=2)) for k in kinds)
    ).map(list)
)
rules = st.builds(
    Rule,
    act=st.sampled_from(Act),
    tool=st.booleans(),
    names=st.lists(st.sampled_from([*NAMES, "*", "s__*"]), min_size=1, max_size=2),
    by=st.lists(st.sampled_from(GROUPS), max_size=2),
    programs=st.lists(st.just(b"p"), max_size=1),
    resources=wanted,
    text=st.just("rule"),
    line=st.integers(1, 99),
)
policies = st.lists(rules, max_size=6).map(AccessPolicy)


@settings(max_examples=60)
@given(policies, subjects, deeds)
def test_denials_come_first_then_asks_then_what_is_allowed(policy: AccessPolicy, who: Subject, deed: Deed) -> None:
    found = {rule.act for rule in policy.rules if rule.matches(who, deed)}
    first = next((act for act in (Act.DENY, Act.ASK, Act.ALLOW) if act in found), None)
    decision = policy.decide(who, deed)
    assert decision.act is (first or (Act.ASK if deed.default else Act.ALLOW))
    assert bool(decision.rule) == (first is not None or bool(deed.default))  # what decides is always named


@settings(max_examples=60)
@given(policies, subjects, deeds, st.permutations(range(6)))
def test_the_order_in_the_file_does_not_matter(
    policy: AccessPolicy, who: Subject, deed: Deed, order: list[int]
) -> None:
    shuffled = AccessPolicy([policy.rules[at] for at in order if at < len(policy.rules)])
    assert shuffled.decide(who, deed).act is policy.decide(who, deed).act


@settings(max_examples=60)
@given(policies, rules, subjects, deeds)
def test_another_denial_never_allows_more(policy: AccessPolicy, rule: Rule, who: Subject, deed: Deed) -> None:
    rank = [Act.DENY, Act.ASK, Act.ALLOW]
    more = AccessPolicy([*policy.rules, msgspec.structs.replace(rule, act=Act.DENY)])
    assert rank.index(more.decide(who, deed).act) <= rank.index(policy.decide(who, deed).act)


WIDER: dict[str, Any] = {"names": ["*"], "by": [], "programs": [], "resources": [], "act": Act.DENY}
wider = st.lists(st.sampled_from(sorted(WIDER)), max_size=3).map(lambda names: {name: WIDER[name] for name in names})


@settings(max_examples=100)
@given(rules, wider, rules, subjects, deeds)
def test_a_rule_that_covers_another_matches_all_that_it_matches(
    narrow: Rule, changes: dict[str, Any], other: Rule, who: Subject, deed: Deed
) -> None:
    wide = msgspec.structs.replace(narrow, **changes)
    assert wide.covers(narrow)
    for rule in (wide, msgspec.structs.replace(wide, resources=other.resources)):
        earlier = list(Act).index(rule.act) <= list(Act).index(narrow.act)
        assert not (earlier and rule.covers(narrow) and narrow.matches(who, deed)) or rule.matches(who, deed)


@settings(max_examples=60)
@given(policies, subjects, deeds)
def test_a_rule_that_is_warned_of_never_decides(policy: AccessPolicy, who: Subject, deed: Deed) -> None:
    numbered = AccessPolicy([msgspec.structs.replace(rule, line=at) for at, rule in enumerate(policy.rules)])
    assert numbered.decide(who, deed).rule not in {rule.shown for rule, _ in numbered.shadowed()}


def test_all_resources_must_be_allowed_and_one_is_enough_to_be_denied() -> None:
    two = Deed("t", True, [("host", "a.org"), ("host", "b.org")])
    allow = Rule(Act.ALLOW, True, ["t"], resources=[("host", ["a.org"])])
    assert not allow.matches(ME, two)
    assert msgspec.structs.replace(allow, act=Act.DENY).matches(ME, two)


def test_resources_that_a_tool_does_not_declare_are_denied() -> None:
    unclear = Deed("t", True, unknown=["path"])
    deny = Rule(Act.DENY, True, ["t"], resources=[("path", ["x"])])
    assert deny.matches(ME, unclear)
    assert not msgspec.structs.replace(deny, act=Act.ALLOW).matches(ME, unclear)


# ── what an approval binds ────────────────────────────────────────────────────────────────────────────────

CHANGES: list[dict[str, Any]] = [
    {"what": "u"},
    {"tool": False},
    {"resources": [("path", "y")]},
    {"details": [("text", "2")]},
    {"bound": b"1" * 16},
    {"base": "/other"},
]


@pytest.mark.parametrize("change", CHANGES)
def test_an_approval_is_for_this_very_deed(change: dict[str, Any]) -> None:
    deed = Deed("t", True, [("path", "x")], [("text", "1")], b"0" * 16)
    assert deed.digest != msgspec.structs.replace(deed, **change).digest
    assert deed.digest == msgspec.structs.replace(deed, default="another reason").digest


def test_always_is_for_group_program_tool_schema_and_resource() -> None:
    here = Deed("t", True, [("path", "/ws/7/keep")], [("text", "1")], b"schema" + bytes(10) + b"inode", base="/ws/7")
    me = Subject("web", b"p")
    entry = lasting(1, me, here, "x", 0.0)
    there = msgspec.structs.replace(
        here, resources=[("path", "/ws/8/keep")], base="/ws/8", details=[("text", "2")], bound=here.bound[:16] + b"2"
    )
    assert entry.covers(me, here)
    assert entry.covers(me, there)  # another agent of that kind, and its own folder
    for other in (Subject("dev", b"p"), Subject("web"), Subject("web", b"q")):
        assert not entry.covers(other, here)
    for change in (
        {"resources": [("path", "/ws/7/other")]},
        {"bound": b"another schema.."},
        {"what": "u"},
        {"once": True},
    ):
        assert not entry.covers(me, msgspec.structs.replace(here, **change))  # type: ignore[arg-type]


def test_without_resources_it_is_for_these_very_arguments() -> None:
    one = Deed("shell", True, [], [("command", "ls")], bytes(16), base="/ws/7")
    entry = lasting(1, ME, one, "x", 0.0)
    assert entry.covers(ME, msgspec.structs.replace(one, base="/ws/8"))
    assert not entry.covers(ME, msgspec.structs.replace(one, details=[("command", "ls; rm -rf .")]))


def test_a_cut_text_is_marked_and_still_counts_as_a_whole() -> None:
    long = "x" * (DETAIL_CHARS + 10)
    _, text = detail("text", long)
    assert "10 more characters, not shown" in text
    assert detail("text", long + "y") != detail("text", long)
    assert detail("text", long[:-1] + "y") != detail("text", long)


def test_the_kept_part_of_a_call_is_bounded() -> None:
    arguments = {f"a{number}": "x" * 5000 for number in range(1000)}
    shown = details_of(arguments.items())
    assert sum(len(label) + len(text) for label, text in shown) < 2 * ALL_CHARS
    assert "more arguments, not shown" in shown[-1][1]
    assert details_of({**arguments, "a999": "y"}.items()) != shown


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────

NAMES_THERE = table.Names({"shell": (), "fetch": ("host",), "read_file": ("path",)}, servers=("git",))


def read(text: str) -> tuple[AccessPolicy, list[str]]:
    return table.read(tomllib.loads(text)["access"], text, "/etc/aios", NAMES_THERE)


def test_a_table_as_people_write_it() -> None:
    policy, warnings = read(
        "# a comment with { in it\n[access]\nask_timeout = 30\n"
        'deny = [  # ["{"]\n  { tool = "shell", by = "web" },\n\n'
        '  { call = "kill", signal = ["sigkill", "STOP"], group = "dev" },\n]\n'
        'ask = [ { tool = "git__*" }, { tool = "fetch", host = "*.example.org" } ]\n'
        'allow = [ { call = "sto_write", path = "re ports", program = "a.py" } ]\n'
    )
    assert [rule.line for rule in policy.rules] == [5, 7, 9, 9, 10]
    assert policy.ask_timeout_s == 30
    assert policy.rules[1].resources == [("group", ["dev"]), ("signal", ["KILL", "STOP"])]
    assert policy.rules[4].programs == [program_key(b"/etc/aios/a.py")]
    assert warnings == []
    assert policy.decide(ME, Deed("shell", True)).rule == "deny tool=shell by=web (aiosd.toml, line 5)"


@pytest.mark.parametrize(
    ("lines", "number", "words"),
    [
        (['deny = [{ tool = "shel" }]'], 2, "no tool 'shel' (did you mean 'shell'?)"),
        (['deny = [{ tool = "hg__*" }]'], 2, "no tool 'hg__*'"),
        (["deny = [", '{ call = "kil" }]'], 3, "no call 'kil' (did you mean 'kill'?)"),
        (["ask = [", '{ tool = "shell" },', '{ tool = "shell", path = "x" }]'], 4, "shell has no path"),
        (['deny = [{ tool = "fetch", hots = "x" }]'], 2, "unknown key 'hots' (did you mean 'host'?)"),
        (['deny = [{ call = "sto_upload" }]'], 2, "but sto_write can"),
        (['deny = [{ call = "getpid" }]'], 2, "cannot be ruled"),
        (['deny = [{ call = "tool_admit" }]'], 2, 'but tool = "NAME" can'),
        (['deny = [{ tool = "shell", call = "kill" }]'], 2, "one of: tool, call"),
        (["deny = [{ }]"], 2, "one of: tool, call"),
        (['deny = [{ call = "kill", signal = "9" }]'], 2, "is no signal"),
        (['deny = [{ call = "sto_read", path = "/x" }]'], 2, "begins with no slash"),
        (['deny = [{ tool = "shell", by = "a b" }]'], 2, "no name of a group"),
        (['deny = [{ tool = [] }]'], 2, "neither a text nor a list of texts"),
        (["", "deny = 3"], 3, "is a list of rules"),
        (["denied = []"], 2, "unknown key 'denied'"),
        (["ask_timeout = true"], 2, "no number of seconds"),
        (['deny = [{ tool = "shell", sha256 = "ab" }]'], 2, "which one?"),
        (['deny = [{ tool = "shell", program = "x", sha256 = "ab" }]'], 2, "64 digits"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_line(lines: list[str], number: int, words: str, tmp_path: Path) -> None:
    text = "\n".join(["[access]", *lines])
    with pytest.raises(table.RuleError) as caught:
        read(text)
    assert (caught.value.line, words in str(caught.value)) == (number, True), str(caught.value)
    config = tmp_path / "aiosd.toml"
    config.write_text('tool_workers = 2\n[mcpServers.git]\ncommand = "x"\n' + text)
    with pytest.raises(UsageError, match=f"aiosd.toml, line {number + 3}: access"):
        load({}, Home(str(tmp_path)), config, {})


def test_a_rule_names_only_calls_that_are_decided_about_by_that_name() -> None:
    """Any other rule would have no effect, although it looks as if it had: those calls just go on."""
    undecided = [wire.TABLE[sys] for sys in FREE | OF_SERVICES if wire.TABLE[sys].by != "store"]
    assert {row.name for row in undecided} <= set(table._UNNAMED)


def test_tools_of_files_are_not_known_yet(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("")
    config = tmp_path / "aiosd.toml"
    config.write_text('tools = "mine.py"\n[access]\ndeny = [{ tool = "mine", path = "x" }]\n')
    assert load({}, Home(str(tmp_path)), config, {}).access.concerns("mine", True)


def test_a_rule_that_never_decides_is_warned_of() -> None:
    _, warnings = read('[access]\nask = [{ tool = "fetch" }]\nallow = [{ tool = "fetch", host = "example.org" }]\n')
    assert len(warnings) == 1
    assert "allow tool=fetch host=example.org (aiosd.toml, line 3) never decides: ask tool=fetch" in warnings[0]


def test_rules_change_while_the_system_runs(tmp_path: Path) -> None:
    config = tmp_path / "aiosd.toml"
    config.write_text("[access]\n")
    old = load({}, Home(str(tmp_path)), config, {})
    config.write_text('[access]\ndeny = [{ tool = "shell" }]\n')
    new, waiting = reload(old)
    assert (len(new.access.rules), waiting) == (1, [])


# ── what a call of a tool amounts to ──────────────────────────────────────────────────────────────────────


def test_built_in_tools_state_what_rules_expect_of_them() -> None:
    found = functions_of(vars(builtin))
    stated = {name: tuple(concern.partition(":")[0] for concern in one.tool.concerns) for name, one in found.items()}
    assert stated == BUILT_IN_KINDS


def test_the_resources_of_a_call(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc")
    tool = Tool("t", "", {"properties": {"to": {"default": "x"}}}, concerns=("path:{path}", "path:{to}", "host:{url}"))
    deed = deed_of(tool, {"path": "link/passwd", "url": "https://User@EXAMPLE.org.:8/x"}, str(tmp_path))
    assert deed.resources == [
        ("path", f"{tmp_path}/link/passwd"),  # as the call names it
        ("path", "/etc/passwd"),  # where this leads
        ("path", f"{tmp_path}/x"),
        ("host", "example.org"),
    ]
    assert deed.unknown == ["group", "signal"]
    assert deed_of(tool, {"path": "a", "url": "http://[bad"}, str(tmp_path)).unknown == ["group", "host", "signal"]
    assert "path" in deed_of(tool, {"path": ["a"] * (MOST + 1)}, str(tmp_path)).unknown
    assert "path" in deed_of(tool, {"path": "a"}, "").unknown  # of a server: seen from where?


def test_a_file_that_changes_is_another_deed(tmp_path: Path) -> None:
    tool = Tool("write", "", {}, concerns=("path:{path}",))
    file = tmp_path / "a"
    before = deed_of(tool, {"path": "a"}, str(tmp_path)).digest
    file.write_text("1")
    assert (there := deed_of(tool, {"path": "a"}, str(tmp_path)).digest) != before
    os.replace(tmp_path / "a", tmp_path / "b")
    file.symlink_to("b")
    assert deed_of(tool, {"path": "a"}, str(tmp_path)).digest not in (before, there)


@pytest.mark.parametrize("swap", ["another file", "a link", "nothing"])
def test_a_tool_opens_what_was_allowed_and_nothing_else(
    swap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the decision and the opening the file is exchanged."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_text("mine")
    (tmp_path / "secret").write_text("secret")
    monkeypatch.setattr(held, "files", {str(tmp_path / "a"): held.identity(str(tmp_path / "a"))})
    if swap == "another file":
        (tmp_path / "new").write_text("new")
        os.replace(tmp_path / "new", tmp_path / "a")
    elif swap == "a link":
        (tmp_path / "a").unlink()
        (tmp_path / "a").symlink_to("secret")
    for act in (
        lambda: builtin.read_file("a"),
        lambda: builtin.write_file("a", "x"),
        lambda: builtin.edit_file("a", "x", "n"),
    ):
        if swap == "nothing":
            act()
            monkeypatch.setattr(held, "files", {str(tmp_path / "a"): held.identity(str(tmp_path / "a"))})
        else:
            with pytest.raises(PermissionError):
                act()
    assert (tmp_path / "secret").read_text() == "secret"


def test_a_redirect_needs_a_decision_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held, "hosts", ["example.org"])
    held.require_host("example.org")
    with pytest.raises(PermissionError, match=r"another host than evil\.example"):
        held.require_host("evil.example")


@pytest.mark.parametrize("concern", ["path", "command:{x}", "path:x", "path:{a}{b}"])
def test_what_a_tool_cannot_concern(concern: str) -> None:
    with pytest.raises(ValueError, match="a tool concerns"):
        libtool.define(concerns=[concern])
