"""The next token of every call of a step, from the rows of logits: one call of the sampler for all of them.

Most rows are drawn from as they are. Some are changed before (`penalties.py`), drawn from in another way
(`mirostat.py`), or looked at (log probabilities): each of these is done for its row alone, before or after the one
call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from aiosd.llm.logprobs import Raw
from aiosd.llm.sampling import Drawer, Draws, draws

if TYPE_CHECKING:
    from aiosd.llm.sequence import Sequence

Row = npt.NDArray[np.float32]


class Rows:
    """The calls whose tokens are drawn together, row by row, for as many steps as they stay the same."""

    def __init__(self, calls: list[Sequence]) -> None:
        for sequence in calls:
            sequence.plain = sequence.simple and not sequence.replaying
        self.wanted: Draws = draws([(s.choice.sampler, len(s.out), row) for row, s in enumerate(calls)])
        self.special = [(row, s) for row, s in enumerate(calls) if not s.plain]

    def next_step(self) -> None:
        self.wanted["index"] += 1


class Picker:
    def __init__(self, drawer: Drawer) -> None:
        self._drawer = drawer

    def pick(self, rows: Rows, logits: Row) -> list[int]:
        """A token for each row, or NOTHING where the model gave no number. Changes `logits`."""
        special = [(row, sequence) for row, sequence in rows.special if not sequence.replaying]
        for row, sequence in special:
            self._prepare(sequence, logits[row])
            rows.wanted["index"][row] = len(sequence.out)
        tokens = self._drawer.draw(logits, rows.wanted)
        for row, sequence in special:
            if sequence.choice.mirostat is not None:
                tokens[row] = sequence.choice.mirostat.draw(logits[row], len(sequence.out))
        return tokens

    def pick_one(self, sequence: Sequence, row: Row) -> int:
        """The token that `pick` gives for a row of this call."""
        self._prepare(sequence, row)
        if sequence.choice.mirostat is not None:
            return sequence.choice.mirostat.draw(row, len(sequence.out))
        return self._drawer.one(row, sequence.choice.sampler, len(sequence.out))

    def _prepare(self, sequence: Sequence, row: Row) -> None:
        choice = sequence.choice
        if choice.top_logprobs is not None:
            sequence.raw = Raw(row, choice.top_logprobs)
        if choice.edits is not None:
            choice.edits.apply(row, sequence.prompt, sequence.out)

    def again(self, sequence: Sequence, row: Row) -> int:
        """Another draw for the same place, from a part of the row (a place in it) or from a changed row."""
        index = len(sequence.out)
        if sequence.choice.mirostat is not None:
            return max(sequence.choice.mirostat.draw(row, index), 0)
        return max(self._drawer.one(row, sequence.choice.sampler, index), 0)  # all -inf: the first will do
