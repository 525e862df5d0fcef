"""The structure of the code: modules lie on floors, imports run downwards only, and light modules stay light."""

from __future__ import annotations

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aiosd.commands import MODULES

ROOT = Path(__file__).parent.parent

# Each entry (room) stands for a module or package with all below it; the longest one that fits a module counts. A
# module may import from its own room and from lower floors, not from another room of its floor.
FLOORS: list[list[str]] = [
    ["aiosd.commands"],
    ["aiosd.init"],
    ["aiosd.birth"],
    ["aiosd.kernel", "aiosd.llm", "aiosd.store", "aiosd.tools", "aiosd.gateway", "aiosd.net"],
    ["aiosd"],  # config, ipc, logs and other small modules that any part may use
    ["aiosd.init.restart"],  # a policy that settings, kernel and supervisor share
    ["aiosd.models"],  # settings name models
    ["aiosd.llm.modelfile"],
    ["aiosd.llm.spec", "aiosd.tools.spec", "aiosd.errors", "aiosd.nano"],  # descriptions of models and tools
    ["aiosd.budgets.price"],
    ["aiosd.units"],
    ["libaios"],
]
#: Packages that are run by hand, and imported by no part of the system.
OUTSIDE = ["aiosd.nano"]
#: Names that are defined more than once, and how often, because users of the SDK know them.
TWICE = {
    "Context": 2,  # for plain calls, and in `aio` for coroutines
    "Piece": 2,  # of a stream: in `libaios.llm`, and in the contract
}
SOURCES = sorted(path for package in ("aiosd", "libaios") for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """The modules that a file imports, and whether only for the type checker. Cached: several tests use it."""
    found = []
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in node.body
        for inner in ast.walk(child)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.append((alias.name, id(node) in typing_only))
        elif isinstance(node, ast.ImportFrom):
            base = absolute(node, path)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.append((full if exists(full) else base, id(node) in typing_only))
    return found


def absolute(node: ast.ImportFrom, path: Path) -> str:
    if not node.level:
        return node.module or ""
    package = list(path.relative_to(ROOT).parent.parts)
    package = package[: len(package) - node.level + 1]
    return ".".join([*package, *([node.module] if node.module else [])])


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def within(module: str, room: str) -> bool:
    return module == room or module.startswith(room + ".")


def floor_and_room(module: str) -> tuple[int, str]:
    rooms = [(len(room), floor, room) for floor, rooms in enumerate(FLOORS) for room in rooms if within(module, room)]
    _, floor, room = max(rooms)
    return floor, room


def house_imports() -> Iterator[tuple[str, str]]:
    for path in SOURCES:
        importer = module_of(path)
        for imported, typing_only in imports(path):
            if not typing_only and imported.split(".")[0] in ("aiosd", "libaios"):
                yield importer, imported


def test_imports_run_downwards_only() -> None:
    wrong = []
    for importer, imported in house_imports():
        if any(within(importer, room) for room in OUTSIDE):
            continue
        floor, room = floor_and_room(importer)
        its_floor, its_room = floor_and_room(imported)
        if its_floor < floor or (its_floor == floor and its_room != room):
            wrong.append(f"{importer} imports {imported}")
    assert wrong == []


def test_no_other_files_lie_directly_in_aiosd() -> None:
    """A file outside of the packages is one that any of them may use."""
    loose = {path.name for path in (ROOT / "aiosd").iterdir() if path.is_file()} - {"__init__.py", "py.typed"}
    assert loose == {"errors.py", "kin.py", "procfs.py", "threads.py", "timers.py", "units.py"}


def circles(package: str) -> list[list[str]]:
    """Files of the package that import each other, directly or through others. Imports for the type checker and inside
    functions count, too, because they hide a circle and do not remove it."""
    files = {module_of(path): path for path in SOURCES if within(module_of(path), package)}
    after = {module: {name for name, _ in imports(path) if name in files} for module, path in files.items()}
    changed = True
    while changed:  # until `after` holds all that a module reaches
        changed = False
        for reached in after.values():
            more = set().union(*(after[name] for name in reached)) - reached
            reached |= more
            changed = changed or bool(more)
    found = {tuple(sorted(other for other in after[name] if name in after[other])) for name in after}
    return sorted(list(circle) for circle in found if circle)


@pytest.mark.parametrize("package", ["libaios", "aiosd"])
def test_there_is_no_circle_of_imports(package: str) -> None:
    assert circles(package) == []


def test_libaios_imports_nothing_of_aiosd() -> None:
    assert [pair for pair in house_imports() if within(pair[0], "libaios") and within(pair[1], "aiosd")] == []


def test_llm_ggml_alone_touches_llama_cpp() -> None:
    """All others import `aiosd.llm.ggml`: the modules that own llama.cpp's objects, or replace its attention."""
    users = {module_of(path) for path in SOURCES for imported, _ in imports(path) if within(imported, "llama_cpp")}
    assert users <= {"aiosd.llm.ggml"}
    callers = {module_of(path) for path in SOURCES for imported, _ in imports(path) if imported == "aiosd.llm.ggml"}
    assert callers <= {"aiosd.llm.llama", "aiosd.llm.attention", "aiosd.llm.library"}


def test_store_index_alone_touches_faiss() -> None:
    users = {module_of(path) for path in SOURCES for imported, _ in imports(path) if within(imported, "faiss")}
    assert users == {"aiosd.store.index"}


@pytest.mark.parametrize("pure", ["aiosd.llm.policy", "aiosd.llm.prefix"])
def test_pure_parts_import_no_model_library(pure: str) -> None:
    paths = [path for path in SOURCES if within(module_of(path), pure)]
    assert paths
    imported = {name.split(".")[0] for path in paths for name, _ in imports(path)}
    assert imported & {"llama_cpp", "ctypes", "gguf"} == set()


@pytest.mark.parametrize("module", sorted(set(MODULES.values()) - {"aiosd.commands.cli"}))
def test_a_command_imports_nothing_heavy(module: str) -> None:
    heavy = ["numpy", "llama_cpp", "faiss", "rich", "psutil", "jinja2", "aiosd.kernel", "aiosd.llm"]
    assert loaded_by(module, heavy) == []


@pytest.mark.parametrize("module", ["aiosd.commands.ps", "aiosd.commands.kill", "aiosd.commands.wait"])
def test_a_command_with_a_single_call_starts_fast(module: str) -> None:
    """Each of these modules would take a twentieth of the command's time or more."""
    slow = ["asyncio", "logging", "multiprocessing", "pathlib", "pickle", "dataclasses", "unicodedata", "subprocess"]
    assert loaded_by(module, slow) == []


def test_the_sdk_imports_nothing_heavy() -> None:
    assert loaded_by("libaios", ["numpy", "llama_cpp", "faiss", "psutil", "click", "aiosd"]) == []


@pytest.mark.parametrize("module", ["aiosd.init.supervisor", "aiosd.init.guardian"])
def test_processes_that_fork_load_no_model_library(module: str) -> None:
    """A process that forks must have loaded neither llama.cpp nor FAISS."""
    assert loaded_by(module, ["numpy", "llama_cpp", "faiss"]) == []


@pytest.mark.parametrize("module", ["aiosd.llm.core", "aiosd.llm.backend", "aiosd.llm.line"])
def test_a_cores_process_loads_heavy_modules_in_the_backend_only(module: str) -> None:
    assert loaded_by(module, ["numpy", "llama_cpp", "jinja2", "aiosd.llm.local", "aiosd.llm.engine"]) == []


def loaded_by(module: str, names: list[str]) -> list[str]:
    """Which of `names` a fresh interpreter has imported after `import module`."""
    code = f"import sys, {module}; print([name for name in {names!r} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


def test_a_name_is_defined_once() -> None:
    """A class of the same name in two modules makes a reader ask each time which one is meant."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: found for name, found in places.items() if len(found) > TWICE.get(name, 1)} == {}
    assert [name for name in TWICE if len(places.get(name, [])) < 2] == []


@pytest.mark.parametrize("request_of_linux", ["SET_PDEATHSIG", "SET_CHILD_SUBREAPER"])
def test_parent_death_signals_and_subreapers_are_set_in_one_module(request_of_linux: str) -> None:
    found = [str(path.relative_to(ROOT)) for path in SOURCES if request_of_linux in path.read_text().upper()]
    assert found == ["aiosd/kin.py"]


def test_importing_starts_nothing() -> None:
    """Importing a module makes no thread, descriptor, environment variable or handler."""
    modules = [module_of(path) for path in SOURCES if not any(within(module_of(path), room) for room in OUTSIDE)]
    code = f"""
import importlib, logging, os, signal, sys, threading
for heavy in ("msgspec", "llama_cpp"):  # others' modules may do as they like
    importlib.import_module(heavy)
state = lambda: (threading.active_count(), sorted(os.listdir("/proc/self/fd")), dict(os.environ),
                 list(logging.getLogger().handlers), [signal.getsignal(n) for n in sorted(signal.valid_signals())])
for name in {modules!r}:
    if name.endswith("__main__"):
        continue
    before = state()
    importlib.import_module(name)
    after = state()
    if before != after:
        print(name, [(a, b) for a, b in zip(before, after) if a != b])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


# ── documentation ─────────────────────────────────────────────────────────────────────────────────────────

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()


def test_every_file_is_described() -> None:
    """Each file is in the tree of architecture.md or in its package's docstring. (Commands are named after files.)"""
    tree = ARCHITECTURE.partition("\n## The tree\n")[2]
    lists = {path.parent: ast.get_docstring(ast.parse(path.read_text())) for path in SOURCES if path.stem == "__init__"}
    missing = [
        module_of(path)
        for path in SOURCES
        if not path.stem.startswith("__")
        and f"aios-{path.stem}" not in MODULES
        and not re.search(rf"\b{path.name}\b", tree)
        and not re.search(rf"\b{path.stem}\b", lists[path.parent] or "")
    ]
    assert missing == []


def test_every_file_that_is_described_is_there() -> None:
    paths = [*SOURCES, *(ROOT / "tests").rglob("*.py")]
    there = {"/" + str(path.relative_to(ROOT)) for path in paths}
    named = re.findall(r"[\w/]+\.py\b", ARCHITECTURE)
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in there)] == []
