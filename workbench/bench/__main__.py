"""`python -m workbench.bench`: run workloads, check the rows against the targets, write README's table, draw the roofline.

    python -m workbench.bench w1 w4 --into benchmarks          workloads (w1 to w6 by default; `replay` needs no GPU)
    python -m workbench.bench model --replays D                how well a model predicts whole replays; all is kept in D, the model too
    python -m workbench.bench model --from D [D ...]           the same of the replays kept below D, runs of a cell by their mean; no GPU
    python -m workbench.bench model --from D --profile P --refit    by P refitted to the other traces' replays; P refitted to all is kept
    python -m workbench.bench tune --profile NAME              tune the policies that `contest` measures, on a latency model
    python -m workbench.bench tune --profile NAME --stalls D   on one whose steps are delayed as those of the replays kept below D
    python -m workbench.bench long --profile NAME              those and policy 21 for minutes on that model: `contest_long.csv`
    python -m workbench.bench --check benchmarks [w1 ...]      every target: measured, must, met or not; exits 1 unless all are met
    python -m workbench.bench table benchmarks                 README's results table, and all rows beside them
    python -m workbench.bench roofline benchmarks FILE.png     the kernels against the roofline

Every workload first checks its numbers and writes none if they are wrong.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from workbench.bench import check, rows, table, targets
from workbench.bench.session import Session
from workbench.config import did_you_mean
from workbench.latency import LatencyModel

MODULES = {
    "w1": "decode",
    "w2": "offline",
    "w3": "online",
    "w4": "finetune",
    "w5": "kernel",
    "w6": "unified",
    "contest": "contest",
    "model": "modelling",
    "replay": "replaying",
}
FOLDER = Path("benchmarks")
WITHOUT_ENGINE = ("w5", "replay")
KEEPING = (["model"], ["contest"])
PREDICTED = ("w6", "contest", "model")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 for a failed check or a missed target; 2 for a cell that does not exist."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["table"]:
        return _table(given[1:])
    if given[:1] == ["roofline"]:
        return _roofline(given[1:])
    if given[:1] in (["tune"], ["long"]):
        return _simulate(given[0], given[1:])
    options = _options(given)
    if options.check is not None:
        verdicts = check.judge(rows.read(options.check), options.workloads)
        print(check.report(verdicts))
        return 0 if all(v.is_met for v in verdicts) else 1
    return _run(options)


def _options(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workbench.bench", description="Measure the engine, or check what was measured.")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(targets.WORKLOADS)}; by default w1 to w6")
    parser.add_argument("--shape", default=targets.SHAPE, help="a named model shape; its weights are random (tiny-llama for the CPU)")
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="DIR", help="where rows are appended, one CSV a workload")
    parser.add_argument(
        "--seconds", type=float, help="of every workload; no cell is begun after that. Each has a time of its own otherwise"
    )
    parser.add_argument("--only", nargs="+", default=(), metavar="CELL", help="cells whose name contains one of these")
    parser.add_argument("--baseline", choices=["peft"], help="transformers + PEFT beside W1 and W4, in the same run")
    parser.add_argument("--device", help="cuda or cpu; by default CUDA where there is one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--profile", metavar="NAME_OR_DIR", help="the latency model that policies predict with in w6, contest and model, which judges it"
    )
    parser.add_argument(
        "--replays",
        type=Path,
        metavar="DIR",
        help="`model` and `contest` keep what they measure here, and the model that policies predict with",
    )
    parser.add_argument(
        "--from",
        type=Path,
        nargs="+",
        dest="kept",
        metavar="DIR",
        help="`model` measures nothing: it simulates what is kept below here, with each run's own model unless there is a --profile",
    )
    parser.add_argument(
        "--refit",
        action="store_true",
        help="of `model --from --profile`: judge each replay by that profile refitted to other traces, and save it refitted to all",
    )
    parser.add_argument("--check", type=Path, metavar="DIR", help="measure nothing: compare the rows of DIR with the targets")
    options = parser.parse_args(given)
    for name in options.workloads:
        if name not in targets.WORKLOADS:
            parser.error(f"a workload must be one of {', '.join(targets.WORKLOADS)}, got {name!r}. {did_you_mean(name, targets.WORKLOADS)}")
    if options.kept and options.workloads != ["model"]:
        parser.error(f"--from is of the workload model alone, got {options.workloads}")
    if options.replays and options.workloads not in KEEPING:
        parser.error(f"--replays is of the workload model or contest, one of them alone, got {options.workloads}")
    if options.profile is not None and not set(options.workloads) & set(PREDICTED):
        parser.error(f"--profile is of the workloads {', '.join(PREDICTED)}, got {options.workloads}")
    if options.kept is not None and options.replays is not None:
        parser.error("--from simulates what was kept earlier: it takes no --replays")
    if options.refit and (options.kept is None or options.profile is None):
        parser.error("--refit refits a --profile to the replays --from a folder: give both")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be above 0, got {options.seconds}")
    return options


def _run(options: argparse.Namespace) -> int:
    session = Session(
        shape=options.shape,
        into=options.into,
        seconds=options.seconds,
        only=options.only,
        seed=options.seed,
        device=options.device,
        profile=None if options.profile is None else LatencyModel.load(options.profile),
        replays=options.replays,
    )
    for name in options.workloads or targets.BY_DEFAULT:
        module: Any = import_module(f"workbench.bench.{MODULES[name]}")
        if name not in WITHOUT_ENGINE and options.kept is None:
            _ = session.engine  # built before the workload's time begins
        session.start(name, module.SECONDS)
        if options.kept is not None:
            module.run_kept(session, options.kept, refits=options.refit)
        elif module.run(session) and options.baseline == "peft":
            import_module("workbench.bench.peft").run(session, name)
    for cell in session.skipped:
        print(f"not measured, no time: {cell}")
    if options.only and not any(row.cell != rows.CORRECTNESS for row in session.rows) and not session.failed:
        print(f"--only must name a part of a cell's name, got {options.only}. Cells: {'; '.join(session.offered)}", file=sys.stderr)
        return 2
    print(f"{len(session.rows)} rows in {session.into}")
    return 1 if session.failed else 0


def _table(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m workbench.bench table", description="Write the results tables from rows: README's, and DIR/README.md."
    )
    parser.add_argument("folder", type=Path, metavar="DIR", nargs="?", default=FOLDER)
    parser.add_argument("--readme", type=Path, default=Path("README.md"))
    options = parser.parse_args(given)
    text = options.readme.read_text(encoding="utf-8")
    frame = rows.read(options.folder)
    options.readme.write_text(table.updated(text, frame), encoding="utf-8")
    (options.folder / "README.md").write_text(table.full(frame), encoding="utf-8")
    return 0


def _simulate(what: str, given: Sequence[str]) -> int:
    texts = {"tune": "Tune the rivals of the workload contest.", "long": "Replay policy 21 and the tuned ones for minutes, on a model."}
    parser = argparse.ArgumentParser(prog=f"python -m workbench.bench {what}", description=texts[what])
    parser.add_argument("--profile", metavar="NAME_OR_DIR", required=True, help="the latency model to do it on")
    parser.add_argument(
        "--stalls",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="delay steps as those of the replays kept below here were, not as the profile says (tune) or as they were while tuned (long)",
    )
    parser.add_argument("--into", type=Path, default=FOLDER, metavar="DIR")
    options = parser.parse_args(given)
    from workbench.bench import contest, kept, long_contest

    model = LatencyModel.load(options.profile)
    if options.stalls is not None:
        model = model.with_stalls(kept.stalls_of(kept.load_all(options.stalls)))
    elif what == "long":
        model = contest.as_tuned(model, options.into)
    print(contest.tune(model, options.into / contest.FILE) if what == "tune" else long_contest.run(model, options.into))
    return 0


def _roofline(given: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m workbench.bench roofline", description="Draw the kernels' newest rows.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("file", type=Path, metavar="FILE")
    options = parser.parse_args(given)
    from workbench import plots

    figure: Any = plots.roofline(check.comparable(rows.read(options.folder))).get_figure()
    figure.savefig(options.file, dpi=150, bbox_inches="tight")
    return 0


if __name__ == "__main__":
    sys.exit(main())
