"""LoRA adapters: small changes to a model's weights, chosen by each call.

llama.cpp applies one adapter to a whole batch. So calls with different adapters are never in one batch: adapters take
turns in decode steps (`AdapterTurns`). What the model computes for a prompt depends on the adapter, so computed state
is not shared between adapters (`scope`).
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from aiosd.errors import UsageError, WorldError
from aiosd.llm import modelfile
from aiosd.llm.spec import Lora, ModelSpec

if TYPE_CHECKING:
    from aiosd.llm.llama import Model
    from aiosd.llm.sequence import Sequence

#: An adapter keeps its turn for this number of steps while others wait: after a change llama.cpp plans its graphs anew.
#: A step in which each call gets several tokens (`lookahead`) counts as that number of steps: it takes longer, too.
STEPS = 8


def scope(group: str, lora: str) -> str:
    """The name under which computed prompts are shared: group and adapter. No group has a NUL in its name."""
    return f"{group}\0{lora}" if lora else group


def size(spec: ModelSpec) -> int:
    """Bytes of all adapters. Raises UsageError for a file that cannot be one."""
    return sum(_checked(spec, lora).size for lora in spec.lora)


def _checked(spec: ModelSpec, lora: Lora) -> modelfile.ModelFile:
    file = modelfile.read(lora.path)
    kind = file.text("general.type") or "model"
    if kind != "adapter" or file.text("adapter.type") != "lora":
        other = f"an adapter of another kind ({file.text('adapter.type')})" if kind == "adapter" else f"a {kind}"
        raise UsageError(f"--lora {lora.name}: {lora.path}: no LoRA adapter but {other}")
    return file


def load(spec: ModelSpec, model: Model, architecture: str) -> None:
    """Load all adapters into the model. Raises UsageError with one line."""
    for lora in spec.lora:
        file = _checked(spec, lora)
        if file.architecture != architecture:
            raise UsageError(
                f"--lora {lora.name}: {lora.path}: made for a model of type {file.architecture}, not {architecture}"
            )
        if "adapter.alora.invocation_tokens" in file.meta:
            raise UsageError(f"--lora {lora.name}: {lora.path}: it works after certain tokens only, which is not done")
        try:
            model.add_adapter(lora.name, lora.path, lora.scale)
        except WorldError as error:
            raise UsageError(f"--lora {lora.name}: {lora.path}: {error}") from error


def fingerprints(spec: ModelSpec) -> dict[str, str]:
    """A fingerprint of each adapter, for saved states. Reads all files: not for the decoding thread."""
    found = {}
    for lora in spec.lora:
        with open(lora.path, "rb") as file:
            found[lora.name] = f"{hashlib.file_digest(file, 'sha256').hexdigest()} × {lora.scale:g}"
    return found


class AdapterTurns:
    """Which adapter's calls are decoded in a step. Promise: while calls with n adapters are ready, each adapter has
    STEPS of any n × STEPS steps in a row (the calls without one count as an adapter)."""

    def __init__(self) -> None:
        self._turn = ""
        self._steps = 0

    def of(self, ready: list[Sequence]) -> list[Sequence]:
        """The calls of `ready` whose adapter has its turn; the same list if these are all."""
        names = sorted({sequence.lora for sequence in ready})
        if self._turn not in names or (self._steps >= STEPS and len(names) > 1):
            later = [name for name in names if name > self._turn]
            self._turn, self._steps = (later or names)[0], 0
        return ready if len(names) == 1 else [sequence for sequence in ready if sequence.lora == self._turn]

    def done(self, calls: int, tokens: int) -> None:
        """Count a step of the adapter whose turn it is: its number of calls, and of tokens that it has brought."""
        self._steps += max(tokens // calls, 1)
