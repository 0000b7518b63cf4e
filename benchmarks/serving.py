"""Serving under load: throughput and waiting times of `v4-jax serve` against load, drafts, prefixes.

The server runs as a process of its own with the embedded model; clients come at random times (Poisson), each with a
text of its own, and stream what is answered. First twice as many clients as there are slots, without a pause, show how
much the server can do; then clients come at fractions of that rate. Once for each way to draft, at the same rates.
Last, one client asks one question after another about the same long text, with and without a prefix cache.

    python benchmarks/serving.py [--requests 60] [--drafts none mtp:2]

Writes benchmarks/results/serving.json and serving.png, and prints a table. Everything shares this machine's cores, the
clients too: what can be compared is what stands in one table.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from rich.console import Console
from rich.table import Table

from v4_jax.infer.evaluation import recall

RESULTS = Path(__file__).parent / "results"
MODEL = Path(__file__).parents[1] / "v4_jax" / "data" / "demo"

SLOTS, PROMPT, ANSWER = 8, 1000, 48  # characters of a text, which are tokens; tokens of an answer
DOCUMENT, QUESTION, QUESTIONS = 8192, 100, 20  # tokens that all prompts share, and of each one's end
PREFIXES = {
    "none kept": ["--prefix-memory", 0],
    "windows full": ["--prefix-memory", "1G"],
    "windows every 1K": ["--prefix-memory", "1G", "--prefix-windows", "1K"],
    "windows none": ["--prefix-memory", "1G", "--prefix-windows", "none"],
}
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25)  # of what the server can do


class Seen(NamedTuple):
    """What one client sees, in seconds from the moment that it asks; and what of its prompt was not read again."""

    first: float
    last: float
    tokens: int
    cached: int


@contextlib.contextmanager
def server(*others: Any) -> Iterator[str]:
    """A running server's address."""
    options = ["--policy", "float32", "--slots", SLOTS, "--port", 8123, "--requests", 10**6]
    command = [Path(sys.executable).parent / "v4-jax", "serve", MODEL, *options, *others]
    process = subprocess.Popen([str(word) for word in command], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        said = iter(process.stderr.readline, "")
        found = next((match for line in said if (match := re.search(r"http://\S+/v1", line))), None)
        if found is None:
            raise SystemExit("the server did not start")
        yield found[0]
    finally:
        process.terminate()
        process.wait()


async def ask(client: httpx.AsyncClient, text: str) -> Seen:
    """One client's request."""
    body = {"prompt": text, "max_tokens": ANSWER, "temperature": 0, "stream": True, "logprobs": 0}
    body |= {"stream_options": {"include_usage": True}}
    asked, first, tokens, cached = time.perf_counter(), 0.0, 0, 0
    async with client.stream("POST", "/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                said = json.loads(line[6:])
                tokens += sum(len(choice["logprobs"]["tokens"]) for choice in said["choices"])
                cached = (said["usage"] or {}).get("prompt_cache_hit_tokens", 0)
                first = first or time.perf_counter() - asked
    return Seen(first, time.perf_counter() - asked, tokens, cached)


async def closed(client: httpx.AsyncClient, texts: list[str]) -> float:
    """Requests a second, if the next one comes as soon as one is answered."""
    waiting, started = iter(texts), time.perf_counter()

    async def work() -> None:
        for text in waiting:
            await ask(client, text)

    await asyncio.gather(*(work() for _ in range(2 * SLOTS)))
    return len(texts) / (time.perf_counter() - started)


async def offered(client: httpx.AsyncClient, texts: list[str], rate: float) -> dict[str, Any]:
    """What clients see who come at random times, so many a second in the mean."""
    gaps = np.random.default_rng(0).exponential(1 / rate, len(texts))
    started, running = time.perf_counter(), []
    for text, moment in zip(texts, np.cumsum(gaps), strict=True):
        await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
        running.append(asyncio.create_task(ask(client, text)))
    seen = await asyncio.gather(*running)
    seconds = time.perf_counter() - started
    between = [(one.last - one.first) / max(1, one.tokens - 1) for one in seen]
    return {
        "requests a second": rate,
        "tokens a second": sum(one.tokens for one in seen) / seconds,
        "first token": np.quantile([one.first for one in seen], (0.5, 0.95)).tolist(),
        "between tokens": np.quantile(between, (0.5, 0.95)).tolist(),
    }


async def measure(address: str, count: int, rates: list[float]) -> tuple[list[float], list[dict[str, Any]]]:
    """What a server can do, and what clients see at rates; at fractions of the former where there are none."""
    rng = np.random.default_rng(1)
    texts = [recall.lesson(rng, PROMPT, told=24, asked=24) for _ in range(count)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        await closed(client, texts[: 2 * SLOTS])
        most = await closed(client, texts)
        rates = rates or [load * most for load in LOADS]
        return rates, [{"most requests a second": most}, *[await offered(client, texts, rate) for rate in rates]]


async def shared(address: str) -> dict[str, Any]:
    """What a client sees who asks about a text that it has asked about before; the first question is left out."""
    rng = np.random.default_rng(2)
    document = recall.lesson(rng, DOCUMENT, told=24, asked=24)
    ends = [recall.lesson(rng, QUESTION, told=2, asked=2) for _ in range(QUESTIONS + 1)]
    async with httpx.AsyncClient(base_url=address, timeout=None) as client:
        _, *seen = [await ask(client, document + end) for end in ends]
    first = np.quantile([one.first for one in seen], (0.5, 0.95)).tolist()
    return {"first token": first, "found": float(np.mean([one.cached for one in seen]))}


def picture(found: dict[str, list[dict[str, Any]]], prefixes: dict[str, dict[str, Any]], path: Path) -> None:
    """Throughput and time to the first token against the load, and time to the first token against what is kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right, last) = plt.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for draft, (_, *rows) in found.items():
        loads = [row["requests a second"] for row in rows]
        left.plot(loads, [row["tokens a second"] for row in rows], marker="o", label=f"draft {draft}")
        right.plot(loads, [row["first token"][0] for row in rows], marker="o", label=f"draft {draft}, median")
        right.plot(loads, [row["first token"][1] for row in rows], marker="o", ls=":", label=f"draft {draft}, 95%")
    left.set(xlabel="requests a second", ylabel="tokens a second", ylim=(0, None))
    right.set(xlabel="requests a second", ylabel="seconds to the first token", yscale="log")
    for axes in (left, right):
        axes.legend()
        axes.grid(alpha=0.3)
    last.barh(list(prefixes), [row["first token"][0] for row in prefixes.values()])
    last.invert_yaxis()
    last.set(xlabel="seconds to the first token, median", title=f"{DOCUMENT:,} of {DOCUMENT + QUESTION:,} tokens known")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60, help="of each load")
    parser.add_argument("--drafts", nargs="+", default=["none", "mtp:2"])
    given = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    rates: list[float] = []
    for draft in given.drafts:
        with server("--context", "2K", "--prefix-memory", 0, "--draft", draft) as address:
            rates, found[draft] = asyncio.run(measure(address, given.requests, rates))
    prefixes: dict[str, dict[str, Any]] = {}
    for name, options in PREFIXES.items():
        with server("--context", "16K", *options) as address:
            prefixes[name] = asyncio.run(shared(address))
    table = Table(title=f"{SLOTS} slots, prompts of {PROMPT} tokens, answers of {ANSWER}", title_justify="left")
    for name in (
        "draft",
        "most requests/s",
        "requests/s",
        "tokens/s",
        "first token, s (50%, 95%)",
        "token, ms (50%, 95%)",
    ):
        table.add_column(name, justify="right")
    for draft, (most, *rows) in found.items():
        for row in rows:
            first, between = row["first token"], row["between tokens"]
            table.add_row(
                draft,
                f"{most['most requests a second']:.2f}",
                f"{row['requests a second']:.2f}",
                f"{row['tokens a second']:.0f}",
                f"{first[0]:.2f}, {first[1]:.2f}",
                f"{1e3 * between[0]:.1f}, {1e3 * between[1]:.1f}",
            )
    Console(width=120).print(table)
    title = f"{QUESTIONS} questions of {QUESTION} tokens about {DOCUMENT:,}"
    table = Table("prefix cache", "tokens found", "first token, s (50%, 95%)", title=title, title_justify="left")
    for name, row in prefixes.items():
        table.add_row(name, f"{row['found']:.0f}", "{:.3f}, {:.3f}".format(*row["first token"]))
    Console(width=120).print(table)
    settings = {"slots": SLOTS, "prompt": PROMPT, "answer": ANSWER, "requests": given.requests}
    settings |= {"document": DOCUMENT, "question": QUESTION, "questions": QUESTIONS}
    RESULTS.mkdir(exist_ok=True)
    results = {"settings": settings, "by draft": found, "prefixes": prefixes}
    (RESULTS / "serving.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(found, prefixes, RESULTS / "serving.png")


if __name__ == "__main__":
    main()
