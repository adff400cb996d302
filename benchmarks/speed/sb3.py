"""Stable-Baselines3's PPO with our policy against our own PPO, on the same work.

Both sample the same number of texts of one length, score them with the same reward model, charge the same penalty and
take one Adam step per epoch. The ways take turns, a round each; the ratio is the median over rounds. One way more, on
the first shape, shows what minibatches smaller than the buffer cost: single steps drawn at random share few prefixes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import stable_baselines3
import torch
from stable_baselines3 import PPO

from lm_envs.algos.other_libraries.sb3 import CausalLMActorCriticPolicy, TextVecEnv
from lm_envs.benchmarks.run.storage import write_lines
from lm_envs.benchmarks.speed.kernels import RESULTS, in_turns, machine, ratio
from lm_envs.benchmarks.speed.settings import SB3 as Settings
from lm_envs.benchmarks.speed.throughput import Load, timed
from lm_envs.benchmarks.speed.throughput_work import Size, Work
from lm_envs.env.vector import TextVectorEnv
from lm_envs.settings import check

OURS = "our ppo"


def sb3(work: Work, epochs: int, minibatches: int) -> Callable[[], object]:
    """An iteration of the library's PPO: ``rows`` texts stepped, ``epochs`` passes in ``minibatches`` each."""
    tokens = work.size.tokens
    model = PPO(
        CausalLMActorCriticPolicy,
        TextVecEnv(TextVectorEnv(work.task, work.size.rows)),
        n_steps=work.size.new_tokens,
        batch_size=tokens // minibatches,
        n_epochs=epochs,
        learning_rate=1e-5,
        gamma=1.0,
        device="cpu",
    )

    def run() -> None:
        before = model.num_timesteps
        model.learn(tokens, log_interval=None, reset_num_timesteps=False)  # type: ignore[arg-type]
        assert model.num_timesteps == before + tokens

    return run


def lines(settings: Settings) -> Iterator[list[dict[str, Any]]]:
    """The CSV's lines, a shape at a time."""
    about = {"threads": settings.threads, "rounds": settings.rounds} | machine("cpu")
    about |= {"stable-baselines3": stable_baselines3.__version__}
    for shape in settings.shapes:
        work = Work(Size(shape, rows=settings.rows, new_tokens=settings.new_tokens))
        ways = {OURS: work.ppo(settings.epochs), "sb3 ppo": sb3(work, settings.epochs, 1)}
        if settings.minibatches > 1 and shape == settings.shapes[0]:
            ways[f"sb3 ppo, {settings.minibatches} minibatches"] = sb3(work, settings.epochs, settings.minibatches)
        for call in ways.values():
            call()  # first calls allocate and fill caches

        def one(name: str, ways: dict[str, Callable[[], object]] = ways) -> float:
            return timed(ways[name], "cpu")

        load = Load()
        times = in_turns(ways, settings.rounds, one)
        foreign = load.foreign()
        several = []
        for name, own in times.items():
            seconds = statistics.median(own)
            line: dict[str, Any] = {"shape": shape, "vocabulary": work.size.model.vocabulary, "rows": settings.rows}
            line |= {"prompt": work.size.prompt_length, "new_tokens": settings.new_tokens, "epochs": settings.epochs}
            line |= {"way": name, "seconds": round(seconds, 4), "tokens_per_s": round(work.size.tokens / seconds, 1)}
            several.append(
                line | {"times_ours": round(ratio(own, times[OURS]), 3), "foreign_load": round(foreign, 3)} | about
            )
        yield several


def run(settings: Settings, out: Path | None = None) -> Path:
    """Measure, print, and write the CSV after every shape; where it is.

    Raises:
        ValueError: a value out of range, or texts that do not divide into the minibatches.
    """
    check(settings, "{}")
    if settings.rows * settings.new_tokens % settings.minibatches:
        tokens = f"{settings.rows} x {settings.new_tokens} tokens"
        raise ValueError(f"{tokens} do not divide into {settings.minibatches} minibatches")
    torch.set_num_threads(settings.threads)
    out = out or RESULTS / "sb3-cpu.csv"
    everything: list[dict[str, Any]] = []
    for several in lines(settings):
        everything += several
        for line in several:
            print(f"{line['shape']}  {line['way']}: {line['seconds']} s, {line['times_ours']} x ours", flush=True)
        write_lines(out, everything, list(everything[0]))
    print(out)
    return out
