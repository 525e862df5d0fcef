"""Messages between aiosd's own processes: kernel ↔ supervisor and kernel ↔ services.

They travel as msgpack frames: to the supervisor over a Unix stream socket (`libaios.stream`, because descriptors go
with them), to a service over a channel (`libaios.channel`). Both ends are trusted; decoding still checks types, because
a bug is best found where its data arrive.

Every service gets its calls as `Ask`, answers each with one `Answered` or `Failed`, and may send `Part`s of a long
answer before that. An llm core gets its generations as `Submit`, because much of them changes while they run.

A call is known on the way kernel → service → kernel by its `CallKey`: the peer that made it and its call id. The
key is stable over a restart of kernel and service, so a call that is submitted twice is run once.
"""

from __future__ import annotations

import enum
from typing import Any

from msgspec import Raw, Struct, msgpack

from aiosd.access.deed import Deed
from aiosd.access.rules import AccessPolicy
from aiosd.budgets.price import Price
from libaios.wire import Generate, Limits, Logprobs, Template, ToolCall, Usage

CallKey = tuple[int, int]  # (peer: agent pid, or -client id; call id)

LARGEST_COPY = 16 << 10  # bytes of an answer that the kernel keeps, at most


# ── kernel → service ──────────────────────────────────────────────────────────────────────────────────────


class PurseShare(Struct, array_like=True, frozen=True):
    """A budget that a call shares: its owner, the tokens that are left of it, and how many its calls may hold at a
    time; None: it does not limit that."""

    owner: int
    left: int | None
    context: int | None


class Caller(Struct, array_like=True, frozen=True):
    """The agent that a service works for; `pid` 0: the person at the terminal."""

    pid: int
    uid: int
    name: str
    named: bool  # the name was given on purpose, not made from the program's
    group: str
    nice: int = 0
    budget: int | None = None  # how many more tokens it may use; None: unlimited
    box: bytes = b""  # how it is confined: an encoded `sandbox.box.Box`; b"": not at all
    program: bytes = b""  # the program, see `access.deed.Subject`,
    sha256: bytes = b""  # … and with which content
    shares: list[PurseShare] = []  # its budgets of tokens
    network: tuple[int, int] = (0, 0)  # for an agent in a network of its own: Linux pid, and the inode of that network


class Ask(Struct, array_like=True, frozen=True, tag=True):
    """Carry out this call; `args` as in the request, checked by the kernel against the call's row. `again`: it was
    given before to a process that has died since, a kernel or a service.

    `settled`: this peer's ONCE calls with a lower id are over: their replies have reached the peer, and none of them
    will be submitted again; 0: that is not known. `life`: how often the peer was started again; its call ids begin anew
    each time. `approved`: the digest of the deed that the call may do. `moved`: another process of this service had it,
    and had not begun it. `ahead`: with the answer may come that to the call that is likely to follow."""

    key: CallKey
    caller: Caller
    sys: int
    args: Raw
    again: bool = False
    settled: int = 0
    life: int = 0
    approved: bytes = b""
    moved: bool = False
    ahead: bool = False


class Submit(Struct, array_like=True, frozen=True, tag=True):
    """To an llm core: run a generation. If the core has it already it goes on, and its pieces are sent from the end of
    `request.given` on. `budget`: how many more tokens the agent may use (None: unlimited). `mu`: mirostat's state after
    `request.given`, if known. `shares`: the budgets, so that several calls do not exceed one together."""

    key: CallKey
    request: Generate
    nice: int = 0
    group: str = ""
    budget: int | None = None
    mu: float | None = None
    others: bool = False  # other models are available for it: it must fail instead of waiting
    shares: list[PurseShare] = []
    money: int | None = None  # how much more the agent may spend, in 10^-12 of a unit; None: unlimited
    price: Price | None = None  # the price of tokens, if money is limited


class CancelCall(Struct, array_like=True, frozen=True, tag=True):
    """Free whatever the call holds before the next step. No answer: the kernel has already replied."""

    key: CallKey


class Park(Struct, array_like=True, frozen=True, tag=True):
    """Stop decoding the generations of this peer (True) or let them go on (False). Answered with `Parked` and the same
    `number` (not 0), after the last token that was decoded for it."""

    peer: int
    parked: bool
    number: int = 0


class ParkCall(Struct, array_like=True, frozen=True, tag=True):
    """The same for one call: its reader is slow."""

    key: CallKey
    parked: bool


class Keep(Struct, array_like=True, frozen=True, tag=True):
    """Cancel every call of peers that are not in `peers`: sent to a service that has loaded or got a new kernel."""

    peers: list[int]


class PeerGone(Struct, array_like=True, frozen=True, tag=True):
    """This peer is dead (or a client that has not come back): data kept for it alone are of no more use."""

    peer: int


class Schedule(Struct, array_like=True, frozen=True, tag=True):
    """The scheduling policy from now on; all calls are kept. A quantum ends with the first of tokens and seconds.
    `shares`: the weights of groups, in agents of nice 0. Sent to every core that has loaded, and when it changes."""

    policy: str
    tokens: int
    seconds: float
    shares: dict[str, float] = {}


class Renice(Struct, array_like=True, frozen=True, tag=True):
    """The new nice value of all calls of this peer."""

    peer: int
    nice: int


class Rules(Struct, array_like=True, frozen=True, tag=True):
    """The rules about agents. Sent to every service that has loaded, and when they change. If no rule is about a deed
    and it has no default, a service lets it pass; all other decisions it leaves to the kernel (`Needs`)."""

    policy: AccessPolicy


class ErrandDone(Struct, array_like=True, frozen=True, tag=True):
    """The result of an `Errand`: an encoded `wire.Reply`, whose id is the errand's number."""

    number: int
    reply: bytes


class CopiesUsed(Struct, array_like=True, frozen=True, tag=True):
    """For each promise (`Answered.promise`): how often the kernel has given that answer again since the last report."""

    counts: dict[int, int]


class GetStats(Struct, array_like=True, frozen=True, tag=True):
    req: int


class Quit(Struct, array_like=True, frozen=True, tag=True):
    pass


# ── service → kernel ──────────────────────────────────────────────────────────────────────────────────────


class LoadProgress(Struct, array_like=True, frozen=True, tag=True):
    """What a loading service is doing, `fraction` from 0 to 1."""

    what: str
    fraction: float


class Loaded(Struct, array_like=True, frozen=True, tag=True):
    """The service is ready: sent when it has loaded, and again to every new kernel. `info` of an llm core has the
    fields of `wire.ModelInfo` without name and default."""

    info: dict[str, Any] = {}


class LoadFailed(Struct, array_like=True, frozen=True, tag=True):
    """The service cannot load: one line with the reason. It exits after this."""

    message: str


class Working(Struct, array_like=True, frozen=True, tag=True):
    """From now on a core works on this call alone; None: not any more. A death in between is blamed on this call.
    (Other services, whose calls take less time than this message, write the call into their channel.)"""

    key: CallKey | None


class Begun(Struct, array_like=True, frozen=True, tag=True):
    """A call that had waited in the service begins now, in parallel with others."""

    key: CallKey


class Needs(Struct, array_like=True, frozen=True, tag=True):
    """This call needs a decision of the kernel about a deed. The service keeps nothing of the call: it is denied, or
    comes again with `Ask.approved`."""

    key: CallKey
    deed: Deed


class Parked(Struct, array_like=True, frozen=True, tag=True):
    """The `Park` of this number is in force: later tokens were decoded after it."""

    number: int


class Delta(Struct, array_like=True, frozen=True):
    """New output of one generation. `offset`: how much was given out before it, in the core's unit (`wire.Progress`).

    `text` is exactly the text of `tokens`: if text is held back (half a character, the possible beginning of a stop
    string or a tool call), so are its tokens. So the output so far is always a list of whole tokens, and can be forced
    again after a death. A core with a remote model sends text alone. `charged`: how many tokens it costs; None: as many
    as there are in `tokens`. `mu`: mirostat's state after them, if the call uses it."""

    key: CallKey
    offset: int
    tokens: list[int]
    text: str
    logprobs: Logprobs | None = None
    charged: int | None = None
    mu: float | None = None


class Started(Struct, array_like=True, frozen=True):
    """A call got its slot. With the cost of its prompt; 0 tokens: that will be known at its end."""

    key: CallKey
    prompt_tokens: int
    cached_tokens: int


class Spent(Struct, array_like=True, frozen=True):
    """Prompt tokens that a core charges when it knows them, instead of those in `Started` and `GenerationDone.usage`:
    for an attempt at an endpoint when it is sent. Negative: the charge of a free attempt is given back."""

    key: CallKey
    prompt_tokens: int
    cached_tokens: int = 0


class Step(Struct, array_like=True, frozen=True, tag=True):
    """The results of one or several steps. Calls that stream are in the message of every step, others now and then (so
    that their tokens are known if the core dies)."""

    deltas: list[Delta] = []
    started: list[Started] = []  # calls that got a slot, for the first time or again
    preempted: list[CallKey] = []  # calls that have lost their slot, and wait
    spent: list[Spent] = []


class GenerationDone(Struct, array_like=True, frozen=True, tag=True):
    """The only final message about a generation; `tokens` and `text` are those after the last delta. `charged`: as in a
    delta; negative if the deltas had charged too many, so that the sum of all charges is `usage`. `short`: the kind of
    budget that has ended it, if the core knows it."""

    key: CallKey
    offset: int
    tokens: list[int]
    text: str
    finish_reason: str
    usage: Usage
    tool_calls: list[ToolCall] = []
    logprobs: Logprobs | None = None
    charged: int | None = None
    short: str = ""
    spent: Spent | None = None  # the charge for the prompt that is still missing, or is given back


class Ahead(Struct, array_like=True, frozen=True):
    """The answer to a call that was not made yet, with a promise as in `Answered`."""

    sys: int
    args: bytes  # as the caller would send them
    body: bytes
    promise: int


class Answered(Struct, array_like=True, frozen=True, tag=True):
    """The final answer to an `Ask`: `body` is the reply's, already encoded. `prompt_tokens` are charged to the caller.
    `promise`: a number, not 0: until the service names it in `Stale` the caller would get this answer again for the
    same call, so the kernel may give it from memory. `ahead`: what the same caller would get for another call, which it
    is likely to make next."""

    key: CallKey
    body: bytes
    prompt_tokens: int = 0
    promise: int = 0
    ahead: Ahead | None = None


class Stale(Struct, array_like=True, frozen=True, tag=True):
    """These promises are taken back. Sent before the answer to the call that has changed their data; a `Loaded` ends
    all promises made before it."""

    promises: list[int]


class Part(Struct, array_like=True, frozen=True, tag=True):
    """Part of the answer to an `Ask`: the body of a partial reply, already encoded."""

    key: CallKey
    offset: int
    body: bytes


class Errand(Struct, array_like=True, frozen=True, tag=True):
    """Make this system call in the name of the caller of `key`, a call that the service has open. Answered with one
    `ErrandDone`, unless that call ends before. `number`: unique among the errands of a service, and increasing;
    `again`: it was sent before, to a kernel that has died since."""

    key: CallKey
    number: int
    sys: int
    args: Raw
    again: bool = False


class ToolUse(Struct, array_like=True, frozen=True, tag=True):
    """From the toolbox: usage of this agent's calls since the last such message, in microseconds of processor time, and
    the memory that they hold now, in bytes. Sent while they run, and before they are answered."""

    pid: int
    cpu_us: int
    memory_bytes: int


class ToolFiles(Struct, array_like=True, frozen=True, tag=True):
    """From the toolbox: the files of tools in the settings were loaded. Sent to every new kernel. `errors`: file, or
    file and tool → why it has no such tools."""

    errors: dict[str, str] = {}


class Failed(Struct, array_like=True, frozen=True, tag=True):
    """The final answer to any call that could not be served. `elsewhere`: another model may be able to serve it.
    `short`: the kind of budget of which too little is left for it."""

    key: CallKey
    errno: int
    message: str
    elsewhere: bool = False
    short: str = ""


class Health(Struct, array_like=True, frozen=True, tag=True):
    """From an llm core, when this changes: why a call that comes now would have to wait long; "": it would not."""

    why: str


class Denied(Struct, array_like=True, frozen=True, tag=True):
    """From the proxy: it has not connected this agent to a host. Sent once in a while for each host."""

    pid: int
    host: str
    port: int
    why: str


class ProxyUse(Struct, array_like=True, frozen=True, tag=True):
    """From the proxy: microseconds of processor time for this agent since the last such message."""

    pid: int
    cpu_us: int


class Contexts(Struct, array_like=True, frozen=True, tag=True):
    """Where the contexts of peers are kept: "slot", "ram" or "disk", and how many tokens they have. Sent now and then
    while calls run."""

    places: dict[int, tuple[str, int]]


class Stats(Struct, array_like=True, frozen=True, tag=True):
    req: int
    stats: dict[str, Any]


ToService = (
    Ask
    | Submit
    | CancelCall
    | Park
    | ParkCall
    | Keep
    | PeerGone
    | Schedule
    | Renice
    | Rules
    | ErrandDone
    | CopiesUsed
    | GetStats
    | Quit
)
FromService = (
    LoadProgress
    | Loaded
    | LoadFailed
    | Working
    | Begun
    | Needs
    | Parked
    | Step
    | GenerationDone
    | Answered
    | Stale
    | Part
    | Errand
    | ToolUse
    | ToolFiles
    | Failed
    | Health
    | Denied
    | ProxyUse
    | Contexts
    | Stats
)


# ── kernel → supervisor ───────────────────────────────────────────────────────────────────────────────────


class BudgetShare(Struct, array_like=True, frozen=True):
    """A budget that an agent shares: that of `owner`, itself or an ancestor, with its limits and its start (monotonic
    clock, s). It lasts as long as any agent that shares it, even if the owner is dead."""

    owner: int  # 0: the agent that is about to be forked
    limits: Limits
    since: float = 0.0  # 0: the moment of the fork


class Fork(Struct, array_like=True, frozen=True, tag=True):
    """Fork an agent, or (`outside`) only record one. The same `key` again names the same agent. Its program, arguments,
    environment and folder are in its letter (see `aiosd.ipc.letter`), which the supervisor does not read. Descriptors
    with the frame: the letter, and then stdin, stdout, stderr; without these the agent inherits those of agent `ppid`,
    or gets /dev/null and its log.
    """

    key: CallKey
    ppid: int
    pgid: int  # 0: a group of its own
    uid: int
    name: str
    nice: int
    group: str
    umask: int
    detached: bool
    attached: bool
    tty: bool
    named: bool = False  # the name was given, and not made from the program's name
    shares: list[BudgetShare] = []
    client: tuple[int, int] = (0, 0)  # the process that it is attached to: Linux pid and start time
    restart: str = "no"  # see aiosd.init.restart
    token: bytes = b""  # the hash of its token for the gateway, see kernel.tokens
    sandbox: str = "none"  # its level; the rest of its box is in the letter
    program: bytes = b""  # the hash of its path, if a person has started it,
    sha256: bytes = b""  # … and of its content, which its process has checked
    outside: bool = False  # it has no process: programs from outside act as it, see kernel.outside
    template: Template | None = None  # from which it is forked; None: the supervisor


class StartServer(Struct, array_like=True, frozen=True, tag=True):
    """From the toolbox to the supervisor: fork this MCP server; `number` is for the answers. Descriptors: see
    `aiosd.init.servers`."""

    number: int
    name: str


class ServerIs(Struct, array_like=True, frozen=True, tag=True):
    """The answer: the server's Linux pid; 0 when it has ended."""

    number: int
    ospid: int


class SendSignal(Struct, array_like=True, frozen=True, tag=True):
    """Send a signal to the agent's process group, then to every descendant found outside it. Done once for each
    `key`."""

    pid: int
    signal: int
    key: CallKey | None = None


class Mark(Struct, array_like=True, frozen=True, tag=True):
    """Record about the agent what a successor of this kernel must know: a new nice value, a new parent, the budget that
    ended it, that its exit status has been collected. `by` is the call that caused it, and `answer` the encoded body of
    its reply: if it is submitted to a new kernel again it gets that reply and does nothing."""

    pid: int
    nice: int | None = None
    ppid: int | None = None
    budget: str | None = None
    reason: str | None = None
    reaped: bool = False
    by: CallKey | None = None
    answer: bytes = b""


class Forget(Struct, array_like=True, frozen=True, tag=True):
    """The dead agent has left the history: drop its record and its log."""

    pid: int


class Ready(Struct, array_like=True, frozen=True, tag=True):
    """The system can serve. `line` is shown on the terminal, `notes` are lines about things that failed
    nevertheless."""

    line: str
    notes: list[str] = []


class Shutdown(Struct, array_like=True, frozen=True, tag=True):
    """Begin to stop the system (`aiosd stop`), or give up the start (`error` set)."""

    error: str = ""


class SettingChanged(Struct, array_like=True, frozen=True, tag=True):
    """A setting was changed at run time: for processes that are forked from now on."""

    name: str
    value: str


# ── supervisor → kernel ───────────────────────────────────────────────────────────────────────────────────


class Forked(Struct, array_like=True, frozen=True, tag=True):
    """An agent runs, or is recorded without a process. Not sent when it has rung for itself and no descriptors come
    with the message. Descriptors with the frame: of a confined agent its door, and of one in a network of its own its
    gates."""

    key: CallKey
    pid: int
    ospid: int
    pgid: int
    started: float  # Unix time, for people
    since: float  # monotonic, for deadlines; the same clock in all processes of one machine
    log: str
    handed: tuple[int, ...] = ()  # sockets among its stdin, stdout and stderr: inodes


class Forking(Struct, array_like=True, frozen=True, tag=True):
    """A process was forked that looks up its program. Descriptors with the frame: the agent's memfd, and the kernel's
    end of its doorbell. The kernel prepares what it can; then the agent rings as soon as it runs, or `Forked` or
    `ForkFailed` comes."""

    forked: Forked


class ForkFailed(Struct, array_like=True, frozen=True, tag=True):
    """An agent could not be forked. With a descriptor: the message is behind it (`letter.read_text`), from the process
    that could not become the agent."""

    key: CallKey
    errno: int
    message: str


class ChildStopped(Struct, array_like=True, frozen=True, tag=True):
    pid: int
    stopped: bool


class ChildExited(Struct, array_like=True, frozen=True, tag=True):
    """An agent's process has ended. `status` as from os.waitstatus_to_exitcode; `reason` set when the supervisor knows
    more. `again_s`: it is started again after that time. `cpu_s`: processor seconds of its process, with the children
    that it had waited for."""

    pid: int
    status: int
    reason: str = ""
    again_s: float | None = None
    cpu_s: float = 0.0


class ChildRestarted(Struct, array_like=True, frozen=True, tag=True):
    """An agent was started again, under its old pid. Descriptors as with `Forked`."""

    pid: int
    ospid: int


class ServiceForked(Struct, array_like=True, frozen=True, tag=True):
    """A service was forked (again). Descriptors: memfd and the kernel's end of the doorbell of its new channel."""

    name: str
    pid: int
    ospid: int
    deaths: int


class ServiceDied(Struct, array_like=True, frozen=True, tag=True):
    name: str
    reason: str


class TemplateReport(Struct, frozen=True):
    """From a template to the supervisor, as JSON. Neither `ready` nor `stale`: it cannot serve, for the reason in
    `words`."""

    ready: bool = False
    stale: bool = False  # files that it has imported have changed; it serves no more
    version: str = ""  # of Python
    loaded: int = 0  # modules
    errno: int = 0
    words: str = ""


class TemplateState(enum.Enum):
    """Whether a template can fork agents."""

    LOADING = "loading"  # it imports its modules
    READY = "ready"


class TemplateShown(Struct, array_like=True, frozen=True):
    """A template, for people."""

    name: str
    pid: int
    ospid: int
    state: TemplateState
    of: Template
    python: str  # version of its interpreter; "": not known yet
    loaded: int  # modules
    agents: int  # forked from it so far
    started: float  # Unix time


class Templates(Struct, array_like=True, frozen=True, tag=True):
    """All current templates."""

    shown: list[TemplateShown]


class ServerShown(Struct, array_like=True, frozen=True):
    """An MCP server that runs, for people."""

    name: str
    pid: int
    ospid: int
    started: float  # Unix time


class McpServers(Struct, array_like=True, frozen=True, tag=True):
    """All MCP servers that run now."""

    shown: list[ServerShown]


class Reread(Struct, array_like=True, frozen=True, tag=True):
    """The settings were read again: those that can change in a running system."""

    log_level: str
    schedule: Schedule
    access: AccessPolicy
    report: dict[str, Any]  # the result, see config.Settings


class Stop(Struct, array_like=True, frozen=True, tag=True):
    """The system stops: refuse new calls. Agents are being ended. With `last` all have ended, and the kernel must
    end."""

    reason: str
    last: bool = False


ToSupervisor = Fork | SendSignal | Mark | Forget | Ready | Shutdown | SettingChanged
FromSupervisor = (
    Forked
    | Forking
    | ForkFailed
    | ChildStopped
    | ChildExited
    | ChildRestarted
    | ServiceForked
    | ServiceDied
    | Templates
    | McpServers
    | Reread
    | Stop
)

encode = msgpack.Encoder().encode
decode_to_service = msgpack.Decoder(ToService).decode
decode_from_service = msgpack.Decoder(FromService).decode
decode_to_supervisor = msgpack.Decoder(ToSupervisor).decode
decode_from_supervisor = msgpack.Decoder(FromSupervisor).decode
