"""The head of a GGUF, read and checked before llama.cpp opens the file.

llama.cpp's errors for damaged files are often unclear, and some files end the process (a length field of 2^60 is
allocated before it is checked). So the head is read here, and every length is checked against the size of the file: a
file that is missing, no GGUF, cut off or invalid is refused with one line. The head also shows how large the KV cache
will be.
"""

from __future__ import annotations

import mmap
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiosd.errors import UsageError

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES = 1 << 20
_SHORT = 1024  # longer lists of numbers are skipped, not read
MOST_LAYERS = 4096  # llama.cpp takes 512
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf\Z")


@dataclass
class ModelFile:
    path: str
    size: int  # bytes, all parts of a split model together
    meta: dict[str, Any] = field(default_factory=dict)  # scalars and strings; lists of numbers if short, else None
    num_tensors: int = 0
    kv_bytes: float = 2.0  # bytes of a number in the cache; f16 by default

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    def number(self, key: str, default: int = 0) -> int:
        """A number of this architecture, such as block_count. If there is one for each layer: the largest."""
        return max(self.numbers(key), default=default)

    def numbers(self, key: str) -> list[int]:
        """As `number`, where there may be one for each layer; a single number is returned as a list of one; [] if it is
        missing or the list is too long to be read. Raises UsageError where it is no number."""
        name = f"{self.architecture}.{key}"
        value = self.meta.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in values):
            raise UsageError(f"{self.path}: damaged: {name} is {str(value)[:60]!r}, not a number")
        return values

    def text(self, key: str) -> str:
        """A text; '' if it is missing. Raises UsageError where it is not text."""
        value = self.meta.get(key, "")
        if not isinstance(value, str):
            raise UsageError(f"{self.path}: damaged: {key} is {str(value)[:60]!r}, not a text")
        return value

    def _kv_heads(self) -> list[int]:
        """The number for every layer; 0 where it has a recurrent state instead of attention."""
        layers = self.number("block_count")
        if layers > MOST_LAYERS:
            raise UsageError(f"{self.path}: damaged, or no model for llama.cpp: {layers} layers")
        per_layer = self.numbers("attention.head_count_kv")
        if not any(per_layer) and len(per_layer) <= 1:
            if self._state_per_layer():
                return [0] * layers
            per_layer = self.numbers("attention.head_count") or [1]
        return per_layer * layers if len(per_layer) == 1 else [*per_layer, *[0] * layers][:layers]

    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token over all layers. An upper estimate where layers share them."""
        values = self.number("attention.value_length", self._head_width())
        return int(self.kv_bytes * sum(self._kv_heads()) * (self.key_width() + values))

    def key_width(self) -> int:
        """Numbers in the key of one head."""
        return self.number("attention.key_length", self._head_width())

    def _head_width(self) -> int:
        return self.number("embedding_length") // (self.number("attention.head_count") or 1)

    def state_bytes(self) -> int:
        """Bytes that a recurrent model keeps per sequence of any length: all layers, as f32."""
        return 4 * self._state_per_layer() * sum(not heads for heads in self._kv_heads())

    def _state_per_layer(self) -> int:
        """How many numbers a layer without attention keeps."""
        inner, state = self.number("ssm.inner_size"), self.number("ssm.state_size")
        width, groups = self.number("embedding_length"), self.number("ssm.group_count")
        mamba = (self.number("ssm.conv_kernel", 1) - 1) * (inner + 2 * groups * state) + state * inner
        head = self.number("wkv.head_size")
        rwkv = (self.number("token_shift_count", 2) + head) * width if head else 0
        return mamba + rwkv + max(self.number("shortconv.l_cache") - 1, 0) * width

    def kv_bytes_per_slot(self, ctx: int) -> int:
        """Bytes of one slot of `ctx` tokens: llama.cpp rounds up to a multiple of 256 tokens."""
        return -(-ctx // 256) * 256 * self.kv_bytes_per_token() + self.state_bytes()


class _GgufReader:
    def __init__(self, data: mmap.mmap, path: str) -> None:
        self._data, self._path, self.at = data, path, 0

    def take(self, form: str) -> Any:
        size = struct.calcsize(form)
        self._check(size)
        (value,) = struct.unpack_from(form, self._data, self.at)
        self.at += size
        return value

    def string(self) -> str:
        return self.raw(self.take("<Q")).decode(errors="replace")

    def raw(self, size: int) -> bytes:
        self._check(size)
        self.at += size
        return self._data[self.at - size : self.at]

    def skip(self, size: int) -> None:
        self._check(size)
        self.at += size

    def _check(self, size: int) -> None:
        if size > len(self._data) - self.at:
            raise UsageError(f"{self._path}: damaged or cut off: its head points past the end of the file")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self._array()
        form = _SCALARS.get(kind)
        if form is None:
            raise UsageError(f"{self._path}: damaged: a field of unknown type {kind}")
        return self.take(form)

    def _array(self) -> list[Any] | None:
        kind, count = self.take("<I"), self.take("<Q")
        if kind in _SCALARS:
            if count <= _SHORT:
                return [self.take(_SCALARS[kind]) for _ in range(count)]
            self.skip(count * struct.calcsize(_SCALARS[kind]))
        elif kind == _STRING:
            if count > len(self._data) // 8:
                raise UsageError(f"{self._path}: damaged: an array of {count} strings")
            self._skip_strings(count)
        else:
            raise UsageError(f"{self._path}: damaged: an array of type {kind}")
        return None

    def _skip_strings(self, count: int) -> None:
        """Written for speed: a vocabulary has up to 250 000 strings, and simple code takes a second for these."""
        length = struct.Struct("<Q").unpack_from
        data, at, last = self._data, self.at, len(self._data) - 8
        for _ in range(count):
            if at > last:
                self._check(at + 8 - self.at)  # refuses
            at += 8 + length(data, at)[0]
        self.skip(at - self.at)


def read(path: str) -> ModelFile:
    """Raises UsageError with one line: the reason why the file is no model."""
    try:
        size = os.stat(path).st_size
        with open(path, "rb") as file:
            if os.path.isdir(path) or size < 24:
                raise UsageError(f"{path}: not a GGUF model (only {size} bytes)")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                model = _read(data, path)
    except IsADirectoryError:
        raise UsageError(f"{path}: is a directory, not a GGUF model") from None
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file (aiosd models lists what is on this machine)") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    model.size = sum(os.stat(part).st_size for part in parts(path))
    return model


def _read(data: mmap.mmap, path: str) -> ModelFile:
    reader = _GgufReader(data, path)
    if reader.raw(4) != b"GGUF":
        raise UsageError(f"{path}: not a GGUF model")
    version = reader.take("<I")
    if not 2 <= version <= 3:
        raise UsageError(f"{path}: GGUF version {version} is not supported (2 and 3 are)")
    tensors, entries = reader.take("<Q"), reader.take("<Q")
    if entries > _MAX_ENTRIES or tensors > _MAX_ENTRIES:
        raise UsageError(f"{path}: damaged: {entries} fields and {tensors} tensors")
    model = ModelFile(path, len(data), num_tensors=tensors)
    for _ in range(entries):
        key = reader.string()
        model.meta[key] = reader.value(reader.take("<I"))
    if not model.architecture:
        raise UsageError(f"{path}: no model: it names no architecture")
    for _ in range(tensors):
        reader.string()
        dimensions = reader.take("<I")
        if dimensions > 4:
            raise UsageError(f"{path}: damaged: a tensor of {dimensions} dimensions")
        reader.skip(8 * dimensions + 12)
    return model


def first_part(path: str) -> str:
    """The first file of a model that is split into several: llama.cpp must get that one. `path`: any of them."""
    return _SPLIT.sub(r"-00001-of-\2.gguf", path)


def parts(path: str) -> list[Path]:
    """All files of a model that is split into several. `path`: any of them."""
    match = _SPLIT.search(path)
    if match is None:
        return [Path(path)]
    found = [Path(f"{path[: match.start()]}-{i:05d}-of-{match[2]}.gguf") for i in range(1, int(match[2]) + 1)]
    for part in found:
        if not part.exists():
            raise UsageError(f"{part}: no such file (the model is split into {len(found)})")
    return found
