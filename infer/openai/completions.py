"""Completions in OpenAI's form: what a body asks for, as a request to the engine, and its tokens as the answer.

An answer has its reasoning apart, as `reasoning_content`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from v4_jax import chat
from v4_jax.config import Config
from v4_jax.infer.checks import check_ids, check_samples
from v4_jax.infer.engine.grammar import Grammar, Grammars
from v4_jax.infer.engine.requests import NOT_FINITE, Event, Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.speculative import Acceptance
from v4_jax.infer.openai.bodies import Body, BodyError, ChatBody, CompletionBody, SchemaFormat
from v4_jax.infer.prompts import Mode, Prompt, chat_prompt, plain_ids
from v4_jax.infer.text import Piece, Reply, Sample
from v4_jax.tokenizer import Tokenizer

_STREAMED = {"content": "content", "reasoning": "reasoning_content"}  # kinds of text that come as they are written


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
    """

    number: int
    choice: Sample
    event: Event
    pieces: list[Piece]


class Completion:
    """One body on its way to its answer.

    Args:
      body: what is asked.
      model: who is asked.
      seed: of its random numbers, where the body has none.
      salt: shares the prefix cache with requests of the same salt.

    Attributes:
      body: as given.
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
        self.body, self._model = body, model
        self.requests: list[Request] = []
        self.choices: list[Sample] = []
        for number, prompt in enumerate(_encode_prompts(body, model)):
            request = self._request(prompt, (seed + number * self._each) % 2**32, salt)
            # The next turn of a conversation has another prompt; the same line of a job, run again, has the same calls.
            ids = np.asarray(prompt.ids, "<i4").tobytes()
            origin = hashlib.sha256(ids + b"%d" % request.sampling.seed).digest()
            stops = request.stops(model.config)
            self.requests.append(request)
            self.choices += [
                Sample(Reply(model.tokenizer, body.stops, prompt.thinking_mode, origin + b"/%d" % sample), stops)
                for sample in range(self._each)
            ]
        self._cached: dict[int, int] = {}  # by prompt
        self._drafts: dict[int, tuple[Acceptance, ...]] = {}  # by choice
        self._created = int(time.time())

    def _request(self, prompt: Prompt, seed: int, salt: bytes) -> Request:
        body, model = self.body, self._model
        defaults = model.defaults
        check_ids(prompt.ids, model.config)
        thinks, budget = prompt.thinking_mode == "thinking", None
        if thinks and isinstance(body, ChatBody) and body.thinking:
            budget = body.thinking.budget_tokens
        room = model.max_length - len(prompt.ids)
        return Request(
            prompt.ids,
            max_tokens=body.limit or max(1, min(defaults.max_tokens, room)),
            sampling=_sampling(body, dataclasses.replace(defaults.sampling, seed=seed)),
            stop_ids=defaults.stop_ids,
            n=self._each,
            top_logprobs=body.alternatives,
            constraint=_constraint(body, model),
            reasoning_end=model.reasoning_end if thinks else (),
            reasoning_budget=budget,
            opening=prompt.opening,
            salt=salt,
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
        return sum(len(choice.events) for choice in self.choices)

    def push(self, event: Event) -> Update:
        """Takes a token, whose `event.request` numbers the prompts."""
        index = event.request * self._each + event.sample
        choice = self.choices[index]
        self._cached[event.request] = event.cached
        self._drafts[index] = event.drafts
        return Update(index, choice, event, choice.push(event))

    # ---- the answer --------------------------------------------------------------------------------------------------

    def answer(self, name: str) -> dict[str, Any]:
        """The completion object of this id, "chat.completion" or "text_completion"."""
        kind = "chat.completion" if isinstance(self.body, ChatBody) else "text_completion"
        choices = [self._answer(index, choice) for index, choice in enumerate(self.choices)]
        return self.envelope(name, kind) | {"choices": choices, "usage": self.usage()}

    def chunk(self, update: Update) -> dict[str, Any] | None:
        """What a stream says about a token: a choice of a chunk.

        None while there is nothing to say. Tool calls come whole, when all of them are certain.
        """
        choice = update.choice
        said: dict[str, Any] = {}
        for kind, text in update.pieces:
            if text and (name := _STREAMED.get(kind)):
                said[name] = said.get(name, "") + text
        finish = None
        if choice.finish:
            finish, written = self._ended(choice)
            if "tool_calls" in written:
                said["tool_calls"] = [{"index": i, **call} for i, call in enumerate(written["tool_calls"])]
            if "unparsed_tool_calls" in written:
                said["unparsed_tool_calls"] = written["unparsed_tool_calls"]
        logprobs = self._logprobs([update.event])
        if not (said or finish or logprobs):
            return None
        common = {"index": update.number, "finish_reason": finish, "logprobs": logprobs}
        if isinstance(self.body, ChatBody):
            return common | {"delta": said}
        return common | {"text": said.get("content", "")}

    def envelope(self, name: str, kind: str) -> dict[str, Any]:
        """What objects about this completion have in common."""
        return {"id": name, "object": kind, "created": self._created, "model": self._model.name}

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated; what of the prompt was cached, as DeepSeek and OpenAI say it; how drafts fared."""
        prompt, places = self.prompt_tokens, list(zip(*self._drafts.values(), strict=True))
        offered = [sum(one.offered for one in place) for place in places]
        accepted = [sum(one.accepted for one in place) for place in places]
        return {
            "prompt_tokens": prompt,
            "completion_tokens": self.new_tokens,
            "total_tokens": prompt + self.new_tokens,
            "prompt_cache_hit_tokens": self.cached,
            "prompt_cache_miss_tokens": prompt - self.cached,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {
                "accepted_prediction_tokens": sum(accepted),
                "rejected_prediction_tokens": sum(offered) - sum(accepted),
                "drafts_by_position": [{"offered": a, "accepted": b} for a, b in zip(offered, accepted, strict=True)],
            },
        }

    def _answer(self, index: int, choice: Sample) -> dict[str, Any]:
        finish, written = self._ended(choice)
        common = {"index": index, "finish_reason": finish, "logprobs": self._logprobs(choice.events)}
        if isinstance(self.body, ChatBody):
            return common | {"message": {"role": "assistant", **written}}
        return common | {"text": written["content"]}

    def _ended(self, choice: Sample) -> tuple[str | None, dict[str, Any]]:
        """Why a choice ended, in OpenAI's words, and what it wrote."""
        written = choice.reply.message()
        calls_tools = choice.finish == "stop" and "tool_calls" in written
        return "tool_calls" if calls_tools else choice.finish, written

    def _logprobs(self, events: Sequence[Event]) -> dict[str, Any] | None:
        """Log-probabilities of tokens, in the form of the body's kind; None if they are not asked for."""
        if not self.body.wants_logprobs:
            return None
        if isinstance(self.body, ChatBody):
            content = []
            for event in events:
                others = [self._token(*other) for other in event.alternatives]
                content.append(self._token(event.id, event.logprob) | {"top_logprobs": others})
            return {"content": content}
        found: dict[str, Any] = {
            "tokens": [self._name(event.id) for event in events],
            "token_logprobs": [event.logprob for event in events],
        }
        if self.body.alternatives:
            found["top_logprobs"] = [{self._name(id): value for id, value in event.alternatives} for event in events]
        return found

    def _name(self, id: int) -> str:
        """A token's text; of a part of a character its bytes, as OpenAI writes them, so that no two look alike."""
        spelled = self._model.tokenizer.token_bytes(id)
        if spelled is None:
            return f"token_id:{id}"
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _token(self, id: int, logprob: float) -> dict[str, Any]:
        spelled = self._model.tokenizer.token_bytes(id)
        return {"token": self._name(id), "logprob": logprob, "bytes": None if spelled is None else list(spelled)}


def _encode_prompts(body: ChatBody | CompletionBody, model: Model) -> Iterator[Prompt]:
    if isinstance(body, ChatBody):
        yield _encode_chat(body, model)
        return
    for prompt in body.prompts:
        if not prompt:
            raise BodyError("prompt is empty; expected some text", "prompt")
        yield Prompt(plain_ids(model.tokenizer, prompt) if isinstance(prompt, str) else prompt)


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
