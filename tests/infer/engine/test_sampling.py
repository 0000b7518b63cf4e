"""Sampling draws from the distribution it says, row by row, whatever else is in the batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.infer.engine.history import History
from v4_jax.infer.engine.sampling import GREEDY, Sampling, SamplingBatch, adjust, best, keep, sample
from v4_jax.layers.head import log_probability

DRAWS = 8000
LOGITS = jnp.asarray([2.0, -1.0, 0.5, 2.0, 0.0, -30.0, 1.0, 0.5])


def softmax(values):
    values = np.exp(np.asarray(values, np.float64) - np.max(values))
    return values / values.sum()


def allowed(scaled, sampling):
    """The filters written out for one row, one token after another."""
    order = sorted(range(len(scaled)), key=lambda i: (-scaled[i], i))
    if sampling.top_k:
        order = order[: sampling.top_k]
    probabilities = dict(zip(order, softmax(scaled[order]), strict=True))
    kept, mass = [], 0.0
    for token in order:
        if kept and mass >= sampling.top_p and sampling.top_p < 1:
            break
        mass += probabilities[token]
        if not kept or probabilities[token] >= sampling.min_p * probabilities[order[0]]:
            kept.append(token)
    return set(kept)


compiled = jax.jit(sample)


def draw(logits, sampling, positions):
    rows = SamplingBatch.of([sampling] * len(positions))
    return compiled(jnp.broadcast_to(logits, (len(positions), logits.shape[-1])), rows, jnp.asarray(positions))


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=3.0, seed=9),
        Sampling(top_k=3),
        Sampling(top_p=0.7),
        Sampling(temperature=2.0, top_k=5, top_p=0.8, min_p=0.3),
    ],
)
def test_frequencies(sampling):
    tokens = np.asarray(draw(LOGITS, sampling, np.arange(DRAWS))[0])
    scaled = np.asarray(LOGITS) / sampling.temperature
    expected = softmax([x if i in allowed(scaled, sampling) else -np.inf for i, x in enumerate(scaled)])
    found = np.bincount(tokens, minlength=len(expected)) / DRAWS
    assert not found[expected == 0].any()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / DRAWS)).all()


def test_filters_against_one_token_after_another():
    random = np.random.default_rng(0)
    samplings, logits = [], []
    for _ in range(400):
        samplings.append(
            Sampling(
                top_p=random.choice([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
                top_k=int(random.integers(0, 14)),
                min_p=random.choice([0.0, 0.05, 0.5, 1.0]),
            )
        )
        # rounded, so that there are ties; the mass never comes within rounding of a top_p
        logits.append(np.round(random.normal(size=12) * 3, 1) + 0.013)
    scaled = np.asarray(logits, np.float32)
    kept = np.asarray(jax.jit(keep)(jnp.asarray(scaled), SamplingBatch.of(samplings)))
    for row, sampling, found in zip(scaled, samplings, kept, strict=True):
        assert set(np.flatnonzero(found)) == allowed(row, sampling), sampling


def test_ties_keep_the_lower_ids():
    tied = jnp.zeros((6,))
    rows = {
        "top_k": (Sampling(top_k=2), [0, 1]),
        "top_p": (Sampling(top_p=0.5), [0, 1, 2]),
        "top_p 0": (Sampling(top_p=0.0), [0]),
        "min_p": (Sampling(min_p=1.0), [0, 1, 2, 3, 4, 5]),
    }
    for name, (sampling, expected) in rows.items():
        assert np.flatnonzero(keep(tied[None], SamplingBatch.of([sampling]))[0]).tolist() == expected, name
    assert draw(jnp.asarray([1.0, 3.0, 3.0]), GREEDY, [0])[0].tolist() == [1]


def test_everything_is_kept_by_default():
    # A cumulated sum of many small numbers ends above or below 1; with top_p = 1 neither may cost a token.
    logits = jax.random.normal(jax.random.key(0), (3, 50000)) * 0.01
    assert bool(keep(logits, SamplingBatch.of([Sampling(min_p=1e-9)] * 3)).all())


def test_greedy_rows_among_sampled_ones():
    logits = jax.random.normal(jax.random.key(1), (4, 100))
    mixed = SamplingBatch.of([GREEDY, Sampling(), Sampling(temperature=0.0, top_k=3, top_p=0.1), Sampling(top_k=1)])
    tokens = compiled(logits, mixed, jnp.zeros(4, jnp.int32))[0]
    best = jnp.argmax(logits, axis=-1)
    assert [int(tokens[i]) for i in (0, 2, 3)] == [int(best[i]) for i in (0, 2, 3)]
    alone = compiled(logits, SamplingBatch.of([GREEDY] * 4), jnp.zeros(4, jnp.int32))[0]
    assert alone.tolist() == best.tolist()


def test_a_row_does_not_depend_on_its_neighbours():
    logits = jax.random.normal(jax.random.key(2), (5, 64))
    samplings = [Sampling(seed=3), Sampling(top_p=0.9, seed=4), GREEDY, Sampling(min_p=0.01, seed=3), Sampling(seed=5)]
    positions = jnp.asarray([7, 0, 3, 7, 1000000])
    together = compiled(logits, SamplingBatch.of(samplings), positions)
    for i, sampling in enumerate(samplings):
        alone = compiled(logits[i : i + 1], SamplingBatch.of([sampling]), positions[i : i + 1])
        assert int(alone[0][0]) == int(together[0][i])
        np.testing.assert_allclose(alone[1][0], together[1][i], rtol=1e-6)


def test_seed_and_position_both_select_the_numbers():
    flat = jnp.zeros((1000,))
    texts = {seed: draw(flat, Sampling(seed=seed), np.arange(50))[0].tolist() for seed in (0, 1, 2**32 - 1)}
    assert len({tuple(text) for text in texts.values()}) == 3
    assert len(set(texts[0])) > 40  # positions differ
    assert texts[0] == draw(flat, Sampling(), np.arange(50))[0].tolist()


def test_log_probabilities_are_the_models():
    logits = jax.random.normal(jax.random.key(3), (3, 40)) * 4
    samplings = [Sampling(temperature=5.0), Sampling(top_k=2, temperature=0.1), GREEDY]
    tokens, logprobs = compiled(logits, SamplingBatch.of(samplings), jnp.arange(3))
    for row, token, logprob in zip(np.asarray(logits), tokens.tolist(), logprobs.tolist(), strict=True):
        assert logprob == pytest.approx(np.log(softmax(row)[token]), abs=1e-5)
    assert float(log_probability(logits, tokens)[1]) == pytest.approx(float(logprobs[1]))


@pytest.mark.parametrize("temperature", [1e-30, 1e30])
def test_extreme_temperatures(temperature):
    tokens = np.asarray(draw(LOGITS.at[3].set(1.9), Sampling(temperature=temperature), np.arange(200))[0])
    assert set(tokens) == ({0} if temperature < 1 else set(range(len(LOGITS))))


def adjusted(logits, sampling, prompt, generated):
    """Bias and penalties written out for one row, one token after another."""
    logits = np.array(logits, np.float32)
    for token, bias in sampling.logit_bias.items():
        logits[token] += np.float32(bias)
    for token in set(prompt) | set(generated):
        factor = np.float32(sampling.repetition_penalty)
        logits[token] = logits[token] / factor if logits[token] > 0 else logits[token] * factor
    for token in set(generated):
        logits[token] -= np.float32(sampling.frequency_penalty) * generated.count(token)
        logits[token] -= np.float32(sampling.presence_penalty)
    return logits


def test_bias_and_penalties_against_one_token_after_another():
    """In mixed company, over steps in which some rows rest, with a row copied and a slot begun anew on the way."""
    samplings = [
        Sampling(seed=1),
        Sampling(seed=2, repetition_penalty=1.7),
        Sampling(seed=3, frequency_penalty=0.6, presence_penalty=-1.5),
        Sampling(0.0, repetition_penalty=0.8, frequency_penalty=-0.4, logit_bias={3: 2.5, 7: -100, 0: 0.1}),
        Sampling(seed=5, presence_penalty=2, logit_bias={11: -4}),
    ]
    random, vocabulary, slots = np.random.default_rng(0), 12, len(samplings)
    rows = SamplingBatch.of(samplings)
    prompts = [random.integers(0, vocabulary, length).tolist() for length in (1, 3, 4, 6, 2)]
    written = [[] for _ in prompts]

    @jax.jit
    def step(logits, positions, history, going):
        tokens, _ = sample(logits, rows, positions, history)
        return adjust(logits, rows, history), tokens, history.generate(tokens, going)

    def read(history, slot, prompt):
        """In chunks of 2 whose second row is nowhere, and the last token by itself, as the engine does."""
        for begin in range(0, max(len(prompt) - 1, 1), 2):
            part = prompt[begin : min(begin + 2, len(prompt) - 1)]
            tokens = np.zeros((2, 2), np.int32)
            tokens[0, : len(part)] = part
            history = history.read(*map(jnp.asarray, ([slot, slots], tokens, [len(part), 0], [begin, 0])))
        return history.prompt(jnp.full(slots, prompt[-1]), jnp.arange(slots) == slot)

    history = History.empty(slots, vocabulary)
    for slot, prompt in enumerate(prompts):
        history = read(history, slot, prompt)
    for turn in range(30):
        if turn == 12:
            history = history.copy(jnp.asarray(2), jnp.asarray([4, slots, slots]))
            prompts[4], written[4] = prompts[2], list(written[2])
        if turn == 20:
            prompts[1], written[1] = [5, 5, 8], []
            history = read(history, 1, prompts[1])
        logits = (random.normal(size=(slots, vocabulary)) * 3).astype(np.float32)
        going = random.random(slots) < 0.8
        found, tokens, history = step(logits, jnp.full(slots, turn), history, going)
        assert (np.asarray(found[0]) == logits[0]).all()
        for row, sampling in enumerate(samplings):
            expected = adjusted(logits[row], sampling, prompts[row], written[row])
            np.testing.assert_allclose(found[row], expected, rtol=1e-5, atol=1e-5)
            assert sampling.temperature or int(tokens[row]) == np.argmax(expected)
            if going[row]:
                written[row].append(int(tokens[row]))


def test_the_best_tokens():
    logits = jax.random.normal(jax.random.key(3), (3, 40)) * 4
    logits = logits.at[1, 7].set(logits[1, 30])
    for few, many in ((logits[:, :9], 9), (logits, 20)):
        ids, logprobs = jax.jit(best)(few)
        assert ids.shape == logprobs.shape == (3, many)
        for row, found, values in zip(np.asarray(few), ids.tolist(), logprobs, strict=True):
            assert found == sorted(range(len(row)), key=lambda i: (-row[i], i))[:many]
            np.testing.assert_allclose(values, np.log(softmax(row))[found], atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("temperature", value) for value in (-0.1, float("nan"), float("inf"))),
        *(("top_p", value) for value in (-0.1, 1.1, float("nan"))),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("top_k", value) for value in (-1, 2**31)),
        *(("seed", value) for value in (-1, 2**32)),
        *(("repetition_penalty", value) for value in (0, -1.0, float("nan"), float("inf"))),
        *(("frequency_penalty", value) for value in (-2.1, 2.1, float("nan"))),
        *(("presence_penalty", value) for value in (-2.1, 2.1)),
    ],
)
def test_values_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field} is "):
        Sampling(**{field: value})


def test_biases_out_of_range():
    with pytest.raises(ValueError, match="logit_bias has 301 entries, expected at most 300"):
        Sampling(logit_bias=dict.fromkeys(range(301), 1.0))
    for bias in (100.5, -101, float("nan")):
        with pytest.raises(ValueError, match=r"logit_bias of token 4 is .*, expected a number from -100 to 100"):
            Sampling(logit_bias={4: bias})
