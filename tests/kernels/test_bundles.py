"""The watch over kernels' sizes: what has grown is refused, what has shrunk is told, and what is new is asked for."""

from __future__ import annotations

import json
import os
import types
import warnings

import pytest

from tests.kernels import bundles


def described(topologies):
    """Stands for `tpu_devices`, which has started libtpu for so many topologies."""
    return types.SimpleNamespace(cache_info=lambda: types.SimpleNamespace(currsize=topologies))


@pytest.fixture(autouse=True)
def compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(bundles, "_libtpu", lambda: "1.0")
    monkeypatch.setattr(bundles, "tpu_devices", described(0))
    monkeypatch.setattr(bundles, "RECORDED", tmp_path / "bundles.json")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_other=1")
    monkeypatch.delenv(bundles.RECORD, raising=False)


def judged(count, before=1000, libtpu="1.0"):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        bundles.judge("case[v6e]", {"matmul": count}, {"matmul": before} if before else {}, libtpu)
    return [str(one.message) for one in said]


def test_a_twentieth_either_way_is_nothing():
    assert judged(1000) == judged(1050) == judged(950) == []


def test_what_has_grown_is_refused():
    with pytest.raises(AssertionError, match=r"matmul takes 1,051 bundles in case\[v6e\], where 1,000 .* \(\+5.1%\)"):
        judged(1051)


def test_what_has_shrunk_is_told():
    (sentence,) = judged(949)
    assert "(-5.1%): record the improvement with make bundles" in sentence


def test_what_cannot_be_compared_is_asked_for():
    with pytest.raises(AssertionError, match=r"\['matmul'\], recorded are \[\]: record them with make bundles"):
        judged(1000, before=None)
    with pytest.raises(AssertionError, match=r"recorded with libtpu 0\.9, this is 1\.0"):
        judged(1000, libtpu="0.9")


PROGRAM = """
  %matmul.1 = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={}
  ROOT %matmul.2 = f32[8]{0} custom-call(%matmul.1), custom_call_target="tpu_custom_call"
  %offload.4 = f32[8]{0} custom-call(%x), custom_call_target="AsyncOffload"
"""


def dumped(name, total, opcode="custom-call"):
    """What the compiler writes of an operation."""
    folder = os.environ["LIBTPU_INIT_ARGS"].split("--xla_jf_dump_to=")[1].split()[0]
    line = f"%{name} = f32[1,4096]{{1,0:T(1,128)}} {opcode}(%bitcast.2, %a.1)"
    text = f"Schedule analysis:\n\ttotal scheduled bundles:    {total}\n\t {total} scheduled bundles: {line}\n"
    with open(f"{folder}/17-{name}-00-schedule-analysis_final_bundles.txt", "w") as file:
        file.write(text)


def test_counts_are_read_recorded_and_compared(monkeypatch):
    counting = bundles.Bundles()
    assert os.environ["LIBTPU_INIT_ARGS"].startswith("--xla_other=1 --xla_jf_dump_to=")
    monkeypatch.setenv(bundles.RECORD, "1")
    dumped("before", 7)
    counting.start()
    dumped("matmul.1", 400)
    dumped("matmul.2", 100)
    dumped("copy.3", 30, opcode="copy")
    dumped("offload.4", 70)
    counting.finish("case[v6e]", PROGRAM)
    counting.write()
    assert json.loads(bundles.RECORDED.read_text()) == {"libtpu": "1.0", "bundles": {"case[v6e]": {"matmul": 500}}}

    monkeypatch.delenv(bundles.RECORD)
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    again = bundles.Bundles()
    dumped("matmul.1", 520)
    again.finish("case[v6e]", PROGRAM)
    again.start()
    with pytest.raises(AssertionError, match="the compiler counted nothing"):
        again.finish("case[v6e]", PROGRAM)
    again.write()
    assert json.loads(bundles.RECORDED.read_text())["bundles"] == {"case[v6e]": {"matmul": 500}}


def test_a_compiler_that_was_started_before_is_not_asked(monkeypatch):
    monkeypatch.setattr(bundles, "tpu_devices", described(1))
    counting = bundles.Bundles()
    with pytest.warns(UserWarning, match="libtpu was started before it could be told to count"):
        counting.finish("case[v6e]", PROGRAM)
    counting.write()
