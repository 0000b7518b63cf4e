"""Benchmarks on the processor: what is timed, where the time goes, what is written down, and what is refused."""

from __future__ import annotations

import functools
import json
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import THREE, TWO, make, two
from v4_jax import Config, profiler
from v4_jax.commands import bench as verb
from v4_jax.layers.mixture_of_experts import hash_table
from v4_jax.number_formats import BlockScaled, dequantise
from v4_jax.planning import kernel_comparison, measure, profile
from v4_jax.planning.hlo import Program
from v4_jax.planning.job import Job, abstract_params, program_of, without_mtp
from v4_jax.planning.kernel_comparison import comparisons
from v4_jax.planning.links import Links
from v4_jax.planning.random_values import random_cache, random_weights, uniform
from v4_jax.sharding.chips import Topology, topology_of
from v4_jax.sharding.mesh import make_mesh, parse_mesh
from v4_jax.sharding.platform import by_platform, choices_watched, interpreted

ALONE = parse_mesh("data=1")
MESH = "data=2,expert=4"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two layers whose experts are enough for eight devices."""
    return make(**TWO | {"n_routed_experts": 8}).exported(tmp_path_factory.mktemp("whole") / "small")


@pytest.fixture(scope="module")
def bare(tmp_path_factory, whole):
    """A directory with its config.json and nothing else."""
    path = tmp_path_factory.mktemp("bare") / "small"
    path.mkdir()
    shutil.copy(whole / "config.json", path)
    return path


def decoded(model, *more):
    sizes = ("--context", 64, "--batch", 4, "--dtype", "bfloat16", "--steps", 4, "--warm-up", 1)
    return ("bench", "--model", model, "--task", "decode", *sizes, *more)


# ---- a whole benchmark -----------------------------------------------------------------------------------------------


def test_decoding_on_a_mesh(run, whole, tmp_path):
    path, kept = tmp_path / "result.json", tmp_path / "trace"
    said = run(*decoded(whole, "--mesh", MESH, "--json", path, "--profile", kept))
    assert said.code == 0, said.err
    assert "of small, its own weights (bfloat16), on 8 devices (cpu) as --mesh data=2,expert=4" in re.sub(
        r"\s+", " ", said.out
    )
    assert "there is no estimate for cpu: plan knows TPUs alone" in said.out and f"written: {path}" in said.err
    result = json.loads(path.read_text())
    assert list(result) == [
        *("format", "versions", "devices", "settings", "compile_s", "memory", "warm_up", "times_s", "median_s"),
        *("tokens_per_second", "finite", "parts", "kernels", "plan"),
    ]
    assert result["versions"]["jax"] == jax.__version__
    assert result["devices"]["count"] == 8 and result["devices"]["topology"] is None and result["plan"] is None
    asked = {"model": "small", "layers": 2, "layers_of_model": 2, "task": "decode", "context": 64, "batch": 4}
    assert asked.items() <= result["settings"].items() and result["settings"]["weights"] == "checkpoint"
    assert len(result["times_s"]) == 4 and result["median_s"] == pytest.approx(np.median(result["times_s"]))
    assert result["tokens_per_second"] == pytest.approx(4 / result["median_s"]) and result["finite"]
    assert result["memory"]["together"] >= result["memory"]["arguments"] > 0
    parts = result["parts"]
    assert parts["devices"] == 8 and parts["busy_s"] == pytest.approx(sum(parts["seconds"].values()))
    assert {"collectives", "experts.ffn", "attention.window"} <= set(parts["seconds"])
    assert list(kept.rglob("*.xplane.pb"))


def test_alone_with_random_weights(run, bare):
    """On one device and few threads, the parts take about as long together as the calls that they are of."""
    said = run(*decoded(bare, "--json", "-"))
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result["settings"]["weights"] == "random" and result["devices"]["count"] == 1
    assert result["parts"]["devices"] == 1 and 0.1 < result["parts"]["busy_s"] / result["parts"]["call_s"] < 4


def test_training(run, bare):
    """One layer, with its optimiser: the loss is a number after several steps."""
    said = run("bench", "--model", bare, "--layers", 1, "--task", "train", "--context", 32, "--steps", 2, "--json", "-")
    assert said.code == 0, said.err
    result = json.loads(said.out)
    assert result["finite"] and result["settings"]["layers"] == 1 and result["settings"]["layers_of_model"] == 2
    assert result["settings"]["chunk"] == 32 and "experts.ffn" in result["parts"]["seconds"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--context", "0"), "size '0' is not understood"),
        (("--context", "2M"), "--context 2M is more than the model's"),
        (("--batch", "0"), "expected at least 1"),
        (("--layers", "3"), "--layers: 3 layers are asked for, expected 1 to 2"),
        (("--mesh", "wheel=8"), "found 'wheel=8', expected each of data, seq, expert, tensor"),
        (("--mesh", "data=2"), "mesh data=2 has 2 places, but there are 8 devices"),
        (("--mesh", "tensor=8"), "legal meshes of 8 devices are"),
        (("--preset", "fast"), "no preset 'fast'; expected one of decode, prefill"),
        (("--chunk", "4"), "--chunk is for prefill: decode takes one token"),
        (("--dtype", "native"), "expected --dtype bfloat16"),
        (("--json", "/nowhere/x.json"), "there is no directory /nowhere"),
        (("--profile", __file__), "is a file; expected a directory"),
    ],
)
def test_what_cannot_be_run(run, bare, options, sentence):
    said = run(*decoded(bare, *options))
    assert said.code == 2 and sentence in said.err and said.out == "" and "Traceback" not in said.err


def test_what_has_no_room_is_said_before_anything_is_made(run, bare, monkeypatch):
    monkeypatch.setattr(measure, "free_bytes", lambda mesh: 10_000)
    monkeypatch.setattr(measure, "random_weights", None)
    said = run(*decoded(bare))
    assert said.code == 2
    assert "the decode step has no room on each device: its weights and cache take" in said.err
    assert "10.00 kB are free; expected fewer --layers" in said.err


@pytest.mark.parametrize("calls", [2, 6])  # while they are timed, and while they are traced
def test_an_interrupt_ends_it(run, bare, monkeypatch, tmp_path, calls):
    step, counted = measure.Run.step, []

    def interrupted(self):
        counted.append(None)
        if len(counted) > calls:
            raise KeyboardInterrupt
        return step(self)

    with monkeypatch.context() as context:
        context.setattr(measure.Run, "step", interrupted)
        said = run(*decoded(bare, "--json", tmp_path / "x.json"))
    assert said.code == 130 and said.out == "" and not list(tmp_path.iterdir())
    with profiler.recorded(tmp_path):
        pass  # the trace was ended, or another could not begin


# ---- beside a plan ---------------------------------------------------------------------------------------------------


def test_on_chips_that_plan_knows_its_numbers_stand_beside(run, bare, monkeypatch):
    """The program that was measured is the one that is estimated: with a processor taken for a chip."""
    monkeypatch.setattr(verb, "topology_of", lambda devices: Topology.parse("v6e:1x1") if len(devices) == 1 else None)
    monkeypatch.setattr("v4_jax.planning.kernels.cycles", lambda *_: {})
    monkeypatch.setattr(Links, "between", lambda devices, topology: Links(topology, ((0, 0),)))
    said = run(*decoded(bare, "--json", "-"))
    assert said.code == 0, said.err
    plan = json.loads(said.out)["plan"]
    assert 0 < plan["floor_s"] <= plan["estimate_s"] and plan["bound"] in ("flops", "hbm", "ici")
    assert plan["estimate_s"] == pytest.approx(sum(plan["parts"].values()))
    tables = run(*decoded(bare))
    assert re.search(r"plan's estimate +│.*│.*│ +[\d.]+ ", tables.out) and "plan's floor" in tables.out


def chips(kind, *places):
    return [types.SimpleNamespace(device_kind=kind, coords=list(place)) for place in places]


def test_topologies_of_devices():
    square = [(x, y, 0) for x in range(2) for y in range(4)]
    assert str(topology_of(chips("TPU v6 lite", *square))) == "v6e:2x4"
    cube = [(x, y, z) for x in range(2) for y in range(2) for z in range(1)]
    assert str(topology_of(chips("TPU v5", *cube))) == "v5p:2x2x1"
    assert str(topology_of(chips("TPU7x", *cube, *cube))) == "tpu7x:2x2x1"
    assert topology_of(chips("TPU v6 lite", *square[:-1])) is None  # not a block
    assert topology_of(chips("TPU7x", *cube)) is None  # half of each chip
    assert topology_of(jax.devices()) is None


# ---- random numbers --------------------------------------------------------------------------------------------------


def test_random_numbers():
    numbers = np.asarray(uniform((64, 100), 3))
    assert abs(numbers.mean()) < 0.02 and abs(numbers.std() - 3**-0.5) < 0.01
    assert len(np.unique(numbers)) > 6390 and np.abs(numbers).max() <= 1
    neighbours = np.corrcoef(numbers[:, 1:].ravel(), numbers[:, :-1].ravel())[0, 1]
    assert abs(neighbours) < 0.05 and abs(np.corrcoef(numbers.ravel(), uniform((64, 100), 4).ravel())[0, 1]) < 0.05


def test_random_weights_have_the_deviation_of_fresh_ones():
    config = without_mtp(make(**THREE | {"hidden_size": 64}).config)
    mesh = make_mesh(ALONE, jax.devices()[:1])
    shapes = abstract_params(config, mesh, "decode", "native")
    weights = random_weights(config, shapes)
    kinds = set()
    for leaf in jax.tree.leaves(weights, is_leaf=lambda node: isinstance(node, BlockScaled)):
        if isinstance(leaf, BlockScaled):
            kinds.add(leaf.codes.dtype.name)
            deviation = float(jnp.std(dequantise(leaf, jnp.float32)))
            assert 0.9 < deviation / config.initializer_range < 2.1  # scales are powers of two
    assert kinds == {"float8_e4m3fn", "float4_e2m1fn"}
    assert [x.dtype for x in jax.tree.leaves(weights)] == [x.dtype for x in jax.tree.leaves(shapes)]
    table = next(leaf for leaf in jax.tree.leaves(weights) if leaf.dtype == jnp.int32)
    np.testing.assert_array_equal(table, hash_table(config)(None, table.shape, jnp.int32))


def test_rows_end_blocks_as_often_as_in_use():
    job = Job(without_mtp(two().config), "decode", 300, 4, 1, ALONE, "decode", "bfloat16")
    run = object.__new__(measure.Run)
    run.executable = types.SimpleNamespace(job=job)
    starts = []
    for run._calls in range(128):
        starts.append(run._starts())
    assert np.min(starts) == 299 - 127 and np.max(starts) == 299
    ended = (np.array(starts) + 1) % 128 == 0
    assert (ended.sum(axis=0) == 1).all() and ended.sum(axis=1).max() == 1  # each row once, no two at a time


def test_a_random_cache_is_full():
    job = Job(without_mtp(two().config), "decode", 64, 2, 1, ALONE, "decode", "bfloat16")
    program = program_of(job, make_mesh(ALONE, jax.devices()[:1]))
    cache = random_cache(program.cache)
    for rows in (*cache.entries.values(), *cache.rings.values()):
        values = np.asarray(rows.decode(rows.arrays, jnp.float32))
        assert np.isfinite(values).all() and np.abs(values).max() <= 1 and np.std(values) > 0.5
    assert cache.lengths.tolist() == [0, 0]


# ---- traces ----------------------------------------------------------------------------------------------------------


def test_a_loop_is_not_paid_for_what_runs_inside():
    events = [("while.1", 0.0, 10.0, {}), ("dot.2", 1.0, 4.0, {}), ("add.3", 4.0, 5.0, {}), ("copy.4", 11.0, 12.0, {})]
    own = {name: seconds for name, _, seconds in profile._own_times(events)}
    assert own == {"while.1": 6.0, "dot.2": 3.0, "add.3": 1.0, "copy.4": 1.0}


def event(name, start, duration, **stats):
    return types.SimpleNamespace(name=name, start_ns=start * 1e9, duration_ns=duration * 1e9, stats=stats.items())


def test_operations_of_a_tpu_are_read_from_their_own_line():
    """Names are whole instructions there; other lines tell of the same time once more."""
    operations = types.SimpleNamespace(name="XLA Ops", events=[event("%dot.2 = bf16[8,8] dot(...)", 1, 3)])
    modules = types.SimpleNamespace(name="XLA Modules", events=[event("jit_call(1)", 0, 10)])
    device = types.SimpleNamespace(name="/device:TPU:3", lines=[modules, operations])
    host = types.SimpleNamespace(name="/host:CPU", lines=[types.SimpleNamespace(name="x", events=[])])
    (line,) = profile._lines(types.SimpleNamespace(planes=[host, device]), "jit_call")
    assert line == (3, [("dot.2", 1.0, 4.0, {})])


def test_what_the_compiler_made_up_belongs_to_its_neighbours():
    named = 'metadata={op_name="jit(f)/attn/attention.window/dot_general"}'
    program = Program(
        f"""HloModule jit_f

%fused (p: f32[8,8]) -> f32[8,8] {{
  %p = f32[8,8] parameter(0)
  %inner = f32[8,8] negate(%p), metadata={{op_name="jit(f)/ffn/experts.ffn/neg"}}
  ROOT %convert = f32[8,8] copy(%inner)
}}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {{
  %a = f32[8,8] parameter(0)
  %convert.1 = f32[8,8] convert(%a)
  %dot.2 = f32[8,8] dot(%convert.1, %a), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}, {named}
  %all-reduce.3 = f32[8,8] all-reduce(%dot.2), replica_groups={{{{0,1}}}}, {named}
  %fusion.4 = f32[8,8] fusion(%all-reduce.3), kind=kLoop, calls=%fused
  ROOT %copy.5 = f32[8,8] copy(%fusion.4)
}}
"""
    )
    parts = profile._parts_by_name(program)
    assert parts["convert.1"] == parts["dot.2"] == "attention.window"
    assert parts["all-reduce.3"] == "collectives"
    assert parts["fusion.4"] == parts["copy.5"] == "experts.ffn"


def test_first_layers():
    config = Config.flash().first_layers(4)
    assert config.layers == Config.flash().layers[:4] and config.num_nextn_predict_layers == 1
    assert without_mtp(config).compress_ratios == (0, 0, 4, 128)
    assert Config.flash_0731().first_layers(2) == without_mtp(Config.flash()).first_layers(2)
    with pytest.raises(ValueError, match="44 layers are asked for, expected 1 to 43"):
        Config.flash().first_layers(44)


# ---- kernels against their references --------------------------------------------------------------------------------


def test_forms_of_the_processor_are_compared(run, bare):
    said = run(*decoded(bare, "--kernels", "yes", "--json", "-", "--steps", 1))
    assert said.code == 0, said.err
    kernels = json.loads(said.out)["kernels"]
    assert {kernel["name"] for kernel in kernels} == {"index_scores"}
    for kernel in kernels:
        assert (
            kernel["error"] is None and kernel["difference"] < 1e-5 and kernel["shapes"][0].endswith("[4, 1, 32, 16]")
        )
        assert kernel["seconds"] > 0 and kernel["reference_seconds"] > 0


def test_kernels_are_found_where_they_are_chosen():
    """What is TPUs' own, interpreted: the choice of experts, among the scores of the program, and the rows' ways
    to experts and back."""
    one = {"num_hidden_layers": 1, "num_hash_layers": 0, "n_routed_experts": 128, "compress_ratios": (0, 0)}
    job = Job(without_mtp(make(**TWO | one).config), "decode", 32, 2, 1, ALONE, "decode", "bfloat16")
    with interpreted():
        compared = {one.name: one for one in comparisons(job, make_mesh(ALONE, jax.devices()[:1]))}
    assert set(compared) == {"best_experts", "leave", "back"}
    found = compared["best_experts"]
    assert found.error is None and found.seconds
    assert found.difference < 1e-6 and found.unequal == 0


def test_a_wrong_kernel_is_seen():
    """Of values that are given and values that are closed over, in a loop, of which the first turn counts."""

    def scaled(x):
        def turn(total, place):
            def right(x):
                return jnp.roll(x, place) + y, place

            def wrong(x):
                return jnp.where(jnp.arange(8) == 3, 0.5, 0) + jnp.roll(x, place) + y, place + 1

            return total + by_platform(x, default=right, cpu=wrong)[0], None

        y = 2 * x
        return jax.lax.scan(turn, x, jnp.arange(5, 9))[0]

    found = {}
    with choices_watched(functools.partial(kernel_comparison._watch, found, "cpu")):
        jax.jit(scaled)(jnp.arange(8.0))
    jax.effects_barrier()
    (choice,) = found.values()
    assert choice.name == "test_a_wrong_kernel_is_seen" and sorted(map(str, choice.seen.values())) == sorted(
        [str(np.arange(8.0)), str(2 * np.arange(8.0)), "5"]
    )
    compared = kernel_comparison._compared(choice, make_mesh(ALONE, jax.devices()[:1]))
    largest = np.max(np.roll(np.arange(8.0), 5) + 2 * np.arange(8.0))
    assert compared.difference == pytest.approx(0.5 / largest) and compared.unequal == 1 and compared.error is None

    given = next(number for number, value in choice.seen.items() if value.shape and value[1] == 1)
    choice.seen[given][0] = np.inf  # where both are infinite, nothing is compared
    assert kernel_comparison._compared(choice, make_mesh(ALONE, jax.devices()[:1])).difference > 0
