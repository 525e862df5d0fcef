"""Calls for vectors take turns as the policy decides: others need not wait for the end of a large one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator

import pytest

from aiosd.ipc.link import Caller
from aiosd.llm import policy
from aiosd.llm.embedqueue import EmbedJob, EmbedQueue

BATCH = 512
BATCH_S = 0.05
NAMES = ["fifo", "rr", "priority", "mlfq", "fair"]


class Embedder:
    """Computes one batch of the queue's next call at a time."""

    def __init__(self, name: str) -> None:
        self.now = 0.0
        self.queue = EmbedQueue(lambda: self.now)
        self.queue.set_policy(policy.make(name, policy.Quantum(64, 10.0), {}))
        self.left: dict[tuple[int, int], int] = {}
        self.served: list[tuple[int, int]] = []

    def ask(self, peer: int, number: int, batches: int, nice: int = 0) -> None:
        steps: Iterator[None] = iter(())
        self.left[peer, number] = batches
        self.queue.add((peer, number), Caller(peer, 0, "a", False, "", nice), steps)

    def step(self) -> EmbedJob | None:
        job = self.queue.next()
        if job is None:
            return None
        self.now += BATCH_S
        self.served.append(job.key)
        self.queue.charge(job, BATCH)
        self.left[job.key] -= 1
        if not self.left[job.key]:
            self.queue.remove(job.key)
        return job


@pytest.mark.parametrize("name", ["rr", "mlfq", "fair"])
def test_a_small_call_does_not_wait_for_the_end_of_a_large_one(name: str) -> None:
    embedder = Embedder(name)
    embedder.ask(1, 1, batches=1000)
    for _ in range(20):
        embedder.step()
    embedder.ask(2, 1, batches=1)
    for _ in range(3):
        embedder.step()
    assert (2, 1) in embedder.served


def test_first_come_first_served_where_that_is_the_policy() -> None:
    embedder = Embedder("fifo")
    for peer in (1, 2):
        embedder.ask(peer, 1, batches=3)
    for _ in range(6):
        embedder.step()
    assert embedder.served == [(1, 1)] * 3 + [(2, 1)] * 3


def test_several_calls_of_one_agent_are_no_larger_share() -> None:
    embedder = Embedder("fair")
    for number in range(4):
        embedder.ask(1, number, batches=1000)
    embedder.ask(2, 0, batches=1000)
    for _ in range(400):
        embedder.step()
    shares = Counter(peer for peer, _ in embedder.served)
    assert 0.8 < shares[1] / shares[2] < 1.25


def test_a_stopped_agent_has_no_turn_until_it_goes_on() -> None:
    embedder = Embedder("fair")
    embedder.ask(1, 1, batches=3)
    embedder.step()
    embedder.queue.park(1, True)
    embedder.ask(1, 2, batches=1)
    assert not embedder.queue.has_work
    assert embedder.step() is None
    embedder.queue.park(1, False)
    assert embedder.queue.has_work
    while embedder.step() is not None:
        pass
    assert Counter(embedder.served) == {(1, 1): 3, (1, 2): 1}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_every_call_comes_to_its_end(name: str, seed: int) -> None:
    embedder, chance = Embedder(name), random.Random(seed)
    asked: dict[tuple[int, int], int] = {}
    for number in range(60):
        peer = chance.randrange(1, 6)
        match chance.randrange(8):
            case 0:
                embedder.queue.park(peer, chance.random() < 0.5)
            case 1:
                embedder.queue.renice(peer, chance.randrange(-20, 20))
            case 2:
                embedder.queue.set_policy(policy.make(chance.choice(NAMES), policy.Quantum(), {}))
            case 3:
                for key in [key for key in embedder.left if key[0] == peer and embedder.left[key]][:1]:
                    embedder.queue.remove(key)
                    del asked[key], embedder.left[key]
            case _:
                asked[peer, number] = chance.randrange(1, 6)
                embedder.ask(peer, number, asked[peer, number], chance.randrange(-20, 20))
        for _ in range(chance.randrange(3)):
            embedder.step()
    for peer in range(1, 6):
        embedder.queue.park(peer, False)
    while embedder.queue.has_work:
        assert embedder.step() is not None
    served = Counter(embedder.served)
    assert {key: served[key] for key in asked} == asked


def test_a_new_kernel_keeps_the_calls_of_its_peers_and_parks_none() -> None:
    embedder = Embedder("fair")
    for peer in (1, 2):
        embedder.ask(peer, 1, batches=1)
        embedder.queue.park(peer, True)
    embedder.queue.keep({2})
    assert (1, 1) not in embedder.queue
    assert embedder.step() is not None
    assert embedder.served == [(2, 1)]
