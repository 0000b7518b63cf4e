"""What a comparison of two checkpoints found, as tables."""

from __future__ import annotations

from rich.table import Table

from v4_jax.checkpoint import Comparison


def kinds_table(comparison: Comparison, title: str = "Tensors by format") -> Table:
    """A comparison's summary."""
    table = Table(title=title, title_justify="left", caption=_verdict(comparison), caption_justify="left")
    for i, column in enumerate(("format", "tensors", "bytes", "differing")):
        table.add_column(column, justify="right" if i else "left", no_wrap=True)
    for kind in comparison.kinds:
        table.add_row(kind.format, f"{kind.tensors:,}", f"{kind.bytes:,}", f"{kind.differing:,}")
    table.add_section()
    totals = [sum(kind[i] for kind in comparison.kinds) for i in (1, 2, 3)]
    table.add_row("total", *(f"{total:,}" for total in totals))
    return table


def differences(comparison: Comparison, limit: int) -> list[Table]:
    """What differs: fields of the configuration, and at most `limit` tensors."""
    tables = []
    if comparison.config:
        table = Table("field", "a", "b", title="Configuration", title_justify="left")
        for field, values in comparison.config.items():
            table.add_row(field, *map(str, values))
        tables.append(table)
    if comparison.differing:
        left_out = len(comparison.differing) - limit
        table = Table(
            title="Tensors that differ",
            title_justify="left",
            caption=f"and {left_out:,} more (--rows)" if left_out > 0 else None,
            caption_justify="left",
        )
        for column in ("tensor", "what", "in a", "in b", "largest difference"):
            table.add_column(column, overflow="fold")
        for row in comparison.differing[:limit]:
            absent = row.status in ("missing", "extra") and row.other_format is None
            held = ("", row.format) if row.status == "extra" and absent else (row.format, row.other_format or "")
            table.add_row(
                row.name, row.status, *held, "" if row.max_difference is None else f"{row.max_difference:.3g}"
            )
        tables.append(table)
    return tables


def _verdict(comparison: Comparison) -> str:
    tensors = sum(kind.tensors for kind in comparison.kinds)
    if comparison.equal:
        return f"all {tensors:,} tensors are equal, bit for bit"
    parts = []
    if comparison.differing:
        parts.append(f"{sum(kind.differing for kind in comparison.kinds):,} of {tensors:,} tensors differ")
    if comparison.config:
        parts.append(f"{len(comparison.config)} configuration fields differ")
    return ", ".join(parts)
