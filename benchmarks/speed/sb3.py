"""Stable-Baselines3's PPO with our policy against our own PPO, on the same work.

Both sample the same number of texts of one length, score them with the same reward model, charge the same penalty and
take one Adam step per epoch. The ways take turns; the ratio is the median over rounds. One more way, on the first
shape, shows what minibatches smaller than the buffer cost: single steps drawn at random share few prefixes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import stable_baselines3
import torch
from stable_baselines3 import PPO

from lm_envs.algos.other_libraries.sb3 import CausalLMActorCriticPolicy, TextVecEnv
from lm_envs.algos.ppo import PPO as OurPPO
from lm_envs.algos.ppo import PPOConfig
from lm_envs.benchmarks.speed.kernels import RESULTS, machine, ratio
from lm_envs.benchmarks.speed.settings import SB3 as Settings
from lm_envs.benchmarks.speed.throughput import in_rounds, record
from lm_envs.benchmarks.speed.throughput_work import Size, Work
from lm_envs.env.vector import TextVectorEnv
from lm_envs.settings import check

OURS = "our ppo"


def sb3(work: Work, epochs: int, minibatches: int) -> Callable[[], object]:
    """Make an iteration of the library's PPO: ``rows`` texts, ``epochs`` passes over them in ``minibatches`` each."""
    tokens = work.size.tokens
    env = TextVecEnv(TextVectorEnv(work.task, work.size.rows))
    batches: dict[str, Any] = {"n_steps": work.size.new_tokens, "batch_size": tokens // minibatches, "n_epochs": epochs}
    model = PPO(CausalLMActorCriticPolicy, env, learning_rate=1e-5, gamma=1.0, device="cpu", **batches)

    def run() -> None:
        before = model.num_timesteps
        model.learn(tokens, log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]
        assert model.num_timesteps == before + tokens

    return run


def lines(settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """Yield the CSV's lines, a shape at a time."""
    about = {"threads": settings.threads, "rounds": settings.rounds} | machine("cpu")
    about |= {"stable-baselines3": stable_baselines3.__version__}
    for shape in settings.shapes:
        work = Work(Size(shape, rows=settings.rows, new_tokens=settings.new_tokens))
        ways = {OURS: work.train(OurPPO, PPOConfig, epochs=settings.epochs), "sb3 ppo": sb3(work, settings.epochs, 1)}
        if settings.minibatches > 1 and shape == settings.shapes[0]:
            ways[f"sb3 ppo, {settings.minibatches} minibatches"] = sb3(work, settings.epochs, settings.minibatches)
        found, batch = in_rounds(ways, settings.rounds), []
        for name, one in found.items():
            line: dict[str, Any] = {"shape": shape, "vocabulary": work.size.model.vocabulary, "rows": settings.rows}
            line |= {"prompt": work.size.prompt_length, "new_tokens": settings.new_tokens, "epochs": settings.epochs}
            line |= {"way": name, "seconds": round(one["seconds"], 4)}
            line |= {"tokens_per_s": round(work.size.tokens / one["seconds"], 1)}
            line |= {"times_ours": round(ratio(one["times"], found[OURS]["times"]), 3)}
            batch.append(line | {"foreign_load": round(one["foreign"], 3)} | about)
        yield batch


def run(settings: Settings) -> None:
    """Measure, print, and write the CSV after every shape.

    Raises:
        ValueError: a value out of range, or texts that do not divide into the minibatches.
    """
    check(settings, "{}")
    if settings.rows * settings.new_tokens % settings.minibatches:
        tokens = f"{settings.rows} x {settings.new_tokens} tokens"
        raise ValueError(f"{tokens} do not divide into {settings.minibatches} minibatches")
    torch.set_num_threads(settings.threads)
    text = "{shape}  {way}: {seconds} s, {times_ours} x ours"
    record(settings.out or RESULTS / "sb3-cpu.csv", lines(settings), lambda line: text.format(**line))
