"""TRL's SFTTrainer as a contender. It runs in its own venv and prints JSON lines.

    python -m benchmarks.trl_peer TASK.json

It gets token ids and labels that are made already, in the order that Veritune takes them, and nothing of Veritune's
code computes here. Options that a task does not name keep TRL's defaults.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any


def tell(**told: Any) -> None:
    sys.__stdout__.write(json.dumps(told) + "\n")  # type: ignore[union-attr]
    sys.__stdout__.flush()  # type: ignore[union-attr]


def main(task: dict[str, Any]) -> None:
    import bitsandbytes
    import peft
    import transformers
    import trl

    packages = {module.__name__: module.__version__ for module in (trl, transformers, peft, bitsandbytes)}
    tell(mark="imported", packages=packages)
    trainer = _trainer(task)
    tell(mark="loaded", computes_in="bf16" if trainer.args.bf16 else "fp32")
    trainer.train()
    trainer.save_model(task["adapter"])
    tell(mark="saved")


def _trainer(task: dict[str, Any]) -> Any:
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(task["threads"])
    compute = torch.bfloat16 if task["bf16"] else torch.float32
    quantization: Any = BitsAndBytesConfig
    counted = _Counted()

    class Tells(TrainerCallback):
        """The seconds and the real tokens of each update, and its loss."""

        began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began, counted.tokens = time.perf_counter(), 0

        def on_step_end(self, *_: Any, **__: Any) -> None:
            counted.seconds = time.perf_counter() - self.began

        def on_log(self, *_: Any, **named: Any) -> None:
            if "loss" in (logs := named["logs"]):
                tell(mark="update", tokens=counted.tokens, seconds=counted.seconds, loss=logs["loss"])

    class Counting(SFTTrainer):  # type: ignore[misc]
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            counted.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
            return super().training_step(model, inputs, *rest, **named)

    return Counting(
        model=task["base"],
        args=SFTConfig(
            output_dir=task["output"],
            max_steps=task["updates"],
            learning_rate=task["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=0,
            seed=task["seed"],
            bf16=task["bf16"],
            use_cpu=True,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            model_init_kwargs={"dtype": compute},
            **task["options"],
        ),
        train_dataset=datasets.Dataset.from_list(_rows(Path(task["rows"]), task["order"])),
        processing_class=AutoTokenizer.from_pretrained(task["base"]),
        quantization_config=quantization(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=compute,
        ),
        peft_config=LoraConfig(
            r=task["r"],
            lora_alpha=task["alpha"],
            lora_dropout=task["dropout"],
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[Tells()],
    )


class _Counted:
    tokens = 0
    seconds = 0.0


def _rows(path: Path, order: list[int]) -> list[dict[str, Any]]:
    """The encoded rows in the given order, with label -100 for tokens without loss."""
    encoded = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    rows = []
    for row in encoded:
        labels = [-100] * len(row["ids"])
        for start, end in row["trained"]:
            labels[start:end] = row["ids"][start:end]
        rows.append({"input_ids": row["ids"], "labels": labels})
    return [rows[place] for place in order]


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text("utf-8")))
