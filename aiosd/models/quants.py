"""Quantisations by their names: the one of a file, and the choice of one file among several.

A repository on a hub holds one model in many sizes, `name-Q4_K_M.gguf` beside `name-Q8_0.gguf` and
`name-BF16-00001-of-00002.gguf`. The user chooses one by the name of its quantisation; the default is Q4_K_M,
half the size of Q8_0 and hardly worse, or the nearest to it in bits per weight.
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass

from aiosd.errors import UsageError

DEFAULT = "Q4_K_M"

#: Bits for each weight, about.
BITS: dict[str, float] = {
    "IQ1_S": 1.6, "IQ1_M": 1.8, "TQ1_0": 1.7, "TQ2_0": 2.1, "IQ2_XXS": 2.1, "IQ2_XS": 2.3, "IQ2_S": 2.5, "IQ2_M": 2.7,
    "Q2_K_S": 2.8, "Q2_K": 3.0, "Q2_K_L": 3.1, "Q2_K_XL": 3.1, "IQ3_XXS": 3.1, "IQ3_XS": 3.3, "IQ3_S": 3.5,
    "Q3_K_S": 3.5, "IQ3_M": 3.7, "Q3_K_M": 3.9, "Q3_K": 3.9, "Q3_K_L": 4.2, "Q3_K_XL": 4.3, "IQ4_XS": 4.3,
    "MXFP4": 4.4, "MXFP4_MOE": 4.4, "NVFP4": 4.5, "IQ4_NL": 4.5, "Q4_0": 4.6, "Q4_K_S": 4.6, "Q4_K": 4.85,
    "Q4_K_M": 4.85, "Q4_K_L": 4.9, "Q4_K_XL": 4.9, "Q4_1": 5.1, "Q5_0": 5.5, "Q5_K_S": 5.5, "Q5_K": 5.7, "Q5_K_M": 5.7,
    "Q5_K_L": 5.8, "Q5_K_XL": 5.8, "Q5_1": 6.0, "Q6_K": 6.6, "Q6_K_L": 6.7, "Q6_K_XL": 6.8, "Q8_0": 8.5, "Q8_K_XL": 9.0,
    "F16": 16.0, "BF16": 16.0, "F32": 32.0,
}  # fmt: skip

#: `general.file_type` of a GGUF, llama.cpp's `llama_ftype`.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
}  # fmt: skip

_WORDS = "|".join(sorted(BITS, key=len, reverse=True))
_QUANT = re.compile(rf"(?<![A-Z0-9])((?:UD-)?(?:{_WORDS}|FP16|FP32))(?![A-Z0-9_])")
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\Z")
_NO_MODEL = re.compile(r"mmproj|imatrix|(?:^|[-_.])(?:vocab|lora|adapter)(?:[-_.]|\Z)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class QuantChoice:
    """One model of a repository: its quantisation ("" if its name has none) and its files, in order."""

    quant: str
    files: tuple[str, ...]

    @property
    def stem(self) -> str:
        return stem_of(self.files[0])


def of_name(path: str) -> str:
    """The quantisation in the name of a file, or in that of its folder: "Q4_K_M", "UD-Q4_K_XL", ""."""
    for part in reversed(path.upper().split("/")):
        if found := _QUANT.findall(part):
            return re.sub(r"\AFP(?=16|32)", "F", str(found[-1]))
    return ""


def stem_of(path: str) -> str:
    """The file's name without .gguf, and without the number of a part."""
    name = posixpath.basename(path)
    return _SPLIT.sub("", name[:-5] if name.lower().endswith(".gguf") else name)


def is_model(path: str) -> bool:
    """Whether a file, by its name, is a GGUF with weights of a language model, or the first part of one."""
    name = posixpath.basename(path)
    if not name.lower().endswith(".gguf") or _NO_MODEL.search(name):
        return False
    part = _SPLIT.search(name[:-5])
    return part is None or int(part[1]) == 1


def choices(files: Iterable[str]) -> list[QuantChoice]:
    """The models among the files of a repository, the smallest quantisation first."""
    have = sorted(files)
    found = [QuantChoice(of_name(file), _all_parts(file)) for file in have if is_model(file)]
    return sorted(found, key=lambda choice: (_bits(choice.quant), choice.files))


def choose(files: Iterable[str], wanted: str, where: str) -> QuantChoice:
    """The model that `wanted` names: a quantisation, a file, or "" for the default. Raises UsageError, which lists the
    existing ones. `where`: the name of the repository in messages."""
    have = list(files)
    found = choices(have)
    if not found:
        raise UsageError(f"{where}: holds no model in GGUF format")
    named = [choice for choice in found if _fits(choice, wanted)] if wanted else _nearest(found)
    if not named:
        raise UsageError(f"{where}: has no {wanted}; there are {', '.join(map(_call, found))}")
    if len(named) > 1:
        raise UsageError(f"{where}: several files are meant; name one: {', '.join(c.files[0] for c in named)}")
    missing = [file for file in named[0].files if file not in have]
    if missing:
        raise UsageError(f"{where}: {missing[0]} is missing, a part of the model")
    return named[0]


def _all_parts(first: str) -> tuple[str, ...]:
    part = _SPLIT.search(first[:-5])
    if part is None:
        return (first,)
    return tuple(f"{first[: part.start()]}-{i:05d}-of-{part[2]}{first[-5:]}" for i in range(1, int(part[2]) + 1))


def _fits(choice: QuantChoice, wanted: str) -> bool:
    if wanted.lower().endswith(".gguf"):
        return wanted in (choice.files[0], posixpath.basename(choice.files[0]))
    return choice.quant == wanted.upper() or choice.stem.lower() == wanted.lower()


def _nearest(found: list[QuantChoice]) -> list[QuantChoice]:
    """The models nearest to the default; of two equally near the larger, of two of one size the plain one."""

    def distance(choice: QuantChoice) -> tuple[float, bool, bool]:
        off = math.log2(_bits(choice.quant) / BITS[DEFAULT])
        return (round(abs(off), 6), off < 0, choice.quant.startswith("UD-"))

    best = min(map(distance, found))
    return [choice for choice in found if distance(choice) == best]


def _bits(quant: str) -> float:
    return BITS.get(quant.removeprefix("UD-"), 64.0)


def _call(choice: QuantChoice) -> str:
    return choice.quant or posixpath.basename(choice.files[0])
