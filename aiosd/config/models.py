"""The models of the settings: from words such as NAME=PATH and from tables, with the options of each; and routes."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aiosd.config.keys import BY_NAME, PER_MODEL, TABLE_SUFFIX
from aiosd.errors import UsageError
from aiosd.llm.spec import REMOTE, ModelSpec
from aiosd.models import found
from aiosd.models.places import ours
from libaios.home import Home

URLS = ("http://", "https://")
KEYRING = "keyring:"  # a key is there and not in a file (`aiosd.llm.remote.keys`)


def read_model(
    word: str,
    table: Mapping[str, Any],
    values: Mapping[str, Any],
    given: set[str],
    locate: found.Locate,
    folder: str,
    home: Home,
) -> ModelSpec:
    """A model with its options: those given by flag or environment, else its own in the file, else the general
    ones of the file, else the defaults."""
    options = {name: values[name] for name in PER_MODEL}
    own = {name: value for name, value in table.items() if name in PER_MODEL and name not in given}
    options |= own | with_paths(own, folder)
    adapters = [lora.name for lora in options["lora"]]
    if len(set(adapters)) < len(adapters):
        raise UsageError(f"model {word!r}: two adapters of one name: {', '.join(adapters)}")
    name, equals, path = word.partition("=")
    if not equals or "/" in name or ":" in name:
        name, path = "", word
    if not path:
        raise UsageError(f"model {word!r}: a path is missing")
    if path.startswith(URLS):
        return _elsewhere(path, table.get("name") or name, options, folder)
    model = locate(path, folder)
    name = re.sub(r"[\x00-\x20\x7f/]", "_", table.get("name") or name or model.label)[:64]
    return ModelSpec(name=name, path=model.path, folder=str(home.data / "contexts"), **options)


def embedder(
    word: str, values: Mapping[str, Any], given: set[str], locate: found.Locate, folder: str, home: Home
) -> tuple[str, ModelSpec | None]:
    """The embedder that `embed_model` names: the file of a table, or a model; or neither."""
    if not word:
        return "", None
    if word.endswith(TABLE_SUFFIX):
        places = [Path(folder, os.path.expanduser(word)), ours() / word]
        table = next((place for place in places if place.is_file()), None)
        if table is None:
            raise UsageError(f"embed_model: {word}: there is no such file; aiosd get-embedder --static makes one")
        return str(table.absolute()), None
    if word.startswith(URLS):
        raise UsageError(f"embed_model: {word}: a model that is served elsewhere makes no vectors here")
    found_model = read_model(word, {}, values, given, locate, folder, home)
    if not os.path.exists(found_model.path):
        raise UsageError(
            f"embed_model: {found_model.path}: there is no such file; aiosd get-embedder makes one, and aiosd models "
            "lists what is on this machine"
        )
    return "", dataclasses.replace(found_model, vectors_only=True, lora=(), chat_template_file="")


def with_paths(values: Mapping[str, Any], folder: str) -> dict[str, Any]:
    """The values that are paths, made absolute from this folder."""
    found: dict[str, Any] = {}
    if values.get("lora"):
        found["lora"] = tuple(
            dataclasses.replace(lora, path=os.path.join(folder, os.path.expanduser(lora.path)))
            for lora in values["lora"]
        )
    if values.get("chat_template_file"):
        found["chat_template_file"] = os.path.join(folder, os.path.expanduser(values["chat_template_file"]))
    return found


def refuse_for_many(values: Mapping[str, Any], count: int) -> None:
    """Refuse general options that fit one model only: they must be given for that model."""
    for name in ("lora", "chat_template_file"):
        if count > 1 and values[name]:
            raise UsageError(f"{BY_NAME[name].flag}: with {count} models, write it under [[model]] in aiosd.toml")


def word_of(table: Mapping[str, Any]) -> str:
    """The value of `--model` that would stand for a [[model]]."""
    return table["path"] if "path" in table else f"{table['url']}#{table['model']}"


def _elsewhere(address: str, name: str, options: dict[str, Any], folder: str) -> ModelSpec:
    """A model at a URL. Options that only a file needs are ignored."""
    url, _, model = address.partition("#")
    if not model:
        raise UsageError(f"--model {address}: what is its name there? {url}#NAME")
    key_file = options["key_file"]
    if key_file and not key_file.startswith(KEYRING):
        key_file = os.path.join(folder, os.path.expanduser(key_file))
    name = re.sub(r"[\x00-\x20\x7f/]", "_", name or model)[:64]
    limits = {key: options[key] for key in ("concurrency", "rpm", "tpm", "price")}
    return ModelSpec(name=name, backend=REMOTE, url=url, model=model, key_file=key_file, **limits)


def models_of_environment(text: str) -> list[str]:
    """With ':' between them, as in PATH; with ',' where a name has a colon itself: hf:ORG/NAME:Q4_K_M,nano"""
    apart = "," if any(prefix in text for prefix in (*found.PREFIXES, *URLS)) else os.pathsep
    return [word for word in text.split(apart) if word]


def refuse_doubles(models: Sequence[ModelSpec]) -> None:
    names: set[str] = set()
    for model in models:
        if model.name in names:
            raise UsageError(
                f"two models named {model.name!r}; give one another name: --model NAME={model.path or model.url}"
            )
        names.add(model.name)


def checked_routes(
    given: Sequence[tuple[str, tuple[str, ...]]], models: Sequence[ModelSpec]
) -> dict[str, tuple[str, ...]]:
    known, routes = [model.name for model in models], dict(given)
    for name, words in routes.items():
        if name in known:
            raise UsageError(f"route {name}: there is a model of this name")
        for word in words:
            if word not in known:
                raise UsageError(f"route {name}: no model is named {word!r}; there are: {', '.join(known)}")
    return routes
