"""The gateway announces the adapter of a long prompt to the router before it tokenizes the prompt."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest

Start = Callable[..., AbstractAsyncContextManager[Any]]
LONG = "a b c d " * 10
SETTINGS = "gateway.expect_characters=40"


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/chat/completions", {"messages": said(LONG)}),
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": ["short", LONG]}),
    ],
    ids=["chat", "text", "texts"],
)
def test_the_router_is_told_of_a_long_prompt_before_its_request(
    start_gateway: Start, path: str, prompt: dict[str, Any]
) -> None:
    async def scenario() -> None:
        async with start_gateway(SETTINGS) as gateway:
            status, _ = await gateway.post(path, {"model": "pirate", "max_tokens": 2} | prompt)
            assert status == 200
            ((expect, routes_before),) = gateway.cluster.expected
            assert (expect.adapter, routes_before) == (gateway.cluster.adapters["pirate"], 0)
            assert expect.prompt_tokens == len(LONG) // 4

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"model": "pirate", "messages": said("hi")}),
        ("/v1/chat/completions", {"model": "tiny", "messages": said(LONG)}),
        ("/v1/completions", {"model": "pirate", "prompt": [5] * 60}),
    ],
    ids=["short", "base", "tokens"],
)
def test_the_router_is_not_told_of_other_prompts(start_gateway: Start, path: str, body: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with start_gateway(SETTINGS) as gateway:
            status, _ = await gateway.post(path, body | {"max_tokens": 2})
            assert status == 200
            assert gateway.cluster.expected == []

    asyncio.run(scenario())


def test_the_router_is_not_told_of_a_refused_prompt(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway(SETTINGS) as gateway:
            for path, prompt in (("/v1/completions", {"prompt": "a" * 99999}), ("/v1/chat/completions", {})):
                messages = {} if prompt else {"messages": said("a" * 99999)}
                status, _ = await gateway.post(path, {"model": "pirate"} | prompt | messages)
                assert status == 400
            assert gateway.cluster.expected == []

    asyncio.run(scenario())
