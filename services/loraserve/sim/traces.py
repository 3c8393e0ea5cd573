"""Reads request traces from CSV files: the time, the client and the token counts of each request.

The header selects one of two formats. ``time_s,client,prompt_tokens,output_tokens`` is this project's format, used for
traces drawn from ServeGen's statistics. ``TIMESTAMP,ContextTokens,GeneratedTokens`` is the format of the LLM inference
traces of the Azure Public Dataset. The columns may be in any order, and other columns are ignored.
"""

import csv
import gzip
import io
import math
import zlib
from collections.abc import Iterable
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path

import msgspec

from loraserve.errors import ConfigError

OWN_COLUMNS = ("time_s", "client", "prompt_tokens", "output_tokens")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
AZURE_CLIENT = "azure"
"""The client of all requests in Azure's traces, which do not name clients."""


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """A request. ``time_s`` is relative to the start of the trace, or to the first request in Azure's traces."""

    time_s: float
    client: str
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path | str) -> list[TraceRequest]:
    """Return all requests, sorted by time. A file whose name ends in ``.gz`` is decompressed.

    Raises ConfigError if the file cannot be used. The message names the file and, if a line is wrong, the line.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text; the name of a compressed trace has to end in .gz") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path}: is not a complete gzip file ({error}); download or compress it again") from error
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); give the path of a trace in CSV format"
        ) from error
    return parse_trace(io.StringIO(text, newline=""), str(path))


def parse_trace(lines: Iterable[str], name: str) -> list[TraceRequest]:
    """Return all requests, sorted by time; ``name`` is the file's name in error messages."""
    rows = csv.reader(lines)
    try:
        header = [column.strip() for column in next(rows, [])]
        columns = _columns_of(header, name)
        places = [header.index(column) for column in columns]
        requests = [_parse_row(row, columns, places) for row in rows if row]
    except ValueError as error:
        raise ConfigError(f"{name}, line {rows.line_num}, {error}") from error
    except csv.Error as error:
        raise ConfigError(f"{name}, line {rows.line_num}: is not CSV ({error}); save it as plain CSV") from error
    if not requests:
        raise ConfigError(f"{name}: has a header but no requests; expected at least one line below it")
    if columns is AZURE_COLUMNS:
        first_s = min(request.time_s for request in requests)
        requests = [msgspec.structs.replace(request, time_s=request.time_s - first_s) for request in requests]
    return sorted(requests, key=attrgetter("time_s"))


def _columns_of(header: list[str], name: str) -> tuple[str, ...]:
    formats = (OWN_COLUMNS, AZURE_COLUMNS)
    for columns in formats:
        if set(columns) <= set(header):
            return columns
    known = " or ".join(",".join(columns) for columns in formats)
    if not header:
        raise ConfigError(f"{name}: is empty; expected a header, {known}")
    nearest = max(formats, key=lambda columns: len(set(columns) & set(header)))
    missing = ", ".join(column for column in nearest if column not in header)
    raise ConfigError(f"{name}, line 1: the header lacks {missing}; expected the columns {known}")


def _parse_row(row: list[str], columns: tuple[str, ...], places: list[int]) -> TraceRequest:
    try:
        fields = [row[place] for place in places]
    except IndexError:
        text = f"{','.join(row)!r}: has too few fields; expected one for each of {','.join(columns)}"
        raise ValueError(text) from None
    if columns is AZURE_COLUMNS:
        time_s, client = _parse_timestamp(fields[0]), AZURE_CLIENT
    else:
        time_s, client = _parse_seconds(fields[0]), fields[1]
        if not client:
            raise ValueError("client: is empty; expected the name of the client")
    prompt_tokens, output_tokens = (_parse_tokens(fields[i], columns[i]) for i in (-2, -1))
    return TraceRequest(time_s, client, prompt_tokens, output_tokens)


def _parse_seconds(text: str) -> float:
    try:
        time_s = float(text)
    except ValueError:
        time_s = math.nan
    if not 0 <= time_s < math.inf:
        raise ValueError(f"time_s: is {text!r}; expected seconds since the trace began, not below 0")
    return time_s


def _parse_timestamp(text: str) -> float:
    """Return the seconds since the Unix epoch. A time without a zone is in UTC."""
    try:
        stamp = datetime.fromisoformat(text.strip())
    except ValueError:
        raise ValueError(f"TIMESTAMP: is {text!r}; expected a time like 2023-11-16 18:15:46.680") from None
    return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()


def _parse_tokens(text: str, column: str) -> int:
    try:
        tokens = int(text)
    except ValueError:
        tokens = 0
    if tokens <= 0:
        raise ValueError(f"{column}: is {text!r}; expected a whole number of tokens, at least 1")
    return tokens
