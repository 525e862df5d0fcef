"""The radix tree of everything that is kept outside the slots, by tokens: pure, no tensors.

An edge is a run of tokens with a payload (the state of these tokens: in memory or on disk, the tree does not
care), and a path from the root is a prompt, or the beginning of many. Every node has its payload: what loses it
leaves the tree, with all below it.

There is one root per *scope*: a privilege group, or the common one for prompts marked public. Nothing is reused across
scopes, because the saved time would show in one of them what the other has sent.

A *private* node hangs below the tree and is never found by its tokens. It holds what one preempted call has decoded,
which only that call can use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from aiosd.llm.arrays import Tokens

P = TypeVar("P")

#: How many last uses a node remembers (the K of LRU-K).
K = 2


def common_prefix(a: Tokens, b: Tokens) -> int:
    """How many leading tokens are the same."""
    n = min(len(a), len(b))
    differ = (a[:n] != b[:n]).argmax() if n else 0
    return int(differ) if n and a[differ] != b[differ] else n


@dataclass(slots=True, eq=False)
class Node(Generic[P]):
    parent: Node[P] | None
    scope: str
    tokens: Tokens  # of the edge from the parent
    start: int  # tokens before them
    payload: P | None
    peer: int = 0  # the agent that needed it last
    children: dict[int, Node[P]] = field(default_factory=dict)  # by their first token
    privates: list[Node[P]] = field(default_factory=list)
    private: bool = False
    pins: int = 0  # number of calls that are certain to come back for it
    uses: list[float] = field(default_factory=list)  # clock of the last K uses, the latest first

    @property
    def stop(self) -> int:
        return self.start + len(self.tokens)

    @property
    def leaf(self) -> bool:
        return not self.children and not self.privates

    def below(self) -> Iterator[Node[P]]:
        yield from self.children.values()
        yield from self.privates

    def touch(self, now: float) -> None:
        self.uses = [now, *self.uses[: K - 1]]


class Tree(Generic[P]):
    """`split(payload, count)` cuts a payload into its first `count` tokens and the rest."""

    def __init__(self, split: Callable[[P, int], tuple[P, P]]) -> None:
        self._split = split
        self._roots: dict[str, Node[P]] = {}

    def root(self, scope: str) -> Node[P]:
        node = self._roots.get(scope)
        if node is None:
            node = self._roots[scope] = Node(None, scope, np.zeros(0, np.int32), 0, None)
        return node

    def walk(self, scope: str, tokens: Tokens, most: int) -> tuple[list[Node[P]], int]:
        """The nodes along the longest prefix of `tokens[:most]` that is kept, and its length; the last node may
        reach beyond it."""
        path: list[Node[P]] = []
        node = self._roots.get(scope)
        at = 0
        while node is not None and at < most:
            node = node.children.get(int(tokens[at]))
            if node is None:
                break
            path.append(node)
            shared = common_prefix(node.tokens, tokens[at:most])
            at += shared
            if shared < len(node.tokens):
                break
        return path, at

    def add(self, scope: str, tokens: Tokens, stop: int, make: Callable[[int], P], now: float) -> Node[P]:
        """The node that ends at `stop`. The missing part of `tokens[:stop]` is added; `make(start)` returns its
        payload, for the tokens from `start` up to `stop`. Every node on the way counts as used."""
        path, at = self.walk(scope, tokens, stop)
        node = path[-1] if path else self.root(scope)
        if node.stop > at:
            node = self._divide(node, at - node.start)
            path[-1] = node
        for used in path:
            used.touch(now)
        if at < stop:
            child = Node(node, scope, tokens[at:stop].copy(), at, make(at), uses=[now])
            node.children[int(tokens[at])] = child
            node = child
        return node

    def add_private(self, parent: Node[P], tokens: Tokens, payload: P, now: float) -> Node[P]:
        node = Node(parent, parent.scope, tokens.copy(), parent.stop, payload, private=True, uses=[now])
        parent.privates.append(node)
        return node

    def _divide(self, node: Node[P], count: int) -> Node[P]:
        """Cut an edge after `count` tokens; returns the new upper half. The node itself stays the lower one, so nothing
        changes for what hangs below it, and references to it stay right."""
        parent = node.parent
        assert parent is not None
        assert node.payload is not None
        head, rest = self._split(node.payload, count)
        upper = Node(parent, node.scope, node.tokens[:count], node.start, head, node.peer, uses=list(node.uses))
        parent.children[int(node.tokens[0])] = upper
        node.parent, node.tokens, node.start, node.payload = upper, node.tokens[count:], node.start + count, rest
        upper.children[int(node.tokens[0])] = node
        return upper

    def remove(self, node: Node[P]) -> list[Node[P]]:
        """Remove a node and all nodes below it; returns them, each without a parent, with their payloads."""
        parent = node.parent
        assert parent is not None
        if node.private:
            parent.privates.remove(node)
        else:
            del parent.children[int(node.tokens[0])]
        if parent.parent is None and parent.leaf:
            self._roots.pop(parent.scope, None)
        gone, queue = [], [node]
        while queue:
            one = queue.pop()
            queue.extend(one.below())
            one.parent = None
            gone.append(one)
        return gone

    def nodes(self) -> Iterator[Node[P]]:
        """All nodes but the roots, parents before their children."""
        queue = list(self._roots.values())
        while queue:
            node = queue.pop()
            if node.parent is not None:
                yield node
            if node.children or node.privates:  # most have none
                queue.extend(node.below())


def path_to(node: Node[P]) -> list[Node[P]]:
    """From the first node below the root to this one."""
    path: list[Node[P]] = []
    at: Node[P] | None = node
    while at is not None and at.parent is not None:
        path.append(at)
        at = at.parent
    return path[::-1]


def most_shared(lengths: Iterable[int]) -> int:
    """At which length to cut a beginning, so that sharing it saves most tokens. `lengths`: how many leading tokens each
    of the other prompts has in common with it. A prompt can share a cut only if it has at least that length in common,
    so a long cut saves much for few, and a short one little for many. 0: none has anything in common."""
    ordered = sorted(lengths, reverse=True)
    return max(((length * (i + 1), length) for i, length in enumerate(ordered)), default=(0, 0))[1]
