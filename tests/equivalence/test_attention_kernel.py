"""A whole model whose attention runs as the TPUs' kernel, interpreted, is the model without: chunks, tokens, meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import TOLERANCE, Tiny, make
from v4_jax import Transformer, init_cache
from v4_jax.kernels.attention import tpu
from v4_jax.parameter_tree import placements
from v4_jax.sharding.mesh import make_mesh
from v4_jax.sharding.platform import interpreted

# A sliding and an HCA layer, as narrow as the kernel takes them.
NARROW = dict(
    num_hidden_layers=2, compress_ratios=(0, 128), num_nextn_predict_layers=0, num_attention_heads=16, head_dim=128
)
SIZES = (256, 2)  # tokens of calls one after another: two entries come with the first
ROOM = 640


@pytest.fixture(scope="module")
def narrow() -> Tiny:
    return make(**NARROW)


@pytest.fixture
def calls(monkeypatch):
    """What the kernel was interpreted for: how many queries, whether a window, whether entries."""
    traced, kernel = [], tpu.window_attention

    def spy(queries, keys, oldest, entries, *rest, interpret, **options):
        traced.extend([(queries.shape[1], keys is not None, entries is not None)] * interpret)
        return kernel(queries, keys, oldest, entries, *rest, interpret=interpret, **options)

    monkeypatch.setattr(tpu, "window_attention", spy)
    return traced


def run(narrow: Tiny, mesh: str | None) -> np.ndarray:
    """Logits of ragged rows, by calls of `SIZES` tokens."""
    place = {} if mesh is None else dict(mesh=make_mesh(mesh, jax.devices()[:2]), rules="long-context")
    model = Transformer(narrow.config, policy="float32", **place)
    params = (
        narrow.params if mesh is None else jax.device_put(narrow.params, placements(narrow.config, *place.values()))
    )
    step = jax.jit(
        lambda params, tokens, lengths, cache: model.apply({"params": params}, tokens, lengths=lengths, cache=cache)
    )
    tokens = jax.random.randint(jax.random.key(3), (2, sum(SIZES)), 0, 64)
    found, first, cache = [], 0, init_cache(narrow.config, 2, ROOM, dtype="float32", **place)
    for size in SIZES:
        lengths = jnp.array([size, max(1, size - 7)])
        output = step(params, tokens[:, first : first + size], lengths, cache)
        found.append(np.where((jnp.arange(size) < lengths[:, None])[..., None], output.logits, 0))
        first, cache = first + size, output.cache
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("mesh", [None, "seq=2"])
def test_the_model(narrow, mesh, calls):
    """The first call's queries in one wide block; entries join the window, or come apart where queries are few."""
    plain = run(narrow, mesh)
    assert not calls
    with interpreted():
        kernel = run(narrow, mesh)
    tokens = (SIZES[0] // 2, *SIZES[1:]) if mesh == "seq=2" else SIZES
    for count in tokens:
        window, entries = (count, True, False), (count, False, True)
        assert {window, entries if count < 16 else (count, True, True)} <= set(calls)
    np.testing.assert_allclose(kernel, plain, atol=TOLERANCE, rtol=0)
