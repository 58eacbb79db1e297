"""Measure this machine's engine on steps of every kind and size and save the fitted latency model as a profile that travels.

    python scripts/measure_profile.py --shape llama3-8b --adapters 4 --rank 8 --name h100-llama3-8b

writes profiles/NAME (the recorded steps as parquet, the model and its provenance as JSON), which
`wb.LatencyModel.load("NAME")` finds on any machine.
"""

import argparse
from pathlib import Path

import workbench as wb

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure an engine and save a profile.")
    parser.add_argument("--shape", default="llama3-8b", help="a named shape; its weights are random: speed does not depend on values")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument(
        "--rounds",
        type=int,
        help="of steps that cover every bucket in every kind of step, then random mixes; by default nothing but rounds",
    )
    parser.add_argument("--steps", type=int, default=3000, help="at most")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most, after a first pass of the same length that compiles")
    parser.add_argument("--name", required=True, help="of the profile")
    parser.add_argument("--into", type=Path, default=ROOT / "profiles")
    args = parser.parse_args()
    config = wb.EngineConfig(max_model_len=args.max_model_len, activation_tokens=8192)
    engine = wb.Engine.random(args.shape, adapters=args.adapters, rank=args.rank, config=config)
    model = engine.calibrate(max_steps=args.steps, seconds=args.seconds, rounds=args.rounds)
    print(model.report)
    print(model.costs.table().to_string())
    print("saved", model.save(args.into / args.name))


if __name__ == "__main__":
    main()
