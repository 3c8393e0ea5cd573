"""The choice of transports between two processes."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.config import TransferConfig, load_config
from loraserve.errors import ConfigError
from loraserve.messages.transfer import TRANSFER_PROTOCOL_VERSION, Abilities
from loraserve.transfer.abilities import local_abilities
from loraserve.transfer.protocol import choose_transports
from loraserve.transfer.verbs.device import unusable_reason

ALL = TransferConfig().transports
HERE = Abilities(protocol=TRANSFER_PROTOCOL_VERSION, host="boot-1", neighbourhood="n", transports=ALL, device="cuda")
ELSEWHERE = msgspec.structs.replace(HERE, host="boot-2")

anyone = st.builds(
    Abilities,
    protocol=st.sampled_from([TRANSFER_PROTOCOL_VERSION, TRANSFER_PROTOCOL_VERSION + 1]),
    host=st.sampled_from(["", "boot-1", "boot-2"]),
    neighbourhood=st.sampled_from(["", "n", "m"]),
    transports=st.lists(st.sampled_from([*ALL, "pigeon"])).map(tuple),
    device=st.sampled_from(["cpu", "cuda"]),
)
preferences = st.lists(st.sampled_from(ALL), unique=True)


def test_processes_of_one_machine_use_local_transports_and_others_the_network() -> None:
    assert choose_transports(HERE, HERE, ALL) == ("cuda_ipc", "shm", "verbs", "tcp")
    assert choose_transports(HERE, ELSEWHERE, ALL) == ("verbs", "tcp")


def test_a_gpu_s_memory_is_mapped_by_gpus_alone() -> None:
    on_cpu = msgspec.structs.replace(HERE, device="cpu")
    assert choose_transports(on_cpu, HERE, ALL) == choose_transports(HERE, on_cpu, ALL) == ("shm", "verbs", "tcp")


@pytest.mark.parametrize("field", ["host", "neighbourhood"])
def test_processes_with_unknown_locations_use_the_network(field: str) -> None:
    lost = msgspec.structs.replace(HERE, **{field: ""})
    assert choose_transports(lost, lost, ALL) == ("verbs", "tcp")


def test_different_protocols_have_no_common_transport() -> None:
    newer = msgspec.structs.replace(HERE, protocol=TRANSFER_PROTOCOL_VERSION + 1)
    assert (
        choose_transports(HERE, newer, ALL)
        == choose_transports(newer, HERE, ALL)
        == choose_transports(newer, newer, ALL)
        == ()
    )


@given(anyone, anyone, preferences)
def test_both_sides_choose_the_same_transports_in_the_configured_order(
    mine: Abilities, theirs: Abilities, preferred: list[str]
) -> None:
    chosen = choose_transports(mine, theirs, preferred)  # type: ignore[arg-type]
    assert chosen == choose_transports(theirs, mine, preferred)  # type: ignore[arg-type]
    assert list(chosen) == [each for each in preferred if each in chosen]
    assert set(chosen) <= set(mine.transports) & set(theirs.transports)


def test_this_process_is_its_own_neighbour() -> None:
    mine = local_abilities(("shm", "tcp"), "cpu")
    assert choose_transports(mine, mine, ALL) == ("shm", "tcp")


def test_verbs_is_announced_only_with_an_rdma_device() -> None:
    announced = local_abilities(ALL, "cpu").transports
    assert ("verbs" in announced) == (not unusable_reason())
    without = msgspec.structs.replace(ELSEWHERE, transports=("shm", "tcp"))
    assert choose_transports(HERE, without, ALL) == choose_transports(without, HERE, ALL) == ("tcp",)


def test_the_configuration_orders_and_leaves_out_transports() -> None:
    config = load_config(environ={"LORASERVE_TRANSFER__TRANSPORTS": '["tcp", "shm"]'})
    assert choose_transports(HERE, HERE, config.transfer.transports) == ("tcp", "shm")
    with pytest.raises(ConfigError, match=r"'pigeon'.*transfer\.transports"):
        load_config(environ={}, overrides=['transfer.transports=["pigeon"]'])
