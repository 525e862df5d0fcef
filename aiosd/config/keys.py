"""`KEYS`: the only list of settings. File, environment and command line are all read with it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aiosd.budgets import limits, price
from aiosd.config.values import (
    DEFAULT_QUANTUM,
    any_text,
    files,
    folders,
    lookahead,
    loras,
    number,
    one_of,
    places,
    quantum,
    routes,
    seconds,
    shares,
    size,
    size_or_none,
    switch,
    text,
    whole,
)
from aiosd.ipc import endpoint
from aiosd.ipc.endpoint import Endpoint
from aiosd.llm.spec import MAX_SLOTS, ROPE_SCALING
from aiosd.sandbox import boxgroups
from aiosd.sandbox.box import LEVELS, STRICT

POLICIES = ("fifo", "rr", "priority", "mlfq", "fair")
ORPHANS = ("kill", "term")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
ENV_PREFIX = "AIOSD_"


@dataclass(frozen=True, slots=True)
class Key:
    """One setting. `read` converts a string or a TOML value to its value, or raises ValueError."""

    name: str
    read: Callable[[Any], Any]
    metavar: str
    help: str
    default: Any = None
    per_model: bool = False  # belongs to a ModelSpec; may stand in [[model]]
    many: bool = False  # on the command line it may be repeated; the value is a tuple

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def words(self) -> list[str]:
        """The possible values, if they are listed in `shown`."""
        return [word for word in self.metavar.split("|") if word.islower()] if "|" in self.metavar else []

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


#: The suffix of the file of a table of vectors (`aiosd.store.static`).
TABLE_SUFFIX = ".vectors"

KEYS = (
    Key("policy", one_of(POLICIES), "|".join(POLICIES), "Which calls run next on a model (fair).", "fair"),
    Key("quantum", quantum, "TOKENS[,S]", "How long a call runs on while others wait (64,10).", DEFAULT_QUANTUM),
    Key("shares", shares, "GROUP=N,…", "What groups get under fair, in agents of nice 0.", {}),
    Key("ctx", whole(1), "N", "Tokens per slot (what model and memory allow).", per_model=True),
    Key("slots", whole(1, MAX_SLOTS), "N", "Sequences that run at a time (as many as fit).", per_model=True),
    Key("threads", whole(1, 4096), "N", "Threads of a model (measured at the start).", per_model=True),
    Key("gpu_layers", whole(-1, 1 << 16), "N", "Layers on the GPU; -1: all (0).", 0, per_model=True),
    Key(
        "flash_attention",
        one_of(("auto", "on", "off")),
        "auto|on|off",
        "Attention on a CPU: aiosd's own; llama.cpp's flash; plain.",
        "auto",
        per_model=True,
    ),
    Key("kv_type", one_of(("f16", "q8_0")), "f16|q8_0", "How keys and values are kept (f16).", "f16", per_model=True),
    Key(
        "kv_layout",
        one_of(("auto", "streams", "unified")),
        "auto|streams|unified",
        "Own KV cells for each slot, or common ones for all (auto: common on a GPU).",
        "auto",
        per_model=True,
    ),
    Key("lookahead", lookahead, "auto|off|N", "Guessed tokens computed in a step (as many as pay).", per_model=True),
    Key("exact", switch, "", "Same output bit for bit, whatever else runs. CPU only, slower.", False, per_model=True),
    Key("kv_memory", size, "SIZE", "Memory for slots, such as 2G (a quarter of what is free).", per_model=True),
    Key("context_ram", size, "SIZE", "Memory for contexts without a slot (1/8 of what is free).", per_model=True),
    Key("context_disk", size, "SIZE", "Disk for contexts that do not fit there (2G).", 2 << 30, per_model=True),
    Key(
        "lora",
        loras,
        "NAME=PATH[:SCALE]",
        "An adapter that calls may choose; may be repeated.",
        (),
        per_model=True,
        many=True,
    ),
    Key("chat_template_file", text, "FILE", "A chat template instead of the model's.", "", per_model=True),
    Key(
        "override_tensor",
        places,
        "PATTERN=BUFFER",
        "Where tensors lie, as in llama.cpp.",
        (),
        per_model=True,
        many=True,
    ),
    Key("cpu_moe", switch, "", "Weights of experts stay in main memory.", False, per_model=True),
    Key("n_cpu_moe", whole(0, 4096), "N", "Weights of experts of the first N layers only (0).", 0, per_model=True),
    Key("rope_scaling", one_of(tuple(ROPE_SCALING)), "|".join(ROPE_SCALING), "For longer contexts.", per_model=True),
    Key("rope_freq_base", number(1, 1e12), "F", "RoPE's base frequency (the model's).", per_model=True),
    Key("rope_freq_scale", number(1e-6, 1e3), "F", "RoPE's scale; 0.25: for four times the context.", per_model=True),
    Key("yarn_orig_ctx", whole(1), "N", "YaRN: tokens of the training.", per_model=True),
    Key("yarn_ext_factor", number(0, 1e3), "F", "YaRN: extrapolation mix.", per_model=True),
    Key("yarn_attn_factor", number(0, 1e3), "F", "YaRN: factor of attention.", per_model=True),
    Key("yarn_beta_fast", number(0, 1e6), "F", "YaRN: low correction.", per_model=True),
    Key("yarn_beta_slow", number(0, 1e6), "F", "YaRN: high correction.", per_model=True),
    Key("verbose", switch, "", "Show the messages of llama.cpp.", False, per_model=True),
    Key("key_file", text, "FILE", "The key to a model at a URL; keyring:NAME.", "", per_model=True),
    Key("concurrency", whole(1, 256), "N", "Requests to such a model at a time (8).", 8, per_model=True),
    Key("rpm", whole(0), "N", "Requests to such a model in a minute (no limit).", 0, per_model=True),
    Key("tpm", whole(0), "N", "Tokens of such a model in a minute (no limit).", 0, per_model=True),
    Key("price", price.read, "IN,OUT[,CACHED]", "What a million of its tokens cost.", per_model=True),
    Key(
        "route",
        routes,
        "NAME=MODEL,…",
        "A name for several models, of which the first that can answers; may be repeated.",
        (),
        many=True,
    ),
    Key("log_level", one_of(LOG_LEVELS), "|".join(LOG_LEVELS), "How much is logged (info).", "info"),
    Key(
        "keep_dead", whole(0, 1_000_000), "N", "How many ended agents are kept in the history, with logs (1000).", 1000
    ),
    Key(
        "sandbox",
        one_of((*LEVELS, STRICT)),
        "|".join((*LEVELS, STRICT)),
        "How agents are confined (cage, or what this machine can do); strict: in the cage, or aiosd does not start.",
        "cage",
    ),
    Key("net", boxgroups.net, "all|none|gateway|HOST,…", "Which network confined agents have (all).", "all"),
    Key(
        "soft_limit",
        limits.read_percent,
        "PERCENT",
        "At this part of a budget its agent gets a message; 0: never (0).",
        0,
    ),
    Key(
        "orphans",
        one_of(ORPHANS),
        "|".join(ORPHANS),
        "How processes that outlive their agent are ended (kill).",
        "kill",
    ),
    Key(
        "log_size",
        size_or_none(4096),
        "SIZE",
        "How large an agent's log gets until a new file begins; 0: no limit (64M).",
        64 << 20,
    ),
    Key("log_keep", whole(1, 1000), "N", "How many full files of a log are kept beside it (3).", 3),
    Key("store_ram", size, "SIZE", "Memory for copies of notes, such as 64M (32M).", 32 << 20),
    Key("owner_ram", size_or_none(4096), "SIZE", "The same for each owner; 0: a quarter of all (0).", 0),
    Key("note_quota", size, "SIZE", "Notes that each owner may keep on the disk (64M).", 64 << 20),
    Key("file_quota", size, "SIZE", "Files that each owner may keep, with old versions and trash (4G).", 4 << 30),
    Key("file_versions", whole(1, 1_000_000), "N", "Versions kept of a file; the oldest goes first (100).", 100),
    Key("store_folders", folders, "DIR,…", "Folders that agents may mount; DIR=write: for writing, too (none).", ()),
    Key("tools", files, "FILE[:FILE…]", "Python files with more tools for agents (libaios.tool.define).", ()),
    Key("tool_workers", whole(1, 256), "N", "Calls of tools that run at a time (8).", 8),
    Key(
        "embed_model",
        any_text,
        "MODEL",
        "Makes vectors of notes: a GGUF or a table (none).",
        "",
    ),
    Key("index_ram", size, "SIZE", "Memory for vectors that are searched (256M).", 256 << 20),
    Key(
        "gateway",
        endpoint.read,
        "auto|off|[HOST:]PORT,…",
        "Where programs find the OpenAI API, and further ports where it is, too: 0,11434 (auto: any free port).",
        Endpoint(),
    ),
    Key(
        "template_idle",
        seconds,
        "S",
        "A template (aios-run --preload) that has no work ends after S seconds (600).",
        600.0,
    ),
    Key("stop_timeout", seconds, "S", "At the end agents get TERM, and KILL after S seconds (5).", 5.0),
)
BY_NAME = {key.name: key for key in KEYS}
PER_MODEL = {key.name for key in KEYS if key.per_model}

#: What SIGHUP and `aiosd set` can change in a running system: keys, and the fields of Settings.
LIVE = {
    "policy": "policy",
    "quantum": "quantum",
    "shares": "shares",
    "log_level": "log_level",
    "stop_timeout": "stop_timeout_s",
}
