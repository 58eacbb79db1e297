"""Ablations on a real GPU: padded under recorded graphs and the loop without them give segmented's outputs, and no reference runs."""

from dataclasses import replace

import pytest
import torch

from kernels import counters
from tests.runtime.references import SMALL, make_adapter, make_base, request
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run(base, adapters, lora, graphs):
    """Logits of a mixed prefill and three decodes."""
    config = replace(SMALL, lora=lora, graphs=graphs, activation_tokens=128)
    engine, found = Engine.from_pretrained(base, adapters=adapters, device="cuda", dtype="float32", config=config), []
    with Driver(engine) as driver:
        for i, name in enumerate([*adapters, None]):
            driver.add(request(f"r{i}", 5 + 7 * i, name))
            driver.prefill(f"r{i}")
        for _ in range(4):
            driver.step()
            found += [engine.last_logits[f"r{i}"].clone() for i in range(len(adapters) + 1)]
            driver.decode(list(driver.runs))
    return torch.stack(found)


@pytest.mark.parametrize("lora, graphs", [("padded", True), ("padded", False), ("loop", False)])
def test_other_ways_to_apply_adapters_give_the_same_logits_on_the_device(tmp_path, lora, graphs):
    base = make_base(tmp_path / "base", "llama")
    adapters = {"all": make_adapter(tmp_path / "all", base, rank=8), "wide": make_adapter(tmp_path / "wide", base, rank=24, seed=2)}
    expected = run(base, adapters, "segmented", graphs)
    counters.calls.clear()
    found = run(base, adapters, lora, graphs)
    # fp32 sums in another order
    assert float((found - expected).abs().max() / expected.abs().max()) <= 1e-4
    assert counters.references_on("cuda") == {}, "the loop counts as asked for"
