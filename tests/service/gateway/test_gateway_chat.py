"""Chat and completions over real HTTP, with OpenAI's client and with plain requests."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest

Start = Callable[..., AbstractAsyncContextManager[Any]]
HI = [{"role": "user", "content": "hi"}]


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": HI} | fields


def content(events: list[Any], choice: int = 0) -> str:
    found = [one for event in events[:-1] for one in event["choices"] if one["index"] == choice]
    return "".join(one["delta"].get("content") or "" for one in found)


def test_whole_and_streamed_answers_have_the_same_text(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.replies[""].text = "hello \u00e9\u00e8 \U0001f680 world"
            whole = await gateway.openai.chat.completions.create(model="tiny", messages=HI)
            assert whole.choices[0].message.content == "hello \u00e9\u00e8 \U0001f680 world"
            assert whole.choices[0].finish_reason == "stop"
            assert whole.model == "tiny"
            stream = await gateway.openai.chat.completions.create(model="tiny", messages=HI, stream=True)
            text = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(text) == whole.choices[0].message.content
            assert len(text) > 5
            assert all("\ufffd" not in part for part in text)

    asyncio.run(scenario())


def test_a_stream_has_the_events_of_openai(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            options = {"include_usage": True}
            events = await gateway.events("/v1/chat/completions", chat(stream=True, stream_options=options))
            assert events[-1] == "[DONE]"
            first, second, *_, finish, usage = events[:-1]
            assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
            assert second["choices"][0]["delta"]["content"]
            assert finish["choices"][0] | {"index": 0} == {
                "index": 0,
                "delta": {},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
            assert usage["choices"] == []
            assert (
                usage["usage"]["completion_tokens"] == usage["usage"]["total_tokens"] - usage["usage"]["prompt_tokens"]
            )
            assert all(event["usage"] is None for event in events[:-2])
            assert {event["object"] for event in events[:-1]} == {"chat.completion.chunk"}
            assert len({event["id"] for event in events[:-1]}) == 1
            without = await gateway.events("/v1/chat/completions", chat(stream=True))
            assert all("usage" not in event for event in without[:-1])
            options = {"include_usage": True, "continuous_usage_stats": True}
            running = await gateway.events("/v1/chat/completions", chat(stream=True, stream_options=options))
            counts = [event["usage"]["completion_tokens"] for event in running[:-1]]
            assert counts == sorted(counts)
            assert counts[0] == 1

    asyncio.run(scenario())


def test_answers_name_the_adapter_and_its_version(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            for name in ("pirate", "me/x:1"):
                raw = await gateway.openai.chat.completions.with_raw_response.create(model=name, messages=HI)
                answer = raw.parse()
                assert answer.model == name
                assert answer.system_fingerprint == f"digest-of-{name}"
                assert raw.headers["x-loraserve-adapter-version"] == f"digest-of-{name}"
                assert raw.headers["x-loraserve-engine"] == "engine-0"
                assert gateway.cluster.routes[-1].adapter.name == name
            base = await gateway.openai.chat.completions.with_raw_response.create(model="tiny", messages=HI)
            assert "x-loraserve-adapter-version" not in base.headers
            assert gateway.cluster.routes[-1].adapter is None

    asyncio.run(scenario())


def test_the_engine_receives_the_sampling_parameters_and_the_rendered_prompt(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            body = chat(max_completion_tokens=7, max_tokens=9, temperature=0, top_p=0.5, seed=11, ignore_eos=True)
            await gateway.post("/v1/chat/completions", body | {"stop_token_ids": [3], "min_tokens": 1, "unknown": 1})
            route = gateway.cluster.routes[-1]
            sampling = route.sampling
            assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (7, 0.0, 11)
            assert (sampling.top_p, sampling.ignore_eos, sampling.stop_token_ids) == (0.5, True, (3,))
            assert route.gateway == "gateway-0"
            text = gateway.service.gateway.tokenizer.decode(route.prompt_tokens)
            assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
            await gateway.post("/v1/chat/completions", chat())
            limit = gateway.cluster.routes[-1].sampling.max_tokens
            assert limit == 256 - len(route.prompt_tokens)

    asyncio.run(scenario())


def test_each_choice_has_its_own_seed(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.replies[""].text = "seed {seed}"
            whole = await gateway.openai.chat.completions.create(model="tiny", messages=HI, n=3, seed=40)
            assert [choice.message.content for choice in whole.choices] == ["seed 40", "seed 41", "seed 42"]
            assert [choice.index for choice in whole.choices] == [0, 1, 2]
            prompt_tokens = len(gateway.cluster.routes[-1].prompt_tokens)
            assert whole.usage.prompt_tokens == prompt_tokens
            events = await gateway.events("/v1/chat/completions", chat(n=2, seed=7, stream=True))
            assert [content(events, choice) for choice in (0, 1)] == ["seed 7", "seed 8"]
            roles = [one for event in events[:-1] for one in event["choices"] if "role" in one["delta"]]
            assert sorted(one["index"] for one in roles) == [0, 1]

    asyncio.run(scenario())


def test_a_stop_string_ends_the_stream_and_aborts_the_request(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            reply = gateway.cluster.replies[""]
            reply.text, reply.pause_at = "one two three four five", 16
            for stream in (False, True):
                gateway.cluster.aborts.clear()
                if stream:
                    events = await gateway.events("/v1/chat/completions", chat(stop=["three", "zzz"], stream=True))
                    text, finish = content(events), events[-2]["choices"][0]
                else:
                    _, answer = await gateway.post("/v1/chat/completions", chat(stop=["three", "zzz"]))
                    finish, text = answer["choices"][0], answer["choices"][0]["message"]["content"]
                assert text == "one two "
                assert (finish["finish_reason"], finish["stop_reason"]) == ("stop", "three")
                request_id = gateway.cluster.routes[-1].request_id
                await gateway.until(lambda: gateway.cluster.aborts, "the engine to be told of the stop")
                assert gateway.cluster.aborts == [("engine-0", request_id)]
            body = chat(stop="three", include_stop_str_in_output=True)
            _, answer = await gateway.post("/v1/chat/completions", body)
            assert answer["choices"][0]["message"]["content"] == "one two three"

    asyncio.run(scenario())


def test_logprobs_of_both_endpoints(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.replies[""].text = "hello world"
            whole = await gateway.openai.chat.completions.create(
                model="tiny", messages=HI, logprobs=True, top_logprobs=2
            )
            scored = whole.choices[0].logprobs.content
            assert "".join(one.token for one in scored[:-1]) == "hello world"
            assert bytes(byte for one in scored[:-1] for byte in one.bytes) == b"hello world"
            assert scored[0].logprob == -0.5
            assert [len(one.top_logprobs) for one in scored] == [2] * len(scored)
            events = await gateway.events("/v1/chat/completions", chat(stream=True, logprobs=True))
            tokens = [one["logprobs"] for event in events[:-1] for one in event["choices"] if one["logprobs"]]
            assert sum(len(one["content"]) for one in tokens) == len(scored)
            text = await gateway.openai.completions.create(model="tiny", prompt="hi", logprobs=1)
            logprobs = text.choices[0].logprobs
            assert "".join(logprobs.tokens[:-1]) == "hello world"
            assert logprobs.text_offset[:2] == [0, len(logprobs.tokens[0])]
            assert logprobs.token_logprobs == [-0.5] * len(scored)
            assert all(len(top) == 1 for top in logprobs.top_logprobs)

    asyncio.run(scenario())


def test_completions_accept_all_shapes_of_prompts(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            client = gateway.openai
            one = await client.completions.create(model="tiny", prompt="say: ", echo=True)
            assert one.choices[0].text == "say: hello world"
            ids = list(gateway.cluster.routes[-1].prompt_tokens)
            by_ids = await client.completions.create(model="tiny", prompt=ids, echo=True)
            assert by_ids.choices[0].text == "say: hello world"
            assert list(gateway.cluster.routes[-1].prompt_tokens) == ids
            gateway.cluster.replies[""].text = "{seed}"
            many = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, seed=5)
            assert [(choice.index, choice.text) for choice in many.choices] == [(0, "5"), (1, "6"), (2, "5"), (3, "6")]
            lists = await client.completions.create(model="tiny", prompt=[[1, 2], [3]])
            assert (len(lists.choices), lists.usage.prompt_tokens) == (2, 3)
            stream = await client.completions.create(model="tiny", prompt="say: ", echo=True, seed=9, stream=True)
            assert "".join([chunk.choices[0].text async for chunk in stream]) == "say: 9"

    asyncio.run(scenario())


def test_usage_includes_cached_tokens(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.replies[""].cached_tokens = 4
            whole = await gateway.openai.chat.completions.create(model="tiny", messages=HI, n=2)
            usage = whole.usage
            assert usage.prompt_tokens_details.cached_tokens == 4
            assert usage.completion_tokens == 2 * (len(gateway.cluster.encode("hello world")) + 1)
            assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens

    asyncio.run(scenario())


def test_max_tokens_ends_the_output(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            whole = await gateway.openai.chat.completions.create(model="tiny", messages=HI, max_tokens=2)
            assert whole.choices[0].finish_reason == "length"
            assert whole.usage.completion_tokens == 2

    asyncio.run(scenario())


def test_tokens_that_arrive_before_the_router_s_answer_are_kept(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.tokens_before_routed = True
            whole = await gateway.openai.chat.completions.create(model="tiny", messages=HI)
            assert whole.choices[0].message.content == "hello world"
            assert gateway.cluster.aborts == []

    asyncio.run(scenario())


def test_an_unknown_adapter_is_404_and_other_streams_continue(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.replies["pirate"] = type(gateway.cluster.replies[""])(text="a" * 60, delay_s=0.01)
            running = asyncio.create_task(gateway.events("/v1/chat/completions", chat(model="pirate", stream=True)))
            await gateway.until(lambda: gateway.cluster.playing, "the stream to run")
            for _ in range(3):
                with pytest.raises(openai.NotFoundError) as caught:
                    await gateway.openai.chat.completions.create(model="no-such", messages=HI)
                assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
            assert content(await running) == "a" * 60
            assert [route.adapter.name for route in gateway.cluster.routes] == ["pirate"]

    asyncio.run(scenario())
