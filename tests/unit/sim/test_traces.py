"""Trace files: both formats are read in order; errors name file, line and field."""

import csv
import gzip
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraserve.errors import ConfigError
from loraserve.sim.traces import AZURE_CLIENT, TraceRequest, parse_trace, read_trace

OURS = "time_s,client,prompt_tokens,output_tokens"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
LINES = f"{OURS}\n0.5,b,10,1\n0.000,a,971,6\n"
REQUESTS = [TraceRequest(0.0, "a", 971, 6), TraceRequest(0.5, "b", 10, 1)]

requests = st.builds(
    TraceRequest,
    st.floats(0, 1e9),
    st.text(st.characters(codec="utf-8", exclude_characters="\x00"), min_size=1, max_size=8),
    st.integers(1, 10**6),
    st.integers(1, 10**6),
)


def parse(text: str) -> list[TraceRequest]:
    return parse_trace(io.StringIO(text, newline=""), "t.csv")


def test_a_trace_in_our_format_is_read_in_order_of_time(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(LINES)
    assert read_trace(tmp_path / "t.csv") == REQUESTS


def test_a_compressed_trace_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(LINES.encode()))
    assert read_trace(str(tmp_path / "t.csv.gz")) == REQUESTS


def test_azures_time_counts_from_its_first_request() -> None:
    text = f"{AZURE}\r\n2023-11-16 23:59:59.5000000,396,109\r\n2023-11-16 23:59:58.2500000,374,44\r\n"
    assert parse(text) == [TraceRequest(0.0, AZURE_CLIENT, 374, 44), TraceRequest(1.25, AZURE_CLIENT, 396, 109)]


def test_azures_times_may_have_a_zone() -> None:
    text = f"{AZURE}\n2024-05-10 00:00:00.5+00:00,1,1\n2024-05-10 01:00:00+01:00,2,2\n"
    assert [(r.time_s, r.prompt_tokens) for r in parse(text)] == [(0.0, 2), (0.5, 1)]


def test_columns_are_found_by_name_and_blank_lines_are_ignored() -> None:
    text = "\ufeffid,output_tokens,client, time_s,prompt_tokens\n\nx,6,a,0,971\n\nx,1,b,0.5,10\n\n"
    assert parse(text.lstrip("\ufeff")) == REQUESTS


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(LINES, encoding="utf-8-sig")
    assert read_trace(tmp_path / "t.csv") == REQUESTS


def test_requests_with_equal_times_keep_their_order() -> None:
    assert [r.client for r in parse(f"{OURS}\n1,x,1,1\n0,b,1,1\n0,a,1,1\n")] == ["b", "a", "x"]


@given(st.lists(requests, min_size=1, max_size=20))
def test_a_written_trace_is_read_back(written: list[TraceRequest]) -> None:
    file = io.StringIO(newline="")
    rows = csv.writer(file)
    rows.writerow(OURS.split(","))
    rows.writerows((r.time_s, r.client, r.prompt_tokens, r.output_tokens) for r in written)
    assert parse(file.getvalue()) == sorted(written, key=lambda r: r.time_s)


@pytest.mark.parametrize(
    ("line", "field", "expected"),
    [
        ("-1,a,1,1", "time_s: is '-1'", "not below 0"),
        ("nan,a,1,1", "time_s: is 'nan'", "seconds"),
        ("inf,a,1,1", "time_s: is 'inf'", "seconds"),
        ("soon,a,1,1", "time_s: is 'soon'", "seconds"),
        ("1,,1,1", "client: is empty", "name"),
        ("1,a,0,1", "prompt_tokens: is '0'", "at least 1"),
        ("1,a,1.5,1", "prompt_tokens: is '1.5'", "whole number"),
        ("1,a,1,-7", "output_tokens: is '-7'", "at least 1"),
        ("1,a,1,", "output_tokens: is ''", "whole number"),
        ("1,a,1", "'1,a,1': has too few fields", OURS),
    ],
)
def test_an_invalid_line_is_named_with_its_field(line: str, field: str, expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(f"{OURS}\n0,a,1,1\n{line}\n2,a,1,1\n")
    assert str(error.value).startswith(f"t.csv, line 3, {field}")
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("yesterday,1,1", "TIMESTAMP: is 'yesterday'"),
        ("2023-11-16 18:15:46,x,1", "ContextTokens: is 'x'"),
        ("2023-11-16 18:15:46,1,0", "GeneratedTokens: is '0'"),
        ("2023-11-16 18:15:46,1", "'2023-11-16 18:15:46,1': has too few fields"),
    ],
)
def test_an_invalid_line_of_an_azure_trace_is_named_with_its_field(line: str, field: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse(f"{AZURE}\n{line}\n")
    assert str(error.value).startswith(f"t.csv, line 2, {field}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "t.csv: is empty"),
        (f"{OURS}\n", "t.csv: has a header but no requests"),
        ("time_s,client,prompt_tokens\n0,a,1\n", "t.csv, line 1: the header lacks output_tokens"),
        ("TIMESTAMP,ContextTokens\n0,1\n", "t.csv, line 1: the header lacks GeneratedTokens"),
        (f"{OURS}\n0,{'x' * 200_000},1,1\n", "t.csv, line 2: is not CSV"),
    ],
)
def test_a_file_that_is_not_a_trace_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse(text)


def cut(path: Path) -> Path:
    path.write_bytes(gzip.compress(LINES.encode())[:-12])
    return path


def spoilt(path: Path) -> Path:
    content = bytearray(gzip.compress(LINES.encode() * 50))
    content[20:30] = bytes(10)
    path.write_bytes(content)
    return path


def plain(path: Path) -> Path:
    path.write_text(LINES)
    return path


@pytest.mark.parametrize("make", [cut, spoilt, plain])
def test_a_broken_gzip_file_is_refused(make: Callable[[Path], Path], tmp_path: Path) -> None:
    path = make(tmp_path / "t.csv.gz")
    with pytest.raises(ConfigError, match="is not a complete gzip file") as error:
        read_trace(path)
    assert str(path) in str(error.value)


def test_a_compressed_file_without_gz_in_its_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(gzip.compress(LINES.encode()))
    with pytest.raises(ConfigError, match=r"has to end in \.gz"):
        read_trace(tmp_path / "t.csv")


def test_a_missing_file_and_a_folder_are_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read") as error:
            read_trace(path)
        assert str(path) in str(error.value)
