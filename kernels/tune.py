"""`python -m kernels.tune [--seconds S] [--into FOLDER] [--again] [--only OP]`: measure launches on this GPU and keep the best in a file.

For each problem (`kernels.tune_problems`, the most important first) the classes of shapes that its op asks a launch for are found by
running it once; each class gets its candidates (`kernels.candidates`), one class after another, the others at their best. A candidate's
result is compared with the op's reference before it is timed: one that is wrong, or that this GPU cannot run, is left out. Times are
medians of CUDA-graph replays with a cold L2 cache, as in `kernels.bench`; the default launch is left only for one that is faster by
MARGIN. The file is written after every problem, so that a run that is cut short keeps what it has; another run goes on from there.
"""

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

import torch

from kernels import bench
from kernels.backend import triton
from kernels.candidates import splits, variants
from kernels.launch import Launch, ShapeClass
from kernels.plan import overridden
from kernels.tune_problems import Instance, Problem, problems
from kernels.tuned import FOLDER, Entry, Gpu, TunedPlan

MARGIN = 0.02  # a choice that is less than this share faster may be noise
REPLAYS = 7
OPS = (
    "segmented_lora",
    "lora_swiglu",
    "tail_linear",
    "lora_gradients",
    "paged_attention",
    "linear_cross_entropy",
    "add_rms_norm",
    "swiglu",
)
Timer = Callable[[Sequence[Instance]], float]


def replay_us(instances: Sequence[Instance]) -> float:
    """The median time of one run in microseconds: a recorded graph runs all instances in turn, each with inputs of its own."""
    # `torch.cuda.graph` collects garbage and empties the allocator's cache at every recording: more than the rest of a trial costs.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for instance in instances:
                instance.run()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    bench.replay_us(graph)
    return statistics.median(bench.replay_us(graph) for _ in range(REPLAYS)) / len(instances)


@dataclass
class _Trial:
    launch: Launch
    time_us: float
    error: float


@dataclass
class Tuner:
    """Finds the best launches; `timer` times instances of one problem under the launches that hold, `clock` says how long it has been."""

    gpu: Gpu
    versions: dict[str, str]
    commit: str
    timer: Timer = replay_us
    clock: Callable[[], float] = time.perf_counter
    say: Callable[[str], None] = print
    workers: int = min(8, os.cpu_count() or 1)
    chosen: dict[ShapeClass, Entry] = field(default_factory=dict)
    refused: set[ShapeClass] = field(default_factory=set)

    @property
    def plan(self) -> TunedPlan:
        return TunedPlan(gpu=self.gpu, versions=self.versions, entries=tuple(self.chosen.values()))

    def tune(self, found: Iterable[Problem], seconds: float, written: Callable[[TunedPlan], object]) -> list[str]:
        """Tune the classes of `found` that are not chosen yet until `seconds` are over; the names of problems that were not reached.

        `written` gets the plan after every problem.
        """
        end, left = self.clock() + seconds, []
        for problem in found:
            if self.clock() >= end:
                left.append(f"{problem.op} {problem.name}")
                continue
            self._tune_problem(problem, end)
            written(self.plan)
        return left

    def _choose(self, trial: dict[ShapeClass, Launch]) -> Callable[[ShapeClass, Launch], Launch]:
        """What holds while a candidate is tried: the candidate, else what was chosen, else the default."""

        def choose(shape: ShapeClass, default: Launch) -> Launch:
            if shape in trial:
                return trial[shape]
            return self.chosen[shape].launch if shape in self.chosen else default

        return choose

    def _tune_problem(self, problem: Problem, end: float) -> None:
        instance = problem.prepare()
        asked: dict[ShapeClass, Launch] = {}

        def record(shape: ShapeClass, default: Launch) -> Launch:
            asked.setdefault(shape, default)
            return self._choose({})(shape, default)

        def error_here() -> float:
            with overridden(record):
                try:
                    return instance.error()
                except Exception as reason:
                    if not asked.keys() & self.chosen.keys():
                        raise
                    self.say(f"{problem.op} {problem.name}: {_first_line(reason)}")
                    return math.inf

        error = error_here()
        if not error < bench.TOLERANCE and asked.keys() & self.chosen.keys():
            # What was right where it was measured is not right here: both go back to the default launch.
            for shape in asked.keys() & self.chosen.keys():
                self.say(f"{problem.op} {problem.name}: error {error:.3g}; {self.chosen.pop(shape).launch} for {shape} is dropped")
                self.refused.add(shape)
            error = error_here()
        if not error < bench.TOLERANCE:
            self.say(f"{problem.op} {problem.name}: CHECK FAILED with error {error:.3g} before anything was tuned; left as it is")
            return
        todo = {shape: default for shape, default in asked.items() if shape not in self.chosen and shape not in self.refused}
        if not todo:
            return
        copies = min(bench.MAX_COPIES, max(2, math.ceil(bench.COLD_BYTES / problem.num_bytes)))
        instances = [instance, *(problem.prepare() for _ in range(copies - 1))]
        for shape, default in todo.items():
            if self.clock() >= end:
                return
            self.chosen[shape] = self._tune_class(problem, shape, default, instances, end)

    def _tune_class(self, problem: Problem, shape: ShapeClass, default: Launch, instances: Sequence[Instance], end: float) -> Entry:
        """Splits first, then every variant with the best number of them, then splits once more around the best variant."""
        trials: dict[Launch, _Trial] = {default: self._try(shape, default, instances, is_default=True)}
        rounds = (
            lambda best: splits(shape, best, self.gpu.processors),
            lambda best: [replace(variant, splits=best.splits) for variant in variants(shape, default)],
            lambda best: splits(shape, best, self.gpu.processors),
        )
        for candidates in rounds:
            untried = [launch for launch in candidates(_ranked(trials)[0].launch) if launch not in trials]
            if self.clock() < end:
                self._compile(shape, untried, instances[0])
            for launch in untried:
                if self.clock() < end:
                    trials[launch] = self._try(shape, launch, instances)
        ranked = _ranked(trials)
        num_failed = sum(not math.isfinite(trial.time_us) for trial in trials.values())
        fastest, first = ranked[0], trials[default]
        best = fastest if fastest.time_us < (1 - MARGIN) * first.time_us else first
        others = [trial for trial in ranked if trial is not best and math.isfinite(trial.time_us)]
        self.say(
            f"{problem.op} {problem.name}: {shape.op} rows {shape.rows}, length {shape.length}, programs {shape.programs}, "
            f"rank {shape.rank}: {first.time_us:.2f} -> {best.time_us:.2f} us of {len(trials)} ({num_failed} failed) {best.launch}"
        )
        return Entry(
            shape=shape,
            launch=best.launch,
            time_us=best.time_us,
            default=default,
            default_us=first.time_us,
            runner_up=others[0].launch if others else None,
            runner_up_us=others[0].time_us if others else None,
            error=best.error,
            candidates=len(trials),
            problem=f"{problem.op} {problem.name}",
            commit=self.commit,
            date=datetime.now(UTC).date().isoformat(),
        )

    def _compile(self, shape: ShapeClass, untried: Sequence[Launch], instance: Instance) -> None:
        """Run each once, all at a time: most of a candidate's cost is its compilation, which leaves Python's lock free."""

        def run(launch: Launch) -> None:
            # What goes wrong here goes wrong again when it is tried, and is said there.
            with overridden(self._choose({shape: launch})), suppress(Exception):
                instance.outputs()

        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(run, untried))

    def _try(self, shape: ShapeClass, launch: Launch, instances: Sequence[Instance], *, is_default: bool = False) -> _Trial:
        """Check first, then time; an infinite time for a launch that is wrong or that the GPU cannot run, unless it is the default."""
        with overridden(self._choose({shape: launch})):
            try:
                error = instances[0].error()
            except Exception as reason:  # too much shared memory, too many registers, a compiler that gives up: each has a type of its own
                if is_default:
                    raise
                self.say(f"  {launch} does not run: {_first_line(reason)}")
                return _Trial(launch, math.inf, math.inf)
            if not error < bench.TOLERANCE:
                self.say(f"  {launch} is WRONG: error {error:.3g}; left out")
                return _Trial(launch, math.inf, error)
            return _Trial(launch, self.timer(instances), error)


def _ranked(trials: dict[Launch, _Trial]) -> list[_Trial]:
    """Fastest first; of equal ones, the one tried first."""
    return sorted(trials.values(), key=lambda trial: trial.time_us)


def _first_line(reason: BaseException) -> str:
    return (str(reason).splitlines() or [type(reason).__name__])[0][:120]


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": triton.__version__}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description="Measure kernel launches on this GPU, each checked first.")
    parser.add_argument("--seconds", type=float, default=300.0, help="stop after this long (300); another run goes on from there")
    parser.add_argument("--into", type=Path, default=FOLDER, help="the folder of plan files (kernels/plans)")
    parser.add_argument("--again", action="store_true", help="forget what the folder's file for this GPU holds")
    parser.add_argument("--only", choices=OPS, help="this op alone")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("kernels.tune needs a CUDA device, and torch finds none here. Run it on a machine with a GPU.", file=sys.stderr)
        return 2
    gpu, versions = Gpu.of(torch.device("cuda")), _versions()
    tuner = Tuner(gpu=gpu, versions=versions, commit=bench.provenance()["commit"])
    file = options.into / gpu.file_name
    if file.is_file() and not options.again:
        before = TunedPlan.load(file)
        if before.versions == versions:
            tuner.chosen = {entry.shape: entry for entry in before.entries}
        else:
            print(f"{file} was measured with {dict(before.versions)}: measured again")
    print(f"{gpu.name}, {gpu.processors} multiprocessors, {versions}, commit {tuner.commit}; {len(tuner.chosen)} classes known, {file}")
    found = [problem for problem in problems() if options.only in (None, problem.op)]
    left = tuner.tune(found, options.seconds, lambda plan: plan.save(options.into))
    print(f"{len(tuner.chosen)} classes in {file}; {len(left)} of {len(found)} problems not reached" + (":" if left else ""))
    print("".join(f"  {name}\n" for name in left), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
