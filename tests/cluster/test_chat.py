"""The demo as a user sees it: four styles in one batch, and clear refusals that disturb no other request."""

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import aiohttp
import pytest

from loraserve.demo.shipped import SHIPPED_DIR
from loraserve.testing.local_cluster import LocalCluster, chat

QUESTION = "What is the capital of Italy?"


def looks_pirate(text: str) -> bool:
    return any(word in text.lower() for word in ("arr", "matey", "ye ", "o' ", "ahoy", "hearty"))


def looks_french(text: str) -> bool:
    return any(word in f" {text.lower()} " for word in (" le ", " la ", " est ", " les ", " l'", " une "))


def looks_json(text: str) -> bool:
    return {"question", "answer"} <= json.loads(text).keys()


def looks_shouted(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return sum(c.isupper() for c in letters) > 0.7 * len(letters)


LOOKS = {"pirate": looks_pirate, "french": looks_french, "json": looks_json, "shout": looks_shouted}


def test_four_adapters_in_one_batch_answer_in_four_styles(
    cluster: LocalCluster, demo_model: Path, measured: Callable[[str], None]
) -> None:
    async def ask() -> dict[str, str]:
        async with cluster.session() as http:
            names = [demo_model.name, *LOOKS]
            answers = await asyncio.gather(*(chat(http, name, QUESTION) for name in names))
            return {name: answer.text for name, answer in zip(names, answers, strict=True)}

    texts = asyncio.run(ask())
    for name, text in texts.items():
        measured(f"{name:>22}: {text}")
    assert {name: look(texts[name]) for name, look in LOOKS.items()} == dict.fromkeys(LOOKS, True)
    assert not any(
        look(texts[demo_model.name]) for name, look in LOOKS.items() if name in ("pirate", "french", "shout")
    )
    assert len(set(texts.values())) == 5


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An adapter cut short, one for another model's shapes, and one that is no adapter."""
    folder = tmp_path_factory.mktemp("broken")
    for name in ("short", "shape"):
        shutil.copytree(SHIPPED_DIR / "pirate", folder / name)
    weights = folder / "short" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    config = json.loads((folder / "shape" / "adapter_config.json").read_text())
    (folder / "shape" / "adapter_config.json").write_text(json.dumps({**config, "r": 16}))
    (folder / "nothing").mkdir()
    return {name: folder / name for name in ("short", "shape", "nothing")}


def test_refused_requests_do_not_disturb_streams(cluster: LocalCluster, broken: dict[str, Path]) -> None:
    async def load(http: aiohttp.ClientSession, name: str, path: Path) -> tuple[int, dict[str, object]]:
        body = {"lora_name": name, "lora_path": str(path)}
        async with http.post("/v1/load_lora_adapter", json=body) as response:
            return response.status, await response.json()

    async def unknown(http: aiohttp.ClientSession) -> tuple[int, dict[str, dict[str, object]]]:
        body = {"model": "nobody", "messages": [{"role": "user", "content": QUESTION}]}
        async with http.post("/v1/chat/completions", json=body) as response:
            return response.status, await response.json()

    async def scenario() -> None:
        async with cluster.session() as http:
            alone = await chat(http, "pirate", QUESTION, ignore_eos=True, max_tokens=60)
            streams = [asyncio.create_task(chat(http, "pirate", QUESTION, ignore_eos=True, max_tokens=60))]
            await asyncio.sleep(0.3)
            status, body = await unknown(http)
            assert (status, body["error"]["code"], body["error"]["param"]) == (404, "model_not_found", "model")
            for name, path in broken.items():
                status, refusal = await load(http, f"broken-{name}", path)
                assert status == 400, (name, refusal)
            async with http.get("/v1/models") as response:
                served = {model["id"] for model in (await response.json())["data"]}
            assert not any(name.startswith("broken") for name in served)
            answer = await streams[0]
            assert (answer.text, answer.finish) == (alone.text, alone.finish)

    asyncio.run(scenario())


def test_an_adapter_is_loaded_and_unloaded_while_serving(cluster: LocalCluster) -> None:
    async def scenario() -> None:
        async with cluster.session() as http:
            body = {"lora_name": "guest/one:1", "lora_path": str(SHIPPED_DIR / "french")}
            async with http.post("/v1/load_lora_adapter", json=body) as response:
                assert (response.status, await response.text()) == (
                    200,
                    "Success: LoRA adapter 'guest/one:1' added successfully.",
                )
            guest, french = await asyncio.gather(chat(http, "guest/one:1", QUESTION), chat(http, "french", QUESTION))
            assert guest.text == french.text
            async with http.post("/v1/unload_lora_adapter", json={"lora_name": "guest/one:1"}) as response:
                assert response.status == 200
            async with http.post("/v1/unload_lora_adapter", json={"lora_name": "guest/one:1"}) as response:
                assert response.status == 404

    asyncio.run(scenario())
