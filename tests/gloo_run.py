"""A process of a run on the tiny text task, started with torchrun's variables: `FOLDER ddp|fsdp NAME ...` writes what
each algorithm learned. NAME:VARIANT is a policy of another kind."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lm_envs.algos.engine import shards
from lm_envs.algos.policies.adaptation import Adaptation, adapted
from lm_envs.algos.policies.language_model import LMPolicy
from lm_envs.algos.registry import make_agent
from lm_envs.env.vector import TextVectorEnv
from lm_envs.model import forwards
from lm_envs.processes import group
from tests import tiny
from tests.algos import batches
from tests.algos.engine.test_many_processes import SETTINGS, STEPS, learner

PARTS = {"lora": Adaptation(lora_rank=2), "frozen": Adaptation(freeze_layers=1)}
VARIANTS = (*PARTS, "full-kl", "lora-full-kl", "bfloat16", "recomputed", "products", "encoder-decoder", "critic")


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=10,
        d_model=16,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        init_std=0.3,
        dropout=0.0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BartForConditionalGeneration(config).double().eval().requires_grad_(False)


def made(name: str):
    """An agent and its env, by the algorithm's name and the variant of the policy."""
    name, _, variant = name.partition(":")
    if not variant:
        return learner(name)
    settings: dict[str, Any] = SETTINGS | STEPS.get(name, {})
    if variant == "critic":
        env = TextVectorEnv(batches.learned_task(), 8, group_size=4)
        return batches.learner(name, env=env, value_from="reward_model", **settings), env
    if variant == "products":  # what a layer keeps where a batch has many logits
        forwards.MOST_LOGITS["cpu"] = 1
    start = bart() if variant == "encoder-decoder" else tiny.gpt2(seed=1)
    start = start.bfloat16() if variant == "bfloat16" else start
    task = tiny.task(reference=start)
    env = TextVectorEnv(task, 8, group_size=4)
    if variant.endswith("full-kl"):  # the loss reads the reference
        settings["kl_loss"] = "full"
    model = adapted(start, PARTS.get(variant.removesuffix("-full-kl"), Adaptation()))
    policy = LMPolicy.for_mdp(env.mdp, model, gradient_checkpointing=variant == "recomputed")
    return make_agent(name, policy, **settings), env


def learned(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights and norms of gradients after three iterations, the last by an agent that took back a checkpoint; and
    what a checkpoint then holds, which is whole on process 0 alone."""
    agent, env = made(name)
    frozen = [] if env is None else [p for model in env.mdp.task.models for p in model.parameters()]
    before, seen = [p.clone() for p in frozen], []
    loss = agent.loss
    agent.loss = lambda *given: (seen.append([bool(p.isnan().any()) for p in frozen]), loss(*given))[1]
    norms = [agent.iteration(env)[1]["grad_norm"] for _ in range(2)]
    assert all(torch.equal(p, old) for p, old in zip(frozen, before, strict=True))
    assert all(all(cut) == group.sharded() for cut in seen[:1]) or not frozen
    saved = group.exchange(agent.checkpoint(), "a checkpoint")[0]
    agent, env = made(name)
    agent.restore(*saved)
    norms.append(agent.iteration(env)[1]["grad_norm"])
    checkpoint = agent.checkpoint()[0]
    return batches.weights(agent.policy) | {"norms": torch.tensor(norms)}, checkpoint


def fails() -> None:
    """What an update that fails on all processes leaves of shares."""
    agent, env = made("ppo")
    agent.iteration(env)
    saved, loss = agent.checkpoint(), agent.loss
    agent.loss = lambda *given: (lambda found: (found[0] * torch.nan, found[1]))(loss(*given))
    with pytest.raises(FloatingPointError, match="leaves no whole model in memory: start again from the last"):
        agent.iteration(env)
    for further in (agent.checkpoint, lambda: agent.restore(*saved), lambda: agent.iteration(env)):
        with pytest.raises(ValueError, match="an update failed before"):
            further()


def communicated(name: str) -> dict[str, Tensor]:
    """The bytes that tensors of an iteration take which this process sends or receives, by step; the forwards with
    gradients, the steps of Adam, and the bytes of weights: all, and those of layers."""
    sent: Counter[str] = Counter()

    def watch(owner: Any, method: str, count: Callable[..., object]) -> None:
        real = getattr(owner, method)

        def watched(*given: Any, **named: Any) -> Any:
            found = real(*given, **named)
            count(found, *given[1:], **named)
            return found

        setattr(owner, method, watched)

    def exchanged(found: list[Any], value: Any, step: str, patient: bool) -> None:
        sent["forwards"] += max(found) if step == "the forwards of a minibatch" else 0
        parts = [x for each in found if isinstance(each, dict) for x in each.values() if isinstance(x, Tensor)]
        sent[step] += sum(x.nbytes for x in parts)

    agent, env = made(name)
    watch(group.Processes, "sum", lambda _, x, step: sent.update({step: x.nbytes}))
    watch(group.Processes, "exchange", exchanged)
    watch(shards._Gather, "__call__", lambda _, output_tensor, **__: sent.update(gathered=output_tensor.nbytes))
    watch(shards._Sum, "__call__", lambda _, input_tensor, **__: sent.update(scattered=input_tensor.nbytes))
    watch(shards.Cut, "together", lambda found, *_: sent.update(whole=found.nbytes))
    sent["steps"] = int(agent.iteration(env)[1]["updates"])
    sizes = {n: p.nbytes for n, p in agent.policy.named_parameters() if p.requires_grad}
    sent["weights"] = sum(sizes.values())
    sent["idle"] = sum(p.nbytes for p in env.mdp.reference.parameters())
    sent["layers"] = sum(size for n, size in sizes.items() if ".h." in n)
    return {step: torch.tensor(count) for step, count in sent.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, how, *names = sys.argv[1:]
    if how == "fsdp-mean":
        from torch.distributed.fsdp import FSDPModule

        FSDPModule.set_gradient_divide_factor = lambda *_: None
    joined = group.start(fsdp=how.startswith("fsdp"))
    for name in names:
        if how.endswith("-count"):
            save_file(communicated(name), Path(folder) / f"{name}-{group.number()}.safetensors")
            continue
        weights, checkpoint = learned(name)
        save_file(weights, Path(folder) / f"{name}-{group.number()}.safetensors")
        if group.number() == 0:
            save_file(checkpoint, Path(folder) / f"{name}-checkpoint.safetensors")
    if how == "fsdp":
        fails()
    group.end()
