"""DSpark's stages (arXiv 2607.05147) learn to draft what the trunk will say, which stays as it is.

Of each row some places are drawn: blocks that begin there are drafted with the true tokens given, by what the trunk's
one pass over the row says of the tokens before. Packed documents do not see each other, and blocks neither.

Drafts count less the further they are from the anchor, which all before them must be right for: exp(-(k - 1) / gamma).
The loss is 0.1 of the cross-entropy of the token that follows, 0.9 of the L1 distance from the trunk's distribution,
and the binary cross-entropy of the confidence, whose target is the probability that speculative sampling takes the
draft, once those before it are taken: sum(min(draft, trunk)) over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast

import jax
import jax.numpy as jnp
from jax import Array
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from v4_jax.architecture import Architecture, ConfigError
from v4_jax.cache.ring import MOST_ROLLED_BACK
from v4_jax.config import Config
from v4_jax.draft_stages import DSPARK
from v4_jax.drafting import behind
from v4_jax.outputs import Output
from v4_jax.train.batch import Batch
from v4_jax.train.objectives.objective import Arranged, Counts, Decisions, Sums, Weights, targets
from v4_jax.train.section import Section
from v4_jax.train.teachers.settings import TeacherSettings
from v4_jax.transformer import Transformer

_FRESH = {"stages": 3, "block_size": 5, "rank": 256}  # as released


class DSpark(Section):
    """DSpark's stages draft what the trunk will say."""

    imitates: ClassVar[bool] = False

    kind: Literal["dspark"] = "dspark"
    """"dspark": DSpark's stages, on a trunk that stays as it is; nothing else is trained or saved."""
    anchors: PositiveInt = 64
    """Blocks that are drafted in each row of a step, at places drawn anew for each."""
    gamma: PositiveFloat = 4.0
    """Draft k of a block counts exp(-(k - 1) / gamma)."""
    cross_entropy: NonNegativeFloat = 0.1
    """What a nat of cross-entropy counts, of the token that the text has."""
    distance: NonNegativeFloat = 0.9
    """What the L1 distance of the draft's distribution from the trunk's counts, which is 2 at most."""
    confidence: NonNegativeFloat = 1.0
    """What a nat of the confidence's binary cross-entropy counts."""
    base: Literal["native", "bfloat16", "float32"] = "native"
    """How the trunk is held: in the formats that the model has on disk, or in one of these."""
    fresh: bool = False
    """Whether to begin with fresh stages although the model has some. Where it has none they are fresh in any case."""
    stages: PositiveInt | None = None
    """Of fresh stages: how many; by default 3, as released. Stages that are there say all this themselves."""
    block_size: PositiveInt | None = None
    """Of fresh stages: tokens that are drafted at once; by default 5."""
    noise_token: NonNegativeInt | None = None
    """Of fresh stages: the token that stands for drafts to come, one that texts do not have (released: 128799)."""
    target_layers: list[NonNegativeInt] | None = Field(None, min_length=1)
    """Of fresh stages: the layers of the trunk that they see, counted from 0; by default the last 3."""
    rank: PositiveInt | None = None
    """Of fresh stages: rank of the head that adds what the token before says; by default 256."""

    @property
    def readers(self) -> Mapping[str, TeacherSettings]:
        """As for `Objective`: nobody."""
        return {}

    def begins_fresh(self, config: Architecture) -> bool:
        """Whether the stages are fresh where a model of this architecture is what the run begins with."""
        return self.fresh or not config.dspark_stages

    def of(self, config: Config) -> Config:
        """The architecture of a model with its stages: those it has, or fresh ones in place of whatever drafts.

        Raises:
          ValueError: settings that are not those of the stages it has, or none for fresh ones, or a model that cannot
            have any.
        """
        if config.expert_dtype == "nvfp4":
            raise ValueError(
                "the model's experts are in NVFP4, which is read and not made, and those of its stages would be, too: "
                "expected a model in another format"
            )
        layers = config.num_hidden_layers
        if not self.begins_fresh(config):
            has = {
                "stages": config.dspark_stages,
                "block_size": config.dspark_block_size,
                "noise_token": config.dspark_noise_token_id,
                "target_layers": list(config.dspark_target_layer_ids),
                "rank": config.dspark_markov_rank,
            }
            for name, value in has.items():
                if (said := getattr(self, name)) not in (None, value):
                    raise ValueError(
                        f"objective.{name} is {said}, and the model has stages of {value}: expected that, or "
                        "objective.fresh for stages that begin anew"
                    )
            return config
        if self.noise_token is None:
            raise ValueError(
                "objective.noise_token is missing, and the stages are fresh: expected the id of a token that texts do "
                f"not have, below {config.vocab_size}"
            )
        chosen = {name: getattr(self, name) or value for name, value in _FRESH.items()}
        if chosen["block_size"] >= MOST_ROLLED_BACK:
            raise ValueError(
                f"objective.block_size is {chosen['block_size']}, expected at most {MOST_ROLLED_BACK - 1}, which can "
                "be checked at once"
            )
        try:
            return config.with_stages(
                chosen["stages"],
                block_size=chosen["block_size"],
                noise_token=self.noise_token,
                target_layers=self.target_layers or range(max(0, layers - 3), layers),
                rank=chosen["rank"],
            )
        except ConfigError as error:
            raise ValueError(f"objective has stages that do not fit the model: {error}") from None

    def begin(self, config: Architecture, batch: Batch, step: Array) -> tuple[Batch, Counts]:
        """As for `Losses`: draws the blocks' places, as `given` "anchors" [..., B, A]; -1 where a row has too few."""
        rows = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), batch)
        legal = targets(rows, 2)  # of the token before an anchor: the first draft stands two further
        drawn = jax.random.uniform(jax.random.fold_in(jax.random.key(0), step), legal.shape)
        best, places = jax.lax.top_k(jnp.where(legal, drawn, -1), min(self.anchors, legal.shape[1]))
        anchors = jnp.where(best >= 0, places + 1, -1).astype(jnp.int32)
        weights = self._weights(config, rows, anchors)
        counts = Counts(
            loss=jnp.maximum(jnp.sum(weights), self._of_place(1)[0]),
            mtp=jnp.maximum(jnp.sum(anchors > 0), 1),
            rows=len(legal),
            tokens=jnp.maximum(jnp.sum(rows.segment_ids > 0), 1),
        )
        return batch._replace(given={"anchors": anchors.reshape(*batch.tokens.shape[:-1], -1)}), counts

    def total(
        self,
        model: Transformer,
        params: Any,
        batch: Batch,
        counts: Counts,
        weights: Weights,
        decisions: Decisions | None = None,
        shared: Any = None,
    ) -> tuple[Array, Sums]:
        """As for `Losses`: of the stages alone."""
        del weights, decisions, shared
        anchors = (batch.given or {})["anchors"]
        trunk = cast(
            Output,
            model.apply(
                {"params": params}, batch.tokens, segment_ids=batch.segment_ids, logits="none", return_taps=True
            ),
        )
        found = cast(
            dict[str, Array],
            model.apply(
                {"params": params},
                trunk.taps,
                trunk.streams,
                batch.tokens,
                anchors,
                self._weights(model.config, batch, anchors),
                segment_ids=batch.segment_ids,
                shares=(self.cross_entropy, self.distance, self.confidence),
                method="dspark_loss",
            ),
        )
        statistics = {name: found[name] for name in ("cross_entropy", "distance", "confidence_loss")}
        statistics["accepted_length"] = found["length"] * counts.loss / counts.mtp  # a mean over blocks
        sums = Sums(found["loss"], jnp.zeros(()), None, None, found["load"], statistics)
        return found["loss"] / counts.loss, sums

    def arranged(self, config: Architecture, values: Array) -> Arranged:
        """As for `Losses`: [stages, ...]."""
        return [((DSPARK, f"stage_{i}"), values[i]) for i in range(config.dspark_stages)]

    def _of_place(self, size: int) -> Array:
        """What the drafts of a block of this size count, [size] float32."""
        return jnp.exp(-jnp.arange(size, dtype=jnp.float32) / self.gamma)

    def _weights(self, config: Architecture, batch: Batch, anchors: Array) -> Array:
        """What each draft counts, [B, A, Q] float32: 0 where its document is over, or where nothing is learnt."""
        size, length = config.dspark_block_size, batch.tokens.shape[-1]
        places = anchors[..., None] + 1 + jnp.arange(size, dtype=jnp.int32)
        counted = (anchors > 0)[..., None] & (places < length)
        counted &= behind(batch.segment_ids, anchors, 1, size) == behind(batch.segment_ids, anchors, 0, 1)
        if batch.trained is not None:
            counted &= behind(batch.trained, anchors, 1, size)
        return jnp.where(counted, self._of_place(size), 0)
