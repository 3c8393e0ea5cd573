"""Request traces from CSV files: who asked when, for how many tokens. ``parse_trace`` is pure.

Two kinds are known by their header: ``time_s,client,prompt_tokens,output_tokens`` (seconds; ours, drawn from ServeGen's
statistics) and ``TIMESTAMP,ContextTokens,GeneratedTokens`` (Azure Public Dataset, LLM inference traces). Columns may
come in any order, others are ignored.
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
from typing import NoReturn

import msgspec

from loraserve.errors import ConfigError

AZURE_CLIENT = "azure"
"""Azure's traces name no clients: all requests are this one's."""


class TraceRequest(msgspec.Struct, frozen=True, gc=False):
    """One request. ``time_s`` counts from the trace's own zero; Azure's zero is its first request."""

    time_s: float
    client: str
    prompt_tokens: int
    output_tokens: int


def read_trace(path: Path | str) -> list[TraceRequest]:
    """All requests in order of time, from a plain file or one whose name ends in ``.gz``.

    Raises ConfigError where it cannot be used, naming the file, and the line and field at fault.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text; the name of a compressed trace has to end in .gz") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ConfigError(f"{path}: is no whole gzip file ({error}); get it again or compress it again") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give the path of a trace's CSV file") from error
    return parse_trace(io.StringIO(text, newline=""), str(path))


def parse_trace(lines: Iterable[str], name: str) -> list[TraceRequest]:
    """All requests in order of time; ``name`` is what errors call the file. Raises ConfigError."""
    rows = csv.reader(lines)
    try:
        header = [column.strip() for column in next(rows, [])]
        kind = _kind(header, name)
        columns = [header.index(column) for column in kind.columns]
        # Values are not looked at twice, for there are hundreds of thousands of lines: a bad one is found by raising.
        found = [kind.request(row, columns) for row in rows if row]
    except _BadField as error:
        raise ConfigError(f"{name}, line {rows.line_num}, {error}") from error
    except csv.Error as error:
        raise ConfigError(f"{name}, line {rows.line_num}: is no CSV ({error}); save it as plain CSV") from error
    if not found:
        raise ConfigError(f"{name}: has a header and no requests; at least one line is expected below it")
    return sorted(kind.from_zero(found), key=attrgetter("time_s"))


class _BadField(Exception):
    """A value of a line that cannot be used; the text names the column and what is expected."""


class _Ours:
    columns = ("time_s", "client", "prompt_tokens", "output_tokens")

    def request(self, row: list[str], columns: list[int]) -> TraceRequest:
        try:
            time, client, prompt, output = (row[column] for column in columns)
        except IndexError:
            _short(row, self.columns)
        return TraceRequest(
            _seconds(time), client or _no_client(), _tokens(prompt, "prompt_tokens"), _tokens(output, "output_tokens")
        )

    def from_zero(self, requests: list[TraceRequest]) -> list[TraceRequest]:
        return requests


class _Azure:
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

    def request(self, row: list[str], columns: list[int]) -> TraceRequest:
        try:
            stamp, prompt, output = (row[column] for column in columns)
        except IndexError:
            _short(row, self.columns)
        return TraceRequest(
            _stamp_s(stamp), AZURE_CLIENT, _tokens(prompt, "ContextTokens"), _tokens(output, "GeneratedTokens")
        )

    def from_zero(self, requests: list[TraceRequest]) -> list[TraceRequest]:
        first_s = min(request.time_s for request in requests)
        return [msgspec.structs.replace(request, time_s=request.time_s - first_s) for request in requests]


def _kind(header: list[str], name: str) -> _Ours | _Azure:
    kinds: tuple[_Ours | _Azure, ...] = (_Ours(), _Azure())
    for kind in kinds:
        if set(kind.columns) <= set(header):
            return kind
    known = " or ".join(",".join(kind.columns) for kind in kinds)
    if not header:
        raise ConfigError(f"{name}: is empty; a header is expected, {known}")
    nearest = max(kinds, key=lambda kind: len(set(kind.columns) & set(header)))
    missing = ", ".join(column for column in nearest.columns if column not in header)
    raise ConfigError(f"{name}, line 1: the header lacks {missing}; the columns expected are {known}")


def _seconds(text: str) -> float:
    try:
        time_s = float(text)
    except ValueError:
        time_s = math.nan
    if not 0 <= time_s < math.inf:
        raise _BadField(f"time_s: is {text!r}; seconds since the trace began are expected, not below 0")
    return time_s


def _stamp_s(text: str) -> float:
    """Seconds since the epoch; a time without a zone is taken for UTC."""
    try:
        stamp = datetime.fromisoformat(text.strip())
    except ValueError:
        raise _BadField(f"TIMESTAMP: is {text!r}; a time like 2023-11-16 18:15:46.680 is expected") from None
    return (stamp if stamp.tzinfo else stamp.replace(tzinfo=UTC)).timestamp()


def _tokens(text: str, column: str) -> int:
    try:
        tokens = int(text)
    except ValueError:
        tokens = 0
    if tokens <= 0:
        raise _BadField(f"{column}: is {text!r}; a whole number of tokens is expected, at least 1")
    return tokens


def _no_client() -> NoReturn:
    raise _BadField("client: is empty; the name of who asked is expected")


def _short(row: list[str], columns: Iterable[str]) -> NoReturn:
    raise _BadField(f"{','.join(row)!r}: has too few fields; one for each of {','.join(columns)} is expected")
