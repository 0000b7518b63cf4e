"""Tokenizers of both kinds: nothing is lost on the way to ids and back, at once or one id at a time."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from v4_jax import chat
from v4_jax.chat import protocol
from v4_jax.chat.protocol import ASSISTANT, BOS, EOS, PAD, TASK_TOKENS, THINK_CLOSE, USER
from v4_jax.tokenizer import load_tokenizer

TINY_VOCABULARIES = (256, 257, 300, 320)  # of the tiny checkpoints
CASES = json.loads((Path(__file__).parent / "data" / "encoding" / "cases.json").read_text(encoding="utf-8"))
TEXTS = ["", "plain", "émoji 🎉 中文\n\t\0", "\U0010ffff\ud7ff\x7f\x80", PAD + BOS + EOS + "a" + EOS, EOS[:-1] + EOS]
TEXTS += [case["expected"] for case in CASES["encode"][:6]]


def build_vocabulary(directory, specials=protocol.SPECIAL_TOKENS):
    """Trains a small byte-level BPE with the release's special tokens; returns its size."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(specials[:3]),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the token, the tokens 中文中文 🎉🎉 émoji émoji"] * 4, trainer)
    tokenizer.add_special_tokens(list(specials[3:]))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(  # as other releases have: adds BOS
        single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer.get_vocab_size()


@pytest.fixture(params=[*TINY_VOCABULARIES, "tokenizer.json"])
def tokenizer(request, tmp_path):
    if request.param == "tokenizer.json":
        return load_tokenizer(tmp_path, build_vocabulary(tmp_path) + 5)
    return load_tokenizer(tmp_path, request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_bytes(tokenizer, text):
    assert b"".join(tokenizer.token_bytes(i) for i in tokenizer.encode(text)) == text.encode()


def test_ids_without_a_token_have_no_bytes(tmp_path):
    for tokenizer in (load_tokenizer(tmp_path, 320), load_tokenizer(tmp_path, build_vocabulary(tmp_path) + 5)):
        assert tokenizer.token_bytes(tokenizer.vocab_size - 1) is None
        with pytest.raises(ValueError, match="outside of the vocabulary"):
            tokenizer.token_bytes(tokenizer.vocab_size)


@pytest.mark.parametrize("text", TEXTS)
def test_streamed_text_comes_back(tokenizer, text):
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(pieces)  # no half character on the way
    assert "".join(pieces) + stream.flush() == text


@pytest.mark.parametrize("seed", range(20))
def test_streaming_any_ids_equals_decoding_them(tokenizer, seed):
    """Random models write random bytes: half characters, stray continuations, unused ids."""
    rng = random.Random(seed)
    most_used = sorted({i for text in TEXTS for i in tokenizer.encode(text)})
    not_ascii = [i for i in range(tokenizer.vocab_size) if not tokenizer.decode([i]).isascii()]
    ids = [rng.choice(rng.choice((most_used, not_ascii, range(tokenizer.vocab_size)))) for _ in range(200)]
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert stream.flush() == ""


def test_half_a_character_waits(tokenizer):
    ids = tokenizer.encode("ж")  # two bytes that the vocabulary has not merged
    assert len(ids) == 2
    stream = tokenizer.stream()
    assert [stream.push(ids[0]), stream.push(ids[1]), stream.flush()] == ["", "ж", ""]
    assert [stream.push(ids[0]), stream.flush(), stream.flush()] == ["", "\ufffd", ""]
    assert [stream.push(ids[0]), stream.push(tokenizer.eos_id), stream.flush()] == ["", "\ufffd" + EOS, ""]


def test_cost_of_a_token_does_not_grow(tokenizer, monkeypatch):
    lengths, decode = [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: lengths.append(len(ids)) or decode(ids))
    stream = tokenizer.stream()
    half, _ = tokenizer.encode("ж")
    for _ in range(100):
        stream.push(half)  # the worst case: nothing is ever a whole character
    assert 100 <= len(lengths) <= 200
    assert max(lengths) <= 9


def test_special_ids_and_nothing_added(tokenizer):
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert tokenizer.encode(BOS + "a" + EOS) == [0, *tokenizer.encode("a"), 1]
    assert tokenizer.encode("") == []
    ids = tokenizer.encode(chat.encode([{"role": "user", "content": "hi"}]))
    middle = [tokenizer.encode(text) for text in (USER, "hi", ASSISTANT, THINK_CLOSE)]
    assert ids == [0, *middle[0], *middle[1], *middle[2], *middle[3]]
    assert [len(middle[i]) for i in (0, 2, 3)] == [1, 1, 1]


def test_ids_out_of_range(tokenizer):
    size = tokenizer.vocab_size
    for bad in (-1, size, size + 1000):
        for use in (lambda i: tokenizer.decode([0, i]), tokenizer.stream().push):
            with pytest.raises(ValueError, match=f"token id {bad} is outside .* 0 to {size - 1}$"):
                use(bad)


def test_a_refused_id_leaves_the_stream_as_it_was(tokenizer):
    first, second = tokenizer.encode("ж")
    stream = tokenizer.stream()
    stream.push(first)
    with pytest.raises(ValueError, match="outside"):
        stream.push(-1)
    assert stream.push(second) == "ж"


def test_array_integers_are_ids(tokenizer):
    ids = tokenizer.encode("é")
    assert tokenizer.decode(np.array(ids, np.int32)) == "é"
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in np.array(ids, np.int32)) == "é"


def test_lone_surrogates_raise(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 1; expected valid Unicode"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("vocab_size", TINY_VOCABULARIES)
def test_byte_layout(tmp_path, vocab_size):
    tokenizer = load_tokenizer(tmp_path, vocab_size)
    assert tokenizer.decode([0, 1, 2]) == BOS + EOS + PAD
    assert tokenizer.encode("\0a\x7f") == [3, 3 + ord("a"), 3 + 0x7F]
    # As many special tokens as fit have an id of their own; the others are spelled in bytes.
    used = 3 + 243
    fitting = protocol.SPECIAL_TOKENS[3:][: vocab_size - used]
    assert [tokenizer.encode(token) for token in fitting] == [[used + i] for i in range(len(fitting))]
    for token in protocol.SPECIAL_TOKENS[3 + len(fitting) :]:
        assert len(tokenizer.encode(token)) == len(token.encode())
    assert len(fitting) == {256: 10, 257: 11}.get(vocab_size, 12)
    unused = range(used + len(fitting), vocab_size)
    assert tokenizer.decode(unused) == "\ufffd" * len(unused)


def test_smallest_and_largest_byte_vocabularies(tmp_path):
    assert load_tokenizer(tmp_path, 246).decode(load_tokenizer(tmp_path, 246).encode("中" + USER)) == "中" + USER
    with pytest.raises(ValueError, match="245 ids is too small for bytes as tokens; expected 246 or more"):
        load_tokenizer(tmp_path, 245)
    with pytest.raises(ValueError, match=r"has no tokenizer\.json, which a vocabulary of 129280 ids needs"):
        load_tokenizer(tmp_path, 129280)
    with pytest.raises(ValueError, match="no directory"):
        load_tokenizer(tmp_path / "missing", 256)


def test_saved_truncation_and_padding_are_switched_off(tmp_path):
    size = build_vocabulary(tmp_path)
    whole = load_tokenizer(tmp_path, size)
    saved = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    saved.enable_truncation(16)
    saved.enable_padding(length=400)
    saved.save(str(tmp_path / "tokenizer.json"))
    found, text = load_tokenizer(tmp_path, size), "the token, the tokens " * 9
    assert found.encode(text) == whole.encode(text) and len(found.encode(text)) > 16
    assert len(found.encode("token")) < 16
    assert found.definition() == whole.definition()


def test_vocabulary_may_be_padded_but_not_too_small(tmp_path):
    size = build_vocabulary(tmp_path)
    tokenizer = load_tokenizer(tmp_path, size + 3)
    assert tokenizer.vocab_size == size + 3
    assert tokenizer.decode([size + 2, *tokenizer.encode("é"), size]) == "\ufffdé\ufffd"
    with pytest.raises(ValueError, match=f"has token id {size - 1}, but the model's vocabulary has {size - 1} ids"):
        load_tokenizer(tmp_path, size - 1)


def test_a_file_that_is_not_the_releases_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is not a tokenizer that can be read"):
        load_tokenizer(tmp_path, 400)
    build_vocabulary(tmp_path, tuple(TASK_TOKENS.values()))
    with pytest.raises(ValueError, match=r"has no token .* expected the release's tokenizer"):
        load_tokenizer(tmp_path, 400)
