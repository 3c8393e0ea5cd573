"""The table of transports in /admin/cluster."""

import msgspec

from loraserve.gateway.api.admin import MAX_TABLE_ENGINES, usable_transports
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Abilities
from loraserve.testing.reports import engine_capabilities

HERE = Abilities(
    protocol=TRANSFER_PROTOCOL_VERSION, host="a", neighbourhood="n", transports=("shm", "tcp"), device="cpu"
)
THERE = msgspec.structs.replace(HERE, host="b")


def test_transports_of_each_pair_are_in_the_order_of_preference() -> None:
    loads = [
        engine_capabilities("engine-0", abilities=HERE),
        engine_capabilities("engine-1", abilities=HERE),
        engine_capabilities("engine-2", abilities=THERE),
        engine_capabilities("engine-3"),
    ]
    table = usable_transports(loads, ("shm", "tcp"))
    assert table["engine-0"] == {"engine-1": ["shm", "tcp"], "engine-2": ["tcp"]}
    assert table["engine-2"] == {"engine-0": ["tcp"], "engine-1": ["tcp"]}
    assert "engine-3" not in table
    assert usable_transports(loads, ("tcp",))["engine-0"]["engine-1"] == ["tcp"]


def test_there_is_no_table_for_very_many_engines() -> None:
    loads = [engine_capabilities(f"e{n}", abilities=HERE) for n in range(MAX_TABLE_ENGINES + 1)]
    assert usable_transports(loads, ("shm",)) == {}
