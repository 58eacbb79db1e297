"""The tour as a person uses it: open it in JupyterLab, run all, move a slider, and believe what is shown only if it is recomputed."""

import ast
import os
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
# Run in the tour's own kernel: fresh replays at the settings shown, past the explorer's cache, summed up from their event rows.
FIND_EXPLORER = "_explorer = next(v for v in list(globals().values()) if type(v).__name__ == 'Explorer')"
RECOMPUTED = "{{label: float(r.summary()['attainment']) for (label, _), r in _explorer.replays(*{settings}).replays.items()}}"
DRAWN_FOR = "([cells, target]) => Math.round(Number(document.querySelector(cells).dataset.ttftMs)) === Math.round(target)"
CELLS = ".loquetier-explorer .loquetier-attainment"

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


def shown(page) -> list[dict[str, str]]:
    """The attainment cells of the live explorer: the text that a person reads, and the settings that it stands for."""
    return page.locator(CELLS).evaluate_all("cells => cells.map(cell => ({text: cell.innerText, ...cell.dataset}))")


def test_attainment_shown_equals_the_summary_recomputed_at_the_sliders_value(tour, lab):
    target = slider(tour, "TTFT target")
    before, cells_before = readout(target), shown(tour)
    # To its lower end, a tenth of where it stood: 18 steps of a twentieth.
    move(tour, target, "ArrowLeft", times=18)
    after = readout(target)
    assert after != before, "the slider did not move"
    tour.wait_for_function(DRAWN_FOR, arg=[CELLS, float(after.replace(",", ""))], timeout=120_000)
    cells = shown(tour)
    assert [cell["value"] for cell in cells] != [cell["value"] for cell in cells_before], "a tenth of the target must cost attainment"
    settings = tuple(float(cells[0][name]) for name in ("rate", "ttftMs", "itlMs", "share"))
    recomputed = ast.literal_eval(lab.evaluate(FIND_EXPLORER, RECOMPUTED.format(settings=settings), timeout_s=120))
    assert len(recomputed) >= 2
    assert {cell["policy"]: float(cell["value"]) for cell in cells} == pytest.approx(recomputed, abs=1e-12)
    # Shown with two decimals of a percent.
    assert {cell["policy"]: float(cell["text"].strip(" %")) / 100 for cell in cells} == pytest.approx(recomputed, abs=5.1e-5)


def test_every_figure_is_in_the_page(tour):
    pictures = tour.locator(".jp-OutputArea-output img")
    assert pictures.count() >= 2
    assert all(pictures.nth(i).evaluate("image => image.complete && image.naturalWidth > 300") for i in range(pictures.count()))
