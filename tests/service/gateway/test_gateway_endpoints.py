"""The endpoints besides generation: models, adapters, tokens, health, metrics, admin."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

Start = Callable[..., AbstractAsyncContextManager[Any]]
HI = [{"role": "user", "content": "hi"}]
OUTCOMES = ("", "_useful", "_wasted")


def test_models_are_listed_with_the_base_first(start_gateway: Start) -> None:
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


def test_the_store_is_asked_once_for_many_unknown_names(start_gateway: Start) -> None:
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


def test_unknown_names_are_404_if_the_store_says_so_and_503_if_it_is_silent(start_gateway: Start) -> None:
    async def scenario() -> None:
        async with start_gateway() as gateway:
            assert (await gateway.get("/v1/models/unknown"))[0] == 404
            gateway.cluster.unreachable.add("store")
            registry = gateway.service.gateway.registry
            assert (await gateway.get("/v1/models/pirate"))[0] == 200
            # It may have been registered a moment ago, and the publication was lost.
            status, body = await gateway.get("/v1/models/unknown")
            assert (status, body["error"]["code"]) == (503, "no_store")
            assert "only known adapters" in body["error"]["message"]
            registry.revision = -1
            gateway.cluster.publishes_registry = False
            await asyncio.sleep(0.1)
            registry.revision = -1
            status, body = await gateway.get("/v1/models/unknown")
            assert (status, body["error"]["code"]) == (503, "no_store")

    asyncio.run(scenario())


def test_adapters_are_loaded_and_unloaded_like_in_vllm(start_gateway: Start) -> None:
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


def test_tokenize_and_detokenize(start_gateway: Start) -> None:
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


def test_health_names_what_is_missing(start_gateway: Start) -> None:
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


def test_metrics_have_the_names_of_vllm(start_gateway: Start) -> None:
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
            counts = [samples[f"loraserve_adapter_prefetched{of}_bytes_total", "engine-0", "plan"] for of in OUTCOMES]
            assert counts == [30, 20, 10]
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
            assert body["engines"][0]["load"]["memory"]["kv_blocks_free"] == 75
            assert body["engines"][0]["reads_from"] == {}
            assert body["plan_epoch"] == 3
            assert [adapter["name"] for adapter in body["registry"]["adapters"]] == ["me/x:1", "pirate"]
            _, plan = await gateway.get("/admin/plan")
            assert plan["placements"][0]["engine"] == "engine-0"
            _, done = await gateway.post("/admin/rebalance", {"dry_run": True})
            assert (done["applied"], done["message"]) == (False, "nothing")
            assert body["drained"] == []
            for how, drained in (("drain", ["engine-1"]), ("undrain", [])):
                status, done = await gateway.post(f"/admin/engines/engine-1/{how}", {})
                assert (status, done["plan"]["drained"]) == (200, drained)
                status, body = await gateway.post(f"/admin/engines/engine-9/{how}", {})
                assert (status, body["error"]["code"]) == (404, "engine_not_found")
                assert "engine-0, engine-1" in body["error"]["message"]
            gateway.cluster.unreachable.update(("planner", "engine-1"))
            _, body = await gateway.get("/admin/cluster")
            assert body["processes"]["planner"] == {"state": "UNREACHABLE"}
            assert body["plan_epoch"] is None
            assert (await gateway.get("/admin/plan"))[0] == 503

    asyncio.run(scenario())
