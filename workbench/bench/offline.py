"""W2: 256 requests with log-normal lengths, all at t = 0: output tokens per second until the last has ended."""

from workbench.bench import correctness, serving
from workbench.bench.session import Session
from workbench.policies import FCFS

SECONDS = 40.0
TRACE = "w2-offline"


def run(session: Session) -> bool:
    """Four adapters, then none and one. False if the check fails."""
    if not session.check(correctness.serving_errors(session)):
        return False
    for cell, count in (("4 adapters", 4), ("no LoRA", 0), ("1 adapter", 1)):
        if not session.wants(cell):
            continue
        with session.adapters(serving.ADAPTER_RANKS[:count]) as names:
            adapters = names or (None,)
            serving.warm_up(session, adapters)
            requests = serving.with_adapters(session.requests(TRACE), adapters)
            result = serving.run(session, requests, FCFS())
        outputs, seconds = sum(len(tokens) for tokens in result.outputs.values()), float(result.steps["end_s"].max())
        assert outputs == sum(r.output_tokens or 0 for r in requests), "every output token of the trace must have been generated"
        note = f"{sum(r.prompt_tokens for r in requests)} prompt and {outputs} output tokens in {seconds:.2f} s, {result.policy}"
        session.record(cell, "output", [outputs / seconds], "tokens/s", n=len(requests), note=note)
    return True
