"""The architecture as data: sizes and layer roles, checked; `Config` adds where they come from and what they cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, Self

from v4_jax.json_files import shown

AttentionRole = Literal["sliding", "csa", "hca"]
FeedForwardRole = Literal["hash", "routed"]

# How the routed experts are stored: as released, as repackaged in NVFP4, or plain in a checkpoint that is all BF16.
ExpertDtype = Literal["fp4", "fp8", "nvfp4", "bf16"]
EXPERT_DTYPES: tuple[ExpertDtype, ...] = ("fp4", "fp8", "nvfp4", "bf16")

# `compress_ratios` entry -> attention role (technical report, section 2.3).
ROLE_OF_RATIO: dict[int, AttentionRole] = {0: "sliding", 4: "csa", 128: "hca"}
RATIO_OF_ROLE: dict[AttentionRole, int] = {role: ratio for ratio, role in ROLE_OF_RATIO.items()}


# What nobody will build, and what would take for ever to lay out: a field beyond is a damaged one.
MOST_LAYERS = 4096
_MOST = 1 << 24  # of any size or id but these
_MOST_OF = {"num_hidden_layers": MOST_LAYERS, "n_routed_experts": 65536, "hc_mult": 64, "hc_sinkhorn_iters": 1024}
_LEAST_NUMBER, _MOST_NUMBER = 1e-30, 2e9  # of fields that are no whole numbers, and may be written like ones of 32 bits


class ConfigError(ValueError):
    """A configuration that this model cannot compute faithfully."""


class Layer(NamedTuple):
    """Roles of one block: which attention it runs and how its tokens reach their experts."""

    attention: AttentionRole
    feed_forward: FeedForwardRole

    @property
    def ratio(self) -> int:
        """Tokens per compressed entry; 0 for a sliding layer."""
        return RATIO_OF_ROLE[self.attention]


class Period(NamedTuple):
    """Where the layer roles repeat: `repeats` copies of `length` layers, from layer `start` on."""

    start: int
    length: int
    repeats: int

    @property
    def stop(self) -> int:
        """The first layer after it."""
        return self.start + self.length * self.repeats

    def layers(self, repeat: int) -> range:
        """Layer numbers of one repeat."""
        return range(self.start + repeat * self.length, self.start + (repeat + 1) * self.length)


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN context extension of the compressed layers' rotary frequencies (no attention factor)."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclasses.dataclass(frozen=True)
class Architecture:
    """DeepSeek-V4's architecture. Field names are those of the released `config.json`; all sizes count elements.

    `compress_ratios` has one entry per layer and one for each block that drafts after them: a multi-token-prediction
    block, or the stages of DSpark (arXiv 2607.05147), which a model has if its `dspark_block_size`, the tokens that are
    drafted at once, is not 0. `num_nextn_predict_layers` counts the former alone, where the released `config.json` says
    1 for either.
    """

    vocab_size: int
    hidden_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    n_routed_experts: int
    num_experts_per_tok: int
    routed_scaling_factor: float
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    compress_ratios: tuple[int, ...]
    num_hash_layers: int = 3
    num_nextn_predict_layers: int = 1
    dspark_block_size: int = 0
    dspark_noise_token_id: int = 0
    dspark_target_layer_ids: tuple[int, ...] = ()
    dspark_markov_rank: int = 0
    sliding_window: int = 128
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    rope_scaling: Yarn = Yarn()
    max_position_embeddings: int = 1048576
    initializer_range: float = 0.02
    expert_dtype: ExpertDtype = "fp4"
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self):
        problems = list(_mistyped(self)) or list(_problems(self))
        if problems:
            raise ConfigError("illegal configuration: " + "; ".join(problems))

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Roles of the trunk's layers, in order."""
        return tuple(
            Layer(ROLE_OF_RATIO[ratio], "hash" if i < self.num_hash_layers else "routed")
            for i, ratio in enumerate(self.compress_ratios[: self.num_hidden_layers])
        )

    @property
    def draft_layer(self) -> Layer:
        """Roles of the multi-token-prediction block, and of DSpark's stages."""
        return Layer("sliding", "routed")

    @property
    def draft_blocks(self) -> int:
        """Blocks after the trunk's layers, of one kind or the other."""
        return len(self.compress_ratios) - self.num_hidden_layers

    @property
    def dspark_stages(self) -> int:
        """Blocks of DSpark, which run one after another; 0 without it."""
        return self.draft_blocks if self.dspark_block_size else 0

    def trunk(self) -> Self:
        """The same model without what drafts."""
        fields = dataclasses.fields(self)
        none: dict[str, Any] = {field.name: field.default for field in fields if field.name.startswith("dspark_")}
        layers = self.compress_ratios[: self.num_hidden_layers]
        return dataclasses.replace(self, num_nextn_predict_layers=0, compress_ratios=layers, **none)

    def with_stages(
        self, stages: int, *, block_size: int, noise_token: int, target_layers: Sequence[int], rank: int
    ) -> Self:
        """The same trunk with DSpark's stages in place of what drafts.

        Raises:
          ConfigError: stages that it cannot have.
        """
        return dataclasses.replace(
            self,
            num_nextn_predict_layers=0,
            compress_ratios=(*self.compress_ratios[: self.num_hidden_layers], *(0,) * stages),
            dspark_block_size=block_size,
            dspark_noise_token_id=noise_token,
            dspark_target_layer_ids=tuple(target_layers),
            dspark_markov_rank=rank,
        )

    def first_layers(self, count: int) -> Self:
        """The same model cut down to its first layers; DSpark's stages, which read later ones, are left out.

        Raises:
          ConfigError: it has not so many.
        """
        if not 1 <= count <= self.num_hidden_layers:
            raise ConfigError(f"{count} layers are asked for, expected 1 to {self.num_hidden_layers}, which are there")
        whole = self.trunk() if self.dspark_block_size else self
        drafts = whole.compress_ratios[whole.num_hidden_layers :]
        return dataclasses.replace(
            whole,
            num_hidden_layers=count,
            num_hash_layers=min(count, whole.num_hash_layers),
            compress_ratios=(*whole.compress_ratios[:count], *drafts),
        )

    @property
    def period(self) -> Period:
        """The repetition of roles that covers most layers, the shortest and earliest of equals.

        Fewer than two repeats are no period: `repeats` is then 0 and every layer stands alone.
        """
        layers = self.layers
        best = Period(len(layers), 1, 0)
        for length in range(1, len(layers) // 2 + 1):
            for start in range(len(layers) - 2 * length + 1):
                repeats = 1
                while (
                    layers[start : start + length] == layers[start + repeats * length : start + (repeats + 1) * length]
                ):
                    repeats += 1
                if repeats > 1 and length * repeats > best.length * best.repeats:
                    best = Period(start, length, repeats)
        return best

    @property
    def nope_head_dim(self) -> int:
        """Dimensions of a head that are not rotated (448 of 512)."""
        return self.head_dim - self.qk_rope_head_dim


def _mistyped(config: Architecture) -> Iterator[str]:
    """Yields fields that hold something else than declared, one sentence fragment each."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    for field in dataclasses.fields(Architecture):
        value = getattr(config, field.name)
        if field.type == "int" and not whole(value):
            yield f"{field.name} is {shown(value)}, expected a whole number"
        if field.type == "float" and not (whole(value) or isinstance(value, float)):
            yield f"{field.name} is {shown(value)}, expected a number"
    for name in ("compress_ratios", "dspark_target_layer_ids"):
        for value in getattr(config, name):
            if not whole(value):
                yield f"{name} contains {shown(value)}, expected whole numbers"
                break
    for name, value in dataclasses.asdict(config.rope_scaling).items():
        if not (whole(value) or isinstance(value, float)):
            yield f"rope_scaling {name} is {shown(value)}, expected a number"


_NUMBERS = {field.name for field in dataclasses.fields(Architecture) if field.type == "float"}


def _problems(config: Architecture) -> Iterator[str]:
    """Yields what is wrong with a configuration, one sentence fragment each."""
    positive = [f.name for f in dataclasses.fields(Architecture) if f.type in ("int", "float")]
    allowed_zero = {"num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id"}
    allowed_zero |= {name for name in positive if name.startswith("dspark_")}
    for name in positive:
        value = getattr(config, name)
        if value < 0 or (value == 0 and name not in allowed_zero):
            yield f"{name} is {shown(value)}, expected a positive number"
            return
        most: float = _MOST_OF.get(name, _MOST)
        if isinstance(value, float) or name in _NUMBERS:
            most = _MOST_NUMBER
        if name == "max_position_embeddings":
            most = 1 << 31
        if name in _NUMBERS and 0 < value < _LEAST_NUMBER:
            yield f"{name} is {shown(value)}, expected at least {_LEAST_NUMBER:g}"
            return
        if not value <= most:  # what is not a number is not either
            yield f"{name} is {shown(value)}, expected at most {most:,.0f}"
            return
    for name, value in dataclasses.asdict(config.rope_scaling).items():
        if not _LEAST_NUMBER <= value <= _MOST_NUMBER:
            yield f"rope_scaling {name} is {shown(value)}, expected a number from 1e-30 to {_MOST_NUMBER:,.0f}"
            return
    for name in ("rope_theta", "compress_rope_theta"):
        if getattr(config, name) <= 1:
            yield f"{name} is {shown(getattr(config, name))}, expected a number above 1"
            return
    if config.dspark_block_size:
        yield from _dspark_problems(config)
    elif config.draft_blocks != config.num_nextn_predict_layers:
        yield (
            f"compress_ratios has {len(config.compress_ratios)} entries, expected "
            f"{config.num_hidden_layers + config.num_nextn_predict_layers} (num_hidden_layers + "
            "num_nextn_predict_layers)"
        )
    for ratio in sorted(set(config.compress_ratios) - set(ROLE_OF_RATIO))[:1]:
        yield f"compress_ratios contains {shown(ratio)}, expected one of {sorted(ROLE_OF_RATIO)}"
    if any(config.compress_ratios[config.num_hidden_layers :]):
        yield "a draft block's compress_ratios entry is not 0: it is a sliding-window block"
    if config.num_nextn_predict_layers > 1:
        yield f"num_nextn_predict_layers is {config.num_nextn_predict_layers}, expected 0 or 1"
    if config.sliding_window < 2:
        yield f"sliding_window is {config.sliding_window}, expected at least 2"
    if config.qk_rope_head_dim % 2 or config.qk_rope_head_dim > config.head_dim:
        yield f"qk_rope_head_dim is {config.qk_rope_head_dim}, expected an even number up to head_dim {config.head_dim}"
    if config.index_head_dim < config.qk_rope_head_dim:
        yield f"index_head_dim is {config.index_head_dim}, expected at least qk_rope_head_dim {config.qk_rope_head_dim}"
    if config.num_attention_heads % config.o_groups:
        yield f"num_attention_heads {config.num_attention_heads} is not a multiple of o_groups {config.o_groups}"
    if config.num_experts_per_tok > config.n_routed_experts:
        yield f"num_experts_per_tok {config.num_experts_per_tok} exceeds n_routed_experts {config.n_routed_experts}"
    if config.num_hash_layers > config.num_hidden_layers:
        yield f"num_hash_layers {config.num_hash_layers} exceeds num_hidden_layers {config.num_hidden_layers}"


def _dspark_problems(config: Architecture) -> Iterator[str]:
    """Yields what is wrong with DSpark's fields."""
    if config.num_nextn_predict_layers:
        yield "a model has a multi-token-prediction block or DSpark stages, not both"
    if config.draft_blocks < 1:
        yield f"compress_ratios has no entries for DSpark's stages after those of {config.num_hidden_layers} layers"
    if config.dspark_markov_rank < 1:
        yield f"dspark_markov_rank is {config.dspark_markov_rank}, expected a positive number"
    if config.dspark_noise_token_id >= config.vocab_size:
        yield f"dspark_noise_token_id is {config.dspark_noise_token_id}, expected one below {config.vocab_size}"
    targets = config.dspark_target_layer_ids
    if not targets or list(targets) != sorted({*targets} & {*range(config.num_hidden_layers)}):
        yield (
            f"dspark_target_layer_ids is {list(targets)}, expected rising numbers of layers below "
            f"{config.num_hidden_layers}"
        )
