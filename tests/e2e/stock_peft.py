"""Run by itself: load base and adapter with stock transformers, bitsandbytes and PEFT, and print log probabilities.

stdin: {"base": directory, "adapter": directory, "prompt": [ids]}. It imports nothing of this project. The adapter
is served on the function it was trained on, so the base is quantised to NF4 and its weights are dequantised.
"""

import json
import sys
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

asked = json.load(sys.stdin)
untyped: Any = BitsAndBytesConfig
quantised = untyped(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.bfloat16,
)
base: Any = AutoModelForCausalLM.from_pretrained(asked["base"], quantization_config=quantised, dtype=torch.bfloat16)
base = base.dequantize().float().eval()
prompt = torch.tensor([asked["prompt"]])


def first(model: torch.nn.Module) -> list[float]:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=prompt).logits[0, -1].float(), dim=-1).tolist()


plain = first(base)
adapted = PeftModel.from_pretrained(base, asked["adapter"])
zero = [name for name, value in adapted.named_parameters() if "lora_B" in name and not value.abs().max() > 0]
print(json.dumps({"base": plain, "adapter": first(adapted), "zero_lora_b": zero}))
