"""The objective and one step: every loss by hand, microbatches, routing given, weights rounded, stages."""

from __future__ import annotations

import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import jitted, three
from v4_jax import Policy, declarations
from v4_jax.layer_stack import by_layer
from v4_jax.layers.stages import Stage
from v4_jax.number_formats import E2M1, dequantise, quantise
from v4_jax.parameter_tree import placements
from v4_jax.parameters import is_parameter
from v4_jax.placement import Place
from v4_jax.sharding.mesh import make_mesh
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import Counts, Weights, targets, total_loss
from v4_jax.train.objectives.pretraining import Pretraining
from v4_jax.train.precision import compute_copy
from v4_jax.train.step import PRETRAINING, TrainState, make_decide, make_step

ROWS, LENGTH = 4, 256
RATE = 0.1
SGD = optax.sgd(RATE)  # shows the gradients as they are, where the real optimisers amplify their rounding
WEIGHTS = Weights(mtp=0.3, balance=0.01, indexer=0.5)


@pytest.fixture(scope="module")
def tiny():
    return three()


@pytest.fixture(scope="module")
def rows():
    """Packed rows, one of which ends in padding."""
    tokens = jax.random.randint(jax.random.key(5), (ROWS, LENGTH), 0, 64)
    segments = jnp.stack(
        [
            jnp.searchsorted(jnp.array(ends), jnp.arange(LENGTH), side="right") + 1
            for ends in ([70], [131, 140], [9], [255])
        ]
    )
    segments = segments.at[2, 200:].set(0)
    return Batch(tokens, segments.astype(jnp.int32))


def cut(rows, microbatches):
    return jax.tree.map(lambda x: x.reshape(microbatches, -1, LENGTH), rows)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model.clone(stage=Stage(indexer_loss=True), remat="sublayers")


@pytest.fixture(scope="module")
def train(tiny, model):
    """`step(state, batch, decisions)`, jitted once per shape, and a state to begin with."""
    return jax.jit(make_step(model, SGD, lambda step: WEIGHTS)), begin(tiny.params)


def begin(params):
    return TrainState(jnp.int32(0), params, SGD.init(params))


@pytest.fixture(scope="module")
def whole(train, rows):
    step, state = train
    return step(state, cut(rows, 1), None)


@pytest.fixture(scope="module")
def outputs(tiny, model, rows):
    """What the trunk and the MTP block return of the rows."""
    call = functools.partial(jitted(model), tiny.params, segment_ids=rows.segment_ids, return_routing=True)
    trunk = call(rows.tokens)
    return trunk, call(trunk.streams, jnp.pad(rows.tokens[:, 1:], [(0, 0), (0, 1)]), method="mtp")


def pairs(a, b):
    flat = jax.tree_util.tree_flatten_with_path(a)[0]
    yield from ((jax.tree_util.keystr(path), x, y) for (path, x), y in zip(flat, jax.tree.leaves(b), strict=True))


def by_hand(logits, rows, ahead):
    """Negative log-probabilities of the targets, one by one."""
    tokens, segments, found = np.asarray(rows.tokens), np.asarray(rows.segment_ids), []
    trained = np.ones_like(tokens, bool) if rows.trained is None else np.asarray(rows.trained)
    logits = np.asarray(logits, np.float64)
    for row in range(ROWS):
        for i in range(LENGTH - ahead):
            segment, to = segments[row, i], i + ahead
            if segment and segment == segments[row, to] and trained[row, to]:
                found.append(np.log(np.sum(np.exp(logits[row, i]))) - logits[row, i, tokens[row, to]])
    return found


def test_only_what_is_trained_is_a_target(tiny, model, outputs, rows):
    """The losses of fine-tuning: the same logits, and fewer targets."""
    trained = (jnp.arange(LENGTH) // 7) % 3 == 0
    marked = rows._replace(trained=jnp.broadcast_to(trained, (ROWS, LENGTH)) & (rows.segment_ids > 0))
    counts = Counts.of(marked)
    sums = jax.jit(lambda params: total_loss(PRETRAINING, model, params, marked, counts, WEIGHTS)[1])(tiny.params)
    for output, ahead, name in ((outputs[0], 1, "loss"), (outputs[1], 2, "mtp")):
        losses = by_hand(output.logits, marked, ahead)
        assert 0 < len(losses) == int(getattr(counts, name)) < len(by_hand(output.logits, rows, ahead)) / 2
        np.testing.assert_allclose(getattr(sums, name), np.sum(losses), rtol=1e-5)
    np.testing.assert_array_equal(sums.load.sum(1)[-1], (rows.segment_ids > 0).sum() * tiny.config.num_experts_per_tok)
    assert counts.tokens == Counts.of(rows).tokens


def test_losses_by_hand(outputs, rows, whole):
    """Means over the targets inside documents, of the logits that `__call__` and `mtp` return."""
    (trunk, mtp), metrics = outputs, whole[1]
    segments = np.asarray(rows.segment_ids)
    for output, ahead, name in ((trunk, 1, "loss"), (mtp, 2, "mtp_loss")):
        np.testing.assert_allclose(metrics[name], np.mean(by_hand(output.logits, rows, ahead)), rtol=1e-5)
    valid = segments > 0
    np.testing.assert_allclose(metrics["tokens"], valid.sum())
    divergence = np.asarray(trunk.statistics.indexer_loss)[:, valid].mean()
    np.testing.assert_allclose(metrics["indexer_loss"], divergence, rtol=1e-4)
    balance = float(jnp.sum(trunk.statistics.balance) + jnp.sum(mtp.statistics.balance)) / (ROWS * 3)
    np.testing.assert_allclose(metrics["balance"], balance, rtol=1e-5)
    expected = metrics["loss"] + 0.3 * metrics["mtp_loss"] + 0.01 * 3 * balance + 0.5 * divergence
    np.testing.assert_allclose(metrics["total_loss"], expected, rtol=1e-5)


def test_router_biases_get_their_experts_load(tiny, outputs, whole):
    (trunk, mtp), seen = outputs, 0
    for prefix, load in by_layer(tiny.config, jnp.concatenate([trunk.statistics.load, mtp.statistics.load])):
        before, after = (functools.reduce(lambda t, key: t[key], prefix, p) for p in (tiny.params, whole[0].params))
        before, after = (tree.get("block", tree) for tree in (before, after))
        if "bias" in before["ffn"]:
            moved = before["ffn"]["bias"] - after["ffn"]["bias"]
            np.testing.assert_allclose(moved, RATE * load, rtol=1e-4)
            seen += 1
    assert seen == 3


def test_microbatches_make_the_same_step(train, rows, whole):
    step, state = train
    after, metrics = step(state, cut(rows, 2), None)
    for name, value in whole[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
    for path, found, wanted in pairs(after.params, whole[0].params):
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=path)


def test_given_experts_are_used(tiny, model, train, rows, whole):
    """Those that the same parameters choose change nothing; those of others do."""
    step, state = train
    decide = jax.jit(make_decide(model))
    same = decide(state.params, cut(rows, 1))
    assert same.trunk.experts.shape == (1, 3, ROWS, LENGTH, 2)
    after, metrics = step(state, cut(rows, 1), same)
    np.testing.assert_allclose(metrics["loss"], whole[1]["loss"], rtol=1e-6)
    for path, found, wanted in pairs(after.params, whole[0].params):
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=path)
    other = jax.tree.map(lambda x: (x + 1) % 8, same)
    assert abs(float(step(state, cut(rows, 1), other)[1]["loss"]) - float(whole[1]["loss"])) > 1e-4


def test_what_is_not_finite_changes_nothing(tiny, train, rows):
    step, state = train
    broken = state.replace(params=state.params | {"norm": state.params["norm"].at[0].set(jnp.nan)})
    after, metrics = step(broken, cut(rows, 1), None)
    assert not bool(metrics["finite"])
    for path, found, wanted in pairs(after, broken):
        np.testing.assert_array_equal(found, wanted, err_msg=path)


def test_on_a_mesh(tiny, model, rows, whole):
    """Sequence, experts and tensor split, weights in shards: the same losses and the same parameters afterwards."""
    mesh = make_mesh("seq=2,expert=2,tensor=2")
    place = Place(mesh, "train")
    places = TrainState(place.replicated, placements(tiny.config, mesh, "train"), SGD.init(None))
    state = jax.tree.map(jax.device_put, begin(tiny.params), places)
    spread = model.clone(mesh=mesh, rules="train")
    step = jax.jit(make_step(spread, SGD, lambda step: WEIGHTS), out_shardings=(places, place.replicated))
    after, metrics = step(state, place.put(cut(rows, 1)), None)
    for name, value in whole[1].items():
        np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    for path, found, wanted in pairs(after.params, whole[0].params):
        np.testing.assert_allclose(found, wanted, atol=2e-5, err_msg=path)


def test_fp4_experts_with_straight_gradients(tiny):
    policy = Policy.of("float32")
    plain, rounded = (compute_copy(tiny.params, tiny.config, policy, fp4_experts=yes) for yes in (False, True))
    declared = jax.tree.leaves(declarations(tiny.config), is_leaf=is_parameter)
    for parameter, a, b in zip(declared, *map(jax.tree.leaves, (plain, rounded)), strict=True):
        expected = dequantise(quantise(a, E2M1), jnp.float32) if parameter.storage == "expert" else a
        np.testing.assert_array_equal(b, expected, err_msg=parameter.released)

    def total(params):
        copy = compute_copy(params, tiny.config, policy, fp4_experts=True)
        return sum(jnp.sum(3 * leaf) for leaf in jax.tree.leaves(copy) if leaf.dtype == jnp.float32)

    for leaf in jax.tree.leaves(jax.grad(total, allow_int=True)(tiny.params)):
        if leaf.dtype == jnp.float32:
            np.testing.assert_array_equal(leaf, 3)


def test_what_is_cast_to_the_compute_dtype(tiny):
    copy = compute_copy(tiny.params, tiny.config, Policy.of("bfloat16"))
    declared = jax.tree.leaves(declarations(tiny.config), is_leaf=is_parameter)
    for parameter, leaf in zip(declared, jax.tree.leaves(copy), strict=True):
        wanted = {"fp8": jnp.bfloat16, "bf16": jnp.bfloat16, "i64": jnp.int32}.get(parameter.storage, jnp.float32)
        assert leaf.dtype == wanted, parameter.released


def test_counts_of_padding_alone():
    counts = Counts.of(Batch(jnp.zeros((1, 2, 8), jnp.int32), jnp.zeros((1, 2, 8), jnp.int32)))
    assert (int(counts.loss), int(counts.mtp), counts.rows, int(counts.tokens)) == (1, 1, 2, 1)


class Nothing(Pretraining):
    """Next tokens do not matter, nor what the data says."""

    imitates: ClassVar[bool] = False

    def loss(self, model, params, streams, batch, shared):
        return jnp.sum(streams) * 0, {"targets": jnp.sum(targets(batch, 1)).astype(jnp.float32)}


def test_what_does_not_imitate_leaves_the_mtp_loss_to_its_block(tiny, rows):
    """Neither the trunk nor embedding and head learn from it."""
    counts, weights = Counts.of(rows), Weights(balance=0)
    loss = lambda params: total_loss(Nothing(), tiny.model, params, rows, counts, weights)  # noqa: E731
    gradient, sums = jax.jit(jax.grad(loss, allow_int=True, has_aux=True))(tiny.params)
    assert sums.statistics["targets"] == counts.loss
    moved = {
        name: any(jnp.any(x != 0) for x in jax.tree.leaves(tree) if x.dtype == jnp.float32)
        for name, tree in gradient.items()
    }
    assert {name for name, yes in moved.items() if yes} == {"mtp"}


def test_indexer_stage_has_no_other_gradient(tiny, rows):
    """Weight 0 of the model's losses: only the indexer's parameters have a gradient."""
    model = tiny.model.clone(stage=Stage(dense=True, indexer_loss=True))
    weights = Weights(model=0.0, indexer=1.0)
    counts = Counts.of(rows)
    loss = lambda params: total_loss(PRETRAINING, model, params, rows, counts, weights)[0]  # noqa: E731
    gradient = jax.jit(jax.grad(loss, allow_int=True))(tiny.params)
    declared = jax.tree.leaves(declarations(tiny.config), is_leaf=is_parameter)
    for parameter, leaf in zip(declared, jax.tree.leaves(gradient), strict=True):
        if parameter.group in ("muon", "adamw"):
            assert (float(jnp.abs(leaf).max()) > 0) == (parameter.loss == "indexer"), parameter.released
