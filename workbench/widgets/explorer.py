"""Sliders over replays on a latency model: what attainment and throughput become at another load, SLO or share of fine-tuning."""

import base64
import html
import io
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as widgets

from workbench.config import SLO, FinetuneJob, require
from workbench.experiments.compare import Comparison, compare
from workbench.model_error import METRICS
from workbench.widgets.share import LimitedTraining

Settings = tuple[float, float, float, float]  # rate_per_s, ttft_ms, itl_ms, share
CACHED = 64
SHOWN = {
    "attainment": ("SLO attainment", "{:.2%}"),
    "finetune_tokens_per_s": ("fine-tuning (committed tokens/s)", "{:,.1f}"),
    "decode_tokens_per_s": ("output (tokens/s)", "{:,.1f}"),
    "ttft_p50_s": ("TTFT p50 (s)", "{:.3f}"),
    "ttft_p99_s": ("TTFT p99 (s)", "{:.3f}"),
    "itl_p99_s": ("token gap p99 (s)", "{:.3f}"),
    "requests": ("requests", "{:.0f}"),
    "saturated": ("queue grows", "{}"),
}


class Explorer:
    """Replays `policies` on `executor` at the sliders' settings and shows attainment and throughput. Made by `explorer`.

    `widget` is the ipywidgets box, `comparison` what it shows now, `snapshot()` the same without sliders, for a page that is not live.
    """

    def __init__(
        self,
        policies: Sequence[Callable[..., None]],
        *,
        trace: Callable[[float], Any],
        executor: Any,
        jobs: Sequence[FinetuneJob],
        slo: SLO,
        rates: Sequence[float],
        seed: int,
        planning: float,
    ) -> None:
        require(executor.info.simulated, "an explorer needs a latency model, so that a redraw takes less than a second", executor.info.name)
        require(len(rates) > 1, "rates must hold at least two arrival rates for the slider", list(rates))
        self.policies, self.trace, self.executor, self.jobs, self.slo = tuple(policies), trace, executor, tuple(jobs), slo
        self.seed, self.planning = seed, planning
        self._cache: OrderedDict[Settings, Comparison] = OrderedDict()
        ttft_ms, itl_ms = (slo.ttft_s or 5.0) * 1e3, (slo.itl_s or 0.2) * 1e3
        rates = sorted(float(r) for r in rates)
        options = [(f"{r:g}", r) for r in rates]
        self.rate = widgets.SelectionSlider(options=options, value=rates[0], description="arrival rate (requests/s)", **_look())
        self.ttft = _target_slider("TTFT target (ms)", ttft_ms)
        self.itl = _target_slider("token gap target (ms)", itl_ms)
        share = {"value": 1.0, "min": 0.0, "max": 1.0, "step": 0.1, "readout_format": ".0%"}
        self.share = widgets.FloatSlider(description="fine-tune share, at most", **share, **_look())
        self._image, self._text = widgets.Image(format="png"), widgets.HTML()
        for slider in (self.rate, self.ttft, self.itl, self.share):
            slider.observe(self._redraw, names="value")
        sliders = widgets.VBox([self.rate, self.ttft, self.itl, self.share])
        self.widget = widgets.VBox([sliders, self._text, self._image]).add_class("loquetier-explorer")
        self._redraw()

    @property
    def settings(self) -> Settings:
        """Where the sliders are: arrival rate (requests/s), TTFT and gap targets (ms), fine-tune share."""
        return self.rate.value, self.ttft.value, self.itl.value, self.share.value

    @property
    def comparison(self) -> Comparison:
        """The replays at the sliders' settings."""
        if self.settings not in self._cache:
            self._cache[self.settings] = self.replays(*self.settings)
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return self._cache[self.settings]

    def replays(self, rate_per_s: float, ttft_ms: float, itl_ms: float, share: float) -> Comparison:
        """Fresh replays at any settings, past the cache: the same numbers as at the sliders, for equal settings."""
        return compare(
            [LimitedTraining(policy, share) for policy in self.policies],
            trace=self.trace(rate_per_s),
            executor=self.executor,
            jobs=self.jobs,
            slo=replace(self.slo, ttft_s=ttft_ms / 1e3, itl_s=itl_ms / 1e3),
            seeds=[self.seed],
            planning=self.planning,
            progress=False,
        )

    def snapshot(self) -> widgets.HTML | Any:
        """The figure and the numbers at the sliders' present settings as plain HTML with a PNG inside."""
        from IPython.display import HTML

        data = base64.b64encode(self._image.value).decode()
        return HTML(f'{self._text.value}<img alt="SLO attainment and throughput by policy" src="data:image/png;base64,{data}">')

    def _redraw(self, _: Any = None) -> None:
        comparison = self.comparison
        self._text.value = table_html(comparison, self.settings)
        buffer = io.BytesIO()
        comparison.plot().savefig(buffer, format="png", dpi=80)
        self._image.value = buffer.getvalue()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.widget)


def _look() -> dict[str, Any]:
    return {"continuous_update": False, "style": {"description_width": "160px"}, "layout": widgets.Layout(width="520px")}


def _target_slider(name: str, value_ms: float) -> widgets.FloatSlider:
    """A slider from a tenth to four times a target, in steps of a twentieth."""
    step = value_ms / 20
    return widgets.FloatSlider(value=value_ms, min=2 * step, max=80 * step, step=step, description=name, readout_format=".0f", **_look())


def table_html(comparison: Comparison, settings: Settings) -> str:
    """The numbers as an HTML table, the latency model's error on each below them.

    The attainment cells carry class `loquetier-attainment` and the exact value and settings as data.
    """
    rate, ttft_ms, itl_ms, share = settings
    head = "".join(f"<th>{name}</th>" for name, _ in SHOWN.values())
    rows = []
    for row in comparison.runs.to_dict("records"):
        where = f'data-policy="{html.escape(row["policy"])}" data-rate="{rate!r}" data-ttft-ms="{ttft_ms!r}" data-itl-ms="{itl_ms!r}" '
        where += f'data-share="{share!r}" data-value="{row["attainment"]!r}"'
        cells = []
        for name, (_, form) in SHOWN.items():
            mark = f' class="loquetier-attainment" {where}' if name == "attainment" else ""
            cells.append(f"<td{mark}>{form.format(row[name])}</td>")
        rows.append(f'<tr><th style="text-align:left">{html.escape(row["policy"])}</th>{"".join(cells)}</tr>')
    errors = {name: comparison.model_error(name) for name in SHOWN if name in METRICS}
    cells = [f"<td>{html.escape(error.amount) if (error := errors.get(name)) else ''}</td>" for name in SHOWN]
    judged = next((f" ({e.tried} replays on {e.where})" for e in errors.values() if e is not None and e.tried), "")
    foot = f'<tr class="loquetier-model-error"><th style="text-align:left">model error{html.escape(judged)}</th>{"".join(cells)}</tr>'
    body = f"<tbody>{''.join(rows)}</tbody><tfoot>{foot}</tfoot>"
    return f'<table class="loquetier-numbers"><thead><tr><th></th>{head}</tr></thead>{body}</table>'


def explorer(
    policies: Sequence[Callable[..., None]],
    *,
    trace: Callable[[float], Any],
    executor: Any,
    jobs: Sequence[FinetuneJob] = (),
    slo: SLO = SLO(ttft_s=5.0, itl_s=0.2),
    rates: Sequence[float] = (0.5, 1.0, 2.0, 4.0, 8.0),
    seed: int = 0,
    planning: float = 0.001,
) -> Explorer:
    """Sliders for arrival rate, TTFT target, gap target and fine-tune share; every move replays the policies and redraws.

    `trace` is a function arrival rate (requests/s) -> Trace. `executor` is a LatencyModel; a trace of about a hundred requests redraws
    in under a second. `planning`: seconds that every decision costs. The share bounds the part of the time that steps with fine-tuning
    in them take (`LimitedTraining`). Raises ValueError for a real executor or fewer than two rates.
    """
    return Explorer(policies, trace=trace, executor=executor, jobs=jobs, slo=slo, rates=rates, seed=seed, planning=planning)
