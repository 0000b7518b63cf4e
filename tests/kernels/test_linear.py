"""Products with E4M3 weights: the TPU kernel, interpreted, and its reference, against float64."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from v4_jax import Config, Transformer, declarations, init_cache
from v4_jax.kernels import choose
from v4_jax.kernels.linear import groups as linear_groups
from v4_jax.kernels.linear import reference, shares
from v4_jax.kernels.linear import tpu as linear_tpu
from v4_jax.kernels.linear.tpu import ROWS, WHOLE_ROWS, matmul, one_row, supports
from v4_jax.kernels.output import few as output_few
from v4_jax.kernels.output.few import attention_end
from v4_jax.layer_stack import Cut
from v4_jax.layers.linear import grouped_linear, linear, linears
from v4_jax.number_formats import E2M1, E4M3, E8M0, FP8_BLOCK, BlockScaled, Stack, dequantise, quantise
from v4_jax.parameters import is_parameter
from v4_jax.sharding.platform import interpreted


def random(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def weight_of(*shape, seed=0):
    """Neighbouring blocks differ in scale by up to 2^8."""
    rows, columns = (-(-size // 128) for size in shape[-2:])
    blocks = 2.0 ** jax.random.randint(jax.random.key(seed + 100), (*shape[:-2], rows, columns), -12, -4)
    spread = jnp.repeat(jnp.repeat(blocks, 128, axis=-2), 128, axis=-1)
    return quantise(random(seed, *shape) * spread[..., : shape[-2], : shape[-1]], E4M3)


def rows_of(*shape, seed=1):
    return random(seed, *shape).astype(jnp.bfloat16)


@functools.partial(jax.jit, static_argnames="groups")
def kernel(x, weights, groups=1):
    return matmul(x, weights, groups=groups, interpret=True)


@functools.partial(jax.jit, static_argnames="groups")
def plain(x, weights, groups=1):
    if groups == 1:
        return jnp.concatenate([reference.matmul(x, dequantise(w, x.dtype), x.dtype) for w in weights], axis=-1)
    x = x.reshape(x.shape[0], groups, -1)
    return reference.grouped(x, dequantise(weights[0], x.dtype), x.dtype).reshape(x.shape[0], -1)


BOTH = pytest.mark.parametrize("product", [kernel, plain], ids=["kernel", "reference"])


def check(out, x, weights, groups=1):
    """Within what bfloat16 output and float32 sums allow.

    Half a step of bfloat16 is 2^-8 of the value; K float32 additions err by at most K 2^-24 of the sum of magnitudes.
    """
    x = np.asarray(x, np.float64).reshape(x.shape[0], groups, -1)
    expected, sums = [], []
    for weight in weights:
        w = np.asarray(dequantise(weight, jnp.float32), np.float64)
        w = w.reshape(groups, -1, w.shape[-1])
        expected.append(np.einsum("mgi,goi->mgo", x, w).reshape(x.shape[0], -1))
        sums.append(np.einsum("mgi,goi->mgo", abs(x), abs(w)).reshape(x.shape[0], -1))
    expected, sums = np.concatenate(expected, axis=1), np.concatenate(sums, axis=1)
    assert out.dtype == jnp.bfloat16 and out.shape == expected.shape
    bound = 2.0**-8 * abs(expected) + (1 + 2.0**-8) * x.shape[-1] * 2.0**-24 * sums
    assert (abs(np.asarray(out, np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("rows", [1, 3, 8, 17, 128, ROWS + 44, WHOLE_ROWS, WHOLE_ROWS + 1, 2 * WHOLE_ROWS + 100])
@BOTH
def test_any_rows(rows, product):
    """One tile of rows or several, the last of them cut off; few, and so many that weights are expanded."""
    x, weight = rows_of(rows, 256), weight_of(384, 256)
    check(product(x, [weight]), x, [weight])


@pytest.mark.parametrize("rows", [5, WHOLE_ROWS + 1])
@pytest.mark.parametrize(
    ("width", "depth"), [(128, 128), (640, 128), (1024, 384), (256, 1152), (128, 4608), (2048, 512)]
)
def test_any_width_and_depth(width, depth, rows):
    x, weight = rows_of(rows, depth), weight_of(width, depth)
    check(kernel(x, [weight]), x, [weight])


@pytest.mark.parametrize("rows", [5, WHOLE_ROWS + 1])
@pytest.mark.parametrize("widths", [(256, 128), (128, 512, 384)])
@BOTH
def test_several_weights_of_the_same_rows(widths, rows, product):
    x = rows_of(rows, 256)
    weights = [weight_of(width, 256, seed=i) for i, width in enumerate(widths)]
    check(product(x, weights), x, weights)


@pytest.mark.parametrize("rows", [5, WHOLE_ROWS + 1])
@pytest.mark.parametrize(("groups", "width", "depth"), [(2, 128, 256), (4, 384, 128), (8, 1024, 128)])
@BOTH
def test_groups_meet_their_own_matrices(groups, width, depth, rows, product):
    x, weight = rows_of(rows, groups * depth), weight_of(groups * width, depth)
    check(product(x, [weight], groups=groups), x, [weight], groups)


def in_stack(stack, layer):
    cut = jax.tree.map(lambda x: x[layer], stack)
    return cut, cut.replace(codes=jnp.zeros_like(cut.codes), stack=Stack(stack.codes, stack.scales, jnp.int32(layer)))


@pytest.mark.parametrize("rows", [5, WHOLE_ROWS + 1])
def test_layers_are_read_in_their_stacks(rows):
    """Not where they were cut out: the kernel is given nothing there. One that stands alone may be among them."""
    x = rows_of(rows, 128)
    stacks, alone = [weight_of(3, 256, 128), weight_of(3, 128, 128, seed=1)], weight_of(128, 128, seed=2)
    for layer in range(3):
        cuts, known = zip(*(in_stack(stack, layer) for stack in stacks), strict=True)
        check(kernel(x, list(known)), x, cuts)
        check(kernel(x, [alone, known[1]]), x, [alone, cuts[1]])


@pytest.mark.parametrize("scales", [E8M0, jnp.float32])
@pytest.mark.parametrize("rows", [128, WHOLE_ROWS + 128])
@BOTH
def test_every_code_and_scale_is_exact(scales, rows, product):
    """Rows of the identity read the weight itself, any scale of which bfloat16 can hold the products with all codes."""
    exponents = np.array([-117, -60, -7, -1, 0, 1, 7, 60, 118])
    codes = np.arange(128 * 128, dtype=np.uint32).reshape(128, 128) % 256
    codes = np.where(codes & 0x7F == 0x7F, 0, codes).astype(np.uint8)  # not a number: never released
    weight = BlockScaled(
        jax.lax.bitcast_convert_type(jnp.tile(jnp.asarray(codes), (len(exponents), 1)), E4M3),
        jnp.asarray(np.ldexp(1.0, exponents)[:, None].astype(np.float32)).astype(scales),
        FP8_BLOCK,
    )
    x = jnp.tile(jnp.eye(128, dtype=jnp.bfloat16), (rows // 128, 1))
    found = np.asarray(product(x, [weight]), np.float32)
    expected = np.asarray(dequantise(weight, jnp.float32)).T
    assert len(np.unique(abs(expected))) > 700
    np.testing.assert_array_equal(found, np.tile(expected, (rows // 128, 1)))


def test_unsupported_is_refused_by_name():
    good = weight_of(128, 128)
    assert supports(good, jnp.bfloat16) and not supports(good, jnp.float32)
    assert not supports(random(0, 128, 128).astype(jnp.bfloat16), jnp.bfloat16)
    assert not supports(quantise(random(0, 128, 128), E2M1), jnp.bfloat16)
    assert not supports(good, jnp.bfloat16, groups=2)
    with pytest.raises(NotImplementedError, match="multiples of 128"):
        matmul(rows_of(4, 192), [weight_of(128, 192)])
    with pytest.raises(ValueError, match="does not fit"):
        matmul(rows_of(4, 256), [good])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("size", [128, 96])  # the second is not for the kernel
def test_layers_take_any_weight(dtype, size):
    """What layers call, in the program of this platform, with gradients; plain weights beside block-scaled ones."""
    x, weight, other = random(1, 2, 3, size), weight_of(2 * size, size), random(2, size, size)
    found = linears(x, [weight, other], dtype)
    for one, w in zip(found, [dequantise(weight, dtype), other], strict=True):
        np.testing.assert_array_equal(one, reference.matmul(x, w, dtype))
        assert one.dtype == dtype and one.shape == (2, 3, w.shape[0])
    np.testing.assert_array_equal(linear(x, weight, dtype), found[0])
    of_x = jax.grad(lambda x: jnp.sum(linear(x, weight, dtype).astype(jnp.float32)))(x)
    expected = jnp.broadcast_to(jnp.sum(dequantise(weight, jnp.float32), axis=0), x.shape)
    np.testing.assert_allclose(of_x, expected, rtol=2e-2 if dtype == jnp.bfloat16 else 1e-5, atol=1e-4)
    grouped = grouped_linear(x.reshape(3, 2, size), weight, dtype)
    assert grouped.shape == (3, 2, size) and grouped.dtype == dtype


def test_one_row_as_two():
    x, weight = random(0, 1, 1, 96), random(1, 64, 96)
    for dtype in (jnp.float32, jnp.bfloat16):
        out = one_row(x, weight, dtype)
        assert out.dtype == dtype and out.shape == (1, 1, 64)
        np.testing.assert_allclose(out, reference.matmul(x, weight, dtype), rtol=2.0**-7, atol=1e-5)
    pull = jax.vjp(lambda x, w: choose.matmul(x, w, jnp.float32), x, weight)[1]
    np.testing.assert_allclose(pull(jnp.ones((1, 1, 64)))[0][0, 0], jnp.sum(weight, axis=0), atol=1e-5)


# A layer alone and one that repeats, with all sizes multiples of 128.
CONFIG = dataclasses.replace(
    Config.tiny(),
    num_hidden_layers=3,
    compress_ratios=(0, 0, 0),
    num_nextn_predict_layers=0,
    num_hash_layers=1,
    q_lora_rank=128,
    o_lora_rank=128,
    moe_intermediate_size=128,
    initializer_range=0.1,
)


def test_a_model_reads_every_layer_where_it_lies(monkeypatch):
    """A chunk and a token of a model in the released formats: as without kernels, but for roundings to bfloat16."""
    model = Transformer(CONFIG, policy="bfloat16")
    codes = {"fp8": E4M3, "expert": E2M1}
    params = jax.tree.map(
        lambda declared, value: quantise(value, codes[declared.storage]) if declared.storage in codes else value,
        declarations(CONFIG),
        nn.meta.unbox(model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]),
        is_leaf=is_parameter,
    )
    tokens = jax.random.randint(jax.random.key(1), (2, 25), 0, CONFIG.vocab_size)
    given = []

    def spy(x, weights, **options):
        given.extend(weights)
        return matmul(x, weights, **options)

    def spy_on_end(partials, sink, turn, weights, **options):
        given.extend(weights)
        return attention_end(partials, sink, turn, weights, **options)

    monkeypatch.setattr(linear_tpu, "matmul", spy)
    monkeypatch.setattr(output_few, "attention_end", spy_on_end)

    def run(params, replayed):
        cache, found = init_cache(CONFIG, 2, 128, dtype="bfloat16"), []
        for chunk, decisions in zip((tokens[:, :24], tokens[:, 24:]), replayed, strict=True):
            out = model.apply({"params": params}, chunk, cache=cache, routing=decisions, return_routing=True)
            cache = out.cache
            found.append((out.logits, out.routing))
        return tuple(zip(*found, strict=True))

    program = jax.jit(run, compiler_options={"xla_cpu_use_fusion_emitters": True})  # which can reinterpret E2M1
    expected, routing = program(params, (None, None))
    given.clear()  # forms for other platforms are traced, too
    with interpreted():
        found, _ = program(params, routing)
    in_stacks = sum(weight.stack is not None for weight in given)
    # Chunks, and the weights of a layer's attention; a loop's body is traced anew.
    assert len(given) - in_stacks == 2 * 5 <= in_stacks
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2.0**-5 * float(abs(other).max()))


def shared_weights(depth, layers=2):
    """Weights of a layer in every form, as one of a stack's and alone."""
    scaled, across = weight_of(layers, 128, depth), weight_of(layers, 2 * depth, depth, seed=1)
    wide, narrow = (random(seed, layers, size, depth).astype(jnp.bfloat16) for seed, size in ((2, 384), (3, 16)))
    return [scaled, across, wide, narrow]


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize(("rows", "devices"), [(1, 2), (5, 4), (32, 1)])
def test_shares_of_the_inputs(rows, devices, stacked):
    """Every device's share of E4M3 and bfloat16 weights: the kernel, the reference, and their sum, in float64."""
    depth = 128 * devices
    x, stacks, layer = rows_of(rows, depth), shared_weights(depth), 1
    cuts = [jax.tree.map(lambda x: x[layer], stack) for stack in stacks]
    dtypes = [jnp.bfloat16] * 2 + [jnp.float32] * 2
    given = [
        in_stack(stack, layer)[1]
        if isinstance(stack, BlockScaled)
        else Cut(jnp.zeros_like(cut), stack, jnp.int32(layer))
        for stack, cut in zip(stacks, cuts, strict=True)
    ]
    assert shares.supports(x, cuts, dtypes, devices)
    total = [0.0] * len(cuts)
    for device in range(devices):
        own = slice(device * 128, (device + 1) * 128)
        plain = reference.partial_products(x, cuts, jnp.int32(device), devices=devices, dtypes=dtypes)
        found = shares.partial_products(
            x, given if stacked else cuts, jnp.int32(device), devices=devices, interpret=True
        )
        for i, cut in enumerate(cuts):
            w = np.asarray(dequantise(cut, jnp.float32), np.float64)[:, own]
            exact, bound = np.asarray(x, np.float64)[:, own] @ w.T, abs(np.asarray(x, np.float64))[:, own] @ abs(w).T
            for sums in (plain, found):
                part = np.asarray(reference.parts(sums, cuts)[i], np.float64)
                assert part.shape == exact.shape and (abs(part - exact) <= 128 * 2.0**-24 * bound).all()
            total[i] = total[i] + exact
    for cut, summed in zip(cuts, total, strict=True):
        w = np.asarray(dequantise(cut, jnp.float32), np.float64)
        np.testing.assert_allclose(summed, np.asarray(x, np.float64) @ w.T, rtol=1e-9, atol=1e-9)


def test_what_shares_are_made_of():
    x, weight = rows_of(2, 256), weight_of(128, 256)
    assert reference.divides(weight, 2) and not reference.divides(weight, 4)
    assert reference.divides(random(0, 8, 6), 3) and not reference.divides(random(0, 8, 6), 4)
    assert not shares.supports(x, [weight], [jnp.float32], 2)  # the weight would have to be expanded
    assert not shares.supports(x, [random(0, 128, 256)], [jnp.float32], 2)
    assert not shares.supports(x.astype(jnp.float32), [weight], [jnp.bfloat16], 2)
    assert not shares.supports(rows_of(2, 128), [weight_of(128, 128)], [jnp.bfloat16], 2)


@pytest.mark.parametrize(
    ("rows", "groups", "size", "out"), [(700, 3, 256, 128), (130, 2, 128, 640), (1024, 1, 128, 128)]
)
def test_groups_of_plain_weights(rows, groups, size, out):
    """As the reference of the same signature is, and each gradient as the products that it is."""
    x, weight = rows_of(rows, groups, size), random(2, groups * out, size).astype(jnp.bfloat16)
    gradient = rows_of(rows, groups, out, seed=3)
    plain = functools.partial(reference.grouped, dtype=jnp.bfloat16)
    assert linear_groups.supports(x, weight, jnp.bfloat16)
    flat = x.reshape(rows, -1)
    for found in (plain(x, weight), linear_groups.product(x, weight, interpret=True)):
        assert found.shape == (rows, groups, out)
        check(found.reshape(rows, -1), flat, [weight], groups)
    turned = jnp.swapaxes(weight.reshape(groups, out, size), 1, 2).reshape(groups * size, out)
    for found in (
        jax.vjp(plain, x, weight)[1](gradient)[0],
        linear_groups.gradient_of_rows(gradient, weight, interpret=True),
    ):
        assert found.shape == x.shape
        check(found.reshape(rows, -1), gradient.reshape(rows, -1), [turned], groups)


def test_what_groups_the_kernels_take():
    x, weight = rows_of(4, 64, 2, 128), random(2, 256, 128)
    assert linear_groups.supports(x, weight, jnp.bfloat16) and not linear_groups.supports(x, weight, jnp.float32)
    assert not linear_groups.supports(x[:1], weight, jnp.bfloat16)
    assert not linear_groups.supports(x, weight[:192], jnp.bfloat16)
    assert not linear_groups.supports(x[..., :96], weight[:, :96], jnp.bfloat16)


def test_groups_in_kernels():
    """What layers call where kernels run: the same with them and without, and gradients of the operands' dtypes."""
    x, weight = rows_of(2, 100, 2, 128), random(2, 512, 128)
    gradient = rows_of(2, 100, 2, 256, seed=4)

    def both(x, weight):
        out, pull = jax.vjp(lambda x, w: grouped_linear(x, w, jnp.bfloat16), x, weight)
        return out, *pull(gradient)

    plain = both(x, weight)
    with interpreted():
        found = both(x, weight)
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        a, b = (np.asarray(value, np.float32) for value in (a, b))
        np.testing.assert_allclose(a, b, rtol=2.0**-7, atol=2.0**-7 * abs(b).max())
