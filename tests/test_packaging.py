"""What a user installs: the wheel has everything in it, the commands, the model, and what they import."""

from __future__ import annotations

import ast
import configparser
import importlib.metadata
import re
import shutil
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
    """Built in a copy, because setuptools leaves its working files in the tree it builds."""
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


def test_wheel_brings_the_licence(wheel: zipfile.ZipFile) -> None:
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
def test_installed_command_tells_its_version(command: str) -> None:
    path = Path(sys.executable).parent / command
    done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30, check=False, cwd="/")
    assert (done.returncode, done.stderr) == (0, "")
    assert aiosd.__version__ in done.stdout


def requirements(text: str) -> set[str]:
    return {canonical(re.split(r"[<>=!~\[; ]", line)[0]) for line in text.strip().splitlines()}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_import_is_required() -> None:
    """Nothing is imported that only happens to be installed. The trainer of the embedded model is extra."""
    distributions = importlib.metadata.packages_distributions()
    required = requirements(CONFIG["options"]["install_requires"])
    missing = set()
    for path in SOURCES:
        allowed = required
        if module_of(path).startswith("aiosd.nano"):
            allowed = required | requirements(CONFIG["options.extras_require"]["nano"])
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
def test_set_up_tells_its_phase(line: str, phase: str) -> None:
    assert bootstrap.phase_in(line.encode(), "before") == phase


def test_set_up_is_read_by_an_old_python() -> None:
    """It must come as far as saying that the Python is too old."""
    ast.parse((ROOT / "tools/bootstrap.py").read_text(), feature_version=(3, 6))


def test_set_up_says_what_to_install_when_there_is_no_compiler(
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
