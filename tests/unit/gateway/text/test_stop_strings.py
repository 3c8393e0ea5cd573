"""Stop strings are found however the text is cut, and nothing is sent that belongs to one."""

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.gateway.text.output import StopMatcher

TEXT = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Return the shortest prefix that ends in a stop string, and the longest such stop string: the definition."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@settings(max_examples=400, deadline=None)
@given(text=TEXT, stops=STOPS, include=st.booleans(), cuts=st.lists(st.integers(0, 30)))
def test_matches_equal_the_definition_for_any_cuts(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    matcher = StopMatcher(stops, include)
    sent = ""
    for start, end in pairwise(bounds):
        sent += matcher.push(text[start:end])
        assert expected(text, stops, include)[0].startswith(sent)
    sent += matcher.flush()
    assert (sent, matcher.matched) == expected(text, stops, include)


def test_only_text_that_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["\nUser:"])
    assert matcher.push("one\nUs") == "one"
    assert matcher.push("ual") == "\nUsual"
    assert matcher.push("\nUser") == ""
    assert matcher.push(": hi") == ""
    assert matcher.matched == "\nUser:"
    assert matcher.push("more") == ""
    assert matcher.flush() == ""


def test_without_stop_strings_text_passes() -> None:
    matcher = StopMatcher([])
    assert matcher.push("text") == "text"
    assert matcher.flush() == ""
    assert matcher.matched is None


def test_a_long_stop_string_takes_linear_time() -> None:
    matcher = StopMatcher(["a" * 5000 + "b"])
    sent = "".join(matcher.push("a" * 10) for _ in range(2000)) + matcher.flush()
    assert sent == "a" * 20_000
