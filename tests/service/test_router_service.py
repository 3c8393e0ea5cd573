"""The router process with scripted engines, in virtual time."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Literal

import msgspec
import pytest

from loraserve.config import Config, RouterConfig
from loraserve.errors import PeerError
from loraserve.messages import (
    Abort,
    Admit,
    Admitted,
    ClusterLoad,
    EngineSeen,
    Expect,
    ExpectAdapter,
    Ping,
    Placement,
    Plan,
    Rejected,
    Route,
    Routed,
    ToEngine,
    ToRouter,
)
from loraserve.router.engine_view import MAX_AVOIDANCE_S
from loraserve.router.service import FIRST_ENGINE_TIMEOUT_S, RouterService
from loraserve.testing.clock import LoopClock, run_virtual
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.peers import Peer, Script, serving
from loraserve.testing.reports import adapter_ref, engine_seen, picture, resident, route_request

ADMIT_TIMEOUT_S = 1.0
PIRATE = adapter_ref(1)
HELD = {"resident": (resident(PIRATE),)}


def takes(message: Any) -> Any:
    return Admitted(request_id=message.request_id, incarnation="i1") if isinstance(message, Admit) else None


def silent(_: Any) -> None:
    return None


def refuses(code: str) -> Script:
    def script(message: Any) -> Any:
        if not isinstance(message, Admit):
            return None
        return Admitted(request_id=message.request_id, incarnation="i1", ok=False, code=code, message=f"why: {code}")

    return script


class RouterHarness:
    """The router, a gateway, a monitor, a planner, and engines e0 (the best), e1, ..."""

    def __init__(self, policy: Literal["predicted", "shares"] = "predicted") -> None:
        self.network = MemoryNetwork()
        config = Config(router=RouterConfig(admit_timeout_s=ADMIT_TIMEOUT_S, policy=policy))
        self.router = RouterService(config, self.network.bus("router", ToRouter), LoopClock())
        self.gateway = self.network.bus("gateway-0", Ping)
        self.monitor = self.network.bus("monitor", Ping)
        self.planner = self.network.bus("planner", Ping)
        self.engines: list[Peer] = []
        self.sequence = 0

    def start_engines(self, *scripts: Script) -> None:
        self.engines = [Peer(self.network, f"e{n}", ToEngine, script) for n, script in enumerate(scripts)]

    async def publish_picture(self, *loads: EngineSeen) -> None:
        """Publish a picture; by default queues grow from e0 to e1 and so on, so that e0 is the best."""
        queued = [engine_seen(f"e{n}", waiting_prefill_tokens=1000 * n) for n in range(len(self.engines))]
        self.sequence += 1
        self.monitor.publish("load", picture(*(loads or queued), sequence=self.sequence))
        await asyncio.sleep(0.01)

    async def plan(self, epoch: int, engine: str, created_unix_s: float = 0.0, drained: tuple[str, ...] = ()) -> None:
        copy = Placement(version=PIRATE.version, name=PIRATE.name, engine=engine, share=1.0)
        plan = Plan(epoch=epoch, created_unix_s=created_unix_s, placements=(copy,), drained=drained)
        self.planner.publish("plan", plan)
        await asyncio.sleep(0.01)

    async def route(self, request: Route | None = None) -> Routed | Rejected:
        return await self.gateway.request("router", request or route_request(), Routed | Rejected, 60.0)


def run_scenario(
    scenario: Callable[[RouterHarness], Coroutine[Any, Any, None]],
    *scripts: Script,
    policy: Literal["predicted", "shares"] = "predicted",
) -> None:
    async def main() -> None:
        harness = RouterHarness(policy)
        harness.start_engines(*scripts)
        async with serving(harness.router):
            await harness.publish_picture()
            await scenario(harness)

    run_virtual(main())


def test_requests_to_a_router_that_has_just_started_wait_for_the_first_publication() -> None:
    async def main() -> None:
        harness = RouterHarness()
        harness.start_engines(takes)
        async with serving(harness.router):
            asking = asyncio.create_task(harness.route())
            await asyncio.sleep(FIRST_ENGINE_TIMEOUT_S - 0.1)
            assert not asking.done()
            await harness.publish_picture()
            answer = await asking
            assert isinstance(answer, Routed)
            assert answer.engine == "e0"

    run_virtual(main())


def test_requests_wait_for_the_first_engine_that_a_new_monitor_learns_of() -> None:
    async def main() -> None:
        harness = RouterHarness()
        harness.start_engines(takes)
        async with serving(harness.router):
            asking = [asyncio.create_task(harness.route(route_request(f"r{n}"))) for n in range(2)]
            await asyncio.sleep(0.5)
            harness.monitor.publish("load", picture(sequence=0))
            await asyncio.sleep(0.5)
            assert not any(task.done() for task in asking)
            await harness.publish_picture()
            answers = await asyncio.gather(*asking)
            assert [answer.engine for answer in answers if isinstance(answer, Routed)] == ["e0", "e0"]

    run_virtual(main())


def test_without_a_monitor_requests_to_a_router_that_has_just_started_are_rejected() -> None:
    async def main() -> None:
        harness = RouterHarness()
        async with serving(harness.router):
            for _ in range(2):
                answer = await harness.route()
                assert isinstance(answer, Rejected)
                assert answer.code == "no_engine"

    run_virtual(main())


def test_the_best_engine_gets_the_whole_request() -> None:
    async def scenario(harness: RouterHarness) -> None:
        request = route_request("r7", tokens=5, adapter=PIRATE)
        answer = await harness.route(request)
        assert answer == Routed(request_id="r7", engine="e0", incarnation="i1", why="load")
        (admit,) = harness.engines[0].received
        assert (admit.gateway, admit.prompt_tokens) == ("gateway-0", request.prompt_tokens)
        assert (admit.sampling, admit.adapter) == (request.sampling, PIRATE)
        assert harness.engines[1].received == []

    run_scenario(scenario, takes, takes)


@pytest.mark.parametrize("answer", [Ping(), PeerError("internal", "it broke")], ids=["nonsense", "error"])
def test_an_engine_with_an_invalid_answer_is_told_to_abort(answer: Any) -> None:
    async def scenario(harness: RouterHarness) -> None:
        assert isinstance(await harness.route(route_request("r1")), Rejected)
        await asyncio.sleep(0.01)
        assert harness.engines[0].got(Abort) == [Abort(request_id="r1")]

    run_scenario(scenario, lambda message: answer if isinstance(message, Admit) else None, takes)


def test_a_silent_engine_is_skipped_and_told_to_abort() -> None:
    async def scenario(harness: RouterHarness) -> None:
        began_s = asyncio.get_running_loop().time()
        answer = await harness.route()
        assert isinstance(answer, Routed)
        assert answer.engine == "e1"
        assert asyncio.get_running_loop().time() - began_s == pytest.approx(ADMIT_TIMEOUT_S, abs=0.05)
        await asyncio.sleep(0.01)
        assert [type(message) for message in harness.engines[0].received] == [Admit, Abort]
        assert harness.engines[0].got(Abort) == [Abort(request_id="r1")]
        assert harness.engines[1].got(Abort) == []

    run_scenario(scenario, silent, takes)


def test_a_late_admission_is_ignored() -> None:
    async def scenario(harness: RouterHarness) -> None:
        harness.engines[0].delay_s = 1.5 * ADMIT_TIMEOUT_S
        answer = await harness.route()
        await asyncio.sleep(10.0)
        assert isinstance(answer, Routed)
        assert answer.engine == "e1"
        assert len(harness.engines[0].got(Abort)) == 1

    run_scenario(scenario, takes, takes)


def test_an_engine_whose_connection_is_lost_is_skipped_at_once() -> None:
    async def scenario(harness: RouterHarness) -> None:
        asking = asyncio.create_task(harness.route())
        await asyncio.sleep(0.1)
        harness.network.kill("e0")
        await asyncio.sleep(0.1)
        answer = asking.result()
        assert isinstance(answer, Routed)
        assert answer.engine == "e1"

    run_scenario(scenario, silent, takes)


@pytest.mark.parametrize("code", ["overloaded", "draining", "starting"])
def test_a_refusal_that_concerns_the_engine_leads_to_the_next_engine(code: str) -> None:
    async def scenario(harness: RouterHarness) -> None:
        answer = await harness.route()
        assert isinstance(answer, Routed)
        assert answer.engine == "e1"

    run_scenario(scenario, refuses(code), takes)


def test_a_starting_engine_refuses_and_the_next_is_asked() -> None:
    async def scenario(harness: RouterHarness) -> None:
        answer = await harness.route()
        assert isinstance(answer, Routed)
        assert answer.engine == "e1"

    run_scenario(scenario, lambda _: PeerError("starting", "loading weights"), takes)


def test_a_refusal_that_concerns_the_request_is_final() -> None:
    async def scenario(harness: RouterHarness) -> None:
        answer = await harness.route()
        assert answer == Rejected(request_id="r1", code="context_length", message="why: context_length")
        assert harness.engines[1].received == []

    run_scenario(scenario, refuses("context_length"), takes)


@pytest.mark.parametrize(
    ("scripts", "code", "text"),
    [
        ((refuses("overloaded"), refuses("overloaded")), "overloaded", "why: overloaded"),
        ((refuses("draining"), refuses("draining")), "no_engine", "why: draining"),
        ((silent, silent), "no_engine", "no engine answered"),
        ((refuses("overloaded"), silent), "overloaded", "why: overloaded"),
    ],
    ids=["all full", "all draining", "all silent", "one full, one silent"],
)
def test_the_gateway_gets_the_reason_if_no_engine_admits(scripts: tuple[Script, ...], code: str, text: str) -> None:
    async def scenario(harness: RouterHarness) -> None:
        answer = await harness.route()
        assert isinstance(answer, Rejected)
        assert (answer.request_id, answer.code) == ("r1", code)
        assert text in answer.message

    run_scenario(scenario, *scripts)


def test_a_rejection_of_the_policy_is_returned_unchanged() -> None:
    async def scenario(harness: RouterHarness) -> None:
        await harness.publish_picture(engine_seen("e0", waiting_prefill_tokens=100_000))
        answer = await harness.route()
        assert isinstance(answer, Rejected)
        assert (answer.code, answer.retry_after_s) == ("overloaded", pytest.approx(90.0, abs=0.1))
        assert harness.engines[0].received == []

    run_scenario(scenario, takes)


def test_the_choice_is_logged_with_its_prediction_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario(harness: RouterHarness) -> None:
        for number in range(3):
            assert isinstance(await harness.route(route_request(f"r{number}", tokens=1, adapter=PIRATE)), Routed)
        await harness.publish_picture(engine_seen("e0", waiting_prefill_tokens=100_000))
        assert isinstance(await harness.route(route_request("r9")), Rejected)
        metrics = harness.router.metrics.render().decode()
        # The other requests find the load that the first one started.
        assert 'loraserve_routed_total{engine="e0",why="load"} 1.0' in metrics
        assert 'loraserve_routed_total{engine="e0",why="resident"} 2.0' in metrics
        assert 'loraserve_rejected_total{code="overloaded"} 1.0' in metrics

    run_scenario(scenario, takes)
    routed = [line for line in capsys.readouterr().out.splitlines() if "routed" in line]
    assert len(routed) == 3
    assert "why=load" in routed[0]
    assert "load: first token in 0." in routed[0]


def test_the_configured_policy_routes() -> None:
    async def scenario(harness: RouterHarness) -> None:
        await harness.plan(1, "e1")
        await harness.publish_picture(engine_seen("e0", **HELD), engine_seen("e1", waiting_prefill_tokens=9000, **HELD))
        answer = await harness.route(route_request("r1", tokens=1, adapter=PIRATE))
        assert isinstance(answer, Routed)
        assert (answer.engine, answer.why) == ("e1", "planned")

    run_scenario(scenario, takes, takes, policy="shares")


def test_before_the_first_picture_there_is_no_engine() -> None:
    async def scenario() -> None:
        harness = RouterHarness()
        async with serving(harness.router):
            answer = await harness.route()
            assert isinstance(answer, Rejected)
            assert answer.code == "no_engine"

    run_virtual(scenario())


def test_one_slow_engine_does_not_hold_up_other_requests() -> None:
    async def scenario(harness: RouterHarness) -> None:
        slow = asyncio.create_task(harness.route(route_request("r1")))
        await asyncio.sleep(0.1)
        await harness.publish_picture(engine_seen("e0", waiting_prefill_tokens=9000), engine_seen("e1"))
        began_s = asyncio.get_running_loop().time()
        answer = await harness.route(route_request("r2"))
        assert isinstance(answer, Routed)
        assert asyncio.get_running_loop().time() - began_s < 0.1
        assert isinstance(await slow, Routed)

    run_scenario(scenario, silent, takes)


def test_a_sent_request_counts_as_load_until_it_expires() -> None:
    async def scenario(harness: RouterHarness) -> None:
        engines = []
        for number, pause_s in enumerate((0.0, 0.1, 2.0)):
            await asyncio.sleep(pause_s)
            answer = await harness.route(route_request(f"r{number}", tokens=3000 if number == 0 else 1))
            assert isinstance(answer, Routed)
            engines.append(answer.engine)
        assert engines == ["e0", "e1", "e0"]

    run_scenario(scenario, takes, takes)


def test_an_engine_that_stays_silent_is_asked_last_until_it_answers_again() -> None:
    async def scenario(harness: RouterHarness) -> None:
        for number in range(2):
            await harness.route(route_request(f"r{number}"))
        asked = len(harness.engines[0].got(Admit))
        answer = await harness.route(route_request("r3"))
        assert isinstance(answer, Routed)
        assert len(harness.engines[0].got(Admit)) == asked, "it was asked although it is known to be silent"
        harness.engines[0].script = takes
        await asyncio.sleep(20.0)
        await harness.publish_picture()
        again = await harness.route(route_request("r4"))
        assert isinstance(again, Routed)
        assert again.engine == "e0"

    run_scenario(scenario, silent, takes)


async def publish_unheard(harness: RouterHarness, **ended: bool) -> None:
    """Publish the load of a monitor that hears none of the named engines, and knows which of them ended."""
    harness.sequence += 1
    seen = (msgspec.structs.replace(engine_seen(name), alive=False, ended=over) for name, over in ended.items())
    load = ClusterLoad(incarnation="m1", sequence=harness.sequence, engines=tuple(seen))
    harness.monitor.publish("load", load)
    await asyncio.sleep(0.01)


def test_engines_that_a_cut_off_monitor_does_not_hear_are_asked_unless_they_ended() -> None:
    async def scenario(harness: RouterHarness) -> None:
        for ended in ("e0", "e1"):
            await publish_unheard(harness, e0=ended == "e0", e1=ended == "e1")
            answer = await harness.route()
            assert isinstance(answer, Routed)
            assert answer.engine != ended
        await publish_unheard(harness, e0=True, e1=True)
        assert isinstance(await harness.route(), Rejected)

    run_scenario(scenario, takes, takes)


def test_engines_that_neither_the_monitor_nor_the_router_reaches_are_asked_rarely() -> None:
    async def scenario(harness: RouterHarness) -> None:
        loop = asyncio.get_running_loop()
        waited = []
        for _ in range(4):
            await publish_unheard(harness, e0=False)
            began_s = loop.time()
            answer = await harness.route()
            assert isinstance(answer, Rejected)
            assert answer.code == "no_engine"
            waited.append(loop.time() - began_s > 0.5 * ADMIT_TIMEOUT_S)
        assert waited == [True, True, False, False]
        harness.engines[0].script = takes
        await asyncio.sleep(MAX_AVOIDANCE_S)
        await publish_unheard(harness, e0=False)
        assert isinstance(await harness.route(), Routed), "it is tried again after a while"

    run_scenario(scenario, silent)


def test_a_question_repeated_while_the_first_is_open_gets_the_same_answer() -> None:
    async def scenario(harness: RouterHarness) -> None:
        answers = await asyncio.gather(*(harness.route() for _ in range(3)))
        assert answers[0] == answers[1] == answers[2]
        assert sum(isinstance(m, Admit) for m in harness.engines[1].received) == 1

    run_scenario(scenario, silent, takes)


def test_a_migrated_request_keeps_its_output_and_avoids_its_engine() -> None:
    async def scenario(harness: RouterHarness) -> None:
        request = msgspec.structs.replace(route_request(tokens=5), generated=2, avoid=("e0",))
        answer = await harness.route(request)
        assert isinstance(answer, Routed)
        assert answer.engine == "e1"
        (admit,) = harness.engines[1].received
        assert (admit.prompt_tokens, admit.generated) == (request.prompt_tokens, 2)

    run_scenario(scenario, takes, takes)


def test_a_repeated_request_goes_to_the_engine_that_runs_it() -> None:
    async def scenario(harness: RouterHarness) -> None:
        await harness.route(route_request("r1"))
        await harness.publish_picture(
            engine_seen("e0", waiting_prefill_tokens=9000, request_ids=("r1",)), engine_seen("e1")
        )
        answer = await harness.route(route_request("r1"))
        assert isinstance(answer, Routed)
        assert (answer.engine, answer.why) == ("e0", "live")

    run_scenario(scenario, takes, takes)


def test_the_plan_breaks_ties_and_another_epoch_replaces_it() -> None:
    async def scenario(harness: RouterHarness) -> None:
        # A planner that lost its disk may publish another plan with the same epoch.
        for epoch, created_unix_s, engine in ((5, 1.0, "e1"), (6, 2.0, "e0"), (1, 3.0, "e1"), (1, 4.0, "e0")):
            await harness.plan(epoch, engine, created_unix_s)
            for number in range(6):
                await asyncio.sleep(2.0)
                await harness.publish_picture(engine_seen("e0", **HELD), engine_seen("e1", **HELD))
                answer = await harness.route(route_request(f"{created_unix_s}-{number}", tokens=1, adapter=PIRATE))
                assert isinstance(answer, Routed)
                assert (answer.engine, answer.why) == (engine, "planned")

    run_scenario(scenario, takes, takes)


@pytest.mark.parametrize(
    ("other", "expected"),
    [(takes, "e1"), (silent, "e0"), (refuses("draining"), "e0"), (refuses("overloaded"), "overloaded")],
    ids=["takes", "silent", "draining", "overloaded"],
)
def test_a_drained_engine_replaces_lost_engines_only(other: Script, expected: str) -> None:
    async def scenario(harness: RouterHarness) -> None:
        await harness.plan(1, "e0", drained=("e0",))
        await harness.publish_picture()
        answer = await harness.route(route_request())
        assert (answer.engine if isinstance(answer, Routed) else answer.code) == expected

    run_scenario(scenario, takes, other)


def test_the_engine_is_told_once_to_expect_an_adapter() -> None:
    async def scenario(harness: RouterHarness) -> None:
        for _ in range(2):
            harness.gateway.send("router", Expect(adapter=PIRATE, prompt_tokens=10))
            await asyncio.sleep(0.01)
        assert [engine.received for engine in harness.engines] == [[ExpectAdapter(adapter=PIRATE)], []]
        assert (await harness.route(route_request("r1", adapter=PIRATE))).why == "resident"
        assert [type(message) for message in harness.engines[0].received] == [ExpectAdapter, Admit]

    run_scenario(scenario, takes, takes)


def test_routing_by_shares_does_not_prefetch() -> None:
    async def scenario(harness: RouterHarness) -> None:
        harness.gateway.send("router", Expect(adapter=PIRATE, prompt_tokens=10))
        await asyncio.sleep(0.01)
        assert [engine.received for engine in harness.engines] == [[], []]

    run_scenario(scenario, takes, takes, policy="shares")
