"""kill -9 of an engine: the router leaves it within two seconds, the other serves on, the dead one comes back."""

import asyncio
import time

import aiohttp

from loraserve.testing.local_cluster import Answer, LocalCluster, chat

QUESTION = "Tell me a story about the sea."
BACK_TIMEOUT_S = 60.0


async def keep_asking(http: aiohttp.ClientSession, until: asyncio.Event) -> list[tuple[float, Answer]]:
    """Short requests, two at a time, with the time each was sent."""
    answers = []
    while not until.is_set():
        sent_s = time.monotonic()
        both = await asyncio.gather(*(chat(http, name, "hi", max_tokens=4) for name in ("pirate", "french")))
        answers += [(sent_s, answer) for answer in both]
    return answers


def test_a_killed_engine_is_left_survived_and_used_again(cluster: LocalCluster) -> None:
    async def scenario() -> None:
        async with cluster.session() as http:
            long = [
                asyncio.create_task(chat(http, "pirate", f"{QUESTION} {i}", max_tokens=150, ignore_eos=True))
                for i in range(6)
            ]
            await asyncio.sleep(1.5)
            victim = "engine-0"
            killed_s = time.monotonic()
            cluster.kill(victim)
            stop = asyncio.Event()
            asking = asyncio.create_task(keep_asking(http, stop))
            answers = await asyncio.gather(*long)
            ended = [answer for answer in answers if answer.error is not None]
            assert {answer.engine for answer in ended} == {victim}
            assert all(answer.error["code"] == "engine_died" for answer in ended if answer.error)
            assert all(answer.finish == "length" for answer in answers if answer.engine != victim)
            back_s = await wait_until_back(cluster, http, victim, killed_s)
            await asyncio.sleep(1.0)
            stop.set()
            short = await asking
            late = [a for sent_s, a in short if killed_s + 2 < sent_s < back_s]
            assert late
            assert all(answer.engine == "engine-1" and answer.error is None for answer in late)
            used = {(await chat(http, name, "hi", max_tokens=4)).engine for name in ("json", "shout") for _ in range(6)}
            assert victim in used, "the engine came back and nobody used it"
            print(
                f"{len(ended)} streams ended with an error event; the engine was back after {back_s - killed_s:.1f} s"
            )

    asyncio.run(scenario())


async def wait_until_back(cluster: LocalCluster, http: aiohttp.ClientSession, victim: str, killed_s: float) -> float:
    """When the cluster again sees a living engine of this name, under a new incarnation."""
    was_dead = False
    while time.monotonic() < killed_s + BACK_TIMEOUT_S:
        engines = {engine["name"]: engine for engine in (await cluster.admin(http))["engines"]}
        alive = victim in engines and engines[victim]["alive"] and engines[victim]["load"]["state"] == "READY"
        was_dead = was_dead or not alive
        if was_dead and alive:
            return time.monotonic()
        await asyncio.sleep(0.1)
    raise AssertionError(f"{victim} did not come back within {BACK_TIMEOUT_S:.0f} s")
