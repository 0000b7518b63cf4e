"""Loading on a mesh equals loading whole, and each process reads the bytes of its own shards only."""

import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from tests.checkpoint.directories import random_params
from tests.conftest import DATA
from tests.processes import finish, start, start_two
from v4_jax.checkpoint import CheckpointError, convert, export, load
from v4_jax.config import Config
from v4_jax.sharding.axes import resolve

SCRIPT = Path(__file__).with_name("sharded_load.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model whose dimensions hold several blocks, so that they can be split."""
    config = dataclasses.replace(
        Config.tiny(),
        hidden_size=256,
        moe_intermediate_size=256,
        o_lora_rank=128,
        n_routed_experts=16,
        num_hidden_layers=5,
        num_hash_layers=1,
        compress_ratios=(0, 4, 128, 4, 128, 0),
    )
    path = tmp_path_factory.mktemp("sharded") / "model"
    export((config, random_params(config)), path)
    return path


def bytes_read(output: str) -> int:
    return int(re.search(r"native read (\d+) of", output)[1])


@pytest.mark.parametrize("kind", ["released", "orbax"])
def test_eight_devices(directory, tmp_path, kind):
    if kind == "orbax":
        convert(directory, tmp_path / "orbax")
    finish(start(SCRIPT, 8, directory if kind == "released" else tmp_path / "orbax", tmp_path))


def test_two_processes(directory, tmp_path):
    processes = start_two(SCRIPT, 4, directory, tmp_path)
    outputs = [finish(process) for process in processes]
    assert bytes_read(outputs[0]) == bytes_read(outputs[1])


def mesh(**sizes):
    count = int(np.prod(list(sizes.values())))
    return Mesh(np.array(jax.devices()[:1] * count).reshape(*sizes.values()), tuple(sizes))


def test_illegal_meshes_are_refused():
    """Found from the declarations, before anything is read: legal sizes are printed."""
    source = DATA / "released-tiny"
    with pytest.raises(CheckpointError) as caught:
        load(source, mesh=mesh(expert=3))
    assert "does not fit on the mesh" in str(caught.value)
    assert "axis 'experts' of size 8 cannot be split 3 ways over expert: legal sizes are 1, 2, 4, 8" in str(
        caught.value
    )
    with pytest.raises(CheckpointError) as caught:
        load(source, mesh=mesh(tensor=2), rules=resolve("decode").replace(vocab=None))
    assert "in multiples of 128: legal sizes are 1" in str(caught.value)
    with pytest.raises(CheckpointError, match="mesh axis 'expert' would split both"):
        load(source, mesh=mesh(expert=1), rules=resolve("decode").replace(expert_embed="expert"))


def test_rules_need_a_mesh():
    with pytest.raises(CheckpointError, match="sharding rules were given without a mesh"):
        load(DATA / "released-tiny", rules="decode")
