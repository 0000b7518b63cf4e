"""Parameters that kernels read in the stack of all layers: as if they had been cut out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax.kernels.hyper_connections import tpu as hyper_connections
from v4_jax.kernels.hyper_connections.reference import Numbers, Site
from v4_jax.kernels.output import tpu as output_kernel
from v4_jax.kernels.rotary import tpu as rotary
from v4_jax.kernels.rotary.reference import Steps
from v4_jax.layer_stack import Cut, one_layer, stack_of, uncut
from v4_jax.layers.partials import Partial
from v4_jax.layers.rotary import Turn

LAYERS = 19  # more than one block of lines, and the last one not full
CHANNELS = 128


def cut(array, layer, dtype=jnp.float32):
    """The array as layer `layer` of a stack whose other layers are not finite."""
    stack = jnp.full((LAYERS, *array.shape), jnp.nan, dtype).at[layer].set(array.astype(dtype))
    return Cut(array.astype(dtype), stack, jnp.int32(layer))


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("layer", [0, 7, 15, 16, 18])
def test_in_a_stack(layer):
    streams, norm = numbers(0, 1, 3, 4 * CHANNELS).astype(jnp.bfloat16), numbers(1, CHANNELS)
    site = Site(numbers(2, 24, 4 * CHANNELS) / 8, numbers(3, 24), numbers(4, 3), norm)
    turn = Turn(numbers(5, 1, 3, 64), numbers(6, 1, 3, 64))
    heads = numbers(7, 1, 3, 2, CHANNELS)
    partial = numbers(8, 1, 3, 2), jnp.exp(numbers(9, 1, 3, 2)), heads
    sink = numbers(10, 2)

    def enter(site):
        return hyper_connections.enter(streams, site, Numbers(4, 1e-6, 1e-6, 3), interpret=True)

    def rotate(norm):
        return rotary.norm_rotate(numbers(11, 1, 3, CHANNELS), norm, turn, Steps(1e-6), interpret=True)

    def output(sink):
        return output_kernel.attention_output([Partial(*partial)], sink, turn, jnp.bfloat16, interpret=True)

    for call, given in ((enter, site), (rotate, norm), (output, sink)):
        stacked = jax.tree.map(lambda x: cut(x, layer), given)
        for found, expected in zip(jax.tree.leaves(call(stacked)), jax.tree.leaves(call(given)), strict=True):
            np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_a_bfloat16_norm_in_a_stack():
    x, norm = numbers(0, 1, 2, CHANNELS), numbers(1, CHANNELS).astype(jnp.bfloat16)
    found = rotary.norm_rotate(x, cut(norm, 17, jnp.bfloat16), None, Steps(1e-6), interpret=True)
    np.testing.assert_array_equal(found, rotary.norm_rotate(x, norm, None, Steps(1e-6), interpret=True))


def test_one_that_was_not_cut_is_a_stack_of_its_own():
    x = numbers(0, 4)
    (stack, layer), one = stack_of(x), cut(x, 3)
    assert stack.shape == (1, 4) and layer == 0 and one.shape == (4,) and one.dtype == jnp.float32
    np.testing.assert_array_equal(uncut({"a": one})["a"], x)


def test_weights_of_one_layer_are_told_from_others():
    one = Cut(jnp.zeros(4), jnp.zeros((3, 4)), jnp.int32(2))
    assert one_layer([one, one]) == 2 and one_layer([jnp.zeros(4)]) == one_layer([]) == 0
    for other in (jnp.zeros(4), Cut(jnp.zeros(4), jnp.zeros((2, 4)), jnp.int32(1))):
        with pytest.raises(ValueError, match="layers: expected the same"):
            one_layer([one, other])
