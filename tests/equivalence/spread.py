"""A tiny model on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tests.equivalence.tiny import Tiny, jitted
from v4_jax import Transformer, init_cache
from v4_jax.parameter_tree import placements
from v4_jax.sharding.mesh import make_mesh, parse_mesh


class Spread:
    """A `Tiny` on as many of the devices as its mesh names, called like it."""

    def __init__(self, tiny: Tiny, mesh: str, preset: str, policy: str = "float32"):
        count = 1
        for size in parse_mesh(mesh).values():
            count *= size
        self.config, self.preset = tiny.config, preset
        self.mesh = make_mesh(mesh, jax.devices()[:count])
        self.model = Transformer(tiny.config, policy=policy, mesh=self.mesh, rules=preset)
        self.params = jax.device_put(tiny.params, placements(tiny.config, self.mesh, preset))
        self._program = jitted(self.model)

    def __call__(self, *inputs, **arguments):
        return self._program(self.params, *map(jnp.asarray, inputs), **arguments)

    def cache(self, batch, length, dtype="float32"):
        return init_cache(self.config, batch, length, dtype=dtype, mesh=self.mesh, rules=self.preset)
