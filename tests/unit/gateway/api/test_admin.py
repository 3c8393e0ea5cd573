"""What /admin/cluster says of who reads from whom over what."""

import msgspec

from loraserve.gateway.api.admin import MAX_TABLE_ENGINES, usable_transports
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Abilities
from loraserve.testing.reports import engine_load

HERE = Abilities(
    protocol=TRANSFER_PROTOCOL_VERSION, host="a", neighbourhood="n", transports=("shm", "tcp"), device="cpu"
)
THERE = msgspec.structs.replace(HERE, host="b")


def test_pairs_are_told_with_their_first_choice_first() -> None:
    loads = [
        engine_load("engine-0", abilities=HERE),
        engine_load("engine-1", abilities=HERE),
        engine_load("engine-2", abilities=THERE),
        engine_load("engine-3"),
    ]
    told = usable_transports(loads, ("shm", "tcp"))
    assert told["engine-0"] == {"engine-1": ["shm", "tcp"], "engine-2": ["tcp"]}
    assert told["engine-2"] == {"engine-0": ["tcp"], "engine-1": ["tcp"]}
    assert "engine-3" not in told
    assert usable_transports(loads, ("tcp",))["engine-0"]["engine-1"] == ["tcp"]


def test_of_very_many_no_table_is_made() -> None:
    assert (
        usable_transports([engine_load(f"e{n}", abilities=HERE) for n in range(MAX_TABLE_ENGINES + 1)], ("shm",)) == {}
    )
