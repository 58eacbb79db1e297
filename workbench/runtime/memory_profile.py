"""How much memory the largest steps of an engine need, by running them."""

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch

from workbench.config import EngineConfig, FinetuneJob, RandomTokens
from workbench.core import Request, Sampling
from workbench.runtime.driver import Driver

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine

DOCUMENT_TOKENS = 1_024  # of the fine-tune rows that fill the arena


class Gauge(Protocol):
    """What is asked of a device."""

    def total_bytes(self) -> int: ...

    def free_bytes(self) -> int:
        """Free now, with nothing of ours left in caches."""
        ...

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most that `run` held at once beyond what was held before it."""
        ...


class CudaGauge:
    """A CUDA device, by its driver and by torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def total_bytes(self) -> int:
        return torch.cuda.mem_get_info(self.device)[1]

    def free_bytes(self) -> int:
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def peak_bytes(self, run: Callable[[], object]) -> int:
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def _profile_requests(config: EngineConfig, max_model_len: int) -> tuple[int, int]:
    """How many requests fill a step, and the prompt tokens of each."""
    count = min(config.max_requests, config.max_batch_tokens)
    return count, max(1, min(config.max_batch_tokens // count, max_model_len - 1))


def profile_blocks(config: EngineConfig, max_model_len: int) -> int:
    """The KV blocks that the largest step needs."""
    count, tokens = _profile_requests(config, max_model_len)
    return count * -(-(tokens + 1) // config.block_tokens)


def profile(engine: "Engine", gauge: Gauge) -> int:
    """The most memory in bytes that steps take beyond weights, pool, arena and job, seen in the largest that there are.

    It is what a forward needs (over max_batch_tokens fine-tune rows with their loss, or over max_batch_tokens of prompts of as many
    requests as can be resident, each sampled in the way that needs most) and what a layer of the backward of an arena full of rows
    needs, together: recorded as a graph, the one keeps its memory while the other runs.
    """
    info, config = engine.info, engine.config
    length = min(info.activation_tokens, info.max_model_len, DOCUMENT_TOKENS)
    rows = max(1, info.activation_tokens // length)
    data = RandomTokens(examples=rows, tokens=length)
    job = FinetuneJob(adapter="profile", data=data, rank=config.reserve_rank, batch_size=rows, steps=1, max_tokens=length)
    count, tokens = _profile_requests(config, info.max_model_len)
    forwards = []
    with Driver(engine, [job]) as driver:
        is_complete = False
        while not is_complete:
            is_complete = driver.finetune(job.id, info.max_batch_tokens)
            forwards.append(gauge.peak_bytes(driver.step))
        for i in range(count):
            sampling = Sampling(temperature=1.0, top_k=50, top_p=0.9, repetition_penalty=1.1)
            driver.add(
                Request(request_id=f"{i}", arrival_s=0.0, prompt_tokens=tokens, output_tokens=1, adapter=job.adapter, sampling=sampling)
            )
            driver.prefill(f"{i}")
        forwards.append(gauge.peak_bytes(driver.step))
        driver.backward(job.id, 1)
        return max(forwards) + gauge.peak_bytes(driver.step)
