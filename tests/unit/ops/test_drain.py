"""scripts/drain and scripts/undrain: requests, waiting and exit statuses."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from loraserve.messages import EngineSeen, Placement, Plan, RebalanceDone
from loraserve.ops import commands
from loraserve.ops.arguments import parser
from loraserve.testing.reports import adapter_ref, engine_seen, resident

PINNED = (resident(adapter_ref(1), pinned=True),)
COPY = Placement(version="v1", name="adapter-1", engine="engine-1", share=1.0)


class Cluster:
    """Answers like a gateway. ``loads`` are successive reports of engine-1; the last one is repeated."""

    def __init__(self, *loads: EngineSeen, **done: Any) -> None:
        self.loads = list(loads)
        plan = Plan(epoch=4, created_unix_s=0.0, placements=done.pop("placements", ()), drained=("engine-1",))
        self.done = RebalanceDone(plan=plan, moves=(), applied=True, **done)
        self.asked: list[tuple[str, Any]] = []

    def __call__(self, path: str, body: Any) -> bytes:
        self.asked.append((path, body))
        if path != "/admin/cluster":
            return msgspec.json.encode(self.done)
        seen = self.loads.pop(0) if len(self.loads) > 1 else self.loads[0]
        return msgspec.json.encode(
            {
                "gateway": {"name": "gateway-0", "streams": 0, "model": "m"},
                "processes": {},
                "load_age_s": 0.1,
                "engines": [
                    {
                        "name": "engine-1",
                        "alive": True,
                        "age_s": 0.1,
                        "load": seen.load,
                        "capabilities": seen.capabilities,
                    }
                ],
                "demand": [],
                "plan_epoch": 4,
                "drained": ["engine-1"],
                "registry": {"revision": 1, "adapters": []},
            }
        )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr(commands, "DRAIN_POLL_S", 0.0)
    monkeypatch.setattr(commands, "DRAIN_REPORT_INTERVAL_S", 0.0)

    def run(cluster: Cluster, *command: str) -> int:
        arguments = parser().parse_args(command)
        return commands.COMMANDS[arguments.command](arguments, cluster)

    return run


def test_drain_waits_until_requests_and_copies_are_gone(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    busy = engine_seen("engine-1", running=2, waiting=1, resident=PINNED)
    cluster = Cluster(busy, engine_seen("engine-1", running=1), engine_seen("engine-1"))
    assert run(cluster, "drain", "engine-1") == 0
    assert cluster.asked[0] == ("/admin/engines/engine-1/drain", {})
    assert [path for path, _ in cluster.asked[1:]] == ["/admin/cluster"] * 4, "empty is seen twice"
    said = capsys.readouterr()
    assert said.out.splitlines()[-1] == "engine-1 is drained: it has no request and no planned copy, and can be stopped"
    assert said.err.splitlines() == [
        "engine-1 still has 3 requests and 1 planned copy",
        "engine-1 still has 1 request and 0 planned copies",
    ]


def test_an_engine_that_does_not_become_empty_in_time_is_a_failure(
    run: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(Cluster(engine_seen("engine-1", running=1)), "drain", "engine-1", "--timeout", "0") == 1
    assert "is not empty: it still has 1 request" in capsys.readouterr().out


def test_drain_does_not_wait_if_no_engine_can_take_the_copies(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stuck = Cluster(engine_seen("engine-1", resident=PINNED), placements=(COPY,), failed=("engine-0: no room",))
    assert run(stuck, "drain", "engine-1") == 1
    out = capsys.readouterr().out
    assert "failed: engine-0: no room" in out
    assert "1 planned copy" in out


def test_json_is_one_line(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Cluster(engine_seen("engine-1")), "drain", "engine-1", "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    expected = {"engine": "engine-1", "empty": True, "requests": 0, "copies": 0, "epoch": 4, "failed": []}
    assert json.loads(line) == expected


def test_undrain_sends_one_request_and_confirms(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(engine_seen("engine-1"))
    assert run(cluster, "undrain", "engine-1") == 0
    assert cluster.asked == [("/admin/engines/engine-1/undrain", {})]
    assert "engine-1 accepts requests again" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["", "../rebalance", "engine 1", "engine-1/undrain"])
def test_an_invalid_engine_name_is_refused_without_a_request(run: Any, name: str) -> None:
    cluster = Cluster(engine_seen("engine-1"))
    with pytest.raises(Exception, match="not an engine's name"):
        run(cluster, "drain", name)
    assert cluster.asked == []
