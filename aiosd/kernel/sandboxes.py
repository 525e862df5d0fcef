"""How new agents are confined: by the settings, the rules of their group, what this machine can do and what was asked
for.

What a box is, and who may have which, is in `sandbox.box`; this joins it to the settings.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping

import msgspec

from aiosd.kernel.proc import Proc
from aiosd.kernel.spawning import group_of_child
from aiosd.sandbox import box as boxes
from aiosd.sandbox import hosts, plan
from aiosd.sandbox.box import LEVELS, Box, SandboxSettings
from aiosd.sandbox.probe import Offer
from libaios import wire


class Sandboxes:
    def __init__(
        self,
        rules: SandboxSettings,
        groups: Mapping[str, SandboxSettings],
        offer: Offer,
        folder: str,
        strict: bool = False,
        chosen: bool = True,
    ) -> None:
        """`folder`: of the workspaces. `strict`: no less than the rules say may be chosen. `chosen`: the
        level of `rules` is what a person has set, not the default."""
        self.rules = rules
        self._chosen = chosen
        self._strict = strict
        self._groups = groups
        self.offer = offer
        self._folder = folder
        self._data = os.path.dirname(os.path.realpath(folder))  # of the system itself

    def raised(self, args: wire.Spawn, parent: Proc) -> str:
        """In which way the new agent would be less confined than its parent, or its parent's group; "": in none."""
        if parent.box is None and not args.sandbox.level:
            return ""
        same = msgspec.structs.replace(args, group=None)
        try:
            self.decide(same, parent)
        except PermissionError as err:
            return err.strerror or str(err) if self._possible(same, parent) else ""
        except OSError:  # it will not start at all
            pass
        return ""

    def _possible(self, args: wire.Spawn, parent: Proc) -> bool:
        """Whether a person could allow it."""
        try:
            self.decide(args, parent, allowed=True)
        except OSError:
            return False
        return True

    def decide(self, args: wire.Spawn, parent: Proc | None, allowed: bool = False) -> Box | None:
        """The box of a new agent, None: it is not confined. `allowed`: it may be less confined than its parent. Raises
        OSError: EINVAL, EPERM, ENOTSUP."""
        boxes.check(args.sandbox)
        wish = boxes.without_data(boxes.with_hosts(args.sandbox), self._data)
        box = self._decide(args, wish, parent, allowed)
        if box is not None:
            boxes.refuse_data(box, self._data, self._folder)
        return box

    def _decide(self, args: wire.Spawn, wish: wire.Sandbox, parent: Proc | None, allowed: bool) -> Box | None:
        if parent is not None and parent.box is not None and not parent.outside:
            if not allowed:
                return boxes.of_child(wish, parent.box)
            if not self._strict or wish.level in ("", *LEVELS[LEVELS.index(parent.box.level) :]):
                return boxes.of_child_with_more(wish, parent.box)
            raise wire.error(errno.EPERM, f"sandbox: {wish.level} is less than strict settings allow anyone")
        group = group_of_child(parent, args.group, allowed)
        rules = self.of_group(group)
        if parent is not None and parent.box is None and parent.group == group and not self._strict:
            rules = msgspec.structs.replace(rules, level="none")  # a person has chosen that for its parent
        fixed = (parent is not None and not allowed) or self._strict
        if fixed and wish.level and LEVELS.index(wish.level) < LEVELS.index(rules.level):
            raise wire.error(errno.EPERM, f"sandbox: agents of group {group!r} run in {rules.level!r} or more")
        if LEVELS.index(wish.level or "none") > LEVELS.index(self.offer.level):
            raise wire.error(errno.ENOTSUP, f"sandbox: {wish.level} is not possible here: {self.offer.reason}")
        confined = (wish.level or rules.level) != "none"
        if not confined and not wish.level and self._wanted(group).level != "none":  # it can read and write all anyway
            wish = msgspec.structs.replace(wish, read=[], write=[])
        if confined and hosts.are_named(wish.net or rules.net) and self.offer.level != LEVELS[-1]:
            raise wire.error(errno.ENOTSUP, f"sandbox: --net HOST needs a cage, not possible here: {self.offer.reason}")
        program = wish.script or wish.program or args.target
        place = boxes.workspace(self._folder, group, program, args.name or "") if confined else ""
        return boxes.of_person(wish, rules, place)

    def environment(self, args: wire.Spawn, parent: Proc | None, box: Box | None) -> dict[str, str]:
        """What of its environment the agent gets. A confined agent has passed the list itself: its children get all. A
        program from outside has not, and is none that is confined itself: its box is that of its tools."""
        if box is None:
            return args.env
        if parent is not None and parent.box is not None and not parent.outside:
            return boxes.at_home(args.env, box)
        group = group_of_child(parent, args.group, allowed=True)  # `decide` has asked
        allowed = (*self.of_group(group).env, *args.sandbox.env)
        return boxes.at_home(boxes.environment(args.env, allowed), box)

    def of_group(self, group: str) -> SandboxSettings:
        """In force here: a level that this machine cannot do is one lower, which the log says."""
        rules = self._wanted(group)
        weakest = min(rules.level, self.offer.level, key=LEVELS.index)
        return SandboxSettings(weakest, rules.net, rules.read, rules.write, rules.env)

    def _wanted(self, group: str) -> SandboxSettings:
        return self._groups.get(group, self.rules)

    def shown(self) -> dict[str, object]:
        """For `aiosd status`."""
        groups = {name: self.of_group(name).level for name in self._groups}
        shown: dict[str, object] = {"default": self.of_group("").level, "possible": self.offer.level}
        if self._strict:
            shown["strict"] = True
        if groups:
            shown["groups"] = groups
        if self.offer.reason:
            shown["why_no_more"] = self.offer.reason
        if self.offer.open:
            shown["left_open"] = list(self.offer.open)
        return shown | {"every_agent": plan.granted(sys.path)}

    def warnings(self) -> list[str]:
        """One line for each setting that this machine cannot do."""
        wanted = {name: rules.level for name, rules in self._groups.items()}
        if self._chosen:
            wanted = {"": self.rules.level} | wanted
        else:  # groups that say nothing have the default, too
            wanted = {name: level for name, level in wanted.items() if level != self.rules.level}
        return [
            f"sandbox {level}{f' of group {name}' if name else ''} is not possible here, agents run in "
            f"{self.offer.level}: {self.offer.reason}"
            for name, level in wanted.items()
            if LEVELS.index(level) > LEVELS.index(self.offer.level)
        ]

    def notes(self) -> list[str]:
        """What the person who starts aiosd is told: the warnings, and where the default is not possible, what is."""
        if self._chosen or self.of_group("").level == self.rules.level:
            return self.warnings()
        words = {"none": "agents run without a sandbox", "flat": "agents run in flat, not in a cage"}
        return [f"{words[self.offer.level]}: {self.offer.reason}", *self.warnings()]


def folder(data: os.PathLike[str]) -> str:
    """Of the workspaces; without links, because a cage follows none."""
    return os.path.realpath(os.path.join(data, "workspaces"))
