"""Which transports carry bytes between two processes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.config import TransferConfig, load_config
from loraserve.errors import ConfigError
from loraserve.transfer.choice import Abilities, choose
from loraserve.transfer.here import abilities
from loraserve.transfer.protocol import PROTOCOL
from loraserve.transfer.verbs_ports import why_not

ALL = TransferConfig().transports
HERE = Abilities(protocol=PROTOCOL, host="boot-1", neighbourhood="n", transports=ALL, device="cuda")
ELSEWHERE = msgspec.structs.replace(HERE, host="boot-2")

anyone = st.builds(
    Abilities,
    protocol=st.sampled_from([PROTOCOL, PROTOCOL + 1]),
    host=st.sampled_from(["", "boot-1", "boot-2"]),
    neighbourhood=st.sampled_from(["", "n", "m"]),
    transports=st.lists(st.sampled_from([*ALL, "pigeon"])).map(tuple),
    device=st.sampled_from(["cpu", "cuda"]),
)
preferences = st.lists(st.sampled_from(ALL), unique=True)


def test_neighbours_use_what_is_nearest_and_others_the_network() -> None:
    assert choose(HERE, HERE, ALL) == ("cuda_ipc", "shm", "verbs", "tcp")
    assert choose(HERE, ELSEWHERE, ALL) == ("verbs", "tcp")


def test_a_gpu_s_memory_is_mapped_by_gpus_alone() -> None:
    on_cpu = msgspec.structs.replace(HERE, device="cpu")
    assert choose(on_cpu, HERE, ALL) == choose(HERE, on_cpu, ALL) == ("shm", "verbs", "tcp")


@pytest.mark.parametrize("field", ["host", "neighbourhood"])
def test_where_a_process_is_may_be_unknown_and_then_it_has_no_neighbours(field: str) -> None:
    lost = msgspec.structs.replace(HERE, **{field: ""})
    assert choose(lost, lost, ALL) == ("verbs", "tcp")


def test_another_protocol_leaves_no_transport() -> None:
    newer = msgspec.structs.replace(HERE, protocol=PROTOCOL + 1)
    assert choose(HERE, newer, ALL) == choose(newer, HERE, ALL) == choose(newer, newer, ALL) == ()


@given(anyone, anyone, preferences)
def test_both_sides_choose_the_same_of_what_both_offer_in_the_configured_order(
    mine: Abilities, theirs: Abilities, preferred: list[str]
) -> None:
    chosen = choose(mine, theirs, preferred)  # type: ignore[arg-type]
    assert chosen == choose(theirs, mine, preferred)  # type: ignore[arg-type]
    assert list(chosen) == [each for each in preferred if each in chosen]
    assert set(chosen) <= set(mine.transports) & set(theirs.transports)


def test_this_process_is_its_own_neighbour() -> None:
    mine = abilities(("shm", "tcp"), "cpu")
    assert choose(mine, mine, ALL) == ("shm", "tcp")


def test_verbs_is_announced_only_where_there_is_a_device_for_it() -> None:
    announced = abilities(ALL, "cpu").transports
    assert ("verbs" in announced) == (not why_not())
    without = msgspec.structs.replace(ELSEWHERE, transports=("shm", "tcp"))
    assert choose(HERE, without, ALL) == choose(without, HERE, ALL) == ("tcp",)


def test_the_configuration_orders_and_leaves_out_transports() -> None:
    config = load_config(environ={"LORASERVE_TRANSFER__TRANSPORTS": '["tcp", "shm"]'})
    assert choose(HERE, HERE, config.transfer.transports) == ("tcp", "shm")
    with pytest.raises(ConfigError, match=r"'pigeon'.*transfer\.transports"):
        load_config(environ={}, overrides=['transfer.transports=["pigeon"]'])
