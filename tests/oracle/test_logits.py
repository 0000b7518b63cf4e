"""The whole model's float32 logits are transformers', at every length where something begins, and through the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")

import v4_jax
from tests.checkpoint.directories import write_run
from tests.conftest import DATA
from tests.oracle import hf
from v4_jax import Transformer, init_cache
from v4_jax.checkpoint import export

TOLERANCE = 2e-4  # the contract; 1e-5 is usual. Logits have a standard deviation of 2.

# Around the first compressed entry, the window (32), 4 * top-k = the positions before YaRN (64), the first HCA entry.
EDGES = [*range(1, 10), 31, 32, 33, 63, 64, 65, 127, 128, 129, 130, 300]


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("length", [1, 3, 7, 65, 129, 400])
def test_prefill(pair, tokens, length):
    logits = jax.jit(lambda params, tokens: pair.ours.apply({"params": params}, tokens).logits)
    tokens = tokens[:, :length]
    assert_close(logits(pair.params, tokens), pair.expected(tokens))


def test_prefill_of_every_edge_length(pair, tokens):
    """One ragged batch, each row against transformers' run of that row alone; then a cached chunk of the same."""
    rng = np.random.default_rng(2)
    rows = rng.integers(0, pair.config.vocab_size, (len(EDGES), max(EDGES))).astype(np.int32)
    expected = [pair.expected(row[None, :length])[0] for row, length in zip(rows, EDGES, strict=True)]

    @jax.jit
    def plain(params, lengths):
        return pair.ours.apply({"params": params}, rows, lengths=lengths).logits

    @jax.jit
    def cached(params, lengths):
        cache = init_cache(pair.config, len(EDGES), max(EDGES), dtype="float32")
        return pair.ours.apply({"params": params}, rows, lengths=lengths, cache=cache, logits="last").logits

    whole, last = plain(pair.params, jnp.array(EDGES)), cached(pair.params, jnp.array(EDGES))
    for row, length in enumerate(EDGES):
        assert_close(whole[row, :length], expected[row])
        assert_close(last[row, 0], expected[row][-1])


def test_decode(pair):
    """Token by token from prompts of uneven lengths, so that rows pass the edges at different steps."""
    prompts, steps = np.array([1, 30, 61, 120, 250]), 80
    rng = np.random.default_rng(3)
    rows = rng.integers(0, pair.config.vocab_size, (len(prompts), max(prompts) + steps)).astype(np.int32)
    expected = [pair.expected(row[None, : length + steps])[0] for row, length in zip(rows, prompts, strict=True)]

    @jax.jit
    def advance(params, tokens, lengths, cache):
        output = pair.ours.apply({"params": params}, tokens, lengths=lengths, cache=cache, logits="last")
        return output.logits[:, 0], output.cache

    cache = init_cache(pair.config, len(prompts), max(prompts) + steps, dtype="float32")
    logits, cache = advance(pair.params, rows[:, : max(prompts)], jnp.array(prompts), cache)
    batch, one = np.arange(len(prompts)), jnp.ones(len(prompts), jnp.int32)
    for step in range(steps):
        at = prompts + step
        assert_close(logits, np.stack([expected[row][at[row] - 1] for row in batch]))
        logits, cache = advance(pair.params, rows[batch, at][:, None], one, cache)


def test_a_wrong_weight_is_seen(pair, tokens):
    """The tolerance has teeth: one attention sink moved by a tenth fails it by far."""
    params = jax.tree.map(lambda x: x, pair.params)
    params["layer_0"]["attn"]["attn_sink"] = params["layer_0"]["attn"]["attn_sink"].at[0].add(0.1)
    short = tokens[:, :65]
    logits = jax.jit(lambda params, tokens: pair.ours.apply({"params": params}, tokens).logits)(params, short)
    assert np.abs(logits - pair.expected(short)).max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["flash-tiny", "pro-tiny"])
def test_released_checkpoint(name):
    """A released directory, loaded by us: transformers computes the same from those weights."""
    assert_same_logits(DATA / name, filled_from(DATA / name))


@pytest.fixture(scope="module")
def exported(pair, tmp_path_factory):
    """A released directory made from what a training run saved."""
    folder = tmp_path_factory.mktemp("runs")
    # Whole blocks of 32 for the experts, as transformers takes the size of a block from the number of its scales.
    config = dataclasses.replace(pair.config, moe_intermediate_size=64)
    trained = hf.build(config)
    hf.randomise(trained, config, seed=5)
    run = write_run(folder / "run", config, {1: hf.params_from_state(hf.state_of(trained), config)})
    export(run, folder / "out")
    return folder / "out"


def test_exported_run(exported):
    """The directory loaded by us."""
    assert_same_logits(exported, filled_from(exported))


def test_exported_run_as_transformers_reads_it(exported):
    """The directory loaded by transformers: its own reader of names, blocks, scales and the configuration."""
    pytest.importorskip("accelerate")  # without it transformers refuses to read FP8
    import torch
    from transformers import DeepseekV4ForCausalLM, FineGrainedFP8Config

    theirs, found = DeepseekV4ForCausalLM.from_pretrained(
        exported,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        attn_implementation="eager",
        output_loading_info=True,
    )
    assert not any(found.values())
    assert_same_logits(exported, theirs.float().eval())  # plain tensors were left in bfloat16


def filled_from(directory):
    """transformers' model with the weights that we load."""
    config, params = v4_jax.load(directory, dtype="float32")
    theirs = hf.build(config)
    hf.write_state(hf.state_of(theirs), params, config)
    return theirs


def assert_same_logits(directory, theirs):
    """Our model of a directory against transformers'."""
    config, params = v4_jax.load(directory, dtype="float32")
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, (2, 150)).astype(np.int32)
    model = Transformer(config, policy="float32")
    logits = jax.jit(lambda params, tokens: model.apply({"params": params}, tokens).logits)(params, tokens)
    assert_close(logits, hf.logits_of(theirs, tokens))
