"""The packed forward of all four kinds against transformers + PEFT, each sequence alone, fp32."""

import pytest
import torch

from tests.runtime.references import (
    FAMILIES,
    SMALL,
    job,
    make_family,
    mixed_rows,
    record_hidden,
    reference_logits,
    request,
    rows_of,
)
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine

# fp32 sums of a few hundred products in another order: the relative error stays near 1e-6; 1e-4 is the bound that is claimed.
TOLERANCE = 1e-4


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


def close(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("seed", [0, 1])
def test_mixed_batch_logits_equal_transformers_and_peft_run_separately(family, seed):
    folder, base, adapters = family
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)
    jobs = [
        job("first", seed=seed, evaluation=rows_of(20, 2, 9), evaluate_every=1),
        job("second", seed=seed + 1, rank=8, targets=("v_proj",)),
    ]
    kinds = set()
    for segment, found, expected in mixed_rows(engine, folder, adapters, jobs, seed):
        kinds.add(segment.kind)
        assert close(found, expected(base)) <= TOLERANCE, segment
    assert kinds == {"finetune", "evaluate", "prefill", "decode"}


def test_first_token_of_a_prefill_beside_finetune_rows_comes_from_its_own_last_row(family):
    _, base, adapters = family
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)
    jobs = [job("first")]
    with Driver(engine, jobs) as driver:
        driver.add(request("r", 21, "all"))
        driver.finetune(jobs[0].id)
        driver.prefill("r")
        token = driver.step().tokens["r"]
        prompt = engine._sequences["r"].tokens[:-1]
    assert token == int(reference_logits(base, adapters["all"], prompt)[-1].argmax())


def test_greedy_tokens_equal_transformers_wherever_the_margin_is_clear(family):
    _, base, adapters = family
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)
    names = [None, "all", "wide", "mlp"]
    with Driver(engine) as driver:
        for i, name in enumerate(names):
            driver.add(request(f"r{i}", 5 + 9 * i, name))
            driver.prefill(f"r{i}")
        driver.step()
        for _ in range(12):
            driver.decode(list(driver.runs))
            driver.step()
        for i, name in enumerate(names):
            tokens = engine._sequences[f"r{i}"].tokens
            expected = reference_logits(base, adapters.get(name), tokens[:-1])
            for position in range(5 + 9 * i - 1, len(tokens) - 1):
                best = expected[position].topk(2)
                if best.values[0] - best.values[1] > 1e-3:
                    assert tokens[position + 1] == int(best.indices[0])


def test_inference_rows_never_enter_an_autograd_graph(family):
    _, base, adapters = family
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)
    jobs = [job("first")]
    hidden = record_hidden(engine)
    with Driver(engine, jobs) as driver:
        driver.add(request("r", 30, "all"))
        driver.finetune(jobs[0].id)
        driver.prefill("r")
        driver.step()
    assert not hidden[-1].requires_grad and hidden[-1].grad_fn is None
    assert not any(t.requires_grad for t in engine.base.parameters())
