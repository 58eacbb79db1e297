"""Making an earlier plan again on the state as it is now: for `plan.repeat()`, and for plans from a view one step old."""

from math import inf
from typing import TYPE_CHECKING

from workbench.loop.plan import Plan

if TYPE_CHECKING:
    from workbench.loop.ledger import Ledger


def redo(old: Plan, ledger: "Ledger") -> Plan:
    """The verbs of `old` once more, with the same amounts, for whatever they still apply to; each takes what fits now."""
    new = _serve_again(old, ledger)
    for chunks, phase, verb in (
        (old.finetunes, "forward", new.finetune),
        (old.evaluates, "evaluate", new.evaluate),
        (old.backwards, "backward", new.backward),
    ):
        for j, n in chunks:
            if ledger.jobs.get(j.id) is j and j.phase == phase:
                verb(j.view, n)
    _load_again(old, new, ledger)
    return new


def again(old: Plan, ledger: "Ledger") -> Plan | None:
    """What the policy that made `old` would plan by the same calls: the same serving, and training that goes on.

    None where it has to be asked: it would serve otherwise, a job has ended, a verb that has trained finds nothing to do, or it trained
    beside other than all running requests or before it served them, so that what is left for either may change.
    """
    if old.trained and ledger.running and not old.decodes_all:
        return None
    if any(ledger.jobs.get(verb.job.id) is not verb.job or verb.after != old.served for verb in old.trained):
        return None
    new = _serve_again(old, ledger)
    for name, j, amount, within_s, _, taken in old.trained:
        now = new.train(j.view, within_s=within_s) if name == "train" else getattr(new, name)(j.view, amount, within_s=within_s)
        if taken and not now:
            return None
    _load_again(old, new, ledger)
    is_same = new.decodes_all_of(old._all) or new.decodes == old.decodes
    is_same = is_same and [(s, n) for s, n, _ in new.prefills] == [(s, n) for s, n, _ in old.prefills]
    return new if is_same and not (new.loads or new.preempted or new.rejected or new.held) else None


def _serve_again(old: Plan, ledger: "Ledger") -> Plan:
    new = Plan(ledger)
    for s, reason in old.rejected.values():
        if ledger.requests.get(s.id) is s:
            new.reject(s.view, reason)
    for s in old.preempted.values():
        if s.blocks and s.id not in new.rejected:
            new.preempt(s.view)
    for adapter, version in sorted(old.evicted):
        if adapter in ledger.adapter_infos and ledger.adapter_infos[adapter].version == version:
            new.evict(adapter)
    for owner, paused in old.held.items():
        if owner in ledger.jobs:
            new.hold(ledger.jobs[owner].view, paused)
    running = ledger.running_views
    new.decode(running if old.decodes_all_of(running) else [s.view for s in old.decodes if s.phase == "running"], when_full="skip")
    for s, n, _ in old.prefills:
        if s.phase == "waiting":
            new.prefill(s.view, n)
    return new


def _load_again(old: Plan, new: Plan, ledger: "Ledger") -> None:
    for adapter, version in old.loads:
        if (adapter, version) not in old.versions and adapter in ledger.adapter_infos:
            new.load(adapter)
    if old.stops_on_arrival:
        new.stop_on_arrival()
    if old.stop_after_s < inf:
        new.stop_after(old.stop_after_s)
    new.refused = old.refused | new.refused
    new.queue_why = new.queue_why or old.queue_why
