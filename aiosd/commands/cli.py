"""aiosd: starts the system in the foreground or (-d) in the background, shows its state, stops it.

$ aiosd -d
aiosd: ready (nano; ~/.local/state/aios)
$ aiosd status
aiosd 0.1.0, ready, up 12 s, pid 4711
…
$ aiosd stop
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import click

from aiosd import config
from aiosd.commands import edge
from aiosd.config import keys
from aiosd.errors import AiosdError, WorldError
from aiosd.init import apart
from libaios.client import Home, NoKernel
from libaios.wire import ENV_HOME, NoArgs, Set, Status, Sys

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from aiosd.config import Settings

EXAMPLES = """
  aiosd                                   the embedded model, here
  aiosd -d --model llama.gguf --ctx 8192  in the background, ready on return
  aiosd --model big.gguf --model small=tiny.gguf --slots 16
  aiosd -d --model ollama:llama3.2        from Ollama; aiosd models lists all
  aiosd -d --model hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M    from a hub
  aiosd status                            what runs where
  aiosd set policy rr                     change it while it runs
  aiosd reload                            read aiosd.toml again
  aiosd restart                           stop, start with the same options
  aiosd stop                              end it, and everything in it
  eval "$(aiosd completion bash)"         complete options, pids and names
"""

SHELLS = ("bash", "zsh", "fish")


def _settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each of `config.keys.KEYS`."""
    for key in reversed(keys.KEYS):
        extra: dict[str, Any] = {"is_flag": True} if not key.metavar else {"metavar": key.metavar, "type": _Value(key)}
        if key.many:
            extra |= {"multiple": True, "callback": _joined}
        help_text = f"{key.help} [{key.env}]"
        function = click.option(key.flag, key.name, default=None, help=help_text, **extra)(function)
    return function


def _joined(_context: click.Context, _parameter: click.Parameter, values: tuple[tuple[Any, ...], ...]) -> Any:
    """The value of an option that may be repeated: one tuple of all its values, None if it was not given."""
    return tuple(value for part in values for value in part) or None


class _Value(click.ParamType[Any]):
    """A value that is read by the function of its setting in `config`."""

    def __init__(self, key: keys.Key) -> None:
        self.name = key.name
        self._read = key.read
        self._words = key.words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self._read(value)
        except ValueError as err:
            self.fail(str(err), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return edge.completions(dict.fromkeys(self._words, ""), incomplete)


def _complete_value(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the value of the setting that is named before it."""
    key = keys.BY_NAME.get(context.params.get("name", ""))
    return edge.completions(dict.fromkeys(key.words if key else [], ""), incomplete)


class _Commands(click.Group):
    """Imports subcommands of other files when they are needed. The system is forked from the process that runs this
    file, and every agent from the system: all of them have in memory what is imported here."""

    APART: ClassVar = {
        "models": "models",
        "pull": "models",
        "tools": "tools",
        "mcp": "mcp",
        "token": "tokens",
        "fsck": "store",
        "backup": "store",
        "export": "store",
        "import": "store",
        "get-embedder": "getembedder",
    }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*self.APART, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in self.APART and cmd_name not in self.commands:
            import_module(f"aiosd.commands.{self.APART[cmd_name]}").register(self)
        return super().get_command(ctx, cmd_name)


@edge.new(
    _Commands,
    "Run the operating system for LLM agents. Without a command: start it, in the foreground, until SIGTERM or "
    "Ctrl-C. It prints a line that begins with `aiosd: ready` when it can serve.\n\n"
    "Settings are taken from options, else from the environment, else from the file aiosd.toml in AIOS_HOME (or "
    "in ~/.config/aios). `aiosd reload`, or SIGHUP, has them read again.",
    "[OPTIONS]",
    EXAMPLES,
    invoke_without_command=True,
)
@click.option("-d", "--daemon", is_flag=True, help="Start in the background; returns when it is ready.")
@click.option(
    "--model",
    "names",
    multiple=True,
    metavar="[NAME=]MODEL",
    type=click.Path(),
    help="A GGUF, a name from `aiosd models`, hf:REPO:QUANT, https://HOST/v1#NAME; may be repeated. [AIOSD_MODEL]",
)
@click.option("--home", metavar="DIR", type=click.Path(), help="Where socket, data and logs lie. [AIOS_HOME]")
@click.option("--config", "file", metavar="FILE", type=click.Path(), help="Settings, instead of aiosd.toml.")
@_settings_options
@click.pass_context
def command(
    context: click.Context,
    /,
    daemon: bool,
    names: tuple[str, ...],
    home: str | None,
    file: str | None,
    **flags: Any,
) -> int:
    if home is not None:
        os.environ[ENV_HOME] = os.path.abspath(home)
    if context.invoked_subcommand is not None:
        return 0
    try:
        settings = _settings(names, file, flags)
        return _to_background(settings, sys.argv[1:]) if daemon else _serve(settings)
    except AiosdError as err:
        raise edge.CommandFailed(str(err)) from None


def _settings(names: tuple[str, ...], file: str | None, flags: dict[str, Any]) -> Settings:
    """The settings for a command line, in the environment and folder of this process. Creates the home's folders."""
    given = {name: value for name, value in flags.items() if value is not None}
    if names:
        given["model"] = list(names)
    path = None if file is None else Path(os.path.abspath(file))
    agents = os.memfd_create("aios-settings")

    def load() -> Settings:
        from aiosd.commands.models import locate

        return config.seal(config.load(given, Home(), path, locate=locate), agents)

    settings = apart.run(load)
    _require_home(settings.home)
    return settings


def _require_home(home: Home) -> None:
    from aiosd.init import guardian

    hint = "put it elsewhere with --home DIR or AIOS_HOME"
    try:
        guardian.prepare(home)
    except WorldError as err:
        raise WorldError(f"{err}; {hint}") from err
    for folder in (home.socket.parent, home.data, home.logs):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise WorldError(f"{folder}: cannot be written to; {hint}")


# ── start ─────────────────────────────────────────────────────────────────────────────────────────────────


def _serve(settings: Settings) -> int:
    """Run as the guardian until the system ends."""
    from aiosd.init import guardian, notify

    try:
        return guardian.main(settings)
    except AiosdError as err:
        notify.failed(settings, str(err))
        raise


def _to_background(settings: Settings, words: list[str]) -> int:
    """Start a guardian in a session of its own; return when the system serves, or has reported why it cannot. `words`:
    the command line, which is stored for `aiosd restart`."""
    log = settings.home.data / "aiosd.log"
    reading, writing = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        _be_daemon(dataclasses.replace(settings, ready_fd=writing), log)
    os.close(writing)
    try:
        with open(reading, encoding="utf-8", errors="replace") as reply:
            state, _, line = reply.readline().rstrip("\n").partition(" ")
            notes = reply.read().splitlines()
    except KeyboardInterrupt:
        os.kill(pid, signal.SIGTERM)
        raise
    if state == "ready":
        print(line, file=sys.stderr)
        for note in notes:
            edge.complain("aiosd", note)
        from aiosd.commands import started

        started.remember(settings.home, pid, words, settings.cwd)
        return 0
    raise edge.CommandFailed(line if state == "error" else f"ended before it could serve; see {log}")


def _be_daemon(settings: Settings, log: Path) -> NoReturn:
    """In the child: output goes to the log, and success or failure is reported to the starter through ready_fd."""
    code = 1
    try:
        os.setsid()
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDONLY)
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as err:
            raise WorldError(f"{log}: {err.strerror}") from err
        for fd, number in ((null, 0), (out, 1), (out, 2)):
            os.dup2(fd, number)
        os.close(null)
        os.close(out)
        code = _serve(settings)
    except AiosdError as err:
        edge.complain("aiosd", str(err))
    except BaseException:  # of any kind: the child of a fork must not return into its parent's code
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


# ── status ────────────────────────────────────────────────────────────────────────────────────────────────


@command.command("status", context_settings=edge.SETTINGS, short_help="Show the state of the system.")
@click.option("-v", "--verbose", is_flag=True, help="Everything.")
@click.option("--json", "as_json", is_flag=True, help="Everything, as one JSON object.")
@click.option("--check", is_flag=True, help="Check the books, too; exits with 1 if they do not balance.")
def status(verbose: bool, as_json: bool, check: bool) -> int:
    """Show the state of the system: where it lives, its policy, models, agents by STAT, and the machine's figures."""
    with edge.connect() as client:
        found: dict[str, Any] = client.call(Sys.STATUS, Status(check), dict[str, Any])
    if as_json:
        from msgspec import json

        print(json.format(json.encode(found)).decode())
    else:
        from aiosd.commands import machine
        from aiosd.commands.summary import brief, full

        figures = machine.one_line(machine.measure(str(Home().data), interval_s=0.1))
        print("\n".join((full if verbose else brief)(found, figures)))
    return 1 if check and found.get("check") else 0


# ── set ──────────────────────────────────────────────────────────────────────────────────────────────────


class _Setting(click.Choice[str]):
    """The name of a setting as in aiosd.toml (log_level), or as its option is written (log-level)."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = str(value).replace("-", "_")
        if word not in self.choices:
            self.fail(f"{value!r} is none of {', '.join(self.choices)}", param, ctx)
        return word


@command.command("set", context_settings=edge.SETTINGS, short_help="Change a setting of the running system.")
@click.argument("name", metavar="NAME", type=_Setting([*keys.LIVE]))
@click.argument("value", shell_complete=_complete_value)
def change(name: str, value: str) -> int:
    """Change a setting of the running system.

    \b
      aiosd set policy fair            fifo, rr, priority, mlfq or fair
      aiosd set quantum 64,10          tokens and seconds, whichever is first
      aiosd set shares web=4,batch=1   what groups get under fair, by weight
      aiosd set log_level debug
      aiosd set stop_timeout 30

    It holds until aiosd ends or reads its settings again (SIGHUP); what is to last belongs in aiosd.toml.
    """
    try:
        keys.BY_NAME[name].read(value)
    except ValueError as err:
        raise click.UsageError(f"{name}: {err}") from None
    with edge.connect() as client:
        old, new = client.call(Sys.SET, Set(name, value), tuple[str, str])
    print(f"{name} {new or '-'} (was {old or '-'})")
    return 0


# ── stop ──────────────────────────────────────────────────────────────────────────────────────────────────


@command.command("stop", context_settings=edge.SETTINGS, short_help="End the system and everything in it.")
@click.option("--timeout", type=edge.SecondsType(min=0), default=60.0, metavar="S", help="How long to wait (60).")
def stop(timeout: float) -> int:
    """End the system and everything in it; return when it has ended.

    Agents get TERM, and KILL a few seconds later; data is flushed.
    """
    _stop(timeout)
    return 0


def _stop(timeout: float) -> None:
    end = time.monotonic() + timeout
    guardian = -1
    try:
        try:
            with edge.connect() as client:
                guardian = _pidfd(client.call(Sys.STATUS, Status(), dict[str, Any], timeout=timeout)["pid"])
                client.call(Sys.SHUTDOWN, NoArgs(), None, timeout=timeout)
        except (NoKernel, TimeoutError) as err:
            guardian = _pidfd_of_lock() if guardian < 0 else guardian
            if guardian < 0:
                raise err from None
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                signal.pidfd_send_signal(guardian, signal.SIGTERM)  # it runs, but its kernel does not reply
        except OSError as err:
            if not (isinstance(err, ConnectionError) or err.errno == errno.ENOTCONN):
                raise
            guardian = _pidfd_of_lock() if guardian < 0 else guardian  # it ends, and will not reply any more
        if guardian >= 0 and not _ended(guardian, end - time.monotonic()):
            raise edge.CommandFailed(f"has not ended within {timeout:g} s")
    finally:
        if guardian >= 0:
            os.close(guardian)


def _stop_or_ended(timeout: float) -> None:
    """The same for a system that was running just now and may end by itself before the request comes."""
    try:
        _stop(timeout)
    except NoKernel:
        if _pid_of_lock():
            raise


@command.command("restart", context_settings=edge.SETTINGS, short_help="Stop the system and start it as it was.")
@click.option("--timeout", type=edge.SecondsType(min=0), default=60.0, metavar="S", help="How long to wait (60).")
def restart(timeout: float) -> int:
    """Stop the system, and start it again in the background as `aiosd -d` started it last: with the same options, in
    the same folder, with the same AIOSD_ variables. Files such as aiosd.toml are read anew, and errors in them are
    reported before anything is stopped. A system that has been stopped is started.

    A system that was started in the foreground is restarted there (by systemctl --user restart aiosd, if systemd runs
    it).
    """
    home = Home()
    from aiosd.commands import started

    start, running = started.recall(home), _pid_of_lock()
    if running and (start is None or start.pid != running):
        raise edge.CommandFailed(f"runs in the foreground (pid {running}); restart it where it was started")
    if start is None:
        raise edge.CommandFailed(f"nothing is known of an earlier start in {home.root}; start one with: aiosd -d")
    try:
        started.apply(start)
        with command.make_context("aiosd", list(start.words)) as context:
            params = {key: value for key, value in context.params.items() if key not in ("daemon", "home")}
            names, file = params.pop("names"), params.pop("file")
            settings = _settings(names, file, params)
            if running:
                _stop_or_ended(timeout)
            return _to_background(settings, start.words)
    except AiosdError as err:
        raise edge.CommandFailed(str(err)) from None


@command.command("reload", context_settings=edge.SETTINGS, short_help="Read the settings again.")
@click.option("--timeout", type=edge.SecondsType(min=0), default=10.0, metavar="S", help="How long to wait (10).")
def reload(timeout: float) -> int:
    """Read the settings again (aiosd.toml, and the options of the start), as SIGHUP does, and print what changed.

    What cannot change in a running system is named; it takes effect after a restart. What `aiosd set` changed is
    undone.
    """
    end = time.monotonic() + timeout
    with edge.connect() as client:
        found: dict[str, Any] = client.call(Sys.STATUS, Status(), dict[str, Any])
        before = found.get("reread", {}).get("number", 0)
        os.kill(found["pid"], signal.SIGHUP)
        while (report := found.get("reread", {})).get("number", 0) == before:
            if time.monotonic() > end:
                raise edge.CommandFailed(f"the settings have not been read within {timeout:g} s")
            time.sleep(0.05)
            found = client.call(Sys.STATUS, Status(), dict[str, Any])
    if report["error"]:
        raise edge.CommandFailed(f"nothing changed: {report['error']}")
    print("\n".join(report["changed"]) or "nothing changed")
    if report["after_restart"]:
        print(f"after a restart: {', '.join(report['after_restart'])}")
    return 0


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return -1


def _pidfd_of_lock() -> int:
    pid = _pid_of_lock()
    return _pidfd(pid) if pid else -1


def _pid_of_lock() -> int:
    """The pid in the home's lock file, if that process is a guardian; else 0."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((Home().data / "lock").read_text())
        if b"aiosd" in Path(f"/proc/{pid}/cmdline").read_bytes():
            return pid
    return 0


def _ended(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout_s) * 1000))


# ── systemd ───────────────────────────────────────────────────────────────────────────────────────────────


@command.command("systemd-unit", context_settings=edge.SETTINGS, short_help="Print a unit for systemd --user.")
def systemd_unit() -> int:
    """Print a unit for systemd --user that runs this aiosd, in AIOS_HOME where that is set.

    \b
      aiosd systemd-unit > ~/.config/systemd/user/aiosd.service
      systemctl --user daemon-reload
      systemctl --user enable --now aiosd
      loginctl enable-linger           it runs while you are logged out, too

    Settings belong into aiosd.toml. `systemctl --user reload aiosd` has it read again.
    """
    from aiosd.commands import systemd

    print(systemd.unit(), end="")
    return 0


# ── completion ────────────────────────────────────────────────────────────────────────────────────────────


@command.command("completion", context_settings=edge.SETTINGS, short_help="Print the completion for a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> int:
    """Print the completion of all commands for a shell, to be evaluated by it.

    \b
      bash:  eval "$(aiosd completion bash)"     in ~/.bashrc
      zsh:   eval "$(aiosd completion zsh)"      in ~/.zshrc
      fish:  aiosd completion fish | source      in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    from aiosd.commands import MODULES

    kind = get_completion_class(shell)
    assert kind is not None
    for program in MODULES:
        variable = edge.completion_variable(program)
        print(kind(command, {}, program, variable).source())
    return 0
