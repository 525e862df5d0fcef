"""nano's network: a plain Llama (RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BACK, SHARP, GIVE = 3.0, 3.5, 0.4  # how firmly copying is wired before training


@dataclass(frozen=True)
class Shape:
    vocab: int = 1597
    width: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    hidden: int = 640
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

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        """x: (batch, time, width)."""
        batch, time, _ = x.shape
        y = self.attn_norm(x)
        q = _rotate(self.attn_q(y).view(batch, time, self.s.heads, -1).transpose(1, 2), turn)
        k = _rotate(self.attn_k(y).view(batch, time, self.s.kv_heads, -1).transpose(1, 2), turn)
        v = self.attn_v(y).view(batch, time, self.s.kv_heads, -1).transpose(1, 2)
        with torch.autocast("cpu", enabled=False):  # faster than in bfloat16 here, and copying wants precision
            y = F.scaled_dot_product_attention(q, k, v.float(), is_causal=True, enable_gqa=True)
        x = x + self.attn_output(y.transpose(1, 2).reshape(batch, time, -1))
        y = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))


class Nano(nn.Module):
    """Module names are those of GGUF, so that export copies them.

    A word's first piece with a space before it has no embedding of its own: it is the piece's plus one vector that all
    of them share. ` milk` and `milk` are then as good as the same to a copier, which reads one and writes the other.
    `plain` says for every token which token that is (itself, if it has no space before it).
    """

    def __init__(self, s: Shape, plain: Tensor) -> None:
        super().__init__()
        self.s = s
        self.register_buffer("plain", plain, persistent=False)
        self.space = nn.Parameter(torch.randn(s.width) * 0.04)
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
        """Starts with an induction circuit in place, which training would take half its time to find.

        A head of block 0 looks one token back, by rotary phase alone, and tells block 1 what stood there; a head
        of block 1 looks for places whose predecessor is the current token, and promotes what stands there. That
        is copying. Everything stays free to change.
        """
        s, pairs = self.s, self.s.head // 2
        near, far = pairs * 3 // 8, pairs * 7 // 16  # pairs that turn fast, and the first that hardly turns
        told = 2 * (pairs - far)  # width of the message from block 0 to block 1
        embd = self.token_embd.weight
        embd[:, 0] = 3 * embd.std()  # the same for all tokens: something for the look back to hold on to
        embd[:, -told:] = 0  # room for the message
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
        back.attn_output.weight[-told:, :told] = 0.04 * torch.eye(told)

        group = s.heads // s.kv_heads
        give = nn.init.orthogonal_(torch.empty(s.kv_heads * s.head, s.width))
        give[:, 0] = give[:, -told:] = 0
        match.attn_v.weight[:] = give
        for kv in range(s.kv_heads):  # each carries its share of what stands there
            key, query = kv * s.head, kv * group * s.head
            match.attn_q.weight[query : query + s.head] = match.attn_k.weight[key : key + s.head] = 0
            match.attn_q.weight[query + s.head - told : query + s.head] = SHARP * look
            match.attn_k.weight[key + s.head - told : key + s.head, -told:] = SHARP * torch.eye(told)
            match.attn_output.weight[:, query : query + s.head] = GIVE * give[key : key + s.head].T

    def forward(self, ids: Tensor, wanted: Tensor) -> Tensor:
        """Logits of the token after each place where `wanted` is true. ids, wanted: (batch, time)."""
        angle = torch.outer(torch.arange(ids.shape[1]), self._frequencies())
        turn = angle.cos(), angle.sin()
        embedding = self.embedding()
        x = F.embedding(ids, embedding)
        for block in self.blk:
            x = block(x, turn)
        return F.linear(self.output_norm(x[wanted]), embedding)

    def embedding(self) -> Tensor:
        spaced = self.plain != torch.arange(len(self.plain))
        return self.token_embd.weight[self.plain] + spaced[:, None] * self.space

    def _frequencies(self) -> Tensor:
        return self.s.rope_base ** (-torch.arange(0, self.s.head, 2) / self.s.head)


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary positions on neighbouring pairs, llama.cpp's way for the architecture `llama`."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = turn
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
