"""Write example inputs for a comparison of your own parts, from the built-in task: two model folders and prompts.

    python examples/bring_your_own.py parts
    lm-envs compare --policy parts/policy --reward-model parts/reward_model --prompts parts/prompts.jsonl \
        --algorithms sft best-of-16 ppo --out runs/own

Replace them with your own folders, saved by ``save_pretrained``. Policy and reward model need not share a tokenizer.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_envs.tasks import load


def main(folder: Path) -> None:
    task = load("reviews")
    tokenizer = task.tokenizer

    task.reference.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")

    task.reward.model.save_pretrained(folder / "reward_model")
    task.reward.tokenizer.save_pretrained(folder / "reward_model")

    with (folder / "prompts.jsonl").open("w") as stream:
        for split, prompts in task.prompts.items():
            for text in tokenizer.batch_decode(prompts):
                stream.write(json.dumps({"prompt": text, "split": split}) + "\n")
    print(f"policy, reward model and prompts are in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "parts"))
