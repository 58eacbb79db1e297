"""Rows that are written while a replay runs are the rows that it would have kept."""

import gc
import tracemalloc
from random import Random

import pandas as pd
import pyarrow.parquet as pq
import pytest

from workbench.config import FinetuneJob, RandomTokens, UnknownAdapterError
from workbench.core import Request
from workbench.policies import FCFS, LoquetierStatic, ServeFirst
from workbench.replay import ReplayError, replay
from workbench.results.conservation import ConservationError, check_conservation
from workbench.results.facts import facts_of_history
from workbench.testing import FixedCost, fixed_info


def requests(num: int = 60) -> list[Request]:
    rng, now, out = Random(2), 0.0, []
    for i in range(num):
        now += rng.expovariate(60.0)
        sizes = {"prompt_tokens": rng.randint(1, 60), "output_tokens": rng.randint(1, 40)}
        out.append(Request(request_id=f"r{i}", arrival_s=now, adapter=rng.choice(("a", "b", None)), **sizes))
    return out


def run(policy=FCFS(), executor=None, **options):
    job = FinetuneJob(adapter="t", data=RandomTokens(examples=8, tokens=32), epochs=100)
    executor = executor or FixedCost(info=fixed_info(num_blocks=24))
    return replay(requests(), executor=executor, policy=policy, jobs=[job], planning=0.0, progress=False, **options)


@pytest.mark.parametrize("policy", [FCFS(), ServeFirst(), LoquetierStatic()], ids=lambda p: type(p).__name__)
def test_written_rows_are_the_rows_that_would_be_kept(policy, tmp_path, monkeypatch):
    kept = run(policy)
    monkeypatch.setattr("workbench.results.stream.MAX_ROWS", 150)
    written = run(policy, events=tmp_path / "rows")
    assert pq.ParquetFile(tmp_path / "rows" / "events.parquet").num_row_groups > 5
    for name in ("events", "steps", "work", "requests", "jobs"):
        pd.testing.assert_frame_equal(getattr(kept, name), getattr(written, name), check_exact=True)
    assert written.num_steps == kept.num_steps
    pd.testing.assert_series_equal(pd.Series(written.summary()), pd.Series(kept.summary()))


def test_memory_holds_only_the_rows_that_are_not_written_yet(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.results.stream.MAX_ROWS", 150)
    most = 0

    def watches(view, plan):
        nonlocal most
        most = max(most, view._ledger.history.size)
        FCFS()(view, plan)
        plan.repeat(0)

    assert len(run(watches, events=tmp_path).events) > 1000
    assert most < 150


class Forgets(FixedCost):
    """Does not keep its batches."""

    def step(self, batch):
        result = super().step(batch)
        self.batches.clear()
        return result


def peak_bytes(num: int, folder) -> int:
    """The most memory that a replay of `num` short requests needs beside its trace."""
    trace = [Request(request_id=f"r{k}", arrival_s=0.03 * k, prompt_tokens=8, output_tokens=2 + k % 3, max_tokens=4) for k in range(num)]
    gc.collect()
    tracemalloc.start()
    try:
        replay(trace, executor=Forgets(), policy=FCFS(), planning=0.0, progress=False, events=folder)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_steps_and_tokens_and_hardly_with_requests(tmp_path, monkeypatch):
    monkeypatch.setattr("workbench.results.stream.MAX_ROWS", 500)
    peak_bytes(50, tmp_path / "imports")
    few, many = peak_bytes(100, tmp_path / "few"), peak_bytes(500, tmp_path / "many")
    # sums of 150 bytes and an index of the names for each; the rows of one request are 1,000 bytes and more
    assert (many - few) / 400 < 500


def test_a_law_broken_in_any_part_is_seen(tmp_path, monkeypatch):
    class Drops(FixedCost):
        """Loses a row of a batch, as a broken executor might."""

        def step(self, batch):
            result = super().step(batch)
            object.__setattr__(batch, "segments", batch.segments[:-1]) if batch.step == 40 else None
            return result

    monkeypatch.setattr("workbench.results.stream.MAX_ROWS", 150)
    with pytest.raises(ReplayError, match="tokens must be") as caught:
        run(executor=Drops(info=fixed_info(num_blocks=24)), events=tmp_path)
    assert isinstance(caught.value.__cause__, ConservationError)
    check_conservation(run(events=tmp_path / "whole"))
    taken = []

    def early(history, names):
        facts = facts_of_history(history, names)
        taken.append(facts)
        if len(taken) == 2:
            facts.events["finished"].time[:1] = 0.0
        return facts

    monkeypatch.setattr("workbench.results.stream.facts_of_history", early)
    with pytest.raises(ReplayError, match="between arrival and end|Little's law|arrivals less ends"):
        run(events=tmp_path / "early")


def test_a_folder_with_rows_is_refused_and_what_is_not_kept_is_said(tmp_path):
    result = run(events=tmp_path)
    with pytest.raises(ValueError, match="a folder without the rows of another replay, got .* which holds events.parquet"):
        run(events=tmp_path)
    for name in ("results", "digests"):
        with pytest.raises(ValueError, match=f"keeps no {name}. Run it without events="):
            getattr(result, name)


def test_bad_input_is_refused_as_ever_and_leaves_no_folder(tmp_path):
    unknown = [Request(request_id="x", arrival_s=0.0, prompt_tokens=5, output_tokens=1, adapter="nobody")]
    with pytest.raises(UnknownAdapterError, match="unknown adapter 'nobody'"):
        replay(unknown, executor=FixedCost(), policy=FCFS(), events=tmp_path / "rows", progress=False)
    assert not (tmp_path / "rows").exists()
