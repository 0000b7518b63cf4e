"""Constrained texts parse and are what was asked for, whatever the model says, and others do not notice them."""

import dataclasses
import json
import re

import jsonschema
import numpy as np
import pytest

from tests.infer.engine.test_scheduler import compilations, served
from tests.models import make
from tests.test_tokenizer import build_vocabulary
from v4_jax.chat import protocol
from v4_jax.infer.engine.grammar import Grammars
from v4_jax.infer.engine.guide import Guide, Instruction
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine, Request
from v4_jax.tokenizer import ByteTokenizer, load_tokenizer

VOCABULARY = 260
TOKENIZER = ByteTokenizer(VOCABULARY)
THINK_CLOSE = tuple(TOKENIZER.encode(protocol.THINK_CLOSE))
LENGTH = 160


@pytest.fixture(scope="module")
def grammars():
    return Grammars(TOKENIZER)


@pytest.fixture(scope="module")
def small():
    return make(num_hidden_layers=3, compress_ratios=(0, 4, 128, 0), num_hash_layers=1, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def engine(small):
    return Engine(
        small.config,
        small.params,
        slots=4,
        max_length=LENGTH,
        prefill_chunk=24,
        policy="float32",
        cache_dtype="float32",
    )


def allowed(matcher, vocabulary=VOCABULARY):
    bits = np.unpackbits(matcher.mask().view(np.uint8), bitorder="little")
    assert len(bits) == -(-vocabulary // 32) * 32 and not bits[vocabulary:].any()
    return set(np.flatnonzero(bits).tolist())


def random_schema(random, depth=2):
    """A schema whose texts are short enough to end by themselves."""
    kinds = ["integer", "boolean", "null", "string", "enum", "const"] + ["object", "array", "anyOf"] * (depth > 0)
    match random.choice(kinds):
        case "integer":
            low = int(random.integers(-50, 50))
            return {"type": "integer", "minimum": low, "maximum": low + int(random.integers(0, 2000))}
        case "string":
            return {"type": "string", "minLength": 1, "maxLength": int(random.integers(1, 4))}
        case "enum":
            return {"enum": ["red", 3, None, 'a "quoted" one', [1, 2]][: random.integers(1, 6)]}
        case "const":
            return {"const": {"käse": [True, -1.5]}}
        case "array":
            return {"type": "array", "items": random_schema(random, depth - 1), "minItems": 1, "maxItems": 2}
        case "anyOf":
            return {"anyOf": [random_schema(random, depth - 1) for _ in range(2)]}
        case "object":
            names = ["a", "b", "c d"][: random.integers(1, 4)]
            properties = {name: random_schema(random, depth - 1) for name in names}
            required = [name for name in names if random.random() < 0.6]
            return dict(type="object", properties=properties, required=required, additionalProperties=False)
        case kind:
            return {"type": str(kind)}


def constrained():
    """Requests under random schemas and other grammars, and a judge of each text."""
    random, grammars = np.random.default_rng(3), Grammars(TOKENIZER)

    def judge(schema):
        return lambda text: jsonschema.validate(json.loads(text), schema)

    def matches(pattern):
        return lambda text: re.fullmatch(pattern, text) or pytest.fail(text)

    found = []
    for _ in range(14):
        schema = random_schema(random)
        found.append((grammars.json_schema(schema), judge(schema)))
    found.append((grammars.json_object(), judge({"type": "object"})))
    found.append((grammars.regex(r"[a-c]{2}(x|é)+"), matches(r"[a-c]{2}(x|é)+")))
    texts = ['say "no"', "back\\slash\n", "日本", "maybe", "may"]
    found.append((grammars.choice(texts), lambda text: texts.index(text)))
    prompts = [random.integers(3, 246, length).tolist() for length in random.integers(1, 40, len(found))]
    samplings = [Sampling(seed=i, temperature=(1.0, 0.5, 0.0)[i % 3], top_p=0.95) for i in range(len(found))]
    return [
        (Request(prompt, LENGTH - 40, sampling, constraint=grammar), judge)
        for prompt, sampling, (grammar, judge) in zip(prompts, samplings, found, strict=True)
    ]


def log_softmax(small, prompt, ids):
    """The model's log-probabilities at each of the tokens that follow a prompt."""
    text = np.zeros((1, LENGTH), np.int32)
    text[0, : len(prompt) + len(ids)] = [*prompt, *ids]
    logits = np.asarray(small(text).logits[0, len(prompt) - 1 :][: len(ids)])
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def free():
    random = np.random.default_rng(4)
    return [Request(random.integers(3, 246, 5 + 9 * i).tolist(), 60, Sampling(seed=i), stop_ids=()) for i in range(3)]


@pytest.fixture(scope="module")
def alone(engine):
    return [served(engine, [request])[0] for request, _ in constrained()]


def test_refusals_say_why(grammars):
    """Also where the library draws the pattern first."""
    reason = "look-around, including look-ahead and look-behind, is not supported"
    for refused in (
        lambda: grammars.json_schema({"type": "string", "pattern": "^(?!x)a$"}),
        lambda: grammars.regex("(?!x)a"),
    ):
        with pytest.raises(ValueError, match=rf"cannot be used: .*regex parse error: {reason}$"):
            refused()
    with pytest.raises(ValueError, match="it is false, which allows nothing"):
        grammars.json_schema(False)


def written(grammar, text):
    """How much of a text a grammar lets be written, and whether it may end there."""
    matcher = grammar.start([TOKENIZER.eos_id])
    for place, token in enumerate(TOKENIZER.encode(text)):
        if token not in allowed(matcher):
            return place, False
        matcher.accept(token)
    return len(text), TOKENIZER.eos_id in allowed(matcher)


def test_every_json_text_is_one_of_true(grammars):
    for text in ('{"a": [1, null]}', '"x"', "3.5", "true", "[]"):
        assert written(grammars.json_schema(True), text) == (len(text), True)


def test_blanks_are_bounded(grammars):
    """A space, or a line's indentation: what people and models write, and no more."""
    nested = {"a": [{"b": {"c": [1]}}], "d": 2}
    for text in (json.dumps(nested), json.dumps(nested, indent=2), json.dumps(nested, separators=(",", ":"))):
        assert written(grammars.json_object(), text) == (len(text), True)
    for blanks in ("  ", "\n\n", " \n", "\n" + " " * 21):
        assert written(grammars.json_object(), "{" + blanks) == (len(blanks), False)


def test_texts_are_what_was_asked_for(alone):
    ended = 0
    for (_, judge), [(ids, _, finish)] in zip(constrained(), alone, strict=True):
        if finish == "stop":
            judge(TOKENIZER.decode(ids[:-1] if ids[-1] == TOKENIZER.eos_id else ids))
            ended += 1
        else:
            assert len(ids) == LENGTH - 40
    assert ended >= 14  # nearly all of them


def test_neighbours_change_nothing(engine, alone):
    """Constrained or free, to the last bit."""
    apart = [served(engine, [request])[0] for request in free()]
    mixed = [*free()[:2], *(request for request, _ in constrained()), free()[2]]
    with compilations() as compiled:
        together = served(engine, mixed)
    assert len(compiled) == 1 and engine.programs == 3
    assert together[2:-1] == alone and [*together[:2], together[-1]] == apart
    assert served(engine, mixed[::-1]) == together[::-1]


def test_samples_go_their_own_ways(engine, grammars):
    one = Request(TOKENIZER.encode("a"), 60, Sampling(seed=5), constraint=grammars.regex("[0-9]{3,9}z"), n=3)
    apart = [dataclasses.replace(one, n=1, sampling=Sampling(seed=5 + i)) for i in range(3)]
    [together] = served(engine, [one])
    assert together == [sample for [sample] in served(engine, apart)]
    assert len({tuple(ids) for ids, _, _ in together}) == 3


def test_log_probabilities_stay_the_models(engine, small, grammars):
    request = Request(TOKENIZER.encode("Is it?"), 5, constraint=grammars.choice(["yes"]), top_logprobs=2)
    number = engine.submit(request)
    events = list(engine.run())
    assert TOKENIZER.decode(event.id for event in events) == "yes" and {event.request for event in events} == {number}
    model = log_softmax(small, request.prompt, TOKENIZER.encode("yes"))
    for event, row in zip(events, model, strict=True):
        assert event.logprob == pytest.approx(row[event.id], abs=1e-4)
        assert [token for token, _ in event.alternatives] == np.argsort(-row)[:2].tolist()


def test_slots_of_cancelled_requests(engine, grammars, alone):
    """Neither the grammar nor its rhythm stays behind."""
    number = engine.submit(Request([9], 60, constraint=grammars.regex("a{50}")))
    other = engine.submit(Request([9], 60, constraint=grammars.regex("b{50}"), n=2))
    for _ in range(8):
        engine.round()
    engine.cancel(number)
    for _ in range(3):
        engine.round()
    engine.cancel(other, 1)
    rest = list(engine.run())
    assert {(event.request, event.sample, event.id) for event in rest} == {(other, 0, *TOKENIZER.encode("b"))}
    assert served(engine, [request for request, _ in constrained()[:6]]) == alone[:6]


def test_constrained_samples_keep_step(engine, grammars, monkeypatch):
    """They sit out every other round, but together, so that a step serves all of them; free ones sit out none."""
    steps, run = [], engine._programs.step
    monkeypatch.setattr(engine._programs, "step", lambda *inputs: steps.append(1) or run(*inputs))
    request = Request([9], 60, constraint=grammars.regex("a{20}"))
    engine.submit(request)
    engine.round()
    engine.submit(request)
    assert len(list(engine.run())) == 40 and len(steps) <= 22
    steps.clear()
    served(engine, [Request([9], 38, stop_ids=()), request])
    assert len(steps) <= 40


@pytest.mark.parametrize("end", [THINK_CLOSE, tuple(TOKENIZER.encode("ee.")), (30, 30)])
def test_reasoning_comes_first(engine, small, grammars, end):
    """Free and undisturbed until its end, whatever else begins like it; then the grammar holds."""
    near = {end[0]: 7.0, end[-1]: 6.5}  # so that the random model gets there, and has false starts
    thought = Request([8] * 20, 120, Sampling(seed=2, logit_bias=near), stop_ids=(1,))
    request = dataclasses.replace(thought, constraint=grammars.choice(["right", "wrong"]), reasoning_end=end)
    [[(freely, _, _)]], [[(ids, logprobs, finish)]] = served(engine, [thought]), served(engine, [request])
    at = next(i for i in range(len(freely)) if tuple(freely[i : i + len(end)]) == end) + len(end)
    assert ids[:at] == freely[:at] and TOKENIZER.decode(ids[at:]) in ("right", "wrong") and finish == "stop"
    model = log_softmax(small, request.prompt, ids)  # it has read each token once
    np.testing.assert_allclose(logprobs, model[np.arange(len(ids)), ids], atol=1e-4)
    again, *_ = served(engine, [request, *free(), request])
    assert again == [(ids, logprobs, finish)]
    assert len(end) == 1 or ids[:at].count(end[-1]) > 1 or end[0] == end[-1]  # an end that was none


def ends(ids, end):
    """How many tokens there are up to each occurrence of the end of reasoning, with it."""
    return [i for i in range(len(ids) + 1) if tuple(ids[:i][-len(end) :]) == end]


@pytest.mark.parametrize("end", [THINK_CLOSE, tuple(TOKENIZER.encode("Ok."))])
@pytest.mark.parametrize("budget", [0, 1, 2, 9])
def test_reasoning_is_ended_at_its_budget(engine, small, grammars, end, budget):
    """To the token; what follows is sampled from what the model says after it."""
    thought = Request([7] * 23, 30, Sampling(seed=16), stop_ids=())
    request = dataclasses.replace(thought, reasoning_end=end, reasoning_budget=budget)
    answered = dataclasses.replace(request, max_tokens=60, stop_ids=(1,), constraint=grammars.choice(["yes"]))
    given = [thought, request, dataclasses.replace(request, n=3), answered, *free()]
    [(freely, _, _)], [first], [_, second, third], [(answer, _, finish)], *others = served(engine, given)
    assert not ends(freely, end)
    ids, logprobs, _ = first
    assert ids[: budget + len(end)] == [*freely[:budget], *end] and len(ids) == 30
    assert TOKENIZER.decode(answer[budget + len(end) :]) == "yes" and finish == "stop"
    model = log_softmax(small, request.prompt, ids)
    np.testing.assert_allclose(logprobs, model[np.arange(len(ids)), ids], atol=1e-4)
    for ids, _, _ in (second, third):
        assert ends(ids, end)[0] == budget + len(end)
    assert served(engine, [request]) == [[first]] and others == [served(engine, [one])[0] for one in free()]
    continued = dataclasses.replace(thought, prompt=[*request.prompt, *first[0][: budget + len(end)]])
    assert served(engine, [dataclasses.replace(continued, max_tokens=8)])[0][0][0] == first[0][budget + len(end) :][:8]


def test_reasoning_that_ends_itself_is_left_alone(engine):
    """Before the budget, exactly at it, and when only its last tokens are missing."""
    end = tuple(TOKENIZER.encode("ee."))
    sampling = Sampling(seed=2, logit_bias={end[0]: 7.0, end[-1]: 6.5})
    thought = Request([8] * 20, 100, sampling, stop_ids=())
    [[freely]] = served(engine, [thought])
    at = ends(freely[0], end)[0]
    assert at > 4
    for budget in (at + 5, at + 1, at, at - 1, at - 2):
        limited = dataclasses.replace(thought, reasoning_end=end, reasoning_budget=budget)
        assert served(engine, [limited, *free()])[0] == [freely]
    [[(ids, _, _)]] = served(engine, [dataclasses.replace(limited, reasoning_budget=at - 3)])
    begun = next(i for i in (2, 1, 0) if tuple(freely[0][at - 3 - i : at - 3]) == end[:i])
    assert tuple(ids[at - 3 - begun : at - begun]) == end


OPENING = TOKENIZER.encode("call:")


def test_an_opening(engine, small):
    """Answers begin with it; what follows is what the model says after it, alone or in company."""
    plain = Request([7] * 23, 30, Sampling(seed=16), stop_ids=())
    request = dataclasses.replace(plain, opening=OPENING)
    [first], [_, *others], *_ = together = served(engine, [request, dataclasses.replace(request, n=3), *free()])
    ids, logprobs, _ = first
    assert ids[:5] == OPENING and len(ids) == 30
    assert [other[0][:5] for other in others] == [OPENING] * 2 and others[0] != others[1]
    model = log_softmax(small, request.prompt, ids)
    np.testing.assert_allclose(logprobs, model[np.arange(len(ids)), ids], atol=1e-4)
    continued = dataclasses.replace(plain, prompt=[*plain.prompt, *OPENING], max_tokens=25)
    assert served(engine, [continued])[0][0][0] == ids[5:]
    assert served(engine, [request]) == together[:1]
    assert served(engine, [dataclasses.replace(request, max_tokens=3)])[0][0][::2] == (OPENING[:3], "length")


@pytest.mark.parametrize("end", [THINK_CLOSE, tuple(TOKENIZER.encode("ee.")), (30, 30)])
def test_an_opening_after_reasoning(engine, end):
    """Which ends by itself, wherever, or at its budget; not a token comes between."""
    near = {end[0]: 7.0, end[-1]: 6.5}
    thought = Request([8] * 20, 120, Sampling(seed=2, logit_bias=near), stop_ids=(1,))
    [[(freely, _, _)]] = served(engine, [thought])
    at = ends(freely, end)[0]
    request = dataclasses.replace(thought, reasoning_end=end, opening=OPENING)
    [[(ids, _, _)]] = alone = served(engine, [request])
    assert ids[: at + 5] == [*freely[:at], *OPENING] and len(ids) > at + 5
    assert served(engine, [request, *free()])[:1] == alone
    for budget in (0, 2, at + 1):
        [[(ids, _, _)]] = served(engine, [dataclasses.replace(request, reasoning_budget=budget)])
        ended = ends(ids, end)[0]
        assert ended == min(at, budget + len(end)) and ids[ended : ended + 5] == OPENING


def test_what_must_be_said_is_said(engine, grammars):
    """No token ends a sample in its reasoning while a grammar or an opening is yet to come."""
    sampling = Sampling(seed=3, logit_bias={1: 50.0})
    free_to_end = Request([8] * 20, 30, sampling, stop_ids=(1,), reasoning_end=THINK_CLOSE, reasoning_budget=6)
    for asked, said in (
        (dataclasses.replace(free_to_end, opening=OPENING), [*OPENING, 1]),
        (dataclasses.replace(free_to_end, constraint=grammars.choice(["yes"])), [*TOKENIZER.encode("yes")]),
        (free_to_end, None),
    ):
        [[(ids, _, finish)]] = served(engine, [asked])
        assert finish == "stop"
        if said is None:
            assert ids == [1]
        else:
            assert 1 not in ids[:6] and tuple(ids[6 : 6 + len(THINK_CLOSE)]) == THINK_CLOSE
            assert ids[6 + len(THINK_CLOSE) :] in (said, [*said, 1])


def test_an_end_that_repeats_itself():
    """What is missing of it completes it and not earlier, however it began."""
    random = np.random.default_rng(0)
    for _ in range(300):
        end, budget = tuple(random.integers(0, 2, random.integers(1, 5)).tolist()), int(random.integers(0, 6))
        guide, said, missing = Guide(end=end, budget=budget), [], 0
        while not ends(said, end):
            move = guide.next(unread=False)
            assert (move.forced >= 0) == (len(said) >= budget)
            missing += move.forced >= 0
            said.append(move.forced if move.forced >= 0 else int(random.integers(0, 2)))
            assert not guide.read(said[-1])
        assert guide.next(unread=False) == guide.next(unread=True) == Instruction() and missing <= len(end)


def test_stops_are_legal_where_the_text_may_end(grammars):
    matcher = grammars.regex("ab?(cd)?").start({1, 250, 7777})
    for letter, ends in (("a", False), ("b", True), ("c", True), ("d", False)):
        legal = allowed(matcher)
        assert (1 in legal) == (250 in legal) == ends and TOKENIZER.encode(letter)[0] in legal
        matcher.accept(*TOKENIZER.encode(letter))
    assert matcher.finished and allowed(matcher) == {1, 250}
    [letter] = TOKENIZER.encode("b")  # a stop id that is text as well: where it is legal, the text ends
    assert letter in allowed(grammars.regex("b+").start({letter}))


def test_unused_ids_are_never_legal(grammars):
    tokens = set(range(len(TOKENIZER.tokens), VOCABULARY)) | set(TOKENIZER.special_ids)
    assert len(tokens) > 10
    matcher = grammars.regex("(?s:.*)").start({1})
    for letter in "aé\n":
        assert allowed(matcher) & tokens == {1}
        for token in TOKENIZER.encode(letter):
            matcher.accept(token)


@pytest.mark.parametrize("vocabulary", [256, 287, 288, 289])
def test_masks_of_any_vocabulary(vocabulary):
    """Such as the release's, which is a multiple of 32: the library adds a word then."""
    tokenizer = ByteTokenizer(vocabulary)
    matcher = Grammars(tokenizer).regex("yes").start({1})
    for token in tokenizer.encode("yes"):
        assert allowed(matcher, vocabulary) == {token}
        matcher.accept(token)
    assert matcher.finished and allowed(matcher, vocabulary) == {1}


def test_a_trained_vocabulary(tmp_path):
    """Of byte pairs, padded; the text is cut into other tokens than a grammar's author may think of."""
    size = build_vocabulary(tmp_path) + 37
    tokenizer = load_tokenizer(tmp_path, size)
    grammars = Grammars(tokenizer)
    schema = {"type": "object", "properties": {"the": {"type": "string"}}, "required": ["the"]}
    matcher = grammars.json_schema(schema).start({tokenizer.eos_id})
    text = '{"the": "quick\\n {naïve} fox 日本"}'
    for token in tokenizer.encode(text):
        legal = allowed(matcher, size)
        assert token in legal and tokenizer.eos_id not in legal and not legal & set(range(size - 37, size))
        matcher.accept(token)
    assert matcher.finished and allowed(matcher, size) == {tokenizer.eos_id}


@pytest.mark.parametrize(
    ("make_it", "sentence"),
    [
        (lambda g: g.json_schema({"type": "nonsense"}), "the JSON schema cannot be used: Invalid type: nonsense"),
        (lambda g: g.json_schema({"not": {}}), r'the JSON schema cannot be used: Unimplemented keys: \["not"\]'),
        (lambda g: g.json_schema([3]), "the JSON schema cannot be used: "),
        (lambda g: g.json_schema(False), "the JSON schema cannot be used: "),
        (lambda g: g.regex("[a"), "the regular expression cannot be used: .*invalid regex"),
        (lambda g: g.choice([]), r"the choice is between \[\]; expected at least one text"),
        (lambda g: g.choice(["a", ""]), "none of them empty"),
    ],
)
def test_grammars_that_are_none(grammars, make_it, sentence):
    with pytest.raises(ValueError, match=sentence):
        make_it(grammars)


def test_refused_at_the_door(engine, grammars):
    grammar = grammars.regex("a+")
    with pytest.raises(ValueError, match="a constrained text needs stop_ids to end with, found none"):
        engine.submit(Request([3], 5, stop_ids=(), constraint=grammar))
    with pytest.raises(ValueError, match="compiled for 300 tokens, but the model's vocabulary has 260"):
        engine.submit(Request([3], 5, constraint=Grammars(ByteTokenizer(300)).regex("a+")))
    with pytest.raises(ValueError, match="reasoning_budget is -1, expected 0 or more tokens"):
        engine.submit(Request([3], 5, reasoning_end=(5,), reasoning_budget=-1))
    with pytest.raises(ValueError, match="an opening and a constraint; expected one of them"):
        engine.submit(Request([3], 5, constraint=grammar, opening=(5,)))
    with pytest.raises(ValueError, match="reasoning_budget needs reasoning_end"):
        engine.submit(Request([3], 5, reasoning_budget=4))
    with pytest.raises(ValueError, match="token id 260 is outside of the vocabulary"):
        engine.submit(Request([3], 5, constraint=grammar, reasoning_end=(260,)))
    assert engine.idle
