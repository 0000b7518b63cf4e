"""A model that the command line can load in no time, and ways to run commands."""

import io
import json
import os
import subprocess
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models import two
from v4_jax import Transformer, load
from v4_jax.commands import main


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """A released directory: two layers, bytes for tokens."""
    path = two().exported(tmp_path_factory.mktemp("models") / "small")
    (path / "generation_config.json").write_text(json.dumps({"temperature": 1.0, "top_p": 1.0, "do_sample": True}))
    return path


@pytest.fixture(scope="session")
def logprobs_of(model):
    """Log-probabilities [length, vocabulary] of up to three texts of up to 24 tokens, in one shot, without a cache."""
    config, params = load(model)
    transformer = Transformer(config, policy="float32")

    def forward(params, tokens, lengths):
        return jax.nn.log_softmax(transformer.apply({"params": params}, tokens, lengths=lengths).logits)

    shapes = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((3, 24), (3,)))
    program = jax.jit(forward).lower(params, *shapes).compile()

    def logprobs(texts):
        tokens, lengths = np.zeros((3, 24), np.int32), np.zeros(3, np.int32)
        for row, text in enumerate(texts):
            tokens[row, : len(text)], lengths[row] = text, len(text)
        values = np.asarray(program(params, tokens, lengths))
        return [values[row, : len(text)] for row, text in enumerate(texts)]

    return logprobs


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command in this process: `run("generate", ...)`, with text for stdin as `stdin=`."""

    def call(*arguments, stdin=""):
        with monkeypatch.context() as context:
            context.setattr("sys.stdin", io.StringIO(stdin))
            try:
                code = main([str(argument) for argument in arguments])
            except SystemExit as error:
                code = error.code
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def start():
    """Starts a command as a process of its own, with changes to the environment as keywords."""

    def begin(*arguments, **variables):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            **variables,
        }
        # Python leaves an interrupt ignored that its parent ignores, as a shell does for its background jobs.
        program = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from v4_jax.commands import main; sys.exit(main())"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )

    return begin
