"""Figures say what they show: units, policies, the SLO, n, seeds and executor; and a policy looks the same in all of them."""

from dataclasses import dataclass, replace
from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest

from tests.fake_replays import INFO, SLOS, fake_replay, trace_of
from workbench import metrics, plots
from workbench.experiment import Comparison


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
