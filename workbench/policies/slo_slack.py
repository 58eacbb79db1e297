"""Sprint and rest: decode until everybody can bear one late token, then train until the first of them needs the device again."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, takewhile
from math import inf

from workbench.config import SLO
from workbench.policies.common import ELSEWHERE, StepErrors, in_turn, is_resident, kind_of, repeat_decodes
from workbench.policy import JobView, Plan, RequestView, Room, View

REFILL_TOKENS = 768  # prompt tokens that are worth a slower step beside decodes, in a sprint
ROLLING_TOKENS = 512  # of prompts and decodes together, at least: a forward of so many costs little more than one of half as many
GATHERS = 0.1  # of the tightest TTFT target: for so long prompts gather until they are that many
SHORT = 0.1  # of the tightest TTFT target: with less left to wait for a place, serving goes before training
QUEUE = 0.25  # of all places: so many who find none may wait when a rest goes on, for the sprint to begin with
PIECES = 0.4  # of what trains in rests: by so much steps that also decode and prefill have to be cheaper, before it rolls
CYCLE_MEMORY = 0.7  # what a cycle counts for beside the next one
LONG_S = 5.0  # longer TTFT targets are no measure of how long to try something
PREFILLS = 0.55  # of the gap target: a sprint's steps with prefills or training may last so long, however large the excess of late


@dataclass
class Cycle:
    """A sprint and its rest: since when, whether places were filled again in it, seconds, decodes, seconds of rest; or a sum of several."""

    since_s: float = 0.0
    refills: bool = False
    seconds: float = 0.0
    decodes: float = 0.0
    rest_s: float = 0.0


@dataclass
class SLOSlack:
    """Sprints of decodes with little training, and rests of training without decodes, as far as the targets of all who are there allow.

    A gap target at quantile q forgives a request one late gap in 1 / (1 - q): one in a hundred at 0.99. A sprint decodes until everybody
    who runs has such a gap to spend. In the rest that follows, one late gap for each, jobs train in whole pieces. It ends when somebody
    falls behind the pace of its targets (first token + i * target: who reads at that pace hardly waits; `pace=False` leaves that out for
    gap targets), when a quarter more than the places wait for one, or when the first of them is due, less `reserve` of its TTFT target and
    the time to prefill them all. They are prefilled then, all but a last token each, so that their first tokens come together in the first
    step of the next sprint.

    Where not all of them find a place, those that become free in the sprint are filled again, many at a time and within the gap target,
    until nobody waits: the device decodes full batches, and the rest after it is the longer. Who arrives then waits for the next sprint,
    prefilled but for a last token beside the decodes of this one, where prompts fill a forward: the decodes read the weights anyway. Jobs
    train beside the other decodes, no longer than prompts may: a forward costs less there than in a rest, and so do the prompts of those
    who arrive in a sprint that is longer for it. Half of the gap target is left then, so errors of predictions make hardly a gap late.

    Where gaps are too few for that (TTFT targets short beside a hundred of them), where sprints that are filled again and again leave so
    little rest that fewer decodes, of longer steps, would train more (`end_cycle`), or where those who wait cannot wait until the sprint
    is over, it rolls, for twice as long each time: each step decodes, prefills and trains up to the tightest gap target, and prompts
    gather until they are as many tokens as the decodes. So places stay full while those without one have a tenth of their TTFT target
    left; later, it trains no more. A backward that turns out longer than predicted stops by itself on an executor with safepoints.
    Predictions are corrected by the usual ratio of measured to predicted of their kind of step, and for the rest the largest excess over
    that is kept in reserve, `margin` times in a sprint and `roll_margin` times where it rolls; it is forgotten by half every `memory`
    steps, and so is a quarter of the gap target, where it begins. So a machine whose steps are delayed for long now and then has its
    sprints and rests: a decode alone leaves the most room for that.

    Requests without a gap target have `token_s` per token, those without one for the first token `first_s`. A job without progress for
    `alive_s` gets one layer or `alive_tokens` tokens at all events. Jobs take turns by committed tokens.
    Source: ours. The pace is the delivery timeline of Andes (arXiv 2404.16283).
    """

    token_s: float = 0.05
    first_s: float = 1.0
    reserve: float = 0.1
    pace: bool = True
    margin: float = 2.0
    roll_margin: float = 1.15
    memory: int = 4096
    alive_s: float = 10.0
    alive_tokens: int = 32
    errors: StepErrors = field(default_factory=StepErrors, repr=False)
    late: dict[str, int] = field(default_factory=dict, repr=False)
    sprints: bool = field(default=False, repr=False)
    resting: bool = field(default=False, repr=False)
    enough_until_s: float = field(default=inf, repr=False)
    refills: bool = field(default=False, repr=False)
    rolls_s: float = field(default=0.0, repr=False)
    rolls_until_s: float = field(default=0.0, repr=False)
    steps_left: float = field(default=0.0, repr=False)
    num_longest: int = field(default=0, repr=False)  # of those that `steps_left` was for, at least
    cycle: Cycle = field(default_factory=Cycle, repr=False)
    lately: Cycle = field(default_factory=Cycle, repr=False)  # those whose sprints were filled again, older ones for less
    worth_s: float = field(default=inf, repr=False)  # rolling whose steps last longer than that trains more
    gathers_since_s: float = field(default=inf, repr=False)
    gap_s: float = field(default=inf, repr=False)
    ttft_s: float = field(default=inf, repr=False)
    has_one_ttft: bool = field(default=True, repr=False)  # whether all who ever came have the same target
    queue: Sequence[RequestView] | None = field(default=None, repr=False)  # who waited when the next fields were made
    order: list[RequestView] = field(default_factory=list, repr=False)
    lacks: list[int] = field(default_factory=list, repr=False)  # prompt tokens that each of them needs
    came_s: float = field(default=inf, repr=False)  # when the first of them arrived
    num_begun: int = field(default=0, repr=False)
    is_plain: bool = field(default=False, repr=False)  # whether they are in the order of their arrivals, those who have begun first
    due_s: float = field(default=inf, repr=False)  # by when the first token of somebody who waits should be there
    step: int = field(default=0, repr=False)
    step_s: float = field(default=0.0, repr=False)
    decoded_s: float = field(default=0.0, repr=False)
    prefilled: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        self.learn(view)
        self.look_at_queue(view)
        jobs = in_turn(view)
        sprints = bool(jobs) and self.chooses_to_sprint(view)
        if not (view.running or view.waiting):
            self.idle(view, plan, jobs)
        elif not self.resting and sprints and self.can_rest(view):
            self.resting = True
            self.enough_until_s = min((self.enough_s(view, r) for r in view.running), default=inf)
        if self.resting and plan.empty:
            self.resting = self.rest(view, plan, jobs)
            if not self.resting:
                self.begin_sprint(view, plan)
        elif plan.empty:
            self.serve(view, plan, jobs, sprints)
        self.errors.planned(plan)

    # what a step does

    def idle(self, view: View, plan: Plan, jobs: Sequence[JobView]) -> None:
        """With nobody there: a part of the tightest TTFT target, for who may arrive, or a backward that stops at an arrival."""
        if "safepoint" in view.can:
            plan.stop_on_arrival()
        for job in jobs:
            can_stop = plan.stops_on_arrival and job.phase == "backward"
            seconds = 0.2 * self.ttft_s if self.ttft_s < inf else self.first_s
            plan.train(job, within_s=inf if can_stop else self.errors.usually(plan, job.phase, seconds))
            if plan.empty:
                self.keep_alive(plan, job)

    def rest(self, view: View, plan: Plan, jobs: Sequence[JobView]) -> bool:
        """Train, and prefill at the end; False once the next sprint can begin."""
        due_s = self.due_s - self.margin * max(self.errors.excess_s.values(), default=0.0)
        left_s = min(due_s, self.enough_until_s) - self.prefilling_s(view) - 2 * self.step_s - view.now_s
        if left_s > 0 and len(view.waiting) - self.num_begun < view.free.requests + QUEUE * view.limits.requests:
            for job in jobs:
                plan.train(job, within_s=self.errors.usually(plan, job.phase, left_s))
        if plan.empty and "chunk" in view.can:
            self.enough_until_s = -inf
            self.prefill_ahead(plan, plan.left.tokens)
        return not plan.empty

    def prefill_ahead(self, plan: Plan, tokens: int, within_s: float = inf) -> None:
        """Prefill those who wait, but for a last token each: at most so many tokens. What is known of the queue is kept up to date."""
        left, lacks = tokens, self.lacks
        for place, request in enumerate(self.order):
            if lacks[place] <= 1:
                continue
            lacks[place] = request.prefill_left  # the prefix cache may have more of it, or less, by now
            asked = min(lacks[place] - 1, left)
            taken = plan.prefill(request, asked, within_s=within_s) if asked else 0
            left -= taken
            if taken:
                lacks[place] -= taken
                if place == self.num_begun:
                    self.num_begun += 1
                elif place > self.num_begun:
                    self.queue = None  # somebody was passed over
            if not left or (taken < asked and plan.why not in ELSEWHERE):
                break

    def begin_sprint(self, view: View, plan: Plan) -> None:
        """The first tokens of all who were prefilled, beside the first decodes; an executor without chunks prefills them here."""
        plan.decode(view.running)
        chunks = "chunk" in view.can
        begun = [r for r in view.waiting if not chunks or (is_resident(r) and r.prefill_left == 1)]
        plan.prefill(begun, whole=not chunks, skip=ELSEWHERE)
        self.queue = None
        self.end_cycle(view)
        if self.rolling_s() > self.worth_s:
            self.roll(view)
        self.refills = len(view.waiting) - len(begun) > view.free.requests
        self.steps_left = 1.0
        self.cycle = Cycle(view.now_s, self.refills)

    def serve(self, view: View, plan: Plan, jobs: Sequence[JobView], sprints: bool) -> None:
        """One step of a sprint, or of rolling."""
        gap_s = self.gap_s - (view.now_s - self.decoded_s) if view.running else inf
        plan.decode(view.running)
        self.refills = self.refills and sprints and bool(view.waiting)
        if view.waiting and not (sprints and not self.refills and self.can_wait(view)):
            if sprints and not self.refills:
                sprints, self.worth_s = False, 0.0
                self.roll(view)
            self.fill(view, plan, gap_s)
        elif view.waiting and "chunk" in view.can:
            self.fill_ahead(view, plan, gap_s)
        if sprints and not self.refills and not plan.prefills:
            self.train_beside(view, plan, jobs, gap_s)
        if not sprints and not self.is_short_of_places(view, plan):
            # who arrives waits for this step and is prefilled in the next one
            step_s = min(gap_s, (1 - self.reserve) / 2 * self.ttft_s) if view.running else 0.2 * self.ttft_s
            for job in jobs:
                bound_s = self.errors.surely(plan, job.phase, step_s, self.gap_s, self.roll_margin)
                self.train_within(view, plan, job, bound_s, step_s)
        for job in jobs:
            if not plan.is_named(job.id) and view.now_s - job.last_progress_s >= self.alive_s:
                self.keep_alive(plan, job)
        self.steps_left -= 1
        repeat_decodes(view, plan)

    def fill(self, view: View, plan: Plan, gap_s: float) -> None:
        """Prefill beside decodes: in a sprint many tokens at once and no padding; where it rolls as many as there are decodes, and
        ROLLING_TOKENS with them at least. All at once what gathered for long, or ends a sprint's queue.
        """
        whole = "chunk" not in view.can
        order = self.order
        if not view.running:
            plan.prefill(order, whole=whole, skip=ELSEWHERE)
            self.queue = None
            return
        bound_s = self.prefill_within_s(plan, gap_s)
        room = plan.left
        num_placed, left, is_late = self.gathered(view, room)
        tokens: int | None = None
        if not (whole or is_late or not view.jobs or (self.refills and len(order) <= num_placed)):
            if self.sprints:
                packed = view.limits.tokens - room.tokens
                tokens = max((b for b in view.token_buckets if packed < b <= packed + left), default=packed + left) - packed
                enough = min(REFILL_TOKENS, room.tokens)
            else:
                enough = self.filling(view, room)
                tokens = min(enough, left)
            if tokens < enough and plan.copy().prefill(order, tokens, skip=ELSEWHERE, within_s=bound_s) == tokens:
                return  # more would fit: they gather
        taken = plan.prefill(order, tokens, whole=whole, skip=ELSEWHERE, within_s=bound_s)
        if taken:
            self.gathers_since_s = inf
            self.took(taken)

    def fill_ahead(self, view: View, plan: Plan, gap_s: float) -> None:
        """In a sprint: prefill those who wait for the next one, where their prompts fill a forward beside the decodes."""
        room, lacks = plan.left, self.lacks
        enough = self.filling(view, room)
        if sum(lacks) - len(lacks) < enough:
            return  # whoever has a place
        placed = lacks[: self.num_begun + room.requests]
        if sum(placed) - len(placed) >= enough:
            self.prefill_ahead(plan, enough, self.prefill_within_s(plan, gap_s))

    def prefill_within_s(self, plan: Plan, gap_s: float) -> float:
        """How long a step with prefills beside decodes may be predicted to last."""
        margin = self.margin if self.sprints else self.roll_margin
        return max(self.errors.surely(plan, "prefill", gap_s, self.gap_s, margin), PREFILLS * self.gap_s)

    def filling(self, view: View, room: Room) -> int:
        """Tokens beside the decodes that fill a forward, as many as those at least; what the decodes leave is `room`."""
        left = room.tokens
        packed = view.limits.tokens - left
        wanted = max(ROLLING_TOKENS, 2 * packed)
        return min(next((b for b in view.token_buckets if b >= wanted), wanted) - packed, left)

    def gathered(self, view: View, room: Room) -> tuple[int, int, bool]:
        """How many have a place or find one, the tokens that they lack (as far as a step has room), and whether they gathered for long."""
        num_placed = self.num_begun + room.requests
        left = min(sum(self.lacks[:num_placed]), room.tokens)
        if left:
            self.gathers_since_s = min(self.gathers_since_s, view.now_s)
        # a step without them, and the one that prefills them, may last as long as a gap
        is_due = self.due_s - view.now_s < 2 * self.gap_s
        return num_placed, left, is_due or view.now_s - self.gathers_since_s >= GATHERS * self.ttft_s

    def is_short_of_places(self, view: View, plan: Plan) -> bool:
        """Whether somebody finds no place and has hardly any of its TTFT target left to wait for one."""
        if plan.queue_why not in ("requests", "blocks") and len(self.order) - self.num_begun <= view.free.requests:
            return False
        return self.due_s - view.now_s < SHORT * self.ttft_s

    def train_beside(self, view: View, plan: Plan, jobs: Sequence[JobView], gap_s: float) -> None:
        """In a sprint: layers beside the decodes, or what fills a forward with them, if that takes no longer than prefills may whatever
        happened of late, and those who wait can wait until a sprint of such steps is over.
        """
        within_s = min(PREFILLS * self.gap_s, gap_s)
        if not view.running or self.due_s <= view.now_s + self.steps_left * within_s + self.prefilling_s(view):
            return
        for job in jobs:
            bound_s = self.errors.usually(plan, job.phase, within_s)
            if job.phase == "backward":
                self.train_within(view, plan, job, bound_s, gap_s)
            elif job.phase == "forward":
                tokens = min(self.filling(view, plan.left), sum(job.next_tokens))
                if plan.copy().finetune(job, tokens, within_s=bound_s) == tokens:
                    plan.finetune(job, tokens)

    def train_within(self, view: View, plan: Plan, job: JobView, bound_s: float, step_s: float) -> None:
        """Train as long as is predicted to last `bound_s`; a backward beside decodes that turns out longer stops by itself before `step_s`,
        on an executor with safepoints.
        """
        errors, before_s, is_first = self.errors, plan.predicted_s, not plan.backwards
        done = plan.train(job, within_s=bound_s)
        if done and job.phase == "backward" and "safepoint" in view.can and view.running and is_first:
            layer_s = (plan.predicted_s - before_s) / done
            plan.stop_after(max(step_s - errors.plan_s - 1.5 * layer_s * errors.ratios.get(kind_of(plan), 1.0), 1e-6))

    def roll(self, view: View) -> None:
        """Sprint no more, for a while, or as long as training within gaps is worth it."""
        self.sprints, self.cycle = False, Cycle()
        self.rolls_s = 2 * max(self.rolls_s, min(self.ttft_s, LONG_S))
        self.rolls_until_s = view.now_s + self.rolls_s

    def keep_alive(self, plan: Plan, job: JobView) -> int:
        """One layer or a few tokens of what is due; all of it on an executor that cannot cut it."""
        if job.phase == "backward":
            return plan.backward(job, 1) or plan.backward(job)
        verb = plan.evaluate if job.phase == "evaluate" else plan.finetune
        return verb(job, self.alive_tokens) or verb(job)

    # when

    def chooses_to_sprint(self, view: View) -> bool:
        """Whether to sprint and rest: once it does, until somebody cannot wait; else asked anew once a sprint's steps have gone by."""
        is_asked = not self.sprints and view.running and not self.num_begun and self.steps_left <= 0
        if is_asked and len(view.waiting) <= view.free.requests:
            gaps = max(gaps_per_late(r.slo) for r in view.running)
            cycle_s = min((1 - self.reserve) * self.ttft_s, gaps * self.gap_s if self.pace else inf)
            rolling_s = self.rolling_s()
            self.sprints = gaps * rolling_s < cycle_s and (view.now_s >= self.rolls_until_s or rolling_s <= self.worth_s)
            self.steps_left = 0.0 if self.sprints else gaps
        return self.sprints

    def end_cycle(self, view: View) -> None:
        """Learn from a cycle whose sprint was filled again how long the steps of rolling have to be to train more.

        Rolling for L seconds a step saves 1 / pace - 1 / L decodes a second, each by what it costs whatever its rows, about half of it.
        That has to make up for `PIECES` of the share of time that trains now: training in pieces is slower, and nearer to the targets.
        Nothing is worth it before cycles of three TTFT targets were seen.
        """
        cycle, lately, memory = self.cycle, self.lately, CYCLE_MEMORY
        if cycle.refills and cycle.decodes:
            lately.seconds = memory * lately.seconds + view.now_s - cycle.since_s
            lately.decodes = memory * lately.decodes + cycle.decodes
            lately.rest_s = memory * lately.rest_s + cycle.rest_s
        self.worth_s = inf
        if lately.seconds >= 3 * min(self.ttft_s, LONG_S):
            fewest = (lately.decodes - PIECES * lately.rest_s / max(self.step_s / 2, 1e-9)) / lately.seconds
            self.worth_s = 1 / fewest if fewest > 0 else inf

    def rolling_s(self) -> float:
        """How long the steps of rolling last: what stalls any kind of step leaves them less."""
        return min(self.errors.left_s(name, self.gap_s, self.gap_s, self.roll_margin) for name in ("train", "prefill", "decode"))

    def can_rest(self, view: View) -> bool:
        """Whether nobody who runs misses its gap target by one more late gap."""
        if self.steps_left <= 0 or self.num_longest <= 0:
            spare = [self.gaps_to_spare(r) for r in view.running]
            self.steps_left = max(spare, default=0.0)
            self.num_longest = sum([gaps >= self.steps_left for gaps in spare])
        return self.steps_left <= 0

    def gaps_to_spare(self, request: RequestView) -> float:
        """How many more gaps on time it needs until one may be late; none if more were late than its tokens forgive: it is lost."""
        slo, generated = request.slo, request.generated
        if slo is None or slo.itl_s is None:
            return 0.0
        late, gaps = self.late.get(request.id, 0), gaps_per_late(slo)
        return 0.0 if late * gaps > generated else (late + 1) * gaps - generated

    def enough_s(self, view: View, request: RequestView) -> float:
        """Until when it has tokens enough, by the pace of its targets."""
        slo, first_s = request.slo, request.first_token_s
        assert first_s is not None
        gap_s = self.token_s if slo is None else slo.tpot_s or (slo.itl_s if self.pace else inf) or self.token_s
        end_s = inf if request.finish_by_s == inf else request.finish_by_s - view.remaining_s(request)
        return min(end_s, first_s + request.generated * gap_s)

    def can_wait(self, view: View) -> bool:
        """Whether those who wait can do so until the sprint is over."""
        return self.due_s > view.now_s + max(self.steps_left, 0.0) * self.step_s + self.prefilling_s(view)

    def begin_by_s(self, request: RequestView) -> float:
        """When its first token should be there; at once after a preemption."""
        first_s, slo = request.first_token_s, request.slo
        if first_s is not None:
            return first_s
        return request.arrival_s + (1 - self.reserve) * (self.first_s if slo is None or slo.ttft_s is None else slo.ttft_s)

    def prefilling_s(self, view: View) -> float:
        """How long it takes to prefill all who wait, as measured lately, and those who arrive meanwhile as they did."""
        if not view.waiting:
            return 0.0
        seconds, tokens = self.prefilled
        if not tokens:
            longest = max(view.waiting, key=lambda r: r.prefill_left)
            seconds, tokens = view.prefill_s(longest), max(1, longest.prefill_left)
        seconds *= 1.1 * sum(self.lacks) / tokens
        return seconds / (1.0 - min(0.5, seconds / max(view.now_s - self.came_s, 1e-9)))

    def ttft_target_s(self, request: RequestView) -> float:
        return self.first_s if request.slo is None or request.slo.ttft_s is None else request.slo.ttft_s

    def gap_target_s(self, request: RequestView) -> float:
        return self.token_s if request.slo is None else request.slo.itl_s or request.slo.tpot_s or self.token_s

    # learning

    def look_at_queue(self, view: View) -> None:
        """Those who wait, in the order in which they should begin, and when the first token of the first of them should be there.

        The view has those who have begun first, then who was preempted, then all others by arrival: where one TTFT target holds for all
        and nobody was preempted, only those who have begun are sorted, and who arrives comes last. What this policy prefilled it knows.
        Hundreds may wait, and nobody decodes while a policy thinks: only who arrived is looked at, unless something else happened.
        """
        waiting = view.waiting
        if waiting is self.queue:
            return
        if self.knows(waiting, len(view.arrived)):
            came = waiting[len(self.order) :]
            self.order += came
            self.lacks[0] = self.order[0].prefill_left
            self.lacks += [r.prefill_left for r in came]
        else:
            begun = self.num_begun = sum(1 for _ in takewhile(is_resident, waiting))
            self.is_plain = self.has_one_ttft and not any(r.preemptions for r in waiting[: begun + 1])
            if self.is_plain:
                self.order = [*sorted(waiting[:begun], key=self.begin_by_s), *waiting[begun:]]
            else:
                self.order = sorted(waiting, key=lambda r: (not is_resident(r), self.begin_by_s(r)))
            self.lacks = [r.prefill_left for r in self.order]
        self.queue, order, num_begun = waiting, self.order, self.num_begun
        firsts = (*order[:1], *order[num_begun : num_begun + 1]) if self.is_plain else order
        self.due_s = min(map(self.begin_by_s, firsts), default=inf)
        self.came_s = min([r.arrival_s for r in firsts], default=inf)

    def knows(self, waiting: Sequence[RequestView], num_came: int) -> bool:
        """Whether those who wait are those of `order`, and behind them who came: told by their number and both ends."""
        order, num, num_begun = self.order, len(self.order), self.num_begun
        if self.queue is None or not (self.is_plain and self.has_one_ttft) or not 0 < num == len(waiting) - num_came:
            return False
        if num_begun < num and not (waiting[num_begun] is order[num_begun] and waiting[num - 1] is order[-1]):
            return False
        is_preempted = num_begun and not is_resident(waiting[num_begun - 1])
        return not is_preempted and not (num_came and waiting[num].preemptions)

    def took(self, tokens: int) -> None:
        """So many tokens of those who wait are prefilled by this plan, in their order: who needs no more waits no more, if it runs."""
        num = 0
        while num < len(self.lacks) and self.lacks[num] <= tokens:
            tokens -= self.lacks[num]
            num += 1
        del self.order[:num], self.lacks[:num]
        if tokens and self.lacks:
            self.lacks[0] -= tokens
        self.num_begun = max(self.num_begun - num, tokens > 0)
        self.queue = []  # to be looked at again

    def learn(self, view: View) -> None:
        """Note the tightest targets, how the last step differed from its prediction, and whose gap was late."""
        finished = view.finished
        for request in view.arrived:
            ttft_s = self.ttft_target_s(request)
            self.has_one_ttft = self.has_one_ttft and (ttft_s == self.ttft_s or self.ttft_s == inf)
            self.ttft_s = min(self.ttft_s, ttft_s)
            self.gap_s = min(self.gap_s, self.gap_target_s(request))
        if finished and not any(self.gap_target_s(r) <= self.gap_s for r in chain(view.running, view.waiting)):
            self.gap_s = min(map(self.gap_target_s, chain(view.running, view.waiting)), default=inf)
        for request in finished:
            self.num_longest -= self.gaps_to_spare(request) >= self.steps_left - 1
            self.late.pop(request.id, None)
        last, repeated, self.step = view.last, view.step - self.step > 1, view.step
        if last is None:
            return
        kind = self.errors.learn(last, min(self.gap_s, self.token_s), self.memory)
        if "ward" in kind and "decode" not in kind:
            self.cycle.rest_s += last.duration_s
        if kind == "prefill":
            seconds, tokens = self.prefilled
            self.prefilled = 0.9 * seconds + last.duration_s, 0.9 * tokens + sum(n for _, what, n in last.work if what == "prefill")
        if self.sprints and "prefill" in kind and "decode" in kind:
            joined = [self.gaps_to_spare(r) for r in takewhile(lambda r: r.generated == 1, reversed(view.running))]
            if joined and max(joined) >= self.steps_left:
                self.steps_left, self.num_longest = max(joined), len(joined)
        if "decode" in kind or "prefill" in kind:
            self.note_gaps(view, repeated, "decode" in kind)

    def note_gaps(self, view: View, repeated: bool, decoded: bool) -> None:
        if decoded and not repeated:
            gap_s = view.now_s - self.decoded_s
            if gap_s <= self.gap_s:
                self.step_s += (0.1 if self.step_s else 1.0) * (gap_s - self.step_s)
            else:
                for request in view.running:
                    if request.generated > 1 and gap_s > self.gap_target_s(request):
                        self.late[request.id] = self.late.get(request.id, 0) + 1
        self.cycle.decodes += decoded
        if decoded or all(r.generated == 1 for r in view.running):
            self.decoded_s = view.now_s


def gaps_per_late(slo: SLO | None) -> float:
    """In how many gaps one may be late; 1 without a gap target, and very many at quantile 1."""
    return 1.0 if slo is None or slo.itl_s is None else 1.0 / (1.0 - slo.itl_quantile + 1e-9)
