"""Running a job on the devices that are there: the program that a plan estimates, step by step, with random numbers."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from v4_jax.placement import Place, bytes_per_device
from v4_jax.planning.job import Job, program_of, training
from v4_jax.planning.random_values import random_cache, random_weights

_PHASES = 128  # tokens after which every compressor is where it was


class TooLarge(Exception):
    """A job that has no room on its devices.

    Attributes:
      needed: bytes of each device, as far as is known; None where only the compiler knows.
      free: bytes that each has for it; None likewise.
      held: bytes of weights, or training state, and cache among those needed.
    """

    def __init__(self, needed: float | None, free: float | None, held: float):
        super().__init__(needed, free, held)
        self.needed, self.free, self.held = needed, free, held


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of each device that a program needs, by the compiler's count.

    Attributes:
      arguments: weights or state, cache, tokens.
      temporaries: in between.
      together: both, and results that do not replace an argument.
    """

    arguments: int
    temporaries: int
    together: int


class Executable:
    """A job's program, compiled for its devices; nothing lies on them yet.

    Attributes:
      job: what it computes.
      mesh: its devices.
      program: the program; it is called as a jitted function, which runs what was compiled here. The compiled object
        would refuse 4-bit weights that are placed: jax 0.10 misreads those arrays' layout.
      traced: the same, traced.
      compiled: what the compiler made of it.
      memory: what it needs.
      seconds: time that the compiler took.
    """

    def __init__(self, job: Job, mesh: Mesh):
        """Traces and compiles.

        Raises:
          ShardingError: the job does not split evenly over the mesh.
          TooLarge: it has no room on the devices.
        """
        self.job, self.mesh = job, mesh
        self.program = program_of(job, mesh)
        held = bytes_per_device((self.program.weights, self.program.cache))
        self._check(held, held)
        self.traced = self.program.function.trace(*self.program.arguments)
        start = time.monotonic()
        try:
            self.compiled = self.traced.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" in str(error):
                raise TooLarge(None, free_bytes(mesh), held) from None
            raise
        self.seconds = time.monotonic() - start
        sizes = self.compiled.memory_analysis()
        results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
        arguments, temporaries = sizes.argument_size_in_bytes, sizes.temp_size_in_bytes
        self.memory = Memory(arguments, temporaries, arguments + temporaries + results)
        self._check(self.memory.together, held)

    def _check(self, needed: int, held: int) -> None:
        free = free_bytes(self.mesh)
        if free is not None and needed > free:
            raise TooLarge(needed, free, held)


def free_bytes(mesh: Mesh) -> int | None:
    """Bytes that each device of a mesh has to give; of a host's memory, its processors' share. None if nothing says."""
    devices, told = _own(mesh)
    if told and all("bytes_limit" in one for one in told):
        return min(one["bytes_limit"] - one.get("bytes_in_use", 0) for one in told)
    meminfo = Path("/proc/meminfo")
    if devices and devices[0].platform == "cpu" and meminfo.exists():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0]) // len(devices)
    return None


class Run:
    """A program with its arguments on the devices, to be called again and again.

    Every call is at the end of the context. Rows of a decode step stand apart, and go on by a token a call, so that
    each ends blocks of compressed tokens as often as in use.
    """

    def __init__(self, executable: Executable, weights: Any = None):
        """Makes the arguments.

        Args:
          executable: the program.
          weights: loaded ones; None for random ones.
        """
        self.executable, job = executable, executable.job
        place, rng = Place(executable.mesh, job.preset), np.random.default_rng(0)
        tokens = rng.integers(0, job.config.vocab_size, (job.batch, job.chunk), np.int32)
        self._calls = 0
        if job.trains:
            from v4_jax.train.batch import Batch

            self._fixed: Any = Batch(*place.put((tokens[None], np.ones_like(tokens)[None])))
            self._changing = _training_state(executable)
            return
        weights = random_weights(job.config, executable.program.weights) if weights is None else weights
        self._fixed = (weights, place.put(tokens))
        self._changing = random_cache(executable.program.cache)

    def step(self) -> float:
        """Calls the program once and waits for all of it: seconds."""
        job = self.executable.job
        if not job.trains:
            lengths = self._starts()
            self._changing = self._changing.replace(
                lengths=jax.device_put(lengths, self.executable.program.cache.lengths.sharding, may_alias=False)
            )
            jax.block_until_ready(self._changing.lengths)
        self._calls += 1
        start = time.perf_counter()
        if job.trains:
            self._changing, self.result = self.executable.program.function(self._changing, self._fixed)
        else:
            self.result, self._changing = self.executable.program.function(*self._fixed, self._changing)
        jax.block_until_ready((self.result, self._changing))
        return time.perf_counter() - start

    def finite(self) -> bool:
        """Whether the last call's logits, or its loss, are numbers."""
        result = self.result["total_loss"] if self.executable.job.trains else self.result
        return bool(jnp.isfinite(result).all())

    def _starts(self) -> np.ndarray:
        """Tokens that each row has seen before the next call: [B] int32."""
        job = self.executable.job
        most = job.context - job.chunk
        if job.task != "decode":
            return np.full(job.batch, most, np.int32)
        phases = min(_PHASES, job.context)
        apart = np.arange(job.batch) * phases // job.batch
        return (most - phases + 1 + (apart + self._calls) % phases).astype(np.int32)


def peak_bytes(mesh: Mesh) -> int | None:
    """The most bytes that any of this process's devices has had in use; None where they do not say."""
    _, told = _own(mesh)
    most = [one["peak_bytes_in_use"] for one in told if "peak_bytes_in_use" in one]
    return max(most) if most and len(most) == len(told) else None


def _own(mesh: Mesh) -> tuple[list[Any], list[dict[str, int]]]:
    """This process's devices of a mesh, and what each tells of its memory."""
    devices = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return devices, [device.memory_stats() or {} for device in devices]


def _training_state(executable: Executable) -> Any:
    """Random masters, and the optimiser as it begins."""
    job, shapes = executable.job, executable.program.weights
    params = random_weights(job.config, shapes.params)
    transform = training(job, executable.mesh).transform
    place = jax.tree.map(lambda x: x.sharding, shapes.optimizer)
    optimizer = jax.jit(transform.init, out_shardings=place)(params)
    step = jax.device_put(np.int32(0), shapes.step.sharding, may_alias=False)
    return shapes.replace(step=step, params=params, optimizer=optimizer)
