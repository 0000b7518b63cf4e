"""`v4-jax plan`: compiles the model for a TPU topology that need not be there, and says what it needs."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any, Literal

import jax

from v4_jax import costs
from v4_jax.commands import plan_report as card
from v4_jax.commands.info import config_of
from v4_jax.commands.shared.console import CommandError, bad_input, say, show, working
from v4_jax.commands.shared.jobs import job_of
from v4_jax.commands.shared.options import Count, JsonFlag, OptionalSize, OptionalText, Text
from v4_jax.commands.shared.sizes import bytes_text, operations_text
from v4_jax.config import Config
from v4_jax.layers.stages import Remat
from v4_jax.on_mesh import UNIT
from v4_jax.placement import alternatives, bytes_per_device, check_mesh
from v4_jax.planning.compile import (
    Compiled,
    MissingCompiler,
    PlanError,
    Workload,
    compile_for_tpu,
)
from v4_jax.planning.estimates import Estimate, candidates, estimate, presets_of
from v4_jax.planning.job import MomentumFormat, Task, abstract_params
from v4_jax.sharding.axes import ShardingError
from v4_jax.sharding.chips import Topology
from v4_jax.sharding.mesh import abstract_mesh, format_mesh, parse_mesh

MOST = 3  # meshes that are tried before giving up


def plan(
    *,
    model: Text,
    task: Task,
    topology: Text,
    context: OptionalSize = None,
    batch: Count = 1,
    mesh: OptionalText = None,
    preset: OptionalText = None,
    chunk: OptionalSize = None,
    dtype: Literal["native", "bfloat16"] = "native",
    remat: Literal["auto", "none", "sublayers", "layers"] = "auto",
    momentum_dtype: MomentumFormat = "float32",
    as_json: JsonFlag = False,
) -> int:
    """Compiles the model for TPUs that need not be there: whether it fits, what it costs, and how to split it.

    No weights are read and nothing is run. Without --mesh, all legal meshes are ranked by estimate and the most
    promising compiled, until one fits. Exit code 1: none does.

    Examples:
      v4-jax plan --model flash --task decode --context 1M --topology v6e:2x4
      v4-jax plan --model pro --task prefill --context 1M --chunk 32K --topology v5p:4x4x8
      v4-jax plan --model flash --task decode --context 1M --topology v6e:2x4 --mesh seq=2,tensor=4 --json
      v4-jax plan --model flash --task train --context 16K --batch 128 --topology v5p:4x4x8
      v4-jax plan --model flash --task sft --context 8K --batch 8 --topology v6e:2x4

    Args:
      model: A directory with a config.json, or flash, pro, flash-0731, pro-0813 or tiny.
      task: decode: one token of each row; prefill: a chunk of each row; train: a step of whole rows, MTP included; sft:
        a step that trains LoRA adapters of rank 16 beside attention and shared experts, and leaves the weights alone;
        dspark: one that trains DSpark's stages on the trunk, which it leaves alone.
      topology: The chips: v4, v5e, v5p, v6e or tpu7x and the slice's shape, such as v6e:2x4 or v5p:2x2x2.
      context: Tokens of each row after the call, such as 128K or 1M. Default: 1M, or 16K in training, or the model's
        most if that is less.
      batch: Rows.
      mesh: Sizes of the mesh axes data, seq, expert and tensor, such as seq=4,tensor=2. Default: the best of all.
      preset: Which mesh axes split what: decode, prefill, long-context or train. Default: what suits the task.
      chunk: Tokens of each row that one prefill call takes. Default: 8K, or 128 per device if that is more.
      dtype: native: weights in the released formats, computing with its rounding; bfloat16: both in that. The cache is
        bfloat16 in either case. Training keeps float32 masters and moments and computes in bfloat16; with sft they are
        the adapters' alone, and with dspark the stages'.
      remat: What training's backward pass computes again. auto: what fits of sublayers, which keeps more and is
        faster, and layers.
      momentum_dtype: In which training keeps Muon's momentum.
      as_json: Write the plan as one JSON object.
    """
    jax.config.update("jax_platforms", "cpu")  # only shapes are computed here, also where there are TPUs
    with bad_input("--"):
        chips = Topology.parse(topology)
    whole = config_of(model)
    job = job_of(
        whole, task, devices=chips.devices, context=context, batch=batch, chunk=chunk, preset=preset, dtype=dtype
    )
    if not job.trains and (remat != "auto" or momentum_dtype != "float32"):
        raise CommandError(f"--remat and --momentum-dtype are for training, not for {task}")
    workload = dataclasses.replace(Workload.of(job, chips), momentum_dtype=momentum_dtype)
    estimates = _chosen(workload, mesh) if mesh else _best(workload, preset)
    policies: tuple[Remat, ...] = (job.remat,) if remat == "auto" else (remat,)
    if job.trains and remat == "auto":
        policies = ("sublayers", "layers")
    attempts = []
    for one, policy in itertools.product(estimates[:MOST], policies):
        attempts.append(_attempt(dataclasses.replace(one.workload, remat=policy)))
        if attempts[-1].fits:
            break
    if as_json:
        print(json.dumps(card.as_json(attempts, estimates), indent=2))
    else:
        show(card.render(attempts, estimates))
    if whole != workload.config:
        say(_drafts(whole, attempts[-1].workload))
    return 0 if attempts[-1].fits else 1


def _chosen(workload: Workload, text: str) -> list[Estimate]:
    """The mesh that was asked for, if it is legal."""
    native, devices = workload.dtype == "native", workload.topology.devices
    call: dict[str, Any] = {"batch": workload.batch, "length": workload.chunk, "native": native}
    with bad_input("--mesh: "):
        sizes = parse_mesh(text)
    try:
        mesh = abstract_mesh(sizes)
        if mesh.size != devices:
            raise ShardingError(
                f"mesh {format_mesh(sizes)} has {mesh.size} places, but {workload.topology} {devices} devices"
            )
        check_mesh(workload.config, mesh, workload.preset, **call)
    except ShardingError as error:
        raise CommandError(
            f"--mesh: {error}; {alternatives(workload.config, devices, workload.preset, **call)}"
        ) from None
    return [estimate(dataclasses.replace(workload, mesh=sizes))]


def _best(workload: Workload, preset: str | None) -> list[Estimate]:
    """All legal meshes, the most promising first."""
    presets = (preset,) if preset else presets_of(workload.task, workload.config, workload.topology.devices)
    with working("ranking meshes"):
        found = candidates(workload, presets)
    if not found:
        rows = f"{workload.batch} rows of {workload.chunk} tokens"
        raise CommandError(
            f"no mesh of {workload.topology.devices} devices splits {rows} evenly; "
            f"expected another --batch, a --chunk that is a multiple of {UNIT} per device, or another --topology"
        )
    return found


def _drafts(config: Config, workload: Workload) -> str:
    """What drafting adds to a plan of the trunk, in one sentence."""
    mesh = abstract_mesh(workload.mesh)
    whole, trunk = (
        bytes_per_device(abstract_params(one, mesh, workload.preset, workload.dtype))
        for one in (config, workload.config)
    )
    cache = costs.cache_bytes(config, 1, workload.cache_dtype).by_role["draft"]
    return (
        f"not in the plan: {'DSpark stages' if config.dspark_stages else 'the MTP block'} for drafts, which take "
        f"{bytes_text(whole - trunk)} of each device, {bytes_text(cache)} of cache for each row, and "
        f"{operations_text(config.draft_flops())} FLOPs each time that a row drafts"
    )


def _attempt(workload: Workload) -> card.Attempt:
    outcome: Compiled | PlanError
    with working(f"compiling {format_mesh(workload.mesh)} {workload.preset}"):
        try:
            outcome = compile_for_tpu(workload)
        except MissingCompiler as error:
            raise CommandError(str(error)) from None
        except PlanError as error:
            outcome = error
    attempt = card.Attempt(workload, outcome)
    if not attempt.fits:
        say(f"{attempt.name} {attempt.sentence()}")
    return attempt
