"""kill -9 of an engine: its streams continue on the other engine, the router avoids it, and the engine returns."""

import asyncio
import time
from collections.abc import Callable

import aiohttp

from loraserve.testing.local_cluster import Answer, LocalCluster, chat

QUESTION = "Tell me a story about the sea."
VICTIM = "engine-0"
BACK_TIMEOUT_S = 60.0
LEFT_AFTER_S = 2.0
SKEW_S = 0.5
"""The router may know this much earlier than a poll of the gateway shows that the engine is back."""


async def keep_asking(http: aiohttp.ClientSession, until: asyncio.Event) -> list[tuple[float, Answer]]:
    """Send short requests, two at a time. Returns them with the time at which each was sent."""
    answers = []
    while not until.is_set():
        sent_s = time.monotonic()
        both = await asyncio.gather(*(chat(http, name, "hi", max_tokens=4) for name in ("pirate", "french")))
        answers += [(sent_s, answer) for answer in both]
    return answers


def test_a_killed_engine_is_avoided_and_used_again_after_its_restart(
    cluster: LocalCluster, measured: Callable[[str], None]
) -> None:
    async def scenario() -> None:
        async with cluster.session() as http:
            long = [asyncio.create_task(tell_story(http, number)) for number in range(6)]
            await asyncio.sleep(1.5)
            first_pid = cluster.pids()[VICTIM]
            killed_s = time.monotonic()
            cluster.kill(VICTIM)
            stop = asyncio.Event()
            asking = asyncio.create_task(keep_asking(http, stop))
            kill_again = asyncio.create_task(kill_while_it_starts(cluster, first_pid))
            # Watched from now on: where streams take long to end, it may be back before they do.
            back = asyncio.create_task(wait_until_back(cluster, http, killed_s))
            stories = await asyncio.gather(*long)
            assert VICTIM in {story.engine for story in stories}, "no stream ran on the killed engine"
            dead_until_s = await back
            await kill_again
            stop.set()
            meanwhile = [
                (answer.engine, answer.error)
                for sent_s, answer in await asking
                if killed_s + LEFT_AFTER_S < sent_s < dead_until_s - SKEW_S
            ]
            assert meanwhile
            assert set(meanwhile) == {("engine-1", None)}
            used = {(await chat(http, name, "hi", max_tokens=4)).engine for name in ("json", "shout") for _ in range(6)}
            assert VICTIM in used, "the engine came back and nobody used it"
            undisturbed = await asyncio.gather(*(tell_story(http, number) for number in range(6)))
            assert [story.error for story in stories] == [None] * 6
            assert [(s.text, s.finish) for s in stories] == [(s.text, "length") for s in undisturbed]
            back_s = dead_until_s - killed_s
            measured(f"engine killed twice: {len(meanwhile)} requests ran elsewhere, back after {back_s:.1f} s")

    asyncio.run(scenario())


async def tell_story(http: aiohttp.ClientSession, number: int) -> Answer:
    return await chat(http, "pirate", f"{QUESTION} {number}", max_tokens=150, ignore_eos=True)


async def kill_while_it_starts(cluster: LocalCluster, first_pid: int) -> None:
    """Kill the engine again while it starts, so that enough requests are sent during its absence."""
    for _ in range(200):
        if cluster.pids()[VICTIM] != first_pid:
            break
        await asyncio.sleep(0.05)
    await asyncio.sleep(1.0)
    cluster.kill(VICTIM)


async def wait_until_back(cluster: LocalCluster, http: aiohttp.ClientSession, killed_s: float) -> float:
    """Wait until the engine is alive again. Returns when it was last seen dead."""
    dead_s = 0.0
    while (asked_s := time.monotonic()) < killed_s + BACK_TIMEOUT_S:
        engines = {engine["name"]: engine for engine in (await cluster.admin(http))["engines"]}
        alive = VICTIM in engines and engines[VICTIM]["alive"] and engines[VICTIM]["load"]["state"] == "READY"
        if not alive:
            dead_s = asked_s
        elif dead_s:
            return dead_s
        await asyncio.sleep(0.1)
    raise AssertionError(f"{VICTIM} did not come back within {BACK_TIMEOUT_S:.0f} s")
