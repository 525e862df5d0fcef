"""Options that place tensors elsewhere than `--gpu-layers` does: on a device, or in main memory.

    --cpu-moe                                the weights of all experts in main memory, the rest on the GPU
    --override-tensor 'blk\\.[0-3]\\.=CPU'     all tensors whose name contains a match

As in llama.cpp, patterns are searched for in the names of tensors, and the first that matches counts.
"""

from __future__ import annotations

import re

from aiosd.errors import UsageError
from aiosd.llm import llama
from aiosd.llm.spec import ModelSpec

#: The weights of experts in the files of all architectures.
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"

CPU = "CPU"


def places(spec: ModelSpec) -> list[tuple[str, str]]:
    """(pattern, kind of buffer) for each override. Raises UsageError for what llama.cpp cannot do."""
    known = llama.buffer_types() if spec.override_tensor else {}
    for pattern, kind in spec.override_tensor:
        if kind not in known:
            raise UsageError(f"--override-tensor {pattern}={kind}: no such buffer; there are: {', '.join(known)}")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--override-tensor {pattern}={kind}: {error}") from None
    found = list(spec.override_tensor)
    if spec.cpu_moe:
        found.append((EXPERTS, CPU))
    return found + [(rf"blk\.{layer}{EXPERTS}", CPU) for layer in range(spec.n_cpu_moe)]
