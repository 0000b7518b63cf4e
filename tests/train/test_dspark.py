"""DSpark's stages as what is trained: their loss, its gradients on a mesh, and what runs begin with and leave."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.models import drafts, jitted, make, trained, two
from tests.train.logs import Metrics, shared_programs
from v4_jax.checkpoint import CheckpointError, export, load, open_checkpoint, verify
from v4_jax.draft_stages import DSPARK, DraftStages
from v4_jax.layers import draft_loss as blockwise
from v4_jax.layers import head
from v4_jax.layers.draft_loss import Drafted, draft_loss
from v4_jax.number_formats import BlockScaled
from v4_jax.parameter_tree import placements
from v4_jax.placement import Place
from v4_jax.sharding.mesh import make_mesh
from v4_jax.train.batch import Batch
from v4_jax.train.loop import Trainer
from v4_jax.train.objectives.dspark import DSpark
from v4_jax.train.objectives.objective import Weights
from v4_jax.train.settings import SettingsError, read_settings
from v4_jax.train.setup import Origin, notes, open_rows, open_run
from v4_jax.train.step import TrainState, make_step

LENGTH = 256
SGD = optax.sgd(1.0)  # shows the gradients as they are
OBJECTIVE = DSpark(anchors=6, gamma=2.0)


@pytest.fixture(scope="module")
def rows():
    """Two documents and some padding in each row."""
    tokens = jax.random.randint(jax.random.key(5), (2, LENGTH), 0, 64)
    at = jnp.arange(LENGTH)
    segments = jnp.stack([jnp.where(at < 250, 1 + (at > 90), 0), jnp.where(at < 200, 1 + (at > 7), 0)])
    return Batch(tokens, segments)


# ---- the loss --------------------------------------------------------------------------------------------------------


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def reference(draft, trunk, tokens, anchors, weights, shares):
    """The loss and its parts in float64, block by block."""
    parts = np.zeros(4)
    for row, block in zip(*np.nonzero(np.asarray(weights[..., 0])), strict=True):
        reached, parts[3] = 1.0, parts[3] + 1
        for k in range(weights.shape[-1]):
            if not weights[row, block, k]:
                break
            place = anchors[row, block] + k  # of the token that the trunk has read
            ours = softmax(np.asarray(draft.logits[row, block, k], np.float64))
            theirs = softmax(np.asarray(trunk[row, place], np.float64))
            taken = np.minimum(ours, theirs).sum()
            sure = 1 / (1 + np.exp(-np.float64(draft.confidence[row, block, k])))
            doubt = -(taken * np.log(sure) + (1 - taken) * np.log(1 - sure))
            found = [-np.log(ours[tokens[row, place + 1]]), np.abs(ours - theirs).sum(), doubt]
            parts[:3] += weights[row, block, k] * np.asarray(found)
            reached *= taken
            parts[3] += reached
    return np.append(np.dot(shares, parts[:3]), parts)


def test_against_numpy(rows, monkeypatch):
    """Of drafts in two packed documents, with weights that end within a block, in several blocks of the head."""
    tiny, shares = drafts(), (0.2, 0.7, 1.5)
    monkeypatch.setattr(head, "LOGITS", 64 * 16)
    small = jax.tree.map(lambda x: x, tiny.params)
    small[DSPARK] = small[DSPARK] | {"confidence": 0.05 * small[DSPARK]["confidence"]}  # where float64 can follow
    output = tiny(rows.tokens, segment_ids=rows.segment_ids, return_taps=True)
    batch, counts = OBJECTIVE.begin(tiny.config, jax.tree.map(lambda x: x[None], rows), jnp.int32(3))
    anchors = batch.given["anchors"][0].at[0, 2].set(-1).at[1, 1].set(196).at[1, 2].set(4)
    weights = OBJECTIVE._weights(tiny.config, rows, anchors)
    assert (weights > 0).sum(-1)[1, 1:3].tolist() == [3, 3] and not weights[0, 2].any()
    np.testing.assert_allclose(np.asarray(weights[0, 0]), np.exp(-np.arange(5) / 2), rtol=1e-6)
    run = jitted(tiny.model)
    draft = run(
        {**tiny.params, **small}, output.taps, rows.tokens, anchors, segment_ids=rows.segment_ids, method="dspark_known"
    )
    call = functools.partial(tiny.model.apply, segment_ids=rows.segment_ids, shares=shares, method="dspark_loss")
    found = jax.jit(call)({"params": small}, output.taps, output.streams, rows.tokens, anchors, weights)
    names = "loss", "cross_entropy", "distance", "confidence_loss", "length"
    expected = reference(draft, output.logits, rows.tokens, np.asarray(anchors), np.asarray(weights), shares)
    np.testing.assert_allclose([found[name] for name in names], expected, rtol=2e-5)
    tokens = 2 * 5 * int((anchors > 0).sum())
    assert found["load"].sum(axis=1).tolist() == [tokens] * 2
    assert counts.mtp == 12 and counts.loss > 0


def test_gradients_of_the_blockwise_loss(monkeypatch):
    """Those that differentiating the plain formulas gives."""
    monkeypatch.setattr(head, "LOGITS", 50 * 8)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    normal = lambda *shape: jax.random.normal(next(keys), shape)  # noqa: E731
    drafted = Drafted(
        hidden=normal(30, 24),
        embedded=normal(30, 6),
        markov=normal(50, 6),
        trunk=normal(30, 24),
        head=normal(50, 24),
        tokens=jax.random.randint(next(keys), (30,), 0, 50),
        weights=jax.random.uniform(next(keys), (30,)),
    )

    def plain(hidden, embedded, markov):
        scores = jax.nn.log_softmax(hidden @ drafted.head.T + embedded @ markov.T)
        theirs = jax.nn.softmax(drafted.trunk @ drafted.head.T)
        of_token = -jnp.take_along_axis(scores, drafted.tokens[:, None], axis=1)[:, 0]
        apart = jnp.abs(jnp.exp(scores) - theirs).sum(1)
        return jnp.sum(drafted.weights * (0.3 * of_token + 0.8 * apart)), (of_token, apart)

    def ours(hidden, embedded, markov):
        loss, *parts = draft_loss(drafted._replace(hidden=hidden, embedded=embedded, markov=markov), 0.3, 0.8)
        return loss, tuple(parts)

    found, expected = (
        jax.value_and_grad(call, argnums=(0, 1, 2), has_aux=True)(*drafted[:3]) for call in (ours, plain)
    )
    alone = draft_loss(drafted, 0.3, 0.8)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    np.testing.assert_array_equal(alone[0], found[0][0])
    assert blockwise.blocks(drafted.head, drafted.hidden)[0].shape[0] == 3


def test_places_are_drawn_where_something_is_to_be_learnt(rows):
    """Behind a token of the same document, before one that is trained; each once; others in the next step."""
    trained = jax.random.uniform(jax.random.key(1), rows.tokens.shape) < 0.1
    batch = Batch(rows.tokens[None], rows.segment_ids[None], trained[None])
    many = DSpark(anchors=200)
    found = [many.begin(drafts().config, batch, jnp.int32(step))[0].given["anchors"][0] for step in (1, 2)]
    for one in map(np.asarray, found):
        for row, places in enumerate(one):
            there = places[places > 0]
            segments, learnt = np.asarray(rows.segment_ids[row]), np.asarray(trained[row])
            legal = [
                at
                for at in range(1, LENGTH - 1)
                if segments[at] and segments[at - 1] == segments[at] == segments[at + 1] and learnt[at + 1]
            ]
            assert sorted(there) == legal and (places[len(there) :] == -1).all()
    assert (found[0] != found[1]).any()


# ---- a step ----------------------------------------------------------------------------------------------------------


def stepped(model, params, rows, place=None, declared=None):
    step = jax.jit(make_step(model, SGD, lambda step: Weights(), OBJECTIVE, addition=DraftStages()))
    base, stages = {name: x for name, x in params.items() if name != DSPARK}, {DSPARK: params[DSPARK]}
    state = TrainState(jnp.int32(3), stages, SGD.init(stages))
    after, metrics = step(state, jax.tree.map(lambda x: x[None], rows), None, base)
    grads = jax.tree.map(lambda x, y: x - y, stages, after.params)
    return grads, {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope="module")
def alone(rows):
    tiny = drafts()
    return stepped(tiny.model, tiny.params, rows)


def test_step(alone):
    grads, metrics = alone
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(grad).max() > 0, path
    assert {"cross_entropy", "distance", "confidence_loss", "accepted_length", "expert_load_excess"} <= set(metrics)
    assert not {"mtp_loss", "indexer_loss", "balance"} & set(metrics)
    assert 1 < metrics["accepted_length"] < 6 and metrics["tokens"] == 450


def test_on_a_mesh(rows, alone):
    """Rows split over the sequence, heads, experts and vocabulary over others: the same gradients."""
    tiny, mesh = drafts(), make_mesh("data=2,seq=2,tensor=2")
    params = jax.device_put(tiny.params, placements(tiny.config, mesh, "train"))
    model = tiny.model.clone(mesh=mesh, rules="train", remat="sublayers")
    found, metrics = stepped(model, params, Place(mesh, "train").put(rows))
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(alone[0]), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 + 2e-4 * np.abs(y).max(), err_msg=str(path))
    for name, value in metrics.items():
        np.testing.assert_allclose(value, alone[1][name], rtol=1e-4, atol=1e-6, err_msg=name)


# ---- a run -----------------------------------------------------------------------------------------------------------

STEPS = 4
FRESH = (
    "objective={kind: dspark, anchors: 16, noise_token: 319, stages: 2, block_size: 3, target_layers: [0, 1], rank: 4}"
)


@pytest.fixture(scope="module", autouse=True)
def _shared_programs():
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A trunk as a released directory, in FP4 and FP8."""
    return trained().exported(tmp_path_factory.mktemp("released") / "model")


@pytest.fixture(scope="module")
def build(released, tmp_path_factory):
    """`build(run, log, *changes)`: a run of four steps."""
    texts = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} times {i} is {i * i}. " * 20}) + "\n" for i in range(40)))

    def build(run, log, *changes):
        settings = read_settings(
            None,
            [
                f"run={run}",
                f"model={released}",
                f"data={{sources: [{{path: {texts}}}], open_rows: 2, threads: 1}}",
                f"stages=[{{steps: {STEPS}, length: 128, rows: 4, microbatches: 2}}]",
                FRESH,
                "optimizer={learning_rate: 0.02, weight_decay: 0}",
                "policy=float32",
                *changes,
            ],
        )
        origin, place = Origin.of(settings), Place()
        open_run(settings, origin)
        rows = open_rows(settings, origin)
        fresh = functools.partial(origin.fresh, place, 0, settings.held)
        given = functools.partial(origin.stages, place)
        return Trainer(settings, origin.config, place, rows, fresh, log, lambda text: None, given=given)

    return build


@pytest.fixture(scope="module")
def run(build, tmp_path_factory):
    """A whole run: its directory, its losses, and the base after it."""
    path, log = tmp_path_factory.mktemp("runs") / "run", Metrics()
    trainer = build(path, log)
    assert trainer.run() == "done"
    return path, {step: metrics["loss"] for step, metrics in log.found.items()}, trainer._base


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def test_the_trunk_is_left_alone(run, released):
    """It is held as it is on disk, and is the same after all steps, which learn all the same."""
    _, losses, base = run
    leaves = jax.tree.leaves(base, is_leaf=lambda node: isinstance(node, BlockScaled))
    assert DSPARK not in base and sum(isinstance(leaf, BlockScaled) for leaf in leaves) > 10
    assert bits(base) == bits(load(released)[1])
    assert losses[STEPS] < losses[1] - 0.1


def test_stopped_and_continued(run, build, tmp_path):
    """Bit for bit the losses of a run that was not stopped, and its stages."""
    first, second = Metrics(stop=2), Metrics()
    assert build(tmp_path / "run", first).run() == "stopped"
    assert build(tmp_path / "run", second).run() == "done"
    found = {step: metrics["loss"] for step, metrics in (first.found | second.found).items()}
    assert found == run[1] and not set(first.found) & set(second.found)
    assert bits(load(tmp_path / "run", dtype="float32")[1]) == bits(load(run[0], dtype="float32")[1])


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The run in the released layout."""
    return export(run[0], tmp_path_factory.mktemp("exported") / "model").path


def test_exported(run, exported, released, tmp_path):
    """A step holds stages and no weight; what is exported is the trunk as it was, and the stages after it."""
    path = run[0]
    step = path / "checkpoints" / str(STEPS)
    assert sorted(item.name for item in step.iterdir() if item.is_dir()) == ["optimizer", "progress", "stages"]
    assert verify(path, exported).equal
    with open_checkpoint(released) as base, open_checkpoint(exported) as made:
        assert made.config.dspark_stages == 2 and made.config.trunk() == base.config
        assert {name.split(".")[1] for name in made.tensors if name.startswith("mtp.")} == {"0", "1"}
        for name in base.tensors:
            assert base.read(name).tobytes() == made.read(name).tobytes()
        assert json.loads((exported / "config.json").read_text())["num_nextn_predict_layers"] == 1
    tokens = jax.random.randint(jax.random.key(5), (1, 40), 0, 320)
    found = []
    for directory in (path, exported):
        config, params = load(directory)
        model = jitted(make(**config_fields(config)).model)
        taps = model(params, tokens, return_taps=True, logits="none").taps
        found.append(model(params, taps, tokens[:, 0], method="dspark"))
    assert bits(found[0]) == bits(found[1]) and found[0].tokens.shape == (1, 3)


def config_fields(config):
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def test_stages_that_are_there_go_on(run, exported, build, tmp_path):
    """A release's stages are what a run begins with, as float32 masters, unless they are to be fresh."""
    log, kept = Metrics(stop=1), "objective={kind: dspark, anchors: 16}"
    trainer = build(tmp_path / "run", log, f"model={exported}", kept)
    assert trainer.run() == "stopped"
    assert log.found[1]["loss"] < run[1][STEPS - 1] and DSPARK not in trainer._base
    begun = trainer._given()
    assert bits(begun) == bits({DSPARK: load(exported, dtype="float32")[1][DSPARK]})
    settings = trainer._settings
    assert Origin.of(settings).drafts == settings.objective
    with pytest.raises(
        ValueError, match=r"objective.block_size is 5, and the model has stages of 3: expected that, or"
    ):
        build(tmp_path / "other", log, f"model={exported}", "objective={kind: dspark, block_size: 5}")
    fresh = build(
        tmp_path / "fresh", log, f"model={exported}", "objective={kind: dspark, fresh: true, noise_token: 300}"
    )
    assert fresh._given() is None and fresh._config.dspark_stages == 3
    assert fresh._config.dspark_target_layer_ids == (0, 1) and fresh._config.dspark_markov_rank == 256


def test_formats_that_are_not_made_are_refused():
    nvfp4 = dataclasses.replace(two().config, expert_dtype="nvfp4")
    with pytest.raises(ValueError, match="the model's experts are in NVFP4, which is read and not made"):
        DSpark(noise_token=319).of(nvfp4)


def test_an_mtp_block_is_replaced(build, tmp_path):
    """As in the release; it is said, and named among what is left out."""
    model = two().exported(tmp_path / "model")
    trainer = build(tmp_path / "run", Metrics(stop=1), f"model={model}", "stages.0.microbatches=1")
    assert trainer.run() == "stopped"
    (note,) = notes(trainer._settings, Origin.of(trainer._settings))
    assert "multi-token-prediction block is left out" in note
    with open_checkpoint(tmp_path / "run") as made:
        (left_out,) = made.ignored.values()
        assert "mtp.0.e_proj.weight" in left_out and "mtp.0.main_proj.weight" in made.tensors


def test_another_trunk_is_refused(run, build, released, tmp_path):
    """As are weights in place of stages; and a trunk that changed is not put together with them."""
    moved = tmp_path / "run"
    shutil.copytree(run[0], moved)
    with pytest.raises(SettingsError, match="is a run of another architecture"):
        build(moved, Metrics(), "objective=null", "objective={kind: pretraining}")
    with pytest.raises(SettingsError, match=r"another architecture \(it differs in dspark_markov_rank\)"):
        build(moved, Metrics(), "objective.rank=8")
    other = make(1, **config_fields(trained().config)).exported(tmp_path / "other")
    with pytest.raises(SettingsError, match=f"{other} holds other weights"):
        build(moved, Metrics(), f"model={other}")
    record = json.loads((moved / "stages.json").read_text())
    (moved / "stages.json").write_text(json.dumps(record | {"model": str(other)}))
    with pytest.raises(CheckpointError, match="is not the model that the stages of"):
        load(moved)
    (moved / "stages.json").write_text(json.dumps(record | {"version": 2}))
    with pytest.raises(CheckpointError, match="is no record of v4-jax stages, version 1"):
        load(moved)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["objective.noise_token=null"], "objective.noise_token is missing, and the stages are fresh: expected the id"),
        (["objective.noise_token=320"], "dspark_noise_token_id is 320, expected one below 320"),
        (
            ["objective.target_layers=[1, 2]"],
            "dspark_target_layer_ids is [1, 2], expected rising",
        ),
        (["objective.block_size=9"], "objective.block_size is 9, expected at most 8"),
    ],
)
def test_stages_that_do_not_fit(build, changes, said, tmp_path):
    with pytest.raises(ValueError, match=re.escape(said)):
        build(tmp_path / "run", Metrics(), *changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["model=null", "architecture={}"], "objective dspark trains stages on a trunk: expected model, the directory"),
        (["lora={}"], "objective dspark leaves the trunk as it is, and lora adapts it: leave one of them out"),
        (["fp4_experts=true", "objective.base=float32"], "fp4_experts rounds all experts that are held in floats, as"),
        (["stages.0.attention=dense"], "stages.0.attention is dense, and objective dspark leaves the trunk as it is"),
        (["objective.anchors=128"], "stages.0.length is 128, which has no room for objective.anchors 128"),
        (["objective.gamma=0"], "objective.dspark.gamma is 0: input should be greater than 0"),
        (["objective.depth=2"], "unknown field objective.dspark.depth; expected one of anchors, base, block_size,"),
    ],
)
def test_settings_that_make_no_sense(changes, said):
    given = "run=r", "model=m", "data.sources=[{path: x}]", "stages=[{steps: 1, length: 128, rows: 1}]", FRESH
    with pytest.raises(SettingsError, match=re.escape(said)):
        read_settings(None, [*given, *changes])
