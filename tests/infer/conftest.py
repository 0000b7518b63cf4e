"""One small model behind all servers."""

import openai
import pytest

from tests.infer.serving import LENGTH, SLOTS, serving
from tests.models import two
from v4_jax.infer.engine.sampling import Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.openai.completions import Defaults, Model
from v4_jax.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def parts():
    """An engine, and what it serves."""
    tiny = two()
    engine = Engine(
        tiny.config,
        tiny.params,
        slots=SLOTS,
        max_length=LENGTH,
        prefill_chunk=32,
        policy="float32",
        cache_dtype="float32",
    )
    engine.compile()
    defaults = Defaults(Sampling(), (tiny.config.eos_token_id,), 8)
    return engine, Model("tiny", tiny.config, ByteTokenizer(320), defaults, LENGTH, SLOTS)


@pytest.fixture(scope="module")
def served(parts):
    with serving(parts) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
