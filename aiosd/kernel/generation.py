"""The kernel's record of one generation: enough to start it again on a new core, and to charge for it."""

from __future__ import annotations

from dataclasses import dataclass, field

from aiosd.kernel.routes import ModelRoute
from libaios import wire


@dataclass(slots=True, eq=False)
class OpenGeneration:
    request: wire.Generate
    model: str
    progress: wire.Progress  # all that was given out, `request.given` included
    texts: list[str] = field(default_factory=list)  # text not yet sent to a caller that does not stream …
    logprobs: wire.Logprobs = field(default_factory=list)  # … and its log probabilities, if requested
    mu: float | None = None  # mirostat's state after `progress`, where the call uses it
    new_from: int = 0  # how long `progress` was when this kernel got the call
    budget: int | None = None  # tokens left when it was submitted, and used since
    used: int = 0
    started: bool = False  # it has a slot
    prompt_counted: bool = False  # the core that has it has reported the prompt's tokens
    route: ModelRoute | None = None  # that its caller has named
    tried: set[str] = field(default_factory=set)  # the models of the route that had the call
    others: bool = False  # … and there are others
    ending: bool = False  # its end has been reported
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: int = 0  # in 10^-12 of the currency's unit
    ctx_tokens: int = 0
    paused: bool = False  # its reader is slow
    resyncing: bool = False  # the core was asked to send the missing tokens again

    def restart(self, model: str) -> None:
        """Start from the beginning with another model. The usage before stays counted."""
        self.model = model
        self.tried.add(model)
        self.others = self.route is not None and len(self.tried) < len(self.route.cores)
        self.progress, self.new_from = wire.Progress(), 0
        self.texts, self.logprobs, self.mu, self.ctx_tokens = [], [], None, 0
        self.started = self.prompt_counted = self.paused = self.resyncing = False
