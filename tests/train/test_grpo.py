"""Reinforcement: the surrogate against plain float64, rewards of every kind, advantages by hand."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import pytest

from v4_jax.tokenizer import ByteTokenizer
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.grpo import Grpo
from v4_jax.train.on_policy.advantages import GroupAdvantages
from v4_jax.train.on_policy.rewards import Reply, Reward
from v4_jax.train.on_policy.rollouts import Prompt, RolloutError, Sample

TOKENIZER = ByteTokenizer(320)
LEAST = {"rollouts": {"prompts": 1, "samples": 2, "max_tokens": 8}, "rewards": [{"kind": "exact"}]}


class Scores:
    """A model whose streams are the log-probabilities of the next tokens."""

    def apply(self, variables, streams, tokens, method):
        assert method == "log_probabilities"
        return streams


def plainly(ours, batch, objective):
    """Loss and statistics, token by token."""
    total, clipped, inference, reference = np.zeros(4)
    rows, length = batch.tokens.shape
    for row in range(rows):
        for at in range(length - 1):
            segment = batch.segment_ids[row, at]
            if not segment or batch.segment_ids[row, at + 1] != segment or not batch.trained[row, at + 1]:
                continue
            score, advantage = ours[row, at], float(batch.given["advantage"][row, at + 1])
            moved = score - float(batch.given["logprobs"][row, at + 1])
            ratio = np.exp(moved)
            bound = min(max(ratio, 1 - objective.clip), 1 + (objective.clip_above or objective.clip))
            total -= min(ratio * advantage, bound * advantage)
            clipped += bound * advantage < ratio * advantage
            inference += ratio - 1 - moved
            if objective.reference is not None:
                off = float(batch.given["reference"][row, at + 1]) - score
                reference += np.exp(off) - 1 - off
    return total + objective.kl * reference, clipped, inference, reference


@pytest.mark.parametrize(
    "changes",
    [{}, {"clip": 0.1, "clip_above": 0.4}, {"reference": {"model": "elsewhere"}, "kl": 0.3}],
    ids=["plain", "asymmetric", "reference"],
)
def test_the_surrogate_against_plain_float64(changes):
    """The sum, and its slope to every log-probability."""
    objective, rng = Grpo.model_validate(LEAST | changes), np.random.default_rng(0)
    segment_ids = np.asarray([[1] * 7 + [2] * 5, [1] * 9 + [0] * 3], np.int32)
    given = {name: rng.normal(size=(2, 12)).astype(np.float32) for name in ("logprobs", "advantage", "reference")}
    given["logprobs"] = -np.abs(given["logprobs"])
    batch = Batch(np.ones((2, 12), np.int32), segment_ids, (rng.random((2, 12)) < 0.7) & (segment_ids > 0), given)
    ours = np.roll(given["logprobs"], -1, 1) + rng.normal(0, 0.8, (2, 12)).astype(np.float32)

    def loss(scores):
        return objective.loss(Scores(), None, scores, jax.tree.map(jnp.asarray, batch), None)

    (total, found), slopes = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(ours))
    wanted, clipped, inference, reference = plainly(ours.astype(np.float64), batch, objective)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    assert found["clipped"] == clipped > 0
    np.testing.assert_allclose(found["inference_divergence"], inference, rtol=1e-4)
    if "reference" in changes:
        np.testing.assert_allclose(found["reference_divergence"], reference, rtol=1e-4)
    for place in np.ndindex(ours.shape):
        step = np.zeros(ours.shape)
        step[place] = 1e-6
        ends = [plainly(ours + sign * step, batch, objective)[0] for sign in (1, -1)]
        np.testing.assert_allclose(slopes[place], (ends[0] - ends[1]) / 2e-6, atol=1e-4)


def reward(**settings) -> Any:
    return pydantic.TypeAdapter(Reward).validate_python(settings)


def replies(text, **fields):
    return [Reply(Prompt((1,), fields=fields, reference="4", where="line 1 of 'a'"), text, f"why</think>{text}")]


@pytest.mark.parametrize(
    ("settings", "text", "fields", "wanted"),
    [
        ({"kind": "exact"}, "4", {}, 1),
        ({"kind": "exact"}, "Four", {"answer": "four"}, 0),
        ({"kind": "exact", "ignore_case": True, "field": "word"}, "Four", {"word": " four "}, 1),
        ({"kind": "numeric"}, "It is 3, or 4.", {}, 1),
        ({"kind": "numeric"}, "1,234.5 in all", {"answer": 1234.5}, 1),
        ({"kind": "numeric"}, "4 or 5", {}, 0),
        ({"kind": "numeric"}, "none", {}, 0),
        ({"kind": "numeric", "tolerance": 0.01}, "99.5", {"answer": "100"}, 1),
        ({"kind": "regex", "pattern": r"^\d+$"}, "42", {}, 1),
        ({"kind": "regex"}, "a cat", {"answer": r"\bcat\b"}, 1),
        ({"kind": "regex", "pattern": ".*"}, "", {}, 0),  # nothing said is nothing found
        ({"kind": "json_schema", "json_schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', {}, 1),
        ({"kind": "json_schema", "json_schema": {"type": "object", "required": ["a"]}}, '{"b": 1}', {}, 0),
        ({"kind": "json_schema", "field": "schema"}, "[1]", {"schema": {"items": {"type": "string"}}}, 0),
        ({"kind": "json_schema", "field": "schema"}, "no", {"schema": {}}, 0),
        ({"kind": "json_schema", "field": "schema"}, "NaN", {"schema": {}}, 0),
        ({"kind": "json_schema", "field": "schema"}, "[" * 100_000, {"schema": {}}, 0),
        ({"kind": "python", "function": "operator.contains"}, "abc", {}, None),
    ],
)
def test_rules(settings, text, fields, wanted):
    if wanted is None:
        with pytest.raises(RolloutError, match=r"operator.contains fails on an answer to line 1 of 'a': TypeError"):
            reward(**settings).score(replies(text, **fields))
        return
    assert reward(**settings).score(replies(text, **fields)) == [wanted]


def test_what_cannot_be_judged():
    nothing = Reply(Prompt((1,), where="line 1 of 'a'"), "4", "4")
    for kind in ("exact", "numeric", "regex", "json_schema"):
        with pytest.raises(RolloutError, match=f"line 1 of 'a' has no field 'answer', which the reward {kind} needs"):
            reward(kind=kind).score([nothing])
    for settings, said in (
        ({"kind": "regex", "pattern": "("}, "no regular expression"),
        ({"kind": "python", "function": "nowhere.at_all"}, "there is no such function"),
        ({"kind": "python", "function": "math.pi"}, "it is a float; expected a function"),
        ({"kind": "beauty"}, "'beauty'"),
    ):
        with pytest.raises(pydantic.ValidationError, match=said):
            reward(**settings)


@pytest.fixture
def judge():
    """An API that answers what it is told to, in order, and remembers what it was asked."""
    asked, says = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append((self.path, dict(self.headers), json.loads(body)))
            content = says.pop(0)
            self.send_response(500 if content is None else 200)
            if content == "cut short":
                self.send_header("Content-Length", "1000")
            self.end_headers()
            if content is not None:
                self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked, says
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_judge_over_http(judge, monkeypatch):
    """It is asked again where it fails or gives no mark; in the end the run says why it cannot go on."""
    url, asked, says = judge
    monkeypatch.setenv("JUDGE_KEY", "secret")
    prompt = "{question} {answer} {{x}}"
    chosen = reward(kind="judge", url=url, model="big", prompt=prompt, scale=10, key="JUDGE_KEY", retries=2, wait=0)
    says += [None, "no idea", "I give it 7."]
    assert chosen.score(replies("four {question}", question="2+2?")) == [0.7]
    path, headers, body = asked[-1]
    assert (path, headers["Authorization"], body["model"]) == ("/v1/chat/completions", "Bearer secret", "big")
    assert body["messages"] == [{"role": "user", "content": "2+2? four {question} {{x}}"}] and len(asked) == 3
    says += ["11", "cut short", "-3"]
    assert [chosen.score(replies("x"))[0] for _ in range(2)] == [1.0, 0.0]
    says += [None] * 3
    with pytest.raises(RolloutError, match=r"the judge at .* gives no mark, after 3 times: HTTPError: HTTP Error 500"):
        chosen.score(replies("x"))


def said(text, ended=True):
    tokens = np.asarray([*TOKENIZER.encode(text), *([1] if ended else [])], np.int32)
    return Sample(tokens, np.zeros(len(tokens), np.float32), ended)


def test_advantages_by_hand():
    """Rewards less what length costs, against the group; nothing where a group is alike; reasoning has to be closed."""
    rewards = [{"kind": "numeric"}, {"kind": "exact", "weight": 0.5}]
    objective = Grpo.model_validate(LEAST | {"length": {"high": {"free": 2, "rate": 50}}, "rewards": rewards})
    prompts = [Prompt((1,), reference="4", mode="high"), Prompt((1,), reference="5", mode="non-think")]
    samples = [
        [said("so</think>4"), said("so</think>four"), said("4"), said("so 4", ended=False)],
        [said("5")] * 4,
    ]
    found, metrics = GroupAdvantages(objective, TOKENIZER)(prompts, samples)
    lengths = [len(sample.tokens) for sample in samples[0]]
    scores = np.asarray([1.5, 0, 0, 0]) - [0.05 * max(0, length - 2) for length in lengths]
    assert len(set(scores)) > 2
    wanted = (scores - scores.mean()) / scores.std()
    np.testing.assert_allclose([one["advantage"] for one in found[0]], wanted, rtol=1e-6)
    assert all(one["advantage"] == 0 for one in found[1])
    assert metrics["reward_0_numeric"] == 5 / 8 and metrics["groups_alike"] == 0.5
    np.testing.assert_allclose(metrics["reward"], (scores.sum() + 6) / 8)
    unscaled, _ = GroupAdvantages(objective.model_copy(update={"scale": False}), TOKENIZER)(prompts, samples)
    np.testing.assert_allclose([one["advantage"] for one in unscaled[0]], scores - scores.mean(), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rollouts": LEAST["rollouts"] | {"samples": 1}}, "rollouts.samples is 1; expected a group of at least 2"),
        ({"kl": 0.1}, "kl has a cost, and there is no reference; expected one"),
        ({"reference": {"model": "m", "weight": 2}}, "reference.weight is 2; what the reference counts is kl"),
    ],
)
def test_settings_that_cannot_be_used(changes, wanted):
    with pytest.raises(pydantic.ValidationError, match=wanted):
        Grpo.model_validate(LEAST | changes)
