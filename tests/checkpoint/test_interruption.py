"""Targets appear whole or not at all, and interrupted work is taken up where it ended."""

import dataclasses
import errno
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections import namedtuple

import pytest

from tests.checkpoint.directories import config_of, random_params, read_directory, write_directory
from tests.conftest import DATA
from v4_jax.checkpoint import CheckpointError, conversion, convert, export, interface, load, safetensors, verify
from v4_jax.config import Config

SOURCE = DATA / "released-tiny"
PARTS = 8  # embed, five layers, head, mtp.0

BOTH = pytest.mark.parametrize("write", [convert, export])


class Stop(Exception):
    pass


def stop_at(label, error=Stop):
    def progress(part, done, total):
        assert 0 < done <= total
        if part in (label, f"model-00004-of-{PARTS:05d}.safetensors"):
            raise error

    return progress


def partial_of(target):
    return target.with_name(f".{target.name}.partial")


@BOTH
@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_interrupted_run_is_resumed(tmp_path, write, error):
    target = tmp_path / "out"
    with pytest.raises(error):
        write(SOURCE, target, progress=stop_at("layers.2", error))
    assert not target.exists()
    assert partial_of(target).is_dir()
    with pytest.raises(CheckpointError, match="unfinished copy: run the same command again"):
        load(target)

    labels = []
    written = write(SOURCE, target, progress=lambda label, done, total: labels.append((label, done, total)))
    assert written.resumed == 3
    assert len({label for label, _, _ in labels}) == PARTS
    dones = [done for _, done, _ in labels]
    assert dones == sorted(dones) and dones[-1] == labels[-1][2] == written.bytes
    assert verify(SOURCE, target).equal
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert not [path for path in target.iterdir() if path.name.startswith(".")]


KILLED = """
import os, signal, sys
from v4_jax.checkpoint import convert

def progress(part, done, total):
    if part == "layers.3":
        os.kill(os.getpid(), signal.SIGKILL)

convert(sys.argv[1], sys.argv[2], progress=progress)
"""


def test_killed_conversion_is_resumed(tmp_path):
    target = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", KILLED, SOURCE, target], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not target.exists()
    # What Orbax leaves behind when it is killed in the middle of a part.
    leftover = partial_of(target) / "layers.3.orbax-checkpoint-tmp"
    leftover.mkdir()
    (leftover / "half").write_bytes(b"written")
    assert convert(SOURCE, target).resumed == 4
    assert verify(SOURCE, target).equal
    assert not list(target.glob("*tmp*"))


@BOTH
def test_existing_target_is_refused(tmp_path, write):
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckpointError, match=r"out already exists: choose another name, or remove it first"):
        write(SOURCE, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@BOTH
def test_unfinished_copy_of_another_source_is_refused(tmp_path, write):
    target = tmp_path / "out"
    with pytest.raises(Stop):
        write(SOURCE, target, progress=stop_at("layers.2"))
    with pytest.raises(CheckpointError, match="holds an unfinished copy of another checkpoint"):
        write(DATA / "flash-tiny", target)
    assert not target.exists()


def test_unfinished_conversion_is_not_finished_as_an_export(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(Stop):
        convert(SOURCE, target, progress=stop_at("layers.2"))
    with pytest.raises(CheckpointError, match="holds an unfinished copy of another checkpoint"):
        export(SOURCE, target)


@BOTH
def test_two_processes_do_not_write_one_target(tmp_path, write):
    """The second would take what the first is writing for parts of an interrupted run."""
    target = tmp_path / "out"

    def meanwhile(part, done, total):
        with pytest.raises(CheckpointError, match="is being written by another process"):
            write(SOURCE, target)

    assert write(SOURCE, target, progress=meanwhile).resumed == 0
    assert verify(SOURCE, target).equal


def test_source_that_changed_since_is_refused(tmp_path):
    source = write_directory(tmp_path / "model", config_of(SOURCE), read_directory(SOURCE))
    with pytest.raises(Stop):
        convert(source, tmp_path / "out", progress=stop_at("layers.2"))
    shard = next(source.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, (1, 1))
    with pytest.raises(CheckpointError, match="or of this one before it changed"):
        convert(source, tmp_path / "out")


def test_parameters_in_memory_begin_anew(tmp_path):
    """They cannot be told from others, so an unfinished export of them is never continued."""
    params, target = load(SOURCE), tmp_path / "out"
    with pytest.raises(Stop):
        export(params, target, progress=stop_at("-"))
    assert export(params, target).resumed == 0
    assert verify(SOURCE, target).equal


# ---- a full disk ----------------------------------------------------------------------------------------------------


def is_clear(message, target):
    return (
        message.startswith(f"the disk of {target.parent} is full: ")
        and f"finished parts are kept in {partial_of(target)}" in message
        and "run the same command again" in message
    )


def test_disk_full_while_exporting(tmp_path, monkeypatch):
    target, calls = tmp_path / "out", []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.os, "fsync", fsync)
    with pytest.raises(CheckpointError) as caught:
        export(SOURCE, target)
    assert is_clear(str(caught.value), target)
    assert not target.exists()
    assert export(SOURCE, target).resumed == 3
    assert verify(SOURCE, target).equal


def test_disk_full_while_converting(tmp_path, monkeypatch):
    """TensorStore reports a full disk as a ValueError with the reason in its text."""
    target, save = tmp_path / "out", conversion._save

    def full(path, arrays):
        if path.name == "layers.2":
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']")
        save(path, arrays)

    monkeypatch.setattr(conversion, "_save", full)
    with pytest.raises(CheckpointError) as caught:
        convert(SOURCE, target)
    assert is_clear(str(caught.value), target)
    monkeypatch.undo()
    assert convert(SOURCE, target).resumed == 3
    assert verify(SOURCE, target).equal


@BOTH
def test_disk_without_room_for_the_next_part(tmp_path, monkeypatch, write):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100_000, 0, 100_000))
    with pytest.raises(CheckpointError) as caught:
        write(SOURCE, tmp_path / "out")
    assert is_clear(str(caught.value), tmp_path / "out")
    assert "0.1 MB are free" in str(caught.value)


# ---- memory ---------------------------------------------------------------------------------------------------------


def model_of(layers, path, vocabulary=512):
    """Layers of about four megabytes, in few tensors."""
    config = dataclasses.replace(
        Config.tiny(),
        vocab_size=vocabulary,
        hidden_size=512,
        moe_intermediate_size=1024,
        num_hidden_layers=layers,
        num_hash_layers=0,
        compress_ratios=(0,) * layers,
        num_nextn_predict_layers=0,
        n_routed_experts=2,
    )
    export((config, random_params(config)), path)
    return path


def peak_of(function, *arguments) -> int:
    tracemalloc.start()
    try:
        function(*arguments)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_the_layers(tmp_path):
    few, many = model_of(2, tmp_path / "few"), model_of(6, tmp_path / "many")
    for path in (few, many):
        convert(path, tmp_path / f"{path.name}.orbax")  # what is imported and traced once is not what is measured
    sizes = [sum(file.stat().st_size for file in path.glob("*.safetensors")) for path in (few, many)]
    layer = (sizes[1] - sizes[0]) / 4
    assert layer > 3e6
    for write in (convert, export):
        peaks = [peak_of(write, path, tmp_path / f"{path.name}.{write.__name__}") for path in (few, many)]
        assert peaks[1] < peaks[0] + layer / 4
    peaks = [peak_of(verify, path, tmp_path / f"{path.name}.orbax") for path in (few, many)]
    assert peaks[1] < peaks[0] + layer / 4


def test_memory_does_not_grow_with_a_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(interface, "PIECE_BYTES", 1 << 20)
    path = model_of(1, tmp_path / "model", vocabulary=16384)
    assert read_directory(path)["embed.weight"].nbytes == 16 << 20
    verify(path, path)
    assert peak_of(verify, path, path) < 8 << 20
    assert peak_of(export, path, tmp_path / "out") < 8 << 20
