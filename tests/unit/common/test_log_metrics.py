"""Log lines and metrics of a process."""

import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from prometheus_client.parser import text_string_to_metric_families

from loraserve.bus.protocol import MAX_COUNTED_PEERS, BusCounters
from loraserve.config import ClusterConfig, Config
from loraserve.errors import ConfigError
from loraserve.log import configure_logging, get_logger
from loraserve.metrics import Metrics


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # So that configure_logging does not close the handlers of the test runner.
    root.handlers[:] = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def written(folder: Path, **settings: Any) -> list[str]:
    """Return the log lines of one event of each kind."""
    config = Config(cluster=ClusterConfig(log_dir=str(folder / "logs"), **settings))
    configure_logging(config, "engine-0")
    log = get_logger("loraserve.engine")
    log.debug("detail")
    log.info("request.admitted", request_id="r1", adapter="pirate")
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("step_failed", request_id="r1")
    logging.getLogger("aiohttp").warning("from a %s", "library")
    warnings.simplefilter("always")
    warnings.warn("old thing", stacklevel=1)
    return (folder / "logs" / "engine-0.log").read_text().splitlines()


def test_json_lines_carry_process_event_and_context(tmp_path: Path) -> None:
    lines = [json.loads(line) for line in written(tmp_path)]
    assert all({"timestamp", "level", "logger", "process", "event"} <= set(line) for line in lines)
    assert {line["process"] for line in lines} == {"engine-0"}
    admitted, failed, library, warning = lines
    assert (admitted["event"], admitted["request_id"], admitted["adapter"]) == ("request.admitted", "r1", "pirate")
    assert (admitted["logger"], admitted["level"]) == ("loraserve.engine", "info")
    assert "ValueError: broken" in failed["exception"]
    assert (library["event"], library["logger"], library["level"]) == ("from a library", "aiohttp", "warning")
    assert "old thing" in warning["event"]


def test_console_lines_are_for_people(tmp_path: Path) -> None:
    text = "\n".join(written(tmp_path, log_format="console"))
    assert "request.admitted" in text
    assert "adapter=pirate" in text
    assert "ValueError: broken" in text
    assert "\x1b[" not in text


@pytest.mark.parametrize(("level", "seen"), [("debug", 5), ("info", 4), ("warning", 3), ("error", 1)])
def test_the_log_level_filters_lines(tmp_path: Path, level: str, seen: int) -> None:
    lines = written(tmp_path, log_level=level)
    assert len([line for line in lines if line.startswith("{")]) == seen


def test_without_a_folder_lines_go_to_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging(Config(), "router")
    get_logger("x").info("here")
    assert json.loads(stream.getvalue())["process"] == "router"


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cluster\.log_dir: cannot write .*file"):
        configure_logging(Config(cluster=ClusterConfig(log_dir=str(tmp_path / "file"))), "router")


def samples(metrics: Metrics) -> dict[str, float]:
    families = text_string_to_metric_families(metrics.render().decode())
    found = [sample for family in families for sample in family.samples]
    return {f"{sample.name}{sorted(sample.labels.values())}": sample.value for sample in found}


def test_metrics_are_the_process_s_own_and_prefixed() -> None:
    metrics, others = Metrics(), Metrics()
    metrics.counter("loads", "Adapter loads", ["source"]).labels("store").inc(2)
    metrics.gauge("free_bytes", "Free").set(7)
    metrics.histogram("step_seconds", "Steps", buckets=(0.1, 1.0)).observe(0.5)
    seen = samples(metrics)
    assert seen["loraserve_loads_total['store']"] == 2
    assert seen["loraserve_free_bytes[]"] == 7
    assert seen["loraserve_step_seconds_bucket['1.0']"] == 1
    assert samples(others) == {}


def test_the_bus_is_counted_as_it_is_when_scraped() -> None:
    metrics, counters = Metrics(), BusCounters("router")
    metrics.watch_bus(counters)
    counters.sent, counters.received, counters.late_replies = 5, 4, 1
    counters.count_bad("engine-0", "bad_message", "at $.x")
    counters.count_dropped("gateway-0", "full")
    seen = samples(metrics)
    assert seen["loraserve_bus_sent_total[]"] == 5
    assert seen["loraserve_bus_received_total[]"] == 4
    assert seen["loraserve_bus_late_replies_total[]"] == 1
    assert seen["loraserve_bus_bad_messages_total['bad_message', 'engine-0']"] == 1
    assert seen["loraserve_bus_dropped_messages_total['gateway-0']"] == 1
    counters.count_bad("engine-0", "bad_message", "again")
    assert samples(metrics)["loraserve_bus_bad_messages_total['bad_message', 'engine-0']"] == 2


def test_made_up_names_cannot_grow_the_counters_without_end() -> None:
    counters = BusCounters("router")
    for n in range(3 * MAX_COUNTED_PEERS):
        counters.count_bad(f"stranger-{n}", "bad_frames", "")
    assert len(counters.bad) <= MAX_COUNTED_PEERS + 1
    assert counters.bad.total() == 3 * MAX_COUNTED_PEERS


def test_a_flood_is_logged_now_and_then_only(tmp_path: Path) -> None:
    configure_logging(Config(cluster=ClusterConfig(log_dir=str(tmp_path))), "router")
    counters = BusCounters("router")
    for _ in range(2500):
        counters.count_bad("engine-0", "bad_message", "at $.x")
    lines = [json.loads(line) for line in (tmp_path / "router.log").read_text().splitlines()]
    assert [line["count"] for line in lines] == [1, 2, 3, 1000, 2000]
    assert (lines[0]["sender"], lines[0]["reason"], lines[0]["detail"]) == ("engine-0", "bad_message", "at $.x")
