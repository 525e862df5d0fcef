"""The contract between agents and the kernel: system-call numbers, message structs, limits, errors.

`libaios` and `aiosd` share this module (with `ring`, `channel` and `stream`, which carry what it describes)
and nothing else, so a number or a field cannot drift between the two sides.

A *frame* is one msgpack-encoded `Request` (agent → kernel) or `Reply` (kernel → agent). Every request has an
id, unique within its process for as long as the system runs, and gets exactly one final reply; a stream gets
any number of partial replies before it. Replies come in any order.

Arguments and bodies stay undecoded (`msgspec.Raw`) until the number of the system call determines their type.
`TABLE` has one row for each call: its number, the struct of its arguments, the type of its reply, which process answers
it, and what happens when it is submitted again after a death. All else follows from that row. The kernel decodes
arguments against the struct named there, and this is the one place where types and ranges of what an agent sent are
checked.

Arguments and replies of the calls are grouped by subject, in the order of `Sys`; the table follows them. To add a call,
add a struct for its arguments, perhaps one for its reply, and a row.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable
from typing import Annotated, Any

from msgspec import Meta, Raw, Struct, msgpack

#: Version of ring layout and messages together; both sides refuse a peer with another one.
VERSION = 1
#: Largest frame that one process may send to another (bytes).
MAX_FRAME = 16 << 20
#: Environment of an agent: `memfd:doorbell:ospid` (two descriptor numbers and the process that owns them: in
#: any other process, such as a child that inherited them, the channel must not be used), its pid, its system.
ENV_CHANNEL = "AIOS_CHANNEL"
ENV_PID = "AIOS_PID"
ENV_HOME = "AIOS_HOME"
Uint = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Amount = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)]
Pid = Annotated[int, Meta(ge=1, lt=1 << 53)]
Seconds = Annotated[float, Meta(ge=0, le=1e9)]
Finite = Annotated[float, Meta(ge=-1.7e308, le=1.7e308)]  # neither NaN nor infinite
Nice = Annotated[int, Meta(ge=-20, le=19)]
Signal = Annotated[int, Meta(ge=0, le=64)]
#: No blank, no control character, no slash, and neither "." nor "..": a name or group may become a file's name.
NAME_PATTERN = r"\A(?!\.{1,2}\Z)[^\x00-\x20\x7f/]+\Z"
Name = Annotated[str, Meta(min_length=1, max_length=64, pattern=NAME_PATTERN)]


class Sys(enum.IntEnum):
    """Numbers of the system calls. A number is never given a second meaning."""

    # processes
    GETPID = 1
    GETPPID = 2
    SPAWN = 3
    WAIT = 4
    KILL = 5
    PS = 6
    NICE = 7
    INSPECT = 8
    # messages
    SEND = 16
    RECV = 17
    # language model
    GENERATE = 32
    EMBED = 33
    TOKENIZE = 34
    DETOKENIZE = 35
    MODELS = 36
    CTX_SAVE = 37
    CTX_RESTORE = 38
    CTX_CLOSE = 39
    CTX_LIST = 40
    CTX_REMOVE = 41
    RERANK = 42
    # calls about calls and about the system
    CANCEL = 48
    STATUS = 49
    SHUTDOWN = 50
    SET = 51
    # 65 and 66 were the placeholders of the storage and the tool manager
    # notes
    MEM_ADD = 80
    MEM_GET = 81
    MEM_UPDATE = 82
    MEM_REMOVE = 83
    MEM_SEARCH = 84
    MEM_LIST = 85
    MEM_CLEAR = 86
    MEM_STATS = 87
    # files
    STO_WRITE = 96
    STO_READ = 97
    STO_LIST = 98
    STO_STAT = 99
    STO_HISTORY = 100
    STO_ROLLBACK = 101
    STO_REMOVE = 102
    STO_TRASH = 103
    STO_RESTORE = 104
    STO_EMPTY = 105
    STO_SHARE = 106
    STO_UNSHARE = 107
    STO_SHARES = 108
    STO_MOUNT = 109
    STO_UNMOUNT = 110
    STO_MOUNTS = 111
    STO_SEARCH = 112
    STO_UPLOAD = 113
    STO_PIECE = 114
    STO_FINISH = 115
    STO_ABORT = 116
    STO_STATS = 117
    # the store as a whole
    STORE_SNAPSHOT = 120
    # tools
    TOOL_LIST = 128
    TOOL_CALL = 129
    TOOL_TRUST = 130
    TOOL_ADMIT = 131
    # what a person allows
    ASK_LIST = 140
    ASK_WATCH = 141
    ASK_ANSWER = 142
    RULES = 143
    ALWAYS_LIST = 144
    ALWAYS_REVOKE = 145
    # tokens of the gateway
    TOKEN_NEW = 152
    TOKEN_LIST = 153


class Request(Struct, array_like=True, frozen=True):
    """Agent → kernel."""

    id: Uint
    sys: Uint
    args: Raw = Raw(b"\x90")  # an empty array: every argument at its default
    again: bool = False  # it was sent before, to a kernel that has died since


class Reply(Struct, array_like=True, frozen=True):
    """Kernel → agent. `more` marks a partial reply; `errno` ≠ 0 a failed call, whose body is a `Failure`."""

    id: int
    errno: int = 0
    more: bool = False
    offset: int = 0  # streams: how many tokens were given out before this piece (see `Progress` for other units)
    body: Raw = Raw(b"\xc0")


class Failure(Struct, array_like=True, frozen=True):
    """The body of a reply whose errno is not 0."""

    message: str


# ── control socket ────────────────────────────────────────────────────────────────────────────────────────

#: A token that is GATE and the pid of an agent: a program has connected through that agent's own gate.
GATE = "gate:"

#: Before SOCKET/PID:STARTED,… in place of a token: these processes (`procfs.Stat.started`) have the other end of a
#: program's connection, which is the socket of this inode, and the agent is meant that all of them descend from.
PROCESSES = "processes:"
MOST_PROCESSES = 8


class Hello(Struct, array_like=True, frozen=True):
    """First frame of a client on the control socket. `client` 0 asks for a new identity. `token`: the secret of the
    agent that the client acts for, or GATE and its pid, or PROCESSES and processes of it; only aiosd's own
    gateway may send one."""

    version: int
    client: Uint = 0
    boot: str = ""
    token: Annotated[str, Meta(max_length=256)] = ""


class Welcome(Struct, array_like=True, frozen=True):
    """The kernel's answer to `Hello`: the client's identity, which it sends when it connects again. `pid`, `ospid`: the
    agent that a client with a token acts for."""

    version: int
    boot: str
    client: int
    release: str
    pid: int = 0
    ospid: int = 0


# ── processes ─────────────────────────────────────────────────────────────────────────────────────────────


class NoArgs(Struct, array_like=True, frozen=True):
    pass


class Limits(Struct, array_like=True, frozen=True):
    """Budgets of one agent, shared with all agents that it starts; None: unlimited."""

    tokens: Uint | None = None  # prompt tokens computed + completion tokens
    time_s: Seconds | None = None  # wall seconds since the spawn
    memory_bytes: Amount | None = None  # PSS of its processes, and what they hold in memfds
    cpu_s: Seconds | None = None  # processor seconds of its processes
    context: Amount | None = None  # tokens that its open calls hold at a time, prompts and answers
    tool_calls: Uint | None = None
    children: Uint | None = None  # agents that it starts, and that these start
    processes: Amount | None = None  # Linux processes at a time
    disk_bytes: Amount | None = None  # written to the store, and in its workspace
    cost: Uint | None = None  # what its generations cost by the prices of models, in 10^-12 of the currency's unit
    soft: Annotated[int, Meta(ge=0, le=100)] | None = None  # percent of each at which it gets a message; 0: never


Paths = Annotated[list[Annotated[str, Meta(min_length=1, max_length=4096)]], Meta(max_length=256)]


class Sandbox(Struct, array_like=True, frozen=True):
    """How an agent is to be confined; "": as set for its group. Paths are `os_text`, absolute, without
    symbolic links: the kernel looks up none (`libaios.sandbox` makes this). A confined agent's child gets its parent's
    files, and never more."""

    level: Annotated[str, Meta(pattern=r"\A(|none|flat|cage)\Z")] = ""
    net: Annotated[str, Meta(max_length=8192)] = ""  # none, all, gateway, or hosts: "example.org,*.example.net:8443"
    read: Paths = []
    write: Paths = []
    own: Paths = []  # paths that its program must be able to read
    env: Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=1024)] = []
    program: Annotated[str, Meta(max_length=4096)] = ""  # the path by which its workspace is found again
    alone: bool = False  # `own` has the script alone, not its folder
    sha256: Annotated[bytes, Meta(max_length=32)] = b""  # of the script when its person started it
    script: Annotated[str, Meta(max_length=4096)] = ""  # the script that an interpreter runs: for its workspace


#: `a.b.c`, as in an import.
Module = Annotated[str, Meta(pattern=r"\A[^\W\d]\w*(\.[^\W\d]\w*)*\Z", max_length=200)]


class Template(Struct, array_like=True, frozen=True):
    """A process from which agents are forked: its interpreter (`os_text`, absolute; "": aiosd's own), and the modules
    that it has imported before. It is public: all agents may see it."""

    python: Annotated[str, Meta(max_length=4096)] = ""
    modules: Annotated[list[Module], Meta(max_length=64)] = []

    @property
    def name(self) -> str:
        """The name of its process. If there are several of this name, all but the first have a number, too."""
        return f"template:{self.modules[0] if self.modules else os.path.basename(os_shown(self.python))}"


class Spawn(Struct, array_like=True, frozen=True):
    """Start an agent.

    `kind` is how `target` is run: "file" (a Python script), "module" (python -m) or "exec" (a program).
    A client passes 3 descriptors with the frame (stdin, stdout, stderr) unless `detached`; an agent's child
    gets the agent's own. For a `detached` agent with a `tty` they may come, too: the client writes its log then.
    Target, arguments, environment and folder are `os_text`. `attached` ties the agent to the caller's connection:
    it gets HUP when that ends.
    """

    kind: Annotated[str, Meta(pattern=r"\A(file|module|exec)\Z")]
    target: Annotated[str, Meta(min_length=1, max_length=4096)]
    args: Annotated[list[str], Meta(max_length=4096)] = []
    env: dict[str, str] = {}
    cwd: str = "/"
    name: Name | None = None
    nice: Nice | None = None
    group: Name | None = None
    limits: Limits = Limits()
    umask: Annotated[int, Meta(ge=0, le=0o777)] = 0o022
    detached: bool = False
    attached: bool = False
    tty: bool = False  # stdin is a terminal of the agent's own: make it the controlling one
    restart: Annotated[str, Meta(max_length=32)] = "no"  # when it is started again; only for `detached` ones
    gateway: bool | None = None  # its environment leads programs to the gateway; None: as its parent's does
    sandbox: Sandbox = Sandbox()
    template: Template | None = None  # forked from there; for "file" and "module" only


class Spawned(Struct, array_like=True, frozen=True):
    pid: int
    log: str = ""  # path of the agent's log when detached
    sandbox: str = "none"  # the level in which it is confined


class Wait(Struct, array_like=True, frozen=True):
    """Wait for a child (`pid` 0: any) — or, from the control socket, for any agent — to end."""

    pid: Uint = 0
    block: bool = True
    timeout_s: Seconds | None = None


class Waited(Struct, array_like=True, frozen=True):
    """`status` as from os.waitstatus_to_exitcode: the exit code, or -n for signal n. pid 0: none yet."""

    pid: int
    status: int
    budget: str = ""  # which budget ended it, by its name in aiosd.toml; "": none
    reason: str = ""  # why it ended, a sentence from the kernel or the supervisor; "" when it ended by itself
    denied: str = ""  # what its sandbox has denied it last of the network, and what would allow that; "": nothing


class Kill(Struct, array_like=True, frozen=True):
    """Send `signal` to `pid` (negative: the process group). STOP replies when the agent has stopped."""

    pid: int
    signal: Signal = 15
    timeout_s: Seconds | None = None  # send KILL if the agent is still alive after this time; then reply


class Ps(Struct, array_like=True, frozen=True):
    """List agents: the caller's live ones, or `all` (zombies and aiosd's own processes too); `dead`: zombies
    and those of which aiosd still has a record as well."""

    all: bool = False
    pids: list[Uint] | None = None
    name: str | None = None
    dead: bool = False


class ProcInfo(Struct, frozen=True):
    """One line of aios-ps. `exit` is None while alive, else as in a shell: 0–255, 128+n for signal n; 124 when a budget
    ended it."""

    pid: int
    ppid: int
    pgid: int
    ospid: int
    uid: int
    stat: str
    nice: int
    name: str
    command: str
    group: str
    calls: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    ctx_tokens: int
    mem_bytes: int
    cpu_s: float
    started: float  # Unix time
    exit: int | None = None
    system: bool = False
    ctx_kept: int = 0  # tokens of the context that the core keeps for it …
    ctx_place: str = ""  # … and where: "slot", "ram" or "disk"
    restarts: int = 0  # how often it was started again
    sandbox: str = "none"  # how it is confined
    cost: str = "0.00"  # what its generations cost, exactly
    budget: str = ""  # which budget ended it, by its name in aiosd.toml
    reason: str = ""  # why it ended, if the kernel or the supervisor knows
    template: str = ""  # the name of the template that it was forked from; "": of none
    ended: float | None = None  # Unix time


class NiceArgs(Struct, array_like=True, frozen=True):
    pid: Uint = 0  # 0: the caller
    value: Nice | None = None  # None: read only
    relative: bool = False


class PidArgs(Struct, array_like=True, frozen=True):
    pid: Uint


# ── messages ──────────────────────────────────────────────────────────────────────────────────────────────


class Send(Struct, array_like=True, frozen=True):
    pid: Pid
    obj: Raw


class Recv(Struct, array_like=True, frozen=True):
    timeout_s: Seconds | None = None


class Received(Struct, array_like=True, frozen=True):
    sender: int
    obj: Raw


# ── language model ────────────────────────────────────────────────────────────────────────────────────────

TokenId = Annotated[int, Meta(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Meta(max_length=1 << 20)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
#: What a generation has given out so far: its tokens, or its text if a remote model sends no tokens.
Given = TokenIds | Annotated[str, Meta(max_length=1 << 22)]
#: The strings that end a repetition for DRY if `dry_breakers` is None.
BREAKERS = ("\n", ":", '"', "*")


class Sampling(Struct, array_like=True, frozen=True):
    max_tokens: Annotated[int, Meta(ge=0, le=1 << 24)] | None = None  # None: to the end of the context
    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.8
    top_p: Annotated[float, Meta(gt=0, le=1)] = 0.95
    top_k: Annotated[int, Meta(ge=0, le=1 << 24)] = 40  # 0: off
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.05
    repeat_penalty: Annotated[float, Meta(gt=0, le=10)] = 1.0
    seed: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] = 0  # the SDK draws one if the caller gave none
    ignore_eos: bool = False
    stop: Annotated[list[Annotated[str, Meta(min_length=1, max_length=1024)]], Meta(max_length=64)] = []
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[dict[TokenId, Annotated[float, Meta(ge=-100, le=100)]], Meta(max_length=1024)] = {}
    min_tokens: Annotated[int, Meta(ge=0, le=1 << 24)] = 0
    stop_tokens: Annotated[list[TokenId], Meta(max_length=1024)] = []
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] = 0
    dry_multiplier: Annotated[float, Meta(ge=0, le=100)] = 0.0  # 0: off
    dry_base: Annotated[float, Meta(ge=1, le=100)] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=0, le=4096)] = 2
    dry_last_n: Annotated[int, Meta(ge=0, le=4096)] = 64
    dry_breakers: Annotated[list[Annotated[str, Meta(min_length=1, max_length=40)]], Meta(max_length=32)] | None = None
    xtc_probability: Annotated[float, Meta(ge=0, le=1)] = 0.0
    xtc_threshold: Annotated[float, Meta(ge=0, le=1)] = 0.1
    mirostat: Annotated[int, Meta(ge=0, le=2)] = 0
    mirostat_tau: Annotated[float, Meta(ge=0, le=100)] = 5.0
    mirostat_eta: Annotated[float, Meta(ge=0, le=1)] = 0.1


class Generate(Struct, array_like=True, frozen=True):
    """One generation: a chat (`messages`) or a completion (`prompt`: text, or token ids taken verbatim).

    `given` is what this very call has given out already, before its kernel or core died (see `Progress`). It is not
    generated again: tokens are forced, a text is continued, and replies start after it.
    """

    messages: Annotated[list[dict[str, Any]], Meta(max_length=1 << 16)] | None = None
    prompt: str | TokenIds | None = None
    model: str | None = None
    sampling: Sampling = Sampling()
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    schema: dict[str, Any] | bool | None = None
    stream: bool = False
    timeout_s: Seconds | None = None
    given: Given = []
    public: bool = False  # other groups may find out, by timing, that this prompt was sent before
    tool_choice: str | dict[str, Any] | None = None  # "auto", "none", "required", or {"function": {"name": …}}
    parallel_tool_calls: bool = True  # may there be several calls in one answer?
    template_args: dict[str, Any] = {}  # more that the chat template can ask for (enable_thinking, date_string, …)
    grammar: Annotated[str, Meta(max_length=1 << 16)] | None = None  # GBNF; the text is one of its `root`
    lora: Name | None = None  # the adapter to compute it with


class Usage(Struct, frozen=True):
    """What one generation cost. Times in seconds."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    preemptions: int = 0
    context_left: float = 0.0  # the fraction of the context that is still free at the end
    reasoning_tokens: int = 0  # of the completion: thoughts, with their marks


class ToolCall(Struct, frozen=True):
    """A call of a tool that the model asks for; `arguments` is valid against the tool's schema."""

    id: str
    name: str
    arguments: dict[str, Any]


class Alternative(Struct, array_like=True, frozen=True):
    """A token that could have come, with the natural logarithm of its probability and its bytes (`piece`). `token` is
    -1 if a remote model does not send token numbers."""

    token: int
    logprob: float
    piece: bytes


class Logprob(Struct, array_like=True, frozen=True):
    """A generated token; `logprob` and the likeliest tokens (`top`) as the model has them: before temperature, filters
    and penalties."""

    token: int
    logprob: float
    piece: bytes
    top: list[Alternative] = []


#: One for each token; None if it is not known any more, because the model's process has died since.
Logprobs = list[Logprob | None]


class Piece(Struct, array_like=True, frozen=True):
    """Body of a partial reply of a stream: whole characters only, and the tokens they came from. `text` contains marks
    that show which part of the answer follows (`libaios.parts`). `model`: in the first piece of a call that named a
    route, the model that writes it; no other model can go on from there."""

    text: str
    tokens: list[int]
    logprobs: Logprobs | None = None
    model: str = ""


class Progress:
    """What one generation has given out, counted as its core counts: in tokens, or in characters of text where a core
    has no tokens. For a piece without tokens its text counts."""

    __slots__ = ("length", "texts", "tokens")

    def __init__(self, given: list[int] | str = "") -> None:
        self.tokens: list[int] = [] if isinstance(given, str) else list(given)
        self.texts: list[str] = [given] if given and isinstance(given, str) else []
        self.length = len(given)

    def add(self, tokens: list[int], text: str) -> None:
        if tokens:
            self.tokens += tokens
            self.length += len(tokens)
        elif text:
            self.texts.append(text)
            self.length += len(text)

    def given(self) -> list[int] | str:
        """The value for `Generate.given`."""
        return "".join(self.texts) if self.texts else list(self.tokens)


class Generated(Struct, array_like=True, frozen=True):
    """Body of the final reply to GENERATE. In a stream `text` and `tokens` are what comes after the last piece. For
    `text` see `Piece`."""

    text: str
    tokens: list[int]
    finish_reason: str  # "stop" | "length" | "tool_calls" | "limit"
    usage: Usage
    tool_calls: list[ToolCall] = []
    logprobs: Logprobs | None = None
    model: str = ""  # the name of the model that answered


class Embed(Struct, array_like=True, frozen=True):
    texts: Annotated[list[str], Meta(max_length=65536)]
    model: str | None = None
    timeout_s: Seconds | None = None


class Embedded(Struct, array_like=True, frozen=True):
    """n vectors of d float32 each, unit length, row after row."""

    n: int
    d: int
    data: bytes
    prompt_tokens: int = 0


class Rerank(Struct, array_like=True, frozen=True):
    """Ask a model for a score for each document: how well it answers the query."""

    query: str
    documents: Annotated[list[str], Meta(max_length=65536)]
    model: str | None = None
    timeout_s: Seconds | None = None


class Ranked(Struct, array_like=True, frozen=True):
    """One score for each document, in their order."""

    scores: list[float]
    prompt_tokens: int = 0


class Tokenize(Struct, array_like=True, frozen=True):
    text: str
    model: str | None = None
    special: bool = False  # read special tokens such as <|im_end|> as such
    bos: bool = False  # with the token that the model expects first, if it does
    call: Generate | None = None  # the prompt of this call, in place of a text


class Detokenize(Struct, array_like=True, frozen=True):
    tokens: TokenIds
    model: str | None = None
    apart: bool = False  # the bytes of each token, which may be a part of a character, and not the text of all


class ModelInfo(Struct, frozen=True):
    """A loaded model. A figure of 0 is not known; of a model on another server most are not known."""

    name: str
    path: str = ""  # its file; "": it has none on this machine
    default: bool = False
    description: str = ""
    n_params: int = 0
    n_ctx: int = 0  # tokens per slot
    n_slots: int = 0
    n_vocab: int = 0
    n_embd: int = 0
    gpu_layers: int = 0
    chat: bool = False  # has a chat template
    tools: bool = False  # whose template takes tools
    loras: list[str] = []  # adapters that a call can name
    url: str = ""  # the server that runs it, if it is not on this machine
    route: list[str] = []  # it is a route: the first of these models that can answers


class SaveContext(Struct, array_like=True, frozen=True):
    """Keep a conversation under a name, with what the model has computed of it."""

    name: Name
    messages: Annotated[list[dict[str, Any]], Meta(max_length=1 << 16)]
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    model: str | None = None
    lora: Name | None = None


class SavedContext(Struct, frozen=True):
    """A context that lies on disk under a name."""

    name: str
    tokens: int
    bytes: int
    created: float  # Unix time


class NamedContext(Struct, array_like=True, frozen=True):
    name: Name
    model: str | None = None


class RestoredContext(Struct, array_like=True, frozen=True):
    """`cached`: tokens whose state came back; `refused`: why these are not all of them, or ''."""

    messages: list[dict[str, Any]]
    tokens: int
    cached: int
    refused: str = ""
    lora: str = ""  # the adapter that it was saved with


class CloseContext(Struct, array_like=True, frozen=True):
    """The caller will not continue this conversation: the state kept for it may be dropped first."""

    messages: Annotated[list[dict[str, Any]], Meta(max_length=1 << 16)]
    tools: Annotated[list[dict[str, Any]], Meta(max_length=1024)] | None = None
    model: str | None = None
    lora: Name | None = None


class ListContexts(Struct, array_like=True, frozen=True):
    model: str | None = None


# ── calls about calls and about the system ────────────────────────────────────────────────────────────────


class Cancel(Struct, array_like=True, frozen=True):
    id: Uint


class Status(Struct, array_like=True, frozen=True):
    check: bool = False


class Set(Struct, array_like=True, frozen=True):
    """Change a setting of the running system; name and value as on the command line. The reply is the old and the new
    value."""

    name: str
    value: str


# ── notes ─────────────────────────────────────────────────────────────────────────────────────────────────

NoteText = Annotated[str, Meta(max_length=1 << 20)]
NoteKey = Annotated[str, Meta(min_length=1, max_length=1024)]
Tags = Annotated[list[Annotated[str, Meta(min_length=1, max_length=256)]], Meta(max_length=64)]
#: Flat, so that a filter means the same for every note.
Metadata = Annotated[
    dict[str, str | Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | Finite | bool | None], Meta(max_length=64)
]
NoteRef = Annotated[int, Meta(ge=1, le=(1 << 63) - 1)] | NoteKey  # its id, or its key


class NoteFilters(Struct, array_like=True, frozen=True):
    """Notes that have all these tags and metadata, changed at `since` or later and before `until` (Unix times)."""

    tags: Tags = []
    metadata: Metadata = {}
    since: Finite | None = None
    until: Finite | None = None


class MemAdd(Struct, array_like=True, frozen=True):
    """`shared`: it belongs to the caller's group. A note of the same owner and key is replaced."""

    text: NoteText
    key: NoteKey | None = None
    tags: Tags = []
    metadata: Metadata = {}
    ttl_s: Seconds | None = None
    shared: bool = False


class MemGet(Struct, array_like=True, frozen=True):
    note: NoteRef


class MemUpdate(Struct, array_like=True, frozen=True):
    """Fields that are None stay as they are."""

    note: NoteRef
    text: NoteText | None = None
    tags: Tags | None = None
    metadata: Metadata | None = None
    ttl_s: Seconds | None = None
    if_version: Uint | None = None


class MemSearch(Struct, array_like=True, frozen=True):
    """`by`: "words" or "meaning"; "": both, if there is an embedder."""

    query: Annotated[str, Meta(max_length=1 << 16)]
    k: Annotated[int, Meta(ge=1, le=1000)] = 5
    filters: NoteFilters = NoteFilters()
    by: Annotated[str, Meta(pattern=r"\A(|words|meaning)\Z")] = ""


class MemList(Struct, array_like=True, frozen=True):
    filters: NoteFilters = NoteFilters()
    limit: Annotated[int, Meta(ge=1, le=1000)] = 100
    offset: Uint = 0


class MemStats(Struct, array_like=True, frozen=True):
    """Figures of the caller's notes; a person may name any `owner`, as aiosd writes it."""

    owner: Annotated[str, Meta(max_length=512)] = ""


class Note(Struct, frozen=True):
    """A note as it is kept. Times are Unix times; `version` grows by one with each change. `damaged`: the disk has lost
    its content, and only its id is known; with id 0 it stands for an unknown number of notes without a known id."""

    id: int
    text: str
    key: str | None
    tags: list[str]
    metadata: dict[str, Any]
    created: float
    updated: float
    expires: float | None
    version: int
    shared: bool  # it belongs to the caller's group
    damaged: bool = False


class Found(Struct, frozen=True):
    """A note that a search found. `score`: more is better; scores of different searches cannot be compared."""

    note: Note
    score: float


# ── files ─────────────────────────────────────────────────────────────────────────────────────────────────

#: Names with a slash between them. The store checks each name, and converts it to Unicode's normal form NFC.
FilePath = Annotated[str, Meta(min_length=1, max_length=1024)]
Folder = Annotated[str, Meta(max_length=1024)]
#: Whose files are meant: "" the caller's own; "group", "group:NAME"; "agent:NAME" (of the caller's group),
#: "agent:GROUP/NAME"; "pid:N", an agent without a name of its own; "person", at the terminal.
Space = Annotated[str, Meta(max_length=200)]
#: The largest piece of a file that one call carries, and the size of all pieces but the last.
PIECE = 1 << 20
PieceData = Annotated[bytes, Meta(max_length=PIECE)]


class StoPath(Struct, array_like=True, frozen=True):
    path: FilePath
    of: Space = ""


class StoWrite(Struct, array_like=True, frozen=True):
    """`append`: add to the file's content. `if_version`: only if the file has this version; 0: only if there is no
    file."""

    path: FilePath
    data: PieceData
    of: Space = ""
    append: bool = False
    if_version: Uint | None = None


class StoRead(Struct, array_like=True, frozen=True):
    path: FilePath
    of: Space = ""
    version: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)] | None = None  # None: the newest
    offset: Uint = 0
    size: Annotated[int, Meta(ge=0, le=PIECE)] = PIECE


class StoList(Struct, array_like=True, frozen=True):
    """Files in this folder and below it whose path comes after `after`."""

    folder: Folder = ""
    of: Space = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 1000
    after: Folder = ""


class StoHistory(Struct, array_like=True, frozen=True):
    """Versions below `before`, the newest first."""

    path: FilePath
    of: Space = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 1000
    before: Uint = 0


class StoRollback(Struct, array_like=True, frozen=True):
    """Exactly one of the two fields. `time`: to the newest version that is not later (Unix time)."""

    path: FilePath
    of: Space = ""
    version: Annotated[int, Meta(ge=1, le=(1 << 63) - 1)] | None = None
    time: Finite | None = None


class StoTrash(Struct, array_like=True, frozen=True):
    of: Space = ""
    limit: Annotated[int, Meta(ge=1, le=1000)] = 1000
    after: Uint = 0


class StoRestore(Struct, array_like=True, frozen=True):
    """`id`: as in the list of the trash."""

    id: Uint
    of: Space = ""


class StoEmpty(Struct, array_like=True, frozen=True):
    """None: all that is in the trash."""

    of: Space = ""
    ids: Annotated[list[Uint], Meta(max_length=1000)] | None = None


class StoShare(Struct, array_like=True, frozen=True):
    """A file, or all files of a folder, those to come included."""

    path: FilePath
    to: Annotated[str, Meta(min_length=1, max_length=200)]
    write: bool = False
    of: Space = ""


class StoUnshare(Struct, array_like=True, frozen=True):
    path: FilePath
    to: Annotated[str, Meta(min_length=1, max_length=200)]
    of: Space = ""


class StoSpace(Struct, array_like=True, frozen=True):
    of: Space = ""


class StoMount(Struct, array_like=True, frozen=True):
    """`folder` is `os_text`."""

    folder: Annotated[str, Meta(min_length=1, max_length=4096)]
    at: FilePath
    write: bool = False
    of: Space = ""


class StoSearch(Struct, array_like=True, frozen=True):
    query: Annotated[str, Meta(max_length=1 << 16)]
    k: Annotated[int, Meta(ge=1, le=1000)] = 10
    folder: Folder = ""
    of: Space | None = None  # None: all that the caller can read


class StoUpload(Struct, array_like=True, frozen=True):
    path: FilePath
    of: Space = ""
    if_version: Uint | None = None


class StoPiece(Struct, array_like=True, frozen=True):
    """`offset` is a multiple of PIECE. A piece that is there already is replaced."""

    upload: Uint
    offset: Uint
    data: PieceData


class StoFinish(Struct, array_like=True, frozen=True):
    """`size`: of the whole file, in bytes."""

    upload: Uint
    size: Uint


class StoAbort(Struct, array_like=True, frozen=True):
    upload: Uint


class File(Struct, frozen=True):
    """A file in its newest version. Times are Unix times. A file of a mounted folder has version 0, and no history.
    `damaged`: the disk has lost all that is known of it but its path."""

    path: str
    size: int
    version: int
    created: float
    updated: float
    by: str  # the agent that made this version
    mounted: bool = False
    damaged: bool = False


class Version(Struct, frozen=True):
    number: int
    size: int
    time: float
    by: str


class FileData(Struct, array_like=True, frozen=True):
    """A part of a version, which may be shorter than requested; empty: past the end. `size`: bytes of the whole
    version."""

    data: bytes
    size: int
    version: int


class Trashed(Struct, frozen=True):
    """A file that was removed; `id` names it from now on."""

    id: int
    path: str
    size: int
    version: int
    removed: float


class Share(Struct, frozen=True):
    """`of` and `to` as in calls: the owner, and the agent or group with which it is shared."""

    path: str
    of: str
    to: str
    write: bool


class Mount(Struct, frozen=True):
    """A real folder and the path under which its files are found. `files`: the number of known ones; `note`: what is
    missing."""

    at: str
    folder: str
    write: bool
    files: int
    complete: bool  # the whole folder has been read
    note: str = ""


class FoundFile(Struct, frozen=True):
    """`excerpt`: some of the text around the words, or its beginning if none of them is in it; "" for a file that is no
    text. `score`: more is better; scores of different searches cannot be compared."""

    file: File
    of: str
    excerpt: str
    score: float


# ── tools ─────────────────────────────────────────────────────────────────────────────────────────────────

#: As the APIs of models allow it, because a model writes this name.
TOOL_NAME_PATTERN = r"[A-Za-z0-9_-]{1,64}\Z"


class CallTool(Struct, array_like=True, frozen=True):
    """Call a tool. `arguments` are checked against the tool's schema by the toolbox."""

    name: Annotated[str, Meta(max_length=64)]
    arguments: Annotated[dict[str, Any], Meta(max_length=1024)] = {}
    timeout_s: Seconds | None = None
    stream: bool = False  # send what it writes while it runs


class AdmitTool(Struct, array_like=True, frozen=True):
    """May the caller compute this tool itself (`libaios.pure`)? True counts as a call of the tool; False: it has to go
    to the toolbox."""

    name: Annotated[str, Meta(max_length=64)]


class TrustTool(Struct, array_like=True, frozen=True):
    """Offer a tool again whose description has changed. Only a person may do that."""

    name: Annotated[str, Meta(max_length=64)]


class ToolInfo(Struct, frozen=True):
    """A tool. `parameters`: the JSON Schema of its arguments; `source`: "built in", or the file it comes from."""

    name: str
    description: str
    parameters: dict[str, Any]
    source: str = ""


# ── what a person allows ──────────────────────────────────────────────────────────────────────────────────


class WatchAsks(Struct, array_like=True, frozen=True):
    """Get a message for each ask: for all agents, or agent `pid`, or agents `attached` to this very connection, and
    their descendants. As long as this call is open there is a person who can answer, and asks wait for the answer."""

    pid: Uint = 0
    attached: bool = False


class AnswerAsk(Struct, array_like=True, frozen=True):
    """`digest`: of the ask as it was shown (`Asked`), so that the answer can allow nothing else. `always`: never ask
    for the like again. `reason`: for the agent that is denied."""

    id: Annotated[str, Meta(max_length=64)]
    digest: Annotated[str, Meta(max_length=64)]
    allow: bool
    always: bool = False
    reason: Annotated[str, Meta(max_length=500)] = ""


class RevokeAlways(Struct, array_like=True, frozen=True):
    number: Uint


class AskState(enum.StrEnum):
    OPEN = "open"
    ALLOWED = "allowed"
    DENIED = "denied"
    GONE = "gone"  # the call ended before a person had answered


class Asked(Struct, frozen=True):
    """An action that an agent may do only if a person allows it (an *ask*). `details`: the action exactly, as labels
    and texts, which are not made safe for a terminal; `rule`: why a person has to decide; `always`: what an answer for
    all times would allow, "": there is no such answer."""

    id: str
    digest: str
    pid: int
    name: str
    group: str
    what: str
    tool: bool
    resources: list[tuple[str, str]]
    details: list[tuple[str, str]]
    rule: str
    always: str
    since: float  # Unix time
    folder: str = ""  # in which the action is done
    state: AskState = AskState.OPEN


class RulesInForce(Struct, frozen=True):
    """The rules of [access] in the order in which they decide, in words; how long an ask waits while no person can
    answer; how many clients could answer now; and the file in which decisions are recorded."""

    rules: list[str]
    ask_timeout_s: float
    listening: int
    audit: str


class Always(Struct, frozen=True):
    """What is allowed for all times. `text`: in words; `agent`: the one whose ask was answered first."""

    number: int
    text: str
    agent: str
    given: float  # Unix time


# ── tokens of the gateway ─────────────────────────────────────────────────────────────────────────────────


class NewToken(Struct, array_like=True, frozen=True):
    """Make an agent without a process: programs from outside that send its token act as this agent. The kernel gets the
    SHA-256 of the token and never the token itself."""

    name: Name
    hash: Annotated[bytes, Meta(min_length=32, max_length=32)]
    group: Name | None = None
    limits: Limits = Limits()  # of kinds that need no process


class TokenInfo(Struct, frozen=True):
    """An agent without a process. `used`: all tokens that it was charged with; `limit` None: no budget of tokens.
    `budgets`: for each kind that is limited the "limit" and what is "used", as `aios-inspect` has them."""

    pid: int
    name: str
    group: str
    used: int
    limit: int | None
    budgets: dict[str, dict[str, Any]] = {}


class TokenList(Struct, frozen=True):
    """`url`: where the gateway listens; "": there is none."""

    url: str
    tokens: list[TokenInfo]


# ── codec ─────────────────────────────────────────────────────────────────────────────────────────────────

_encoder = msgpack.Encoder()
encode = _encoder.encode
decode_request = msgpack.Decoder(Request).decode
decode_reply = msgpack.Decoder(Reply).decode
decode_args: dict[int, Callable[[Any], Any]] = {}  # by number: the function that decodes the arguments of that call


def raw(obj: Any) -> Raw:
    """Encode `obj` to be embedded in a Request or a Reply."""
    return Raw(_encoder.encode(obj))


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────


class Again(enum.Enum):
    """What happens to a call that is submitted again because the process that answers it died."""

    REPEAT = "repeat"  # it is done again: it only reads, or doing it twice has the same effect as doing it once
    ONCE = "once"  # it takes effect once: the process that answers it remembers its key
    NEVER = "never"  # once begun it is not done again: its caller gets EIO


class Row(Struct, frozen=True):
    """One system call. `by`: "kernel", or the kind of the service that answers it. `piece`: the type of the body of
    partial replies, for calls that stream."""

    sys: int
    args: type[Struct]
    reply: Any = None  # the type of the body of the final reply; None: there is none
    by: str = "kernel"
    again: Again = Again.REPEAT
    piece: Any = None

    @property
    def name(self) -> str:
        """Its name as in aios-inspect and in the log."""
        return _names.get(self.sys) or call_name(self.sys)


TABLE: dict[int, Row] = {}
_names: dict[int, str] = {}


def add(*rows: Row) -> None:
    """Add calls to the table. Raises ValueError for a number that is taken."""
    for row in rows:
        if row.sys in TABLE:
            raise ValueError(f"system call {row.sys} is in the table already")
        TABLE[row.sys] = row
        _names[row.sys] = call_name(row.sys)
        decode_args[row.sys] = msgpack.Decoder(row.args).decode


def call_name(number: int) -> str:
    return Sys(number).name.lower() if number in Sys._value2member_map_ else str(number)


_ONCE, _NEVER = Again.ONCE, Again.NEVER
add(
    Row(Sys.GETPID, NoArgs, int),
    Row(Sys.GETPPID, NoArgs, int),
    Row(Sys.SPAWN, Spawn, Spawned, again=_ONCE),
    Row(Sys.WAIT, Wait, Waited, again=_ONCE),
    Row(Sys.KILL, Kill, again=_ONCE),
    Row(Sys.PS, Ps, list[ProcInfo]),
    Row(Sys.NICE, NiceArgs, int, again=_ONCE),
    Row(Sys.INSPECT, PidArgs, dict[str, Any]),
    Row(Sys.SEND, Send, again=_ONCE),
    Row(Sys.RECV, Recv, Received, again=_ONCE),
    # A generation goes on from the tokens that its caller has.
    Row(Sys.GENERATE, Generate, Generated, by="llm", piece=Piece),
    Row(Sys.EMBED, Embed, Embedded, by="llm"),
    Row(Sys.RERANK, Rerank, Ranked, by="llm"),
    Row(Sys.TOKENIZE, Tokenize, list[int], by="llm"),
    Row(Sys.DETOKENIZE, Detokenize, str | list[bytes], by="llm"),
    Row(Sys.MODELS, NoArgs, list[ModelInfo]),
    Row(Sys.CTX_SAVE, SaveContext, SavedContext, by="llm"),
    Row(Sys.CTX_RESTORE, NamedContext, RestoredContext, by="llm"),
    Row(Sys.CTX_CLOSE, CloseContext, by="llm"),
    Row(Sys.CTX_LIST, ListContexts, list[SavedContext], by="llm"),
    Row(Sys.CTX_REMOVE, NamedContext, bool, by="llm"),
    Row(Sys.CANCEL, Cancel, bool),
    Row(Sys.STATUS, Status, dict[str, Any]),
    Row(Sys.SHUTDOWN, NoArgs),
    Row(Sys.SET, Set, tuple[str, str]),
    Row(Sys.MEM_ADD, MemAdd, int, by="store", again=_ONCE),
    Row(Sys.MEM_GET, MemGet, Note, by="store"),
    Row(Sys.MEM_UPDATE, MemUpdate, int, by="store", again=_ONCE),
    Row(Sys.MEM_REMOVE, MemGet, by="store", again=_ONCE),
    Row(Sys.MEM_SEARCH, MemSearch, list[Found], by="store"),
    Row(Sys.MEM_LIST, MemList, list[Note], by="store"),
    Row(Sys.MEM_CLEAR, NoArgs, int, by="store", again=_ONCE),
    Row(Sys.MEM_STATS, MemStats, dict[str, Any], by="store"),
    Row(Sys.STO_WRITE, StoWrite, File, by="store", again=_ONCE),
    Row(Sys.STO_READ, StoRead, FileData, by="store"),
    Row(Sys.STO_LIST, StoList, list[File], by="store"),
    Row(Sys.STO_STAT, StoPath, File, by="store"),
    Row(Sys.STO_HISTORY, StoHistory, list[Version], by="store"),
    Row(Sys.STO_ROLLBACK, StoRollback, File, by="store", again=_ONCE),
    Row(Sys.STO_REMOVE, StoPath, int, by="store", again=_ONCE),
    Row(Sys.STO_TRASH, StoTrash, list[Trashed], by="store"),
    Row(Sys.STO_RESTORE, StoRestore, File, by="store", again=_ONCE),
    Row(Sys.STO_EMPTY, StoEmpty, int, by="store", again=_ONCE),
    Row(Sys.STO_SHARE, StoShare, by="store", again=_ONCE),
    Row(Sys.STO_UNSHARE, StoUnshare, bool, by="store", again=_ONCE),
    Row(Sys.STO_SHARES, NoArgs, list[Share], by="store"),
    Row(Sys.STO_MOUNT, StoMount, Mount, by="store", again=_ONCE),
    Row(Sys.STO_UNMOUNT, StoPath, bool, by="store", again=_ONCE),
    Row(Sys.STO_MOUNTS, StoSpace, list[Mount], by="store"),
    Row(Sys.STO_SEARCH, StoSearch, list[FoundFile], by="store"),
    Row(Sys.STO_UPLOAD, StoUpload, int, by="store", again=_ONCE),
    Row(Sys.STO_PIECE, StoPiece, by="store"),
    Row(Sys.STO_FINISH, StoFinish, File, by="store", again=_ONCE),
    Row(Sys.STO_ABORT, StoAbort, by="store", again=_ONCE),
    Row(Sys.STO_STATS, StoSpace, dict[str, Any], by="store"),
    Row(Sys.STORE_SNAPSHOT, NoArgs, str, by="store", piece=int),
    Row(Sys.TOKEN_NEW, NewToken, Spawned, again=_ONCE),
    Row(Sys.TOKEN_LIST, NoArgs, TokenList),
    Row(Sys.TOOL_LIST, NoArgs, list[ToolInfo], by="toolbox"),
    Row(Sys.TOOL_CALL, CallTool, Any, by="toolbox", again=_NEVER, piece=str),
    Row(Sys.TOOL_TRUST, TrustTool, by="toolbox", again=_ONCE),
    Row(Sys.TOOL_ADMIT, AdmitTool, bool),
    Row(Sys.ASK_LIST, NoArgs, list[Asked]),
    Row(Sys.ASK_WATCH, WatchAsks, piece=Asked),
    Row(Sys.ASK_ANSWER, AnswerAsk),
    Row(Sys.RULES, NoArgs, RulesInForce),
    Row(Sys.ALWAYS_LIST, NoArgs, list[Always]),
    Row(Sys.ALWAYS_REVOKE, RevokeAlways),
)


# ── errors ────────────────────────────────────────────────────────────────────────────────────────────────


def error(code: int, message: str) -> OSError:
    """An OSError that prints as `[Errno N] message`; Python picks the subclass by the number."""
    return OSError(code, message)


def errno_name(code: int) -> str:
    return errno.errorcode.get(code, str(code))


# ── texts as Linux has them ───────────────────────────────────────────────────────────────────────────────


def os_text(value: str | bytes | os.PathLike[str]) -> str:
    """A value that is bytes for Linux (an argument, a variable, a path) as a text that a message can carry. Bytes that
    are no UTF-8 become a NUL, which no such value contains, followed by one character for each byte."""
    plain = os.fspath(value)
    if isinstance(plain, str) and plain.isascii() and plain[:1] != "\0":  # nearly all
        return plain
    encoded = plain if isinstance(plain, bytes) else plain.encode("utf-8", "surrogateescape")
    try:
        text = encoded.decode()
    except UnicodeDecodeError:
        return "\0" + encoded.decode("latin-1")
    return text if text[:1] != "\0" else "\0" + text  # must not be taken for bytes: the kernel refuses it


def os_bytes(text: str) -> bytes:
    """The bytes that `os_text` was made from."""
    return text[1:].encode("latin-1") if text[:1] == "\0" else text.encode("utf-8", "surrogateescape")


def os_str(text: str) -> str:
    """The same value as Python has it in os.environ and sys.argv."""
    return os_bytes(text).decode("utf-8", "surrogateescape") if text[:1] == "\0" else text


def os_shown(text: str) -> str:
    """The same value for people: bytes that are no UTF-8 as `\\xff`."""
    return os_bytes(text).decode("utf-8", "backslashreplace") if text[:1] == "\0" else text
