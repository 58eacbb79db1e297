"""Sizes chosen from what a device has: the profile on a scratch engine, what is left for the KV pool, and advice where nothing is."""

from dataclasses import replace

import pytest
import torch

from tests.runtime.references import make_base
from workbench.config import EngineConfig
from workbench.runtime.engine import Engine, OutOfMemory
from workbench.runtime.kv_cache import KVPool
from workbench.runtime.memory import MARGIN_SHARE, MemoryReport, fit
from workbench.runtime.weights import load_base

CPU = torch.device("cpu")
MIB = 1 << 20
CONFIG = EngineConfig(max_model_len=64, max_batch_tokens=48, max_requests=6, num_slots=2, max_jobs=1, activation_tokens=96, reserve_rank=4)


class FakeDevice:
    """A device of `total` bytes, of which `free` are left once the scratch engine is gone; a step peaks at `peak`."""

    def __init__(self, *, total=1000 * MIB, free=600 * MIB, peak=50 * MIB):
        self.total, self.free, self.peak, self.batches = total, free, peak, []

    def total_bytes(self):
        return self.total

    def free_bytes(self):
        return self.free

    def peak_bytes(self, run):
        run()
        self.batches.append(run.__self__.batch)
        return self.peak + len(self.batches)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return load_base(make_base(tmp_path_factory.mktemp("base") / "base", "llama"))


def fitted(base, device, config=CONFIG, scratch=None):
    engine = Engine(base, config=replace(config, num_blocks=1))
    make = scratch or (lambda trial: Engine(base, config=trial))
    return fit(engine.fused.dims, config, CPU, torch.float32, weights=7 * MIB, scratch=make, gauge=device), engine.fused.dims


def test_the_kv_pool_takes_what_is_left_after_everything_that_the_report_names(base):
    device = FakeDevice()
    (limits, report), dims = fitted(base, device)
    block = KVPool.bytes_per_block(dims, CONFIG.block_tokens, torch.float32)
    largest = 50 * MIB + len(device.batches)
    assert report.workspace == (largest - 1) + largest, "the largest forward and the backward together"
    others = report.adapters + report.jobs + report.arena + report.graphs + report.workspace
    left = 600 * MIB - int(MARGIN_SHARE * 1000 * MIB) - others
    assert limits.num_blocks == left // block and report.kv_pool == limits.num_blocks * block
    assert min(report.adapters, report.jobs, report.arena, report.graphs) > 0 and report.weights == 7 * MIB
    for change in (dict(num_slots=4), dict(max_jobs=3), dict(activation_tokens=192), dict(reserve_rank=16), dict(max_requests=12)):
        (smaller, _), _ = fitted(base, FakeDevice(), replace(CONFIG, **change))
        assert smaller.num_blocks < limits.num_blocks, change


def test_the_profile_runs_the_largest_steps_that_there_are(base):
    device = FakeDevice()
    fitted(base, device)
    *_, prefill, last = device.batches
    assert max(b.num_tokens for b in device.batches) == CONFIG.max_batch_tokens == prefill.num_tokens
    assert sum(s.samples for s in prefill.segments) == CONFIG.max_requests and all(s.adapter for s in prefill.segments)
    (backward,) = last.backwards
    assert backward.tokens > CONFIG.activation_tokens // 2 and backward.top_layer == 3
    finetuned = sum(s.tokens for b in device.batches for s in b.segments if s.kind == "finetune")
    assert finetuned == backward.tokens and device.batches[0].num_tokens == CONFIG.max_batch_tokens


@pytest.mark.parametrize(
    "change",
    [dict(activation_tokens=1), dict(max_requests=1), dict(max_batch_tokens=1), dict(max_model_len=8, max_requests=2), dict(num_slots=1)],
)
def test_a_profile_fits_whatever_sizes_are_asked_for(base, change):
    (limits, _), _ = fitted(base, FakeDevice(), replace(CONFIG, **change))
    assert limits.num_blocks > 1 and limits.activation_tokens == change.get("activation_tokens", 96)


def test_explicit_num_blocks_win_without_a_profile(base):
    device = FakeDevice()
    (limits, report), _ = fitted(base, device, replace(CONFIG, num_blocks=5))
    assert limits.num_blocks == report.num_blocks == 5 and report.workspace is None and not device.batches


def test_a_device_with_nothing_left_is_refused_with_the_size_to_lower(base):
    with pytest.raises(ValueError, match=r"(?s)left for the KV pool .* got -\d.* MiB. Of the four .* lower EngineConfig.max_batch_tokens"):
        fitted(base, FakeDevice(free=60 * MIB))


def test_a_profile_that_runs_out_of_memory_says_what_it_needed_beside(base):
    def scratch(trial):
        engine = Engine(base, config=trial)
        forward = engine.runner.forward

        def failing(*args):
            forward(*args)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 MiB")

        engine.runner.forward = failing
        return engine

    with pytest.raises(ValueError, match=r"(?s)the largest step must fit the device .* Tried to allocate 3.00 MiB.*\nweights") as caught:
        fitted(base, FakeDevice(), scratch=scratch)
    assert isinstance(caught.value.__cause__, OutOfMemory)


REPORT = MemoryReport(
    weights=900 * MIB,
    adapters=12 * MIB,
    jobs=5 * MIB,
    arena=64 * MIB,
    graphs=MIB,
    workspace=32 * MIB,
    kv_pool=200 * MIB,
    total=1300 * MIB,
    num_blocks=100,
    num_slots=4,
    activation_tokens=128,
    max_batch_tokens=64,
)


@pytest.mark.parametrize(
    "sizes, error, advice",
    [
        ({}, "Tried to allocate 20.00 MiB", "lower EngineConfig.num_blocks from 100 to 90, which frees 20.0 MiB."),
        ({}, "Tried to allocate 20.50 MiB", "lower EngineConfig.num_blocks from 100 to 89, which frees 22.0 MiB."),
        ({}, "out of memory", "lower EngineConfig.num_blocks from 100 to 90, which frees 20.0 MiB."),
        ({"kv_pool": 10 * MIB}, "Tried to allocate 1048576 bytes", "lower EngineConfig.activation_tokens from 128 to 126"),
        ({"kv_pool": 10 * MIB, "arena": 0}, "Tried to allocate 0.01 GiB", "lower EngineConfig.max_batch_tokens from 64 to 43"),
        ({"kv_pool": 1, "arena": 0, "workspace": None}, "Tried to allocate 1.00 MiB", "lower EngineConfig.num_slots from 4 to 3"),
        (
            {"kv_pool": 10 * MIB, "arena": 0, "workspace": MIB},
            "Tried to allocate 1.00 TiB",
            "from 100 to 1, which frees 9.9 MiB, which alone",
        ),
    ],
)
def test_running_out_names_the_largest_of_the_four_and_how_far_to_lower_it(sizes, error, advice):
    assert advice in replace(REPORT, **sizes).advice(torch.OutOfMemoryError(f"CUDA out of memory. {error}"))


def test_the_report_is_a_table_of_the_whole_device():
    lines = str(REPORT).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "weights",
        "adapters",
        "fine-tune jobs",
        "arena",
        "graphs",
        "workspace",
        "KV pool",
        "everything else",
    ]
    assert "200.0 MiB  num_blocks = 100" in lines[6]
    assert sum(float(line[16:33].replace(",", "").replace("MiB", "")) for line in lines) == pytest.approx(1300)
    assert "not measured" in str(replace(REPORT, workspace=None))


def test_a_step_that_runs_out_of_memory_gives_the_engines_own_advice(base):
    engine = Engine(base, config=replace(CONFIG, num_blocks=20))
    assert engine.memory.num_blocks == engine.info.num_blocks == 20 and engine.memory.total is None
    assert engine.memory.weights == sum(p.numel() * 4 for p in base.parameters())
