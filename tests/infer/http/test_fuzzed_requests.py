"""Requests that are damaged at random end in a completion or in a sentence, over HTTP and in job files alike.

TORTURE=100000 tries more of them than the sample that runs always.
"""

import json
import os
import random

from tests.models import two
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.openai.batch import line_id, read_request, refusal
from v4_jax.infer.openai.bodies import read_body
from v4_jax.infer.openai.completions import Completion, Defaults, Model
from v4_jax.json_text import read_json
from v4_jax.tokenizer import ByteTokenizer

COUNT = int(os.environ.get("TORTURE", 600))

CALL = {"name": "f", "arguments": '{"x": 1}'}
SOUND = [
    {"role": "user", "name": "n", "content": "Q"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
    {"role": "developer", "content": "D"},
    {"role": "assistant", "content": "A", "reasoning_content": "r"},
    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": CALL}]},
    {"role": "tool", "tool_call_id": "a", "content": "r"},
    {"role": "assistant", "content": None, "function_call": CALL},
    {"role": "function", "name": "f", "content": "r"},
]
FIELDS = {
    "n": 1,
    "max_tokens": 2,
    "temperature": 0.5,
    "stop": ["x"],
    "logprobs": True,
    "top_logprobs": 2,
    "logit_bias": {"5": 1},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string"}}},
    "thinking": {"type": "enabled", "budget_tokens": 3},
    "stream_options": {"include_usage": True},
}
ODD = [None, True, 0, -1, 2.5, 1e300, 10**30, "", "x", "\ud800", "\x00", "null", [], {}, ["x"], {"x": []}, float("nan")]


def damaged(value, dice):
    """The same, but here and there something else, something more or something less."""
    if dice.random() < 0.03:
        return dice.choice(ODD)
    if isinstance(value, dict):
        kept = {key: damaged(one, dice) for key, one in value.items() if dice.random() < 0.98}
        return kept | ({dice.choice(["x", "role", "type", "\ud800"]): dice.choice(ODD)} if dice.random() < 0.03 else {})
    return [damaged(one, dice) for one in value] if isinstance(value, list) else value


def test_damaged_requests_end_in_a_sentence():
    model = Model("tiny", two().config, ByteTokenizer(320), Defaults(Sampling(), (1,), 8), 2048, slots=8)
    dice, served = random.Random(0), 0
    for number in range(COUNT):
        chosen = dice.sample(list(FIELDS), dice.randrange(3))
        body = {"messages": dice.sample(SOUND, dice.randrange(1, 4))} | {name: FIELDS[name] for name in chosen}
        text = json.dumps(damaged(body, dice)).encode()
        line = json.dumps({"custom_id": dice.choice(ODD), "url": "/v1/chat/completions", "body": None})
        line = line.replace('"body": null', f'"body": {text.decode()}').encode()[: dice.choice([None, -1, 40])]
        try:
            Completion(read_body(read_json(text), chat=True), model, 0)
            served += 1
        except ValueError as error:
            said = str(error)
            assert said and "\n" not in said.strip() and len(said) < 1000 and said.encode(), text
        try:
            Completion(read_request(line).body, model, 0)
        except ValueError as error:
            json.dumps(refusal(number, line_id(line), error), ensure_ascii=False).encode()
    assert COUNT / 20 < served < COUNT
