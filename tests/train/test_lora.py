"""Adapters beside a base that nobody touches: what they compute, what they learn, and what a run of them leaves."""

from __future__ import annotations

import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from tests.models import jitted, six, trained
from tests.train.logs import Metrics, shared_programs
from v4_jax.adapters import FAMILIES, A, Adapters, B
from v4_jax.checkpoint import CheckpointError, block_formats, export, export_adapters, load, open_checkpoint, verify
from v4_jax.checkpoint.byte_ranges import LocalFile
from v4_jax.checkpoint.names import transformers_name
from v4_jax.checkpoint.orbax_arrays import nested, open_arrays
from v4_jax.checkpoint.safetensors import SafetensorsFile
from v4_jax.layers.expert_parallelism import dispatch, local_experts
from v4_jax.layers.experts import Experts
from v4_jax.layers.stages import Stage
from v4_jax.low_rank import is_adapted, merged
from v4_jax.number_formats import E2M1, BlockScaled, dequantise, quantise
from v4_jax.parameter_tree import declarations, drawn, placements
from v4_jax.parameters import is_parameter, places
from v4_jax.placement import Place
from v4_jax.sharding.axes import resolve
from v4_jax.sharding.mesh import make_mesh
from v4_jax.sharding.split import Split
from v4_jax.train.batch import Batch
from v4_jax.train.loop import Trainer
from v4_jax.train.objectives.objective import Weights
from v4_jax.train.precision import held_as
from v4_jax.train.settings import SettingsError, read_settings
from v4_jax.train.setup import Origin, open_rows, open_run
from v4_jax.train.step import TrainState, make_step

RATE, WEIGHTS = 1.0, Weights(mtp=0.0, balance=0.01, indexer=0.5)
SGD = optax.sgd(RATE)  # shows the gradients as they are
ALL = Adapters(3, 6.0, FAMILIES)


@pytest.fixture(scope="module")
def tiny():
    return trained()


def some(config):
    """Factors of every family, none of them zero."""
    fresh = drawn(ALL.declarations(config), jax.random.key(1))
    return jax.tree.map(lambda x: x + 0.1 * jax.random.normal(jax.random.key(2), x.shape), fresh)


@pytest.fixture(scope="module")
def factors(tiny):
    return some(tiny.config)


@pytest.fixture(scope="module")
def rows():
    tokens = jax.random.randint(jax.random.key(5), (4, 128), 0, 320)
    return Batch(tokens, jnp.where(jnp.arange(128) < 120, 1 + (jnp.arange(128) > 50), 0)[None].repeat(4, 0))


def whole(params):
    """Plain parameters, of which updates are a part."""
    return jax.tree.map(lambda x: merged(x) if is_adapted(x) else x, params, is_leaf=is_adapted)


def stepped(tiny, step, params, rows, base=None):
    state = TrainState(jnp.int32(0), params, SGD.init(params))
    return step(state, jax.tree.map(lambda x: x[None], rows), None, base)


def test_every_matrix_has_a_family(tiny):
    """But the projections of hyper-connections, which kernels read."""
    for parameter in jax.tree.leaves(declarations(tiny.config), is_leaf=is_parameter):
        assert (parameter.family is not None) == (parameter.group == "muon" and "hc_" not in parameter.released)


def test_fresh_adapters_change_nothing(tiny, rows):
    fresh = drawn(ALL.declarations(tiny.config), jax.random.key(1))
    assert all((x == 0).all() == (path[-1].key == B) for path, x in jax.tree_util.tree_leaves_with_path(fresh))
    found = jitted(tiny.model)(ALL.onto(tiny.params, fresh), rows.tokens).logits
    np.testing.assert_array_equal(found, tiny(rows.tokens).logits)


def test_merged_is_adapted():
    """In layers that are stacked, too."""
    tiny, tokens = six(), jax.random.randint(jax.random.key(5), (2, 40), 0, 64)
    run, adapted = jitted(tiny.model), ALL.onto(tiny.params, some(tiny.config))
    found, expected = (run(params, tokens).logits for params in (adapted, whole(adapted)))
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.fixture(scope="module")
def model(tiny):
    return tiny.model.clone(stage=Stage(indexer_loss=True), remat="sublayers")


@pytest.fixture(scope="module")
def gradients(tiny, model, factors, rows):
    """Of the factors, from one step; and of the same weights, merged, as a plain run has them."""
    step = functools.partial(make_step, model, SGD, lambda step: WEIGHTS)
    after, metrics = stepped(tiny, jax.jit(step(addition=ALL)), factors, rows, tiny.params)
    plain = whole(ALL.onto(tiny.params, factors))
    plainly, expected = stepped(tiny, jax.jit(step()), plain, rows)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    return tuple(
        jax.tree.map(lambda x, y: (x - y) / RATE, *pair) for pair in ((factors, after.params), (plain, plainly.params))
    )


def test_gradients_are_those_of_the_merged_weights(factors, gradients):
    """dL/dA = s B^T G and dL/dB = s G A^T, of the gradient G of the weight itself; experts and stacks included."""
    found, of_weights = gradients

    def compare(found, weight, factors):
        if A not in found:
            for name in found:
                compare(found[name], weight[name], factors[name])
            return
        g, a, b = (np.asarray(x, np.float64) for x in (weight, factors[A], factors[B]))
        for name, expected in ((A, b.swapaxes(-1, -2) @ g), (B, g @ a.swapaxes(-1, -2))):
            assert np.abs(expected).max() > 0
            scale = ALL.scale * np.abs(expected).max()
            np.testing.assert_allclose(found[name], ALL.scale * expected, atol=2e-4 * scale + 1e-6)

    compare(found, of_weights, factors)


def test_on_a_mesh(tiny, model, factors, rows, gradients):
    """Factors in shards, as their matrices are: the same gradients."""
    mesh = make_mesh("data=2,expert=2,tensor=2")
    place = Place(mesh, "train")
    base = jax.device_put(tiny.params, placements(tiny.config, mesh, "train"))
    where = places(ALL.declarations(tiny.config), mesh, resolve("train"))
    spread = jax.device_put(factors, where)
    step = jax.jit(make_step(model.clone(mesh=mesh, rules="train"), SGD, lambda step: WEIGHTS, addition=ALL))
    after, _ = stepped(tiny, step, spread, place.put(rows), base)
    for (path, x), y, expected in zip(
        jax.tree_util.tree_leaves_with_path(factors), *map(jax.tree.leaves, (after.params, gradients[0])), strict=True
    ):
        np.testing.assert_allclose(x - y, expected, atol=2e-5 + 1e-4 * np.abs(expected).max(), err_msg=str(path))


def test_experts_that_rows_travel_to(tiny, factors):
    """More rows than visit every device: each goes to its experts, FP4 with adapters, and gradients come back."""
    count, tokens, names = tiny.config.n_routed_experts, 1200, ("w1", "w2", "w3")
    rng = np.random.default_rng(0)
    x, probe = (rng.normal(size=(tokens, tiny.config.hidden_size)).astype(np.float32) for _ in range(2))
    assigned = np.argsort(rng.random((tokens, count)), axis=1)[:, :2].astype(np.int32)
    scale = rng.random(assigned.shape).astype(np.float32)
    layer, base = factors["layer_1"]["ffn"], tiny.params["layer_1"]["ffn"]
    base, layer = ({name: tree[name] for name in names} for tree in (base, layer))
    stored = {name: quantise(value, E2M1) for name, value in base.items()}

    def alone(factors, x, scale):
        experts = Experts(**ALL.onto(stored, factors))
        found = local_experts(x, assigned, scale, experts, None, count=count, limit=tiny.config.swiglu_limit)
        return jnp.sum(probe * found)

    mesh, rows = make_mesh("expert=4", jax.devices()[:4]), P("expert")
    split = Split.on(mesh, resolve("train"), 1, 128)

    def spread(factors, x, scale):
        @functools.partial(jax.shard_map, mesh=mesh, in_specs=rows, out_specs=P(), check_vma=False)
        def each(experts, x, assigned, scale, probe):
            found = dispatch(x, assigned, scale, experts, None, tiny.config, jnp.float32, split)
            return jax.lax.psum(jnp.sum(probe * found), "expert")

        return each(Experts(**ALL.onto(stored, factors)), x, assigned, scale, probe)

    expected, found = (jax.jit(jax.grad(call, argnums=(0, 1, 2)))(layer, x, scale) for call in (alone, spread))
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max())


# ---- a run -----------------------------------------------------------------------------------------------------------

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def _shared_programs():
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def released(tiny, tmp_path_factory):
    """The model as a released directory, in FP4 and FP8."""
    return tiny.exported(tmp_path_factory.mktemp("released") / "model")


@pytest.fixture(scope="module")
def build(released, tmp_path_factory):
    """`build(run, log, *changes)`: a run of four steps that adapts attention and experts."""
    texts = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{i} times {i} is {i * i}. " * 20}) + "\n" for i in range(40)))

    def build(run, log, *changes):
        settings = read_settings(
            None,
            [
                f"run={run}",
                f"model={released}",
                f"data={{sources: [{{path: {texts}}}], open_rows: 2, threads: 1}}",
                f"stages=[{{steps: {STEPS}, length: 128, rows: 4}}]",
                "lora={rank: 3, alpha: 6, families: [attention, experts]}",
                "optimizer={learning_rate: 0.01, weight_decay: 0}",
                "policy=float32",
                *changes,
            ],
        )
        origin, place = Origin.of(settings), Place()
        open_run(settings, origin)
        rows = open_rows(settings, origin)
        fresh = functools.partial(origin.fresh, place, 0, settings.held)
        return Trainer(settings, origin.config, place, rows, fresh, log, lambda text: None)

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


def test_the_base_is_left_alone(run, released):
    """It is held as it is on disk, and is the same after all steps, which learn all the same."""
    _, losses, base = run
    assert sum(isinstance(leaf, BlockScaled) for leaf in leaves(base)) > 10
    assert bits(base) == bits(load(released)[1])
    assert losses[STEPS] < losses[1] - 0.1


def leaves(tree):
    return jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, BlockScaled))


def test_stopped_and_continued(run, build, tmp_path):
    """Bit for bit the losses of a run that was not stopped, and its adapters."""
    first, second = Metrics(stop=2), Metrics()
    assert build(tmp_path / "run", first).run() == "stopped"
    assert build(tmp_path / "run", second).run() == "done"
    found = {step: metrics["loss"] for step, metrics in (first.found | second.found).items()}
    assert found == run[1] and not set(first.found) & set(second.found)
    assert bits(load(tmp_path / "run", dtype="float32")[1]) == bits(load(run[0], dtype="float32")[1])


def test_saved_apart_and_merged_at_export(run, released, tiny, tmp_path):
    """A step holds adapters and no weight; what is exported is the model with them, rounded, and all else as it was."""
    path, _, base = run
    step = path / "checkpoints" / str(STEPS)
    assert sorted(item.name for item in step.iterdir() if item.is_dir()) == ["adapters", "optimizer", "progress"]
    factors = nested({key: array.read((), key) for key, array in open_arrays(step / "adapters")})
    adapters = Adapters(3, 6.0, ("attention", "experts"))
    expected = whole(adapters.onto(base, factors))
    values, held = (load(path, dtype=dtype)[1] for dtype in ("float32", "native"))
    for (at, x), y in zip(jax.tree_util.tree_leaves_with_path(values), leaves(expected), strict=True):
        np.testing.assert_allclose(x, dequantise(y, jnp.float32), atol=1e-6, err_msg=str(at))
    rounded = jax.jit(functools.partial(held_as, config=tiny.config, dtype="native"))
    assert bits(held) == bits(rounded(values))
    export(path, tmp_path / "out")
    assert verify(path, tmp_path / "out").equal
    differing = {row.name for row in verify(released, tmp_path / "out").differing}
    assert differing and all(".attn.w" in name or ".experts." in name for name in differing)


def test_adapters_alone(run, released, tmp_path):
    """As PEFT has them: with them the weights of transformers' modules are those of the run."""
    written = export_adapters(run[0], tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 6.0, str(released))
    file = SafetensorsFile(LocalFile(tmp_path / "out" / "adapter_model.safetensors"))
    assert written.tensors == len(file.entries) == 2 * len(config["target_modules"])
    with open_checkpoint(run[0]) as merged_run, open_checkpoint(released) as base:
        for name in ("layers.1.attn.wo_a.weight", "layers.1.ffn.experts.5.w3.weight"):
            module = f"base_model.model.{transformers_name(name).removesuffix('.weight')}"
            a, b = (file.read(file.entries[f"{module}.{factor}.weight"]) for factor in (A, B))
            form = base.formats.block("expert" if "experts" in name else "fp8")
            held = block_formats.dequantise(base.read(name), base.read(block_formats.scale_name(name)), form)
            np.testing.assert_allclose(merged_run.unrounded(name), held + 2 * b @ a, atol=1e-6)
    with pytest.raises(CheckpointError, match="has no adapters, expected a training run with lora"):
        export_adapters(released, tmp_path / "none")


def test_another_base_is_refused(run, build, tiny, tmp_path):
    """As are weights in place of adapters, and other adapters; and a base that changed is not merged."""
    path, moved = run[0], tmp_path / "run"
    shutil.copytree(path, moved)
    for change, said in (
        ("lora=null", "trains adapters, and lora says otherwise"),
        ("lora.rank=4", "rank=3"),
        ("lora.families=[mtp]", "has no such matrices; expected others"),
    ):
        with pytest.raises(SettingsError, match=said):
            build(moved, Metrics(), change)
    export((tiny.config, jax.tree.map(lambda x: -x if x.ndim == 1 else x, tiny.params)), tmp_path / "other")
    with pytest.raises(SettingsError, match=f"{tmp_path / 'other'} holds other weights"):
        build(moved, Metrics(), f"model={tmp_path / 'other'}")
    record = json.loads((moved / "adapters.json").read_text())
    (moved / "adapters.json").write_text(json.dumps(record | {"model": str(tmp_path / "other")}))
    with pytest.raises(CheckpointError, match="is not the model that the adapters of"):
        load(moved)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("lora={rank: 0}", "lora.rank is 0: input should be greater than 0"),
        ("lora={families: [mlp]}", "lora.families.0 is 'mlp': input should be 'attention', "),
        ("lora={targets: [wq_a]}", "unknown field lora.targets; expected one of alpha, base, families, rank"),
        ("fp4_experts=true", "fp4_experts rounds weights that are trained, and lora trains none"),
        ("stages.0.attention=indexer", "nothing but the indexer learns, and lora.families are attention, shared"),
        ("lora={families: [indexer]} stages.0.attention=dense", "where all but the indexer learns, and"),
    ],
)
def test_settings_that_make_no_sense(change, said):
    given = "run=r", "model=m", "data.sources=[{path: x}]", "stages=[{steps: 1, length: 8, rows: 1}]", "lora={}"
    with pytest.raises(SettingsError, match=re.escape(said)):
        read_settings(None, [*given, *re.split(" (?=stages)", change)])


def test_a_fresh_model_has_nothing_to_adapt():
    given = "run=r", "architecture={}", "data.sources=[{path: x}]", "stages=[{steps: 1, length: 8, rows: 1}]"
    with pytest.raises(SettingsError, match="lora trains adapters of a model: expected model"):
        read_settings(None, [*given, "lora={}"])
