"""Teachers: directories whose models read a round's texts, one after another, and whose heads follow one another.

Only one teacher's weights are on the devices at a time, unless asked otherwise, and of those that have read, one head.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from v4_jax.checkpoint import Checkpoint, load, local, open_checkpoint, run_of
from v4_jax.config import Config
from v4_jax.placement import Place
from v4_jax.sharding.axes import resolve, sharding
from v4_jax.train.objectives.objective import shift
from v4_jax.train.settings import SettingsError
from v4_jax.train.teachers.rows import Part, marked
from v4_jax.train.teachers.settings import TeacherSettings
from v4_jax.transformer import Transformer

TOKENIZER = "tokenizer.json"


class _Teacher(NamedTuple):
    """A directory that was opened; nothing of it is read."""

    settings: TeacherSettings
    checkpoint: Checkpoint

    @property
    def config(self) -> Config:
        return self.checkpoint.config

    def head(self) -> np.ndarray:
        """[V, D] as the model holds it."""
        name = "head.weight"
        if self.settings.dtype == "float32":
            exact = self.checkpoint.unrounded(name)
            return np.asarray(self.checkpoint.read(name) if exact is None else exact, np.float32)
        return np.asarray(self.checkpoint.read(name), ml_dtypes.bfloat16)


class Teachers:
    """The teachers of a run.

    Args:
      teachers: which they are, by name.
      config: the student's.
      place: where they run, as the student does.
      known: what is to be known of them: the "hidden" states that their heads make distributions of, a number of the
        "top" tokens of these, or the "score" of the text, the log-probabilities of its tokens.
      top_k: that number.
      keep: whether their weights stay on the devices.
      tokenizer: the student's file; None without one.
      loading: entered while a teacher is loaded; told which.

    Raises:
      SettingsError: a teacher has another vocabulary.
      ValueError, OSError: a directory holds no model.
    """

    def __init__(
        self,
        teachers: Mapping[str, TeacherSettings],
        config: Config,
        place: Place,
        *,
        known: Literal["hidden", "top", "score"] = "hidden",
        top_k: int = 0,
        keep: bool = False,
        tokenizer: bytes | None = None,
        loading: Callable[[str], contextlib.AbstractContextManager[None]] = lambda what: contextlib.nullcontext(),
    ) -> None:
        self._known, self._top_k, self._keep, self._place, self._loading = known, top_k, keep, place, loading
        self._teachers: dict[str, _Teacher] = {}
        self._params: dict[str, Any] = {}
        self._heads: dict[str, np.ndarray] = {}  # on the host
        self._resident: tuple[str, dict[str, Any]] | None = None
        for name, settings in teachers.items():
            checkpoint = open_checkpoint(settings.model)
            vocabulary = checkpoint.config.vocab_size
            if vocabulary != config.vocab_size:
                raise SettingsError(
                    f"teacher {name} ({settings.model}) has a vocabulary of {vocabulary:,} tokens and the student one "
                    f"of {config.vocab_size:,}; expected the same"
                )
            if top_k > vocabulary:
                raise SettingsError(f"objective.top_k is {top_k:,}; the vocabulary has {vocabulary:,} tokens")
            file = (run_of(settings.model) or local(settings.model)) / TOKENIZER
            if tokenizer is not None and file.exists() and file.read_bytes() != tokenizer:
                raise SettingsError(f"{file} of teacher {name} is not the student's; expected the same tokens")
            self._teachers[name] = _Teacher(settings, checkpoint)

    def read(self, name: str, parts: Iterable[Part]) -> Iterator[Part]:
        """The parts with what is to be known of a teacher, which reads them; see `Objective.loss`.

        Raises:
          CheckpointError: its weights are damaged, or do not fit on the mesh.
        """
        program, params = self._program(name), self._load(name)
        for part in parts:
            batch = part.batch
            found = program(params, *(self._place.put_tokens(x) for x in (batch.tokens, batch.segment_ids)))
            given = (batch.given or {}) | {key: _host(x) for key, x in found.items()}
            yield part._replace(batch=marked(batch)._replace(given=given))
        if not self._keep:
            self._params.pop(name, None)

    def shared(self, name: str) -> dict[str, Any]:
        """What a teacher's parts share: on the devices, until that of another teacher is asked for."""
        if self._resident is None or self._resident[0] != name:
            teacher = self._teachers[name]
            self._resident = None  # gone before the next one comes
            shared: dict[str, Any] = {"weight": jnp.float32(teacher.settings.weight)}
            if self._known == "hidden":
                if name not in self._heads:
                    self._heads[name] = teacher.head()
                shared["head"] = self._put(self._heads[name])
            self._resident = name, shared
        return self._resident[1]

    def _put(self, head: np.ndarray) -> Any:
        """A head to where the student's own lies."""
        mesh, where = self._place.mesh, None
        if mesh is not None:
            where = sharding(mesh, ("vocab", "embed"), head.shape, resolve(self._place.rules), name="a teacher's head")
        return jax.device_put(head, where, may_alias=False)

    def _load(self, name: str) -> Any:
        if name not in self._params:
            teacher = self._teachers[name]
            with self._loading(f"teacher {name}"):
                _, self._params[name] = load(
                    teacher.checkpoint,
                    dtype=teacher.settings.dtype,
                    mesh=self._place.mesh,
                    rules=self._place.rules,
                )
        return self._params[name]

    @functools.cache  # noqa: B019 lives as long as the run
    def _program(self, name: str) -> Any:
        """`(params, tokens, segment_ids)` -> what is to be known."""
        teacher, place, top_k = self._teachers[name], self._place, self._top_k
        model = Transformer(teacher.config, policy=teacher.settings.policy, mesh=place.mesh, rules=place.rules)

        def program(params: Any, tokens: Any, segment_ids: Any) -> Mapping[str, Any]:
            output: Any = model.apply({"params": params}, tokens, segment_ids=segment_ids, logits="none")
            if self._known == "score":
                following = shift(tokens, 1)
                scores = model.apply({"params": params}, output.streams, following, method="log_probabilities")
                return {"reference": jnp.pad(cast(jax.Array, scores)[:, :-1], ((0, 0), (1, 0)))}
            if self._known == "hidden":
                return {"hidden": model.apply({"params": params}, output.streams, method="hidden")}
            ids, scores = model.apply({"params": params}, output.streams, top_k, method="top_scores")  # type: ignore[misc]
            return {"ids": ids, "scores": scores}

        return jax.jit(program)


def _host(array: Any) -> np.ndarray:
    """The whole array, in every process."""
    if jax.process_count() > 1:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)
