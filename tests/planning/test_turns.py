"""What a plan counts of kernels whose loops depend on the data."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from v4_jax.kernels.turns import about, visits
from v4_jax.planning.turns import tells_all, tells_visits, with_turns


def _kernel(turns, out):
    @pl.when(pl.program_id(0) == 0)
    def _():
        out[0] = 0

    def body(i, carry):
        out[0] += 1
        return carry

    jax.lax.fori_loop(0, turns[0], body, None)
    with about(5):
        jax.lax.fori_loop(0, turns[0], body, None)

    def halve(x):
        out[0] += 100
        return x // 2

    with about(7):
        jax.lax.while_loop(lambda x: x > 0, halve, turns[0])

    def once():
        out[0] += 1000

    with about(0):
        pl.when(turns[0] > 0)(once)
    with about(1):
        pl.when(turns[0] < 0)(once)


def _count(steps, turns, said):
    def call(steps, turns):
        kernel = pl.pallas_call(
            _kernel, grid=(steps,), out_shape=jax.ShapeDtypeStruct((1,), jnp.int32), interpret=True, name="count"
        )
        with about(3):
            return kernel(turns)

    closed = jax.make_jaxpr(call)(steps, turns)
    (equation,) = (e for e in closed.eqns if e.primitive.name == "pallas_call")
    counted = with_turns(equation) if said else equation
    operands = (steps, turns)[len(equation.invars) - len(counted.invars) :]
    return jax.jit(lambda *x: counted.primitive.bind(*x, **counted.params))(*operands)[0].item()


@pytest.mark.parametrize(("said", "turns", "steps"), [(False, 2, 2), (True, 5, 3)])
def test_loops_and_grids_turn_as_often_as_is_said(said, turns, steps):
    """A grid of 2 steps that is said to have 3; loops of 2 turns said to have 5 and 7, and one of which nothing is. Of
    two conditions, what is done is said not to be, and the other way round."""
    halvings = 7 if said else 2
    assert _count(jnp.int32(2), jnp.array([2], jnp.int32), said) == steps * (2 + turns + 100 * halvings + 1000)


def test_transfers_that_are_said_not_to_be_are_left_out():
    """Their bytes count without them; and a condition that is said to hold is no condition any more."""

    def kernel(x, out, arrived):
        copy = pltpu.make_async_copy(x, out, arrived)
        with about(1):
            pl.when(pl.program_id(0) == 0)(copy.start)
        with about(0):
            copy.wait()

    call = pl.pallas_call(
        kernel,
        grid=(1,),
        out_shape=jax.ShapeDtypeStruct((8, 128), jnp.float32),
        scratch_shapes=[pltpu.SemaphoreType.DMA],
        interpret=True,
    )
    (equation,) = jax.make_jaxpr(call)(jnp.zeros((8, 128))).eqns
    assert {"cond", "dma_wait"} <= {inner.primitive.name for inner in equation.params["jaxpr"].eqns}
    counted = with_turns(equation).params["jaxpr"].eqns
    assert not {"cond", "dma_wait"} & {inner.primitive.name for inner in counted}
    (once,) = (inner for inner in counted if inner.primitive.name == "scan")
    assert once.params["length"] == 1


@pytest.mark.parametrize("first", [True, False])
def test_all_visits_are_first_ones_or_none_is(first):
    def kernel(out):
        out[0] = 0
        fresh = pl.program_id(0) == 1

        def add(count):
            out[0] += count

        with visits(first=True):
            pl.when(fresh)(lambda: add(10))
        with visits(first=False):
            pl.when(~fresh)(lambda: add(1))

    call = pl.pallas_call(kernel, grid=(2,), out_shape=jax.ShapeDtypeStruct((1,), jnp.int32), interpret=True)
    (equation,) = jax.make_jaxpr(call)().eqns
    assert tells_visits(equation)
    counted = with_turns(equation, first=first)
    assert jax.jit(lambda: counted.primitive.bind(**counted.params))()[0].item() == (10 if first else 1)


@pytest.mark.parametrize(
    ("condition", "told", "tells"),
    [
        (lambda flags: pl.program_id(0) == pl.num_programs(0) - 1, False, True),
        (lambda flags: flags[0] > 0, False, False),
        (lambda flags: pl.program_id(0) < flags[0], False, False),
        (lambda flags: pl.program_id(0) < flags[0], True, True),
    ],
)
@pytest.mark.parametrize("loop", [False, True])
def test_kernels_tell_of_products_that_depend_on_data(condition, told, tells, loop):
    """The estimate takes data to be zeros: what it would leave out is told, or the kernel has no estimate."""

    def kernel(flags, x, out):
        def add(_, carry):
            out[...] += x[...] @ x[...]
            return carry

        def work():
            if not loop:
                add(0, None)
                return
            with about(3):
                jax.lax.fori_loop(0, flags[1], add, None)

        with about(1) if told else contextlib.nullcontext():
            pl.when(condition(flags))(work)

    call = pl.pallas_call(kernel, grid=(2,), out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32), interpret=True)
    (equation,) = jax.make_jaxpr(call)(jnp.zeros(2, jnp.int32), jnp.zeros((8, 8))).eqns
    assert tells_all(with_turns(equation)) == tells
    assert not loop or not tells_all(equation)
