"""A sweep runs every combination once, keeps it by its content, and survives what ends it."""

import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench.experiments import content_key as keys
from workbench.experiments.run_cache import ENTRY_FILE
from workbench.testing import FixedCost, fixed_info

ROOT = Path(__file__).resolve().parents[1]
SLOS = wb.SLO(ttft_s=0.03, itl_s=0.01)


@dataclass
class Chunked:
    """First come, first served; a line per run in `log`. `stop_at`: Ctrl-C in the run of that number; `fails_at`: an error."""

    chunk: int = 64
    log: str = ""
    stop_at: int | None = None
    fails_at: int | None = None
    is_new: bool = True

    def __call__(self, view, plan) -> None:
        if self.is_new and self.log:
            self.is_new = False
            with open(self.log, "a") as file:
                file.write("run\n")
            if lines(self.log) == self.stop_at:
                raise KeyboardInterrupt
            if lines(self.log) == self.fails_at:
                raise ZeroDivisionError("on purpose")
        plan.decode(view.running)
        plan.prefill(view.waiting, self.chunk)


def other(view, plan) -> None:
    plan.decode(view.running)
    if not view.running:
        plan.prefill(view.waiting)


def lines(log: str | Path) -> int:
    return len(Path(log).read_text().splitlines()) if Path(log).exists() else 0


LENGTHS = pd.DataFrame({"prompt_tokens": [8, 20, 32, 12], "output_tokens": [4, 2, 3, 1]})


@cache
def trace(seed: int, load: float = 6.0) -> wb.Trace:
    return wb.traces.poisson(rate=load, duration_s=2.0, seed=seed).with_lengths(LENGTHS, seed=seed)


def sweep(policies=None, **more) -> wb.Sweep:
    options = {"trace": trace, "executor": FixedCost(), "planning": 0.0, "slo": SLOS, "seeds": range(2), "progress": False}
    return wb.sweep(policies or [Chunked()], **(options | more))


# what is run


def test_every_combination_is_one_row_with_its_axes_and_the_numbers_of_its_replay():
    found = sweep([Chunked(), other], parameters={"chunk": [16, 32]}, axes={"load": [4.0, 8.0]})
    assert len(found.frame) == (2 + 1) * 2 * 2 and found.axes == ("chunk", "load")
    assert found.frame.groupby("policy_name").size().to_dict() == {"Chunked": 8, "other": 4}
    row = found.frame[(found.frame["chunk"] == 16) & (found.frame["load"] == 8.0) & (found.frame["seed"] == 1)].iloc[0]
    alone = wb.replay(
        trace(1, 8.0), executor=FixedCost(), policy=Chunked(16), slo=SLOS, seed=1, planning=0.0, measure=(0.0, row["measure_end_s"])
    )
    for name, value in alone.summary().items():
        assert row[name] == value or (pd.isna(row[name]) and pd.isna(value)), name
    assert found.redrawn == ("arrivals", "lengths")


def test_executors_jobs_limits_and_whole_traces_are_axes_too():
    job = wb.FinetuneJob(adapter="t", data=wb.RandomTokens(examples=8, tokens=32), epochs=100)
    found = sweep(
        [other],
        trace=trace(0),
        executor=lambda max_requests: FixedCost(info=fixed_info(max_requests=max_requests)),
        axes={
            "max_requests": [1, 8],
            "jobs": {"none": (), "one": (job,)},
            "trace": {"quiet": trace(0), "busy": lambda seed: trace(seed, 20.0)},
        },
        seeds=[0],
    )
    assert len(found.frame) == 8 and set(found.frame["jobs"]) == {"none", "one"} and set(found.frame["trace"]) == {"quiet", "busy"}
    assert found.redrawn == ("arrivals", "lengths")
    busy = found.where(trace="busy", jobs="none").set_index("max_requests")
    assert busy["requests"].nunique() == 1


def test_an_executor_class_takes_its_own_fields_from_the_axes():
    found = sweep(executor=FixedCost, axes={"step_s": [0.004, 0.02]}, seeds=[0])
    assert found.where(step_s=0.02)["ttft_p50_s"].iloc[0] > found.where(step_s=0.004)["ttft_p50_s"].iloc[0] + 0.01


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"axes": {"laod": [1.0]}}, "an axis must be taken by trace, executor, jobs or slo, got 'laod'. Did you mean 'load'"),
        ({"axes": {"seed": [1]}}, "an axis must be taken by"),
        ({"axes": {"load": [1.0, 1.0]}}, "the values of axis 'load' must differ"),
        ({"axes": {"load": []}}, "axis 'load' must have at least one value"),
        ({"parameters": {"chunks": [1]}}, "parameters must be fields of a policy, got 'chunks'. Did you mean 'chunk'"),
        ({"trace": lambda seed, rate: trace(seed)}, r"must take parameters that are axes or the seed; it also takes, got \['rate'\]"),
        ({"seeds": []}, "at least one seed"),
        ({"seeds": [0, 0]}, "seeds must differ"),
        ({"policies": [Chunked(), Chunked()]}, "must differ in their repr"),
    ],
)
def test_an_axis_that_nothing_takes_is_an_error(more, message):
    with pytest.raises(ValueError, match=message):
        sweep(**more)


def test_a_failing_run_is_a_row_with_its_error_a_warning_and_tried_again(tmp_path):
    log = str(tmp_path / "log")
    options = {"policies": [Chunked(log=log, fails_at=2)], "seeds": range(3), "cache": tmp_path / "cache"}
    with pytest.warns(UserWarning, match="1 of 3 runs failed; the first .* on purpose"):
        found = sweep(**options)
    assert found.frame["error"].notna().tolist() == [False, True, False]
    again = sweep(**options)
    assert again.frame["error"].isna().all() and again.frame["cached"].tolist() == [True, False, True] and lines(log) == 4


def test_a_real_executor_is_run_here_one_by_one_with_the_policies_turning():
    order = []

    class Real(FixedCost):
        def begin(self, jobs, *, seed):
            order.append(seed)
            return super().begin(jobs, seed=seed)

    executor = Real(info=replace(fixed_info(), simulated=False))
    found = sweep([Chunked(), other], executor=executor, n_jobs=2)
    assert order == [0, 0, 1, 1] and executor.num_open == 0
    assert found.frame["policy_name"].tolist() == ["Chunked", "other", "other", "Chunked"]
    assert "the machine's own noise" in found.redrawn


# what is kept


def test_a_second_sweep_computes_only_what_is_missing_and_gives_the_same_frame(tmp_path):
    log = tmp_path / "log"
    options = {"policies": [Chunked(log=str(log))], "cache": tmp_path / "cache"}
    first = sweep(**options, axes={"load": [4.0]})
    more = sweep(**options, axes={"load": [4.0, 8.0]})
    assert lines(log) == 4
    assert more.frame.groupby("load")["cached"].all().to_dict() == {4.0: True, 8.0: False}
    old, new = first.frame.drop(columns="cached"), more.where(load=4.0).drop(columns="cached")
    pd.testing.assert_frame_equal(old, new.reset_index(drop=True), check_exact=True)


def test_replays_are_there_where_they_were_asked_for(tmp_path):
    log = tmp_path / "log"
    options = {"policies": [Chunked(log=str(log))], "cache": tmp_path / "cache", "seeds": [0]}
    bare = sweep(**options)
    with pytest.raises(ValueError, match="a replay must have been kept"):
        bare.replay(bare.frame["run"].iloc[0])
    whole = sweep(**options, replays=True)
    assert lines(log) == 2
    for found in (whole, sweep(policies=[Chunked()], seeds=[0], replays=True)):
        run = found.frame.iloc[0]
        assert found.replay(run["run"]).summary()["ttft_p99_s"] == run["ttft_p99_s"]
    with pytest.raises(ValueError, match="run must be an id of this sweep"):
        whole.replay("nothing")


@pytest.mark.parametrize("damage", ["cut", "number", "replay"])
def test_a_damaged_entry_is_warned_about_and_computed_again(damage, tmp_path):
    options = {"cache": tmp_path / "cache", "seeds": [0], "replays": True}
    first = sweep(**options)
    place = next((tmp_path / "cache").glob("*/*"))
    entry = place / ENTRY_FILE
    if damage == "cut":
        entry.write_text(entry.read_text()[:-40])
    elif damage == "number":
        record = json.loads(entry.read_text())
        record["row"]["attainment"] = 0.123
        entry.write_text(json.dumps(record))
    else:
        file = place / "replay" / "events.parquet"
        file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.warns(UserWarning, match="is damaged and will be computed again"):
        second = sweep(**options)
    pd.testing.assert_frame_equal(second.frame, first.frame)
    assert sweep(**options).frame["cached"].all()


def test_ctrl_c_gives_the_runs_so_far_and_the_next_call_goes_on(tmp_path):
    log = str(tmp_path / "log")
    options = {"policies": [Chunked(log=log, stop_at=3)], "seeds": range(5), "cache": tmp_path / "cache"}
    first = sweep(**options)
    assert first.interrupted and len(first.frame) == 2
    second = sweep(**options)
    assert not second.interrupted and len(second.frame) == 5 and lines(log) == 3 + 3


def test_a_sweep_of_a_notebooks_policy_in_two_processes_that_is_killed_loses_nothing(tmp_path):
    """The class lives in `__main__` there, and in another module here: its key is the same."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    script, environment = (
        ROOT / "tests" / "sweep_script.py",
        os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path]))},
    )
    process = subprocess.Popen([sys.executable, script, cache, log, "2"], start_new_session=True, env=environment)
    deadline = time.monotonic() + 60
    while len(list(cache.glob("*/*/" + ENTRY_FILE))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept, begun = len(list(cache.glob("*/*/" + ENTRY_FILE))), lines(log)
    assert 3 <= kept < 10
    namespace = runpy.run_path(str(script), init_globals={}, run_name="a_module")
    found = namespace["run"](str(cache), str(log), None)
    assert len(found.frame) == 10 and found.frame["cached"].sum() == kept and lines(log) == begun + 10 - kept
    expected = wb.sweep([Chunked(16)], trace=trace_of_script, executor=FixedCost(), planning=0.0, seeds=range(5), progress=False)
    same = found.where(chunk=16).reset_index(drop=True)
    assert same["ttft_p99_s"].tolist() == expected.frame["ttft_p99_s"].tolist()


def trace_of_script(seed: int) -> wb.Trace:
    return trace(seed, 4.0)


def test_a_dask_cluster_whose_worker_is_killed_half_way_loses_nothing(tmp_path):
    distributed = pytest.importorskip("distributed", reason="dask is not installed")
    import joblib

    expected = sweep([Chunked(), other], seeds=range(8))
    log = tmp_path / "log"
    with distributed.LocalCluster(n_workers=0, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50) as cluster:
        workers = [start_worker(cluster.scheduler_address) for _ in range(2)]
        try:
            with distributed.Client(cluster) as client, joblib.parallel_config(backend="dask"):
                client.wait_for_workers(2, timeout=60)
                killer = threading.Thread(target=kill_after, args=(workers[0], log, 3))
                killer.start()
                found = sweep([Slow(log=str(log)), other], seeds=range(8))
                killer.join()
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    assert workers[0].returncode == -signal.SIGKILL
    assert found.frame["error"].isna().all() and len(found.frame) == 16
    numbers = ["seed", "requests", "attainment", "ttft_p99_s", "decode_tokens_per_s"]
    assert found.frame[numbers].to_numpy().tolist() == expected.frame[numbers].to_numpy().tolist()


@dataclass
class Slow(Chunked):
    def __call__(self, view, plan) -> None:
        if self.is_new:
            time.sleep(0.1)
        super().__call__(view, plan)


def start_worker(address: str) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), *sys.path])), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def kill_after(worker: subprocess.Popen, log: Path, num: int) -> None:
    deadline = time.monotonic() + 60
    while lines(log) < num and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.kill()


# keys


def test_equal_content_has_equal_keys_and_any_change_another():
    def value(**changes):
        parts = {"policy": Chunked(), "executor": FixedCost(), "slo": SLOS, "seeds": (0, 1), "frame": pd.DataFrame({"a": [1.0]})}
        return keys.content_key(parts | changes)

    assert value() == value() == value(frame=pd.DataFrame({"a": [1.0]}))
    others = [
        value(policy=Chunked(chunk=65)),
        value(policy=other),
        value(executor=FixedCost(step_s=0.005)),
        value(executor=FixedCost(info=fixed_info(num_blocks=65))),
        value(slo=None),
        value(seeds=(1, 0)),
        value(seeds=[0, 2]),
        value(frame=pd.DataFrame({"a": [1.5]})),
        value(frame=pd.DataFrame({"b": [1.0]})),
        value(array=np.zeros(3)),
        value(array=np.zeros((3, 1))),
    ]
    assert len({value(), *others}) == len(others) + 1


def defined(source: str):
    namespace: dict = {"__name__": "a_cell"}
    exec(compile(source, "<cell>", "exec"), namespace)
    return namespace["policy"]


BASE = """
LIMIT = 3
def helper(x):
    return x + LIMIT
class Policy:
    def __call__(self, view, plan):
        plan.decode(view.running[:helper(1)])
policy = Policy()
"""


@pytest.mark.parametrize(
    ("old", "new", "is_same"),
    [
        ("LIMIT = 3", "\n\n# a comment\nLIMIT  =  3", True),
        ("helper(1)", "helper(2)", False),
        ("LIMIT = 3", "LIMIT = 4", False),
        ("x + LIMIT", "x - LIMIT", False),
        ("plan.decode", "plan.prefill", False),
        ("class Policy:", "class Policy:\n    depth = 2", False),
    ],
)
def test_a_policys_code_and_what_it_uses_are_in_its_key_and_comments_are_not(old, new, is_same):
    first, second = (keys.content_key(defined(source)) for source in (BASE, BASE.replace(old, new)))
    assert (first == second) == is_same


def test_an_edited_policy_of_the_same_name_is_run_again_and_the_old_one_is_still_there(tmp_path):
    body = "        plan.decode(view.running)\n        plan.prefill(view.waiting, 64)\n"
    cell = f"class Policy:\n    def __call__(self, view, plan):\n{body}policy = Policy()"
    edited = cell.replace("64", "8")
    cached = [sweep([defined(source)], seeds=[0], cache=tmp_path).frame["cached"].item() for source in (cell, edited, cell, edited)]
    assert cached == [False, False, True, True]


def test_a_run_in_this_process_leaves_the_policys_class_and_its_key_as_they_were():
    policy, call = Chunked(), Chunked.__call__
    before = keys.content_key(policy)
    sweep([policy], seeds=[0])
    assert Chunked.__call__ is call and keys.content_key(policy) == before


def test_threads_are_refused_since_they_would_share_an_executor():
    import joblib

    with joblib.parallel_config(backend="threading", n_jobs=2), pytest.raises(ValueError, match="runs need processes of their own"):
        sweep()


def test_closures_partials_lambdas_and_classes_that_name_each_other_have_keys():
    def make(n):
        return lambda view, plan: plan.decode(view.running[:n])

    assert keys.content_key(make(1)) == keys.content_key(make(1)) != keys.content_key(make(2))
    loop = "class A:\n    def __call__(self, v, p): return B\nclass B:\n    def f(self): return A\npolicy = A()"
    assert (
        keys.content_key(defined(loop)) == keys.content_key(defined(loop)) != keys.content_key(defined(loop.replace("self, v", "self, w")))
    )


def test_what_has_no_content_cannot_be_kept_and_says_what_to_do(tmp_path):
    with (
        open(tmp_path / "file", "w") as file,
        pytest.raises(TypeError, match=r"got TextIOWrapper as .*identity\(\) -> str, or run without a cache"),
    ):
        keys.content_key(file)


def test_latency_models_are_keyed_by_their_profile():
    from workbench.core import ExecutorInfo
    from workbench.features import NAMES

    def model(cost: float, seed: int = 0, **limits):
        rng = np.random.default_rng(seed)
        steps = pd.DataFrame(rng.integers(1, 50, (120, len(NAMES))).astype(float), columns=list(NAMES))
        steps["duration_s"] = cost * (1 + steps["decode_tokens"])
        info: ExecutorInfo = fixed_info(simulated=False)
        return wb.LatencyModel.fit(steps, info=info, commit="x").with_limits(**limits)

    assert model(0.001).identity() == model(0.001).identity()
    assert len({model(0.001).identity(), model(0.002).identity(), model(0.001, 1).identity(), model(0.001, max_requests=3).identity()}) == 4


def test_a_change_of_the_code_that_runs_makes_earlier_results_old(monkeypatch, tmp_path):
    log = tmp_path / "log"
    options = {"policies": [Chunked(log=str(log))], "cache": tmp_path / "cache", "seeds": [0]}
    sweep(**options)
    monkeypatch.setattr("workbench.experiments.sweep_plan.code_version", lambda: "another version")
    sweep(**options)
    assert lines(log) == 2


# reading


def test_a_sweeps_difference_is_at_one_cell_and_the_best_setting_says_among_how_many():
    found = sweep([Chunked(), other], parameters={"chunk": [8, 64]}, axes={"load": [20.0, 60.0]}, seeds=range(3))
    with pytest.raises(ValueError, match=r"several values, got \['load'\]. Name a value for each"):
        found.difference("other", "Chunked(chunk=64, log='', stop_at=None, fails_at=None, is_new=True)")
    difference = found.difference(other, Chunked(64), metric="ttft_p50_s", load=60.0)
    assert difference.n == 3 and difference.estimate > 0
    best = found.best("ttft_p50_s", by="policy_name", least=True, load=60.0)
    assert best.loc["Chunked", "tried"] == 2 and best.loc["other", "tried"] == 1
    means = found.where(load=60.0).groupby("policy")["ttft_p50_s"].mean()
    assert best.loc["Chunked", "ttft_p50_s"] == means.drop("other").min()
    assert found.policies[best.loc["Chunked", "policy"]].chunk in (8, 64)


def test_the_best_setting_is_sought_among_those_that_reach_the_bounds():
    found = sweep([Chunked()], parameters={"chunk": [4, 8, 64]}, seeds=range(2))
    means = found.frame.groupby("policy")[["ttft_p50_s", "itl_p99_s", "decode_tokens_per_s"]].mean()
    first, second = means["ttft_p50_s"].nsmallest(2)
    # the best of all is left out by a bound that only the others reach
    worse = found.best("ttft_p50_s", by="policy_name", least=True, at_least={"ttft_p50_s": (first + second) / 2})
    assert worse.loc["Chunked", "ttft_p50_s"] == second and worse.loc["Chunked", "reached"]
    out_of_reach = found.best("ttft_p50_s", by="policy_name", least=True, at_least={"ttft_p50_s": 1e6})
    assert not out_of_reach.loc["Chunked", "reached"] and out_of_reach.loc["Chunked", "ttft_p50_s"] == means["ttft_p50_s"].max()
