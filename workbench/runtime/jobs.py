"""What a user holds of a running fine-tune job: `engine.jobs[adapter]`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

from workbench.checkpoint import readable, replaced
from workbench.config import FinetuneJob
from workbench.data import DATA_FILE, JOB_FILE, save_prepared
from workbench.runtime.adapters import AdapterWeights
from workbench.runtime.finetune import TrainState

if TYPE_CHECKING:
    from workbench.runtime.engine import Engine

STATE_FILE, PROGRESS_FILE = "state.safetensors", "progress.json"
FILES = (JOB_FILE, DATA_FILE, STATE_FILE, PROGRESS_FILE)


class JobHandle:
    """Pause, resume, stop, checkpoint or publish one job, from a cell, a callback or another thread.

    Commands take effect between two steps. `checkpoint` and `publish` also work after the replay has ended.
    """

    def __init__(self, engine: "Engine", state: TrainState) -> None:
        self._engine, self._state = engine, state

    def __repr__(self) -> str:
        s = self._state
        return f"JobHandle({s.job.id!r}, micro_batches_done={s.micro_batches_done}, optimizer_steps={s.optimizer_steps})"

    @property
    def job(self) -> FinetuneJob:
        return self._state.job

    @property
    def micro_batches_done(self) -> int:
        return self._state.micro_batches_done

    @property
    def optimizer_steps(self) -> int:
        return self._state.optimizer_steps

    @property
    def weights(self) -> AdapterWeights:
        """The weights as trained so far (fp32, on the CPU)."""
        return self._engine.trained_weights(self._state)

    @property
    def gradients(self) -> dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]:
        """The gradients (dA, dB) in fp32 by (layer, target), summed over the micro-batches of the open window that are committed."""
        state = self._state
        places = {key: state.index_of(key) for key in state.master}
        return {key: (state.accumulated[i], state.accumulated[i + 1]) for key, i in places.items()}

    def pause(self) -> None:
        self._engine.command("pause", self._state.job.id)

    def resume(self) -> None:
        self._engine.command("resume", self._state.job.id)

    def stop(self) -> None:
        self._engine.command("stop", self._state.job.id)

    def publish(self) -> int:
        """Serve the weights of the last optimiser step as a new version, without a copy through disk; returns the version.

        Requests in flight keep the version that they were admitted with.
        """
        return self._engine.publish(self._state)

    def checkpoint(self, folder: str | Path) -> Path:
        """Save the job at its last micro-batch boundary: weights, optimiser, accumulated gradients (fp32), data, place.

        Work in flight is not saved and will be redone. Resume with `FinetuneJob.from_checkpoint(folder)`. A checkpoint that is there is
        replaced as a whole: if this is cut short, the old one can still be read. Raises ValueError for a folder that holds other files.
        """
        state = self._state
        with self._engine.lock, replaced(folder, FILES) as new:
            save_prepared(new, state.job, state.prepared, micro_batches_done=state.micro_batches_done)
            save_file(state_tensors(state), new / STATE_FILE)
            progress = {"optimizer_steps": state.optimizer_steps, "micro_batches_done": state.micro_batches_done}
            (new / PROGRESS_FILE).write_text(json.dumps(progress, indent=1) + "\n")
        return Path(folder)


def state_tensors(state: TrainState) -> dict[str, torch.Tensor]:
    """Every tensor that a resumed run needs, by name, on the CPU."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (p, gradient, means) in enumerate(zip(state.params, state.accumulated, state.optimizer_tensors(), strict=True)):
        tensors[f"{i}.weight"], tensors[f"{i}.accumulated"] = p, gradient
        tensors |= {f"{i}.{name}": tensor for name, tensor in means.items()}
    return {name: t.detach().cpu().clone() for name, t in tensors.items()}


def restore_state(state: TrainState, folder: Path) -> None:
    """Put a checkpoint's tensors and counters into a freshly created state.

    Raises ValueError when the checkpoint does not fit the job.
    """
    folder = readable(folder)
    tensors = load_file(folder / STATE_FILE)
    if len(tensors) != 5 * len(state.params):
        raise ValueError(
            f"the checkpoint must hold 5 tensors for each of the job's {len(state.params)} weights, got {len(tensors)} in {folder}. "
            "Resume with the base model and the targets that it was made with."
        )
    with torch.no_grad():
        for i, (p, gradient, means) in enumerate(zip(state.params, state.accumulated, state.optimizer_tensors(), strict=True)):
            if tensors[f"{i}.weight"].shape != p.shape:
                raise ValueError(
                    f"weight {i} of the checkpoint must have shape {tuple(p.shape)}, got {tuple(tensors[f'{i}.weight'].shape)}."
                )
            p.copy_(tensors[f"{i}.weight"])
            gradient.copy_(tensors[f"{i}.accumulated"])
            for name, tensor in means.items():
                tensor.copy_(tensors[f"{i}.{name}"])
        state.refresh_compute()
    progress = json.loads((folder / PROGRESS_FILE).read_text())
    if progress["micro_batches_done"] != state.prepared.first_micro_batch:
        raise ValueError(
            f"job.json and progress.json must name the same micro-batch, got {state.prepared.first_micro_batch} and "
            f"{progress['micro_batches_done']} in {folder}: saving was cut short. Resume from another checkpoint."
        )
    state.micro_batches_done, state.optimizer_steps = progress["micro_batches_done"], progress["optimizer_steps"]
