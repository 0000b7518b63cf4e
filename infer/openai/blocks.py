"""An answer as blocks that follow each other, reasoning, text and calls of tools, as newer APIs write it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

from v4_jax.infer.conversation import as_said
from v4_jax.infer.openai.completions import Update
from v4_jax.infer.text import Sample

Kind = Literal["reasoning", "text", "call"]
_KINDS: dict[str, Kind] = {"reasoning": "reasoning", "content": "text"}


@dataclasses.dataclass
class Block:
    """A part of an answer.

    Attributes:
      kind: what it is.
      text: of reasoning or answer; of a call its arguments, in JSON.
      id: of a call.
      name: of the tool that is called.
    """

    kind: Kind
    text: str = ""
    id: str = ""
    name: str = ""


class Step(NamedTuple):
    """What becomes of a block.

    Attributes:
      what: a new block begins; the newest one goes on; it ends.
      place: which block it is.
      block: it, as far as it is there.
      added: what it goes on with.
    """

    what: Literal["begin", "add", "end"]
    place: int
    block: Block
    added: str = ""


def whole_blocks(choice: Sample) -> list[Block]:
    """The blocks of an answer that has ended."""
    message = choice.reply.message()
    calls = [
        Block("call", call["function"]["arguments"], call["id"], call["function"]["name"])
        for call in message.get("tool_calls", ())
    ]
    spoken = [Block("reasoning", message.get("reasoning_content", "")), Block("text", as_said(message))]
    return [*(block for block in spoken if block.text), *calls]


class GrowingBlocks:
    """The blocks of an answer that is being written.

    Attributes:
      blocks: so far.
    """

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self._open = False

    def update(self, update: Update) -> Iterator[Step]:
        """What a token does to them."""
        for call in update.calls:
            if call.name is None:
                yield from self._grow(call.arguments)
        for kind, text in update.pieces:
            if kind in _KINDS:
                yield from self._add(_KINDS[kind], text)
        for call in update.calls:
            if call.name is not None:
                yield from self._begin(Block("call", id=call.id, name=call.name))
                yield from self._grow(call.arguments)
        if update.choice.finish:
            message = update.choice.reply.message()
            if message.get("unparsed_tool_calls"):  # is a part of what was said, and read as such when it comes back
                yield from self._add("text", as_said(message).removeprefix(message["content"]))
            yield from self._end()

    def _add(self, kind: Kind, text: str) -> Iterator[Step]:
        if not text:
            return
        if not self._open or self.blocks[-1].kind != kind:
            yield from self._begin(Block(kind))
        yield from self._grow(text)

    def _begin(self, block: Block) -> Iterator[Step]:
        yield from self._end()
        self.blocks.append(block)
        self._open = True
        yield Step("begin", len(self.blocks) - 1, block)

    def _grow(self, text: str) -> Iterator[Step]:
        if text:
            self.blocks[-1].text += text
            yield Step("add", len(self.blocks) - 1, self.blocks[-1], text)

    def _end(self) -> Iterator[Step]:
        if self._open:
            self._open = False
            yield Step("end", len(self.blocks) - 1, self.blocks[-1])
