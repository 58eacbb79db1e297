"""The baseline of W1 and W4: transformers + PEFT over the very same base weights, in the same process."""

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from workbench.bench import decode, finetune
from workbench.bench.session import Session
from workbench.core import Request

if TYPE_CHECKING:
    from workbench.runtime.peft_baseline import PeftBaseline

SYSTEM = "PEFT"
BATCHES = (1, 16, 64)  # 256 prompts in one padded prefill do not fit beside the engine
SETS = {"1 x r8": (8,), "4 x r8": (8,) * 4}


def run(session: Session, workload: str) -> None:
    """The baseline's rows of a workload that has some."""
    if workload == "w1":
        _decode(session)
    elif workload == "w4":
        _finetune(session)


@contextmanager
def baseline(session: Session, ranks: Sequence[int]) -> Iterator[tuple["PeftBaseline", tuple[str, ...]]]:
    """PEFT on a view of the engine's base, with the same random adapters."""
    from workbench.runtime.peft_baseline import PeftBaseline

    peft = PeftBaseline(session.engine.view(), name=session.shape, config=session.sizes.config)
    with session.adapters(ranks) as names, tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Random weights come from no place that PEFT could name.
        warnings.filterwarnings("ignore", message=".*base_model_name_or_path")
        for name in names:
            session.engine.save_adapter(name, f"{folder}/{name}")
            peft.load_adapter(name, f"{folder}/{name}")
    yield peft, names


def _decode(session: Session) -> None:
    from workbench.runtime.driver import Driver

    context = session.sizes.context_tokens
    for name, ranks in SETS.items():
        wanted = [b for b in BATCHES if b in session.sizes.batches and session.wants(f"{name}, B={b} ({SYSTEM})")]
        if not wanted:
            continue
        with baseline(session, ranks) as (peft, adapters):
            for batch in wanted:
                with Driver(cast(Any, peft), seed=session.seed) as driver:
                    for i in range(batch):
                        adapter = adapters[i % len(adapters)]
                        driver.add(Request(request_id=f"r{i}", arrival_s=0.0, prompt_tokens=context, output_tokens=1, adapter=adapter))
                        driver.prefill(f"r{i}")
                    driver.step()

                    def step(driver: Any = driver) -> float:
                        driver.decode(list(driver.runs))
                        return driver.step().duration_s

                    decode.record_steps(session, f"{name}, B={batch}", session.times(step), ranks, batch, SYSTEM)


def _finetune(session: Session) -> None:
    for cell, batches in finetune.cells(session)[:2]:
        if session.wants(f"{cell} ({SYSTEM})"):
            jobs = [finetune.tuning_job(session, f"tuned-{i}", batch) for i, batch in enumerate(batches)]
            with baseline(session, ()) as (peft, _):
                finetune.record_rates(session, cell, finetune.tune(session, peft, jobs), SYSTEM)
