"""JSON that others wrote, by the one reader: refused for the same reasons in a request and in a file."""

import pytest

from v4_jax.json_files import parse
from v4_jax.json_text import JsonError, read_json


@pytest.mark.parametrize(
    ("text", "request_is", "file_is"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at column 2", "Expecting property name"),
        (b"[1,\n2", "not JSON: Expecting ',' delimiter at line 2 column 2", "line 2 column 2"),
        (b"\xff", "not UTF-8 text (byte 0); expected UTF-8", "can't decode byte 0xff in position 0"),
        (b"[NaN]", "not JSON: NaN is not a JSON number", "NaN is no number in JSON"),
        (b"[-1e999]", "not usable: the number -1e999 is too large", "the number '-1e999' is out of range"),
        (b"1" * 5000, "not usable: a number has 5,000 digits", "it has a number of too many digits"),
        (b'{"\\ud83d": 1}', r"not text: it holds half a surrogate pair (\ud83d)", "half a surrogate pair"),
        (b"[" * 129 + b"]" * 129, "nested too deeply; expected at most 128 levels", "nested too deeply to be read"),
        (b"[" * 100_000, "nested too deeply to be read", "nested too deeply to be read"),
    ],
)
def test_what_is_refused(text, request_is, file_is):
    with pytest.raises(JsonError) as refused:
        read_json(text)
    assert str(refused.value).startswith(request_is)
    with pytest.raises(KeyError) as raised:
        parse(text, "the file", KeyError)
    (sentence,) = raised.value.args
    assert file_is in sentence and sentence.startswith(
        "the file is " + ("nested" if refused.value.reason == "deep" else "not valid JSON: ")
    )


def test_what_is_read():
    text = b'\xef\xbb\xbf{"a": [1, 2.5, "\\ud83d\\ude00"], "a": 12345678901234567890}'
    assert read_json(text) == {"a": 12345678901234567890}
    assert parse(text, "it", ValueError, pairs=list) == [("a", [1, 2.5, "\U0001f600"]), ("a", 12345678901234567890)]
    nested = b"[" * 64 + b"7" + b"]" * 64
    assert parse(nested, "it", ValueError) == read_json(nested)
    with pytest.raises(ValueError, match="nested too deeply"):
        parse(b"[" + nested + b"]", "it", ValueError)
    assert read_json(b"[" * 128 + b"7" + b"]" * 128)
