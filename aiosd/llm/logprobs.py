"""Log probabilities of each chosen token, and of the tokens that were likeliest at its place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from aiosd.llm.arrays import LogitRow
from libaios.wire import Alternative, Logprob


class Raw:
    """The distribution as the model gave it. Log probabilities are taken from it when the token has been chosen."""

    def __init__(self, row: LogitRow, count: int) -> None:
        self._row = row.copy()  # penalties may change it in place
        usable = np.where(np.isnan(row), -np.inf, row).astype(np.float64)
        most = usable.max()
        self._log_sum = float(most + np.log(np.exp(usable - most).sum()))
        self._top: list[int] = []
        if count:
            near = np.argpartition(usable, -count)[-count:] if count < len(row) else np.arange(len(row))
            self._top = near[np.lexsort((near, -usable[near]))][:count].tolist()

    def of(self, token: int, pieces: Sequence[bytes]) -> Logprob:
        top = [Alternative(other, self._log(other), pieces[other]) for other in self._top]
        return Logprob(token, self._log(token), pieces[token], top)

    def _log(self, token: int) -> float:
        return max(float(self._row[token]) - self._log_sum, -1e4)  # JSON has no -inf
