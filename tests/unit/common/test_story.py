"""Stories: what happened to one id, in order, in bounded memory."""

from loraserve.story import KEPT_LINES, Story


def test_one_id_has_its_own_lines_oldest_first_with_their_times() -> None:
    story = Story()
    story.tell("r1", 1.0, "waiting")
    story.tell("r2", 1.5, "waiting")
    story.tell("r1", 2.25, "running")
    assert story.of("r1") == ["1.000 waiting", "2.250 running"]
    assert story.of("nobody") == []


def test_the_oldest_lines_go_when_there_are_too_many() -> None:
    story = Story()
    for index in range(KEPT_LINES + 2):
        story.tell("r", float(index), "tick")
    assert len(story.of("r")) == KEPT_LINES
    assert story.of("r")[0] == "2.000 tick"
