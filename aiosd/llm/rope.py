"""RoPE: options that change how positions are encoded from the values in the model's file. The options are llama.cpp's,
value by value. `--rope-scaling yarn --rope-freq-scale 0.25` is for four times as many tokens as the model was trained
for.
"""

from __future__ import annotations

from aiosd.errors import UsageError
from aiosd.llm.modelfile import ModelFile
from aiosd.llm.spec import YARN, ModelSpec


def check(spec: ModelSpec, file: ModelFile) -> None:
    """Raises UsageError for options that would have no effect: then the user meant something else."""
    scaling = spec.rope_scaling or file.text(f"{file.architecture}.rope.scaling.type")
    given = [f"--{name.replace('_', '-')}" for name in YARN if getattr(spec, name) is not None]
    if given and scaling != "yarn":
        raise UsageError(f"{given[0]}: only with --rope-scaling yarn, not with {scaling or 'none'}")
    if spec.yarn_attn_factor is not None and spec.yarn_ext_factor != 0:
        raise UsageError("--yarn-attn-factor: only with --yarn-ext-factor 0; llama.cpp computes it itself otherwise")
    if scaling == "none" and spec.rope_freq_scale is not None:
        raise UsageError("--rope-freq-scale: not together with --rope-scaling none")


def described(spec: ModelSpec) -> str:
    """The options that differ from the model's file, for people; '': there are none."""
    given: dict[str, object] = {"rope_scaling": spec.rope_scaling} if spec.rope_scaling is not None else {}
    given |= {name: value for name, value in spec.rope.items() if name != "rope_scaling_type"}
    return ", ".join(f"{name} {value}" for name, value in given.items())


def stretched(spec: ModelSpec, trained: int) -> int | None:
    """The number of tokens that the model is usable for; None: not known, because the user has set another base."""
    if spec.rope_freq_base is not None:
        return None
    scale = spec.rope_freq_scale
    return int(trained / scale) if scale is not None and scale < 1 else trained
