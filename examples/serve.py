"""Serve a model from within a program, and ask it with OpenAI's client (pip install 'v4-jax[serve]' openai).

python examples/serve.py
python examples/serve.py --model DeepSeek-V4-Flash --prompt "The sky is dark at night because" --max-tokens 40
"""

import threading
import time
from pathlib import Path

import openai
import tyro
import uvicorn

import v4_jax
from v4_jax.infer.engine.sampling import GREEDY
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.http.server import make_app
from v4_jax.infer.http.service import Service
from v4_jax.infer.openai.completions import Defaults, Model
from v4_jax.tokenizer import load_tokenizer

DEMO = Path(v4_jax.__file__).parent / "data" / "demo"
CONTEXT = 512  # tokens of a text and what is added


def main(model: Path = DEMO, prompt: str = "moon KB03 fox QZ47 pond KB", max_tokens: int = 2) -> str:
    """Serves a model at a free port, asks it to continue a text, and stops.

    Args:
      model: A released or converted checkpoint, or a training run.
      prompt: The text.
      max_tokens: Most tokens to add.
    """
    config, params = v4_jax.load(model)
    engine = Engine(config, params, slots=2, max_length=CONTEXT, policy="float32")
    engine.compile()
    defaults = Defaults(GREEDY, (config.eos_token_id,), max_tokens)
    served = Model("model", config, load_tokenizer(model, config.vocab_size), defaults, CONTEXT)
    app = make_app(Service(engine, most=8), served)
    # The logging of the program around it is left alone.
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.01)
    try:
        port = server.servers[0].sockets[0].getsockname()[1]
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        answer = client.completions.create(model="model", prompt=prompt, max_tokens=max_tokens)
    finally:
        server.should_exit = True  # drains and exits
        thread.join()
    print(prompt + answer.choices[0].text)
    return answer.choices[0].text


if __name__ == "__main__":
    tyro.cli(main)
