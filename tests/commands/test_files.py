"""Files that commands are given: whoever wrote them, they are read, or a sentence says why not."""

import io

import pytest

from v4_jax.commands.shared.console import CommandError, read_json, read_text


def test_a_byte_order_mark_is_no_text(tmp_path, monkeypatch):
    path = tmp_path / "given"
    path.write_bytes(b"\xef\xbb\xbf[1]")
    assert read_text(path) == "[1]" and read_json(path) == [1]
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeff[1]"))
    assert read_text(type(path)("-")) == "[1]"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON: "),
        ("[" * 100_000, "is nested too deeply"),
        ("[" * 200 + "]" * 200, "is nested too deeply; expected at most 128 levels"),
        ("1" * 5000, "cannot be read: Exceeds the limit"),
        ("[NaN]", "is not JSON: NaN is not a JSON number"),
        ("[1e999]", "is not usable: the number 1e999 is too large"),
        ('["\\ud800"]', r"is not text: it holds half a surrogate pair \(.ud800\)"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path, text, sentence):
    path = tmp_path / "given"
    path.write_text(text)
    with pytest.raises(CommandError, match=sentence):
        read_json(path)
