"""Distillation: rows by teacher, their hidden states kept for a round, and a run that goes on amid it."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TWO, Tiny, make, trained
from tests.train.logs import Metrics, shared_programs
from v4_jax import Transformer, load
from v4_jax.placement import Place
from v4_jax.sharding.mesh import make_mesh
from v4_jax.tokenizer import ByteTokenizer
from v4_jax.train.loop import Trainer
from v4_jax.train.objectives.objective import targets
from v4_jax.train.settings import SettingsError, read_settings
from v4_jax.train.setup import Origin, open_rounds, open_rows, open_run

ROWS, LENGTH, STEPS, ROUND = 4, 128, 8, 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A student, two teachers of which one is wider, and texts for each."""
    folder = tmp_path_factory.mktemp("distillation")
    changes = TWO | {"compress_ratios": (0, 4), "num_nextn_predict_layers": 0, "n_routed_experts": 8}
    trained().exported(folder / "student")
    make(1, **changes).exported(folder / "narrow")
    make(2, **changes | {"hidden_size": 64}).exported(folder / "wide")
    for name, words in {"narrow": ["token", "entry"], "wide": ["window", "stream"]}.items():
        rng = np.random.default_rng(0)
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": " ".join(rng.choice(words, 30))}) + "\n" for _ in range(20))
        )
    return folder


def settings(folder, run, *changes):
    sources = [{"path": str(folder / f"{name}.jsonl"), "teacher": name} for name in ("narrow", "wide")]
    sources[1]["weight"] = 2.0
    teachers = {
        name: {"model": str(folder / name), "dtype": "float32", "policy": "float32"} for name in ("narrow", "wide")
    }
    teachers["wide"]["weight"] = 0.5
    return read_settings(
        None,
        [
            f"run={run}",
            f"model={folder / 'student'}",
            f"data={json.dumps({'sources': sources, 'open_rows': 2, 'threads': 1})}",
            f"objective={json.dumps({'kind': 'distillation', 'teachers': teachers, 'round': ROUND})}",
            f"stages=[{{steps: {STEPS}, length: {LENGTH}, rows: {ROWS}, microbatches: {ROWS}}}]",
            "checkpoints={every: 3, keep: 2}",
            "policy=float32",
            "optimizer={learning_rate: 0.01}",
            *changes,
        ],
    )


@pytest.fixture
def build(folder, tmp_path):
    def build(log, name="run", *changes, mesh=None):
        chosen = settings(folder, tmp_path / name, *changes)
        origin = Origin.of(chosen)
        open_run(chosen, origin)
        place = Place() if mesh is None else Place(make_mesh(mesh), "train")
        rows = open_rows(chosen, origin)
        rounds = open_rounds(chosen, origin, place, rows)
        return Trainer(chosen, origin.config, place, rows, lambda: origin.fresh(place, 0), log, print, rounds=rounds)

    return build


@pytest.fixture(scope="module", autouse=True)
def _shared_programs():
    """Runs of the same objective share their programs."""
    with shared_programs(lambda settings: settings.objective.model_dump_json()):
        yield


def test_rows_are_ordered_by_teacher_and_shared_by_weight(folder, tmp_path):
    chosen = settings(folder, tmp_path)
    rows = open_rows(chosen, Origin.of(chosen))
    states, seen = [], []
    for _ in range(6):
        states.append(json.dumps(rows.state()))
        seen.append(rows.next_parts(ROWS, 1, LENGTH))
    names = [[part.teacher for part in parts] for parts in seen]
    assert all(found == sorted(found) for found in names)
    assert sum(found.count("wide") for found in names) == 16 and sum(map(len, names)) == 24
    for number, parts in enumerate(seen):
        for part in parts:
            words = ByteTokenizer(320).decode(part.batch.tokens[part.batch.segment_ids > 0].tolist())
            assert ("window" in words) == (part.teacher == "wide")
        rows.restore(json.loads(states[number]))
        for again, part in zip(rows.next_parts(ROWS, 1, LENGTH), parts, strict=True):
            assert again.teacher == part.teacher
            np.testing.assert_array_equal(again.batch.tokens, part.batch.tokens)


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return (
        logits
        - logits.max(-1, keepdims=True)
        - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    )


def plainly(folder, parts, top_k):
    """What the first step's loss and divergence are, from whole logits of both models."""
    loaded = {name: load(folder / name, dtype="float32") for name in ("student", "narrow", "wide")}
    models = {
        name: Tiny(config, Transformer(config, policy="float32"), params) for name, (config, params) in loaded.items()
    }
    loss = divergence = count = 0.0
    for part in parts:
        batch = jax.tree.map(jnp.asarray, part.batch)
        ours, theirs = (
            log_softmax(model(batch.tokens, segment_ids=batch.segment_ids).logits)
            for model in (models["student"], models[part.teacher])
        )
        if top_k:
            best = np.argsort(-theirs, -1)[..., :top_k]
            ours, theirs = (
                np.concatenate(
                    [
                        np.take_along_axis(x, best, -1),
                        np.log1p(-np.exp(np.take_along_axis(x, best, -1)).sum(-1, keepdims=True)),
                    ],
                    -1,
                )
                for x in (ours, theirs)
            )
        counted = np.asarray(targets(batch, 1))
        found = np.sum(np.sum(np.exp(ours) * (ours - theirs), -1)[counted])
        loss, divergence = loss + {"narrow": 1.0, "wide": 0.5}[part.teacher] * found, divergence + found
        count += counted.sum()
    return loss / count, divergence / count


@pytest.mark.parametrize("top_k", [0, 8])
def test_the_loss_is_the_divergence_from_each_text_s_teacher(folder, build, tmp_path, top_k):
    """That of whole logits; and it falls."""
    log = Metrics()
    assert build(log, "run", f"objective.top_k={top_k}").run() == "done"
    chosen = settings(folder, tmp_path / "run")
    parts = open_rows(chosen, Origin.of(chosen)).next_parts(ROWS, 1, LENGTH)
    loss, divergence = plainly(folder, parts, top_k)
    np.testing.assert_allclose(log.found[1]["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(log.found[1]["divergence"], divergence, rtol=1e-4)
    assert log.found[STEPS]["loss"] < 0.9 * log.found[1]["loss"]


def test_on_a_mesh(folder, build, tmp_path):
    """Rows, experts, hidden states and heads split."""
    log = Metrics()
    changes = f"stages=[{{steps: 1, length: {LENGTH}, rows: 8, microbatches: 2}}]"
    assert build(log, "run", changes, mesh="data=2,expert=2,tensor=2").run() == "done"
    chosen = settings(folder, tmp_path / "run")
    parts = open_rows(chosen, Origin.of(chosen)).next_parts(2, 4, LENGTH)
    assert [part.teacher for part in parts] == ["narrow", "wide"]
    np.testing.assert_allclose(log.found[1]["loss"], plainly(folder, parts, 0)[0], rtol=1e-4)


def test_stopped_amid_a_round_and_continued(build, tmp_path):
    """Bit for bit, whether the round is still there or made anew; rounds that are over are removed."""
    whole, first, second, third = Metrics(), Metrics(stop=4), Metrics(), Metrics()
    assert build(whole, "whole").run() == "done"
    assert build(first).run() == "stopped"
    step = max(first.found)
    assert step % ROUND
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "rounds")
    for log, name in ((second, "run"), (third, "copy")):
        assert build(log, name).run() == "done"
        assert first.found | log.found == whole.found
    rounds = {path.name for path in (tmp_path / "run" / "rounds").iterdir()}
    assert "0" not in rounds and {"4", "6"} <= rounds


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["data.sources.0.teacher=null"], "data.sources.0.teacher is None; expected one of narrow, wide"),
        (["objective={kind: pretraining}"], "data.sources.0.teacher is narrow; this objective has none"),
        (["objective.kind=guessing"], "objective is .*'guessing'"),
        (
            ["objective.top=3"],
            "unknown field objective.distillation.top; expected one of keep_teachers, kind, rollouts, ",
        ),
        (["objective.teachers={}"], "objective.distillation.teachers is {}: "),
    ],
)
def test_settings_that_cannot_be_used(folder, tmp_path, changes, said):
    with pytest.raises(SettingsError, match=said):
        settings(folder, tmp_path, *changes)


def test_a_teacher_of_other_tokens(folder, tmp_path, build):
    make(1, **TWO | {"vocab_size": 321}).exported(tmp_path / "other")
    with pytest.raises(
        SettingsError, match=r"teacher narrow \(.*other\) has a vocabulary of 321 tokens and the student"
    ):
        build(Metrics(), "run", f"objective.teachers.narrow.model={tmp_path / 'other'}")
