"""Thin, typed owners of llama.cpp's objects.

A `Model` holds weights and vocabulary, a `LlamaContext` the KV cache of one model, a `BatchBuffer` the arrays that a
decode step reads, a `Grammar` the state of one constrained generation. Each frees what it owns in `close`;
a context is closed before its model. Nothing here is thread-safe: one thread decodes.

llama.cpp ends the process (GGML_ABORT, or a C++ exception that ctypes cannot pass on) when it gets impossible
arguments. Every method here documents which these are, and its callers check first.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from aiosd.errors import Bug, WorldError
from aiosd.llm import blob
from aiosd.llm.attention import Attention
from aiosd.llm.ggml import C, Floats, Ints, on_abort, start, supports_gpu, take_errors, version

__all__ = [
    "ABORTED",
    "NO_ROOM",
    "OK",
    "POOLING_MEAN",
    "POOLING_RANK",
    "BatchBuffer",
    "C",
    "Floats",
    "Grammar",
    "Ints",
    "LlamaContext",
    "Model",
    "on_abort",
    "start",
    "supports_gpu",
    "take_errors",
    "version",
]

POOLING_NONE, POOLING_MEAN, POOLING_RANK = 0, 1, 4

OK, NO_ROOM, ABORTED = 0, 1, 2  # what LlamaContext.decode returns; below 0: an error


# ── weights and vocabulary ────────────────────────────────────────────────────────────────────────────────


#: llama.cpp finds words with a regex that recurses once per character: a run of more than about ten thousand characters
#: overflows the stack, which ends the process. Such a text (no real text has one) is tokenised in parts.
_RUN = 2048
_LONG_RUN = re.compile(rf"\S{{{_RUN},}}|\s{{{_RUN},}}")

_CUTTING = (C.LLAMA_VOCAB_TYPE_SPM, C.LLAMA_VOCAB_TYPE_BPE)
_STRIPS = C.LLAMA_TOKEN_ATTR_LSTRIP | C.LLAMA_TOKEN_ATTR_RSTRIP


class Model:
    """Weights and vocabulary of one GGUF.

    Loading raises WorldError with llama.cpp's own message. The vocabulary is copied into Python once, so that
    turning tokens into bytes never crosses into C.
    """

    def __init__(
        self,
        path: str,
        gpu_layers: int,
        progress: Callable[[float], None],
        vocabulary_only: bool = False,
        places: Sequence[tuple[str, str]] = (),
    ) -> None:
        """`places`: where tensors lie, as (pattern of their names, kind of buffer); the first that fits counts."""
        params = C.llama_model_default_params()
        overrides = _overrides(places)
        if overrides is not None:
            params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
        params.vocab_only = vocabulary_only
        params.n_gpu_layers = gpu_layers
        last = -1.0

        @C.llama_progress_callback  # type: ignore[untyped-decorator]
        def report(fraction: float, _data: object) -> bool:
            nonlocal last
            if fraction - last >= 0.01 or fraction == 1:
                last = fraction
                progress(fraction)
            return True

        params.progress_callback = report
        take_errors()
        self._model = C.llama_model_load_from_file(path.encode(), params)
        if not self._model:
            raise WorldError("; ".join(_reasons(take_errors())) or "llama.cpp gave no reason")
        self._vocab = C.llama_model_get_vocab(self._model)
        self.adapters: dict[str, tuple[Any, float]] = {}  # llama.cpp's handle of each, and its scale
        self.own_template = ""  # a chat template that is used instead of the file's, '' if none is
        self._facts()
        self._vocabulary()

    def _facts(self) -> None:
        model = self._model
        self.n_params = int(C.llama_model_n_params(model))
        self.size = int(C.llama_model_size(model))
        self.n_embd = int(C.llama_model_n_embd(model))
        self.n_embd_out = int(C.llama_model_n_embd_out(model))
        self.n_swa = int(C.llama_model_n_swa(model))
        self.n_cls_out = int(C.llama_model_n_cls_out(model))
        self.n_layer = int(C.llama_model_n_layer(model))
        self.n_ctx_train = int(C.llama_model_n_ctx_train(model))
        self.has_encoder = bool(C.llama_model_has_encoder(model))
        self.has_decoder = bool(C.llama_model_has_decoder(model))
        self.causal = self.meta(f"{self.meta('general.architecture')}.attention.causal") != "false"  # it can generate
        self.recurrent = bool(C.llama_model_is_recurrent(model) or C.llama_model_is_hybrid(model))
        buffer = ctypes.create_string_buffer(256)
        C.llama_model_desc(model, buffer, len(buffer))
        self.description = buffer.value.decode(errors="replace")

    def _vocabulary(self) -> None:
        vocab = self._vocab
        self.n_vocab = n = int(C.llama_vocab_n_tokens(vocab))
        self._kind = int(C.llama_vocab_type(vocab))
        self.has_tokenizer = self._kind != C.LLAMA_VOCAB_TYPE_NONE
        self.bos, self.eos = int(C.llama_vocab_bos(vocab)), int(C.llama_vocab_eos(vocab))
        self.adds_bos = bool(C.llama_vocab_get_add_bos(vocab))
        self.query_marks = self._query_marks()
        self.end_tokens = frozenset(t for t in range(n) if C.llama_vocab_is_eog(vocab, t))
        self.control = np.array([C.llama_vocab_is_control(vocab, t) for t in range(n)], dtype=bool)
        self._buffer = ctypes.create_string_buffer(1024)
        #: Bytes of every token as shown to a reader: control tokens are empty.
        self.pieces = [self._piece(t, False) for t in range(n)]
        self.longest_piece = max(map(len, self.pieces), default=0)

    def _query_marks(self) -> tuple[list[int], list[int], list[int]]:
        """The tokens before, between and after a query and a document, if the model's file has no template."""
        vocab, sep = self._vocab, int(C.llama_vocab_sep(self._vocab))
        end = [self.eos if self.eos >= 0 else sep] if C.llama_vocab_get_add_eos(vocab) else []
        between = [*end, sep] if C.llama_vocab_get_add_sep(vocab) else end
        begin = [self.bos] if self.adds_bos else []
        return begin, [token for token in between if token >= 0], [token for token in end if token >= 0]

    def _piece(self, token: int, special: bool) -> bytes:
        n = C.llama_token_to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, special)
        if n < 0:
            self._buffer = ctypes.create_string_buffer(-n)
            n = C.llama_token_to_piece(self._vocab, token, self._buffer, -n, 0, special)
        return self._buffer.raw[: max(n, 0)]

    def control_tokens(self) -> list[int]:
        return [int(token) for token in np.flatnonzero(self.control)]

    @property
    def cuts_at_controls(self) -> bool:
        """Is the text on both sides of a control token tokenised as if it stood alone?"""
        strips = any(C.llama_vocab_get_attr(self._vocab, token) & _STRIPS for token in self.control_tokens())
        return self._kind in _CUTTING and not strips

    def token_text(self, token: int) -> str:
        """A token as templates write it, with the text of control tokens."""
        return "" if token < 0 else self._piece(token, True).decode(errors="replace")

    def tokenize(self, text: str, *, bos: bool, special: bool) -> list[int]:
        """`bos`: add the token that the model expects first. `special`: recognise control tokens in the text."""
        if self._kind == C.LLAMA_VOCAB_TYPE_BPE and _LONG_RUN.search(text):  # others use no regex
            parts = [text[i : i + _RUN] for i in range(0, len(text), _RUN)]
            first, *rest = (self._tokenize(part, bos and i == 0, special) for i, part in enumerate(parts))
            return first + [token for tokens in rest for token in tokens]
        return self._tokenize(text, bos, special)

    def _tokenize(self, text: str, bos: bool, special: bool) -> list[int]:
        data = text.encode(errors="replace")
        room = len(data) + 8
        while True:
            out = (C.llama_token * room)()
            n = int(C.llama_tokenize(self._vocab, data, len(data), out, room, bos, special))
            if n >= 0:
                return list(out[:n])
            room = -n

    def detokenize(self, tokens: list[int]) -> bytes:
        """The bytes of the tokens, without control tokens."""
        pieces = self.pieces
        return b"".join([pieces[token] for token in tokens])

    def text(self, tokens: list[int]) -> str:
        """The text that `tokenize` would turn into these tokens: with control tokens, without an added space."""
        ids = (C.llama_token * len(tokens))(*tokens)
        room = sum(len(self.pieces[token]) for token in tokens) + 64 * len(tokens) + 8
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = int(C.llama_detokenize(self._vocab, ids, len(tokens), buffer, room, False, True))
            if n >= 0:
                return buffer.raw[:n].decode(errors="replace")
            room = -n

    def apart(self, tokens: list[int]) -> list[bytes]:
        """The bytes of each token, with the text of control tokens. Those of one alone need not be UTF-8."""
        return [self.pieces[token] or self._piece(token, True) for token in tokens]

    def meta(self, key: str) -> str | None:
        """A string of the GGUF's metadata; numbers are returned as text."""
        size = C.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = ctypes.create_string_buffer(size + 1)
        C.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode(errors="replace")

    @property
    def chat_templates(self) -> tuple[str | None, str | None]:
        """The chat template, and another one for conversations with tools; None where there is none."""
        if self.own_template:
            return self.own_template, None
        return self.meta("tokenizer.chat_template"), self.meta("tokenizer.chat_template.tool_use")

    def add_adapter(self, name: str, path: str, scale: float) -> None:
        """Load a LoRA adapter; it is freed with the model. Raises WorldError with llama.cpp's reason."""
        take_errors()
        adapter = C.llama_adapter_lora_init(self._model, path.encode())
        if not adapter:
            raise WorldError("; ".join(_reasons(take_errors())) or "llama.cpp gave no reason")
        self.adapters[name] = adapter, scale

    def close(self) -> None:
        if self._model:
            C.llama_model_free(self._model)
            self._model = None


class _Override(ctypes.Structure):
    """llama_model_tensor_buft_override, which llama_cpp does not declare."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def buffer_types() -> dict[str, int]:
    """The kinds of buffers in which tensors can lie, by name: CPU, CUDA0, …; and llama.cpp's handle of each."""
    found: dict[str, int] = {}
    for device in range(int(_dev_count())):
        kind = _dev_buffer_type(_dev_get(device))
        if kind:
            found.setdefault(_buffer_type_name(kind).decode(errors="replace"), kind)
    return found


def gpu_memory() -> int:
    """Bytes that are free on all GPUs together."""
    free, total, found = ctypes.c_size_t(), ctypes.c_size_t(), 0
    for device in range(int(_dev_count())):
        if int(_dev_type(_dev_get(device))) == _GPU:
            _dev_memory(_dev_get(device), ctypes.byref(free), ctypes.byref(total))
            found += free.value
    return found


def _overrides(places: Sequence[tuple[str, str]]) -> Any:
    """The array that llama.cpp reads while it loads a model. None: nothing is overridden."""
    if not places:
        return None
    known = buffer_types()
    entries = [_Override(pattern.encode(), known[kind]) for pattern, kind in places]
    return (_Override * (len(entries) + 1))(*entries)  # the last one, empty, ends it


def _reasons(errors: list[str]) -> list[str]:
    """llama.cpp's error lines without function names; the most general lines come last."""
    lines = [line.split(": ", 1)[1] if ": " in line and " " not in line.split(": ", 1)[0] else line for line in errors]
    return [line for line in dict.fromkeys(lines) if line != "failed to load model"]


# ── batch ─────────────────────────────────────────────────────────────────────────────────────────────────


class BatchBuffer:
    """The arrays that `LlamaContext.decode` reads, as numpy views that are written in place: nothing is allocated
    and no ctypes object made in a step. Each token belongs to one sequence. Set `size`, fill the first `size`
    places of `tokens`, `positions`, `sequences`, `wanted` (1: the logits of this token are wanted)."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens: Ints = np.zeros(capacity, np.int32)
        self.positions: Ints = np.zeros(capacity, np.int32)
        self.sequences: Ints = np.zeros(capacity, np.int32)
        self.wanted: npt.NDArray[np.int8] = np.zeros(capacity, np.int8)
        self._ones: Ints = np.ones(capacity, np.int32)
        self._pointers = self.sequences.ctypes.data + 4 * np.arange(capacity, dtype=np.uint64)
        self.struct = C.llama_batch()
        self.struct.token = self.tokens.ctypes.data_as(type(self.struct.token))
        self.struct.pos = self.positions.ctypes.data_as(type(self.struct.pos))
        self.struct.n_seq_id = self._ones.ctypes.data_as(type(self.struct.n_seq_id))
        self.struct.seq_id = self._pointers.ctypes.data_as(type(self.struct.seq_id))
        self.struct.logits = self.wanted.ctypes.data_as(type(self.struct.logits))

    @property
    def size(self) -> int:
        return int(self.struct.n_tokens)

    @size.setter
    def size(self, size: int) -> None:
        if not 0 <= size <= self.capacity:
            raise Bug(f"a batch of {size} tokens, capacity {self.capacity}")
        self.struct.n_tokens = size


# ── KV cache ──────────────────────────────────────────────────────────────────────────────────────────────

_get_logits = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(("llama_get_logits", C._lib))
_get_embeddings_seq = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)(
    ("llama_get_embeddings_seq", C._lib)
)
_state_seq_get = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32)(
    ("llama_state_seq_get_data", C._lib)
)
_state_seq_set = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32)(
    ("llama_state_seq_set_data", C._lib)
)

_state_seq_size_ext = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint32)(
    ("llama_state_seq_get_size_ext", C._lib)
)
_state_seq_get_ext = ctypes.CFUNCTYPE(
    ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_uint32
)(("llama_state_seq_get_data_ext", C._lib))
_dev_count = ctypes.CFUNCTYPE(ctypes.c_size_t)(("ggml_backend_dev_count", C._lib))
_dev_get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t)(("ggml_backend_dev_get", C._lib))
_dev_type = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(("ggml_backend_dev_type", C._lib))
_dev_memory = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)(
    ("ggml_backend_dev_memory", C._lib)
)
_GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU: one with memory of its own
_dev_buffer_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(("ggml_backend_dev_buffer_type", C._lib))
_buffer_type_name = ctypes.CFUNCTYPE(ctypes.c_char_p, ctypes.c_void_p)(("ggml_backend_buft_name", C._lib))
_KV_TYPES = {"f16": 1, "q8_0": 8}  # ggml's numbers
_WINDOW_ONLY = 1  # LLAMA_STATE_SEQ_FLAGS_SWA_ONLY


class LlamaContext:
    """The KV cache of one model: `slots` streams of `ctx` tokens each (rounded up to 256 by llama.cpp). With `cells` it
    is one stream of `cells` cells for all sequences, which can share cells (see `cells.py`). With `embeddings` one
    stream of `ctx` tokens for all: only then sequences of several lengths stay in one batch."""

    def __init__(
        self,
        model: Model,
        *,
        slots: int,
        ctx: int,
        ubatch: int,
        threads: int,
        flash_attention: bool | None,
        cells: int = 0,
        kv_type: str = "f16",
        embeddings: bool = False,
        pooling: int | None = None,
        attention: Attention | None = None,
        rope: Mapping[str, int | float] | None = None,
        outputs: int = 0,
    ) -> None:
        """`outputs`: of how many tokens of a batch logits may be wanted; of one of each slot in any case."""
        params = C.llama_context_default_params()
        for name, value in (rope or {}).items():
            setattr(params, name, value)
        padded = -(-ctx // 256) * 256
        params.n_ctx = padded if embeddings else cells or padded * slots
        params.n_seq_max = slots
        params.n_batch = params.n_ubatch = ubatch
        outputs = min(max(slots, outputs), ubatch)
        params.n_outputs_max = 0 if embeddings else outputs
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = -1 if flash_attention is None else int(flash_attention)  # -1: llama.cpp decides
        params.kv_unified = embeddings or cells > 0
        params.type_k = params.type_v = _KV_TYPES[kv_type]
        params.embeddings = embeddings
        params.swa_full = True  # layers with a window keep all cells: a state may be cut anywhere, see `blob.py`
        params.no_perf = True
        if pooling is not None:
            params.pooling_type = pooling
        if attention is not None:
            params.cb_eval = ctypes.cast(attention.callback, type(params.cb_eval))
            params.cb_eval_user_data = attention.data
            attention.set_threads(threads)
        self.attention = attention  # llama.cpp keeps bare pointers
        take_errors()
        self._ctx = C.llama_init_from_model(model._model, params)
        if not self._ctx:
            raise WorldError("; ".join(_reasons(take_errors())) or "llama.cpp could not make a context")
        self._memory = C.llama_get_memory(self._ctx)
        self.n_vocab = model.n_vocab
        self.n_layer = model.n_layer
        self._window = model.n_swa  # tokens that some layers look back at most; 0: all look at everything
        self.cells = int(C.llama_n_ctx(self._ctx)) if cells else 0  # that all sequences share; 0: each has its own
        self.ubatch = int(C.llama_n_ubatch(self._ctx))  # tokens of a batch; `calibrate.py` may choose fewer
        self.pooling = int(C.llama_pooling_type(self._ctx))
        self._pooled = model.n_cls_out if self.pooling == POOLING_RANK else model.n_embd_out
        self.outputs = outputs
        self._logits_at = 0
        self._logits: Floats = np.zeros((0, model.n_vocab), np.float32)
        self._decode: Callable[[Any, Any], int] = C.llama_decode
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]  # for states that are moved
        self._abort: Any = None
        self._adapters = model.adapters
        self._adapter = ""

    def use(self, adapter: str) -> None:
        """Apply this LoRA adapter of the model ('': none) from the next decode on."""
        if adapter == self._adapter:
            return
        handles, scales = [], []
        if adapter:
            handle, scale = self._adapters[adapter]
            handles, scales = [handle], [scale]
        n = len(handles)
        array = (C.llama_adapter_lora_p_ctypes * n)(*handles)
        C.llama_set_adapters_lora(self._ctx, array, n, (ctypes.c_float * n)(*scales))
        self._adapter = adapter

    def decode(self, batch: BatchBuffer) -> int:
        """OK; NO_ROOM: nothing changed; ABORTED: a part stays, see `last_position`; below 0: an error (-1:
        nothing changed). At most `ubatch` tokens, and logits of at most `outputs` of them."""
        return self._decode(self._ctx, batch.struct)

    def logits(self, rows: int) -> Floats:
        """The wanted logits of the last decode, one row each in the order of the batch. A view: it changes with
        the next decode. It may be written to."""
        address = _get_logits(self._ctx)
        if address != self._logits_at:
            if not address:
                raise Bug("logits asked for, none computed")
            pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
            self._logits = np.ctypeslib.as_array(pointer, (self.outputs, self.n_vocab))
            self._logits_at = address
        return self._logits[:rows]

    def embedding(self, sequence: int) -> Floats:
        """The pooled result of one sequence in the last decode (a copy): a vector, or the scores of a model that
        ranks."""
        address = _get_embeddings_seq(self._ctx, sequence)
        if not address:
            raise Bug(f"no embedding for sequence {sequence}")
        return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), (self._pooled,)).copy()

    def cut(self, sequence: int, length: int) -> bool:
        """Forget a sequence's tokens from position `length` on. False: this model cannot forget a part, or the rest
        lacks tokens that the next ones would look at."""
        if self._memory is None:
            return True
        if self._window and length:
            first = int(C.llama_memory_seq_pos_min(self._memory, sequence))
            if first > max(length - self._window, 0):
                return False
        return bool(C.llama_memory_seq_rm(self._memory, sequence, length, -1))

    def take_back(self, sequence: int, length: int) -> None:
        """Forget the tokens from position `length` on, which were computed just now: unlike after `cut`, the next ones
        find all that they look at. Not for models with a recurrent state."""
        if not C.llama_memory_seq_rm(self._memory, sequence, length, -1):
            raise Bug(f"llama.cpp does not take back tokens of sequence {sequence}")

    def last_position(self, sequence: int) -> int:
        """The position of the last token, -1 when the sequence is empty."""
        return int(C.llama_memory_seq_pos_max(self._memory, sequence))

    def copy(self, source: int, target: int) -> None:
        """Copy the whole sequence `source` into `target`, which must be empty. (A part of a stream aborts the
        process.)"""
        C.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def share(self, source: int, target: int, length: int) -> None:
        """Let `target` begin with the first `length` cells of `source`: nothing is copied. Only with `cells`."""
        C.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def read(self, sequence: int, start: int = 0) -> npt.NDArray[np.uint8]:
        """The state of one sequence, for `restore` into any slot of a context of this model with as many slots: a
        view that the next `read` overwrites. llama.cpp writes whole sequences only; with `start` the tokens before that
        position are forgotten first, so that less is copied: only for a sequence that is not needed afterwards."""
        if start:
            C.llama_memory_seq_rm(self._memory, sequence, 0, start)
        size = self._into_buffer(sequence, 0)
        block = self._buffers[0][:size]
        return self._with_all_cells(sequence, block) if self._window and size else block

    def _with_all_cells(self, sequence: int, block: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """llama.cpp leaves out the cells before the window, though the cache has them. To read them, the end of the
        sequence is cut off, so that they lie in the window; then the sequence gets its end back."""
        found = blob.positions(block)
        if found is None:
            return block
        (first, seen), earlier = found, list[npt.NDArray[np.uint8]]()
        while seen > first:
            C.llama_memory_seq_rm(self._memory, sequence, seen, -1)
            size = int(_state_seq_size_ext(self._ctx, sequence, _WINDOW_ONLY))
            part = np.empty(size, np.uint8)
            _state_seq_get_ext(self._ctx, part.ctypes.data, size, sequence, _WINDOW_ONLY)
            found = blob.positions(part) if size else None
            if found is None or found[1] >= seen:
                break
            seen = found[1]
            earlier.append(part)
        if not earlier:
            return block
        whole = blob.completed(block, earlier)
        if not self.restore(sequence, whole):
            raise Bug(f"llama.cpp refuses the state it just gave, for sequence {sequence}")
        return whole

    def sample(self) -> npt.NDArray[np.uint8]:
        """The state of two tokens in an empty context, which shows the layout of states; empty when there is none."""
        batch = BatchBuffer(2)
        batch.size = 2
        batch.positions[:] = (0, 1)
        if self._memory is None or self.decode(batch) != OK:
            return self._buffers[0][:0]
        block = self.read(0).copy()
        self.clear()
        return block

    def restore(self, sequence: int, block: npt.NDArray[np.uint8]) -> bool:
        """Replace the state of the sequence. False: llama.cpp refused it, and the sequence is empty now."""
        if int(_state_seq_set(self._ctx, block.ctypes.data, len(block), sequence)) == len(block):
            return True
        self.cut(sequence, 0)
        return False

    def exchange(self, a: int, b: int) -> None:
        """Exchange two sequences. The buffers are kept: new ones would cost more than the copying."""
        if self._window:
            states = [self.read(sequence).copy() for sequence in (a, b)]
            for state, target in zip(states, (b, a), strict=True):
                self.cut(target, 0)
                if len(state) and not self.restore(target, state):
                    raise Bug(f"llama.cpp refuses the state it just gave, for sequence {target}")
            return
        sizes = [self._into_buffer(sequence, i) for i, sequence in enumerate((a, b))]
        for i, target in ((0, b), (1, a)):
            self.cut(target, 0)
            size = sizes[i]
            if size and int(_state_seq_set(self._ctx, self._buffers[i].ctypes.data, size, target)) != size:
                raise Bug(f"llama.cpp refuses the state it just gave, for sequence {target}")

    def _into_buffer(self, sequence: int, i: int) -> int:
        if self.last_position(sequence) < 0:
            return 0
        size = int(C.llama_state_seq_get_size(self._ctx, sequence))
        return int(_state_seq_get(self._ctx, self._buffer(size, i).ctypes.data, size, sequence))

    def _buffer(self, size: int, i: int) -> npt.NDArray[np.uint8]:
        if len(self._buffers[i]) < size:
            self._buffers[i] = np.empty(size * 5 // 4, np.uint8)
        return self._buffers[i]

    def buffer(self, size: int) -> npt.NDArray[np.uint8]:
        """A buffer of at least `size` bytes to build a state for `restore`; valid until the next `exchange`."""
        return self._buffer(size, 1)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of the buffers for states that are moved."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def drop_buffers(self) -> None:
        self._buffers = [np.empty(0, np.uint8), np.empty(0, np.uint8)]

    def abort_when(self, wanted: Callable[[], bool] | None) -> None:
        """Call `wanted` between the operations of a decode; True ends it (ABORTED). None: never end it."""
        if wanted is None:
            self._abort = None
            C.llama_set_abort_callback(self._ctx, C.ggml_abort_callback(0), None)
            return

        @C.ggml_abort_callback  # type: ignore[untyped-decorator]
        def ask(_data: object) -> bool:
            return wanted()

        self._abort = ask  # llama.cpp keeps a bare pointer
        C.llama_set_abort_callback(self._ctx, ask, None)

    def set_threads(self, threads: int) -> None:
        C.llama_set_n_threads(self._ctx, threads, threads)
        if self.attention is not None:
            self.attention.set_threads(threads)

    def clear(self) -> None:
        if self._memory is not None:
            C.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        if self._ctx:
            C.llama_free(self._ctx)
            self._ctx = None
            if self.attention is not None:
                self.attention.close()


# ── grammar ───────────────────────────────────────────────────────────────────────────────────────────────

_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


class Grammar:
    """The state of one constrained generation.

    The text of a grammar must come from `schema.py`, which bounds its size and depth: llama.cpp recurses over
    it. `accept` must only be given tokens that `allows` or `mask` let through: any other ends the process.
    """

    def __init__(self, model: Model, gbnf: str) -> None:
        self._sampler = C.llama_sampler_init_grammar(model._vocab, gbnf.encode(), b"root")
        if not self._sampler:
            raise Bug(f"llama.cpp refuses our grammar: {'; '.join(take_errors())}")
        self._one = np.zeros(1, _CANDIDATE)
        self._array = C.llama_token_data_array()

    def allows(self, token: int) -> bool:
        """May this token come next? An end token may if the grammar can end here."""
        one = self._one
        one["id"] = token
        one["logit"] = 0.0
        self._apply(one)
        return bool(one["logit"][0] == 0.0)

    def mask(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of these tokens may come next?"""
        candidates = np.zeros(len(ids), _CANDIDATE)
        candidates["id"] = ids
        self._apply(candidates)
        return np.asarray(candidates["logit"] == 0.0)

    def _apply(self, candidates: npt.NDArray[Any]) -> None:
        array = self._array
        array.data = candidates.ctypes.data_as(type(array.data))
        array.size = len(candidates)
        array.selected = -1
        array.sorted = False
        C.llama_sampler_apply(self._sampler, ctypes.byref(array))

    def accept(self, token: int) -> None:
        C.llama_sampler_accept(self._sampler, token)

    def close(self) -> None:
        if self._sampler:
            C.llama_sampler_free(self._sampler)
            self._sampler = None
