"""A sweep as a notebook cell would write it: the policy is a class of `__main__`. Run by `test_sweep`, killed, and run again.

Arguments: folder of the cache, file for a line per computed run, number of processes.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

import workbench as wb
from workbench.testing import FixedCost

PAUSE_S = 0.1
LENGTHS = pd.DataFrame({"prompt_tokens": [8, 20, 32, 12], "output_tokens": [4, 2, 3, 1]})


@dataclass
class FromACell:
    """First come, first served; the first plan takes a while."""

    log: str
    chunk: int = 64
    is_new: bool = True

    def __call__(self, view, plan):
        if self.is_new:
            self.is_new = False
            time.sleep(PAUSE_S)
            with open(self.log, "a") as file:
                file.write("run\n")
        plan.decode(view.running)
        plan.prefill(view.waiting, self.chunk)


def trace(seed):
    return wb.traces.poisson(rate=4.0, duration_s=2.0, seed=seed).with_lengths(LENGTHS, seed=seed)


def run(cache: str, log: str, num_processes: int) -> wb.Sweep:
    options = {"executor": FixedCost(), "planning": 0.0, "seeds": range(5), "cache": Path(cache), "progress": False}
    return wb.sweep([FromACell(log)], trace=trace, parameters={"chunk": [16, 32]}, n_jobs=num_processes, **options)


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], int(sys.argv[3]))
