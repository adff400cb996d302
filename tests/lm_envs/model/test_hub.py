"""Names on the hub without a network: refused at once, or read from the cache, and nobody asks again and again."""

from __future__ import annotations

import shutil
import socketserver
import threading
from pathlib import Path

import pytest
from huggingface_hub import constants

from lm_envs.data.dataset import Examples
from lm_envs.files import CacheError
from lm_envs.model import hub, loading
from lm_envs.reward.learned import load_reward_model, reward_start
from tests.lm_envs import byo


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """The requests that reach a hub which answers none, beside an empty cache."""
    requests: list[bytes] = []

    class Hangs(socketserver.BaseRequestHandler):
        def handle(self):
            first = self.request.recv(4096).split(b"\r\n")[0]
            if first.startswith(b"HEAD"):  # the library also asks about itself, once
                requests.append(first)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Hangs) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        there = f"http://127.0.0.1:{server.server_address[1]}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, there)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", there)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.place_of.cache_clear()
        yield requests
        server.shutdown()
    hub.place_of.cache_clear()


def keep(folder: Path, name: str) -> None:
    """Put a folder into the cache as if it had been downloaded."""
    place = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / "0123")
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0123")


@pytest.mark.parametrize("read", [loading.load_policy, loading.load_tokenizer, load_reward_model, reward_start])
def test_what_cannot_be_reached_is_refused_after_one_request(asked, read):
    with pytest.raises(ValueError, match="no such folder here, and the hub .* cannot be reached: .*give a folder") as e:
        read("some-owner/some-name")
    assert "'some-owner/some-name'" in str(e.value) and "\n" not in str(e.value)
    assert asked == [b"HEAD /some-owner/some-name/resolve/main/config.json HTTP/1.1"]


def test_names_that_the_hub_cannot_have_are_not_asked_for(asked):
    with pytest.raises(ValueError, match="'no name! of the hub'"):
        loading.load_policy("no name! of the hub")
    assert asked == []


def test_data_sets_too(asked):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="no such file or folder here, and the hub .* cannot be reached: .*give a fil"):
        Examples("some-owner/some-name")
    assert len(asked) == 1 and b"/datasets/some-owner/some-name/" in asked[0]


def test_what_is_in_the_cache_is_read_from_it_after_one_request(asked, tmp_path):
    tokenizer = byo.byte_level_bpe()
    byo.llama(len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    keep(tmp_path / "model", "some-owner/kept")
    found = loading.load_policy("some-owner/kept")
    assert found.name_or_path == "some-owner/kept"
    assert loading.load_tokenizer("some-owner/kept").get_vocab() == tokenizer.get_vocab()
    reward_start("some-owner/kept")
    assert len(asked) == 1


@pytest.mark.parametrize("kind", ["a file", "a loop", "too long"])
def test_a_cache_that_cannot_be_written_is_told_before_the_hub_is_asked(asked, tmp_path, monkeypatch, kind):
    folder = tmp_path / ("x" * 300 if kind == "too long" else "cache")
    if kind == "a file":
        folder.write_text("")
    elif kind == "a loop":
        folder.symlink_to(folder)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    with pytest.raises(CacheError, match=f"cannot use the cache folder {folder}: .*set HF_HUB_CACHE or HF_HOME") as e:
        loading.load_policy("some-owner/some-name")
    assert "\n" not in str(e.value) and not asked
