"""What training asks of the forward pass: its stage, and what the backward pass recomputes.

Technical report, section 4.2: sparse attention is introduced late. CSA layers first attend all compressed entries;
then, still so, their indexers learn to tell which entries matter; from then on they attend the indexer's picks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import flax.linen as nn
import jax
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero

Remat = Literal["none", "sublayers", "layers"]

# What a block keeps for its backward pass under each name. Picked entries are kept always: scoring all entries again to
# find them is the one cost that grows with the square of the sequence. So are the few numbers that the indexer's loss
# comes to.
_KEPT: dict[Remat, tuple[str, ...]] = {
    "sublayers": ("picked", "attention", "feed_forward"),
    "layers": ("picked",),
}

M = TypeVar("M", bound=type[nn.Module])


@dataclasses.dataclass(frozen=True)
class Stage:
    """How CSA layers attend, and whether their indexers learn.

    Attributes:
      dense: attend all visible entries instead of the indexer's picks.
      indexer_loss: compute how far the indexer's scores are from the attention that the entries get: over all visible
        entries where attention is dense, over the picked ones where it is sparse.
    """

    dense: bool = False
    indexer_loss: bool = False


SPARSE = Stage()


def keep(x: Array, name: Literal["picked", "attention", "feed_forward"]) -> Array:
    """Marks a value that a rematerialised block may keep."""
    return checkpoint_name(x, name)


def recompute(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run again in the backward pass but for the picked entries."""
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names("picked"))


def rematerialised(module: M, remat: Remat, *, in_scan: bool) -> M:
    """The module, whose backward pass recomputes what `remat` does not keep.

    Args:
      module: a Linen module class.
      remat: "none" keeps everything; "sublayers" keeps what attention and feed-forward put out and the streams between
        blocks, 6 D numbers per token and layer; "layers" the streams alone, 4 D.
      in_scan: whether it runs in the body of a scan, where the compiler cannot merge the recomputation with the first
        computation.

    Raises:
      ValueError: no such policy.
    """
    if remat == "none":
        return module
    if remat not in _KEPT:
        raise ValueError(f"unknown remat policy {remat!r}, expected one of {['none', *_KEPT]}")
    policy = jax.checkpoint_policies.save_only_these_names(*_KEPT[remat])
    return nn.remat(module, policy=policy, prevent_cse=not in_scan)


@jax.custom_jvp
def in_turn(values: Any) -> Any:
    """The values as they are. Backwards, none of their gradients is used before all of them are there.

    Of streams and the weights that a layer reads with them: a compiler may put off gradients of weights for as long as
    nobody waits for them, and keeps all that they are made of.
    """
    return values


@functools.partial(in_turn.defjvp, symbolic_zeros=True)
def _in_turn(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    """A barrier of the tangents, whose transpose is one of the gradients; of what has none, none is made."""
    leaves, tree = jax.tree.flatten(tangents[0], is_leaf=lambda x: isinstance(x, SymbolicZero))
    moving = [i for i, tangent in enumerate(leaves) if not isinstance(tangent, SymbolicZero)]
    for i, tangent in zip(moving, jax.lax.optimization_barrier([leaves[i] for i in moving]), strict=True):
        leaves[i] = tangent
    return primals[0], jax.tree.unflatten(tree, leaves)


def alone(module: nn.Module) -> Callable[..., Any]:
    """A bound module, called outside a scan: its weights and its first argument are `in_turn`."""
    if module.is_initializing():
        return module
    unbound, variables = module.unbind()

    def call(first: Any, *rest: Any) -> Any:
        own, first = in_turn((variables, first))
        with jax.named_scope(str(module.name)):  # as profiles know it
            return unbound.apply(own, first, *rest)

    return call
