"""Making an earlier plan again on the state as it is now: for `plan.repeat()`, and for plans from a view one step old."""

from typing import TYPE_CHECKING

from workbench.loop.plan import Plan

if TYPE_CHECKING:
    from workbench.loop.ledger import Ledger


def redo(old: Plan, ledger: "Ledger") -> Plan:
    """The verbs of `old` once more, with the same amounts, for whatever they still apply to; each takes what fits now."""
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
    for chunks, phase, verb in (
        (old.finetunes, "forward", new.finetune),
        (old.evaluates, "evaluate", new.evaluate),
        (old.backwards, "backward", new.backward),
    ):
        for j, n in chunks:
            if ledger.jobs.get(j.id) is j and j.phase == phase:
                verb(j.view, n)
    for adapter, version in old.loads:
        if (adapter, version) not in old.versions and adapter in ledger.adapter_infos:
            new.load(adapter)
    if old.stops_on_arrival:
        new.stop_on_arrival()
    new.refused = old.refused | new.refused
    new.queue_why = new.queue_why or old.queue_why
    return new


def is_same_work(old: Plan, new: Plan) -> bool:
    """Whether `new` does to the same owners exactly as much, and nothing else."""
    return (
        (new.decodes_all_of(old._all) or new.decodes == old.decodes)
        and [(s, n) for s, n, _ in new.prefills] == [(s, n) for s, n, _ in old.prefills]
        and new.finetunes == old.finetunes
        and new.evaluates == old.evaluates
        and new.backwards == old.backwards
        and not (new.loads or new.preempted or new.rejected or new.held)
    )


def can_go_on(old: Plan) -> bool:
    """Whether the jobs of a plan that was run have as much left of the same as it took."""
    chunks = [(j, n, "forward") for j, n in old.finetunes] + [(j, n, "evaluate") for j, n in old.evaluates]
    return not any(j.phase != phase or j.current.tokens - j.offset < n for j, n, phase in chunks) and not any(
        j.phase != "backward" or j.layers_left < n for j, n in old.backwards
    )
