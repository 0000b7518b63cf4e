"""Run by test_sharded_load.py: loads on a mesh of 8 virtual devices, in one process or in one of two, and checks it.

Arguments: checkpoint directory, working directory, then for two processes: process number and coordinator address.
"""

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

path, work = Path(sys.argv[1]), Path(sys.argv[2])
if len(sys.argv) > 3:
    jax.distributed.initialize(sys.argv[4], num_processes=2, process_id=int(sys.argv[3]))
assert jax.device_count() == 8

from v4_jax.checkpoint import export, load, open_checkpoint, verify  # noqa: E402
from v4_jax.sharding.axes import resolve  # noqa: E402

# Devices of one process are neighbours along "tensor", so the two processes hold different experts.
MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("expert", "tensor"))
# Unlike the preset, split experts' rows (w1, w3) and packed columns (w2) as well.
RULES = resolve("decode").replace(experts="expert", expert_hidden="tensor")


def stored_bytes(shard) -> int:
    return shard.data.nbytes // 2 if shard.data.dtype == "float4_e2m1fn" else shard.data.nbytes


def share(params) -> int:
    """Stored bytes of the distinct shards that this process holds."""
    total = 0
    for leaf in jax.tree.leaves(params):
        distinct = {str(shard.index): stored_bytes(shard) for shard in leaf.addressable_shards}
        total += sum(distinct.values()) * (2 if leaf.dtype == np.int32 else 1)  # I64 on disk
    return total


# Reading is the same for all directories, so each kind of run checks its own extras: floats, or the way back.
converted, alone = (path / "v4_jax.json").exists(), len(sys.argv) == 3

for dtype in ("native", "bfloat16") if converted or not alone else ("native",):
    _, whole = load(path, dtype=dtype)
    with open_checkpoint(path) as checkpoint:
        config, params = load(checkpoint, dtype=dtype, mesh=MESH, rules=RULES)
        read, size = checkpoint.bytes_read, checkpoint.nbytes
    assert jax.tree.structure(params) == jax.tree.structure(whole)
    for (name, leaf), reference in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(whole), strict=True
    ):
        reference = np.asarray(reference)
        assert (leaf.dtype, leaf.shape) == (reference.dtype, reference.shape), name
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == reference[shard.index].tobytes(), (name, shard.index)
    if dtype == "native":
        expected = share(params)
        w2 = params["period"]["block_0"]["ffn"]["w2"]
        assert w2.codes.sharding.shard_shape(w2.codes.shape) == (2, 4, 256, 128), w2.codes.sharding
        assert w2.scales.sharding.shard_shape(w2.scales.shape) == (2, 4, 256, 4)
        wq_b = params["period"]["block_0"]["attn"]["wq_b"]
        assert wq_b.codes.sharding.shard_shape(wq_b.codes.shape)[1] * 2 == wq_b.codes.shape[1]
        assert wq_b.scales.sharding.shard_shape(wq_b.scales.shape)[1] * 2 == wq_b.scales.shape[1]
    assert read == expected, (dtype, read, expected)  # each byte of the own shards once, and no other
    print(dtype, "read", read, "of", size)
    if not alone:
        assert read < 0.75 * size
    else:
        assert read == size
        if not converted:
            export((config, params), work / "out")
            comparison = verify(path, work / "out")
            assert comparison.equal, (comparison.config, comparison.differing[:3])
