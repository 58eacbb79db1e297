"""What tests of policies share: short requests, replays on fixed costs, and one decision at a time on a ledger driven by hand."""

from random import Random

from workbench.config import FinetuneJob, RandomTokens
from workbench.core import Request, StepResult
from workbench.loop.ledger import Ledger
from workbench.loop.plan import Plan
from workbench.loop.views import Oracle
from workbench.policy import View
from workbench.replay import replay
from workbench.testing import FixedCost, FixedShape, fixed_info


def one(name, arrival_s=0.0, prompt=20, output=8, adapter=None, **more):
    return Request(
        request_id=name, arrival_s=arrival_s, prompt_tokens=prompt, output_tokens=output, max_tokens=output, adapter=adapter, **more
    )


def run(policy, requests, *, jobs=0, documents=(30, 30), num=40, evaluate=False, costs=None, limits=None, **options):
    """A replay on fixed costs with `jobs` jobs of `num` micro-batches, planning for free."""
    evaluation = {"evaluate_every": 1, "evaluation_documents": ((16,),)} if evaluate else {}
    shapes = {f"job:t{i}": FixedShape(documents, num, 1, **evaluation) for i in range(jobs)}
    executor = FixedCost(info=fixed_info(**(limits or {})), shapes=shapes, **(costs or {}))
    tuned = [FinetuneJob(adapter=f"t{i}", data=RandomTokens(), steps=num) for i in range(jobs)]
    return replay(requests, executor=executor, policy=policy, jobs=tuned, planning=0.0, progress=False, **options)


def kinds(result):
    """The set of work kinds of each step, as a short word: f(inetune) e(valuate) p(refill) d(ecode) b(ackward)."""
    return ["".join(sorted({k[0] for k in rows})) for _, rows in result.work.groupby("step")["kind"]]


class Desk:
    """A policy before a ledger that the test drives: what arrives, what time it is, and one decision at a time."""

    def __init__(self, policy, *, slo=None, costs=None, arrivals=(), **limits):
        self.policy = policy
        executor = FixedCost(info=fixed_info(**limits), **(costs or {}))
        self.ledger = Ledger(executor.info, executor.adapter_infos, predictor=executor, slo=slo)
        self.view = View(self.ledger, Random(0), Oracle(lambda: tuple(arrivals)))

    def arrive(self, *requests):
        for r in requests:
            assert self.ledger.arrive(r, r.arrival_s)

    def job(self, documents=(30, 30), num=3, name="t"):
        job = FinetuneJob(adapter=name, data=RandomTokens(), steps=1)
        self.ledger.add_job(job, FixedShape(documents, num), self.ledger.now_s)
        return self.view.jobs[-1]

    def decide(self, now_s=None):
        """The policy's plan at `now_s`; nothing of it is done yet."""
        if now_s is not None:
            self.ledger.now_s = now_s
        plan = Plan(self.ledger)
        self.policy(self.view, plan)
        self.ledger.planned()
        return plan

    def step(self, now_s=None, duration_s=0.01):
        """Decide, and do it: the names of the requests that it prefilled, in the plan's order."""
        plan = self.decide(now_s)
        batch = self.ledger.apply(plan)
        self.ledger.now_s += duration_s
        result = StepResult(duration_s=duration_s)
        self.ledger.commit(batch, result, self.ledger.now_s)
        self.ledger.last = (batch, result, self.ledger.now_s - duration_s, plan.predicted_s, 0.0)
        return began(plan)

    def of(self, name):
        return self.ledger.requests[name].view


def began(plan):
    """The requests that a plan prefills, in its order."""
    return [s.id for s, _, _ in plan.prefills]
