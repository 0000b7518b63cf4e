"""`v4-jax convert`, `export` and `verify`: checkpoints from one layout to another, and proof that nothing changed."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from v4_jax import checkpoint
from v4_jax.checkpoint import Comparison, Written
from v4_jax.cli.console import CommandError, bad_input, progress_bar, say, show
from v4_jax.cli.options import Count, Directory

_GB = 1e9


def convert(source: Directory, target: Directory, /) -> None:
    """Converts a released checkpoint to Orbax, one part per layer, in the released number formats.

    Nothing is rounded and nothing is expanded: the result is as large as the release, and `verify` finds no
    difference. Memory stays bounded by one layer. TARGET appears when it is complete; an interrupted run is continued
    by giving the same command again.

    Examples:
      v4-jax convert DeepSeek-V4-Flash flash-orbax
      v4-jax verify DeepSeek-V4-Flash flash-orbax

    Args:
      source: The released directory: config.json, model.safetensors.index.json and its shards.
      target: The directory to make.
    """
    _write(checkpoint.convert, source, target, "converting")


def export(source: Directory, target: Directory, /) -> None:
    """Writes a checkpoint in the released layout: safetensors shards, their index and config.json.

    What is held in the released formats is written bit for bit; a training run's newest complete step is rounded to
    them. TARGET appears when it is complete; an interrupted run is continued by giving the same command again.

    Examples:
      v4-jax export flash-orbax DeepSeek-V4-Flash-again
      v4-jax verify DeepSeek-V4-Flash DeepSeek-V4-Flash-again
      v4-jax export my-run my-model

    Args:
      source: A converted or released directory, a training run, or RUN/checkpoints/STEP for an older step of one.
      target: The directory to make.
    """
    _write(checkpoint.export, source, target, "exporting")


def verify(a: Directory, b: Directory, /, *, rows: Count = 20) -> int:
    """Compares two checkpoints tensor by tensor and bit by bit, a few megabytes at a time.

    Released and converted directories and training runs (as they would be exported) can be compared in any
    combination. The exit code is 0 if they hold the same configuration and the same tensors, and 1 if they differ.

    Examples:
      v4-jax verify DeepSeek-V4-Flash flash-orbax

    Args:
      a: A released or converted directory, or a training run.
      b: The directory to compare it with.
      rows: Most tensors that differ to list.
    """
    for path in (a, b):
        _require(path)
    with bad_input(), progress_bar("verifying") as report:
        comparison = checkpoint.verify(a, b, progress=report)
    show(kinds_table(comparison))
    if not comparison.equal:
        show(*_differences(comparison, rows))
    return 0 if comparison.equal else 1


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


def _differences(comparison: Comparison, limit: int) -> list[Table]:
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


def _write(action: Callable[..., Written], source: Path, target: Path, label: str) -> None:
    _require(source)
    started = time.perf_counter()
    with bad_input(), progress_bar(label) as report:
        written = action(source, target, progress=report)
    seconds = time.perf_counter() - started
    resumed = f", {written.resumed} parts of which an earlier run had finished" if written.resumed else ""
    say(
        f"wrote {written.path}: {written.tensors:,} tensors, {written.bytes / _GB:,.3f} GB in {seconds:.1f} s "
        f"({written.bytes / _GB / seconds:,.2f} GB/s){resumed}"
    )


def _require(path: Path) -> None:
    if not path.is_dir():
        raise CommandError(f"there is no directory {path}; expected a released or converted one, or a training run")
