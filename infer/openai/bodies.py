"""Bodies of requests in OpenAI's form, checked: what may be asked of a model, field by field.

Fields that are not known, and values that this package does not honour, are refused: nothing that would change an
answer is silently left out of a request. Fields that change none (who asks, what it is for, how it is billed) are
taken. Beyond OpenAI's fields, `top_k`, `min_p` and `repetition_penalty` are understood, DeepSeek's `thinking`, the part
of `chat_template_kwargs` that is about thinking, and `effort_profile`, which overrides what the model's directory says
about its reasoning efforts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from v4_jax.chat import EffortProfile, Mode
from v4_jax.infer.conversation import says_something
from v4_jax.infer.engine.sampling import MOST_ALTERNATIVES, MOST_BIASES

# The model was trained for three efforts; OpenAI's others mean the nearest one below, as other servers have it.
EFFORTS: dict[str, Mode] = {
    "none": "non-think",
    "minimal": "low",
    "low": "low",
    "medium": "low",
    "high": "high",
    "xhigh": "max",
    "max": "max",
}
T = TypeVar("T")
B = TypeVar("B", bound="Strict")
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]

MOST_STOPS = 16  # stop strings of a request
MOST_SAMPLES = 1024  # answers to a request; to each of its prompts at most as many as an engine has slots
MOST_MESSAGES = 100_000


class BodyError(ValueError):
    """A body that cannot be served. The message is one sentence.

    Attributes:
      param: the field at fault, None for the body as a whole.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class Strict(BaseModel):
    """Fields of their very types, and no others."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Strict):
    """What a stream brings beside the text."""

    include_usage: bool = False
    include_obfuscation: bool | None = None  # padding against who listens, of which there is none


class TextFormat(Strict):
    """An answer of any form."""

    type: Literal["text"]


class ObjectFormat(Strict):
    """A JSON object."""

    type: Literal["json_object"]


class Schema(Strict):
    """A JSON schema with a name."""

    name: str
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    """What a JSON schema allows."""

    type: Literal["json_schema"]
    json_schema: Schema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class FunctionName(Strict):
    """Which function."""

    name: str


class FunctionChoice(Strict):
    """The function that is to be called."""

    type: Literal["function"]
    function: FunctionName


class Thinking(Strict):
    """Whether the model reasons before it answers, in DeepSeek's form, and for how many tokens at most."""

    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = Field(None, ge=0)


class TemplateOptions(Strict):
    """What other servers hand on to a chat template; of it, what is about thinking."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    thinking_mode: Literal["chat", "thinking"] | None = None
    reasoning_effort: Effort | None = None
    effort_profile: EffortProfile | None = None
    drop_thinking: bool | None = None


Seed = Annotated[int, Field(ge=-1, lt=2**32), AfterValidator(lambda seed: None if seed == -1 else seed)]
TopK = Annotated[int, Field(ge=-1, lt=2**31), AfterValidator(lambda count: max(count, 0))]  # -1 is off, too
TokenId = Annotated[int, Field(ge=0)]
Tokens = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Annotated[list[T], Field(min_length=1, max_length=MOST_SAMPLES)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]


class Body(Strict):
    """What both kinds of bodies may hold; None means the model's default."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: TopK | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    seed: Seed | None = None
    repetition_penalty: float | None = Field(None, gt=0, le=1e6)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[TokenName, Bias] | None = Field(None, max_length=MOST_BIASES)
    stop: str | Annotated[list[str], Field(max_length=MOST_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=MOST_SAMPLES)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # Taken, and without any effect on an answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens to generate."""
        return self.max_tokens

    @property
    def stops(self) -> list[str]:
        """Strings that end an answer; an empty one ends none."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or ()) if stop]


class CompletionBody(Body):
    """A text to continue, or its token ids, which are taken as they are; or a list of texts or of lists of ids."""

    prompt: str | Tokens | Prompts[str] | Prompts[Tokens]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)
    echo: bool | None = None
    suffix: str | None = None
    best_of: int | None = Field(None, ge=1, le=MOST_SAMPLES)

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """What is to be continued, one by one."""
        if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int):
            return self.prompt  # type: ignore[return-value]
        return [self.prompt]  # type: ignore[list-item]

    @property
    def wants_logprobs(self) -> bool:
        """Whether the tokens' log-probabilities are asked for."""
        return self.logprobs is not None

    @property
    def alternatives(self) -> int:
        """Most probable tokens to report at each position."""
        return self.logprobs or 0


class ChatBody(Body):
    """A conversation to answer."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=MOST_MESSAGES)
    continue_final_message: bool | None = None
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None
    reasoning_effort: Effort | None = None
    thinking: Thinking | None = None
    effort_profile: EffortProfile | None = None
    chat_template_kwargs: TemplateOptions | None = None
    verbosity: Literal["low", "medium", "high"] | None = None  # without any effect
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_ALTERNATIVES)

    @property
    def limit(self) -> int | None:
        """Most tokens to generate."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        """Whether the tokens' log-probabilities are asked for."""
        return bool(self.logprobs)

    @property
    def alternatives(self) -> int:
        """Most probable tokens to report at each position."""
        return (self.top_logprobs or 0) if self.logprobs else 0

    def call(self) -> tuple[bool, str | None]:
        """Whether the answer must be a tool call, and of which tool; None leaves it to the model.

        Raises:
          BodyError: there is no such tool.
        """
        if self.tool_choice in (None, "auto", "none"):
            return False, None
        functions = [tool.get("function") for tool in self.tools or ()]
        names = [function.get("name") for function in functions if isinstance(function, dict)]
        wanted = self.tool_choice.function.name if isinstance(self.tool_choice, FunctionChoice) else None
        if not names or wanted not in (None, *names):
            what = "a tool" if wanted is None else repr(wanted)
            raise BodyError(f"tool_choice asks for {what}; the tools are {names}", "tool_choice")
        return True, wanted

    def mode(self, default: Mode) -> Mode:
        """How to answer: without thinking where that is said, else by the effort, else by the default."""
        thinks, effort = self._thinks(), self._effort()
        if thinks is False:
            return "non-think"
        if effort is not None:
            return EFFORTS[effort]
        return "low" if thinks and default == "non-think" else default  # which is to say nothing

    def profile(self, default: EffortProfile) -> EffortProfile:
        """What the model takes its reasoning efforts for."""
        return _agreed(self._said("effort_profile")) or default

    def check_thinking(self) -> None:
        """Checks that all who say something of thinking say the same.

        Raises:
          BodyError: they do not.
        """
        self._thinks()
        self._effort()
        self.profile("preview")

    def _thinks(self) -> bool | None:
        template = self.chat_template_kwargs or TemplateOptions()
        said = {f"chat_template_kwargs.{name}": getattr(template, name) for name in ("thinking", "enable_thinking")}
        said["chat_template_kwargs.thinking_mode"] = template.thinking_mode and template.thinking_mode == "thinking"
        said["thinking"] = self.thinking and self.thinking.type == "enabled"
        return _agreed(said)

    def _effort(self) -> Effort | None:
        return _agreed(self._said("reasoning_effort"))

    def _said(self, name: str) -> dict[str, Any]:
        """What the body and its template's options say in a field that both have."""
        return {
            name: getattr(self, name),
            f"chat_template_kwargs.{name}": getattr(self.chat_template_kwargs, name, None),
        }


def _agreed(said: Mapping[str, Any]) -> Any:
    """What fields say that may say the same, by name; None if they say nothing.

    Raises:
      BodyError: they do not agree.
    """
    given = {name: value for name, value in said.items() if value is not None}
    if len(set(given.values())) > 1:
        differing = " and ".join(f"{name} ({value!r})" for name, value in given.items())
        raise BodyError(f"{differing} do not agree; expected one of them", next(iter(given)))
    return next(iter(given.values()), None)


def read_body(content: Any, *, chat: bool | None = None) -> ChatBody | CompletionBody:
    """Checks a parsed JSON body.

    Args:
      content: the body.
      chat: which kind it must be; None takes it by what it holds, "messages" or "prompt".

    Raises:
      BodyError: it is not legal; the sentence says which field, what was found and what is expected.
    """
    if not isinstance(content, dict):
        raise BodyError(f'the body is a {type(content).__name__}; expected an object with "messages" or "prompt"')
    if chat is None:
        chat = "messages" in content
        if not chat and "prompt" not in content:
            raise BodyError('the body has neither "messages" nor "prompt"; expected one of them')
    body: ChatBody | CompletionBody = validated(ChatBody, content) if chat else validated(CompletionBody, content)
    _check_together(body)
    return body


def validated(kind: type[B], content: Any) -> B:
    """A parsed JSON body, its fields each by itself.

    Raises:
      BodyError: one is not legal.
    """
    if not isinstance(content, dict):
        raise BodyError(f"the body is a {type(content).__name__}; expected an object")
    try:
        return kind.model_validate(content)
    except pydantic.ValidationError as error:
        raise _explained(error, content, kind) from None


def check_known(item: Mapping[str, Any], known: Sequence[str], where: str, hints: Sequence[str] = ()) -> None:
    """Checks that a part of a body, of which the type is known, holds nothing else, unless it is empty.

    Args:
      item: the part.
      known: fields that say something.
      where: its place in the body.
      hints: fields that may be there and change no answer.

    Raises:
      BodyError: a field is neither.
    """
    for key, value in item.items():
        if key not in ("type", *hints, *known) and says_something(value):
            raise BodyError(
                f"{where}.{key:.80} is not supported; legal fields are {', '.join(known)}", f"{where}.{key:.80}"
            )


def _check_together(body: ChatBody | CompletionBody) -> None:
    """Refuses fields that mean nothing without another."""
    if body.stream_options is not None and not body.stream:
        raise BodyError("stream_options is for streams; expected stream true beside it", "stream_options")
    if isinstance(body, ChatBody):
        if body.top_logprobs and not body.logprobs:
            raise BodyError("top_logprobs is for log-probabilities; expected logprobs true beside it", "top_logprobs")
        body.check_thinking()
        return
    if body.max_tokens == 0 and not body.echo:
        raise BodyError("max_tokens is 0; expected at least 1, or echo true beside it", "max_tokens")
    if body.suffix:
        raise BodyError(
            "suffix is not supported: this model continues texts and fills no gaps; expected null", "suffix"
        )
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise BodyError(
            f"best_of is {body.best_of} and n {body.n or 1}; all answers are returned, expected best_of to be n",
            "best_of",
        )
    if len(body.prompts) * (body.n or 1) > MOST_SAMPLES:
        raise BodyError(
            f"prompt has {len(body.prompts)} texts and n is {body.n}; expected at most {MOST_SAMPLES} answers", "prompt"
        )


def _explained(error: pydantic.ValidationError, content: dict[str, Any], kind: type[Strict]) -> BodyError:
    """The first thing that is wrong, as a sentence."""
    first = error.errors(include_url=False)[0]
    # Where a field may be of several types, pydantic tries each and puts its name into the path.
    path: list[str] = []
    value: Any = content
    for depth, key in enumerate(first["loc"], 1):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            if first["type"] in ("missing", "extra_forbidden") and depth == len(first["loc"]):
                path.append(str(key))
            continue
        path.append(str(key))
    where = ".".join(path)
    if first["type"] == "missing":
        return BodyError(f"{where} is missing; it is needed", where)
    if first["type"] == "extra_forbidden":
        legal = f"; legal fields are {', '.join(sorted(kind.model_fields))}" if len(path) == 1 else ""
        return BodyError(f"{where} is not supported{legal}", where)
    reasons = [one["msg"] for one in error.errors(include_url=False) if one["loc"][:1] == first["loc"][:1]]
    reason = " or ".join(dict.fromkeys(reason[0].lower() + reason[1:] for reason in reasons))
    shown = repr(first["input"])
    return BodyError(f"{where} is {shown if len(shown) <= 80 else shown[:77] + '...'}: {reason}", where)
