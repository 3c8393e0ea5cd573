"""The output of the operators' commands."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraserve.messages import (
    AdapterDemand,
    AdapterRef,
    EngineCounters,
    Move,
    Plan,
    ReadCounts,
    RebalanceDone,
    ResidentAdapter,
)
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Abilities
from loraserve.ops import status
from loraserve.ops.gateway_client import OpsError
from loraserve.ops.rendering import (
    MergedStory,
    ModelList,
    decode,
    exit_status,
    render_adapters,
    render_rebalance,
    render_story,
)
from loraserve.ops.status import ClusterAnswer
from loraserve.testing.reports import engine_seen
from loraserve.text import BAR_CELLS, bar, size, table

PIRATE = AdapterRef(name="pirate", version="a" * 64, rank=8, slab_bytes=900 << 10)
FRENCH = AdapterRef(name="french", version="b" * 64, rank=32, slab_bytes=4 << 20)


def engine(name: str, age_s: float = 0.1, alive: bool = True, **changes: Any) -> dict[str, Any]:
    """Return an engine of /admin/cluster."""
    idle = {"kv_blocks": 100, "kv_blocks_free": 100, "pool_bytes": 512 << 20, "pool_free_bytes": 512 << 20}
    seen = engine_seen(name, **{**idle, "decode_step_s": 0.0, **changes})
    return {"name": name, "alive": alive, "age_s": age_s, "load": seen.load, "capabilities": seen.capabilities}


def cluster(**changes: Any) -> ClusterAnswer:
    """Return an answer of /admin/cluster."""
    busy = engine(
        "engine-0",
        waiting=3,
        running=7,
        kv_blocks_free=60,
        pool_free_bytes=256 << 20,
        decode_step_s=0.0132,
        resident=(
            ResidentAdapter(name="pirate", version=PIRATE.version, rank=8, slab_bytes=900 << 10, pinned=True),
            ResidentAdapter(name="json", version="c" * 64, rank=16, slab_bytes=1 << 20),
        ),
        loading=(FRENCH.version, "d" * 64),
    )
    demand = AdapterDemand(
        version=PIRATE.version,
        name="pirate",
        rank=8,
        prefill_tokens_per_s=12.34,
        decode_tokens_per_s=5.0,
        requests_per_s=0.5,
        forecast_tokens_per_s=17.0,
    )
    state = {
        "gateway": {"name": "gateway-0", "streams": 2, "model": "smol"},
        "processes": {
            "store": {"state": "READY", "detail": "4 adapters", "pid": 7, "name": "store", "protocol": 1},
            "planner": {"state": "UNREACHABLE"},
        },
        "load_age_s": 0.2,
        "engines": [
            busy,
            engine("engine-1", age_s=9.0, alive=False),
        ],
        "demand": [demand],
        "plan_epoch": 12,
        "registry": {"revision": 4, "adapters": [PIRATE, FRENCH]},
        "added_by_a_newer_gateway": 1,
    }
    return decode(msgspec.json.encode({**state, **changes}), ClusterAnswer)


def line_of(text: str, start: str) -> str:
    """Return the last line with this beginning."""
    return [line for line in text.splitlines() if line.startswith(start)][-1]


def words(line: str) -> str:
    return " ".join(line.split())


def test_status_shows_the_state_of_each_process() -> None:
    text = status.render(cluster())
    assert text.startswith("smol   plan epoch 12   2 adapters   2 open streams\n")
    assert line_of(text, "store").split() == ["store", "READY", "7", "4", "adapters"]
    assert line_of(text, "planner").split() == ["planner", "UNREACHABLE", "-"]


def test_status_shows_what_engines_do_and_hold() -> None:
    shown = status.engines(cluster()).splitlines()
    assert words(shown[1]) == "engine-0 READY 3 7 ####...... 40% #####..... 50% 256.0 MiB 13.2 ms"
    assert "no, silent for 9 s" in shown[2]
    held = status.residents(cluster()).splitlines()
    assert held[1].split("  ") == ["engine-0", "json:16", "pirate:8*", "french (loading)", "dddddddddddd (loading)"]
    assert held[2].split() == ["engine-1", "-"]


def test_status_distinguishes_draining_and_drained_engines() -> None:
    engines = [
        engine("engine-0", running=1),
        engine("engine-1"),
        engine("engine-2"),
    ]
    shown = status.engines(cluster(engines=engines, drained=["engine-0", "engine-1"])).splitlines()
    assert [line.split()[:2] for line in shown[1:]] == [
        ["engine-0", "DRAINING"],
        ["engine-1", "DRAINED"],
        ["engine-2", "READY"],
    ]


def test_status_shows_demand_and_says_when_there_is_none() -> None:
    assert words(line_of(status.render(cluster()), "pirate")) == "pirate 8 0.50 12.3 5.0 17.0"
    assert "no adapter has been requested" in status.render(cluster(demand=[]))


def test_demand_for_an_adapter_without_a_name_is_not_the_base_model_s() -> None:
    figures = dict.fromkeys(("prefill_tokens_per_s", "decode_tokens_per_s", "forecast_tokens_per_s"), 0.0)
    nameless = AdapterDemand(version="e" * 64, name="", rank=8, requests_per_s=1.0, **figures)
    base = AdapterDemand(version="", name="", rank=0, requests_per_s=1.0, **figures)
    shown = status.demand(cluster(demand=[nameless, base]))
    assert words(line_of(shown, "eeee")) == "eeeeeeeeeeee 8 1.00 0.0 0.0 0.0"
    assert words(line_of(shown, "(base model)")) == "(base model) - 1.00 0.0 0.0 0.0"


def test_status_reports_a_missing_monitor_and_planner() -> None:
    text = status.render(cluster(load_age_s=None, engines=[], demand=[], plan_epoch=None))
    assert "plan epoch unknown, the planner does not answer" in text
    assert "is the monitor up?" in text
    assert "is the monitor up?" in status.render(cluster(load_age_s=8.0))
    assert "is the monitor up?" not in status.render(cluster())


@pytest.mark.parametrize("kind", [ClusterAnswer, RebalanceDone, ModelList, MergedStory])
@pytest.mark.parametrize("content", [b"<html>", b"{}", b"[]", b""])
def test_an_answer_of_another_server_is_refused_with_a_remedy(kind: Any, content: bytes) -> None:
    with pytest.raises(OpsError, match=r"not from a LoRAServe gateway of this version .*--url"):
        decode(content, kind)


def move(source: str, target: str, slab_bytes: int = 0, gain_s: float = 0.0) -> Move:
    return Move(
        version="a",
        name="pirate",
        source=source,
        target=target,
        slab_bytes=slab_bytes,
        reason="because",
        gain_s=gain_s,
    )


def done(
    *moves: Move, applied: bool = True, failed: tuple[str, ...] = (), message: str = "", epoch: int = 7
) -> RebalanceDone:
    plan = Plan(epoch=epoch, created_unix_s=0.0, placements=())
    return RebalanceDone(plan=plan, moves=moves, applied=applied, message=message, failed=failed)


def test_a_rebalance_names_adapter_from_to_size_and_reason() -> None:
    answer = done(move("engine-0", "engine-1", 3 << 20, 0.0123), move("", "engine-0", 1 << 20), move("engine-1", ""))
    lines = render_rebalance(answer, dry_run=False).splitlines()
    assert lines[0].split() == ["ADAPTER", "FROM", "TO", "SIZE", "GAIN", "REASON"]
    assert words(lines[1]) == "pirate engine-0 engine-1 3.0 MiB 12.3 ms because"
    assert words(lines[2]) == "pirate (new copy) engine-0 1.0 MiB - because"
    assert words(lines[3]) == "pirate engine-1 (copy removed) - - because"
    assert lines[4] == "epoch 7: 3 moves made, 4.0 MiB loaded"
    assert exit_status(answer) == 0


def test_a_dry_run_says_that_nothing_was_changed() -> None:
    text = render_rebalance(done(move("", "engine-0", 1 << 20), applied=False), dry_run=True)
    assert "dry run, nothing was changed: would make 1 move and load 1.0 MiB; the next epoch is 7" in text
    assert "no adapter would move" in render_rebalance(done(applied=False), dry_run=True)


def test_a_plan_without_changes_is_a_success_and_keeps_its_epoch() -> None:
    answer = done(applied=False, message="the plan is right as it is")
    assert render_rebalance(answer, dry_run=False) == "epoch 7 stays in force: the plan is right as it is"
    assert exit_status(answer) == 0


def test_reloaded_copies_are_not_counted_as_moves() -> None:
    assert "no copy moved" in render_rebalance(done(), dry_run=False)


def test_failures_are_listed_and_set_the_exit_status() -> None:
    answer = done(move("", "engine-0"), failed=("engine-1: timeout", "engine-1: pool is full"))
    assert render_rebalance(answer, dry_run=False).splitlines()[-2:] == [
        "failed: engine-1: timeout",
        "failed: engine-1: pool is full",
    ]
    assert exit_status(answer) == 1
    nobody = done(applied=False, failed=("no engine is ready",), message="no engine is ready")
    for dry_run in (False, True):
        assert render_rebalance(nobody, dry_run).startswith("epoch 7 stays in force: no engine is ready")
    assert exit_status(nobody) == 1


def test_adapters_are_listed_without_the_base_model() -> None:
    cards = [
        {"id": "smol", "parent": None, "object": "model"},
        {"id": "pirate", "parent": "smol", "version": "a" * 64, "rank": 8, "slab_bytes": 900 << 10},
        {"id": "french", "parent": "smol", "version": "b" * 64, "rank": 32, "slab_bytes": 4 << 20},
    ]
    found = decode(msgspec.json.encode({"object": "list", "data": cards}), ModelList).adapters()
    assert [line.split() for line in render_adapters(found).splitlines()[1:]] == [
        ["french", "32", "4.0", "MiB", "b" * 12],
        ["pirate", "8", "900.0", "KiB", "a" * 12],
    ]
    assert "scripts/adapters load NAME DIR" in render_adapters([])


@given(used=st.floats(0, 2e12), total=st.floats(0, 1e12))
@settings(max_examples=100)
def test_a_bar_has_a_fixed_width_and_is_empty_only_if_unused(used: float, total: float) -> None:
    drawn = bar(used, total)
    assert len(drawn) == BAR_CELLS + 5
    assert ("#" in drawn) == (used > 0 and total > 0 and used / total > 0)
    assert drawn.count("#") + drawn.count(".") == BAR_CELLS


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (5 << 40, "5120.0 GiB")]
)
def test_sizes_take_the_largest_unit(count: int, text: str) -> None:
    assert size(count) == text


def test_columns_of_figures_are_right_aligned() -> None:
    assert table(["NAME", "N"], [["a", "7"], ["bbbbb", "12"]]).splitlines() == ["NAME    N", "a       7", "bbbbb  12"]


def test_each_pair_of_engines_has_a_row_of_reads_even_before_the_first_read() -> None:
    able = Abilities(
        protocol=TRANSFER_PROTOCOL_VERSION, host="a", neighbourhood="n", transports=("shm", "tcp"), device="cpu"
    )
    read = ReadCounts(
        source="engine-1",
        transport="tcp",
        reads=3,
        read_bytes=6 << 20,
        failed=2,
        mismatched=1,
        predicted_bytes_per_s=1e9,
    )
    state = cluster(
        engines=[
            {
                **engine("engine-0", abilities=able),
                "counters": EngineCounters(reads=(read,)),
                "reads_from": {"engine-1": ["shm", "tcp"], "engine-2": []},
            }
        ]
    )
    lines = [line.split() for line in status.reads(state).splitlines()]
    assert lines[1:] == [
        ["engine-0", "engine-1", "shm", "0", "0", "B", "-", "0", "0"],
        ["engine-0", "engine-1", "tcp", "3", "6.0", "MiB", "953.7", "MiB/s", "2", "1"],
    ]
    assert status.reads(state) in status.render(state)
    assert status.reads(cluster(engines=[])) == ""


def test_a_story_is_a_table_by_time_and_names_the_processes_that_did_not_answer() -> None:
    entries = [
        {"unix_s": 0.25, "process": "router", "subject": "cmpl-1-0", "text": "sent to engine-0"},
        {"unix_s": 1.5, "process": "engine-0", "subject": "a" * 64, "text": "loaded"},
    ]
    content = {"id": "cmpl-1", "subjects": ["cmpl-1-0"], "entries": entries, "silent": ["planner", "monitor"]}
    head, *rows, silent = render_story(decode(msgspec.json.encode(content), MergedStory)).splitlines()
    assert words(head) == "TIME PROCESS SUBJECT EVENT"
    assert words(rows[0]).endswith(":00.250 router cmpl-1-0 sent to engine-0")
    assert words(rows[1]).endswith(":01.500 engine-0 aaaaaaaaaaaa loaded")
    assert silent == "no answer from: planner, monitor"


def test_a_story_that_no_process_knows_says_which_ids_are_possible() -> None:
    content = {"id": "nothing", "subjects": ["nothing"], "entries": []}
    text = render_story(decode(msgspec.json.encode(content), MergedStory))
    assert text.startswith("no process knows nothing; give an answer")
