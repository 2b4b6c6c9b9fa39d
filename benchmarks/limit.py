"""The limit of an update on this machine: the matrix products that it cannot do without, and nothing else.

    python -m benchmarks.limit CONFIG.json SHAPES.json RANK DTYPE

For each micro-batch: every linear layer forward and, through its frozen weight, backward; LoRA's two products forward
and four backward; attention's two forward and four backward, each row alone; the head forward and backward on the
positions that carry a loss. No products for what needs no gradient: the first layer's input, frozen weights. Results
go into memory that is there already. No norm, no activation, no softmax, no rotation, no loss, no optimizer.
Tells one JSON line an update: its seconds and its floating-point operations.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

SHARES = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}
"""Linear layers, grouped by the input that they share."""


class Shapes:
    """Sizes of a Llama model, named as in its config."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.layers, self.vocab = int(config["num_hidden_layers"]), int(config["vocab_size"])
        self.heads, self.kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
        self.width, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        self.head_width = int(config.get("head_dim") or self.width // self.heads)
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        self.linear = {
            "q": (queries, self.width),
            "k": (keys, self.width),
            "v": (keys, self.width),
            "o": (self.width, queries),
            "gate": (inner, self.width),
            "up": (inner, self.width),
            "down": (self.width, inner),
        }
        """name → (out, in)."""


class Products:
    """The products of one model, over random weights: each layer has its own, as in a model."""

    def __init__(self, shapes: Shapes, rank: int, dtype: torch.dtype) -> None:
        self._shapes, self._rank, self._dtype = shapes, rank, dtype
        self._weights = [
            {name: self._random(*size) for name, size in shapes.linear.items()} for _ in range(shapes.layers)
        ]
        self._a = {name: self._random(rank, size[1]) for name, size in shapes.linear.items()}
        self._b = {name: self._random(size[0], rank) for name, size in shapes.linear.items()}
        self._head = self._random(shapes.vocab, shapes.width)
        self._room: dict[tuple[int, ...], torch.Tensor] = {}
        self.operations = 0

    def run(self, batches: list[dict[str, Any]]) -> None:
        for batch in batches:
            for layer in range(self._shapes.layers):
                self._layer(layer, sum(batch["lengths"]))
                for length in batch["lengths"]:
                    self._attention(length)
            self._product(self._input(batch["labelled"], self._shapes.width), self._head.t())
            self._product(self._input(batch["labelled"], self._shapes.vocab), self._head)

    def _layer(self, layer: int, tokens: int) -> None:
        for name, (outs, ins) in self._shapes.linear.items():
            x, grad, low = self._input(tokens, ins), self._input(tokens, outs), self._input(tokens, self._rank)
            weight, a, b = self._weights[layer][name], self._a[name], self._b[name]
            self._product(x, weight.t())
            self._product(x, a.t())
            self._product(low, b.t())
            self._product(grad, b)
            self._product(grad.t(), low)
            self._product(low.t(), x)
            if layer or SHARES[name]:
                self._product(grad, weight)
                self._product(low, a)

    def _attention(self, length: int) -> None:
        """Scores and values forward; gradients of values, probabilities, queries and keys backward."""
        group = self._shapes.heads // self._shapes.kv_heads
        q = self._input(self._shapes.kv_heads, group * length, self._shapes.head_width)
        k = self._input(self._shapes.kv_heads, length, self._shapes.head_width)
        p = self._input(self._shapes.kv_heads, group * length, length)
        for left, right in ((q, k.mT), (p, k), (p.mT, q), (q, k.mT), (p, k), (p.mT, q)):
            self._product(left, right)

    def _product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        out = self._out(*left.shape[:-1], right.shape[-1])
        (torch.mm if left.ndim == 2 else torch.bmm)(left, right, out=out)
        self.operations += 2 * left.numel() * right.shape[-1]

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size).mul_(0.02).to(self._dtype)

    def _input(self, *size: int) -> torch.Tensor:
        return self._kept((0, *size))

    def _out(self, *size: int) -> torch.Tensor:
        return self._kept((1, *size))

    def _kept(self, key: tuple[int, ...]) -> torch.Tensor:
        if key not in self._room:
            self._room[key] = self._random(*key[1:])
        return self._room[key]


def timed(products: Products, updates: list[list[dict[str, Any]]]) -> Iterator[tuple[float, int]]:
    """(seconds, operations) of each update. Each runs once before it is measured, so that its memory is allocated."""
    for batches in updates:
        products.run(batches)
        products.operations = 0
        began = time.perf_counter()
        products.run(batches)
        yield time.perf_counter() - began, products.operations


def main(config: Path, shapes: Path, rank: int, dtype: str) -> None:
    torch.manual_seed(1)
    products = Products(Shapes(json.loads(config.read_text("utf-8"))), rank, getattr(torch, dtype))
    updates = json.loads(shapes.read_text("utf-8"))
    with torch.no_grad():
        for batches, (seconds, operations) in zip(updates, timed(products, updates), strict=True):
            tokens = sum(sum(batch["lengths"]) for batch in batches)
            print(json.dumps({"tokens": tokens, "seconds": seconds, "operations": operations}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
