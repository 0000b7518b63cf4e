"""What we export transformers loads, and what it saves we load: the same weights, and the same logits."""

import jax
import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("torch")

import torch
from transformers import DeepseekV4ForCausalLM

from tests.checkpoint.directories import assert_same_tree
from tests.conftest import DATA
from tests.oracle import hf
from v4_jax import Transformer
from v4_jax.checkpoint import export, load

SOURCE = DATA / "flash-tiny"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("exchange") / "bf16"
    export(SOURCE, path, format="bf16")
    return path


@pytest.fixture(scope="module")
def theirs(exported):
    model, report = DeepseekV4ForCausalLM.from_pretrained(
        exported, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values()), report  # nothing missing, unexpected or of another shape
    return model.eval().requires_grad_(False)


def test_what_we_export(exported, theirs):
    config, params = load(exported, dtype="float32")
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, 160)).astype(np.int32)
    logits = jax.jit(Transformer(config, policy="float32").apply)({"params": params}, tokens).logits
    np.testing.assert_allclose(logits, hf.logits_of(theirs, tokens), atol=2e-4, rtol=0)


@pytest.mark.parametrize("original", [True, False], ids=["released names", "own names"])
def test_what_it_saves(theirs, tmp_path, original):
    theirs.save_pretrained(tmp_path, save_original_format=original)
    expected = load(SOURCE, dtype="float32")[1]
    expected.pop("mtp")  # which transformers does not have
    assert_same_tree(load(tmp_path, dtype="float32")[1], expected)
