"""Files that anybody may have damaged: each is read, or refused in one printable sentence, soon.

A sample runs with the other tests; `make torture`, which sets TORTURE, runs all.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import struct

import pytest

from tests.checkpoint.directories import config_of
from tests.conftest import DATA
from v4_jax.checkpoint import CheckpointError, check, convert, export, load, open_checkpoint, verify
from v4_jax.commands.shared.console import CommandError
from v4_jax.commands.shared.models import ModelDirectory

SOURCE = DATA / "flash-tiny"
INDEX = "model.safetensors.index.json"
FULL = "TORTURE" in os.environ
SECONDS = 20  # on a machine with other work; a hang is for ever

# As JSON has them, and as Python does.
VALUES = [
    *("null", "true", "-1", "0", "0.5", "1000000000000000000", "10000000", "1" * 5000, "1e999", "NaN", "-Infinity"),
    *('"x"', '""', "[]", "{}", "[null]", '{"a": 1}', '[[[["x"]]]]', "[" * 100000, "[" * 300 + "]" * 300),
    *('"\\u0000\\u001b[31m"', '"\\ud800"', json.dumps("x\n" * 5000), "[1, 5]", "3", "1e-320", "4294967297"),
]


class Hangs(BaseException):
    """Not an error that what is tried might take for one of its own."""


@contextlib.contextmanager
def soon():
    def late(number, frame):
        raise Hangs

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS, 1)  # again and again: callbacks drop what is raised in them
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sampled(cases, count, seed=0):
    """All cases in full, some of them otherwise; always the same."""
    return cases if FULL or len(cases) <= count else random.Random(seed).sample(cases, count)


def survives(path, call=None):
    """Whether a directory is read; refused, it must be in one sentence that a terminal can show."""
    try:
        with soon():
            if call is not None:
                call(path)
                return True
            model = ModelDirectory.open(path)
            with model.checkpoint:
                model.generation_defaults()
    except (CheckpointError, CommandError) as error:
        sentence = str(error)
        assert sentence.isprintable() and len(sentence) < 3000, sentence[:3000]
        return False
    return True


def linked(folder, *changed):
    """A directory of the source's files, but for those that will be changed."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file in SOURCE.iterdir():
        if file.name not in changed and file.name != "golden.safetensors":
            (folder / file.name).symlink_to(file)
    return folder


def replaced(content, path, text):
    """JSON of an object with the value at a path replaced by a text that may be none."""
    mark = "@@@"
    copy = json.loads(json.dumps(content))
    node = copy
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = mark
    return json.dumps(copy).replace(json.dumps(mark), text)


def places(content, path=()):
    """Paths of all values in an object."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def test_config(tmp_path):
    config = config_of(SOURCE)
    nested = {key: value for key, value in config.items() if key not in ("rope_scaling", "rope_theta")}
    compress = {"rope_type": "yarn", "rope_theta": config["compress_rope_theta"], **config["rope_scaling"]}
    compress.pop("type", None)
    nested["rope_parameters"] = {"main": {"rope_type": "default", "rope_theta": 10000.0}, "compress": compress}
    cases = [(form, path, value) for form in (config, nested) for path in places(form) for value in VALUES]
    read = 0
    for form, path, value in sampled(cases, 30):
        folder = linked(tmp_path / "model", "config.json")
        (folder / "config.json").write_text(replaced(form, path, value))
        read += survives(folder)
    assert 0 < read < len(cases)  # what says nothing about the model may be anything


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_files_that_are_no_json(tmp_path, name):
    folder = linked(tmp_path / "model", name)
    for content in (
        b"",
        b"\xff\xfe{}",
        b"[" * 10**6,
        b'{"a":' * 10**5,
        b"[]",
        b"1" * 10**5,
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        (folder / name).write_bytes(content)
        assert not survives(folder)
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert not survives(folder)
    (folder / name).unlink()
    (folder / name).mkdir()
    assert not survives(folder)
    (folder / name).rmdir()
    (folder / name).write_bytes(b"\xef\xbb\xbf" + (SOURCE / name).read_bytes())
    assert survives(folder)


def test_generation_config(tmp_path):
    for key in sampled(["temperature", "top_p", "top_k", "min_p", "eos_token_id", "do_sample"], 6):
        for value in sampled(VALUES, 3, seed=len(key)):
            folder = linked(tmp_path / "model", "generation_config.json")
            (folder / "generation_config.json").write_text(replaced({key: 0}, (key,), value))
            survives(folder)


def test_index(tmp_path):
    content = json.loads((SOURCE / INDEX).read_text())
    some = sorted(content["weight_map"])[:3]
    paths = [("weight_map",), ("metadata",), *(("weight_map", name) for name in some)]
    for path, value in sampled([(path, value) for path in paths for value in VALUES], 12):
        folder = linked(tmp_path / "model", INDEX)
        (folder / INDEX).write_text(replaced(content, path, value))
        assert survives(folder) == (path == ("metadata",) and survives(folder))
    for name in ("a\0b", "x" * 10000, "new\nline", "\x1b[2J"):
        weights = {**content["weight_map"], name: "model-00001-of-00003.safetensors"}
        (folder / INDEX).write_text(json.dumps({"weight_map": weights}))
        assert not survives(folder)
        (folder / INDEX).write_text(json.dumps({"weight_map": {**content["weight_map"], some[0]: name}}))
        assert not survives(folder)


def test_headers(tmp_path):
    shard = "model-00001-of-00003.safetensors"
    data = (SOURCE / shard).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    name = next(key for key in header if key != "__metadata__")
    paths = [
        (name,),
        (name, "dtype"),
        (name, "shape"),
        (name, "data_offsets"),
        (name, "shape", 0),
        (name, "data_offsets", 1),
    ]
    folder = linked(tmp_path / "model", shard)
    for path, value in sampled([(path, value) for path in paths for value in VALUES], 12):
        raw = replaced(header, path, value).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(raw)) + raw + rest)
        assert not survives(folder)
    for strange in ("a\0b", "x" * 10000, "new\nline", "\x1b[2J"):
        raw = json.dumps(
            {**{key: value for key, value in header.items() if key != name}, strange: header[name]}
        ).encode()
        (folder / shard).write_bytes(struct.pack("<Q", len(raw)) + raw + rest)
        assert not survives(folder)
    for content in (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", b"", data[:-1], bytes(100)):
        (folder / shard).write_bytes(content)
        assert not survives(folder)


def test_a_pointer_is_called_one(tmp_path):
    folder = linked(tmp_path / "model", INDEX)
    (folder / INDEX).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="is a Git LFS pointer, not the file itself: fetch it with git lfs pull"):
        open_checkpoint(folder)


def test_keys_of_other_tools(tmp_path):
    folder = linked(tmp_path / "model", "config.json", "generation_config.json")
    config = config_of(SOURCE) | {"eos_token_id": [1, 5], "unsloth_fixed": True, "transformers_version": "5.0"}
    config["quantization_config"] = config.get("quantization_config", {}) | {"weight_block_size": None}
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelDirectory.open(folder)
    assert model.config.eos_token_id == 1 and model.generation_defaults().stop_ids == (1, 5)


def test_flipped_bytes_of_a_converted_directory(tmp_path):
    """Whatever byte of the data it is: refused by the tensor's name, and found by `check`."""
    whole = tmp_path / "whole"
    convert(SOURCE, whole)
    assert check(whole).damaged == [] and check(whole).digests
    rng, refused = random.Random(1), 0
    for _ in range(60 if FULL else 4):
        broken = tmp_path / "broken"
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(whole, broken)
        file = max(rng.sample(sorted(broken.rglob("d/*")), 4), key=lambda file: file.stat().st_size)
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        if survives(broken, load):  # bytes that nothing refers to: versions of the database that it replaced
            assert verify(whole, broken).equal and not check(broken).damaged
            continue
        refused += 1
        try:
            assert check(broken).damaged
        except CheckpointError as error:  # the database's own nodes
            assert "is damaged" in str(error)
    assert refused


def test_digests_can_be_turned_off(tmp_path, monkeypatch):
    monkeypatch.setenv("V4_JAX_DIGESTS", "off")
    convert(SOURCE, tmp_path / "without")
    assert not list((tmp_path / "without").rglob("digests.json"))
    monkeypatch.delenv("V4_JAX_DIGESTS")
    assert check(tmp_path / "without").without and load(tmp_path / "without")


def test_companions_travel(tmp_path):
    """Code is text here: it travels and never runs."""
    folder = linked(tmp_path / "model")
    names = [
        "chat_template.jinja",
        "added_tokens.json",
        "README.md",
        "LICENSE",
        "configuration_x.py",
        "inference/config.json",
    ]
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('ran')" if name.endswith("py") else "{}")
    convert(folder, tmp_path / "converted")
    export(tmp_path / "converted", tmp_path / "exported")
    for name in names:
        assert (tmp_path / "exported" / name).read_text() == (folder / name).read_text(), name
