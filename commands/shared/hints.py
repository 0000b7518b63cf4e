"""What somebody may have meant who writes an option as other programs have it, or misspells one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

# Options of llama.cpp, vLLM, SGLang, transformers and ollama: what they are here, the first that there is.
_OTHERS: dict[str, tuple[str, ...]] = {
    "--max-new-tokens": ("--max-tokens",),
    "--max-completion-tokens": ("--max-tokens",),
    "--n-predict": ("--max-tokens",),
    "-n": ("--max-tokens",),
    "--max-length": ("--context", "--max-tokens"),
    "--max-model-len": ("--context",),
    "--context-length": ("--context",),
    "--ctx-size": ("--context",),
    "-c": ("--context",),
    "--temp": ("--temperature",),
    "-t": ("--temperature",),
    "-p": ("--prompt",),
    "-f": ("--prompt-file", "--input"),
    "--file": ("--prompt-file", "--input"),
    "--input-file": ("--prompt-file", "--input"),
    "--messages": ("--chat",),
    "--system-prompt": ("--system",),
    "-sys": ("--system",),
    "-o": ("--output",),
    "--output-file": ("--output",),
    "-v": ("--verbose",),
    "--reasoning-effort": ("--mode",),
    "--thinking": ("--mode",),
    "--tensor-parallel-size": ("--mesh tensor=N",),
    "--tp": ("--mesh tensor=N",),
    "-tp": ("--mesh tensor=N",),
    "--data-parallel-size": ("--mesh data=N",),
    "--expert-parallel-size": ("--mesh expert=N",),
    "--enable-expert-parallel": ("--mesh expert=N",),
    "--max-num-seqs": ("--slots",),
    "--max-batch-size": ("--slots", "--batch"),
    "--batch-size": ("--batch", "--slots"),
    "--gpu-memory-utilization": ("--memory",),
    "--mem-fraction-static": ("--memory",),
    "--kv-cache-dtype": ("--cache-dtype",),
    "--quantization": ("--dtype",),
    "--speculative-config": ("--draft",),
    "--chunked-prefill-size": ("--prefill-chunk",),
    "--served-model-name": ("--name",),
    "--api-key": ("--keys",),
    "--do-sample": ("--greedy",),
    "--cache-dir": ("--compilation-cache",),
    "--config": (),
}
_MODEL = ("--model", "-m", "--model-path", "--model-name", "--checkpoint")


def of_options(arguments: Sequence[str], known: Iterable[str], verb: str) -> str:
    """The options of a command that does not parse as they are called here: the end of a sentence, or "".

    Args:
      arguments: of the command.
      known: its options.
      verb: what it is called by.
    """
    known, said = set(known), []
    for word in arguments:
        option = word.partition("=")[0]
        if not re.match(r"--?[A-Za-z]", option) or option.replace("_", "-") in known:
            continue
        if option in _MODEL:
            said.append(f"the model is given without {option}: {verb} MODEL ...")
            continue
        near = difflib.get_close_matches(option, sorted(known), 1, 0.75) if option.startswith("--") else []
        meant = [one for one in _OTHERS.get(option, ()) if one.split()[0] in known] or near
        if meant:
            said.append(f"{option} is {meant[0]} here" if option in _OTHERS else f"perhaps {meant[0]} is meant")
    return "".join(f"; {one}" for one in dict.fromkeys(said))


def of_model(path: Path) -> str:
    """What a model that is not there may be the name of: the end of a sentence, or ""."""
    text = str(path)
    if found := re.fullmatch(r"https?:/+huggingface\.co/([\w.-]+/[\w.-]+).*", text):
        return f"; a model of the hub is hf://{found[1]}"
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", text) and not path.parent.exists():
        return f"; if it is a model of the hub, write hf://{text}"
    return ""
