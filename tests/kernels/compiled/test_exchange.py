"""The exchange of rows between devices, as the TPU compiler writes it into a training program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conftest import tpu_devices
from v4_jax.kernels.compiler_options import compiler_options
from v4_jax.planning.hlo import Program
from v4_jax.sharding.dispatch import Choices, capacity, visit
from v4_jax.sharding.mesh import make_mesh

LAYERS, ROWS, WIDTH, TOP, DEVICES = 3, 1024, 2048, 2, 4


def layers(x, weights, shared, group, scale):
    """Layers on one device, each with experts that rows travel to and one that they do not."""

    def work(rows, scale, sizes, weight, fixed):
        del sizes, fixed
        out = jnp.dot(rows.reshape(rows.shape[0], -1), weight) * scale[:, None]
        return out.astype(x.dtype).reshape(rows.shape)

    def layer(x, weights):
        weight, beside = weights
        beside = jax.lax.all_gather(beside, "expert", axis=0, tiled=True)
        choices = Choices(group, scale + x[:1, :1].astype(jnp.float32))
        routed = visit(work, WIDTH, 1, ("expert",), ("expert",), x, choices, weight, None)
        return x + routed.astype(x.dtype) + jnp.dot(jax.nn.silu(jnp.dot(x, beside)), beside), None

    return jax.lax.scan(layer, x, (weights, shared))[0]


def test_work_goes_on_beside_an_exchange():
    """What does not wait for rows runs while they travel, and no layer copies the room for those that come."""
    mesh = make_mesh(f"expert={DEVICES}", tpu_devices("v5p:2x2x1"))
    specs = (P("expert"), P(), P(None, "expert"), P("expert"), P("expert"))
    shapes = ((DEVICES * ROWS, WIDTH), *((LAYERS, WIDTH, WIDTH),) * 2, *((DEVICES * ROWS, TOP),) * 2)
    dtypes = (*(jnp.bfloat16,) * 3, jnp.int32, jnp.float32)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
    ]
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(layers, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=False)
        options = compiler_options("training", "tpu")
        program = Program(jax.jit(mapped, compiler_options=options).lower(*arguments).compile().as_text())

    room = (capacity(ROWS * TOP, DEVICES), WIDTH // 128, 128)
    copied = [
        instruction
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
        if instruction.opcode == "copy" and instruction.shapes[0].dimensions == room
        if computation.instructions[instruction.operands[0]].opcode in ("parameter", "get-tuple-element")
    ]
    assert not copied

    (body,) = (
        computation
        for computation in program.computations.values()
        if any(i.opcode == "while" for i in computation.instructions.values())
        and any(i.opcode == "ragged-all-to-all-start" for i in computation.instructions.values())
    )
    beside, running = [], set()
    for instruction in body.instructions.values():
        if instruction.opcode == "ragged-all-to-all-start":
            running.add(instruction.name)
        elif instruction.opcode == "ragged-all-to-all-done":
            running.remove(instruction.operands[0])
        elif running:
            beside.append(instruction.op_name)
    assert any(name.endswith("dot_general") for name in beside)
