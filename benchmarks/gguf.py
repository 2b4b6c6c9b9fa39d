"""The base and the adapters as GGUF files for llama.cpp, converted once by its scripts, in bfloat16."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.deployment import BenchmarkError
from benchmarks.machine import ROOT
from benchmarks.publishing import KEPT

BUILT = ROOT / ".cache" / "llama.cpp"
SCRIPTS = BUILT / "source" / "vendor" / "llama.cpp"


def converted(base: Path, adapters: Sequence[Path]) -> tuple[Path, list[Path]]:
    """(the base's file, the adapters' files), made where they are older than what they are made of."""
    folder = KEPT / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    whole = _made("convert_hf_to_gguf.py", base, folder / f"{base.name}.gguf")
    return whole, [
        _made("convert_lora_to_gguf.py", each, folder / f"{each.name}.gguf", "--base", str(base)) for each in adapters
    ]


def _made(script: str, source: Path, target: Path, *options: str) -> Path:
    newest = max(path.stat().st_mtime for path in source.iterdir())
    if target.exists() and target.stat().st_mtime > newest:
        return target
    command = [sys.executable, str(SCRIPTS / script), str(source), "--outfile", str(target), "--outtype", "bf16"]
    own = os.environ | {"PYTHONPATH": str(BUILT / "site")}  # what the scripts import and the project does not
    done = subprocess.run([*command, *options], env=own, capture_output=True, text=True)
    if done.returncode:
        target.unlink(missing_ok=True)
        raise BenchmarkError(done.stderr[-3000:])
    return target
