"""The rules: which deeds are denied, need a person's answer, or are allowed. Pure.

* All rules that deny come first, then those that ask, then those that allow, whatever their order in the file. The
first
  that matches decides; it does not matter if another one is more specific.
* If none matches, the deed's own default decides: a person is asked if it has one, else it is allowed.
* A rule for a resource denies or asks when one of the deed's resources of that type matches, and allows when all do.
  Unknown resources of a deed (`Deed.unknown`) may be anything: such a rule denies it or asks, and never allows it.
* An answer for all times (`LastingApproval`) answers an ask, and never changes a denial.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from aiosd.access import patterns
from aiosd.access.deed import KINDS, Deed, Subject


class Act(enum.Enum):
    DENY = "deny"
    ASK = "ask"
    ALLOW = "allow"


class Rule(Struct, frozen=True, array_like=True):
    """One rule. `names`: of tools or of calls; `*` for all, `git__*` for those of a server. `by`: groups of agents, []
    for all. `programs`: hashes of paths (`deed.program_key`), `contents`: of files, [] for all. `resources`: type and
    patterns."""

    act: Act
    tool: bool
    names: list[str]
    by: list[str] = []
    programs: list[bytes] = []
    contents: list[bytes] = []
    resources: list[tuple[str, list[str]]] = []
    text: str = ""  # as it stands in the file
    line: int = 0

    @property
    def shown(self) -> str:
        return f"{self.act.value} {self.text} (aiosd.toml, line {self.line})"

    def matches(self, subject: Subject, deed: Deed) -> bool:
        return (
            self.tool == deed.tool
            and any(_named(name, deed.what) for name in self.names)
            and (not self.by or subject.group in self.by)
            and (not self.programs or subject.program in self.programs)
            and (not self.contents or subject.sha256 in self.contents)
            and all(self._concerns(kind, wanted, deed) for kind, wanted in self.resources)
        )

    def _concerns(self, kind: str, wanted: Sequence[str], deed: Deed) -> bool:
        if kind in deed.unknown:
            return self.act is not Act.ALLOW
        hits = [
            any(patterns.matches(kind, pattern, value, deed.base) for pattern in wanted) for value in deed.values(kind)
        ]
        return all(hits) and bool(hits) if self.act is Act.ALLOW else any(hits)

    def covers(self, other: Rule) -> bool:
        """Whether this rule matches everything that the other matches. False if that is not certain."""
        return (
            self.tool == other.tool
            and all(any(_named(mine, name) for mine in self.names) for name in other.names)
            and _contains(self.by, other.by)
            and _contains(self.programs, other.programs)
            and _contains(self.contents, other.contents)
            and all(_covers_resource(kind, wanted, other) for kind, wanted in self.resources)
        )


class Decision(Struct, frozen=True):
    """A decision. `rule`: the name of what has decided; "": there was nothing to decide."""

    act: Act
    rule: str = ""


class AccessPolicy(Struct, frozen=True, array_like=True):
    """The rules in force, and how many seconds an ask waits while no person can answer."""

    rules: list[Rule] = []
    ask_timeout_s: float = 0.0

    def decide(self, subject: Subject, deed: Deed) -> Decision:
        for act in Act:
            for rule in self.rules:
                if rule.act is act and rule.matches(subject, deed):
                    return Decision(act, rule.shown)
        if deed.default:
            return Decision(Act.ASK, f"default: {deed.default}")
        return Decision(Act.ALLOW)

    def concerns(self, what: str, tool: bool) -> bool:
        """Whether any rule names this tool or call."""
        return any(rule.tool == tool and any(_named(name, what) for name in rule.names) for rule in self.rules)

    def kinds_for(self, what: str, tool: bool) -> set[str]:
        """The types of resources that rules about it use."""
        about = [rule for rule in self.rules if rule.tool == tool and any(_named(name, what) for name in rule.names)]
        return {kind for rule in about for kind, _ in rule.resources}

    def contents(self) -> set[bytes]:
        """The hashes of programs' contents that matter to a rule."""
        return {content for rule in self.rules for content in rule.contents}

    def shadowed(self) -> list[tuple[Rule, Rule]]:
        """Rules that can never decide, each with the one that always decides before it."""
        ordered = [rule for act in Act for rule in self.rules if rule.act is act]
        found = []
        for at, rule in enumerate(ordered):
            earlier = next((other for other in ordered[:at] if other.covers(rule)), None)
            if earlier is not None:
                found.append((rule, earlier))
        return found


class LastingApproval(Struct, frozen=True):
    """An approval for all times: for agents of one group (and of one program, if that was proved), for one tool or
    call, and for these very resources; if there are none, for these very arguments. `schema`: of the tool."""

    number: int
    group: str
    program: str  # hexadecimal, "" if it was not proved
    what: str
    tool: bool
    resources: list[tuple[str, str]]
    schema: str
    arguments: str  # their digest, "" if there are resources
    agent: str  # the agent's name when the approval was given, for people only
    given: float  # Unix time

    def covers(self, subject: Subject, deed: Deed) -> bool:
        return (
            (self.group, self.what, self.tool) == (subject.group, deed.what, deed.tool)
            and self.program == subject.program.hex()
            and not deed.once
            and self.resources == deed.lasting()
            and self.schema == deed.schema
            and self.arguments == ("" if deed.resources else deed.arguments.hex())
        )

    @property
    def shown(self) -> str:
        things = ", ".join(f"{kind} {value}" for kind, value in self.resources) or "with these arguments only"
        program = " of the same program" if self.program else ""
        return f"{self.what} {things}, by agents of group {self.group}{program}"


def lasting(number: int, subject: Subject, deed: Deed, agent: str, now: float) -> LastingApproval:
    return LastingApproval(
        number,
        subject.group,
        subject.program.hex(),
        deed.what,
        deed.tool,
        deed.lasting(),
        deed.schema,
        "" if deed.resources else deed.arguments.hex(),
        agent,
        now,
    )


def matcher(pattern: str) -> Callable[[str], bool]:
    """A function that returns whether a name matches the name in a rule."""
    return lambda name: _named(pattern, name)


def _named(pattern: str, name: str) -> bool:
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return pattern == name


def _contains(wide: Sequence[object], narrow: Sequence[object]) -> bool:
    """Whether the first list contains the second; an empty list stands for everything."""
    return not wide or (bool(narrow) and set(narrow) <= set(wide))


def _covers_resource(kind: str, wanted: Iterable[str], other: Rule) -> bool:
    narrow = dict(other.resources).get(kind)
    return narrow is not None and all(any(patterns.covers(kind, wide, one) for wide in wanted) for one in narrow)


__all__ = ["KINDS", "AccessPolicy", "Act", "Decision", "LastingApproval", "Rule"]
