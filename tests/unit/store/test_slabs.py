"""SlabFiles: addressed by content, complete or absent, verified before use."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.adapter.format import decode_header, seal_layout, slab_version
from loraserve.adapter.pack import Slab
from loraserve.config import MAX_SLAB_READ_BYTES
from loraserve.errors import AdapterError
from loraserve.store.slabs import DATA_ALIGN_BYTES, SlabFiles, removable

MakeSlab = Callable[..., Slab]


def _file(root: Path, version: str) -> Path:
    return root / "slabs" / version[:2] / f"{version}.slab"


def test_a_stored_slab_reads_back_unchanged(tmp_path: Path, make_slab: MakeSlab) -> None:
    slab = make_slab()
    assert SlabFiles(tmp_path).put(slab, now=1.0) is True
    slabs = SlabFiles(tmp_path)
    opened = slabs.open(slab.version, now=2.0)
    data = slabs.read(slab.version, 0, opened.slab_bytes, now=2.0)
    assert decode_header(opened.header) == slab.header
    assert data == bytes(slab.data)
    assert slab_version(seal_layout(decode_header(opened.header), data)) == slab.version
    assert opened.data_begin % DATA_ALIGN_BYTES == 0


def test_the_same_content_is_stored_once(tmp_path: Path, make_slab: MakeSlab) -> None:
    slabs = SlabFiles(tmp_path)
    assert slabs.put(make_slab(), now=1.0) is True
    assert slabs.put(make_slab(), now=2.0) is False
    assert slabs.put(make_slab(seed=1), now=3.0) is True
    assert sorted(slabs.versions().values()) == [2.0, 3.0]


def test_reads_stay_inside_the_slab(tmp_path: Path, make_slab: MakeSlab) -> None:
    slabs, slab = SlabFiles(tmp_path), make_slab()
    slabs.put(slab, now=1.0)
    size = slab.header.slab_bytes
    assert slabs.read(slab.version, 10, 7, 1.0) == bytes(slab.data[10:17])
    assert slabs.read(slab.version, size - 1, 1, 1.0) == bytes(slab.data[-1:])
    for offset, length in (
        (0, 0),
        (0, -1),
        (-1, 1),
        (0, size + 1),
        (size, 1),
        (0, MAX_SLAB_READ_BYTES + 1),
        (2**63, 1),
    ):
        with pytest.raises(AdapterError) as caught:
            slabs.read(slab.version, offset, length, 1.0)
        assert caught.value.code == "bad_range"


@pytest.mark.parametrize("version", ["", "0" * 64, "../../etc/passwd", "a/../" + "0" * 59, "F" * 64, "0" * 63 + "\n"])
def test_unknown_versions_are_not_found(tmp_path: Path, version: str) -> None:
    slabs = SlabFiles(tmp_path)
    for ask in (lambda: slabs.open(version, 1.0), lambda: slabs.read(version, 0, 1, 1.0)):
        with pytest.raises(AdapterError, match="register the adapter again") as caught:
            ask()
        assert caught.value.code == "not_found"


def _flip(data: bytearray, at: int) -> bytearray:
    data[at] ^= 1
    return data


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:5],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: _flip(data, 0),
        lambda data: _flip(data, 10),
        lambda data: _flip(data, 40),
        lambda data: b"LORASLB1" + data[8:],
        lambda data: _flip(data, DATA_ALIGN_BYTES),
        lambda data: _flip(data, (DATA_ALIGN_BYTES + len(data)) // 2),
        lambda data: _flip(data, len(data) - 1),
    ],
    ids=[
        "short",
        "long",
        "prefix",
        "header",
        "empty",
        "magic",
        "length",
        "in-header",
        "first-format",
        "first-byte",
        "middle-byte",
        "last-byte",
    ],
)
def test_a_damaged_file_is_set_aside_and_can_be_stored_again(
    tmp_path: Path, make_slab: MakeSlab, damage: Callable[[bytearray], bytes]
) -> None:
    slab = make_slab()
    SlabFiles(tmp_path).put(slab, now=1.0)
    path = _file(tmp_path, slab.version)
    path.write_bytes(damage(bytearray(path.read_bytes())))
    slabs = SlabFiles(tmp_path)
    with pytest.raises(AdapterError, match="register the adapter again") as caught:
        slabs.open(slab.version, 1.0)
    assert caught.value.code == "corrupt"
    assert path.with_suffix(".corrupt").exists()
    with pytest.raises(AdapterError) as caught:
        slabs.read(slab.version, 0, 1, 1.0)
    assert caught.value.code == "not_found"
    assert slabs.put(slab, now=2.0) is True
    assert slabs.read(slab.version, 0, 9, 2.0) == bytes(slab.data[:9])


def test_storing_again_repairs_a_slab_damaged_after_verification(tmp_path: Path, make_slab: MakeSlab) -> None:
    slabs, slab = SlabFiles(tmp_path), make_slab()
    slabs.put(slab, now=1.0)
    path = _file(tmp_path, slab.version)
    path.write_bytes(_flip(bytearray(path.read_bytes()), -1))
    assert slabs.put(slab, now=2.0) is True
    slabs.verify(slab.version)


def test_a_file_truncated_while_open_is_detected(tmp_path: Path, make_slab: MakeSlab) -> None:
    slabs, slab = SlabFiles(tmp_path), make_slab()
    slabs.put(slab, now=1.0)
    with _file(tmp_path, slab.version).open("r+b") as file:
        file.truncate(DATA_ALIGN_BYTES + 10)
    with pytest.raises(AdapterError) as caught:
        slabs.read(slab.version, 0, 20, 1.0)
    assert caught.value.code == "corrupt"


def test_temporary_files_of_a_crash_are_removed_at_start(tmp_path: Path) -> None:
    SlabFiles(tmp_path)
    (tmp_path / "tmp" / "half.0").write_bytes(b"x")
    SlabFiles(tmp_path)
    assert list((tmp_path / "tmp").iterdir()) == []


def test_only_old_unreferenced_slabs_are_removed(tmp_path: Path, make_slab: MakeSlab) -> None:
    slabs = SlabFiles(tmp_path)
    kept, old, young = (make_slab(seed) for seed in range(3))
    for slab, now in ((kept, 0.0), (old, 0.0), (young, 950.0)):
        slabs.put(slab, now)
    assert slabs.remove_unreferenced({kept.version}, now=1000.0, grace_s=100.0) == [old.version]
    assert slabs.versions().keys() == {kept.version, young.version}
    with pytest.raises(AdapterError):
        slabs.open(old.version, 1000.0)
    slabs.open(young.version, 1100.0)
    assert slabs.remove_unreferenced({kept.version}, now=1150.0, grace_s=100.0) == []


def test_concurrent_removal_never_deletes_a_slab_that_was_just_stored(tmp_path: Path, make_slab: MakeSlab) -> None:
    """Each slab was just stored, so a removal with a short grace period must never delete it."""
    slabs, slab = SlabFiles(tmp_path), make_slab()
    stop = threading.Event()
    now = [0.0]

    def collect() -> None:
        while not stop.is_set():
            slabs.remove_unreferenced((), now[0], grace_s=5.0)

    collector = threading.Thread(target=collect)
    collector.start()
    try:
        for _ in range(150):
            now[0] += 10.0
            slabs.put(slab, now[0])
            assert slabs.verify(slab.version).slab_bytes == slab.header.slab_bytes
    finally:
        stop.set()
        collector.join()


@given(
    used=st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 100)),
    referenced=st.sets(st.sampled_from("abcdef")),
    now=st.integers(0, 200),
    grace=st.integers(0, 100),
)
def test_only_old_unreferenced_files_are_removable(
    used: dict[str, float], referenced: set[str], now: int, grace: int
) -> None:
    gone = set(removable(used, referenced, now, grace))
    assert not gone & referenced
    for version in used.keys() - referenced:
        assert (version in gone) == (used[version] < now - grace)
