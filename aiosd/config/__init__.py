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
    path = "models/writer.gguf"             relative to the folder of the file; or a name (`aiosd models`)
    slots = 4                               for this model alone

    [[model]]                               a model on another server, with OpenAI's API
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

    [[agent]]                               starts with the system; see aiosd.config.autostart
    file = "agents/planner.py"

    [[group]]                               how its agents are confined; see aiosd.sandbox.boxgroups
    name = "web"
    sandbox = "flat"
    tokens = 1000000                        what they may use together, see aiosd.budgets.limits,
    each = { time = "10m" }                 … and what each agent that a person starts may use

An unknown key is an error with its place, not silently ignored.

keys.py       the only list of settings; file, environment and command line are all read with it
values.py     readers of single settings
file.py       aiosd.toml, table by table
models.py     the models, with the options of each; routes
autostart.py  agents that start with the system
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiosd.access.rules import AccessPolicy
from aiosd.budgets import limits
from aiosd.budgets.limits import GroupLimits
from aiosd.config.autostart import AgentSpec
from aiosd.config.keys import BY_NAME, ENV_PREFIX, KEYS, LIVE, PER_MODEL
from aiosd.config.values import DEFAULT_QUANTUM
from aiosd.errors import AiosdError, UsageError
from aiosd.ipc import sealed
from aiosd.ipc.endpoint import Endpoint
from aiosd.ipc.link import Schedule
from aiosd.ipc.passage import Passages
from aiosd.llm.spec import ModelSpec
from aiosd.sandbox.box import LEVELS, STRICT, SandboxSettings
from aiosd.tools.spec import McpServer
from libaios import digest
from libaios.home import Home

if TYPE_CHECKING:
    from aiosd.ipc.service import ServiceSpec
    from aiosd.models.found import Locate


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
    sealed: int = -1  # … or a descriptor with them and the MCP servers, see `aiosd.ipc.sealed`,
    sealed_digest: str = ""  # … and a digest that shows whether these have changed
    ready_fd: int | None = None  # where to write one line, `ready …` or `error …`, for a starter that waits
    flags: Mapping[str, Any] = field(default_factory=dict)  # the values from the command line, for `reload`
    config: Path | None = None  # a file named on the command line
    cwd: str = "/"  # where relative paths on the command line start
    # The result of the last SIGHUP: its number, settings that changed, settings that wait for a restart, or an error.
    reread: Mapping[str, Any] = field(default_factory=dict)
    orphans: str = "kill"  # or "term": the first signal to a process that outlives its agent
    store_ram: int = 32 << 20
    owner_ram: int = 0  # 0: a quarter of that
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
    services: tuple[ServiceSpec, ...] = ()  # besides the cores
    gateway: Endpoint = field(default_factory=Endpoint)  # as requested, …
    door: Endpoint | None = None  # … and where it listens
    passages: Passages | None = None  # between aiosd's own processes
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)  # of groups that `groups` does not name
    sandbox_chosen: bool = False  # its level was set by an option, a variable or a file
    groups: Mapping[str, SandboxSettings] = field(default_factory=dict)
    access: AccessPolicy = field(default_factory=AccessPolicy)  # the rules, …
    access_warnings: tuple[str, ...] = ()  # … and warnings about rules that never decide
    budgets: Mapping[str, GroupLimits] = field(default_factory=dict)  # of groups
    soft_limit: int = 0  # percent of a budget at which its agent gets a message
    strict: bool = False  # no agent is confined less than in the cage

    def schedule(self) -> Schedule:
        """The settings for cores."""
        return Schedule(self.policy, *self.quantum, dict(self.shares))


# ── reading ───────────────────────────────────────────────────────────────────────────────────────────────


def load(
    flags: Mapping[str, Any],
    home: Home,
    config: Path | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: str | None = None,
    locate: Locate | None = None,
) -> Settings:
    """Settings from all sources. `flags`: the values from the command line, by key, and `model`: a list of
    `[NAME=]MODEL`, paths or names that `locate` finds (None: `found.find`); `locate` may fetch missing models, which
    only a command may do. Raises UsageError that names the place of the error."""
    # Imported here, because the process from which agents are forked has the settings read in another one (`apart`).
    from aiosd.config import file as toml
    from aiosd.config import models as of_models
    from aiosd.models import found

    locate = locate or found.find
    environ = os.environ if environ is None else environ
    cwd = _working_directory() if cwd is None else cwd
    path = config or home.config
    file = toml.read(path, must_exist=config is not None)
    file.values |= of_models.with_paths(file.values, str(path.parent))
    values = {key.name: key.default for key in KEYS}
    chosen = file.values | _from_environment(environ) | {name: flags[name] for name in BY_NAME if name in flags}
    values |= chosen
    given = {name for name in PER_MODEL if name in flags or environ.get(BY_NAME[name].env)}
    words = flags.get("model") or of_models.models_of_environment(environ.get(ENV_PREFIX + "MODEL", ""))
    tables: list[tuple[str, Mapping[str, Any], str]]
    if not words and file.models:
        tables = [(of_models.word_of(table), table, str(path.parent)) for table in file.models]
    else:
        tables = [(word, {}, cwd) for word in words or [found.NANO]]
    of_models.refuse_for_many(values, len(tables))
    values |= of_models.with_paths(values, cwd)
    models = [of_models.read_model(word, table, values, given, locate, folder, home) for word, table, folder in tables]
    typed = "tools" in flags or BY_NAME["tools"].env in environ
    tools = _tool_files(values["tools"], cwd if typed else str(path.parent.absolute()))
    in_file = "embed_model" not in flags and not environ.get(BY_NAME["embed_model"].env)
    place = str(path.parent) if in_file else cwd
    table, embedder = of_models.embedder(values["embed_model"], values, given, locate, place, home)
    of_models.refuse_doubles([*models, *([embedder] if embedder is not None else [])])
    strict = values["sandbox"] == STRICT
    rules = SandboxSettings(LEVELS[-1] if strict else values["sandbox"], values["net"])
    policy, warnings = toml.access_of(path, file, bool(tools))
    return Settings(
        home=home,
        models=tuple(models),
        routes=of_models.checked_routes(values["route"], models),
        policy=values["policy"],
        quantum=values["quantum"],
        shares=values["shares"],
        log_level=values["log_level"],
        keep_dead=values["keep_dead"],
        stop_timeout_s=values["stop_timeout"],
        template_idle_s=values["template_idle"],
        orphans=values["orphans"],
        store_ram=values["store_ram"],
        owner_ram=values["owner_ram"],
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
        sandbox_chosen="sandbox" in chosen,
        groups=toml.groups_of(path, file.groups, rules, strict),
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
    """The settings with agents and MCP servers moved into `fd`: the supervisor's memory must not have their keys."""
    content = sealed.write(fd, settings.agents, settings.mcp_servers)
    shown = digest.of(content).hex()
    return dataclasses.replace(settings, agents=(), mcp_servers={}, sealed=fd, sealed_digest=shown)


def agents_of(settings: Settings) -> tuple[AgentSpec, ...]:
    """The agents that start with the system."""
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
    own = ("ready_fd", "home", "reread", "door", "passages", "sealed")
    waiting = [name for name in changed if name not in live and name not in own]
    return dataclasses.replace(settings, **{name: getattr(new, name) for name in live}), waiting


def reload_and_report(settings: Settings) -> Settings:
    """The same, with the result in `reread`. Settings that cannot be read change nothing."""
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
    """The settings with one of LIVE changed, given as on the command line. Raises ValueError with a sentence."""
    from aiosd.config import file as toml

    name = name.replace("-", "_")
    if name not in LIVE:
        why = "cannot change in a running system" if name in BY_NAME else f"is no setting{toml.meant(name, set(LIVE))}"
        raise ValueError(f"{name} {why}")
    try:
        value = BY_NAME[name].read(text)
    except ValueError as err:
        raise ValueError(f"{name}: {err}") from None
    return dataclasses.replace(settings, **{LIVE[name]: value})


def show(settings: Settings, name: str) -> str:
    """The value of one of LIVE, as on the command line."""
    value = getattr(settings, LIVE[name.replace("-", "_")])
    if isinstance(value, tuple):
        return ",".join(f"{part:g}" for part in value)
    if isinstance(value, Mapping):
        return ",".join(f"{key}={part:g}" for key, part in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)


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


def _tool_files(names: Sequence[str], folder: str) -> tuple[str, ...]:
    """The full paths of tool files. Raises UsageError if one is missing."""
    paths = [os.path.abspath(os.path.join(folder, os.path.expanduser(name))) for name in names]
    for name in paths:
        if not name.endswith(".py") or not os.path.isfile(name):
            raise UsageError(f"tools: {name} is no Python file")
    return tuple(dict.fromkeys(paths))
