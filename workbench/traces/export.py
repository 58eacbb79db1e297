"""`Trace.export`: a trace in the formats that other systems' load generators read.

| format | what is written | how it is run |
| --- | --- | --- |
| vllm | JSONL: timestamp (ms), input_length, output_length, hash_ids of 512 tokens | `vllm bench serve --dataset-name timed_trace` |
| sglang | the same, hash_ids of 128 tokens | `sglang.bench_serving --dataset-name mooncake --use-trace-timestamps` |
| loquetier | a folder with timestamps.txt, inference.json and prompts.jsonl | tests/test_scalable_loquetier.py of the release |

Sources: vllm-project/vllm, pull request 39795; sgl-project/sglang, python/sglang/benchmark/datasets/mooncake.py; NJUDeepEngine/Loquetier.
The harness of the last cuts prompts to 200 tokens and lets the text decide output lengths. The two servers' clients make a prompt from
its hash ids, equal ids giving equal text: vLLM's of `--timed-trace-chunk-hash-size` tokens each, for input_length tokens; SGLang's of
128 words each, whatever input_length says. So the ids are what carries lengths and prefixes.
"""

import json
import math
import shlex
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workbench.config import did_you_mean, require
from workbench.data import PREFIX_TOKENS

if TYPE_CHECKING:
    from workbench.traces.trace import Trace

FORMATS = ("vllm", "sglang", "loquetier")
SGLANG_HASH_TOKENS = 128
_CARRIED = {
    "vllm": ("prompt_tokens", "output_tokens", "prefix_ids"),
    "sglang": ("prompt_tokens", "output_tokens", "prefix_ids"),
    "loquetier": ("adapter", "prompt"),
}
_ALWAYS = ("request_id", "arrival_s")


def export(trace: "Trace", path: str | Path, format: Literal["vllm", "sglang", "loquetier"], prompts: str | Path | None = None) -> str:
    """Write the trace for a load generator; the command line that replays it (with MODEL and such to fill in).

    Columns that the format has no place for (adapters, priorities ...) are named in a warning. Raises ValueError for an unknown
    format, a closed loop, a trace without lengths, and, for Loquetier, for arrivals between whole seconds, requests without an
    adapter, adapters in shares that its round robin cannot give, and prompts that are nowhere to be had (`prompts` is a ShareGPT
    JSONL for a trace without texts).
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}. {did_you_mean(str(format), FORMATS)}")
    require(not trace.is_closed, "a load generator needs arrival times, not a closed loop", trace.name, "Drop parent_id from its frame.")
    require(len(trace) > 0, "a trace for a load generator must hold at least one request", len(trace))
    require(prompts is None or format == "loquetier", "prompts is for format='loquetier'", str(prompts), "Leave it out.")
    frame = trace.frame
    lost = [c for c in frame.columns if c not in (*_ALWAYS, *_CARRIED[format]) and frame[c].notna().any()]
    if lost:
        warnings.warn(f"format {format!r} has no place for {', '.join(lost)} of {trace.name!r}: left out", UserWarning, stacklevel=3)
    if format == "loquetier":
        return _loquetier(trace, Path(path), prompts)
    return _timed(trace, Path(path), format)


def _timed(trace: "Trace", path: Path, format: str) -> str:
    """Mooncake's format (FAST'25 traces), one line a request."""
    frame = trace.frame
    has_lengths = {"prompt_tokens", "output_tokens"} <= set(frame.columns) and not frame[["prompt_tokens", "output_tokens"]].isna().any(
        axis=None
    )
    require(
        has_lengths, f"format {format!r} needs prompt_tokens and output_tokens of every request", trace.name, "Call .with_lengths first."
    )
    size = PREFIX_TOKENS if format == "vllm" else SGLANG_HASH_TOKENS
    given = frame["prefix_ids"].tolist() if "prefix_ids" in frame else [()] * len(frame)
    fresh = 1 + max((i for ids in given for i in ids), default=-1)
    with path.open("w", encoding="utf-8") as file:
        for at, prompt, output, prefix in zip(frame["arrival_s"], frame["prompt_tokens"], frame["output_tokens"], given, strict=True):
            needed = math.ceil(int(prompt) / PREFIX_TOKENS)
            ids = [*prefix[:needed], *range(fresh, fresh + max(0, needed - len(prefix)))]
            fresh += max(0, needed - len(prefix))
            split = PREFIX_TOKENS // size
            hashes = [i * split + k for i in ids for k in range(split)][: math.ceil(int(prompt) / size)]
            row = {"timestamp": round(float(at) * 1e3, 6), "input_length": int(prompt), "output_length": int(output), "hash_ids": hashes}
            file.write(json.dumps(row) + "\n")
    name, num = shlex.quote(str(path)), len(frame)
    if format == "vllm":
        return (
            f"vllm bench serve --model MODEL --dataset-name timed_trace --dataset-path {name} --num-prompts {num} --self-timed "
            f"--timed-trace-chunk-hash-size {PREFIX_TOKENS} --timed-trace-sec-multiplier 0.001 --save-result --save-detailed"
        )
    return (
        f"python -m sglang.bench_serving --model MODEL --dataset-name mooncake --dataset-path {name} --num-prompts {num} "
        "--use-trace-timestamps --output-details"
    )


def _loquetier(trace: "Trace", folder: Path, prompts: str | Path | None) -> str:
    """Line j of timestamps.txt goes to test case j mod n; the harness sorts the requests by time afterwards."""
    frame = trace.frame
    times = frame["arrival_s"]
    broken = times[times != times.round()]
    require(broken.empty, "Loquetier's harness reads whole seconds", float(broken.iloc[0]) if len(broken) else None, "Round arrival_s.")
    names = list(trace.adapters)
    require(bool(frame["adapter"].notna().all()), "Loquetier serves no request without an adapter", trace.name, "Use .assign_adapters.")
    groups: dict[str, Any] = {name: frame[frame["adapter"] == name] for name in names}
    order = sorted(names, key=lambda name: (-len(groups[name]), names.index(name)))
    counts = [len(groups[name]) for name in order]
    dealt = [len(range(k, len(frame), len(order))) for k in range(len(order))]
    require(
        counts == dealt, f"Loquetier's harness deals requests to adapters in turn, {dealt} of each", counts, "Use traces.round_robin()."
    )
    has_text = "prompt" in frame and bool(frame["prompt"].notna().all())
    require(has_text or prompts is not None, "Loquetier's harness needs texts of prompts", trace.name, "Pass prompts=, a ShareGPT JSONL.")
    folder.mkdir(parents=True, exist_ok=True)
    lines = [int(groups[order[j % len(order)]]["arrival_s"].iloc[j // len(order)]) for j in range(len(frame))]
    (folder / "timestamps.txt").write_text("".join(f"{t}\n" for t in lines), encoding="utf-8")
    source, offset, cases = str(prompts) if prompts is not None else str(folder / "prompts.jsonl"), 0, []
    for name in order:
        case = {"lora_name": name, "jsonl_path": source, "sample_num": len(groups[name]), "sample_offset": offset, "request_start": 0}
        offset += len(groups[name])
        cases.append(case)
    if prompts is None:
        texts = [text for name in order for text in groups[name]["prompt"]]
        rows = [json.dumps({"conversations": [{"from": "human", "value": text}]}) for text in texts]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = {"base_model_path": "", "lora_model_path": "", "lora_names": order, "testcases": cases}
    (folder / "inference.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    files = [shlex.quote(str(folder / name)) for name in ("inference.json", "timestamps.txt")]
    return f"python test_scalable_loquetier.py --infer_config {files[0]} --timestamp_txt {files[1]} --ft_config FINETUNE.json --device 0"
