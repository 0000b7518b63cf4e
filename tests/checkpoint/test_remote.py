"""Checkpoints in a bucket and on the hub: the same, by the bytes that are needed and no others."""

import contextlib
from pathlib import Path

import pytest
from gcsfs.core import GCSFileSystem
from huggingface_hub import HfFileSystem

from tests.checkpoint.directories import assert_same_tree
from tests.conftest import DATA
from tests.remote_servers import COMMIT, TOKEN, serving
from v4_jax.checkpoint import CheckpointError, convert, export, load, open_checkpoint, url_of
from v4_jax.checkpoint.remote import directory

SOURCE = DATA / "flash-base-tiny"
URLS = {"gs": "gs://weights/models/tiny", "hf": "hf://org/name", "hf@": f"hf://org/name@{COMMIT}"}


@pytest.fixture(params=["gs", "hf"])
def remote(request, monkeypatch):
    """A server that holds the source, and the URL by which it is read."""
    with served(request.param, SOURCE, monkeypatch) as server:
        yield server, URLS[request.param]


def served(kind, path, monkeypatch):
    @contextlib.contextmanager
    def run():
        directory.cache_clear()
        (GCSFileSystem if kind == "gs" else HfFileSystem).clear_instance_cache()
        with serving(kind, path, "models/tiny/" if kind == "gs" else "") as server:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST" if kind == "gs" else "HF_ENDPOINT", server.url)
            monkeypatch.setenv("HF_TOKEN", TOKEN)
            yield server
        directory.cache_clear()

    return run()


def test_urls_survive_pathlib():
    for url in URLS.values():
        assert url_of(url) == url_of(Path(url)) == url_of(url + "/") == url
    assert url_of("DeepSeek-V4-Flash") is None
    assert url_of(Path("/mnt/gs:/weights")) is None


def test_the_same_as_here(remote):
    server, url = remote
    with open_checkpoint(url) as checkpoint:
        config, params = load(checkpoint)
        files = {name: file.read_bytes() for name, file in checkpoint.files.items()}
    expected_config, expected = load(SOURCE)
    assert config == expected_config
    assert_same_tree(params, expected)
    assert files == {"generation_config.json": (SOURCE / "generation_config.json").read_bytes()}
    shards = [name for name in server.files if "/model-" in f"/{name}" and name.endswith(".safetensors")]
    assert len(shards) == 2
    for name in shards:  # every byte once
        assert sum(b - a for a, b in server.sent[name]) == len(
            set().union(*(range(*part) for part in server.sent[name]))
        )
        assert sum(b - a for a, b in server.sent[name]) == len(server.files[name])
    assert not any("golden" in name for name in server.sent)
    assert server.unknown == []


def test_only_what_the_shards_need(remote):
    server, url = remote
    with open_checkpoint(url) as checkpoint:
        headers = server.bytes_of_shards()
        name = "layers.0.ffn.experts.1.w1.weight"
        info = checkpoint.tensors[name]
        before = dict(server.sent)
        rows = checkpoint.read(name, slice(16, 32))
        assert server.bytes_of_shards() - headers == rows.nbytes == info.nbytes * 16 // info.shape[0]
        columns = checkpoint.read(name, slice(0, 8), slice(4, 12))  # narrow rows come whole, in one request
        assert server.bytes_of_shards() - headers - rows.nbytes == 8 * info.shape[1]
        with open_checkpoint(SOURCE) as here:
            assert columns.tobytes() == here.read(name, slice(0, 8), slice(4, 12)).tobytes()
            assert rows.tobytes() == here.read(name, slice(16, 32)).tobytes()
        assert before.keys() == server.sent.keys()
        assert headers < 0.2 * sum(len(content) for content in server.files.values())


def test_a_revision_is_pinned(monkeypatch):
    with served("hf", SOURCE, monkeypatch):
        with open_checkpoint("hf://org/name@main") as branch, open_checkpoint(URLS["hf@"]) as commit:
            assert branch.tensors == commit.tensors
        with pytest.raises(CheckpointError, match=r"hf://org/name@gone cannot be read \(\w+ 404\)"):
            load("hf://org/name@gone")
        with pytest.raises(CheckpointError, match="hf://name is no model of the hub, expected hf://org/name or"):
            load("hf://name")


def test_tokens_are_not_printed(monkeypatch, caplog, capfd):
    with served("hf", SOURCE, monkeypatch):
        monkeypatch.setenv("HF_TOKEN", TOKEN + "-wrong")
        with pytest.raises(
            CheckpointError, match=r"hf://org/name cannot be read \(\w+ 401\): it is missing, or it needs"
        ) as caught:
            load("hf://org/name")
    assert caught.value.__cause__ is None and caught.value.__suppress_context__
    out, err = capfd.readouterr()
    assert TOKEN not in str(caught.value) + caplog.text + out + err


def test_what_is_not_there(monkeypatch):
    with served("gs", SOURCE, monkeypatch):
        with pytest.raises(
            CheckpointError, match=r"gs://weights/models/other (does not exist or is empty|cannot be read)"
        ):
            load("gs://weights/models/other")
        with pytest.raises(CheckpointError, match="gs://weights/out cannot be written: expected a directory of this"):
            export(SOURCE, "gs://weights/out")


def test_a_converted_directory_is_refused(monkeypatch, tmp_path):
    convert(SOURCE, tmp_path / "orbax")
    with (
        served("gs", tmp_path / "orbax", monkeypatch),
        pytest.raises(CheckpointError, match="was made by convert, and only released directories are read from afar"),
    ):
        load(URLS["gs"])
