"""The figures of `aiosd status -v`, written for people: what the keys of the status are called, and their values.

A key that is not known here (of a newer kernel) is shown as its own words.
"""

from __future__ import annotations

import re
from typing import Any

from aiosd.commands.edge import escaped
from aiosd.units import format_duration, format_size

LINE = 80  # characters in a line,
LEAST = 40  # … at least of the values, however long the labels are

#: Keys whose own words are not what a person would call the figure.
LABELS = {
    # the system
    "boot": "id of this boot",
    "group_shares": "shares of groups",
    "agent_problems": "not started",
    "dead_remembered": "dead agents known",
    "always": "allowed for all times",
    "asks": "asked for now",
    "listening": "people who listen",
    "ask_timeout_s": "patience",
    "epoch": "times started",
    "reread": "settings read again",
    "mcp_servers": "MCP servers",
    # of every process
    "ospid": "Linux pid",
    # a model
    "url": "address",
    "n_params": "parameters",
    "n_vocab": "vocabulary",
    "n_embd": "embedding size",
    "chat": "can chat",
    "loras": "adapters",
    "lora": "files of adapters",
    "gpu_layers": "layers on the GPU",
    "model_bytes": "model's memory",
    "kv_bytes": "KV memory",
    "rss_bytes": "memory in all",
    "kv_layout": "KV cache",
    "prompt_batch": "tokens in a batch",
    "ctx_why": "size of slots",
    "rope": "RoPE",
    "tensors": "tensors placed",
    "llama_cpp": "llama.cpp",
    "prefix": "prefix cache",
    "bytes": "size",
    "budget": "at most",
    "evictions": "evicted",
    "copy_s": "time for copies",
    "copied_bytes": "copied",
    "tokens_prefilled": "tokens computed",
    "tokens_cached": "tokens from the cache",
    "tokens_per_s": "tokens/s",
    "prefill_tokens_per_s": "prompt tokens/s",
    "step_s": "time for a step",
    "longest_step_s": "longest step",
    "busy_s": "this step so far",
    "circuit": "its connection",
    # the store
    "most_bytes": "size at most",
    "faults": "read from the disk",
    "history": "evicted ones known",
    "database_bytes": "size of the database",
    "file_bytes": "size of files",
    "free_bytes": "free on the disk",
    "ballast_bytes": "reserve on the disk",
    "pending": "wait for vectors",
    "wordless": "wait for their words",
    "index_bytes": "size of indexes",
    "index_evictions": "indexes evicted",
}


def rows(figures: dict[str, Any]) -> list[str]:
    """A line for each figure, the values below each other, long ones in several lines. Figures that are not there have
    none; that of a reason (`threads_why`) is shown behind its figure."""
    shown = [
        (label(name), _explained(figures, name, value)) for name, value in figures.items() if _is_shown(figures, name)
    ]
    shown = [(title, text) for title, text in shown if text]
    width = max((len(title) for title, _ in shown), default=0)
    lines = []
    for title, text in shown:
        first, *more = wrapped(text, max(LINE - width - 3, LEAST))
        lines += [f"  {title:{width}} {first}", *(" " * (width + 3) + line for line in more)]
    return lines


def label(name: str) -> str:
    return LABELS.get(name, escaped(name).replace("_", " "))


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines, broken only where it has a comma outside of brackets: figures and paths stay whole."""
    lines = [""]
    for part in re.split(r", (?![^(]*\))", text):
        if lines[-1] and len(lines[-1]) + len(part) + 3 > width:
            lines[-1] += ","
            lines.append(part)
        else:
            lines[-1] += (", " if lines[-1] else "") + part
    return lines


def _is_shown(figures: dict[str, Any], name: str) -> bool:
    return not (name.endswith("_why") and name.removesuffix("_why") in figures)


def _explained(figures: dict[str, Any], name: str, value: Any) -> str:
    text, why = escaped(written(name, value)), figures.get(f"{name}_why")
    return f"{text} ({escaped(str(why))})" if text and why else text


def written(name: str, value: Any) -> str:
    """The value of this key; "": there is none."""
    match value:
        case None | "":
            return ""
        case dict():
            return ", ".join(_parts(name, value))
        case list():
            return ", ".join(written(name, part) for part in value)
        case bool():
            return "yes" if value else "no"
        case int() | float():
            return _number(name, value)
    return str(value)


def _parts(name: str, value: dict[str, Any]) -> list[str]:
    inherited = "bytes" if name.endswith("bytes") else ""
    found = []
    for key, part in value.items():
        text = written(inherited or key, part)
        if text:
            found.append(
                f"{label(key)} ({text})" if isinstance(part, dict) else text if key == "why" else f"{label(key)} {text}"
            )
    return found


def _number(name: str, value: float) -> str:
    if name.endswith("_per_s"):
        return f"{value:,.1f}"
    if name.endswith("_s"):
        return _seconds(value)
    if name.endswith("_rate"):
        return f"{value:.1%}"
    if name.endswith(("bytes", "budget", "buffers")):
        return format_size(value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if name.endswith("pid") else f"{value:,}"


def _seconds(value: float) -> str:
    if 0 < value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g} s" if value < 60 else format_duration(value)
