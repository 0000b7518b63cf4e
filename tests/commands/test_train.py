"""`v4-jax train`: from weights to better ones and out again, whatever ends it on the way."""

import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.models import trained
from tests.processes import free_address, one_of_two
from v4_jax.commands.train_rows import print_rows
from v4_jax.tokenizer import ByteTokenizer
from v4_jax.train.batch import Batch
from v4_jax.train.metrics import read_metrics

STEPS = 6
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A released directory with eight experts."""
    return trained().exported(tmp_path_factory.mktemp("eight") / "model")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i} times {i} is {i * i}. " * 20}) + "\n" for i in range(40)))
    return path


@pytest.fixture
def settings(tmp_path, eight, texts):
    """`settings(name, ...)`: a settings file of a run of six steps."""

    def write(name="run", **changes):
        values = {
            "run": str(tmp_path / name),
            "model": str(eight),
            "data": {"sources": [{"path": str(texts)}], "open_rows": 2, "threads": 1},
            "stages": [{"steps": STEPS, "length": 128, "rows": 4}],
            "optimizer": {"learning_rate": 0.003},
            "checkpoints": {"every": 2},
            "log": {"every": 1, "tensorboard": False},
            "policy": "float32",
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    return write


def losses(run):
    found = read_metrics(run / "metrics.jsonl")
    return dict(zip(found["step"].tolist(), found["loss"].tolist(), strict=True))


def test_the_whole_way(run, settings, tmp_path):
    """Train, stop half way, go on, look, export, generate."""
    first = run("train", settings(), f"stages.0.steps={STEPS // 2}")
    assert first.code == 0, first.err
    assert f"done at step 3 of 3: {tmp_path / 'run'}" in first.err
    second = run("train", settings())
    assert second.code == 0, second.err
    assert "continuing after step 3 of 6" in second.err and re.search(r"step +6/6  loss \d", second.err)
    found = losses(tmp_path / "run")
    assert sorted(found) == list(range(1, STEPS + 1)) and found[STEPS] < found[1]

    again = run("train", settings())
    assert again.code == 0 and "done at step 6 of 6" in again.err and losses(tmp_path / "run") == found

    assert run("plot", tmp_path / "run").code == 0
    assert (tmp_path / "run" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    assert run("export", tmp_path / "run", tmp_path / "released").code == 0
    assert run("verify", tmp_path / "released", tmp_path / "released").code == 0
    words = [
        run("generate", tmp_path / name, "--tokens", "5 6 7", "--greedy", "--max-tokens", "4", "--json")
        for name in ("run", "released")
    ]
    assert [result.code for result in words] == [0, 0]


def test_rows_are_shown(run, monkeypatch):
    """Of the example of fine-tuning, with what is trained marked: an answer that has a weight of 0 is not."""
    monkeypatch.chdir(ROOT)  # where the example's paths begin
    result = run("train", "examples/sft.yaml", "data.shuffle=false", "data.open_rows=1", "--show-rows", "1")
    assert result.code == 0, result.err
    texts = result.out.split("\n--\n")
    heading = texts[0]
    assert heading.startswith("row 1: ") and " of 1,024 tokens in " in heading
    assert "<think>⟦A sum.</think>4<｜end▁of▁sentence｜>⟧" in result.out
    assert "</think>4<｜end▁of▁sentence｜><｜User｜>And 3 + 3?" in texts[1]
    assert "</think>9.11<｜end▁of▁sentence｜><｜User｜>" in texts[3] and texts[3].count("⟦") == 1


def test_the_example_of_distillation(run, monkeypatch, tmp_path):
    """Its settings are legal, its rows each teacher's in turn, and a teacher that is not there is missed at once."""
    monkeypatch.chdir(ROOT)
    here = f"run={tmp_path / 'run'}", "objective.teachers.chats.model=v4_jax/data/demo"
    result = run("train", "examples/distillation.yaml", *here, "--dry-run")
    assert result.code == 0, result.err
    assert "objective: distillation; chats: v4_jax/data/demo; texts: v4_jax/data/demo\n" in result.out
    result = run("train", "examples/distillation.yaml", *here, "--show-rows", "4")
    rows = [text.partition(": ")[0] for text in result.out.split("\nrow ")]
    assert result.code == 0 and len(rows) == 4 and "⟦A sum.</think>" in result.out
    result = run(
        "train", "examples/distillation.yaml", here[0], f"objective.teachers.chats.model={tmp_path}", "--dry-run"
    )
    assert result.code == 2 and f"{tmp_path} has no config.json" in result.err


def test_the_example_of_reinforcement(run, monkeypatch, tmp_path):
    """Its settings are legal, and its prompts are shown up to where the model answers."""
    monkeypatch.chdir(ROOT)
    here = (f"run={tmp_path / 'run'}",)
    result = run("train", "examples/grpo.yaml", *here, "--dry-run")
    assert result.code == 0, result.err
    assert "objective: grpo; 4 prompts a step, 8 answers to each\n" in result.out
    result = run("train", "examples/grpo.yaml", *here, "--show-rows", "2")
    assert result.code == 0 and "<｜Assistant｜></think>\n" in result.out and "⟦" not in result.out


def test_the_example_of_adapters(run, monkeypatch, tmp_path):
    """Its settings are legal; what is counted are adapters, beside weights that stay as they are on disk."""
    monkeypatch.chdir(ROOT)
    here = (f"run={tmp_path / 'run'}",)
    result = run("train", "examples/lora.yaml", *here, "--dry-run")
    assert result.code == 0, result.err
    assert "adapters: rank 8 of attention, shared, 86,016 parameters; weights native, left as they are\n" in result.out
    assert "recall: 16 needle, raw" in result.out
    whole = run("train", "examples/lora.yaml", *here, "lora=null", "--dry-run")
    assert whole.code == 0 and "adapters:" not in whole.out
    state = [re.search(r"state: ([\d.]+) MB", one.out)[1] for one in (result, whole)]
    assert float(state[0]) < float(state[1]) / 4
    flops = [one.out.splitlines()[-2].split("│")[7] for one in (result, whole)]
    assert flops[0] != flops[1]


def test_the_example_of_stages(run, monkeypatch, tmp_path):
    """Its settings are legal; what is counted are the stages, beside a trunk that stays as it is on disk."""
    monkeypatch.chdir(ROOT)
    result = run("train", "examples/dspark.yaml", f"run={tmp_path / 'run'}", "--dry-run")
    assert result.code == 0, result.err
    said = "stages: 3, fresh, which draft 5 tokens from layers 2, 3, 4, 1,010,411 parameters; the trunk native, left as"
    assert f"{said} it is\n" in result.out and "--task dspark counts" in result.out
    assert "note: the model's multi-token-prediction block is left out: DSpark's stages take its place" in result.err


def test_rows_say_nothing_to_the_terminal(capsys):
    """What a terminal would obey in a text of the data is not passed on."""
    tokenizer = ByteTokenizer(300)
    tokens = np.asarray([tokenizer.encode("a\x1b[2Jb\tc\n")], np.int32)
    print_rows(Batch(tokens, np.ones_like(tokens)), tokenizer)
    assert capsys.readouterr().out.splitlines()[1:] == ["⟦a\ufffd[2Jb\tc", "⟧"]


def test_dry_run(run, settings, tmp_path, texts, monkeypatch):
    """Says what a run would do, or what is wrong with it; nothing is made."""
    before = sorted(tmp_path.iterdir())
    file = settings()
    result = run("train", file, "--dry-run")
    assert result.code == 0 and sorted(tmp_path.iterdir()) == [*before, file], result.err
    for part in ("(new, from ", "2 layers, ", "mesh: one device", "1 source, ", "state: ", "3,072", "every 2 steps"):
        assert part in result.out, part
    spread = run("train", file, "mesh=data=2,expert=2,tensor=2", "--dry-run").out
    assert "mesh: data=2,expert=2,tensor=2 of 8" in spread
    adamw = run("train", file, "optimizer.matrices=adamw", "--dry-run").out

    def state(out):
        found = re.search(r"state: ([\d.]+) ([kM])B of", out)
        return float(found[1]) * {"k": 1e3, "M": 1e6}[found[2]]

    assert 3 * state(spread) < state(result.out) < state(adamw) / 1.2  # which has a second moment
    with monkeypatch.context() as context:
        context.setattr("v4_jax.commands.shared.devices.slices_of", lambda devices: 2)
        slices = run("train", file, "mesh=data=2,expert=2,tensor=2", "--dry-run").out
    assert 1.5 * state(spread) < state(slices) < state(result.out)  # each slice has everything
    with monkeypatch.context() as context:
        context.delenv("V4_JAX_MESH")
        chosen = run("train", file, "--dry-run")
        two = "stages=[{steps: 1, length: 128, rows: 8}, {steps: 1, length: 128, rows: 1}]"
        both = run("train", file, two, "--dry-run")
    assert chosen.code == both.code == 0 and " of masters and moments on each (mesh=one is one device)" in chosen.err
    for found, stages in ((chosen, ()), (both, (two,))):  # it is legal for every stage
        mesh = re.search(r"mesh: (\S+), all 8 devices", found.err)[1]
        assert f"mesh: {mesh} of 8" in found.out and run("train", file, *stages, f"mesh={mesh}", "--dry-run").code == 0
    monkeypatch.setattr("v4_jax.commands.train_report.free_bytes", lambda mesh: 1000)
    small = run("train", file, "--dry-run")
    assert small.code == 1 and "it has no room; expected a mesh of more devices" in small.out
    monkeypatch.setitem(sys.modules, "wandb", None)
    missing = run("train", file, "log.wandb=project")
    assert (missing.code, missing.err.count("\n")) == (2, 1) and not (tmp_path / "run").exists()
    assert "wandb is not installed; it comes with pip install 'v4-jax[wandb]'" in missing.err
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    for change, sentence in (
        ("stages.0.steps=0", "stages.0.steps is 0"),
        ("mesh=data=3", "mesh data=3 has 3 places"),
        ("run=" + str(texts), "is not a training run"),
        (f"run={texts}/x", "cannot be made in"),
        (f"data.sources.0.path={tmp_path}/nowhere.jsonl", "nowhere.jsonl"),
        (f"data.sources.0.path={tmp_path}/bad.jsonl", "bad.jsonl"),
    ):
        wrong = run("train", file, change, "--dry-run")
        assert (wrong.code, wrong.out) == (2, "") and sentence in wrong.err, (change, wrong)


def test_profile(run, settings, tmp_path):
    """A run traces steps after the first two, of which this one has no more than one."""
    result = run("train", settings(), "stages.0.steps=3", "--profile", tmp_path / "trace")
    assert result.code == 0, result.err
    assert len(list((tmp_path / "trace").rglob("*.xplane.pb"))) == 1
    assert "--profile " in run("train", settings(), "--profile", tmp_path / "run.yaml").err


def test_killed(start, run, settings, tmp_path):
    """Killed without warning, on several devices, the run loses what came after its newest checkpoint, and no more."""
    mesh = "data=2,expert=2,tensor=2"
    assert run("train", settings("whole", mesh=mesh)).code == 0
    process = start("train", settings("run", mesh=mesh))
    checkpoint = tmp_path / "run" / "checkpoints" / "4"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    after = run("train", settings("run", mesh=mesh))
    assert after.code == 0 and re.search(r"continuing after step [4-6] of 6", after.err), after.err
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_two_processes(start, run, settings, tmp_path):
    """Two processes take the steps that one takes, and one goes on where they stopped, on another mesh."""
    assert run("train", settings("whole")).code == 0
    alone = losses(tmp_path / "whole")
    address = free_address()
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    both = [
        start(
            *("train", settings("run", mesh="data=2,expert=2"), f"stages.0.steps={STEPS // 2}", "--distributed"),
            XLA_FLAGS=flags,
            **one_of_two(number, address),
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "done at step 3 of 3" in said[0] and "step" not in said[1]
    after = run("train", settings("run", mesh="seq=2,expert=4"))
    assert after.code == 0 and "continuing after step 3 of 6" in after.err
    assert losses(tmp_path / "run") == pytest.approx(alone, rel=1e-3)


def test_asked_to_stop(start, run, settings, tmp_path):
    """An interrupt saves first, and the exit code says that there is more to do."""
    long = settings("run", stages=[{"steps": 500, "length": 128, "rows": 4}], checkpoints={"every": 500})
    process = start("train", long)
    deadline = time.monotonic() + 300
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    (step,) = re.findall(r"stopped at step (\d+) of 500", err)
    assert (tmp_path / "run" / "checkpoints" / step).is_dir() and max(losses(tmp_path / "run")) == int(step)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("optimizer.lr=1", "unknown field optimizer.lr; expected one of beta1, "),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate is 'fast': input should be a valid number"),
        ("optimizer.weight_decay=-1", "optimizer.weight_decay is -1: input should be greater than or equal to 0"),
        ("stages.1.steps=3", "stages.1.steps: found '1' in a list of 1, expected 0 to 0"),
        ("stages.0.microbatches=3", "stages.0: 4 rows do not divide into 3 microbatches"),
        ("stages.0.attention=thin", "stages.0.attention is 'thin': input should be 'dense', 'indexer' or 'sparse'"),
        ("optimizer.warmup_steps=7", "warmup_steps 7 and decay_steps 0 exceed the run's 6 steps"),
        ("architecture={}", "expected either model, a directory to start from, or architecture, of a fresh one"),
        ("policy", "'policy' is no change of a setting; expected field=value"),
        ("policy=[", "policy=[ is not YAML: "),
        ("run.name=x", "run.name: run is "),
        ("data.sources=[]", "data.sources is []: list should have at least 1 item"),
        ("data.sources.0.path=nowhere", "nowhere"),
        ("model=nowhere", "nowhere"),
        ("mesh=seq=3", "mesh seq=3 has 3 places, but there are 8 devices; legal meshes of 8 devices are "),
        ("mesh=data=8", "axis 'batch' of size 4 cannot be split 8 ways over data"),
    ],
)
def test_settings_that_cannot_be(run, settings, tmp_path, change, said):
    result = run("train", settings(), change)
    assert result.code == 2 and said in result.err and len(result.err.splitlines()) == 1, result.err
    assert not (tmp_path / "run").exists()


def test_no_settings(run, tmp_path):
    assert "there are no settings; expected a YAML file" in run("train").err
    assert "nothing.yaml" in run("train", tmp_path / "nothing.yaml").err
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "holds no settings" in run("train", tmp_path / "list.yaml").err
    (tmp_path / "part.yaml").write_text("seed: 1\n")
    assert "run is missing; data is missing; stages is missing" in run("train", tmp_path / "part.yaml").err


def test_directories_that_are_no_run(run, settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    result = run("train", settings())
    assert result.code == 2 and "exists and is not a training run" in result.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_documents_that_cannot_be_used(run, settings, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"txt": "no"}\n')
    result = run("train", settings(data={"sources": [{"path": str(tmp_path / "bad.jsonl")}]}))
    assert result.code == 2 and "bad.jsonl" in result.err and "text" in result.err and "Traceback" not in result.err
    (tmp_path / "empty.jsonl").write_text("")
    result = run("train", settings("other", data={"sources": [{"path": str(tmp_path / "empty.jsonl")}]}))
    assert result.code == 2 and "empty.jsonl" in result.err and len(result.err.splitlines()) == 1


def test_mistakes_of_ours_keep_their_traceback(run, settings, monkeypatch):
    def mistaken(self):
        raise ValueError("shapes do not match")

    monkeypatch.setattr("v4_jax.train.loop.Trainer.run", mistaken)
    with pytest.raises(ValueError, match="shapes do not match"):
        run("train", settings())


def test_without_the_extra(run, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "v4_jax.train.settings", None)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    result = run("train", settings())
    assert result.code == 2 and "it comes with pip install 'v4-jax[train]'" in result.err


def test_every_setting_is_explained(run):
    result = run("train", "--fields")
    assert result.code == 0
    for field in ("run", "data.sources.N.path", "stages.N.attention", "optimizer.learning_rate", "stability.hold"):
        assert re.search(rf"^│ {re.escape(field)} +│", result.out, flags=re.MULTILINE), field
    assert "required" in result.out


def test_sets_to_be_asked_are_read_first(run, settings, tmp_path):
    """What cannot be asked is refused before anything is trained."""
    sums = tmp_path / "sums.jsonl"
    lines = [{"messages": [{"role": "user", "content": f"{i}?"}], "answer": str(i)} for i in range(3)]
    sums.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = tmp_path / "words.jsonl"
    words.write_text(json.dumps({"messages": [{"role": "user", "content": "?"}], "answer": "x"}) + "\n")
    sets = {"sums": {"path": str(sums), "max_tokens": 4}, "words": {"path": str(words), "max_tokens": 4}}
    evaluate = {"every": 2, "dtype": "float32", "slots": 4, "prefill_chunk": 64, "sets": sets}
    path = settings(evaluate=evaluate)
    said = run("train", path, "mesh=one", "--dry-run")
    assert said.code == 0, said.err
    assert (
        "evaluation: every 2 steps; sums: 3 chats, non-think; words: 1 chats, non-think; the best by their mean is kept"
        in said.out
    )
    missing = run("train", path, "evaluate.sets.sums.path=nowhere.jsonl", "--dry-run")
    assert missing.code == 2 and "nowhere.jsonl cannot be read" in missing.err
    words.write_text("{}\n")
    bad = run("train", path)
    assert bad.code == 2 and f"evaluate.sets.words: {words}: line 1 is no question" in bad.err
    assert not (tmp_path / "run").exists()
