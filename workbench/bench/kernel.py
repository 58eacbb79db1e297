"""W5: the kernels, one projection each, and what stands beside them: a torch loop over the adapters and the base GEMM alone."""

from typing import TYPE_CHECKING

from workbench.bench import correctness
from workbench.bench.rows import OURS
from workbench.bench.session import Session

if TYPE_CHECKING:
    from kernels.bench import Case

SECONDS = 75.0  # half of it on a machine that has compiled nothing yet
COMPUTE_BOUND_ROWS = 2048  # from here on the forward is judged beside the base GEMM, and the backward beside the forward
LOOP, GEMM, BOTH = "torch loop", "base GEMM", "base GEMM + LoRA"


def run(session: Session) -> bool:
    """Every cell of the table, then attention and cross-entropy on a GPU. False if any kernel's check fails."""
    from kernels import bench

    device = session.torch_device.type
    shapes = {f"{a} x r8, {k} -> {n}, T={rows}": (a, k, n, rows) for a, k, n, rows in session.sizes.lora}
    wanted = {cell: shape for cell, shape in shapes.items() if session.wants(cell)}
    others = [case for case in (bench.other_cases(quick=False) if session.on_cuda else ()) if session.wants(case.shape)]
    cases = {cell: {op: bench.lora_case(op, *shape, device=device) for op in bench.LORA_OPS} for cell, shape in wanted.items()}
    if not session.check(_errors(cases, others)):
        return False
    for cell, of_op in cases.items():
        if session.left_s > 0:
            _measure(session, cell, of_op, wanted[cell][3])
        else:
            session.skipped.append(f"w5 {cell}")
    for case in others:
        if session.left_s > 0:
            _record(session, case.shape, case.op, OURS, case)
    return True


def _errors(cases: "dict[str, dict[str, Case]]", others: "list[Case]") -> correctness.Errors:
    """The worst error of each op against its reference in float64, on at most 300 rows of every shape."""
    from kernels.bench import TOLERANCE

    # The check of segmented_lora compares the gradients too.
    checked = [of_op[op] for of_op in cases.values() for op in ("segmented_lora", "lora_loop", "base_gemm", "base_gemm_lora")] + others
    worst: dict[str, float] = {}
    for case in checked:
        # NaN is the worst error, whatever it is compared with
        found = [float("inf") if e != e else e for e in case.check().values()]
        worst[case.op] = max(worst.get(case.op, 0.0), *found)
    return {op: (error, TOLERANCE) for op, error in worst.items()} or {"no kernel was asked for": (0.0, TOLERANCE)}


def _measure(session: Session, cell: str, cases: "dict[str, Case]", rows: int) -> None:
    from kernels.bench import in_one_product

    is_one = in_one_product(rows, session.torch_device.type)
    _record(session, cell, "addition", LOOP, cases["lora_loop"])
    base, both = _record(session, cell, "GEMM", GEMM, cases["base_gemm"]), 0.0
    forward = _record(session, cell, "addition apart" if is_one else "addition", OURS, cases["segmented_lora"])
    if is_one or rows >= COMPUTE_BOUND_ROWS:
        both = _record(session, cell, "GEMM and addition", BOTH, cases["base_gemm_lora"])
    if is_one:
        note = f"in one product: {both:.1f} us against {base:.1f} us"
        session.record(cell, "addition", [both - base], "us", system=OURS, floor=cases["segmented_lora"].floor_us, note=note)
    if rows >= COMPUTE_BOUND_ROWS:
        backward = _record(session, cell, "backward", OURS, cases["lora_gradients"])
        session.record(cell, "over the base GEMM", [100 * (both / base - 1)], "%", note=f"{both:.1f} and {base:.1f} us")
        session.record(cell, "backward over forward", [backward / forward], "x", note=f"{backward:.1f} and {forward:.1f} us")


def _record(session: Session, cell: str, metric: str, system: str, case: "Case") -> float:
    """Measure and write one row; the median in microseconds."""
    from kernels.bench import REPLAYS, measure_us

    p20, p50, p80 = measure_us(case, device=session.torch_device.type)
    floor = case.floor_us if session.rates() is not None else None
    note = f"CUDA-graph replay, L2 cold: {case.num_copies} calls with inputs of their own" if session.on_cuda else "plain calls"
    row = session.record(
        cell,
        metric,
        [p50],
        "us",
        system=system,
        n=REPLAYS,
        floor=floor,
        spread=(p20, p80),
        num_bytes=case.num_bytes,
        flops=case.flops,
        note=note,
    )
    return row.p50
