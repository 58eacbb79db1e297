"""The engine on a real GPU: numbers against transformers + PEFT, the fused paths alone, and the speed that a study needs at least."""

import statistics
from dataclasses import replace

import pytest
import torch

import workbench as wb
from kernels import counters
from tests.runtime.references import FAMILIES, SMALL, job, make_adapter, make_base, make_family, mixed_rows, request, rows_of, shake
from tests.runtime.test_finetune import gradients_beside_peft
from workbench.runtime.driver import Driver

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, tmp_path_factory):
    return make_family(tmp_path_factory.mktemp(request.param), request.param)


def mixed_errors(family, dtype, seed):
    """Largest |a - b| of all rows over the largest |b| against the fp32 reference: the engine's, and that of transformers in `dtype`."""
    folder, base, adapters = family
    engine = wb.Engine.from_pretrained(base, adapters=adapters, device="cuda", dtype=dtype, config=SMALL)
    jobs = [
        job("first", seed=seed, evaluation=rows_of(20, 2, 9), evaluate_every=1),
        job("second", seed=seed + 1, rank=8, targets=("v_proj",)),
    ]
    ours, theirs, largest, kinds = [], [], [], set()
    for segment, found, expected in mixed_rows(engine, folder, adapters, jobs, seed):
        exact = expected(base, "cuda", torch.float32)
        kinds.add(segment.kind)
        ours.append(float((found.float() - exact).square().mean()))
        theirs.append(float((expected(base, "cuda", dtype).float() - exact).square().mean()))
        largest.append((float((found.float() - exact).abs().max()), float(exact.abs().max())))
    assert kinds == {"finetune", "evaluate", "prefill", "decode"}
    return max(e for e, _ in largest) / max(m for _, m in largest), statistics.mean(ours) ** 0.5, statistics.mean(theirs) ** 0.5


@pytest.mark.parametrize("seed", [0, 1])
def test_mixed_batches_in_fp32_equal_transformers_and_peft(family, seed):
    torch.backends.cuda.matmul.allow_tf32 = False
    worst, _, _ = mixed_errors(family, torch.float32, seed)
    assert worst <= 1e-4


@pytest.mark.parametrize("seed", [0, 1])
def test_mixed_batches_in_bf16_err_no_more_than_transformers_does(family, seed):
    counters.calls.clear()
    worst, ours, theirs = mixed_errors(family, torch.bfloat16, seed)
    assert ours <= 1.5 * theirs, (worst, ours, theirs)
    assert not counters.references_on("cuda")


@pytest.mark.parametrize(("seed", "activations"), [(0, "keep"), (1, "keep"), (0, "recompute")])
def test_gradients_on_the_gpu_equal_peft(tmp_path, seed, activations):
    base = make_base(tmp_path / "base", "qwen3")
    adapters = {"other": make_adapter(tmp_path / "other", base, rank=5, seed=3)}
    assert gradients_beside_peft(base, adapters, tmp_path, seed, {}, device="cuda", activations=activations) <= 1e-4


def accumulated_gradients(base, adapters, jobs, config, seed):
    """fp32 gradients of two micro-batches of every job, cut into layers that alternate between the jobs, beside decodes."""
    engine = wb.Engine.from_pretrained(base, adapters=adapters, device="cuda", dtype=torch.bfloat16, config=config)
    with Driver(engine, jobs, seed=seed) as driver:
        for j in jobs:
            shake(engine, j.id)
        driver.add(request("r0", 12, "other"))
        driver.prefill("r0")
        driver.step()
        for _ in range(2):
            for j in jobs:
                driver.finetune(j.id)
                driver.decode(["r0"])
                driver.step()
            for _ in range(engine.info.num_layers):
                for j in jobs:
                    driver.backward(j.id, 1)
                driver.decode(["r0"])
                driver.step()
        recorded = 0 if engine._backward_graphs is None else len(engine._backward_graphs.recorded)
        return recorded, [[g.clone() for g in engine._states[j.id].accumulated] for j in jobs]


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_recorded_backward_gives_the_gradients_of_the_eager_one(tmp_path, activations):
    base = make_base(tmp_path / "base", "qwen3")
    adapters = {"other": make_adapter(tmp_path / "other", base, rank=5, seed=3)}
    jobs = [job("first", accumulation=3), job("second", seed=1, rank=8, targets=("q_proj", "v_proj", "down_proj"), accumulation=3)]
    configs = [replace(SMALL, graphs=graphs, activations=activations) for graphs in (True, False)]
    (recorded, ours), (none, expected) = (accumulated_gradients(base, adapters, jobs, config, 0) for config in configs)
    assert recorded >= 2 and none == 0
    for a, b in zip([g for of_job in ours for g in of_job], [g for of_job in expected for g in of_job], strict=True):
        assert float((a - b).norm()) <= 2e-2 * float(b.norm()) and float(b.norm()) > 0


def fail(*_arguments):
    raise RuntimeError("after the graphs")


@pytest.mark.parametrize("slices", [(1, 2), (2, 1), (1, 1, 1), (3,)])
def test_a_recorded_backward_whose_steps_fail_goes_on_where_it_was(tmp_path, monkeypatch, slices):
    base, mine = make_base(tmp_path / "base", "llama"), job("mine", accumulation=3)
    found = []
    for fails in (False, True):
        engine = wb.Engine.from_pretrained(base, device="cuda", dtype=torch.bfloat16, config=SMALL)
        with Driver(engine, [mine]) as driver:
            shake(engine, mine.id)
            for _ in range(2):
                driver.finetune(mine.id)
                driver.step()
                for layers in slices:
                    driver.backward(mine.id, layers)
                    batch = driver.take()
                    if fails:
                        with monkeypatch.context() as patch:
                            patch.setattr(engine, "_commit", fail)
                            with pytest.raises(RuntimeError, match="after the graphs"):
                                engine.step(batch)
                    engine.step(batch)
            graphs = engine._backward_graphs
            assert graphs is not None
            assert graphs.recorded
            assert engine._states[mine.id].micro_batches_done == 2
            found.append([g.clone() for g in engine._states[mine.id].accumulated])
    assert all(torch.equal(a, b) and b.any() for a, b in zip(*found, strict=True))


@pytest.fixture(scope="module")
def llama():
    config = wb.EngineConfig(max_model_len=2048, max_batch_tokens=2048, activation_tokens=4096)
    return wb.Engine.random("llama3-8b", adapters=4, rank=8, device="cuda", config=config)


def test_a_decode_step_of_sixteen_takes_at_most_forty_milliseconds(llama, record_property):
    with Driver(llama) as driver:
        for i in range(16):
            driver.add(request(f"r{i}", 512, f"adapter-{i % 4}", output_tokens=100))
            driver.prefill(f"r{i}")
            driver.step()
        times = []
        for _ in range(30):
            driver.decode(list(driver.runs))
            times.append(driver.step().duration_s)
    median = statistics.median(times[10:])
    record_property("decode_step_b16_s", median)
    print(f"decode step, B = 16, 4 x r8, context 512: median {1000 * median:.2f} ms")
    assert median <= 0.040


def test_fine_tuning_alone_reaches_three_thousand_tokens_a_second(llama, record_property):
    j = wb.FinetuneJob.example(steps=4)
    with Driver(llama, [j]) as driver:
        seconds = []
        while driver.jobs[j.id].index < driver.shapes[j.id].num_micro_batches:
            driver.finetune(j.id)
            spent = driver.step().duration_s
            driver.backward(j.id)
            seconds.append(spent + driver.step().duration_s)
    rate = 2048 / statistics.mean(seconds[4:])
    record_property("finetune_tokens_per_s", rate)
    print(f"fine-tuning alone, 2 x 1024, r8: {rate:.0f} tokens/s")
    assert rate >= 3000


def test_two_minutes_of_burstgpt_with_four_adapters_and_one_job_run_on_the_fused_paths_alone(llama, record_property):
    trace = (
        wb.traces.load("burstgpt-day29")
        .slice(0, 120)
        .jitter(1.0, seed=0)
        .with_lengths("azure-conv", seed=0, clip=(1024, 512))
        .assign_adapters(4, popularity=wb.zipf(1.0), seed=0)
    )
    counters.calls.clear()
    slo = wb.SLO(ttft_s=5.0, itl_s=0.2)
    result = wb.replay(
        trace, executor=llama, policy=wb.policies.ServeFirst(step_s=0.150), jobs=[wb.FinetuneJob.example()], slo=slo, progress=False
    )
    summary = result.summary()
    print(summary.to_string() if hasattr(summary, "to_string") else summary)
    assert not counters.references_on("cuda"), counters.calls
    assert {op for op, path, device in counters.calls if device == "cuda"} >= {"segmented_lora", "paged_attention", "varlen_attention"}
    assert (result.requests["outcome"] == "finished").all() and len(result.requests) == len(trace)
    assert result.steps["finetune_tokens"].gt(0).any() and result.steps["backward_layers"].gt(0).any()
    assert result.jobs["committed_tokens"].sum() > 0
