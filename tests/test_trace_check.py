"""Users' own tables by a mapping of columns, and everything that is wrong with one, at once."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from workbench import traces
from workbench.traces.trace import Trace

COLUMNS = {"arrival_s": "When", "prompt_tokens": "in", "output_tokens": "out", "adapter": "lora"}


def table(**changes):
    rows = {"When": [100.0, 100.25, 101.0], "in": [10, 20, 30], "out": [1, 2, 3], "lora": ["007", None, "b"], "ip": ["1", "2", "3"]}
    return pd.DataFrame(rows | changes)


def write(frame, path):
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")).replace("NaN", "null"))
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_of_ones_own_is_a_trace_by_naming_its_columns(tmp_path, suffix):
    trace = Trace.from_file(write(table(), tmp_path / f"mine.{suffix}"), COLUMNS)
    frame = trace.frame
    assert trace.name == "mine" and trace.notes == ("columns left out: ip",)
    assert frame["request_id"].tolist() == ["0", "1", "2"]
    assert frame["arrival_s"].tolist() == [0.0, 0.25, 1.0]
    assert frame["prompt_tokens"].tolist() == [10, 20, 30] and frame["output_tokens"].tolist() == [1, 2, 3]
    assert frame["adapter"].tolist() == ["007", None, "b"]


@pytest.mark.parametrize(
    "when, unit",
    [
        ([5000, 5250, 6000], {"arrival_s": "ms"}),
        ([5_000_000, 5_250_000, 6_000_000], {"arrival_s": "us"}),
        (["2024-05-01T00:00:59.75", "2024-05-01T00:01:00.000Z", "2024-05-01 00:01:00.75+00:00"], None),
        ([1714521600.0, 1714521600.25, 1714521601.0], None),
    ],
)
def test_times_in_other_units_and_dates_become_seconds_from_the_first(tmp_path, when, unit):
    trace = Trace.from_file(write(table(When=when), tmp_path / "mine.csv"), COLUMNS, units=unit)
    assert trace.frame["arrival_s"].tolist() == pytest.approx([0.0, 0.25, 1.0], abs=1e-6)


def test_deadlines_move_with_arrivals_and_rows_out_of_order_are_sorted_and_noted(tmp_path):
    frame = table(When=[100.25, 100.0, 101.0], due=[103.0, 102.0, 104.0])
    trace = Trace.from_file(write(frame, tmp_path / "mine.csv"), COLUMNS | {"deadline_s": "due"})
    assert trace.frame["prompt_tokens"].tolist() == [20, 10, 30]
    assert trace.frame["deadline_s"].tolist() == [2.0, 3.0, 4.0]
    assert "sorted by arrival: 1 rows were out of order" in trace.notes


def test_requests_of_no_tokens_are_left_out_on_request_only(tmp_path):
    path = write(table(out=[1, 0, 3]), tmp_path / "mine.csv")
    with pytest.raises(ValueError, match="output_tokens must be at least 1, got 0 in row 1.*drop_empty=True"):
        Trace.from_file(path, COLUMNS)
    assert len(Trace.from_file(path, COLUMNS, drop_empty=True)) == 2


def test_names_that_are_not_there_are_refused(tmp_path):
    path = write(table(), tmp_path / "mine.csv")
    with pytest.raises(ValueError, match="columns must map a trace's columns to the file's, got 'arrivals'. Did you mean 'arrival_s'"):
        Trace.from_file(path, {"arrivals": "When"})
    with pytest.raises(ValueError, match="columns must name columns of the file, got 'Wen'. Did you mean 'When'"):
        Trace.from_file(path, {"arrival_s": "Wen"})
    with pytest.raises(ValueError, match="a unit must be one of s, ms, us, ns, min, h or datetime, got 'sec'"):
        Trace.from_file(path, COLUMNS, units={"arrival_s": "sec"})
    with pytest.raises(ValueError, match="units are for columns of times, got 'out'"):
        Trace.from_file(path, COLUMNS, units={"out": "ms"})
    with pytest.raises(ValueError, match="format and columns exclude each other"):
        Trace.from_file(path, COLUMNS, format="burstgpt")
    with pytest.raises(ValueError, match=r"or pass columns=\{'arrival_s': ..., ...\}"):
        Trace.from_file(path)


# everything at once


def problems(report):
    return {(None if pd.isna(r) else int(r), c): rule for r, c, rule in report.problems[["row", "column", "rule"]].itertuples(index=False)}


def test_a_sound_trace_has_no_problem():
    report = traces.validate(traces.load("w3-5rps").frame)
    assert report.ok and report.num_rows > 100 and repr(report).endswith("no problem")


def test_every_problem_is_listed_with_its_row_rule_and_value():
    frame = pd.DataFrame(
        {
            "request_id": ["a", "b", "b", None, "e", "f", "g"],
            "arrival_s": [0.0, 5.0, -1.0, "x", 1.0, 6.0, 7.0],
            "prompt_tokens": [1, 0, 2.5, 4, 5, None, 7],
            "output_tokens": [1, 2, 3, 4, -5, 6, 9],
            "max_tokens": [None, None, None, None, None, 3, 8],
            "top_p": [2.0, 1, 1, 1, 1, 1, 1],
            "colour": "red",
        }
    )
    report = traces.validate(frame)
    assert problems(report) == {
        (None, "colour"): "a trace's columns must be known ones",
        (0, "top_p"): "top_p must lie in (0, 1]",
        (1, "prompt_tokens"): "prompt_tokens must be at least 1",
        (2, "request_id"): "request_id must be unique",
        (2, "arrival_s"): "arrival_s must be at least 0",
        (2, "prompt_tokens"): "prompt_tokens must be a whole number",
        (3, "request_id"): "request_id must not be missing or empty",
        (3, "arrival_s"): "arrival_s must be a number",
        (4, "arrival_s"): "arrival_s must not decrease from row to row",
        (4, "output_tokens"): "output_tokens must be at least 1",
        (5, "prompt_tokens"): "prompt_tokens must not be missing",
        # a rule between columns is looked at where each column is sound
        (6, "output_tokens"): "output_tokens must be at most the request's max_tokens",
    }
    values = dict(zip(report.problems["column"], report.problems["value"], strict=True))
    assert values["top_p"] == 2.0 and report.problems.query("row == 3 and column == 'arrival_s'")["value"].tolist() == ["x"]
    text = repr(report)
    assert "7 rows, 7 of them with problems (12 in all)" in text and "row 4 (-5). Drop or repair the row" in text


def test_rows_are_those_of_the_file_even_where_it_is_sorted_by_time(tmp_path):
    frame = table(When=[101.0, 100.0, 100.5], out=[1, 2, 0])
    report = traces.validate(write(frame, tmp_path / "mine.csv"), COLUMNS)
    assert problems(report) == {(2, "output_tokens"): "output_tokens must be at least 1"}
    assert report.name == "mine.csv" and "sorted by arrival: 2 rows were out of order" in report.notes


def test_a_table_without_what_a_trace_needs_says_so_beside_its_rows():
    report = traces.validate(pd.DataFrame({"request_id": ["a", "a"], "prompt_tokens": [0, 1], "deadline_s": [1.0, "soon"]}))
    assert (None, "") in problems(report) and (1, "request_id") in problems(report) and (0, "prompt_tokens") in problems(report)
    assert (1, "deadline_s") in problems(report)
    assert "arrival_s" in report.problems["rule"].iloc[0]


BAD = {"arrival_s": [-1.0, np.inf, "noon"], "prompt_tokens": [0, 1.5, "many", -3], "output_tokens": [0, 2.5, "few"], "priority": [0.5]}


@settings(max_examples=15, deadline=None)
@example([(0, "arrival_s", 2), (0, "priority", 0)])
@given(st.lists(st.tuples(st.integers(0, 29), st.sampled_from(sorted(BAD)), st.integers(0, 3)), max_size=12))
def test_exactly_the_cells_that_were_spoiled_are_found(spoils):
    n = 30
    rows = {"request_id": range(n), "arrival_s": np.arange(n) * 1.0, "prompt_tokens": 5, "output_tokens": 6, "priority": 0}
    frame = pd.DataFrame(rows).astype(object)
    for row, column, which in spoils:
        frame.loc[row, column] = BAD[column][which % len(BAD[column])]
    report = traces.validate(frame)
    assert set(problems(report)) == {(row, column) for row, column, _ in spoils}
    assert report.ok == (not spoils)
    if spoils:
        with pytest.raises(ValueError, match="must"):
            Trace.from_frame(frame)
    else:
        Trace.from_frame(frame)
