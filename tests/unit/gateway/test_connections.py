"""Which connections a stopping gateway closes."""

from loraserve.gateway.connections import IDLE_GRACE_S, Connections


def test_no_connection_is_closed_before_the_drain() -> None:
    connections = Connections()
    connections.begin("a")
    connections.end("a", 1.0)
    assert connections.closable(["a", "b"], 1e9) == []


def test_a_connection_is_closed_after_it_was_idle_for_the_grace_time() -> None:
    connections = Connections()
    connections.drain(10.0)
    assert connections.closable(["a"], 10.0 + IDLE_GRACE_S - 0.01) == []
    assert connections.closable(["a"], 10.0 + IDLE_GRACE_S) == ["a"]


def test_a_connection_with_requests_stays_open_and_its_idle_time_starts_at_their_end() -> None:
    connections = Connections()
    connections.begin("a")
    connections.begin("a")
    connections.drain(10.0)
    assert connections.requests == 2
    connections.end("a", 11.0)
    assert connections.closable(["a", "b"], 20.0) == ["b"]
    connections.end("a", 20.0)
    assert connections.requests == 0
    assert connections.closable(["a"], 20.0 + IDLE_GRACE_S - 0.01) == []
    assert connections.closable(["a"], 20.0 + IDLE_GRACE_S) == ["a"]
