"""Metrics: every step once in the file whatever was interrupted, and the same in TensorBoard."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from v4_jax.config import Config
from v4_jax.costs import flops_per_token, training_flops
from v4_jax.train.metrics import Metrics, MetricsError, duration, line, read_metrics, throughput


def steps_of(run):
    return read_metrics(run / "metrics.jsonl")["step"].tolist()


def test_a_line_a_step(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(1, {"loss": np.float32(3.5), "mtp_loss": 4.0})
        metrics.write(3, {"loss": float("nan"), "tokens": np.int32(64)})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()  # written while the run goes on
    first, second = map(json.loads, lines)
    assert first.pop("time") == pytest.approx(second.pop("time"), abs=60)
    assert (first, second) == (
        {"step": 1, "loss": 3.5, "mtp_loss": 4.0},
        {"step": 3, "loss": None, "tokens": 64.0},
    )
    found = read_metrics(tmp_path / "metrics.jsonl")
    assert found["step"].dtype == np.int64 and found["loss"].dtype == np.float64
    np.testing.assert_array_equal(found["step"], [1, 3])
    np.testing.assert_array_equal(found["loss"], [3.5, np.nan])
    np.testing.assert_array_equal(found["mtp_loss"], [4.0, np.nan])
    np.testing.assert_array_equal(found["tokens"], [np.nan, 64])


def test_a_run_goes_on_from_an_earlier_step(tmp_path):
    with Metrics(tmp_path) as metrics:
        for step in range(1, 8):
            metrics.write(step, {"loss": step})
    with Metrics(tmp_path) as metrics:
        metrics.rewind(4)
        assert steps_of(tmp_path) == [1, 2, 3, 4]
        for step in (5, 6):
            metrics.write(step, {"loss": 10 * step})
        metrics.rewind(5)  # after a spike
        metrics.write(6, {"loss": 100.0})
    found = read_metrics(tmp_path / "metrics.jsonl")
    expected = {1: 1, 2: 2, 3: 3, 4: 4, 5: 50, 6: 100}
    assert dict(zip(found["step"].tolist(), found["loss"].tolist(), strict=True)) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    assert shown_by_tensorboard(tmp_path / "tensorboard") == expected


def shown_by_tensorboard(folder):
    """What TensorBoard shows: files in order; a session that starts at a step hides what there was from there on."""
    values = {}
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            assert masked_crc32c(content[:8]) == int.from_bytes(content[8:12], "little")
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            if event.HasField("session_log"):
                values = {step: value for step, value in values.items() if step < event.step}
            for value in event.summary.value:
                assert value.tag == "loss"
                values[event.step] = value.simple_value
    return values


def test_without_tensorboard(tmp_path):
    with Metrics(tmp_path, tensorboard=False) as metrics:
        metrics.write(1, {"loss": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_step_is_not_written_twice(tmp_path):
    with Metrics(tmp_path) as metrics:
        metrics.write(2, {"loss": 1.0})
        with pytest.raises(ValueError, match="step 2 follows step 2, expected a later one"):
            metrics.write(2, {"loss": 1.0})
    with Metrics(tmp_path) as metrics, pytest.raises(ValueError, match="step 1 follows step 2"):
        metrics.write(1, {"loss": 1.0})


def test_a_last_line_that_is_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert steps_of(tmp_path) == [1]
    with Metrics(tmp_path) as metrics:
        metrics.write(2, {"loss": 1.0})
    assert read_metrics(path)["loss"].tolist() == [2.0, 1.0]


def test_no_lines_yet(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert list(read_metrics(tmp_path / "metrics.jsonl")) == ["step"] and steps_of(tmp_path) == []


@pytest.mark.parametrize("bad", ["[1]", "{", '{"loss": 1.0}', '{"step": 1.5}', '{"step": 1, "loss": "x"}', "\udcff"])
def test_a_damaged_line(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n'.encode(errors="surrogateescape"))
    with pytest.raises(MetricsError, match=r"metrics.jsonl: line 2 is .*, expected a JSON object of numbers with an"):
        read_metrics(path)


# ---- throughput ------------------------------------------------------------------------------------------------------


def device(kind):
    return SimpleNamespace(device_kind=kind)


def test_throughput():
    config = Config.flash()
    found = throughput(training_flops(config, 4096), tokens=8192, seconds=2.0, devices=[device("cpu")])
    forward = flops_per_token(config, 4096, phase="prefill").total
    assert found == {"tokens_per_second": 4096, "flops_per_second": 3 * forward * 4096}
    assert 6 * 13e9 < found["flops_per_second"] / 4096 < 9 * 13e9  # 13B active parameters, and attention


@pytest.mark.parametrize(("kind", "peak"), [("TPU v5 lite", 197e12), ("TPU7x", 2307e12 / 2), ("TPU v5p", 459e12)])
def test_share_of_the_peak(kind, peak):
    found = throughput(10**9, 1000, 1.0, [device(kind)] * 4)
    assert found["flops_share"] == pytest.approx(found["flops_per_second"] / (4 * peak))


# ---- the line --------------------------------------------------------------------------------------------------------


def test_the_line():
    metrics = {
        "loss": 3.2141,
        "mtp_loss": 3.4019,
        "balance": 1.0312,
        "gradient_norm": 0.912,
        "learning_rate": 2.7e-4,
        "tokens": 1117,
        "tokens_per_second": 5120.3,
        "flops_per_second": 1.21e11,
        "expert_unused": 0.1,
    }
    assert line(120, 1000, metrics) == (
        "step   120/1,000  loss 3.214  mtp 3.402  balance 1.03  grad 0.912  lr 2.7e-04  5,120 tok/s  1.2e11 FLOP/s  "
        "eta 3m12s"
    )
    assert "  1.2e11 FLOP/s (41% of peak)  eta" in line(120, 1000, metrics | {"flops_share": 0.413})
    assert line(1, 10, {"loss": float("nan")}) == "step  1/10  loss nan"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (59.6, "1m00s"), (192, "3m12s"), (7512, "2h05m"), (86399.9, "1d00h"), (1e6, "11d13h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
