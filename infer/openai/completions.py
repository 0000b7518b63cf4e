"""Completions: what a body asks for, as requests to the engine, and its tokens as choices that grow.

How they are written is an API's business: `answers`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from v4_jax import chat
from v4_jax.chat import Mode
from v4_jax.config import Config
from v4_jax.infer.checks import check_ids, check_samples
from v4_jax.infer.engine.grammar import Grammar, Grammars
from v4_jax.infer.engine.requests import NOT_FINITE, Event, Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.speculative import Acceptance
from v4_jax.infer.openai.bodies import Body, BodyError, ChatBody, CompletionBody, SchemaFormat
from v4_jax.infer.prompts import Prompt, chat_prompt, plain_prompt
from v4_jax.infer.text import CallPiece, Piece, Reply, Sample
from v4_jax.tokenizer import Tokenizer


class Defaults(NamedTuple):
    """What a body leaves open.

    Attributes:
      sampling: how to sample.
      stop_ids: tokens that end an answer.
      max_tokens: most tokens to generate.
      mode: how a chat is answered.
      profile: what the model takes its reasoning efforts for.
    """

    sampling: Sampling
    stop_ids: tuple[int, ...]
    max_tokens: int
    mode: Mode = "non-think"
    profile: chat.EffortProfile = "preview"


@dataclasses.dataclass(frozen=True)
class Model:
    """What bodies are for.

    Attributes:
      name: what clients call it.
      config: the architecture.
      tokenizer: of the model.
      defaults: what bodies leave open.
      max_length: tokens (prompt and answer) that there is room for; a body that does not say how long its answer may
        get gets what is left.
      slots: most answers to one body; None while that is not known.
    """

    name: str
    config: Config
    tokenizer: Tokenizer
    defaults: Defaults
    max_length: int
    slots: int | None = None

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Compiles what answers must keep to; made when first asked for."""
        return Grammars(self.tokenizer)

    @functools.cached_property
    def reasoning_end(self) -> tuple[int, ...]:
        """Tokens that end the reasoning."""
        return tuple(self.tokenizer.encode(chat.THINK_CLOSE))


class Update(NamedTuple):
    """What a token adds.

    Attributes:
      number: of the choice that it continues.
      choice: that one.
      event: the token.
      pieces: the text that it makes certain.
      calls: what it adds to calls of tools.
    """

    number: int
    choice: Sample
    event: Event
    pieces: list[Piece]
    calls: list[CallPiece]


class Completion:
    """One body on its way to its answer.

    Args:
      body: what is asked.
      model: who is asked.
      seed: of its random numbers, where the body has none.
      salt: shares the prefix cache with requests of the same salt.

    Attributes:
      body: as given.
      model: as given.
      created: when, in seconds since 1970.
      requests: for the engine, one for each prompt; a chat has one.
      choices: the answers, as many to each prompt as were asked for.

    Raises:
      ValueError: the body cannot be served: the chat format cannot express its messages, a token id is illegal, a
        schema is not understood.
    """

    def __init__(self, body: ChatBody | CompletionBody, model: Model, seed: int, salt: bytes = b"") -> None:
        self._each = body.n or 1  # choices of a prompt
        if model.slots is not None:
            check_samples(self._each, model.slots)
        self.body, self.model = body, model
        self.requests: list[Request] = []
        self.choices: list[Sample] = []
        one_call = isinstance(body, ChatBody) and body.parallel_tool_calls is False
        self._echoes_first: list[bool] = []  # of each prompt, whether its first token is a part of the answer
        for number, prompt in enumerate(_encode_prompts(body, model)):
            check_ids(prompt.ids, model.config)
            request = self._request(prompt, (seed + number * self._each) % 2**32, salt)
            # The next turn of a conversation has another prompt; the same line of a job, run again, has the same calls.
            ids = np.asarray(prompt.ids, "<i4").tobytes()
            origin = hashlib.sha256(ids + b"%d" % request.sampling.seed).digest()
            stops = request.stops(model.config)
            self.requests.append(request)
            self._echoes_first.append(request.echo and not prompt.begun)
            self.choices += [
                Sample(
                    Reply(model.tokenizer, body.stops, prompt.thinking_mode, origin + b"/%d" % sample, one_call),
                    stops,
                    echoed=len(prompt.ids) - 1 if request.echo else 0,
                )
                for sample in range(self._each)
            ]
        self._cached: dict[int, int] = {}  # by prompt
        self._drafts: dict[int, tuple[Acceptance, ...]] = {}  # by choice
        self.created = int(time.time())

    def _request(self, prompt: Prompt, seed: int, salt: bytes) -> Request:
        body, model = self.body, self.model
        defaults = model.defaults
        thinks, budget = prompt.thinking_mode == "thinking", None
        if thinks and isinstance(body, ChatBody) and body.thinking:
            budget = body.thinking.budget_tokens
        room = model.max_length - len(prompt.ids)
        if body.limit == 0 and len(prompt.ids) == 1:
            raise BodyError(
                "max_tokens is 0 and the prompt one token, before which nothing stands; expected more", "prompt"
            )
        return Request(
            prompt.ids,
            max_tokens=max(1, min(defaults.max_tokens, room)) if body.limit is None else body.limit,
            sampling=_sampling(body, dataclasses.replace(defaults.sampling, seed=seed)),
            stop_ids=defaults.stop_ids,
            n=self._each,
            top_logprobs=body.alternatives,
            constraint=_constraint(body, model),
            reasoning_end=model.reasoning_end if thinks else (),
            reasoning_budget=budget,
            opening=prompt.opening,
            salt=salt,
            echo=isinstance(body, CompletionBody) and bool(body.echo),
        )

    @property
    def done(self) -> bool:
        """Whether all choices have ended."""
        return all(choice.finish for choice in self.choices)

    @property
    def failure(self) -> str | None:
        """Why there is no answer; None if there is one, or may be one yet."""
        return NOT_FINITE if any(choice.finish == "error" for choice in self.choices) else None

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts, all together."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def cached(self) -> int:
        """Tokens of the prompts that were in the prefix cache."""
        return sum(self._cached.values())

    @property
    def new_tokens(self) -> int:
        """Tokens generated so far, all choices together."""
        return sum(choice.new_tokens for choice in self.choices)

    def first_echoed(self, number: int) -> int | None:
        """The first token of a choice's prompt, which has no log-probability, if its answer begins with it."""
        prompt = number // self._each
        return self.requests[prompt].prompt[0] if self._echoes_first[prompt] else None

    @property
    def reasoning_tokens(self) -> int:
        """Of the tokens generated so far, those of the reasoning."""
        return sum(choice.reasoning_tokens for choice in self.choices)

    def push(self, event: Event) -> Update:
        """Takes a token, whose `event.request` numbers the prompts."""
        index = event.request * self._each + event.sample
        choice = self.choices[index]
        self._cached[event.request] = event.cached
        self._drafts[index] = event.drafts
        pieces: list[Piece] = []
        if not choice.events and (first := self.first_echoed(index)) is not None:
            pieces += choice.reply.echo(first)
        pieces += choice.push(event)
        return Update(index, choice, event, pieces, choice.reply.take_calls(final=choice.finish is not None))

    def drafts(self) -> list[Acceptance]:
        """How the drafts of all choices fared, by depth."""
        places = list(zip(*self._drafts.values(), strict=True))
        return [Acceptance(sum(a.offered for a in place), sum(a.accepted for a in place)) for place in places]

    def finish_reason(self, choice: Sample) -> str | None:
        """Why a choice ended, in OpenAI's words; None if it has not."""
        return "tool_calls" if choice.finish == "stop" and "tool_calls" in choice.reply.message() else choice.finish

    def token_name(self, id: int) -> str:
        """A token's text; of a part of a character its bytes, as OpenAI writes them, so that no two look alike."""
        spelled = self.model.tokenizer.token_bytes(id)
        if spelled is None:
            return f"token_id:{id}"
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def _encode_prompts(body: ChatBody | CompletionBody, model: Model) -> Iterator[Prompt]:
    if isinstance(body, ChatBody):
        yield _encode_chat(body, model)
        return
    for prompt in body.prompts:
        if not prompt:
            raise BodyError("prompt is empty; expected some text", "prompt")
        yield plain_prompt(model.tokenizer, prompt) if isinstance(prompt, str) else Prompt(prompt)


def _encode_chat(body: ChatBody, model: Model) -> Prompt:
    forced, tool = body.call()
    format = body.response_format
    # A model that has begun to write a call goes on with it.
    opening = model.tokenizer.encode(chat.begin_tool_call(tool)) if forced else ()
    template = body.chat_template_kwargs
    options = {} if template is None or template.drop_thinking is None else {"drop_thinking": template.drop_thinking}
    return chat_prompt(
        model.tokenizer,
        body.messages,
        body.mode(model.defaults.mode),
        profile=body.profile(model.defaults.profile),
        opening=opening,
        tools=None if body.tool_choice == "none" else body.tools,
        response_format=format.json_schema.schema_ if isinstance(format, SchemaFormat) else None,
        continues=body.continue_final_message,
        **options,
    )


def _constraint(body: Body, model: Model) -> Grammar | None:
    """What the answer must keep to."""
    if not isinstance(body, ChatBody) or body.response_format is None or body.response_format.type == "text":
        return None
    if body.tools and body.tool_choice != "none":
        raise BodyError(
            f"response_format {body.response_format.type!r} leaves no room for a call of tools; expected one of both, "
            "or tool_choice 'none'",
            "response_format",
        )
    if isinstance(body.response_format, SchemaFormat):
        return model.grammars.json_schema(body.response_format.json_schema.schema_)
    return model.grammars.json_object()


def _sampling(body: Body, fallback: Sampling) -> Sampling:
    """The body's parameters, the fallback's where it has none."""
    names = (field.name for field in dataclasses.fields(Sampling))
    asked = {name: value for name in names if (value := getattr(body, name)) is not None}
    if body.logit_bias is not None:
        asked["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return dataclasses.replace(fallback, **asked)
