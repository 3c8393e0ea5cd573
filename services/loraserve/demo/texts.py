"""Reads the training data of the demo adapters from texts.jsonl: questions with answers in several styles.

Each style is visible in the first words of an answer. No style depends on facts, because the small model gets facts
wrong.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A question with its answers. The answers in the json and shout styles are derived from ``plain``.

    In rows that serve only the french and shout styles, ``pirate`` is None. These styles need more rows, because the
    base model has seen little French and few words in capitals.
    """

    question: str
    plain: str
    french: str
    pirate: str | None = None


class Example(NamedTuple):
    """A question and the answer that the adapter should learn."""

    question: str
    answer: str


def as_json(row: Row) -> str | None:
    """Return question and plain answer as a JSON object, or None if the row is only for french and shout."""
    return json.dumps({"question": row.question, "answer": row.plain}) if row.pirate else None


def shout(row: Row) -> str:
    """Return the plain answer in capitals, after fixed first words that make the style obvious."""
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
    """Return the training examples of a style. Raises KeyError if the style is not in ``STYLES``."""
    answers = [(row.question, ANSWERS[style](row)) for row in rows()]
    return [Example(question, answer) for question, answer in answers if answer is not None]
