"""How many threads read a token a row: by what there is to multiply, and nothing is left changed."""

import pytest
import torch

from lm_envs.model import step_threads
from lm_envs.model.decoding import Decoder, generate
from lm_envs.model.step_threads import StepThreads
from tests.lm_envs.model.test_decoding import EOS, gpt2

LAYER, HEAD = 12 * 16**2, 10 * 16  # weights of each of the two layers, and of the tied head; positions are looked up


def test_the_work_alone_decides(monkeypatch):
    threads = StepThreads(gpt2())
    monkeypatch.setattr(step_threads, "WORTH", {True: LAYER, False: HEAD + 1})
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert [threads.of(rows) for rows in (1, 2, 5)] == [(1, 1), (2, 1), (5, 1)]
    for other in ("active", ""):
        monkeypatch.setenv("OMP_WAIT_POLICY", other)
        assert [threads.of(rows)[1] for rows in (1, 2, 3)] == [1, 1, 2]


def test_layers_and_head_have_their_own(monkeypatch):
    model, seen = gpt2(), []
    note = lambda *_: seen.append(torch.get_num_threads())  # noqa: E731
    model.transformer.h[1].register_forward_pre_hook(note)
    model.lm_head.forward = lambda x, made=model.lm_head.forward: (note(), made(x))[1]
    prompts, uniforms = torch.tensor([[1, 2], [3, 4]]), torch.full((2, 3), 0.5, dtype=torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(StepThreads, "of", lambda self, rows: (1, 7))
        generate(model, prompts, uniforms, EOS, max_new_tokens=3, min_new_tokens=3)
        assert seen == [2, 2, 1, 2, 1, 2]  # the prompts have all there are, and nothing has more
        seen.clear()
        decoder = Decoder(model)
        decoder(torch.tensor([[1, 2, -1], [3, 4, -1]]))
        decoder(torch.tensor([[1, 2, 5], [3, 4, 6]]))
        assert seen == [2, 2, 1, 2]
        monkeypatch.setattr(StepThreads, "of", lambda self, rows: (2, 1))
        seen.clear()
        decoder(torch.tensor([[1, 2, -1], [3, 4, -1]]))
        decoder(torch.tensor([[1, 2, 5], [3, 4, 6]]))
        assert seen == [2, 2, 2, 1]
        assert torch.get_num_threads() == 2
        with pytest.raises(TypeError), StepThreads(model).use(1):
            model.lm_head("no tensor")  # after the hook that sets its threads
        assert torch.get_num_threads() == 2
        assert len(model.lm_head._forward_pre_hooks) == len(model.lm_head._forward_hooks) == 0
    finally:
        torch.set_num_threads(before)
