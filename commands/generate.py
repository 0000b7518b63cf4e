"""`v4-jax generate`: one prompt or one chat, streamed to the terminal."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax

from v4_jax.chat import EffortProfile, Mode
from v4_jax.commands.shared.chat_files import read_chat
from v4_jax.commands.shared.console import CommandError, bad_input, check_output, read_text, say
from v4_jax.commands.shared.contexts import DEFAULT_MAX_TOKENS, check_length, check_mode, room
from v4_jax.commands.shared.devices import join, place
from v4_jax.commands.shared.models import ModelDirectory, cache_format
from v4_jax.commands.shared.options import (
    CacheFormat,
    ChatFile,
    Count,
    Draft,
    Dtype,
    Flag,
    Int,
    JsonFlag,
    Model,
    OptionalFile,
    OptionalSize,
    OptionalText,
    Profile,
    Texts,
)
from v4_jax.commands.shared.profiling import check_profile, profiled
from v4_jax.commands.shared.reply import Writer
from v4_jax.commands.shared.sampling import SamplingOptions
from v4_jax.commands.shared.sizes import bytes_text
from v4_jax.commands.shared.streaming import Outcome, stream
from v4_jax.config import Config
from v4_jax.files import complete
from v4_jax.infer.checks import check_ids, check_precision
from v4_jax.infer.chunks import chunk_size
from v4_jax.infer.engine.drafters import choose_drafter
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.prompts import Prompt, chat_prompt, plain_ids
from v4_jax.infer.text import Reply
from v4_jax.policy import PolicyName
from v4_jax.sharding.axes import Preset
from v4_jax.tokenizer import Tokenizer


def generate(
    model: Model,
    *,
    prompt: OptionalText = None,
    prompt_file: OptionalFile = None,
    chat_file: ChatFile = None,
    tokens: OptionalText = None,
    raw: Flag = False,
    system: OptionalText = None,
    mode: Mode = "non-think",
    effort_profile: Profile = "auto",
    max_tokens: OptionalSize = None,
    context: OptionalSize = None,
    sampling: SamplingOptions = SamplingOptions(),  # noqa: B008 (frozen)
    seed: Int = 0,
    stop: Texts = (),
    dtype: Dtype = "native",
    policy: PolicyName = "bfloat16",
    cache_dtype: CacheFormat = "auto",
    prefill_chunk: Count = 512,
    draft: Draft = "none",
    mesh: OptionalText = None,
    preset: Preset = "long-context",
    distributed: Flag = False,
    show_reasoning: Flag = False,
    as_json: JsonFlag = False,
    output: OptionalFile = None,
    verbose: Flag = False,
    profile: OptionalFile = None,
) -> None:
    """Continues a prompt or answers a chat, writing the text as it comes.

    The text goes to stdout; speed and warnings go to stderr. On a terminal reasoning is dim and the answer is not;
    elsewhere only the answer is written, unless --show-reasoning asks for both under headings, or --json for an object
    with everything in it.

    Examples:
      v4-jax generate DeepSeek-V4-Flash --prompt "Why is the sky blue?" --mode high
      v4-jax generate DeepSeek-V4-Flash --chat messages.json --mode max --context 384K
      v4-jax generate DeepSeek-V4-Flash --mesh tensor=8 --prompt "Why is the sky blue?"
      cat essay.txt | v4-jax generate DeepSeek-V4-Flash-Base --raw --max-tokens 200 --temperature 0.7
      v4-jax generate DeepSeek-V4-Flash --tokens "0, 17, 42" --greedy --json

    Args:
      model: A directory with a released model, or one made by convert.
      prompt: The question, or with --raw the text to continue. Without --prompt, --prompt-file, --chat and
        --tokens it is read from stdin, less one newline at its end.
      prompt_file: A text file with the prompt, less one newline at its end.
      chat_file: A JSON file with a list of messages (role and content), or an object with "messages" and perhaps
        "tools" and "response_format"; - is stdin.
      tokens: Token ids to continue just as they are, such as "0, 17, 42".
      raw: Continue the prompt itself, after a begin-of-sentence token, without the chat format.
      system: What the model is told before a chat.
      mode: How a chat is answered: at once, or after reasoning with little, high or the most effort (which wants a
        context of 384K or more).
      effort_profile: What the model takes its reasoning efforts for: preview, official (Flash-0731, Pro-0813), or auto,
        which its own encoding says.
      max_tokens: Most tokens to generate. Default: what --context leaves, or 512 without it.
      context: Most tokens of prompt and reply together, such as 131072, 128K or 1M. Default: both fit.
      sampling: How tokens are chosen.
      seed: The same seed gives the same text.
      stop: End the reply before this text; may be given several times.
      dtype: How weights are held: as released, or expanded.
      policy: Precision of the computation; released is bfloat16 with the release's rounding of keys and values.
      cache_dtype: Number format of the cache; auto is the policy's.
      prefill_chunk: Prompt tokens read at once; with a mesh, rounded up to what splits evenly.
      draft: What guesses tokens ahead in every step: none; mtp:N, N tokens, up to 4, by the multi-token-prediction
        block; dspark; or auto, what the model has. The reply is that of none, sooner.
      mesh: How to spread the model over all devices: sizes of data, seq, expert and tensor, such as
        seq=4,expert=2; one, for one device; or auto, the best that fits, which is the default.
      preset: Which mesh axes split what; long-context splits long prompts over all axes but data.
      distributed: This is one of several processes, one per host, that run the same command together.
      show_reasoning: Write reasoning and answer under headings where stdout is not a terminal.
      as_json: Write one JSON object at the end: reply, token ids, log-probabilities, speed.
      output: A file to write in place of stdout; it appears when the reply is complete.
      profile: A directory for a trace of the first 64 chunks and steps, for XProf or Perfetto.
      verbose: Say on stderr what was loaded, what the model reads, and how it computes.
    """
    join(distributed)
    if output is not None:
        check_output(output)
    check_profile(profile)
    directory = ModelDirectory.open(model)
    config, tokenizer, defaults = directory.config, directory.tokenizer(), directory.generation_defaults()
    cache, efforts = cache_format(cache_dtype, policy), directory.effort_profile(effort_profile, mode)
    sources = Sources(prompt, prompt_file, chat_file, tokens)
    with bad_input():
        chosen = sampling.over(defaults, seed)
        check_precision(config, policy, cache)
        choose_drafter(config, draft)
        encoded = _encode_prompt(tokenizer, config, sources, raw, system, mode, efforts)
        limits = Limits.of(len(encoded.ids), max_tokens, context, config)
        reply = Reply(tokenizer, stop, encoded.thinking_mode, str(encoded.ids).encode())
    check_mode(mode if encoded.thinking_mode else None, limits.context, efforts)
    where = place(config, mesh, preset, batch=1, dtype=dtype, context=limits.allocated, cache=cache)
    started = time.perf_counter()
    params = directory.load(dtype, where)
    loaded = time.perf_counter() - started
    with bad_input():
        engine = Engine(
            config,
            params,
            slots=where.row_shards,
            max_length=limits.allocated,
            policy=policy,
            cache_dtype=cache,
            prefill_chunk=chunk_size(len(encoded.ids), prefill_chunk),
            draft=draft,
            place=where,
        )
    if verbose:
        size = sum(where.cache_shapes(config, where.row_shards, limits.allocated, cache).nbytes().values())
        count = where.mesh.size if where.mesh else 1
        say(
            f"model: {directory.path}, {config.num_hidden_layers} layers, {bytes_text(directory.checkpoint.nbytes)} in "
            f"{loaded:.1f} s, weights {dtype}\n"
            f"computation: {policy}, cache {cache} of {bytes_text(size)} for {limits.allocated} tokens, on {count} "
            f"{where.platform} device{'' if count == 1 else 's'}, draft {draft}\n"
            f"sampling: {', '.join(f'{name} {value}' for name, value in dataclasses.asdict(chosen).items() if value)}\n"
            f"prompt: {len(encoded.ids)} tokens, {tokenizer.decode(encoded.ids)!r}"
        )
    writer, shown = None, io.StringIO()
    file = sys.stdout if output is None else shown
    if not as_json:
        terminal = output is None and sys.stdout.isatty()
        writer = Writer(file, show_reasoning=terminal or show_reasoning, headings=show_reasoning)
    request = Request(encoded.ids, limits.max_tokens, chosen, defaults.stop_ids)
    with profiled(engine, profile):
        outcome = stream(engine, request, reply, writer)
    if as_json:
        print(json.dumps(_as_json(outcome, reply, encoded, chosen), ensure_ascii=False), file=file)
    else:
        say(outcome.summary())
    if output is not None and not jax.process_index():
        with bad_input(f"{output} cannot be written: "), complete(output) as working:
            working.write_text(shown.getvalue(), encoding="utf-8")


class Limits(NamedTuple):
    """How long things may get, in tokens.

    Attributes:
      max_tokens: to generate at most.
      context: of prompt and reply together at most.
      allocated: room in the cache: no more than can be used, rounded up so that similar prompts share programs.
    """

    max_tokens: int
    context: int
    allocated: int

    @classmethod
    def of(cls, prompt: int, max_tokens: int | None, context: int | None, config: Config) -> Limits:
        """Resolves what was given and what was not.

        Raises:
          CommandError: the context is longer than the model's, or the prompt leaves no room in it.
        """
        longest = config.max_position_embeddings
        if context is not None:
            check_length(config, context)
        if max_tokens is not None:
            check_length(config, max_tokens, "--max-tokens")
        if context is None:
            context = min(longest, prompt + (DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens))
        if prompt >= context:
            raise CommandError(f"the prompt has {prompt} tokens, which leaves no room in a context of {context}")
        max_tokens = context - prompt if max_tokens is None else min(max_tokens, context - prompt)
        return cls(max_tokens, context, room(prompt + max_tokens, longest))


class Sources(NamedTuple):
    """Where the prompt is: one of these, or stdin.

    Attributes:
      prompt: the text itself.
      prompt_file: a file with it.
      chat_file: a file with messages.
      tokens: token ids as text.
    """

    prompt: str | None
    prompt_file: Path | None
    chat_file: Path | None
    tokens: str | None


def _encode_prompt(
    tokenizer: Tokenizer,
    config: Config,
    sources: Sources,
    raw: bool,
    system: str | None,
    mode: Mode,
    profile: EffortProfile,
) -> Prompt:
    """The prompt from whichever option gives it, or from stdin."""
    options = ("--prompt", "--prompt-file", "--chat", "--tokens")
    names = [name for name, value in zip(options, sources, strict=True) if value is not None]
    if len(names) > 1:
        raise CommandError(f"{' and '.join(names)} both give a prompt; expected one of them")
    if raw and sources.chat_file is not None:
        raise CommandError("--raw is for plain text and --chat for messages; expected one of them")
    if system is not None and (raw or sources.tokens is not None):
        raise CommandError(f"--system is for chats, and {'--raw' if raw else '--tokens'} is none; expected one of them")
    told = [{"role": "system", "content": system}] if system else []
    if sources.tokens is not None:
        return Prompt(_token_ids(sources.tokens, config))
    if (path := sources.chat_file) is not None:
        messages, extra = read_chat(path)
        if told and messages and messages[0].get("role") == "system":
            raise CommandError(f"--system, and {path} begins with a system message; expected one of them")
        with bad_input(f"{path}: "):
            return chat_prompt(tokenizer, [*told, *messages], mode, profile=profile, **extra)
    text = sources.prompt
    if text is None:
        if sources.prompt_file is None and sys.stdin.isatty():
            say("reading the prompt from the terminal; end it with Ctrl-D")
        text = read_text(sources.prompt_file or Path("-")).removesuffix("\n")
    if not text.strip():
        raise CommandError(f"the prompt is empty; expected some text ({', '.join(options)} or stdin)")
    if raw:
        return Prompt(plain_ids(tokenizer, text))
    return chat_prompt(tokenizer, [*told, {"role": "user", "content": text}], mode, profile=profile)


def _token_ids(text: str, config: Config) -> list[int]:
    words = [word for word in re.split(r"[\s,]+", text.strip("[] \n")) if word]
    if not all(re.fullmatch(r"-?[0-9]+", word) for word in words):
        raise CommandError(f'--tokens {text!r} is not understood; expected token ids such as "0, 17, 42"')
    ids = [int(word) for word in words]
    check_ids(ids, config)
    return ids


def _as_json(outcome: Outcome, reply: Reply, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
    return {
        **{"reasoning_content": "", "tool_calls": []},
        **reply.message(),
        "finish_reason": outcome.finish,
        "prompt": prompt.ids,
        "tokens": outcome.ids,
        "logprobs": outcome.logprobs,
        "sampling": dataclasses.asdict(sampling),
        "speed": outcome.speed(),
    }
