"""Train the tour's three adapters with the project's own engine, once, into .cache/adapters/{topics,numpy,code}.

All three train in the same steps, as three independent jobs of one replay without requests. Afterwards each adapter is held against
the base model and the other two on texts that nobody trained on; `provenance.json` keeps the numbers.
"""

import json
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(Path(__file__).parent))

import texts  # noqa: E402  (a neighbour of this script)

DATA = ROOT / ".cache" / "data"
OUT = ROOT / ".cache" / "adapters"
# The cheapest settings tried with which every adapter wins on its own text by at least 0.2 nats a token: openings of 64 tokens teach a
# kind of text twice as fast as openings of 128.
MAX_TOKENS = 64
SETTINGS = {"rank": 8, "alpha": 16.0, "learning_rate": 6e-3, "batch_size": 1, "schedule": "linear", "warmup_steps": 1}
# The model knows code best, so that there is least left to learn.
STEPS = {"topics": 8, "numpy": 8, "code": 12}
NUM_HELD_OUT = 4


def train_all(view, plan) -> None:
    """Whatever each job needs next, as far as the step's room goes."""
    for job in view.jobs:
        plan.train(job)


def train(engine, data: dict[str, dict[str, list[str]]]) -> float:
    """Train one adapter per kind of text; returns the seconds that it took."""
    import workbench as wb

    # Token ids rather than text: an opening is cut, so no end-of-sequence token may follow it.
    jobs = [
        wb.FinetuneJob(
            adapter=kind,
            data=[engine.tokenizer(text)["input_ids"] for text in data[kind]["train"]],
            max_tokens=MAX_TOKENS,
            steps=steps,
            **SETTINGS,
        )
        for kind, steps in STEPS.items()
    ]
    started = time.perf_counter()
    with engine.uncalibrated():
        wb.replay([], executor=engine, policy=train_all, jobs=jobs, progress=True)
    return time.perf_counter() - started


def losses(engine, data: dict[str, dict[str, list[str]]]) -> dict[str, dict[str, float]]:
    """Nats a token on each kind's held-out text (outer key) under the base model and each adapter (inner key)."""
    held_out = {kind: data[kind]["heldout"][:NUM_HELD_OUT] for kind in texts.KINDS}
    models = {"base": None, **{kind: kind for kind in texts.KINDS}}
    return {kind: {name: round(engine.nll(own, adapter=a), 4) for name, a in models.items()} for kind, own in held_out.items()}


def print_table(table: dict[str, dict[str, float]]) -> None:
    print("Nats a token on held-out text (rows) under each model (columns):")
    columns = ["base", *table]
    print(f"{'':>8}" + "".join(f"{c:>9}" for c in columns))
    for kind, row in table.items():
        print(f"{kind:>8}" + "".join(f"{row[c]:>9.3f}" for c in columns))


def commit() -> str:
    """The commit that the adapters were trained at; empty outside a git checkout."""
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip()


def save(engine, table: dict[str, dict[str, float]], seconds: float) -> None:
    """Write the adapters as PEFT directories, and last of all provenance.json: with it the set is complete."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    for kind in texts.KINDS:
        engine.save_adapter(kind, OUT / kind)
    provenance = {
        "commit": commit(),
        "model": engine.info.name,
        "device": engine.info.device,
        "settings": {**SETTINGS, "steps": STEPS, "max_tokens": MAX_TOKENS},
        "train_s": round(seconds, 1),
        "held_out_texts": NUM_HELD_OUT,
        "held_out_nats_per_token": table,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft", "numpy")} | {"python": sys.version.split()[0]},
    }
    (OUT / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    import workbench as wb
    from workbench.runtime.weights import default_model_dir

    engine = wb.Engine.from_pretrained(default_model_dir(), config=wb.EngineConfig(max_model_len=512, num_blocks=64))
    data = texts.write(DATA, engine.tokenizer, MAX_TOKENS)
    print(f"Training {', '.join(texts.KINDS)} on {engine.info.device} ...", flush=True)
    seconds = train(engine, data)
    table = losses(engine, data)
    print_table(table)
    save(engine, table, seconds)
    print(f"Trained in {seconds:.0f} s; saved in {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
