"""Evaluates all contenders alike: the mean loss of the labelled tokens, with stock transformers and PEFT.

    python -m benchmarks.evaluator BASE ROWS ADAPTER…

The base is quantised as in training and computes in float32, one row at a time. Prints a JSON line for each adapter. An
empty name means the base.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig


def mean_loss(model: Any, rows: list[dict[str, Any]]) -> float:
    total, count = 0.0, 0
    for row in rows:
        ids = torch.tensor(row["ids"])
        places = [place for start, end in row["trained"] for place in range(max(start, 1), end)]
        with torch.inference_mode():
            logits = model(input_ids=ids[None]).logits[0]
        total += float(cross_entropy(logits[[place - 1 for place in places]], ids[places], reduction="sum"))
        count += len(places)
    return total / count


def load(base: str) -> Any:
    untyped: Any = BitsAndBytesConfig
    config = untyped(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    automatic: Any = AutoModelForCausalLM
    model = automatic.from_pretrained(base, dtype="auto", quantization_config=config, device_map={"": "cpu"})
    return model.dequantize(dtype=model.dtype).float().eval()


def main(base: str, rows: Path, adapters: list[str]) -> None:
    encoded = [json.loads(line) for line in rows.read_text("utf-8").splitlines()]
    model = load(base)
    for adapter in adapters:
        if not adapter:
            print(json.dumps({"adapter": "", "loss": mean_loss(model, encoded)}), flush=True)
            continue
        adapted: Any = PeftModel.from_pretrained(model, adapter)
        print(json.dumps({"adapter": adapter, "loss": mean_loss(adapted.float().eval(), encoded)}), flush=True)
        model = adapted.unload()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
