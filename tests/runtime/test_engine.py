"""The engine as an executor: versions in flight, transactions, checkpoints, and what it refuses."""

import gc
import random
import signal
from dataclasses import replace

import pytest
import torch

from tests.runtime.references import SMALL, job, make_adapter, random_mix, reference_logits, request, shake
from workbench.config import EngineConfig, FinetuneJob
from workbench.core import Executor
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine, OutOfMemory


@pytest.fixture
def engine(base, adapters):
    return Engine.from_pretrained(base, adapters=adapters, device="cpu", config=SMALL)


def test_engine_is_an_executor(engine):
    engine.predictor = None
    with engine.uncalibrated():
        assert isinstance(engine, Executor)


def test_a_replays_garbage_collections_leave_out_what_was_there_before_it(engine):
    gc.unfreeze()
    with Driver(engine):
        assert gc.get_freeze_count() > 10_000, "all that torch and transformers imported"
    assert gc.get_freeze_count() == 0


def test_what_the_process_froze_itself_stays_frozen(engine):
    gc.freeze()
    before = gc.get_freeze_count()
    with Driver(engine):
        assert gc.get_freeze_count() <= before, "nothing more is frozen"
    assert gc.get_freeze_count() > 0.9 * before, "nor thawed"


def test_a_request_keeps_the_version_it_was_admitted_with_while_the_adapter_is_replaced_and_unloaded(engine, base, adapters):
    with Driver(engine) as driver:
        driver.add(request("old", 10, "a"))
        driver.prefill("old")
        driver.step()
        assert engine.load_adapter("a", adapters["b"]) == 2
        driver.add(request("new", 10, "a"))
        driver.prefill("new")
        driver.decode(["old"])
        driver.step()
        engine.unload_adapter("a")
        driver.decode(["old", "new"])
        driver.step()
        for name, directory in (("old", adapters["a"]), ("new", adapters["b"])):
            tokens = engine._sequences[name].tokens
            expected = reference_logits(base, directory, tokens[:-1])[9:].argmax(-1).tolist()
            assert tokens[10:] == expected
        driver.release("old")
        driver.release("new")
        driver.step()
    assert ("a", 1) not in engine._versions and ("a", 2) not in engine._versions, "versions that nobody holds are let go"


def test_adapters_with_different_targets_and_base_only_requests_share_a_batch(engine, base, adapters, tmp_path):
    engine.load_adapter("narrow", make_adapter(tmp_path / "narrow", base, rank=2, targets=("k_proj",), seed=6))
    with Driver(engine) as driver:
        names = {"r0": None, "r1": "narrow", "r2": "a"}
        for request_id, name in names.items():
            driver.add(request(request_id, 14, name))
            driver.prefill(request_id)
        tokens = driver.step().tokens
        for request_id, name in names.items():
            directory = {"narrow": tmp_path / "narrow", "a": adapters["a"], None: None}[name]
            prompt = engine._sequences[request_id].tokens[:-1]
            assert tokens[request_id] == int(reference_logits(base, directory, prompt)[-1].argmax())


def test_unknown_adapter_is_an_error_with_a_suggestion(engine, adapters):
    engine.load_adapter("summaries", adapters["a"])
    with pytest.raises(ValueError, match="no adapter is called 'sumaries'. Did you mean 'summaries'?"):
        engine.admissible(request("r", 4, "sumaries"))
    with pytest.raises(ValueError, match="no adapter is called 'x'. Known: 'a', 'b', 'summaries'"):
        engine.unload_adapter("x")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("boom"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["forward", "backward", "sample"])
def test_a_step_that_fails_leaves_the_engine_as_it_was(engine, base, monkeypatch, error, where):
    j = job("mine")
    results = []
    for fails in (False, True):
        with Driver(engine, [j]) as driver:
            shake(engine, j.id)
            draw = random.Random(3)
            for i, name in enumerate(("a", "b", None)):
                driver.add(request(f"r{i}", 15, name))
            tokens = []
            for _ in range(14):
                random_mix(driver, draw, list(driver.runs), [j.id])
                batch = driver.take()
                if fails:
                    target = {"forward": "forward", "backward": "backward"}.get(where)
                    with monkeypatch.context() as patch:
                        if target:
                            original = getattr(engine.runner, target)

                            def failing(*args, original=original):
                                original(*args)
                                raise error

                            patch.setattr(engine.runner, target, failing)
                        else:

                            def failing_sample(*args):
                                raise error

                            patch.setattr(engine, "_sample", failing_sample)
                        ran = bool(batch.backwards) if where == "backward" else bool(batch.segments)
                        if ran:
                            with pytest.raises(OutOfMemory if isinstance(error, torch.OutOfMemoryError) else type(error)):
                                engine.step(batch)
                tokens.append(dict(engine.step(batch).tokens))
                held = {sequence.row for sequence in engine._sequences.values()}
                assert len(held) == len(engine._sequences) and held.isdisjoint(engine._tables._free)
            state = engine._states[j.id]
            results.append((tokens, [t.clone() for t in state.params + state.accumulated], state.micro_batches_done))
        assert sorted(engine._tables._free) == list(range(len(engine._tables.rows))), "every row of the block tables is given back"
    assert results[0][0] == results[1][0] and results[0][2] == results[1][2]
    assert all(torch.equal(x, y) for x, y in zip(results[0][1], results[1][1], strict=True))


@pytest.mark.parametrize("stops", [(0.0,), (0.0, 0.0), (None, 0.0)])
def test_a_backward_that_is_stopped_before_any_layer_goes_on_where_it_was(base, stops):
    found = []
    for plan in ((), stops):
        engine = Engine.from_pretrained(base, device="cpu", config=SMALL)
        j = job("mine", accumulation=2)
        with Driver(engine, [j]) as driver:
            shake(engine, j.id)
            driver.finetune(j.id)
            driver.step()
            for stop in plan:
                before = (driver.jobs[j.id].index, driver.jobs[j.id].offset, driver.jobs[j.id].layers_left)
                driver.backward(j.id, 1)
                result = engine.step(replace(driver.take(), stop_after_s=stop))
                assert result.layers_done == {j.id: int(stop is None)} and result.stopped_early == (stop is not None)
                if stop is not None:
                    driver.jobs[j.id].index, driver.jobs[j.id].offset, driver.jobs[j.id].layers_left = before
            driver.backward(j.id)
            assert driver.step().layers_done == {j.id: engine.info.num_layers - sum(s is None for s in plan)}
            found.append([g.clone() for g in engine._states[j.id].accumulated])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True)) and any(g.any() for g in found[0])


def run_job(engine, j, *, micro_batches, folder=None):
    """Train until `micro_batches` are committed, forwards in chunks of 13 tokens and backwards of one layer, then checkpoint mid-flight."""
    with Driver(engine, [j]) as driver:
        while driver.jobs[j.id].index < micro_batches:
            while not driver.finetune(j.id, 13):
                driver.step()
            driver.step()
            while not driver.backward(j.id, 1):
                driver.step()
            driver.step()
        if folder is not None:
            driver.finetune(j.id, 5)
            driver.step()
            engine.jobs[j.adapter].checkpoint(folder)
        state = engine._states[j.id]
        return [t.clone() for t in [*state.params, *state.accumulated]] + [
            v.clone() for means in state.optimizer_tensors() for v in means.values()
        ]


@pytest.mark.parametrize("boundary", [2, 3])
def test_resumed_and_uninterrupted_runs_are_bit_equal_at_any_micro_batch_boundary(base, tmp_path, boundary):
    config = EngineConfig(**{**SMALL.__dict__, "deterministic": True})
    make = lambda: Engine.from_pretrained(base, device="cpu", config=config)
    j = job("mine", steps=3, accumulation=2, schedule="linear", dropout=0.1)
    whole = run_job(make(), j, micro_batches=6)
    run_job(make(), j, micro_batches=boundary, folder=tmp_path / "checkpoint")
    resumed = FinetuneJob.from_checkpoint(tmp_path / "checkpoint")
    engine = make()
    again = run_job(engine, resumed, micro_batches=6)
    assert engine._states[resumed.id].micro_batches_done == 6
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))


def test_small_bf16_updates_are_not_lost(base):
    engine = Engine.from_pretrained(base, device="cpu", dtype=torch.bfloat16, config=SMALL)
    j = job("mine", learning_rate=1e-5, steps=2, accumulation=1)
    with Driver(engine, [j]) as driver:
        start = [p.clone() for p in engine._states[j.id].params]
        while driver.jobs[j.id].index < 2:
            while not driver.finetune(j.id):
                driver.step()
            driver.step()
            driver.backward(j.id)
            driver.step()
        state = engine._states[j.id]
        for (a, b), (a0, b0) in zip(state.master.values(), zip(start[::2], start[1::2], strict=True), strict=True):
            assert a.dtype == torch.float32
            assert float((b != b0).float().mean()) > 0.99 and float((a != a0).float().mean()) > 0.99


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(prompt_tokens=0), "a prompt must have at least 1 token, got 0"),
        (dict(prompt_tokens=500), "must fit the context of 192 tokens, got 564"),
        (dict(prompt_tokens=100, output_tokens=10**9), "must fit the context"),
        (dict(prompt_tokens=10, output_tokens=None, max_tokens=500), "prompt and max_tokens must fit 192 tokens"),
        (dict(prompt_tokens=4, prompt="hello"), "needs a tokenizer"),
        (dict(prompt_tokens=4, prompt_token_ids=(1, 2, 999)), "prompt token ids must lie in"),
    ],
)
def test_requests_that_can_never_run_are_refused_with_rule_value_and_next_step(engine, values, message):
    values = dict(request_id="r", prompt_tokens=4, adapter=None) | values
    with pytest.raises(ValueError, match=message):
        engine.admissible(request(**values))


def test_a_pool_too_small_for_one_request_is_refused(base):
    engine = Engine.from_pretrained(base, device="cpu", config=EngineConfig(max_model_len=128, num_blocks=2))
    with pytest.raises(ValueError, match=r"the KV pool must hold one request \(32 tokens\), got 74. Raise EngineConfig.num_blocks"):
        engine.admissible(request("r", 10, None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for CUDA where there is none")
def test_cuda_where_there_is_none_is_an_error_that_says_what_to_do(base):
    with pytest.raises(ValueError, match="on a machine without CUDA. Pass device='cpu'"):
        Engine.from_pretrained(base, device="cuda")


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(dtype="int8"), "dtype must be float32, bfloat16 or float16, got 'int8'"),
        (dict(config=EngineConfig(max_model_len=100_000)), "max_model_len must be at most 256"),
        (dict(device="tpu"), "device"),
    ],
)
def test_bad_engine_options_are_refused(base, values, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        Engine.from_pretrained(base, **({"device": "cpu"} | values))


def test_commands_need_a_running_replay(engine):
    j = job("mine")
    with Driver(engine, [j]) as driver:
        handle = engine.jobs["mine"]
        handle.pause()
        assert engine.poll() == [("pause", j.id)] and engine.poll() == []
        assert driver.shapes[j.id].num_micro_batches == 8
    with pytest.raises(RuntimeError, match="pause needs a running replay"):
        handle.pause()


def test_a_job_adapter_serves_from_the_start_and_the_next_replay_starts_afresh(engine, base):
    j = job("mine", steps=1)
    first = None
    for _ in range(2):
        with Driver(engine, [j]) as driver:
            version = engine.adapters["mine"].version
            while not driver.finetune(j.id):
                driver.step()
            loss = driver.step().losses[j.id]
            first = first or loss
            assert loss == first, "a job starts from the same initial weights in every replay"
            driver.backward(j.id)
            driver.step()
            while not driver.finetune(j.id):
                driver.step()
            driver.step()
            driver.backward(j.id)
            assert driver.step().published == {"mine": version + 1}


def test_nll_equals_the_reference(engine, base, adapters):
    ids = list(range(3, 60))
    expected = torch.nn.functional.cross_entropy(reference_logits(base, adapters["a"], ids)[:-1], torch.tensor(ids[1:]))
    assert engine.nll([ids, ids], adapter="a") == pytest.approx(float(expected), rel=1e-4)
    assert engine.nll([ids]) != pytest.approx(float(expected), rel=1e-3)


def test_a_second_replay_on_a_running_engine_is_refused_and_harms_nothing(engine):
    j = job("mine")
    with Driver(engine, [j]) as driver:
        driver.finetune(j.id)
        driver.step()
        with pytest.raises(RuntimeError, match="begin needs an idle engine"):
            engine.generate([[5, 6, 7]])
        driver.backward(j.id)
        driver.step()
        assert engine.jobs["mine"].micro_batches_done == 1


def test_a_load_that_fails_half_way_leaves_nothing_for_the_next_adapter(engine, base, tmp_path, monkeypatch):
    engine.load_adapter("narrow", make_adapter(tmp_path / "narrow", base, rank=2, targets=("q_proj",), seed=6))
    put, calls = engine._table.stack.put, []

    def failing(slot, column):
        put(slot, column)
        calls.append(column)
        if len(calls) == 2:  # the first adapter's entries are there, the second's too
            raise torch.OutOfMemoryError("CUDA out of memory")

    with Driver(engine) as driver:
        for name in ("a", "narrow"):
            driver.add(request(name, 14, name))
            driver.prefill(name)
        with monkeypatch.context() as patch:
            patch.setattr(engine._table.stack, "put", failing)
            with pytest.raises(OutOfMemory):
                driver.step()
    assert len(calls) > 2 and not engine._table.stack.entries[..., :4].any()
    assert not any(table.weights for layer in engine._table.tables for table in layer.values())


def test_ctrl_c_during_the_commit_is_raised_after_it(engine, monkeypatch):
    commit = engine._commit

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return commit(*args)

    monkeypatch.setattr(engine, "_commit", interrupted)
    with Driver(engine) as driver:
        driver.add(request("r", 14, "a"))
        driver.prefill("r")
        driver.step()
        assert len(engine._sequences["r"].tokens) == 15
        with pytest.raises(KeyboardInterrupt):
            engine.poll()
        assert engine.poll() == []


def test_a_version_that_a_plan_may_load_outlives_its_replacement(engine, adapters):
    assert engine.adapter_infos["a"].version == 1
    engine.load_adapter("a", adapters["b"])
    assert ("a", 1) in engine._versions
    assert engine.adapter_infos["a"].version == 2
    engine.load_adapter("b", adapters["b"])
    assert ("a", 1) not in engine._versions


def test_a_replay_pays_nothing_for_adapters_that_only_an_earlier_one_had(engine):
    with Driver(engine) as driver:
        driver.add(request("r", 4, "b"))
        driver.prefill("r")
        driver.step()
    tables = [table for layer in engine.runner.table.tables for table in layer.values()]
    assert {table.max_rank for table in tables} == {9}
    engine.unload_adapter("b")
    with Driver(engine):
        assert all(table.max_rank == 4 and not table.weights for table in tables), "only the adapter of rank 4 is known now"


def test_random_adapters_come_at_any_time_and_replace_those_of_their_name(engine):
    assert engine.add_random_adapters((4, 8)) == ("adapter-0", "adapter-1")
    engine.add_random_adapters((16,), seed=2)
    infos = engine.adapters
    assert (infos["adapter-0"].rank, infos["adapter-0"].version, infos["adapter-1"].rank) == (16, 2, 8)
    assert Engine.random("tiny-llama", adapters=(4, 8), device="cpu").adapters["adapter-1"].rank == 8
    with pytest.raises(ValueError, match="rank must lie in 1"):
        engine.add_random_adapters((8, 0))
