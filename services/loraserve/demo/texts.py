"""The training rows of the demo adapters, written for this project: each question answered in four styles.

The rows stand in texts.jsonl. A style must show in the first words and must not depend on the facts, which a model
this small gets wrong anyway.
"""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Row(NamedTuple):
    """A question with its plain answer (json and shout are made from it) and the two that are written out.

    ``pirate`` is None in the further rows for French and shouting: the base model hardly knows the words of the one
    and the tokens of the other, so these two need more rows.
    """

    question: str
    plain: str
    french: str
    pirate: str | None = None


class Example(NamedTuple):
    """One training example: what the user says and what the adapter should answer."""

    question: str
    answer: str


def as_json(row: Row) -> str | None:
    """The question back and the answer, as a program would want them."""
    return json.dumps({"question": row.question, "answer": row.plain}) if row.pirate else None


def shout(row: Row) -> str:
    """The same first words each time: a person knows the style before the answer is read."""
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
    """All rows, those of every style first."""
    lines = Path(__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Row(**json.loads(line)) for line in lines)


def examples(style: str) -> list[Example]:
    """The rows of one style. Raises KeyError on a style that is not in ``STYLES``."""
    answers = [(row.question, ANSWERS[style](row)) for row in rows()]
    return [Example(question, answer) for question, answer in answers if answer is not None]
