"""TRL's trainers on the throughput benchmark's work, as a script in an environment of their own, without lm-envs.

The argument is a job as JSON: ``trainer`` (ppo, grpo or rloo), ``epochs``, ``threads`` and the size. The trainer's own
loop runs; between its iterations it waits for a line on standard input. It answers ``go`` with the seconds of one
iteration, and ``peak`` with the most bytes that its tensors held beyond those that were there.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
import time
from typing import Any, TextIO

import torch
from datasets import Dataset
from shared_work import LiveMemory, gpt2_config, word_tokenizer  # the module beside this one, which runs as a script
from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel, TrainerCallback

ENDLESS = 10**6  # iterations: the benchmark decides how many there are


class Turns(TrainerCallback):
    """A callback that holds the trainer between two iterations until it is asked for one."""

    def __init__(self, answers: TextIO, device: str) -> None:
        self.answers = answers
        self._asked = ""
        self._start = 0.0
        self._memory = LiveMemory(device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer, and wait for the next request."""
        if self._asked:
            value = time.perf_counter() - self._start if self._asked == "go" else self._memory.stop()
            print(value, file=self.answers, flush=True)
        else:  # the first iteration allocates and fills caches
            print("ready", file=self.answers, flush=True)
        self._asked = sys.stdin.readline().strip()
        if self._asked not in ("go", "peak"):
            raise SystemExit(0)
        if self._asked == "peak":
            gc.collect()
            self._memory.start()
        self._start = time.perf_counter()


def tokenizer(job: dict[str, Any]) -> Any:
    """Make a tokenizer that pads with a token that no model can sample: TRL's PPO takes every pad token for padding."""
    return word_tokenizer(job["vocabulary"], pad=job["vocabulary"], padding_side="left")


def scorer(job: dict[str, Any]) -> GPT2ForSequenceClassification:
    """Make a reward model or a critic."""
    made = GPT2ForSequenceClassification(gpt2_config(job, num_labels=1))
    made.config.pad_token_id = job["vocabulary"]
    return made


def settings(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the options of every trainer: the whole batch at once, float32, everything optional off."""
    return dict(
        output_dir=folder,
        per_device_train_batch_size=job["rows"],
        gradient_accumulation_steps=1,
        learning_rate=1e-5,
        bf16=False,
        use_cpu=job["device"] == "cpu",
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=ENDLESS,
        temperature=1.0,
    )


def ppo(job: dict[str, Any], folder: str, turns: Turns) -> Any:
    """Make TRL 1.12's PPO trainer: a critic of the policy's size, a reference and a reward model."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy = GPT2LMHeadModel(gpt2_config(job))
    scorers = [scorer(job) for _ in range(2)]
    prompts = torch.randint(1, job["vocabulary"], (job["rows"], job["prompt_length"]))
    return PPOTrainer(
        PPOConfig(
            **settings(job, folder),
            num_ppo_epochs=job["epochs"],
            num_mini_batches=1,
            local_rollout_forward_batch_size=job["rows"],
            response_length=job["new_tokens"],
            total_episodes=job["rows"] * ENDLESS,
            num_sample_generations=0,
            kl_coef=0.05,
        ),
        processing_class=tokenizer(job),
        model=policy,
        ref_model=None,
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        callbacks=[turns],
    )


def grouped(job: dict[str, Any], folder: str, turns: Turns) -> Any:
    """Make TRL 1.16's GRPO or RLOO trainer: ``group`` responses to each prompt, a reference and a reward model."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer, made = (GRPOTrainer, GRPOConfig) if job["trainer"] == "grpo" else (RLOOTrainer, RLOOConfig)
    words = tokenizer(job)
    GPT2LMHeadModel(gpt2_config(job)).save_pretrained(
        folder
    )  # the trainer reads the reference from where the policy was
    words.save_pretrained(folder)
    prompts = torch.randint(1, job["vocabulary"], (job["rows"] // job["group"], job["prompt_length"]))
    return trainer(
        GPT2LMHeadModel.from_pretrained(folder),
        reward_funcs=[scorer(job)],
        reward_processing_classes=[tokenizer(job)],
        args=made(
            **settings(job, folder),
            num_generations=job["group"],
            max_completion_length=job["new_tokens"],
            generation_kwargs={"min_new_tokens": job["new_tokens"], "top_k": 0},
            steps_per_generation=1,
            max_steps=ENDLESS,
            beta=0.05,
        ),
        train_dataset=Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in prompts.tolist()]}),
        processing_class=words,
        callbacks=[turns],
    )


def main() -> None:
    """Train until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the trainer prints is no answer
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        make = ppo if job["trainer"] == "ppo" else grouped
        make(job, folder, Turns(answers, job["device"])).train()


if __name__ == "__main__":
    main()
