"""``lm-envs people next``: rounds of samples, people's answers, a reward model and a policy (Ouyang et al. 2022; Bai et
al. 2022, section 4.5).

Where a study stands is seen from what is on the disk, and every part is written in one step or continued from its
checkpoints, so the same command goes on after a kill at any point.

.. code-block:: text

    study/
        loop.toml                the settings
        study.sqlite             the items and answers of all rounds
        round-0/
            answers.jsonl        what the reward model learns from: all rounds so far, with a split by prompt
            reward-model/        a run of `lm-envs reward-model`
            accuracy.json        of it, and of the one before, on this round's answers
            policy/              a run of `lm-envs train`
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from lm_envs import files
from lm_envs.benchmarks.commands import people_items
from lm_envs.benchmarks.commands.learn import RewardModel
from lm_envs.benchmarks.commands.options import Own, command_of
from lm_envs.benchmarks.commands.train import Train
from lm_envs.benchmarks.errors import UserError
from lm_envs.benchmarks.run.compare import write_results
from lm_envs.benchmarks.run.storage import finished, read_json, write_json
from lm_envs.data.conventions import Example
from lm_envs.data.dataset import Examples
from lm_envs.data.splits import divide
from lm_envs.feedback import agreement, exchange, ratings
from lm_envs.feedback.store import Judgment, Store
from lm_envs.feedback.study import Item, Response
from lm_envs.model.text import Codec
from lm_envs.reward.learned import load_reward_model
from lm_envs.settings import Count, Name, Positive, Seed, Settings, Several, make

FILE = "loop.toml"


@dataclass(frozen=True)
class LoopSettings(Settings):
    """What ``loop.toml`` holds.

    Attributes:
        policy: the policy at the start, from which the KL penalty is measured, and each round's reward model begins.
        prompts: a tenth each, by a hash of the text, is for validation and test: reward models are measured on them.
        responses: per prompt; from the second round on by the newest policy and the one before in turn.
        temperature, max_new_tokens: of all samples.
        limit: prompts a round, each round the next ones; None for all in every round.
        seed: of samples, and of training.
        reward_model, train: options of these commands, with "_" for "-"; ``model`` of the first is what it begins as.
    """

    policy: Name
    prompts: Name
    responses: Several = 2
    temperature: Positive = 1.0
    max_new_tokens: Count = 64
    limit: Count | None = None
    seed: Seed = 0
    reward_model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=lambda: {"algorithm": "ppo"})


def scores_of(place: str, items: Sequence[Item]) -> list[list[float]]:
    """Return a reward model's scores of each item's responses. It reads prompt and response as one text, as it does
    while a policy is trained on it.

    Args:
        place: a folder of ``save_pretrained`` or a hub name.
    """
    reward = load_reward_model(place)
    codec = Codec(reward.tokenizer, reward.model)
    found = []
    for item in items:
        (prompt,), _ = codec.decode([codec.encode(item.prompt)[0]], [[]])
        found.append([reward.encode(prompt + response.text, stopped=True) for response in item.responses])
    scores = iter(reward.raw([ids for rows in found for ids in rows]).tolist())
    return [[next(scores) for _ in rows] for rows in found]


class Loop:
    """The rounds of a study that lies in ``folder``."""

    def __init__(self, folder: Path, store: Store) -> None:
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{folder} has no {FILE}; `lm-envs people new` with one --policy and --prompts writes one")
        self.folder, self.store = folder, store
        self.settings = make(LoopSettings, files.read_toml(path), str(path), "setting")

    def run(self, console: Console, anyway: bool) -> None:
        """Go on until people are needed.

        Args:
            anyway: take the current round's answers as enough, if there are any.
        """
        for place in (self.folder, *self.folder.glob("round-*")):
            files.remove_unfinished(place)
        for number in itertools.count():
            if not self.items(number):
                self.sample(number)
            judgments = [judgment for judgment in self.store.judgments() if self.round_of(judgment.content) == number]
            answers = self.folder / f"round-{number}" / "answers.jsonl"
            lacking = self.store.settings.overlap * len(self.items(number)) - len(judgments)
            if lacking > 0 and not answers.exists() and not (anyway and judgments):
                told = f"round {number} waits for {lacking} answers: lm-envs people serve {self.folder}"
                console.print(told, highlight=False, markup=False, soft_wrap=True)
                return
            if not answers.exists():
                self.write_answers(number, answers)
            self.learn(number, console)
            self.measure(number, judgments)
            self.improve(number, console)

    # ---- what is there ----

    def name(self, number: int) -> str:
        """Return the name in the study of the policy after ``number`` rounds."""
        return self.settings.policy if number == 0 else f"policy {number}"

    def round_of(self, item: Item) -> int | None:
        """The round that an item was sampled in; None for one that was not."""
        sources = [response.source for response in item.responses]
        found = [int(name[1]) for source in sources if (name := re.fullmatch(r"policy (\d+)", source))]
        return max(found, default=0 if self.settings.policy in sources else None)

    def items(self, number: int) -> list[Item]:
        return [item for item in self.store.items().values() if self.round_of(item) == number]

    def policy(self, number: int) -> str:
        """Return the folder or hub name of the policy after ``number`` rounds."""
        return self.settings.policy if number == 0 else str(self.run_of(number - 1) / "model")

    def run_of(self, number: int) -> Path:
        """The folder of a round's run of ``train``, which has one."""
        out = self.folder / f"round-{number}" / "policy"
        return next(out.glob("*/*/seed-*"), out)

    def reward_model(self, number: int) -> Path:
        return self.folder / f"round-{number}" / "reward-model"

    def splits(self) -> dict[str, str]:
        """The split of each prompt, by its key."""
        rows = [(each.key, each.split) for each in Examples(self.settings.prompts, "prompts")]
        return divide(rows, self.settings.prompts)

    # ---- the steps; each is done whole, or again ----

    def sample(self, number: int) -> None:
        settings, names = self.settings, {self.policy(k): self.name(k) for k in (number, number - 1) if k >= 0}
        found = people_items.sampled(
            list(names),
            settings.prompts,
            settings.responses,
            (settings.temperature,),
            settings.max_new_tokens,
            settings.seed + number,
            settings.limit,
            first=number * (settings.limit or 0),
        )
        items = [replace(i, responses=tuple(Response(r.text, names[r.source]) for r in i.responses)) for i in found]
        self.store.add_items(people_items.in_pairs(items) if self.store.settings.mode == "pair" else items)

    def write_answers(self, number: int, path: Path) -> None:
        splits = self.splits()
        found = [j for j in self.store.judgments() if (k := self.round_of(j.content)) is not None and k <= number]
        rows = exchange.preferences(self.folder, found)
        path.parent.mkdir(exist_ok=True)
        exchange.write_rows(path, [row | {"split": splits.get(Example(row["prompt"]).key, "train")} for row in rows])

    def learn(self, number: int, console: Console) -> None:
        out = self.reward_model(number)
        if finished(out) is None:
            given = {"model": self.settings.policy, "seed": self.settings.seed, "bad": "skip"}
            given |= self.settings.reward_model
            here = {"data": str(self.folder / f"round-{number}" / "answers.jsonl"), "out": out, "resume": True}
            command_of(RewardModel, given | here, f"[reward_model] in {self.folder / FILE}").run(console)

    def measure(self, number: int, judgments: Sequence[Judgment]) -> None:
        """Keep how often the new reward model orders this round's responses to held-out prompts as people did, and the
        one before all of its responses, of which it saw none."""
        path = self.folder / f"round-{number}" / "accuracy.json"
        if path.exists():
            return
        splits = self.splits()
        held = [j for j in judgments if splits.get(Example(j.content.prompt).key, "train") != "train"]
        found: dict[str, Any] = {}
        for name, which, these in (("accuracy before", number - 1, judgments), ("accuracy", number, held)):
            if which >= 0 and these:
                scores = scores_of(str(self.reward_model(which) / "model"), [j.content for j in these])
                share = agreement.share([(item, right) for item, _, right in agreement.predicted(these, scores)])
                found[name] = [share.value, share.low, share.high] if share.count else None
        write_json(path, found)

    def improve(self, number: int, console: Console) -> None:
        out = self.folder / f"round-{number}" / "policy"
        if finished(self.run_of(number)) is not None:
            write_results(out)  # a kill may have come between the end of the run and this
            return
        settings = self.settings
        given = {"algorithm": "ppo", "seed": settings.seed, **settings.train}
        env = (f"temperature={settings.temperature}", f"max_new_tokens={settings.max_new_tokens}")
        own = Own(
            policy=self.policy(number),
            prompts=settings.prompts,
            reward_model=str(self.reward_model(number) / "model"),
            reference=settings.policy,
        )
        here = {"out": out, "resume": True, "own": own}
        here["env"] = (*env, *given.pop("env", ()))
        command_of(Train, given | here, f"[train] in {self.folder / FILE}").run(console)

    def report(self) -> list[dict[str, Any]]:
        """A row a round: answers, how often reward models order them as people did, and how the policy that was new in
        it is rated in all rounds."""
        rated = ratings.bradley_terry(ratings.battles(self.store.judgments()))
        rows = []
        answers = Counter(self.round_of(judgment.content) for judgment in self.store.judgments())
        for number in itertools.takewhile(self.items, itertools.count()):
            path = self.folder / f"round-{number}" / "accuracy.json"
            known = read_json(path) if path.exists() else {}
            row: dict[str, Any] = {"round": number, "answers": answers[number]}
            for name in ("accuracy", "accuracy before"):
                row[name] = "-" if known.get(name) is None else "{:.2f} [{:.2f}, {:.2f}]".format(*known[name])
            elo = rated.get(self.name(number))
            rows.append(row | {"Elo": "-" if elo is None else f"{elo.value:.0f} [{elo.low:.0f}, {elo.high:.0f}]"})
        return rows
