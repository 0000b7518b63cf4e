"""The wire format's constants, read once from `protocol_strings.json`.

That data file is the only place where a special token or a template of the release's encoding is spelled; encoder,
parser, tokenizer and tests all take them from here. Templates keep their `{fields}`: the encoder fills them in, and
the parser reads the text between the fields, so the two cannot drift apart.
"""

import json
import string
from importlib import resources

_STRINGS = json.loads(resources.files(__package__).joinpath("protocol_strings.json").read_text(encoding="utf-8"))

BOS: str = _STRINGS["bos"]
EOS: str = _STRINGS["eos"]
PAD: str = _STRINGS["pad"]
THINK_OPEN: str = _STRINGS["think_open"]
THINK_CLOSE: str = _STRINGS["think_close"]
USER: str = _STRINGS["user"]
ASSISTANT: str = _STRINGS["assistant"]
LATEST_REMINDER: str = _STRINGS["latest_reminder"]
DSML: str = _STRINGS["dsml"]
TASK_TOKENS: dict[str, str] = _STRINGS["task_tokens"]

# Everything that only the format itself may write. None of these is ever part of what a speaker says.
SPECIAL_TOKENS: tuple[str, ...] = (
    BOS, EOS, PAD, USER, ASSISTANT, THINK_OPEN, THINK_CLOSE, DSML, LATEST_REMINDER, *TASK_TOKENS.values()
)  # fmt: skip

REASONING_EFFORT_MAX: str = _STRINGS["reasoning_effort_max"]
REASONING_EFFORT_OFFICIAL_MAX: str = _STRINGS["reasoning_effort_official_max"]
RESPONSE_FORMAT: str = _STRINGS["response_format"]  # {schema}
TOOL_RESULT: str = _STRINGS["tool_result"]  # {content}
UNSUPPORTED_PART: str = _STRINGS["unsupported_part"]  # {type}
SEPARATOR: str = _STRINGS["separator"]  # the blank line between the parts of one turn

THINKING_MODES = ("chat", "thinking")


def _fill(template: str, **values: str) -> str:
    """Fills some fields of a template and leaves the others as fields."""
    for name, value in values.items():
        template = template.replace("{" + name + "}", value)
    return template


def literals(template: str) -> tuple[str, ...]:
    """Returns the fixed text before, between and after the fields of a template."""
    return tuple(text for text, *_ in string.Formatter().parse(template))


TOOLS_BLOCK = _fill(  # {tool_schemas}
    _STRINGS["tools_block"], dsml_token=DSML, thinking_start_token=THINK_OPEN, thinking_end_token=THINK_CLOSE
)
TOOL_CALLS = _fill(_STRINGS["tool_calls"], dsml_token=DSML)  # {calls}
INVOKE = _fill(_STRINGS["invoke"], dsml_token=DSML)  # {name} {parameters}
PARAMETER = _fill(_STRINGS["parameter"], dsml_token=DSML)  # {name} {is_string} {value}


def legal(values: object) -> str:
    """Writes legal alternatives for an error message: `'chat', 'thinking'`."""
    return ", ".join(map(repr, values))  # type: ignore[call-overload]


def check_thinking_mode(thinking_mode: str) -> None:
    """Raises ValueError unless `thinking_mode` is one of `THINKING_MODES`."""
    if thinking_mode not in THINKING_MODES:
        raise ValueError(f"unknown thinking_mode {thinking_mode!r}; legal modes are {legal(THINKING_MODES)}")
