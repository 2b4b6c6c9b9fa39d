"""PEFT as a contender: `generate` with `adapter_names`, which mixes adapters in a batch.

    python -m benchmarks.peft_peer TASK.json

TASK: `base` (a directory), `adapters` (directories), `rows` (a list of {prompts, names}), `tokens`, `times`, `threads`.
Prints a JSON line for each of the `rows`.
"""

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from worker.inference.model.base import DTYPES

BASE = "__base__"
"""PEFT's word for a row without an adapter."""


def main(task: dict[str, Any]) -> None:
    out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    torch.set_num_threads(task["threads"])
    bare: Any = AutoModelForCausalLM.from_pretrained(task["base"], dtype=DTYPES["bfloat16"])
    model: Any = bare
    for name, directory in task["adapters"].items():
        if isinstance(model, PeftModel):
            model.load_adapter(directory, name, autocast_adapter_dtype=False)
        else:
            model = PeftModel.from_pretrained(bare, directory, name, autocast_adapter_dtype=False)
    model.to(DTYPES["bfloat16"]).eval()
    for rows in task["rows"]:
        figures = _measure(model, rows["prompts"], rows["names"], task["tokens"], task["times"])
        out.write(json.dumps(figures) + "\n")
        out.flush()


@torch.inference_mode()
def _measure(model: Any, prompts: list[list[int]], names: list[str], tokens: int, times: int) -> dict[str, Any]:
    ids = torch.tensor(prompts)
    alone = set(names) == {BASE}

    def generate(count: int) -> tuple[float, list[list[int]]]:
        chosen = {} if alone else {"adapter_names": names}
        began = time.perf_counter()
        found = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=count,
            min_new_tokens=count,
            pad_token_id=0,
            **chosen,
        )
        return time.perf_counter() - began, found[:, ids.shape[1] :].tolist()

    if alone:
        with model.disable_adapter():
            return _paces(generate, len(prompts), tokens, times)
    return _paces(generate, len(prompts), tokens, times)


def _paces(generate: Any, rows: int, tokens: int, times: int) -> dict[str, Any]:
    generate(2)
    wholes, firsts, answers = [], [], []
    for _ in range(times):
        firsts.append(generate(1)[0])
        seconds, answers = generate(tokens + 1)
        wholes.append(seconds)
    paces = [rows * tokens / (whole - median(firsts)) for whole in wholes]
    return {
        "tokens_per_second": round(median(paces), 1),
        "each": [round(pace, 1) for pace in paces],
        "answers": answers,
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
