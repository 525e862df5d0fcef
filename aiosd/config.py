"""Settings of one system: flags over environment over file over defaults.

    # aiosd.toml                            environment, flag
    policy = "fair"                         AIOSD_POLICY, --policy
    quantum = "64,10"                       tokens, and seconds
    shares = { web = 4, batch = 0.5 }       AIOSD_SHARES="web=4,batch=0.5"
    ctx = 4096                              AIOSD_CTX, --ctx
    slots = 16
    kv_memory = "2G"

    [[model]]                               AIOSD_MODEL (several: with ':' between), --model
    name = "writer"
    path = "models/writer.gguf"             as seen from the folder of the file; or a name (`aiosd models`)
    slots = 4                               for this model alone

    [[model]]                               one that another server runs, behind OpenAI's API
    url = "https://host/v1"
    model = "its-name-there"                --model NAME=https://host/v1#its-name-there
    key_file = "host.key"                   or "keyring:NAME": a key of that name in Linux's user keyring
    concurrency = 8                         requests at a time; rpm, tpm: requests and tokens in a minute
    price = "0.15,0.60"                     of a million tokens of prompt, and of answer

    [access]                                what agents may do; see aiosd.access.table
    deny = [{ tool = "shell", by = "web" }]

    [route]                                 names for lists of models: the first that can answers
    fast = ["writer", "its-name-there"]     AIOSD_ROUTE="fast=writer,big;deep=big", --route fast=writer,big

    [mcpServers.git]                        tools of an MCP server, as other programs configure them
    command = "mcp-server-git"

    [[agent]]                               starts with the system; see aiosd.autostart
    file = "agents/planner.py"

    [[group]]                               how its agents are confined; see aiosd.sandbox.boxgroups
    name = "web"
    sandbox = "flat"
    tokens = 1000000                        what they may use together, see aiosd.limits,
    each = { time = "10m" }                 … and what each may that a person starts

`KEYS` is the only list of settings; file, environment and command line are all read with it. An unknown key is an
error with its place, not silently ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiosd import autostart, endpoint, limits, price, sealed
from aiosd.access import table as access_table
from aiosd.access.rules import Policy
from aiosd.autostart import AgentSpec
from aiosd.endpoint import Endpoint
from aiosd.errors import AiosdError, UsageError, WorldError
from aiosd.limits import GroupLimits
from aiosd.link import Schedule
from aiosd.llm.spec import MAX_SLOTS, REMOTE, ROPE_SCALING, Lora, ModelSpec
from aiosd.models import found
from aiosd.models.places import ours
from aiosd.sandbox import boxgroups
from aiosd.sandbox.box import LEVELS, NETS, STRICT, Rules
from aiosd.tools.spec import BUILT_IN_KINDS, McpServer, read_servers
from aiosd.units import format_size, parse_size
from libaios.home import Home
from libaios.wire import NAME_PATTERN

if TYPE_CHECKING:
    from aiosd.service import Service

POLICIES = ("fifo", "rr", "priority", "mlfq", "fair")
ORPHANS = ("kill", "term")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
ENV_PREFIX = "AIOSD_"
URLS = ("http://", "https://")
KEYRING = "keyring:"  # a key is there and not in a file (`aiosd.llm.remote.keys`)


# ── what there is to set ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Key:
    """One setting. `read` converts a string or a TOML value to its value, or raises ValueError."""

    name: str
    read: Callable[[Any], Any]
    metavar: str
    help: str
    default: Any = None
    per_model: bool = False  # belongs to a ModelSpec; may stand in [[model]]
    many: bool = False  # on the command line it may be given again and again; the value is a tuple

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def words(self) -> list[str]:
        """What there is to choose from, where that is written down."""
        return [word for word in self.metavar.split("|") if word.islower()] if "|" in self.metavar else []

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")


def _whole(low: int, high: int = 1 << 31) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{value!r} is no whole number")
        if not low <= value <= high:
            limits = f"at least {low}" if high == 1 << 31 else f"from {low} to {high}"
            raise ValueError(f"{value} is out of range ({limits})")
        return value

    return read


def _seconds(value: Any) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is no number of seconds") from None
    if not 0 <= seconds <= 1e9:
        raise ValueError(f"{value} is out of range (from 0 to 1000000000)")
    return seconds


def _number(low: float, high: float) -> Callable[[Any], float]:
    def read(value: Any) -> float:
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or math.isnan(number):
            raise ValueError(f"{value!r} is no number")
        if not low <= number <= high:
            raise ValueError(f"{value} is out of range (from {low:g} to {high:g})")
        return number

    return read


def _pairs(value: Any, sample: str) -> list[tuple[str, str]]:
    """ "a=1,b=2" · ["a=1", "b=2"]"""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) for item in items):
        raise ValueError(f"{value!r} is not of the form {sample}")
    pairs = [part.strip().partition("=") for item in items for part in item.split(",") if part.strip()]
    if not pairs or not all(name and equals and rest for name, equals, rest in pairs):
        raise ValueError(f"{value!r} is not of the form {sample}")
    return [(name, rest) for name, _, rest in pairs]


def _loras(value: Any) -> tuple[Lora, ...]:
    """ "sql=sql.gguf" · "sql=sql.gguf:0.5,chat=chat.gguf" · a list of these"""
    return tuple(_lora(name, rest) for name, rest in _pairs(value, "NAME=PATH[:SCALE]"))


def _lora(name: str, rest: str) -> Lora:
    path, colon, scale = rest.rpartition(":")
    try:
        number = float(scale) if colon else 1.0
    except ValueError:  # a colon in the path
        path, colon, number = rest, "", 1.0
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > 64:
        raise ValueError(f"{name!r} is no name for an adapter")
    if not -1000 <= number <= 1000 or number == 0:
        raise ValueError(f"{name}: a scale of {scale} is out of range (from -1000 to 1000, not 0)")
    return Lora(name, path if colon else rest, number)


def _places(value: Any) -> tuple[tuple[str, str], ...]:
    return tuple(_pairs(value, "PATTERN=BUFFER"))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r} is no text")
    return value


def _one_of(words: Sequence[str]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if not isinstance(value, str) or value.lower() not in words:
            raise ValueError(f"{value!r} is none of {', '.join(words)}")
        return value.lower()

    return read


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    known = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if not isinstance(value, str) or value.lower() not in known:
        raise ValueError(f"{value!r} is neither true nor false")
    return known[value.lower()]


def _size(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError(f"{value!r} is no size (such as 512M or 2G)")
    return parse_size(str(value))


def _size_or_none(low: int) -> Callable[[Any], int]:
    """0 means that there is no limit."""

    def read(value: Any) -> int:
        size = 0 if str(value).strip() == "0" and not isinstance(value, bool) else _size(value)
        if 0 < size < low:
            raise ValueError(f"{value} is out of range (from {format_size(low)}, or 0: no limit)")
        return size

    return read


def _quantum(value: Any) -> tuple[int, float]:
    """64 · "64,10" · [64, 10]"""
    parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
    if not 1 <= len(parts) <= 2:
        raise ValueError(f"{value!r} is no quantum (such as 64, or 64,10: tokens and seconds)")
    tokens = _whole(1, 1_000_000)(parts[0])
    seconds = _seconds(parts[1]) if len(parts) == 2 else DEFAULT_QUANTUM[1]
    if seconds < 0.001:
        raise ValueError(f"{parts[1]} is out of range (from 0.001 seconds on)")
    return tokens, seconds


def _shares(value: Any) -> dict[str, float]:
    """ "web=4,batch=0.5" · {web = 4, batch = 0.5}"""
    if isinstance(value, str):
        value = dict(part.partition("=")[::2] for part in value.split(",") if part.strip())
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no list of shares (such as web=4,batch=0.5)")
    return {name.strip(): _share(name.strip(), share) for name, share in value.items()}


def _share(name: str, value: Any) -> float:
    try:
        share = float(value)
    except (TypeError, ValueError):
        share = 0.0
    if not name or not 0.001 <= share <= 1e6 or isinstance(value, bool):
        raise ValueError(f"{name}={value} is no share of a group (from 0.001 to 1000000)")
    return share


def _routes(value: Any) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """ "fast=small,gpt" · "fast=small,gpt;deep=big,gpt" · {fast = ["small", "gpt"]}"""
    if isinstance(value, str):
        value = {name.strip(): models for name, _, models in (one.partition("=") for one in value.split(";") if one)}
    if not isinstance(value, dict):
        raise ValueError(f"{value!r} is no route (such as fast=small,gpt)")
    return tuple((name, _route(name, models)) for name, models in value.items())


def _route(name: str, value: Any) -> tuple[str, ...]:
    words = value.split(",") if isinstance(value, str) else value
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{name}={value!r} is no list of models (such as fast=small,gpt)")
    models = tuple(dict.fromkeys(word.strip() for word in words if word.strip()))
    if not models or not re.fullmatch(NAME_PATTERN, name) or len(name) > 64:
        raise ValueError(f"{name}={value} is no route (such as fast=small,gpt)")
    return models


def _folders(value: Any) -> tuple[str, ...]:
    """ "/srv/docs,/srv/out=write" · ["/srv/docs", "/srv/out=write"]"""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{value!r} is no list of folders (such as /srv/docs,/srv/out=write)")
    folders = tuple(part.strip() for part in parts if part.strip())
    for folder in folders:
        path, equals, mode = folder.partition("=")
        if not path.startswith("/") or (equals and mode != "write"):
            raise ValueError(f"{folder!r} is neither an absolute path nor one with =write behind it")
    return folders


def _files(value: Any) -> tuple[str, ...]:
    """ "a.py:b.py" · ["a.py", "b.py"]"""
    words = value.split(os.pathsep) if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) for word in words):
        raise ValueError(f"{value!r} is no list of files (such as a.py:b.py)")
    return tuple(word for word in words if word)


def _any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is no text")
    return value


DEFAULT_QUANTUM = (64, 10.0)
#: How the file of a table of vectors ends (`aiosd.store.static`).
TABLE_SUFFIX = ".vectors"

KEYS = (
    Key("policy", _one_of(POLICIES), "|".join(POLICIES), "Who runs next on the model (fair).", "fair"),
    Key("quantum", _quantum, "TOKENS[,S]", "How long a call runs on while others wait (64,10).", DEFAULT_QUANTUM),
    Key("shares", _shares, "GROUP=N,…", "What groups get under fair, in agents of nice 0.", {}),
    Key("ctx", _whole(1), "N", "Tokens per slot (what model and memory allow).", per_model=True),
    Key("slots", _whole(1, MAX_SLOTS), "N", "Sequences that run at a time (as many as fit).", per_model=True),
    Key("threads", _whole(1, 4096), "N", "Threads of a model (measured at the start).", per_model=True),
    Key("gpu_layers", _whole(-1, 1 << 16), "N", "Layers on the GPU; -1: all (0).", 0, per_model=True),
    Key(
        "flash_attention",
        _one_of(("auto", "on", "off")),
        "auto|on|off",
        "Attention on a CPU: aiosd's own; llama.cpp's flash; plain.",
        "auto",
        per_model=True,
    ),
    Key("kv_type", _one_of(("f16", "q8_0")), "f16|q8_0", "How keys and values are kept (f16).", "f16", per_model=True),
    Key("exact", _switch, "", "Same output bit for bit, whatever else runs. CPU only, slower.", False, per_model=True),
    Key("kv_memory", _size, "SIZE", "Memory for slots, such as 2G (a quarter of what is free).", per_model=True),
    Key("context_ram", _size, "SIZE", "Memory for contexts without a slot (1/8 of what is free).", per_model=True),
    Key("context_disk", _size, "SIZE", "Disk for contexts that do not fit there (2G).", 2 << 30, per_model=True),
    Key(
        "lora",
        _loras,
        "NAME=PATH[:SCALE]",
        "An adapter that calls may ask for; again and again.",
        (),
        per_model=True,
        many=True,
    ),
    Key("chat_template_file", _text, "FILE", "A chat template instead of the model's.", "", per_model=True),
    Key(
        "override_tensor",
        _places,
        "PATTERN=BUFFER",
        "Where tensors lie, as in llama.cpp.",
        (),
        per_model=True,
        many=True,
    ),
    Key("cpu_moe", _switch, "", "Weights of experts stay in main memory.", False, per_model=True),
    Key("n_cpu_moe", _whole(0, 4096), "N", "… those of the first N layers (0).", 0, per_model=True),
    Key("rope_scaling", _one_of(tuple(ROPE_SCALING)), "|".join(ROPE_SCALING), "For longer contexts.", per_model=True),
    Key("rope_freq_base", _number(1, 1e12), "F", "RoPE's base frequency (the model's).", per_model=True),
    Key("rope_freq_scale", _number(1e-6, 1e3), "F", "RoPE's scale; 0.25: for four times the context.", per_model=True),
    Key("yarn_orig_ctx", _whole(1), "N", "YaRN: tokens of the training.", per_model=True),
    Key("yarn_ext_factor", _number(0, 1e3), "F", "YaRN: extrapolation mix.", per_model=True),
    Key("yarn_attn_factor", _number(0, 1e3), "F", "YaRN: factor of attention.", per_model=True),
    Key("yarn_beta_fast", _number(0, 1e6), "F", "YaRN: low correction.", per_model=True),
    Key("yarn_beta_slow", _number(0, 1e6), "F", "YaRN: high correction.", per_model=True),
    Key("verbose", _switch, "", "Show what llama.cpp says.", False, per_model=True),
    Key("key_file", _text, "FILE", "The key to a model at a URL; keyring:NAME.", "", per_model=True),
    Key("concurrency", _whole(1, 256), "N", "Requests to such a model at a time (8).", 8, per_model=True),
    Key("rpm", _whole(0), "N", "… and in a minute (no limit).", 0, per_model=True),
    Key("tpm", _whole(0), "N", "Its tokens in a minute (no limit).", 0, per_model=True),
    Key("price", price.read, "IN,OUT[,CACHED]", "What a million of its tokens cost.", per_model=True),
    Key(
        "route",
        _routes,
        "NAME=MODEL,…",
        "A name for several models: the first that can answers; again and again.",
        (),
        many=True,
    ),
    Key("log_level", _one_of(LOG_LEVELS), "|".join(LOG_LEVELS), "How much is logged (info).", "info"),
    Key("keep_dead", _whole(0, 1_000_000), "N", "How many dead agents are remembered, with their logs (1000).", 1000),
    Key(
        "sandbox",
        _one_of((*LEVELS, STRICT)),
        "|".join((*LEVELS, STRICT)),
        "How agents are confined (none); strict: in the cage, or aiosd does not start.",
        "none",
    ),
    Key("net", _one_of(NETS), "|".join(NETS), "Whether confined agents have a network (all).", "all"),
    Key(
        "soft_limit",
        limits.read_percent,
        "PERCENT",
        "At this part of a budget its agent gets a message; 0: never (0).",
        0,
    ),
    Key("orphans", _one_of(ORPHANS), "|".join(ORPHANS), "What processes get that outlive their agent (kill).", "kill"),
    Key(
        "log_size",
        _size_or_none(4096),
        "SIZE",
        "How large an agent's log gets until a new file begins; 0: no limit (64M).",
        64 << 20,
    ),
    Key("log_keep", _whole(1, 1000), "N", "How many full files of a log are kept beside it (3).", 3),
    Key("store_ram", _size, "SIZE", "Memory for copies of notes, such as 64M (32M).", 32 << 20),
    Key("note_quota", _size, "SIZE", "Notes that each owner may keep on the disk (64M).", 64 << 20),
    Key("file_quota", _size, "SIZE", "Files that each owner may keep, with old versions and trash (4G).", 4 << 30),
    Key("file_versions", _whole(1, 1_000_000), "N", "Versions kept of a file; the oldest goes first (100).", 100),
    Key("store_folders", _folders, "DIR,…", "Folders that agents may mount; DIR=write: for writing, too (none).", ()),
    Key("tools", _files, "FILE[:FILE…]", "Python files with more tools for agents (libaios.tool.define).", ()),
    Key("tool_workers", _whole(1, 256), "N", "Calls of tools that run at a time (8).", 8),
    Key(
        "embed_model",
        _any_text,
        "MODEL",
        "Makes vectors of notes: a GGUF or a table (none).",
        "",
    ),
    Key("index_ram", _size, "SIZE", "Memory for vectors that are searched (256M).", 256 << 20),
    Key(
        "gateway",
        endpoint.read,
        "auto|off|[HOST:]PORT",
        "Where programs find the OpenAI API (auto: any free port).",
        Endpoint(),
    ),
    Key(
        "template_idle",
        _seconds,
        "S",
        "A template (aios-run --preload) that has no work ends after S seconds (600).",
        600.0,
    ),
    Key("stop_timeout", _seconds, "S", "At the end agents get TERM, and KILL after S seconds (5).", 5.0),
)
BY_NAME = {key.name: key for key in KEYS}
_PER_MODEL = {key.name for key in KEYS if key.per_model}

#: What SIGHUP and `aiosd set` can change in a running system: keys, and the fields of Settings.
LIVE = {
    "policy": "policy",
    "quantum": "quantum",
    "shares": "shares",
    "log_level": "log_level",
    "stop_timeout": "stop_timeout_s",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How one system runs. Fixed for its life, but for the fields in LIVE."""

    home: Home
    models: tuple[ModelSpec, ...]
    routes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # names for lists of models
    policy: str = "fair"
    quantum: tuple[int, float] = DEFAULT_QUANTUM  # tokens, seconds
    shares: Mapping[str, float] = field(default_factory=dict)  # of groups, in agents of nice 0
    log_level: str = "info"
    keep_dead: int = 1000
    stop_timeout_s: float = 5.0
    template_idle_s: float = 600.0  # of a template without work
    log_size: int = 64 << 20  # bytes of an agent's log before a new file begins; 0: no limit
    log_keep: int = 3  # full files of a log beside the one that is being written
    agents: tuple[AgentSpec, ...] = ()  # those that start with the system;
    sealed: int = -1  # … or a descriptor with them and the MCP servers, see `aiosd.sealed`,
    sealed_digest: str = ""  # … and what tells whether these have changed
    ready_fd: int | None = None  # where to write one line, `ready …` or `error …`, for a starter that waits
    flags: Mapping[str, Any] = field(default_factory=dict)  # the values from the command line, for `reload`
    config: Path | None = None  # a file named on the command line
    cwd: str = "/"  # where relative paths on the command line start
    # What came of the last SIGHUP: its number, settings that changed, settings that wait for a restart, or an error.
    reread: Mapping[str, Any] = field(default_factory=dict)
    orphans: str = "kill"  # or "term": the first signal to a process that outlives its agent
    store_ram: int = 32 << 20
    note_quota: int = 64 << 20
    file_quota: int = 4 << 30
    file_versions: int = 100
    store_folders: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()  # files of tools
    tool_workers: int = 8
    mcp_servers: Mapping[str, McpServer] = field(default_factory=dict)
    index_ram: int = 256 << 20
    embedder: ModelSpec | None = None  # the model that makes vectors of notes,
    embed_table: str = ""  # … or the file of a table that does
    services: tuple[Service, ...] = ()  # besides the cores
    gateway: Endpoint = field(default_factory=Endpoint)  # as it was asked for, …
    door: Endpoint | None = None  # … and where it listens
    sandbox: Rules = field(default_factory=Rules)  # for agents of groups that `groups` does not name
    groups: Mapping[str, Rules] = field(default_factory=dict)
    access: Policy = field(default_factory=Policy)  # what agents may do, …
    access_warnings: tuple[str, ...] = ()  # … and which rules never decide
    budgets: Mapping[str, GroupLimits] = field(default_factory=dict)  # of groups
    soft_limit: int = 0  # percent of a budget at which its agent gets a message
    strict: bool = False  # no agent is confined less than in the cage

    def schedule(self) -> Schedule:
        """The settings that cores get."""
        return Schedule(self.policy, *self.quantum, dict(self.shares))


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────


def load(
    flags: Mapping[str, Any],
    home: Home,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: str | None = None,
    locate: found.Locate = found.find,
) -> Settings:
    """Settings from everywhere. `flags` holds what was given on the command line, by key, and `model`: a list of
    `[NAME=]MODEL`, paths or names that `locate` knows; it may fetch what is not here, which only a command may do.
    Raises UsageError that names the place of what is wrong."""
    environ = os.environ if environ is None else environ
    cwd = _working_directory() if cwd is None else cwd
    path = config or home.config
    file = _read_file(path, must_exist=config is not None)
    file.values |= _with_paths(file.values, str(path.parent))
    values = {key.name: key.default for key in KEYS}
    values |= file.values | _from_environment(environ) | {name: flags[name] for name in BY_NAME if name in flags}
    given = {name for name in _PER_MODEL if name in flags or environ.get(BY_NAME[name].env)}
    words = flags.get("model") or _models_of_environment(environ.get(ENV_PREFIX + "MODEL", ""))
    tables: list[tuple[str, Mapping[str, Any], str]]
    if not words and file.models:
        tables = [(_word(table), table, str(path.parent)) for table in file.models]
    else:
        tables = [(word, {}, cwd) for word in words or [found.NANO]]
    _refuse_for_many(values, len(tables))
    values |= _with_paths(values, cwd)
    models = [_model(word, table, values, given, locate, folder, home) for word, table, folder in tables]
    typed = "tools" in flags or BY_NAME["tools"].env in environ
    tools = _tool_files(values["tools"], cwd if typed else str(path.parent.absolute()))
    table, embedder = _embedder(values, given, file, path, cwd, flags, environ, locate, home)
    _refuse_doubles([*models, *([embedder] if embedder is not None else [])])
    strict = values["sandbox"] == STRICT
    rules = Rules(LEVELS[-1] if strict else values["sandbox"], values["net"])
    policy, warnings = _access(path, file, bool(tools))
    return Settings(
        home=home,
        models=tuple(models),
        routes=_checked_routes(values["route"], models),
        policy=values["policy"],
        quantum=values["quantum"],
        shares=values["shares"],
        log_level=values["log_level"],
        keep_dead=values["keep_dead"],
        stop_timeout_s=values["stop_timeout"],
        template_idle_s=values["template_idle"],
        orphans=values["orphans"],
        store_ram=values["store_ram"],
        note_quota=values["note_quota"],
        file_quota=values["file_quota"],
        file_versions=values["file_versions"],
        store_folders=values["store_folders"],
        index_ram=values["index_ram"],
        embedder=embedder,
        embed_table=table,
        log_size=values["log_size"],
        log_keep=values["log_keep"],
        gateway=values["gateway"],
        agents=tuple(file.agents),
        sandbox=rules,
        groups=_groups(path, file.groups, rules, strict),
        strict=strict,
        access=policy,
        access_warnings=warnings,
        budgets={values["name"]: limits.group_limits_of(values) for _, values in file.groups if "name" in values},
        soft_limit=values["soft_limit"],
        tools=tools,
        tool_workers=values["tool_workers"],
        mcp_servers=file.servers,
        flags=dict(flags),
        config=config,
        cwd=cwd,
    )


def seal(settings: Settings, fd: int) -> Settings:
    """With agents and MCP servers of the file in `fd` instead: the supervisor's memory must not have their keys."""
    content = sealed.write(fd, settings.agents, settings.mcp_servers)
    digest = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(settings, agents=(), mcp_servers={}, sealed=fd, sealed_digest=digest)


def agents_of(settings: Settings) -> tuple[AgentSpec, ...]:
    """Those that start with the system."""
    return settings.agents if settings.sealed < 0 else sealed.agents(settings.sealed)


def reload(settings: Settings) -> tuple[Settings, list[str]]:
    """Read everything again: the settings that are in force now, and the names of those that have changed but
    wait for a restart."""
    new = load(settings.flags, settings.home, settings.config, cwd=settings.cwd)
    if settings.sealed >= 0:
        new = seal(new, os.memfd_create("aios-settings"))
    changed = [f.name for f in dataclasses.fields(Settings) if getattr(new, f.name) != getattr(settings, f.name)]
    live = {*LIVE.values(), "access", "access_warnings"}
    changed = ["agents or mcpServers" if name == "sealed_digest" else name for name in changed]
    own = ("ready_fd", "home", "reread", "door", "sealed")
    waiting = [name for name in changed if name not in live and name not in own]
    return dataclasses.replace(settings, **{name: getattr(new, name) for name in live}), waiting


def reload_and_report(settings: Settings) -> Settings:
    """The same, with what came of it in `reread`. Settings that cannot be read change nothing."""
    report: dict[str, Any] = {"number": settings.reread.get("number", 0) + 1, "changed": [], "after_restart": []}
    report["error"] = ""
    new = settings
    try:
        new, report["after_restart"] = reload(settings)
        shown = [(name, show(settings, name), show(new, name)) for name in LIVE]
        report["changed"] = [f"{name} {now or '-'} (was {was or '-'})" for name, was, now in shown if was != now]
        if new.access != settings.access:
            report["changed"].append(f"access: {len(new.access.rules)} rules (were {len(settings.access.rules)})")
    except AiosdError as err:
        report["error"] = str(err)
    return dataclasses.replace(new, reread=report)


def change(settings: Settings, name: str, text: str) -> Settings:
    """With one of LIVE set anew, as the command line would. Raises ValueError with a sentence."""
    name = name.replace("-", "_")
    if name not in LIVE:
        why = "cannot change in a running system" if name in BY_NAME else f"is no setting{_meant(name, set(LIVE))}"
        raise ValueError(f"{name} {why}")
    try:
        value = BY_NAME[name].read(text)
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from None
    return dataclasses.replace(settings, **{LIVE[name]: value})


def show(settings: Settings, name: str) -> str:
    """One of LIVE, as on the command line."""
    value = getattr(settings, LIVE[name.replace("-", "_")])
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}={part:g}" for key, part in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _model(
    word: str,
    table: Mapping[str, Any],
    values: Mapping[str, Any],
    given: set[str],
    locate: found.Locate,
    folder: str,
    home: Home,
) -> ModelSpec:
    """A model with its options: those given by flag or environment, else its own in the file, else the general
    ones of the file, else the defaults."""
    options = {name: values[name] for name in _PER_MODEL}
    own = {name: value for name, value in table.items() if name in _PER_MODEL and name not in given}
    options |= own | _with_paths(own, folder)
    adapters = [lora.name for lora in options["lora"]]
    if len(set(adapters)) < len(adapters):
        raise UsageError(f"model {word!r}: two adapters of one name: {', '.join(adapters)}")
    name, equals, path = word.partition("=")
    if not equals or "/" in name or ":" in name:
        name, path = "", word
    if not path:
        raise UsageError(f"model {word!r}: a path is missing")
    if path.startswith(URLS):
        return _elsewhere(path, table.get("name") or name, options, folder)
    model = locate(path, folder)
    name = re.sub(r"[\x00-\x20\x7f/]", "_", table.get("name") or name or model.label)[:64]
    return ModelSpec(name=name, path=model.path, folder=str(home.data / "contexts"), **options)


def _embedder(
    values: Mapping[str, Any],
    given: set[str],
    file: _File,
    path: Path,
    cwd: str,
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    locate: found.Locate,
    home: Home,
) -> tuple[str, ModelSpec | None]:
    """A table, or a model, that makes vectors; or neither."""
    word = values["embed_model"]
    if not word:
        return "", None
    in_file = "embed_model" not in flags and not environ.get(BY_NAME["embed_model"].env)
    folder = str(path.parent) if in_file else cwd
    if word.endswith(TABLE_SUFFIX):
        places = [Path(folder, os.path.expanduser(word)), ours() / word]
        table = next((place for place in places if place.is_file()), None)
        if table is None:
            raise UsageError(f"embed_model: {word}: there is no such file; aiosd get-embedder --static makes one")
        return str(table.absolute()), None
    if word.startswith(URLS):
        raise UsageError(f"embed_model: {word}: a model that is served elsewhere makes no vectors here")
    model = _model(word, {}, values, given, locate, folder, home)
    return "", dataclasses.replace(model, vectors_only=True, lora=(), chat_template_file="")


def _with_paths(values: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """Those of the values that hold paths, with full ones, as seen from this folder."""
    found: dict[str, Any] = {}
    if values.get("lora"):
        found["lora"] = tuple(
            dataclasses.replace(lora, path=os.path.join(folder, os.path.expanduser(lora.path)))
            for lora in values["lora"]
        )
    if values.get("chat_template_file"):
        found["chat_template_file"] = os.path.join(folder, os.path.expanduser(values["chat_template_file"]))
    return found


def _refuse_for_many(values: Mapping[str, Any], count: int) -> None:
    """What fits one model only must be said of that model."""
    for name in ("lora", "chat_template_file"):
        if count > 1 and values[name]:
            raise UsageError(f"{BY_NAME[name].flag}: with {count} models, write it under [[model]] in aiosd.toml")


def _word(table: Mapping[str, Any]) -> str:
    """What `--model` would be for a [[model]]."""
    return table["path"] if "path" in table else f"{table['url']}#{table['model']}"


def _elsewhere(address: str, name: str, options: dict[str, Any], folder: str) -> ModelSpec:
    """A model at a URL. Options that only a file needs are ignored."""
    url, _, model = address.partition("#")
    if not model:
        raise UsageError(f"--model {address}: what is its name there? {url}#NAME")
    key_file = options["key_file"]
    if key_file and not key_file.startswith(KEYRING):
        key_file = os.path.join(folder, os.path.expanduser(key_file))
    name = re.sub(r"[\x00-\x20\x7f/]", "_", name or model)[:64]
    limits = {key: options[key] for key in ("concurrency", "rpm", "tpm", "price")}
    return ModelSpec(name=name, backend=REMOTE, url=url, model=model, key_file=key_file, **limits)


def _models_of_environment(text: str) -> list[str]:
    """With ':' between them, as in PATH; with ',' where a name has a colon itself: hf:ORG/NAME:Q4_K_M,nano"""
    apart = "," if any(prefix in text for prefix in (*found.PREFIXES, *URLS)) else os.pathsep
    return [word for word in text.split(apart) if word]


def _refuse_doubles(models: Sequence[ModelSpec]) -> None:
    names: set[str] = set()
    for model in models:
        if model.name in names:
            raise UsageError(
                f"two models named {model.name!r}; give one another name: --model NAME={model.path or model.url}"
            )
        names.add(model.name)


def _checked_routes(
    given: Sequence[tuple[str, tuple[str, ...]]], models: Sequence[ModelSpec]
) -> dict[str, tuple[str, ...]]:
    known, routes = [model.name for model in models], dict(given)
    for name, words in routes.items():
        if name in known:
            raise UsageError(f"route {name}: there is a model of this name")
        for word in words:
            if word not in known:
                raise UsageError(f"route {name}: no model is named {word!r}; there are: {', '.join(known)}")
    return routes


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {}
    for key in KEYS:
        if environ.get(key.env):
            try:
                values[key.name] = key.read(environ[key.env])
            except ValueError as err:
                raise UsageError(f"{key.env}: {err}") from None
    return values


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


# ── the file ──────────────────────────────────────────────────────────────────────────────────────────────


def _tool_files(names: Sequence[str], folder: str) -> tuple[str, ...]:
    """Their whole paths. Raises UsageError for one that is not there."""
    paths = [os.path.abspath(os.path.join(folder, os.path.expanduser(name))) for name in names]
    for name in paths:
        if not name.endswith(".py") or not os.path.isfile(name):
            raise UsageError(f"tools: {name} is no Python file")
    return tuple(dict.fromkeys(paths))


@dataclass(slots=True)
class _File:
    values: dict[str, Any] = field(default_factory=dict)
    models: list[dict[str, Any]] = field(default_factory=list)
    agents: list[AgentSpec] = field(default_factory=list)
    groups: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # with the line of each
    servers: Mapping[str, McpServer] = field(default_factory=dict)
    access: Any = None  # the table [access], and the text of the file
    text: str = ""


def _read_file(path: Path, must_exist: bool) -> _File:
    import tomllib

    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if must_exist:
            raise UsageError(f"{path}: there is no such file") from None
        return _File()
    except UnicodeDecodeError:
        raise UsageError(f"{path}: is not UTF-8") from None
    except NotADirectoryError:
        return _File()  # the home is a file; creating its folders reports that
    except OSError as err:
        raise WorldError(f"{path}: {err.strerror}") from err
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as err:
        raise UsageError(f"{path}: {err}") from None
    models, agents, groups = (_tables(path, text, data, name) for name in ("model", "agent", "group"))
    try:
        servers = read_servers(data.pop("mcpServers", {}))
    except ValueError as err:
        raise UsageError(f"{path}, line {_line(text, 'mcpServers')}: {err}") from None
    access = data.pop("access", None)
    file = _File(_read_table(path, text, data, _SETTINGS, 0), servers=servers, access=access, text=text)
    for first, table in models:
        model = _read_table(path, text, table, _OF_MODEL, first)
        if ("path" in model) == ("url" in model):
            raise UsageError(f"{path}, line {first}: a model without path" + (" or url" if "model" in model else ""))
        if ("url" in model) != ("model" in model):
            raise UsageError(f"{path}, line {first}: url and model (its name there) belong together")
        file.models.append(model)
    for first, table in agents:
        values = _read_table(path, text, table, autostart.READERS, first)
        try:
            file.agents.append(autostart.read(values, str(path.parent.absolute())))
        except ValueError as err:
            raise UsageError(f"{path}, line {first}: {err}") from None
    readers = boxgroups.READERS | limits.GROUP_READERS
    file.groups = [(first, _read_table(path, text, table, readers, first)) for first, table in groups]
    return file


def _access(path: Path, file: _File, more_tools: bool) -> tuple[Policy, tuple[str, ...]]:
    """What agents may do. `more_tools`: there are tools whose names are not known yet."""
    if file.access is None:
        return Policy(), ()
    names = access_table.Names(BUILT_IN_KINDS, file.servers, more_tools)
    try:
        policy, warnings = access_table.read(file.access, file.text, str(path.parent.absolute()), names)
    except access_table.Wrong as err:
        raise UsageError(f"{path}, line {err.line}: {err}") from None
    return policy, tuple(warnings)


def _groups(
    path: Path, tables: Sequence[tuple[int, Mapping[str, Any]]], general: Rules, strict: bool
) -> dict[str, Rules]:
    found: dict[str, Rules] = {}
    for first, values in tables:
        try:
            name, rules = boxgroups.read(values, str(path.parent.absolute()), general)
            if name in found:
                raise ValueError(f"group {name!r} is there twice")
            if strict and rules.level != general.level:
                raise ValueError(f"group {name!r}: sandbox = {rules.level!r} is less than strict allows")
        except ValueError as err:
            raise UsageError(f"{path}, line {first}: {err}") from None
        found[name] = rules
    return found


def _tables(path: Path, text: str, data: dict[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    """Take the tables [[name]] out of the data, each with the line where it begins."""
    tables = data.pop(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{path}, line {_line(text, name)}: {name}s are written as [[{name}]]")
    return [(_line_of_table(text, name, number), table) for number, table in enumerate(tables, 1)]


Readers = Mapping[str, Callable[[Any], Any]]


def _read_table(path: Path, text: str, table: Mapping[str, Any], readers: Readers, first: int) -> dict[str, Any]:
    """Check one table that begins at line `first`."""
    values = {}
    for name, value in table.items():
        place = f"{path}, line {_line(text, name, first)}"
        if name not in readers:
            raise UsageError(f"{place}: unknown key {name!r}{_meant(name, set(readers))}")
        try:
            values[name] = readers[name](value)
        except ValueError as err:
            raise UsageError(f"{place}: {name}: {err}") from None
    return values


def _meant(name: str, known: set[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, 1)
    return f" (did you mean {close[0]!r}?)" if close else f"; there are: {', '.join(sorted(known))}"


def _line(text: str, name: str, first: int = 0) -> int:
    """The number of the line at or after `first` that sets `name`. tomllib does not tell where a key stood."""
    lines = text.splitlines()
    pattern = re.compile(rf"""\s*\[*\s*(?:\w+\s*\.\s*)?["']?{re.escape(name)}["']?\s*[]=.]""")
    for number in range(max(first, 1), len(lines) + 1):
        if pattern.match(lines[number - 1]):
            return number
    return max(first, 1)


def _line_of_table(text: str, name: str, number: int) -> int:
    """Where the `number`th [[name]] begins."""
    starts = [n for n, line in enumerate(text.splitlines(), 1) if re.match(rf"\s*\[\[\s*{name}\s*\]\]", line)]
    return starts[number - 1] if number <= len(starts) else 1


_SETTINGS: Readers = {key.name: key.read for key in KEYS}
_OF_MODEL: Readers = {
    "name": _text,
    "path": _text,
    "url": _text,
    "model": _text,
    **{key.name: key.read for key in KEYS if key.per_model},
}
