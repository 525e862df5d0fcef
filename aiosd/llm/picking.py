"""Chooses the next token of every call of a step: one call of the sampler for all rows of logits.

Most rows are used as they are. Some rows are changed first (`penalties.py`), need another way of drawing
(`mirostat.py`), or are kept for log probabilities. That is done for each of these rows alone, before or after the
common call of the sampler.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiosd.llm.arrays import LogitRow
from aiosd.llm.logprobs import Raw
from aiosd.llm.sampling import Drawer, Draws, draws

if TYPE_CHECKING:
    from aiosd.llm.sequence import Sequence


class Rows:
    """The calls whose tokens are drawn together, one row each. It serves for all steps in which these calls run."""

    def __init__(self, calls: list[Sequence]) -> None:
        for sequence in calls:
            sequence.plain = sequence.simple and not sequence.replaying
        self.wanted: Draws = draws([(s.chain.sampler, len(s.out), row) for row, s in enumerate(calls)])
        self.special = [(row, s) for row, s in enumerate(calls) if not s.plain]

    def next_step(self) -> None:
        self.wanted["index"] += 1


class Picker:
    def __init__(self, drawer: Drawer) -> None:
        self._drawer = drawer

    def pick(self, rows: Rows, logits: LogitRow) -> list[int]:
        """A token for each row, or NOTHING where no token can be drawn. May change `logits`."""
        special = [(row, sequence) for row, sequence in rows.special if not sequence.replaying]
        for row, sequence in special:
            self._prepare(sequence, logits[row])
            rows.wanted["index"][row] = len(sequence.out)
        tokens = self._drawer.draw(logits, rows.wanted)
        for row, sequence in special:
            if sequence.chain.mirostat is not None:
                tokens[row] = sequence.chain.mirostat.draw(logits[row], len(sequence.out))
        return tokens

    def pick_one(self, sequence: Sequence, row: LogitRow) -> int:
        """The token that `pick` would give for this row of this call."""
        self._prepare(sequence, row)
        if sequence.chain.mirostat is not None:
            return sequence.chain.mirostat.draw(row, len(sequence.out))
        return self._drawer.one(row, sequence.chain.sampler, len(sequence.out))

    def _prepare(self, sequence: Sequence, row: LogitRow) -> None:
        chain = sequence.chain
        if chain.top_logprobs is not None:
            sequence.raw = Raw(row, chain.top_logprobs)
        if chain.edits is not None:
            chain.edits.apply(row, sequence.prompt, sequence.out)

    def again(self, sequence: Sequence, row: LogitRow) -> int:
        """Draw again for the same place, from a changed row or a part of it (then the result is a place in that)."""
        index = len(sequence.out)
        if sequence.chain.mirostat is not None:
            return max(sequence.chain.mirostat.draw(row, index), 0)
        return max(self._drawer.one(row, sequence.chain.sampler, index), 0)  # if all are -inf, the first one
