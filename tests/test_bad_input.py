"""One table: what a user can get wrong, the error that says so (rule, value, next step), and that nothing else changed by it."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import workbench as wb
from tests.runtime.references import SMALL, job, make_adapter, make_base
from workbench.config import EngineConfig

GOOD = {"request_id": ["a", "b"], "arrival_s": [0.0, 0.01], "prompt_tokens": [9, 5], "output_tokens": [4, 12], "adapter": ["good", None]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    make_base(root / "base", "llama")
    make_base(root / "other", "smollm2")
    make_adapter(root / "good", root / "base", rank=4)
    make_adapter(root / "foreign", root / "other", rank=4)
    for name in ("nan", "shape", "pickle", "escape"):
        make_adapter(root / name, root / "base", rank=4)
    spoil(root / "nan", lambda t: t.fill_(float("nan")))
    spoil(root / "shape", lambda t: t[:, :-1].contiguous())
    torch.save({}, root / "pickle" / "adapter_model.bin")
    (root / "pickle" / "adapter_model.safetensors").unlink()
    outside = root / "outside.safetensors"
    (root / "escape" / "adapter_model.safetensors").rename(outside)
    (root / "escape" / "adapter_model.safetensors").symlink_to(outside)
    (root / "empty.jsonl").write_text("")
    return root


def spoil(folder: Path, change) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(n for n in tensors if "lora_A" in n)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, file)


@pytest.fixture(scope="module")
def engine(folder):
    return wb.Engine.from_pretrained(folder / "base", adapters={"good": folder / "good"}, device="cpu", config=SMALL)


def frame(**changes) -> pd.DataFrame:
    return pd.DataFrame(GOOD | changes)


def serve(engine, *, policy=None, jobs=(), **changes):
    return wb.replay(wb.Trace.from_frame(frame(**changes)), executor=engine, policy=policy or wb.policies.FCFS(), jobs=jobs)


def raises(view, plan):
    raise KeyError("my mistake")


def plans_nothing(view, plan):
    return None


def names_a_finished_request(view, plan):
    plan.decode(view.finished)
    plan.decode(view.running)
    plan.prefill(view.waiting)


def names_one_twice(view, plan):
    plan.prefill(view.waiting)
    plan.decode(view.running)
    plan.decode(view.running)


TRACE = ValueError
TABLE = {
    # traces
    "negative time": (lambda e, f: frame_of(arrival_s=[-1.0, 0.0]), TRACE, "arrival_s"),
    "unsorted times": (lambda e, f: frame_of(arrival_s=[1.0, 0.0]), TRACE, "arrival_s"),
    "missing time": (lambda e, f: frame_of(arrival_s=[np.nan, 0.0]), TRACE, "arrival_s"),
    "time that is no number": (lambda e, f: frame_of(arrival_s=["soon", 0.0]), TRACE, "arrival_s"),
    "no time column": (lambda e, f: wb.Trace.from_frame(frame().drop(columns="arrival_s")), TRACE, "arrival_s"),
    "no prompt tokens": (lambda e, f: frame_of(prompt_tokens=[0, 5]), TRACE, "prompt_tokens"),
    "negative output": (lambda e, f: frame_of(output_tokens=[-3, 5]), TRACE, "output_tokens"),
    "huge token count": (lambda e, f: frame_of(prompt_tokens=[10**12, 5]), TRACE, "prompt_tokens"),
    "two requests of one id": (lambda e, f: frame_of(request_id=["a", "a"]), TRACE, "request_id"),
    "unknown trace": (lambda e, f: wb.traces.load("burstgpt-day92"), (ValueError, FileNotFoundError), "Did you mean 'burstgpt-day29'"),
    # requests
    "prompt beyond the context": (
        lambda e, f: serve(e, prompt_tokens=[9, 5000]),
        UserWarning,
        "1 of 2 requests were rejected.*of 192 tokens, got 5012",
    ),
    "unknown adapter": (lambda e, f: serve(e, adapter=["god", None]), ValueError, "no adapter is called 'god'. Did you mean 'good'"),
    "pool too small for one request": (
        lambda e, f: serve(wb.Engine.from_pretrained(f / "base", device="cpu", config=TINY_POOL), adapter=None, prompt_tokens=[60, 5]),
        UserWarning,
        "1 of 2 requests were rejected.*Raise EngineConfig.num_blocks",
    ),
    # adapters
    "adapter with NaN": (lambda e, f: e.load_adapter("x", f / "nan"), ValueError, "finite"),
    "adapter of a wrong shape": (lambda e, f: e.load_adapter("x", f / "shape"), ValueError, "shape"),
    "adapter of another base": (lambda e, f: e.load_adapter("x", f / "foreign"), ValueError, "base|shape"),
    "pickled adapter": (lambda e, f: e.load_adapter("x", f / "pickle"), (ValueError, FileNotFoundError), "safetensors"),
    "adapter outside its folder": (lambda e, f: e.load_adapter("x", f / "escape"), ValueError, "folder|inside|outside"),
    "no adapter there": (lambda e, f: e.load_adapter("x", f / "nowhere"), (ValueError, FileNotFoundError), "nowhere"),
    # jobs
    "empty data set": (lambda e, f: serve(e, jobs=[job_of(data=f / "empty.jsonl")]), ValueError, "empty|at least"),
    "text without a tokenizer": (lambda e, f: serve(e, jobs=[job_of(data=[{"text": "hello"}])]), ValueError, "tokenizer"),
    "micro-batch larger than the arena": (
        lambda e, f: serve(e, jobs=[job_of(data=[[5] * 400] * 4, max_tokens=400)]),
        ValueError,
        "activation_tokens",
    ),
    "more jobs than places": (lambda e, f: serve(e, jobs=[job(f"j{i}") for i in range(4)]), ValueError, "max_jobs"),
    "two jobs of one id": (lambda e, f: serve(e, jobs=[job("j"), job("j")]), ValueError, "different|id"),
    "no checkpoint there": (lambda e, f: wb.FinetuneJob.from_checkpoint(f / "nowhere"), FileNotFoundError, "nowhere"),
    # policies
    "policy that raises": (lambda e, f: serve(e, policy=raises), wb.ReplayError, "my mistake"),
    "policy that plans nothing for ever": (lambda e, f: serve(e, policy=plans_nothing), wb.ReplayError, "planned nothing"),
    "policy that names a finished request": (lambda e, f: serve(e, policy=names_a_finished_request), wb.ReplayError, "finished"),
    "policy that names a request twice": (lambda e, f: serve(e, policy=names_one_twice), wb.ReplayError, "twice|already"),
    # device
    "step out of memory": (lambda e, f: out_of_memory(e), wb.ReplayError, "must fit the device's memory"),
}
TINY_POOL = EngineConfig(max_model_len=128, num_blocks=2)


def frame_of(**changes) -> wb.Trace:
    return wb.Trace.from_frame(frame(**changes))


def job_of(**options) -> wb.FinetuneJob:
    return wb.FinetuneJob(**({"adapter": "mine", "steps": 1, "batch_size": 2, "max_tokens": 64} | options))


def out_of_memory(engine):
    """The device runs out in the middle of the third step."""
    forward, calls = engine.runner.forward, []

    def failing(*args):
        calls.append(1)
        if len(calls) == 3:
            forward(*args)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(*args)

    engine.runner.forward = failing
    try:
        serve(engine)
    finally:
        engine.runner.forward = forward


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_is_a_clear_error_and_leaves_everything_as_it_was(case, engine, folder):
    act, error, message = TABLE[case]
    adapters = dict(engine.adapters)
    weights = engine.fused.layers[0].qkv.clone()
    with engine.uncalibrated():
        before = serve(engine).outputs
        with pytest.raises(error, match=f"(?s){message}") as caught:
            act(engine, folder)
        if isinstance(caught.value, wb.ReplayError):
            partial = caught.value.replay
            assert 1 <= len(partial.requests) <= 2 and partial.summary()["requests"] == len(partial.requests)
        assert not engine.is_running and not engine._sequences
        assert engine.adapters["good"] == adapters["good"] and "x" not in engine.adapters
        assert torch.equal(weights, engine.fused.layers[0].qkv)
        assert serve(engine).outputs == before
