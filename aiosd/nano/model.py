"""nano's network: a plain Llama (RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACK, TELL, SHARP, GIVE = 5.0, 0.15, 2.5, 0.8  # scales of the weights that `_wire_copying` sets


@dataclass(frozen=True)
class Shape:
    vocab: int = 1600
    width: int = 192
    layers: int = 8
    heads: int = 6
    kv_heads: int = 3
    hidden: int = 512
    context: int = 2048
    eps: float = 1e-5
    rope_base: float = 500_000.0

    @property
    def head(self) -> int:
        return self.width // self.heads


class Block(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.attn_norm = nn.RMSNorm(s.width, s.eps)
        self.attn_q = nn.Linear(s.width, s.width, bias=False)
        self.attn_k = nn.Linear(s.width, s.kv_heads * s.head, bias=False)
        self.attn_v = nn.Linear(s.width, s.kv_heads * s.head, bias=False)
        self.attn_output = nn.Linear(s.width, s.width, bias=False)
        self.ffn_norm = nn.RMSNorm(s.width, s.eps)
        self.ffn_gate = nn.Linear(s.width, s.hidden, bias=False)
        self.ffn_up = nn.Linear(s.width, s.hidden, bias=False)
        self.ffn_down = nn.Linear(s.hidden, s.width, bias=False)

    def forward(self, x: Tensor, layout: "BatchLayout", wanted: Tensor | None = None) -> Tensor:
        """x: (tokens, width), a beginning that all conversations share and then the rest of each. `wanted`: the indices
        of the tokens whose outputs are needed; the others then serve as keys and values only."""
        s = self.s
        weight = torch.cat([self.attn_q.weight, self.attn_k.weight, self.attn_v.weight])
        y = F.linear(self.attn_norm(x), weight).view(len(x), -1, s.head)
        turned, v = _rotate(y[:, : s.heads + s.kv_heads], layout.turn).to(y.dtype), y[:, s.heads + s.kv_heads :]
        y = layout.attend(turned[:, : s.heads], turned[:, s.heads :], v)
        if wanted is not None:
            x, y = x[wanted], y[wanted]
        x = x + self.attn_output(y)
        y = F.linear(self.ffn_norm(x), torch.cat([self.ffn_gate.weight, self.ffn_up.weight]))
        gate, up = y.chunk(2, -1)
        return x + self.ffn_down(F.silu(gate) * up)


class BatchLayout:
    """The positions of a batch's tokens: first `shared` tokens with which every conversation begins, then `length` more
    for each of `rows` conversations. Computing the shared ones once for all saves a third of the work."""

    def __init__(self, shared: int, rows: int, length: int, frequencies: Tensor) -> None:
        self.shared, self.rows, self.length = shared, rows, length
        rest = torch.arange(shared, shared + length).repeat(rows)
        angle = torch.outer(torch.cat([torch.arange(shared), rest]), frequencies)
        self.turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        self.later = torch.full((shared + length, shared + length), -1e4, dtype=torch.bfloat16).triu(1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention. q, k, v: (tokens, heads, head); the result: (tokens, heads * head)."""
        p, heads = self.shared, k.shape[1]

        def whole(x: Tensor) -> Tensor:  # every conversation with its beginning
            first = x[:p].expand(self.rows, -1, -1, -1)
            x = torch.cat([first, x[p:].view(self.rows, self.length, heads, -1)], 1)
            return x.transpose(1, 2).flatten(0, 1)

        begin = _attention(q[None, :p], k[:p].transpose(0, 1), v[:p].transpose(0, 1), self.later[:p, :p])
        rest = q[p:].view(self.rows, self.length, *q.shape[1:])
        return torch.cat([begin, _attention(rest, whole(k), whole(v), self.later[p:])])


def _attention(q: Tensor, k: Tensor, v: Tensor, later: Tensor) -> Tensor:
    """q: (rows, time, heads, head); k, v: (rows * KV heads, time with the beginning, head). It is written out because
    PyTorch's own attention is half as fast on a CPU for short texts."""
    rows, time, heads, head = q.shape
    of_keys = len(k) // rows
    group = heads // of_keys
    q = q.view(rows, time, of_keys, group, head).permute(0, 2, 3, 1, 4).reshape(len(k), group * time, head)
    scores = torch.baddbmm(later.repeat(group, 1).to(q.dtype), q, k.transpose(1, 2), alpha=head**-0.5)
    y = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return y.view(rows, of_keys, group, time, head).permute(0, 3, 1, 2, 4).reshape(rows * time, heads * head)


class Nano(nn.Module):
    """Modules are named as their tensors in GGUF, so that `export` can copy the names.

    A token with a space before it has no embedding of its own: it has that of the token without the space, plus one
    vector that all such tokens share. So ` milk` and `milk` are nearly the same to the model, which often reads one and
    has to write the other. `plain`: for every token, the token without the space (itself, if it has none).
    """

    def __init__(self, s: Shape, plain: Tensor) -> None:
        super().__init__()
        self.s = s
        self.register_buffer("plain", plain, persistent=False)
        self.space = nn.Parameter(torch.randn(s.width) * 0.03)
        self.token_embd = nn.Embedding(s.vocab, s.width)
        self.blk = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.output_norm = nn.RMSNorm(s.width, s.eps)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                last = name.endswith(("attn_output.weight", "ffn_down.weight"))
                std = 0.02 / (2 * s.layers) ** 0.5 if last else 0.05
                nn.init.normal_(p, std=0.08 if p is self.token_embd.weight else std)
        self._wire_copying()

    @torch.no_grad()
    def _wire_copying(self) -> None:
        """Set an induction circuit, which copies. Training would need half its time to find it.

        A head of block 0 attends to the previous token, by rotary phase alone, and adds a code of it to the residual
        stream (the message). A head of block 1 attends to places whose previous token is the current token, and raises
        the logit of the token there. Training may change all of these weights.
        """
        s, pairs = self.s, self.s.head // 2
        # `near` rotary pairs with high frequencies tell neighbours apart; from pair `far` on positions hardly matter.
        near, far = pairs * 3 // 16, pairs * 7 // 16
        told = 2 * (pairs - far)  # width of the message from block 0 to block 1
        embd = self.token_embd.weight
        embd.mul_(
            0.08 * s.width**0.5 / embd.norm(dim=1, keepdim=True)
        )  # equal norms: a long one would attract attention
        embd[:, 0] = 3 * embd.std()  # the same for all tokens: the head of block 0 matches by it
        embd[:, -told:] = self.space[-told:] = self.space[0] = 0  # room for the message
        look = nn.init.orthogonal_(torch.empty(told, s.width))
        look[:, 0] = look[:, -told:] = 0

        back, match = self.blk[0], self.blk[1]
        phase = self._frequencies()[:near]
        back.attn_q.weight[: s.head] = back.attn_k.weight[: s.head] = 0
        back.attn_q.weight[0 : 2 * near : 2, 0] = BACK
        back.attn_k.weight[0 : 2 * near : 2, 0] = BACK * phase.cos()
        back.attn_k.weight[1 : 2 * near : 2, 0] = BACK * phase.sin()
        back.attn_v.weight[:told] = look
        back.attn_output.weight[:, : s.head] = 0
        back.attn_output.weight[-told:] = back.ffn_down.weight[-told:] = 0  # at first only the message is written there
        back.attn_output.weight[-told:, :told] = TELL * torch.eye(told)

        group = s.heads // s.kv_heads
        give = nn.init.orthogonal_(torch.empty(s.kv_heads * s.head, s.width))
        give[:, 0] = give[:, -told:] = 0
        match.attn_v.weight[:] = give
        for kv in range(s.kv_heads):  # each copies its part of the token's embedding
            key, query = kv * s.head, kv * group * s.head
            match.attn_q.weight[query : query + s.head] = match.attn_k.weight[key : key + s.head] = 0
            match.attn_q.weight[query + s.head - told : query + s.head] = SHARP * look
            match.attn_k.weight[key + s.head - told : key + s.head, -told:] = SHARP * torch.eye(told)
            match.attn_output.weight[:, query : query + s.head] = GIVE * give[key : key + s.head].T

    def forward(self, shared: Tensor, ids: Tensor, wanted: Tensor) -> Tensor:
        """Logits of the next token at each place where `wanted` is true. shared: (time), the beginning of all
        conversations; ids, wanted: (batch, time), the rest of each."""
        layout = BatchLayout(len(shared), len(ids), ids.shape[1], self._frequencies())
        embedding = self.embedding()
        x = F.embedding(torch.cat([shared, ids.flatten()]), embedding)
        said = len(shared) + wanted.flatten().nonzero()[:, 0]
        for block in self.blk[:-1]:
            x = block(x, layout)
        return F.linear(self.output_norm(self.blk[-1](x, layout, said)), embedding)

    def embedding(self) -> Tensor:
        spaced = self.plain != torch.arange(len(self.plain))
        return self.token_embd.weight[self.plain] + spaced[:, None] * self.space

    def _frequencies(self) -> Tensor:
        return self.s.rope_base ** (-torch.arange(0, self.s.head, 2) / self.s.head)


def _rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary positions on neighbouring pairs, as llama.cpp computes them for the architecture `llama`."""
    return torch.view_as_real(torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * turn).flatten(-2)
