"""The settings of a core. Imports nothing heavy: supervisor, configuration and CLI use it, too."""

from __future__ import annotations

from dataclasses import dataclass

from aiosd.budgets.price import Price

#: The least number of tokens per slot without a setting, if the model was trained for it (see `room.py`).
DEFAULT_CTX = 2048

#: The backend that runs a model in the core's own process, with llama.cpp.
LOCAL = "aiosd.llm.local:open_model"

#: … and the one for a model that another server runs.
REMOTE = "aiosd.llm.remote.backend:open_model"

#: llama.cpp's own limit on sequences in one context.
MAX_SLOTS = 256

#: How positions beyond those of the training are handled, as llama.cpp numbers it.
ROPE_SCALING = {"none": 0, "linear": 1, "yarn": 2, "longrope": 3}

YARN = ("yarn_orig_ctx", "yarn_ext_factor", "yarn_attn_factor", "yarn_beta_fast", "yarn_beta_slow")


@dataclass(frozen=True, slots=True)
class Lora:
    """A LoRA adapter: `--lora NAME=PATH[:SCALE]`."""

    name: str
    path: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One `--model` of the command line with the options that go with it.

    `ctx` and `slots` are honoured as given or refused with the reason; None leaves the choice to the core.
    """

    name: str
    path: str = ""  # its file; "": it has none on this machine
    backend: str = LOCAL  # what runs it, see backend.py
    ctx: int | None = None  # tokens per slot; None: as many as model and memory allow
    slots: int | None = None  # None: as many as fit into kv_memory, at most 32; unified: 32
    threads: int | None = None  # None: measured at the start
    gpu_layers: int = 0  # -1: all
    flash_attention: str = "auto"  # on, off; auto: our own on a CPU, llama.cpp's choice on a GPU
    kv_type: str = "f16"  # or q8_0: how keys and values are kept
    kv_layout: str = "auto"  # streams: each slot has its own cells; unified: all share them; auto: that on a GPU
    lookahead: int | None = None  # guessed tokens that a step computes at most; 0: none; None: as many as pay
    exact: bool = False  # same logits bit for bit whatever else is in the batch; CPU only
    kv_memory: int | None = None  # bytes for the KV cache; None: a quarter of the memory that is free
    context_ram: int | None = None  # bytes for contexts that have no slot; None: an eighth of the free memory
    context_disk: int = 2 << 30  # bytes of disk for those that do not fit there either
    folder: str = ""  # where contexts on disk lie; '': nowhere
    verbose: bool = False  # llama.cpp's own log to stderr
    vectors_only: bool = False  # it makes vectors and does not generate: see `embedcore`
    lora: tuple[Lora, ...] = ()  # adapters that calls may ask for
    chat_template_file: str = ""  # instead of the template in the model's file
    override_tensor: tuple[tuple[str, str], ...] = ()  # where tensors lie: pattern of their names, kind of buffer
    cpu_moe: bool = False  # the weights of all experts stay in main memory
    n_cpu_moe: int = 0  # … or those of this number of layers, the first
    # RoPE, as in llama.cpp; None: as in the model's file
    rope_scaling: str | None = None
    rope_freq_base: float | None = None
    rope_freq_scale: float | None = None
    yarn_orig_ctx: int | None = None
    yarn_ext_factor: float | None = None
    yarn_attn_factor: float | None = None
    yarn_beta_fast: float | None = None
    yarn_beta_slow: float | None = None
    url: str = ""  # the server of a remote model (REMOTE); the following fields are for such a model alone
    model: str = ""  # its name there
    key_file: str = ""  # a file that holds the key to it; '': none is needed
    concurrency: int = 8  # requests at a time
    rpm: int = 0  # requests in a minute; 0: no limit
    tpm: int = 0  # tokens in a minute; 0: no limit
    price: Price | None = None  # None: a local model costs nothing, the price of a remote one is not known

    @property
    def rope(self) -> dict[str, int | float]:
        """The RoPE options that were given, by the names of llama.cpp's parameters."""
        names = ("rope_freq_base", "rope_freq_scale", *YARN)
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given if self.rope_scaling is None else {"rope_scaling_type": ROPE_SCALING[self.rope_scaling], **given}
