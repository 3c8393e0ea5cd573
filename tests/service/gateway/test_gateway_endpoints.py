"""Everything beside generation: models, adapters, tokens, health, metrics, admin, keys and limits."""

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from prometheus_client.parser import text_string_to_metric_families

from loraserve.gateway.openai_schema import ChatRequest, CompletionRequest, TokenizeRequest

Start = Callable[..., AbstractAsyncContextManager[Any]]
HI = [{"role": "user", "content": "hi"}]


def test_models_base_first_with_odd_names(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            models = [model async for model in await gateway.openai.models.list()]
            assert [(model.id, model.parent) for model in models] == [
                ("tiny", None),
                ("me/x:1", "tiny"),
                ("pirate", "tiny"),
            ]
            assert models[0].max_model_len == 256
            for path in ("me/x:1", "me%2Fx%3A1"):
                status, body = await gateway.get(f"/v1/models/{path}")
                assert (status, body["id"], body["rank"]) == (200, "me/x:1", 8)
            status, body = await gateway.get("/v1/models/no/such")
            assert (status, body["error"]["code"]) == (404, "model_not_found")

    asyncio.run(scenario())


def test_a_name_is_asked_for_once_before_it_is_unknown(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            cluster = gateway.cluster
            cluster.publishes_registry = False
            cluster.add_adapter("fresh")
            assert (await gateway.get("/v1/models/fresh"))[0] == 200
            cluster.lists_asked = 0
            await asyncio.gather(*(gateway.get(f"/v1/models/unknown-{number}") for number in range(50)))
            assert 1 <= cluster.lists_asked <= 3

    asyncio.run(scenario())


def test_silent_store_is_404_when_known_and_503_when_never_heard(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            gateway.cluster.unreachable.add("store")
            registry = gateway.service.gateway.registry
            assert (await gateway.get("/v1/models/pirate"))[0] == 200
            answers = [gateway.get("/v1/models/unknown")]
            assert (await asyncio.gather(*answers))[0][0] == 404
            registry.revision = -1
            gateway.cluster.publishes_registry = False
            await asyncio.sleep(0.1)
            registry.revision = -1
            status, body = await gateway.get("/v1/models/unknown")
            assert (status, body["error"]["code"]) == (503, "no_store")

    asyncio.run(scenario())


def test_adapters_are_loaded_and_unloaded_as_in_vllm(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway(adapters=()) as gateway:
            gateway.cluster.publishes_registry = False
            load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
            body = {"lora_name": "a/b:c", "lora_path": "/adapters/one"}
            assert await gateway.post(load, body) == (200, "Success: LoRA adapter 'a/b:c' added successfully.")
            answer = await gateway.openai.chat.completions.create(model="a/b:c", messages=HI)
            assert answer.system_fingerprint == "digest-of-/adapters/one"
            assert (await gateway.post(load, body))[0] == 200
            status, refused = await gateway.post(load, body | {"lora_path": "/adapters/two"})
            assert (status, refused["error"]["code"]) == (400, "duplicate")
            status, _ = await gateway.post(load, body | {"lora_path": "/adapters/two", "load_inplace": True})
            assert status == 200
            answer = await gateway.openai.chat.completions.create(model="a/b:c", messages=HI)
            assert answer.system_fingerprint == "digest-of-/adapters/two"
            status, refused = await gateway.post(load, {"lora_name": "x", "lora_path": "/broken"})
            assert (status, refused["error"]["code"]) == (400, "bad_shape")
            assert "the model has 64" in refused["error"]["message"]
            for wrong in (
                {"lora_name": "x"},
                {"lora_path": "/y"},
                {"lora_name": 5},
                {"lora_name": "tiny", "lora_path": "/y"},
            ):
                assert (await gateway.post(load, wrong))[0] == 400
            gone = await gateway.post(unload, {"lora_name": "a/b:c"})
            assert gone == (200, "Success: LoRA adapter 'a/b:c' removed successfully.")
            status, unknown = await gateway.post(unload, {"lora_name": "a/b:c"})
            assert (status, unknown["error"]["type"]) == (404, "NotFoundError")
            with pytest.raises(openai.NotFoundError):
                await gateway.openai.chat.completions.create(model="a/b:c", messages=HI)

    asyncio.run(scenario())


def test_tokenize_and_back(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            _, body = await gateway.post("/tokenize", {"prompt": "hello world", "return_token_strs": True})
            assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
            assert "".join(body["token_strs"]) == "hello world"
            assert body["max_model_len"] == 256
            _, back = await gateway.post("/detokenize", {"model": "pirate", "tokens": body["tokens"]})
            assert back == {"prompt": "hello world"}
            _, messages = await gateway.post("/tokenize", {"messages": HI, "add_generation_prompt": False})
            _, back = await gateway.post("/detokenize", {"tokens": messages["tokens"]})
            assert back["prompt"] == "<|im_start|>user\nhi<|im_end|>\n"
            for path, wrong in (("/tokenize", {}), ("/detokenize", {"tokens": [10**9]}), ("/detokenize", {})):
                assert (await gateway.post(path, wrong))[0] == 400
            assert (await gateway.post("/tokenize", {"model": "nobody", "prompt": "x"}))[0] == 404

    asyncio.run(scenario())


def test_health_says_what_is_missing(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            status, body = await gateway.get("/health")
            assert (status, body["status"], body["engines"]) == (200, "ok", ["engine-0", "engine-1"])
            gateway.cluster.dead.add("engine-0")
            await asyncio.sleep(0.15)
            assert (await gateway.get("/health"))[0] == 200
            gateway.cluster.dead.add("engine-1")
            gateway.cluster.unreachable.add("store")
            await asyncio.sleep(0.15)
            status, body = await gateway.get("/health")
            assert (status, body["store"], body["router"]) == (503, "UNREACHABLE", "READY")
            assert "no engine is alive and READY" in body["problems"]
            assert (await gateway.get("/live"))[0] == 200

    asyncio.run(scenario())


def test_metrics_under_vllm_s_names(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            whole = await gateway.openai.chat.completions.create(model="pirate", messages=HI)
            await gateway.get("/v1/models/no-such")
            _, text = await gateway.get("/metrics")
            samples = {}
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    samples[(sample.name, *sorted(sample.labels.values()))] = sample.value
            usage = whole.usage
            assert samples["vllm:prompt_tokens_total", "tiny"] == usage.prompt_tokens
            assert samples["vllm:generation_tokens_total", "tiny"] == usage.completion_tokens
            assert samples["vllm:request_success_total", "stop", "tiny"] == 1
            assert samples["vllm:time_to_first_token_seconds_count", "tiny"] == 1
            assert samples["vllm:e2e_request_latency_seconds_count", "tiny"] == 1
            assert samples["vllm:inter_token_latency_seconds_count", "tiny"] == usage.completion_tokens - 1
            assert samples["vllm:kv_cache_usage_perc", "engine-1", "tiny"] == 0.25
            assert samples["vllm:num_requests_waiting", "engine-0", "tiny"] == 0
            assert samples["loraserve_requests_total", "ok", "pirate"] == 1
            assert samples["loraserve_http_responses_total", "/v1/models/{id}", "404"] == 1
            assert any(name[0] == "vllm:lora_requests_info" for name in samples)

    asyncio.run(scenario())


def test_admin(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            status, body = await gateway.get("/admin/cluster")
            assert status == 200
            assert body["processes"]["router"]["state"] == "READY"
            assert [engine["name"] for engine in body["engines"]] == ["engine-0", "engine-1"]
            assert body["engines"][0]["load"]["kv_blocks_free"] == 75
            assert body["plan_epoch"] == 3
            assert [adapter["name"] for adapter in body["registry"]["adapters"]] == ["me/x:1", "pirate"]
            _, plan = await gateway.get("/admin/plan")
            assert plan["placements"][0]["engine"] == "engine-0"
            _, done = await gateway.post("/admin/rebalance", {"dry_run": True})
            assert (done["applied"], done["message"]) == (False, "nothing")
            gateway.cluster.unreachable.update(("planner", "engine-1"))
            _, body = await gateway.get("/admin/cluster")
            assert body["processes"]["planner"] == {"state": "UNREACHABLE"}
            assert body["plan_epoch"] is None
            assert (await gateway.get("/admin/plan"))[0] == 503

    asyncio.run(scenario())


def test_keys(start_gateway: Start) -> None:
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


def test_limits_and_http_errors_have_openai_s_shape(start_gateway: Start) -> None:
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
                "/tokenize": (TokenizeRequest, {"prompt": "hi"}),
            }
            for path, (schema, body) in cases.items():
                for field in schema.__struct_fields__:
                    statuses = [(await gateway.post(path, body | {field: odd}))[0] for odd in ODD]
                    assert set(statuses) <= {200, 400, 404}, (path, field, statuses)
                    assert 400 in statuses or field in ("tool_choice", "response_format", "tools", "functions")

    asyncio.run(scenario())


def test_odd_bytes_in_paths_and_headers(start_gateway: Start) -> None:
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


def test_request_ids_are_echoed_or_made(start_gateway: Start) -> None:
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
