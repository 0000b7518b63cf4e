"""Collectives read from compiled programs: kinds, bytes, groups, and how often they run."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from v4_jax.planning.hlo import Expected, Shape
from v4_jax.planning.hlo_collectives import Collective, collectives
from v4_jax.sharding.mesh import make_mesh

MESH = "data=2,seq=4"


def compiled(function, *shapes, specs, out=None):
    """The text of `function` as it runs on each device of the mesh."""
    mesh = make_mesh(MESH, jax.devices()[:8])
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out or specs[0], check_vma=False)
    arguments = [shape if hasattr(shape, "dtype") else jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def only(text, **arguments):
    (found,) = collectives(text, **arguments)
    return found


@pytest.mark.parametrize(
    ("function", "kind", "bytes_", "group", "sent"),
    [
        (lambda x: jax.lax.psum(x, "data"), "all-reduce", 4 * 16 * 8, 2, 4 * 16 * 8),
        (lambda x: jax.lax.psum(x, ("data", "seq")), "all-reduce", 4 * 16 * 8, 8, 2 * 7 / 8 * 4 * 16 * 8),
        (lambda x: jax.lax.all_gather(x, "seq", axis=1, tiled=True), "all-gather", 4 * 4 * 16 * 8, 4, 3 * 4 * 16 * 8),
        (lambda x: jax.lax.psum_scatter(x, "seq", tiled=True), "reduce-scatter", 4 * 4 * 8, 4, 3 * 4 * 4 * 8),
        (lambda x: jax.lax.all_to_all(x, "seq", 0, 0, tiled=True), "all-to-all", 4 * 16 * 8, 4, 3 * 4 * 4 * 8),
        (
            lambda x: jax.lax.ppermute(x, "seq", [(i, i + 1) for i in range(3)]),
            *("collective-permute", 4 * 16 * 8, 4, 4 * 16 * 8),
        ),
    ],
)
def test_kinds(function, kind, bytes_, group, sent):
    """[16, 8] float32 on each device."""
    found = only(compiled(function, (32, 32), specs=(P("data", "seq"),)))
    assert (found.kind, found.nbytes, found.group, found.runs, found.at_most) == (kind, bytes_, group, 1, False)
    assert found.sent == sent
    assert found.op_name.startswith("jit(")


def test_loops_multiply():
    def inner(i, x):
        return jax.lax.psum(x * i, "seq")

    def outer(x, w):
        return jax.lax.fori_loop(0, 3, inner, x) + jax.lax.pmax(w, "data"), None

    def function(x, w):
        return jax.lax.scan(outer, x, w)[0]

    text = compiled(function, (16, 8), (5, 8, 8), specs=(P("data"), P()))
    runs = {(found.group, found.runs) for found in collectives(text)}
    assert runs == {(4, 15), (2, 5)}


def test_loops_whose_length_depends_on_the_data():
    def function(x, n):
        return jax.lax.fori_loop(0, n, lambda i, x: jax.lax.psum(x, "seq"), x)

    text = compiled(function, (16, 8), jax.ShapeDtypeStruct((), jnp.int32), specs=(P(), P()))
    assert only(text).runs is None

    class Seven(Expected):
        def trips(self, loop):
            return 7

    assert only(text, expected=Seven()).runs == 7


def test_branches_run_at_most():
    def function(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: jax.lax.psum(x, "seq"), lambda x: jax.lax.pmax(x, "seq"), x)

    found = collectives(compiled(function, (16, 8), specs=(P(),)))
    assert [(one.kind, one.runs, one.at_most) for one in found] == 2 * [("all-reduce", 1, True)]


def test_a_program_without_communication():
    assert not collectives(compiled(lambda x: 2 * x, (16, 8), specs=(P("data"),)))


def test_small_types():
    assert [Shape(dtype, (3, 5)).nbytes for dtype in ("pred", "f4e2m1fn", "f8e8m0fnu", "bf16", "s32", "token")] == [
        *(15, 8, 15, 30, 60, 0)
    ]


# As the TPU compiler writes it: asynchronous pairs, layouts with tiles and memory spaces, a loop's limit carried along,
# its counter advanced by two in a fusion.
TPU = """HloModule jit_f, is_scheduled=true

%fused_computation.1 (param_0.1: s32[]) -> s32[] {
  %param_0.1 = s32[]{:T(128)} parameter(0)
  %constant.9 = s32[]{:T(128)} constant(2)
  ROOT %add.3 = s32[]{:T(128)} add(%param_0.1, %constant.9)
}

%body (param.1: (s32[], bf16[2,4096], s32[])) -> (s32[], bf16[2,4096], /*index=2*/s32[]) {
  %param.1 = (s32[]{:T(128)}, bf16[2,4096]{1,0:T(2,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%param.1), index=0
  %get-tuple-element.2 = bf16[2,4096]{1,0:T(2,128)(2,1)} get-tuple-element(%param.1), index=1
  %get-tuple-element.3 = s32[]{:T(128)} get-tuple-element(%param.1), index=2
  %fusion.1 = s32[]{:T(128)} fusion(%get-tuple-element.1), kind=kLoop, calls=%fused_computation.1
  %collective-permute-start = (bf16[2,4096]{1,0:T(2,128)(2,1)}, bf16[2,4096]{1,0:T(2,128)(2,1)S(1)}, u32[]{:S(2)}, \
u32[]{:S(2)}) collective-permute-start(%get-tuple-element.2), channel_id=2, source_target_pairs={{0,1},{1,2},{2,3}}, \
metadata={op_name="jit(f)/a (\\"quoted\\")/ppermute" stack_frame_id=9}, backend_config={"flag_configs":[]}
  %collective-permute-done = bf16[2,4096]{1,0:T(2,128)(2,1)S(1)} collective-permute-done(%collective-permute-start)
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[2,4096]{1,0:T(2,128)(2,1)}, s32[]{:T(128)}) tuple(%fusion.1, \
%collective-permute-done, %get-tuple-element.3)
}

%condition (param.2: (s32[], bf16[2,4096], s32[])) -> pred[] {
  %param.2 = (s32[]{:T(128)}, bf16[2,4096]{1,0:T(2,128)(2,1)}, s32[]{:T(128)}) parameter(0)
  %get-tuple-element.4 = s32[]{:T(128)} get-tuple-element(%param.2), index=0
  %get-tuple-element.5 = s32[]{:T(128)} get-tuple-element(%param.2), index=2
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.4, %get-tuple-element.5), direction=LT
}

ENTRY %main (x: bf16[2,4096]) -> bf16[2,4096] {
  %x = bf16[2,4096]{1,0:T(2,128)(2,1)} parameter(0)
  %constant.1 = s32[]{:T(128)} constant(1)
  %constant.2 = s32[]{:T(128)} constant(12)
  %copy.1 = s32[]{:T(128)} copy(%constant.2)
  %tuple.2 = (s32[]{:T(128)}, bf16[2,4096]{1,0:T(2,128)(2,1)}, s32[]{:T(128)}) tuple(%constant.1, %x, %copy.1)
  %while.1 = (s32[]{:T(128)}, bf16[2,4096]{1,0:T(2,128)(2,1)}, s32[]{:T(128)}) while(%tuple.2), \
condition=%condition, body=%body
  %get-tuple-element.6 = bf16[2,4096]{1,0:T(2,128)(2,1)} get-tuple-element(%while.1), index=1
  ROOT %all-reduce.1 = bf16[2,4096]{1,0:T(2,128)(2,1)} all-reduce(%get-tuple-element.6), \
replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add
}
"""


def test_the_text_for_a_tpu():
    permute, reduce = collectives(TPU)
    pairs, name = ((0, 1), (1, 2), (2, 3)), r"jit(f)/a (\"quoted\")/ppermute"
    assert permute == Collective("collective-permute", (Shape("bf16", (2, 4096), 1),), pairs, 6, False, name)
    assert permute.group == 4
    assert (reduce.kind, reduce.group, reduce.runs, reduce.op_name) == ("all-reduce", 4, 1, "")


def test_what_runs_on_sparse_cores_counts():
    """On tpu7x a collective is in a computation of its own, which another thread of execution is called for."""
    callee = """%called (param_0.9: bf16[2,4096]) -> bf16[2,4096] {
  %param_0.9 = bf16[2,4096]{1,0:T(2,128)(2,1)} parameter(0)
  ROOT %all-reduce.9 = bf16[2,4096]{1,0:T(2,128)(2,1)} all-reduce(%param_0.9), \
replica_groups=[2,4]<=[4,2]T(1,0), use_global_device_ids=true, to_apply=%add
}

ENTRY"""
    call = """%start = ((bf16[2,4096]{1,0:T(2,128)(2,1)}), bf16[2,4096]{1,0:T(2,128)(2,1)}, u32[]{:S(8)}) call-start(\
%get-tuple-element.6), async_execution_thread="sparsecore", to_apply=%called
  ROOT %done = bf16[2,4096]{1,0:T(2,128)(2,1)} call-done(%start)
}
"""
    text = TPU.replace("ENTRY", callee, 1)
    text = text[: text.index("ROOT %all-reduce.1 ")] + call
    assert [(found.kind, found.runs) for found in collectives(text)] == [("collective-permute", 6), ("all-reduce", 1)]


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("HloModule nothing")
