"""The tour as a person uses it: open it in JupyterLab, run all, move a slider, and believe what is shown only if it is recomputed."""

import ast
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.browser.lab import running_lab
from tests.browser.page import move, readout, run_all, slider, wait_for_kernel

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = "/usr/bin/chromium"
# As root in a container, and without the requests that a browser makes by itself.
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
RUN_ALL_S = 600
SCREENSHOT = ROOT / "results" / "tour-browser.png"
# What the explorer's sliders say, and the summary of the replays that stand behind the numbers shown, recomputed from their event rows.
VALUES = "{policy: float(replay.summary(slo=explorer.slo)['attainment']) for policy, replay in explorer.replays.items()}"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def chromium() -> str:
    if not Path(CHROMIUM).exists():
        sentence = f"{CHROMIUM} is not there. On Debian: apt-get install chromium."
        if os.environ.get("CI") == "true":
            pytest.fail(sentence)
        pytest.skip(sentence)
    return CHROMIUM


@pytest.fixture(scope="module")
def lab(tmp_path_factory, model_dir, adapter_dirs):
    """JupyterLab over a copy of the notebooks, so that its saving does not touch the committed ones."""
    root, scratch = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "notebooks", root / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in ("traces", ".cache"):
        (root / name).symlink_to(ROOT / name)
    with running_lab(root, scratch, python_path=ROOT) as running:
        yield running


@pytest.fixture(scope="module")
def tour(lab, chromium):
    """The tour's page after Run All."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1400, "height": 1800})
        page.goto(lab.page("notebooks/00_tour.ipynb"))
        wait_for_kernel(page)
        run_all(page, RUN_ALL_S)
        yield page
        SCREENSHOT.parent.mkdir(exist_ok=True)
        page.screenshot(path=SCREENSHOT)
        browser.close()


def shown_attainments(page) -> list[float]:
    """The shares that the explorer shows, in its order, from text such as "93.4 %"."""
    text = " ".join(page.locator(".loquetier-attainment").all_inner_texts())
    return [float(number) / 100 for number in re.findall(r"(\d+(?:\.\d+)?)\s*%", text)]


def test_attainment_shown_equals_the_summary_recomputed_at_the_sliders_value(tour, lab):
    slo_slider = slider(tour, "SLO")
    before, shown_before = readout(slo_slider), tour.locator(".loquetier-attainment").first.inner_text()
    move(tour, slo_slider, "ArrowLeft", times=3)
    tour.wait_for_function("shown => document.querySelector('.loquetier-attainment').innerText !== shown", arg=shown_before, timeout=60_000)
    assert readout(slo_slider) != before, "the slider did not move"
    recomputed = ast.literal_eval(lab.evaluate("pass", VALUES))
    shown = shown_attainments(tour)
    assert len(shown) == len(recomputed) >= 2
    # Shown with one decimal of a percent.
    assert shown == pytest.approx(list(recomputed.values()), abs=0.0006)


def test_every_figure_is_in_the_page(tour):
    pictures = tour.locator(".jp-OutputArea-output img")
    assert pictures.count() >= 2
    assert all(pictures.nth(i).evaluate("image => image.complete && image.naturalWidth > 300") for i in range(pictures.count()))
