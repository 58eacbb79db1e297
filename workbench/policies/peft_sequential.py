"""Serving and fine-tuning as plain Hugging Face PEFT code does it: one after another."""

from dataclasses import dataclass, field

from workbench.policy import Plan, View


@dataclass
class PeftSequential:
    """One adapter's static batch at a time, run to its end; between two batches one whole fine-tune micro-batch, which blocks inference.

    A batch is the oldest waiting request and up to `batch_size` in all of the same adapter, by arrival. Nothing joins it later.
    Runs on executors that can neither mix kinds nor cut. Source: the PEFT baseline of the Loquetier paper (arXiv 2511.00101).
    """

    batch_size: int = 16
    group: frozenset[str] = field(default=frozenset(), repr=False)
    tuning: tuple[str, int] | None = field(default=None, repr=False)
    served_last: bool = field(default=False, repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        if self.tune(view, plan) or self.serve(view, plan):
            return
        jobs = [job for job in view.jobs if job.phase != "paused"]
        if jobs and (self.served_last or not view.waiting):
            job = min(jobs, key=lambda j: j.committed_tokens)
            self.tuning, self.served_last = (job.id, job.committed_tokens), False
            plan.train(job)
        elif view.waiting:
            same = [r for r in view.waiting if r.adapter == view.waiting[0].adapter]
            self.group, self.served_last = frozenset(r.id for r in same[: self.batch_size]), True
            self.serve(view, plan)

    def tune(self, view: View, plan: Plan) -> bool:
        """Go on with the micro-batch that was begun, until it is committed and evaluated."""
        for job in view.jobs:
            if self.tuning is not None and job.id == self.tuning[0] and job.phase != "paused":
                if job.committed_tokens == self.tuning[1] or job.phase == "evaluate":
                    plan.train(job)
                    return True
        self.tuning = None
        return False

    def serve(self, view: View, plan: Plan) -> bool:
        """Prefill the group, then decode it to its end."""
        waiting = [r for r in view.waiting if r.id in self.group]
        running = [r for r in view.running if r.id in self.group]
        plan.prefill(waiting)
        if plan.empty:
            plan.decode(running)
        return bool(waiting or running)
