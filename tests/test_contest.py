"""The contest without an engine: what tuning chooses, and what the long contest shows."""

import json

import pandas as pd

import workbench as wb
from workbench.bench import contest, long_contest


def test_tuning_chooses_the_policy_that_trains_most_of_those_that_attain_while_no_queue_grows(tmp_path):
    grid = (wb.policies.LatencyBudget(budget_s=0.02), wb.policies.TemporalSharing(every=64), wb.policies.TemporalSharing(every=4096))
    file = contest.tune(
        wb.LatencyModel.load("h100-llama3-8b"), tmp_path / "t.json", shares=(0.2,), grid=grid, seconds=2.0, slo=wb.SLO(ttft_s=0.1)
    )
    record = json.loads(file.read_text())
    assert record["capacity"] > 4 and len(record["rows"]) == 3
    stalls = wb.LatencyModel.load("h100-llama3-8b").stalls
    assert record["stalls"] == f"{stalls}; {stalls.source}"
    calm, other = (wb.LatencyModel.load("h100-llama3-8b").with_stalls(s) for s in (None, wb.Stalls(9.0, (0.5,))))
    (tmp_path / contest.FILE).write_text(file.read_text())
    assert contest.as_tuned(calm, tmp_path).stalls == contest.as_tuned(other, tmp_path).stalls == stalls
    assert all(0 <= row["attainment"] <= 1 for row in record["rows"])
    for row, attainment, tokens in zip(record["rows"], (0.99, 0.98, 0.4), (100.0, 900.0, 5.0), strict=True):
        row |= {"attainment": attainment, "finetune_tokens_per_s": tokens, "saturated": False}
    assert contest.best(record, 0.2) == grid[0]
    assert contest.best(record, 0.2, only="TemporalSharing") == grid[1], "none attains: the one that attains most"
    record["rows"][1]["finetune_tokens_per_s"] = 0.0
    assert contest.best(record, 0.2, only="TemporalSharing") == grid[2], "of those that train"
    record["rows"][2] |= {"attainment": 0.995}
    assert contest.best(record, 0.2) == grid[0], "it trains more"
    record["rows"][0]["saturated"] = True
    assert contest.best(record, 0.2) == grid[2], "a queue that grows puts serving off until after the window"


def test_the_long_contest_shows_policy_21_the_best_tuned_and_who_nearly_was_with_and_without_stalls(tmp_path):
    budgets = [{"budget_s": s, "chunk_tokens": 512} for s in (0.02, 0.03, 0.04)]
    made = [
        {"share": 0.2, "policy": "LatencyBudget", "parameters": p, "finetune_tokens_per_s": 9.0 + i, "attainment": 1 - 0.02 * i}
        | {"saturated": i == 1}
        for i, p in enumerate(budgets)
    ]
    (tmp_path / contest.FILE).write_text(json.dumps({"capacity": 20.0, "rows": made}))
    model = wb.LatencyModel.load("h100-llama3-8b")
    found = pd.read_csv(long_contest.run(model, tmp_path, shares=(0.2,), seconds=4.0))
    of_policy = found.groupby(found["policy"].str.split("(").str[0])
    assert of_policy.size().to_dict() == {"SLOSlack": 4, "LatencyBudget": 8}, "two draws, with and without stalls"
    assert set(found["policy"].str.extract(r"budget_s=([\d.]+)")[0].dropna()) == {"0.02", "0.03"}, "not who attained 96 %"
    assert set(found["stalls"]) == {"no stalls", contest.stalls_of(model)}
    assert set(found["seed"]).isdisjoint({*contest.TUNED_ON, *contest.HELD_OUT})
    assert found["bound_tokens_per_s"].between(1000.0, 20_000.0).all()
    assert found["load"].eq(4.0).all() and found["attainment"].between(0, 1).all() and found["finetune_tokens_per_s"].gt(1000).all()
