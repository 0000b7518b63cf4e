"""The few models that all tests share, small enough that each program compiles in seconds.

Programs are kept under the checkout (`tests/conftest.py`): tests that use the same model with the same shapes share
them, and so do runs. A test that needs another model says why.

    six()     every role, and a period (hca, csa) that repeats: for what scans over layers
    three()   one layer of each role, and an MTP block: for everything else
    drafts()  as three(), with two DSpark stages in place of the MTP block
    two()     bytes for tokens, a sliding and a CSA layer: for the command line and the server; trained() for training
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4_jax import Cache, Config, Output, Transformer, declarations, init_cache
from v4_jax.architecture import Yarn
from v4_jax.checkpoint import export
from v4_jax.checkpoint.byte_ranges import LocalFile
from v4_jax.checkpoint.safetensors import SafetensorsFile
from v4_jax.parameter_tree import placements
from v4_jax.parameters import is_parameter
from v4_jax.sharding.mesh import make_mesh, parse_mesh

TOPK = 8

# Exact arithmetic would give equality; float32 sums taken in another order differ in the sixth digit of logits of size
# 2 after six layers. Routing and top-k are discontinuous, so that a real disagreement is 1e-2 and more.
TOLERANCE = 1e-4


def golden(directory: Path) -> dict[str, np.ndarray]:
    """What the published program makes of a small checkpoint, by name."""
    file = SafetensorsFile(LocalFile(directory / "golden.safetensors"))
    return {name: file.read(entry) for name, entry in file.entries.items()}


def jitted(model: Transformer):
    """`(params, *inputs, **arguments) -> Output`, a program for each kind of arguments."""

    def run(params, *inputs, **arguments):
        return model.apply({"params": params}, *inputs, **arguments)

    return jax.jit(run, static_argnames=("logits", "method", "return_routing", "return_taps"))


class Tiny(NamedTuple):
    config: Config
    model: Transformer
    params: dict

    @functools.cache  # noqa: B019 one instance lives as long as the tests
    def _program(self):
        return jitted(self.model)

    def __hash__(self):
        return id(self)

    def __call__(self, *inputs, **arguments) -> Output:
        return self._program()(self.params, *map(jnp.asarray, inputs), **arguments)

    def exported(self, path: Path) -> Path:
        """The model as a released directory."""
        export((self.config, self.params), path)
        return path

    def cache(self, batch: int, length: int, dtype="float32") -> Cache:
        return init_cache(self.config, batch, length, dtype=dtype)

    def in_chunks(self, tokens, sizes, cache=None):
        """Logits and cache after feeding `tokens` in chunks of the given sizes."""
        cache = self.cache(*tokens.shape) if cache is None else cache
        logits, first = [], 0
        for size in sizes:
            output = self(tokens[:, first : first + size], cache=cache)
            logits.append(output.logits)
            cache, first = output.cache, first + size
        return np.concatenate(logits, axis=1), cache


THREE = dict(
    num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1, n_routed_experts=8, index_n_heads=16
)
DSPARK = dict(
    num_nextn_predict_layers=0,
    compress_ratios=(0, 4, 128, 0, 0),
    dspark_block_size=5,
    dspark_noise_token_id=63,
    dspark_target_layer_ids=(1, 2),
    dspark_markov_rank=8,
)
TWO = dict(num_hidden_layers=2, compress_ratios=(0, 4, 0), num_hash_layers=1, vocab_size=320)


def make(seed: int = 0, **changes) -> Tiny:
    """A model with random weights, of six layers but for what `changes` say."""
    values = dict(
        vocab_size=64,
        hidden_size=48,
        moe_intermediate_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        head_dim=32,
        qk_rope_head_dim=8,
        q_lora_rank=24,
        o_groups=2,
        o_lora_rank=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        routed_scaling_factor=1.5,
        index_n_heads=32,
        index_head_dim=16,
        index_topk=TOPK,
        compress_ratios=(0, 4, 128, 4, 128, 4, 0),
        num_hash_layers=2,
        sliding_window=16,
        rope_scaling=Yarn(original_max_position_embeddings=64),  # so that 300 tokens reach far beyond it
    )
    config = Config(**(values | changes))
    rng = np.random.default_rng(seed)

    def value(declared):
        """Numbers everywhere: fresh biases, scales and norms are constants that could hide a mistake."""
        if declared.group == "frozen" and declared.storage == "i64":
            return rng.permuted(np.resize(np.arange(4), declared.shape), axis=-1).astype(np.int32)
        center = 1.0 if "norm" in declared.released else 0.0
        return rng.normal(center, 0.2, declared.shape).astype(np.float32)

    params = jax.tree.map(value, declarations(config), is_leaf=is_parameter)
    return Tiny(config, Transformer(config, policy="float32"), jax.device_put(params))


@functools.cache
def six() -> Tiny:
    """Six layers: three unrolled, and a period (hca, csa) when it repeats."""
    return make()


@functools.cache
def three() -> Tiny:
    """One layer of each role and an MTP block; experts enough for eight devices."""
    return make(**THREE)


@functools.cache
def drafts() -> Tiny:
    """One layer of each role and two DSpark stages that draft five tokens at once."""
    return make(**THREE | DSPARK)


@functools.cache
def two() -> Tiny:
    """Two layers and an MTP block, bytes for tokens."""
    return make(**TWO)


@functools.cache
def trained() -> Tiny:
    """What training runs begin with: two layers and no MTP block, experts enough for eight devices."""
    return make(**TWO | {"compress_ratios": (0, 4), "num_nextn_predict_layers": 0, "n_routed_experts": 8})


class OnMesh:
    """A `Tiny` on as many of the devices as its mesh names, called like it."""

    def __init__(self, tiny: Tiny, mesh: str, preset: str, policy: str = "float32"):
        count = 1
        for size in parse_mesh(mesh).values():
            count *= size
        self.config, self.preset = tiny.config, preset
        self.mesh = make_mesh(mesh, jax.devices()[:count])
        self.model = Transformer(tiny.config, policy=policy, mesh=self.mesh, rules=preset)
        self.params = jax.device_put(tiny.params, placements(tiny.config, self.mesh, preset))
        self._program = jitted(self.model)

    def __call__(self, *inputs, **arguments):
        return self._program(self.params, *map(jnp.asarray, inputs), **arguments)

    def exported(self, path: Path) -> Path:
        """The model as a released directory."""
        export((self.config, self.params), path)
        return path

    def cache(self, batch, length, dtype="float32"):
        return init_cache(self.config, batch, length, dtype=dtype, mesh=self.mesh, rules=self.preset)
