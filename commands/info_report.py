"""The model card: layers, parameters, FLOPs and cache of a configuration, and how they compare with DeepSeek-V3.2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from v4_jax import costs
from v4_jax.chat import MODES, PROFILES, EffortProfile, Mode, effort_prefix
from v4_jax.commands.shared.sizes import bytes_text, format_size, operations_text, scaled, share_text
from v4_jax.config import Config


def as_json(config: Config, context: int, profile: EffortProfile | None = None) -> dict[str, Any]:
    """The model card as plain numbers: counts of parameters, FLOPs per token and bytes.

    Args:
      config: the architecture.
      context: tokens in the sequence, for FLOPs and cache.
      profile: what the model takes its reasoning efforts for; None if nothing says so.

    Raises:
      ValueError: a context that no cache can hold.
    """
    period = config.period
    counts, cache = costs.parameter_counts(config), _cache(config, context)
    against = costs.compare(config, context, cache.dtype)
    return {
        "context": context,
        "layers": {
            "count": len(config.layers),
            "attention": dict(Counter(layer.attention for layer in config.layers)),
            "feed_forward": dict(Counter(layer.feed_forward for layer in config.layers)),
            "period": {
                "start": period.start,
                "repeats": period.repeats,
                "attention": [config.layers[i].attention for i in period.layers(0)] if period.repeats else [],
            },
        },
        "parameters": {**counts._asdict(), "checkpoint": counts.checkpoint},
        "bytes": {
            dtype: {"total": size.total, "draft": size.draft, "by_format": size.by_format}
            for dtype, size in (("native", costs.parameter_bytes(config)), ("bfloat16", _bfloat16(config)))
        },
        "flops_per_token": {
            phase: {
                "linear": flops.linear,
                "attention": flops.attention,
                "index": flops.index,
                "total": flops.total,
                "equivalent_fp8": flops.equivalent_fp8,
            }
            for phase, flops in _flops(config, context).items()
        },
        "flops_per_draft": costs.draft_flops(config),
        "cache_bytes": {
            "dtype": cache.dtype,
            "by_role": cache.by_role,
            "per_token": cache.per_token,
            "total": cache.total,
        },
        "comparison": {
            **against._asdict(),
            "flops_ratio": against.flops_ratio,
            "headline_flops_ratio": against.headline_ratio,
            "cache_ratio": against.cache_ratio,
            "gqa_ratio": against.gqa_ratio,
        },
        "efforts": {
            "profile": profile,
            "instruction_bytes": {
                one: {mode: len(_instruction(mode, one).encode()) for mode in MODES} for one in PROFILES
            },
        },
    }


def render(config: Config, context: int, profile: EffortProfile | None = None) -> RenderableType:
    """The model card as tables; see `as_json`."""
    cache = _cache(config, context)
    tables = (
        _layer_table(config),
        _parameter_table(config),
        _flops_table(config, context),
        _cache_table(cache, context),
        _comparison_table(costs.compare(config, context, cache.dtype)),
        _effort_table(profile),
    )
    return Group(*tables)


# ---- tables ----------------------------------------------------------------------------------------------------------


def _layer_table(config: Config) -> Table:
    period, layers = config.period, config.layers
    caption = "no roles repeat"
    if period.repeats:
        roles = ", ".join(layers[i].attention for i in period.layers(0))
        caption = f"layers {period.start} to {period.stop - 1}: ({roles}) x {period.repeats}, run as one scan"
    table = make_table(f"{len(layers)} layers", "role", "layers", "which", caption=caption)
    for kind in ("attention", "feed_forward"):
        for role in dict.fromkeys(getattr(layer, kind) for layer in layers):
            which = [i for i, layer in enumerate(layers) if getattr(layer, kind) == role]
            table.add_row(f"{kind.replace('_', '-')}: {role}", str(len(which)), _ranges(which))
    if config.draft_blocks:
        block, first = config.draft_layer, len(layers)
        numbers = _ranges(list(range(first, first + config.draft_blocks)))
        table.add_row(f"{_drafts(config)}: {block.attention}, {block.feed_forward}", str(config.draft_blocks), numbers)
    return table


def _parameter_table(config: Config) -> Table:
    counts, native, plain = costs.parameter_counts(config), costs.parameter_bytes(config), _bfloat16(config)
    table = make_table("Parameters", "", "count", "as released", "bfloat16")
    table.add_row(
        "trunk", _count(counts.total), bytes_text(native.total - native.draft), bytes_text(plain.total - plain.draft)
    )
    table.add_row("  active per token", _count(counts.active), "", "")
    drafts = _count(counts.draft), bytes_text(native.draft), bytes_text(plain.draft)
    table.add_row(_drafts(config), *drafts, end_section=True)
    table.add_row("checkpoint", _count(counts.checkpoint), bytes_text(native.total), bytes_text(plain.total))
    for name, _ in _largest_first(plain.by_format | native.by_format):
        held = [bytes_text(sizes[name]) if name in sizes else "" for sizes in (native.by_format, plain.by_format)]
        table.add_row(f"  {name}", "", *held)
    return table


def _flops_table(config: Config, context: int) -> Table:
    flops = _flops(config, context)
    decode, prefill = flops["decode"], flops["prefill"]
    table = make_table(
        f"FLOPs per token at {format_size(context)} tokens",
        *("", "decoding", "prefill, mean"),
        caption="FP8 equivalent: attention core twice, index scores half",
    )
    for role, value in _largest_first(decode.linear):
        table.add_row(f"linear: {role}", operations_text(value), operations_text(prefill.linear[role]))
    for role, value in decode.attention.items():
        table.add_row(f"attention core: {role}", operations_text(value), operations_text(prefill.attention[role]))
    table.add_row("index scores", operations_text(decode.index), operations_text(prefill.index), end_section=True)
    table.add_row("total", operations_text(decode.total), operations_text(prefill.total))
    table.add_row("FP8 equivalent", operations_text(decode.equivalent_fp8), operations_text(prefill.equivalent_fp8))
    if config.draft_blocks:
        drafts = f"{config.dspark_block_size} tokens" if config.dspark_stages else "1 token"
        table.add_section()
        table.add_row(f"drafting {drafts}", operations_text(costs.draft_flops(config)), "")
    return table


def _drafts(config: Config) -> str:
    """What drafts, by name."""
    return "DSpark stages" if config.dspark_stages else "MTP block"


def _cache_table(cache: costs.CacheBytes, context: int) -> Table:
    title = f"Cache per row at {format_size(context)} tokens, {cache.dtype} format"
    table = make_table(title, "", "held", "bytes per further token")
    for role, size in _largest_first(cache.by_role):
        per_token = f"{cache.per_token[role]:,.1f}" if role in cache.per_token else "constant"
        table.add_row(role, bytes_text(size), per_token)
    table.add_section()
    table.add_row("total", bytes_text(cache.total), f"{sum(cache.per_token.values()):,.1f}")
    return table


def _comparison_table(against: costs.Comparison) -> Table:
    table = make_table(
        f"Against others at {format_size(against.context)} tokens",
        *("", "FLOPs per token", "V4 needs", "cache per row", "V4 needs"),
        caption="FLOPs of decoding one token, FP8 equivalent; cache without that of drafts and without padding",
    )
    table.add_row("V4, this configuration", operations_text(against.flops), "", bytes_text(against.cache), "")
    shares = share_text(against.flops_ratio), share_text(against.cache_ratio)
    table.add_row(
        "DeepSeek-V3.2", operations_text(against.flops_v32), shares[0], bytes_text(against.cache_v32), shares[1]
    )
    table.add_row("  by active parameters in whole billions", "", share_text(against.headline_ratio), "", "")
    table.add_row("8 KV heads x 128, bfloat16", "", "", bytes_text(against.cache_gqa), share_text(against.gqa_ratio))
    return table


def _effort_table(profile: EffortProfile | None) -> Table:
    says = "nothing in the directory says which of the two it is" if profile is None else f"this model is of {profile}"
    table = make_table("Modes of answering a chat", "mode", *PROFILES, caption=f"by effort profile; {says}")
    for mode, how in MODES.items():
        if how.thinking_mode == "chat":
            table.add_row(mode, *["no reasoning"] * len(PROFILES))
            continue
        said = [len(_instruction(mode, one).encode()) for one in PROFILES]
        table.add_row(mode, *(f"reasoning, {size} bytes of instruction" if size else "reasoning" for size in said))
    return table


def _instruction(mode: Mode, profile: EffortProfile) -> str:
    """What stands in front of a chat."""
    return effort_prefix(MODES[mode].reasoning_effort, profile)


def make_table(title: str, *columns: str, caption: str | None = None) -> Table:
    """A table whose first column holds names and whose others hold numbers."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=i == 0)
    return table


# ---- numbers ---------------------------------------------------------------------------------------------------------


def _flops(config: Config, context: int) -> dict[str, costs.Flops]:
    return {
        "decode": costs.flops_per_token(config, context),
        "prefill": costs.flops_per_token(config, context, phase="prefill"),
    }


def _bfloat16(config: Config) -> costs.ParameterBytes:
    return costs.parameter_bytes(config, "bfloat16")


def _cache(config: Config, context: int) -> costs.CacheBytes:
    """Cache bytes in the released formats, or in bfloat16 where the head sizes do not suit them."""
    try:
        return costs.cache_bytes(config, context, "released")
    except ValueError:
        return costs.cache_bytes(config, context, "bfloat16")  # a bad context raises again


def _largest_first(sizes: Mapping[str, int]) -> Iterable[tuple[str, int]]:
    return sorted(sizes.items(), key=lambda item: -item[1])


def _count(value: float) -> str:
    return scaled(value, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)))


def _ranges(numbers: list[int]) -> str:
    """Rising numbers as runs of equal steps: "0, 1, 3 to 41 by 2"."""
    parts: list[str] = []
    start = 0
    while start < len(numbers):
        stop = start + 1
        while stop < len(numbers) and numbers[stop] - numbers[stop - 1] == numbers[start + 1] - numbers[start]:
            stop += 1
        if stop - start < 3:
            stop = start + 1
            parts.append(str(numbers[start]))
        else:
            step = numbers[start + 1] - numbers[start]
            parts.append(f"{numbers[start]} to {numbers[stop - 1]}" + (f" by {step}" if step > 1 else ""))
        start = stop
    return ", ".join(parts)
