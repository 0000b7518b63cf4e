"""FLOPs and bytes read from compiled programs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from v4_jax.planning.hlo import Program
from v4_jax.planning.hlo_costs import _multiplications, costs


def program(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return Program(jax.jit(function).lower(*arguments).compile().as_text())


def test_products_in_loops():
    def function(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    found = costs(program(function, (64, 128), (5, 128, 128)))
    assert sum(cost.flops for cost in found) == 5 * 2 * 64 * 128 * 128


def test_batched_products():
    found = costs(program(lambda x, w: jnp.einsum("bij,bkj->bik", x, w), (3, 8, 16), (3, 4, 16)))
    assert sum(cost.flops for cost in found) == 2 * 3 * 8 * 4 * 16


def test_bytes_of_an_elementwise_program():
    found = costs(program(lambda x, y: x * y + 1, (256, 256), (256, 256)))
    assert sum(cost.nbytes for cost in found) == 3 * 4 * 256 * 256


def test_a_slice_counts_as_itself():
    found = costs(program(lambda x: jax.lax.fori_loop(0, 10, lambda i, y: y + jnp.sin(x[i]), x[0]), (10, 4096)))
    assert sum(cost.nbytes for cost in found) < 10 * 4 * 4 * 4096  # and not ten times all of it


@pytest.mark.parametrize(
    ("labels", "window", "left", "right", "out", "expected"),
    [
        ("bf_io->bf", "", (8, 16), (16, 32), (8, 32), 8 * 16 * 32),
        # A product of five pairs of matrices, as a convolution whose window meets one pair at a time.
        (
            "0bf_0io->0bf",
            "window={size=5 stride=4 pad=0_0 lhs_dilate=5}, ",
            *((5, 8, 16), (5, 16, 32), (5, 8, 32), 5 * 8 * 16 * 32),
        ),
        # Three taps over ten places, padded by one on each side.
        ("b0f_0io->b0f", "window={size=3 pad=1_1}, ", (1, 10, 1), (3, 1, 1), (1, 10, 1), 28),
        ("b0f_0io->b0f", "window={size=3 stride=2}, ", (1, 9, 1), (3, 1, 1), (1, 4, 1), 12),
    ],
)
def test_products_as_the_tpu_compiler_writes_them(labels, window, left, right, out, expected):
    assert _multiplications(f", {window}dim_labels={labels}", left, right, out) == expected


def test_what_is_on_the_chip_is_free():
    text = """HloModule m

ENTRY %main (x: f32[1024]) -> f32[1024] {
  %x = f32[1024]{0:T(1024)} parameter(0)
  %copy.1 = f32[1024]{0:T(1024)S(1)} copy(%x)
  %negate.1 = f32[1024]{0:T(1024)S(1)} negate(%copy.1)
  ROOT %copy.2 = f32[1024]{0:T(1024)} copy(%negate.1)
}
"""
    assert {cost.instruction.name: cost.nbytes for cost in costs(Program(text))} == {"copy.1": 4096, "copy.2": 4096}


def test_what_a_fusion_hands_on_is_free():
    """The buffer of a collective that runs beside it."""
    text = """HloModule m

%fused (p: f32[1024], buffer: f32[4096]) -> (f32[1024], f32[4096]) {
  %p = f32[1024]{0} parameter(0)
  %buffer = f32[4096]{0} parameter(1)
  %n = f32[1024]{0} negate(%p)
  ROOT %both = (f32[1024]{0}, f32[4096]{0}) tuple(%n, %buffer)
}

ENTRY %main (x: f32[1024], y: f32[4096]) -> (f32[1024], f32[4096]) {
  %x = f32[1024]{0} parameter(0)
  %y = f32[4096]{0} parameter(1)
  ROOT %f = (f32[1024]{0}, f32[4096]{0}) fusion(%x, %y), kind=kCustom, calls=%fused
}
"""
    assert sum(cost.nbytes for cost in costs(Program(text))) == 2 * 4096


def test_room_that_is_not_written_is_free():
    text = """HloModule m

ENTRY %main () -> f32[1024] {
  ROOT %empty.1 = f32[1024]{0:T(1024)} custom-call(), custom_call_target="AllocateBuffer"
}
"""
    assert not costs(Program(text))
    assert costs(Program(text.replace("AllocateBuffer", "Other")))


ESTIMATES = {
    "in one line": '{"flops":"77","transcendentals":"0","bytes_accessed":"99"}}}',
    "in several": """ {
"bytes_accessed":99,
"flops":77,
"transcendentals":0
}, "serialization_format": 1}}""",  # as the compiler has it within a fusion
}


@pytest.mark.parametrize("estimate", ESTIMATES.values(), ids=ESTIMATES)
def test_a_kernel_counts_as_it_says(estimate):
    text = f"""HloModule m

ENTRY %main (x: f32[1024]) -> f32[1024] {{
  %x = f32[1024]{{0:T(1024)}} parameter(0)
  %kernel = f32[1024]{{0:T(1024)}} custom-call(%x), custom_call_target="tpu_custom_call", \
backend_config={{"custom_call_config":{{"cost_estimate":{estimate}
  ROOT %same = f32[1024]{{0:T(1024)}} bitcast(%kernel)
}}
"""
    program = Program(text)
    (cost,) = costs(program)
    assert (cost.flops, cost.nbytes) == (77, 99)
    assert program.computations["main"].root == "same"
