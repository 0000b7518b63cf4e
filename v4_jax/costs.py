"""What a configuration costs: parameters, bytes at rest, FLOPs per token and cache, and how V3.2 compares.

Nothing here knows a shape of the model: parameters and their bytes are read off `declarations(config)`, cache bytes off
`init_cache`, so a cost cannot drift from what is computed. FLOPs count a multiply and an add as two and leave out
elementwise work. What they must reproduce is published: the technical report's parameter counts and its comparison with
DeepSeek-V3.2 at a million tokens, and the sizes in the released checkpoints' index files.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

from v4_jax.architecture import RATIO_OF_ROLE, Architecture
from v4_jax.cache.cache import CacheDtype, init_cache
from v4_jax.cache.entries import ENTRY_RATIOS
from v4_jax.number_formats import bytes_of, layout, scale_shape
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import EXPERTS, Parameter, is_parameter

WeightDtype = Literal["native", "bfloat16", "float32"]

# Price of an operation relative to FP8, the technical report's unit: bfloat16 runs at half that speed, FP4 at twice.
_BF16_COST, _FP8_COST, _FP4_COST = 2.0, 1.0, 0.5


# ---- parameters ------------------------------------------------------------------------------------------------------


class ParameterCounts(NamedTuple):
    """Numbers of parameters.

    Attributes:
      total: the trunk's: everything but what drafts.
      active: of those, the ones that one token multiplies: `num_experts_per_tok` of the routed experts, and all else
        but the input embedding, of which a token reads a row and multiplies nothing.
      draft: of the MTP block or DSpark's stages; they share embedding and head with the trunk.
    """

    total: int
    active: int
    draft: int

    @property
    def checkpoint(self) -> int:
        """Parameters of the released checkpoint: trunk and what drafts."""
        return self.total + self.draft


def parameter_counts(config: Architecture) -> ParameterCounts:
    """Counts the parameters of a configuration.

    Every floating-point tensor counts, the router's bias included. The hash layers' table from token ids to experts
    does not: it holds integers and nothing of it is learned. (Flash: 284.33B, 13.27B active, 6.61B in the MTP block.)
    """
    total = active = draft = 0
    for path, parameter in _parameters(config):
        if _in_draft(path):
            draft += _elements(parameter)
        else:
            total += _elements(parameter)
            active += _active_elements(config, path, parameter)
    return ParameterCounts(total, active, draft)


@dataclasses.dataclass(frozen=True)
class ParameterBytes:
    """Bytes of a whole checkpoint's tensors, without file headers.

    Attributes:
      by_format: bytes by dtype name; a quantised weight's codes and scales count apart, each under their own.
      draft: the share of the MTP block or DSpark's stages.
    """

    by_format: dict[str, int]
    draft: int

    @property
    def total(self) -> int:
        """All formats together."""
        return sum(self.by_format.values())


def parameter_bytes(config: Architecture, dtype: WeightDtype = "native") -> ParameterBytes:
    """Bytes that the parameters take, those of what drafts included.

    Args:
      config: the architecture.
      dtype: "native" as released, which reproduces the published sizes to the byte; "bfloat16" or "float32" for weights
        dequantised to that. What is released in float32 stays so, and the hash table is then int32.

    Raises:
      ValueError: an unknown dtype.
    """
    if dtype not in ("native", "bfloat16", "float32"):
        raise ValueError(f"unknown weight dtype {dtype!r}, expected 'native', 'bfloat16' or 'float32'")
    by_format: Counter[str] = Counter()
    draft = 0
    for path, parameter in _parameters(config):
        for array in _arrays(config, parameter, dtype):
            by_format[jnp.dtype(array.dtype).name] += bytes_of(array)
            draft += bytes_of(array) if _in_draft(path) else 0
    return ParameterBytes(dict(by_format), draft)


def _arrays(config: Architecture, parameter: Parameter, dtype: WeightDtype) -> Iterator[jax.ShapeDtypeStruct]:
    """The arrays that hold a parameter."""
    shape, storage = parameter.shape, parameter.storage
    if storage == "i64":
        yield jax.ShapeDtypeStruct(shape, jnp.dtype("int64" if dtype == "native" else "int32"))
    elif storage == "f32":
        yield jax.ShapeDtypeStruct(shape, jnp.float32)
    elif dtype != "native":
        yield jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    elif (held := layout(storage, config.expert_dtype)) is None:
        yield jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    else:
        yield jax.ShapeDtypeStruct(shape, held.codes)
        yield jax.ShapeDtypeStruct(scale_shape(shape, held.block), held.scales)


def _parameters(config: Architecture) -> list[tuple[tuple[str, ...], Parameter]]:
    """Every declaration with its path in the parameter tree."""
    leaves = jax.tree_util.tree_leaves_with_path(declarations(config), is_leaf=is_parameter)
    return [(tuple(key.key for key in path), parameter) for path, parameter in leaves]


def _in_draft(path: tuple[str, ...]) -> bool:
    return path[0] in ("mtp", "dspark")


def _elements(parameter: Parameter) -> int:
    return 0 if parameter.storage == "i64" else math.prod(parameter.shape)


def _active_elements(config: Architecture, path: tuple[str, ...], parameter: Parameter) -> int:
    if path == ("embed",):
        return 0
    if EXPERTS in parameter.axes:
        return _elements(parameter) // config.n_routed_experts * config.num_experts_per_tok
    return _elements(parameter)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------

# Where in the parameter tree a linear layer's cost is booked: the first of these that its path contains.
_LINEAR_ROLES = {
    "indexer": "indexer",
    "compressor": "compressors",
    "attn": "attention",
    "attn_norm": "attention",
    "ffn": "experts",
    "ffn_norm": "experts",
    "hc_attn": "hyper-connections",
    "hc_ffn": "hyper-connections",
    "hc_head": "hyper-connections",
    "head": "head",
    "norm": "head",
}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one token's forward pass through the trunk.

    Attributes:
      linear: two per active parameter, by role. A prompt of which only the last token is predicted can do without
        "head" for all others.
      attention: the attention core (query . key, probability . value) over "window", "csa" and "hca" keys.
      index: the lightning indexer's scores of every visible entry.
    """

    linear: dict[str, int]
    attention: dict[str, int]
    index: int

    @property
    def total(self) -> int:
        """All FLOPs, whatever their precision."""
        return sum(self.linear.values()) + sum(self.attention.values()) + self.index

    @property
    def equivalent_fp8(self) -> float:
        """FLOPs in FP8's worth of time, as the report compares models: core attention in bfloat16, index scores in FP4,
        and all linear layers at FP8 speed, FP4 experts too, which are multiplied with FP8 activations."""
        core = _BF16_COST * sum(self.attention.values())
        return _FP8_COST * sum(self.linear.values()) + core + _FP4_COST * self.index


def flops_per_token(config: Architecture, context: int, *, phase: Literal["decode", "prefill"] = "decode") -> Flops:
    """FLOPs per token, as if no work were wasted on masked keys.

    A query attends to `sliding_window` tokens and to `index_topk` (CSA) or all (HCA) of the entries visible to it, and
    its indexer scores all entries of a CSA layer (technical report, sections 2.3.1 and 2.3.2).

    Args:
      config: the architecture.
      context: tokens in the sequence, the current one included.
      phase: "decode" for the token that comes last, "prefill" for the mean over the whole sequence.

    Raises:
      ValueError: a context of less than one token, or an unknown phase.
    """
    if context < 1:
        raise ValueError(f"context is {context}, expected at least 1 token")
    if phase not in ("decode", "prefill"):
        raise ValueError(f"unknown phase {phase!r}, expected 'decode' or 'prefill'")
    linear: Counter[str] = Counter()
    for path, parameter in _parameters(config):
        if not _in_draft(path) and (active := _active_elements(config, path, parameter)):
            linear[next(role for name, role in _LINEAR_ROLES.items() if name in path)] += 2 * active

    def keys(ratio: int, limit: int) -> float:
        count = _keys_in_total if phase == "prefill" else _keys_at_the_end
        return count(context, ratio, limit) / (context if phase == "prefill" else 1)

    roles = [layer.attention for layer in config.layers]
    csa, hca = RATIO_OF_ROLE["csa"], RATIO_OF_ROLE["hca"]
    per_key = 4 * config.num_attention_heads * config.head_dim  # one product with the query, one with the probability
    per_index_key = 2 * config.index_n_heads * config.index_head_dim
    attention = {
        "window": len(roles) * keys(1, config.sliding_window) * per_key,
        "csa": roles.count("csa") * keys(csa, config.index_topk) * per_key,
        "hca": roles.count("hca") * keys(hca, context) * per_key,
    }
    index = roles.count("csa") * keys(csa, context) * per_index_key
    return Flops(dict(linear), {role: round(value) for role, value in attention.items()}, round(index))


def draft_flops(config: Architecture) -> int:
    """FLOPs of drafting once behind a token that the trunk has read; 0 for a model that does not draft.

    The MTP block makes one draft, DSpark a whole block of them, and both need the trunk's head for each.
    """
    rows = config.dspark_block_size or config.num_nextn_predict_layers
    total = 2 * rows * config.vocab_size * config.hidden_size if rows else 0
    for path, parameter in _parameters(config):
        if not _in_draft(path) or path[-1] == "markov_w1":  # of which a draft reads a row
            continue
        active = 2 * _active_elements(config, path, parameter)
        if path[-1] == "main_proj":
            total += active  # of the token that was read
        else:
            total += rows * active
            total += active if config.dspark_stages and path[-1] == "wkv" else 0  # the token's key, besides the block's
    per_key = 4 * config.num_attention_heads * config.head_dim
    seen = config.sliding_window + config.dspark_block_size
    return total + rows * config.draft_blocks * seen * per_key


def training_flops(config: Architecture, length: int, *, frozen: bool = False) -> int:
    """FLOPs per token of a training step on rows of `length` tokens, as the model needs them.

    Three times the trunk's forward pass, the mean over a row's positions: what is computed again in the backward pass
    does not count, nor does what drafts.

    Args:
      config: the architecture.
      length: tokens of a row.
      frozen: whether the weights have no gradients, which are a third of what their products take.
    """
    forward = flops_per_token(config, length, phase="prefill")
    return 3 * forward.total - (sum(forward.linear.values()) if frozen else 0)


def stage_training_flops(config: Architecture, length: int, anchors: int) -> int:
    """FLOPs per token of a step that trains DSpark's stages on rows of `length` tokens, as the model needs them.

    The trunk's forward pass, without its head; and three times what it takes to draft a block, for each anchor. The
    head has no gradient, and instead says what the trunk thinks of the drafts.

    Args:
      config: the architecture.
      length: tokens of a row.
      anchors: blocks of a row.
    """
    forward = flops_per_token(config, length, phase="prefill")
    return forward.total - forward.linear["head"] + 3 * draft_flops(config) * anchors // length


def _keys_at_the_end(context: int, ratio: int, limit: int) -> int:
    """Keys that the last token of a sequence attends to, at one per `ratio` tokens and `limit` at most."""
    return min(limit, context // ratio)


def _keys_in_total(context: int, ratio: int, limit: int) -> int:
    """The sum of `_keys_at_the_end` over all lengths up to `context`."""
    steps = min(limit, (context + 1) // ratio)  # `ratio` tokens see 0 keys, `ratio` see 1, ..., all others `steps`
    return ratio * steps * (steps - 1) // 2 + steps * (context + 1 - ratio * steps)


# ---- cache -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class CacheBytes:
    """Bytes of cache that one row (sequence) of a batch takes.

    Attributes:
      dtype: the format that keys are kept in.
      by_role: "window", "csa", "hca", "index", "open blocks" (the compressors' state) and "draft", where the model has
        them.
      per_token: bytes per further token by role, those that grow; all others are constant.
      padding: how many of all bytes fill rows up to whole memory tiles, outside of "draft".
    """

    dtype: str
    by_role: dict[str, int]
    per_token: dict[str, float]
    padding: int

    @property
    def total(self) -> int:
        """All roles together."""
        return sum(self.by_role.values())

    @property
    def trunk(self) -> int:
        """What a row takes without the windows of what drafts."""
        return self.total - self.by_role.get("draft", 0)


def cache_bytes(config: Architecture, context: int, dtype: str = "released") -> CacheBytes:
    """Bytes of cache per row for `context` tokens, exactly as `init_cache` allocates them.

    Args:
      config: the architecture.
      context: tokens that the row has room for.
      dtype: "released", "bfloat16" or "float32"; see `init_cache`.

    Raises:
      ValueError: as `init_cache`.
    """
    allocate = functools.partial(init_cache, config, 1, context, dtype=cast(CacheDtype, dtype))  # which checks it
    cache = jax.eval_shape(allocate)
    per_token: dict[str, float] = {
        role: rows.nbytes / rows.shape[2] / ENTRY_RATIOS[role] for role, rows in cache.entries.items()
    }
    padding = sum(rows.padding for rows in (*cache.entries.values(), cache.rings["window"]))
    return CacheBytes(dtype, cache.nbytes(), per_token, padding)


# ---- DeepSeek-V3.2 and plain attention, for comparison ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DeepSeekV32:
    """DeepSeek-V3.2's shape; field names and values are those of its released `config.json`.

    Multi-head latent attention over the `index_topk` tokens that an indexer picks from all of them, in every layer.
    """

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    n_routed_experts: int = 256
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    num_attention_heads: int = 128
    q_lora_rank: int = 1536
    kv_lora_rank: int = 512
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128
    index_n_heads: int = 64
    index_head_dim: int = 128
    index_topk: int = 2048

    def parameters(self) -> tuple[int, int]:
        """Parameters (total, active) of its matrices, on the terms of `parameter_counts`; norms are left out."""
        d, heads = self.hidden_size, self.num_attention_heads
        attention = (
            d * self.q_lora_rank
            + self.q_lora_rank * heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
            + d * (self.kv_lora_rank + self.qk_rope_head_dim)
            + self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
            + heads * self.v_head_dim * d
        )
        # Queries from the latent, one key and the heads' weights from the input.
        indexer = self.q_lora_rank * self.index_n_heads * self.index_head_dim
        indexer += d * (self.index_head_dim + self.index_n_heads)
        head = self.vocab_size * d
        dense = 3 * d * self.intermediate_size
        expert = 3 * d * self.moe_intermediate_size
        everywhere = self.num_hidden_layers * (attention + indexer) + self.first_k_dense_replace * dense + head

        def with_experts(routed: int) -> int:
            per_layer = (routed + self.n_shared_experts) * expert + self.n_routed_experts * d
            return everywhere + (self.num_hidden_layers - self.first_k_dense_replace) * per_layer

        return with_experts(self.n_routed_experts) + head, with_experts(self.num_experts_per_tok)

    def equivalent_fp8_flops(self, context: int) -> float:
        """FLOPs of decoding one token, weighted like `Flops.equivalent_fp8`, with the indexer's scores in FP8.

        Decoding absorbs the key and value up-projections into queries and outputs, which moves their FLOPs and adds
        none, so that every head reads latent keys of 512 + 64 channels and latent values of 512.
        """
        core = 2 * self.num_attention_heads * (2 * self.kv_lora_rank + self.qk_rope_head_dim)
        core *= min(context, self.index_topk)
        index = 2 * self.index_n_heads * self.index_head_dim * context
        linear = 2 * self.parameters()[1]
        return _FP8_COST * linear + self.num_hidden_layers * (_BF16_COST * core + _FP8_COST * index)

    def cache_bytes(self, context: int) -> int:
        """Bytes of cache per row as it is served.

        Per token and layer: the latent in E4M3 with a float32 scale per 128 channels and rotary channels in bfloat16
        (656 bytes), and an index key in E4M3 with its float32 scale (132 bytes).
        """
        latent = self.kv_lora_rank + 4 * self.kv_lora_rank // 128 + 2 * self.qk_rope_head_dim
        index = self.index_head_dim + 4 * self.index_head_dim // 128
        return self.num_hidden_layers * context * (latent + index)


class Comparison(NamedTuple):
    """A configuration beside DeepSeek-V3.2 and plain grouped-query attention at one context.

    Attributes:
      context: tokens.
      flops: FP8-equivalent FLOPs of decoding one token; see `Flops.equivalent_fp8`.
      flops_v32: the same of DeepSeek-V3.2.
      headline_ratio: FLOPs as a share of DeepSeek-V3.2's when both models' active parameters are first rounded to whole
        billions, as headlines count them; below a billion they are not rounded.
      cache: bytes of cache per row, without those of what drafts and without padding.
      cache_v32: the same of DeepSeek-V3.2.
      cache_gqa: the same of as many layers of grouped-query attention: 8 heads of 128 channels in bfloat16.
    """

    context: int
    flops: float
    flops_v32: float
    headline_ratio: float
    cache: int
    cache_v32: int
    cache_gqa: int

    @property
    def flops_ratio(self) -> float:
        """FLOPs as a share of DeepSeek-V3.2's."""
        return self.flops / self.flops_v32

    @property
    def cache_ratio(self) -> float:
        """Cache as a share of DeepSeek-V3.2's."""
        return self.cache / self.cache_v32

    @property
    def gqa_ratio(self) -> float:
        """Cache as a share of grouped-query attention's."""
        return self.cache / self.cache_gqa


def compare(config: Architecture, context: int, dtype: str = "released") -> Comparison:
    """Sets a configuration beside DeepSeek-V3.2, as the technical report does at a million tokens.

    The report gives 27% of the FLOPs and 10% of the cache for Pro, 10% and 7% for Flash, and 2% of grouped-query
    attention's cache.

    Args:
      config: the architecture.
      context: tokens in the sequence.
      dtype: cache format. An entry counts 583 bytes in "released": 448 codes, 7 scales and 64 bfloat16 channels; the
        padding to the 640 that it takes in memory is left out.

    Raises:
      ValueError: as `init_cache`.
    """
    v32, cache = DeepSeekV32(), cache_bytes(config, context, dtype)
    flops = flops_per_token(config, context)
    active, active_v32 = sum(flops.linear.values()) / 2, v32.parameters()[1]
    rounded = flops.equivalent_fp8 + 2 * (_headline(active) - active)
    rounded_v32 = v32.equivalent_fp8_flops(context) + 2 * (_headline(active_v32) - active_v32)
    keys_and_values, gqa_heads, gqa_size, bf16 = 2, 8, 128, 2
    return Comparison(
        context,
        flops.equivalent_fp8,
        v32.equivalent_fp8_flops(context),
        rounded / rounded_v32,
        cache.trunk - cache.padding,
        v32.cache_bytes(context),
        config.num_hidden_layers * context * keys_and_values * gqa_heads * gqa_size * bf16,
    )


def _headline(parameters: float) -> float:
    """A parameter count in whole billions, where it has any; halves go down, as 37.5B is called 37B."""
    billions = parameters / 1e9
    return parameters if billions < 1 else math.ceil(billions - 0.5) * 1e9
