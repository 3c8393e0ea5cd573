"""Logging: one line per event with the process name, as JSON or as text for a console."""

import logging
import sys
from pathlib import Path
from typing import Any, cast

import structlog
from structlog.typing import FilteringBoundLogger, Processor

from loraserve.config import Config
from loraserve.errors import ConfigError

Logger = FilteringBoundLogger


def get_logger(name: str) -> Logger:
    """Return the logger of the module ``name``. Every line also contains the process name."""
    return cast(Logger, structlog.get_logger(name))


def configure_logging(config: Config, name: str) -> None:
    """Write all log lines of this process and its libraries to ``<cluster.log_dir>/<name>.log``.

    If ``cluster.log_dir`` is "", the lines go to standard error. Raises ConfigError if the file cannot be written.
    """
    level = logging.getLevelNamesMapping()[config.cluster.log_level.upper()]
    handler = _handler(config, name)
    handler.setFormatter(_formatter(config, name, handler))
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(level)
    logging.captureWarnings(True)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=False,
    )


def _handler(config: Config, name: str) -> logging.Handler:
    if not config.cluster.log_dir:
        return logging.StreamHandler(sys.stderr)
    path = Path(config.cluster.log_dir) / f"{name}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return logging.FileHandler(path)
    except OSError as error:
        raise ConfigError(f"cluster.log_dir: cannot write {path}: {error.strerror}") from error


def _formatter(config: Config, name: str, handler: logging.Handler) -> logging.Formatter:
    def add_process(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("process", name)
        return event

    shared: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        add_process,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
    ]
    if config.cluster.log_format == "console":
        on_terminal = isinstance(handler, logging.StreamHandler) and handler.stream.isatty()
        render: list[Processor] = [structlog.dev.ConsoleRenderer(colors=on_terminal)]
    else:
        render = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    return structlog.stdlib.ProcessorFormatter(processors=[*shared, *render])
