"""``lm-envs people``: studies in which people rank, compare or rate responses."""

from __future__ import annotations

import getpass
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from annotated_types import Interval
from rich.console import Console
from rich.table import Table as RichTable

from lm_envs import files
from lm_envs.benchmarks.commands.people_serve import Folder, Serve
from lm_envs.benchmarks.errors import UserError
from lm_envs.feedback.store import FILE, Store, open_study
from lm_envs.feedback.study import ANSWERS, INSTRUCT_FLAGS, MOST, SETTINGS, StudySettings, write_settings
from lm_envs.printable import one_line
from lm_envs.settings import Count, Positive, Probability, Seed

_INSTRUCTIONS = "Read all responses before you answer. Judge what is written, not how long it is."


@dataclass(frozen=True)
class New:
    """Make a study: what is asked, and which responses people see.

      lm-envs people new --out study --policy runs/ppo/model --policy DIR --prompts prompts.jsonl --responses 2
      lm-envs people new --out study --comparison runs/demo --mode rank
      lm-envs people new --out study --texts responses.jsonl --mode rate

    Edit OUT/study.toml for the instructions, the flags and everything else; then `lm-envs people serve OUT`.
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Folder of the study."""
    mode: Literal["pair", "rank", "rate"] = "pair"
    """Compare two, rank several, or rate each on a scale."""
    policy: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="DIR")] = ()
    """A policy to sample from; may be given again."""
    prompts: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """What to sample responses to."""
    responses: Annotated[int, Interval(ge=2, le=MOST)] = 2
    """Responses per prompt, of all policies and temperatures together."""
    temperature: Annotated[tuple[Positive, ...], tyro.conf.arg(metavar="T ...")] = (1.0,)
    """Temperatures to sample at."""
    max_new_tokens: Count = 64
    """Longest response in tokens."""
    comparison: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Show the test samples of a finished comparison instead; in mode pair each method's beside SFT's."""
    task: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Task of the comparison, if it has several."""
    texts: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Show texts instead: rows of prompt, completions, and sources and ranks if known."""
    judged: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Take items and answers from an export of Label Studio or Argilla, or from battles as Chatbot Arena has them."""
    gold: Annotated[Path | None, tyro.conf.arg(metavar="FILE.jsonl")] = None
    """Items with known ranks, which each annotator gets first: rows of prompt, completions, ranks (0 the best)."""
    limit: Count | None = None
    """Take no more prompts."""
    overlap: Count = 1
    """How many people answer each item."""
    flags: bool = False
    """Ask about each response what InstructGPT's annotators were asked: is it harmful, does it fail the instruction."""
    seed: Seed = 0
    """Decides samples and the order in which responses are shown."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.commands import people_items
        from lm_envs.benchmarks.run.compare import gone_if_refused
        from lm_envs.feedback import exchange

        given = {
            "--policy": bool(self.policy),
            "--comparison": self.comparison,
            "--texts": self.texts,
            "--judged": self.judged,
        }
        if len([name for name, value in given.items() if value]) != 1:
            raise UserError(f"say where responses come from: one of {', '.join(given)}")
        if self.policy and not self.prompts:
            raise UserError("--policy needs --prompts: what shall it respond to?")
        if (self.out / SETTINGS).exists():
            raise UserError(f"{self.out} is a study already; give another --out")
        if (self.out / FILE).exists():
            raise UserError(
                f"{self.out / FILE} is there without {SETTINGS}: `people new` was stopped, or a study lost its "
                "settings; give another --out"
            )
        settings = StudySettings(
            Path(os.path.abspath(self.out)).name,  # resolve() refuses loops of links with an error of its own
            self.mode,
            question={
                "pair": "Which response is better?",
                "rank": "Rank the responses, the best first.",
                "rate": "How good is each response?",
            }[self.mode],
            instructions=_INSTRUCTIONS,
            overlap=self.overlap,
            flags=INSTRUCT_FLAGS if self.flags else {},
            seed=self.seed,
        )
        judgments = exchange.read(self.judged) if self.judged else []
        if self.mode == "pair":
            judgments = list(people_items.judged_in_pairs(judgments))
        if self.policy:
            assert self.prompts is not None
            found = people_items.sampled(
                self.policy, self.prompts, self.responses, self.temperature, self.max_new_tokens, self.seed, self.limit
            )
        elif self.comparison:
            found = people_items.compared(self.comparison, self.task, self.limit)
        elif self.texts:
            found = people_items.of_file(self.texts, self.limit)
        else:
            found = iter([item for item, _, _ in judgments])
        items = list(people_items.in_pairs(found, "sft" if self.comparison else None) if self.mode == "pair" else found)
        if self.gold:
            items += people_items.of_file(self.gold)
        if not items:
            raise UserError("there is nothing to judge: no item was found")
        new = not self.out.exists()
        with gone_if_refused(self.out, *(FILE + end for end in ("", "-wal", "-shm"))):
            if new:
                self.out.chmod(0o700)  # people's names and answers will lie in it
            store = Store(self.out, settings)
            count = store.add_items(items)
            for item, who, answer in judgments:
                store.take(item, who, answer)
            if self.policy and len(self.policy) * len(self.temperature) == 1:
                loop: dict[str, Any] = {"policy": self.policy[0], "prompts": self.prompts, "responses": self.responses}
                loop |= {"temperature": self.temperature[0], "max_new_tokens": self.max_new_tokens, "seed": self.seed}
                loop |= {"limit": self.limit, "reward_model": {}, "train": {"algorithm": "ppo"}}
                write_settings(self.out / "loop.toml", loop)
            write_settings(self.out / SETTINGS, asdict(settings))
        made = f"{count} item{'s' * (count != 1)} in {self.out}; next: lm-envs people serve {self.out}"
        console.print(made, highlight=False, markup=False, soft_wrap=True)


@dataclass(frozen=True)
class Rank:
    """Answer a study in the terminal.

    lm-envs people rank study
    """

    study: Folder
    annotator: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    """Who answers; your user name if not given."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.commands.people_terminal import ask_all

        ask_all(open_study(self.study), self.annotator or getpass.getuser())


@dataclass(frozen=True)
class Simulate:
    """Let simulated annotators answer a study: Bradley-Terry choices by a score of each response.

      lm-envs people simulate study --annotators 3 --strength ppo=1 --strength sft=0

    For teaching, for tests, and to learn how many answers a study needs before people are asked.
    """

    study: Folder
    annotators: Count = 3
    """Number of annotators."""
    strength: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="SOURCE=X")] = ()
    """How good a source's responses are; 0 if not given; may be given again."""
    temperature: Annotated[float, tyro.conf.arg(metavar="T")] = 1.0
    """Temperature of the choices; at 0 the better response always wins."""
    flip: Probability = 0.0
    """Probability that an answer is reversed."""
    length_bias: float = 0.0
    """Utility added per character of a response."""
    position_bias: float = 0.0
    """Utility added to the response shown first."""
    limit: Count | None = None
    """Answers per annotator at most."""
    seed: Seed = 0
    """Seed of the choices."""

    def run(self, console: Console) -> None:
        from lm_envs.feedback.annotators import Annotator, work

        store = open_study(self.study)
        strength: dict[str, float] = {}
        for text in self.strength:
            name, found, value = text.rpartition("=")
            try:
                strength[name] = float(value)
            except ValueError:
                found = ""
            if not found:
                raise UserError(f"--strength is SOURCE=NUMBER, not {text!r}")
        sources = {response.source for item in store.items().values() for response in item.responses}
        if unknown := [name for name in strength if name not in sources]:
            raise UserError(
                f"--strength: no response is of {unknown[0]!r}; the sources are {', '.join(sorted(sources))}"
            )
        total = 0
        for number in range(self.annotators):
            person = Annotator(
                lambda item: [strength.get(response.source, 0.0) for response in item.responses],
                temperature=self.temperature,
                flip=self.flip,
                per_character=self.length_bias,
                first=self.position_bias,
                seed=self.seed * 1000 + number,
            )
            total += work(store, f"simulated-{number + 1}", person, self.limit)
        console.print(f"{total} answers by {self.annotators} simulated annotators", highlight=False, markup=False)


@dataclass(frozen=True)
class Results:
    """Agreement, biases and ratings of a study's answers.

    lm-envs people results study
    """

    study: Folder
    against: Annotated[str | None, tyro.conf.arg(metavar="SOURCE")] = None
    """Win-rates against this source; the one most often compared if not given."""
    reward_model: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    """Set a reward model beside people: how often it agrees, by the margin of its scores, and how often it should."""
    json: bool = False
    """Print JSON."""

    def run(self, console: Console) -> None:
        from lm_envs.feedback.summary import summarize

        judgments, scores = open_study(self.study).judgments(), None
        if not judgments:
            raise UserError(f"nobody has answered yet: lm-envs people serve {self.study}")
        if self.reward_model is not None:
            from lm_envs.benchmarks.commands.people_loop import scores_of

            scores = scores_of(self.reward_model, [judgment.content for judgment in judgments])
        summary = summarize(judgments, self.against, scores)
        if self.json:
            print(json.dumps(files.jsonable(summary), indent=1))
            return
        show_tables(summary)


@dataclass(frozen=True)
class Next:
    """Go on with a study in rounds: when people have answered, train a reward model and a policy and sample again.

      lm-envs people new --out study --policy runs/sft/model --prompts prompts.jsonl --limit 200
      lm-envs people serve study
      lm-envs people next study

    STUDY/loop.toml holds the settings of both trainings. May be stopped at any time: the same command goes on.
    """

    study: Folder
    anyway: bool = False
    """Do not wait for the rest of this round's answers."""

    def run(self, console: Console) -> None:
        from lm_envs.benchmarks.commands.people_loop import Loop

        loop = Loop(self.study, open_study(self.study))
        loop.run(console, self.anyway)
        show_tables({"Rounds": loop.report()})


@dataclass(frozen=True)
class Export:
    """Write a study's answers to a file.

      lm-envs people export study answers.jsonl
      lm-envs people export study pairs.jsonl --layout pairs

    `lm-envs reward-model --data STUDY`, dpo and data check take the folder of the study itself.
    """

    study: Folder
    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """File to write."""
    layout: Literal["kwise", "pairs", "csv"] = "kwise"
    """Ranked completions (JSONL), TRL's prompt, chosen, rejected (JSONL), or CSV."""

    def run(self, console: Console) -> None:
        from lm_envs.feedback import exchange

        count = exchange.write(self.file, open_study(self.study).judgments(), self.layout)
        console.print(f"{count} rows in {self.file}", highlight=False, markup=False)


@dataclass(frozen=True)
class Forget:
    """Delete everything a study holds about one annotator.

    lm-envs people forget study ann
    """

    study: Folder
    annotator: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    """Annotator to delete."""

    def run(self, console: Console) -> None:
        try:
            count = open_study(self.study).forget(self.annotator)
            (self.study / ANSWERS).unlink(missing_ok=True)  # is written again when something learns from it
        except KeyError as error:
            raise UserError(str(error.args[0])) from error
        console.print(f"{count} answers of {self.annotator} are gone", highlight=False, markup=False)


@dataclass(frozen=True)
class People:
    """Let people compare, rank or rate responses, and see how far they agree."""

    what: Annotated[
        Annotated[New, tyro.conf.subcommand("new", prefix_name=False)]
        | Annotated[Serve, tyro.conf.subcommand("serve", prefix_name=False)]
        | Annotated[Rank, tyro.conf.subcommand("rank", prefix_name=False)]
        | Annotated[Simulate, tyro.conf.subcommand("simulate", prefix_name=False)]
        | Annotated[Next, tyro.conf.subcommand("next", prefix_name=False)]
        | Annotated[Results, tyro.conf.subcommand("results", prefix_name=False)]
        | Annotated[Export, tyro.conf.subcommand("export", prefix_name=False)]
        | Annotated[Forget, tyro.conf.subcommand("forget", prefix_name=False)],
        tyro.conf.arg(name=""),
    ]

    def run(self, console: Console) -> None:
        self.what.run(console)


def show_tables(tables: Mapping[str, list[dict[str, Any]]]) -> None:
    """Print lists of rows, each under its title."""
    for title, rows in tables.items():
        if rows:
            table = RichTable(title=title, title_justify="left", show_edge=False)
            for name in rows[0]:
                table.add_column(name)
            for row in rows:
                table.add_row(*[_cell(value) for value in row.values()])
            Console(markup=False, emoji=False).print(table)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.2f}"
    return one_line(str(value))
