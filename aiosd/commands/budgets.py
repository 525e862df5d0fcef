"""Options for budgets, for the commands that make agents. They are made from `limits.KINDS`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import click

from aiosd.budgets import limits
from aiosd.commands import edge
from aiosd.units import parse_duration
from libaios.wire import Limits

Command = Callable[..., int]


class Duration(edge.SecondsType):
    """A number of seconds, or a length of time with units."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                value = parse_duration(value)
        return super().convert(value, param, ctx)


class AmountType(click.ParamType[float]):
    """The amount of a budget, read as in aiosd.toml."""

    def __init__(self, kind: limits.Kind) -> None:
        self.kind = kind
        self.name = kind.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            amount: float = self.kind.read(value)
            return amount
        except ValueError as err:
            self.fail(str(err), param, ctx)


def options(kinds: Sequence[limits.Kind], soft: bool = False) -> Callable[[Command], Command]:
    """An option for each of these kinds, passed as `budget_NAME`; `soft`: and one for their messages."""

    def add(command: Command) -> Command:
        if soft:
            percent = click.IntRange(0, 100)
            words = "Send it a message when that much of a budget is used, such as 80."
            command = click.option("--soft-limit", "budget_soft_limit", type=percent, metavar="PERCENT", help=words)(
                command
            )
        for kind in reversed(kinds):
            amount = Duration(min=0) if kind.metavar == "S" else AmountType(kind)
            option = click.option(
                kind.flag, f"budget_{kind.name}", type=amount, metavar=kind.metavar, help=f"Budget: {kind.help}"
            )
            command = option(command)
        return command

    return add


def limits_of(amounts: Mapping[str, float | None]) -> Limits:
    """The limits that these options give."""
    return limits.limits_of({name.removeprefix("budget_"): amount for name, amount in amounts.items()})
