"""The prefix cache on the real engine: the same tokens and logits as without it, whoever shares, is preempted or changes version."""

import random
from dataclasses import replace

import pytest
import torch

import workbench as wb
from tests.runtime.references import SMALL, VOCAB, reference_logits
from workbench.config import EngineConfig
from workbench.core import Request
from workbench.testing import FixedCost

TOLERANCE = dict(rtol=2e-4, atol=2e-4)  # fp32 sums in another order: a prompt in one piece, or as a chunk behind cached blocks


def engine_of(base, adapters, **limits) -> wb.Engine:
    return wb.Engine.from_pretrained(base, adapters=adapters, device="cpu", config=EngineConfig(**(SMALL.__dict__ | limits)))


def serve(engine: wb.Engine, requests, policy=wb.policies.FCFS()) -> tuple[wb.Replay, dict[tuple[str, int], torch.Tensor]]:
    """The replay, and the logits [V] of every sampled row by (request, its position)."""
    logits: dict[tuple[str, int], torch.Tensor] = {}
    forward = engine.runner.forward

    def recording(inputs, *rest):
        out = forward(inputs, *rest)
        logits.update({(s.owner, s.end): row for s, row in zip(inputs.sampled, out.logits, strict=True)})
        return out

    engine.runner.forward = recording  # type: ignore[method-assign]
    try:
        with engine.uncalibrated():
            return wb.replay(requests, executor=engine, policy=policy, planning=0.0, progress=False), logits
    finally:
        engine.runner.forward = forward  # type: ignore[method-assign]


def shared_prompts(num: int = 14, seed: int = 5) -> list[Request]:
    """Prompts that begin with one of two texts of 37 tokens, some of them nothing but that; the lengths are no multiples of a block."""
    draw = random.Random(seed)
    texts = [[draw.randrange(3, VOCAB) for _ in range(37)] for _ in range(2)]
    requests = []
    for i in range(num):
        ids = (*draw.choice(texts)[: draw.choice((32, 37))], *(draw.randrange(3, VOCAB) for _ in range(draw.choice((0, 5, 20)))))
        adapter = draw.choice((None, "a", "b"))
        requests.append(
            Request(
                request_id=f"r{i}",
                arrival_s=0.0,
                prompt_tokens=len(ids),
                prompt_token_ids=ids,
                output_tokens=draw.randint(4, 20),
                adapter=adapter,
            )
        )
    return requests


@pytest.mark.parametrize("num_blocks", [64, 14], ids=["room for all", "with preemptions"])
def test_tokens_and_logits_are_those_without_the_cache(base, adapters, num_blocks):
    limits = dict(num_blocks=num_blocks, max_requests=5, max_batch_tokens=48)
    (on, found), (off, expected) = (
        serve(engine_of(base, adapters, prefix_cache=is_on, **limits), shared_prompts()) for is_on in (True, False)
    )
    assert on.outputs == off.outputs
    assert found.keys() == expected.keys() and len(found) > 100
    for place, row in found.items():
        torch.testing.assert_close(row, expected[place], **TOLERANCE)
    assert on.summary()["prefix_hit_share"] > 0.3
    assert off.summary()["prefix_hit_share"] == 0
    assert on.events["kind"].eq("preempted").any() == (num_blocks == 14)
    if num_blocks == 14:
        skipped = on.events[on.events["kind"] == "cached"].groupby("owner")["value"].sum()
        assert (skipped > on.requests["cached_tokens"][skipped.index]).any(), "a preempted request must have found blocks again"


def test_hits_of_an_engine_are_those_of_a_simulated_executor_and_of_its_recording(base, adapters):
    engine = engine_of(base, adapters, num_blocks=14, max_requests=5)
    requests = [replace(r, prompt_token_ids=None, prefix_ids=(i % 2,)) for i, r in enumerate(shared_prompts())]
    for trace in (shared_prompts(), requests):
        measured, _ = serve(engine, trace)
        assert measured.requests["cached_tokens"].sum() > 0
        simulated = FixedCost(info=replace(engine.info, simulated=True), adapters={"a": 4, "b": 9})
        for executor in (simulated, wb.Recorded(measured)):
            other = wb.replay(trace, executor=executor, policy=wb.policies.FCFS(), planning=0.0, progress=False)
            assert other.work.equals(measured.work)
            assert other.requests["cached_tokens"].equals(measured.requests["cached_tokens"])


def test_a_new_version_does_not_reuse_what_the_old_one_computed(base, adapters):
    engine, is_replaced = engine_of(base, adapters), []
    ids = tuple(random.Random(8).randrange(3, VOCAB) for _ in range(50))

    def replaces_a(view, plan):
        if view.now_s > 50 and not is_replaced:
            is_replaced.append(engine.load_adapter("a", adapters["b"]))
        wb.policies.FCFS()(view, plan)

    requests = [
        Request(request_id=name, arrival_s=at, prompt_tokens=50, prompt_token_ids=ids, output_tokens=5, adapter="a")
        for name, at in (("first", 0.0), ("same", 60.0), ("new", 120.0), ("new again", 180.0))
    ]
    result, _ = serve(engine, requests, replaces_a)
    assert result.requests["cached_tokens"].to_dict() == {"first": 0, "same": 48, "new": 0, "new again": 48}
    for name, directory in (("first", "a"), ("same", "a"), ("new", "b"), ("new again", "b")):
        tokens = [*ids, *result.outputs[name]]
        expected = reference_logits(base, adapters[directory], tokens[:-1])[49:].argmax(-1).tolist()
        assert list(result.outputs[name]) == expected, name
    assert result.outputs["same"] != result.outputs["new"]


def test_off_is_a_switch(base):
    assert engine_of(base, {}).info.prefix_cache
    assert not engine_of(base, {}, prefix_cache=False).info.prefix_cache
