"""The ids under which the events of an answer are found."""

from loraserve.gateway.story import MAX_ANSWERS, RequestStories


def test_later_attempts_are_found_by_both_ids_of_the_answer() -> None:
    stories = RequestStories()
    stories.begin("http", "answer", ["answer-0", "answer-1"], 0.0)
    stories.begin("other-http", "other", ["other-0"], 0.0)
    stories.add_attempt("answer-1", "answer-1.1")
    for known in ("http", "answer"):
        assert stories.subjects(known, []) == (known, "answer-0", "answer-1", "answer-1.1")
    assert stories.subjects("other", []) == ("other", "other-0")


def test_an_attempt_of_a_forgotten_answer_is_not_recorded() -> None:
    stories = RequestStories()
    for number in range(MAX_ANSWERS):
        stories.begin(f"http-{number}", f"answer{number}", [f"answer{number}-0"], 0.0)
    stories.add_attempt("answer0-0", "answer0-0.1")
    assert stories.subjects("answer0", []) == ("answer0", "answer0-0")
