"""Adapters beyond the GPU's slots on a real GPU: how fast they load, that loads disturb nothing, and that the sizes fit the device."""

import statistics
import time
from dataclasses import replace

import pytest
import torch

import workbench as wb
from tests.runtime.references import SMALL, job, make_adapter, make_base, request
from workbench.core import AdapterLoad
from workbench.runtime.driver import Driver
from workbench.runtime.memory import MARGIN_SHARE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

RANK = 16
NAMES = [f"adapter-{i}" for i in range(6)]


@pytest.fixture(scope="module")
def llama():
    config = wb.EngineConfig(max_model_len=2048, max_batch_tokens=2048, activation_tokens=4096, num_slots=8, max_jobs=2, reserve_rank=RANK)
    engine = wb.Engine.random("llama3-8b", adapters=[RANK] * len(NAMES), device="cuda", config=config)
    for name in NAMES:
        engine._versions[name, 1].packed.staged = None  # every load below comes from host memory
    return engine


def logits_of(engine, monkeypatch):
    """The logits of every step from now on, copied."""
    found, sample = [], engine._sample

    def watched(forward):
        found.append(forward.logits.clone())
        return sample(forward)

    monkeypatch.setattr(engine, "_sample", watched)
    return found


def test_the_pool_fills_the_device_and_every_reserve_can_be_taken(llama):
    print(llama.memory)
    memory = llama.memory
    assert memory.workspace and memory.num_blocks == llama.info.num_blocks and memory.kv_pool > 0.3 * memory.total
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    reserved = memory.adapters + memory.jobs + memory.arena + memory.graphs + memory.workspace
    assert memory.total == total and free >= reserved, "what was set aside is there"
    assert free - reserved <= (MARGIN_SHARE + 0.05) * total, "and not much more"
    del free
    taken = torch.empty(reserved, dtype=torch.uint8, device="cuda")
    del taken
    torch.cuda.empty_cache()


def test_recorded_graphs_take_no_more_than_was_set_aside(llama):
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    llama.warm_up()
    torch.cuda.empty_cache()
    taken = before - torch.cuda.mem_get_info()[0]
    print(f"recorded graphs: {taken / (1 << 20):,.0f} MiB of {llama.memory.graphs / (1 << 20):,.0f} set aside")
    assert taken <= llama.memory.graphs


def test_a_warm_load_of_rank_16_takes_at_most_ten_milliseconds(llama, record_property):
    table, versions = llama._table, [llama._versions[name, 1] for name in NAMES]
    size = versions[0].packed.layout.bytes
    assert 80e6 < size < 90e6 and all(v.packed.host.is_pinned() for v in versions)
    device_s, host_s = [], []
    for i in range(60):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        started = time.perf_counter()
        table.load(i % 8, versions[i % len(versions)])
        host_s.append(time.perf_counter() - started)
        table.wait([i % 8])
        end.record()
        end.synchronize()
        device_s.append(begin.elapsed_time(end) / 1e3)
    device, host = statistics.median(device_s[20:]), statistics.median(host_s[20:])
    record_property("warm_load_r16_s", device)
    rate = size / device / 1e9
    print(f"warm load, r16 on all linears ({size / 1e6:.0f} MB): {1e3 * device:.2f} ms ({rate:.1f} GB/s), host {1e3 * host:.2f} ms")
    assert device <= 0.010 and host <= 0.002


def test_decode_steps_during_loads_of_other_adapters_give_the_same_bits(llama, monkeypatch):
    runs, times = [], []
    for loads in (False, True):
        with monkeypatch.context() as patch, Driver(llama) as driver:
            found = logits_of(llama, patch)
            for i in range(8):
                driver.add(request(f"r{i}", 64, NAMES[i % 2], output_tokens=100))
                driver.prefill(f"r{i}")
            driver.step()
            seconds = []
            for i in range(24):
                driver.decode(list(driver.runs))
                batch = driver.take()
                if loads:  # into the six slots that no row of this batch reads, over and over
                    name = NAMES[2 + i % 4]
                    info = llama.adapters[name]
                    batch = replace(batch, loads=(AdapterLoad(name, 1, 2 + i % 6, info.rank, info.bytes),))
                seconds.append(llama.step(batch).duration_s)
            runs.append(found)
            times.append(statistics.median(seconds[8:]))
    print(f"decode step, B = 8: median {1e3 * times[0]:.2f} ms, with a load of 84 MB in each step {1e3 * times[1]:.2f} ms")
    assert len(runs[0]) == len(runs[1]) == 25
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    base = make_base(folder / "base", "llama")
    return base, {name: make_adapter(folder / name, base, rank=16, seed=seed) for seed, name in enumerate("abc")}


def test_adapters_replaced_under_recorded_graphs_give_the_bits_of_adapters_that_stay(small, monkeypatch):
    base, adapters = small
    runs = []
    for num_slots in (4, 1):
        engine = wb.Engine.from_pretrained(
            base, adapters=adapters, device="cuda", config=replace(SMALL, num_slots=num_slots, warm_up=False)
        )
        with monkeypatch.context() as patch, Driver(engine) as driver:
            found = logits_of(engine, patch)
            for i in range(18):
                name = "abc"[i % 3]
                if num_slots == 1 and (name, 1) not in driver.slots:
                    driver.slots.clear()
                if name not in driver.runs:
                    driver.add(request(name, 12, name))
                    driver.prefill(name)
                else:
                    driver.decode([name])
                driver.step()
            runs.append(found)
            assert engine._graphs is not None and len(engine._graphs.recorded) == 1, "one graph for all of them"
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def test_a_version_published_on_the_device_is_the_same_in_its_slot_and_on_the_host(small):
    base, _ = small
    engine = wb.Engine.from_pretrained(base, device="cuda", config=SMALL)
    j = job("mine", publish="step", steps=3, accumulation=1)
    with Driver(engine, [j]) as driver:
        for step in range(3):
            while not driver.finetune(j.id):
                driver.step()
            driver.step()
            driver.backward(j.id)
            assert driver.step().published == {"mine": step + 2}
            state, version = engine._states[j.id], engine._versions["mine", step + 2]
            expected = {key: tuple(t.clone() for t in pair) for key, pair in state.compute.items()}
            for _ in range(2):  # from its device copy, then from the host
                engine._table.load(0, version)
                engine._table.wait([0])
                for row, key in enumerate(engine._table._keys):
                    entry = engine._table.stack.columns[0].weights(row)
                    assert torch.equal(entry.a, expected[key][0]) and torch.equal(entry.b, expected[key][1])
            for key, pair in version.tensors.items():
                assert all(t.device.type == "cpu" and torch.equal(t, e.cpu()) for t, e in zip(pair, expected[key], strict=True))
