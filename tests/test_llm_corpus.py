"""Schemas of the kinds that agents send today: each becomes a grammar, and every text drawn from it is valid.

Most are made in the style of pydantic, zod and MCP servers (`tests/schemas.py`); where packages with many models are
installed, theirs are taken as well.
"""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from aiosd.llm import llama
from aiosd.llm.schema import grammar_of
from tests import schemas, tinymodels
from tests.test_llm_schema import walk

jsonschema = pytest.importorskip("jsonschema")

CORPUS = [*schemas.fields(), *schemas.corpus(200)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[llama.Model]:
    llama.start()
    path: Path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tinymodels.write(path, d=8, layers=1, heads=1, kv_heads=1, ff=8)
    model = llama.Model(str(path), 0, lambda fraction: None)
    yield model
    model.close()


def check(model: llama.Model, schema: Any, walks: int, most: int = 500) -> int:
    gbnf = grammar_of(schema)
    validator, ended = jsonschema.Draft202012Validator(schema), 0
    for seed in range(walks):
        text = walk(model, gbnf, random.Random(seed), most)
        if text is not None:
            errors = list(validator.iter_errors(json.loads(text)))
            assert not errors, f"{text!r}: {errors[0].message}"
            ended += 1
    return ended


@pytest.mark.parametrize(("name", "schema"), CORPUS, ids=[name for name, _ in CORPUS])
def test_every_schema_of_the_corpus_is_kept(model: llama.Model, name: str, schema: Any) -> None:
    ended = check(model, schema, walks=1 if "object" in name else 3)
    assert ended or "object" in name or "email" in json.dumps(schema), "no walk came to an end"


def models_of(package: ModuleType) -> list[Any]:
    """All pydantic models of a package and its modules."""
    pydantic = importlib.import_module("pydantic")
    found: dict[str, Any] = {}
    for info in [None, *pkgutil.walk_packages(package.__path__, f"{package.__name__}.")]:
        module = importlib.import_module(info.name) if info else package
        for item in vars(module).values():
            if inspect.isclass(item) and issubclass(item, pydantic.BaseModel) and item.__module__ == module.__name__:
                found[f"{item.__module__}.{item.__qualname__}"] = item
    return list(found.values())


@pytest.mark.parametrize("package", ["mcp_types", "openai.types.chat", "openai.types.responses"])
def test_models_of_installed_packages(model: llama.Model, package: str) -> None:
    """They have thousands of fields. A few are too large for a grammar; no other one may be refused."""
    module, pydantic = pytest.importorskip(package), pytest.importorskip("pydantic")
    refused, began, count = [], time.process_time(), 0
    for item in models_of(module):
        try:
            schema = item.model_json_schema()
        except pydantic.errors.PydanticInvalidForJsonSchema:
            continue  # for example, it contains a function
        count += 1
        try:
            grammar_of(schema)
        except OSError as error:
            refused.append((item.__name__, error.strerror))
    assert count > 20
    assert not refused
    assert time.process_time() - began < 0.2 * count + 5
