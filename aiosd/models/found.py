"""The models that are on this machine, and one of them by its name.

    nano                              the embedded model
    qwen2.5-7b-instruct-q4_k_m        a file in aiosd's own folder
    hf:Qwen/Qwen2.5-7B-GGUF:Q4_K_M    in the cache of the hub's library (from `aiosd pull`, or any other program)
    ollama:llama3.2, ollama:llama3.2:3b
    lmstudio:Qwen/Qwen2.5-7B-GGUF:Q4_K_M

`find` takes such a name, or a shorter one that fits only one model (`llama3.2`), or the path of a file, which is tried
first. Nothing is downloaded here. Files of other programs are read in their own formats, and unexpected content is
ignored: a listing must not fail because one folder is damaged.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiosd.errors import UsageError
from aiosd.llm import modelfile
from aiosd.models import fit, places, quants
from aiosd.nano import model_path

NANO = "nano"
HUB, OLLAMA, LMSTUDIO = "hf:", "ollama:", "lmstudio:"
PREFIXES = (HUB, OLLAMA, LMSTUDIO)

_OLLAMA_HOST, _OLLAMA_FOLDER, _LATEST = "registry.ollama.ai", "library", "latest"
_WEIGHTS = "application/vnd.ollama.image.model"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
_MOST_FILES = 10_000  # most files looked at in one folder: a wrong AIOSD_MODELS must not read a whole disk


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model on this machine."""

    name: str  # the name for `--model`
    source: str  # nano, aiosd, hub, ollama, lmstudio; path: a file that was named
    path: str  # its file, the first one if it is split
    label: str  # its default name in a running system
    shorter: frozenset[str] = frozenset()  # other names, in lower case


class NotHere(UsageError):
    """A model of a hub that is not on this machine; `repo` and `quant` name it, so that it can be fetched."""

    def __init__(self, repo: str, quant: str) -> None:
        super().__init__(f"{hub_name(repo, quant)}: not on this machine; aiosd pull {hub_name(repo, quant)[3:]}")
        self.repo, self.quant = repo, quant


# ── one model ─────────────────────────────────────────────────────────────────────────────────────────────


def find(word: str, folder: str = "/") -> FoundModel:
    """The model that `word` names, by its name or by a path relative to `folder`. A path is not checked here: errors in
    the file are reported when it is loaded. Raises UsageError, NotHere if it could be fetched from a hub."""
    if word == NANO:
        return nano()
    if word.startswith(HUB):
        return in_hub_cache(*hub_words(word))
    path = os.path.abspath(os.path.join(folder, os.path.expanduser(word)))
    if not os.path.exists(path) and not word.lower().endswith(".gguf"):
        if named := _named(word):
            return named
        if word.startswith(PREFIXES):
            raise UsageError(f"{word}: not on this machine (aiosd models lists what is)")
    first = modelfile.first_part(path)
    return FoundModel(word, "path", first, quants.stem_of(first))


def _named(word: str) -> FoundModel | None:
    wanted = word.lower()
    models = listing()
    exact = [model for model in models if model.name.lower() == wanted]
    fitting = exact or [model for model in models if wanted in model.shorter]
    if len({os.path.realpath(model.path) for model in fitting}) > 1:
        raise UsageError(f"{word}: several models may be meant: {', '.join(model.name for model in fitting)}")
    return fitting[0] if fitting else None


def nano() -> FoundModel:
    return FoundModel(NANO, "nano", str(model_path()), NANO)


def listing() -> list[FoundModel]:
    """All models, the embedded one first."""
    return [nano(), *_ours(), *_hub(), *_ollama(), *_lmstudio()]


def row(model: FoundModel, room: int) -> dict[str, Any]:
    """Figures from its file, for a listing; `problem` if it cannot be read. `room`: free bytes of memory."""
    row: dict[str, Any] = {"name": model.name, "source": model.source, "path": model.path}
    try:
        file = modelfile.read(model.path)
    except UsageError as err:
        return row | {"problem": str(err).removeprefix(f"{model.path}: ")}
    quant = quants.FILE_TYPES.get(file.meta.get("general.file_type", -1), "")
    memory = fit.fit(file, room)
    return row | {
        "size": file.size,
        "ctx": file.number("context_length"),
        "family": file.architecture,
        "quantisation": quant or quants.of_name(model.path),
        "needs_bytes": memory.needs,
        "fits": memory.fits,
    }


# ── aiosd's own folder ────────────────────────────────────────────────────────────────────────────────────


def _ours() -> list[FoundModel]:
    files = [path for path in _ggufs(places.ours()) if not any(".parts" in part for part in path.parts[:-1])]
    stems = [(path, quants.stem_of(path.name)) for path in files]
    return [FoundModel(stem, "aiosd", str(path), stem, _beginnings(stem)) for path, stem in stems]


def _beginnings(stem: str) -> frozenset[str]:
    """`qwen2.5-7b` and `qwen2.5` of `qwen2.5-7b-q4_k_m`; not `qwen2`, which is another model."""
    return frozenset(stem[: end.start()].lower() for end in re.finditer(r"[-_]|\.(?!\d)", stem) if end.start())


def _ggufs(folder: Path) -> list[Path]:
    """The models below a folder, by their names."""
    found = []
    for number, path in enumerate(_walk(folder)):
        if number >= _MOST_FILES:
            break
        if quants.is_model(path.name) and path.is_file():
            found.append(path)
    return sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    for base, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(base, name) for name in files)


# ── huggingface_hub ───────────────────────────────────────────────────────────────────────────────────────


def hub_words(word: str) -> tuple[str, str]:
    """`hf:ORG/NAME:QUANT`, also without hf: or :QUANT, as (repository, quantisation or file or "")."""
    repo, _, quant = word.removeprefix(HUB).partition(":")
    if not _REPOSITORY.fullmatch(repo) or ".." in repo:
        raise UsageError(f"{word!r} names no model of a hub (such as hf:ORG/NAME or hf:ORG/NAME:Q4_K_M)")
    return repo, quant


def hub_name(repo: str, quant: str) -> str:
    return f"{HUB}{repo}:{quant}" if quant else f"{HUB}{repo}"


def in_hub_cache(repo: str, quant: str) -> FoundModel:
    """A model in the cache. Raises NotHere."""
    for snapshot in _snapshots(places.hub() / f"models--{repo.replace('/', '--')}"):
        files = [path.relative_to(snapshot).as_posix() for path in _walk(snapshot) if path.exists()]
        try:
            return hub_found(repo, quants.choose(files, quant, repo), snapshot)
        except UsageError:
            continue  # the cache has another file of this repository, or another state of it
    raise NotHere(repo, quant)


def hub_found(repo: str, choice: quants.QuantChoice, snapshot: Path) -> FoundModel:
    name = hub_name(repo, choice.quant or choice.files[0])
    return FoundModel(name, "hub", str(snapshot / choice.files[0]), choice.stem, _shorter(HUB, name, choice.stem))


def _hub() -> list[FoundModel]:
    found: dict[str, FoundModel] = {}
    for folder in sorted(_folders(places.hub())):
        if not folder.name.startswith("models--"):
            continue
        repo = folder.name.removeprefix("models--").replace("--", "/")
        for snapshot in _snapshots(folder):
            for choice in quants.choices(path.relative_to(snapshot).as_posix() for path in _ggufs(snapshot)):
                model = hub_found(repo, choice, snapshot)
                found.setdefault(model.name, model)
    return list(found.values())


def _snapshots(folder: Path) -> list[Path]:
    """The cached states of a repository, the last known one of `main` first."""
    try:
        main = (folder / "refs" / "main").read_text().strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    return sorted(_folders(folder / "snapshots"), key=lambda path: (path.name != main, -path.stat().st_mtime))


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()]
    except OSError:  # it does not exist, or may not be read
        return []


def _shorter(prefix: str, name: str, stem: str) -> frozenset[str]:
    """`org/name:quant`, `org/name`, `name:quant`, `name`, and the file's own name."""
    full = name.removeprefix(prefix)
    repo, _, _ = full.partition(":")
    last = full.partition("/")[2]
    words = {full, repo, last, last.partition(":")[0], stem, f"{prefix}{repo}"}
    return frozenset(word.lower() for word in words)


# ── Ollama ────────────────────────────────────────────────────────────────────────────────────────────────


def _ollama() -> list[FoundModel]:
    found: dict[str, FoundModel] = {}
    for folder in places.ollama():
        for manifest in sorted(_walk(folder / "manifests")):
            parts = manifest.relative_to(folder / "manifests").parts
            blob = _weights(manifest, folder)
            if blob is not None and len(parts) == 4:
                model = _ollama_found(*parts, blob)
                found.setdefault(model.name, model)
    return list(found.values())


def _ollama_found(host: str, owner: str, model: str, tag: str, blob: Path) -> FoundModel:
    where = [] if host == _OLLAMA_HOST else [host]
    base = "/".join([*where, *([] if not where and owner == _OLLAMA_FOLDER else [owner]), model])
    name = base if tag == _LATEST else f"{base}:{tag}"
    words = {base, f"{base}:{tag}", f"{model}:{tag}", model}
    shorter = words | {OLLAMA + word for word in words}
    return FoundModel(OLLAMA + name, "ollama", str(blob), name.replace("/", "_"), frozenset(map(str.lower, shorter)))


def _weights(manifest: Path, folder: Path) -> Path | None:
    """The file that a manifest calls the model, if it is there."""
    try:
        layers = json.loads(manifest.read_bytes())["layers"]
        digests = [layer["digest"] for layer in layers if layer["mediaType"] == _WEIGHTS]
        path = folder / "blobs" / digests[0].replace(":", "-")
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # no manifest, or one of a model that has no file of this kind
    return path if path.parent == folder / "blobs" and path.is_file() else None


# ── LM Studio ─────────────────────────────────────────────────────────────────────────────────────────────


def _lmstudio() -> list[FoundModel]:
    found: dict[str, FoundModel] = {}
    for folder in places.lmstudio():
        for path in _ggufs(folder):
            parts = path.relative_to(folder).parts
            stem = quants.stem_of(path.name)
            quant = quants.of_name(path.name) or stem
            name = f"{LMSTUDIO}{'/'.join(parts[:-1]) or stem}:{quant}"
            found.setdefault(name, FoundModel(name, "lmstudio", str(path), stem, _shorter(LMSTUDIO, name, stem)))
    return list(found.values())


Locate = Callable[[str, str], FoundModel]
