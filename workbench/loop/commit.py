"""What a finished step does to requests and jobs; the second half of `Ledger.commit`."""

from typing import TYPE_CHECKING

from workbench.core import Batch, Segment, StepResult

if TYPE_CHECKING:
    from workbench.loop.ledger import Ledger
    from workbench.loop.plan import Plan
    from workbench.loop.states import JobState, RequestState


def log_refused(ledger: "Ledger", plan: "Plan", start_s: float) -> None:
    """Log for which request the reason to leave it out is another one than in the plan before; none any more is an empty note."""
    old, requests = ledger.refused, ledger.requests
    new = {name: why for name, why in plan.refused.items() if name in requests and not plan.is_named(name)}
    for name in old:
        if name not in new and name in requests:
            ledger.log(start_s, "refused", name, requests[name].adapter)
    for name, why in new.items():
        if old.get(name) != why:
            ledger.log(start_s, "refused", name, requests[name].adapter, None, why)
    ledger.refused = new


def commit_prefills(ledger: "Ledger", batch: Batch, result: StepResult, start_s: float, now_s: float) -> None:
    """Prefill chunks arrive at the step's end; the last chunk of a request brings a token with it."""
    requests, rows, step = ledger.requests, ledger.rows, ledger.step
    for segment in batch.segments:
        if segment.kind == "decode":
            break
        if segment.kind != "prefill":
            continue
        s = requests[segment.owner]
        if s.id not in ledger.begun:
            _begin(ledger, s, segment.start, start_s)
        s.prefilled = segment.end
        ledger.share(s, segment)
        rows.append((now_s, step, "prefill", s.id, s.adapter, float(segment.tokens), ""))
        if segment.samples:
            s.phase = "running"
            s.add_token(now_s)
            ledger.enter_queue(s, ledger.running)
            rows.append((now_s, step, "token", s.id, s.adapter, float(s.own_generated), ""))
            if _is_last(ledger, s, result):
                ledger.end(s, "finished", now_s)


def commit_together(ledger: "Ledger", batch: Batch, result: StepResult, ended: "list[RequestState]", now_s: float) -> None:
    """A token for every request that ran when the step was planned: counted before, not written. `ended`: those at their limit."""
    ledger.history.decoded(ledger.step, (now_s,))
    if result.tokens:
        ended = [s for segment in batch.of("decode") if _is_last(ledger, s := ledger.requests[segment.owner], result)]
    if ended:
        end_together(ledger, ended, now_s)


def end_together(ledger: "Ledger", ended: "list[RequestState]", now_s: float) -> None:
    """The requests end that have reached their limit with a step in which all decoded, in the order of its rows."""
    if len(ended) > 1:
        ended = sorted(ended, key=lambda s: s.stint.row)  # type: ignore[union-attr]
    for s in ended:
        ledger.end(s, "finished", now_s)


def commit_decodes(ledger: "Ledger", batch: Batch, result: StepResult, now_s: float) -> None:
    """A token for some of the running requests: written for each."""
    decoded = [ledger.requests[segment.owner] for segment in batch.of("decode")]
    for s in decoded:
        s.add_token(now_s)
        ledger.rows.append((now_s, ledger.step, "token", s.id, s.adapter, float(s.own_generated), ""))
    for s in decoded:
        if _is_last(ledger, s, result):
            ledger.end(s, "finished", now_s)


def _is_last(ledger: "Ledger", s: "RequestState", result: StepResult) -> bool:
    """Keep the sampled token; whether the request ends with it: at its limit, or at an end-of-sequence token when the text decides."""
    ends = s.generated >= s.limit
    if result.tokens:
        token = result.tokens[s.id]
        s.outputs.append(token)
        ends = ends or (s.request.output_tokens is None and token in ledger.info.eos_token_ids)
    return ends


def _begin(ledger: "Ledger", s: "RequestState", cached_tokens: int, start_s: float) -> None:
    ledger.enter_queue(s, ledger.begun)
    if not s.admitted:
        s.admitted = True
        ledger.log(start_s, "scheduled", s.id, s.adapter)
        if s.adapter is not None:
            ledger.uses[s.adapter] = (ledger.uses.get(s.adapter, (0, 0.0))[0] + 1, start_s)
    if cached_tokens:
        ledger.log(start_s, "cached", s.id, s.adapter, float(cached_tokens))


def commit_jobs(ledger: "Ledger", batch: Batch, result: StepResult, now_s: float) -> None:
    """Forward chunks, backward slices and evaluation of every job in the batch, then the versions that the step published."""
    owners = {job.job.adapter: job.id for job in ledger.jobs.values()} if result.published else {}
    for segment in batch.segments:
        if segment.kind == "finetune":
            _forward(ledger, ledger.jobs[segment.owner], segment, result, now_s)
        elif segment.kind == "evaluate":
            _evaluate(ledger, ledger.jobs[segment.owner], segment, result, now_s)
    for backward in batch.backwards:
        job = ledger.jobs[backward.owner]
        layers = result.layers_done.get(job.id, backward.num_layers)
        assert 0 <= layers <= backward.num_layers, (backward, layers)
        if layers:
            _backward(ledger, job, layers, now_s)
    for adapter, version in result.published.items():
        ledger.log(now_s, "published", owners.get(adapter, adapter), adapter, float(version))


def _forward(ledger: "Ledger", job: "JobState", segment: Segment, result: StepResult, now_s: float) -> None:
    ledger.log(now_s, "forward", job.id, job.job.adapter, float(segment.tokens))
    job.last_progress_s = now_s
    job.offset += segment.tokens
    loss_sum, loss_tokens = result.losses.get(job.id, (0.0, 0))
    job.loss_sum += loss_sum
    job.loss_tokens += loss_tokens
    if job.offset == job.current.tokens:
        job.phase, job.layers_left = "backward", job.layers
        if job.loss_tokens:
            ledger.log(now_s, "loss", job.id, job.job.adapter, job.loss_sum / job.loss_tokens)
        job.loss_sum, job.loss_tokens = 0.0, 0


def _backward(ledger: "Ledger", job: "JobState", layers: int, now_s: float) -> None:
    ledger.log(now_s, "backward", job.id, job.job.adapter, float(layers))
    job.last_progress_s = now_s
    job.layers_left -= layers
    if job.layers_left:
        return
    micro_batch = job.current
    job.committed_tokens += micro_batch.tokens
    ledger.log(now_s, "committed", job.id, job.job.adapter, float(micro_batch.tokens))
    _free_rows(ledger, job)
    if micro_batch.ends_window:
        job.optimizer_steps += 1
        ledger.log(now_s, "optimizer_step", job.id, job.job.adapter, float(job.optimizer_steps))
    if job.evaluation and job.shape.evaluates_after(job.index):
        job.phase, job.eval_index, job.offset = "evaluate", 0, 0
    else:
        job.next_micro_batch()
        _finish(ledger, job, now_s)


def _evaluate(ledger: "Ledger", job: "JobState", segment: Segment, result: StepResult, now_s: float) -> None:
    job.last_progress_s = now_s
    job.offset += segment.tokens
    loss_sum, loss_tokens = result.eval_losses.get(job.id, (0.0, 0))
    job.eval_sum += loss_sum
    job.eval_tokens += loss_tokens
    if job.offset < job.current.tokens:
        return
    _free_rows(ledger, job)
    job.eval_index, job.offset = job.eval_index + 1, 0
    if job.eval_index < len(job.evaluation):
        return
    if job.eval_tokens:
        ledger.log(now_s, "eval_loss", job.id, job.job.adapter, job.eval_sum / job.eval_tokens)
    job.eval_sum, job.eval_tokens, job.eval_index = 0.0, 0, 0
    job.next_micro_batch()
    _finish(ledger, job, now_s)


def _free_rows(ledger: "Ledger", job: "JobState") -> None:
    ledger.arena.release(job.id)
    job.rows = None


def _finish(ledger: "Ledger", job: "JobState", now_s: float) -> None:
    if not job.is_active:
        ledger.log(now_s, "job_finished", job.id, job.job.adapter)
        ledger.drop_job(job)
