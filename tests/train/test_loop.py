"""A run goes on as if nothing had happened, whatever happened: stops, spikes, damage, a full disk, another mesh."""

from __future__ import annotations

import functools
import json
import os
import re
import signal

import jax
import numpy as np
import pytest

from tests.models import trained
from tests.train.logs import shared_programs
from v4_jax.placement import Place
from v4_jax.sharding.mesh import make_mesh
from v4_jax.train import loop
from v4_jax.train.checkpoints import FitError, SaveError
from v4_jax.train.documents import DataError
from v4_jax.train.loop import Trainer, TrainingError
from v4_jax.train.settings import SettingsError, read_settings
from v4_jax.train.setup import Origin, locked, open_rows, open_run

STEPS, EVERY = 8, 3


@pytest.fixture(scope="module")
def architecture():
    """Two layers, sliding and CSA, the second of which chooses its experts; few entries are picked."""
    tiny = trained()
    return tiny.config.to_hf()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = np.random.default_rng(0)
    for i in range(30):
        words = rng.choice(["expert", "token", "entry", "window", "stream"], 40)
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


class Losses:
    """A log that remembers, and may do something at a step."""

    def __init__(self, at=None, action=None):
        self.losses, self.metrics, self.rewinds, self.at, self.action = {}, {}, [], at, action

    def write(self, step, metrics, over_at):
        self.losses[step], self.metrics[step] = metrics["loss"], metrics
        if step == self.at:
            self.at = None
            self.action()

    def rewind(self, step):
        self.rewinds.append(step)


@pytest.fixture(scope="module", autouse=True)
def _shared_programs():
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def build(architecture, corpus):
    """`build(folder, log, name, *changes)`: a run of eight steps with a checkpoint every three."""

    def build(folder, log, name="run", *changes, mesh=None, say=lambda text: None):
        settings = read_settings(
            None,
            [
                f"run={folder / name}",
                f"architecture={json.dumps(architecture)}",
                f"data={{sources: [{{path: {corpus}}}], open_rows: 2, threads: 1}}",
                f"stages=[{{steps: {STEPS}, length: 128, rows: 4}}]",
                f"checkpoints={{every: {EVERY}, keep: 2}}",
                "policy=float32",
                "optimizer={learning_rate: 0.01}",
                "stability={ahead: 2, hold: 3, rollbacks: 1, window: 100}",
                *changes,
            ],
        )
        origin = Origin.of(settings)
        open_run(settings, origin)
        place = Place() if mesh is None else Place(make_mesh(mesh), "train")
        rows = open_rows(settings, origin, say)
        return Trainer(settings, origin.config, place, rows, lambda: origin.fresh(place, 0), log, say)

    return build


@pytest.fixture
def trainer(tmp_path, build):
    """`build` in a folder of this test's own."""
    return functools.partial(build, tmp_path)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, build):
    """The losses of a run that nothing happens to."""
    log = Losses()
    assert build(tmp_path_factory.mktemp("uninterrupted"), log).run() == "done"
    assert sorted(log.losses) == list(range(1, STEPS + 1))
    assert log.losses[STEPS] < log.losses[1]
    return log.losses


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def spikes_at(monkeypatch, *steps):
    """Makes the losses of these steps look like spikes, each once."""
    left, real = list(steps), loop.SpikeDetector.spiked

    def spiked(self, loss):
        if left and self.count + 1 == left[0]:
            left.pop(0)
            return True
        return real(self, loss)

    monkeypatch.setattr(loop.SpikeDetector, "spiked", spiked)


def test_stopped_and_continued(trainer, expected):
    """Bit for bit the losses of a run that was not stopped, and its parameters."""
    first, second = Losses(4, ask_to_stop), Losses()
    assert trainer(first).run() == "stopped"
    said = []
    assert trainer(second, say=said.append).run() == "done"
    assert said == [f"continuing after step {max(first.losses)} of {STEPS}"]
    assert first.losses | second.losses == expected
    assert not set(first.losses) & set(second.losses)


def test_fine_tuning_is_stopped_and_continued(trainer, tmp_path):
    """Conversations: what is learnt of each row is the same again, too."""
    lines = (
        {
            "messages": [
                {"role": "user", "content": f"after {i}?"},
                {"role": "assistant", "reasoning_content": "one more", "content": str(i + 1)},
                {"role": "user", "content": "and then?"},
                {"role": "assistant", "reasoning_content": "two more", "content": str(i + 2)},
            ]
        }
        for i in range(30)
    )
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = f"data={{sources: [{{path: {tmp_path / 'chats.jsonl'}, field: messages}}], open_rows: 2, threads: 1}}"
    whole, first, second = Losses(), Losses(4, ask_to_stop), Losses()
    assert trainer(whole, "whole", data).run() == "done"
    assert trainer(first, "run", data).run() == "stopped"
    assert trainer(second, "run", data).run() == "done"
    assert first.losses | second.losses == whole.losses and first.losses and second.losses
    assert whole.losses[STEPS] < whole.losses[1] / 2


def test_continued_on_a_mesh(trainer, expected):
    assert trainer(Losses(4, ask_to_stop)).run() == "stopped"
    log = Losses()
    assert trainer(log, mesh="data=2,expert=2,tensor=2").run() == "done"
    for step, loss in log.losses.items():
        assert loss == pytest.approx(expected[step], rel=1e-4)
    assert max(log.losses) == STEPS


def test_a_longer_run_is_continued(trainer, expected):
    log = Losses()
    assert trainer(log, "run", "stages.0.steps=5").run() == "done"
    assert trainer(log).run() == "done"
    assert log.losses == expected


def test_spike(trainer, expected, monkeypatch):
    """Back to the newest checkpoint, on with anticipatory routing for a while, and off again."""
    spikes_at(monkeypatch, 5)
    log, said = Losses(), []
    assert trainer(log, say=said.append).run() == "done"
    assert said == [
        "the loss of step 5 jumped or is not finite: back to step 3, with anticipatory routing until step 8"
    ]
    assert log.rewinds == [0, 3]
    on = [step for step, metrics in log.metrics.items() if metrics["anticipatory_routing"]]
    assert on == [4, 5, 6, 7, 8]
    assert {step: log.losses[step] for step in (1, 2, 3)} == {step: expected[step] for step in (1, 2, 3)}
    assert log.losses[8] == pytest.approx(expected[8], rel=0.05)
    assert log.losses[8] != expected[8]


def test_stopped_while_anticipating(trainer, monkeypatch):
    """The experts chosen ahead are part of the checkpoint."""
    spikes_at(monkeypatch, 5)
    whole = Losses()
    assert trainer(whole, "whole").run() == "done"
    spikes_at(monkeypatch, 5)
    first, second = Losses(), Losses()
    # The second time that step 5 is noted, after the spike.
    first.rewind = lambda step: setattr(first, "at", 5 if step == 3 else None)
    first.action = ask_to_stop
    assert trainer(first).run() == "stopped"
    assert trainer(second).run() == "done"
    assert first.losses | second.losses == whole.losses
    assert 0 < len(second.losses) < STEPS - 3


def test_a_spike_that_comes_again_ends_the_run(trainer, monkeypatch):
    spikes_at(monkeypatch, 5, 5)
    with pytest.raises(
        TrainingError, match=r"step 5 jumped or is not finite again after 1 attempts .* stays at step 3"
    ):
        trainer(Losses()).run()


def test_a_spike_before_the_first_checkpoint_starts_anew(trainer, expected, monkeypatch):
    spikes_at(monkeypatch, 2)
    log = Losses()
    assert trainer(log).run() == "done"
    assert log.rewinds == [0, 0]
    assert log.losses[1] == expected[1]


def test_damaged_checkpoint_is_put_aside(trainer, expected, tmp_path):
    assert trainer(Losses(6, ask_to_stop)).run() == "stopped"
    steps = sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    newest = tmp_path / "run" / "checkpoints" / str(steps[-1]) / "params"
    for file in newest.rglob("*"):
        if file.is_file() and file.parent.name == "d":
            file.write_bytes(file.read_bytes()[:100])
    log, said = Losses(), []
    assert trainer(log, say=said.append).run() == "done"
    assert said[0].startswith(f"the checkpoint of step {steps[-1]} cannot be read (")
    assert (tmp_path / "run" / "damaged" / str(steps[-1])).is_dir()
    assert said[1] == f"continuing after step {steps[-2]} of {STEPS}"
    assert log.losses == {step: loss for step, loss in expected.items() if step > steps[-2]}


def flip(folder):
    """Flips a bit in the middle of the largest file of a directory's arrays."""
    file = max((file for file in folder.rglob("*") if file.parent.name == "d"), key=lambda file: file.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_flipped_bit_is_damage(trainer, tmp_path):
    """Also one of the optimiser's state, which nothing else would notice; what is put aside overwrites nothing."""
    assert trainer(Losses(), "run", "stages.0.steps=6").run() == "done"
    checkpoints = tmp_path / "run" / "checkpoints"
    (tmp_path / "run" / "damaged" / "6").mkdir(parents=True)
    flip(checkpoints / "6" / "optimizer")
    said = []
    assert trainer(Losses(), "run", "stages.0.steps=6", say=said.append).run() == "done"
    assert re.match(
        r"the checkpoint of step 6 cannot be read \(its bytes on disk are not those that were written: "
        r"optimizer: [\w.]+\): put aside as \S+/damaged/6-2$",
        said[0],
    ), said
    assert (tmp_path / "run" / "damaged" / "6-2" / "optimizer").is_dir() and said[1].startswith(
        "continuing after step 3"
    )


def test_a_checkpoint_of_other_settings_is_refused(trainer, tmp_path):
    assert trainer(Losses(), "run", "stages.0.steps=3").run() == "done"
    run = tmp_path / "run"
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    with pytest.raises(
        FitError, match=r'^the checkpoint of step 3 .*: optimizer.matrices changed from "muon" to "adamw"'
    ):
        trainer(Losses(), "run", "optimizer.matrices=adamw").run()
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_changed_settings_are_said(trainer, tmp_path):
    assert trainer(Losses(), "run", "stages.0.steps=3").run() == "done"
    said = []
    assert trainer(Losses(), "run", "stages.0.steps=4", "optimizer.eps=1e-9", say=said.append).run() == "done"
    assert said == [
        "settings that changed since step 3: stages.0.steps from 3 to 4; optimizer.eps from 1e-20 to 1e-09",
        "continuing after step 3 of 4",
    ]
    (tmp_path / "run").rename(tmp_path / "moved")
    said.clear()
    assert trainer(Losses(), "moved", "stages.0.steps=4", "optimizer.eps=1e-9", say=said.append).run() == "done"
    assert said == ["continuing after step 4 of 4"]


def test_a_document_that_cannot_be_used(trainer, tmp_path):
    """What was learnt before it is saved; or it is left out and counted."""
    lines = [json.dumps({"text": "entry window stream " * 12})] * 60
    lines[10] = '{"text": null}'
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    data = f"data={{sources: [{{path: {tmp_path / 'texts.jsonl'}}}], open_rows: 2, threads: 1, shuffle: false"
    with pytest.raises(DataError, match=r"^line 11 of '.*texts.jsonl' has NoneType in field 'text'"):
        trainer(Losses(), "run", data + "}").run()
    step = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert 3 < step < STEPS
    said = []
    assert trainer(Losses(), "run", data + ", on_bad: skip}", say=said.append).run() == "done"
    assert f"continuing after step {step} of {STEPS}" in said
    assert said[-1] == "1 documents could not be used and were left out, each time they came"


def test_a_run_is_trained_by_one_process(trainer, tmp_path):
    trainer(Losses())
    refused = pytest.raises(SettingsError, match="is being trained by another process")
    with locked(tmp_path / "run"), refused, locked(tmp_path / "run"):
        pass
    with locked(tmp_path / "run"):
        pass


def test_full_disk(trainer, expected, tmp_path, monkeypatch):
    """A checkpoint that cannot be written ends the run with a sentence; the one before is kept and continued from."""
    import orbax.checkpoint as ocp

    real = ocp.StandardCheckpointHandler.async_save

    async def full(self, directory, *arguments, **named):
        if "/6" in str(directory):
            raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmany more lines")
        return await real(self, directory, *arguments, **named)

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "async_save", full)
    with pytest.raises(
        SaveError, match=r"cannot be written to .*: .*No space left on device; the newest one is that of step 3$"
    ):
        trainer(Losses()).run()
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["3"]
    log = Losses()
    assert trainer(log).run() == "done"
    assert log.losses == {step: loss for step, loss in expected.items() if step > 3}


def test_stages(trainer, tmp_path):
    """Dense attention without the indexer, then the indexer alone, then sparse attention on longer rows."""
    stages = (
        "[{steps: 2, length: 128, rows: 4, attention: dense}, {steps: 2, length: 128, rows: 2, attention: indexer},"
    )
    stages += "{steps: 2, length: 256, rows: 2, microbatches: 2}]"
    log, params = Losses(), {}
    run = trainer(log, "run", f"stages={stages}")
    real = run._take

    def take(state, step):
        params[step] = jax.tree.map(np.asarray, state.params)
        return real(state, step)

    run._take = take
    assert run.run() == "done"
    assert [log.metrics[step]["tokens"] for step in (1, 3, 5)] == [512, 256, 512]

    def moved(a, b):
        leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda x, y: bool((x != y).any()), a, b))
        return {jax.tree_util.keystr(path, simple=True, separator="/") for path, yes in leaves if yes}

    assert all("indexer" in name or name.endswith("bias") for name in moved(params[2], params[4]))
    assert any("indexer" in name for name in moved(params[2], params[4]))
    assert not any("indexer" in name for name in moved(params[0], params[2]))
    assert {"embed", "layer_1/attn/wkv", "layer_1/attn/indexer/wq_b"} <= moved(params[4], params[5])
