"""How often the model's programs do what depends on the data, on the mean: rows at the end of a context, experts evenly
chosen. What is not named here counts as if it always did its work."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

from v4_jax.architecture import RATIO_OF_ROLE
from v4_jax.config import Config
from v4_jax.kernels.grouped_matmul.groups import tile_rows
from v4_jax.kernels.grouped_matmul.tpu import tile_rows as grouped_tile_rows
from v4_jax.kernels.stored_weights import SPREAD_ROWS
from v4_jax.layers.expert_parallelism import FEW_TOKENS
from v4_jax.planning.hlo import Expected, Instruction, Program, Share
from v4_jax.sharding.dispatch import capacity
from v4_jax.sharding.split import Split

# Turns that the TPU compiler's estimate takes a loop to have whose length is known only at run time (libtpu 0.0.42,
# seen on loops and grids in Pallas kernels whose bodies' cycles are known).
DYNAMIC_TURNS = 42

# Kernels whose grids have a step for each tile of places, those without rows included.
TRAINING = (
    "experts_hidden",
    "experts_out",
    "experts_activations",
    "experts_rows_gradient",
    "experts_w1_w3_gradient",
    "experts_w2_gradient",
    "rows_from_tiles",
    "rows_in_tiles",
)


@dataclasses.dataclass(frozen=True)
class OnMean(Expected):
    """What to expect of one call of the model.

    Attributes:
      program: what was compiled.
      config: the architecture.
      tokens: tokens of the call, all devices together.
      rows: rows of its batch on one device.
      decoding: whether it takes one token of each row.
      split: the mesh.
    """

    program: Program
    config: Config
    tokens: int
    rows: int
    decoding: bool
    split: Split

    @property
    def _choices(self) -> float:
        """Choices of experts that all tokens make."""
        return self.tokens * self.config.num_experts_per_tok

    @property
    def _own(self) -> float:
        """Experts of a device."""
        return self.config.n_routed_experts / self.split.count(self.split.axes("experts"))

    @property
    def _reaching(self) -> float:
        """Choices that fall on a device's experts."""
        return self._choices * self._own / self.config.n_routed_experts

    @property
    def _places(self) -> float:
        """Room for choices on a device, of which an even load fills `_own / n_routed_experts`."""
        split, top = self.split, self.config.num_experts_per_tok
        away = split.count(tuple(a for a in split.axes("experts") if a not in split.shared("experts")))
        rows = self.tokens // split.count(split.tokens)
        if rows * away <= FEW_TOKENS or away == 1:
            return rows * away * top
        return capacity(rows * top, away)

    @property
    def _hit(self) -> float:
        """Experts of a device that any token chose."""
        return self._own * (1 - (1 - 1 / self.config.n_routed_experts) ** self._choices)

    def trips(self, loop: Instruction) -> float:
        """The exchange of rows between devices stands before the loop of the others, which an even load needs none of;
        the walk over a device's experts, and over tiles of rows inside it, as often as such a load makes it."""
        if self.program.communicates(loop):
            return 0
        rows = self._choices / self.config.n_routed_experts  # of each expert, all devices together
        if "while/body/" in loop.op_name.rsplit("experts.ffn/", 1)[-1]:
            return max(1.0, rows / tile_rows(math.ceil(rows), 1))
        return min(1.0, rows) * self._own

    def taken(self, conditional: Instruction, branches: int) -> Sequence[float]:
        """Of a choice between sizes of what devices send each other the last, as at the end of a context; in decode,
        what is done where a row completes a block; picks that lie on a device nearly always fit its first block."""
        name = conditional.op_name
        if branches == 1:
            return (1.0,)
        if branches > 2:
            return (*(0.0,) * (branches - 1), 1.0)
        share = 1.0
        if "/compressor/" in name and self.decoding:
            share = 1 - (1 - 1 / self._ratio(name)) ** self.rows
        elif "/attention.csa/" in name:
            share = min(1.0, 2 / self.split.count(self.split.axes("entries")))
        return 1 - share, share

    def share(self, kernel: Instruction) -> Share:
        """Of visits to experts, those that an even load makes."""
        name = kernel.op_name.rsplit("/", 2)[-2:][0]
        rows = kernel.shapes[0].dimensions[0] if kernel.shapes and kernel.shapes[0].dimensions else 0
        own, later = self._reaching, 0.0
        if name == "grouped_matmul":
            tile = grouped_tile_rows(rows, max(1, round(self._own)))
            visits = self._hit + own / tile  # each once, and once more for each boundary between tiles of rows
            turns, later = visits / DYNAMIC_TURNS, 1 - self._hit / visits
        elif name == "experts" and "/experts.ffn/" in kernel.op_name:
            rows *= self.config.num_experts_per_tok
            turns = self._hit / min(self._own, rows)  # the kernel says that as many are visited as can be
        elif name in TRAINING:  # places without a row cost nothing
            return Share(*[min(1.0, own / self._places)] * 3)
        elif name == "visit_experts":
            rows *= self.config.num_experts_per_tok
            visits = self._own * _turns(SPREAD_ROWS, self._choices, 1 / self.config.n_routed_experts)
            turns = visits / self._own  # the kernel says that each is visited once
            return Share(turns, min(1.0, own / rows), visits / max(1.0, min(rows, self._own)))
        else:
            return Share()
        return Share(turns, min(1.0, own / rows), min(1.0, self._hit / max(1.0, min(rows, self._own))), later)

    def filled(self, exchange: Instruction) -> float:
        """An even load's rows, of all that there is room for. Where there is none for all of them, they go in waves."""
        room = exchange.shapes[0].dimensions[0]
        return self._reaching / (room * math.ceil(self._reaching / room))

    def _ratio(self, op_name: str) -> int:
        """Tokens to an entry in the layer that a conditional stands in."""
        found = re.search(r"/(block|layer)_(\d+)/", op_name)
        layer = int(found[2]) + (self.config.period.start if found[1] == "block" else 0) if found else 0
        return RATIO_OF_ROLE.get(self.config.layers[layer].attention, 1)


def _turns(taken: int, choices: float, share: float) -> float:
    """Turns of `taken` rows each that an expert needs on the mean, when each of the choices falls on it by chance."""
    chance, below, turns = (1 - share) ** choices, 0.0, 0.0  # of so many rows, and of fewer than that
    for rows in range(round(choices)):
        below += chance
        if rows % taken == 0:
            turns += 1 - below
        chance *= (choices - rows) / (rows + 1) * share / (1 - share)
    return turns
