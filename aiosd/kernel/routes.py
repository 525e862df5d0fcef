"""Routes: names for lists of models. A call that names a route goes to the first model of the list that can take it,
and on to the next when that one fails before the caller got anything.

A model is skipped while it is down, while it would make the call wait long (its rate is used up, its circuit is open:
`Core.trouble`), and for calls with tools if its template takes none. If all are skipped, the first one gets the call.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from aiosd.budgets.price import Price
from libaios import wire

logger = logging.getLogger("kernel.routes")


class Member(Protocol):
    """The part of `cores.Core` that a route looks at."""

    @property
    def model(self) -> str: ...
    @property
    def info(self) -> wire.ModelInfo | None: ...
    @property
    def trouble(self) -> str: ...
    @property
    def price(self) -> Price | None: ...


@dataclass(slots=True, eq=False)
class ModelRoute:
    name: str
    cores: Sequence[Member]
    served: Counter[str] = field(default_factory=Counter)  # calls, by model
    passed_over: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, str] = field(default_factory=dict)  # why each was skipped or failed the last time
    _last: str = ""  # the model that had the last call

    def choose(self, request: wire.Generate, tried: set[str], money: int | None = None) -> str | None:
        """The model that gets a call of an agent with this much money left (None: it has no budget of money). None: all
        have been tried."""
        found = None
        for core in (core for core in self.cores if core.model not in tried):
            found = found or core
            trouble = _trouble(core, request, money)
            if not trouble:
                return self._take(core)
            self.passed_over[core.model] += 1
            self.reasons[core.model] = trouble
        return None if found is None else self._take(found)

    def failed(self, model: str, why: str) -> None:
        """A model got the call and could not serve it."""
        self.passed_over[model] += 1
        self.reasons[model] = why

    def _take(self, core: Member) -> str:
        self.served[core.model] += 1
        if core.model != self._last and (self._last or core is not self.cores[0]):
            over = ", ".join(f"{model}: {why}" for model, why in self.reasons.items() if model != core.model)
            logger.warning("route %s: %s serves now (%s)", self.name, core.model, over)
        self._last = core.model
        return core.model

    @property
    def info(self) -> wire.ModelInfo:
        """The route as one more model, with the capabilities that all of its models have."""
        infos = [core.info for core in self.cores if core.info is not None]
        return wire.ModelInfo(
            name=self.name,
            description=f"route: {', '.join(core.model for core in self.cores)}",
            n_ctx=min((info.n_ctx for info in infos), default=0),
            chat=any(info.chat for info in infos),
            tools=any(info.tools for info in infos),
            route=[core.model for core in self.cores],
        )

    def shown(self) -> dict[str, Any]:
        """For `aiosd status`."""
        return {
            "name": self.name,
            "models": [
                {
                    "name": core.model,
                    "calls": self.served[core.model],
                    "passed_over": self.passed_over[core.model],
                    "why": self.reasons.get(core.model, ""),
                    "trouble": core.trouble,
                }
                for core in self.cores
            ],
        }


def _trouble(core: Member, request: wire.Generate, money: int | None) -> str:
    """Why this model cannot take the call; "": it can."""
    if core.trouble:
        return core.trouble
    if money is not None and core.price is None:
        return "its price is not known"
    if money == 0 and core.price is not None and not core.price.is_free:
        return "no money is left"
    if request.tools and core.info is not None and not core.info.tools:
        return "it takes no tools"
    return ""


class Routes:
    """The routes of the settings. `find`: returns a core by the name of its model; cores may be added later."""

    def __init__(self, find: Callable[[str], Member | None], names: Mapping[str, Sequence[str]]) -> None:
        self._find = find
        self._names = names
        self._routes: dict[str, ModelRoute] = {}

    def __iter__(self) -> Iterator[ModelRoute]:
        return iter([route for name in self._names if (route := self.find(name)) is not None])

    def find(self, name: str | None) -> ModelRoute | None:
        if name is None or name not in self._names:
            return None
        route = self._routes.get(name)
        if route is None:
            found = [self._find(model) for model in self._names[name]]
            route = self._routes[name] = ModelRoute(name, [core for core in found if core is not None])
        return route
