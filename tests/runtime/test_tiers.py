"""Adapter versions between host memory and the device's slots: what is copied when, what waits for what, and that no bit changes."""

import pickle
import time
from dataclasses import replace
from types import SimpleNamespace
from weakref import ref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import workbench as wb
from tests.runtime.references import SMALL, job, make_adapter, request, shake
from workbench.config import LINEARS
from workbench.runtime import shapes
from workbench.runtime.adapters import init_adapter
from workbench.runtime.driver import Driver
from workbench.runtime.engine import Engine, OutOfMemory
from workbench.runtime.packed import ALIGN_BYTES, PackedLayout, PackedTensors
from workbench.runtime.slots import AdapterTable, Copies
from workbench.runtime.virtual import CarriedAdapter
from workbench.runtime.weights import Dims

CPU = torch.device("cpu")
DIMS = Dims.of(shapes.config("tiny-llama"))


class OtherMemory(Copies):
    """A device whose memory is not the host's, as far as copies and waiting go: `log` says what was asked for, `buffers` what is alive."""

    has_tiers = True

    def __init__(self):
        super().__init__(CPU)
        self.log, self.buffers = [], []

    def to_device(self, packed):
        buffer = packed.host.clone()
        self.buffers.append(ref(buffer))
        self.log.append(("to device", packed))
        return buffer, SimpleNamespace(packed=packed)

    def to_host(self, packed):
        packed.host.copy_(packed.staged)
        packed.arrival = SimpleNamespace(synchronize=lambda: self.log.append(("host waits", packed)))
        self.log.append(("to host", packed))

    def wait(self, arrival):
        self.log.append(("step waits", arrival.packed))

    def seen(self, what):
        return [packed for kind, packed in self.log if kind == what]


@pytest.fixture(scope="module")
def adapters(adapters, base, tmp_path_factory):
    """Another one, without some of the linears."""
    narrow = tmp_path_factory.mktemp("adapters") / "narrow"
    return adapters | {"narrow": make_adapter(narrow, base, rank=2, targets=("k_proj", "down_proj"), seed=2)}


def make(base, adapters=(), **config):
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", config=replace(SMALL, **config))
    engine._table.copies = OtherMemory()
    return engine


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(st.tuples(st.integers(0, 1), st.sampled_from(LINEARS)), st.integers(1, 256), min_size=1))
def test_packed_tensors_are_aligned_apart_and_as_they_were(ranks):
    shapes = {key: ((r, DIMS.linear(key[1])[0]), (DIMS.linear(key[1])[1], r)) for key, r in ranks.items()}
    tensors = {key: (torch.randn(a), torch.randn(b)) for key, (a, b) in shapes.items()}
    layout = PackedLayout.of(shapes, torch.float32)
    packed = PackedTensors.allocate(layout, CPU)
    packed.write(tensors)
    ends = [0]
    for key, pair in packed.items():
        for ours, theirs in zip(pair, tensors[key], strict=True):
            assert torch.equal(ours, theirs)
            start = ours.data_ptr() - packed.host.data_ptr()
            assert start % ALIGN_BYTES == 0 and start >= ends[-1]
            ends.append(start + ours.numel() * 4)
    assert ends[-1] <= layout.bytes and list(packed) == list(tensors)


def test_entries_point_to_the_weights_that_the_reference_reads():
    table = AdapterTable(DIMS, 3, CPU, torch.float32)
    weights = [init_adapter(DIMS, "all", rank=8, b_std=0.1), init_adapter(DIMS, "two", rank=3, targets=("v_proj", "up_proj"), b_std=0.1)]
    weights[1] = replace(weights[1], tensors={k: v for k, v in weights[1].tensors.items() if k[0] == 1})
    table.load(0, table.admit(weights[0]))
    table.put(1, weights[0].tensors, weights[0].scales)
    table.load(2, table.admit(weights[1]))
    found = set()
    for layer, group in enumerate(table.tables):
        for t in group.values():
            for slice in range(t.num_slices):
                for slot in range(3):
                    words, entry = t.entries[slice, slot].tolist(), t.get(slice, slot)
                    assert words[4:] == [t.out_offsets[slice], t.out_features[slice], 0, 0]
                    if entry is None:
                        assert words[:4] == [0] * 4
                        continue
                    bits = torch.tensor(entry.scale).view(torch.int32).item()
                    assert words[:4] == [entry.a.data_ptr(), entry.b.data_ptr(), entry.rank, bits]
                    found.add((layer, slot, entry.rank))
                    t.check(slice, entry)
    assert found == {(layer, slot, 8) for layer in range(DIMS.num_layers) for slot in (0, 1)} | {(1, 2, 3)}
    facts = [(t.max_rank, t.rank_multiple) for t in table.tables[1].values()]
    assert facts == [(8, 1), (8, 8), (8, 1), (8, 8)]


def test_a_table_of_a_stack_changes_only_through_its_stack():
    table = AdapterTable(DIMS, 2, CPU, torch.float32).tables[0]["o"]
    with pytest.raises(ValueError, match="got one of a stack. Change the slot with LoraTableStack.put"):
        table.clear(0)


@pytest.mark.parametrize("change", [lambda t: t.double(), lambda t: t.T.contiguous().T, lambda t: torch.cat([t, t])])
def test_weights_in_training_that_kernels_could_not_read_are_refused(change):
    table = AdapterTable(DIMS, 2, CPU, torch.float32)
    weights = init_adapter(DIMS, "x", rank=4, targets=("q_proj",))
    (key, (a, b)), *_ = weights.tensors.items()
    with pytest.raises(ValueError, match="[ab] must"):
        table.put(0, {key: (change(a), b)}, weights.scales)
    assert not table.stack.entries[..., :4].any()


def test_an_adapter_for_another_base_is_refused_with_its_name():
    table = AdapterTable(DIMS, 2, CPU, torch.float32)
    other = init_adapter(replace(DIMS, hidden=DIMS.hidden * 2), "wide", rank=4)
    with pytest.raises(ValueError, match=r"wide: A and B of model.layers.0.self_attn.q_proj must have shapes \(r, "):
        table.admit(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_served_version_is_saved_and_carried_bit_for_bit(base, adapters, tmp_path, dtype):
    engine = Engine.from_pretrained(base, adapters=adapters, device="cpu", dtype=dtype, config=SMALL)
    for name, directory in adapters.items():
        engine.save_adapter(name, tmp_path / name)
        ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / name, directory))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) and ours[k].dtype == theirs[k].dtype for k in ours)
        weights = engine._versions[name, 1]
        carried = CarriedAdapter.of(weights)
        size = sum(t.numel() * t.element_size() for t in carried.tensors.values())
        assert len(pickle.dumps(carried)) < 2 * size + 100_000, "a view must not take its whole buffer along"
        assert all(torch.equal(carried.tensors[k.removeprefix("base_model.model.")], theirs[k]) for k in theirs)
        assert weights.packed is not None and weights.packed.layout.dtype == dtype
        assert (weights.tensors is weights.packed) == (dtype == torch.float32), "weights of the engine's own dtype are kept once"


def serve(engine, num_requests=9):
    requests = [
        replace(request(f"r{i}", 11 + i, ("a", "b", "narrow")[i % 3], output_tokens=5), arrival_s=i / 1e6) for i in range(num_requests)
    ]
    with engine.uncalibrated():
        return wb.replay(requests, executor=engine, policy=wb.policies.FCFS(), progress=False)


def test_more_adapters_than_slots_are_served_as_if_there_were_slots_for_all(base, adapters):
    found = []
    for num_slots in (3, 1):
        engine = make(base, adapters, num_slots=num_slots, max_batch_adapters=num_slots)
        found.append(serve(engine))
        loads = engine._table.copies.seen("to device")
        assert len(loads) == 3 if num_slots == 3 else len(loads) > 3
        assert sum(buffer() is not None for buffer in engine._table.copies.buffers) == num_slots, "what leaves a slot leaves the device"
    assert found[0].outputs == found[1].outputs


def test_a_step_waits_for_the_adapters_it_reads_and_for_no_other(base, adapters):
    engine = make(base, adapters)
    copies = engine._table.copies
    with Driver(engine) as driver:
        for name in ("a", "b"):
            driver.add(request(name, 10, name))
        driver._need_slot("b", 1)  # loaded ahead, as plan.load does
        driver.prefill("a")
        driver.step()
        a, b = (engine._versions[name, 1].packed for name in "ab")
        assert copies.seen("to device") == [b, a] and copies.seen("step waits") == [a]
        driver.decode(["a"])
        driver.step()
        assert copies.seen("step waits") == [a]
        driver.prefill("b")
        driver.step()
        driver.decode(["a", "b"])
        driver.step()
    assert copies.seen("step waits") == [a, b] and copies.seen("to device") == [b, a] and not copies.seen("host waits")


def test_loads_start_before_the_rows_are_packed(base, adapters, monkeypatch):
    engine, order = make(base, adapters), []
    pack, to_device, wait = engine._pack, engine._table.copies.to_device, engine._table.copies.wait
    monkeypatch.setattr(engine, "_pack", lambda batch: order.append("pack") or pack(batch))
    monkeypatch.setattr(engine._table.copies, "to_device", lambda packed: order.append("copy") or to_device(packed))
    monkeypatch.setattr(engine._table.copies, "wait", lambda arrival: order.append("wait") or wait(arrival))
    with Driver(engine) as driver:
        driver.add(request("a", 10, "a"))
        driver.prefill("a")
        driver.step()
    assert order == ["copy", "pack", "wait"]


@pytest.mark.parametrize("where", ["to_device", "wait", "forward"])
def test_a_failed_step_gives_each_slot_its_version_back_without_new_memory(base, adapters, monkeypatch, where):
    tokens = []
    for fails in (False, True):
        engine = make(base, adapters, num_slots=1)
        with Driver(engine) as driver:
            driver.add(request("a", 10, "a"))
            driver.prefill("a")
            tokens.append([driver.step().tokens])
            if fails:
                driver.add(request("b", 10, "b"))
                driver.slots.clear()  # the driver never evicts: let "b" have the only slot
                driver.prefill("b")
                batch = driver.take()
                out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 MiB")
                target = engine.runner if where == "forward" else engine._table.copies

                def failing(*args, error=out_of_memory):
                    raise error

                with monkeypatch.context() as patch:
                    patch.setattr(target, where, failing)
                    before = len(engine._table.copies.buffers)
                    with pytest.raises(OutOfMemory, match="lower EngineConfig.activation_tokens from 512"):
                        engine.step(batch)
                    assert len(engine._table.copies.buffers) <= before + 1
                driver.slots = {("a", 1): 0}
            for _ in range(2):
                driver.decode(["a"])
                tokens[-1].append(driver.step().tokens)
    assert tokens[0] == tokens[1]


def train(engine, j, *, steps=None):
    """Micro-batch after micro-batch, whole; what each step published."""
    published = []
    with Driver(engine, [j]) as driver:
        shake(engine, j.id)
        while driver.jobs[j.id].index < (steps or driver.shapes[j.id].num_micro_batches):
            driver.finetune(j.id)
            driver.step()
            driver.backward(j.id)
            published.append(driver.step().published)
        state = engine._states[j.id]
        return published, [t.clone() for t in (*state.params, *state.accumulated)]


def test_a_published_version_is_loaded_from_where_it_was_made_and_lives_in_host_memory_after(base):
    engine = make(base, num_slots=1)
    copies, j = engine._table.copies, job("mine", publish="step", steps=2, accumulation=1)
    train(engine, j)
    newest = engine._versions["mine", 3].packed
    assert len(copies.seen("to host")) == 3 and copies.seen("to host")[-1] is newest and not copies.seen("host waits")
    assert [p.staged is not None for p in copies.seen("to host")] == [False, False, True], "one device copy at a time waits for a slot"
    expected = {key: tuple(t.clone() for t in pair) for key, pair in engine._states[j.id].compute.items()}
    with Driver(engine) as driver:
        driver.add(request("r", 10, "mine"))
        driver.prefill("r")
        driver.step()
        assert not copies.seen("to device") and newest.staged is None
        on_device = ref(engine._table.stack.columns[0].weights(0).a)
        engine._table.load(0, engine._versions["mine", 3])
        assert copies.seen("to device") == [newest] and on_device() is None, "the slot held the only device copy"
        for row, key in enumerate(engine._table._keys):
            entry = engine._table.stack.columns[0].weights(row)
            assert torch.equal(entry.a, expected[key][0]) and torch.equal(entry.b, expected[key][1])
    assert not copies.seen("host waits")
    for key, pair in engine._versions["mine", 3].tensors.items():
        assert all(torch.equal(x, y) for x, y in zip(pair, expected[key], strict=True))
    assert copies.seen("host waits") == [newest], "reading the host copy waits, once, for its arrival"


@pytest.mark.parametrize("publish", ["step", "end"])
def test_a_step_that_finds_no_room_to_publish_leaves_the_optimiser_where_it_was(base, monkeypatch, publish):
    found = []
    for fails in (False, True):
        engine = make(base)
        j = job("mine", publish=publish, steps=2, accumulation=1)
        reserve, failed = engine._table.reserve, []

        def failing(like, *, staged, reserve=reserve, failed=failed):
            if len(failed) < 2:
                failed.append(staged)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
            return reserve(like, staged=staged)

        with Driver(engine, [j]) as driver:
            shake(engine, j.id)
            published = []
            for _ in range(2):
                driver.finetune(j.id)
                driver.step()
                driver.backward(j.id)
                batch = driver.take()
                if fails:
                    state = engine._states[j.id]
                    before = (state.optimizer_steps, state.micro_batches_done, [t.clone() for t in (*state.params, *state.accumulated)])
                    with monkeypatch.context() as patch:
                        patch.setattr(engine._table, "reserve", failing)
                        while len(failed) < 2 and (publish == "step" or driver.jobs[j.id].index == 2):
                            with pytest.raises(OutOfMemory):
                                engine.step(batch)
                            after = (state.optimizer_steps, state.micro_batches_done)
                            assert after == before[:2]
                            assert all(torch.equal(x, y) for x, y in zip((*state.params, *state.accumulated), before[2], strict=True))
                published.append(engine.step(batch).published)
            state = engine._states[j.id]
            found.append((published, [t.clone() for t in (*state.params, *state.accumulated)]))
        assert bool(failed) == fails
    assert found[0][0] == found[1][0] == ([{"mine": 2}, {"mine": 3}] if publish == "step" else [{}, {"mine": 2}])
    assert all(torch.equal(x, y) for x, y in zip(found[0][1], found[1][1], strict=True))


def test_publishing_takes_no_memory_once_the_commit_has_begun(base, monkeypatch):
    engine = make(base)
    commit, allocate, in_commit = engine._commit, PackedTensors.allocate, []

    def watched(*args):
        in_commit.append(True)
        try:
            return commit(*args)
        finally:
            in_commit.pop()

    def allocating(*args, **options):
        if in_commit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(*args, **options)

    monkeypatch.setattr(engine, "_commit", watched)
    monkeypatch.setattr(PackedTensors, "allocate", allocating)
    published, _ = train(engine, job("mine", publish="step", steps=2, accumulation=1))
    assert published == [{"mine": 2}, {"mine": 3}]


def test_filling_a_slot_of_a_32_layer_model_takes_the_host_under_two_milliseconds():
    dims = replace(Dims.of(shapes.config("llama3-8b")), hidden=64, intermediate=96, head_dim=2)
    table = AdapterTable(dims, 24, CPU, torch.bfloat16)
    table.copies = OtherMemory()
    versions = [table.admit(init_adapter(dims, f"a{i}", rank=16, b_std=0.1)) for i in range(2)]
    times = []
    for i in range(40):
        started = time.perf_counter()
        table.load(i % 16, versions[i % 2])
        table.wait([i % 16])
        times.append(time.perf_counter() - started)
    assert min(times) < 0.002
