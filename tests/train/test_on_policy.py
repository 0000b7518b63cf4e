"""Rollouts: prompts, answers by the engine, rows of them, and runs that learn from them and go on amid a round."""

from __future__ import annotations

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import Tiny, trained
from tests.train.logs import Metrics, shared_programs
from v4_jax import Transformer, chat, declarations, load
from v4_jax.checkpoint.orbax_arrays import open_arrays
from v4_jax.commands.shared.rollouts import EngineRollouts
from v4_jax.outputs import Routing
from v4_jax.parameter_tree import placements
from v4_jax.parameters import is_parameter
from v4_jax.placement import Place
from v4_jax.sharding.mesh import make_mesh
from v4_jax.tokenizer import ByteTokenizer
from v4_jax.train import rounds
from v4_jax.train.checkpoints import Checkpoints
from v4_jax.train.documents import DataError
from v4_jax.train.loop import Trainer
from v4_jax.train.on_policy.rollouts import Prompt, Sample
from v4_jax.train.on_policy.rows import Answer, pack
from v4_jax.train.precision import held_as
from v4_jax.train.settings import SettingsError, read_settings
from v4_jax.train.setup import Origin, open_rounds, open_rows, open_run

LENGTH, STEPS, ROUND = 128, 4, 2
TOKENIZER = ByteTokenizer(320)
ROLLOUTS = {
    "prompts": 2,
    "samples": 2,
    "max_tokens": 16,
    "slots": 4,
    "dtype": "float32",
    "replay": "all",
    "prefill_chunk": 8,
}
LINES = [
    {
        "messages": [
            {"role": "user", "content": f"{i}+{i}?"},
            {"role": "assistant", "content": str(2 * i)},
        ],
        "answer": str(2 * i),
    }
    for i in range(20)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_policy")
    trained().exported(folder / "student")
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return folder


def settings(folder, run, objective, *changes):
    return read_settings(
        None,
        [
            f"run={run}",
            f"model={folder / 'student'}",
            f"data={{sources: [{{path: {folder / 'questions.jsonl'}, field: messages}}], shuffle: false}}",
            f"objective={json.dumps(objective | {'round': ROUND, 'rollouts': ROLLOUTS})}",
            f"stages=[{{steps: {STEPS}, length: {LENGTH}, rows: 4, microbatches: 2}}]",
            "checkpoints={every: 3, keep: 2}",
            "policy=float32",
            "optimizer={learning_rate: 0.01}",
            *changes,
        ],
    )


def distilling(folder):
    return {
        "kind": "distillation",
        "teachers": {"only": {"model": str(folder / "student"), "dtype": "float32", "policy": "float32"}},
    }


@pytest.fixture(scope="module")
def rollouts(folder):
    """One engine for all runs: it has no state but weights."""
    chosen = settings(folder, "run", distilling(folder))
    return EngineRollouts(trained().config, Place(), chosen.rollouts, chosen.policy, LENGTH)


@pytest.fixture
def build(folder, tmp_path, rollouts):
    def build(log, name, objective, *changes):
        chosen = settings(folder, tmp_path / name, objective, *changes)
        origin = Origin.of(chosen)
        open_run(chosen, origin)
        place, rows = Place(), open_rows(chosen, origin)
        rounds = open_rounds(chosen, origin, place, rows, rollouts)
        return Trainer(chosen, origin.config, place, rows, lambda: origin.fresh(place, 0), log, print, rounds=rounds)

    return build


@pytest.fixture(scope="module", autouse=True)
def _shared_programs():
    """Runs of the same objective share their programs."""
    with shared_programs(lambda settings: settings.objective.model_dump_json()):
        yield


@pytest.fixture(scope="module")
def student(folder):
    config, params = load(folder / "student", dtype="float32")
    return Tiny(config, Transformer(config, policy="float32"), params)


def prompts_of(folder, *changes):
    chosen = settings(folder, "run", distilling(folder), *changes)
    return open_rows(chosen, Origin.of(chosen))


def test_prompts(folder):
    """What is before the assistant's last turn, as it is when the model is asked; seeds by step and prompt."""
    prompts = prompts_of(folder)
    first, second = prompts.next(2, LENGTH, 0)
    assert TOKENIZER.decode(list(first.tokens)) == chat.encode(LINES[0]["messages"][:1])
    assert (first.reference, first.fields["answer"], first.teacher) == ("0", "0", "only")
    state = json.dumps(prompts.state())
    third = prompts.next(1, LENGTH, 1)[0]
    prompts.restore(json.loads(state))
    assert prompts.next(1, LENGTH, 1) == [third]
    prompts.restore(json.loads(state))
    assert len({first.seed, second.seed, third.seed, prompts.next(1, LENGTH, 2)[0].seed}) == 4


def test_prompts_that_cannot_be_used(folder, tmp_path):
    lines = [LINES[0], {"messages": [{"role": "user", "content": "x" * 120}]}, {"messages": []}, LINES[1]]
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change = f"data.sources.0.path={tmp_path / 'bad.jsonl'}"
    prompts = prompts_of(folder, change)
    with pytest.raises(DataError, match=r"line 2 of .* has 12\d tokens before an answer of up to 16; expected at most"):
        prompts.next(2, LENGTH, 0)
    assert prompts.state()["following"] == 0
    found = prompts_of(folder, change, "data.on_bad=skip")
    assert [prompt.reference for prompt in found.next(3, LENGTH, 0)] == ["0", "2", "0"]
    assert found.state()["skipped"] == 2


def test_rows_of_answers():
    """Each answer after its prompt, alone in its segment, with its numbers and its decisions where they belong."""
    rng = np.random.default_rng(0)

    def answer(prompt, said, number):
        size = prompt + said - 1
        routing = Routing(rng.integers(0, 8, (3, size, 2)), rng.integers(-1, max(1, size // 4), (1, size, 5)))
        sample = Sample(
            rng.integers(1, 64, said).astype(np.int32), rng.normal(size=said).astype(np.float32), True, routing
        )
        return Answer(Prompt(tuple(rng.integers(1, 64, prompt).tolist())), sample, {"advantage": float(number)})

    answers = [answer(*sizes) for sizes in ((3, 4, 1), (9, 6, 2), (5, 13, 3), (8, 1, 4))]
    parts = pack(answers, 2, 20, 4)
    assert len(parts) == 2 and all(batch.tokens.shape == (2, 20) for batch, _ in parts)
    seen = 0
    for batch, decisions in parts:
        for row in range(2):
            entries = 0
            for segment in range(1, batch.segment_ids[row].max() + 1):
                at = np.flatnonzero(batch.segment_ids[row] == segment)
                number = batch.given["advantage"][row, at[-1]]
                prompt, sample, _ = answers[int(number) - 1]
                said = at[len(prompt.tokens) :]
                np.testing.assert_array_equal(batch.tokens[row, at], [*prompt.tokens, *sample.tokens])
                np.testing.assert_array_equal(
                    np.flatnonzero(batch.trained[row] & (batch.segment_ids[row] == segment)), said
                )
                np.testing.assert_array_equal(batch.given["logprobs"][row, said], sample.logprobs)
                np.testing.assert_array_equal(decisions.trunk.experts[:, row, at[:-1]], sample.routing.experts)
                picked = decisions.trunk.entries[:, row, at[:-1]]
                wanted = sample.routing.entries
                np.testing.assert_array_equal(picked, np.where(wanted < 0, -1, wanted + entries))
                entries += len(at) // 4
                seen += 1
    assert seen == len(answers) and not batch.trained[1].any()  # the last part ends in an empty row
    unknown = [one._replace(sample=one.sample._replace(routing=None)) for one in answers]
    assert [decisions for _, decisions in pack([*answers[:1], *unknown[1:]], 4, 20, 4)] == [None]


def test_answers_have_the_model_s_own_log_probabilities(folder, student, rollouts):
    """Those of the given weights, whatever the engine had before; the same prompts and seeds give the same."""
    asked = prompts_of(folder).next(3, LENGTH, 0)
    found = rollouts.sample(student.params, asked, 2)
    assert rollouts._engine._engine._params is None  # the room is training's again
    other = jax.tree.map(lambda x: x * 1.01 if jnp.issubdtype(x.dtype, jnp.floating) else x, student.params)
    different = rollouts.sample(other, asked[:1], 2)
    again = rollouts.sample(student.params, asked[1:2], 2)
    for sample, same in zip(found[1], again[0], strict=True):
        np.testing.assert_array_equal(sample.tokens, same.tokens)
        np.testing.assert_array_equal(sample.logprobs, same.logprobs)
    assert not all(np.array_equal(a.logprobs, b.logprobs) for a, b in zip(found[0], different[0], strict=True))
    for batch, _ in pack(
        [Answer(p, s, {}) for p, group in zip(asked, found, strict=True) for s in group], 6, LENGTH, 4
    ):
        logits = student(batch.tokens, segment_ids=batch.segment_ids).logits
        scores = np.asarray(jax.nn.log_softmax(logits))[:, :-1]
        scores = np.take_along_axis(scores, batch.tokens[:, 1:, None], -1)[..., 0]
        said = batch.trained[:, 1:]
        np.testing.assert_allclose(scores[said], batch.given["logprobs"][:, 1:][said], atol=1e-4)


@pytest.mark.parametrize("dtype", ["native", "bfloat16"])
def test_weights_are_held_as_an_export_would_write_them(folder, dtype):
    """Bit for bit."""
    tiny = trained()
    held = jax.jit(held_as, static_argnums=(1, 2))(tiny.params, tiny.config, dtype)
    exported = load(folder / "student", dtype="native")[1]
    if dtype == "bfloat16":
        for parameter, leaf in zip(
            jax.tree.leaves(declarations(tiny.config), is_leaf=is_parameter), jax.tree.leaves(held), strict=True
        ):
            wanted = {"f32": jnp.float32, "i64": jnp.int32}.get(parameter.storage, jnp.bfloat16)
            assert leaf.dtype == wanted
        return
    assert jax.tree.structure(held) == jax.tree.structure(exported)
    for found, wanted in zip(jax.tree.leaves(held), jax.tree.leaves(exported), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(*(np.asarray(x.astype(jnp.float32)) for x in (found, wanted)))


def test_answers_come_with_the_engine_s_decisions(folder, student, rollouts):
    """Those that the model takes on the packed rows: of every token that was read, numbered as entries are there."""
    asked = prompts_of(folder).next(3, LENGTH, 0)
    found = rollouts.sample(student.params, asked, 2)
    answers = [Answer(prompt, one, {}) for prompt, group in zip(asked, found, strict=True) for one in group]
    ((batch, decisions),) = pack(answers, 3, LENGTH, 4)
    own = student(batch.tokens, segment_ids=batch.segment_ids, return_routing=True).routing
    following = np.pad(batch.segment_ids[:, 1:], [(0, 0), (0, 1)])
    read = (batch.segment_ids > 0) & (batch.segment_ids == following)
    assert batch.segment_ids.max() > 1 and read.sum() == sum(answer.size - 1 for answer in answers)
    for kept, wanted in ((decisions.trunk.experts, own.experts), (decisions.trunk.entries, own.entries)):
        width = max(kept.shape[-1], wanted.shape[-1])
        kept, wanted = (
            np.sort(np.pad(x, [(0, 0)] * 3 + [(0, width - x.shape[-1])], constant_values=-1))[:, read]
            for x in (kept, wanted)
        )
        np.testing.assert_array_equal(kept, wanted)
    assert (decisions.trunk.entries[:, read] >= 0).sum() > 100


def test_answers_on_a_mesh(folder, student, rollouts):
    """From masters that lie as training has them: the same answers, and the same decisions."""
    chosen = settings(folder, "run", distilling(folder))
    mesh = make_mesh("data=2,expert=2,tensor=2")
    spread = EngineRollouts(student.config, Place(mesh, "train"), chosen.rollouts, chosen.policy, LENGTH)
    params = jax.device_put(student.params, placements(student.config, mesh, "train"))
    asked = prompts_of(folder).next(2, LENGTH, 0)
    found, wanted = spread.sample(params, asked, 2), rollouts.sample(student.params, asked, 2)
    for one, other in zip(itertools.chain(*found), itertools.chain(*wanted), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)
        np.testing.assert_array_equal(np.sort(one.routing.experts), np.sort(other.routing.experts))
        picked, same = (sample.routing.entries for sample in (one, other))
        width = max(picked.shape[-1], same.shape[-1])
        padded = [np.pad(x, [(0, 0)] * 2 + [(0, width - x.shape[-1])], constant_values=-1) for x in (picked, same)]
        np.testing.assert_array_equal(*map(np.sort, padded))


def test_on_policy_distillation(folder, build, tmp_path, caplog):
    """From oneself nothing is learnt at first; then it goes on bit for bit after a stop amid a round."""
    log = Metrics()
    with jax.log_compiles():
        assert build(log, "same", distilling(folder), "stages.0.steps=1").run() == "done"
        stopped_and_continued(build, tmp_path, "distilled", distilling(folder))
    assert abs(log.found[1]["loss"]) < 1e-5 and 1 <= log.found[1]["answer_tokens"] <= 16
    for program in ("step", "prefill", "copy"):  # the engine's, for weights of all steps
        assert caplog.text.count(f"Compiling jit(_{program})") <= 1


@pytest.fixture
def reinforcing(folder, tmp_path, monkeypatch):
    (tmp_path / "small.py").write_text("def letters(answer, line):\n    return sum(map(str.isalpha, answer)) / 16\n")
    monkeypatch.chdir(tmp_path)
    return {
        "kind": "grpo",
        "rewards": [{"kind": "python", "function": "small.letters"}, {"kind": "numeric", "weight": 0.5}],
        "reference": {"model": str(folder / "student"), "dtype": "float32", "policy": "float32"},
        "kl": 0.01,
        "length": {"non-think": {"rate": 0.1}},
    }


def test_reinforcement(build, tmp_path, reinforcing):
    """The engine's log-probabilities are the model's, and so are a reference's that it is itself, until it learns."""
    log = stopped_and_continued(build, tmp_path, "reinforced", reinforcing)
    first, second = log.found[1], log.found[2]
    assert 0 <= first["inference_divergence"] < 1e-6 < second["inference_divergence"]
    assert 0 <= first["reference_divergence"] < 1e-6 < second["reference_divergence"]
    assert first["clipped"] == 0 and first["reward_deviation"] > 0
    penalty = 0.1 * first["answer_tokens"] / 1000
    whole = first["reward_0_python"] + 0.5 * first["reward_1_numeric"] - penalty
    np.testing.assert_allclose(first["reward"], whole, rtol=1e-5)


def test_reinforcement_goes_on_after_a_kill(build, tmp_path, reinforcing, monkeypatch):
    """What lies on disk amid a round's answers, its files, a step and a save is enough to end with the same bits."""
    run, whole = tmp_path / "run", Metrics()
    note, digest, write, sample = whole.write, Checkpoints._write_digests, rounds._write, EngineRollouts.sample

    def left(moment):
        if not (tmp_path / moment).exists():
            shutil.copytree(run, tmp_path / moment)

    def sampling(self, *rest):
        found = sample(self, *rest)
        if (run / "rounds" / ".2").exists():
            left("answers")
        return found

    def writing(path, part):
        write(path, part)
        if path.name == "2-0.npz":
            left("files")

    def noting(step, *rest):
        note(step, *rest)
        if step == 3:
            left("step")

    def saving(self):
        if self._saving == STEPS:
            left("save")
        digest(self)

    with monkeypatch.context() as patch:
        patch.setattr(EngineRollouts, "sample", sampling)
        patch.setattr(rounds, "_write", writing)
        patch.setattr(whole, "write", noting)
        patch.setattr(Checkpoints, "_write_digests", saving)
        assert build(whole, "run", reinforcing).run() == "done"
    assert any((tmp_path / "save" / "checkpoints").glob(f"{STEPS}.orbax*"))  # amid it
    for moment, first in (("answers", 1), ("files", 1), ("step", 1), ("save", STEPS)):
        log = Metrics()
        assert build(log, moment, reinforcing).run() == "done"
        assert log.found == {step: whole.found[step] for step in range(first, STEPS + 1)}
        assert bits(tmp_path / moment) == bits(run)


def bits(run):
    """The parameters and moments that a run ended with."""
    folders = (run / "checkpoints" / str(STEPS) / item for item in ("params", "optimizer"))
    stored = ((folder.name, name, array) for folder in folders for name, array in open_arrays(folder))
    return {(item, name): array.read((slice(None),) * len(array.shape), name).tobytes() for item, name, array in stored}


def stopped_and_continued(build, tmp_path, name, objective):
    """Also where the process was killed after its last checkpoint, amid a round, and while another one was made."""
    whole, first, second, third = Metrics(), Metrics(stop=2), Metrics(), Metrics()
    assert build(whole, f"{name}-whole", objective).run() == "done"
    assert build(first, name, objective).run() == "stopped"
    assert max(first.found) == 3  # amid the second round
    assert build(second, name, objective).run() == "done"
    assert first.found | second.found == whole.found
    killed = tmp_path / f"{name}-whole"
    shutil.rmtree(killed / "checkpoints" / "4")
    (killed / "rounds" / ".4").mkdir()
    assert build(third, killed.name, objective).run() == "done"
    assert third.found == {STEPS: whole.found[STEPS]}
    return whole


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "objective.rollouts.max_tokens=128",
            "stages.0.length is 128, which has no room for a prompt and an answer of ",
        ),
        (
            "objective.rollouts.tokens=1",
            "unknown field objective.distillation.rollouts.tokens; expected one of draft, ",
        ),
    ],
)
def test_settings_that_cannot_be_used(folder, change, said):
    with pytest.raises(SettingsError, match=said):
        settings(folder, "run", distilling(folder), change)
