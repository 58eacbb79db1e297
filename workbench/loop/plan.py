"""The plan that a policy fills: every verb takes what fits, so that no policy can break a limit.

A plan changes nothing: it counts against the ledger's free resources and keeps what it took; `Ledger.apply` makes it true.
"""

from collections.abc import Container, Iterable
from math import inf
from typing import TYPE_CHECKING, Literal

from workbench.config import did_you_mean
from workbench.core import AdapterInfo
from workbench.features import pairs_until, totals
from workbench.loop.plan_accounts import Accounts, PlanError, Why
from workbench.loop.views import JobView, RequestView

if TYPE_CHECKING:
    from workbench.loop.states import JobState, RequestState


class Plan(Accounts):
    """One step in the making.

    A verb takes what fits, returns what it took and leaves the reason for the rest in `why` ("" when everything was taken). `within_s`
    bounds the predicted duration of the whole plan. Verbs raise PlanError only for misuse. `batch_adapters` counts serving versions;
    the weights of a job in training need neither a slot nor a place among them.
    """

    __slots__ = ()

    # serving

    def decode(
        self, requests: RequestView | Iterable[RequestView], *, when_full: Literal["preempt", "skip"] = "preempt"
    ) -> tuple[RequestView, ...]:
        """One token for each running request that fits; those taken.

        Without a free block it preempts the youngest of the others that this plan does not use (`"preempt"`: recomputed later) or
        leaves the request out (`"skip"`).
        """
        if when_full not in ("preempt", "skip"):
            raise PlanError(f"when_full must be 'preempt' or 'skip', got {when_full!r}")
        self.why = ""
        if not self._is_kind("decode"):
            return ()
        running = self._ledger._running_views
        if requests is running and running and self._decode_all(running):
            return running
        self._decodes, self._named, self._all = self.decodes, self.named, None
        named, versions, max_versions = self._named, self.versions, self._ledger.info.max_batch_adapters
        taken: list[RequestView] = []
        context = 0
        for view in (requests,) if isinstance(requests, RequestView) else requests:
            s: RequestState = view._state
            if s.id in named or s.phase != "running":
                self._check_named(s.id)
                raise PlanError(f"only a running request can decode, {s.id!r} is {s.phase}. Prefill a waiting one first.")
            if s.id in self.preempted or s.id in self.rejected:
                self.why = "phase"
                continue
            if self._tokens == 0:
                self.why = "tokens"
                break
            is_new = s.key is not None and s.key not in versions
            if is_new and len(versions) >= max_versions:
                self.why = self.refused[s.id] = "batch_adapters"
                continue
            if s.capacity < s.context:
                if self._blocks == 0 and not (when_full == "preempt" and self._preempt_youngest(s)):
                    self.why = self.refused[s.id] = "blocks"
                    continue
                self._blocks -= 1
            if is_new:
                assert s.key is not None
                versions.add(s.key)
                self.work.adapters.add(s.key)
            self._tokens -= 1
            named.add(s.id)
            self._decodes.append(s)
            taken.append(view)
            context += s.context
        if taken:
            v, n = self.work.values, len(taken)
            v[3] += n
            v[6] += context
            v[7] += n
            v[8] += n
            v[9] = len(self.work.adapters)
            self._took("decode")
        return tuple(taken)

    def _decode_all(self, views: tuple[RequestView, ...]) -> bool:
        """Decode everything that runs, from the sums of the group; False where one of them might not fit or stands out."""
        ledger = self._ledger
        if self._all is not None or self._decodes or self.preempted or self.rejected or self._tokens < len(views):
            return False
        group = ledger.decoding if ledger.decoding.is_open else ledger.together()
        versions = self.versions | group.versions.keys() if self.versions else set(group.versions)
        num_growing = len(group.need_block())
        if len(versions) > ledger.info.max_batch_adapters or num_growing > self._blocks:
            return False
        n = group.num
        self._all, self.versions = views, versions
        self._tokens -= n
        self._blocks -= num_growing
        v = self.work.values
        self.work.adapters.update(group.versions)
        v[3] += n
        v[6] += group.context
        v[7] += n
        v[8] += n
        v[9] = len(self.work.adapters)
        self._took("decode")
        return True

    def prefill(
        self,
        requests: RequestView | Iterable[RequestView],
        tokens: int | None = None,
        *,
        whole: bool = False,
        skip: Container[Why] = (),
        within_s: float = inf,
    ) -> int:
        """Prefill waiting requests, in the given order, with at most `tokens` tokens together; the number of tokens taken.

        The last one may be cut into a chunk, unless `whole`. It stops at the first request that does not fit, unless its reason is in
        `skip`. A request begins only if its whole prefill fits the free blocks; it holds them from then on. Tokens in the prefix cache
        (`RequestView.cached_tokens`) are not computed and use up no tokens; their blocks count only if nobody else holds them.
        """
        if tokens is not None or within_s != inf:
            self._check_amount("tokens", tokens)
            self._check_within(within_s)
        self.why = ""
        if not requests or not self._is_kind("prefill"):
            return 0
        total = 0
        for view in (requests,) if isinstance(requests, RequestView) else requests:
            s: RequestState = view._state
            self._check_named(s.id)
            if s.phase != "waiting":
                raise PlanError(f"only a waiting request can be prefilled, {s.id!r} is {s.phase}. Use plan.decode for a running one.")
            if s.id in self.preempted or s.id in self.rejected:
                continue
            n, why = self._prefill(s, None if tokens is None else tokens - total, whole, within_s)
            total += n
            if why:
                self.why = why
                if not n:
                    self.refused[s.id] = why
                if why not in skip:
                    self.queue_why = why
                    break
        return total

    def _prefill(self, s: "RequestState", budget: int | None, whole: bool, within_s: float) -> tuple[int, Why]:
        info, slots = self._ledger.info, self._ledger.slots
        found = self._ledger.cached_blocks(s)
        first = s.prefilled + len(found) * info.block_tokens
        left = s.context - first
        most = min(left, self._tokens if budget is None else min(budget, self._tokens))
        is_whole = whole or "chunk" not in info.can
        if most == 0 or (is_whole and most < left):
            asked_for_a_cut = not whole and budget is not None and 0 < budget < left <= self._tokens
            return 0, "unsupported" if asked_for_a_cut else "tokens"
        adapter, key, blocks = s.info, s.key, 0
        if not s.blocks:
            blocks = -(-s.context // info.block_tokens) - sum([self._holders(block) > 0 for block in found])
            if key is None and s.adapter is not None:
                adapter = self._ledger.adapter_infos[s.adapter]
                key = (s.adapter, adapter.version)
            if s.adapter in self._ledger.away:
                return 0, "adapter_loading"
            if self._requests == 0 or blocks > self._blocks:
                return 0, "requests" if self._requests == 0 else "blocks"
            if key is not None and not self._has_slot(key):
                return 0, "slots"
        if key is not None and key not in self.versions and len(self.versions) >= info.max_batch_adapters:
            return 0, "batch_adapters"
        loads = key is not None and key not in slots.entries and key not in self.loads

        work = self.work
        v, adapters = work.values, len(work.adapters) + (key is not None and key not in work.adapters)
        tokens, pairs, requests, samples = v[2], v[5], v[7], v[8]
        if loads:
            assert adapter is not None and key is not None
            num_loads, load_bytes, read_s = v[14] + 1, v[15] + adapter.bytes, work.read_s + self._ledger.host.read_s(key, adapter)
        else:
            num_loads, load_bytes, read_s = v[14], v[15], work.read_s

        def put(n: int) -> None:
            stop = first + n
            v[2] = tokens + n
            v[5] = pairs + (stop * (stop + 1) - first * (first + 1)) // 2
            v[7], v[8], v[9] = requests + 1, samples + (stop == s.context), adapters
            v[14], v[15], work.read_s = num_loads, load_bytes, read_s

        n = self._largest("prefill", most, put, within_s, whole=is_whole)
        if n == 0:
            return 0, "within_s"
        if key is not None:
            work.adapters.add(key)
        self._tokens -= n
        self._blocks -= blocks
        self._requests -= not s.blocks
        if found:
            self._share(s, found)
        if key is not None:
            if loads:
                assert adapter is not None
                self._load(key, adapter)
            self._use(key)
        self._named.add(s.id)
        self.prefills.append((s, n, adapter))
        self._took("prefill")
        return n, "" if n == left else "tokens" if n == most else "within_s"

    # fine-tuning

    def finetune(self, job: JobView, tokens: int | None = None, *, within_s: float = inf) -> int:
        """Forward of the job's micro-batch, up to `tokens` tokens further; it may stop inside an example. The tokens taken."""
        return self._note("finetune", job, tokens, within_s, self._finetune(job, tokens, within_s))

    def evaluate(self, job: JobView, tokens: int | None = None, *, within_s: float = inf) -> int:
        """Forward without gradients of an evaluation that is due, up to the end of its micro-batch. The tokens taken."""
        return self._note("evaluate", job, tokens, within_s, self._evaluate(job, tokens, within_s))

    def train(self, job: JobView, *, within_s: float = inf) -> int:
        """Whichever of the three is due: forward or evaluation tokens, or backward layers. The amount taken."""
        phase = job._state.phase
        verb = self._backward if phase == "backward" else self._evaluate if phase == "evaluate" else self._finetune
        return self._note("train", job, None, within_s, verb(job, None, within_s))

    def backward(self, job: JobView, num_layers: int | None = None, *, within_s: float = inf) -> int:
        """Backward of the job's micro-batch, up to `num_layers` layers further down. The layers taken.

        An executor that cannot cut it (`EngineConfig(backward="whole")`) takes all layers that are left or none: fewer are "unsupported".
        """
        return self._note("backward", job, num_layers, within_s, self._backward(job, num_layers, within_s))

    def _backward(self, job: JobView, num_layers: int | None, within_s: float) -> int:
        if num_layers is not None:
            self._check_amount("num_layers", num_layers)
        self._check_within(within_s)
        s = self._job(job)
        left = s.layers_left
        is_first = left == self._ledger.info.num_layers
        most = left if num_layers is None else min(num_layers, left)
        if not self._may_train(s, "backward", "backward", "cut_backward", most < left):
            return 0
        micro_batch = s.current
        num_tokens, pairs = totals(micro_batch.documents)
        v = self.work.values
        token_layers, pair_layers, layers, updates, starts = v[10], v[11], v[12], v[13], v[16] + is_first

        def put(n: int) -> None:
            v[10] = token_layers + num_tokens * n
            v[11] = pair_layers + pairs * n
            v[12] = layers + n
            v[13] = updates + (micro_batch.ends_window and n == left)
            v[16] = starts

        n = self._largest("backward", most, put, within_s, whole="cut_backward" not in self._ledger.info.can)
        if n < most:
            self.why = "within_s"
        if n:
            self._named.add(s.id)
            self.backwards.append((s, n))
            self._took("backward")
        return n

    def _finetune(self, job: JobView, tokens: int | None, within_s: float) -> int:
        return self._forward(job, "finetune", "forward", self.finetunes, tokens, within_s)

    def _evaluate(self, job: JobView, tokens: int | None, within_s: float) -> int:
        return self._forward(job, "evaluate", "evaluate", self.evaluates, tokens, within_s)

    def _forward(
        self, job: JobView, kind: str, phase: str, chunks: "list[tuple[JobState, int]]", tokens: int | None, within_s: float
    ) -> int:
        if tokens is not None:
            self._check_amount("tokens", tokens)
        self._check_within(within_s)
        s = self._job(job)
        documents = s.current.documents if s.phase == phase else ()
        left = sum(documents) - s.offset if documents else 0
        asked = left if tokens is None else min(tokens, left)
        if not self._may_train(s, kind, phase, "chunk", asked < left):
            return 0
        is_whole = "chunk" not in self._ledger.info.can
        most = min(asked, self._tokens)
        if most < asked:
            self.why = "tokens"
            most = 0 if is_whole else most
        if s.rows is None and self._reserve(s) is None:
            self.why = "activation"
            return 0
        start, feature = s.offset, 0 if kind == "finetune" else 1
        key, work = (s.id, 0), self.work
        v, adapters = work.values, len(work.adapters) + (key not in work.adapters)
        tokens_before, pairs = v[feature], v[4] - pairs_until(documents, start)

        def put(n: int) -> None:
            v[feature] = tokens_before + n
            v[4] = pairs + pairs_until(documents, start + n)
            v[9] = adapters

        n = self._largest(kind, most, put, within_s, whole=is_whole)
        if n < most:
            self.why = "within_s"
        if n:
            work.adapters.add(key)
            self._tokens -= n
            self._named.add(s.id)
            chunks.append((s, n))
            self._took(kind)
        elif s.rows is None:
            assert self._arena is not None
            self._arena.release(s.id)
        return n

    def _reserve(self, s: "JobState") -> int | None:
        """Reserve arena rows for the job's micro-batch, in a copy that only this plan sees."""
        if self._arena is None:
            self._arena = self._ledger.arena.copy()
        return self._arena.reserve(s.id, s.current.tokens)

    def _may_train(self, s: "JobState", kind: str, phase: str, cut: str, is_cut: bool) -> bool:
        self.why = ""
        if not self._is_kind(kind):
            return False
        if s.paused or self.held.get(s.id) or s.phase != phase:
            self.why = "phase"
        elif is_cut and cut not in self._ledger.info.can:
            self.why = "unsupported"
        return not self.why

    def _job(self, job: JobView) -> "JobState":
        s: JobState = job._state
        if self._ledger.jobs.get(s.id) is not s:
            raise PlanError(
                f"a job must belong to this replay and have arrived, got {s.id!r}. {did_you_mean(s.id, list(self._ledger.jobs))}"
            )
        if not s.is_active:
            raise PlanError(f"only an active job can be planned, {s.id!r} is {s.phase}")
        self._check_named(s.id)
        return s

    # memory and queues

    def preempt(self, request: RequestView, keep: Literal["recompute", "host"] = "recompute") -> bool:
        """Take a resident request off the device; it waits and prefills prompt and generated tokens again."""
        if keep not in ("recompute", "host"):
            raise PlanError(f"keep must be 'recompute' or 'host', got {keep!r}")
        s: RequestState = request._state
        self._check_request(s)
        self.why = "" if keep == "recompute" else "unsupported"
        if not self.why and (not s.blocks or s.id in self.preempted or s.id in self.rejected):
            self.why = "phase"
        if not self.why:
            self._release(s)
            self.preempted[s.id] = s
        return not self.why

    def reject(self, request: RequestView, reason: str) -> bool:
        """End a request without (further) service: rejected if it never began, else aborted. `reason` goes into its event."""
        s: RequestState = request._state
        self._check_request(s)
        self.why = ""
        if s.id in self.rejected:
            self._raise_twice(s.id)
        if s.blocks and s.id not in self.preempted:
            self._release(s)
        self.preempted.pop(s.id, None)
        self.rejected[s.id] = (s, reason)
        return True

    def _check_request(self, s: "RequestState") -> None:
        self._check_named(s.id)
        if self._ledger.requests.get(s.id) is not s:
            raise PlanError(f"a request must be waiting or running, {s.id!r} is {s.phase}")

    def _raise_twice(self, name: str) -> None:
        raise PlanError(f"a request or job may be named once in a plan, got {name!r} twice")

    def load(self, adapter: str) -> bool:
        """Copy the adapter's current version to the device in this step; it is then not evicted on demand before its first use."""
        key, info = self._current(adapter)
        self.why = ""
        if key in self._ledger.slots.entries or key in self.loads:
            if key in self.evicted:
                self.why = "slots"
            return not self.why
        if self._slots == 0 or adapter in self._ledger.away:
            self.why = "adapter_loading" if adapter in self._ledger.away else "slots"
            return False
        self._load(key, info)
        self.work.add_load(info.bytes, self._ledger.host.read_s(key, info))
        self._predicted_s = None
        return True

    def evict(self, adapter: str) -> bool:
        """Free the slot of the adapter's current version, if no request holds it; it cannot be used in this same plan."""
        key, _ = self._current(adapter)
        slot = self._ledger.slots.entries.get(key)
        self.why = ""
        if slot is None or key in self.evicted or key in self.versions or slot.refs > self.dropped.get(key, 0):
            self.why = "phase"
            return False
        if not slot.fresh and self._slots == 0:
            # earlier loads of this plan count on this very slot
            self.why = "slots"
            return False
        self._slots += slot.fresh
        self.evicted.add(key)
        return True

    def merge(self, adapter: str | None) -> bool:
        """Merge an adapter into the base (None unmerges); no executor can yet."""
        if adapter is not None:
            self._current(adapter)
        self.why = "unsupported"
        return False

    def _current(self, adapter: str) -> tuple[tuple[str, int], AdapterInfo]:
        info = self._ledger.adapter_infos.get(adapter)
        if info is None:
            raise PlanError(f"unknown adapter {adapter!r}. {did_you_mean(adapter, list(self._ledger.adapter_infos))}")
        return (adapter, info.version), info

    # the step itself

    def hold(self, job: JobView, paused: bool = True) -> bool:
        """Pause a job (it keeps its place in the micro-batch and its arena rows) or let it go on, from the next step on."""
        s = self._job(job)
        self.why = ""
        self.held[s.id] = paused
        return True

    def stop_on_arrival(self) -> None:
        """Let the step end at the next layer after an arrival, on an executor with safepoints."""
        self.why = "" if "safepoint" in self._ledger.info.can else "unsupported"
        self.stops_on_arrival = not self.why

    def stop_after(self, seconds: float) -> None:
        """Let the step end at the first layer of its backward that ends so long after it began, on an executor with safepoints."""
        if not seconds > 0:
            raise PlanError(f"stop_after needs more than 0 seconds, got {seconds}")
        self.why = "" if "safepoint" in self._ledger.info.can else "unsupported"
        self.stop_after_s = inf if self.why else seconds

    def wait(self, until_s: float) -> None:
        """Empty on purpose, until then or the next event, whichever is first."""
        if not until_s > self._ledger.now_s:
            raise PlanError(f"wait needs a time after now ({self._ledger.now_s} s), got {until_s}")
        self.why = ""
        self.wait_until_s = until_s

    def repeat(self, max_steps: int | None = None) -> None:
        """Run the same plan again, without asking, until something arrives, ends, loads or lacks a block; at most `max_steps` more.

        The same verbs are called: a job that it trains beside all that runs goes on, through forward, backward and evaluation under
        `train`, each with the amount that fits then, until the job ends or a verb that has trained has nothing left to do.
        """
        self._check_amount("max_steps", max_steps)
        self.why = ""
        self.repeat_steps = max_steps
