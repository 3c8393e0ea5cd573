"""Which adapters count as usual followers, and the bounds of what is remembered."""

from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.engine.adapters.prefetch import LEAST_TIMES, MOST_FOLLOWERS, MOST_LEADERS, MOST_OPEN, WINDOW_S, Followers
from loraserve.messages import AdapterRef

APART_S = 10 * WINDOW_S


def ref(version: str, name: str = "name") -> AdapterRef:
    return AdapterRef(name=name, version=version, rank=8, slab_bytes=4096)


A, B, C = (ref(version) for version in "abc")


def come(followers: Followers, *adapters: AdapterRef, at_s: float, apart_s: float = 1.0) -> list[list[str]]:
    """Return what is expected at each of several requests in a row."""
    found = [followers.note_request(adapter, at_s + apart_s * n) for n, adapter in enumerate(adapters)]
    followers.validate()
    return [[adapter.version for adapter in expected] for expected in found]


def test_an_adapter_that_follows_often_enough_is_expected() -> None:
    followers = Followers()
    for times in range(LEAST_TIMES):
        assert come(followers, A, B, at_s=times * APART_S) == [[], []]
    assert come(followers, A, at_s=1e6) == [["b"]]
    assert come(followers, B, at_s=2e6) == [[]], "nothing follows it"


def test_a_request_after_the_window_does_not_count() -> None:
    followers = Followers()
    for times in range(3 * LEAST_TIMES):
        come(followers, A, B, at_s=times * APART_S, apart_s=WINDOW_S)
    assert come(followers, A, at_s=1e6) == [[]]


def test_a_follower_in_fewer_than_half_of_the_windows_is_not_expected() -> None:
    followers = Followers()
    for times in range(3 * LEAST_TIMES):
        come(followers, *((A, B) if times % 3 == 0 else (A, C)), at_s=times * APART_S)
    assert come(followers, A, at_s=1e6) == [["c"]]


def test_a_burst_counts_as_one_window() -> None:
    followers = Followers()
    come(followers, *[A] * 10, B, *[A, B] * 10, at_s=0.0, apart_s=0.1)
    assert come(followers, A, at_s=1e6) == [[]]


def test_the_most_frequent_follower_comes_first_with_its_newest_name() -> None:
    followers = Followers()
    for times in range(8):
        come(followers, *((A, C, B) if times % 2 else (A, B)), at_s=times * APART_S)
    come(followers, A, ref("b", "renamed"), at_s=9 * APART_S)
    expected = followers.note_request(A, 1e6)
    assert [(adapter.version, adapter.name) for adapter in expected] == [("b", "renamed")]
    come(followers, C, at_s=1e6 + 1)
    assert come(followers, A, at_s=2e6) == [["b", "c"]]


def test_old_habits_are_forgotten() -> None:
    followers = Followers()
    for times in range(200):
        come(followers, A, B, at_s=times * APART_S)
    changed_s = 1e6
    until = next(n for n in range(200) if come(followers, A, C, at_s=changed_s + n * APART_S)[0] == ["c"])
    assert until < 80, "200 cases of the past do not outweigh as many of the present"


def test_a_forgotten_follower_is_expected_again_once_it_follows_again() -> None:
    followers = Followers()
    for times in range(LEAST_TIMES):
        come(followers, A, B, at_s=times * APART_S)
    followers.forget("b")
    assert come(followers, A, at_s=1e6) == [[]]


@settings(max_examples=50, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 40), st.sampled_from([0.0, 0.05, 1.0, 6.0])), max_size=300))
def test_any_sequence_of_requests_keeps_the_invariants(steps: list[tuple[int, float]]) -> None:
    followers, now = Followers(), 0.0
    for number, apart_s in steps:
        now += apart_s
        followers.note_request(ref(f"v{number}"), now)
        followers.validate()


def test_leaders_followers_and_windows_are_bounded() -> None:
    followers = Followers()
    for number in range(2 * MOST_LEADERS):
        followers.note_request(ref(f"v{number}"), number * 0.001)
        followers.validate()
    for number in range(3 * MOST_FOLLOWERS):
        come(followers, A, ref(f"one-{number}"), B, at_s=1e6 + number * APART_S)
    assert come(followers, A, at_s=1e9) == [["b"]], "those that came once do not push it out"
    assert MOST_OPEN < MOST_LEADERS
