"""One small model behind all servers."""

import openai
import pytest

from tests.infer.serving import serving, small_parts
from v4_jax.tokenizer import ByteTokenizer


@pytest.fixture(scope="session")
def parts():
    return small_parts(ByteTokenizer(320))


@pytest.fixture(scope="module")
def served(parts):
    with serving(parts) as running:
        yield running


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)
