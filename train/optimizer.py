"""Which rule updates which parameter: Muon, AdamW, the router's balance, or nothing, as each declaration says."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from v4_jax.architecture import Architecture
from v4_jax.draft_stages import DSPARK
from v4_jax.parameter_tree import declarations
from v4_jax.parameters import Loss, is_parameter, places
from v4_jax.sharding.axes import Rules, resolve
from v4_jax.train.muon import RMS, groups, muon

BALANCE_SPEED = 0.001  # technical report, section 4.2.2


def optimizer(
    config: Architecture,
    learning_rate: optax.ScalarOrSchedule,
    *,
    matrices: str = "muon",
    momentum: float = 0.95,
    momentum_dtype: Any = jnp.float32,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-20,
    weight_decay: float = 0.1,
    rms: float = RMS,
    balance_speed: float = BALANCE_SPEED,
    dtype: Any = jnp.bfloat16,
    mesh: Mesh | None = None,
    rules: Rules | str | None = None,
    loss: Loss | None = None,
    declared: Any = None,
) -> optax.GradientTransformation:
    """The optimiser of the technical report (section 2.4 and 4.2.2), whose defaults are the report's.

    It expects as the "gradient" of a router's bias the tokens that each expert got.

    Args:
      config: the architecture.
      learning_rate: constant, or by step; the same for both optimisers.
      matrices: what updates the matrices: "muon", or "adamw" to compare with.
      momentum: Muon's.
      momentum_dtype: in which it is kept.
      betas: AdamW's.
      eps: AdamW's.
      weight_decay: decoupled, of both.
      rms: size of Muon's updates; see `v4_jax.train.muon.muon`.
      balance_speed: by how much a step moves the router's bias of an expert.
      dtype: of Muon's matrix products.
      mesh: devices that the parameters lie on.
      rules: which mesh axes split which logical axes.
      loss: whose parameters are trained; those of the other loss are left alone. None trains both.
      declared: the declarations of what is trained, such as adapters; by default the whole model (`whole`).

    Raises:
      ValueError: `matrices` is neither.
    """
    if matrices not in ("muon", "adamw"):
        raise ValueError(f"unknown optimiser {matrices!r} for matrices, expected 'muon' or 'adamw'")
    declared = whole(config) if declared is None else declared
    adamw = optax.adamw(learning_rate, *betas, eps=eps, weight_decay=weight_decay)
    orthogonal = muon(
        declared,
        learning_rate,
        momentum=momentum,
        momentum_dtype=momentum_dtype,
        weight_decay=weight_decay,
        rms=rms,
        dtype=dtype,
        mesh=mesh,
        rules=rules,
    )
    rule = {"muon": orthogonal if matrices == "muon" else adamw, "adamw": adamw}
    rule |= {"bias": balance(balance_speed), "frozen": optax.set_to_zero()}
    both = optax.partition(rule, groups(declared))
    return both if loss is None else only(declared, loss, both)


def whole(config: Architecture) -> Any:
    """The declarations of a model as the losses of its next tokens train it: DSpark's stages are frozen.

    None of those losses trains them, and decay alone would wear them away.
    """
    declared = dict(declarations(config))
    if DSPARK in declared:
        declared[DSPARK] = jax.tree.map(lambda p: p.replace(group="frozen"), declared[DSPARK], is_leaf=is_parameter)
    return declared


def balance(speed: float) -> optax.GradientTransformation:
    """Moves the bias of experts with less than the mean load up and of those with more down (section 4.2.2)."""

    def update(loads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(lambda n: speed * jnp.sign(jnp.mean(n, axis=-1, keepdims=True) - n), loads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


def only(declared: Any, loss: Loss, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` for the parameters of one loss: the others are left alone, and so are their moments."""
    chosen = jax.tree.map(lambda p: p.loss == loss, declared, is_leaf=is_parameter)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, after = inner.update(grads, state, params)
        advanced = _like_state(inner, after, chosen, True)
        kept = jax.tree.map(lambda yes, new, old: new if yes else old, advanced, after, state)
        return jax.tree.map(lambda yes, u: u if yes else jnp.zeros_like(u), chosen, updates), kept

    return optax.GradientTransformation(inner.init, update)


def state_placements(
    declared: Any, transform: optax.GradientTransformation, mesh: Mesh, rules: Rules | str | None
) -> Any:
    """Where the optimiser's state lies: moments with their parameters, the rest on every device."""
    shapes = jax.tree.map(lambda p: p.value, declared, is_leaf=is_parameter)
    state = jax.eval_shape(transform.init, shapes)
    return _like_state(transform, state, places(declared, mesh, resolve(rules)), NamedSharding(mesh, P()))


def _like_state(transform: optax.GradientTransformation, state: Any, of_params: Any, other: Any) -> Any:
    """A tree like the optimiser's state: a parameter's entry of `of_params` for its moments, `other` for the rest."""

    def masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    return optax.tree.map_params(
        transform,
        lambda leaf, value: leaf if masked(leaf) else value,
        state,
        of_params,
        transform_non_params=lambda _: other,
        is_leaf=masked,
    )
