"""EleutherAI's evaluation harness, the real one, asks the server: log-likelihoods and generations of a small task."""

import json

import httpx
import lm_eval
import lm_eval.tasks
import numpy as np
import pytest
import tokenizers
import yaml

from tests.infer.serving import serving, small_parts
from tests.models import two
from v4_jax.chat import protocol
from v4_jax.infer.score import Scorer, TextToScore
from v4_jax.tokenizer import load_tokenizer

DOCUMENTS = [
    {"question": "The cat sat on the", "choices": ["mat", "moon"], "answer": 0},
    {"question": "One two three", "choices": ["four!", "é"], "answer": 1},
    {"question": "a", "choices": ["bcd", "b"], "answer": 1},
]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tokenizer that both sides read, bytes of a small vocabulary, and two tasks of the same documents."""
    path = tmp_path_factory.mktemp("harness")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    specials = protocol.SPECIAL_TOKENS
    vocabulary = {token: id for id, token in enumerate([*specials[:3], *letters, *specials[3:]])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(list(specials))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{specials[0]} $A", special_tokens=[(specials[0], 0)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": protocol.BOS, "eos_token": protocol.EOS}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "documents.jsonl").write_text("".join(json.dumps(one) + "\n" for one in DOCUMENTS))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path / "documents.jsonl")}},
        "test_split": "test",
        "doc_to_text": "{{question}}",
    }
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}"}
    written = {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[answer]}}",
        "generation_kwargs": {"max_gen_toks": 6, "until": ["\n\n"]},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    for name, more in (("choice", choice), ("written", written)):
        (path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | more))
    return path


@pytest.fixture(scope="module")
def parts(directory):
    return small_parts(load_tokenizer(directory, two().config.vocab_size))


@pytest.fixture(scope="module")
def evaluate(directory, parts, tmp_path_factory):
    """Runs the harness on a task, for its samples in the documents' order; and where it asks."""
    with pytest.MonkeyPatch.context() as context, serving(parts) as (address, service):
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            context.setenv(name, "1")
        context.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))

        def run(model, path, task, **options):
            arguments = {"model": "tiny", "base_url": address + path, "max_length": 256} | options
            found = lm_eval.simple_evaluate(
                model,
                model_args=arguments,
                tasks=[task],
                task_manager=lm_eval.tasks.TaskManager(include_path=str(directory), include_defaults=False),
                log_samples=True,
                bootstrap_iters=0,
                apply_chat_template="chat" in model,
            )
            return sorted(found["samples"][task], key=lambda sample: sample["doc_id"])

        yield run, address
        assert service.active == 0


def scored(parts, texts):
    """Log-probabilities of texts' tokens but the first, by the scorer: no server and no engine."""
    config = two().config
    scorer = Scorer(config, longest=64, policy="float32", cache_dtype="float32", batch=2, chunk=32)
    return [score.logprobs for score in scorer.score(two().params, [TextToScore(0, text) for text in texts])]


@pytest.mark.parametrize(
    "options",
    [
        {"tokenized_requests": True, "add_bos_token": True, "batch_size": 4},  # lists of lists of ids
        {"tokenized_requests": False, "batch_size": 1},  # a text each
    ],
    ids=["tokens", "text"],
)
def test_log_likelihoods(evaluate, directory, parts, options):
    tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": str(directory)}
    samples = evaluate[0]("local-completions", "/v1/completions", "choice", **tokenizer, **options)
    encode, texts, lengths = parts[1].tokenizer.encode, [], []
    for document in DOCUMENTS:
        for choice in document["choices"]:
            texts.append([0, *encode(f"{document['question']} {choice}")])
            lengths.append(len(encode(f" {choice}")))
    expected = [values[-length:].sum() for values, length in zip(scored(parts, texts), lengths, strict=True)]
    found = [float(response[0][0]) for sample in samples for response in sample["resps"]]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)
    for number, sample in enumerate(samples):
        best = int(np.argmax(expected[2 * number : 2 * number + 2]))
        assert sample["acc"] == float(best == DOCUMENTS[number]["answer"])


def test_generations(evaluate, directory):
    """Of texts and of chats: what the server says when it is asked plainly."""
    run, address = evaluate
    plain = {"max_tokens": 6, "temperature": 0, "stop": ["\n\n", protocol.EOS]}
    tokenizer = {"tokenizer_backend": "huggingface", "tokenizer": str(directory), "tokenized_requests": False}
    said = run("local-completions", "/v1/completions", "written", **tokenizer, batch_size=2)
    chats = run("local-chat-completions", "/v1/chat/completions", "written")
    for document, text, chat in zip(DOCUMENTS, said, chats, strict=True):
        asked = {"prompt": document["question"]}, {"messages": [{"role": "user", "content": document["question"]}]}
        texts, messages = (
            httpx.post(address + path, json=plain | one).json()["choices"][0]
            for path, one in zip(("/v1/completions", "/v1/chat/completions"), asked, strict=True)
        )
        assert text["resps"] == [[texts["text"]]] and texts["text"]
        assert chat["resps"] == [[messages["message"]["content"]]]
        assert text["exact_match"] == float(texts["text"] == document["choices"][document["answer"]])
