"""What a model can be asked: legal precisions, and token ids of its vocabulary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from v4_jax.cache.cache import CacheDtype
from v4_jax.config import Config
from v4_jax.number_formats import INDEX_BLOCK, KV_BLOCK
from v4_jax.policy import Policy


def check_precision(config: Config, policy: str | Policy, cache_dtype: CacheDtype) -> None:
    """Checks that a policy and a cache format fit the model and each other.

    Raises:
      ValueError: they do not.
    """
    precision = Policy.of(policy)
    if precision.fake_quant and (config.nope_head_dim % KV_BLOCK or config.index_head_dim % INDEX_BLOCK):
        raise ValueError(
            f"the policy 'released' rounds keys in blocks of {KV_BLOCK} and index keys in blocks of {INDEX_BLOCK}, but "
            f"this model's have {config.nope_head_dim} and {config.index_head_dim} channels; expected 'bfloat16' or "
            "'float32'"
        )
    precision.check_cache(cache_dtype == "released")


def check_samples(n: int, slots: int) -> None:
    """Checks how many samples of one prompt are asked for.

    Raises:
      ValueError: more than are generated at the same time.
    """
    if n > slots:
        raise ValueError(f"n is {n}, but there are {slots} slots; expected at most so many samples")


def check_ids(ids: Sequence[int], config: Config) -> None:
    """Checks a prompt's token ids.

    Raises:
      ValueError: there are none, or one is outside of the vocabulary.
    """
    if not ids:
        raise ValueError("the prompt is empty; expected at least one token")
    check_vocabulary(ids, config)


def check_vocabulary(ids: Iterable[int], config: Config) -> None:
    """Checks that token ids are in the vocabulary.

    Raises:
      ValueError: one is not.
    """
    for token in ids:
        if not 0 <= token < config.vocab_size:
            raise ValueError(
                f"token id {token} is outside of the vocabulary; legal ids are 0 to {config.vocab_size - 1}"
            )
