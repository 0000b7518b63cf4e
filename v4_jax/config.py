"""`v4_jax.Config`: an architecture with its presets, its two-way mapping to the released `config.json`, its costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from v4_jax import costs
from v4_jax.architecture import EXPERT_DTYPES, MOST_LAYERS, Architecture, ConfigError, Yarn
from v4_jax.json_files import read_object, shown


@dataclasses.dataclass(frozen=True)
class Config(Architecture):
    """DeepSeek-V4's architecture; the fields are those of `Architecture`."""

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
    def flash_0731(cls) -> Config:
        """DeepSeek-V4-Flash-0731, the official release: Flash with DSpark stages in place of the MTP block."""
        return cls.flash()._with_dspark(rank=256)

    @classmethod
    def pro_0813(cls) -> Config:
        """DeepSeek-V4-Pro-0813, the official release: Pro with DSpark stages in place of the MTP block."""
        return cls.pro()._with_dspark(rank=512)

    def _with_dspark(self, rank: int) -> Config:
        """Three stages on the last three layers, as in the official releases."""
        layers = self.num_hidden_layers
        return self.with_stages(
            _RELEASED_STAGES, block_size=5, noise_token=128799, target_layers=range(layers - 3, layers), rank=rank
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

    # ---- costs -------------------------------------------------------------------------------------------------------

    def parameter_counts(self) -> costs.ParameterCounts:
        """See `v4_jax.costs.parameter_counts`."""
        return costs.parameter_counts(self)

    def flops_per_token(self, context: int) -> costs.Flops:
        """See `v4_jax.costs.flops_per_token`."""
        return costs.flops_per_token(self, context)

    def draft_flops(self) -> int:
        """See `v4_jax.costs.draft_flops`."""
        return costs.draft_flops(self)

    def cache_bytes(self, context: int, dtype: str = "released") -> costs.CacheBytes:
        """See `v4_jax.costs.cache_bytes`."""
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
        fields["dspark_target_layer_ids"] = list(self.dspark_target_layer_ids)
        if self.dspark_stages:
            fields["num_nextn_predict_layers"] = 1
        else:
            fields = {key: value for key, value in fields.items() if key not in _DSPARK}
        fields["rope_scaling"] = {"type": "yarn", **fields["rope_scaling"]}
        plain = self.expert_dtype == "bf16"  # nothing is quantised
        return {
            "architectures": ["DeepseekV4ForCausalLM"],
            "model_type": "deepseek_v4",
            **{key: value for key, value in _FIXED.items() if key != "mlp_bias"},
            **fields,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            **({} if plain else {"quantization_config": dict(QUANTIZATION)}),
        }


# How the releases describe their number formats, beside `expert_dtype`.
QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}

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

# What GPT-style configurations call the same; tools write them beside or in place of ours.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_inner": "moe_intermediate_size",
    "n_positions": "max_position_embeddings",
    "n_ctx": "max_position_embeddings",
    "activation_function": "hidden_act",
    "layer_norm_epsilon": "rms_norm_eps",
}

# Keys that say nothing about the forward pass: provenance, storage, library bookkeeping, training-only or decoding
# defaults.
_INERT = frozenset(
    (
        *("architectures", "model_type", "auto_map", "_name_or_path", "name_or_path", "transformers_version"),
        *("torch_dtype", "dtype", "quantization_config", "torchscript", "use_cache", "chunk_size_feed_forward"),
        *("id2label", "label2id", "problem_type", "is_encoder_decoder", "pad_token_id"),
        *("return_dict", "output_attentions", "output_hidden_states", "output_router_logits"),
        *("router_aux_loss_coef", "router_jitter_noise", "gradient_checkpointing", "is_decoder", "add_cross_attention"),
        *("attn_implementation", "resid_pdrop", "embd_pdrop", "attn_pdrop", "summary_type", "tokenizer_class"),
        *("do_sample", "temperature", "top_k", "top_p", "task_specific_params"),
        # What tools that fine-tune, quantise or store models write down about themselves.
        *("unsloth_fixed", "unsloth_version", "_attn_implementation", "_attn_implementation_autoset", "peft_version"),
        *("_commit_hash", "_from_model_config", "trl_version", "sentence_transformers", "finetuning_task"),
    )
)

# Given all together, or not at all.
_DSPARK = ("dspark_block_size", "dspark_noise_token_id", "dspark_target_layer_ids", "dspark_markov_rank")
_RELEASED_STAGES = 3  # for which `config.json` has no key but the trailing entries of compress_ratios

_LAYER_TYPES = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


# Fields that are no numbers or words.
_KINDS: dict[str, Any] = {
    **dict.fromkeys(("rope_parameters", "rope_scaling", "quantization_config", "compress_rates"), dict),
    **dict.fromkeys(("compress_ratios", "layer_types", "mlp_layer_types", "dspark_target_layer_ids"), list | tuple),
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(source: str | Path | dict[str, Any]) -> dict[str, Any]:
    if isinstance(source, dict):
        return source
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    return read_object(path, ConfigError)


def _fields_from_hf(hf: dict[str, Any]) -> dict[str, Any]:
    """Translates a `config.json` into `Config` fields, refusing whatever it does not understand."""
    hf = dict(hf)
    for key, kind in _KINDS.items():
        if hf.get(key) is not None and not isinstance(hf[key], kind):
            expected = "an object" if kind is dict else "a list"
            raise ConfigError(f"{key} is {shown(hf[key])}, expected {expected}")
    for key, name in _ALIASES.items():
        value = hf.pop(key, None)
        if value is not None and hf.setdefault(name, value) != value:
            raise ConfigError(f"{key} is {shown(value)}, but {name}, which it repeats, is {shown(hf[name])}")
    if hf.get("model_type", "deepseek_v4") != "deepseek_v4":
        raise ConfigError(f"model_type is {shown(hf['model_type'])}, expected 'deepseek_v4'")
    for key, legal in _FIXED.items():
        value = hf.pop(key, legal)
        if value != legal:
            raise ConfigError(f"{key} is {shown(value)}, expected {legal!r}: no other value is implemented")

    fields: dict[str, Any] = {**_rope_fields(hf), **_dspark_fields(hf), **_rotary_width(hf)}
    fields |= _layer_fields(hf, bool(fields.get("dspark_block_size")))
    quantization = hf.get("quantization_config") or {}
    block = quantization.get("weight_block_size")
    if block is not None and block != [128, 128]:
        raise ConfigError(f"quantization_config.weight_block_size is {shown(block)}, expected [128, 128]")

    known = {f.name: f for f in dataclasses.fields(Config)}
    for name in known:
        if name not in fields and name in hf:
            fields[name] = hf.pop(name)
        hf.pop(name, None)
    for name in ("bos_token_id", "eos_token_id"):
        value = fields.get(name)
        if isinstance(value, list) and value:  # all of them end an answer, and the first one is written
            fields[name] = value[0]
        if name in fields and value is None:
            del fields[name]
    if fields.get("expert_dtype", "fp4") not in EXPERT_DTYPES:
        legal = ", ".join(EXPERT_DTYPES)
        raise ConfigError(f"expert_dtype is {shown(fields['expert_dtype'])}, expected one of {legal}")
    unknown = sorted(set(hf) - _INERT)
    if unknown:
        raise ConfigError(
            f"unknown configuration keys {shown(unknown)}: they may change the mathematics, so they are refused"
        )
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
            raise ConfigError(
                f"rope parameters have the entries {shown(sorted(nested))}, expected 'main' and 'compress'"
            )
        for name, part in nested.items():
            if not isinstance(part, dict):
                raise ConfigError(f"rope parameters '{name}' are {shown(part)}, expected an object")
            if part.get("rope_theta") is None:  # as some tools write it: once, beside them
                part = {**part, "rope_theta": hf.get("rope_theta" if name == "main" else "compress_rope_theta")}
            if not _is_number(part["rope_theta"]):
                raise ConfigError(
                    f"rope parameters '{name}' have rope_theta {shown(part['rope_theta'])}, expected a number"
                )
            nested = {**nested, name: part}
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
    if fraction is not None and not (_is_number(fraction) and 0 < fraction <= 1 and type(head_dim) is int):
        raise ConfigError(
            f"partial_rotary_factor is {shown(fraction)}, expected a fraction of head_dim {shown(head_dim)}"
        )
    if fraction is not None and width is None:
        width = round(fraction * head_dim)
    if fraction is not None and width != fraction * head_dim:
        raise ConfigError(f"partial_rotary_factor {fraction} of head_dim {head_dim} is not qk_rope_head_dim {width}")
    return {} if width is None else {"qk_rope_head_dim": width}


def _yarn(values: dict[str, Any]) -> Yarn:
    kinds = [values.pop(key) for key in ("type", "rope_type") if key in values]
    if not kinds or any(kind != "yarn" for kind in kinds):
        raise ConfigError(f"rope scaling type is {shown(kinds)}, expected 'yarn'")
    for key, legal in (("attention_factor", 1.0), ("mscale", 1.0), ("mscale_all_dim", 1.0), ("truncate", True)):
        value = values.pop(key, None)
        if value is not None and value != legal:
            raise ConfigError(f"rope scaling {key} is {shown(value)}, expected {legal}: V4 applies no attention factor")
    values.pop("partial_rotary_factor", None)  # repeats qk_rope_head_dim / head_dim; applying it twice is a known bug
    names = {f.name for f in dataclasses.fields(Yarn)}
    if unknown := sorted(set(values) - names):
        raise ConfigError(f"unknown rope scaling keys {shown(unknown)}, expected {sorted(names)}")
    if missing := sorted(names - set(values)):
        raise ConfigError(f"rope scaling lacks {missing}")
    return Yarn(**values)


def _dspark_fields(hf: dict[str, Any]) -> dict[str, Any]:
    """What describes DSpark's stages; empty without them."""
    fields = {key: hf.pop(key) for key in _DSPARK if key in hf}
    if not fields.get("dspark_block_size"):
        return {}
    if missing := [key for key in _DSPARK if key not in fields]:
        raise ConfigError(f"missing configuration keys {missing}, which a model with DSpark stages has")
    if not isinstance(fields["dspark_target_layer_ids"], list | tuple):
        raise ConfigError(f"dspark_target_layer_ids is {shown(fields['dspark_target_layer_ids'])}, expected a list")
    return fields | {"dspark_target_layer_ids": tuple(fields["dspark_target_layer_ids"])}


def _layer_fields(hf: dict[str, Any], dspark: bool) -> dict[str, Any]:
    """Layer roles from `compress_ratios` or from transformers' `layer_types`; surplus draft entries are trimmed."""
    if "num_hidden_layers" not in hf:
        raise ConfigError("missing configuration keys ['num_hidden_layers']")
    count, mtp = hf["num_hidden_layers"], hf.get("num_nextn_predict_layers", 0)
    if type(count) is not int or type(mtp) is not int:
        raise ConfigError(
            f"num_hidden_layers is {shown(count)} and num_nextn_predict_layers is {shown(mtp)}, expected whole numbers"
        )
    if not 0 < count <= MOST_LAYERS or not 0 <= mtp <= MOST_LAYERS:
        raise ConfigError(
            f"num_hidden_layers is {shown(count)} and num_nextn_predict_layers is {shown(mtp)}, expected 1 to "
            f"{MOST_LAYERS} and 0 or 1"
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
        if unknown := [kind for kind in types if not isinstance(kind, str) or kind not in _LAYER_TYPES]:
            raise ConfigError(f"unknown layer_types {shown(unknown)}, expected {sorted(_LAYER_TYPES)}")
        ratios = [_LAYER_TYPES[kind] for kind in types] + [0] * (_RELEASED_STAGES if dspark else mtp)
    mtp, blocks = (0, len(ratios) - count) if dspark else (mtp, mtp)
    fields: dict[str, Any] = {"compress_ratios": tuple(ratios[: count + blocks]), "num_nextn_predict_layers": mtp}
    if any(ratios[count + blocks :]):
        raise ConfigError(f"compress_ratios has {len(ratios)} entries for {count} layers and {mtp} MTP blocks")
    if kinds is not None:
        hashed = sum(kind == "hash_moe" for kind in kinds)
        if list(kinds) != ["hash_moe"] * hashed + ["moe"] * (len(kinds) - hashed):
            raise ConfigError(f"mlp_layer_types is {shown(kinds)}, expected hash_moe layers first and moe after them")
        if hf.setdefault("num_hash_layers", hashed) != hashed:
            raise ConfigError(
                f"num_hash_layers is {hf['num_hash_layers']}, but mlp_layer_types has {hashed} hash_moe layers"
            )
    return fields
