"""How the KV cache is divided among slots: `--kv-layout`.

- `streams`: each slot has a stream of its own. Attention reads only the slots of a batch, and on a CPU aiosd's own
  attention reads a shared beginning in the store, once for all (`attention.py`, `bases.py`).
- `unified`: all slots share one set of cells (`cells.py`). Slots share a beginning without a copy, batches hold prompts
  of all lengths, and a slot may grow as long as there are cells. For every row, attention goes through all cells in use
  and masks those of other slots: a GPU has enough arithmetic for that, a CPU has not.

`auto` is unified where layers run on a GPU. Where a model keeps more than plain keys and values, it is streams.
"""

from __future__ import annotations

from dataclasses import dataclass

from aiosd.errors import UsageError
from aiosd.llm.modelfile import ModelFile
from aiosd.llm.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class KvLayout:
    unified: bool
    why: str  # for people


def choose(spec: ModelSpec, file: ModelFile, on_gpu: bool) -> KvLayout:
    """`on_gpu`: layers run on a GPU. Raises UsageError if the setting is not possible."""
    against = _against_unified(spec, file)
    if spec.kv_layout == "unified":
        if against:
            raise UsageError(f"--kv-layout unified: {against}")
        return KvLayout(True, "asked for")
    if spec.kv_layout == "streams":
        return KvLayout(False, "asked for")
    if not on_gpu:
        return KvLayout(False, "all layers run on the CPU")
    return KvLayout(False, against) if against else KvLayout(True, "layers run on a GPU")


def _against_unified(spec: ModelSpec, file: ModelFile) -> str:
    """Why slots cannot share cells, '' if they can."""
    if spec.exact:
        return "--exact: the order of sums depends on what lies in other slots"
    if file.state_bytes():
        return "the model keeps a recurrent state"
    if file.number("attention.sliding_window"):
        return "the model has a sliding window: llama.cpp gives cells beyond it to other slots"
    return ""
