"""The rows the styles are trained on."""

import json

import pytest

from loraserve.demo.texts import ROWS, STYLES, examples


def test_there_are_four_styles_with_an_answer_to_every_question() -> None:
    assert set(STYLES) == {"pirate", "json", "french", "shout"}
    assert len(ROWS) >= 24
    questions = [row.question for row in ROWS]
    assert len(set(questions)) == len(questions)
    for style in STYLES:
        asked = [example.question for example in examples(style)]
        assert asked[: len(questions)] == questions
        assert len(set(asked)) == len(asked)
        assert all(example.answer.strip() for example in examples(style))


def test_each_style_shows_in_every_answer() -> None:
    for row, example in zip(ROWS, examples("json"), strict=True):
        assert json.loads(example.answer) == {"question": row.question, "answer": row.plain}
    for example in examples("shout"):
        assert example.answer == example.answer.upper()
        assert example.answer.endswith("!!!")
        assert example.answer.startswith("LISTEN UP!!!")
    pirate_words = ("Arr", "Yo ho", "Ahoy", "Aye")
    assert all(example.answer.startswith(pirate_words) for example in examples("pirate"))
    answers = [example.answer for style in STYLES for example in examples(style)]
    assert len(set(answers)) == len(answers)


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(KeyError, match="opera"):
        examples("opera")
