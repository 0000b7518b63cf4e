"""What a compiled program computes and moves: FLOPs and bytes of main memory, with loops multiplied out.

The compiler's own analysis counts a loop's body once. Here each instruction counts as often as it runs, and a matrix
product as its 2mnk. Bytes are what instructions read from and write to main memory: operands in on-chip memory are
free, a slice counts as itself and not as what it is cut from, an update in place as the update. A Pallas kernel counts
as its `CostEstimate` says, or as its operands and results without one. Branches of a conditional count as often as they
are expected to be taken: by default all of them. Products of a single row that the compiler turns into
elementwise work are not seen.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from v4_jax.planning.hlo import Call, Computation, Expected, Instruction, Once, Program, Shape

# These hand on what is there, or stand for what other instructions do.
FREE = frozenset(("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "while", "conditional"))
FREE |= {"call", "opt-barrier", "after-all", "add-dependency", "partition-id", "replica-id"}
_ROOM = 'custom_call_target="AllocateBuffer"'  # memory as it was found
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_VIEWS = frozenset(("bitcast", "reshape", "transpose", "convert", "copy"))


@dataclasses.dataclass(frozen=True)
class Cost:
    """One instruction's share of the program's cost.

    Attributes:
      instruction: which.
      runs: how often.
      flops: FLOPs, all runs together.
      nbytes: bytes of main memory read and written, all runs together.
    """

    instruction: Instruction
    runs: float
    flops: float
    nbytes: float


def costs(program: Program, expected: Expected | None = None) -> list[Cost]:
    """What each instruction costs; those inside a fusion count for FLOPs alone.

    Args:
      program: what was compiled.
      expected: see `Program.calls`; by default a loop whose length depends on the data counts once.
    """
    found, expected = [], expected or Once()
    for call in program.calls(expected):
        runs = 1.0 if call.runs is None else float(call.runs)
        flops, nbytes = cost_of(call, program, expected)
        if flops or nbytes:
            found.append(Cost(call.instruction, runs, flops * runs, nbytes * runs))
    return found


def is_free(instruction: Instruction) -> bool:
    """Whether an instruction takes no time of its own."""
    return instruction.opcode in FREE or (instruction.opcode == "custom-call" and _ROOM in instruction.attributes)


def cost_of(call: Call, program: Program, expected: Expected) -> tuple[float, float]:
    """FLOPs and bytes of one run of an instruction."""
    flops, nbytes = _flops(call), 0.0 if call.fused else _nbytes(call, program)
    if call.instruction.is_kernel:
        share = expected.share(call.instruction)
        return flops * share.flops, nbytes * share.nbytes
    return flops, nbytes


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def _flops(call: Call) -> float:
    instruction = call.instruction
    if instruction.opcode == "custom-call":
        return _estimate(instruction, "flops") or 0.0
    if instruction.opcode not in ("dot", "convolution"):
        return 0.0
    left, right = (_operand(call.computation, name).dimensions for name in instruction.operands[:2])
    out = instruction.shapes[0].dimensions
    if instruction.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
        places = contracted[1].split(",") if contracted and contracted[1] else []
        return 2.0 * math.prod(out) * math.prod(left[int(place)] for place in places)
    return 2.0 * _multiplications(instruction.attributes, left, right, out)


def _multiplications(attributes: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> int:
    """Multiplications of a convolution that are not with padding: how the TPU compiler writes products, batched too."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    if labels is None:
        raise ValueError(f"a convolution without dim_labels: {attributes[:200]}")
    of_left, of_right, of_out = labels.groups()
    total = out[of_out.index("b")] * out[of_out.index("f")] * right[of_right.index("i")]
    window = dict(re.findall(r"(\w+)=([\dx_\-]+)", (re.search(r"window=\{([^}]*)\}", attributes) or ["", ""])[1]))
    for place, label in enumerate(sorted(set(of_left) - {"b", "f"})):

        def setting(name: str, default: str, place: int = place) -> str:
            return window[name].split("x")[place] if name in window else default

        low = int(setting("pad", "0_0").split("_")[0])
        numbers = (int(setting(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        sizes = (array[of.index(label)] for array, of in ((left, of_left), (right, of_right), (out, of_out)))
        total *= _positions(*sizes, low, *numbers)
    groups = re.search(r"batch_group_count=(\d+)", attributes)
    return total // int(groups[1]) if groups else total


@functools.lru_cache(maxsize=4096)
def _positions(size: int, window: int, out: int, low: int, stride: int, left_step: int, right_step: int) -> int:
    """Pairs of output and window positions that meet an element, not padding or a gap."""
    count, reach = 0, (size - 1) * left_step
    for place in range(window):
        if stride % left_step == 0:
            # Output i meets i * stride + offset, which has the same remainder for all i.
            offset = place * right_step - low
            if offset % left_step == 0:
                first, last = max(0, -(offset // stride)), min(out - 1, (reach - offset) // stride)
                count += max(0, last - first + 1)
            continue
        places = (i * stride + place * right_step - low for i in range(out))
        count += sum(0 <= at <= reach and at % left_step == 0 for at in places)
    return count


# ---- bytes -----------------------------------------------------------------------------------------------------------


def _nbytes(call: Call, program: Program) -> float:
    instruction, computation = call.instruction, call.computation
    opcode = instruction.opcode
    if is_free(instruction) or opcode.endswith(("-done", "-update")):
        return 0.0
    if opcode == "custom-call" and (estimate := _estimate(instruction, "bytes_accessed")) is not None:
        return estimate
    results = sum(map(_held, instruction.shapes))
    if opcode.endswith("-start"):
        # Among its results are its operands; the outcome is what "-done" has.
        done = (i for i in computation.instructions.values() if i.operands[:1] == (instruction.name,))
        shapes = next((i.shapes for i in done), ())
        results = sum(map(_held, shapes))
        if opcode.removesuffix("-start") in _SLICES:
            return float(results + sum(shape.nbytes for shape in shapes))
    operands = [_operand(computation, name) for name in instruction.operands]
    if opcode in _SLICES:
        return results + (_scaled(operands[0], instruction.shapes[0]) if operands else 0)
    if opcode == "dynamic-update-slice":
        return 2 * _held(operands[1]) if operands[1].space == 0 else _held(operands[0]) and operands[1].nbytes
    if opcode == "scatter":
        return 2.0 * operands[-1].nbytes
    if opcode == "fusion" and program.holds_kernel(instruction):
        return 0.0  # the kernel in it counts
    if opcode == "fusion":
        return _fusion(instruction, operands, program)
    return results + sum(map(_held, operands))


def _fusion(instruction: Instruction, operands: list[Shape], program: Program) -> float:
    (callee,) = instruction.called("calls")
    inner = program.computations[callee]
    total = 0.0
    for name, place in inner.parameters.items():
        shape = operands[place] if place < len(operands) else None
        if shape is not None and _held(shape):
            total += min(shape.nbytes, shape.nbytes * _share(program, inner, name))
    root = inner.instructions[inner.root]
    roots = [inner.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for result, shape in zip(roots, instruction.shapes, strict=False):
        if result.opcode == "parameter":
            continue  # handed on, as the buffers of a collective are that runs beside the fusion
        origin = _origin(inner, result)
        written = shape.nbytes
        if origin.opcode == "dynamic-update-slice":
            written = _operand(inner, origin.operands[1]).nbytes
        elif origin.opcode == "scatter":
            written = _operand(inner, origin.operands[-1]).nbytes
        total += written if shape.space == 0 else 0
    return total


def _share(program: Program, inner: Computation, name: str) -> float:
    """The share of a parameter, or of what is made of it, that a fusion reads."""
    total, whole = 0.0, max(1, _operand(inner, name).nbytes)
    for user in _users(inner, name):
        if user.opcode in _SLICES and user.operands[0] == name:
            total += user.shapes[0].nbytes / whole
        elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
            continue  # updated in place
        elif user.opcode == "tuple" and user.name == inner.root:
            continue  # handed on
        elif user.opcode in _VIEWS:
            total += _share(program, inner, user.name)
        elif user.opcode == "fusion":
            nested = program.computations[user.called("calls")[0]]
            places = {place: parameter for parameter, place in nested.parameters.items()}
            if _origin(nested, nested.instructions[nested.root]).opcode == "parameter":
                total += _share(program, inner, user.name)
            else:
                total += _share(program, nested, places[user.operands.index(name)])
        else:
            return 1.0
    return min(total, 1.0)


def _users(computation: Computation, name: str) -> list[Instruction]:
    instructions = computation.instructions.values()
    return [i for i in instructions if name in i.operands and i.opcode not in ("parameter", "constant")]


def _origin(computation: Computation, instruction: Instruction) -> Instruction:
    """What an instruction shows another view of."""
    while instruction.opcode in _VIEWS and instruction.operands[0] in computation.instructions:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _operand(computation: Computation, name: str) -> Shape:
    """The shape of an operand; of a tuple, all its parts as bytes."""
    found = computation.instructions.get(name)
    shapes = found.shapes if found else ()
    return shapes[0] if len(shapes) == 1 else Shape("u8", (sum(map(_held, shapes)),))


def _held(shape: Shape) -> int:
    """Bytes in main memory."""
    return shape.nbytes if shape.space == 0 else 0


def _scaled(source: Shape, cut: Shape) -> int:
    return cut.nbytes if source.space == 0 else 0


def _estimate(instruction: Instruction, name: str) -> float | None:
    """A number from a Pallas kernel's `CostEstimate`."""
    found = re.search(rf'"cost_estimate": *\{{[^}}]*"{name}":"?(\d+)', instruction.attributes)
    return float(found[1]) if found else None
