"""The installed package: the wheel has all modules, commands and the model, and requires all that they import."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import aiosd
from tests.test_house import ROOT, SOURCES, imports, module_of
from tools import bootstrap

CONFIG = configparser.ConfigParser()
CONFIG.read(ROOT / "setup.cfg")
COMMANDS = sorted(path.name for path in (ROOT / "bin").iterdir())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel in a copy of the tree, because setuptools leaves its working files there."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("aiosd", "libaios", "bin"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("setup.cfg", "setup.py", "MANIFEST.in", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    code = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", code], cwd=tree, check=True, capture_output=True, timeout=100)
    return zipfile.ZipFile(next(tree.glob("*.whl")))


def test_wheel_has_every_module_and_data_file(wheel: zipfile.ZipFile) -> None:
    wanted = {str(path.relative_to(ROOT)) for path in SOURCES}
    wanted |= {"aiosd/py.typed", "libaios/py.typed", "aiosd/nano/nano.gguf", "aiosd/nano/MODEL_CARD.md"}
    assert wanted - set(wheel.namelist()) == set()
    assert any(re.fullmatch(r"aiosd/llm/_attention\..*\.so", name) for name in wheel.namelist())


def test_wheel_has_nothing_else(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert {top for top in tops if not top.startswith("aiosd-")} == {"aiosd", "libaios"}


def test_wheel_has_every_command(wheel: zipfile.ZipFile) -> None:
    scripts = {Path(name).name for name in wheel.namelist() if ".data/scripts/" in name}
    assert scripts == set(COMMANDS)


def test_wheel_has_the_licence(wheel: zipfile.ZipFile) -> None:
    metadata = wheel.read(next(name for name in wheel.namelist() if name.endswith("/METADATA"))).decode()
    assert "License-Expression: MIT" in metadata
    assert any(name.endswith("/LICENSE") for name in wheel.namelist())


def test_embedded_model_is_small() -> None:
    assert (ROOT / "aiosd/nano/nano.gguf").stat().st_size < 16 << 20


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_a_few_lines_and_executable(command: str) -> None:
    path = ROOT / "bin" / command
    assert path.stat().st_mode & 0o111
    assert len(path.read_text().splitlines()) <= 15


@pytest.mark.parametrize("command", COMMANDS)
def test_command_has_a_test(command: str) -> None:
    texts = [path.read_text() for path in Path(__file__).parent.glob("test_*.py") if path != Path(__file__)]
    assert any(f'"{command}"' in text for text in texts)


@pytest.mark.parametrize("command", COMMANDS)
def test_installed_command_prints_its_version(command: str) -> None:
    path = Path(sys.executable).parent / command
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert aiosd.__version__ in done.stdout


def requirements(text: str) -> set[str]:
    return {canonical(re.split(r"[<>=!~\[; ]", line)[0]) for line in text.strip().splitlines()}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_required() -> None:
    """No module is imported that is installed only by chance. The trainer of the embedded model, hub, gateway and MCP
    have extras."""
    distributions = importlib.metadata.packages_distributions()
    required = requirements(CONFIG["options"]["install_requires"])
    missing = set()
    for path in SOURCES:
        allowed = required
        if module_of(path).startswith("aiosd.nano"):
            allowed = required | requirements(CONFIG["options.extras_require"]["nano"])
        elif module_of(path) == "aiosd.models.hub":
            allowed = required | requirements(CONFIG["options.extras_require"]["hub"])
        elif module_of(path) in ("aiosd.tools.bridge", "aiosd.tools.mcpstreams", "aiosd.commands.mcpserver"):
            allowed = required | requirements(CONFIG["options.extras_require"]["mcp"])
        elif module_of(path).startswith("aiosd.gateway"):
            allowed = required | requirements(CONFIG["options.extras_require"]["gateway"])
        for imported, _ in imports(path):
            top = imported.split(".")[0]
            if top in sys.stdlib_module_names or top in ("aiosd", "libaios"):
                continue
            if not {canonical(name) for name in distributions.get(top, [top])} & allowed:
                missing.add(f"{module_of(path)} imports {top}")
    assert missing == set()


def test_every_requirement_is_pinned_for_make() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonical(line.split("==")[0]) for line in lines if "==" in line}
    wanted = requirements(CONFIG["options"]["install_requires"])
    for extra in CONFIG["options.extras_require"].values():
        wanted |= requirements(extra)
    assert wanted <= pins


# ── the set-up of `make` ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("  [17/193] /usr/bin/g++ -DGGML_BUILD -o ggml.o", "compiling llama.cpp, step 17 of 193"),
        ("  [ 12%] Building CXX object ggml.o", "compiling llama.cpp, 12 %"),
        ("  Building wheel for llama-cpp-python (pyproject.toml): started", "building llama-cpp-python"),
        ("Collecting numpy>=1.26", "looking for numpy>=1.26"),
        ("  Downloading msgspec-0.22.0.whl (220 kB)", "downloading msgspec-0.22.0.whl"),
        ("  -- Looking for pthread.h", "before"),
    ],
)
def test_set_up_shows_its_phase(line: str, phase: str) -> None:
    assert bootstrap.phase_in(line.encode(), "before") == phase


def test_set_up_is_read_by_an_old_python() -> None:
    """It must be able to report that the Python is too old."""
    ast.parse((ROOT / "tools/bootstrap.py").read_text(), feature_version=(3, 6))


def test_set_up_names_what_to_install_when_there_is_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(bootstrap, "works", lambda *command: False)
    monkeypatch.setattr(bootstrap, "output", lambda *command: "")
    with pytest.raises(SystemExit):
        bootstrap.check_compiler("python")
    (line,) = capsys.readouterr().err.splitlines()
    assert "no C++ compiler" in line
    assert "apt install" in line


def test_set_up_shows_the_end_of_the_log_when_a_step_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "setup.log"
    log.touch()
    with pytest.raises(SystemExit):
        bootstrap.watch([sys.executable, "-c", "print('out of luck'); raise SystemExit(3)"], str(log), "trying")
    errors = capsys.readouterr().err
    assert "out of luck" in errors
    assert f"trying failed; the whole log is {log}" in errors


# ── llama.cpp, compiled once and with what is needed only ─────────────────────────────────────────────────


class Builder:
    """Simulates pip: makes an empty wheel on request, and records commands and CMAKE_ARGS."""

    def __init__(self) -> None:
        self.built: list[tuple[list[str], str]] = []
        self.installed: list[str] = []
        self.ahead = ["true"]  # simulates the installation of all other packages
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, python: str, stage: str, log: str) -> subprocess.Popen[bytes]:
        self.started.append(subprocess.Popen(self.ahead))
        return self.started[-1]

    def watch(self, command: list[str], log: str, what: str, environ: dict[str, str] | None = None) -> None:
        if "wheel" in command:
            assert environ is not None
            self.built.append((command, environ["CMAKE_ARGS"]))
            folder = Path(command[command.index("-w") + 1])
            folder.mkdir(parents=True)
            (folder / "llama_cpp_python.whl").touch()
        else:
            self.installed.append(command[-1])


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Builder:
    builder = Builder()
    monkeypatch.setattr(bootstrap, "watch", builder.watch)
    monkeypatch.setattr(bootstrap, "start_packages", builder.start)
    monkeypatch.setattr(bootstrap, "check_compiler", lambda python: None)
    monkeypatch.setattr(bootstrap, "works", lambda *command: True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return builder


def test_one_wheel_serves_all_checkouts(builder: Builder, tmp_path: Path) -> None:
    for venv in ("one", "two", "two"):
        bootstrap.install_llama_cpp(str(tmp_path / venv), "python", "base", "log")
    assert len(builder.built) == len(builder.started) == 1  # packages are installed ahead only beside a build
    assert len(set(builder.installed)) == 1
    assert len(builder.installed) == 2
    ((_, cmake_args),) = builder.built
    assert "-DLLAVA_BUILD=OFF" in cmake_args
    assert "tools/llama_cpp.cmake" in cmake_args


def test_options_of_a_person_make_another_wheel_and_are_remembered(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    venv = str(tmp_path / "one")
    bootstrap.install_llama_cpp(venv, "python", "base", "log")
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=on")
    bootstrap.install_llama_cpp(venv, "python", "base", "log")
    monkeypatch.delenv("CMAKE_ARGS")
    bootstrap.install_llama_cpp(venv, "python", "base", "log")  # `make test` does this afterwards
    assert len(builder.built) == 2
    command, cmake_args = builder.built[1]
    assert cmake_args.endswith(" -DGGML_CUDA=on")
    assert "-DLLAVA_BUILD=OFF" in cmake_args
    assert "--no-cache-dir" in command  # pip's own cache does not distinguish builds
    assert len(builder.installed) == 2


def test_a_build_that_was_interrupted_leaves_no_wheel(
    builder: Builder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(command: list[str], *args: object, **more: object) -> None:
        Path(command[command.index("-w") + 1]).mkdir(parents=True)
        raise SystemExit(130)

    monkeypatch.setattr(bootstrap, "watch", interrupted)
    builder.ahead = ["sleep", "1000"]
    with pytest.raises(SystemExit):
        bootstrap.install_llama_cpp(str(tmp_path / "one"), "python", "base", "log")
    assert builder.started[0].returncode == -signal.SIGTERM
    monkeypatch.setattr(bootstrap, "watch", builder.watch)
    builder.ahead = ["false"]  # `install` reports missing packages later
    bootstrap.install_llama_cpp(str(tmp_path / "one"), "python", "base", "log")
    assert len(builder.built) == 1


def test_all_but_llama_cpp_is_installed_while_that_is_compiled() -> None:
    base, dev = (set(bootstrap.requirements(stage)) for stage in ("base", "dev"))
    assert {line.partition(">")[0] for line in base} >= {"numpy", "faiss-cpu", "psutil", "click"}
    assert base < dev
    assert not any("llama" in line for line in dev)


def test_llama_cpp_is_used_without_its_part_for_images(tmp_path: Path) -> None:
    """`make` does not build that part."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    package, copy = Path(spec.origin).parent, tmp_path / "llama_cpp"
    (copy / "lib").mkdir(parents=True)
    for path in [*package.glob("*.py"), *package.glob("lib/*")]:
        if "mtmd" not in path.name or path.suffix == ".py":
            (copy / path.relative_to(package)).symlink_to(path)
    code = "import llama_cpp, aiosd.llm.llama; llama_cpp.llama_backend_init(); print(llama_cpp.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=path_to(tmp_path)
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(copy / "__init__.py")), done.stderr


def path_to(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


# ── the check of a GPU, which no test can run ─────────────────────────────────────────────────────────────


def test_the_check_of_a_gpu_is_a_script_that_bash_can_read() -> None:
    script = ROOT / "tools/gpu_check.sh"
    assert script.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", script], check=True, timeout=10)
    mentioned = set(re.findall(r"(?:benchmarks|tools)/\w+\.(?:py|sh)", script.read_text()))
    assert all((ROOT / name).exists() for name in mentioned)


def test_the_check_of_a_gpu_reports_that_there_is_none(tmp_path: Path) -> None:
    for tool in ("bash", "dirname", "realpath"):
        (tmp_path / tool).symlink_to(shutil.which(tool) or tool)
    env = {"PATH": str(tmp_path)}
    script = str(ROOT / "tools/gpu_check.sh")
    done = subprocess.run([script, tmp_path / "out"], env=env, capture_output=True, text=True, timeout=20, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "gpu_check: no nvidia-smi: is there a card, and its driver?\n"
