"""Serving under load: throughput, waiting times and tokens a step of `v4-jax serve` against load, drafts, prefixes.

The server runs as a process of its own with the embedded model. First one client has it for itself. Then twice as many
clients as there are slots, without a pause, show how much the server can do; then clients come at random times
(Poisson) at fractions of that rate, each with a text of its own, and stream what is answered. Once for each way to
draft, at the rates of the first one. DSpark's stages are those that `benchmarks/drafts.py` trains, on the same trunk.
Last, one client asks one question after another about the same long text, with and without a prefix cache.

    python benchmarks/serving.py [--requests 60] [--drafts none mtp:2]
    python benchmarks/serving.py --drafts none mtp:1 mtp:2 dspark --stages DIRECTORY/model

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

SLOTS, PROMPT, ANSWER = 8, 1000, 192  # characters of a text, which are tokens; tokens of an answer
ALONE = 12  # requests of a client that has the server for itself
DOCUMENT, QUESTION, QUESTIONS = 8192, 100, 20  # tokens that all prompts share, and of each one's end
PREFIXES = {
    "none kept": ["--prefix-memory", 0],
    "windows full": ["--prefix-memory", "1G"],
    "windows every 1K": ["--prefix-memory", "1G", "--prefix-windows", "1K"],
    "windows none": ["--prefix-memory", "1G", "--prefix-windows", "none"],
}
LOADS = (0.25, 0.5, 0.75, 1.0, 1.25)  # of what the server can do


class Seen(NamedTuple):
    """What one client sees, in seconds from the moment that it asks; and what the server says of it.

    Attributes:
      first: seconds to the first token.
      last: seconds to the end.
      tokens: of the answer.
      cached: tokens of the prompt that were not read again.
    """

    first: float
    last: float
    tokens: int
    cached: int


@contextlib.contextmanager
def server(model: Path, *others: Any) -> Iterator[str]:
    """A running server's address."""
    options = ["--policy", "float32", "--slots", SLOTS, "--port", 8123, "--requests", 10**6]
    command = [Path(sys.executable).parent / "v4-jax", "serve", model, *options, *others]
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


async def ask(client: httpx.AsyncClient, text: str, temperature: float = 0) -> Seen:
    """One client's request."""
    body = {"prompt": text, "max_tokens": ANSWER, "temperature": temperature, "stream": True, "logprobs": 0}
    body |= {"stream_options": {"include_usage": True}}
    body |= {"seed": 1}
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


async def counted(client: httpx.AsyncClient) -> np.ndarray:
    """Steps of rows that take drafts, and drafts that were right, as the server has counted them so far."""
    page = (await client.get(str(client.base_url).replace("/v1/", "/metrics"))).text
    steps = re.search(r"^v4_jax_draft_steps (\S+)", page, flags=re.MULTILINE)
    right = re.findall(r'^v4_jax_drafts{.*outcome="accepted"} (\S+)', page, flags=re.MULTILINE)
    assert steps is not None
    return np.array([float(steps[1]), sum(map(float, right))])


async def closed(client: httpx.AsyncClient, texts: list[str], temperature: float) -> float:
    """Requests a second, if the next one comes as soon as one is answered."""
    waiting, started = iter(texts), time.perf_counter()

    async def work() -> None:
        for text in waiting:
            await ask(client, text, temperature)

    await asyncio.gather(*(work() for _ in range(2 * SLOTS)))
    return len(texts) / (time.perf_counter() - started)


async def alone(client: httpx.AsyncClient, texts: list[str], temperature: float) -> dict[str, Any]:
    """What a client sees who has the server for itself, one request after another: decoding, without its prompts."""
    before = await counted(client)
    seen = [await ask(client, text, temperature) for text in texts]
    steps, right = await counted(client) - before
    seconds = [(one.last - one.first) / max(1, one.tokens - 1) for one in seen]
    return {
        "tokens a second": float(1 / np.median(seconds)),
        "tokens a step": float(1 + right / steps) if steps else 1.0,
    }


async def offered(client: httpx.AsyncClient, texts: list[str], rate: float, temperature: float) -> dict[str, Any]:
    """What clients see who come at random times, so many a second in the mean."""
    before = await counted(client)
    gaps = np.random.default_rng(0).exponential(1 / rate, len(texts))
    started, running = time.perf_counter(), []
    for text, moment in zip(texts, np.cumsum(gaps), strict=True):
        await asyncio.sleep(max(0.0, started + moment - time.perf_counter()))
        running.append(asyncio.create_task(ask(client, text, temperature)))
    seen = await asyncio.gather(*running)
    seconds = time.perf_counter() - started
    steps, right = await counted(client) - before
    between = [(one.last - one.first) / max(1, one.tokens - 1) for one in seen]
    return {
        "requests a second": rate,
        "tokens a second": sum(one.tokens for one in seen) / seconds,
        "tokens a step": float(1 + right / steps) if steps else 1.0,
        "first token": np.quantile([one.first for one in seen], (0.5, 0.95)).tolist(),
        "between tokens": np.quantile(between, (0.5, 0.95)).tolist(),
    }


async def measure(
    address: str, count: int, rates: list[float], temperature: float
) -> tuple[list[float], list[dict[str, Any]]]:
    """What a server can do, and what clients see at rates; at fractions of the former where there are none."""
    rng = np.random.default_rng(1)
    texts = [recall.lesson(rng, PROMPT, told=24, asked=24) for _ in range(count)]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        await closed(client, texts[: 2 * SLOTS], temperature)
        one = await alone(client, texts[:ALONE], temperature)
        most = await closed(client, texts, temperature)
        rates = rates or [load * most for load in LOADS]
        seen = [await offered(client, texts, rate, temperature) for rate in rates]
        return rates, [{"most requests a second": most, "alone": one}, *seen]


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
    """Throughput, tokens a step and waiting times against the load, a colour for each way to draft; and the time to the
    first token against what is kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 4, figsize=(18, 8), layout="constrained")
    (single, speed, token, steps), (most, first, last, unused) = panels
    unused.axis("off")
    colours = {draft: f"C{number}" for number, draft in enumerate(found)}
    for draft, (_, *rows) in found.items():
        loads = [row["requests a second"] for row in rows]
        for axes, values in (
            (speed, [row["tokens a second"] for row in rows]),
            (steps, [row["tokens a step"] for row in rows]),
            (token, [1e3 * row["between tokens"][0] for row in rows]),
            (first, [row["first token"][0] for row in rows]),
        ):
            axes.plot(loads, values, marker="o", color=colours[draft], label=draft)
        steps.axhline(found[draft][0]["alone"]["tokens a step"], ls="--", lw=1, color=colours[draft])
        first.plot(loads, [row["first token"][1] for row in rows], marker="o", ls=":", color=colours[draft])
    speed.set(title="Throughput", ylabel="tokens a second", ylim=(0, None))
    steps.set(title="Tokens a step of a row (dashed: alone)", ylabel="tokens", ylim=(0, None))
    token.set(title="Time of a token, median", ylabel="milliseconds", ylim=(0, None))
    first.set(title="First token: median, and 95% dotted", ylabel="seconds", yscale="log")
    for axes in (speed, steps, token, first):
        axes.set_xlabel("requests a second")
        axes.grid(alpha=0.3)
    speed.legend(title="draft")
    single.bar(list(found), [rows[0]["alone"]["tokens a second"] for rows in found.values()], color=colours.values())
    single.set(title="One client alone, decoding", ylabel="tokens a second")
    most.bar(list(found), [rows[0]["most requests a second"] for rows in found.values()], color=colours.values())
    most.set(title="Without a pause, twice as many clients as slots", ylabel="requests a second")
    last.barh(list(prefixes), [row["first token"][0] for row in prefixes.values()], color="gray")
    last.invert_yaxis()
    last.set(xlabel="seconds to the first token, median", title=f"{DOCUMENT:,} of {DOCUMENT + QUESTION:,} tokens known")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=60, help="of each load")
    parser.add_argument("--drafts", nargs="+", default=["none", "mtp:2"])
    parser.add_argument("--stages", type=Path, help="the model that benchmarks/drafts.py has made, for dspark")
    parser.add_argument("--temperature", type=float, default=1.0, help="of answers; 0 always takes the likeliest token")
    given = parser.parse_args()
    if "dspark" in given.drafts and given.stages is None:
        parser.error("dspark wants --stages, the model that benchmarks/drafts.py has made")
    found: dict[str, list[dict[str, Any]]] = {}
    rates: list[float] = []
    for draft in given.drafts:
        model = given.stages if draft == "dspark" else MODEL
        with server(model, "--context", "2K", "--prefix-memory", 0, "--draft", draft) as address:
            rates, found[draft] = asyncio.run(measure(address, given.requests, rates, given.temperature))
    prefixes: dict[str, dict[str, Any]] = {}
    for name, options in PREFIXES.items():
        with server(MODEL, "--context", "16K", *options) as address:
            prefixes[name] = asyncio.run(shared(address))
    table = Table(title=f"{SLOTS} slots, prompts of {PROMPT} tokens, answers of {ANSWER}", title_justify="left")
    for name in (
        "draft",
        "most requests/s",
        "requests/s",
        "tokens/s",
        "tokens a step",
        "first token, s (50%, 95%)",
        "token, ms (50%, 95%)",
    ):
        table.add_column(name, justify="right")
    for draft, (most, *rows) in found.items():
        one = most["alone"]
        table.add_row(draft, "", "alone", f"{one['tokens a second']:.0f}", f"{one['tokens a step']:.2f}", "", "")
        for row in rows:
            first, between = row["first token"], row["between tokens"]
            table.add_row(
                draft,
                f"{most['most requests a second']:.2f}",
                f"{row['requests a second']:.2f}",
                f"{row['tokens a second']:.0f}",
                f"{row['tokens a step']:.2f}",
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
    settings["temperature"] = given.temperature
    settings |= {"document": DOCUMENT, "question": QUESTION, "questions": QUESTIONS}
    RESULTS.mkdir(exist_ok=True)
    results = {"settings": settings, "by draft": found, "prefixes": prefixes}
    (RESULTS / "serving.json").write_text(json.dumps(results, indent=1) + "\n")
    picture(found, prefixes, RESULTS / "serving.png")


if __name__ == "__main__":
    main()
