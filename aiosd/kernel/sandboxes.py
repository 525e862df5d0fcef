"""Decides how new agents are confined: by the settings, the rules of their group, what this machine can do, and what
the call requests.

`sandbox.box` defines what a box is, and which agent may have which; this file applies it to the settings.
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
        """`folder`: of the workspaces. `strict`: no call may choose less than the rules require. `chosen`: the level of
        `rules` was set by a person, and is not the default."""
        self.rules = rules
        self._chosen = chosen
        self._strict = strict
        self._groups = groups
        self.offer = offer
        self._folder = folder
        self._data = os.path.dirname(os.path.realpath(folder))  # the data folder of the system

    def raised(self, args: wire.Spawn, parent: Proc) -> str:
        """In which way the new agent would be less confined than its parent, or its parent's group; "": in none."""
        if parent.box is None and not args.sandbox.level:
            return ""
        same = msgspec.structs.replace(args, group=None)
        try:
            self.decide(same, parent)
        except PermissionError as err:
            return err.strerror or str(err) if self._possible(same, parent) else ""
        except OSError:  # the agent will not start at all
            pass
        return ""

    def _possible(self, args: wire.Spawn, parent: Proc) -> bool:
        """Whether the spawn is possible if a person allows it."""
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
        if not confined and not wish.level and self._wanted(group).level != "none":  # the parent may do all anyway
            wish = msgspec.structs.replace(wish, read=[], write=[])
        if confined and hosts.are_named(wish.net or rules.net) and self.offer.level != LEVELS[-1]:
            raise wire.error(errno.ENOTSUP, f"sandbox: --net HOST needs a cage, not possible here: {self.offer.reason}")
        program = wish.script or wish.program or args.target
        place = boxes.workspace(self._folder, group, program, args.name or "") if confined else ""
        return boxes.of_person(wish, rules, place)

    def environment(self, args: wire.Spawn, parent: Proc | None, box: Box | None) -> dict[str, str]:
        """The part of its environment that the agent gets. A confined agent's child gets all: the confined agent itself
        has only what passed the list. Not so a program from outside, which is not confined: its box is for its
        tools."""
        if box is None:
            return args.env
        if parent is not None and parent.box is not None and not parent.outside:
            return boxes.at_home(args.env, box)
        group = group_of_child(parent, args.group, allowed=True)  # `decide` has checked it
        allowed = (*self.of_group(group).env, *args.sandbox.env)
        return boxes.at_home(boxes.environment(args.env, allowed), box)

    def of_group(self, group: str) -> SandboxSettings:
        """The rules of a group on this machine: if the machine lacks its level, the next lower one; the log reports
        that."""
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
        """One line for each setting that this machine cannot satisfy."""
        wanted = {name: rules.level for name, rules in self._groups.items()}
        if self._chosen:
            wanted = {"": self.rules.level} | wanted
        else:  # groups without a level have the default, too
            wanted = {name: level for name, level in wanted.items() if level != self.rules.level}
        return [
            f"sandbox {level}{f' of group {name}' if name else ''} is not possible here, agents run in "
            f"{self.offer.level}: {self.offer.reason}"
            for name, level in wanted.items()
            if LEVELS.index(level) > LEVELS.index(self.offer.level)
        ]

    def notes(self) -> list[str]:
        """The lines for the person who starts aiosd: warnings, and the level in force if the default is not
        possible."""
        if self._chosen or self.of_group("").level == self.rules.level:
            return self.warnings()
        words = {"none": "agents run without a sandbox", "flat": "agents run in flat, not in a cage"}
        return [f"{words[self.offer.level]}: {self.offer.reason}", *self.warnings()]


def folder(data: os.PathLike[str]) -> str:
    """The folder of the workspaces, without links in its path, because a cage follows none."""
    return os.path.realpath(os.path.join(data, "workspaces"))
