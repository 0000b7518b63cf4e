"""The transformers model as an oracle: its configuration, its random weights, and their way into our parameter tree.

Weights travel by released name: our declarations list the released tensors of every parameter, and `locate` says where
transformers keeps each of them. torch and transformers are imported only where a model is built, so that a process
that reads a saved state dict needs neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from v4_jax.checkpoint.names import in_stack, transformers_name
from v4_jax.config import Config
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import is_parameter


def locate(released: str, config: Config) -> tuple[str, tuple[Any, ...]]:
    """Where transformers keeps a released tensor: key in its state dict, and the part of that array."""
    place = in_stack(released)
    if place is None:
        return transformers_name(released), ()
    size = config.moe_intermediate_size if place.parts == 2 else config.hidden_size
    return place.name, (place.expert, slice(place.part * size, (place.part + 1) * size))


def params_from_state(state: Mapping[str, np.ndarray], config: Config) -> Any:
    """Our parameter tree (numpy, float32; int32 for the hash tables) from a transformers state dict.

    Raises:
      ValueError: a tensor that no parameter of ours reads.
    """
    used = set()

    def fill(parameter: Any) -> np.ndarray:
        out = np.empty(parameter.shape, parameter.value.dtype)
        for index, released in parameter.tensors():
            key, part = locate(released, config)
            used.add(key)
            out[index] = state[key][part]
        return out

    params = jax.tree.map(fill, declarations(config), is_leaf=is_parameter)
    if unread := sorted(set(state) - used):
        raise ValueError(f"transformers tensors that no parameter reads: {unread}")
    return params


def write_state(state: Mapping[str, np.ndarray], params: Any, config: Config) -> None:
    """The reverse: writes plain parameters into a state dict's arrays, save the MTP block, which transformers lacks.

    Raises:
      ValueError: a transformers tensor that stays unwritten, in part or whole.
    """
    missing = {key: value.size for key, value in state.items()}

    def pour(parameter: Any, value: Any) -> None:
        for index, released in parameter.tensors():
            if released.startswith("mtp."):
                continue
            key, part = locate(released, config)
            state[key][part] = value[index]
            missing[key] -= value[index].size

    jax.tree.map(pour, declarations(config), params, is_leaf=is_parameter)
    if unwritten := sorted(key for key, count in missing.items() if count):
        raise ValueError(f"transformers tensors that no parameter fills: {unwritten}")


def hf_content(config: Config) -> dict[str, Any]:
    """The released `config.json` of an architecture, for plain weights: all that transformers needs to build it."""
    return {key: value for key, value in config.to_hf().items() if key != "quantization_config"}


def build(config: Config) -> Any:
    """A float32 transformers model in evaluation mode, with its own initial weights."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    settings = DeepseekV4Config(**hf_content(config))
    model = DeepseekV4ForCausalLM._from_config(settings, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def randomise(model: Any, config: Config, seed: int) -> None:
    """Weights that make every term matter: unit-scale activations, uneven gates, sinks, biases and routes."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Any, scale: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale + mean)

    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                order = torch.rand(tensor.shape[0], config.n_routed_experts, generator=generator).argsort(dim=1)
                tensor.copy_(order[:, : tensor.shape[1]])
            elif name.endswith(("norm.weight", "hc.scale", "hc_scale")):
                normal(tensor, 0.2, 1.0)
            elif name.endswith(("sinks", "position_bias", "hc.base", "hc_base")):
                normal(tensor, 1.0)
            elif name.endswith("e_score_correction_bias"):
                normal(tensor, 0.3)
            elif name.endswith("embed_tokens.weight"):
                normal(tensor, 1.0)
            elif name.endswith("lm_head.weight"):
                normal(tensor, 2.0 * tensor.shape[-1] ** -0.5)
            elif name.endswith("scorer.weights_proj.weight"):
                # Heads that agree in sign: where relu leaves exact zeros in all of them, the index scores tie at an end
                # of their ranking, not at the cut, where each side would pick its own winners.
                normal(tensor, tensor.shape[-1] ** -0.5)
                tensor.copy_(tensor[:1] * torch.rand(len(tensor), 1, generator=generator))
            else:  # a matrix [..., out, in]
                normal(tensor, tensor.shape[-1] ** -0.5)


def state_of(model: Any) -> dict[str, np.ndarray]:
    """The model's state dict as numpy arrays that share its memory."""
    return {name: tensor.numpy() for name, tensor in model.state_dict().items()}


def logits_of(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] of one forward pass over [B, S] ids, without a cache."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64)), use_cache=False).logits.numpy()
