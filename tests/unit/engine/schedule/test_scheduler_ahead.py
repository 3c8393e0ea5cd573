"""Steps that are sent while one still runs: their content, and what they hold until they return."""

from types import SimpleNamespace
from typing import Any

import pytest

from loraserve.engine.schedule.blocks import BlockManager
from loraserve.engine.schedule.events import PENDING_TOKEN, RequestAborted
from loraserve.engine.schedule.sequence import Sequence, Transition
from loraserve.engine.schedule.steps import StepBuilder
from loraserve.messages import Admit, SamplingParams

PROMPT = list(range(10, 22))


def shape(desk: SimpleNamespace, name: str) -> list[tuple[int, tuple[int, ...], bool, int]]:
    """Return (start, tokens, sample, output index) of a request in each step in flight."""
    parts = [part for step in desk.steps for part in step.sequences if part.request_id == name]
    return [(part.start, part.tokens, part.sample, part.output_index) for part in parts]


def test_a_decode_runs_ahead_with_a_pending_token(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1)
    desk.arrive("r", [1, 1])
    assert shape(desk, "r") == [(0, (1, 1), True, 0), (2, (PENDING_TOKEN,), True, 1)]
    desk.step_done(5)
    assert desk.output["r"] == [5]
    assert shape(desk, "r") == [(2, (PENDING_TOKEN,), True, 1), (3, (PENDING_TOKEN,), True, 2)]
    desk.step_done(6)
    assert shape(desk, "r") == [(3, (PENDING_TOKEN,), True, 2), (4, (PENDING_TOKEN,), True, 3)]
    assert len(desk.part("r").blocks) == 2, "there is a block for what the step ahead writes"
    assert desk.output["r"] == [5, 6]


def test_at_most_steps_ahead_steps_are_sent_ahead(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=2)
    desk.arrive("r", [1, 1])
    assert [start for start, *_ in shape(desk, "r")] == [0, 2, 3]
    desk = helpers.Desk()
    desk.arrive("r", [1, 1])
    assert len(desk.steps) == 1


def test_a_prompt_runs_ahead_in_chunks_and_then_decodes(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1, max_step_tokens=5)
    desk.arrive("r", PROMPT)
    assert shape(desk, "r") == [(0, (10, 11, 12, 13, 14), False, 0), (5, (15, 16, 17, 18, 19), False, 0)]
    desk.step_done()
    desk.step_done()
    assert shape(desk, "r") == [(10, (20, 21), True, 0), (12, (PENDING_TOKEN,), True, 1)]


def test_a_new_request_joins_the_next_step(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1)
    desk.arrive("first", [1, 1])
    desk.arrive("second", [2, 2])
    assert desk.sizes == {"first": 1}
    desk.step_done()
    assert desk.sizes == {"first": 1, "second": 2}
    desk.step_done()
    assert desk.sizes == {"first": 1, "second": 1}
    assert shape(desk, "second") == [(0, (2, 2), True, 0), (2, (PENDING_TOKEN,), True, 1)]


@pytest.mark.parametrize("limit", [{"max_tokens": 2}, {"max_model_tokens": 4}])
def test_no_request_runs_ahead_of_its_last_token(helpers: SimpleNamespace, limit: dict[str, int]) -> None:
    limits = {name: value for name, value in limit.items() if name == "max_model_tokens"}
    desk = helpers.Desk(steps_ahead=2, **limits)
    desk.arrive("r", [1, 1], max_tokens=limit.get("max_tokens", 8))
    assert len(desk.steps) == 2
    desk.step_done(5)
    assert len(desk.steps) == 1
    desk.step_done(6)
    assert (desk.output["r"], desk.finish["r"], desk.scheduler.is_idle) == ([5, 6], "length", True)


@pytest.mark.parametrize("penalty", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_a_request_with_penalties_waits_for_its_token(helpers: SimpleNamespace, penalty: str) -> None:
    desk = helpers.Desk(steps_ahead=1)
    desk.arrive("r", [1, 1], **{penalty: 1.5})
    assert shape(desk, "r") == [(0, (1, 1), True, 0)]
    desk.step_done(5)
    assert shape(desk, "r") == [(2, (5,), True, 1)]
    assert desk.part("r").history == [1, 1, 5]


def test_a_prompt_with_penalties_runs_ahead(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1, max_step_tokens=8)
    desk.arrive("r", PROMPT, presence_penalty=1.0)
    assert [start for start, *_ in shape(desk, "r")] == [0, 8]
    assert desk.part("r").history == PROMPT


def test_a_request_below_min_tokens_waits_for_its_token(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1)
    desk.arrive("r", [1, 1], min_tokens=2)
    assert shape(desk, "r") == [(0, (1, 1), True, 0)]
    desk.step_done(5)
    assert shape(desk, "r") == [(2, (5,), True, 1), (3, (PENDING_TOKEN,), True, 2)], "the third token may stop it"


def test_a_stopped_request_keeps_its_blocks_until_its_step_returns(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1, prefix_cache=False, pool_bytes=helpers.UNIT)
    desk.arrive("r", [1, 1], helpers.adapter("a"))
    desk.loaded("a")
    desk.arrive("waits", [2], helpers.adapter("b"), max_tokens=1)
    desk.step_done(helpers.EOS)
    assert (desk.output["r"], desk.finish["r"]) == ([helpers.EOS], "stop")
    load = desk.scheduler.load()
    assert (load.memory.kv_blocks_free, load.adapters.resident[0].running, desk.loads) == (15, 1, [])
    assert load.queue.request_ids == ("waits", "r")
    assert len(desk.steps) == 1, "no new step may contain it"
    desk.arrive("r", [1, 1], helpers.adapter("a"))
    assert desk.rejected["r"].code == "overloaded"
    instructions = desk.step_done(9)
    assert desk.output["r"] == []
    assert not any(hasattr(i, "delta") for i in instructions)
    assert (desk.scheduler.load().memory.kv_blocks_free, desk.loads) == (16, ["b"])
    assert desk.scheduler.story.lines("r")[-1].endswith("finished: stop")


def test_the_place_of_a_stopped_request_is_free_at_once(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1, max_running=1)
    desk.arrive("stops", [1, 1])
    desk.arrive("next", [2, 2])
    desk.step_done(helpers.EOS)
    assert desk.sizes == {"next": 2}
    desk.step_done(9)
    assert desk.scheduler.load().queue.request_ids == ("next",)


def test_a_token_computed_after_the_stop_token_is_discarded(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1)
    desk.arrive("r", [1, 1, 1])
    desk.step_done(helpers.EOS)
    desk.step_done(9)
    (counted,) = desk.scheduler.counts.by_adapter()
    assert (counted.prefill_tokens, counted.decode_tokens) == (3, 0)
    desk.arrive("same", [1, 1, 1, helpers.EOS, 1])
    assert desk.steps[0].sequences[0].start == 0


def test_an_aborted_request_is_released_after_all_its_steps(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1, prefix_cache=False)
    desk.arrive("gone", [1, 1])
    desk.tell(RequestAborted("gone"))
    desk.step_done()
    assert (desk.scheduler.load().memory.kv_blocks_free, len(desk.steps)) == (15, 1)
    desk.tell(RequestAborted("gone"))
    desk.step_done()
    assert (desk.scheduler.load().memory.kv_blocks_free, desk.output["gone"], desk.scheduler.is_idle) == (16, [], True)
    assert [line.split(" ", 1)[1] for line in desk.scheduler.story.lines("gone")].count("aborted") == 1


@pytest.mark.parametrize("next_fails", [False, True])
def test_a_failed_step_rejects_once_and_keeps_blocks_until_the_next_step_returns(
    helpers: SimpleNamespace, next_fails: bool
) -> None:
    desk = helpers.Desk(steps_ahead=1, prefix_cache=False)
    desk.arrive("fails", [1, 1])
    desk.arrive("later", [2, 2])
    desk.step_done(5)
    assert [[part.request_id for part in step.sequences] for step in desk.steps] == [["fails"], ["fails", "later"]]
    desk.step_failed()
    assert desk.rejected.keys() == {"fails"}
    assert desk.sizes == {"later": 1}
    assert desk.scheduler.load().memory.kv_blocks_free == 14, "the next step still writes to both blocks"
    desk.rejected.clear()
    if next_fails:
        desk.step_failed()
    else:
        desk.step_done(6)
    assert desk.output == {"fails": [5], "later": [] if next_fails else [6]}
    assert desk.rejected.keys() == ({"later"} if next_fails else set())
    assert "fails" not in desk.scheduler.load().queue.request_ids


def test_no_block_after_a_failed_step_is_cached(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1, max_step_tokens=8)
    desk.arrive("fails", PROMPT)
    desk.step_failed()
    desk.step_done()
    desk.arrive("same", PROMPT)
    assert desk.steps[0].sequences[0].start == 0
    assert desk.scheduler.counters().prefix_hits_tokens == 0


def test_a_block_is_cached_once_its_step_is_done(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=2)
    desk.arrive("first", PROMPT, max_tokens=2)
    desk.arrive("early", PROMPT, max_tokens=2)
    assert shape(desk, "early")[0][0] == 0
    desk.step_done()
    desk.arrive("late", PROMPT, max_tokens=2)
    desk.step_done()
    assert shape(desk, "late")[0][0] == 8


def test_a_request_without_blocks_waits_for_its_step_and_preempts_the_latest(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1, kv_blocks=4, max_model_tokens=16, prefix_cache=False)
    desk.arrive("old", [1] * 6)
    desk.arrive("new", [2] * 6)
    while len(desk.output["old"]) < 2:
        desk.step_done()
    # Both have filled their two blocks and are in flight, so that neither can be preempted.
    assert desk.scheduler.counters().preemptions == 0
    assert "old" not in desk.sizes
    while desk.scheduler.counters().preemptions == 0:
        desk.step_done()
    assert [s.request_id for s in desk.scheduler.waiting] == ["new"]
    assert desk.sizes == {"old": 1}
    while "old" not in desk.finish:
        desk.step_done()
    while "new" not in desk.finish:
        desk.step_done()
    assert (len(desk.output["old"]), len(desk.output["new"])) == (8, 8)


def sequence(name: str, order: int, prompt: list[int], **sampling: Any) -> Sequence:
    params = SamplingParams(**{"max_tokens": 8, **sampling})
    admit = Admit(request_id=name, gateway="g", prompt_tokens=tuple(prompt), sampling=params)
    running = Sequence(admit, order, 48, 4)
    running.advance(Transition.START)
    return running


def test_a_sequence_continues_only_from_the_newest_step() -> None:
    running = sequence("r", 1, PROMPT)
    running.blocks = (0, 1)
    running.part_sent(running.next_part(8))
    for newest, joined in ((["other"], 0), (["r"], 1)):
        builder = StepBuilder(BlockManager(8, 4), 16, newest)
        builder.add_running([running])
        assert len(builder.parts()) == joined


def test_a_sequence_waits_for_the_blocks_of_an_ended_request() -> None:
    blocks = BlockManager(1, 4)
    leaving, running = sequence("leaving", 1, [1]), sequence("r", 2, PROMPT)
    leaving.blocks = blocks.allocate(1) or ()
    leaving.part_sent(leaving.next_part(1))
    leaving.advance(Transition.END)
    builder = StepBuilder(blocks, 16, ["leaving"])
    builder.add_running([leaving, running])
    assert (builder.parts(), builder.waits_for_blocks, builder.preempted) == ((), True, [])


def test_a_decode_ahead_comes_before_prefills() -> None:
    prefills, decodes = sequence("prefills", 1, PROMPT), sequence("decodes", 2, [1])
    decodes.blocks = (0,)
    decodes.part_sent(decodes.next_part(1))
    builder = StepBuilder(BlockManager(8, 4), 8, ["decodes"])
    builder.add_running([prefills, decodes])
    assert [(part.request_id, len(part.tokens)) for part in builder.parts()] == [("decodes", 1), ("prefills", 7)]


def test_a_sequence_that_waits_for_blocks_is_not_overtaken_by_new_requests(helpers: SimpleNamespace) -> None:
    desk = helpers.Desk(steps_ahead=1, kv_blocks=8, max_model_tokens=32, max_step_tokens=8, prefix_cache=False)
    desk.arrive("decodes", [1] * 5, max_tokens=20)
    desk.arrive("prefills", [2] * 21)
    desk.arrive("waits", [3])
    desk.step_done()
    desk.step_done()
    assert desk.sizes == {"decodes": 1, "prefills": 7}
    desk.step_done()
    # Its last chunk lacks one of two blocks; the free one is kept for it.
    assert (desk.sizes, desk.scheduler.load().memory.kv_blocks_free) == ({"decodes": 1}, 1)
