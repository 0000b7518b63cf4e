"""The released checkpoints, as loaded, against outputs on which independent implementations agree."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import CHECKPOINTS, DATA
from tests.models import golden
from v4_jax import Config, Policy, Transformer, init_cache, load

TOLERANCE = 2e-4  # ten times what two independent implementations differ by
DIVERGENCE = 5e-4  # mean KL of fake-quantised numerics, which rounding makes discontinuous


class Case(NamedTuple):
    config: Config
    params: dict
    golden: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def cases():
    def read(name: str) -> Case:
        return Case(*load(DATA / name), golden(DATA / name))

    return {name: read(name) for name in CHECKPOINTS}


def run(case: Case, policy: str | Policy):
    """Logits, MTP logits and final streams of the golden tokens, from weights in the released formats."""
    model, tokens = Transformer(case.config, policy=policy), jnp.asarray(case.golden["tokens"])

    @jax.jit
    def both(params, tokens):
        trunk = model.apply({"params": params}, tokens)
        draft = model.apply({"params": params}, trunk.streams[:, :-1], tokens[:, 1:], method="mtp")
        return trunk.logits, draft.logits, trunk.streams

    return both(case.params, tokens)


def assert_same_predictions(found: np.ndarray, golden: np.ndarray) -> None:
    np.testing.assert_allclose(found, golden, atol=TOLERANCE, rtol=0)
    best, second = np.sort(golden, axis=-1)[..., -1], np.sort(golden, axis=-1)[..., -2]
    clear = best - second > 2 * TOLERANCE
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(found.argmax(-1)[clear], golden.argmax(-1)[clear])


@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "dspark-tiny"])
def test_float32(cases, name):
    case = cases[name]
    logits, draft, streams = map(np.asarray, run(case, "float32"))
    assert_same_predictions(logits, case.golden["logits"])
    assert_same_predictions(draft, case.golden["mtp_logits"])
    rows, positions = case.golden["streams_out"].shape[:2]
    np.testing.assert_allclose(streams[:rows, :positions], case.golden["streams_out"], atol=TOLERANCE, rtol=0)


def test_dspark(cases):
    """Taps of a pass over the whole text; drafts, their logits and confidences behind several of its positions.

    The stages are given the golden taps, and for drafts and logits also those of the pass. (Confidences are as large
    as 45, and some move by 2e-4 with the last digits of the taps.)
    """
    config, params, golden = cases["dspark-tiny"]
    model, tokens = Transformer(config, policy="float32"), jnp.asarray(golden["tokens"])
    last = golden["anchors"]  # of which the taps are known; the token after it begins the block

    trunk = jax.jit(lambda params: model.apply({"params": params}, tokens, return_taps=True))(params)
    assert_same_predictions(trunk.logits, golden["logits"])
    np.testing.assert_allclose(trunk.taps, golden["taps"], atol=TOLERANCE, rtol=0)

    @jax.jit
    def drafts(params, taps):
        taps = jnp.broadcast_to(taps, (len(last), *taps.shape[1:]))
        return model.apply({"params": params}, taps, tokens[0, last + 1], lengths=last + 1, method="dspark")

    @jax.jit
    def known(params, taps):
        """As training drafts: all blocks at once, in rows where the golden drafts stand behind the anchors."""
        size = golden["drafts"].shape[1]
        taps = jnp.pad(jnp.broadcast_to(taps, (len(last), *taps.shape[1:])), [(0, 0), (0, size), (0, 0)])
        rows = jnp.pad(jnp.tile(tokens, (len(last), 1)), [(0, 0), (0, size)])
        rows = rows.at[np.arange(len(last))[:, None], last[:, None] + 2 + np.arange(size)].set(golden["drafts"])
        draft = model.apply({"params": params}, taps, rows, last[:, None] + 1, method="dspark_known")
        return jax.tree.map(lambda x: x[:, 0], draft)

    for taps in (golden["taps"], trunk.taps):
        for draft in (drafts(params, jnp.asarray(taps)), known(params, jnp.asarray(taps))):
            np.testing.assert_array_equal(draft.tokens, golden["drafts"])
            np.testing.assert_allclose(draft.logits, golden["draft_logits"], atol=TOLERANCE, rtol=0)
            if taps is golden["taps"]:
                np.testing.assert_allclose(draft.confidence, golden["confidence"], atol=TOLERANCE, rtol=0)


def divergence(golden: np.ndarray, found: jax.Array) -> float:
    """Mean over positions of KL(golden || found)."""
    a, b = jax.nn.log_softmax(jnp.asarray(golden)), jax.nn.log_softmax(found)
    return float(jnp.mean(jnp.sum(jnp.exp(a) * (a - b), axis=-1)))


def test_released_numerics(cases):
    """Fake-quantisation as the release does it; leaving it out is an order of magnitude beyond the contract."""
    case = cases["released-tiny"]
    logits, draft, _ = run(case, Policy(jnp.float32, fake_quant=True))
    assert divergence(case.golden["released_logits"], logits) < DIVERGENCE
    assert divergence(case.golden["released_mtp_logits"], draft) < DIVERGENCE
    assert divergence(case.golden["released_logits"], case.golden["logits"]) > 5 * DIVERGENCE


def test_released_cache(cases):
    """Keys held in E4M3 and index keys in E2M1 give what the same numbers in bfloat16 give, bit for bit."""
    case = cases["released-tiny"]
    model = Transformer(case.config, policy="released")
    step = jax.jit(lambda cache, tokens: model.apply({"params": case.params}, tokens, cache=cache))
    tokens = jnp.asarray(case.golden["tokens"])

    def logits(dtype: str) -> tuple[list, int]:
        cache, out = init_cache(case.config, 2, 260, dtype=dtype), []
        for first, last in ((0, 100), (100, 200), (200, 201), (201, 202)):
            output = step(cache, tokens[:, first:last])
            out.append(output.logits)
            cache = output.cache
        sizes = cache.nbytes()
        return out, sum(sizes[role] for role in ("window", "csa", "hca", "index"))

    released, released_bytes = logits("released")
    plain, plain_bytes = logits("bfloat16")
    for a, b in zip(released, plain, strict=True):
        np.testing.assert_array_equal(a, b)
    assert released_bytes < 0.8 * plain_bytes


def test_released_cache_needs_the_released_policy(cases):
    case = cases["released-tiny"]
    model = Transformer(case.config, policy="bfloat16")
    cache = init_cache(case.config, 2, 8, dtype="released")
    with pytest.raises(ValueError, match="needs the policy 'released'"):
        model.apply({"params": case.params}, jnp.zeros((2, 4), jnp.int32), cache=cache)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dequantised_weights_are_the_same_model(cases, dtype):
    """Every released value is exact in bfloat16 products of a code and a power of two, so the logits are the same."""
    case = cases["pro-tiny"]
    config, params = load(DATA / "pro-tiny", dtype=dtype)
    logits, *_ = run(case._replace(config=config, params=params), "float32")
    np.testing.assert_allclose(logits, case.golden["logits"], atol=TOLERANCE, rtol=0)
