"""Figures say what they show: units, policies, the SLO, n, seeds and executor; and a policy looks the same in all of them."""

from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

import workbench as wb
from tests.fake_replays import INFO, SLOS, fake_replay, trace_of
from workbench import plots
from workbench.experiments.compare import Comparison
from workbench.experiments.search import Capacity
from workbench.experiments.statistics import Difference
from workbench.results import metrics


@dataclass(frozen=True)
class Pace:
    gap_s: float


LABELS = ("Pace(gap_s=0.02)", "Pace(gap_s=0.04)")


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    replays = {}
    for label, gap_s in zip(LABELS, (0.02, 0.04), strict=True):
        for seed in range(3):
            replays[label, seed] = fake_replay(trace_of(seed), policy=Pace(gap_s), seed=seed, executor=INFO)
    return Comparison(labels=LABELS, seeds=(0, 1, 2), replays=replays, trace_name="poisson", redrawn=("arrivals",))


def texts(figure) -> str:
    figure.canvas.draw()
    return "\n".join(t.get_text() for t in figure.findobj(mpl.text.Text) if t.get_visible())


def test_overview_says_units_policies_targets_n_seeds_executor_and_device(comparison):
    text = texts(comparison.plot())
    for part in (
        "% of arrived requests",
        "tokens/s",
        *LABELS,
        "≤ 500 ms",
        "n = 60 requests a run",
        "3 seeds",
        "Engine(tiny)",
        "test device",
    ):
        assert part in text.replace("\n", " ") or part in text, part
    assert "simulated" not in text


def test_caption_says_simulated_when_it_is(comparison):
    for run in comparison.replays.values():
        run.executor = replace(INFO, simulated=True)
    try:
        assert "simulated by" in comparison.caption
    finally:
        for run in comparison.replays.values():
            run.executor = INFO


def test_bars_show_the_mean_over_seeds_of_the_summaries(comparison):
    ax = plots.attainment(comparison.runs, slo=SLOS)
    shown = [bar.get_height() for container in ax.containers if isinstance(container, mpl.container.BarContainer) for bar in container]
    table = comparison.table()
    expected = [table.loc[label, name] * 100 for label in LABELS for name in ("attainment", "attainment_ttft", "attainment_itl")]
    np.testing.assert_allclose(shown, expected)


def test_a_policy_keeps_its_style_in_every_figure(comparison):
    style = plots.styles(LABELS)
    colour = mpl.colors.to_rgba(style[LABELS[1]].colour)
    bars = plots.throughput(comparison.runs).containers
    assert any(isinstance(c, mpl.container.BarContainer) and c.get_label() == LABELS[1] and c[0].get_facecolor() == colour for c in bars)
    lines = {line.get_label(): line.get_color() for line in plots.distribution(comparison.requests).lines}
    assert mpl.colors.to_rgba(lines[LABELS[1]]) == colour


def test_first_styles_differ_in_lightness():
    def lightness(colour: str) -> float:
        return float(np.dot(mpl.colors.to_rgb(colour), (0.299, 0.587, 0.114)))

    values = [lightness(c) for c in plots.COLOURS[:4]]
    assert min(abs(a - b) for a, b in pairwise(values)) > 0.2


def test_distribution_draws_the_slo_line_and_counts_requests_without_a_value(comparison):
    frame = comparison.requests.assign(ttft_s=lambda f: f["ttft_s"].where(f.index % 2 == 0))
    ax = plots.distribution(frame, "ttft_s", slo_s=0.5)
    assert any(np.allclose(line.get_xdata(), 500.0) for line in ax.lines)
    ends = [line.get_ydata()[-1] for line in ax.lines if line.get_label() in LABELS]
    np.testing.assert_allclose(ends, 50.0)
    assert "fewer than 1,000" in texts(ax.get_figure())
    assert ax.get_xlabel() == "time to first token (ms)"


def test_p99_is_not_greyed_for_a_thousand_rows():
    frame = pd.DataFrame({"policy": "a", "itl_s": np.linspace(0.01, 0.1, 1000)})
    assert "fewer than" not in texts(plots.distribution(frame, "itl_s").get_figure())


def test_timeline_integrates_to_the_number_of_tokens(comparison):
    events = comparison.events
    one = events[(events["seed"] == 0) & (events["policy"] == LABELS[0])]
    axes = plots.timeline(one, bin_s=0.5)
    for ax, kind in zip(axes, ("arrived", "token", "committed"), strict=True):
        stairs = ax.patches[0]
        rows = one[one["kind"] == kind]
        total = rows["value"].sum() if kind == "committed" else len(rows)
        assert stairs.get_data().values.sum() * 0.5 == pytest.approx(total)
        assert "/s)" in ax.get_ylabel()


def test_loss_is_drawn_over_committed_tokens(comparison):
    ax = plots.loss(comparison.events)
    line = next(line for line in ax.lines if line.get_label().startswith(LABELS[0]) and "held out" not in line.get_label())
    replay = comparison.replays[LABELS[0], 0]
    assert line.get_xdata()[-1] in (
        replay.events.query("kind == 'committed'")["value"].sum(),
        replay.events.query("kind == 'committed'")["value"].sum() - 64,
    )
    np.testing.assert_allclose(line.get_ydata(), replay.events.query("kind == 'loss'")["value"])


def test_predicted_against_measured_has_equal_axes_and_the_line_of_equality(comparison):
    ax = plots.predicted_vs_measured(comparison.steps)
    assert ax.get_xlim() == ax.get_ylim() and "(ms)" in ax.get_xlabel() and "(ms)" in ax.get_ylabel()
    assert any(np.array_equal(line.get_xdata(), line.get_ydata()) for line in ax.lines)


def test_step_timeline_has_a_row_for_each_kind_of_work_that_ran(comparison):
    ax = plots.step_timeline(comparison.replays[LABELS[0], 0].steps)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["decode", "prefill", "fine-tune forward", "fine-tune backward"]


def test_lines_over_load_have_bands_over_seeds(comparison):
    runs = pd.concat([comparison.runs.assign(rate_per_s=r, attainment=comparison.runs["attainment"] / r) for r in (1.0, 2.0)])
    runs["attainment"] += 0.01 * runs["seed"]
    ax = plots.by_load(runs)
    assert len(ax.collections) == 2 and ax.get_xlabel() == "arrival rate (requests/s)"


def test_a_figure_shows_itself_as_a_png_without_pyplot(comparison):
    assert comparison.plot()._repr_png_().startswith(b"\x89PNG")
    assert mpl._pylab_helpers.Gcf.get_all_fig_managers() == []


def test_gaps_can_be_drawn_by_policy(comparison):
    gaps = pd.concat([metrics.token_gaps(r.events).assign(policy=label) for (label, _), r in comparison.replays.items()])
    assert plots.distribution(gaps, "itl_s", slo_s=0.08).get_ylabel() == "share of gaps (%)"


def test_roofline_places_kernels_by_intensity_under_the_measured_roof():
    rows = pd.DataFrame(
        {
            "device": "NVIDIA H100 80GB HBM3",
            "system": ["workbench", "workbench", "base GEMM", "workbench"],
            "metric": ["addition", "addition", "GEMM", "attainment"],
            "unit": ["us", "us", "us", "%"],
            "p50": [10.0, 20.0, 100.0, 99.0],
            "num_bytes": [1e6, 2e6, 1e7, np.nan],
            "flops": [1e7, 2e7, 5e10, np.nan],
        }
    )
    ax = plots.roofline(rows)
    points = np.vstack([c.get_offsets() for c in ax.collections])
    np.testing.assert_allclose(sorted(map(tuple, points)), [(10.0, 1.0), (10.0, 1.0), (5000.0, 500.0)])
    (roof,) = ax.lines
    x, y = roof.get_data()
    np.testing.assert_allclose(y, np.minimum(x * 3.02, 711.0))
    assert "TFLOP/s" in ax.get_ylabel() and "FLOP/byte" in ax.get_xlabel()
    with pytest.raises(ValueError, match="exactly one device"):
        plots.roofline(rows.assign(device=["a", "b", "a", "b"]))
    assert not plots.roofline(rows.assign(device="CPU")).lines


def test_a_tradeoff_has_a_point_per_setting_and_the_bound_and_the_target(comparison):
    runs = comparison.runs.assign(
        policy_name="Pace", finetune_tokens_per_s=comparison.runs["policy"].map({LABELS[0]: 50.0, LABELS[1]: 90.0})
    )
    bound = SimpleNamespace(
        attainment=0.9,
        finetune_at=lambda attainment: 200.0 - 100.0 * attainment,
        sustained_at=lambda attainment: 150.0 - 100.0 * attainment,
    )
    ax = plots.tradeoff(runs, bound=bound, target=0.95, caption="made by hand")
    line = next(line for line in ax.lines if len(line.get_xdata()) == 2 and line.get_marker() == "o")
    assert list(line.get_xdata()) == [50.0, 90.0]
    np.testing.assert_allclose(np.asarray(line.get_ydata(), float), 100 * runs.groupby("policy", sort=False)["attainment"].mean())
    text = texts(ax.figure)
    assert "95% meet the SLO" in text and "upper bound" in text and "% of arrived requests" in text and "made by hand" in text
    drawn = next(line for line in ax.lines if "upper bound" in str(line.get_label()))
    assert drawn.get_xdata()[-1] == pytest.approx(110.0) and drawn.get_ydata()[-1] == pytest.approx(90.0)


def test_differences_stand_at_their_estimates_with_their_intervals():
    common = {"a": "A", "b": "B", "metric": "tokens", "p_value": 0.1, "n": 5, "over": "seeds", "method": "t"}
    found = {
        "one": Difference(estimate=3.0, low=-1.0, high=7.0, **common),
        "two": Difference(estimate=-250.0, low=-300.0, high=-200.0, **common),
    }
    ax = plots.differences(found, unit="tokens/s")
    spans = [bars.get_segments()[0][:, 0].tolist() for bars in ax.collections]
    assert spans == [[-1.0, 7.0], [-300.0, -200.0]]
    assert {"one", "two", "tokens/s", "+3", "-250"} <= set(texts(ax.figure).split("\n"))


def test_capacity_rings_stand_at_the_largest_loads_that_met_each_target():
    points = pd.DataFrame({"load": [1.0, 2.0, 4.0], "attainment": [1.0, 0.93, 0.5], "low": [0.99, 0.9, 0.3], "high": [1.0, 0.97, 0.7]})
    table = pd.DataFrame({"capacity": [2.0, np.nan]}, index=pd.Index([0.9, 0.999], name="target"))
    found = Capacity(policy="A", metric="attainment", table=table, points=points, seeds=(0, 1), redrawn=(), runs=pd.DataFrame())
    ax = plots.capacity([found])
    rings = next(line for line in ax.lines if line.get_markerfacecolor() == "none")
    assert list(rings.get_xdata()) == [2.0] and list(rings.get_ydata()) == pytest.approx([93.0])
    assert "90%" in texts(ax.figure) and "load (requests/s)" in texts(ax.figure)


def test_costs_are_drawn_by_class_of_step_with_what_a_unit_costs():
    shares = pd.DataFrame({"decode": [0.75, 0.25], "train": [0.1, 0.9]}, index=["step", "finetune_tokens"])
    ax = plots.costs(shares, pd.Series({"step": 6543.2, "finetune_tokens": 4.918}), caption="by hand")
    assert sorted(bar.get_width() for bar in ax.patches) == pytest.approx([10, 25, 75, 90])
    assert {"6,543", "4.92", "finetune tokens", "µs per unit"} <= set(texts(ax.figure).split("\n"))


def test_costs_that_hardly_count_are_one_row_together():
    shares = pd.DataFrame({"decode": [0.99, 0.004, 0.003, 0.003], "train": [0.997, 0.0, 0.002, 0.001]}, index=["step", "a", "b", "c"])
    ax = plots.costs(shares, pd.Series({"step": 6543.2, "a": 1.0, "b": 2.0, "c": 3.0}))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["3 other terms", "step"]
    assert sorted(bar.get_width() for bar in ax.patches) == pytest.approx([0.3, 1.0, 99.0, 99.7])


def test_a_legend_names_a_shipped_policy_without_the_parameters_that_have_their_defaults(comparison):
    frame = comparison.requests
    for label, shown in (
        (repr(wb.policies.SLOSlack()), "SLOSlack"),
        (repr(wb.policies.SLOSlack(reserve=0.2, pace=False)), "SLOSlack(reserve=0.2, pace=False)"),
        (repr(wb.policies.MultiLevelQueue()), repr(wb.policies.MultiLevelQueue())),
        ("Mine(tokens=512)", "Mine(tokens=512)"),
    ):
        ax = plots.distribution(frame.assign(policy=label), "ttft_s")
        (text,) = ax.get_legend().get_texts()
        assert text.get_text().replace("\n", " ") == shown


def test_replicas_are_drawn_at_the_mean_over_seeds():
    rows = pd.DataFrame({"policy": ["x"] * 4, "replica": [0, 1, 0, 1], "busy_share": [0.2, 0.8, 0.4, 0.6]})
    ax = plots.by_replica(rows, "busy_share")
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([30.0, 70.0])
    assert "busy (% of the window)" in texts(ax.figure)


def test_a_request_timeline_shows_its_phases_and_a_tick_per_token(comparison):
    run = comparison.replays[LABELS[0], 0]
    life, below = plots.request_timeline(run.events, run.steps, "r3", caption="one request")
    tokens = run.events[(run.events["owner"] == "r3") & (run.events["kind"] == "token")]
    ticks = next(c for c in life.collections if c.get_label() == "a token")
    assert [segment[0][0] for segment in ticks.get_segments()] == pytest.approx(tokens["time_s"].tolist())
    text = texts(life.figure)
    assert "request r3" in text and "decode" in text and "one request" in text and below.get_xlabel() == "time (s)"
    with pytest.raises(ValueError, match="request_id must be of a request that arrived, got 'nobody'"):
        plots.request_timeline(run.events, run.steps, "nobody")


def test_a_label_longer_than_the_figure_does_not_squeeze_the_axes(comparison):
    runs = comparison.runs.assign(rate_per_s=comparison.runs["seed"], policy="Pace(" + "gap_s=0.02, " * 20 + ")")
    ax = plots.by_load(runs)
    ax.figure.canvas.draw()
    assert ax.get_position().width > 0.6
