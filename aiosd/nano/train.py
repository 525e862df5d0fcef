"""Trains nano from seeds and writes nano.gguf: `make nano`, or `python -m aiosd.nano.train`.

First come some batches of pure copying, because an agent of this size lives by it; then the conversations of
`tasks.py`, never the same one twice, in batches of about the same length, in five cycles; after the first the
network grows from four blocks to six. Loss is taken on the assistant's turns alone. Matrices of the blocks learn with
Muon (momentum, made orthogonal by a few steps of Newton and Schulz; Jordan et al. 2024), embeddings and norms with
AdamW. The rates are low on purpose: three times as much destroys the copying circuit that `model.py` wires before the
first step. One thread, one seed: the same machine gives the same model.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from aiosd.nano import model_path
from aiosd.nano.export import export
from aiosd.nano.model import Nano, Shape
from aiosd.nano.tasks import conversation
from aiosd.nano.template import render
from aiosd.nano.tokenizer import IM_END, IM_START, SPECIAL, Tokenizer, load

SEED = 1
BATCH_TOKENS = 3072
LONGEST = 1024  # tokens of a conversation


@dataclass(frozen=True)
class Cycle:
    """One warm start: how long, how fast, on what."""

    steps: int
    muon: float  # peak learning rates
    adam: float
    first_seed: int  # of the conversations; the next ones follow
    drills: int  # batches of pure copying before the first conversation
    drill_every: int
    grow_after: tuple[int, ...] = ()  # blocks behind which a new one is put first


CYCLES = (
    Cycle(steps=2200, muon=0.006, adam=1e-3, first_seed=10_000, drills=120, drill_every=6),
    Cycle(steps=1800, muon=0.005, adam=8e-4, first_seed=20_000_000, drills=0, drill_every=30, grow_after=(1, 2)),
    Cycle(steps=1850, muon=0.0025, adam=4e-4, first_seed=40_000_000, drills=0, drill_every=30),
    Cycle(steps=600, muon=0.0015, adam=2.5e-4, first_seed=60_000_000, drills=0, drill_every=60),
    Cycle(steps=2150, muon=0.004, adam=6e-4, first_seed=90_000_000, drills=0, drill_every=40),
)


def plain_twins(tokenizer: Tokenizer) -> Tensor:
    """For every token the one without the space before it."""
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    return torch.tensor([ids.get(t[1:], i) if len(t) > 1 and t[:1] == b" " else i for t, i in ids.items()])


def examples(tokenizer: Tokenizer, first_seed: int) -> Iterator[tuple[list[int], list[bool]]]:
    """Ids of conversations, and whether the token after each is the assistant's."""
    start, end = tokenizer.special[IM_START], tokenizer.special[IM_END]
    assistant = tokenizer.encode("assistant\n")
    seed = first_seed
    while True:
        ids = tokenizer.encode(render(*conversation(seed)))
        seed += 1
        if len(ids) > LONGEST:
            continue
        wanted = [False] * len(ids)
        for i, token in enumerate(ids):
            if token == start and ids[i + 1 : i + 1 + len(assistant)] == assistant:
                for j in range(i + len(assistant), ids.index(end, i)):
                    wanted[j] = True
        yield ids[:-1], wanted[:-1]


def batches(tokenizer: Tokenizer, first_seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Inputs, places that count, and the tokens after those places. Neighbours in length share a batch."""
    source = examples(tokenizer, first_seed)
    order = torch.Generator().manual_seed(first_seed)
    while True:
        pool = sorted((next(source) for _ in range(400)), key=lambda e: len(e[0]))
        groups: list[list[tuple[list[int], list[bool]]]] = [[]]
        for example in pool:
            if groups[-1] and (len(groups[-1]) + 1) * len(example[0]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(example)
        for g in torch.randperm(len(groups), generator=order).tolist():
            longest = len(groups[g][-1][0])
            ids = torch.zeros(len(groups[g]), longest + 1, dtype=torch.long)
            wanted = torch.zeros(len(groups[g]), longest, dtype=torch.bool)
            for row, (tokens, flags) in enumerate(groups[g]):
                ids[row, : len(tokens)] = torch.tensor(tokens)
                wanted[row, : len(flags)] = torch.tensor(flags)
            yield ids[:, :-1], wanted, ids[:, 1:][wanted]


def drills(vocab: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pure copying: noise, a mark, random tokens, the mark's end, noise, the mark again, and the same tokens to be
    said. Some rows use few kinds of tokens, so that more than one token back must be looked at, as in numbers."""
    order = torch.Generator().manual_seed(SEED)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=order))

    start, end = SPECIAL.index(IM_START), SPECIAL.index(IM_END)
    while True:
        length, before, between = number(5, 30), number(0, 30), number(0, 40)
        rows = []
        for _ in range(16):
            variety = number(10, 40) if number(0, 3) == 0 else vocab
            kinds = torch.randint(len(SPECIAL), vocab, (variety,), generator=order)
            noise = kinds[torch.randint(0, len(kinds), (before + between + length,), generator=order)]
            text, rest = noise[:length], noise[length:]
            mark, stop = torch.tensor([start]), torch.tensor([end])
            rows.append(torch.cat([rest[:before], mark, text, stop, rest[before:], mark, text, stop]))
        ids = torch.stack(rows)
        wanted = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        wanted[:, -length - 1 :] = True
        yield ids[:, :-1], wanted, ids[:, 1:][wanted]


def lessons(tokenizer: Tokenizer, cycle: Cycle) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What a cycle teaches in turn: copying, then conversations with a drill now and then."""
    drill, talk = drills(len(tokenizer.tokens)), batches(tokenizer, cycle.first_seed)
    for _ in range(cycle.drills):
        yield next(drill)
    for step in count():
        yield next(drill) if step % cycle.drill_every == 0 else next(talk)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal: every direction of a matrix moves equally far."""

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closures here
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                alike.setdefault(p.shape, []).append(p)
            for shape, params in alike.items():
                pushes = []
                for p in params:
                    speed = self.state[p].setdefault("speed", torch.zeros_like(p))
                    speed.lerp_(p.grad, 1 - group["momentum"])
                    pushes.append(p.grad.lerp(speed, group["momentum"]))
                reach = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, update in zip(params, _orthogonal(torch.stack(pushes)), strict=True):
                    p.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-reach)


def _orthogonal(g: Tensor) -> Tensor:
    """The nearest matrices with singular values of about one. g: (n, rows, columns)."""
    x = g.mT if g.shape[1] > g.shape[2] else g
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if g.shape[1] > g.shape[2] else x).float()


def run(cycle: Cycle, model: Nano, tokenizer: Tokenizer, out: Path, minutes: float) -> None:
    """One cycle: rates rise for 60 steps and fall along a cosine, over `cycle.steps` or, if given, over `minutes`."""
    matrices = [p for p in model.blk.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or name.startswith("token_embd")]
    muon, adam = Muon(matrices, cycle.muon), torch.optim.AdamW(others, cycle.adam, (0.9, 0.95), weight_decay=0.0)
    begin, seen, losses = time.time(), 0, [0.0]
    for step, (ids, wanted, targets) in enumerate(lessons(tokenizer, cycle)):
        done = (time.time() - begin) / (60 * minutes) if minutes else step / cycle.steps
        if done >= 1:
            break
        scale = min(1.0, (step + 1) / 60) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = cycle.muon * scale, cycle.adam * scale
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, wanted)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += ids.numel()
        losses.append(loss.item())
        if step % 100 == 99:
            speed, mean = seen / (time.time() - begin), sum(losses[-100:]) / 100
            print(f"{done:6.1%}  step {step + 1}  {seen:,} tokens  {speed:,.0f}/s  loss {mean:.4f}", flush=True)
        if step % 500 == 499:
            export(model, tokenizer, out)
    export(model, tokenizer, out)
    print(f"wrote {out}, {out.stat().st_size:,} bytes, after {(time.time() - begin) / 60:.1f} minutes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=model_path())
    parser.add_argument("--minutes", type=float, default=0, help="length of a cycle, instead of its number of steps")
    parser.add_argument("--state", type=Path, help="also save the weights as a PyTorch file after every cycle")
    parser.add_argument("--resume", type=Path, help="go on from such a file")
    options = parser.parse_args()

    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    tokenizer = load()
    model = Nano(Shape(vocab=len(tokenizer.tokens)), plain_twins(tokenizer))
    finished = 0
    if options.resume:
        saved = torch.load(options.resume)
        finished = saved["cycles"]
        for cycle in CYCLES[:finished]:
            model.grow(cycle.grow_after)
        model.load_state_dict(saved["weights"])
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer.tokens)} tokens", flush=True)
    for number, cycle in enumerate(CYCLES[finished:], finished + 1):
        model.grow(cycle.grow_after)
        run(cycle, model, tokenizer, options.out, options.minutes)
        if options.state:
            torch.save({"cycles": number, "weights": model.state_dict()}, options.state)


if __name__ == "__main__":
    main()
