"""Progress bars of long work, as Hugging Face's libraries show them. Torch-free."""

from typing import Any


def progress_bar(total: int, what: str, unit: str, progress: bool | None) -> Any:
    """A tqdm bar that goes when it is closed: None shows it once the work has taken three seconds, True at once, False never."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=what[:40], unit=unit, leave=False, disable=progress is False, delay=0 if progress else 3.0)
