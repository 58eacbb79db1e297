"""Every law that a replay must keep is broken once here, and seen."""

import copy
from dataclasses import replace
from functools import cache
from random import Random

import numpy as np
import pandas as pd
import pytest

from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Request
from workbench.policies import FCFS, LoquetierStatic, PeftSequential, ServeFirst
from workbench.replay import Replay, ReplayError, replay
from workbench.results.conservation import ConservationError, check_conservation, check_littles_law
from workbench.results.facts import Rows
from workbench.results.tally import Tally
from workbench.testing import FixedCost, fixed_info


def requests(num: int = 30) -> list[Request]:
    rng, now, out = Random(1), 0.0, []
    for i in range(num):
        now += rng.expovariate(80.0)
        lengths = {"prompt_tokens": rng.randint(1, 90), "output_tokens": rng.randint(1, 25)}
        out.append(Request(request_id=f"r{i}", arrival_s=now, adapter=rng.choice(("a", "b", None)), **lengths))
    return out


def run(policy=FCFS(), **changes) -> Replay:
    job = FinetuneJob(adapter="t", data=RandomTokens(examples=8, tokens=32), epochs=100)
    info = fixed_info(**({"num_blocks": 24} | changes))
    return replay(requests(), executor=FixedCost(info=info), policy=policy, jobs=[job], planning=0.001, progress=False)


@cache
def whole() -> Replay:
    return run(ServeFirst())


@pytest.mark.parametrize("policy", [FCFS(), ServeFirst(), LoquetierStatic(), PeftSequential()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("blocks", [12, 64])
def test_replays_keep_every_law_also_under_preemption(policy, blocks):
    result = run(policy, num_blocks=blocks)
    check_conservation(result)
    if blocks == 12 and isinstance(policy, FCFS):
        assert (result.events["kind"] == "preempted").any()


def broken(**frames) -> Replay:
    """The whole replay with some frames changed."""
    out = copy.copy(whole())
    for name in ("requests", "jobs"):
        out.__dict__.pop(name, None)
    for name, change in frames.items():
        frame = getattr(out, name).copy()
        setattr(out, name, change(frame))
    return out


def at(frame: pd.DataFrame, kind: str, k: int = 5) -> int:
    return int(frame.index[frame["kind"] == kind][k])


def dropped(kind: str):
    return lambda frame: frame.drop(index=at(frame, kind)).reset_index(drop=True)


def repeated(kind: str):
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        row = at(frame, kind)
        return pd.concat([frame.iloc[: row + 1], frame.iloc[row:]], ignore_index=True)

    return change


def moved(kind: str, column: str, by: float):
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame.loc[at(frame, kind), column] += by
        return frame

    return change


def shifted(column: str, by: float, k: int = 5):
    def change(frame: pd.DataFrame) -> pd.DataFrame:
        frame[column] = frame[column] + np.where(np.arange(len(frame)) == k, by, 0).astype(frame[column].dtype)
        return frame

    return change


CASES = [
    ("steps", shifted("end_s", 0.5), "a step must not begin before the last one ends"),
    ("steps", shifted("duration_s", 0.5), "a step must last at least plan_s"),
    ("steps", shifted("decode_tokens", 1.0), "a step's decode tokens must be those of its batch"),
    ("work", shifted("step", 10**6), "every row of work must belong to a step"),
    ("events", repeated("arrived"), "a request must arrive at most once, got 2 times"),
    ("events", repeated("finished"), "a request must end at most once, got 2 times"),
    ("events", dropped("arrived"), "a request must arrive before it ends"),
    ("events", moved("token", "time_s", 100.0), "a request must see its token between arrival and end"),
    ("events", dropped("finished"), "the ledger's count must be arrivals less ends"),
    ("steps", shifted("waiting", 1), "the ledger's count must be arrivals less ends"),
    ("events", dropped("token"), "a request's tokens must be numbered 1, 2, ... each once"),
    ("events", moved("prefill", "value", 1.0), "prefilled tokens must be those of the batches"),
    ("events", moved("forward", "value", 32.0), "forward tokens must be those of the batches"),
    ("events", moved("committed", "value", 10.0**6), "committed tokens must have gone forward"),
    ("events", repeated("committed"), "committed tokens must have gone forward"),
    ("work", dropped("backward"), "must go backward through each layer once"),
]


@pytest.mark.parametrize(("frame", "change", "law"), CASES, ids=[f"{law[:40]}-{i}" for i, (_, _, law) in enumerate(CASES)])
def test_a_broken_law_is_named_with_its_numbers(frame, change, law):
    check_conservation(whole())
    with pytest.raises(ConservationError, match=law.replace(".", r"\.")) as caught:
        check_conservation(broken(**{frame: change}))
    assert ", got " in str(caught.value)


def test_a_prompt_token_prefilled_twice_or_not_at_all_is_seen():
    for by in (-1, 1):

        def change(frame: pd.DataFrame, by: int = by) -> pd.DataFrame:
            frame.loc[at(frame, "prefill"), "start"] += by
            return frame

        with pytest.raises(ConservationError, match=r"prefill"):
            check_conservation(broken(work=change))


def test_a_decode_row_at_another_position_is_seen():
    with pytest.raises(ConservationError, match="decode rows must stand at consecutive positions"):
        check_conservation(broken(work=moved("decode", "start", 1)))


def test_a_finished_request_with_another_length_than_its_traces_is_seen():
    result = broken()
    longer = replace(result.trace_requests[3], output_tokens=result.trace_requests[3].output_tokens + 1)
    result.trace_requests = (*result.trace_requests[:3], longer, *result.trace_requests[4:])
    with pytest.raises(ConservationError, match="must have the output tokens that it asks for, got"):
        check_conservation(result)


def test_littles_law_is_broken_by_an_end_before_its_arrival():
    names = pd.Index(["a", "b"])
    steps = {"start_s": np.array([1.5]), "end_s": np.array([4.0]), "waiting": np.array([0]), "running": np.array([2])}

    def rows(kind: str, *moments: tuple[float, int]) -> dict[str, Rows]:
        time, owner = (np.array(x) for x in zip(*moments, strict=True)) if moments else (np.zeros(0), np.zeros(0, int))
        return {kind: Rows(time, np.zeros(len(time)), owner.astype(int), np.full(len(time), np.nan))}

    def check(*ends: tuple[float, int]) -> None:
        tally = Tally(names)
        tally.add_moments(rows("rejected") | rows("aborted") | rows("arrived", (0.0, 0), (1.0, 1)) | rows("finished", *ends))
        tally.add_counts(steps)
        check_littles_law(tally)

    check((2.0, 0), (3.0, 1))
    with pytest.raises(ConservationError, match="Little's law: .* got"):
        check((4.0, 0), (0.5, 1))
    with pytest.raises(ConservationError, match="arrivals less ends, got 2 beside 1 to 1 at"):
        check((1.2, 0), (3.0, 1))


def test_an_executor_that_breaks_a_law_ends_the_replay_with_an_error_and_the_partial_result():
    class Backwards(FixedCost):
        """Reports more layers done than there are, as a broken executor might."""

        def step(self, batch):
            result = super().step(batch)
            object.__setattr__(batch, "segments", batch.segments[:-1]) if batch.step == 3 else None
            return result

    with pytest.raises(ReplayError, match="tokens must be") as caught:
        replay(requests(), executor=Backwards(info=fixed_info()), policy=FCFS(), planning=0.0, progress=False)
    assert isinstance(caught.value.__cause__, ConservationError)
    assert len(caught.value.replay.events) > 0
