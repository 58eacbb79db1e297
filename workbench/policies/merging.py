"""One adapter merged into the base while nearly everybody asks for it."""

from dataclasses import dataclass, field

from workbench.policies.common import adapters_of, begin_in_order, continue_residents, not_begun, residents
from workbench.policy import Plan, RequestView, View


@dataclass
class CreditMerge:
    """Merge the adapter that fills the batch into the base, and unmerge before those displaced by it wait too long.

    The share of an adapter is that of its requests among the `window` oldest. Unmerged, the largest share at `merge_at` or above
    merges; merged, a share below `unmerge_at` unmerges. Merged, only that adapter's requests run: each that begins ahead of an older
    one gives it a credit, a request with `max_credit` ends the merged mode, and unmerged ones begin by credit, then by arrival. After each
    switch the thresholds move by `adapt` in favour of the mode that gave more tokens per second, a switch of `switch_s` counted
    against the merged one. On an executor that cannot merge (`"merge" not in view.can`) it is first come, first served.
    Source: dLoRA (Wu et al., OSDI 2024), its dynamic batching; thresholds and their steps are recalled, not copied.
    """

    merge_at: float = 0.8
    unmerge_at: float = 0.5
    adapt: float = 0.05
    switch_s: float = 0.01
    max_credit: int = 8
    window: int = 32
    merged: str | None = field(default=None, repr=False)
    credit: dict[str, int] = field(default_factory=dict, repr=False)
    speeds: dict[bool, float] = field(default_factory=dict, repr=False)
    spell: tuple[float, float] = field(default=(0.0, 0.0), repr=False)

    def __call__(self, view: View, plan: Plan) -> None:
        waiting = not_begun(view)
        everybody = sorted([*residents(view), *waiting], key=lambda r: r.arrival_s)
        self.credit = {r.id: self.credit[r.id] for r in everybody if r.id in self.credit}
        self.measure(view)
        self.switch(view, plan, everybody)
        if self.merged is None:
            left = continue_residents(view, plan)
            begin_in_order(view, plan, sorted(waiting, key=lambda r: -self.credit.get(r.id, 0)), left)
            return
        plan.decode([r for r in view.running if r.adapter == self.merged])
        mine = [r for r in view.waiting if r.adapter == self.merged]
        plan.prefill(mine)
        named = {s.id for s, _, _ in plan.prefills}
        for jumper in (r for r in waiting if r.id in named):
            for other in everybody:
                if other.adapter != self.merged and other.arrival_s < jumper.arrival_s:
                    self.credit[other.id] = self.credit.get(other.id, 0) + 1

    def measure(self, view: View) -> None:
        """Add the last step to the tokens and seconds of this spell of one mode."""
        if view.last is not None:
            tokens = sum(n for _, kind, n in view.last.work if kind in ("prefill", "decode"))
            self.spell = (self.spell[0] + tokens, self.spell[1] + view.last.duration_s)

    def switch(self, view: View, plan: Plan, requests: list[RequestView]) -> None:
        """Change the mode where the shares, or the credits of the displaced, ask for it."""
        oldest = requests[: self.window]
        shares = {a: sum(r.adapter == a for r in oldest) / len(oldest) for a in adapters_of(oldest)}
        if self.merged is None:
            best = max(shares, key=lambda a: (shares[a], a), default=None)
            wanted = best if best is not None and shares[best] >= self.merge_at else None
        else:
            stays = shares.get(self.merged, 0.0) >= self.unmerge_at and max(self.credit.values(), default=0) < self.max_credit
            wanted = self.merged if stays else None
        if wanted != self.merged and plan.merge(wanted):
            self.learn(is_merged=self.merged is not None)
            self.merged = wanted

    def learn(self, *, is_merged: bool) -> None:
        """A spell ends: move both thresholds towards the faster mode."""
        tokens, seconds = self.spell
        self.speeds[is_merged] = tokens / max(seconds + self.switch_s * is_merged, 1e-9)
        self.spell = (0.0, 0.0)
        if len(self.speeds) == 2:
            step = -self.adapt if self.speeds[True] > self.speeds[False] else self.adapt
            self.merge_at = min(1.0, max(0.5, self.merge_at + step))
            self.unmerge_at = min(self.merge_at, max(0.1, self.unmerge_at + step))
