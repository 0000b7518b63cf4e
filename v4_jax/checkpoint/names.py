"""What transformers calls the released tensors, in its own state dict and in what it saves.

Its `DeepseekV4ForCausalLM` has names of its own, with the routed experts' matrices of a layer stacked. What it saves by
default are the released names again, behind a `model.`, but for those that its rules do not take back: more or fewer,
as the model came from one set of names or the other.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

# Released spelling -> transformers' (its conversion mapping, whose indexer sits inside the compressor), in this order.
_RENAMES = [
    (r"^(embed|norm)\.", r"model.\1."),
    (r"^model\.embed\.", r"model.embed_tokens."),
    (r"^head\.", r"lm_head."),
    (r"^hc_head_", r"model.hc_head.hc_"),
    (r"^layers\.", r"model.layers."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn\.indexer\.compressor\.", r".attn.compressor.indexer."),
    (r"\.attn\.indexer\.wq_b\.", r".attn.compressor.indexer.q_b_proj."),
    (r"\.attn\.indexer\.weights_proj\.", r".attn.compressor.indexer.scorer.weights_proj."),
    (r"\.(attn|compressor|indexer)\.norm\.", r".\1.kv_norm."),
    (r"\.attn\.", r".self_attn."),
    (r"\.ffn\.", r".mlp."),
    (r"\.attn_norm\.", r".input_layernorm."),
    (r"\.ffn_norm\.", r".post_attention_layernorm."),
    (r"\.attn_sink$", r".sinks"),
    (r"\.ape$", r".position_bias"),
    (r"\.q_norm\.", r".q_a_norm."),
    (r"\.(wq_a|wq_b|wkv|wo_a|wo_b)\.", lambda match: f".{match[1][1:]}_proj."),
    (r"\.wgate\.", r".gate_proj."),
    (r"\.gate\.bias$", r".gate.e_score_correction_bias"),
    (r"(experts(?:\.#)?)\.w1\.", r"\1.gate_proj."),
    (r"(experts(?:\.#)?)\.w2\.", r"\1.down_proj."),
    (r"(experts(?:\.#)?)\.w3\.", r"\1.up_proj."),
]


class InStack(NamedTuple):
    """Where a routed expert's matrix lies among those of its layer.

    Attributes:
      name: of the stack [experts, parts * out, in].
      expert: place on its first axis.
      part: which of the parts; gate and up lie one below the other.
      parts: 2 of gate and up, 1 of down.
    """

    name: str
    expert: int
    part: int
    parts: int


def transformers_name(name: str) -> str:
    """transformers' name of a released tensor, of a routed expert's with the expert's number; draft blocks' stay.

    A name that is transformers' in part or whole becomes so wholly: what it saves is often a mixture.
    """
    if name.startswith("mtp."):
        return name
    numbers = iter(_NUMBER.findall(name))
    return re.sub("#", lambda _: next(numbers), _renamed(_NUMBER.sub("#", name)))


_NUMBER = re.compile(r"(?<=layers\.)\d+|(?<=experts\.)\d+")


@functools.lru_cache(maxsize=1024)
def _renamed(name: str) -> str:
    """A name with # for the numbers of layer and expert."""
    for pattern, replacement in _RENAMES:
        name = re.sub(pattern, replacement, name)  # type: ignore[call-overload]
    return name


def in_stack(released: str) -> InStack | None:
    """Where transformers stacks a routed expert's matrix; None for all other tensors, and in draft blocks."""
    match = re.fullmatch(r"(layers\.\d+)\.ffn\.experts\.(\d+)\.w([123])\.weight", released)
    if match is None:
        return None
    stem, expert = f"model.{match[1]}.mlp.experts", int(match[2])
    if match[3] == "2":
        return InStack(f"{stem}.down_proj", expert, 0, 1)
    return InStack(f"{stem}.gate_up_proj", expert, int(match[3] == "3"), 2)


def canonical(name: str) -> str:
    """The same for all names of a tensor: released, transformers', any mixture of them, behind `model.` or not."""
    return transformers_name(name.removeprefix("model.")).removeprefix("model.")
