"""Trains nano from seeds and writes nano.gguf: `make nano`, or `python -m aiosd.nano.train`.

Batches of pure copying come first and now and then, because an agent of this size lives by it; the rest are the
conversations of `tasks.py`, never the same one twice, in batches of about the same length. Loss is taken on the
assistant's turns alone. Matrices of the blocks learn with Muon (momentum, made orthogonal by a few steps of Newton
and Schulz; Jordan et al. 2024), embeddings and norms with AdamW. The rates are low on purpose: three times as much
destroys the copying circuit that `model.py` wires before the first step.

Three processes of one thread each work on batches of their own and average their gradients: matrices of this size
gain little from threads. The same number of processes on the same machine gives the same model.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
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
WORKERS = 3
SEEDS_APART = 100_000_000  # of two processes' conversations


@dataclass(frozen=True)
class Recipe:
    """How long, how fast, on what."""

    steps: int = 8000
    minutes: float = 0.0  # a length in time instead, if it is not 0
    muon: float = 0.007  # peak learning rates
    adam: float = 1.2e-3
    warm: int = 100  # steps to the peak
    fall: float = 0.35  # the last part of the way, on which the rates fall to nothing
    first_seed: int = 1_000_000_000  # of the conversations; the next ones follow
    drills: int = 100  # batches of pure copying before the first conversation
    drill_every: int = 25

    def rate(self, step: int, done: float) -> float:
        """Share of the peak rates at a step, `done` of the way behind it."""
        return min(1.0, (step + 1) / self.warm, max(0.0, 1 - done) / self.fall)


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


def drills(vocab: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Pure copying: noise, a mark, random tokens, the mark's end, noise, the mark again, and the same tokens to be
    said. Some rows use few kinds of tokens, so that more than one token back must be looked at, as in numbers."""
    order = torch.Generator().manual_seed(seed)

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


def lessons(tokenizer: Tokenizer, recipe: Recipe, rank: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What one of the processes teaches in turn: copying, then conversations with a drill now and then."""
    drill = drills(len(tokenizer.tokens), SEED + rank)
    talk = batches(tokenizer, recipe.first_seed + rank * SEEDS_APART)
    for step in count():
        yield next(drill) if step < recipe.drills or step % recipe.drill_every == 0 else next(talk)


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


def average(model: Nano) -> None:
    """Makes the gradients of all processes their mean."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(mean.view_as(grad))


def progress(recipe: Recipe, step: int, begin: float) -> float:
    """The share of the way that is done; the same in all processes."""
    if not recipe.minutes:
        return step / recipe.steps
    done = torch.tensor((time.time() - begin) / (60 * recipe.minutes))
    dist.broadcast(done, 0)
    return float(done)


def learn(recipe: Recipe, model: Nano, tokenizer: Tokenizer, out: Path) -> None:
    """Trains; the first process tells and writes, also every 500 steps, so that a look at the model can be had."""
    rank, size = dist.get_rank(), dist.get_world_size()
    matrices = [p for p in model.blk.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or name.startswith("token_embd")]
    muon, adam = Muon(matrices, recipe.muon), torch.optim.AdamW(others, recipe.adam, (0.9, 0.95), weight_decay=0.0)
    begin, seen, losses = time.time(), 0, [0.0]
    for step, (ids, wanted, targets) in enumerate(lessons(tokenizer, recipe, rank)):
        done = progress(recipe, step, begin)
        if done >= 1:
            break
        rate = recipe.rate(step, done)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = recipe.muon * rate, recipe.adam * rate
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(ids, wanted)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        average(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in (muon, adam):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += ids.numel() * size
        losses.append(loss.item())
        if rank == 0 and step % 100 == 99:
            speed, mean = seen / (time.time() - begin), sum(losses[-100:]) / 100
            print(f"{done:6.1%}  step {step + 1}  {seen:,} tokens  {speed:,.0f}/s  loss {mean:.4f}", flush=True)
        if rank == 0 and step % 500 == 499:
            export(model, tokenizer, out)
    if rank == 0:
        export(model, tokenizer, out)
        minutes = (time.time() - begin) / 60
        print(f"wrote {out}, {out.stat().st_size:,} bytes, after {step:,} steps and {minutes:.1f} minutes", flush=True)


def worker(rank: int, size: int, meet: str, recipe: Recipe, out: Path, resume: Path | None, state: Path | None) -> None:
    """One of the processes; they meet at the file `meet`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
    tokenizer = load()
    model = Nano(Shape(vocab=len(tokenizer.tokens)), plain_twins(tokenizer))
    if resume:
        model.load_state_dict(torch.load(resume))
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer.tokens)} tokens", flush=True)
    learn(recipe, model, tokenizer, out)
    if rank == 0 and state:
        torch.save(model.state_dict(), state)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=model_path())
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--minutes", type=float, default=0, help="how long to train, instead of a number of steps")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes of one thread each")
    parser.add_argument("--state", type=Path, help="also save the weights as a PyTorch file at the end")
    parser.add_argument("--resume", type=Path, help="begin with the weights of such a file")
    parser.add_argument("--first-seed", type=int, default=Recipe.first_seed, help="of the conversations")
    options = parser.parse_args()
    recipe = Recipe(steps=options.steps, minutes=options.minutes, first_seed=options.first_seed)
    with tempfile.TemporaryDirectory() as folder:
        meet = str(Path(folder, "meet"))
        mp.spawn(
            worker,
            (options.workers, meet, recipe, options.out, options.resume, options.state),
            nprocs=options.workers,
        )


if __name__ == "__main__":
    main()
