"""Downloads from a model hub, into the cache of its own library, where every other program finds them too.

    pull("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "Q4_K_M", report)

huggingface_hub (extra `aiosd[hub]`) makes the connections: tokens, mirrors (HF_ENDPOINT), offline mode (HF_HUB_OFFLINE)
and folders (HF_HOME) are as its documentation describes them. This file does the rest: it chooses the file of a
repository, fetches all parts of one that is split, continues interrupted downloads, and checks the checksum. Without a
connection, or in offline mode, the cache is used.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aiosd.errors import UsageError, WorldError
from aiosd.models import found, places, quants
from aiosd.models.found import FoundModel, NotHere
from aiosd.units import format_size

if TYPE_CHECKING:
    from types import ModuleType

Report = Callable[[str], None]

#: The hub names a large file by its SHA-256; small files, which no model is, have another name.
_SHA256 = re.compile(r"[0-9a-f]{64}")
#: Larger ones need the library's own way of fetching.
_MOST_BY_HTTP = 50 * 10**9


def find_or_pull(word: str, folder: str, report: Report) -> FoundModel:
    """As `found.find`, but a model of a hub that is not on this machine is fetched."""
    try:
        return found.find(word, folder)
    except NotHere as missing:
        return pull(missing.repo, missing.quant, report)


def pull(repo: str, quant: str, report: Report) -> FoundModel:
    """Fetch a model, if its newest state is not on this machine. Raises UsageError if the hub has no such model,
    WorldError if it cannot be fetched. `report` is called with lines about the progress."""
    library = _library()
    try:
        info = library.HfApi().model_info(repo)
    except library.errors.OfflineModeIsEnabled:
        return _cached(repo, quant, "offline mode (HF_HUB_OFFLINE)")
    except library.errors.GatedRepoError:
        raise UsageError(f"{repo}: its terms have to be accepted on its page, and HF_TOKEN set") from None
    except library.errors.RepositoryNotFoundError:
        raise UsageError(f"{repo}: no such repository, or a private one (HF_TOKEN)") from None
    except library.errors.HFValidationError as err:
        raise UsageError(f"{repo}: {_first_line(err)}") from None
    except _unreachable(library) as err:
        if not _answered(err):
            with contextlib.suppress(NotHere):
                model = _cached(repo, quant, "")
                report(f"{repo}: the hub cannot be reached; what is on this machine serves")
                return model
            raise WorldError(f"{repo}: the hub cannot be reached: {_first_line(err)}") from err
        raise WorldError(f"{repo}: {_first_line(err)}") from err
    choice = quants.choose([sibling.rfilename for sibling in info.siblings or ()], quant, repo)
    if quant == "" and choice.quant not in ("", quants.DEFAULT):
        report(f"{repo}: has no {quants.DEFAULT}; {choice.quant} is nearest")
    for file in choice.files:
        _fetch(library, repo, file, info.sha, report)
    return found.hub_found(repo, choice, _repository(repo) / "snapshots" / info.sha)


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.file_download
    except ImportError:
        raise UsageError("fetching models needs huggingface_hub: pip install 'aiosd[hub]'") from None
    library: ModuleType = huggingface_hub
    return library


def _cached(repo: str, quant: str, why: str) -> FoundModel:
    try:
        return found.in_hub_cache(repo, quant)
    except NotHere:
        if not why:
            raise
        raise UsageError(f"{found.hub_name(repo, quant)}: not on this machine, and {why} is on") from None


def _fetch(library: ModuleType, repo: str, file: str, commit: str, report: Report) -> None:
    """Fetch one file into the cache: first its content, then the library enters it under its name."""
    try:
        _content(library, repo, file, commit, report)
        library.hf_hub_download(repo, file)
    except _unreachable(library) as err:
        raise WorldError(f"{repo}/{file}: {_first_line(err)}; what has arrived is kept, try again") from err


def _content(library: ModuleType, repo: str, file: str, commit: str, report: Report) -> None:
    url = library.hf_hub_url(repo, file, revision=commit)
    about = library.get_hf_file_metadata(url)
    size, digest = about.size, about.etag or ""
    if not _SHA256.fullmatch(digest) or size is None or size > _MOST_BY_HTTP:
        return  # left to the library
    content = _repository(repo) / "blobs" / digest
    if content.exists():
        return
    content.parent.mkdir(parents=True, exist_ok=True)
    partial = content.with_name(digest + ".aiosd")
    with open(partial, "ab") as out:
        fcntl.flock(out, fcntl.LOCK_EX)
        if content.exists():  # another process has just fetched it
            return
        have = _room(out.fileno(), size)
        report(f"fetching {repo}/{file} ({format_size(size)}{f', {format_size(have)} of it are here' if have else ''})")
        headers = library.utils.build_hf_headers()
        library.file_download.http_get(
            url,
            out,
            resume_size=have,
            headers=headers,
            expected_size=size,
            displayed_filename=os.path.basename(file),
            tqdm_class=_bar(library),
        )
        out.flush()
        if _sha256(partial) != digest:
            partial.unlink()
            raise WorldError(f"{repo}/{file}: damaged on its way: its SHA-256 is not {digest}; try again")
        partial.rename(content)


def _room(fd: int, size: int) -> int:
    """How many bytes of a file are here; 0 if there are more than the file has."""
    have = os.fstat(fd).st_size
    if have > size:
        os.ftruncate(fd, 0)
        return 0
    return have


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _repository(repo: str) -> Path:
    return places.hub() / f"models--{repo.replace('/', '--')}"


def _bar(library: ModuleType) -> Any:
    """A progress bar on a terminal, nothing in a log."""

    class Bar(library.utils.tqdm):  # type: ignore[name-defined,misc] # a class of a module that is imported late
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": not sys.stderr.isatty()})

    return Bar


def _unreachable(library: ModuleType) -> tuple[type[Exception], ...]:
    """The exceptions of the library when a hub does not answer, or not properly: OSErrors and those of its HTTP
    library; its own HTTP error is of both kinds."""
    return (OSError, *library.errors.HfHubHTTPError.__bases__)


def _answered(err: Exception) -> bool:
    """Was there an answer at all?"""
    return getattr(err, "response", None) is not None


def _first_line(err: Exception) -> str:
    line = (str(err).strip() or type(err).__name__).splitlines()[0]
    return re.sub(r"^\[Errno -?[0-9]+\] ", "", line)
