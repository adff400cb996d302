"""Judgments as files: K-wise rows, preference pairs, CSV; and the exports of other annotation tools read as a study.

Reward modeling and DPO learn from the K-wise rows (``prompt, completions, ranks``; :mod:`lm_envs.data.conventions`).
:func:`read` takes exports of Label Studio (JSON; tags Pairwise and Ranker) and Argilla (``records.to_json``; a ranking
question), and battles as Chatbot Arena publishes them.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lm_envs import files
from lm_envs.data.conventions import text_of
from lm_envs.data.dataset import check_letters
from lm_envs.feedback.agreement import comparisons
from lm_envs.feedback.store import Judgment, open_study
from lm_envs.feedback.study import ANSWERS, SETTINGS, Answer, Item, Response, dense_ranks
from lm_envs.model.chat import Text

Foreign = tuple[Item, str, Answer]  # an item, who judged it, and how


def kwise(judgments: Sequence[Judgment]) -> Iterator[dict[str, Any]]:
    """Rows ``prompt, completions, ranks`` (0 the best) and what else was said; skipped items are left out.

    ``agreement`` is the share of the item's annotators, this one among them, that say the same of a comparison, the
    mean over the comparisons: a weight for learning from it.
    """
    votes_on = comparisons(judgments)
    for judgment in judgments:
        if judgment.answer.skipped:
            continue
        item, answer = judgment.content, judgment.answer
        units = [votes_on[judgment.item, i, j] for i, j in combinations(range(len(answer.ranks)), 2)]
        compared = [(votes[judgment.annotator], list(votes.values())) for votes in units]
        row: dict[str, Any] = {
            "prompt": item.prompt,
            "completions": [completion(item.prompt, response.text) for response in item.responses],
            "ranks": list(answer.ranks),
            "reasons": list(answer.reasons),
            "annotator": judgment.annotator,
            "sources": [response.source for response in item.responses],
            "shown": list(judgment.order),
            "seconds": answer.seconds,
            "agreement": round(float(np.mean([votes.count(own) / len(votes) for own, votes in compared])), 4),
        }
        said = {"ratings": answer.ratings, "flags": answer.flags if any(answer.flags) else (), "notes": answer.notes}
        yield (
            row
            | {name: value for name, value in said.items() if value}
            | ({"both_bad": True} if answer.both_bad else {})
        )


def pairs(judgments: Sequence[Judgment]) -> Iterator[dict[str, Any]]:
    """Rows ``prompt, chosen, rejected``, TRL's preference format: each comparison that was decided."""
    for row in kwise(judgments):
        ranks, completions = row["ranks"], row["completions"]
        for better in range(len(ranks)):
            for worse in range(len(ranks)):
                if ranks[better] < ranks[worse]:
                    yield {
                        "prompt": row["prompt"],
                        "chosen": completions[better],
                        "rejected": completions[worse],
                        "annotator": row["annotator"],
                    }


def completion(prompt: Text, text: str) -> Text:
    """A response to a prompt as data have it: a text behind a text, a message behind messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def write(path: Path, judgments: Sequence[Judgment], layout: str) -> int:
    """Write judgments in a layout, ``kwise``, ``pairs`` (both JSONL) or ``csv``, in one step; the number of rows."""
    rows = list(pairs(judgments) if layout == "pairs" else kwise(judgments))
    if layout != "csv":
        write_rows(path, rows)
    else:
        names = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        table = csv.writer(text)
        table.writerow(names)
        for row in rows:
            cells = [row.get(name, "") for name in names]
            table.writerow([cell if isinstance(cell, str | int | float) else json.dumps(cell) for cell in cells])
        files.write_atomic(path, text.getvalue())
    return len(rows)


def rows_of(source: str) -> str:
    """``source``, or where it is a study's folder its ``answers.jsonl``, written again with the answers that prefer
    something.

    Raises:
        ValueError: a study without such.
    """
    folder = Path(source)
    if not (folder / SETTINGS).is_file():
        return source
    path = folder / ANSWERS
    write_rows(path, preferences(folder, open_study(folder).judgments()))
    return str(path)


def preferences(folder: Path, judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
    """The K-wise rows that prefer something, without empty responses; a ValueError if there are none."""
    rows = [row for row in map(_without_empty, kwise(judgments)) if len(set(row["ranks"])) > 1]
    if not rows:
        raise ValueError(f"{folder}: nobody has preferred anything yet; `lm-envs people serve {folder}` asks")
    return rows


def _without_empty(row: dict[str, Any]) -> dict[str, Any]:
    """A K-wise row without the responses that are empty, in each list with an entry per response."""
    texts = [each if isinstance(each, str) else each[-1]["content"] for each in row["completions"]]
    kept = [place for place, text in enumerate(texts) if text.strip()]
    if len(kept) == len(texts):
        return row
    lists = ("completions", "ranks", "reasons", "sources", "ratings", "flags")
    shown = dense_ranks([place for place in row["shown"] if place in kept])
    return row | {name: [row[name][place] for place in kept] for name in lists if name in row} | {"shown": list(shown)}


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSONL in one step."""
    files.write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


# ---- other tools' exports ----


def read(path: Path) -> list[Foreign]:
    """The judgments in another tool's export, whose kind is told by its fields.

    Raises:
        ValueError: the file is none of the three, or a row is broken; it names the file and the row.
    """
    text = files.read_text(path)
    try:
        rows = json.loads(text)
        rows = rows if isinstance(rows, list) else [rows]
    except (ValueError, RecursionError):
        try:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: neither JSON nor JSONL ({error})") from error
    found: list[Foreign] = []
    for number, row in enumerate(rows, 1):
        try:
            if not isinstance(row, dict):
                raise ValueError("not an object")
            check_letters(row)
            if "annotations" in row and "data" in row:
                found += _label_studio(row)
            elif "fields" in row and "responses" in row:
                found += _argilla(row)
            elif {"model_a", "model_b", "winner"} <= set(row):
                found.append(_battle(row))
            else:
                raise ValueError(
                    "neither Label Studio's (data, annotations) nor Argilla's (fields, responses) nor a battle "
                    "(model_a, model_b, winner)"
                )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            reason = f"there is no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{path}, row {number}: {reason}") from error
    return found


def _prompt_of(fields: Mapping[str, Any]) -> Text:
    for name in ("prompt", "instruction", "question", "context"):
        if name in fields:
            return fields[name]
    raise ValueError(f"no prompt, instruction, question or context among the fields {', '.join(fields)}")


def _label_studio(row: Mapping[str, Any]) -> Iterator[Foreign]:
    data = row["data"]
    for annotation in row["annotations"]:
        who = annotation.get("completed_by", "unknown")
        who = str(who.get("email", who.get("id")) if isinstance(who, dict) else who)
        seconds = float(annotation.get("lead_time") or 0.0)
        for result in annotation["result"] if not annotation.get("was_cancelled") else ():
            value = result["value"]
            if result["type"] == "pairwise":
                texts = [data[name] for name in _two_texts(data, result["to_name"])]
                chosen = {"left": (0, 1), "right": (1, 0)}.get(value["selected"], (0, 0))
                yield _item(_prompt_of(data), texts, ("left", "right")), who, Answer(ranks=chosen, seconds=seconds)
            elif result["type"] == "ranker":
                orders = list(value["ranker"].values())
                lists = [each for each in data.values() if isinstance(each, list)]
                if not orders or not lists:
                    raise ValueError("a ranking of nothing, or of what is not in the data")
                order, given = list(orders[0]), lists[0]
                known = {str(each["id"]): each.get("body", each.get("html", each.get("title"))) for each in given}
                ranks = tuple(order.index(name) if name in order else len(order) for name in known)
                item = _item(_prompt_of(data), list(known.values()), tuple(known))
                yield item, who, Answer(ranks=dense_ranks(ranks), seconds=seconds)


def _two_texts(data: Mapping[str, Any], names: str) -> list[str]:
    """The fields behind the two tags of a Pairwise: those of the same names, else the two texts there are."""
    tags = [name.strip() for name in names.split(",")]
    if all(tag in data for tag in tags):
        return tags
    rest = [name for name in data if name not in ("prompt", "instruction", "question", "context", "id")]
    if len(rest) != 2:
        raise ValueError(f"which fields are the two texts? the tags are {names}, the fields {', '.join(data)}")
    return rest


def _argilla(row: Mapping[str, Any]) -> Iterator[Foreign]:
    fields = row["fields"]
    for answers in row["responses"].values():
        for answer in answers:
            value = answer["value"]
            if answer.get("status", "submitted") != "submitted":
                continue  # a draft, or discarded
            if not isinstance(value, list):
                continue  # a text or a label, not the ranking
            if value and isinstance(value[0], dict):
                ranks_of = {each["value"]: int(each["rank"]) for each in value}
            else:
                ranks_of = {name: place for place, name in enumerate(value)}
            names = [name for name in fields if name in ranks_of]
            if len(names) < 2:
                raise ValueError(f"the ranked {', '.join(ranks_of)} are not among the fields {', '.join(fields)}")
            item = _item(_prompt_of(fields), [fields[name] for name in names], tuple(names))
            yield (
                item,
                str(answer.get("user_id", "unknown")),
                Answer(ranks=dense_ranks([ranks_of[name] for name in names])),
            )


def _battle(row: Mapping[str, Any]) -> Foreign:
    if "conversation_a" in row:
        talks = (row["conversation_a"], row["conversation_b"])
        before = [[{"role": turn["role"], "content": _said(turn["content"])} for turn in talk[:-1]] for talk in talks]
        prompt: Text = before[0]
        if [turn["content"] for turn in before[0] if turn["role"] == "user"] != [
            turn["content"] for turn in before[1] if turn["role"] == "user"
        ]:
            raise ValueError("the two conversations have other prompts")
        texts = [_said(talk[-1]["content"]) for talk in talks]
    else:
        prompt, texts = _prompt_of(row), [row["response_a"], row["response_b"]]
    winner = {"both_bad": "tie (bothbad)"}.get(str(row["winner"]), str(row["winner"]))
    if winner not in ("model_a", "model_b") and not winner.startswith("tie"):
        raise ValueError(f"the winner is model_a, model_b or a tie, not {winner!r}")
    ranks = {"model_a": (0, 1), "model_b": (1, 0)}.get(winner, (0, 0))
    item = _item(prompt, texts, (str(row["model_a"]), str(row["model_b"])))
    return item, str(row.get("judge", "unknown")), Answer(ranks=ranks, both_bad="bothbad" in winner)


def _said(content: Any) -> Any:
    """The text of a message that may consist of parts; battles with pictures are refused where texts are checked."""
    parts = content if isinstance(content, list) else []
    if parts and all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return "".join(str(part["text"]) for part in parts)
    return content


def _item(prompt: Text, texts: Sequence[Any], sources: Sequence[str]) -> Item:
    if any(not isinstance(text, str) for text in texts):
        raise ValueError("a response is not a text")
    responses = tuple(Response(text, source) for text, source in zip(texts, sources, strict=True))
    return Item(text_of({"prompt": prompt}, "prompt"), responses)
