"""What a core is told at its start. Imports nothing heavy: supervisor, configuration and CLI use it too."""

from __future__ import annotations

from dataclasses import dataclass

#: Tokens per slot when the user says nothing.
DEFAULT_CTX = 2048

#: The backend that runs a model in the core's own process, with llama.cpp.
LOCAL = "aiosd.llm.local:open_model"

#: llama.cpp's own limit on sequences in one context.
MAX_SLOTS = 256


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One `--model` of the command line with the options that go with it.

    `ctx` and `slots` are honoured as given or refused with the reason; None leaves the choice to the core.
    """

    name: str
    path: str = ""  # its file; "": it has none on this machine
    backend: str = LOCAL  # what runs it, see backend.py
    ctx: int | None = None  # tokens per slot; None: DEFAULT_CTX
    slots: int | None = None  # None: as many as fit into kv_memory, at most 32
    threads: int | None = None  # None: measured at the start
    gpu_layers: int = 0  # -1: all
    flash_attention: str = "auto"  # on, off; auto: our own on a CPU, llama.cpp's choice on a GPU
    kv_type: str = "f16"  # or q8_0: how keys and values are kept
    exact: bool = False  # same logits bit for bit whatever else is in the batch; CPU only
    kv_memory: int | None = None  # bytes for the KV cache; None: a quarter of the memory that is free
    context_ram: int | None = None  # bytes for contexts that have no slot; None: an eighth of the free memory
    context_disk: int = 2 << 30  # bytes of disk for those that do not fit there either
    folder: str = ""  # where contexts on disk lie; '': nowhere
    verbose: bool = False  # llama.cpp's own log to stderr
    vectors_only: bool = False  # it embeds texts and does not generate: see `embedcore`
