"""Parts that other implementations got wrong, each against transformers' own module."""

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import DeepseekV4Config
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as modeling

from tests.oracle import hf
from v4_jax import Config
from v4_jax.architecture import RATIO_OF_ROLE
from v4_jax.layers.hyper_connections import HyperConnection, apart, joined, leave
from v4_jax.layers.rotary import inverse_frequencies, rotate, turn


class Doubled(torch.nn.Module):
    """Stands for attention."""

    def forward(self, x, **arguments):
        return 2 * x, None


class Reversed(torch.nn.Module):
    """Stands for the experts."""

    def forward(self, x, input_ids=None):
        return x.flip(-1)


def test_residual_mixing_has_the_right_direction(pair):
    """transformers' block around stand-in sublayers; the same with the mixing matrix transposed is something else."""
    block = modeling.DeepseekV4DecoderLayer(pair.theirs.config, 0).eval().requires_grad_(False)
    hf.randomise(block, pair.config, seed=5)
    block.self_attn, block.mlp = Doubled(), Reversed()
    rng = np.random.default_rng(5)
    streams = rng.normal(size=(2, 9, pair.config.hc_mult, pair.config.hidden_size)).astype(np.float32)
    with torch.no_grad():
        expected = block(torch.from_numpy(streams)).numpy()
    state = hf.state_of(block)

    def run(transpose: bool):
        x, asymmetry, hc = joined(jnp.asarray(streams)), 0.0, pair.config.hc_mult
        for site, norm, sublayer in (
            ("attn_hc", "input_layernorm", lambda y: 2 * y),
            ("ffn_hc", "post_attention_layernorm", lambda y: y[..., ::-1]),
        ):
            params = {name: state[f"{site}.{name}"] for name in ("fn", "base", "scale")}
            norm = state[f"{norm}.weight"]
            x, y, mix = HyperConnection(config=pair.config).apply({"params": params}, x, norm)
            residual = mix[hc:].reshape(hc, hc, *mix.shape[1:])
            asymmetry = max(asymmetry, float(jnp.abs(residual - residual.swapaxes(0, 1)).max()))
            if transpose:
                mix = jnp.concatenate([mix[:hc], residual.swapaxes(0, 1).reshape(hc * hc, *mix.shape[1:])])
            x = leave(x, sublayer(y), mix, pair.config)
        return apart(x, hc), asymmetry

    ours, asymmetry = run(transpose=False)
    np.testing.assert_allclose(ours, expected, atol=1e-5, rtol=0)
    assert asymmetry > 0.1  # or a transposed matrix would pass
    assert np.abs(run(transpose=True)[0] - expected).max() > 0.1


POSITIONS = np.array([0, 1, 127, 65535, 65536, 65537, 70001, 262144, 1048575])


@pytest.mark.parametrize("role", ["sliding", "csa", "hca"])
@pytest.mark.parametrize("config", [Config.flash(), Config.pro(), Config.tiny()], ids=["flash", "pro", "tiny"])
def test_rotary_angles(config, role):
    """cos and sin as transformers has them, at positions that only YaRN was made for."""
    kind = "main" if role == "sliding" else "compress"
    rotary = modeling.DeepseekV4RotaryEmbedding(DeepseekV4Config(**hf.hf_content(config)))
    with torch.no_grad():
        cos, sin = rotary(torch.zeros(1), torch.from_numpy(POSITIONS)[None], layer_type=kind)
    frequencies = inverse_frequencies(config, RATIO_OF_ROLE[role])
    theirs = getattr(rotary, kind + "_inv_freq").numpy()
    np.testing.assert_allclose(frequencies, theirs, rtol=3e-7, atol=0)  # a last bit or two: float32 powers

    unit = jnp.zeros((len(POSITIONS), config.head_dim)).at[:, ::2].set(1.0)
    # An angle of 65536 is known to a few thousandths in float32, for them as for us: compare on the same table ...
    turned = np.asarray(rotate(unit, turn(jnp.asarray(POSITIONS), theirs)))[:, -config.qk_rope_head_dim :]
    np.testing.assert_allclose(turned[:, ::2], cos[0], atol=1e-6, rtol=0)
    np.testing.assert_allclose(turned[:, 1::2], sin[0], atol=1e-6, rtol=0)
    # ... and on our own within what those last bits of a frequency are worth.
    turned = np.asarray(rotate(unit, turn(jnp.asarray(POSITIONS), frequencies)))[:, -config.qk_rope_head_dim :]
    slack = 1e-6 + 3e-7 * POSITIONS[:, None] * theirs
    assert np.all(np.abs(turned[:, ::2] - cos[0].numpy()) <= slack)
    assert np.all(np.abs(turned[:, 1::2] - sin[0].numpy()) <= slack)
