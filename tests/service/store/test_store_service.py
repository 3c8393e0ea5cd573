"""The store service: registrations, refusals, reads of slabs and publications."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from loraserve.adapter.format import decode_header
from loraserve.clock import SystemClock
from loraserve.config import Config
from loraserve.errors import ConfigError, PeerError
from loraserve.messages import (
    AdapterList,
    AdapterUnregistered,
    ListAdapters,
    OpenSlab,
    ReadSlab,
    SlabChunk,
    SlabInfo,
    UnregisterAdapter,
)
from loraserve.store.core import namespace
from loraserve.store.service import StoreService
from loraserve.testing.memory_bus import MemoryNetwork
from loraserve.testing.peft_writer import write_peft

Opened = Callable[..., AbstractAsyncContextManager[Any]]
Peft = Callable[..., Path]


async def refusal(asking: Any) -> PeerError:
    with pytest.raises(PeerError) as refused:
        await asking
    return refused.value


def test_a_registered_adapter_is_listed_published_and_readable(opened: Opened, peft: Peft) -> None:
    async def main() -> None:
        async with opened() as stage:
            before = (await stage.ask(ListAdapters(), AdapterList)).revision
            answer = await stage.register("org/a:1", peft(rank=8))
            assert (answer.created, answer.adapter.name, answer.adapter.rank) == (True, "org/a:1", 8)
            listed = await stage.ask(ListAdapters(), AdapterList)
            assert listed.adapters == (answer.adapter,)
            assert (stage.news[-1].revision, stage.news[-1].adapters) == (listed.revision, listed.adapters)
            assert listed.revision > before
            header, slab = await stage.fetch(answer.adapter, chunk_bytes=10_007)
            assert decode_header(header).slab_bytes == answer.adapter.slab_bytes == len(slab)
            assert await stage.is_whole(answer.adapter)

    asyncio.run(main())


def test_equal_content_changes_nothing_and_other_content_needs_replace(opened: Opened, peft: Peft) -> None:
    async def main() -> None:
        async with opened() as stage:
            first = await stage.register("a", peft(0))
            again = await stage.register("a", peft(0))
            assert (again.created, again.adapter) == (False, first.adapter)
            error = await refusal(stage.register("a", peft(1)))
            assert error.code == "duplicate"
            assert "unregister it, choose another name or set replace" in error.message
            assert await stage.names() == {"a": first.adapter.version}
            other = await stage.register("a", peft(1), replace=True)
            assert await stage.names() == {"a": other.adapter.version}
            assert await stage.is_whole(first.adapter), "engines may still be fetching it"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "path", "code", "texts"),
    [
        ("base", "peft-0-8", "bad_name", ["adapter name 'base'", "choose another"]),
        (" a", "peft-0-8", "bad_name", ["without blanks at its ends"]),
        ("a", "nowhere", "not_found", ["nowhere does not exist where the store runs", "name a PEFT directory"]),
        ("a", "../outside", "forbidden", ["is not under store.allowed_dirs"]),
        ("a", "peft-0-20", "bad_rank", ["has rank 20", "store.max_rank = 16"]),
        ("a", "empty", "not_found", ["adapter_config.json"]),
        ("a", "nan", "not_finite", ["layers.0.self_attn.q_proj.lora_A.weight", "train the adapter again"]),
        ("a", "other-model", "bad_shape", ["q_proj.lora_A.weight has shape [8, 5]", "input width 128"]),
    ],
)
def test_a_refusal_names_the_field_and_the_remedy(
    opened: Opened, peft: Peft, tmp_path: Path, name: str, path: str, code: str, texts: list[str]
) -> None:
    peft(0, 8)
    peft(0, 20)
    (tmp_path / "empty").mkdir()
    a, b = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format, np.ones((128, 8), dtype="f4")
    write_peft(tmp_path / "nan", {a("A"): np.full((8, 128), np.nan, dtype="f4"), a("B"): b})
    write_peft(tmp_path / "other-model", {a("A"): np.ones((8, 5), dtype="f4"), a("B"): b})

    async def main() -> None:
        async with opened(max_rank=16, allowed_dirs=(str(tmp_path),)) as stage:
            before = await stage.ask(ListAdapters(), AdapterList)
            error = await refusal(stage.register(name, tmp_path / path))
            assert error.code == code
            for text in texts:
                assert text in error.message
            assert await stage.ask(ListAdapters(), AdapterList) == before
            assert (await stage.register("good", tmp_path / "peft-0-8")).created, "it serves on"

    asyncio.run(main())


def test_an_adapter_larger_than_every_pool_is_refused(opened: Opened, peft: Peft) -> None:
    async def main() -> None:
        async with opened() as stage:
            error = await refusal(stage.register("a", peft(rank=200)))
            assert error.code == "too_large"
            assert "raise engine.pool_bytes or train with a smaller rank" in error.message

    asyncio.run(main())


def test_reads_outside_of_a_slab_are_refused(opened: Opened, peft: Peft) -> None:
    async def main() -> None:
        async with opened() as stage:
            ref = (await stage.register("a", peft())).adapter
            for offset, length in ((0, 0), (-1, 2), (ref.slab_bytes, 1), (0, ref.slab_bytes + 1), (0, 1 << 60)):
                message = ReadSlab(version=ref.version, offset_bytes=offset, length_bytes=length)
                error = await refusal(stage.ask(message, SlabChunk))
                assert (error.code, f"offset_bytes {offset}" in error.message) == ("bad_range", True)

    asyncio.run(main())


@pytest.mark.parametrize("version", ["0" * 64, "", "../../registry.sqlite"])
def test_an_unknown_version_is_not_found(opened: Opened, version: str) -> None:
    async def main() -> None:
        async with opened() as stage:
            for message, kind in (
                (OpenSlab(version=version), SlabInfo),
                (ReadSlab(version=version, offset_bytes=0, length_bytes=1), SlabChunk),
            ):
                error = await refusal(stage.ask(message, kind))
                assert error.code == "not_found"
                assert "register the adapter again" in error.message

    asyncio.run(main())


def test_a_slab_stays_readable_after_its_name_is_unregistered(opened: Opened, peft: Peft) -> None:
    async def main() -> None:
        async with opened() as stage:
            ref = (await stage.register("a", peft())).adapter
            assert (await stage.ask(UnregisterAdapter(name="a"), AdapterUnregistered)).name == "a"
            assert await stage.names() == {}
            assert stage.news[-1].adapters == ()
            assert await stage.is_whole(ref)
            error = await refusal(stage.ask(UnregisterAdapter(name="a"), AdapterUnregistered))
            assert (error.code, "list the adapters to see the names" in error.message) == ("not_found", True)

    asyncio.run(main())


def test_concurrent_registrations_are_all_answered(opened: Opened, peft: Peft) -> None:
    paths = [peft(seed) for seed in range(3)]

    async def main() -> None:
        async with opened() as stage:
            asked = [stage.register(f"own-{i}", paths[i % 3]) for i in range(9)]
            asked += [stage.register("shared", path, replace=True) for path in paths]
            answers = await asyncio.gather(*asked)
            names = await stage.names()
            assert names.keys() == {"shared", *(f"own-{i}" for i in range(9))}
            assert names["shared"] in {answer.adapter.version for answer in answers[9:]}
            assert all([await stage.is_whole(answer.adapter) for answer in answers])
            revisions = [news.revision for news in stage.news]
            assert revisions == sorted(revisions), "news never go back"

    asyncio.run(main())


def test_the_registry_is_published_periodically_for_late_subscribers(opened: Opened, peft: Peft) -> None:
    async def main() -> None:
        async with opened(publish_interval_s=0.02) as stage:
            ref = (await stage.register("a", peft())).adapter
            stage.news.clear()
            async with asyncio.timeout(10):
                while len(stage.news) < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert {news.adapters for news in stage.news} == {(ref,)}
            assert len({news.revision for news in stage.news}) == 1

    asyncio.run(main())


def test_a_restart_keeps_all_adapters(opened: Opened, peft: Peft) -> None:
    async def main() -> None:
        async with opened() as stage:
            ref = (await stage.register("a", peft())).adapter
            before = await stage.ask(ListAdapters(), AdapterList)
        async with opened() as stage:
            assert await stage.ask(ListAdapters(), AdapterList) == before
            assert await stage.is_whole(ref)

    asyncio.run(main())


def test_configured_adapters_are_registered_at_start_except_refused_ones(opened: Opened, peft: Peft) -> None:
    async def main() -> None:
        async with opened(adapters={"a": str(peft(0)), "broken": "/nowhere"}) as stage:
            first = await stage.names()
            assert first.keys() == {"a"}
        async with opened(adapters={"a": str(peft(1))}) as stage:
            assert (await stage.names())["a"] != first["a"], "what the configuration says now counts"

    asyncio.run(main())


def test_a_slab_damaged_on_disk_is_never_served_and_can_be_registered_again(
    opened: Opened, peft: Peft, tmp_path: Path, helpers: SimpleNamespace
) -> None:
    async def main() -> None:
        async with opened() as stage:
            ref = (await stage.register("a", peft())).adapter
        (file,) = helpers.store_folder(tmp_path).glob("slabs/*/*.slab")
        data = bytearray(file.read_bytes())
        data[-100] ^= 4
        file.write_bytes(data)
        async with opened() as stage:
            error = await refusal(stage.fetch(ref))
            assert error.code == "corrupt"
            assert "register the adapter again" in error.message
            assert (await refusal(stage.fetch(ref))).code == "not_found"
            assert (await stage.register("a", peft())).adapter == ref
            assert await stage.is_whole(ref)

    asyncio.run(main())


def test_adapters_of_an_earlier_format_are_named_at_start_with_the_remedy(
    opened: Opened, peft: Peft, tmp_path: Path, helpers: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    async def main() -> None:
        async with opened() as stage:
            await stage.register("a", peft(0))
            await stage.register("b", peft(1))
        folder = helpers.store_folder(tmp_path)
        folder.rename(folder.parent / namespace(helpers.shape, "bfloat16", slab_format=1))
        async with opened(adapters={"a": str(peft(0))}) as stage:
            assert (await stage.names()).keys() == {"a"}

    asyncio.run(main())
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "slab_outdated" in line]
    for text in ("adapter=b", f"packed_from={peft(1)}", "has an earlier format; register the adapter again"):
        assert text in told


def test_a_store_that_cannot_be_used_does_not_start(opened: Opened, tmp_path: Path, helpers: SimpleNamespace) -> None:
    async def fails(config: Config, text: str) -> None:
        store = StoreService(config, MemoryNetwork().bus("store", StoreService.inbox), SystemClock())
        with pytest.raises(ConfigError, match=text):
            await store.run()

    async def main() -> None:
        await fails(Config(), r"model\.path is empty")
        async with opened():
            await fails(helpers.store_config(tmp_path), r"in use by another store.*cluster\.data_dir")

    asyncio.run(main())


def test_the_model_cannot_take_the_name_of_a_registered_adapter(
    opened: Opened, peft: Peft, tmp_path: Path, helpers: SimpleNamespace
) -> None:
    async def main() -> None:
        async with opened() as stage:
            await stage.register("french", peft())
        config = helpers.store_config(tmp_path)
        renamed = msgspec.structs.replace(config, model=msgspec.structs.replace(config.model, name="french"))
        store = StoreService(renamed, MemoryNetwork().bus("store", StoreService.inbox), SystemClock())
        with pytest.raises(ConfigError, match=r"model\.name 'french' is the name of a registered adapter.*--name"):
            await asyncio.wait_for(store.run(), 10)
        async with opened() as stage:
            assert (await stage.names()).keys() == {"french"}, "the folder is free again and nothing was lost"

    asyncio.run(main())
