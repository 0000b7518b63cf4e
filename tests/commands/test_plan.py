"""Plans: estimates, what the report says, and, where the TPU compiler is installed, what it says."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
from rich.console import Console

from v4_jax import Config
from v4_jax.commands import plan as compilation
from v4_jax.commands import plan_report as card
from v4_jax.costs import parameter_bytes
from v4_jax.planning import compile as ahead_of_time
from v4_jax.planning import estimates as planning
from v4_jax.planning.compile import Collectives, Compiled, OutOfMemory, PlanError, Workload
from v4_jax.planning.job import without_mtp
from v4_jax.sharding.chips import CHIPS, Topology

FLASH = without_mtp(Config.flash())
NO_MESH = {"data": 1, "seq": 1, "expert": 1, "tensor": 1}
MEGABYTE = 10**6


def workload(**changes):
    values = dict(config=FLASH, task="decode", context=2**20, batch=1, chunk=1, topology=Topology.parse("v6e:2x4"))
    values |= dict(mesh=NO_MESH | {"tensor": 8}, preset="decode", dtype="native")
    return Workload(**(values | changes))


def compiled(**changes):
    values = dict(
        weights=20 * 10**9, cache=10**9, arguments=22 * 10**9, temporaries=3 * 10**9, peak=25 * 10**9, live=24 * 10**9
    )
    values |= dict(flops=1e12, hbm=50e9, collectives=(Collectives("all-gather", 43.0, 2e9, 1.75e9),), seconds=61.0)
    values |= dict(heaviest=((40e9, 20.0, "copy", "u8[21,448]", "jit(step)/layers/attn/scatter"),))
    values |= dict(
        estimate_s=0.1,
        operations=4e4,
        bounded=("attend",),
        parts={"hyper_connections.sinkhorn": 0.06, "experts.ffn": 0.04},
    )
    return Compiled(**(values | dict(compiler_flops=1e11, compiler_hbm=5e9) | changes))


def printed(*renderables):
    console = Console(width=140)
    with console.capture() as capture:
        console.print(*renderables)
    return capture.get()


@pytest.fixture
def compiler(monkeypatch):
    """A compiler that answers from a list, and the jobs that it was given."""
    jobs = []

    def install(*answers):
        replies = iter(answers)

        def compile_for_tpu(workload):
            jobs.append(workload)
            reply = next(replies)
            if isinstance(reply, Exception):
                raise reply
            return reply

        monkeypatch.setattr(compilation, "compile_for_tpu", compile_for_tpu)
        return jobs

    return install


# ---- topologies ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "chips", "devices"),
    [("v6e:2x4", 8, 8), ("v5p:2x2x2", 8, 8), ("tpu7x:2x2x4", 16, 32), ("v5e:16x16", 256, 256)],
)
def test_topologies(text, chips, devices):
    topology = Topology.parse(text)
    assert (topology.chips, topology.devices, str(topology)) == (chips, devices, text)
    assert topology.chip.per_device().hbm_bytes * devices == topology.chip.hbm_bytes * chips


@pytest.mark.parametrize("text", ["", "v6e", "v6e:", "v6e:8", "v6e:2x2x2", "v5p:2x2", "v9:2x2", "v6e:0x4", "v6e:2x4 "])
def test_nonsense_is_no_topology(text):
    with pytest.raises(ValueError, match=r"expected one of v4, v5e|has [23] axes, as in"):
        Topology.parse(text)


# ---- estimates -------------------------------------------------------------------------------------------------------


def test_candidates_are_ranked():
    found = planning.candidates(workload(), ["decode"])
    assert [one.order for one in found] == sorted(one.order for one in found)
    assert found[0].workload.mesh["tensor"] == 8 and found[0].fits  # one row: what is not split is read by everyone
    assert all(one.workload.mesh["data"] == 1 for one in found)
    whole = planning.estimate(workload(mesh=NO_MESH, topology=Topology.parse("v6e:1x1")))
    assert not whole.fits and whole.weights == pytest.approx(parameter_bytes(FLASH).total, rel=0.01)


def test_many_rows_split_over_data():
    """Each device would read windows of all rows, and hand on their softmaxes: the compiler says 38 ms, and here 22."""
    found = planning.candidates(workload(batch=128, context=2**15, topology=Topology.parse("v6e:4x4")), ["decode"])
    assert {axis: size for axis, size in found[0].workload.mesh.items() if size > 1} == {"data": 4, "tensor": 4}
    together = planning.estimate(
        dataclasses.replace(found[0].workload, mesh=found[0].workload.mesh | {"data": 1, "seq": 4})
    )
    assert together.floor.ici > 2 * found[0].floor.ici and together.floor.hbm > found[0].floor.hbm


def test_the_least_of_a_step():
    least = planning.least_work(workload())
    assert least.flops == FLASH.flops_per_token(2**20).total
    # Six of 256 experts of each layer, all else once; index keys and HCA entries, not the unpicked CSA entries.
    assert 10e9 < least.weights < 12e9
    cache = FLASH.cache_bytes(2**20).by_role
    assert cache["index"] + cache["hca"] < least.cache < cache["index"] + cache["csa"]
    many = planning.least_work(workload(batch=32))
    assert many.flops == 32 * least.flops and many.cache == 32 * least.cache
    assert least.weights < many.weights < planning.least_work(workload(batch=1024)).weights


def test_adapters_need_little_beside_the_weights():
    """Their state is theirs alone, the base lies in its formats, and no weight has a gradient."""
    there = dict(config=Config.flash(), context=4096, chunk=4096, batch=8, preset="train", mesh=NO_MESH | {"expert": 8})
    whole, tuned = (workload(task=task, **there) for task in ("train", "sft"))
    found, weights = planning.estimate(tuned), parameter_bytes(Config.flash()).total / 8
    assert found.fits and weights < found.weights < 1.02 * weights
    assert planning.estimate(whole).weights > 12 * found.weights
    flops = [planning.least_work(one).flops for one in (whole, tuned)]
    assert 2 / 3 < flops[1] / flops[0] < 0.75


def test_stages_are_trained_beside_the_trunk():
    """What is held is the trunk in its formats, and masters and moments of the stages alone."""
    config = Config.flash_0731()
    there = dict(config=config, context=4096, chunk=4096, batch=8, preset="train", mesh=NO_MESH | {"expert": 8})
    whole, stages = (planning.estimate(workload(task=task, **there)) for task in ("train", "dspark"))
    of_stages = parameter_bytes(config).total - parameter_bytes(config.trunk()).total
    trunk = parameter_bytes(config.trunk()).total / 8
    assert trunk + of_stages / 8 < stages.weights < whole.weights / 3
    flops = planning.least_work(workload(task="dspark", **there)).flops / (8 * 4096)
    forward = config.flops_per_token(4096).total
    assert 0.8 * forward < flops < 2 * forward


def test_the_floor_is_the_largest_of_three():
    floor = planning.floor_of(workload(), compiled())
    assert floor.flops == 1e12 / 918e12 and floor.hbm == 50e9 / 1638e9 and floor.ici == 1.75e9 / 400e9
    assert floor.seconds == floor.hbm and floor.bound == "hbm"
    halves = planning.floor_of(workload(topology=Topology.parse("tpu7x:2x2x1")), compiled())
    assert halves.hbm == 2 * 50e9 / CHIPS["tpu7x"].hbm_bandwidth


def test_jobs_and_results_travel_as_json():
    assert Workload.from_json(json.loads(json.dumps(workload().to_json()))) == workload()
    assert Compiled.from_json(json.loads(json.dumps(dataclasses.asdict(compiled())))) == compiled()


# ---- the compiler's refusals -----------------------------------------------------------------------------------------


def test_too_little_memory_is_understood():
    error = ahead_of_time._refusal(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (42.58G) exceeds "
        "available HBM (31.25G)."
    )
    assert isinstance(error, OutOfMemory)
    assert (error.required, error.available) == (42.58 * 2**30, 31.25 * 2**30)
    said = card.refusal(workload(), error)
    assert said.startswith(
        "temporaries need 45.72 GB of the 33.55 GB that a chip has, 12.17 GB too much; weights take "
    )
    used = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 35.10G of 31.25G hbm. Exceeded by 3.85G."
    assert ahead_of_time._refusal(used).required == 35.10 * 2**30


def test_a_crash_is_told_in_a_sentence():
    stderr = (
        "F1 fusion.cc:1] Check failed: a == b No window for %x = f32[64] convert(%y), "
        + 'metadata={op_name="a/b"}\n@ 0'
    )
    assert (
        ahead_of_time._crash(-6, stderr) == "the compiler crashed at a/b: a == b No window for %x = f32[64] convert(%y)"
    )
    assert "was ended by SIGKILL" in ahead_of_time._crash(-9, "https://symbolize/r/?trace=7f96ad51f9b3\n")
    assert ahead_of_time._crash(1, "x\nboom\n\n") == "the compiler ended with code 1: boom"


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_best_mesh_is_found(run, compiler):
    jobs = compiler(OutOfMemory("RESOURCE_EXHAUSTED: temporaries", 40e9, 33e9), compiled())
    result = run("plan", "--model", "flash", "--task", "decode", "--topology", "v6e:2x4", "--json")
    assert result.code == 0
    plan = json.loads(result.out)
    assert [attempt["fits"] for attempt in plan["attempts"]] == [False, True]
    assert plan["recommended"] == {"mesh": plan["attempts"][1]["mesh"], "preset": "decode"}
    assert plan["attempts"][0]["required"] == 40e9 and "7.00 GB too much" in plan["attempts"][0]["error"]
    found = plan["attempts"][1]
    assert found["floor"]["bound"] == "hbm" and found["floor_s"] == pytest.approx(50 / 1638)
    assert found["tokens_per_second_at_most"] == pytest.approx(1638 / 50) and found["tokens_per_second"] == 10
    assert found["estimate_s"] == 0.1 and found["operations"] == 4e4 and found["parts"]["experts.ffn"] == 0.04
    assert jobs[0].context == 2**20 and jobs[0].chunk == 1 and not jobs[0].config.num_nextn_predict_layers


def test_what_training_keeps_is_chosen_by_bytes(run, compiler):
    """The most that fits; what was asked for alone, where it was."""
    jobs = compiler(OutOfMemory("RESOURCE_EXHAUSTED: temporaries", 40e9, 33e9), compiled(), compiled())
    train = ("plan", "--model", "flash", "--task", "train", "--batch", "8", "--topology", "v5p:2x2x2", "--json")
    found = json.loads(run(*train, "--momentum-dtype", "bfloat16").out)
    assert [job.remat for job in jobs] == ["sublayers", "layers"] and jobs[0].mesh == jobs[1].mesh
    assert {job.momentum_dtype for job in jobs} == {"bfloat16"}
    assert found["recommended"]["remat"] == "layers" and found["recommended"]["momentum_dtype"] == "bfloat16"
    found = json.loads(run(*train, "--remat", "none").out)
    assert jobs[2].remat == "none" and jobs[2].momentum_dtype == "float32" and len(found["attempts"]) == 1


def test_the_report_for_people(run, compiler):
    compiler(compiled())
    result = run("plan", "--model", "flash", "--task", "decode", "--topology", "v6e:2x4", "--mesh", "tensor=8")
    assert result.code == 0
    for said in (
        *("one token of 1 row at 1M tokens, native weights, on v6e:2x4 (8 chips)", "Memory of a chip", "34.36 GB"),
        *(
            "fits: 24.00 GB",
            "1,638 GB/s",
            "918 TFLOP/s",
            "all-gather",
            "30.53 ms",
            "memory traffic",
            "layers/attn/scatter",
        ),
    ):
        assert said in result.out, said


def test_what_drafts_is_named_beside_the_plan(run, compiler):
    """The trunk is planned; a device's share of the stages' weights, and what else they take, is said."""
    compiler(compiled())
    result = run("plan", "--model", "flash-0731", "--task", "decode", "--topology", "v6e:2x4", "--mesh", "tensor=8")
    whole, trunk = (parameter_bytes(config).total for config in (Config.flash_0731(), Config.flash_0731().trunk()))
    said = re.search(r"not in the plan: DSpark stages for drafts, which take ([0-9.]+) GB of each device", result.err)
    assert (whole - trunk) / 8e9 < float(said[1]) < (whole - trunk) / 7e9  # norms and the like are on every device
    assert "417.79 kB of cache for each row" in result.err and "FLOPs each time that a row drafts" in result.err


def test_what_does_not_fit_ends_with_code_1(run, compiler):
    jobs = compiler(*3 * [PlanError("the compiler crashed: no window")])
    result = run("plan", "--model", "flash", "--task", "prefill", "--topology", "v5p:2x2x2")
    assert result.code == 1 and len(jobs) == compilation.MOST
    assert "does not fit: the compiler crashed: no window" in result.out and "Traceback" not in result.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--task", "train", "--chunk", "8"), "training takes whole rows"),
        (("--task", "decode", "--remat", "layers"), "--remat and --momentum-dtype are for training, not for decode"),
        (("--task", "train", "--mesh", "data=8"), "axis 'batch' of size 1 cannot be split 8 ways over data"),
        (("--topology", "v6e:8"), "has 2 axes, as in v6e:2x2"),
        (("--mesh", "seq=4"), "has 4 places, but v6e:2x4 8 devices; legal meshes of 8 devices are"),
        (("--mesh", "data=2,seq=4"), "cannot be split 2 ways over data"),
        (("--mesh", "tensor=16", "--topology", "v6e:4x4"), "legal meshes of 16 devices are"),
        (("--mesh", "rows=8"), "expected each of data, seq, expert, tensor"),
        (("--preset", "fast"), "expected one of decode, prefill, long-context, train"),
        (("--context", "2M"), "more than the model's 1M tokens"),
        (("--chunk", "8"), "--chunk is for prefill"),
        (("--model", "nowhere"), "the presets are flash, pro, flash-0731, pro-0813, tiny"),
    ],
)
def test_bad_input(run, arguments, said):
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    given = {"--model": "flash", "--task": "decode", "--topology": "v6e:2x4"} | given
    result = run("plan", *(word for pair in given.items() for word in pair))
    assert result.code == 2 and said in result.err and not result.out and result.err.count("\n") == 1


def test_a_missing_compiler(run, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run("plan", "--model", "flash", "--task", "decode", "--topology", "v6e:2x4", "--mesh", "tensor=8")
    assert result.code == 2 and "pip install 'v4-jax[tpu]'" in result.err and result.err.count("\n") == 1


# ---- with the TPU compiler -------------------------------------------------------------------------------------------


def small(tmp_path):
    """A model of three layers, one of each attention role."""
    config = dataclasses.replace(
        Config.tiny(), num_hidden_layers=3, num_hash_layers=1, num_nextn_predict_layers=0, compress_ratios=(0, 4, 128)
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    return tmp_path


def test_a_small_model_for_a_tpu(run, tmp_path):
    pytest.importorskip("libtpu")
    arguments = ("--context", "1K", "--topology", "v6e:2x2", "--mesh", "seq=2,expert=2", "--json")
    result = run("plan", "--model", small(tmp_path), "--task", "decode", *arguments)
    assert result.code == 0, result
    (attempt,) = json.loads(result.out)["attempts"]
    assert attempt["weights"] <= attempt["arguments"] <= attempt["peak"] < 100 * MEGABYTE
    assert 0.5 < attempt["flops"] / attempt["least"]["flops"] < 20
    assert "all-reduce" in {kind["kind"] for kind in attempt["collectives"]}


def test_a_training_step_for_a_tpu(run, tmp_path):
    """All of it: forward, backward, Muon's exchanges, on a mesh that splits rows and experts."""
    pytest.importorskip("libtpu")
    config = dataclasses.replace(
        Config.tiny(), num_hidden_layers=2, num_hash_layers=1, num_nextn_predict_layers=0, compress_ratios=(0, 4)
    )
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()))
    arguments = ("--context", "512", "--batch", "2", "--topology", "v6e:2x2", "--mesh", "seq=2,expert=2", "--json")
    result = run("plan", "--model", tmp_path, "--task", "train", *arguments)
    assert result.code == 0, result
    (attempt,) = json.loads(result.out)["attempts"]
    assert attempt["weights"] <= attempt["arguments"] <= attempt["live"] <= attempt["peak"] < 300 * MEGABYTE
    assert 1 < attempt["flops"] / attempt["least"]["flops"] < 20
    assert {"reduce-scatter", "all-to-all"} <= {kind["kind"] for kind in attempt["collectives"]}


def test_flash_does_not_fit_on_four_chips(run):
    pytest.importorskip("libtpu")
    arguments = ("--context", "8K", "--topology", "v5e:2x2", "--mesh", "tensor=4", "--json")
    result = run("plan", "--model", "flash", "--task", "decode", *arguments)
    assert result.code == 1
    (attempt,) = json.loads(result.out)["attempts"]
    assert attempt["required"] > attempt["available"] > 10e9
