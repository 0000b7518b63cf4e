"""Evaluation between steps: when it is made, where its scores go, which checkpoint is kept, and that a run goes on."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import trained
from tests.train.logs import Metrics, shared_programs
from v4_jax import chat
from v4_jax.adapters import Adapters
from v4_jax.chat.protocol import EOS
from v4_jax.checkpoint import open_checkpoint
from v4_jax.checkpoint.digests import Digests
from v4_jax.checkpoint.fingerprint import fingerprint
from v4_jax.checkpoint.trained import steps
from v4_jax.commands.shared.evaluation import EngineEvaluation
from v4_jax.parameter_tree import drawn
from v4_jax.placement import Place
from v4_jax.tokenizer import ByteTokenizer
from v4_jax.train.checkpoints import Checkpoints
from v4_jax.train.evaluation import EvaluationSettings
from v4_jax.train.loop import Trainer
from v4_jax.train.metrics import Metrics as Lines
from v4_jax.train.metrics import Report, read_metrics
from v4_jax.train.settings import SettingsError, read_settings
from v4_jax.train.setup import Origin, open_rows, open_run
from v4_jax.train.step import TrainState

STEPS, EVERY = 8, 2
SETS = {"a": {"path": "a.jsonl"}, "b": {"path": "b.jsonl"}}
GOOD = {2: 0.25, 4: 0.75, 6: 0.5, 8: 0.75}  # what the sets' mean is after a step: the best comes twice


class Sets:
    """Scores of weights, which are new to it in the order of `GOOD` unless it is given those it has to meet again."""

    def __init__(self, known=None):
        self.given, self.known, self.asked = known is not None, {} if known is None else known, []

    def scores(self, params):
        seen = np.asarray(params["head"]).tobytes()
        if not self.given:
            self.known[seen] = EVERY * (len(self.known) + 1)
        self.asked.append(self.known[seen])
        return {"a": GOOD[self.asked[-1]] - 0.25, "b": GOOD[self.asked[-1]] + 0.25}


@pytest.fixture(scope="module", autouse=True)
def _shared_programs():
    with shared_programs():
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    words = np.random.default_rng(0).choice(["expert", "token", "entry", "window"], (30, 40))
    path.write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in words))
    return path


def settings(folder, corpus, *changes):
    return read_settings(
        None,
        [
            f"run={folder}",
            f"architecture={json.dumps(trained().config.to_hf())}",
            f"data={{sources: [{{path: {corpus}}}], open_rows: 2, threads: 1}}",
            f"stages=[{{steps: {STEPS}, length: 128, rows: 4}}]",
            "checkpoints={every: 3, keep: 1}",
            f"evaluate={{every: {EVERY}, sets: {json.dumps(SETS)}}}",
            "policy=float32",
            "optimizer={learning_rate: 0.01}",
            *changes,
        ],
    )


def run(chosen, log, sets, said=None):
    origin = Origin.of(chosen)
    open_run(chosen, origin)
    place, rows = Place(), open_rows(chosen, origin)
    say = (said if said is not None else []).append
    make = lambda: origin.fresh(place, 0)  # noqa: E731
    return Trainer(chosen, origin.config, place, rows, make, log, say, evaluation=sets).run()


def scores(log):
    return {
        step: {name: value for name, value in metrics.items() if name.startswith("score")}
        for step, metrics in log.found.items()
        if "score" in metrics
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus):
    """A run that nothing happens to: its directory, log, evaluations and what it said."""
    folder, log, sets, said = tmp_path_factory.mktemp("whole") / "run", Metrics(), Sets(), []
    assert run(settings(folder, corpus), log, sets, said) == "done"
    return folder, log, sets, said


def test_scores_are_metrics_and_the_best_is_kept(whole):
    folder, log, sets, said = whole
    assert sets.asked == [2, 4, 6, 8]
    assert scores(log) == {
        step: {"score": mean, "score_a": mean - 0.25, "score_b": mean + 0.25} for step, mean in GOOD.items()
    }
    assert steps(folder) == [4, 8]  # the newest, and of two that are alike the first
    assert said[-1] == (
        f"the best checkpoint is that of step 4, with a score of 0.750 (the mean of all sets): {folder / 'best'}"
    )
    assert open_checkpoint(folder / "best").label == str(folder / "checkpoints" / "4")
    assert fingerprint(folder / "best") == fingerprint(folder / "checkpoints" / "4") != fingerprint(folder)


@pytest.mark.parametrize("stop", [2, 3, 5])
def test_a_run_goes_on_with_its_scores(whole, corpus, tmp_path, stop):
    """Each evaluation is made once, of the same weights, bit for bit, and the same checkpoints are left."""
    folder, log, sets, said = whole
    first, second, asked = Metrics(stop), Metrics(), Sets(sets.known)
    chosen = settings(tmp_path / "run", corpus)
    assert run(chosen, first, asked) == "stopped"
    again = []
    assert run(chosen, second, asked, again) == "done"
    assert asked.asked == [2, 4, 6, 8]
    assert scores(first) | scores(second) == scores(log) and not set(scores(first)) & set(scores(second))
    assert again[-1] == said[-1].replace(str(folder), str(chosen.run))
    # A stop saves, too.
    assert set(steps(chosen.run)) - {max(first.found)} == {4, 8}


def test_a_kill_between_evaluation_and_checkpoint(whole, corpus, tmp_path, monkeypatch):
    """What was noted of a step that is taken again is noted once."""
    chosen, asked = settings(tmp_path / "run", corpus), Sets(whole[2].known)
    open_run(chosen, Origin.of(chosen))
    real = Checkpoints.save

    def killed(self, state, *rest):
        if int(state.step) == 4:
            raise KeyboardInterrupt
        return real(self, state, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", killed)
        run(chosen, report(chosen.run, []), asked)
    assert read_metrics(chosen.run / "metrics.jsonl")["step"][-1] == 4 and steps(chosen.run) == [2, 3]
    run(chosen, report(chosen.run, []), asked)
    assert asked.asked == [2, 4, 4, 6, 8]
    found = read_metrics(chosen.run / "metrics.jsonl")
    noted = {step: score for step, score in zip(found["step"], found["score"], strict=True) if score == score}
    assert noted == GOOD and steps(chosen.run) == [4, 8]
    assert len(set(found["step"])) == len(found["step"])


def report(folder, said, every=100):
    metrics = Lines(folder, tensorboard=False)
    each = lambda length: 1000  # noqa: E731
    return Report(metrics, steps=STEPS, every=every, length=lambda step: 128, flops=each, say=said.append)


def test_steps_with_scores_are_shown(tmp_path):
    """Whatever `log.every` says; and the time that asking takes does not slow the steps down."""
    said, one = [], {"tokens": 100.0, "loss": 1.0}
    log = report(tmp_path, said)
    log.write(1, one, 1.0)
    log.write(2, one, 2.0)
    log.write(3, one | {"score": 0.5, "score_a": 0.25, "score_b": 0.75, "evaluation_seconds": 50.0}, 3.0)
    log.write(4, one | {"score": 0.5, "score_a": 0.5, "evaluation_seconds": 50.0}, 54.0)
    assert "  score 0.500 (a 0.250, b 0.750)  " in said[1] and "  score 0.500  " in said[2]
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found["step"].tolist() == [1, 3, 4]
    assert found["tokens_per_second"].tolist()[1:] == [100.0, 100.0]


def test_a_set_alone_is_the_score(corpus, tmp_path):
    chosen = settings(tmp_path, corpus, "evaluate.best=b").evaluate
    assert chosen.score({"a": 0.0, "b": 1.0}) == 1.0 and chosen.score({"a": 1.0}) == -np.inf


def test_settings_that_are_refused(corpus, tmp_path):
    for change, sentence in (
        ("evaluate.best=c", "best is c, and the sets are a, b; expected one of them"),
        ("evaluate.sets={a b: {path: x}}", "the set 'a b' has a name that no metric can have"),
        ("evaluate.sets={}", "evaluate.sets is {}"),
        ("evaluate.sets.a.mode=loud", "evaluate.sets.a.mode is 'loud'"),
    ):
        with pytest.raises(SettingsError, match=sentence):
            settings(tmp_path, corpus, change)


def test_each_checkpoint_has_digests_however_soon_the_next_one_comes(tmp_path, monkeypatch):
    """They are written in the background, by the number of the step: the next one's is not known yet."""
    write = Digests.write
    monkeypatch.setattr(Digests, "write", lambda self: (time.sleep(0.1), write(self)))
    kept = Checkpoints(tmp_path, keep=3)
    for step in range(1, 4):
        kept.save(TrainState(jnp.int32(step), {"w": jnp.ones(2)}, {"m": jnp.ones(2)}), {}, [])
    kept.finish()
    assert all(Digests(tmp_path / "checkpoints" / str(step) / "params") for step in range(1, 4))
    kept.close()


def test_checkpoints_that_are_kept_for_long_hold_no_rounds(tmp_path):
    """A run goes back to its newest ones alone: rounds before those are over."""
    chosen = EvaluationSettings(sets=SETS, every=1)
    kept = Checkpoints(tmp_path, keep=2, keep_every=2, score=chosen.score, keep_best=True)
    for step in range(1, 7):
        state = TrainState(jnp.int32(step), {"w": jnp.ones(2)}, {"m": jnp.ones(2)})
        kept.save(state, {}, [], {"a": step == 3, "b": 0.0})
    kept.finish()
    assert steps(tmp_path) == [2, 3, 4, 5, 6]
    assert kept.oldest == 5 and kept.best == (3, 0.5)
    assert (tmp_path / "best").readlink() == Path("checkpoints", "3")
    kept.close()
    assert Checkpoints(tmp_path, keep=2, score=chosen.score).best == (3, 0.5)


def greedy(model, prompt, count):
    """What a model says, by its likeliest token each time, from the whole text anew."""
    tokens = [*prompt]
    for _ in range(count):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(model(padded, lengths=np.asarray([len(tokens)])).logits[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


def test_the_engine_asks(tmp_path):
    """A set's score is the share of answers that are what the weights say, with adapters onto them, too."""
    model, count = trained(), 4
    tokenizer = ByteTokenizer(model.config.vocab_size)
    lines = [{"messages": [{"role": "user", "content": f"{i}?"}]} for i in range(3)]
    for line in lines[:2]:
        said = tokenizer.decode(greedy(model, tokenizer.encode(chat.encode(line["messages"])), count))
        line["answer"] = said.partition(EOS)[0]
    lines[2]["answer"] = "no"
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = EvaluationSettings(
        sets={"own": {"path": str(tmp_path / "set.jsonl"), "max_tokens": count}}, every=1, slots=2, dtype="float32"
    )
    sets = EngineEvaluation(model.config, tokenizer, Place(), chosen, "float32", profile="preview", bos=True)
    assert sets.facts() == ["own: 3 chats, non-think"]
    assert sets.scores(model.params) == {"own": 2 / 3}
    adapters = Adapters(2, 4.0, ("attention",))
    factors = drawn(adapters.declarations(model.config), jax.random.key(0), mesh=None, rules=None)
    assert sets.scores(adapters.onto(model.params, factors)) == {"own": 2 / 3}
