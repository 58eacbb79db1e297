"""W6: four serving adapters beside one fine-tune job, at most 256 resident: attainment and committed fine-tune tokens per second."""

from dataclasses import dataclass, replace
from typing import Any

from workbench import traces
from workbench.bench import correctness, finetune, serving
from workbench.bench.rows import OURS
from workbench.bench.session import Session
from workbench.config import SLO
from workbench.core import Request
from workbench.policies import LatencyBudget, LoquetierStatic, SLOSlack

SECONDS = 120.0


@dataclass(frozen=True)
class Setting:
    """One row of the table: policy 21 as it comes; others stand beside it."""

    cell: str
    rate: int
    gap_s: float


SETTINGS = (
    Setting("2 req/s, gaps 45 ms", 2, 0.045),
    Setting("10 req/s, gaps 45 ms", 10, 0.045),
    Setting("2 req/s, gaps 20 ms", 2, 0.020),
)
POLICY = SLOSlack()
OTHERS = (LatencyBudget(budget_s=0.024), LoquetierStatic(max_resident=256))


def run(session: Session) -> bool:
    """Each setting under its policy, then under the others while time is left. False if a check fails."""
    if not session.check(correctness.serving_errors(session) | correctness.gradient_errors(session)):
        return False
    engine, before = session.engine, session.engine.config
    try:
        with session.adapters(serving.ADAPTER_RANKS) as names:
            wanted = [setting for setting in SETTINGS if session.wants(setting.cell)]
            if wanted:
                # From here on every replay records what its job's steps need before its clock runs.
                engine.config = replace(before, warm_up=True)
                session.predict_with(session.sizes.calibrate_s)
                serving.warm_up(session, names)
                finetune.warm_up(session)
            for policy in (None, *OTHERS):
                for setting in wanted:
                    if session.wants(setting.cell):
                        _measure(session, setting, policy)
    finally:
        engine.config = before
    return True


def _requests(session: Session, rate: int) -> list[Request]:
    """W3's arrivals of the horizon: those of 10 req/s as they are, or those of 5 req/s thinned to 2."""
    horizon_s = session.sizes.horizon_s
    if rate == 10:
        return session.requests("w3-10rps", duration_s=horizon_s)
    trace = traces.load("w3-5rps").scale(rate=rate, how="thin", seed=session.seed)
    return session.requests(trace, duration_s=horizon_s)


def _measure(session: Session, setting: Setting, other: Any) -> None:
    horizon_s = session.sizes.horizon_s
    requests = _requests(session, setting.rate)
    assert requests, f"{setting.cell}: no request arrives within {horizon_s} s, so the replay would never end"
    job = finetune.beside_requests(session)
    slo = SLO(ttft_s=5.0, itl_s=setting.gap_s)
    try:
        result = serving.run(session, requests, other or POLICY, [job], slo=slo, measure=(0.0, horizon_s))
    finally:
        session.engine.unload_adapter(job.adapter)
    found: dict[str, Any] = result.summary()
    system = OURS if other is None else f"{OURS}, {type(other).__name__}"
    note = f"{result.policy}; TTFT p99 {1e3 * found['ttft_p99_s']:.0f} ms, TPOT p50 {1e3 * found['tpot_p50_s']:.1f} ms"
    session.record(setting.cell, "attainment", [100 * found["attainment"]], "%", n=int(found["requests"]), system=system, note=note)
    note = f"{result.policy}; committed within {horizon_s:g} s"
    session.record(setting.cell, "fine-tune", [found["finetune_tokens_per_s"]], "tokens/s", system=system, note=note)
