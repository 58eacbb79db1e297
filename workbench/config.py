"""What a user configures, as frozen keyword dataclasses. Torch-free; variants by `dataclasses.replace`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

LORA_MODES = ("segmented", "padded", "loop", "off")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """A sentence for an unknown name: the close matches, or else what is known."""
    close = get_close_matches(name, list(known), n=3, cutoff=0.6)
    if close:
        return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "Known: " + (", ".join(repr(k) for k in sorted(known)) if known else "none") + "."


class UnknownAdapterError(ValueError):
    """A request or a call names an adapter that does not exist."""


def require(holds: bool, rule: str, value: object, step: str = "") -> None:
    """Raise ValueError with the rule, the value and the next step unless `holds`."""
    if not holds:
        raise ValueError(f"{rule}, got {value!r}" + (f". {step}" if step else ""))


@dataclass(frozen=True, kw_only=True)
class SLO:
    """Service-level objectives of one request, in seconds; None leaves that target out.

    `itl_s` bounds the `itl_quantile` of the request's own gaps between tokens (not their mean), `tpot_s` the mean gap.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    itl_s: float | None = None
    itl_quantile: float = 0.99
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("ttft_s", "tpot_s", "itl_s", "e2e_s"):
            target = getattr(self, name)
            require(target is None or target > 0, f"{name} must be above 0 seconds, or None", target)
        require(0 < self.itl_quantile <= 1, "itl_quantile must lie in (0, 1]", self.itl_quantile)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Limits and modes of one engine. Sizes in tokens unless named otherwise; None: chosen from the model and the memory at hand.

    `max_batch_tokens` bounds the packed tokens of a step, `max_requests` the resident requests, `num_blocks` the KV pool in blocks of
    `block_tokens` tokens, `num_slots` the adapter versions on the device, `max_jobs` the fine-tune jobs of one replay,
    `activation_tokens` the arena of kept fine-tune activations. `activations="keep"` keeps all that the backward needs, "recompute" only
    each layer's input (a quarter of the memory or less, and the forward once more). On CUDA memory is set aside for adapters and jobs of
    `reserve_rank` on all seven linears (larger ranks run too, while there is memory). `deterministic` asks for reductions in a fixed
    order (slower).
    `graphs` records steps as CUDA graphs; `warm_up` records them all before a replay begins (tens of seconds on a fresh machine) instead
    of each at the first step that needs it.
    `prefix_cache` keeps the KV blocks of prompts, so that a request whose prompt begins as an earlier one's did on the same adapter
    version skips what is there (`workbench.loop.prefix_cache`).
    `ranges` names the parts of every step for profilers (NVTX; LOQUETIER_RANGES=1 in the environment does too). `progress` shows bars of
    long work, such as recording graphs and calibrating: None after three seconds, True at once, False never.

    Two are for ablations. `lora` is how adapters are applied: "segmented" (the fused kernels), "padded" (the same with every adapter padded
    by zeros to the largest rank served or trained), "loop" (a torch loop over the adapters of the batch; reads the batch on the host, so it
    needs `graphs=False`), or "off" (not at all: outputs are the base model's, which is wrong, and jobs learn nothing; a bound on speed).
    `backward="whole"` takes a micro-batch's backward in one step: `plan.backward(job, n)` with fewer layers than are left takes none and
    says "unsupported", `within_s` takes all or none, and `stop_on_arrival` is "unsupported".
    """

    max_model_len: int | None = None
    max_batch_tokens: int = 2048
    max_requests: int = 256
    num_blocks: int | None = None
    block_tokens: int = 16
    num_slots: int = 16
    max_batch_adapters: int = 16
    max_jobs: int = 8
    activation_tokens: int | None = None
    activations: Literal["keep", "recompute"] | None = None
    reserve_rank: int = 16
    deterministic: bool = False
    graphs: bool = True
    warm_up: bool = True
    prefix_cache: bool = True
    ranges: bool = False
    progress: bool | None = None
    lora: Literal["segmented", "padded", "loop", "off"] = "segmented"
    backward: Literal["cut", "whole"] = "cut"

    def __post_init__(self) -> None:
        for name in ("max_batch_tokens", "max_requests", "block_tokens", "num_slots", "max_batch_adapters", "max_jobs"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        require(1 <= self.reserve_rank <= 256, "reserve_rank must lie in 1..256", self.reserve_rank)
        for name in ("max_model_len", "num_blocks", "activation_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, or None to choose it", value)
        known = (None, "keep", "recompute")
        require(self.activations in known, "activations must be 'keep', 'recompute', or None to choose it", self.activations)
        require(self.lora in LORA_MODES, f"lora must be one of {LORA_MODES}", self.lora)
        require(self.backward in ("cut", "whole"), "backward must be 'cut' or 'whole'", self.backward)
        rule = "lora='loop' reads each batch on the host, which no recorded CUDA graph can, and needs graphs=False"
        require(self.lora != "loop" or not self.graphs, rule, self.graphs, "Compare it with others at graphs=False.")


@dataclass(frozen=True, kw_only=True)
class RandomTokens:
    """Fine-tune data without text: `examples` rows of `tokens` random token ids, every token labelled. For speed studies."""

    examples: int = 64
    tokens: int = 1024
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.examples >= 1, "examples must be at least 1", self.examples)
        require(self.tokens >= 2, "tokens must be at least 2 (a label needs a successor)", self.tokens)


@dataclass(frozen=True, kw_only=True)
class FinetuneJob:
    """One fine-tune run of one adapter: data, optimiser and schedule, independent of every other job.

    `data` is a JSONL path, a sequence of examples ({"text"}, {"prompt", "completion"} or {"messages"}), token-id lists, or
    `RandomTokens`. Exactly one of `steps` (optimiser steps) and `epochs` is given. A micro-batch is `batch_size` rows of at most
    `max_tokens` tokens (`pack=True` fills a row with several documents, which do not see one another); `accumulation` micro-batches
    make a window, after which AdamW steps once. `completion_only` puts loss on completions alone. `evaluate_every` counts optimiser
    steps; `evaluation` is the held-out data. `publish="end"` serves the trained adapter once the job is done, `"step"` after every
    optimiser step, `"never"` only on `engine.jobs[adapter].publish()`.
    """

    adapter: str
    data: Any
    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = LINEARS
    learning_rate: float = 1e-4
    batch_size: int = 2
    accumulation: int = 1
    steps: int | None = None
    epochs: int | None = None
    seed: int = 0
    arrival_s: float = 0.0
    deadline_s: float | None = None
    priority: int = 0
    weight: float = 1.0
    tenant: str = ""
    job_id: str | None = None
    max_tokens: int = 1024
    pack: bool = False
    completion_only: bool = False
    dropout: float = 0.0
    use_rslora: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    warmup_steps: int = 0
    evaluation: Any = None
    evaluate_every: int | None = None
    publish: Literal["end", "step", "never"] = "end"
    checkpoint: Path | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(bool(self.adapter), "adapter must be a non-empty name", self.adapter)
        require(1 <= self.rank <= 256, "rank must lie in 1..256", self.rank)
        require((self.steps is None) != (self.epochs is None), "exactly one of steps and epochs must be given", (self.steps, self.epochs))
        for name in ("steps", "epochs", "batch_size", "accumulation", "evaluate_every"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1", value)
        require(self.max_tokens >= 2, "max_tokens must be at least 2 (a label needs a successor)", self.max_tokens)
        require(0 <= self.dropout < 1, "dropout must lie in [0, 1)", self.dropout)
        require(self.learning_rate > 0, "learning_rate must be above 0", self.learning_rate)
        require(self.arrival_s >= 0, "arrival_s must be at least 0", self.arrival_s)
        require(self.weight > 0, "weight must be above 0", self.weight)
        require(self.warmup_steps >= 0, "warmup_steps must be at least 0", self.warmup_steps)
        require(self.max_grad_norm is None or self.max_grad_norm > 0, "max_grad_norm must be above 0, or None", self.max_grad_norm)
        require(self.schedule in ("linear", "cosine", "constant"), "schedule must be linear, cosine or constant", self.schedule)
        require(self.publish in ("end", "step", "never"), "publish must be end, step or never", self.publish)
        require(len(self.targets) > 0, "targets must name at least one linear", self.targets)
        for target in self.targets:
            if target not in LINEARS:
                raise ValueError(f"targets must be among the seven linears, got {target!r}. {did_you_mean(target, LINEARS)}")
        require(
            self.evaluate_every is None or self.evaluation is not None,
            "evaluate_every needs evaluation data",
            self.evaluate_every,
            "Pass evaluation=.",
        )

    @property
    def id(self) -> str:
        """The job's key: `job_id`, or `"job:" + adapter`."""
        return self.job_id or f"job:{self.adapter}"

    @property
    def scaling(self) -> float:
        """alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)

    @classmethod
    def example(cls, adapter: str = "finetuned", **overrides: Any) -> "FinetuneJob":
        """A job for speed studies, as in the paper's E3: 2 x 1,024 random tokens a micro-batch, accumulation 4, rank 8, lr 2e-5."""
        values: dict[str, Any] = {
            "adapter": adapter,
            "data": RandomTokens(examples=64, tokens=1024),
            "batch_size": 2,
            "accumulation": 4,
            "learning_rate": 2e-5,
        }
        if "steps" not in overrides and "epochs" not in overrides:
            values["epochs"] = 1000
        return cls(**(values | overrides))

    @classmethod
    def from_checkpoint(cls, folder: str | Path) -> "FinetuneJob":
        """The job that `engine.jobs[adapter].checkpoint(folder)` saved; a replay with it resumes at that micro-batch boundary.

        Raises FileNotFoundError without a checkpoint there. The data travels as token ids inside the checkpoint.
        """
        from workbench.data import job_from_checkpoint

        return job_from_checkpoint(Path(folder))


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a result came from; stands beside every saved frame."""

    commit: str
    versions: Mapping[str, str]
    device: str
    seed: int
    policy: str
    trace_checksum: str
