"""Stories keep the events of a subject in order and in bounded memory."""

from loraserve.messages import StoryLine
from loraserve.story import MAX_ENTRIES, MAX_SUBJECTS, Story


def test_each_subject_has_its_own_entries_oldest_first() -> None:
    story = Story()
    story.tell("r1", 1.0, "waiting")
    story.tell("r2", 1.5, "waiting")
    story.tell("r1", 2.25, "running")
    assert story.lines("r1") == ["1.000 waiting", "2.250 running"]
    assert story.entries("r1")[1] == (2.25, "running")
    assert story.lines("unknown") == []


def test_the_oldest_entries_of_a_subject_are_dropped() -> None:
    story = Story()
    for index in range(MAX_ENTRIES + 2):
        story.tell("r", float(index), "tick")
    assert len(story.lines("r")) == MAX_ENTRIES
    assert story.lines("r")[0] == "2.000 tick"


def test_the_subject_without_an_event_for_longest_is_dropped() -> None:
    story = Story()
    for index in range(MAX_SUBJECTS):
        story.tell(f"r{index}", 0.0, "waiting")
    story.tell("r0", 1.0, "running")
    story.tell("new", 2.0, "waiting")
    assert story.lines("r0") == ["0.000 waiting", "1.000 running"]
    assert story.lines("r1") == []
    assert story.lines("new") == ["2.000 waiting"]


def test_wall_clock_times_stay_the_same_unless_the_clock_is_set() -> None:
    story = Story()
    story.tell("r", 2.0, "waiting")
    first = story.told(["r"], 1000.0)
    assert first == (StoryLine(unix_s=1002.0, subject="r", text="waiting"),)
    assert story.told(["r"], 1000.0001) == first
    assert story.told(["r"], 1005.0)[0].unix_s == 1007.0
