"""What a person does with a notebook in JupyterLab, in the words of its page: run all, wait, read a slider and move it."""

from typing import Any

KERNEL_READY = """() => {
    const name = document.querySelector('.jp-Toolbar-kernelName');
    const light = document.querySelector('.jp-Notebook-ExecutionIndicator');
    return name && name.textContent.trim() && !name.textContent.includes('No Kernel') && light && light.dataset.status === 'idle';
}"""
# What a cell raised is drawn like what it writes to stderr.
ERRORS = """() => [...document.querySelectorAll('.jp-Notebook .jp-OutputArea-output')]
    .filter(output => /vnd\\.jupyter\\.(error|stderr)/.test(output.dataset.mimeType))
    .map(output => output.innerText).filter(text => text.includes('Traceback (most recent call last)'))"""
ALL_RUN = f"""() => {{
    const prompts = [...document.querySelectorAll('.jp-Notebook .jp-CodeCell')]
        .filter(cell => cell.querySelector('.cm-content').innerText.trim())
        .map(cell => cell.querySelector('.jp-InputPrompt').textContent);
    const failed = ({ERRORS})().length;
    return failed ? 'failed' : prompts.length > 0 && prompts.every(p => /\\[\\d+\\]/.test(p)) ? 'done' : null;
}}"""


def wait_for_kernel(page: Any, timeout_s: float = 90) -> None:
    # The light says idle before there is a kernel, and Run All is then dropped: both must hold.
    page.wait_for_function(KERNEL_READY, timeout=1000 * timeout_s)


def run_all(page: Any, timeout_s: float) -> None:
    """Run > Run All Cells, until every code cell has its number. Fails with the traceback of a cell that raised."""
    page.locator(".lm-MenuBar-item", has_text="Run").first.click()
    page.locator('li[data-command="runmenu:run-all"]').click()
    outcome = page.wait_for_function(ALL_RUN, timeout=1000 * timeout_s).json_value()
    if outcome == "failed":
        raise AssertionError("a cell of the notebook failed:\n" + "\n".join(page.evaluate(ERRORS)))


def slider(page: Any, label: str) -> Any:
    """The slider with this label (its beginning)."""
    return page.locator(".widget-slider", has=page.locator(".widget-label", has_text=label)).first


def readout(one: Any) -> str:
    return one.locator(".widget-readout").inner_text().strip()


def move(page: Any, one: Any, key: str, times: int) -> None:
    """Move a slider with the keyboard, one step a key press."""
    handle = one.locator(".noUi-handle").first
    handle.scroll_into_view_if_needed()
    handle.focus()
    for _ in range(times):
        page.keyboard.press(key)
