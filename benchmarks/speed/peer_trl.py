"""TRL's trainers on the throughput benchmark's work. Runs in an environment of theirs, without lm-envs in it.

Called with a job as JSON: ``trainer`` (ppo, grpo or rloo), ``epochs``, ``threads`` and the size. The trainer's own loop
runs; between its iterations it waits for a line on standard input. To ``go`` it answers with the seconds of one
iteration, to ``peak`` with the bytes that its tensors held at the most beyond what was there.
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
from live_memory import LiveMemory  # the module beside this one, which runs as a script
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

EOS = 0
ENDLESS = 10**6  # iterations: whoever asks decides how many there are


class Turns(TrainerCallback):
    """Holds the trainer between two iterations until it is asked for one."""

    def __init__(self, answers: TextIO, device: str) -> None:
        self.answers = answers
        self._asked = ""
        self._start = 0.0
        self._memory = LiveMemory(device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answers, and waits for the next request."""
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


def config(job: dict[str, Any], **more: Any) -> GPT2Config:
    """Every model's, the same as lm-envs' in ``throughput_work``."""
    return GPT2Config(
        vocab_size=job["vocabulary"],
        n_embd=job["width"],
        n_layer=job["layers"],
        n_head=job["heads"],
        n_positions=max(128, job["prompt_length"] + job["new_tokens"]),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), EOS),
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **more,
    )


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A token a word. Padding is a token that no model can sample: TRL's PPO takes every pad token for padding."""
    words = {"<eos>": EOS} | {f"w{i}": i for i in range(1, vocabulary)} | {"<pad>": vocabulary}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def settings(job: dict[str, Any], folder: str) -> dict[str, Any]:
    """What all trainers are told: the whole batch at once, float32, everything optional off."""
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
    """TRL 1.12's PPO: a critic of the policy's size, a reference and a reward model."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy = GPT2LMHeadModel(config(job))
    scorers = [GPT2ForSequenceClassification(config(job, num_labels=1)) for _ in range(2)]
    for scorer in scorers:
        scorer.config.pad_token_id = job["vocabulary"]
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
        processing_class=tokenizer(job["vocabulary"]),
        model=policy,
        ref_model=None,
        reward_model=scorers[0],
        value_model=scorers[1],
        train_dataset=Dataset.from_dict({"input_ids": prompts.tolist()}),
        callbacks=[turns],
    )


def grouped(job: dict[str, Any], folder: str, turns: Turns) -> Any:
    """TRL 1.16's GRPO or RLOO: ``group`` responses to each prompt, a reference and a reward model."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    trainer, made = (GRPOTrainer, GRPOConfig) if job["trainer"] == "grpo" else (RLOOTrainer, RLOOConfig)
    words = tokenizer(job["vocabulary"])
    GPT2LMHeadModel(config(job)).save_pretrained(folder)  # the trainer reads the reference from where the policy was
    words.save_pretrained(folder)
    scorer = GPT2ForSequenceClassification(config(job, num_labels=1))
    scorer.config.pad_token_id = job["vocabulary"]
    prompts = torch.randint(1, job["vocabulary"], (job["rows"] // job["group"], job["prompt_length"]))
    return trainer(
        GPT2LMHeadModel.from_pretrained(folder),
        reward_funcs=[scorer],
        reward_processing_classes=[tokenizer(job["vocabulary"])],
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
    """Trains until standard input ends."""
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
