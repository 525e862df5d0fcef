"""aiosd models, aiosd pull: list the models on this machine, fetch another one.

$ aiosd models
NAME                                           SIZE   CTX FAMILY QUANT  FITS
nano                                           9.1M  2048 llama  F16    yes
SmolLM2-135M-Instruct.Q4_1                    93.8M  8192 llama  Q4_1   yes
hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M      469M 32768 qwen2  Q4_K_M yes
ollama:llama3.3:70b                           39.6G  128k llama  Q4_K_M no: 40.1G
$ aiosd pull Qwen/Qwen2.5-0.5B-Instruct-GGUF
hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q4_K_M
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from aiosd.commands import edge
from aiosd.errors import AiosdError
from aiosd.units import format_size

if TYPE_CHECKING:
    from aiosd.models.found import FoundModel

HEADERS = ("NAME", "SIZE", "CTX", "FAMILY", "QUANT", "FITS")
_FIGURES = {1, 2}  # columns that are aligned to the right


def register(group: click.Group) -> None:
    group.add_command(models)
    group.add_command(pull)


def locate(word: str, folder: str) -> FoundModel:
    """The model that `--model` or aiosd.toml names. One of a hub is fetched if it is not on this machine."""
    from aiosd.models.hub import find_or_pull

    return find_or_pull(word, folder, _report)


@click.command("pull", context_settings=edge.SETTINGS, short_help="Fetch a model from a hub.")
@click.argument("model", metavar="REPO[:QUANT]")
def pull(model: str) -> int:
    """Fetch a model in GGUF format from a hub, into the cache of huggingface_hub; prints the name that --model takes.

    QUANT is the name of a quantisation or of a file; without it Q4_K_M, or what the repository has that is nearest. A
    download that was interrupted goes on where it was. HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE mean what they
    mean to huggingface_hub, which is part of `pip install 'aiosd[hub]'`.

    \b
      aiosd pull Qwen/Qwen2.5-0.5B-Instruct-GGUF
      aiosd pull Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0
      aiosd -d --model hf:Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0     fetches it
    """
    from aiosd.models import found, hub

    try:
        print(hub.pull(*found.hub_words(model), _report).name)
    except AiosdError as err:
        raise edge.CommandFailed(str(err)) from None
    return 0


def _report(line: str) -> None:
    print(f"aiosd: {line}", file=sys.stderr, flush=True)


@click.command("models", context_settings=edge.SETTINGS, short_help="List the models on this machine.")
@click.option("--json", "as_json", is_flag=True, help="A list of objects, with paths.")
def models(as_json: bool) -> int:
    """List the models on this machine that --model takes by name: the embedded one, those in AIOSD_MODELS (or in
    ~/.cache/aiosd/models), and what huggingface_hub, Ollama and LM Studio have downloaded; then those that aiosd.toml
    has at a URL. A name may be shortened as long as it fits one model only.

    \b
    SIZE   of the file, or of all its parts
    CTX    how many tokens the model was trained for
    FITS   do weights and one agent's context fit into the free memory?

    \b
      aiosd models
      aiosd -d --model ollama:llama3.2
      aiosd models --json | jq -r '.[] | select(.fits) | .name'
    """
    from aiosd.models import fit, found

    room = fit.available_memory()
    rows = [found.row(model, room) for model in found.listing()] + _elsewhere()
    print(json.dumps(rows, indent=2) if as_json else "\n".join(_lines(rows)))
    return 0


def _elsewhere() -> list[dict[str, Any]]:
    """The models at URLs that the file of settings names. No request is sent to them."""
    from aiosd import config
    from aiosd.llm.spec import ModelSpec
    from libaios.home import Home

    specs: tuple[ModelSpec, ...] = ()
    with contextlib.suppress(AiosdError):  # `aiosd` itself reports errors in the file
        specs = config.load({}, Home()).models
    return [
        {"name": spec.name, "source": "url", "path": "", "url": f"{spec.url}#{spec.model}"}
        for spec in specs
        if spec.url
    ]


def _lines(rows: list[dict[str, Any]]) -> list[str]:
    texts = [HEADERS, *map(_texts, rows)]
    widths = [max(len(row[column]) for row in texts if len(row) > column) for column in range(len(HEADERS))]
    return [_line(row, widths) for row in texts]


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    if "url" in row:
        return row["name"], "-", "-", "-", "-", row["url"]
    if "problem" in row:
        return row["name"], "-", "-", "-", "-", row["problem"]
    size, ctx, quant = format_size(row["size"]), str(row["ctx"] or "-"), row["quantisation"] or "-"
    return row["name"], size, ctx, row["family"], quant, "yes" if row["fits"] else _too_large(row["needs_bytes"])


def _too_large(needs: int) -> str:
    return f"no: {format_size(needs)}"


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    cells = [
        text.rjust(width) if column in _FIGURES else text.ljust(width)
        for column, (text, width) in enumerate(zip(row, widths, strict=True))
    ]
    return _printable(" ".join(cells).rstrip())


def _printable(text: str) -> str:
    """A file name for the terminal: names may come from anywhere, so control characters are replaced."""
    return "".join(char if char.isprintable() else "?" for char in text)
