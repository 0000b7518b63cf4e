"""Comparing two checkpoints tensor by tensor, in bounded memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from v4_jax.checkpoint.block_formats import BlockFormat, dequantise, scale_name, stored_as
from v4_jax.checkpoint.digests import DIGESTS, Digests
from v4_jax.checkpoint.interface import Checkpoint, Progress, row_ranges
from v4_jax.checkpoint.opening import Source, opened
from v4_jax.checkpoint.released import Released
from v4_jax.checkpoint.tensors import TensorInfo

Status = Literal["equal", "different", "dtype", "shape", "missing", "extra"]


class TensorComparison(NamedTuple):
    """One tensor of either checkpoint; the scales of a block-scaled weight count with the weight.

    Attributes:
      name: released name.
      status: "equal" bit for bit; "different" values; another "dtype" or "shape"; "missing" from b; "extra" in b.
      format: how a (or b, where a lacks it) stores it.
      other_format: how b stores it; None unless both have it.
      tensors: 2 with scales, else 1.
      bytes: size in a (or b).
      max_difference: largest absolute difference of the decoded values; 0 for equal bits, None if not comparable.
    """

    name: str
    status: Status
    format: str
    other_format: str | None
    tensors: int
    bytes: int
    max_difference: float | None


class Kind(NamedTuple):
    """All tensors of one format."""

    format: str
    tensors: int
    bytes: int
    differing: int


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The outcome of `verify`.

    Attributes:
      rows: one for each tensor of either side.
      config: fields of the configurations that differ: name -> (value in a, value in b).
      ignored: tensors that a rule left out: "a" or "b" -> rule -> number.
    """

    rows: tuple[TensorComparison, ...]
    config: dict[str, tuple[object, object]]
    ignored: dict[str, dict[str, int]]

    @property
    def equal(self) -> bool:
        """Whether both hold the same configuration and the same tensors, bit for bit."""
        return not self.config and not self.differing

    @property
    def differing(self) -> tuple[TensorComparison, ...]:
        """The rows that are not equal."""
        return tuple(row for row in self.rows if row.status != "equal")

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Tensors, bytes and differing tensors by storage format."""
        formats: dict[str, list[TensorComparison]] = {}
        for row in self.rows:
            formats.setdefault(row.format, []).append(row)
        return tuple(
            Kind(
                name,
                sum(row.tensors for row in rows),
                sum(row.bytes for row in rows),
                sum(row.tensors for row in rows if row.status != "equal"),
            )
            for name, rows in formats.items()
        )


def verify(a: Source, b: Source, *, progress: Progress | None = None) -> Comparison:
    """Compares two checkpoints of any kind, a few megabytes at a time.

    Neither has to hold what its configuration says: what one side lacks is a finding, not an error.

    Args:
      a: a released or converted directory, a training run or one of its steps, or (config, params).
      b: what to compare it with.
      progress: called as progress(tensor, done bytes, total bytes).

    Returns:
      Every tensor with its outcome.

    Raises:
      CheckpointError: a directory that cannot be read at all.
    """
    with opened(a, strict=False) as first, opened(b, strict=False) as second:
        names = dict.fromkeys((*first.tensors, *second.tensors))  # in order, each once
        weights = [name for name in names if not (name.endswith(".scale") and weight_name(name) in names)]
        total = sum(_Stored.of(first, name).bytes or _Stored.of(second, name).bytes for name in weights)
        rows: list[TensorComparison] = []
        done = 0
        for name in weights:
            rows.append(_compare(_Stored.of(first, name), _Stored.of(second, name)))
            done += rows[-1].bytes
            if progress:
                progress(name, done, total)
        config = {
            field.name: (getattr(first.config, field.name), getattr(second.config, field.name))
            for field in dataclasses.fields(first.config)
            if getattr(first.config, field.name) != getattr(second.config, field.name)
        }
        ignored = {
            side: {rule: len(dropped) for rule, dropped in checkpoint.ignored.items()}
            for side, checkpoint in (("a", first), ("b", second))
        }
        return Comparison(tuple(rows), config, ignored)


def weight_name(scale: str) -> str:
    """Released name of the weight that `<linear>.scale` belongs to."""
    return scale.removesuffix(".scale") + ".weight"


class _Stored(NamedTuple):
    """A tensor as one side holds it: with its scales, if it has them."""

    checkpoint: Checkpoint
    name: str
    info: TensorInfo | None
    scales: TensorInfo | None

    @classmethod
    def of(cls, checkpoint: Checkpoint, name: str) -> _Stored:
        scales = checkpoint.tensors.get(scale_name(name)) if name.endswith(".weight") else None
        return cls(checkpoint, name, checkpoint.tensors.get(name), scales)

    @property
    def tensors(self) -> int:
        return (self.info is not None) + (self.scales is not None)

    @property
    def bytes(self) -> int:
        return sum(info.nbytes for info in (self.info, self.scales) if info)

    @property
    def form(self) -> BlockFormat | None:
        """The block format, for weights with scales."""
        return stored_as(self.info, self.scales) if self.info and self.scales else None

    @property
    def format(self) -> str:
        """A short name of how it is stored."""
        if self.form and self.scales:
            element = "E4M3" if self.form.packing == 1 else "E2M1"
            rows, columns = self.form.block
            return f"{element} + {self.scales.dtype.removeprefix('F8_')} per {rows}x{columns}"
        return " + ".join(info.dtype for info in (self.info, self.scales) if info)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in elements."""
        shape = self.info.shape if self.info else ()
        return (*shape[:-1], shape[-1] * self.form.packing) if self.form else shape

    def read(self, rows: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """A range of rows as stored, with the scales of their blocks."""
        values = self.checkpoint.read(self.name, rows)
        if self.scales is None:
            return values, None
        block = self.form.block[0] if self.form else 1
        return values, self.checkpoint.read(scale_name(self.name), slice(rows.start // block, -(-rows.stop // block)))

    def decode(self, values: np.ndarray, scales: np.ndarray | None) -> np.ndarray:
        """What was read, as numbers that can be subtracted."""
        if self.form is None or scales is None:
            return values.astype(np.float64)
        return dequantise(values, scales, self.form)


def _compare(a: _Stored, b: _Stored) -> TensorComparison:
    def row(status: Status, difference: float | None) -> TensorComparison:
        held, other = (a, b) if a.info else (b, a)
        other_format = other.format if other.info else None
        return TensorComparison(a.name, status, held.format, other_format, held.tensors, held.bytes, difference)

    if a.info is None or b.info is None:
        return row("extra" if a.info is None else "missing", None)
    if a.shape != b.shape:
        return row("shape", None)
    equal, difference = _compare_values(a, b)
    if (a.info.dtype == b.info.dtype) and (a.scales is None) != (b.scales is None):
        return row("extra" if a.scales is None else "missing", None)
    if a.format != b.format:
        return row("dtype", difference)
    return row("equal" if equal else "different", difference)


def _compare_values(a: _Stored, b: _Stored) -> tuple[bool, float]:
    """Whether two tensors of the same shape have the same bytes, and the largest difference of their values."""
    assert a.info is not None and b.info is not None
    equal, largest = True, 0.0
    widest = max(a.info, b.info, key=lambda info: info.nbytes)
    # Ranges begin at blocks, so that each can be decoded by itself.
    for rows in row_ranges(widest, multiple=128):
        left, right = a.read(rows), b.read(rows)
        if all(_same_bytes(x, y) for x, y in zip(left, right, strict=True)):
            continue
        equal = False
        x, y = a.decode(*left), b.decode(*right)
        with np.errstate(all="ignore"):
            difference = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        largest = max(largest, float(np.max(np.nan_to_num(difference, nan=np.inf), initial=0.0)))
    return equal, largest


def _same_bytes(x: np.ndarray | None, y: np.ndarray | None) -> bool:
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and x.tobytes() == y.tobytes()


class Checked(NamedTuple):
    """What became of a directory since it was written.

    Attributes:
      digests: how many directories of arrays have digests.
      without: how many have none: nothing is known of their data.
      damaged: names of the tensors and files that are not as they were written.
    """

    digests: int
    without: int
    damaged: list[str]


def check(path: str | Path, *, progress: Progress | None = None) -> Checked:
    """Opens a directory, so that every header is checked, and compares its data with the digests written with it.

    Args:
      path: a converted directory, a training run (its newest step) or one of its steps. Released layouts have no
        digests.
      progress: called as progress(name, done, total) with numbers of chunks and files.

    Raises:
      CheckpointError: it cannot be opened at all.
    """
    with opened(path) as checkpoint:
        root = Path(checkpoint.label)
        inner = [] if isinstance(checkpoint, Released) else sorted(root.iterdir())
    folders = [folder for folder in inner if folder.is_dir()]
    found, without, damaged = 0, 0, list[str]()
    for folder in folders:
        if not any((folder / name).exists() for name in (DIGESTS, "manifest.ocdbt")):
            continue  # a companion
        digests = Digests(folder)
        if not digests:
            without += 1
            continue
        found += 1
        damaged += [f"{folder.name}: {name}" for name in digests.damaged(progress)]
    return Checked(found, without or (not found), damaged)
