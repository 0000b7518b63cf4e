"""How many bundles of instructions the TPU compiler makes of each kernel, against those that were recorded.

It writes them down as it compiles, where it is told to before it starts. Counts are of code: a turn of a loop
counts once, so that what a turn costs shows, and how many there are does not.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from tests.conftest import tpu_devices

RECORDED = Path(__file__).with_name("bundles.json")
RECORD = "RECORD_BUNDLES"  # in the environment: write the counts down instead of comparing them
MOST = 0.05  # by which a kernel may grow, and shrinks without a word

_TOTAL = re.compile(r"total scheduled bundles:\s+(\d+)")
_OPERATION = re.compile(r"%([\w.\-]+) = [^\n]* custom-call\(")
_KERNEL = re.compile(r'%([\w.\-]+) = [^\n]* custom_call_target="tpu_custom_call"')


class Bundles:
    """Counts of the kernels that a process compiles."""

    def __init__(self) -> None:
        """Tells libtpu to count; where other tests have started it already, it is too late, and nothing is compared."""
        self._late = tpu_devices.cache_info().currsize > 0
        self._folder = Path(tempfile.mkdtemp())
        options = f"--xla_jf_dump_to={self._folder} --xla_jf_dump_llo_text=true"
        options += " --xla_jf_dump_llo_pass_label_regex=final_bundles"
        self._options = os.environ.get("LIBTPU_INIT_ARGS", "")
        os.environ["LIBTPU_INIT_ARGS"] = f"{self._options} {options}".strip()
        self._recorded: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {"bundles": {}}
        self._found: dict[str, dict[str, int]] = {}

    def start(self) -> None:
        """Forgets what has been compiled so far."""
        shutil.rmtree(self._folder)
        self._folder.mkdir()

    def finish(self, case: str, text: str) -> None:
        """Compares what has been compiled since the start with what is recorded for a case.

        Args:
          case: its name.
          text: of the compiled program, which says what of it are kernels.

        Raises:
          AssertionError: a kernel has grown, or is not known.
        """
        if self._late:
            warnings.warn("libtpu was started before it could be told to count bundles: make tpu counts", stacklevel=2)
            return
        kernels, most = set(_KERNEL.findall(text)), dict[str, int]()
        for path in self._folder.glob("*schedule-analysis_final_bundles.txt"):
            said = path.read_text()
            total, operation = _TOTAL.search(said), _OPERATION.search(said)
            if total and operation and operation[1] in kernels:  # the compiler may take one up more than once
                most[operation[1]] = max(most.get(operation[1], 0), int(total[1]))
        counts = Counter[str]()
        for operation_name, bundles in most.items():
            counts[operation_name.partition(".")[0]] += bundles
        assert counts, "the compiler counted nothing: the program was kept from another run, or an option has gone"
        self._found[case] = dict(sorted(counts.items()))
        if RECORD not in os.environ:
            judge(case, self._found[case], self._recorded["bundles"].get(case, {}), self._recorded.get("libtpu"))

    def write(self) -> None:
        """Ends the counting, and writes it down if it was asked for."""
        shutil.rmtree(self._folder)
        os.environ["LIBTPU_INIT_ARGS"] = self._options  # of processes that follow
        if RECORD in os.environ and self._found:
            bundles = dict(sorted((self._recorded["bundles"] | self._found).items()))
            RECORDED.write_text(json.dumps({"libtpu": _libtpu(), "bundles": bundles}, indent=1) + "\n")


def judge(case: str, counts: dict[str, int], recorded: dict[str, int], libtpu: str | None) -> None:
    """Compares a case's counts with those recorded.

    Args:
      case: its name.
      counts: bundles by kernel.
      recorded: likewise.
      libtpu: version of the compiler that the latter are of.

    Raises:
      AssertionError: a kernel has grown, is not recorded, or was recorded with another compiler.
    """
    assert libtpu == _libtpu(), f"recorded with libtpu {libtpu}, this is {_libtpu()}: record anew with make bundles"
    assert set(counts) == set(recorded), (
        f"{case} has the kernels {sorted(counts)}, recorded are {sorted(recorded)}: record them with make bundles"
    )
    for kernel, count in counts.items():
        before = recorded[kernel]
        said = f"{kernel} takes {count:,} bundles in {case}, where {before:,} are recorded ({count / before - 1:+.1%})"
        assert count <= (1 + MOST) * before, f"{said}: make it small again, or record it with make bundles"
        if count < (1 - MOST) * before:
            warnings.warn(f"{said}: record the improvement with make bundles", stacklevel=2)


def _libtpu() -> str:
    return importlib.metadata.version("libtpu")
