"""A compiled program, read from its text: its instructions, and how often each of them runs.

The compiler's own cost analysis counts a loop's body once. Here loops are multiplied out: by the trip count that the
compiler wrote down (XLA:CPU), or by evaluating the loop's counter, limit and step from the program (TPU, where the
limit is often carried around the loop).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# Instructions that communicate.
KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Shape(NamedTuple):
    """An array's type: dtype as the compiler writes it ("bf16", "f8e4m3fn"), dimensions, and where it lies.

    Attributes:
      dtype: number format.
      dimensions: sizes; for a device.
      space: memory space, 0 for the main memory (HBM); on TPU 1 is the on-chip vector memory.
    """

    dtype: str
    dimensions: tuple[int, ...]
    space: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes without padding; two 4-bit numbers to a byte."""
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        bits = int(digits[1]) if digits else 8 * (self.dtype == "pred")  # tokens and opaque values have no bytes
        return -(-math.prod(self.dimensions) * bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: what others call it.
      opcode: what it does ("fusion", "while", "all-reduce-start").
      shapes: its results, flattened.
      operands: names of its operands; for a parameter or a constant what stands in its brackets.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str

    @functools.cached_property
    def op_name(self) -> str:
        """Where in the JAX program it comes from; empty where the compiler made it up."""
        found = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return found[1] if found else ""

    @property
    def nbytes(self) -> int:
        """Bytes of its results."""
        return sum(shape.nbytes for shape in self.shapes)

    def called(self, *roles: str) -> list[str]:
        """Names of the computations that it calls in the given roles ("body", "calls")."""
        names = (re.search(rf"\b{role}=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", self.attributes) for role in roles)
        texts = (found[1] or found[2] for found in names if found)
        return [name.strip().lstrip("%") for text in texts for name in text.split(",")]

    @property
    def is_kernel(self) -> bool:
        """Whether it is a Pallas kernel."""
        return 'custom_call_target="tpu_custom_call"' in self.attributes

    def number(self, attribute: str) -> int | None:
        """A whole number among the attributes, as in `index=3`."""
        found = re.search(rf'\b{attribute}"?[=:]"?\{{?(?:"n":")?(\d+)', self.attributes)
        return int(found[1]) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the program: its instructions by name, in order."""

    instructions: dict[str, Instruction]
    root: str

    @functools.cached_property
    def parameters(self) -> dict[str, int]:
        """Number of each parameter."""
        found = ((i.name, i) for i in self.instructions.values() if i.opcode == "parameter")
        return {name: int(instruction.operands[0]) for name, instruction in found}


class Call(NamedTuple):
    """An instruction as it is reached from the program's entry.

    Attributes:
      instruction: what runs.
      computation: where it stands.
      runs: how often; None where that depends on the data.
      at_most: whether a conditional may leave it out.
      fused: whether it is part of a fusion, so that its operands and results need not exist in memory; a Pallas
        kernel is none, though it may be fused with the update in place that its result is for.
    """

    instruction: Instruction
    computation: Computation
    runs: float | None
    at_most: bool
    fused: bool


class _Term(NamedTuple):
    """A number known as the loop's element `element` (None: as nothing but a constant) plus `offset`."""

    element: int | None
    offset: int


class Share(NamedTuple):
    """What a Pallas kernel does of what the compiler's estimate and its own `CostEstimate` count; and which part of its
    visits to groups are not the first ones."""

    cycles: float = 1.0
    flops: float = 1.0
    nbytes: float = 1.0
    later: float = 0.0


class Expected:
    """How often what depends on the data runs; a base to say more, in which nothing is known and all is counted."""

    def trips(self, loop: Instruction) -> float | None:
        """Turns of a loop whose trip count is not in the program; None where that stays unknown."""
        del loop
        return None

    def taken(self, conditional: Instruction, branches: int) -> Sequence[float]:
        """How often each branch is taken, by its number; for a condition that is false, then true."""
        del conditional
        return (1.0,) * branches

    def share(self, kernel: Instruction) -> Share:
        """Of a Pallas kernel's work, what there is to do."""
        del kernel
        return Share()

    def filled(self, exchange: Instruction) -> float:
        """Of the room for what a ragged exchange brings, what it fills."""
        del exchange
        return 1.0


class Once(Expected):
    """Loops whose length depends on the data count once."""

    def trips(self, loop: Instruction) -> float:
        """Once."""
        del loop
        return 1.0


UNKNOWN = Expected()


class _Arguments:
    """What is known of a fusion's parameters, found out when asked for: few of them ever are, in deep chains."""

    def __init__(self, find: Callable[[int], _Term | None]):
        self.get = functools.cache(find)


# What is known of the elements of a loop's tuple, or of a fusion's parameters; what is not listed is not known.
_Known = dict[int, _Term] | _Arguments


class Program:
    """A compiled program.

    Attributes:
      computations: its functions by name.
      entry: name of the one that is run.
    """

    def __init__(self, text: str):
        """Reads `compiled.as_text()`.

        Raises:
          ValueError: the text holds no entry computation.
        """
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        for name, is_entry, lines in _blocks(text):
            found = [_instruction(line) for line in lines]
            root = next((i for i, line in enumerate(lines) if line.startswith("ROOT ")), len(lines) - 1)
            self.computations[name] = Computation({i.name: i for i in found}, found[root].name)
            self.entry = name if is_entry else self.entry
        if not self.entry:
            raise ValueError("no ENTRY computation found: expected the text of a compiled program")

    def calls(self, expected: Expected = UNKNOWN) -> Iterator[Call]:
        """Every instruction that runs, at each place that it is called from.

        Args:
          expected: how often to count what depends on the data.
        """
        yield from self._calls(self.entry, {}, 1, False, False, expected)

    def holds_kernel(self, instruction: Instruction) -> bool:
        """Whether it is a fusion of a Pallas kernel with the update in place that its result is for."""
        if instruction.opcode != "fusion":
            return False
        (callee,) = instruction.called("calls")
        return any(inner.is_kernel for inner in self.computations[callee].instructions.values())

    def communicates(self, loop: Instruction) -> bool:
        """Whether a loop's body has collectives."""
        calls = self._calls(loop.called("body")[0], {}, 1, False, False, Once())
        return any(call.instruction.opcode.removesuffix("-start") in KINDS for call in calls)

    def _calls(
        self, name: str, known: _Known, runs: float | None, at_most: bool, fused: bool, expected: Expected
    ) -> Iterator[Call]:
        computation = self.computations[name]
        for instruction in computation.instructions.values():
            yield Call(instruction, computation, runs, at_most, fused and not instruction.is_kernel)
            opcode = instruction.opcode
            if opcode == "while":
                body, condition = instruction.called("body", "condition")
                start = self._elements(computation, instruction.operands[0], known)
                counted = self._trips(instruction, body, condition, start)
                trips = expected.trips(instruction) if counted is None else counted
                times = None if trips is None or runs is None else runs * trips
                carried = {k: v for k, v in start.items() if v.element is None and self._keeps(body, k)}
                yield from self._calls(body, carried, times, at_most, fused, expected)
            elif opcode == "conditional":
                branches = instruction.called("branch_computations", "false_computation", "true_computation")
                for branch, share in zip(branches, expected.taken(instruction, len(branches)), strict=True):
                    yield from self._calls(branch, {}, None if runs is None else runs * share, True, fused, expected)
            elif opcode in ("call", "call-start", "fusion", "async-start"):  # call-start: to tpu7x's SparseCores
                inner = fused or opcode == "fusion"
                for callee in instruction.called("to_apply" if opcode.startswith("call") else "calls"):
                    yield from self._calls(callee, {}, runs, at_most, inner, expected)

    # ---- loops -------------------------------------------------------------------------------------------------------

    def _trips(self, loop: Instruction, body: str, condition: str, start: dict[int, _Term]) -> int | None:
        """How often a loop runs that counts from a known number to a known limit; None for all others."""
        written = loop.number("known_trip_count")
        if written is not None:
            return written
        test = self._comparison(self.computations[condition], self.computations[condition].root, None)
        if test is None:
            return None
        (counter, first), limit, inclusive = test
        if counter is None or counter not in start or start[counter].element is not None:
            return None
        if limit.element is not None:
            if not self._keeps(body, limit.element) or limit.element not in start:
                return None
            if start[limit.element].element is not None:
                return None
            limit = _Term(None, limit.offset + start[limit.element].offset)
        after = self._next(body, counter)
        if after is None or after.element != counter or after.offset <= 0:
            return None
        distance = limit.offset + inclusive - (start[counter].offset + first)
        return max(0, -(-distance // after.offset))

    def _comparison(
        self, computation: Computation, name: str, known: _Known | None
    ) -> tuple[_Term, _Term, bool] | None:
        """The two sides of a condition `a < b`, and whether it is `a <= b`; `known` as in `_term`."""
        instruction = computation.instructions[name]
        if instruction.opcode in ("copy", "bitcast"):
            return self._comparison(computation, instruction.operands[0], known)
        if instruction.opcode == "fusion":
            (callee,) = instruction.called("calls")
            inner = self.computations[callee]
            return self._comparison(inner, inner.root, self._arguments(computation, instruction, known))
        if instruction.opcode != "compare":
            return None
        a, b = (self._term(computation, operand, known) for operand in instruction.operands)
        direction = re.search(r"direction=(\w+)", instruction.attributes)
        if a is None or b is None or direction is None:
            return None
        if direction[1] in ("GT", "GE"):
            a, b = b, a
        return (a, b, direction[1] in ("LE", "GE")) if direction[1] in ("LT", "LE", "GT", "GE") else None

    def _keeps(self, body: str, element: int) -> bool:
        """Whether a loop's body hands an element on as it got it."""
        return self._next(body, element) == _Term(element, 0)

    def _next(self, body: str, element: int) -> _Term | None:
        """An element after a turn of the loop, in terms of the elements before."""
        computation = self.computations[body]
        return self._term(computation, computation.root, None, element)

    def _elements(self, computation: Computation, name: str, known: _Known) -> dict[int, _Term]:
        """What is known of the elements of a tuple."""
        instruction = computation.instructions[name]
        if instruction.opcode == "tuple":
            terms = (self._term(computation, operand, known) for operand in instruction.operands)
            return {i: term for i, term in enumerate(terms) if term is not None}
        terms = (self._term(computation, name, known, i) for i in range(len(instruction.shapes)))
        return {i: term for i, term in enumerate(terms) if term is not None}

    def _arguments(self, computation: Computation, call: Instruction, known: _Known | None) -> _Arguments:
        return _Arguments(lambda place: self._term(computation, call.operands[place], known))

    def _term(
        self, computation: Computation, name: str, known: _Known | None, element: int | None = None
    ) -> _Term | None:
        """A whole number, or the element of a tuple, as far as it is known.

        Args:
          computation: where it stands.
          name: the instruction.
          known: what is known of the elements of the computation's tuple or of its parameters; None in a loop, where
            each element stands for itself.
          element: which element of a tuple is meant; None for a plain number.
        """
        instruction = computation.instructions.get(name)
        if instruction is None:
            return None
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "constant":
            return _Term(None, int(operands[0])) if re.fullmatch(r"-?\d+", operands[0]) else None
        if opcode == "parameter":
            place = int(operands[0]) if element is None else element
            return _Term(place, 0) if known is None else known.get(place)
        if opcode in ("copy", "bitcast", "convert", "opt-barrier"):
            return self._term(computation, operands[0], known, element)
        if opcode == "get-tuple-element":
            return self._term(computation, operands[0], known, instruction.number("index"))
        if opcode == "tuple" and element is not None:
            return self._term(computation, operands[element], known)
        if opcode in ("add", "subtract"):
            a, b = (self._term(computation, operand, known) for operand in operands)
            if a is None or b is None or (b.element is not None and (opcode == "subtract" or a.element is not None)):
                return None
            sign = 1 if opcode == "add" else -1
            return _Term(b.element if a.element is None else a.element, a.offset + sign * b.offset)
        if opcode == "fusion":
            (callee,) = instruction.called("calls")
            inner = self.computations[callee]
            return self._term(inner, inner.root, self._arguments(computation, instruction, known), element)
        return None


# ---- text ------------------------------------------------------------------------------------------------------------

_END = re.compile(r"\}(, execution_thread=.*)?\s*$")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """(name, is the entry, lines) of each computation."""
    name, is_entry, lines = "", False, list[str]()
    for line in text.splitlines():
        if not line.startswith(" ") and (header := _HEADER.match(line)):
            name, is_entry, lines = header[2], bool(header[1]), []
        elif name and _END.match(line):
            yield name, is_entry, lines
            name = ""
        elif name and line.startswith(" ") and " = " in line:
            lines.append(line.strip())
        elif name and lines and not line.startswith(" "):  # the compiler breaks some kernels' estimates into lines
            lines[-1] += line


def _instruction(line: str) -> Instruction:
    name, rest = line.removeprefix("ROOT ").split(" = ", 1)
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    opcode, inside, attributes = rest[:opening], rest[opening + 1 : closing], rest[closing + 1 :]
    if opcode in ("parameter", "constant"):
        operands: tuple[str, ...] = (inside,)
    else:
        operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name.lstrip("%"), opcode, _shapes(kind), operands, attributes)


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at `opening` closes."""
    depth = 0
    for found in re.finditer(r"[()]", text[opening:]):
        depth += 1 if found[0] == "(" else -1
        if not depth:
            return opening + found.start()
    raise ValueError(f"unbalanced brackets in {text[:80]!r}")


def _shapes(text: str) -> tuple[Shape, ...]:
    found = re.finditer(r"([a-z]\w*)\[([\d,<= ]*)\](\{[^}]*\})?", text)
    shapes = []
    for match in found:
        space = re.search(r"S\((\d+)\)", match[3] or "")
        sizes = tuple(int(size.strip("<= ")) for size in match[2].split(",") if size.strip())
        shapes.append(Shape(match[1], sizes, int(space[1]) if space else 0))
    return tuple(shapes)
