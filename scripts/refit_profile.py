"""Fit a saved latency model's own steps again with this version, or beside them the steps and the stalls of measured replays.

    python scripts/refit_profile.py h100-llama3-8b
    python scripts/refit_profile.py h100-llama3-8b --replays KEPT --into FOLDER      of replays kept by `bench contest --replays KEPT`

Nothing is measured: the steps, the device, the commit and the date of the measurement stay, and the provenance says that it was refitted.
Errors over whole replays go: they were of the fit before. Models of format 1 do not say what their engine padded to: on a GPU it was
BUCKETS_OF_FORMAT_1, up to its limits, and nothing on a CPU.
"""

import argparse
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.bench.kept import load_all, stalls_of
from workbench.core import AdapterInfo, ExecutorInfo
from workbench.latency.model import FORMAT, MODEL_FILE, PROFILES, STEPS_FILE, LatencyModel

TOKENS = (16, 32, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096)
BUCKETS_OF_FORMAT_1 = {
    "token_buckets": (TOKENS, "max_batch_tokens"),
    "decode_buckets": ((1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256), "max_requests"),
    "backward_buckets": (TOKENS, "activation_tokens"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Fit a saved model's own steps again.")
    parser.add_argument("model", help="a folder, or the name of a profile")
    parser.add_argument("--replays", type=Path, nargs="+", default=(), metavar="DIR", help="replays that were kept: to fit to, stalls too")
    parser.add_argument("--into", type=Path, metavar="DIR", help="where to save; the model's own folder unless given")
    options = parser.parse_args()
    folder = Path(options.model)
    folder = folder if (folder / MODEL_FILE).is_file() else PROFILES / folder
    model = refit(folder)
    if options.replays:
        model = with_kept(model, options.replays)
    print(model)
    print("saved", model.save(options.into or folder))


def with_kept(model: LatencyModel, folders: Sequence[Path]) -> LatencyModel:
    """The model refitted to the replays kept below `folders` and stalling as they did."""
    kept = load_all(folders)
    return model.refit([one.replay for one in kept]).with_stalls(stalls_of(kept))


def refit(folder: Path) -> LatencyModel:
    """The model in `folder`, fitted again to its own steps; nothing is written. Raises ValueError for a perturbed one."""
    record = json.loads((folder / MODEL_FILE).read_text(encoding="utf-8"))
    if "perturbed" in record["provenance"]:
        raise ValueError(
            f"a model must be as fitted to be fitted again, got one with {record['provenance']['perturbed']}. Perturb it later."
        )
    steps, info = pd.read_parquet(folder / STEPS_FILE), _info(record)
    if "backward_starts" not in steps:
        steps["backward_starts"] = _starts(steps["backward_layers"].to_numpy(int), info.num_layers)
    adapters = None if record["adapters"] is None else {name: AdapterInfo(**v) for name, v in record["adapters"].items()}
    stalls = None if record.get("stalls") is None else LatencyModel.load(folder).stalls
    note = {"refitted": datetime.now(UTC).isoformat(timespec="seconds"), "fitted_format": FORMAT}
    model = LatencyModel.fit(steps, info=info, adapters=adapters, vocab_size=record["vocab_size"], provenance=record["provenance"] | note)
    return model if stalls is None else model.with_stalls(stalls)


def _info(record: dict[str, Any]) -> ExecutorInfo:
    """The engine's limits; what it padded to, where the record does not say."""
    info = record["info"] | {name: frozenset(record["info"][name]) for name in ("can", "eos_token_ids")}
    info |= {"simulated": False, "name": record["provenance"]["executor"]}
    if record["format"] < FORMAT and info["device"] != "CPU":
        info |= {name: tuple(b for b in sizes if b <= info[limit]) for name, (sizes, limit) in BUCKETS_OF_FORMAT_1.items()}
    return ExecutorInfo(**info)


def _starts(layers: np.ndarray, num_layers: int) -> np.ndarray:
    """Which steps of one job's, in their order, begin a backward: those whose layers are the first of `num_layers`."""
    below = np.cumsum(layers) - layers
    return ((layers > 0) & (below % num_layers == 0)).astype(float)


if __name__ == "__main__":
    main()
