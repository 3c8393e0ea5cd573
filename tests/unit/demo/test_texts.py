"""The training rows of the styles."""

import json

import pytest

from loraserve.demo.texts import STYLES, examples, rows


def test_there_are_four_styles_with_enough_rows() -> None:
    assert set(STYLES) == {"pirate", "json", "french", "shout"}
    questions = [row.question for row in rows()]
    assert len(set(questions)) == len(questions)
    for style in STYLES:
        asked = [example.question for example in examples(style)]
        assert len(asked) >= 24
        # A question in only one style would teach the topic instead of the style.
        assert asked == questions[: len(asked)]
        assert all(example.answer.strip() for example in examples(style))


def test_each_style_shows_in_every_answer() -> None:
    plain = {row.question: row.plain for row in rows()}
    for example in examples("json"):
        assert json.loads(example.answer) == {"question": example.question, "answer": plain[example.question]}
    for example in examples("shout"):
        assert example.answer == example.answer.upper()
        assert example.answer.startswith("LISTEN UP!!!")
        assert example.answer.endswith("!!!")
    pirate_words = ("Arr", "Yo ho", "Ahoy", "Aye")
    assert all(example.answer.startswith(pirate_words) for example in examples("pirate"))
    answers = [example.answer for style in STYLES for example in examples(style)]
    assert len(set(answers)) == len(answers)


def test_the_questions_of_the_examples_are_not_trained_on() -> None:
    asked = {row.question for row in rows()}
    assert not asked & {"What is the capital of Italy?", "Tell me about dogs.", "How do I learn to swim?"}


def test_an_unknown_style_is_refused() -> None:
    with pytest.raises(KeyError, match="opera"):
        examples("opera")
