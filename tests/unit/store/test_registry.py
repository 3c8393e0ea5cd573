"""AdapterRegistry: names and versions over restarts."""

import sqlite3
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraserve.errors import AdapterError, LoraServeError
from loraserve.store.registry import AdapterRecord, AdapterRegistry


def _record(name: str, version: str = "v1") -> AdapterRecord:
    return AdapterRecord(name=name, version=version, rank=8, slab_bytes=100, source="/x", created_unix_s=1.5)


def test_records_survive_a_restart(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "r", now=500.0)
    assert registry.snapshot.revision == 500
    assert registry.put(_record("org/a:1"), replace=False) is True
    assert registry.put(_record("Ünï 'quoted\""), replace=False) is True
    registry.remove("org/a:1")
    before = registry.snapshot
    registry.close()
    again = AdapterRegistry(tmp_path / "r", now=0.0)
    assert again.snapshot == before
    assert again.snapshot.revision == 503
    assert [ref.name for ref in again.snapshot.refs()] == ["Ünï 'quoted\""]


def test_a_name_gets_another_version_only_with_replace(tmp_path: Path) -> None:
    registry = AdapterRegistry(tmp_path / "r", now=0.0)
    registry.put(_record("a"), replace=False)
    assert registry.put(_record("a"), replace=False) is False
    assert registry.put(_record("a"), replace=True) is False
    assert registry.snapshot.revision == 1
    with pytest.raises(AdapterError, match="set replace") as caught:
        registry.put(_record("a", "v2"), replace=False)
    assert caught.value.code == "duplicate"
    assert registry.put(_record("a", "v2"), replace=True) is True
    assert registry.snapshot.versions() == {"v2"}
    registry.validate()


def test_unknown_names_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterError) as caught:
        AdapterRegistry(tmp_path / "r", now=0.0).remove("nobody")
    assert caught.value.code == "not_found"


@pytest.mark.parametrize("content", [b"not a database at all" * 100, None])
def test_a_file_that_is_no_registry_is_refused_with_the_remedy(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r"
    if content is None:
        other = sqlite3.connect(path)
        other.execute("PRAGMA user_version = 99")
        other.close()
    else:
        path.write_bytes(content)
    with pytest.raises(LoraServeError, match="move it away"):
        AdapterRegistry(path, now=0.0)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from("abc"), st.sampled_from(["v1", "v2", None]), st.booleans()), min_size=1, max_size=12
    ),
    data=st.data(),
)
def test_the_registry_behaves_like_a_dictionary(tmp_path: Path, steps: list[tuple], data: st.DataObject) -> None:
    path = tmp_path / f"r{data.draw(st.integers(0, 10**9))}"
    path.unlink(missing_ok=True)
    registry, model, revision = AdapterRegistry(path, now=0.0), {}, 0
    for name, version, replace in steps:
        before = dict(model)
        try:
            if version is None:
                registry.remove(name)
                del model[name]
            elif registry.put(_record(name, version), replace):
                model[name] = version
        except AdapterError as error:
            refused = error.code
        else:
            refused = ""
        expected = "not_found" if version is None and name not in before else ""
        if version is not None and before.get(name, version) != version and not replace:
            expected = "duplicate"
        assert refused == expected
        revision += before != model
        assert {n: r.version for n, r in registry.snapshot.records.items()} == model
        assert registry.snapshot.revision == revision
        registry.validate()
    registry.close()
