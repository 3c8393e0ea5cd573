"""Batching without adapters: chunked prefill, preemption, prefix cache, finished and refused requests."""

from types import SimpleNamespace

import pytest

from loraserve.engine.schedule.events import HandOver, RequestAborted
from loraserve.errors import ConfigError

ONES, TWOS, THREES = [1] * 8, [2] * 8, [3] * 8


def test_a_long_prompt_is_computed_in_chunks_beside_decoding_requests(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_step_tokens=8, max_running=2)
    desk.arrive("short", [1, 1])
    desk.arrive("long", [2] * 20)
    assert desk.sizes == {"short": 2}
    sizes = []
    for _ in range(3):
        desk.step_done()
        sizes.append(desk.sizes)
    assert sizes == [{"short": 1, "long": 7}, {"short": 1, "long": 7}, {"short": 1, "long": 6}]
    assert (len(desk.output["short"]), desk.output["long"]) == (3, [])
    assert desk.part("long").sample
    desk.step_done(long=9)
    assert desk.output["long"] == [9]
    assert desk.part("long").tokens == (9,)
    assert desk.part("long").start == 20


def test_a_chunk_starts_after_the_last_and_only_the_final_one_samples(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_step_tokens=5)
    desk.arrive("r", range(10, 22))
    seen = []
    for _ in range(3):
        part = desk.part("r")
        seen.append((part.start, part.tokens, part.sample, len(part.blocks)))
        desk.step_done()
    assert seen == [
        (0, (10, 11, 12, 13, 14), False, 2),
        (5, (15, 16, 17, 18, 19), False, 3),
        (10, (20, 21), True, 3),
    ]


def test_at_most_max_running_requests_run(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_running=2)
    for name in ("a", "b", "c"):
        desk.arrive(name, [1], max_tokens=2)
    desk.step_done()
    assert desk.sizes == {"a": 1, "b": 1}
    desk.step_done()
    assert desk.finish == {"a": "length"}
    assert desk.sizes == {"b": 1, "c": 1}


def until_one_is_preempted(helpers: SimpleNamespace) -> SimpleNamespace:
    """Run three requests that fill two of six blocks each, until one needs a third block."""
    desk = helpers.Desk(kv_blocks=6, max_model_tokens=24, prefix_cache=False, max_step_tokens=24)
    for name, prompt in (("first", ONES[:7]), ("second", TWOS[:7]), ("third", THREES[:7])):
        desk.arrive(name, prompt)
    while desk.scheduler.counters().preemptions == 0:
        desk.step_done(first=11, second=21, third=31)
    return desk


def test_the_latest_arrival_is_preempted_when_blocks_run_out(helpers: SimpleNamespace) -> None:
    desk = until_one_is_preempted(helpers)
    assert [s.request_id for s in desk.scheduler.waiting] == ["third"]
    assert desk.sizes.keys() == {"first", "second"}
    assert desk.output["third"] == [31]
    assert any("preempted" in line for line in desk.scheduler.story.lines("third"))


def test_a_preempted_request_recomputes_its_tokens_and_loses_none(helpers: SimpleNamespace) -> None:
    desk = until_one_is_preempted(helpers)
    desk.arrive("fourth", [4])
    while "third" not in desk.sizes:
        assert "fourth" not in desk.sizes, "a request that waits for memory must not be overtaken"
        desk.step_done(first=11, second=21)
    part = desk.part("third")
    assert (part.start, list(part.tokens), part.output_index) == (0, [*THREES[:7], 31], 1)
    desk.step_done(third=33)
    assert desk.output["third"] == [31, 33]


def test_a_common_prefix_is_computed_once(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    prompt = list(range(1, 11))
    desk.arrive("first", prompt, max_tokens=1)
    desk.step_done()
    desk.arrive("same", prompt, max_tokens=1)
    # Two full blocks of four tokens are cached.
    assert (desk.part("same").start, desk.part("same").tokens) == (8, (9, 10))
    desk.step_done()
    assert (desk.cached["first"], desk.cached["same"]) == (0, 8)
    desk.arrive("other", [99, *prompt[1:]], max_tokens=1)
    assert desk.part("other").start == 0
    counters = desk.scheduler.counters()
    assert (counters.prefix_hits_tokens, counters.prefix_queries_tokens) == (8, 30)


def test_a_completely_cached_prompt_still_computes_its_last_token(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    for name in ("first", "same"):
        desk.arrive(name, ONES, max_tokens=1)
        part = desk.part(name)
        desk.step_done()
    assert part.start == 4
    assert desk.output["same"] == [7]


def test_the_prefix_cache_can_be_disabled(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(prefix_cache=False)
    for name in ("first", "same"):
        desk.arrive(name, ONES, max_tokens=1)
        assert desk.part(name).start == 0
        desk.step_done()


def test_max_tokens_finishes_a_request(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], max_tokens=2)
    desk.step_done(5)
    desk.step_done(6)
    assert (desk.output["r"], desk.finish["r"]) == ([5, 6], "length")
    assert desk.scheduler.is_idle


def test_the_context_length_finishes_a_request(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_model_tokens=6)
    desk.arrive("r", [1, 1, 1, 1], max_tokens=100)
    desk.step_done()
    desk.step_done()
    assert (desk.output["r"], desk.finish["r"]) == ([7, 7], "length")


@pytest.mark.parametrize("token", [0, 5], ids=["eos", "stop_token_ids"])
def test_the_stop_token_is_the_last_token(helpers: SimpleNamespace, token: int) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], stop_token_ids=(5,))
    desk.step_done(8)
    desk.step_done(token)
    assert (desk.output["r"], desk.finish["r"]) == ([8, token], "stop")
    assert desk.scheduler.is_idle


def test_ignore_eos_ignores_only_eos(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], ignore_eos=True, stop_token_ids=(5,))
    desk.step_done(helpers.EOS)
    desk.step_done(5)
    assert (desk.output["r"], desk.finish["r"]) == ([helpers.EOS, 5], "stop")


def test_no_token_stops_a_request_before_min_tokens(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], min_tokens=1)
    desk.step_done(helpers.EOS)
    desk.step_done(helpers.EOS)
    assert (desk.output["r"], desk.finish["r"]) == ([helpers.EOS, helpers.EOS], "stop")


def test_a_waiting_request_is_aborted_at_once(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_running=1)
    desk.arrive("runs", [1])
    desk.arrive("waits", [2])
    desk.tell(RequestAborted("waits"))
    assert desk.scheduler.load().queue.request_ids == ("runs",)


def test_a_request_in_a_step_is_released_when_the_step_is_done(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(prefix_cache=False)
    desk.arrive("gone", ONES)
    desk.arrive("stays", TWOS)
    free = desk.scheduler.load().memory.kv_blocks_free
    desk.tell(RequestAborted("gone"))
    assert desk.scheduler.load().memory.kv_blocks_free == free, "the step still writes to its blocks"
    desk.step_done()
    assert desk.output["gone"] == []
    assert desk.sizes == {"stays": 8}
    assert desk.scheduler.load().memory.kv_blocks_free == 16 - 2
    desk.tell(RequestAborted("gone"))


def test_the_id_of_an_aborted_request_is_refused_until_its_step_is_done(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], max_tokens=1)
    desk.tell(RequestAborted("r"))
    desk.arrive("r", [1], max_tokens=1)
    assert desk.rejected["r"].code == "overloaded", "accepted, it would end silently with the step"
    desk.step_done()
    desk.arrive("r", [1], max_tokens=1)
    desk.step_done()
    assert (desk.output["r"], desk.finish["r"]) == ([7], "length")


def test_a_running_request_outside_the_step_is_aborted_at_once(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_step_tokens=4, prefix_cache=False)
    desk.arrive("long", [1] * 8)
    desk.step_done()
    desk.arrive("waits", [2] * 8)
    assert desk.sizes == {"long": 4}
    desk.tell(RequestAborted("waits"))
    assert desk.scheduler.load().queue.request_ids == ("long",)


def test_a_failed_step_fails_only_its_requests(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_running=2)
    for name in ("a", "b", "waits"):
        desk.arrive(name, [1])
    desk.step_done()
    assert desk.sizes.keys() == {"a", "b"}
    desk.step_failed()
    assert {name: (r.code, r.message) for name, r in desk.rejected.items()} == {
        "a": ("engine_error", "boom"),
        "b": ("engine_error", "boom"),
    }
    desk.step_done()
    assert desk.output["waits"] == [7]


def test_a_failed_step_does_not_reject_aborted_requests(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("gone", [1])
    desk.tell(RequestAborted("gone"))
    desk.step_failed()
    assert desk.rejected == {}
    assert desk.scheduler.is_idle


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "code", "text"),
    [
        ([], 1, "bad_request", "send at least one token"),
        ([1], 0, "bad_request", "ask for at least 1"),
        ([1] * 48, 1, "context_length", "maximum context length is 48 tokens. However, your prompt has 48"),
    ],
)
def test_a_request_that_can_never_run_is_refused(
    helpers: SimpleNamespace, prompt: list[int], max_tokens: int, code: str, text: str
) -> None:
    desk = helpers.Desk()
    desk.arrive("r", prompt, max_tokens=max_tokens)
    assert desk.rejected["r"].code == code
    assert text in desk.rejected["r"].message
    assert desk.scheduler.is_idle


def test_the_context_is_limited_by_the_kv_cache(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(kv_blocks=2, max_model_tokens=48)
    desk.arrive("r", ONES)
    assert "maximum context length is 8 tokens" in desk.rejected["r"].message


def test_too_many_waiting_requests_are_overload(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_running=1, max_waiting=2)
    for name in "abcd":
        desk.arrive(name, [1])
    assert {name: r.code for name, r in desk.rejected.items()} == {"d": "overloaded"}
    assert "try again later" in desk.rejected["d"].message


def test_a_repeated_arrival_is_ignored(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1], max_tokens=1)
    desk.arrive("r", [1], max_tokens=1)
    desk.step_done()
    assert (desk.output["r"], desk.scheduler.is_idle) == ([7], True)


def test_a_step_budget_below_max_running_is_refused(helpers: SimpleNamespace) -> None:
    with pytest.raises(ConfigError, match=r"engine\.max_step_tokens is 3, it must be at least engine\.max_running"):
        helpers.Desk(max_step_tokens=3)


def test_a_migrated_request_continues_after_the_output_of_its_earlier_attempt(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1, 1, 5, 6, 7], generated=3, max_tokens=5)
    part = desk.part("r")
    assert (part.tokens, part.sample, part.prompt_length, part.output_index) == ((1, 1, 5, 6, 7), True, 2, 3)
    desk.step_done(r=8)
    desk.step_done(r=9)
    assert (desk.output["r"], desk.finish["r"]) == ([8, 9], "length")


@pytest.mark.parametrize("generated", [-1, 4, 5])
def test_a_migrated_request_must_have_a_prompt_and_output_left(helpers: SimpleNamespace, generated: int) -> None:
    desk = helpers.Desk()
    desk.arrive("r", [1] * 5, generated=generated, max_tokens=4)
    assert desk.rejected["r"].code == "bad_request"
    assert f"generated is {generated}" in desk.rejected["r"].message


def test_a_stopping_engine_hands_over_waiting_and_running_requests(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(max_running=2)
    for name in ("a", "b", "c"):
        desk.arrive(name, [1])
    desk.tell(RequestAborted("a"))
    desk.tell(HandOver())
    assert {name: reject.code for name, reject in desk.rejected.items()} == {"b": "draining", "c": "draining"}
    desk.step_done()
    assert desk.scheduler.is_idle
