"""aios-run: starts an agent, connects it to the terminal, and exits as the agent does.

    $ aios-run --name planner planner.py "plan my day"
    $ aios-run -d -m libaios.agents.react "What is 37 * 91?"
    7

Without -d this process stays attached. It is one loop over the connection to the kernel, the signals that it receives
and, where there is a terminal, the relays of `terminal`. It submits a SPAWN to the kernel, then a WAIT for the agent's
end, and meanwhile turns signals into system calls:

    INT QUIT TERM HUP   are passed on to the agent (with -t Ctrl-C is a key, and the pty makes a signal of it)
    USR1 USR2           are passed on
    WINCH               is passed on; with -t the pty gets the new size instead
    TSTP                stops the agent, then this process
    CONT                continues the agent

If the kernel dies and a new one is started, the client reconnects and submits its open calls again: there is still one
spawn and one exit code. If the agent dies of an INT that was passed on, this process dies of INT, too, as a program in
the foreground would: a shell leaves its loop only then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import signal
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from aiosd.budgets import limits
from aiosd.commands import asks, budgets, edge, unseen
from aiosd.commands.wait import exit_code
from aiosd.sandbox import hosts
from libaios import template, wire
from libaios.client import Client, NoKernel
from libaios.connection import Pending, decode_body
from libaios.sandbox import user_base, wish
from libaios.wire import Kill, PidArgs, Spawn, Spawned, Sys, Wait, Waited, WatchAsks

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from aiosd.commands.terminal import RawMode, Relay

NOT_STARTED = 125
CANNOT_EXECUTE = 126
NOT_FOUND = 127

ENDING = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
FORWARDED = (*ENDING, signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH)
JOB_CONTROL = (signal.SIGTSTP, signal.SIGCONT)
FOREGROUND_POLL_S = 0.2  # between two checks: no signal reports that a running job was brought to the foreground
STOP_PATIENCE_S = 1.0  # how long to wait for the agent's stop: a shell cannot stop while a child of its vfork runs
REPORT_S = 2.0  # how long to wait for the kernel's report about an agent that has failed
LAST_OUTPUT_S = 2.0  # how long a slow reader of stdout may take after the agent's end

#: Variables that name another server than the gateway, if the user sets one of them.
OWN = ("OPENAI_", "CEREBRUM_KERNEL_URL")

EXAMPLES = """
  aios-run agent.py "some task"            a Python script, with its arguments
  aios-run -m libaios.agents.react -v "What is 37 * 91?"
  aios-run --read ~/papers --write . -e HF_TOKEN agent.py
  aios-run -t -- bash                      any program; -t: on a terminal
  aios-run -d --name crawler crawl.py      in the background: prints the pid
  aios-run -dt --name sh -- bash           the same, for aios-attach sh
  aios-run --preload autogen_agentchat.agents --python venv agent.py
  aios-run -n 5 --time 60 --tokens 10000 --memory 512M agent.py
"""


# ── arguments ─────────────────────────────────────────────────────────────────────────────────────────────


class RunCommand(click.Command):
    """Options end at FILE.py, `-m MODULE` or `--`; all following words are the agent's."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        takes_value = {word for p in self.params if isinstance(p, click.Option) and not p.is_flag for word in p.opts}
        options, kind, target = split(args, takes_value)
        ctx.meta["kind"] = kind
        return super().parse_args(ctx, [*options, "--", *target])


def split(args: Sequence[str], takes_value: set[str]) -> tuple[list[str], str, list[str]]:
    """Split the words into options of aios-run, the kind ("file", "module" or "exec"), and the program with its
    arguments."""
    i = 0
    while i < len(args):
        arg = args[i]
        if arg == "--":
            return list(args[:i]), "exec", list(args[i + 1 :])
        if arg[:1] != "-" or arg == "-":
            return list(args[:i]), "file", list(args[i:])
        i += 1
        if arg.startswith("--"):
            i += arg in takes_value
            continue
        for at, letter in enumerate(arg[1:], 1):
            if letter == "m":  # `-m MODULE`, `-mMODULE`, `-dm MODULE`
                before = [arg[:at]] if at > 1 else []
                module = [arg[at + 1 :]] if arg[at + 1 :] else []
                return [*args[: i - 1], *before], "module", [*module, *args[i:]]
            if f"-{letter}" in takes_value:
                i += at == len(arg) - 1  # else the value is the rest of this word
                break
    return list(args), "file", []


def _complete_file(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def _complete_net(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    from click.shell_completion import CompletionItem

    return [CompletionItem(word) for word in (hosts.NONE, hosts.ALL, hosts.GATEWAY) if word.startswith(incomplete)]


@edge.new(
    RunCommand,
    "Start an agent and wait for it: a Python script, a Python module or any program (a FILE that is none of Python's, "
    "but executable, is one too; - is a Python script on stdin). It gets this command's "
    "stdin, stdout and stderr, environment and working directory. By default it runs in a sandbox, where it reads the "
    "folder of its script, writes in a workspace of its own (aios-inspect -w), and gets no secrets of the environment: "
    "--read, --write and -e grant more, --sandbox none all. Where stdin is a terminal, what is typed is "
    "passed on through a pipe while in the foreground; what wants a terminal of its own gets one with -t.\n\n"
    "Exits with the agent's exit code; 128+n when signal n ended it; 124 when a budget did; 125 when there is no "
    "aiosd or it refused; 126 when the program cannot be executed; 127 when it was not found.",
    "[OPTIONS]",
    EXAMPLES,
)
@click.option("-d", "--detach", is_flag=True, help="Print the pid and return; output goes to the log (aios-attach).")
@click.option("-t", "--tty", "terminal", is_flag=True, help="Give it a terminal of its own; with -d: for aios-attach.")
@click.option("--name", metavar="NAME", help="Name in aios-ps; default: that of the script.")
@click.option(
    "--restart",
    metavar="WHEN",
    default="no",
    help="With -d: start it again when it ends: on-failure[:N], always[:N] or no. Waits grow from 0.1 to 30 s.",
)
@click.option("-n", "--nice", type=edge.Whole(-20, 19), metavar="NICE", help="From -20 (most favoured) to 19.")
@click.option(
    "-e",
    "--env",
    "variables",
    multiple=True,
    metavar="K=V|K",
    help="Set a variable in its environment; K alone: pass yours on into a sandbox.",
)
@click.option("-g", "--group", metavar="GROUP", help="Privilege group.")
@click.option("--no-gateway-env", "own_env", is_flag=True, help="Leave OPENAI_BASE_URL and the like as they are.")
@budgets.options(limits.KINDS, soft=True)
@click.option(
    "--sandbox",
    type=click.Choice(["none", "flat", "cage"]),
    help="How it is confined; default: by the settings (cage). An agent cannot choose a lower level for a child.",
)
@click.option("--read", "read", multiple=True, metavar="PATH", help="A file or folder that it may read in a sandbox.")
@click.option(
    "--write", "write", multiple=True, metavar="PATH", help="A file or folder that it may change in a sandbox."
)
@click.option(
    "--net",
    "net",
    multiple=True,
    metavar="none|all|gateway|HOST,...",
    help="Its network in a sandbox; default: by the settings. HOST: example.org, *.example.org (all below it), "
    "example.org:8443 (else ports 80 and 443). HOST, and the gateway alone: in the cage only; there the gateway is at "
    "127.0.0.1:8000, 8080, 11434 and 1234, too. With all, these ports are the machine's: the gateway is there if aiosd "
    "was started so (--gateway 0,11434).",
    shell_complete=_complete_net,
)
@click.option(
    "--preload",
    "preload",
    multiple=True,
    metavar="MODULE,...",
    help="Fork it from a warm process that has imported these: it starts at once, and shares their memory.",
)
@click.option("--python", "python", metavar="ENV", help="With --preload: an interpreter or a virtual environment.")
@click.argument(
    "target",
    nargs=-1,
    type=click.UNPROCESSED,
    metavar="FILE.py|-|-m MODULE|-- PROGRAM [ARG]...",
    shell_complete=_complete_file,
)
@click.pass_context
def command(
    context: click.Context,
    /,
    detach: bool,
    terminal: bool,
    restart: str,
    name: str | None,
    nice: int | None,
    variables: tuple[str, ...],
    group: str | None,
    own_env: bool,
    sandbox: str | None,
    read: tuple[str, ...],
    write: tuple[str, ...],
    net: tuple[str, ...],
    preload: tuple[str, ...],
    python: str | None,
    target: tuple[str, ...],
    **amounts: float | None,
) -> int:
    if not target or not target[0]:
        what = "-m needs a module" if context.meta["kind"] == "module" else "give FILE.py, -m MODULE or -- PROGRAM"
        raise click.UsageError(f"nothing to run: {what}")
    try:
        network = hosts.normal(net) if net else None
    except ValueError as err:
        raise click.UsageError(f"--net: {err}") from None
    if restart != "no" and (terminal or not detach):
        raise click.UsageError("--restart goes with -d, and not with -t: the terminal ends with the agent")
    if detach and terminal and wire.ENV_PID in os.environ:
        raise edge.CommandFailed("-d -t: only a person can start an agent on a terminal that is held, not an agent")
    if not all(map(_is_utf8, (name or "", group or ""))):
        raise edge.CommandFailed("a name is not valid UTF-8", NOT_STARTED)
    for path in (*read, *write):
        if not os.path.exists(os.path.expanduser(path)):
            hint = "" if path in read else "; make it first"  # for reading it may be a file or a folder
            raise edge.CommandFailed(f"{path}: there is no such file or folder to grant{hint}", NOT_STARTED)
    kind, environment, cwd = context.meta["kind"], _environment(variables), _working_directory()
    if kind == "exec" and (base := user_base(environment)):
        environment["PYTHONUSERBASE"] = base
    names = [word.partition("=")[0] for word in variables]
    gateway = False if own_env or any(name.startswith(OWN) for name in names) else None
    if own_env:  # a sandbox passes them on as well
        names += [f"{name}*" for name in OWN]
    try:
        forked_from = _template(kind, preload, python)
        grants = wish(
            kind,
            target[0],
            cwd,
            environment,
            args=target[1:],
            level=sandbox,
            read=read,
            write=write,
            variables=names,
            net=network,
            needed=template.folders(forked_from),
        )
        spawn = Spawn(
            kind=kind,
            target=wire.os_text(target[0]),
            args=[wire.os_text(arg) for arg in target[1:]],
            env={wire.os_text(key): wire.os_text(value) for key, value in environment.items()},
            cwd=wire.os_text(cwd),
            name=name,
            nice=nice,
            group=group,
            limits=budgets.limits_of(amounts),
            umask=_umask(),
            detached=detach,
            attached=not detach,
            restart=restart,
            tty=terminal,
            gateway=gateway,
            sandbox=grants,
            template=forked_from,
        )
        if detach and terminal:
            from aiosd.commands import holder

            return _print_pid(holder.start(spawn))
        with edge.connect() as client:
            if detach:
                spawned = client.call(Sys.SPAWN, spawn, Spawned)
                unseen.note_alone(spawn, spawned)
                if named := unseen.named_outside(spawn, spawned):
                    found = client.call(Sys.INSPECT, PidArgs(spawned.pid), dict[str, Any])
                    unseen.note_files(named, spawned.pid, found)
                return _print_pid(spawned.pid)
            return Attachment(client, spawn).run()
    except NoKernel as err:
        raise edge.CommandFailed(edge.reason(err), NOT_STARTED) from None
    except OSError as err:
        raise _failure(err) from None


def _template(kind: str, preload: Sequence[str], python: str | None) -> wire.Template | None:
    """The template from which the agent is forked; None: from aiosd's own processes."""
    named = [name.strip() for words in preload for name in words.split(",")]
    if not named and python is None:
        return None
    if not named:
        raise click.UsageError("--python goes with --preload; without: aios-run -- ENV/bin/python FILE.py")
    if kind == "exec":
        raise click.UsageError("--preload goes with FILE.py or -m MODULE: a program after -- starts afresh")
    for name in named:
        if not all(part.isidentifier() for part in name.split(".")):
            raise click.UsageError(f"--preload {name}: is no name of a module")
    return template.wish(named, python or "")


def _print_pid(pid: int) -> int:
    try:
        print(pid, flush=True)
    except OSError as err:  # the agent runs all the same: the user should know its pid
        edge.discard_output()
        raise edge.CommandFailed(f"agent {pid} runs, but stdout takes no pid: {err.strerror}") from None
    return 0


def _environment(variables: Sequence[str]) -> dict[str, str]:
    """The agent's environment: this process's, and the variables of -e. If an agent runs this command, its channel is
    not passed on. (A name without a value only lets a confined agent have that variable.)"""
    environment = dict(os.environ)
    for word in variables:
        key, equals, value = word.partition("=")
        if not key:
            raise click.UsageError(f"-e {word}: must be NAME=VALUE or NAME")
        if equals:
            environment[key] = value
    environment.pop(wire.ENV_CHANNEL, None)
    environment.pop(wire.ENV_PID, None)
    return environment


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text) if not text.isascii() else True


def _working_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise edge.CommandFailed("the working directory is gone", NOT_STARTED) from None


def _umask() -> int:
    old = os.umask(0o077)
    os.umask(old)
    return old


def _failure(err: OSError) -> edge.CommandFailed:
    """An error of the spawn, with the exit code that a shell has for it."""
    codes = {
        errno.ENOENT: NOT_FOUND,
        errno.ENOTDIR: NOT_FOUND,
        errno.EACCES: CANNOT_EXECUTE,
        errno.ENOEXEC: CANNOT_EXECUTE,
        errno.EISDIR: CANNOT_EXECUTE,
    }
    return edge.CommandFailed(edge.reason(err), codes.get(err.errno or 0, NOT_STARTED))


# ── an attached agent ─────────────────────────────────────────────────────────────────────────────────────


class Attachment:
    """One agent that runs attached to this command."""

    def __init__(self, client: Client, spawn: Spawn) -> None:
        self.client = client
        self.readable = client.fileno()  # when the kernel has sent something
        self.spawn = spawn
        self.pid = 0  # 0: not spawned yet
        self.ended = False
        self.interrupted = False  # by an INT that was passed on
        self.signals: list[int] = []  # received, not handled yet
        self.early: list[int] = []  # received before there was an agent
        self.relays: list[Relay] = []
        self.outputs: list[Relay] = []  # the relays for the agent's output
        self.given: list[int] = []  # descriptors for the agent, closed here when it has them
        self.master = -1  # of the pty
        self.raw: RawMode | None = None
        self.wakeup = -1
        self.asked: Pending | None = None  # the watch for the agent's asks

    def run(self) -> int:
        """Run the agent from spawn to end; returns the exit code."""
        self._catch_signals()
        try:
            self._connect_stdio()
            self.asked = asks.watch(self.client, WatchAsks(attached=True))  # before the spawn: an ask may come at once
            spawned: Spawned = self._await(self.client.submit(Sys.SPAWN, self.spawn, self.given_fds), Spawned)
            self._agent_lives(spawned.pid)
            unseen.note_alone(self.spawn, spawned)
            if named := unseen.named_outside(self.spawn, spawned):
                shown = self._await(self.client.submit(Sys.INSPECT, PidArgs(self.pid)), dict[str, Any])
                unseen.note_files(named, self.pid, shown)
            waited: Waited = self._await(self.client.submit(Sys.WAIT, Wait(self.pid)), Waited)
            self.ended = True
            for relay in self.outputs:
                relay.drain(LAST_OUTPUT_S)
        finally:
            if self.raw is not None:
                self.raw.leave()
        self._explain(waited)
        if waited.status > 0 and not waited.budget:
            self._explain_failure(waited, spawned)
        if self.interrupted and waited.status == -signal.SIGINT:
            raise KeyboardInterrupt
        return exit_code(waited)

    def _agent_lives(self, pid: int) -> None:
        self.pid = pid
        for fd in self.given:
            os.close(fd)
        self.signals = self.early + self.signals

    def _explain(self, waited: Waited) -> None:
        words = waited.reason or limits.sentence(self.spawn.limits, waited.budget)
        if words:
            edge.complain("aios-run", f"agent {self.pid}: {words}")

    def _explain_failure(self, waited: Waited, spawned: Spawned) -> None:
        """Name what the program may have missed in its sandbox."""
        if waited.denied and self.spawn.kind == "exec":  # in a Python agent the error itself has named it
            edge.complain("aios-run", f"agent {self.pid}: {waited.denied}")
        if os.isatty(2):
            unseen.note_variables(self.spawn, spawned)
            if self.spawn.kind == "exec" and spawned.sandbox != "none" and not (waited.denied or waited.reason):
                self._explain_folder()

    def _explain_folder(self) -> None:
        with contextlib.suppress(OSError):  # the kernel has forgotten the agent, or does not answer
            agent = self.client.call(Sys.INSPECT, PidArgs(self.pid), dict[str, Any], timeout=REPORT_S)
            unseen.note_folder(self.spawn, agent)

    # ── descriptors ───────────────────────────────────────────────────────────────────────────────────────

    def _connect_stdio(self) -> None:
        """Decide what the agent gets as 0, 1 and 2. The code for terminals is imported only if there is one."""
        self.given_fds = [0, 1, 2]
        if not self.spawn.tty and not os.isatty(0):
            self._give_no_reading()
            return
        from aiosd.commands import terminal
        from aiosd.commands.terminal import EOT, RawMode, Relay

        # If a read comes just after this process was sent to the background, it must fail, not stop this process.
        signal.signal(signal.SIGTTIN, signal.SIG_IGN)

        def foreground() -> bool:
            return terminal.in_foreground(0)

        if not self.spawn.tty:
            reading, writing = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(writing, False)
            self.relays = [Relay(0, writing, foreground, at_end=lambda: os.close(writing))]
            self.given, self.given_fds = [reading], [reading, 1, 2]
            self._give_no_reading()
            return
        ours = next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)
        self.master, slave = terminal.open_pty(ours)
        self.given, self.given_fds = [slave], [slave, slave, slave]
        self.outputs = [Relay(self.master, 1, unread=self._hang_up)]
        self.relays = [Relay(0, self.master, foreground, last_words=EOT), *self.outputs]
        if os.isatty(0):
            self.raw = RawMode(0)
            self._enter_raw_mode()

    def _enter_raw_mode(self) -> None:
        """Enter raw mode when this process is in the foreground. In the background (&) it would be stopped for that."""
        if self.raw is not None and not self.raw.entered:
            from aiosd.commands import terminal

            if terminal.in_foreground(0):
                self.raw.enter()

    def _give_no_reading(self) -> None:
        """A shell opens a terminal once, for reading and writing, as 0, 1 and 2. The agent gets stdout and stderr that
        can only be written to, because it must not read what the user types for other programs."""
        for number in (1, 2):
            if os.isatty(number) and fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                self.given_fds[number] = opened = self._for_writing(number)
                self.given.append(opened)

    def _for_writing(self, number: int) -> int:
        """The terminal at this descriptor, opened for writing only. If it cannot be opened again (it belongs to another
        user, after su), the agent does not get it: its output comes through a pipe."""
        try:
            return os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            from aiosd.commands.terminal import Relay

            reading, writing = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(reading, False)
            self.outputs.append(Relay(reading, number, unread=lambda: os.close(reading)))
            self.relays.append(self.outputs[-1])
            return writing

    def _hang_up(self) -> None:
        """The agent's output has no reader any more: send HUP, as for a closed terminal."""
        if self.pid and not self.ended:
            self._send(signal.SIGHUP)

    # ── loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def _await(self, call: Pending, result: Any) -> Any:
        """Handle signals and relays until `call` has its final reply; return that, or raise its error."""
        while True:
            while self.signals:
                self._on_signal(self.signals.pop(0))
            self._pump()
            self._show_asks()
            if call.final is not None:
                return decode_body(call.final, result)
            self._turn()

    def _pump(self) -> None:
        """Receive what the kernel has sent. After a kernel's death the open calls are submitted again at once, because
        nothing would arrive before that."""
        self.client.pump()
        if self.client.socket.reborn:
            self.client.pump()

    def _show_asks(self) -> None:
        for line in asks.notices(self.asked):
            if self.raw is not None and self.raw.entered:
                os.write(2, f"\r\naios-run: {line}\r\n".encode())
            else:
                edge.complain("aios-run", line)

    def _turn(self) -> None:
        self._enter_raw_mode()
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        poll.register(self.readable, select.POLLIN)
        interests: dict[int, int] = {}
        hidden = False
        for relay in self.relays:
            hidden = hidden or not (relay.done or relay.allowed())
            for fd, mask in relay.interests() if self.pid else []:
                interests[fd] = interests.get(fd, 0) | mask
        for fd, mask in interests.items():
            poll.register(fd, mask)
        ready = dict(poll.poll(FOREGROUND_POLL_S * 1000 if hidden else None))
        for relay in self.relays:
            relay.step({fd: mask for fd, mask in ready.items() if fd in interests})
        self._read_signals()

    # ── signals ───────────────────────────────────────────────────────────────────────────────────────────

    def _catch_signals(self) -> None:
        """From now on signals arrive as bytes in a pipe. One that was ignored at the start (nohup) stays ignored."""
        self.wakeup, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (*FORWARDED, *JOB_CONTROL):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, _noted)

    def _read_signals(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.signals.extend(os.read(self.wakeup, 4096))

    def _on_signal(self, number: int) -> None:
        if number == signal.SIGTSTP:
            self._stop()
        elif number == signal.SIGCONT:
            self._send(signal.SIGCONT)
        elif number == signal.SIGWINCH and self.master >= 0:
            from aiosd.commands import terminal

            ours = next((fd for fd in (0, 1, 2) if os.isatty(fd)), None)
            if ours is not None:
                terminal.copy_size(ours, self.master)
        else:
            self._send(number)

    def _send(self, number: int) -> Pending | None:
        """Send a signal to the agent; the reply is ignored. While its pid is not known (it may already have printed
        something), the signal is kept for it; but a second one that ends programs ends this process."""
        self.interrupted = self.interrupted or number == signal.SIGINT
        if self.pid:
            return self.client.submit(Sys.KILL, Kill(self.pid, number))
        if number in ENDING and any(known in ENDING for known in self.early):
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise edge.CommandFailed("interrupted before the agent was started", 128 + number)
        self.early.append(number)
        return None

    def _stop(self) -> None:
        """Ctrl-Z: stop the agent, then this process. CONT continues both."""
        if not self.pid:
            self.early.append(signal.SIGTSTP)
            return
        stopping = self._send(signal.SIGSTOP)
        deadline = time.monotonic() + STOP_PATIENCE_S
        while stopping is not None and stopping.final is None and (left := deadline - time.monotonic()) > 0:
            poll = select.poll()
            poll.register(self.readable, select.POLLIN)
            poll.poll(left * 1000)
            self._pump()
        if self.raw is not None:
            self.raw.leave()
        handler = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # Here this process is stopped until CONT. (Or not at all: Linux does not stop processes of an orphaned group.)
        signal.signal(signal.SIGTSTP, handler)
        self._enter_raw_mode()
        self._read_signals()
        self.signals = [number for number in self.signals if number not in JOB_CONTROL]
        self._send(signal.SIGCONT)


def _noted(number: int, frame: object) -> None:
    """Does nothing: Python needs a function, and the wakeup descriptor has received the signal."""
