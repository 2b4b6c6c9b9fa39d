"""Float32 master weights of mixed-precision training (Micikevicius et al., 2018), and their compute copy.

There is one flat buffer for each purpose. The cast to the compute copy, the sum of gradients, their norm and the
optimizer's update are one operation each, not one for every layer.
"""

import torch
from torch import nn

ALIGNED = 32
"""A parameter begins at a multiple of so many elements. GPU kernels read sixteen bytes at once, and one that reads
from an unaligned address ends the process."""


class MasterWeights:
    """Takes over `parameters`: their data become views of the compute copy, their gradients of one buffer.

    `flat`: the float32 master weights [numel], a parameter for an optimizer. `flat.grad` holds the sum of gradients.
    Between parameters there may be zeros. `count`: how many numbers are trained.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], compute: torch.dtype) -> None:
        self._parameters = parameters
        self.names = tuple(parameters)
        self.count = sum(parameter.numel() for parameter in parameters.values())
        self._spans = _spans(parameters)
        first = next(iter(parameters.values()))
        end = max(end for _, end in self._spans.values())
        self.flat = nn.Parameter(torch.zeros(end, dtype=torch.float32, device=first.device))
        self.flat.grad = torch.zeros_like(self.flat)
        self._copy = torch.empty_like(self.flat, dtype=compute, requires_grad=False)
        self._fresh = torch.zeros_like(self._copy)
        for name, (start, end) in self._spans.items():
            parameter = parameters[name]
            shape = parameter.shape
            self.flat.data[start:end] = parameter.detach().flatten()
            parameter.data = self._copy[start:end].view(shape)
            parameter.grad = self._fresh[start:end].view(shape)
        self.refresh()

    @property
    def gradient(self) -> torch.Tensor:
        """The float32 sum of this update's gradients."""
        assert self.flat.grad is not None
        return self.flat.grad

    def refresh(self) -> None:
        """Cast the masters to the compute copy: once an update."""
        self._copy.copy_(self.flat.detach())

    def collect(self) -> None:
        """Add the gradients of one micro-batch to the sum, in float32: they are many small terms."""
        self.gradient.add_(self._fresh)
        self._fresh.zero_()

    def reset(self) -> None:
        """Zero the gradients of this update."""
        self.gradient.zero_()
        self._fresh.zero_()

    def value(self, name: str) -> torch.Tensor:
        """The masters of one parameter, as a view."""
        start, end = self._spans[name]
        return self.flat.detach()[start:end].view(self._parameters[name].shape)

    def gradient_of(self, name: str) -> torch.Tensor:
        """The sum of one parameter's gradients, as a view."""
        start, end = self._spans[name]
        return self.gradient[start:end].view(self._parameters[name].shape)

    def lend_gradients(self) -> None:
        """Show the sums as the parameters' own gradients, until `reset`."""
        self._fresh.copy_(self.gradient)

    def drop_zeros(self, name: str) -> None:
        """Set the masters of one parameter to zero where its compute copy was set to zero."""
        self.value(name).masked_fill_(self._parameters[name].detach() == 0, 0.0)

    def by_name(self) -> dict[str, torch.Tensor]:
        """The masters under their parameters' names, as copies."""
        return {name: self.value(name).clone() for name in self.names}

    def load(self, values: dict[str, torch.Tensor]) -> None:
        """Set the masters from what `by_name` gave. Raises KeyError when a parameter is missing."""
        for name, (start, end) in self._spans.items():
            self.flat.data[start:end].copy_(values[name].flatten())
        self.refresh()


def _spans(parameters: dict[str, nn.Parameter]) -> dict[str, tuple[int, int]]:
    """Each parameter's [start, end) in a buffer."""
    spans: dict[str, tuple[int, int]] = {}
    start = 0
    for name, parameter in parameters.items():
        spans[name] = (start, start + parameter.numel())
        start += -(-parameter.numel() // ALIGNED) * ALIGNED
    return spans
