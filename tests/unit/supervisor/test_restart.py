"""Decisions about restarts."""

from loraserve.supervisor.restart import (
    CONFIG_ERROR_EXIT,
    LONGEST_DELAY_S,
    STABLE_RUN_S,
    Restart,
    RestartHistory,
    StopCluster,
)


def test_delays_double_up_to_a_limit() -> None:
    history = RestartHistory("engine-0")
    delays = [history.on_exit(-9, ran_s=1.0, cluster_ready=True) for _ in range(8)]
    assert all(isinstance(d, Restart) for d in delays)
    seconds = [d.delay_s for d in delays if isinstance(d, Restart)]
    assert seconds == sorted(seconds)
    assert seconds[1] == 2 * seconds[0]
    assert seconds[-1] == LONGEST_DELAY_S


def test_a_stable_run_resets_the_delay() -> None:
    history = RestartHistory("engine-0")
    first = history.on_exit(-9, ran_s=1.0, cluster_ready=True)
    for _ in range(5):
        history.on_exit(-9, ran_s=1.0, cluster_ready=True)
    assert history.on_exit(-9, ran_s=STABLE_RUN_S, cluster_ready=True) == first


def test_a_process_that_was_asked_to_stop_is_restarted_at_once_and_has_not_failed() -> None:
    history = RestartHistory("gateway-0")
    first = RestartHistory("gateway-0").on_exit(-9, ran_s=1.0, cluster_ready=True)
    for ready in (False, True):
        assert [history.on_exit(0, ran_s=0.5, cluster_ready=ready) for _ in range(5)] == [Restart(0.0)] * 5
    assert history.on_exit(-9, ran_s=1.0, cluster_ready=True) == first


def test_a_refused_configuration_is_never_retried() -> None:
    decision = RestartHistory("store").on_exit(CONFIG_ERROR_EXIT, ran_s=0.1, cluster_ready=True)
    assert decision == StopCluster("store refused its configuration")


def test_failing_while_the_cluster_starts_ends_it() -> None:
    history = RestartHistory("engine-1")
    decisions = [history.on_exit(1, ran_s=0.5, cluster_ready=False) for _ in range(3)]
    assert [type(d) for d in decisions] == [Restart, Restart, StopCluster]
    assert isinstance(decisions[-1], StopCluster)
    assert "engine-1" in decisions[-1].reason
