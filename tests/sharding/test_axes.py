"""The rules that place arrays on a mesh."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from v4_jax.config import Config
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import is_parameter
from v4_jax.placement import alternatives, legal_meshes
from v4_jax.sharding.axes import PRESETS, Rules, ShardingError, legal_sizes, resolve, sharding, spec
from v4_jax.sharding.mesh import format_mesh, make_mesh, mesh_shapes, parse_mesh

RULES = Rules({"experts": "expert", "mlp": "tensor", "embed": None, "batch": ("data", "seq")})


def test_spec():
    assert spec(("experts", "mlp", "embed"), RULES) == PartitionSpec("expert", "tensor", None)
    assert spec(("batch", None), RULES) == PartitionSpec(("data", "seq"), None)


def test_rules_are_hashable_values():
    same = Rules({"mlp": "tensor", "experts": ("expert",), "embed": (), "batch": ("data", "seq")})
    assert same == RULES and hash(same) == hash(RULES)
    assert RULES.replace(mlp=None) != RULES
    assert RULES.replace(mlp=None)["mlp"] == ()


def test_unlisted_axis():
    with pytest.raises(ShardingError, match=r"'exprets' has no rule, expected one of \['batch', 'embed'"):
        spec(("exprets",), RULES)


def test_collision():
    with pytest.raises(ShardingError, match="mesh axis 'tensor' would split both 'experts' and 'mlp'"):
        spec(("experts", "mlp"), RULES.replace(experts="tensor"))


def test_presets_cover_the_model():
    for name in PRESETS:
        for parameter in jax.tree.leaves(declarations(Config.tiny()), is_leaf=is_parameter):
            spec(parameter.axes, resolve(name))
    assert resolve(None) is PRESETS["decode"]
    assert resolve(RULES) is RULES
    with pytest.raises(ShardingError, match="no sharding preset 'fast', expected one of"):
        resolve("fast")


def test_one_device_is_one():
    with pytest.raises(ShardingError, match=r"mesh seq=3 has 3 places, but there is 1 device$"):
        make_mesh("seq=3", jax.devices()[:1])
    assert alternatives(Config.tiny(), 1, "decode").startswith("legal meshes of 1 device are ")


def test_legal_sizes():
    assert legal_sizes(12) == [1, 2, 3, 4, 6, 12]
    assert legal_sizes(512, 128) == [1, 2, 4]
    assert legal_sizes(3072, 128) == [1, 2, 3, 4, 6, 8, 12, 24]
    assert legal_sizes(100, 128) == [1]  # a partial block cannot be split, but can stay whole


def test_sharding_on_a_mesh():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("expert", "tensor"))
    place = sharding(mesh, ("experts", "mlp", None), (8, 64, 32), RULES)
    assert place.spec == PartitionSpec("expert", "tensor", None)
    assert place.shard_shape((8, 64, 32)) == (8, 64, 32)


def abstract(**sizes):
    return AbstractMesh(tuple(sizes.values()), tuple(sizes))


def test_a_mesh_without_an_axis_does_not_split_it():
    place = sharding(abstract(expert=4), ("experts", "mlp"), (8, 3), RULES)
    assert place.spec == PartitionSpec("expert", None)


def test_uneven_split():
    with pytest.raises(ShardingError) as caught:
        sharding(abstract(expert=3), ("experts", "mlp"), (8, 64), RULES, name="w1")
    assert str(caught.value) == (
        "w1: axis 'experts' of size 8 cannot be split 3 ways over expert: legal sizes are 1, 2, 4, 8"
    )


def test_split_within_a_block():
    axes, shape = ("experts", "mlp", "embed"), (8, 3072, 7168)
    assert sharding(abstract(tensor=8), axes, shape, RULES, multiples=(1, 128, 128)).spec[1] == "tensor"
    with pytest.raises(ShardingError) as caught:
        sharding(abstract(tensor=16), axes, shape, RULES, multiples=(1, 128, 128))
    assert "axis 'mlp' of size 3072 cannot be split 16 ways over tensor in multiples of 128" in str(caught.value)
    assert str(caught.value).endswith("legal sizes are 1, 2, 3, 4, 6, 8, 12, 24")


def test_several_mesh_axes_on_one_dimension():
    place = sharding(abstract(data=2, seq=3), ("batch",), (12,), RULES)
    assert place.spec == PartitionSpec(("data", "seq"))
    with pytest.raises(ShardingError, match="cannot be split 6 ways over dataxseq"):
        sharding(abstract(data=2, seq=3), ("batch",), (8,), RULES)


def test_rank_mismatch():
    with pytest.raises(ShardingError, match=r"has shape \(8,\), but 2 logical axes"):
        sharding(abstract(expert=2), ("experts", "mlp"), (8,), RULES)


def test_all_shapes_of_a_mesh():
    shapes = list(mesh_shapes(12))
    assert len(shapes) == len({tuple(shape.items()) for shape in shapes}) == 40
    assert all(math.prod(shape.values()) == 12 for shape in shapes)
    assert all(parse_mesh(format_mesh(shape)) == shape for shape in shapes)


def test_data_alone_leads_from_slice_to_slice():
    class Chip:
        """One of a v6e:2x4, as JAX has it."""

        platform, device_kind, process_index, core_on_chip = "tpu", "TPU v6 lite", 0, 0

        def __init__(self, number):
            self.id, self.slice_index, self.coords = number, number // 8, (number % 2, number % 8 // 2, 0)

    chips = [Chip(number) for number in range(16)]
    for sizes in ("data=2,tensor=8", "data=4,seq=2,tensor=2"):
        mesh = make_mesh(sizes, chips)
        for part, slice_ in zip(np.split(mesh.devices, 2), (0, 1), strict=True):
            assert {device.slice_index for device in part.flat} == {slice_}
    with pytest.raises(ShardingError, match=r"has data=1, but there are 2 slices, .*; expected a multiple of 2"):
        make_mesh("tensor=16", chips)
    assert make_mesh("tensor=8", chips[:8]).size == 8


def test_legal_meshes():
    config = Config.flash()
    legal = legal_meshes(config, 16, "decode")
    assert {"data": 1, "seq": 2, "expert": 1, "tensor": 8} in legal
    assert not any(shape["data"] > 1 for shape in legal)  # one row
    assert not any(shape["tensor"] > config.o_groups for shape in legal)
    assert {"data": 2, "seq": 8, "expert": 1, "tensor": 1} in legal_meshes(config, 16, "decode", batch=2)
    assert legal_meshes(config, 16, "long-context", length=128 * 32)
    assert not legal_meshes(config, 16, "long-context", length=128 * 24)
    assert "legal meshes of 2 devices are tensor=2; expert=2; seq=2" in alternatives(config, 2, "decode")
    assert alternatives(config, 7, "decode") == "no mesh of 7 devices is legal"
