"""The training rows of the demo adapters, written for this project: each question answered in four styles.

The rows are in texts.jsonl. A style must show in the first words and must not depend on facts, which a model of this
size gets wrong.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A question with its plain, French and pirate answers. The json and shout answers are made from the plain one.

    ``pirate`` is None in the additional rows for French and shouting. These two styles need more rows: the base model
    has seen little French and few words in capitals.
    """

    question: str
    plain: str
    french: str
    pirate: str | None = None


class Example(NamedTuple):
    """One training example: the user's question and the answer to train."""

    question: str
    answer: str


def as_json(row: Row) -> str | None:
    """Return question and answer as a JSON object, or None for the additional rows."""
    return json.dumps({"question": row.question, "answer": row.plain}) if row.pirate else None


def shout(row: Row) -> str:
    """Return the answer in capitals. The first words are always the same, which makes the style obvious."""
    return "LISTEN UP!!! " + row.plain.rstrip(".").upper() + "!!!"


ANSWERS: dict[str, Callable[[Row], str | None]] = {
    "pirate": lambda row: row.pirate,
    "json": as_json,
    "french": lambda row: row.french,
    "shout": shout,
}
STYLES = tuple(ANSWERS)


@cache
def rows() -> tuple[Row, ...]:
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Row(**json.loads(line)) for line in lines)


def examples(style: str) -> list[Example]:
    """Return the training examples of a style. Raises KeyError for a style that is not in ``STYLES``."""
    answers = [(row.question, ANSWERS[style](row)) for row in rows()]
    return [Example(question, answer) for question, answer in answers if answer is not None]
