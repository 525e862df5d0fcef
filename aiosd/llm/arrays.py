"""Arrays that several modules pass to each other, by what is in them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

LogitRow = npt.NDArray[np.float32]  # logits: one for each token of the vocabulary
Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]  # of tokens, as indices of a row
Tokens = npt.NDArray[np.int32]  # of a prompt or an output, one after the other
