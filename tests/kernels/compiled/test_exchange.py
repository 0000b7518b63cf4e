"""The exchange of rows between devices, as the TPU compiler writes it into a training program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.conftest import tpu_devices
from v4_jax.kernels.compiler_options import compiler_options
from v4_jax.planning.hlo import Program
from v4_jax.sharding import dispatch
from v4_jax.sharding.dispatch import Choices, capacity, visit
from v4_jax.sharding.mesh import make_mesh

LAYERS, ROWS, WIDTH, TOP, DEVICES = 2, 512, 1024, 2, 4


def layers(x, weights, shared, group, scale):
    """Layers on one device, each with experts that rows travel to and one that they do not."""

    def work(rows, scale, sizes, weight, fixed):
        del sizes, fixed
        with jax.named_scope("routed"):
            product = jnp.dot(rows.reshape(rows.shape[0], -1), weight)
        out = product * scale[:, None]
        return out.astype(x.dtype).reshape(rows.shape)

    def layer(x, weights):
        weight, beside = weights
        beside = jax.lax.all_gather(beside, "expert", axis=0, tiled=True)
        choices = Choices(group, scale + x[:1, :1].astype(jnp.float32))
        routed = visit(work, WIDTH, 1, ("expert",), ("expert",), x, choices, weight, None)
        return x + routed.astype(x.dtype) + jnp.dot(jax.nn.silu(jnp.dot(x, beside)), beside), None

    return jax.lax.scan(layer, x, (weights, shared))[0]


@pytest.mark.parametrize("waves", [1, 2])
def test_work_goes_on_beside_an_exchange(waves, monkeypatch):
    """What does not wait for rows runs while they travel, of two waves also the work on the other; and no layer copies
    the room for those that come."""
    monkeypatch.setattr(dispatch, "MANY", ROWS * TOP // waves)
    mesh = make_mesh(f"expert={DEVICES}", tpu_devices("v5p:2x2x1"))
    specs = (P("expert"), P(), P(None, "expert"), P("expert"), P("expert"))
    shapes = ((DEVICES * ROWS, WIDTH), *((LAYERS, WIDTH, WIDTH),) * 2, *((DEVICES * ROWS, TOP),) * 2)
    dtypes = (*(jnp.bfloat16,) * 3, jnp.int32, jnp.float32)
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
        for shape, dtype, spec in zip(shapes, dtypes, specs, strict=True)
    ]

    def loss(floats, group, scale):
        mapped = jax.shard_map(layers, mesh=mesh, in_specs=specs, out_specs=P("expert"), check_vma=False)
        return jnp.sum(mapped(*floats, group, scale).astype(jnp.float32))

    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), compiler_options=compiler_options("training", "tpu"))
        program = Program(step.lower(arguments[:3], *arguments[3:]).compile().as_text())

    sent = ROWS * TOP // waves
    rooms = [(length, WIDTH // 128, 128) for length in (sent, capacity(sent, DEVICES))]
    at_work, routed = set(), set()
    for name, body in program.computations.items():
        found, running = body.instructions, set()
        for instruction in found.values():
            if instruction.opcode == "copy" and instruction.shapes[0].dimensions in rooms:
                assert found[instruction.operands[0]].opcode not in ("parameter", "get-tuple-element")
            elif instruction.opcode == "ragged-all-to-all-start":
                running.add(instruction.name)
            elif instruction.opcode == "ragged-all-to-all-done":
                running.remove(instruction.operands[0])
            elif running and instruction.op_name.endswith("dot_general"):
                (routed if "routed" in instruction.op_name else at_work).add(name)
    assert len(at_work if waves == 1 else routed) >= 2  # forward and back
