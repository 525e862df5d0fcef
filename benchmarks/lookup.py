#!/usr/bin/env python
"""The gain from guessing tokens that an agent copies: tokens per second by default, against `--lookahead off`.

Two systems with the same model, which differ only in that setting, take turns (default, off, off, default); while one
works the other is idle. In a run each agent requests one answer, whose prompt was computed before. The texts are:

- *json*, *listing*: a tool has returned some records or a list of files, and the answer repeats them, as an agent does
  that passes on or edits what it has read. A chat model is asked to do so; a base model continues a text in which the
  copy has begun. (A small model makes mistakes when it copies.)
- *story*: a story at temperature 0.8, with a seed. Nothing in it is copied, so it shows the cost of useless guesses.

The ratio is the median of the ratios of neighbouring runs, of tokens per second of decoding. The same ratio of the CPU
time of the two cores' processes is shown, too: it means more on a machine that others use.

    $ taskset -c 0 python benchmarks/lookup.py --threads 1
    model     text   agents    off/s  default/s  ratio    bar   cpu ratio  guessed  right
    gemma3    json        1      40.1       81.0   2.02   1.50        2.05      180    171
    …
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import harness  # noqa: E402  the checkout comes first

BARS = {"json": 1.5, "listing": 1.5, "story": 0.97}
AGENTS = (1, 4)
CTX = 2048

AGENT = (
    harness.LOOP
    + """
import libaios as aios
aios.proc.getpid()
def run(order):
    sampling = {"max_tokens": order["tokens"], "temperature": order["temperature"], "seed": order["seed"],
                "ignore_eos": True}
    if order["messages"]:
        answer = aios.llm.chat(order["messages"], **sampling)
    else:
        answer = aios.llm.complete(order["prompt"], **sampling)
    return {"decode_s": answer.usage.decode_s, "tokens": answer.usage.completion_tokens, "text": answer.text}
serve(run)
"""
)


# ── what is written ───────────────────────────────────────────────────────────────────────────────────────

STREETS = ("Mill Lane", "Harbour Road", "High Street", "Station Square", "Orchard Way", "Castle Hill", "Bridge Street")
NAMES = ("Ada Novak", "Ben Okafor", "Chloe Martin", "Dario Rossi", "Elif Kaya", "Finn Larsen", "Grace Lee")
GOODS = ("oak desk", "garden hose", "reading lamp", "steel kettle", "wool blanket", "road bicycle", "chess set")

OPENINGS = ("a lighthouse keeper", "a clockmaker's daughter", "two brothers", "an old ferry", "a travelling painter")


FILES = ("budget.xlsx", "harbour-notes.md", "survey.csv", "todo.txt", "contract-v3.docx", "photo.jpg", "plan.pdf")


def records(chance: random.Random, orders: int) -> str:
    return json.dumps(
        [
            {
                "order": chance.randrange(10_000, 99_999),
                "customer": chance.choice(NAMES),
                "goods": chance.choice(GOODS),
                "address": f"{chance.randrange(1, 200)} {chance.choice(STREETS)}",
                "total": chance.randrange(500, 90_000) / 100,
            }
            for _ in range(orders)
        ],
        indent=1,
    )


def listing(chance: random.Random, files: int) -> str:
    lines = [
        f"-rw-r--r-- 1 {chance.choice(('ada', 'ben', 'eli'))} staff {chance.randrange(100, 99_999):>6} "
        f"Mar {chance.randrange(10, 31)} {chance.randrange(10, 24)}:{chance.randrange(10, 60)} {name}"
        for name in chance.sample(FILES, files)
    ]
    return "\n".join(["$ ls -l reports", *lines])


@dataclass(frozen=True)
class WritingTask:
    """The request of one agent."""

    prompt: str
    messages: list[dict[str, str]]
    temperature: float

    def order(self, tokens: int, seed: int) -> dict[str, Any]:
        return {
            "prompt": self.prompt, "messages": self.messages, "tokens": tokens, "temperature": self.temperature,
            "seed": seed,
        }  # fmt: skip


def copy(found: str, begun: int, chat: bool) -> WritingTask:
    """Repeat a tool's output. The first `begun` characters of the answer are given."""
    if chat:
        asked = f"Here is the output of a tool:\n\n{found}\n\nRepeat it exactly."
        messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": found[:begun]}]
        return WritingTask("", messages, 0.0)
    return WritingTask(f"The output of the tool:\n\n{found}\n\nThe same output once more:\n\n{found[:begun]}", [], 0.0)


def story(chance: random.Random, chat: bool) -> WritingTask:
    hero = chance.choice(OPENINGS)
    if chat:
        return WritingTask("", [{"role": "user", "content": f"Write a long story about {hero}."}], 0.8)
    return WritingTask(f"A story about {hero}.\n\nOnce upon a time", [], 0.8)


TEXTS: dict[str, Callable[[random.Random, bool], WritingTask]] = {
    "json": lambda chance, chat: copy(records(chance, 4), 90, chat),
    "listing": lambda chance, chat: copy(listing(chance, 6), 50, chat),
    "story": story,
}


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────


class LookaheadSide:
    """One system with its agents."""

    def __init__(self, model: Path, options: argparse.Namespace, *more: str) -> None:
        threads = ["--threads", str(options.threads)] if options.threads else []
        self.system = harness.Aiosd(model, "--ctx", str(CTX), *threads, *more)
        self.core = self.system.core()
        self.agents = self.system.start(max(options.agents), AGENT)

    def run(self, writings: list[WritingTask], tokens: int, seed: int) -> dict[str, Any]:
        agents = self.agents[: len(writings)]
        harness.race(agents, [writing.order(1, seed) for writing in writings])  # computes the prompts
        before = harness.cpu_seconds(self.core)
        said = harness.race(agents, [writing.order(tokens, seed + i) for i, writing in enumerate(writings)])
        return {
            "per_s": sum(one["tokens"] for one in said) / max(one["decode_s"] for one in said),
            "cpu_s": harness.cpu_seconds(self.core) - before,
            "texts": [one["text"] for one in said],
        }

    def guesses(self) -> dict[str, Any]:
        return dict(self.system.stats()["lookahead"])


def cell(
    default: LookaheadSide, off: LookaheadSide, name: str, text: str, agents: int, options: argparse.Namespace
) -> dict[str, Any]:
    chat = name != "gemma3"
    before = default.guesses()
    runs: list[tuple[dict[str, Any], dict[str, Any]]] = []
    same = 0
    for turn in range(options.rounds):
        chance = random.Random(f"{options.seed} {text} {agents} {turn}")
        writings = [TEXTS[text](chance, chat) for _ in range(agents)]
        order = (default, off) if turn % 2 == 0 else (off, default)
        found = {side: side.run(writings, options.tokens, options.seed + 100 * turn) for side in order}
        runs.append((found[default], found[off]))
        same += sum(one == two for one, two in zip(found[default]["texts"], found[off]["texts"], strict=True))
    after = default.guesses()
    return {
        "model": name, "text": text, "agents": agents,
        "off_per_s": statistics.median(two["per_s"] for _, two in runs),
        "default_per_s": statistics.median(one["per_s"] for one, _ in runs),
        "ratio": harness.median_ratio([(one["per_s"], two["per_s"]) for one, two in runs]),
        "cpu_ratio": harness.median_ratio([(two["cpu_s"], one["cpu_s"]) for one, two in runs]),
        "bar": BARS[text] if agents == 1 else BARS["story"],
        "guessed": after["guessed"] - before["guessed"], "right": after["right"] - before["right"],
        "answers": agents * len(runs), "same": same, "why": after["why"],
        "runs": [(one["per_s"], two["per_s"], one["cpu_s"], two["cpu_s"]) for one, two in runs],
    }  # fmt: skip


HEAD = "model     text     agents    off/s  default/s  ratio    bar  cpu ratio  guessed  right  same text"


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['model']:<9} {row['text']:<8}{row['agents']:>7}{row['off_per_s']:>9.1f}{row['default_per_s']:>11.1f}"
        f"{row['ratio']:>7.2f}{row['bar']:>7.2f}{row['cpu_ratio']:>11.2f}{row['guessed']:>9}{row['right']:>7}"
        f"{row['same']:>7}/{row['answers']}   {harness.verdict(row['ratio'], row['bar'], at_least=True)}"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", action="append", help="smollm2, gemma3, nano, or a GGUF; several times")
    parser.add_argument("--text", action="append", choices=sorted(TEXTS))
    parser.add_argument("--agents", type=int, nargs="+", default=AGENTS)
    parser.add_argument("--tokens", type=int, default=160, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=6, help="runs of each side")
    parser.add_argument("--threads", type=int, help="threads of a model (default: as aiosd measures)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "lookup.json")
    return parser.parse_args(argv)


def main() -> None:
    options = parse(sys.argv[1:])
    rows: list[dict[str, Any]] = []
    for name in options.model or ["smollm2", "gemma3"]:
        path = harness.model_path(name)
        default = LookaheadSide(path, options)
        off = LookaheadSide(path, options, "--lookahead", "off")
        print(f"{name}: {default.guesses()['why']}\n{HEAD}", flush=True)
        try:
            for text in options.text or list(TEXTS):
                for agents in options.agents:
                    rows.append(cell(default, off, name, text, agents, options))
                    print(line(rows[-1]), flush=True)
                    harness.write("lookup", rows, options.out, seed=options.seed, tokens=options.tokens)
        finally:
            off.system.close()
            default.system.close()


if __name__ == "__main__":
    main()
