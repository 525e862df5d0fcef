"""Messages between aiosd's own processes: kernel ↔ supervisor and kernel ↔ services.

They travel as msgpack frames: to the supervisor over a Unix stream socket (`libaios.stream`, because
descriptors go with them), to a service over a channel (`libaios.channel`). Both ends are trusted; decoding still
checks types, because a bug is found where it enters.

Every service gets its calls as `Ask`, answers each with one `Answered` or `Failed`, and may send `Part`s of a long
answer before that. An llm core gets its generations as `Submit`, because much of them changes while they run.

A call is known on the way kernel → service → kernel by its `CallKey`: the peer that made it and its call id. The
key is stable over a restart of kernel and service, so a call that is submitted twice is run once.
"""

from __future__ import annotations

from typing import Any

from msgspec import Raw, Struct, msgpack

from aiosd.access.deed import Deed
from aiosd.access.rules import AccessPolicy
from aiosd.budgets.price import Price
from libaios.wire import Generate, Limits, Logprobs, Template, ToolCall, Usage

CallKey = tuple[int, int]  # (peer: agent pid, or -client id; call id)


# ── kernel → service ──────────────────────────────────────────────────────────────────────────────────────


class PurseShare(Struct, array_like=True, frozen=True):
    """A budget in which a call has a part: whose it is, the tokens that are left of it, and how many its calls may hold
    at a time; None: it does not limit that."""

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
    program: bytes = b""  # which program it is, see `access.deed.Subject`,
    sha256: bytes = b""  # … and with which content
    shares: list[PurseShare] = []  # its budgets of tokens
    network: tuple[int, int] = (0, 0)  # of one in a network of its own: Linux pid, and the inode of that network


class Ask(Struct, array_like=True, frozen=True, tag=True):
    """Do this call; `args` as in the request, checked by the kernel against the call's row. `again`: it was given to a
    process before that has died since, a kernel or a service.

    `settled`: of the calls of this peer that take effect ONCE, those with a lower id are over. Their replies are with
    the peer, and none of them will be submitted again; 0: that is not known. `life`: how often the peer was started
    again; its call ids begin anew each time. `approved`: the digest of the deed that the call may do. `moved`: another
    process of this service had it, and had not begun it."""

    key: CallKey
    caller: Caller
    sys: int
    args: Raw
    again: bool = False
    settled: int = 0
    life: int = 0
    approved: bytes = b""
    moved: bool = False


class Submit(Struct, array_like=True, frozen=True, tag=True):
    """To an llm core: run a generation. One that the core has already goes on, and its pieces are sent from the end
    of `request.given` on. `budget`: how many more tokens the agent may use (None: unlimited). `mu`: mirostat's state
    after `request.given`, where it is known. `shares`: the budgets, so that calls do not go beyond one together."""

    key: CallKey
    request: Generate
    nice: int = 0
    group: str = ""
    budget: int | None = None
    mu: float | None = None
    others: bool = False  # other models stand ready for it: rather than make it wait, let it fail
    shares: list[PurseShare] = []
    money: int | None = None  # how much more the agent may spend, in 10^-12 of a unit; None: unlimited
    price: Price | None = None  # what it pays for tokens, where money is limited


class CancelCall(Struct, array_like=True, frozen=True, tag=True):
    """Free whatever the call holds before the next step. No answer: the kernel has already replied."""

    key: CallKey


class Park(Struct, array_like=True, frozen=True, tag=True):
    """Take the generations of this peer out of decoding (True) or let them go on (False). Answered with `Parked` and
    the same `number` (not 0), behind the last that was decoded for it."""

    peer: int
    parked: bool
    number: int = 0


class ParkCall(Struct, array_like=True, frozen=True, tag=True):
    """The same for one call: its reader is slow."""

    key: CallKey
    parked: bool


class Keep(Struct, array_like=True, frozen=True, tag=True):
    """Cancel every call of a peer that is not in `peers`: sent to a service that has loaded or got a new kernel."""

    peers: list[int]


class PeerGone(Struct, array_like=True, frozen=True, tag=True):
    """This peer is dead (or a client that has not come back): what is kept for it alone is of no more use."""

    peer: int


class Schedule(Struct, array_like=True, frozen=True, tag=True):
    """Who runs next from now on; all calls are kept. A quantum ends with the first of tokens and seconds. `shares`:
    what groups get as a whole, in agents of nice 0. Sent to every core that has loaded, and when it changes."""

    policy: str
    tokens: int
    seconds: float
    shares: dict[str, float] = {}


class Renice(Struct, array_like=True, frozen=True, tag=True):
    """The nice value of all calls of this peer."""

    peer: int
    nice: int


class Rules(Struct, array_like=True, frozen=True, tag=True):
    """What agents may do. Sent to every service that has loaded, and when it changes. A service may know from it that
    a deed needs nobody's leave; whatever else is to be decided it leaves to the kernel (`Needs`)."""

    policy: AccessPolicy


class ErrandDone(Struct, array_like=True, frozen=True, tag=True):
    """What the system call of an `Errand` got: an encoded `wire.Reply`, whose id is the number again."""

    number: int
    reply: bytes


class CopiesUsed(Struct, array_like=True, frozen=True, tag=True):
    """By promise (`Answered.promise`): how often the kernel has given that answer again since the last such report."""

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
    """The service serves: sent when it has loaded, and again to every new kernel. `info` of an llm core has the fields
    of `wire.ModelInfo` without name and default."""

    info: dict[str, Any] = {}


class LoadFailed(Struct, array_like=True, frozen=True, tag=True):
    """One line that says why; the service exits after it."""

    message: str


class Working(Struct, array_like=True, frozen=True, tag=True):
    """From now on a core works on this call alone; None: not any more. A death in between is this call's fault. (Other
    services, whose calls are shorter than this message takes, write it into their channel.)"""

    key: CallKey | None


class Begun(Struct, array_like=True, frozen=True, tag=True):
    """A call that had waited in the service begins now, beside others."""

    key: CallKey


class Needs(Struct, array_like=True, frozen=True, tag=True):
    """This call amounts to a deed that the kernel has to decide on. The service keeps nothing of the call: it is
    denied, or comes again with `Ask.approved`."""

    key: CallKey
    deed: Deed


class Parked(Struct, array_like=True, frozen=True, tag=True):
    """The `Park` of this number is in force: what comes from now on was decoded after it."""

    number: int


class Delta(Struct, array_like=True, frozen=True):
    """New output of one generation. `offset`: how much was given out before it, in the core's unit (`wire.Progress`).

    `text` is exactly the text of `tokens`: where text is held back (half a character, a stop string or a tool call that
    may be under way), so are its tokens. So what was given out is always a list of whole tokens, and can be forced back
    after a death. A core whose model is elsewhere sends text alone. `charged`: how many tokens it costs; None: as many
    as there are in `tokens`. `mu`: mirostat's state after them, where the call uses it."""

    key: CallKey
    offset: int
    tokens: list[int]
    text: str
    logprobs: Logprobs | None = None
    charged: int | None = None
    mu: float | None = None


class Started(Struct, array_like=True, frozen=True):
    """A call got its slot, with what its prompt cost; 0 tokens: that is known at its end."""

    key: CallKey
    prompt_tokens: int
    cached_tokens: int


class Spent(Struct, array_like=True, frozen=True):
    """Prompt tokens that a core charges when it knows them, in place of `Started` and of what `GenerationDone.usage`
    says: of an attempt at an endpoint when it is sent. Negative: an attempt that cost nothing is given back."""

    key: CallKey
    prompt_tokens: int
    cached_tokens: int = 0


class Step(Struct, array_like=True, frozen=True, tag=True):
    """What one or several steps brought. Calls that stream are in every step's message, others now and then
    (so that their tokens are known should the core die)."""

    deltas: list[Delta] = []
    started: list[Started] = []  # they have a slot: the first time, or again
    preempted: list[CallKey] = []  # they have none any more, and wait
    spent: list[Spent] = []


class GenerationDone(Struct, array_like=True, frozen=True, tag=True):
    """The one final word on a generation; `tokens` and `text` are those after the last delta. `charged`: as in a delta;
    negative where the deltas had charged too many, so that in the end `usage` is what was charged. `short`: the kind of
    budget that has ended it, where the core knows."""

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
    spent: Spent | None = None  # what is still to be charged for the prompt, or given back


class Answered(Struct, array_like=True, frozen=True, tag=True):
    """Final word on an `Ask`: `body` is the reply's, already encoded. `prompt_tokens` are charged to the caller.
    `promise`: a number, not 0: until the service names it in `Stale` the caller would get this answer again for the
    same call, so the kernel may give it from memory."""

    key: CallKey
    body: bytes
    prompt_tokens: int = 0
    promise: int = 0


class Stale(Struct, array_like=True, frozen=True, tag=True):
    """These promises are taken back. Sent before the answer to the call that has changed what they were about; with a
    `Loaded` all promises made before it are void."""

    promises: list[int]


class Part(Struct, array_like=True, frozen=True, tag=True):
    """Part of the answer to an `Ask`: the body of a partial reply, already encoded."""

    key: CallKey
    offset: int
    body: bytes


class Errand(Struct, array_like=True, frozen=True, tag=True):
    """Make this system call in the name of the caller of `key`, a call that the service has open. Answered with one
    `ErrandDone`, unless that call ends before. `number`: no two errands of a service have the same, and a later one has
    a higher one; `again`: it was sent before, to a kernel that has died since."""

    key: CallKey
    number: int
    sys: int
    args: Raw
    again: bool = False


class ToolUse(Struct, array_like=True, frozen=True, tag=True):
    """From the toolbox: what calls of this agent have used since the last such message, in microseconds on processors,
    and the memory that they hold now, in bytes. Sent while they run, and before they are answered."""

    pid: int
    cpu_us: int
    memory_bytes: int


class Failed(Struct, array_like=True, frozen=True, tag=True):
    """Final word on any call that could not be served. `elsewhere`: another model may be able to. `short`: the kind of
    budget of which it would need more than is left."""

    key: CallKey
    errno: int
    message: str
    elsewhere: bool = False
    short: str = ""


class Health(Struct, array_like=True, frozen=True, tag=True):
    """From an llm core, when it changes: why a call that comes now would have to wait long; "": it would not."""

    why: str


class Denied(Struct, array_like=True, frozen=True, tag=True):
    """From the proxy: it has not connected this agent to a host. Told once in a while for each."""

    pid: int
    host: str
    port: int
    why: str


class ProxyUse(Struct, array_like=True, frozen=True, tag=True):
    """From the proxy: what it has used for this agent since the last such message, in microseconds on processors."""

    pid: int
    cpu_us: int


class Contexts(Struct, array_like=True, frozen=True, tag=True):
    """Where the contexts of peers lie that have one: "slot", "ram" or "disk", and how many tokens they have.
    Sent now and then while calls run."""

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
    | Failed
    | Health
    | Denied
    | ProxyUse
    | Contexts
    | Stats
)


# ── kernel → supervisor ───────────────────────────────────────────────────────────────────────────────────


class BudgetShare(Struct, array_like=True, frozen=True):
    """A budget that an agent shares: that of `owner`, itself or an ancestor, with what it allows since when
    (monotonic clock, s). Whatever becomes of the owner, it lasts as long as any that shares it."""

    owner: int  # 0: the agent that is about to be forked
    limits: Limits
    since: float = 0.0  # 0: the moment of the fork


class Fork(Struct, array_like=True, frozen=True, tag=True):
    """Fork an agent, or (`outside`) only remember one. The same `key` again names the same agent. What it runs, its
    arguments, environment and folder are in its letter (see `aiosd.ipc.letter`), which the supervisor does not read.
    Descriptors with the frame: the letter, and then stdin, stdout, stderr; without these the agent inherits those of
    agent `ppid`, or gets /dev/null and its log.
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
    named: bool = False  # the name was given, not made from the program's
    shares: list[BudgetShare] = []
    client: tuple[int, int] = (0, 0)  # the process that it is attached to: Linux pid and start time
    restart: str = "no"  # see aiosd.init.restart
    token: bytes = b""  # the hash of its token for the gateway, see kernel.tokens
    sandbox: str = "none"  # its level; the rest of its box is in the letter
    program: bytes = b""  # the hash of its path, if a person has started it,
    sha256: bytes = b""  # … and of its content, which its process has checked
    outside: bool = False  # it has no process: programs from outside are it, see kernel.outside
    template: Template | None = None  # from which it is forked; None: the supervisor


class StartServer(Struct, array_like=True, frozen=True, tag=True):
    """Of the toolbox to the supervisor: fork this MCP server; `number` is for the answers. Descriptors: see
    `aiosd.init.servers`."""

    number: int
    name: str


class ServerIs(Struct, array_like=True, frozen=True, tag=True):
    """The answer: its Linux pid; 0 when it has ended."""

    number: int
    ospid: int


class SendSignal(Struct, array_like=True, frozen=True, tag=True):
    """To the agent's process group, then to every descendant found outside it. A `key` is served once."""

    pid: int
    signal: int
    key: CallKey | None = None


class Mark(Struct, array_like=True, frozen=True, tag=True):
    """Remember about the agent what a successor of this kernel must know: a new nice value, a new parent, the
    budget that ended it, that its exit status has been collected. `by` is the call that did it, and `answer` the
    encoded body of its reply: submitted again to a new kernel, it gets that and does nothing."""

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
    """The system can serve. `line` is what the terminal shows, `notes` are lines of what has failed all the same."""

    line: str
    notes: list[str] = []


class Shutdown(Struct, array_like=True, frozen=True, tag=True):
    """Begin to stop the system (`aiosd stop`), or do not come up (`error` set)."""

    error: str = ""


class SettingChanged(Struct, array_like=True, frozen=True, tag=True):
    """A setting was changed at run time: what is forked from now on must know."""

    name: str
    value: str


# ── supervisor → kernel ───────────────────────────────────────────────────────────────────────────────────


class Forked(Struct, array_like=True, frozen=True, tag=True):
    """It runs, or it has no process. Not sent when it has rung for itself and nothing comes with it. Descriptors with
    the frame: of a confined agent its door, and of one in a network of its own its gates."""

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
    end of its doorbell. The kernel prepares what it can; then the agent rings as soon as it runs, if it can, or
    `Forked` or `ForkFailed` comes."""

    forked: Forked


class ForkFailed(Struct, array_like=True, frozen=True, tag=True):
    """With a descriptor: the message is in there (`letter.read_text`), from the process that could not become the
    agent."""

    key: CallKey
    errno: int
    message: str


class ChildStopped(Struct, array_like=True, frozen=True, tag=True):
    pid: int
    stopped: bool


class ChildExited(Struct, array_like=True, frozen=True, tag=True):
    """`status` as from os.waitstatus_to_exitcode; `reason` set when the supervisor knows more. `again_s`: its process
    has ended, and it is started again after that time. `cpu_s`: what its process has used of processors, with the
    children that it had waited for."""

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


class TemplateSaid(Struct, frozen=True):
    """From a template to the supervisor, as JSON. Neither `ready` nor `stale`: it cannot serve, for the reason in
    `words`."""

    ready: bool = False
    stale: bool = False  # what it has imported has changed; it serves no more
    version: str = ""  # of Python
    loaded: int = 0  # modules
    errno: int = 0
    words: str = ""


class TemplateShown(Struct, array_like=True, frozen=True):
    """A template, for people."""

    name: str
    pid: int
    ospid: int
    state: str  # "loading" or "ready"
    of: Template
    python: str  # version of its interpreter; "": not known yet
    loaded: int  # modules
    agents: int  # forked from it so far
    started: float  # Unix time


class Templates(Struct, array_like=True, frozen=True, tag=True):
    """All templates that there are now."""

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
    report: dict[str, Any]  # what came of it, see config.Settings


class Stop(Struct, array_like=True, frozen=True, tag=True):
    """The system goes down: refuse new calls. Agents are being ended; when they are, `last` is the kernel's turn."""

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
