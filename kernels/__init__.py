"""Fused operators of the mixed batch: one file per op, each with its plain-torch reference. Nothing heavy is imported here."""


def __getattr__(name: str) -> object:
    """Say what is wrong when something takes this folder for Hugging Face's distribution of the same name."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        open(f"{__path__[0]}/{name}.py").close()
    except OSError:
        raise ImportError(
            f"{__name__!r} must be Hugging Face's distribution to have {name!r}, got the Loquetier Workbench's folder {__path__[0]}. "
            "Uninstall the distribution (pip uninstall kernels): transformers then works without it."
        ) from None
    raise AttributeError(f"module {__name__!r} has not loaded its submodule {name!r} yet")
