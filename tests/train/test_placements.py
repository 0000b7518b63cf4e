"""Training on several slices, with one exchange of gradients between them, and on more devices than divide experts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import OnMesh, three
from v4_jax.layers.stages import Stage
from v4_jax.parameter_tree import placements
from v4_jax.planning.hlo import KINDS, UNKNOWN, Program
from v4_jax.planning.hlo_collectives import groups_of
from v4_jax.sharding.mesh import make_mesh
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import Weights
from v4_jax.train.optimizer import optimizer
from v4_jax.train.step import TrainState, make_step

MESH, PRESET = "data=2,seq=2,expert=2", "train-slices"  # a slice is four devices
SGD = optax.sgd(0.1)  # shows the gradients as they are
FEW = 32  # numbers of an exchange that is none to speak of: losses, counts, what each expert got


@pytest.fixture(scope="module")
def tiny():
    return three()


@pytest.fixture(scope="module")
def batch():
    """Tokens whose decisions are clear: see `tests.equivalence.test_meshes.tokens`."""
    tokens = np.asarray(jax.random.randint(jax.random.key(6), (2, 1700), 0, 64))[:, :256]
    tokens = np.concatenate([tokens, tokens])[None]
    return Batch(tokens, np.ones_like(tokens))


def training(tiny, spread, rule):
    """A step on a mesh, or without one, and the state to begin with."""
    model = (spread or tiny).model.clone(stage=Stage(indexer_loss=True), remat="layers")
    step = make_step(model, rule, lambda step: Weights(mtp=0.3, balance=0.01, indexer=0.5))
    params = tiny.params if spread is None else spread.params
    return jax.jit(step), TrainState(jnp.int32(0), params, rule.init(params))


def test_one_exchange_between_slices(tiny, batch):
    """A device's shards of the gradients cross, and nothing else does; none of it in a loop over layers."""
    mesh = make_mesh(MESH)
    step, state = training(tiny, OnMesh(tiny, MESH, PRESET), optimizer(tiny.config, 1e-3, mesh=mesh, rules=PRESET))
    text = step.lower(state, batch).compile().as_text()
    slice_of = {device: place[0] for place, device in np.ndenumerate(np.vectorize(lambda x: x.id)(mesh.devices))}
    crossing = []
    for call in Program(text).calls(UNKNOWN):
        instruction = call.instruction
        if instruction.opcode.removesuffix("-start") not in KINDS:
            continue
        if any(len({slice_of[device] for device in group}) > 1 for group in groups_of(instruction)):
            crossing.append((instruction, call.runs))
    large = [one for one, _ in crossing if sum(np.prod(shape.dimensions) for shape in one.shapes) > FEW]
    assert large and {one.opcode for one in large} == {"all-reduce"} and {runs for _, runs in crossing} == {1}

    def shard(x, at):
        return np.prod(at.shard_shape(x.shape)) if jnp.issubdtype(x.dtype, jnp.floating) else 0

    shards = jax.tree.map(shard, tiny.params, placements(tiny.config, mesh, PRESET))
    sent = sum(np.prod(shape.dimensions) for one in large for shape in one.shapes)
    # The MTP block has an embedding and a head, too, and gradients of zero for what ends it, where it is called.
    mtp = [shards["mtp"][name] for name in ("norm", "hc_head")]
    once, twice = (sum(jax.tree.leaves(some)) for some in (shards, (shards["embed"], shards["head"], mtp)))
    assert 0.98 * once <= sent <= once + twice


@pytest.fixture(scope="module")
def on_one(tiny, batch):
    step, state = training(tiny, None, SGD)
    return step(state, batch)


@pytest.mark.parametrize(("mesh", "preset"), [(MESH, PRESET), ("data=2,expert=2,tensor=2", "train-split-experts")])
def test_a_step_is_that_of_one_device(tiny, on_one, batch, mesh, preset):
    step, state = training(tiny, OnMesh(tiny, mesh, preset), SGD)
    (after, metrics), (wanted, expected) = step(state, batch), on_one
    for name in ("loss", "mtp_loss", "gradient_norm", "indexer_loss"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-4)
    for one, other in zip(jax.tree.leaves(after.params), jax.tree.leaves(wanted.params), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=0)
