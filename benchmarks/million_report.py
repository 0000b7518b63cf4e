"""What `benchmarks/million.py` measured, as tables, sentences, a picture and a part of docs/million.md."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "million.md"

COMPARED = 65536  # the length at which one device computes everything again
DECODED = 64
TOLERANCE = 2e-4  # the project's contract for float32 logits
NEAR_TIES = 1e-4  # share of picked entries that may differ: of two that score alike to the last digit, either is right
MEGABYTE = 1e6


def sentences(equality: dict[str, Any]) -> list[str]:
    tokens = equality["chunks"] + DECODED
    return [
        f"Split against one device, {equality['length']:,} tokens and {DECODED} decoded, the split run's decisions "
        f"replayed: logits at the ends of {equality['chunks']} chunks and of all decoded tokens differ by at most "
        f"{equality['difference']:.1e} (allowed {TOLERANCE:.0e}; largest logit {equality['largest logit']:.1f}), "
        f"another likeliest token at {equality['argmax differs']} of {tokens}.",
        f"Deciding for itself, one device picks {equality['other picks']:,} of {equality['picks']:,} entries otherwise "
        f"(near ties, allowed {NEAR_TIES:.0e} of them) and other experts for "
        f"{equality['tokens with other experts']:,} tokens of all layers; logits are then within {TOLERANCE:.0e} at "
        f"{equality['free within']} of {tokens} tokens, at most {equality['free difference']:.1e} apart, another "
        f"likeliest token at {equality['free argmax differs']}.",
    ]


def prefill_seconds(run: dict[str, Any]) -> float:
    return sum(chunk["seconds"] for chunk in run["chunks"])


def cpu_seconds(run: dict[str, Any]) -> float:
    return sum(chunk["cpu seconds"] for chunk in run["chunks"])


def columns(run: dict[str, Any], *names: str) -> list[np.ndarray]:
    """Numbers of all chunks, one array for each name."""
    return [np.array([chunk[name] for chunk in run["chunks"]]) for name in names]


def cost(run: dict[str, Any]) -> np.ndarray:
    """Seconds of CPU per token in each chunk."""
    return columns(run, "cpu seconds")[0] / run["chunk"]


@dataclasses.dataclass(frozen=True)
class Fit:
    """Seconds of CPU per FLOP: of what grows with the position (index scores and HCA), and of everything else.

    CPU time of all threads, since whatever else runs on the machine moves the wall clock far more.
    """

    constant: float
    growing: float

    @classmethod
    def of(cls, run: dict[str, Any]) -> Fit:
        """Least squares of the relative deviations over a run's chunks."""
        work = np.stack(columns(run, "constant", "growing"), axis=1) / cost(run)[:, None]
        rates = np.linalg.lstsq(work, np.ones(len(work)), rcond=None)[0]
        return cls(*(float(rate) for rate in rates))

    def per_token(self, run: dict[str, Any]) -> np.ndarray:
        """Seconds of CPU per token in each chunk."""
        constant, growing = columns(run, "constant", "growing")
        return self.constant * constant + self.growing * growing

    def seconds(self, run: dict[str, Any]) -> float:
        """Seconds of CPU of a whole prefill."""
        return float(self.per_token(run).sum() * run["chunk"])

    def explained(self, run: dict[str, Any]) -> float:
        """Share of the variance of a run's cost per token that it explains (R squared)."""
        return float(1 - np.sum((cost(run) - self.per_token(run)) ** 2) / np.sum((cost(run) - cost(run).mean()) ** 2))

    def deviation(self, run: dict[str, Any]) -> float:
        """Median relative deviation of a run's chunks."""
        return float(np.median(np.abs(self.per_token(run) / cost(run) - 1)))


def tables(results: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Titles, headings and rows."""
    runs = results["runs"]
    fit = Fit.of(runs[-1])

    def on_device(run: dict[str, Any], name: str) -> str:
        program = run["programs"][name]
        both = (program["arguments"] + program["temporaries"]) / MEGABYTE
        return f"{both:.1f} ({program['temporaries'] / MEGABYTE:.1f})"

    overall = []
    for run in runs:
        seconds = prefill_seconds(run)
        overall.append(
            [
                f"{run['length']:,}",
                f"{seconds:,.1f}",
                f"{cpu_seconds(run):,.1f}",
                f"{fit.seconds(run):,.1f}",
                f"{run['length'] / seconds:,.0f}",
                f"{1e3 * np.median(run['decode seconds']):.1f}",
                on_device(run, "prefill"),
                on_device(run, "decode"),
                f"{run['peak'] / MEGABYTE:,.0f}",
            ]
        )
    headings = ["tokens", "prefill, s", "CPU, s", "CPU by the fit, s", "tokens/s", "decode, ms/token"]
    headings += ["prefill, MB on a device (temporaries)", "decode, MB on a device (temporaries)", "peak of all, MB"]
    first = (f"Prefill and {DECODED} decoded tokens, {results['devices']} virtual devices", headings, overall)

    roles = []
    for role in runs[-1]["predicted cache"]:
        roles.append([role])
        for run in runs:
            held, predicted, each = (run[name][role] for name in ("cache", "predicted cache", "cache per device"))
            exact = "" if held == predicted else f" (predicted {predicted / MEGABYTE:.3f})"
            roles[-1] += [f"{held / MEGABYTE:.3f}{exact}", f"{each / MEGABYTE:.3f}"]
    total = ["all roles"]
    for run in runs:
        total += [f"{sum(run[name].values()) / MEGABYTE:.3f}" for name in ("cache", "cache per device")]
    roles.append(total)
    headings = ["role"]
    for run in runs:
        headings += [f"{run['length']:,}", "on a device"]
    exact = all(run["cache"] == run["predicted cache"] for run in runs)
    title = "Cache, MB of float32: " + ("exactly as the configuration predicts" if exact else "NOT as predicted")
    return [first, (title, headings, roles)]


def remarks(results: dict[str, Any]) -> list[str]:
    """The fit and the comparison, one sentence each."""
    runs = results["runs"]
    fit, forecast = Fit.of(runs[-1]), Fit.of(runs[-2])
    ratio = forecast.seconds(runs[-1]) / cpu_seconds(runs[-1])
    rooms = [run for run in runs if "difference of room" in run]

    def growth(total: Callable[[dict[str, Any]], int]) -> str:
        """Bytes per further token between each length and the next."""
        steps = itertools.pairwise(runs)
        return " and ".join(f"{(total(b) - total(a)) / (b['length'] - a['length']):.1f}" for a, b in steps)

    return [
        f"Fit over the {len(runs[-1]['chunks'])} chunks of {runs[-1]['length']:,} tokens: {1e-9 / fit.growing:.1f} "
        f"GFLOP/s in index scores and HCA, {1e-9 / fit.constant:.2f} in all else, of CPU time; it "
        f"explains {fit.explained(runs[-1]):.1%} of the variance, and half of the chunks are within "
        f"{fit.deviation(runs[-1]):.1%} of it.",
        f"The rates of {runs[-2]['length']:,} tokens alone forecast {ratio:.2f} times the CPU time that "
        f"{runs[-1]['length']:,} took.",
        "Bytes per further token, from each length to the next: "
        f"{growth(lambda run: sum(run['cache'].values()))} of cache (predicted "
        f"{growth(lambda run: sum(run['predicted cache'].values()))}); on a device, "
        f"{growth(lambda run: sum(run['programs']['prefill'].values()))} in prefill and "
        f"{growth(lambda run: sum(run['programs']['decode'].values()))} in decoding; "
        f"{growth(lambda run: run['peak'])} of the process' peak.",
        *sentences(results["equality"]),
        *(
            f"In a cache with room for {run['length']:,}, the first {COMPARED:,} tokens give the same logits: greatest "
            f"difference {run['difference of room']:.1e}."
            for run in rooms
        ),
    ]


def show(results: dict[str, Any]) -> None:
    console = Console()
    for title, headings, rows in tables(results):
        table = Table(title=title)
        for heading in headings:
            table.add_column(heading, justify="right" if heading != "role" else "left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in remarks(results):
        console.print(line, highlight=False)


def markdown(results: dict[str, Any]) -> str:
    parts = []
    for title, headings, rows in tables(results):
        lines = [f"**{title}**", "", f"| {' | '.join(headings)} |", f"|{' ---: |' * len(headings)}"]
        parts.append("\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]))
    parts.append("\n".join(f"- {line}" for line in remarks(results)))
    return "\n\n".join(parts)


def write_document(results: dict[str, Any]) -> None:
    """Replaces the measured part of the document."""
    begin, end = "<!-- measured -->\n", "<!-- end of measured -->"
    before, rest = DOCUMENT.read_text().split(begin)
    DOCUMENT.write_text(f"{before}{begin}\n{markdown(results)}\n\n{end}{rest.split(end)[1]}")


def draw(results: dict[str, Any], path: Path) -> None:
    """Cost against position, and memory against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    runs = results["runs"]
    fit = Fit.of(runs[-1])
    figure, (per_token, memory) = pyplot.subplots(1, 2, figsize=(13, 5), constrained_layout=True)

    for number, run in enumerate(runs):
        position, wall = columns(run, "position", "seconds")
        longest = run is runs[-1]
        name = "wall clock: with whatever else ran" if longest else None
        per_token.plot(position / 1024, 1000 * wall / run["chunk"], ".", color="0.85", label=name, zorder=0)
        label = f"CPU time, {run['length'] // 1024}K tokens"
        per_token.plot(position / 1024, 1000 * cost(run), ".", color=f"C{number}", label=label)
    position = columns(runs[-1], "position")[0]
    line = 1000 * fit.per_token(runs[-1])
    per_token.plot(position / 1024, line, "k-", linewidth=1, label="predicted FLOPs, two rates")
    per_token.set(
        xlabel="position, thousands (K) of tokens", ylabel="seconds per 1,000 tokens", title="Cost of a token"
    )

    lengths = [run["length"] / 1024 for run in runs]

    def curve(label: str, values: list[float], style: str) -> None:
        memory.plot(lengths, np.array(values) / MEGABYTE, style, label=label)

    curve("peak of the whole process", [run["peak"] for run in runs], "s-")
    for name in ("prefill", "decode"):
        curve(f"{name}: a device, arguments and temporaries", [sum(r["programs"][name].values()) for r in runs], "o-")
    curve("cache, all devices", [sum(run["cache"].values()) for run in runs], "^-")
    curve("cache, predicted", [sum(run["predicted cache"].values()) for run in runs], "k:")
    curve("cache, a device", [sum(run["cache per device"].values()) for run in runs], "v-")
    memory.set(xlabel="length, thousands (K) of tokens", ylabel="MB", title="Memory", xscale="log", yscale="log")
    memory.set_xticks(lengths, [f"{length:.0f}" for length in lengths])
    memory.minorticks_off()
    memory.set_ylim(top=30 * max(run["peak"] for run in runs) / MEGABYTE)  # room for the legend
    for axes in (per_token, memory):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    figure.savefig(path, dpi=120)
