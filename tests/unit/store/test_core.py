"""AdapterStore: names, paths, replacing and restarts."""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from loraserve.cost import extent_bytes
from loraserve.errors import AdapterError, LoraServeError
from loraserve.store.core import GRACE_S, AdapterStore, StoreLimits, allowed_directory, namespace
from loraserve.store.registry import AdapterRecord, AdapterRegistry
from loraserve.testing.peft_writer import TINY_SHAPE

LIMITS = StoreLimits(served_model="base", max_rank=64, engine_max_rank=64, pool_bytes=1 << 20)
OpenStore = Callable[..., AdapterStore]
AdapterDir = Callable[..., Path]


def _code(store: AdapterStore, name: str, path: Path | str, replace: bool = False) -> str:
    before = store.registry.snapshot
    with pytest.raises(AdapterError) as caught:
        store.register(name, str(path), replace, 1000.0)
    assert store.registry.snapshot == before
    return caught.value.code


def test_a_registration_survives_restarts(open_store: OpenStore, adapter_dir: AdapterDir) -> None:
    store = open_store()
    ref, created = store.register("org/a:1", str(adapter_dir()), False, 1000.0)
    assert created
    assert (ref.name, ref.rank) == ("org/a:1", 8)
    assert store.register("org/a:1", str(adapter_dir()), False, 1001.0) == (ref, False)
    revision = store.registry.snapshot.revision
    store = open_store()
    assert store.registry.snapshot.refs() == (ref,)
    assert store.registry.snapshot.revision == revision
    assert store.slabs.open(ref.version, 1000.0).slab_bytes == ref.slab_bytes
    assert store.missing_slabs() == []


def test_two_names_share_one_slab(open_store: OpenStore, adapter_dir: AdapterDir) -> None:
    store = open_store()
    first, _ = store.register("a", str(adapter_dir()), False, 0.0)
    second, created = store.register("b", str(adapter_dir()), False, 0.0)
    assert created
    assert first.version == second.version
    assert len(store.slabs.versions()) == 1
    store.unregister("a", 10.0)
    assert store.collect_garbage(10.0 + 2 * GRACE_S) == []
    store.unregister("b", 20.0)
    assert store.collect_garbage(20.0 + GRACE_S) == []
    assert store.collect_garbage(21.0 + GRACE_S) == [first.version]


def test_other_content_needs_replace_and_the_old_stays_for_the_grace(
    open_store: OpenStore, adapter_dir: AdapterDir
) -> None:
    store = open_store()
    old, _ = store.register("a", str(adapter_dir(0)), False, 0.0)
    assert _code(store, "a", adapter_dir(1)) == "duplicate"
    new, created = store.register("a", str(adapter_dir(1)), True, 5000.0)
    assert created
    assert new.version != old.version
    assert store.collect_garbage(5000.0 + GRACE_S) == []
    assert store.slabs.read(old.version, 0, 10, 5000.0)
    assert store.collect_garbage(5001.0 + GRACE_S) == [old.version]


def test_refusals_leave_nothing_behind(open_store: OpenStore, adapter_dir: AdapterDir, tmp_path: Path) -> None:
    store = open_store()
    assert _code(store, "base", adapter_dir()) == "bad_name"
    assert _code(store, "", adapter_dir()) == "bad_name"
    assert _code(store, "a", "relative/path") == "bad_format"
    assert _code(store, "a", "/nul\0byte") == "bad_format"
    assert _code(store, "a", tmp_path / "nowhere") == "not_found"
    assert _code(store, "a", "/" + "x" * 5000) == "not_found"
    assert _code(store, "a", adapter_dir(0, 65)) == "bad_rank"
    assert store.slabs.versions() == {}
    small = open_store(limits=msgspec.structs.replace(LIMITS, pool_bytes=10))
    assert _code(small, "a", adapter_dir()) == "too_large"
    assert small.slabs.versions() == {}


def test_an_adapter_that_no_engine_can_hold_is_refused(open_store: OpenStore, adapter_dir: AdapterDir) -> None:
    ref, _ = open_store().register("a", str(adapter_dir()), False, 0.0)
    extent = extent_bytes(ref.slab_bytes)
    assert ref.slab_bytes < extent, "a pool of the slab's bytes has no extent for it"
    for pool_bytes, fits in ((ref.slab_bytes, False), (extent - 1, False), (extent, True)):
        store = open_store(limits=msgspec.structs.replace(LIMITS, pool_bytes=pool_bytes))
        assert fits or _code(store, "b", adapter_dir()) == "too_large"
    assert store.register("b", str(adapter_dir()), False, 0.0)[1]
    store = open_store(limits=msgspec.structs.replace(LIMITS, engine_max_rank=7))
    with pytest.raises(AdapterError, match=r"rank 8, engine\.max_rank is 7; raise engine\.max_rank") as caught:
        store.register("c", str(adapter_dir()), False, 0.0)
    assert caught.value.code == "bad_rank"


def test_only_allowed_directories(tmp_path: Path, adapter_dir: AdapterDir) -> None:
    inside, outside = tmp_path / "in", adapter_dir()
    (inside / "real").mkdir(parents=True)
    (inside / "link").symlink_to(outside)
    (inside / "files").mkdir()
    (inside / "files" / "adapter_config.json").symlink_to(outside / "adapter_config.json")
    allowed = (str(inside),)
    assert allowed_directory(str(inside / "real"), allowed) == (inside / "real").resolve()
    assert allowed_directory(str(inside / "link"), ()) == outside.resolve()
    for path in (outside, inside / "link", inside / "files", inside / ".." / "elsewhere", tmp_path / "in2"):
        with pytest.raises(AdapterError, match=r"store\.allowed_dirs") as caught:
            allowed_directory(str(path), allowed)
        assert caught.value.code == "forbidden"


def test_a_link_loop_is_refused(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(AdapterError):
        allowed_directory(str(tmp_path / "loop" / "x"), (str(tmp_path),))


def test_missing_slabs_are_reported_and_restored_by_registering_again(
    open_store: OpenStore, adapter_dir: AdapterDir
) -> None:
    store = open_store()
    ref, _ = store.register("a", str(adapter_dir()), False, 0.0)
    next(store.folder.glob("slabs/*/*.slab")).unlink()
    store = open_store()
    assert store.missing_slabs() == ["a"]
    assert store.register("a", str(adapter_dir()), False, 0.0) == (ref, False)
    assert store.missing_slabs() == []
    next(store.folder.glob("slabs/*/*.slab")).unlink()
    store.unregister("a", 0.0)


def test_adapters_of_an_earlier_format_are_reported_until_registered_again(
    open_store: OpenStore, adapter_dir: AdapterDir
) -> None:
    store = open_store()
    assert store.outdated_adapters() == {}
    earlier = store.folder.parent / namespace(TINY_SHAPE, "bfloat16", slab_format=1)
    earlier.mkdir()
    registry = AdapterRegistry(earlier / "registry.sqlite", 0.0)
    for name in ("a", "b"):
        source = f"/adapters/{name}"
        registry.put(
            AdapterRecord(name=name, version="v", rank=8, slab_bytes=9, source=source, created_unix_s=0.0), False
        )
    assert store.outdated_adapters() == {"a": "/adapters/a", "b": "/adapters/b"}, "while its process runs"
    registry.close()
    store.register("a", str(adapter_dir()), False, 0.0)
    assert open_store().outdated_adapters() == {"b": "/adapters/b"}
    (earlier / "registry.sqlite").write_bytes(b"rubbish" * 999)
    assert open_store().outdated_adapters() == {}


def test_a_second_store_on_the_same_folder_is_refused(open_store: OpenStore, tmp_path: Path) -> None:
    open_store()
    with pytest.raises(LoraServeError, match=r"cluster\.data_dir"):
        AdapterStore(tmp_path / "data", TINY_SHAPE, "bfloat16", LIMITS, 0.0)


def test_a_folder_that_cannot_be_created_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraServeError, match=r"cluster\.data_dir"):
        AdapterStore(tmp_path / "file", TINY_SHAPE, "bfloat16", LIMITS, 0.0)


def test_other_shapes_dtypes_and_formats_have_other_folders() -> None:
    other = msgspec.structs.replace(TINY_SHAPE, layers=3)
    names = {namespace(shape, dtype) for shape in (TINY_SHAPE, other) for dtype in ("float32", "bfloat16")}
    names.add(namespace(TINY_SHAPE, "float32", slab_format=1))
    assert len(names) == 5
