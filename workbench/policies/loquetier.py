"""The two schedulers of the released Loquetier (arXiv 2511.00101): counters of inference steps between fine-tune turns."""

from dataclasses import dataclass, field

from workbench.policies.common import is_resident
from workbench.policy import JobView, Plan, RequestView, View


@dataclass
class LoquetierStatic:
    """A fine-tune turn after every `steps` inference steps; the backward pass takes a turn alone.

    What waited longer than `max_wait_s` is dropped; requests are admitted while fewer than `max_resident` are resident. An evaluation
    that is due runs at once, mixed with the residents. Else, while the count is below `steps` and something is resident, an inference
    step. Else a fine-tune turn: the forward mixed with the residents, and in the next such turn the backward alone.
    Source: the scheduler of the released Loquetier, N = 5, B = 16, waits of 6 s.
    """

    steps: int = 5
    max_resident: int = 16
    max_wait_s: float = 6.0
    count: int = field(default=0, repr=False)
    next_step: int = field(default=0, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        # those that were repeated without asking count as well
        self.count += max(0, view.step - self.next_step)
        self.next_step = view.step + 1
        waiting = []
        for request in view.waiting:
            is_new = not is_resident(request) and request.preemptions == 0
            if is_new and view.now_s - request.arrival_s > self.max_wait_s:
                plan.reject(request, f"waited over {self.max_wait_s:g} s")
            else:
                waiting.append(request)
        residents = len(view.running) + sum(map(is_resident, waiting))
        admitted = [r for r in waiting if is_resident(r)]
        admitted += [r for r in waiting if not is_resident(r)][: max(0, self.max_resident - residents)]
        residents = len(view.running) + len(admitted)
        jobs = [job for job in view.jobs if job.phase != "paused"]
        evaluations = [job for job in jobs if job.phase == "evaluate"]
        if not evaluations and (not jobs or self.count < self.num_steps(residents)) and residents:
            self.count += 1
            self.serve(view, plan, admitted)
            if not view.waiting:
                plan.repeat(max(0, self.num_steps(residents) - self.count) if jobs else None)
        elif jobs:
            self.count = 0
            self.tune(view, plan, admitted, evaluations or jobs)

    def num_steps(self, residents: int) -> int:
        """Inference steps between two fine-tune turns."""
        return self.steps

    def serve(self, view: View, plan: Plan, admitted: list[RequestView]) -> None:
        plan.decode(view.running)
        for request in admitted:
            plan.prefill(request, whole=request.prefill_left <= view.limits.tokens)
            if plan.why:
                break

    def tune(self, view: View, plan: Plan, admitted: list[RequestView], jobs: list[JobView]) -> None:
        backwards = [job for job in jobs if job.phase == "backward"]
        for job in backwards:
            plan.backward(job)
        if not backwards:
            self.serve(view, plan, admitted)
            for job in jobs:
                plan.train(job)


@dataclass
class LoquetierScalable(LoquetierStatic):
    """Loquetier static with a count that grows with the load: N = floor((steps * residents - 1) / max_resident) + 1, so 1 to `steps`.

    Source: the scheduler of the released Loquetier (arXiv 2511.00101).
    """

    def num_steps(self, residents: int) -> int:
        return (self.steps * residents - 1) // self.max_resident + 1
