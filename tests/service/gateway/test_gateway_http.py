"""HTTP itself: settings, keys, limits, request ids, and malformed requests."""

import asyncio
import json
import threading
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI

from loraserve.errors import ConfigError
from loraserve.gateway.api import schema, tokenize
from loraserve.gateway.api.schema import ChatRequest, CompletionRequest, TokenizeRequest
from loraserve.gateway.text.tokenizer import INLINE_BYTES, LARGE_BYTES
from loraserve.messages.sampling import FIELD_TYPES

Start = Callable[..., AbstractAsyncContextManager[Any]]
HI = [{"role": "user", "content": "hi"}]


def test_only_configured_api_keys_are_accepted(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway('gateway.api_keys=["sk-one", "sk-two"]') as gateway:
            for path in ("/v1/models", "/admin/cluster", "/nowhere"):
                status, body = await gateway.get(path)
                assert (status, body["error"]["code"]) == (401, "invalid_api_key")
            for path in ("/health", "/metrics", "/version", "/live"):
                assert (await gateway.get(path))[0] == 200
            with pytest.raises(openai.AuthenticationError):
                await gateway.openai.models.list()
            keyed = AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="sk-two", max_retries=0)
            assert (await keyed.models.list()).data[0].id == "tiny"

    asyncio.run(scenario())


def test_limits_and_http_errors_have_the_shape_of_openai_errors(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("gateway.max_body_bytes=20000") as gateway:
            status, body = await gateway.post("/v1/completions", {"model": "tiny", "prompt": "x" * 30000})
            assert (status, body["error"]["code"]) == (413, "request_too_large")
            for prompt in ("x " * 400, "x" * 19000):
                status, body = await gateway.post("/v1/completions", {"model": "tiny", "prompt": prompt})
                assert (status, body["error"]["code"]) == (400, "context_length_exceeded")
                assert body["error"]["message"].startswith("This model's maximum context length is 256 tokens.")
            assert (await gateway.get("/nowhere"))[1]["error"]["code"] == "not_found"
            status, body = await gateway.get("/v1/completions")
            assert (status, body["error"]["code"]) == (405, "method_not_allowed")
            for raw in (b"{", b"", b'{"model": 5}'):
                async with gateway.http.post(gateway.url + "/v1/completions", data=raw) as response:
                    assert response.status == 400
                    assert (await response.json())["error"]["type"] == "invalid_request_error"
            wrong = {
                "model": "tiny",
                "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            }
            status, body = await gateway.post("/v1/chat/completions", wrong)
            assert (status, body["error"]["param"]) == (400, "messages[0].content[0]")

    asyncio.run(scenario())


def test_bodies_that_cannot_be_read_are_client_errors(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            encoded = [("gzip", b"garbage"), ("gzip", b"\x1f\x8b garbage"), ("deflate", b"garbage")]
            for encoding, data in [*encoded, ("", b'{"tools": ' + b"[" * 100_000)]:
                headers = {"Content-Encoding": encoding} if encoding else {}
                url = gateway.url + "/v1/chat/completions"
                async with gateway.http.post(url, data=data, headers=headers) as response:
                    assert response.status == 400, (encoding, await response.text())
                    assert (await response.json())["error"]["type"] == "invalid_request_error"

    asyncio.run(scenario())


def test_token_ids_are_counted_before_they_are_validated(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            wrong = [1] * 256 + [10**9]
            for prompt in (wrong, [wrong], [*wrong, "a"]):
                status, body = await gateway.post("/v1/completions", {"model": "tiny", "prompt": prompt})
                assert (status, body["error"]["code"]) == (400, "context_length_exceeded")

    asyncio.run(scenario())


ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    10**30,
    1.5,
    1e308,
    "",
    "\u0000",
    [],
    [[]],
    [None],
    {},
    {"a": {}},
    "tiny",
    ["a", 1],
]


def test_no_body_makes_the_gateway_crash(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway("cluster.log_level=error") as gateway:
            base: dict[str, Any] = {"model": "tiny", "max_tokens": 1}
            cases: dict[str, tuple[Any, dict[str, Any]]] = {
                "/v1/chat/completions": (ChatRequest, base | {"messages": HI}),
                "/v1/completions": (CompletionRequest, base | {"prompt": "hi"}),
                "/tokenize": (TokenizeRequest, {"messages": HI}),
            }
            for path, (schema, body) in cases.items():
                for field in (*schema.__struct_fields__, *(() if path == "/tokenize" else FIELD_TYPES)):
                    statuses = [(await gateway.post(path, body | {field: odd}))[0] for odd in ODD]
                    assert set(statuses) <= {200, 400, 404}, (path, field, statuses)
                    assert 400 in statuses or field == "tools"

    asyncio.run(scenario())


def test_invalid_bytes_in_paths_and_headers_are_refused(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway('gateway.api_keys=["sk"]') as gateway:
            key = "Authorization: Bearer sk\r\n"
            cases = {
                b"GET /v1/models/%FF%ED%A0%80 HTTP/1.1\r\nHost: x\r\n" + key.encode(): b"404",
                b"GET /v1/models/%2e%2e/x HTTP/1.1\r\nHost: x\r\n" + key.encode(): b"404",
                b"GET /%FF HTTP/1.1\r\nHost: x\r\n" + key.encode(): b"404",
                b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n": b"401",
                b"GET /live HTTP/1.1\r\nHost: x\r\nX-Request-Id: \xff\xfe\r\n": b"200",
            }
            for request, status in cases.items():
                reader, writer = await asyncio.open_connection("127.0.0.1", gateway.service.port)
                writer.write(request + b"Connection: close\r\n\r\n")
                answer = await reader.read()
                writer.close()
                assert answer.split(b" ")[1] == status, answer

    asyncio.run(scenario())


def test_request_ids_are_echoed_or_generated(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            body = json.dumps({"model": "tiny", "messages": HI, "stream": True})
            for given in ("mine-1", "x" * 300, None):
                headers = {"x-request-id": given} if given else {}
                async with gateway.http.post(
                    gateway.url + "/v1/chat/completions", data=body, headers=headers
                ) as response:
                    echoed = response.headers["x-request-id"]
                    await response.read()
                assert (echoed == given) == (given == "mine-1")
                assert 0 < len(echoed) <= 128
            async with gateway.http.get(gateway.url + "/nowhere", headers={"x-request-id": "mine-2"}) as response:
                assert response.headers["x-request-id"] == "mine-2"

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("setting", "message"),
    [("gateway.host=no.such.host.invalid", r"gateway\.host"), ("model.path=/nowhere/model", r"config\.json")],
)
def test_unusable_settings_are_refused(start_gateway: Start, setting: str, message: str) -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match=message):
            async with start_gateway(setting):
                pass

    asyncio.run(scenario())


def recording_threads(work: Callable[..., Any], threads: list[int]) -> Callable[..., Any]:
    def noted(*arguments: Any) -> Any:
        threads.append(threading.get_ident())
        return work(*arguments)

    return noted


def test_large_requests_are_processed_off_the_event_loop(start_gateway: Start) -> None:
    """The size of the whole body decides, not that of the messages' text."""

    async def scenario() -> None:
        async with start_gateway() as gateway:
            tokenizer = gateway.service.gateway.tokenizer
            threads: list[int] = []
            for name in ("render_chat", "decode"):
                setattr(tokenizer, name, recording_threads(getattr(tokenizer, name), threads))
            calls = [{"function": {"name": "f", "arguments": "x" * INLINE_BYTES}}]
            small = {"model": "tiny", "messages": HI, "max_tokens": 1}
            large = [
                ("/v1/chat/completions", small | {"messages": [{"role": "user", "content": "", "tool_calls": calls}]}),
                ("/v1/chat/completions", small | {"chat_template_kwargs": {"x": "x" * INLINE_BYTES}}),
                ("/detokenize", {"tokens": [1] * INLINE_BYTES}),
            ]
            for path, body in large:
                assert (await gateway.post(path, body))[0] == 200
            assert len(threads) == 3
            assert threading.get_ident() not in threads
            assert (await gateway.post("/v1/chat/completions", small))[0] == 200
            assert threads[-1] == threading.get_ident()

    asyncio.run(scenario())


def test_many_small_prompts_are_tokenized_off_the_event_loop(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            tokenizer = gateway.service.gateway.tokenizer
            threads: list[int] = []
            tokenizer.encode = recording_threads(tokenizer.encode, threads)  # type: ignore[method-assign]
            body = {"model": "tiny", "prompt": ["x" * (INLINE_BYTES // 50)] * 100, "max_tokens": 1}
            assert (await gateway.post("/v1/completions", body))[0] == 200
            assert len(threads) == 100
            assert threading.get_ident() not in threads

    asyncio.run(scenario())


def test_large_bodies_are_decoded_off_the_event_loop(start_gateway: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            threads: list[int] = []
            monkeypatch.setattr(schema, "decode_request", recording_threads(schema.decode_request, threads))
            paths = ("/tokenize", "/detokenize", "/v1/completions", "/v1/chat/completions", "/v1/load_lora_adapter")
            paths += ("/v1/unload_lora_adapter", "/admin/rebalance")
            for path in paths:
                assert (await gateway.post(path, {"tokens": "x" * schema.INLINE_BYTES}))[0] in (200, 400)
            assert len(threads) == len(paths)
            assert threading.get_ident() not in threads

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "method", "body"),
    [
        ("/tokenize", "encode", {"prompt": "x" * LARGE_BYTES}),
        ("/detokenize", "decode", {"tokens": [1] * LARGE_BYTES}),
    ],
)
def test_large_tokenize_requests_do_not_delay_chat_requests(
    start_gateway: Start, path: str, method: str, body: Any
) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            tokenizer, go, started = gateway.service.gateway.tokenizer, threading.Event(), threading.Event()
            work = getattr(tokenizer, method)

            def wait_if_large(given: Any, *arguments: Any) -> Any:
                if len(given) >= LARGE_BYTES:
                    started.set()
                    go.wait(60)
                return work(given, *arguments)

            setattr(tokenizer, method, wait_if_large)
            large = [asyncio.create_task(gateway.post(path, body)) for _ in range(3)]
            try:
                assert await asyncio.to_thread(started.wait, 30)
                await asyncio.sleep(0.2)
                chat = {"model": "tiny", "messages": HI, "chat_template_kwargs": {"x": "x" * INLINE_BYTES}}
                status, _ = await asyncio.wait_for(gateway.post("/v1/chat/completions", chat), 10)
                assert status == 200
                assert not any(task.done() for task in large)
            finally:
                go.set()
            assert [status for status, _ in await asyncio.gather(*large)] == [200] * 3

    asyncio.run(scenario())


def test_all_work_on_many_token_ids_leaves_the_event_loop(
    start_gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            threads: list[int] = []
            monkeypatch.setattr(tokenize, "check_token_ids", recording_threads(tokenize.check_token_ids, threads))
            assert (await gateway.post("/detokenize", {"tokens": [1] * INLINE_BYTES}))[0] == 200
            status, answer = await gateway.post("/detokenize", {"tokens": [1 << 40] * INLINE_BYTES})
            assert (status, answer["error"]["param"]) == (400, "tokens")
            assert len(threads) == 2
            assert threading.get_ident() not in threads

    asyncio.run(scenario())
