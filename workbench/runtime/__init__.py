"""What runs batches: the engine and its parts. Needs torch, transformers and this project's own `kernels` folder."""

from importlib.util import find_spec

if find_spec("kernels.segmented_lora") is None:
    import kernels

    raise ImportError(
        f"`kernels` must be the Loquetier Workbench's folder, got another distribution of that name at {kernels.__file__}. "
        "Uninstall it (pip uninstall kernels), or put this project first on the path."
    )
