"""aiosd's own command line: settings from flags, environment and file; status, completion, the background."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

import click
import msgspec
import pytest

from aiosd import config
from aiosd.commands import MODULES, cli, edge, figures, summary
from aiosd.config import autostart, keys
from aiosd.errors import UsageError
from aiosd.llm import policy
from libaios import wire
from libaios.client import NoKernel
from libaios.home import Home
from libaios.sandbox import CERTIFICATES
from libaios.wire import Sys
from tests import impatient
from tests.conftest import System, eventually

Fresh = Callable[..., System]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., config.Settings]:
    """The settings of a home with this aiosd.toml, read in the folder /models."""

    def do(toml: str = "", environ: dict[str, str] | None = None, **flags: object) -> config.Settings:
        (tmp_path / "aiosd.toml").write_text(toml)
        return config.load(flags, Home(tmp_path), None, environ or {}, "/models")

    return do


Load = Callable[..., config.Settings]

# ── where a value comes from ──────────────────────────────────────────────────────────────────────────────


def test_the_default_is_the_embedded_model(load: Load) -> None:
    settings = load()
    (model,) = settings.models
    assert model.name == "nano"
    assert model.path.endswith("nano.gguf")
    assert (model.ctx, model.slots, model.gpu_layers, model.exact) == (None, None, 0, False)
    assert (settings.policy, settings.log_level, settings.keep_dead) == ("fair", "info", 1000)
    assert (settings.quantum, settings.shares) == ((64, 10.0), {})


def test_no_file_is_no_error(tmp_path: Path) -> None:
    assert config.load({}, Home(tmp_path / "nowhere"), None, {}, "/").models[0].name == "nano"


def test_flag_over_environment_over_file(load: Load) -> None:
    toml = "ctx = 1000\nslots = 1\nthreads = 1\n"
    environ = {"AIOSD_SLOTS": "2", "AIOSD_THREADS": "2"}
    (model,) = load(toml, environ, threads=3).models
    assert (model.ctx, model.slots, model.threads) == (1000, 2, 3)


@pytest.mark.parametrize(
    ("toml", "value"),
    [('lookahead = "auto"', None), ('lookahead = "off"', 0), ("lookahead = 4", 4), ('lookahead = "4"', 4), ("", None)],
)
def test_how_far_to_look_ahead(load: Load, toml: str, value: int | None) -> None:
    assert load(toml).models[0].lookahead == value
    assert load(f'[[model]]\npath = "nano"\n{toml}').models[0].lookahead == value


@pytest.mark.parametrize("wrong", ['"on"', "16", "-1", "true", '""'])
def test_how_far_not(load: Load, wrong: str) -> None:
    with pytest.raises(UsageError, match=r"lookahead.*; else auto or off"):
        load(f"lookahead = {wrong}")


def test_an_empty_variable_counts_as_unset(load: Load) -> None:
    assert load("slots = 3", {"AIOSD_SLOTS": ""}).models[0].slots == 3


@pytest.mark.parametrize(
    ("word", "name", "path"),
    [
        ("big.gguf", "big", "/models/big.gguf"),
        ("/models/big.gguf", "big", "/models/big.gguf"),
        ("writer=big.gguf", "writer", "/models/big.gguf"),
        ("writer=/models/a=b.gguf", "writer", "/models/a=b.gguf"),
        ("./a=b.gguf", "a=b", "/models/a=b.gguf"),
        ("../big model.gguf", "big_model", "/big model.gguf"),
    ],
)
def test_model_names_and_paths(load: Load, word: str, name: str, path: str) -> None:
    (model,) = load(model=[word]).models
    assert (model.name, model.path) == (name, path)


def test_nano_by_another_name_and_a_file_called_nano(load: Load) -> None:
    models = load(model=["nano", "second=nano", "third=./nano"]).models
    assert [model.name for model in models] == ["nano", "second", "third"]
    assert models[0].path == models[1].path
    assert models[2].path == "/models/nano"


def test_models_of_the_environment(load: Load) -> None:
    models = load(environ={"AIOSD_MODEL": "a.gguf:b=c.gguf"}).models
    assert [(model.name, model.path) for model in models] == [("a", "/models/a.gguf"), ("b", "/models/c.gguf")]


def test_models_of_the_file(load: Load, tmp_path: Path) -> None:
    toml = """
slots = 8
ctx = 4096
[[model]]
path = "sub/a.gguf"
[[model]]
name = "b"
path = "nano"
slots = 2
kv_memory = "1G"
"""
    first, second = load(toml).models
    assert (first.name, first.path, first.slots, first.ctx) == ("a", str(tmp_path / "sub/a.gguf"), 8, 4096)
    assert (second.name, second.slots, second.ctx, second.kv_memory) == ("b", 2, 4096, 1 << 30)
    assert [model.slots for model in load(toml, slots=5).models] == [5, 5]
    assert [model.name for model in load(toml, model=["x.gguf"]).models] == ["x"]


def test_two_models_of_one_name(load: Load) -> None:
    with pytest.raises(UsageError, match="two models named 'a'"):
        load(model=["a.gguf", "x/a.gguf"])


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("polcy = 'fifo'", "line 1: unknown key 'polcy' (did you mean 'policy'?)"),
        ("# slots = 1\n\nslots = 0", "line 3: slots: 0 is out of range (from 1 to 256)"),
        ("slots = 'many'", "line 1: slots: 'many' is no whole number"),
        ("slots = true", "line 1: slots: True is no whole number"),
        ("slots = 2.5", "line 1: slots: 2.5 is no whole number"),
        ("exact = 'perhaps'", "line 1: exact: 'perhaps' is neither true nor false"),
        ("policy = 'lottery'", "line 1: policy: 'lottery' is none of fifo"),
        ("quantum = 0", "line 1: quantum: 0 is out of range (from 1 to 1000000)"),
        ("quantum = '64,'", "line 1: quantum: '' is no number of seconds"),
        ("quantum = '1,2,3'", "line 1: quantum: '1,2,3' is no quantum (such as 64, or 64,10: tokens and seconds)"),
        ("slots = 1\nshares = 3", "line 2: shares: 3 is no list of shares (such as web=4,batch=0.5)"),
        ("slots = 1\n[shares]\nweb = 0\n", "line 2: shares: web=0 is no share of a group"),
        ("kv_memory = 'big'", "line 1: kv_memory: 'big' is no size"),
        ("ctx = 1\n[[model]]\npath = 'a'\n\n[[model]]\nname = 'b'\n", "line 5: a model without path"),
        ("ctx = 1\n[[model]]\npath = 'a'\npolicy = 'fifo'\n", "line 4: unknown key 'policy'"),
        ("[[model]]\npath = 'a'\n[[model]]\npath = 'b'\nctx = 0\n", "line 5: ctx: 0 is out of range"),
        ("[model]\npath = 'a'\n", "line 1: models are written as [[model]]"),
        ("[colours]\nred = 1\n", "line 1: unknown key 'colours'"),
        ("slots = = 1", "at line 1"),
        ("log_size = '1K'", "line 1: log_size: 1K is out of range (from 4.0K, or 0: no limit)"),
        ("log_keep = 0", "line 1: log_keep: 0 is out of range (from 1 to 1000)"),
        ("[agent]\nfile = 'a'\n", "line 1: agents are written as [[agent]]"),
        ("[[agent]]\nname = 'a'\n", "line 1: an agent has one of file, module and command"),
        ("[[agent]]\nfile = 'a'\nmodule = 'b'\n", "line 1: an agent has one of file, module and command, not file and"),
        ("[[agent]]\nfile = 'a'\n[[agent]]\nfile = 'b'\nnise = 1\n", "line 5: unknown key 'nise' (did you mean 'nice'"),
        ("[[agent]]\nfile = 'a'\n\n[[agent]]\nfile = 'b'\nnice = 20\n", "line 6: nice: 20 is out of range (from -20"),
        ("[[agent]]\nfile = ''\n", "line 2: file: '' is no text"),
        ("[[agent]]\ncommand = []\n", "line 2: command: no program is named"),
        ('[[agent]]\ncommand = "a \'b"\n', "line 2: command: No closing quotation"),
        ("[[agent]]\nfile = 'a'\nname = 'a b'\n", "line 3: name: 'a b' is no name"),
        ("[[agent]]\nfile = 'a'\nname = '7'\n", "line 3: name: '7' would be taken for a pid"),
        ("[[agent]]\nfile = 'a'\ntime = 'soon'\n", "line 3: time: 'soon' is no length of time"),
        ("[[agent]]\nfile = 'a'\nmemory = 0\n", "line 3: memory: '0' is no size"),
        ("[[agent]]\nfile = 'a'\nrestart = 'never'\n", "line 3: restart: 'never' is no restart policy"),
        ("[[agent]]\nfile = 'a'\n[agent.env]\nA = 1\n", "line 3: env: A = 1 is no variable of an environment"),
        ("[[agent]]\nfile = 'a'\nargs = 'x y'\n", "line 3: args: 'x y' is no list of texts"),
    ],
)
def test_an_error_in_the_file_names_its_place(load: Load, tmp_path: Path, toml: str, words: str) -> None:
    with pytest.raises(UsageError) as told:
        load(toml)
    assert str(tmp_path / "aiosd.toml") in str(told.value)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def test_an_error_in_the_environment_names_the_variable(load: Load) -> None:
    with pytest.raises(UsageError, match="AIOSD_SLOTS: 'x' is no whole number"):
        load(environ={"AIOSD_SLOTS": "x"})


def test_a_file_named_on_the_command_line_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such file"):
        config.load({}, Home(tmp_path), tmp_path / "mine.toml", {}, "/")


def test_agents_of_the_file_become_spawns(load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*CERTIFICATES, "PYTHONPATH"):
        monkeypatch.delenv(name, raising=False)
    toml = """
[[agent]]
name = "planner"
file = "planner.py"
args = ["--fast"]
cwd = "agents"
nice = 5
group = "web"
tokens = 1000
time = "10m"
memory = "512M"
restart = "on-failure:3"
env = { PLAN = "day" }

[[agent]]
command = "sh -c 'echo hi'"

[[agent]]
module = "my.clerk"
cwd = "/srv"
"""
    planner, shell, clerk = load(toml).agents
    assert (str(planner.restart), str(shell.restart)) == ("on-failure:3", "no")
    environ = {"HOME": "/home/me", "PLAN": "night", wire.ENV_PID: "7"}
    folder = str(tmp_path / "agents")
    assert autostart.spawn(planner, environ) == wire.Spawn(
        kind="file", target="planner.py", args=["--fast"], env={"HOME": "/home/me", "PLAN": "day"},
        cwd=folder, name="planner", nice=5, group="web", detached=True,
        limits=wire.Limits(1000, 600.0, 512 << 20), restart="on-failure:3",
        sandbox=wire.Sandbox(own=[folder], env=["PLAN"], program=folder + "/planner.py"),
    )  # fmt: skip
    assert (shell.kind, shell.target, shell.args, shell.cwd) == ("exec", "sh", ("-c", "echo hi"), str(tmp_path))
    assert (clerk.kind, clerk.target, clerk.cwd) == ("module", "my.clerk", "/srv")
    msgspec.convert(msgspec.to_builtins(autostart.spawn(clerk, {})), wire.Spawn)  # the kernel would take it


@pytest.mark.parametrize(("toml", "size"), [("", 64 << 20), ("log_size = 0", 0), ("log_size = '1M'", 1 << 20)])
def test_how_large_a_log_may_get(load: Load, toml: str, size: int) -> None:
    assert load(toml).log_size == size
    assert load(toml, {"AIOSD_LOG_SIZE": "0"}).log_size == 0


def test_reload_changes_what_can_change_and_names_the_rest(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("MODEL", *(key.name.upper() for key in keys.KEYS)):
        monkeypatch.delenv(keys.ENV_PREFIX + key, raising=False)
    settings = load("log_level = 'info'")
    assert config.reload(settings) == (settings, [])
    (tmp_path / "aiosd.toml").write_text("log_level = 'debug'\nstop_timeout = 9\nslots = 3\nkeep_dead = 7\n")
    new, waiting = config.reload(settings)
    assert (new.log_level, new.stop_timeout_s) == ("debug", 9)
    assert (new.models, new.keep_dead) == (settings.models, 1000)
    assert sorted(waiting) == ["keep_dead", "models"]


@pytest.mark.parametrize(
    ("toml", "quantum"),
    [("32", (32, 10.0)), ("'32'", (32, 10.0)), ("'32,0.5'", (32, 0.5)), ("[32, 2]", (32, 2.0))],
)
def test_a_quantum_is_tokens_and_seconds(load: Load, toml: str, quantum: tuple[int, float]) -> None:
    assert load(f"quantum = {toml}").quantum == quantum


@pytest.mark.parametrize("toml", ["shares = 'web=4, batch = 0.5'", "[shares]\nweb = 4\nbatch = 0.5"])
def test_shares_of_groups(load: Load, toml: str) -> None:
    assert load(toml).shares == {"web": 4.0, "batch": 0.5}
    assert load(toml, {"AIOSD_SHARES": "web=1"}).shares == {"web": 1.0}


def test_the_settings_have_all_policies() -> None:
    assert policy.NAMES == keys.POLICIES


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("policy", "RR", "rr"),
        ("quantum", "32,0.5", "32,0.5"),
        ("shares", "web=4,batch=0.5", "web=4,batch=0.5"),
        ("shares", "", ""),
        ("log-level", "debug", "debug"),
        ("stop_timeout", "2", "2"),
    ],
)
def test_what_can_be_changed_at_run_time_and_how_it_is_shown(load: Load, name: str, value: str, shown: str) -> None:
    assert config.show(config.change(load(), name, value), name) == shown


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("slots", "3", "slots cannot change in a running system"),
        ("polcy", "fair", "polcy is no setting (did you mean 'policy'?)"),
        ("policy", "lottery", "policy: 'lottery' is none of fifo, rr, priority, mlfq, fair"),
        ("stop_timeout", "1e99", "stop_timeout: 1e99 is out of range (from 0 to 1000000000)"),
    ],
)
def test_what_cannot_be_changed_at_run_time(load: Load, name: str, value: str, words: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(words)):
        config.change(load(), name, value)


# ── real ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_file_and_environment_reach_the_core(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False, env={"AIOSD_CTX": "1200", "AIOSD_SLOTS": ""})
    (system.home / "aiosd.toml").write_text("slots = 3\nctx = 1500\n")
    (model,) = system.start().status()["models"]
    assert (model["info"]["n_slots"], model["info"]["n_ctx"]) == (3, 1200)


def test_error_in_the_file_is_one_line(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    (system.home / "aiosd.toml").write_text("slots = 3\n\nsolts = 4\n")
    for options in ([], ["-d"]):
        done = system.run("aiosd", *options)
        assert done.returncode == 1
        assert done.stderr == f"aiosd: {system.home}/aiosd.toml, line 3: unknown key 'solts' (did you mean 'slots'?)\n"


def test_broken_settings_leave_a_running_system_alone(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    (system.home / "aiosd.toml").write_text("solts = 4\n")
    system.daemon.send_signal(signal.SIGHUP)
    assert eventually(lambda: "unknown key 'solts'" in system.log())
    assert system.status()["state"] == "ready"


def test_aiosd_ends_with_the_terminal_in_which_it_runs(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    master, slave = os.openpty()
    with open(slave, "r+b", buffering=0) as terminal:
        daemon = subprocess.Popen(
            ["aiosd"], env=system.env, stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
    said = b""
    while b"aiosd: ready" not in said:
        said += os.read(master, 4096)
    daemon.send_signal(signal.SIGHUP)
    while b"settings read again" not in said:
        said += os.read(master, 4096)
    os.close(master)
    assert daemon.wait(30) == 0


def test_another_runtime_folder_finds_the_same_system(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd(start=False)
    system.env |= {"AIOS_HOME": "", "XDG_STATE_HOME": str(system.home / "s"), "XDG_RUNTIME_DIR": str(system.home / "r")}
    system.start()
    for where in ({"XDG_RUNTIME_DIR": str(tmp_path)}, {"XDG_RUNTIME_DIR": "", "TMPDIR": str(tmp_path)}):
        assert json.loads(system.run("aiosd", "status", "--json", env=where, check=True).stdout)["state"] == "ready"
    system.stop()


def test_a_log_that_cannot_be_written(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    (system.home / "data" / "aiosd.log").mkdir(parents=True)
    done = system.run("aiosd", "-d")
    assert done.returncode == 1
    assert f"aiosd: {system.home}/data/aiosd.log: Is a directory\n" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_home_that_is_a_file(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = fresh_aiosd(start=False).run("aiosd", env={"AIOS_HOME": str(tmp_path / "file")})
    assert (done.returncode, done.stderr) == (
        1,
        f"aiosd: {tmp_path}/file: is no directory; put it elsewhere with --home DIR or AIOS_HOME\n",
    )


def test_home_as_an_option(aiosd: System) -> None:
    env = {"AIOS_HOME": "/nonexistent"}
    done = aiosd.run("aiosd", "--home", str(aiosd.home), "status", "--json", env=env, check=True)
    assert json.loads(done.stdout)["home"] == str(aiosd.home)


@pytest.mark.parametrize(
    "args",
    [
        ["--ctx", "0"],
        ["--slots", "257"],
        ["--slots", "x"],
        ["--policy", "lottery"],
        ["--kv-memory", "big"],
        ["--quantum", "0"],
        ["--shares", "web=none"],
        ["set", "slots", "3"],
        ["set", "policy"],
        ["set", "policy", "lottery"],
        ["set", "log-level", "loud"],
        ["nosuch"],
        ["status", "x"],
    ],
)
def test_wrong_use_is_exit_2_and_one_line(fresh_aiosd: Fresh, args: list[str]) -> None:
    done = fresh_aiosd(start=False).run("aiosd", *args)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("aiosd: ")


def test_background_starter_that_is_interrupted_takes_the_system_down(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    starter = system.popen("aiosd", "-d")
    lock = system.home / "data" / "lock"
    assert eventually(lambda: lock.exists() and lock.read_text())
    starter.send_signal(signal.SIGINT)
    assert starter.wait(30) in (-signal.SIGINT, 0)  # 0: it was ready before the signal
    if starter.returncode == 0:
        system.run("aiosd", "stop", check=True)
    assert eventually(lambda: not system.processes())


def test_a_home_that_cannot_be_made_is_reported_with_a_remedy(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    for options in ([], ["-d"]):
        done = system.run("aiosd", *options, env={"AIOS_HOME": "/proc/nowhere"})
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert done.stderr.startswith("aiosd: /proc/nowhere: ")
        assert done.stderr.endswith("; put it elsewhere with --home DIR or AIOS_HOME\n")


def test_restart_starts_as_it_was_started(fresh_aiosd: Fresh, tmp_path: Path) -> None:
    system = fresh_aiosd(start=False)
    (tmp_path / "mine.toml").write_text("ctx = 1200\n")
    assert "nothing is known of an earlier start" in system.run("aiosd", "restart").stderr
    where = {"cwd": tmp_path, "env": {"AIOSD_STOP_TIMEOUT": "3"}}
    system.run("aiosd", "-d", "--slots", "3", "--config", "mine.toml", "--model", "a=nano", check=True, **where)
    try:
        before = system.status()
        (tmp_path / "mine.toml").write_text("ctx = nonsense\n")
        done = system.run("aiosd", "restart", cwd="/")
        assert (done.returncode, system.status()["pid"]) == (1, before["pid"]), "nothing was stopped"
        assert "mine.toml" in done.stderr
        (tmp_path / "mine.toml").write_text("ctx = 1300\n")
        assert system.run("aiosd", "restart", cwd="/", check=True).stderr.startswith("aiosd: ready (a;")
        after = system.status()
        (model,) = after["models"]
        assert after["pid"] != before["pid"]
        assert (model["name"], model["info"]["n_slots"], model["info"]["n_ctx"]) == ("a", 3, 1300)
        system.run("aiosd", "stop", check=True)
        system.run("aiosd", "restart", cwd="/", check=True)  # again, though it had been stopped
        assert system.status()["models"][0]["name"] == "a"
        remembered = json.loads((system.home / "data" / "started.json").read_text())
        assert remembered["env"]["AIOSD_STOP_TIMEOUT"] == "3"
        assert (system.home / "data" / "started.json").stat().st_mode & 0o077 == 0
    finally:
        system.run("aiosd", "stop")


def test_a_system_in_the_foreground_is_not_restarted(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    done = system.run("aiosd", "restart")
    assert (done.returncode, system.alive) == (1, True)
    assert f"runs in the foreground (pid {system.daemon.pid})" in done.stderr


def test_reload_reports_what_took_effect(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd()
    file = system.home / "aiosd.toml"
    assert system.run("aiosd", "reload", check=True).stdout == "nothing changed\n"
    file.write_text("policy = 'rr'\nstop_timeout = 9\nkeep_dead = 7\n")
    told = system.run("aiosd", "reload", check=True).stdout
    assert told == "policy rr (was fair)\nstop_timeout 9 (was 5)\nafter a restart: keep_dead\n"
    assert system.status()["policy"] == "rr"
    file.write_text("polcy = 'rr'\n")
    done = system.run("aiosd", "reload")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "aiosd: nothing changed: " in done.stderr
    assert "unknown key 'polcy'" in done.stderr


def test_background_writes_a_log(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(start=False)
    started = system.run("aiosd", "-d", cwd="/", check=True)
    assert started.stderr.startswith("aiosd: ready")
    log = system.home / "data" / "aiosd.log"
    assert "aiosd: ready" in log.read_text()
    assert log.stat().st_mode & 0o077 == 0
    system.run("aiosd", "stop", check=True)


def test_stop_ends_a_system_whose_kernel_does_not_answer(fresh_aiosd: Fresh) -> None:
    system = fresh_aiosd(program=impatient.PROGRAM)
    for process in system.ps():
        if process["name"] == "kernel":
            os.kill(process["ospid"], signal.SIGSTOP)
    done = system.run("aiosd", "stop", "--timeout", "30")
    assert (done.returncode, done.stderr) == (0, "")
    assert system.daemon.wait(30) == 0


def test_an_agent_may_not_stop_the_system(aiosd: System) -> None:
    done = aiosd.run("aios-run", "--", "aiosd", "stop")
    assert done.returncode == 1
    assert "an agent may not stop the system" in done.stderr


def test_check_balances(aiosd: System) -> None:
    assert aiosd.run("aiosd", "status", "--check", check=True).stdout.endswith("check: all books balance\n")


def test_status_is_short_by_default(aiosd: System) -> None:
    text = aiosd.run("aiosd", "status", check=True).stdout
    assert len(text.splitlines()) <= 12
    assert re.search(rf"^  home +{re.escape(str(aiosd.home))}$", text, re.MULTILINE)
    for words in ("ready, up ", "fair (64 tokens or 10 s)", "0 of ", "load ", "memory "):
        assert words in text
    everything = aiosd.run("aiosd", "status", "-v", check=True).stdout
    assert len(everything.splitlines()) > 30
    for words in ("dead agents known", "machine", "prompt tokens/s"):
        assert words in everything


def test_a_short_status_of_trouble() -> None:
    found = {
        "version": "1", "state": "loading", "pid": 7, "agents": {}, "check": ["books are wrong\x1b"],
        "models": [{"name": "m", "state": "loading", "last_death": "killed by signal 9"}, {}],
        "services": [{"name": "store", "state": "dead"}, {"name": "llm", "state": "ready"}],
    }  # fmt: skip
    text = "\n".join(summary.brief(found))
    for words in ("aiosd 1, loading, pid 7", "loading, killed by signal 9", "store", "check: books are wrong\\x1b"):
        assert words in text
    assert summary.brief({})


def test_no_line_of_a_short_status_is_wider_than_a_terminal() -> None:
    machine = "2 CPUs 100% busy, load 10.51 10.40 10.38, memory 13.2G of 15.6G, disk 76.0G free"
    agents = dict.fromkeys("DQRSTZ", 1000)
    lines = summary.brief({"agents": agents, "max_agents": 6645, "home": "/h", "pid": 4_000_000}, machine)
    assert max(map(len, lines)) <= 80
    for words in ("6 load", "memory 13.2G of 15.6G", "6645 at once (limit on open files)"):
        assert words in " ".join("\n".join(lines).split()).replace("busy, ", "6 ")


def test_a_long_name_does_not_push_the_figures_of_others_aside() -> None:
    name = "a-model-whose-name-is-as-long-as-some-are-Q4_K_M"
    models = [{"name": name, "state": "ready", "default": True}]
    lines = summary.brief({"agents": {}, "max_agents": 6645, "models": models, "policy": "fair"})
    assert lines[1:] == [
        "  policy  fair",
        "  agents  0, at most 6645 at once (limit on open files)",
        f"  model {name}",
        "          ready, the default",
    ]


def test_a_model_that_loads_has_one_line() -> None:
    core = {"name": "llm:m", "state": "loading", "pid": 2}
    lines = summary.brief({"models": [{"name": "m", "state": "loading", "pid": 2}], "services": [core]})
    assert lines[2:] == ["  model m  loading"]
    lines = summary.brief({"services": [{"name": "store", "state": "restarting", "pid": 3}], "access": {"rules": 1}})
    assert lines[2:] == ["  store   restarting", "  access  1 rule"]


def test_status_shows_what_it_does_not_know() -> None:
    lines = summary.full(
        {
            "version": "1", "state": "ready", "pid": 7, "uptime_s": 3700.2, "home": "/h", "agents": {"S": 2, "R": 1},
            "max_agents": 99, "new_thing": {"a_bytes": 2048, "b": [1, 2]}, "check": ["books are wrong"],
            "tiers": {"ram": {"budget": 2 << 30}}, "copied_bytes": {"up": 4096}, "n_params": 3_554_496, "ospid": 12345,
            "step_s": 0.0123, "busy_s": 90.0, "tokens_per_s": 1234.56, "threads": 2, "threads_why": "asked for",
            "models": [{"name": "m", "state": "loading", "info": {}, "stats": {"new_figure": 0.5}}, {}],
        }
    )  # fmt: skip
    assert lines[0] == "aiosd 1, ready, up 1 h 1 min, pid 7"
    text = "\n".join(lines)
    for words in (
        "3 (1 R, 2 S), at most 99 at once (limit on open files)",
        "a bytes 2.0K, b 1, 2",
        "ram (at most 2.0G)",
        "  copied           up 4.0K\n",
        "  parameters       3,554,496\n",
        "  Linux pid        12345\n",
        "  time for a step  12.3 ms\n",
        "  this step so far 1 min 30 s\n",
        "  tokens/s         1,234.6\n",
        "  threads          2 (asked for)\n",
        "model m, loading",
        "new figure",
        "check: books are wrong",
    ):
        assert words in text


def test_status_in_full_has_its_values_below_each_other_and_no_empty_ones() -> None:
    figures = {
        "a_figure_with_a_long_name": 1,
        "cells": None,
        "rope": "",
        "tiers": {"ram": {"buffers": 2048, "why": None}},
    }
    lines = summary.full({"models": [{"name": "m", "state": "ready", "pid": 2, "stats": figures}]})
    figures_of_m = lines[lines.index("model m, ready, pid 2") + 1 :]
    assert figures_of_m == ["  a figure with a long name 1", "  contexts in memory        buffers 2.0K"]


def _keys(value: object) -> set[str]:
    if isinstance(value, list):
        return {key for part in value for key in _keys(part)}
    return set(value).union(*map(_keys, value.values())) if isinstance(value, dict) else set()


def test_every_figure_of_a_status_has_a_label_in_plain_words(aiosd: System) -> None:
    shown = aiosd.run("aiosd", "status", "-v", check=True).stdout
    for words in ("  Linux pid ", "  parameters ", "  KV memory ", "(asked for)"):
        assert words in shown
    assert not [line for line in shown.splitlines() if line.endswith(" -")], "what is empty has no line"
    keys = _keys(aiosd.status()) - {"n_ctx", "n_slots", "uptime_s"}  # these have sentences
    labels = {figures.label(name) for name in keys if not name.endswith("why") or name == "ctx_why"}
    raw = {"n", "kv", "rss", "ctx", "ospid", "bytes", "s", "why", "embd", "vocab"}
    assert not [label for label in labels if raw & set(label.split()) or "_" in label]


def test_a_long_list_in_a_status_ends_where_the_terminal_does() -> None:
    paths = [f"/usr/share/{number}" for number in range(20)]
    lines = summary.full({"sandbox": {"default": "cage", "every_agent": {"read": paths}}})[1:]
    assert max(map(len, lines)) <= 80
    assert " ".join(line.removeprefix("  agents' read").strip() for line in lines[2:]) == ", ".join(paths)


def _help(fresh_aiosd: Fresh, *words: str) -> str:
    return fresh_aiosd(start=False).run(*words, "--help", env={"COLUMNS": "80"}, check=True).stdout


def test_help_is_whole_on_80_columns(fresh_aiosd: Fresh) -> None:
    assert "..." not in _help(fresh_aiosd, "aiosd").partition("Commands:")[2]


SUBCOMMANDS = cli.command.list_commands(click.Context(cli.command))


@pytest.mark.parametrize("words", [*([name] for name in MODULES), *(["aiosd", name] for name in SUBCOMMANDS)])
def test_no_line_of_help_is_wider_than_80_columns(fresh_aiosd: Fresh, words: list[str]) -> None:
    assert [line for line in _help(fresh_aiosd, *words).splitlines() if len(line) > 80] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["set"], "missing argument 'NAME'. Choose from: policy, quantum, shares, log_level, stop_timeout"),
        (["statu"], "no such command 'statu'. Did you mean one of: 'restart', 'status'?"),
    ],
)
def test_a_usage_error_is_one_plain_line(fresh_aiosd: Fresh, words: list[str], message: str) -> None:
    done = fresh_aiosd(start=False).run("aiosd", *words)
    told_by = " ".join(["aiosd", *(words[:1] if words[0] in SUBCOMMANDS else [])])
    assert (done.returncode, done.stderr) == (2, f"aiosd: {message} (see {told_by} --help)\n")


def test_no_files_command_is_one_line(fresh_aiosd: Fresh) -> None:
    done = fresh_aiosd(start=False).run("aios-sto")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "aios-sto: missing command (see aios-sto --help)\n")


def test_help_breaks_no_word_at_its_hyphen() -> None:
    text = "on-failure aios-attach --context-ram " * 20
    formatter = edge.HelpFormatter(width=40)
    formatter.write_text(text)
    formatter.write_dl([("--restart-it", text)])
    lines = formatter.getvalue().splitlines()
    assert max(map(len, lines)) <= 40
    assert {word for line in lines for word in line.split()} == {*text.split(), "--restart-it"}


def test_status_of_an_empty_reply_is_no_error() -> None:
    assert summary.full({})


# ── completion ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shell", cli.SHELLS)
def test_completion_has_every_command(fresh_aiosd: Fresh, shell: str) -> None:
    done = fresh_aiosd(start=False).run("aiosd", "completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    for program in MODULES:
        assert f"_{program.replace('-', '_').upper()}_COMPLETE" in done.stdout


def complete(aiosd: System, line: str) -> list[str]:
    """The completions that bash offers after `line`."""
    words = line.split(" ")
    script = (
        'eval "$(aiosd completion bash)"\n'
        f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}\n"
        f'name=$(complete -p {words[0]} | sed "s/.*-F \\([^ ]*\\) .*/\\1/")\n'
        f'$name {words[0]}; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", script], env=aiosd.env, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return done.stdout.split()


def test_completion_has_options_pids_and_names(aiosd: System) -> None:
    pid = aiosd.run("aios-run", "-d", "--name", "completed", "--", "sleep", "300", check=True).stdout.strip()
    assert complete(aiosd, "aios-kill comp") == ["completed"]
    assert pid in complete(aiosd, "aios-wait ")
    assert complete(aiosd, "aios-ps --fo") == ["--format", "--forest"]
    assert complete(aiosd, "aiosd sta") == ["status"]
    assert complete(aiosd, "aios-run --memo") == ["--memory"]
    assert complete(aiosd, "aiosd tools ca") == ["calc"]
    assert complete(aiosd, "aios-ps -C ") == ["completed"]
    assert complete(aiosd, "aios-top -b -C other,comp") == ["other,completed"]
    assert complete(aiosd, "aios-ps -p ") == [pid]
    aiosd.run("aios-kill", pid, check=True)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("aios-kill -s TE", ["TERM"]),
        ("aios-kill -s SIGTE", ["SIGTERM"]),
        ("aios-kill -US", ["-USR1", "-USR2"]),
        ("aios-kill --t", ["--timeout"]),
        ("aios-ps -o pid,st", ["pid,stat", "pid,stime", "pid,started"]),
        ("aios-ps --sort mem", ["mem", "mem_bytes"]),
        ("aiosd --policy f", ["fifo", "fair"]),
        ("aiosd --log-level w", ["warning"]),
        ("aiosd set po", ["policy"]),
        ("aiosd set policy m", ["mlfq"]),
        ("aiosd set stop_timeout ", []),
    ],
)
def test_completion_has_words(fresh_aiosd: Fresh, line: str, words: list[str]) -> None:
    assert complete(fresh_aiosd(start=False), line) == words


@pytest.mark.parametrize("line", ["aiosd --home ", "aiosd --config ", "aiosd --model ", "aios-run "])
def test_completion_leaves_paths_to_the_shell(fresh_aiosd: Fresh, line: str) -> None:
    program, *_ = words = line.split(" ")
    variable = f"_{program.replace('-', '_').upper()}_COMPLETE"
    env = {variable: "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    assert fresh_aiosd(start=False).run(program, env=env, check=True).stdout.startswith("file,")


def test_completion_without_a_system_is_quiet(fresh_aiosd: Fresh) -> None:
    assert complete(fresh_aiosd(start=False), "aios-kill x") == []


# ── every command ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("program", MODULES)
def test_an_error_cannot_act_upon_the_terminal(fresh_aiosd: Fresh, program: str) -> None:
    evil = "\x1b]0;evil\x07\x9b31m\u202e\udcff"
    system = fresh_aiosd(start=False)
    for args in ([evil], [f"--{evil}"], ["--home", f"/proc/{evil}"] if program == "aiosd" else ["--", evil]):
        done = system.run(program, *args)
        assert done.returncode != 0
        assert done.stderr.rstrip("\n").isprintable(), done.stderr


@pytest.mark.parametrize("program", MODULES)
def test_version(fresh_aiosd: Fresh, program: str) -> None:
    done = fresh_aiosd(start=False).run(program, "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{program} ")


def test_commands_of_bin_are_those_of_the_package() -> None:
    assert {path.name for path in (Path(__file__).parent.parent / "bin").iterdir()} == set(MODULES)


@pytest.mark.parametrize("lost", [Sys.STATUS, Sys.SHUTDOWN])
def test_a_system_that_ends_before_it_replies_to_stop_has_been_stopped(
    monkeypatch: pytest.MonkeyPatch, lost: Sys
) -> None:
    """As for the second of two `aiosd stop` at once."""
    guardian = subprocess.Popen(["true"])

    class Ending:
        def __enter__(self) -> Ending:
            return self

        def __exit__(self, *exc: object) -> None:
            pass

        def call(self, number: Sys, *args: object, **options: object) -> dict[str, int]:
            if number is lost:
                raise OSError(errno.ENOTCONN, "aiosd is gone")
            return {"pid": guardian.pid}

    monkeypatch.setattr(edge, "connect", Ending)
    monkeypatch.setattr(cli, "_pid_of_lock", lambda: guardian.pid)
    try:
        cli._stop(30.0)
    finally:
        guardian.wait()


def test_a_system_that_ends_by_itself_before_it_is_told_to_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(timeout: float) -> None:
        raise NoKernel("the peer hung up")

    monkeypatch.setattr(cli, "_stop", gone)
    monkeypatch.setattr(cli, "_pid_of_lock", lambda: 0)
    cli._stop_or_ended(1.0)
    monkeypatch.setattr(cli, "_pid_of_lock", lambda: 7)
    with pytest.raises(NoKernel):
        cli._stop_or_ended(1.0)
