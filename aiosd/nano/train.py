"""Trains nano from seeds and writes nano.gguf: `make nano`, or `python -m aiosd.nano.train`.

Batches of pure copying come first, and one in twenty later (drills), because most of what nano does is copying. The
others are the conversations of `tasks.py`, each used once, in batches of about equal length. The loss is that of the
assistant's turns only. With `--pick`, a model that is nearly trained computes the loss of many conversations, and
learns from those in which some token still has a high one: a forward pass costs a third of a training step.

The matrices of the blocks are trained by Muon (momentum, made orthogonal by a few steps of Newton and Schulz; Jordan
et al. 2024), embeddings and norms by AdamW. The rates are low on purpose: twice as much undoes the copying circuit
that `model.py` sets before the first step, and weights that are trained already need a third.

Two processes of one thread each work on batches of their own and average their gradients, because threads speed up
matrices of this size only a little. Each process updates its share of the matrices. The same number of processes on
the same machine gives the same model.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count, islice, starmap
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from gguf import GGUFReader
from torch import Tensor

from aiosd.nano import model_path
from aiosd.nano.export import export
from aiosd.nano.model import Nano, Shape
from aiosd.nano.tasks import conversation
from aiosd.nano.template import render
from aiosd.nano.tokenizer import IM_END, IM_START, SPECIAL, Tokenizer, load

SEED = 1
BATCH_TOKENS = 3600  # tokens in a batch of one process, without the shared beginning
LONGEST = 1024  # tokens of a conversation
WORKERS = 2
SEEDS_APART = 100_000_000  # distance between the first seeds of two processes
PATIENCE = timedelta(hours=12)  # how long a process waits for another, which may be stopped for a while
LOOK_AT = 24  # batches whose losses `hard` computes at a time
SURPRISE = 0.05  # a conversation is hard if a token's loss is above this
KEEP = 0.08  # share of the other conversations that is used, too

#: The beginning that all conversations of a batch share, the rest of each, the places there that count for the loss,
#: and the tokens that follow these places.
TrainBatch = tuple[Tensor, Tensor, Tensor, Tensor]

#: A conversation without its beginning: the tokens, and for each whether the next one is the assistant's.
TrainRow = tuple[list[int], list[bool]]
Beginning = tuple[int, ...]


@dataclass(frozen=True)
class Recipe:
    """How long to train, at what rates, on what."""

    steps: int = 8000
    minutes: float = 0.0  # if it is not 0: a duration, instead of `steps`
    muon: float = 0.003  # peak learning rates
    adam: float = 1e-3
    warm: int = 100  # steps to the peak
    fall: float = 0.9  # the last part of the training, in which the rates fall to 0
    first_seed: int = 1_000_000_000  # of the conversations; each next one has the next seed
    drills: int = 40  # batches of pure copying before the first conversation
    drill_every: int = 20
    pick: bool = False  # learn from conversations that are still hard

    def rate(self, step: int, done: float) -> float:
        """Factor on the peak rates at a step, when the share `done` of the training is over."""
        return min(1.0, (step + 1) / self.warm, max(0.0, 1 - done) / self.fall)


def plain_twins(tokenizer: Tokenizer) -> Tensor:
    """For every token, the token without the space before it (itself, if there is none)."""
    ids = {token: i for i, token in enumerate(tokenizer.tokens)}
    return torch.tensor([ids.get(t[1:], i) if len(t) > 1 and t[:1] == b" " else i for t, i in ids.items()])


def examples(tokenizer: Tokenizer, first_seed: int) -> Iterator[TrainRow]:
    """Conversations from consecutive seeds: tokens, and for each whether the next one is the assistant's."""
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


def groups(tokenizer: Tokenizer, first_seed: int) -> Iterator[tuple[Beginning, list[TrainRow]]]:
    """Conversations with the same beginning and about the same length, as many as fit into a batch."""
    source = examples(tokenizer, first_seed)
    start = tokenizer.special[IM_START]
    order = torch.Generator().manual_seed(first_seed)
    while True:
        alike: dict[Beginning, list[TrainRow]] = {}
        for ids, flags in islice(source, 800):
            shared = ids.index(start, 1)  # the beginning is the system's turn
            alike.setdefault(tuple(ids[:shared]), []).append((ids[shared:], flags[shared:]))
        yield from cut(alike, order)


def cut(alike: dict[Beginning, list[TrainRow]], order: torch.Generator) -> list[tuple[Beginning, list[TrainRow]]]:
    """Groups of rows with the same beginning and about the same length, each as large as a batch may be."""
    groups: list[tuple[Beginning, list[TrainRow]]] = []
    for beginning, rows in alike.items():
        group: list[TrainRow] = []
        for row in sorted(rows, key=lambda r: len(r[0])):
            if group and (len(group) + 1) * len(row[0]) > BATCH_TOKENS:
                groups.append((beginning, group))
                group = []
            group.append(row)
        groups.append((beginning, group))
    return [groups[g] for g in torch.randperm(len(groups), generator=order).tolist()]


def batch(beginning: Beginning, rows: list[TrainRow]) -> TrainBatch:
    longest = max(len(tokens) for tokens, _ in rows)
    inputs = torch.zeros(len(rows), longest + 1, dtype=torch.long)
    wanted = torch.zeros(len(rows), longest, dtype=torch.bool)
    for row, (tokens, flags) in enumerate(rows):
        inputs[row, : len(tokens)] = torch.tensor(tokens)
        wanted[row, : len(flags)] = torch.tensor(flags)
    return torch.tensor(beginning), inputs[:, :-1], wanted, inputs[:, 1:][wanted]


def hard(
    model: Nano, found: Iterator[tuple[Beginning, list[TrainRow]]], order: torch.Generator
) -> Iterator[TrainBatch]:
    """Batches of the rows in which some token still has a high loss, and of a few others. All processes compute losses
    at the same time, and then learn from the same number of batches, so that none waits for another."""
    left: list[tuple[Beginning, list[TrainRow]]] = []
    while True:
        pool: dict[Beginning, list[TrainRow]] = {}
        for beginning, rows in left:
            pool.setdefault(beginning, []).extend(rows)
        for beginning, rows in islice(found, LOOK_AT):
            worst = surprise(model, batch(beginning, rows))
            keep = (worst > SURPRISE) | (torch.rand(len(rows), generator=order) < KEEP)
            pool.setdefault(beginning, []).extend(rows[i] for i in keep.nonzero()[:, 0].tolist())
        ready = cut({beginning: rows for beginning, rows in pool.items() if rows}, order)
        number = torch.tensor(len(ready))
        dist.all_reduce(number, dist.ReduceOp.MIN)
        for beginning, rows in ready[: int(number)]:
            yield batch(beginning, rows)
        left = ready[int(number) :]


@torch.no_grad()
def surprise(model: Nano, taught: TrainBatch) -> Tensor:
    """The highest loss of a token in each row."""
    shared, ids, wanted, targets = taught
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(shared, ids, wanted)
    losses = F.cross_entropy(logits.float(), targets, reduction="none")
    return torch.zeros(len(ids)).scatter_reduce(0, wanted.nonzero()[:, 0], losses, "amax")


def drills(vocab: int, seed: int) -> Iterator[TrainBatch]:
    """Pure copying: noise, a start mark, random tokens, an end mark, noise, the start mark again, and then the same
    tokens and end mark, which the model has to generate. Some rows use few different tokens, as numbers do: to copy
    them, the model must look at more than the previous token."""
    order = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=order))

    start, end = SPECIAL.index(IM_START), SPECIAL.index(IM_END)
    while True:
        length, before, between = number(5, 30), number(0, 30), number(0, 40)
        rows = []
        for _ in range(16):
            variety = number(4, 40) if number(0, 2) == 0 else vocab
            kinds = torch.randint(len(SPECIAL), vocab, (variety,), generator=order)
            noise = kinds[torch.randint(0, len(kinds), (before + between + length,), generator=order)]
            text, rest = noise[:length], noise[length:]
            mark, stop = torch.tensor([start]), torch.tensor([end])
            rows.append(torch.cat([rest[:before], mark, text, stop, rest[before:], mark, text, stop]))
        ids = torch.stack(rows)
        wanted = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        wanted[:, -length - 1 :] = True
        yield ids[0, :0], ids[:, :-1], wanted, ids[:, 1:][wanted]


def lessons(model: Nano, tokenizer: Tokenizer, recipe: Recipe, rank: int, first: int) -> Iterator[TrainBatch]:
    """The batches of one process: first drills, then conversations with a drill every `drill_every` steps."""
    drill = drills(len(tokenizer.tokens), SEED + rank + first)
    found = groups(tokenizer, recipe.first_seed + rank * SEEDS_APART + first * 1000)
    order = torch.Generator().manual_seed(first + rank)
    talk = hard(model, found, order) if recipe.pick else starmap(batch, found)
    for step in count(first):
        yield next(drill) if step < recipe.drills or step % recipe.drill_every == 0 else next(talk)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, so that a matrix changes equally in all directions."""

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
    """Matrices near to the given ones, but with singular values of about 1. g: (n, rows, columns)."""
    x = g.mT if g.shape[1] > g.shape[2] else g
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).bfloat16()
    for _ in range(5):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
    return (x.mT if g.shape[1] > g.shape[2] else x).float()


def _one(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def _back(whole: Tensor, tensors: list[Tensor]) -> None:
    for tensor, part in zip(tensors, whole.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def average(model: Nano) -> None:
    """Replace the gradients in all processes by their mean."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    whole = _one(grads)
    dist.all_reduce(whole)
    _back(whole / dist.get_world_size(), grads)


@torch.no_grad()
def exchange(matrices: list[Tensor], rank: int, size: int) -> None:
    """Give every process the matrices that the others have updated."""
    whole = _one([m if i % size == rank else torch.zeros_like(m) for i, m in enumerate(matrices)])
    dist.all_reduce(whole)
    _back(whole, matrices)


def progress(recipe: Recipe, step: int, begin: float) -> float:
    """The share of the training that is done; the same number in all processes."""
    if not recipe.minutes:
        return step / recipe.steps
    done = torch.tensor((time.time() - begin) / (60 * recipe.minutes))
    dist.broadcast(done, 0)
    return float(done)


@torch.no_grad()
def take_up(model: Nano, path: Path) -> None:
    """Load the weights of a GGUF that `export` wrote. If it has fewer blocks, new ones are inserted between them, as
    evenly as possible; their outputs are 0 at first."""
    weights = {t.name: torch.from_numpy(t.data.astype("float32")) for t in GGUFReader(path).tensors}
    have, want = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blk.")), model.s.layers
    places = [i * (want - 1) // (have - 1) for i in range(have)]
    blocks = {name: weights.pop(name) for name in list(weights) if name.startswith("blk.")}
    for name, weight in blocks.items():
        _, block, rest = name.split(".", 2)
        weights[f"blk.{places[int(block)]}.{rest}"] = weight
    for new in set(range(want)) - set(places):
        model.blk[new].attn_output.weight.zero_()
        model.blk[new].ffn_down.weight.zero_()
        weights |= {f"blk.{new}.{name}": weight for name, weight in model.blk[new].state_dict().items()}
    embedding = weights["token_embd.weight"]
    spaced = model.plain != torch.arange(len(embedding))
    weights["space"] = (embedding - embedding[model.plain])[spaced].mean(0)
    model.load_state_dict(weights)


def learn(
    recipe: Recipe, model: Nano, tokenizer: Tokenizer, out: Path, state: Path | None, begin_with: Path | None
) -> None:
    """Train. The first process prints progress, and writes the model at the end and every 100 steps, for a trial."""
    rank, size = dist.get_rank(), dist.get_world_size()
    matrices: list[Tensor] = [p for p in model.blk.parameters() if p.dim() == 2]
    others = [p for name, p in model.named_parameters() if p.dim() == 1 or name.startswith("token_embd")]
    optimizers = (
        Muon(matrices[rank::size], recipe.muon),
        torch.optim.AdamW(others, recipe.adam, (0.9, 0.95), weight_decay=0.0),
    )
    begin, seen, first, losses = time.time(), 0, 0, [0.0]
    if begin_with:
        take_up(model, begin_with)
    mine = state and state.with_suffix(f".{rank}")
    if mine and mine.exists():
        saved = torch.load(mine)
        model.load_state_dict(saved["model"])
        for optimizer, memory in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(memory)
        seen, first, begin = saved["seen"], saved["step"], time.time() - saved["seconds"]
    for step, (shared, ids, wanted, targets) in enumerate(lessons(model, tokenizer, recipe, rank, first), first):
        done = progress(recipe, step, begin)
        if done >= 1:
            break
        for optimizer, peak in zip(optimizers, (recipe.muon, recipe.adam), strict=True):
            optimizer.param_groups[0]["lr"] = peak * recipe.rate(step, done)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(shared, ids, wanted)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        average(model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        exchange(matrices, rank, size)
        seen += (ids.numel() + len(shared) * len(ids)) * size
        if len(shared):  # not a drill
            losses.append(loss.item())
        if rank == 0 and step % 25 == 24:
            mean = sum(losses[-25:]) / 25
            passed = (time.time() - begin) / 60
            print(f"{done:6.1%}  step {step + 1}  {passed:.1f} min  {seen:,} tokens  loss {mean:.4f}", flush=True)
        if step % 100 == 99:
            if rank == 0:
                export(model, tokenizer, out)
            if mine:
                memory = [o.state_dict() for o in optimizers]
                passed = time.time() - begin
                saved = {"model": model.state_dict(), "optimizers": memory, "seen": seen, "step": step + 1}
                torch.save(saved | {"seconds": passed}, mine)
    if rank == 0:
        export(model, tokenizer, out)
        minutes = (time.time() - begin) / 60
        print(f"wrote {out}, {out.stat().st_size:,} bytes: {step:,} steps, {seen:,} tokens, {minutes:.1f} minutes")


def worker(
    rank: int, size: int, meet: str, recipe: Recipe, out: Path, state: Path | None, begin_with: Path | None
) -> None:
    """One of the processes; they find each other by the file `meet`."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=PATIENCE)
    tokenizer = load()
    model = Nano(Shape(vocab=len(tokenizer.tokens)), plain_twins(tokenizer))
    if rank == 0:
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer.tokens)} tokens", flush=True)
    learn(recipe, model, tokenizer, out, state, begin_with)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=model_path())
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--minutes", type=float, default=0, help="how long to train, instead of a number of steps")
    parser.add_argument("--workers", type=int, default=WORKERS, help="processes of one thread each")
    parser.add_argument("--state", type=Path, help="save the state in files of this name, and continue from them")
    parser.add_argument("--begin-with", type=Path, metavar="GGUF", help="begin with the weights of such a file")
    parser.add_argument("--first-seed", type=int, default=Recipe.first_seed, help="of the conversations")
    parser.add_argument("--pick", action="store_true", help="learn from conversations that are still hard")
    parser.add_argument("--rates", type=float, default=1.0, help="a factor on the learning rates")
    options = parser.parse_args()
    recipe = Recipe(
        steps=options.steps,
        minutes=options.minutes,
        muon=Recipe.muon * options.rates,
        adam=Recipe.adam * options.rates,
        drills=0 if options.begin_with else Recipe.drills,
        first_seed=options.first_seed,
        pick=options.pick,
    )
    with tempfile.TemporaryDirectory() as folder:
        meet = str(Path(folder, "meet"))
        mp.spawn(
            worker,
            (options.workers, meet, recipe, options.out, options.state, options.begin_with),
            nprocs=options.workers,
        )


if __name__ == "__main__":
    main()
