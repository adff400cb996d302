"""Models in GGUF files: dequantized by transformers, the same model and tokenizer, and what is refused."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from lm_envs.algos.policies.adaptation import Adaptation, adapted, save_model
from lm_envs.benchmarks.run import inputs
from lm_envs.files import sha256
from lm_envs.model import gguf
from lm_envs.model.loading import load_policy, load_tokenizer
from lm_envs.reward.learned import load_reward_model, reward_start
from tests.lm_envs.model.gguf_files import CHAT, F32, Q8_0, WORDS, in_eights, tiny_llama, write

READS = pytest.mark.skipif(find_spec("gguf") is None, reason="transformers reads GGUF with the package gguf")
IDS = torch.arange(3, 11)[None]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LM_ENVS_CACHE", str(tmp_path / "cache"))
    gguf._folder.cache_clear()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_llama()


def refused(call, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@READS
@pytest.mark.parametrize("kind", [F32, Q8_0])
def test_the_same_model_and_tokenizer(model, tmp_path, kind):
    file = write(model, tmp_path / "tiny.gguf", kind)
    expected = model
    if kind == Q8_0:  # each block of 32 weights is a scale times whole numbers, computed by hand
        expected = tiny_llama()
        expected.load_state_dict(model.state_dict())
        for parameter in expected.parameters():
            if parameter.ndim == 2:
                scale, numbers = in_eights(parameter.detach().numpy())
                parameter.data = torch.from_numpy(scale.astype("f4") * numbers).view_as(parameter)
        assert (logits(expected) - logits(model)).abs().max() > 1e-4  # rounding shows
    found = load_policy(file)
    torch.testing.assert_close(logits(found), logits(expected), atol=1e-5, rtol=0)
    assert found.name_or_path == str(file) and found.dtype == torch.float32
    words = load_tokenizer(file)
    assert words.convert_ids_to_tokens(list(range(len(WORDS)))) == WORDS and words.eos_token == "</s>"
    assert words("ab c")["input_ids"] == [WORDS.index("ab"), WORDS.index("Ġc")] and words.chat_template == CHAT


@READS
def test_what_is_saved_can_be_loaded_again(model, tmp_path, monkeypatch):
    file = write(model, tmp_path / "tiny.gguf")
    found = load_policy(file)
    save_model(found, load_tokenizer(file), tmp_path / "plain")
    torch.testing.assert_close(logits(load_policy(tmp_path / "plain")), logits(model), atol=1e-5, rtol=0)
    # adapters name the folder of the cache, which peft by itself can read from anywhere
    monkeypatch.chdir(tmp_path)
    tuned = adapted(load_policy("tiny.gguf"), Adaptation(lora_rank=2))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save_model(tuned, load_tokenizer(file), tmp_path / "adapters")
    monkeypatch.chdir("/")
    torch.testing.assert_close(logits(load_policy(tmp_path / "adapters")), logits(tuned), atol=1e-5, rtol=0)
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters")
    torch.testing.assert_close(logits(plain), logits(tuned), atol=1e-5, rtol=0)
    assert (logits(tuned) - logits(model)).abs().max() > 1e-3


@READS
def test_a_reward_model_starts_from_it_and_it_is_none_itself(model, tmp_path):
    file = write(model, tmp_path / "tiny.gguf")
    start, _ = reward_start(file)
    assert start.num_labels == 1
    assert torch.equal(start.model.norm.weight, model.model.norm.weight)
    assert "expected a sequence-classification model" in refused(lambda: load_reward_model(file))


@READS
def test_an_unknown_architecture_and_a_file_that_is_cut_off(model, tmp_path):
    strange = write(model, tmp_path / "strange.gguf", architecture="tinyformer")
    message = refused(lambda: load_policy(strange))
    assert "strange.gguf" in message and "tinyformer" in message and "not supported" in message
    whole = write(model, tmp_path / "whole.gguf").read_bytes()
    for share in (0.95, 0.5, 0.05):
        cut = tmp_path / f"cut-{share}.gguf"
        cut.write_bytes(whole[: int(share * len(whole))])
        assert "damaged or cut off" in refused(lambda cut=cut: load_policy(cut))
    assert not list((tmp_path / "cache" / "gguf").glob("*/model.safetensors"))


def test_it_is_read_once_and_again_when_it_changes(model, tmp_path, monkeypatch):
    """Without the package too: what transformers reads is stood in for."""
    tokenizer = SimpleNamespace(save_pretrained=lambda folder: None)
    read: list[str] = []

    def reader(file, begin, part, from_pretrained, **options):
        read.append(part)
        model.config.quantization_config = {"quant_method": "gguf"}
        return {"settings": model.config, "weights": model, "tokenizer": tokenizer}[part]

    monkeypatch.setattr(gguf, "_read", reader)
    monkeypatch.setattr(gguf, "find_spec", lambda name: SimpleNamespace(origin=None))
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF and more")
    first = gguf.folder_of(file)
    assert read == ["settings", "weights", "tokenizer"]
    torch.testing.assert_close(logits(load_policy(file)), logits(model))
    gguf._folder.cache_clear()  # another process
    assert gguf.folder_of(file) == first and len(read) == 3
    file.write_bytes(b"GGUF and something else")
    assert gguf.folder_of(file) != first and len(read) == 6


def test_what_is_no_gguf_file(tmp_path, monkeypatch):
    (tmp_path / "text.gguf").write_text("hello")
    assert "is not a GGUF file" in refused(lambda: load_policy(tmp_path / "text.gguf"))
    (tmp_path / "head.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert "lm-envs[pretrained]" in refused(lambda: load_policy(tmp_path / "head.gguf"), ImportError)
    assert "there is no such file" in refused(lambda: load_policy(tmp_path / "none.gguf"))
    assert gguf.gguf_file(tmp_path) is None and gguf.gguf_file("owner/model") is None


def test_a_packaged_model_has_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert "lm-envs[pretrained]" in refused(lambda: load_policy("smollm2"))
    monkeypatch.setattr(gguf, "find_spec", lambda name: SimpleNamespace(origin=str(tmp_path / "p" / "__init__.py")))
    (tmp_path / "p").mkdir()
    (file := tmp_path / "p" / gguf.PACKAGED["smollm2"][1]).write_bytes(b"GGUF")
    assert gguf.gguf_file("smollm2") == file
    assert inputs._model("smollm2") == inputs._model(str(file)) == sha256(file)
    (tmp_path / "smollm2").mkdir()  # a folder of that name comes first
    assert gguf.gguf_file("smollm2") is None
