"""What must hold of the scheduler's requests after every event. Pure."""

from collections.abc import Set

from loraserve.engine.blocks import BlockManager
from loraserve.engine.pool import AdapterPool
from loraserve.engine.sequence import Sequence, State


def check_queues(
    waiting: list[Sequence], running: list[Sequence], known: Set[str], blocks: BlockManager, pool: AdapterPool
) -> None:
    """Both are in order and hold all that are known, and blocks and pins are held by those who run and nobody else."""
    live = waiting + running
    assert {s.request_id for s in live} == known, "a request is in no list or in two"
    assert len(live) == len(known), "a request is listed twice"
    for queue in (waiting, running):
        assert [s.order for s in queue] == sorted(s.order for s in queue), "a queue is out of order"
    assert all(s.state is State.WAITING and not s.blocks for s in waiting), "a waiting request holds blocks"
    assert not any(s.in_flight for s in waiting), "a waiting request is in a step"
    assert all(s.state in (State.RUNNING, State.LEAVING) for s in running), "a running request is in another state"
    assert blocks.held == sum(len(s.blocks) for s in running), "blocks are held by nobody"
    users: dict[str, int] = {}
    for sequence in running:
        users[sequence.version] = users.get(sequence.version, 0) + 1
    for entry in pool.entries():
        assert entry.running == users.get(entry.adapter.version, 0), f"{entry.adapter.name} has a stray pin"
