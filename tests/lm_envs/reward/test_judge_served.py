"""The remote judge against a real server on this machine, `transformers serve`, with a tiny model that was taught to
grade."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_envs.reward.base import call_reward
from lm_envs.reward.chat_endpoint import EndpointError
from lm_envs.reward.judge import make_judge

WANTED = ("fastapi", "uvicorn", "openai", "accelerate")
MISSING = [name for name in WANTED if find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}: pip install 'transformers[serving]'"
    ),
]

GRADES = {"good": "9", "fair": "5", "bad": "2"}
WORDS = ["<eos>", "<unk>", "user", "assistant", "grade", ":", *GRADES, *"0123456789"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)


def judge_folder(folder: Path) -> Path:
    """A model that answers "user grade : WORD assistant" with the word's grade and an EOS."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = TEMPLATE
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=4, max_position_embeddings=64, eos_token_id=0, bos_token_id=0, pad_token_id=0,
            )
        )  # fmt: skip
    texts = [f"user grade : {word} assistant {grade} <eos>" for word, grade in GRADES.items()]
    ids = tokenizer(texts, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """URL and model of a server that is up, stopped at the end."""
    folder = judge_folder(tmp_path_factory.mktemp("served") / "judge")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder.parent / "log.txt"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except (urllib.error.URLError, OSError):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not come up:\n{log.read_text()[-3000:]}")
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", str(folder)
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_grades_come_back_and_are_kept(served, tmp_path):
    url, model = served
    judge = make_judge(url, model, prompt="grade : {completion}", cache=tmp_path, workers=3, timeout=120)
    words = ["good", "bad", "fair", "bad"]
    found = call_reward(judge, ["p"] * 4, words, [[1]] * 4, ["stop"] * 4)
    assert found.tolist() == [9.0, 2.0, 5.0, 2.0]
    assert len(list(tmp_path.rglob("*.json"))) == 3


def test_what_the_server_refuses_is_told(served):
    url, model = served
    settings = dict(cache=False, attempts=1, timeout=120)
    with pytest.raises(EndpointError, match=r"sample 0 \(completion 'good'\): .* gives no log-probabilities"):
        make_judge(url, model, answers={"9": 1.0, "2": 0.0}, **settings)(["p"], ["good"])
    with pytest.raises(EndpointError, match=r"answered 422: .*no_such_field"):
        make_judge(url, model, parameters={"no_such_field": 1}, **settings)(["p"], ["good"])
