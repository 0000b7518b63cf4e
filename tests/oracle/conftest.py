"""A random model of every role, in transformers and in ours."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from tests.oracle import hf
from v4_jax import Config, Transformer
from v4_jax.architecture import Yarn


class Pair(NamedTuple):
    """The same weights on both sides."""

    config: Config
    theirs: Any
    ours: Transformer
    params: Any

    def expected(self, tokens) -> np.ndarray:
        return hf.logits_of(self.theirs, tokens)


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> None:
    """torch's waiting threads spin, which JAX's on the same cores suffer from; the models are tiny."""
    pytest.importorskip("torch").set_num_threads(1)


@pytest.fixture(scope="session")
def pair() -> Pair:
    """Hash and score routing in every attention role, a period that repeats, active clamps, tight windows and top-k.

    32 index heads keep exact ties between index scores away; 64 positions before YaRN bring its range within reach.
    """
    config = Config(
        vocab_size=320,
        hidden_size=96,
        moe_intermediate_size=48,
        num_hidden_layers=8,
        num_attention_heads=4,
        head_dim=64,
        qk_rope_head_dim=16,
        q_lora_rank=48,
        o_groups=2,
        o_lora_rank=32,
        n_routed_experts=8,
        num_experts_per_tok=3,
        routed_scaling_factor=1.5,
        index_n_heads=32,
        index_head_dim=32,
        index_topk=16,
        compress_ratios=(0, 128, 4, 0, 128, 4, 128, 4),
        num_hash_layers=3,
        num_nextn_predict_layers=0,
        sliding_window=32,
        swiglu_limit=1.0,
        rope_scaling=Yarn(original_max_position_embeddings=64),
    )
    theirs = hf.build(config)
    hf.randomise(theirs, config, seed=0)
    params = jax.device_put(hf.params_from_state(hf.state_of(theirs), config))
    return Pair(config, theirs, Transformer(config, policy="float32"), params)


@pytest.fixture(scope="session")
def tokens(pair) -> np.ndarray:
    return np.random.default_rng(1).integers(0, pair.config.vocab_size, (2, 400)).astype(np.int32)
