"""The chat format: messages to prompt text, and the model's text back to a message.

`encode` writes a conversation as the release does, byte for byte, and `encode_pieces` says whose each part is. `parse`
reads a finished reply, strictly; `StreamSplitter` sorts a reply into reasoning, content and tool calls while it is
still being generated, leniently, and `CallStream` follows the calls.
"""

from v4_jax.chat.call_stream import CallDelta, CallStream
from v4_jax.chat.efforts import (
    MODES,
    PROFILES,
    REASONING_EFFORTS,
    ChatMode,
    EffortProfile,
    Mode,
    effort_prefix,
    read_profile,
)
from v4_jax.chat.encoding import EncodeError, Piece, begin_tool_call, encode, encode_pieces, open_answer
from v4_jax.chat.parsing import ParseError, StreamSplitter, parse, parse_tool_calls
from v4_jax.chat.protocol import BOS, EOS, TASK_TOKENS, THINK_CLOSE, THINKING_MODES
from v4_jax.chat.recovery import ToolCalls, read_tool_calls

TASKS = tuple(TASK_TOKENS)

__all__ = [
    "BOS",
    "EOS",
    "MODES",
    "PROFILES",
    "REASONING_EFFORTS",
    "TASKS",
    "THINKING_MODES",
    "THINK_CLOSE",
    "CallDelta",
    "CallStream",
    "ChatMode",
    "EffortProfile",
    "EncodeError",
    "Mode",
    "ParseError",
    "Piece",
    "StreamSplitter",
    "ToolCalls",
    "begin_tool_call",
    "effort_prefix",
    "encode",
    "encode_pieces",
    "open_answer",
    "parse",
    "parse_tool_calls",
    "read_profile",
    "read_tool_calls",
]
