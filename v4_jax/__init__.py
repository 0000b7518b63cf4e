"""DeepSeek-V4 in JAX: a functional Flax model for TPU pods, from the released weights to tokens.

Letters in shape strings and einsums:

    b B  batch row              s S  token of a chunk          q Q  query of a block
    k K  key, or choice         h H  attention or index head   c C  channel of a head, key or entry
    d D  hidden_size            j    residual stream (hc)      g G  output group
    e E  expert                 i o  input, output feature     v V  vocabulary
    m M  mixing weight of a hyper-connection                   l L  layer of a stack
    E, N (arrays of blocks)     compressed entries of a chunk, of a cache
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from v4_jax import chat
    from v4_jax.architecture import ConfigError
    from v4_jax.cache.cache import Cache, init_cache
    from v4_jax.checkpoint import CheckpointError, load
    from v4_jax.config import Config
    from v4_jax.number_formats import BlockScaled
    from v4_jax.outputs import Draft, Output, Routing
    from v4_jax.parameter_tree import declarations, init
    from v4_jax.policy import Policy
    from v4_jax.transformer import Transformer

__all__ = [
    "BlockScaled",
    "Cache",
    "CheckpointError",
    "Config",
    "ConfigError",
    "Draft",
    "Output",
    "Policy",
    "Routing",
    "Transformer",
    "__version__",
    "chat",
    "declarations",
    "init",
    "init_cache",
    "load",
]

__version__ = "0.1.0"

# Imported when first used: the command line must answer --help, and Ctrl-C, before jax is there.
_HOME = {
    "BlockScaled": "number_formats",
    "Cache": "cache.cache",
    "CheckpointError": "checkpoint",
    "Config": "config",
    "ConfigError": "architecture",
    "Draft": "outputs",
    "Output": "outputs",
    "Policy": "policy",
    "Routing": "outputs",
    "Transformer": "transformer",
    "declarations": "parameter_tree",
    "init": "parameter_tree",
    "init_cache": "cache.cache",
    "load": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"v4_jax.{_HOME[name]}"), name)
    if name == "chat":
        return importlib.import_module("v4_jax.chat")
    raise AttributeError(f"module 'v4_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
