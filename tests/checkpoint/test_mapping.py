"""The table of released tensors, derived from the declarations, against what is known of the release."""

import numpy as np
import pytest

from tests.checkpoint.directories import read_directory
from v4_jax.checkpoint.block_formats import FP4, FP8, Formats, dequantise, pack, unpack
from v4_jax.checkpoint.mapping import entries, part_names
from v4_jax.checkpoint.tensors import TensorInfo
from v4_jax.config import Config


@pytest.mark.parametrize(
    ("config", "tensors", "nbytes", "shards"),
    [(Config.flash(), 69_187, 159_609_485_896, 46), (Config.pro(), 145_116, 864_704_792_696, 64)],
)
def test_published_totals(config, tensors, nbytes, shards):
    """The table alone gives the published index files' number of tensors and bytes, to the byte."""
    table = entries(config, Formats("fp4"))
    assert len(table) == tensors
    assert sum(entry.info.nbytes for entry in table.values()) == nbytes
    assert len(part_names(config)) == shards
    assert sum(entry.part.startswith("mtp.") for entry in table.values()) == (1575 if tensors < 100_000 else 2343)


def test_published_shapes():
    table = entries(Config.pro(), Formats("fp4"))
    assert table["layers.7.ffn.experts.383.w2.weight"].info == TensorInfo("I8", (7168, 1536))
    assert table["layers.7.ffn.experts.383.w2.scale"].info == TensorInfo("F8_E8M0", (7168, 96))
    assert table["layers.60.attn.indexer.wq_b.scale"].info == TensorInfo("F8_E8M0", (64, 12))
    assert table["layers.2.ffn.gate.tid2eid"].info == TensorInfo("I64", (129280, 6))
    base = entries(Config.pro(), Formats("fp8", "F32", "F32"))
    assert base["layers.7.ffn.experts.0.w2.weight"].info == TensorInfo("F8_E4M3", (7168, 3072))
    assert base["layers.7.ffn.experts.0.w2.scale"].info == TensorInfo("F32", (56, 24))


def test_places():
    table = entries(Config.flash(), Formats("fp4"))
    entry = table["layers.9.ffn.experts.200.w3.scale"]
    assert (entry.part, entry.key, entry.expert) == ("layers.9", "ffn.experts.w3.scale", 200)
    assert entry.place[-1] == 200 and entry.role == "scales"
    assert table["hc_head_fn"].part == "head" and table["embed.weight"].part == "embed"


def test_the_table_is_that_of_the_fixtures(released):
    tensors = read_directory(released)
    config = Config.from_hf(released)
    scales = "F32" if config.expert_dtype == "fp8" else "F8_E8M0"
    table = entries(config, Formats(config.expert_dtype, scales, scales))
    assert {name: (entry.info.numpy_dtype, entry.info.shape) for name, entry in table.items()} == {
        name: (array.dtype, array.shape) for name, array in tensors.items()
    }


def test_packing_is_its_own_inverse():
    codes = np.random.default_rng(0).integers(-128, 128, (3, 5, 16), np.int8)
    assert unpack(codes).shape == (3, 5, 32)
    assert (pack(unpack(codes)) == codes).all()
    assert (pack(unpack(codes[:, ::2, 4:10])) == codes[:, ::2, 4:10]).all()


@pytest.mark.parametrize(("form", "rows", "columns"), [(FP8, 200, 300), (FP8, 128, 128), (FP4, 7, 96), (FP4, 3, 80)])
def test_dequantise_covers_partial_blocks(form, rows, columns):
    import jax.numpy as jnp

    from v4_jax import number_formats

    rng = np.random.default_rng(0)
    made = number_formats.quantise(jnp.asarray(rng.standard_normal((rows, columns), np.float32)), form.element)
    stored = np.asarray(made.codes)
    found = dequantise(pack(stored) if form is FP4 else stored, np.asarray(made.scales), form)
    np.testing.assert_array_equal(found, number_formats.dequantise(made, jnp.float32))
