"""Many streams over many adapters: every text is what it would have been alone, and nothing leaks.

LORASERVE_SOAK_S sets how long it goes on (the release check runs 120 s).
"""

import asyncio
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import pytest

from loraserve.testing.local_cluster import Answer, LocalCluster, chat

STREAMS = 64
QUESTIONS = ("What is the moon?", "Tell me about dogs.", "How do I make tea?", "Why is the sky blue?")
SAMPLED = {"temperature": 0.8, "seed": 7, "top_p": 0.9}


@pytest.fixture
def small(demo_model: Path, eight_adapters: dict[str, Path], tmp_path: Path) -> Iterator[LocalCluster]:
    """A cluster with so little memory that adapters evict and streams preempt each other."""
    settings = (f"engine.pool_bytes={12 << 20}", f"engine.kv_bytes={36 << 20}")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    with LocalCluster(tmp_path, "--model", str(demo_model), *flags, adapters=eight_adapters) as running:
        yield running


def test_64_streams_over_8_adapters_equal_their_solo_runs(
    small: LocalCluster, eight_adapters: dict[str, Path], measured: Callable[[str], None]
) -> None:
    seconds = float(os.environ.get("LORASERVE_SOAK_S", "15"))
    names = sorted(eight_adapters)
    kinds = [(name, question) for name in names for question in QUESTIONS]

    async def scenario() -> tuple[int, dict[str, object], list[str]]:
        async with small.session() as http:

            async def ask(kind: tuple[str, str], index: int) -> Answer:
                options = SAMPLED if index % 2 else {}
                return await chat(http, *kind, max_tokens=24, **options)

            solo = {(kind, odd): await ask(kind, odd) for kind in kinds for odd in (0, 1)}
            assert len({answer.text for answer in solo.values()}) > len(kinds) // 2
            end_s = time.monotonic() + seconds

            async def client(number: int) -> int:
                done = 0
                while time.monotonic() < end_s or done == 0:
                    index = number + done
                    kind = kinds[index % len(kinds)]
                    answer = await ask(kind, index)
                    assert answer.error is None, answer.error
                    expected = solo[kind, index % 2]
                    assert (answer.text, answer.finish) == (expected.text, expected.finish), kind
                    done += 1
                return done

            counts = await asyncio.gather(*(client(number) for number in range(STREAMS)))
            await small.wait_idle(http)
            # Counters travel once a second from the engine and once a second from the monitor.
            await asyncio.sleep(2.5)
            return sum(counts), await small.admin(http), await tell_stories(http, names)

    finished, state, stories = asyncio.run(scenario())
    engines = state["engines"]
    preemptions = sum(engine["counters"]["preemptions"] for engine in engines)
    loaded = sum(log.read_text().count("adapter_loaded") for log in (small.data_dir / "logs").glob("engine-*.log"))
    measured(
        f"{finished} streams, {STREAMS} at a time, in {seconds:.0f} s: each as alone, "
        f"{preemptions} preemptions, {loaded} loads"
    )
    assert preemptions > 0, "the KV cache was meant to run out"
    assert loaded > 2 * len(names), "the pool was meant to run out"
    assert any(text.startswith("loaded from ") for text in stories)
    assert any(text.startswith("evicted for ") for text in stories)
    for engine in engines:
        load = engine["load"]
        assert load["memory"]["kv_blocks_free"] == engine["capabilities"]["kv_blocks"]
        assert engine["counters"]["leaks"] == 0
        assert not load["queue"]["request_ids"]
        assert all(adapter["running"] == 0 for adapter in load["adapters"]["resident"])


async def tell_stories(http: aiohttp.ClientSession, names: list[str]) -> list[str]:
    """Return the events of these adapters in all processes."""
    texts: list[str] = []
    for name in names:
        async with http.get(f"/admin/story/{name}") as response:
            texts += [entry["text"] for entry in (await response.json())["entries"]]
    return texts
