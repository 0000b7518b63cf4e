"""Group advantages: how much better an answer is than the others to its prompt, by its rewards and its length."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from v4_jax.tokenizer import Tokenizer
from v4_jax.train.objectives.grpo import Grpo
from v4_jax.train.on_policy.rewards import Reply, Reward
from v4_jax.train.on_policy.rollouts import Prompt, RolloutError, Sample

_ALIKE = 1e-6  # a group whose rewards differ by no more teaches nothing


def _agreed(reward: Reward, replies: Sequence[Reply]) -> np.ndarray:
    """What a reward says of replies, [n] float64: the first process asks, for all."""
    found, problem = np.zeros(len(replies)), None
    if jax.process_index() == 0:
        try:
            found = np.asarray(reward.score(replies), np.float64)
        except RolloutError as error:
            problem = error
    if jax.process_count() > 1:
        fine, found = multihost_utils.broadcast_one_to_all((np.asarray(problem is None), found))
        if not fine and problem is None:
            raise RolloutError("the first process cannot judge the answers, as it says itself")
    if problem is not None:
        raise problem
    return found


class GroupAdvantages:
    """Judges answers, a group for each prompt; see `v4_jax.train.on_policy.rows.Judge`.

    Args:
      objective: the rewards, and what is made of them.
      tokenizer: of the answers.
    """

    def __init__(self, objective: Grpo, tokenizer: Tokenizer) -> None:
        self._objective, self._tokenizer = objective, tokenizer

    def __call__(
        self, prompts: Sequence[Prompt], samples: Sequence[Sequence[Sample]]
    ) -> tuple[list[list[dict[str, float]]], dict[str, float]]:
        """An "advantage" for each answer, and metrics of the rewards.

        Raises:
          RolloutError: something cannot be judged.
        """
        replies = [
            Reply.of(prompt, self._text(sample), prompt.mode not in (None, "non-think"))
            for prompt, group in zip(prompts, samples, strict=True)
            for sample in group
        ]
        scores, metrics = np.zeros(len(replies)), dict[str, float]()
        for number, reward in enumerate(self._objective.rewards):
            found = _agreed(reward, replies)
            scores += reward.weight * found
            metrics[f"reward_{number}_{reward.kind}"] = float(found.mean())
        lengths = [len(sample.tokens) for group in samples for sample in group]
        scores -= [self._penalty(reply.prompt, length) for reply, length in zip(replies, lengths, strict=True)]
        groups = scores.reshape(len(prompts), -1)
        off = groups - groups.mean(axis=1, keepdims=True)
        deviation = groups.std(axis=1, keepdims=True)
        alike = deviation <= _ALIKE
        advantages = np.where(alike, 0, off / np.where(alike, 1, deviation) if self._objective.scale else off)
        metrics |= {
            "reward": float(scores.mean()),
            "reward_deviation": float(deviation.mean()),
            "groups_alike": float(alike.mean()),
        }
        return [[{"advantage": float(value)} for value in group] for group in advantages], metrics

    def _text(self, sample: Sample) -> str:
        return self._tokenizer.decode((sample.tokens[:-1] if sample.ended else sample.tokens).tolist())

    def _penalty(self, prompt: Prompt, length: int) -> float:
        chosen = self._objective.length.get(prompt.mode) if prompt.mode is not None else None
        return 0.0 if chosen is None else chosen.rate * max(0, length - chosen.free) / 1000
