"""The optimiser: which rule updates what, the size of updates, and the same update however matrices are spread."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from tests.models import drafts, three
from v4_jax import Config, declarations
from v4_jax.parameter_tree import placements
from v4_jax.parameters import is_parameter
from v4_jax.planning.hlo import Program
from v4_jax.planning.hlo_costs import costs
from v4_jax.sharding.axes import PRESETS, ShardingError
from v4_jax.sharding.mesh import make_mesh, parse_mesh
from v4_jax.train.muon import COEFFICIENTS, RMS, Assignment, muon, newton_schulz, orthogonalise
from v4_jax.train.optimizer import balance, optimizer, state_placements

RATE = 1e-2
MESHES = ("data=8", "expert=8", "tensor=2", "data=2,seq=4", "seq=2,expert=2,tensor=2")


@pytest.fixture(scope="module")
def tiny():
    return three()


def declared(config):
    return jax.tree.leaves(declarations(config), is_leaf=is_parameter)


def gradients(params, seed=0):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape).astype(leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def test_every_leaf_has_its_group():
    """The report's split (section 2.4), leaf by leaf of the release's names; sinks and ape are our choice."""
    adamw = {
        "embed",
        "head",
        "norm",
        "attn_norm",
        "ffn_norm",
        "q_norm",
        "kv_norm",
        "enorm",
        "hnorm",
        "attn_sink",
        "ape",
    }
    frozen, bias = {"tid2eid"}, {"bias"}
    found = {}
    for parameter in declared(Config.tiny()):
        name = parameter.released.removesuffix(".weight").rsplit(".", 1)[-1]
        found.setdefault(name, set()).add(parameter.group)
    for name, groups in found.items():
        gate = name.startswith("hc_") and name.endswith(("_base", "_scale"))
        expected = (
            "adamw" if name in adamw or gate else "frozen" if name in frozen else "bias" if name in bias else "muon"
        )
        assert groups == {expected}, name
    assert {"w1", "w2", "w3", "wq_a", "wo_a", "gate", "hc_attn_fn", "wgate", "weights_proj", "e_proj"} <= set(found)


def test_independent_matrices():
    """Each output group's, each series' of the overlapping compressor, each expert's and each layer's."""
    config = Config.tiny()
    for parameter in declared(config):
        if parameter.group != "muon":
            continue
        name = parameter.released.removesuffix(".weight").rsplit(".", 1)[-1]
        layers = parameter.period.layers(0) if parameter.period else ()
        released = parameter.released.format(layers=layers, expert=0)
        overlapping = ".compressor." in released and config.layers[int(released.split(".")[1])].attention == "csa"
        expected = config.o_groups if name == "wo_a" else 2 if overlapping else 1
        assert parameter.matrices == expected, parameter.released


@pytest.mark.parametrize("shape", [(3, 40, 24), (24, 40), (2, 2, 16, 16)])
@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e10])
def test_newton_schulz_is_the_nearest_semi_orthogonal_matrix(shape, scale):
    x = jax.random.normal(jax.random.key(0), shape)
    u, _, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    np.testing.assert_allclose(newton_schulz(x * scale), u @ v, atol=2e-3)


def test_newton_schulz_of_nothing_is_nothing():
    np.testing.assert_array_equal(newton_schulz(jnp.zeros((2, 3, 4))), 0)


def test_newton_schulz_is_that_of_optax():
    x = jax.random.normal(jax.random.key(0), (24, 40))
    theirs = optax.contrib.scale_by_muon(COEFFICIENTS, ns_steps=len(COEFFICIENTS), beta=0.0, nesterov=False)
    expected, _ = theirs.update(x, theirs.init(x))
    np.testing.assert_allclose(newton_schulz(x), expected, atol=1e-4)


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
def test_two_steps_by_hand(tiny, kept):
    """Momentum M <- 0.95 M + G, orthogonalised 0.95 M + G, 0.18 sqrt(max(m, n)), decay 0.1, both times the rate."""
    transform = optimizer(tiny.config, RATE, dtype=jnp.float32, momentum_dtype=kept)
    first, second = gradients(tiny.params, 1), gradients(tiny.params, 2)
    state = transform.init(tiny.params)
    update = jax.jit(transform.update)
    _, state = update(first, state, tiny.params)
    found, _ = update(second, state, tiny.params)
    for parameter, weight, g1, g2, new in zip(
        declared(tiny.config), *map(jax.tree.leaves, (tiny.params, first, second, found)), strict=True
    ):
        weight, g1, g2 = (np.asarray(x, np.float64) for x in (weight, g1, g2))
        if parameter.group == "muon":
            height = parameter.shape[-2] // parameter.matrices
            between = np.asarray(jnp.asarray(g1, kept), np.float64)
            direction = (0.95 * (0.95 * between + g2) + g2).reshape(-1, height, parameter.shape[-1])
            u, _, v = np.linalg.svd(direction, full_matrices=False)
            size = RMS * math.sqrt(max(direction.shape[1:]))
            expected = -RATE * (size * (u @ v).reshape(weight.shape) + 0.1 * weight)
            np.testing.assert_allclose(new, expected, atol=3e-3 * RATE * size, err_msg=parameter.released)
        elif parameter.group == "adamw":
            m, v = 0.9 * 0.1 * g1 + 0.1 * g2, 0.95 * 0.05 * g1**2 + 0.05 * g2**2
            expected = -RATE * (m / (1 - 0.81) / np.sqrt(v / (1 - 0.95**2)) + 0.1 * weight)
            np.testing.assert_allclose(new, expected, rtol=1e-4, atol=1e-7, err_msg=parameter.released)
        elif parameter.group == "frozen":
            np.testing.assert_array_equal(new, 0)


def test_update_has_the_size_of_adamws():
    """Whatever the shape: root mean square 0.18 times the rate for full-rank gradients of matrices near square."""
    x = jax.random.normal(jax.random.key(0), (64, 64))
    assert float(jnp.sqrt(jnp.mean((newton_schulz(x) * RMS * 8) ** 2))) == pytest.approx(RMS, rel=0.01)


def test_bias_moves_against_the_load():
    transform = balance(0.001)
    update, _ = transform.update(jnp.array([[10.0, 30.0, 20.0], [0.0, 0.0, 0.0]]), transform.init(None))
    np.testing.assert_allclose(update, [[0.001, -0.001, 0], [0, 0, 0]])


@pytest.mark.parametrize("mesh", MESHES)
def test_spread_over_devices(tiny, mesh):
    """The same update on every mesh, and no device repeats another's work: FLOPs of the compiled program."""
    devices = math.prod(parse_mesh(mesh).values())
    spread = make_mesh(mesh, jax.devices()[:devices])
    places = placements(tiny.config, spread, "train")
    grads = gradients(tiny.params)
    alone = optimizer(tiny.config, RATE, dtype=jnp.float32)
    expected, _ = jax.jit(alone.update)(grads, alone.init(tiny.params), tiny.params)

    together = optimizer(tiny.config, RATE, dtype=jnp.float32, mesh=spread, rules="train")
    params, given = jax.device_put(tiny.params, places), jax.device_put(grads, places)
    where = state_placements(declarations(tiny.config), together, spread, "train")
    state = jax.jit(together.init, out_shardings=where)(params)
    compiled = jax.jit(together.update, out_shardings=(places, where)).lower(given, state, params).compile()
    found, _ = compiled(given, state, params)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)

    groups = {}
    for parameter in declared(tiny.config):
        if parameter.group == "muon":
            assignment = Assignment.of(parameter, spread, PRESETS["train"])
            matrices = math.prod(parameter.shape) // math.prod(assignment.shape)
            key = (assignment.shape, assignment.rows, assignment.columns, assignment.idle)
            groups[key] = groups.get(key, 0) + matrices
    work = 0
    for (shape, *_), matrices in groups.items():
        short, long = sorted(shape)
        work += -(-matrices // devices) * len(COEFFICIENTS) * (4 * short * short * long + 2 * short**3)
    assert sum(cost.flops for cost in costs(Program(compiled.as_text()), lambda loop: 1)) == work


def test_groups_that_do_not_lie_whole_are_refused(tiny):
    mesh = make_mesh("tensor=4", jax.devices()[:4])
    with pytest.raises(
        ShardingError, match=r"wo_a.* holds 2 independent matrices, which do not lie whole on 4 devices"
    ):
        orthogonalise(declarations(tiny.config), mesh=mesh, rules="train")


def test_only_the_indexer(tiny):
    """The other parameters stay, and so do their moments."""
    transform = optimizer(tiny.config, RATE, dtype=jnp.float32)
    narrow = optimizer(tiny.config, RATE, dtype=jnp.float32, loss="indexer")
    state = transform.init(tiny.params)
    _, state = jax.jit(transform.update)(gradients(tiny.params), state, tiny.params)
    updates, after = jax.jit(narrow.update)(gradients(tiny.params, 1), state, tiny.params)
    for parameter, update in zip(declared(tiny.config), jax.tree.leaves(updates), strict=True):
        moved = float(jnp.abs(update).max()) > 0
        assert moved == (parameter.loss == "indexer"), parameter.released
    everything, _ = jax.jit(transform.update)(gradients(tiny.params, 1), after, tiny.params)
    untouched, _ = jax.jit(transform.update)(gradients(tiny.params, 1), state, tiny.params)
    for parameter, a, b in zip(declared(tiny.config), *map(jax.tree.leaves, (everything, untouched)), strict=True):
        if parameter.loss == "model" and parameter.group == "muon":
            np.testing.assert_array_equal(a, b, err_msg=parameter.released)


def test_adamw_for_matrices_too(tiny):
    transform = optimizer(tiny.config, RATE, matrices="adamw")
    updates, _ = jax.jit(transform.update)(gradients(tiny.params), transform.init(tiny.params), tiny.params)
    for parameter, weight, update in zip(
        declared(tiny.config), *map(jax.tree.leaves, (tiny.params, updates)), strict=True
    ):
        if parameter.group == "muon":  # the first step of Adam has every element's size 1
            np.testing.assert_allclose(jnp.abs(update + RATE * 0.1 * weight), RATE, rtol=1e-3)
    with pytest.raises(ValueError, match="unknown optimiser 'sgd' for matrices"):
        optimizer(tiny.config, RATE, matrices="sgd")


def test_muon_alone_is_an_optax_transformation(tiny):
    masked = jax.tree.map(lambda p: p.group == "muon", declarations(tiny.config), is_leaf=is_parameter)
    transform = optax.masked(muon(declarations(tiny.config), RATE, dtype=jnp.float32), masked)
    updates, _ = transform.update(gradients(tiny.params), transform.init(tiny.params), tiny.params)
    assert jax.tree.structure(updates) == jax.tree.structure(tiny.params)


def test_stages_of_dspark_stay_as_they_are():
    """Nothing here trains them, and decay alone would wear them away."""
    tiny = drafts()
    transform = optimizer(tiny.config, 0.1)
    grads = jax.tree.map(jnp.ones_like, tiny.params)
    updates, _ = jax.jit(transform.update)(grads, transform.init(tiny.params), tiny.params)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(updates["dspark"]))
    assert np.asarray(updates["layer_0"]["attn"]["wq_a"]).all() and np.asarray(updates["embed"]).all()
