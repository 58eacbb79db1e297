"""Ablations on the engine: other ways to apply adapters, and a backward that is not cut, against today's way on equal batches, fp32."""

import random
from dataclasses import replace

import pandas as pd
import pytest
import torch

import workbench as wb
from kernels import counters
from tests.runtime.references import SMALL, job, make_adapter, make_base, random_mix, record_hidden, request, rows_of, shake
from workbench.config import LORA_MODES, RandomTokens
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine

# fp32 sums of a few hundred products in another order: the bound of the mixed-batch tests
TOLERANCE = 1e-4
ADAPTERS = {"all": {"rank": 3}, "wide": {"rank": 17, "targets": ("q_proj", "down_proj"), "use_rslora": True}, "mlp": {"rank": 8}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base") / "base", "llama")


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(folder / name, base, seed=i, **options) for i, (name, options) in enumerate(ADAPTERS.items())}


def engine_of(base, adapters, lora, **config):
    return Engine.from_pretrained(base, adapters=adapters, device="cpu", config=replace(SMALL, lora=lora, graphs=False, **config))


def mixed_run(engine, names, jobs, steps=12):
    """Random mixes of all four kinds and cut backwards: the last layer's outputs of every step, and the jobs' trained weights."""
    draw, hidden = random.Random(3), record_hidden(engine)
    with Driver(engine, jobs) as driver:
        for j in jobs:
            shake(engine, j.id)
        for i, name in enumerate(names):
            driver.add(request(f"r{i}", draw.randint(1, 45), name))
        for _ in range(steps):
            random_mix(driver, draw, list(driver.runs), [j.id for j in jobs])
            driver.step()
        trained = {j.id: [t.clone() for t in engine._states[j.id].params] for j in jobs}
        steps_done = {j.id: engine._states[j.id].optimizer_steps for j in jobs}
    return hidden, trained, steps_done


def distance(found, expected):
    return max(float((f - e).abs().max() / e.abs().max()) for f, e in zip(found, expected, strict=True))


# with Adam's own eps the first steps would have the sign of a gradient, however small
JOBS = [
    job("first", accumulation=1, eps=0.01, evaluation=rows_of(20, 2, 9), evaluate_every=1),
    job("second", seed=1, rank=8, targets=("v_proj", "up_proj"), accumulation=1, eps=0.01),
    job("third", seed=2, dropout=0.1, accumulation=1, eps=0.01),
]


@pytest.fixture(scope="module")
def segmented(base, adapters):
    return mixed_run(engine_of(base, adapters, "segmented"), [None, *adapters, "all"], JOBS)


@pytest.mark.parametrize("lora", ["padded", "loop"])
def test_padded_and_loop_give_the_outputs_and_the_training_of_segmented(base, adapters, segmented, lora):
    hidden, trained, steps = mixed_run(engine_of(base, adapters, lora), [None, *adapters, "all"], JOBS)
    assert min(steps.values()) >= 1 and steps == segmented[2], "every job has to have stepped"
    assert distance(hidden, segmented[0]) <= TOLERANCE
    for owner, params in trained.items():
        assert distance(params, segmented[1][owner]) <= TOLERANCE, owner


def test_padded_weights_really_lie_padded_to_the_largest_rank(base, adapters):
    engine = engine_of(base, adapters, "padded")
    with Driver(engine, [job("wider", rank=24, accumulation=1), job("narrow", rank=2, accumulation=1)]) as driver:
        for i, name in enumerate(adapters):
            driver.add(request(f"r{i}", 5, name))
            driver.prefill(f"r{i}")
        driver.step()
        ranks = engine._table.stack.entries[..., 2]
    filled = (ranks > 0).any(0).nonzero().flatten().tolist()
    assert len(filled) == 5 and set(ranks[ranks > 0].tolist()) == {24}


def test_a_larger_adapter_that_comes_later_pads_those_that_are_there(base, adapters):
    few = {name: adapters[name] for name in ("all", "mlp")}
    found = {}
    for lora in ("segmented", "padded"):
        engine, jobs = engine_of(base, few, lora), [job("first", accumulation=1)]
        hidden = record_hidden(engine)
        with Driver(engine, jobs) as driver:
            shake(engine, "job:first")
            for i, name in enumerate(few):
                driver.add(request(f"r{i}", 9, name))
                driver.prefill(f"r{i}")
            driver.step()
            engine.load_adapter("wide", adapters["wide"])
            driver.add(request("late", 9, "wide"))
            driver.prefill("late")
            driver.decode(["r0", "r1"])
            driver.finetune("job:first")
            driver.step()
            if lora == "padded":
                ranks = engine._table.stack.entries[..., 2]
                assert set(ranks[ranks > 0].tolist()) == {17}
        found[lora] = hidden
    assert distance(found["padded"], found["segmented"]) <= TOLERANCE


def logits_of(engine, names):
    """Logits of a prefill and two decodes of one request for each name."""
    found = []
    with Driver(engine) as driver:
        for i, name in enumerate(names):
            driver.add(request(f"r{i}", 5 + 3 * i, name))
            driver.prefill(f"r{i}")
        for _ in range(3):
            driver.step()
            found += [engine.last_logits[f"r{i}"].clone() for i in range(len(names))]
            driver.decode(list(driver.runs))
    return found


def test_off_gives_the_base_models_outputs_and_trains_nothing(base, adapters):
    names = [None, *adapters, "all"]
    runs = (("off", names), ("segmented", names), ("segmented", [None] * 5))
    found, applied, expected = (logits_of(engine_of(base, adapters, lora), n) for lora, n in runs)
    assert distance(found, expected) <= TOLERANCE < distance(applied, expected)
    engine = engine_of(base, adapters, "off")
    jobs = [job("first", accumulation=1)]
    _, trained, steps = mixed_run(engine, ["all"], jobs)
    assert steps["job:first"] >= 1
    again = engine_of(base, adapters, "off")
    with Driver(again, jobs):
        shake(again, "job:first")
        assert all(torch.equal(a, b) for a, b in zip(trained["job:first"], again._states["job:first"].params, strict=True))
    with pytest.raises(ValueError, match="dropout must be 0"):
        engine.begin([job("dropped", dropout=0.1)], seed=0)


def test_the_loop_counts_as_asked_for_and_not_as_a_reference(base, adapters):
    counters.calls.clear()
    engine = engine_of(base, adapters, "loop")
    with Driver(engine, [job("first", accumulation=1)]) as driver:
        driver.finetune("job:first")
        driver.step()
        driver.backward("job:first")
        driver.step()
    assert counters.calls["segmented_lora", "loop", "cpu"] and counters.calls["lora_gradients", "loop", "cpu"]
    assert not {"segmented_lora", "lora_gradients"} & counters.references_on("cpu").keys()


def test_a_published_adapter_serves_alike_padded_and_segmented(base, adapters):
    found = {}
    for lora in ("segmented", "padded"):
        engine = engine_of(base, adapters, lora)
        trained = job("new", accumulation=1, steps=1, publish="step")
        hidden = record_hidden(engine)
        with Driver(engine, [trained]) as driver:
            for _ in range(2):
                driver.finetune(trained.id)
                driver.step()
                driver.backward(trained.id)
                driver.step()
                if engine.adapter_infos["new"].version > 1:
                    break
            driver.add(request("r", 12, "new"))
            driver.prefill("r")
            driver.step()
        found[lora] = hidden[-1:]
    assert distance(found["padded"], found["segmented"]) <= TOLERANCE


class Cut:
    """Asks for the backward in slices of `layers`, and keeps what was taken."""

    def __init__(self, layers):
        self.layers, self.taken = layers, []

    def __call__(self, view, plan):
        plan.stop_on_arrival()
        for trained in view.jobs:
            if trained.phase != "backward":
                plan.train(trained)
                continue
            some = plan.backward(trained, self.layers)
            self.taken.append((some, plan.why))
            if not some:
                plan.backward(trained)

    def __deepcopy__(self, memo):
        return self


@pytest.mark.parametrize("backward, expected", [("cut", {(2, ""), (1, "")}), ("whole", {(0, "unsupported")})])
def test_a_whole_backward_takes_no_slice_and_says_so(base, adapters, backward, expected):
    engine = engine_of(base, adapters, "segmented", backward=backward)
    engine.predictor = _Flat()
    policy = Cut(2)
    result = wb.replay([], executor=engine, policy=policy, jobs=[job("first", steps=2, accumulation=1)], planning=0.0)
    assert set(policy.taken) == expected
    assert result.jobs["optimizer_steps"].iloc[0] == 2
    sizes = set(result.work.loc[result.work["kind"] == "backward", "tokens"])
    assert sizes == ({2, 1} if backward == "cut" else {3})


def test_modes_are_an_axis_of_a_sweep():
    def executor(lora, backward):
        config = replace(SMALL, lora=lora, backward=backward, graphs=False)
        engine = Engine.random("tiny-llama", adapters=[2, 4], device="cpu", config=config)
        engine.predictor = _Flat()
        return engine

    rows = {
        "request_id": ["a", "b"],
        "arrival_s": [0.0, 0.1],
        "prompt_tokens": [5, 7],
        "output_tokens": [3, 3],
        "adapter": ["adapter-0", "adapter-1"],
    }
    found = wb.sweep(
        [wb.policies.ServeFirst()],
        trace=wb.Trace.from_frame(pd.DataFrame(rows)),
        executor=executor,
        jobs=[wb.FinetuneJob(adapter="t", data=RandomTokens(examples=2, tokens=8), steps=1, batch_size=1)],
        planning=0.0,
        axes={"lora": LORA_MODES, "backward": ("cut", "whole")},
        until="jobs",
        measure=(0.0, 1e6),  # however long this machine takes
        progress=False,
    )
    assert len(found.frame) == 8 and found.frame["error"].isna().all()
    assert (found.frame["finished"] == 2).all() and (found.frame["optimizer_steps"] == 1).all()


class _Flat:
    def predict(self, work):
        return 1e-3


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"lora": "padding"}, "lora must be one of"),
        ({"lora": "loop"}, "needs graphs=False"),
        ({"backward": "none"}, "backward must be 'cut' or 'whole'"),
    ],
)
def test_modes_that_are_not_there_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        wb.EngineConfig(**options)
