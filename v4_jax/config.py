"""The architecture as data: one frozen `Config`, its presets, and its two-way mapping to the released `config.json`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from v4_jax import costs

AttentionRole = Literal["sliding", "csa", "hca"]
FeedForwardRole = Literal["hash", "routed"]

# `compress_ratios` entry -> attention role (technical report, section 2.3).
ROLE_OF_RATIO: dict[int, AttentionRole] = {0: "sliding", 4: "csa", 128: "hca"}
RATIO_OF_ROLE: dict[AttentionRole, int] = {role: ratio for ratio, role in ROLE_OF_RATIO.items()}


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
class Config:
    """DeepSeek-V4's architecture. Field names are those of the released `config.json`; all sizes count elements.

    `compress_ratios` has one entry per layer and one for each multi-token-prediction block after them.
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
    expert_dtype: Literal["fp4", "fp8"] = "fp4"
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self):
        problems = list(_mistyped(self)) or list(_problems(self))
        if problems:
            raise ConfigError("illegal configuration: " + "; ".join(problems))

    # ---- presets -----------------------------------------------------------------------------------------------------

    @classmethod
    def flash(cls) -> Config:
        """DeepSeek-V4-Flash: 284B parameters, 13B active."""
        return cls(
            vocab_size=129280,
            hidden_size=4096,
            moe_intermediate_size=2048,
            num_hidden_layers=43,
            num_attention_heads=64,
            head_dim=512,
            qk_rope_head_dim=64,
            q_lora_rank=1024,
            o_groups=8,
            o_lora_rank=1024,
            n_routed_experts=256,
            num_experts_per_tok=6,
            routed_scaling_factor=1.5,
            index_n_heads=64,
            index_head_dim=128,
            index_topk=512,
            compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
        )

    @classmethod
    def pro(cls) -> Config:
        """DeepSeek-V4-Pro: 1.6T parameters, 49B active."""
        return dataclasses.replace(
            cls.flash(),
            hidden_size=7168,
            moe_intermediate_size=3072,
            num_hidden_layers=61,
            num_attention_heads=128,
            q_lora_rank=1536,
            o_groups=16,
            n_routed_experts=384,
            routed_scaling_factor=2.5,
            index_topk=1024,
            compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
        )

    @classmethod
    def tiny(cls) -> Config:
        """Every role, both feed-forward kinds and the MTP block, in about 2M parameters."""
        return cls(
            vocab_size=512,
            hidden_size=128,
            moe_intermediate_size=64,
            num_hidden_layers=7,
            num_attention_heads=4,
            head_dim=128,
            qk_rope_head_dim=64,
            q_lora_rank=64,
            o_groups=2,
            o_lora_rank=64,
            n_routed_experts=8,
            num_experts_per_tok=2,
            routed_scaling_factor=1.5,
            index_n_heads=8,
            index_head_dim=64,
            index_topk=32,
            sliding_window=32,
            compress_ratios=(0, 0, 4, 128, 4, 128, 4, 0),
        )

    # ---- layer roles -------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Roles of the trunk's layers, in order."""
        return tuple(
            Layer(ROLE_OF_RATIO[ratio], "hash" if i < self.num_hash_layers else "routed")
            for i, ratio in enumerate(self.compress_ratios[: self.num_hidden_layers])
        )

    @property
    def mtp_layer(self) -> Layer:
        """Roles of the multi-token-prediction block."""
        return Layer("sliding", "routed")

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

    # ---- costs: implemented in `costs.py`, offered here because they are facts about a configuration -----------------

    def parameter_counts(self) -> costs.ParameterCounts:
        """See `v4_jax.costs.parameter_counts`."""
        from v4_jax import costs

        return costs.parameter_counts(self)

    def flops_per_token(self, context: int) -> costs.Flops:
        """See `v4_jax.costs.flops_per_token`."""
        from v4_jax import costs

        return costs.flops_per_token(self, context)

    def cache_bytes(self, context: int, dtype: str = "released") -> costs.CacheBytes:
        """See `v4_jax.costs.cache_bytes`."""
        from v4_jax import costs

        return costs.cache_bytes(self, context, dtype)

    # ---- config.json -------------------------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, source: str | Path | dict[str, Any]) -> Config:
        """Reads a released (or transformers-written) configuration.

        Args:
          source: a directory holding `config.json`, the file itself, or its parsed content.

        Raises:
          ConfigError: a missing or unknown field, or a value whose mathematics this model does not implement.
          FileNotFoundError: no such file.
        """
        return cls(**_fields_from_hf(_read(source)))

    def to_hf(self) -> dict[str, Any]:
        """The released `config.json` as a dictionary; `Config.from_hf(config.to_hf()) == config`."""
        fields = dataclasses.asdict(self)
        fields["compress_ratios"] = list(self.compress_ratios)
        fields["rope_scaling"] = {"type": "yarn", **fields["rope_scaling"]}
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            **{key: value for key, value in _FIXED.items() if key != "mlp_bias"},
            **fields,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "quantization_config": {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "scale_fmt": "ue8m0",
                "weight_block_size": [128, 128],
            },
        }


def _mistyped(config: Config):
    """Yields fields that hold something else than declared, one sentence fragment each."""

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        if field.type == "int" and not whole(value):
            yield f"{field.name} is {value!r}, expected a whole number"
        if field.type == "float" and not (whole(value) or isinstance(value, float)):
            yield f"{field.name} is {value!r}, expected a number"
    for ratio in config.compress_ratios:
        if not whole(ratio):
            yield f"compress_ratios contains {ratio!r}, expected whole numbers"
    for name, value in dataclasses.asdict(config.rope_scaling).items():
        if not (whole(value) or isinstance(value, float)):
            yield f"rope_scaling {name} is {value!r}, expected a number"


def _problems(config: Config):
    """Yields what is wrong with a configuration, one sentence fragment each."""
    positive = [f.name for f in dataclasses.fields(Config) if f.type in ("int", "float")]
    allowed_zero = {"num_hash_layers", "num_nextn_predict_layers", "bos_token_id", "eos_token_id"}
    for name in positive:
        value = getattr(config, name)
        if value < 0 or (value == 0 and name not in allowed_zero):
            yield f"{name} is {value}, expected a positive number"
            return
    wanted = config.num_hidden_layers + config.num_nextn_predict_layers
    if len(config.compress_ratios) != wanted:
        yield (
            f"compress_ratios has {len(config.compress_ratios)} entries, expected {wanted} "
            "(num_hidden_layers + num_nextn_predict_layers)"
        )
    for ratio in sorted(set(config.compress_ratios) - set(ROLE_OF_RATIO)):
        yield f"compress_ratios contains {ratio}, expected one of {sorted(ROLE_OF_RATIO)}"
    if any(config.compress_ratios[config.num_hidden_layers :]):
        yield "the MTP block's compress_ratios entry is not 0: it is a sliding-window block"
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


# Keys with exactly one value that this model computes. Anything else is refused: it would change the mathematics.
_FIXED: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "tie_word_embeddings": False,
}

# Keys that say nothing about the forward pass: provenance, storage, library bookkeeping, training-only or decoding
# defaults. The DSpark draft's keys belong to a module that loading skips by rule.
_INERT = frozenset(
    (
        *("architectures", "model_type", "auto_map", "_name_or_path", "name_or_path", "transformers_version"),
        *("torch_dtype", "dtype", "quantization_config", "torchscript", "use_cache", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "is_encoder_decoder", "pad_token_id"),
        *("return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("router_aux_loss_coef", "router_jitter_noise"),
        *("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank"),
    )
)

_LAYER_TYPES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def _read(source: str | Path | dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, expected an object")
    return content


def _fields_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Translates a `config.json` into `Config` fields, refusing whatever it does not understand."""
    hf = dict(hf)
    if hf.get("model_type", "deepseek_v4") != "deepseek_v4":
        raise ConfigError(f"model_type is {hf['model_type']!r}, expected 'deepseek_v4'")
    for key, legal in _FIXED.items():
        value = hf.pop(key, legal)
        if value != legal:
            raise ConfigError(f"{key} is {value!r}, expected {legal!r}: no other value is implemented")

    fields: dict[str, Any] = {**_rope_fields(hf), **_layer_fields(hf), **_rotary_width(hf)}
    quantization = hf.get("quantization_config") or {}
    block = quantization.get("weight_block_size", [128, 128])
    if list(block) != [128, 128]:
        raise ConfigError(f"quantization_config.weight_block_size is {block}, expected [128, 128]")

    known = {f.name: f for f in dataclasses.fields(Config)}
    for name in known:
        if name not in fields and name in hf:
            fields[name] = hf.pop(name)
        hf.pop(name, None)
    if fields.get("expert_dtype", "fp4") not in ("fp4", "fp8"):
        raise ConfigError(f"expert_dtype is {fields['expert_dtype']!r}, expected 'fp4' or 'fp8'")
    unknown = sorted(set(hf) - _INERT)
    if unknown:
        raise ConfigError(f"unknown configuration keys {unknown}: they may change the mathematics, so they are refused")
    missing = [
        name
        for name, field in known.items()
        if name not in fields and (field.default is dataclasses.MISSING or name in _NEVER_DEFAULT)
    ]
    if missing:
        raise ConfigError(f"missing configuration keys {missing}")
    return fields


# Optional in Python, but a released configuration that lacks one of these is damaged: defaults would guess.
_NEVER_DEFAULT = frozenset(
    (
        *("num_hash_layers", "swiglu_limit", "sliding_window", "hc_mult"),
        *("rope_theta", "compress_rope_theta", "rope_scaling"),
    )
)


def _rope_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters from either layout: released (`rope_scaling`) or transformers' `{main, compress}`."""
    nested = hf.pop("rope_parameters", None)
    flat = hf.pop("rope_scaling", None)
    if nested is None:
        nested, flat = (flat, None) if isinstance(flat, dict) and "compress" in flat else (None, flat)
    if nested is not None:
        if set(nested) - {"main", "compress"} or "compress" not in nested or "main" not in nested:
            raise ConfigError(f"rope parameters have the entries {sorted(nested)}, expected 'main' and 'compress'")
        main, compress = dict(nested["main"]), dict(nested["compress"])
        if (main.get("rope_type") or main.get("type") or "default") != "default":
            raise ConfigError("rope parameters 'main' must be of type 'default': sliding layers run without YaRN")
        # Both spellings may be present; the nested one is what transformers computes with.
        hf.pop("rope_theta", None), hf.pop("compress_rope_theta", None)
        return {
            "rope_theta": float(main["rope_theta"]),
            "compress_rope_theta": float(compress.pop("rope_theta")),
            "rope_scaling": _yarn(compress),
        }
    if flat is None:
        raise ConfigError(
            "no rotary scaling found: expected `rope_scaling` (YaRN) or rope parameters {main, compress}; "
            "without it the compressed layers would lose YaRN"
        )
    return {"rope_scaling": _yarn(dict(flat))}


def _rotary_width(hf: dict[str, Any]) -> dict[str, Any]:
    """`qk_rope_head_dim`, which transformers may only state as a fraction of the head."""
    fraction, head_dim = hf.pop("partial_rotary_factor", None), hf.get("head_dim", 0)
    width = hf.pop("qk_rope_head_dim", None)
    if fraction is not None and width is None:
        width = round(fraction * head_dim)
    if fraction is not None and width != fraction * head_dim:
        raise ConfigError(f"partial_rotary_factor {fraction} of head_dim {head_dim} is not qk_rope_head_dim {width}")
    return {} if width is None else {"qk_rope_head_dim": width}


def _yarn(values: dict[str, Any]) -> Yarn:
    kinds = {values.pop(key) for key in ("type", "rope_type") if key in values}
    if kinds != {"yarn"}:
        raise ConfigError(f"rope scaling type is {sorted(kinds)}, expected 'yarn'")
    for key, legal in (("attention_factor", 1.0), ("mscale", 1.0), ("mscale_all_dim", 1.0), ("truncate", True)):
        value = values.pop(key, None)
        if value is not None and value != legal:
            raise ConfigError(f"rope scaling {key} is {value}, expected {legal}: V4 applies no attention factor")
    values.pop("partial_rotary_factor", None)  # repeats qk_rope_head_dim / head_dim; applying it twice is a known bug
    names = {f.name for f in dataclasses.fields(Yarn)}
    if unknown := sorted(set(values) - names):
        raise ConfigError(f"unknown rope scaling keys {unknown}, expected {sorted(names)}")
    if missing := sorted(names - set(values)):
        raise ConfigError(f"rope scaling lacks {missing}")
    return Yarn(**values)


def _layer_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """Layer roles from `compress_ratios` or from transformers' `layer_types`; trailing draft entries are trimmed."""
    if "num_hidden_layers" not in hf:
        raise ConfigError("missing configuration keys ['num_hidden_layers']")
    count, mtp = hf["num_hidden_layers"], hf.get("num_nextn_predict_layers", 0)
    if type(count) is not int or type(mtp) is not int:
        raise ConfigError(
            f"num_hidden_layers is {count!r} and num_nextn_predict_layers is {mtp!r}, expected whole numbers"
        )
    types, kinds = hf.pop("layer_types", None), hf.pop("mlp_layer_types", None)
    rates = hf.pop("compress_rates", None) or {}
    for kind, rate in rates.items():
        if _LAYER_TYPES.get(kind) != rate:
            raise ConfigError(
                f"compress_rates gives {kind} {rate}, expected {_LAYER_TYPES.get(kind, 'no such layer type')}"
            )
    ratios = hf.pop("compress_ratios", None)
    if ratios is None:
        if types is None:
            raise ConfigError("missing configuration keys ['compress_ratios']")
        if unknown := sorted(set(types) - set(_LAYER_TYPES)):
            raise ConfigError(f"unknown layer_types {unknown}, expected {sorted(_LAYER_TYPES)}")
        ratios = [_LAYER_TYPES[kind] for kind in types] + [0] * mtp
    fields: dict[str, Any] = {"compress_ratios": tuple(ratios[: count + mtp]), "num_nextn_predict_layers": mtp}
    if any(ratios[count + mtp :]):
        raise ConfigError(f"compress_ratios has {len(ratios)} entries for {count} layers and {mtp} MTP blocks")
    if kinds is not None:
        hashed = sum(kind == "hash_moe" for kind in kinds)
        if list(kinds) != ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed):
            raise ConfigError(f"mlp_layer_types is {kinds}, expected hash_moe layers first and moe after them")
        if hf.setdefault("num_hash_layers", hashed) != hashed:
            raise ConfigError(
                f"num_hash_layers is {hf['num_hash_layers']}, but mlp_layer_types has {hashed} hash_moe layers"
            )
    return fields
