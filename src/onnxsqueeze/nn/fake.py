"""Fake quantization: in training, numbers are rounded as the int8 file will round them, and gradients pass as if they were not.

The grids are those of onnxruntime.quantization's quantize_dynamic and quantize_static with int8 weights (quant_utils.compute_scale_zp, quantize_nparray)
and of ONNX's DynamicQuantizeLinear; rounding is half to even everywhere. Source of the gradient: Bengio et al. 2013, "Estimating or Propagating Gradients Through
Stochastic Neurons" (straight through); of the method: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

_SMALLEST = torch.finfo(torch.float32).tiny
_WEIGHT_STEPS = {8: 127, 7: 64}  # the largest integer of a symmetric weight; 64 is what ONNX Runtime calls 7 bits
_CODES = 255


def weight(values: Tensor, *, per_channel: bool, bits: int = 8) -> Tensor:
    """``values[out, in]`` on the grid of a MatMul's symmetric int8 weight: one scale an output, or one for all."""
    largest = values.detach().abs()
    largest = largest.amax(1, keepdim=True) if per_channel else largest.amax()
    scale = (2 * largest.double() / (2 * _WEIGHT_STEPS[bits])).float()
    scale = torch.where(scale < _SMALLEST, torch.ones_like(scale), scale)
    return _through(values, (values.detach() / scale).round().clamp(-128, 127) * scale)


def table(values: Tensor) -> Tensor:
    """``values[rows, width]`` on the grid of a Gather's unsigned table: one scale and zero point."""
    found = values.detach()
    return _through(values, _unsigned(found, found.amin().clamp_max(0), found.amax().clamp_min(0)))


def activation(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values[rows, tokens, width]`` or ``[rows, width]`` on the grid that each row gets when it comes alone: the range of its own real tokens.

    ``mask[rows, tokens]`` is 1 where a token is real; it is not looked at where there is no axis of tokens.
    """
    found = values.detach().float()
    low, high = found, found
    if mask is not None and found.dim() == 3:  # rows, tokens, width
        padding = mask[:, : found.shape[1], None] == 0
        low, high = found.masked_fill(padding, 0.0), found.masked_fill(padding, 0.0)  # 0 is in every range
    axes = tuple(range(1, found.dim()))
    return _through(values, _unsigned(found, low.amin(axes, keepdim=True).clamp_max(0), high.amax(axes, keepdim=True).clamp_min(0)))


def within(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``values`` of any shape on the grid of one range that was fixed beforehand; what lies outside gets its nearest end. ``low`` ≤ 0 ≤ ``high``."""
    return _through(values, _unsigned(values.detach().float(), low, high))


def _unsigned(values: Tensor, low: Tensor, high: Tensor) -> Tensor:
    scale = (high - low) / _CODES
    scale = torch.where(scale < _SMALLEST, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, _CODES)
    return ((values / scale).round() + zero).clamp(0, _CODES).sub(zero).mul(scale)


def _through(values: Tensor, rounded: Tensor) -> Tensor:
    return values + (rounded.to(values.dtype) - values).detach()


class Ranges(nn.Module):
    """Of each linear layer's input the smallest and the largest value, ``low[calls]`` and ``high[calls]``, in the order in which a forward pass comes to them.

    A layer that is called twice has two. Buffers, so that a training's state keeps them.
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.zeros(0))
        self.register_buffer("high", torch.zeros(0))


class FakeQuantized:
    """Makes every linear layer and every table of a model round as its int8 export will, while it is entered; the state dict stays what it was.

    With ``static``, inputs of linear layers have the ranges that `measure` found last, which must be called first; else each row has its own.
    Products of activations with each other (attention), norms and biases stay in float, as the quantizers leave them.
    """

    def __init__(self, model: nn.Module, *, per_channel: bool, bits: int, static: bool = False) -> None:
        self._model, self._mask = model, None
        self._forwards: list[tuple[nn.Module, Any]] = []
        self._options: Mapping[str, Any] = {"per_channel": per_channel, "bits": bits}
        self._call = 0  # of linear layers, in this forward pass
        self._seen: list[tuple[Tensor, Tensor]] | None = None  # while measuring
        self.ranges = Ranges() if static else None

    def __enter__(self) -> FakeQuantized:
        def remember(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:  # noqa: ARG001, a hook's arguments
            self._mask, self._call = kwargs.get("attention_mask"), 0

        self._hook = self._model.register_forward_pre_hook(remember, with_kwargs=True)
        for module in self._model.modules():
            if isinstance(module, nn.Linear):
                self._replace(module, self._linear(module))
            elif isinstance(module, nn.Embedding):
                self._replace(module, self._embedding(module))
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()
        for module, forward in self._forwards:
            module.forward = forward
        self._forwards.clear()

    @torch.no_grad()
    def measure(self, batches: Iterable[Mapping[str, NDArray[Any]]]) -> None:
        """Fix the ranges that the layers' inputs have in float over ``batches``, ``{name: [rows, tokens]}``, padding and 0 included.

        Source: onnxruntime.quantization's MinMax calibration, which sees the model in float as well.
        """
        assert self.ranges is not None  # noqa: S101  # only with static
        training, place = self._model.training, next(self._model.parameters()).device
        self._model.eval()
        found: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            self._seen = []
            self._model(**{name: torch.from_numpy(values).to(place) for name, values in batch.items()})
            found = [(a.minimum(c), b.maximum(d)) for (a, b), (c, d) in zip(found or self._seen, self._seen, strict=True)]
        self._seen = None
        self.ranges.low = torch.stack([low for low, _ in found]).clamp_max(0)
        self.ranges.high = torch.stack([high for _, high in found]).clamp_min(0)
        self._model.train(training)

    def _replace(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        self._forwards.append((module, module.forward))
        module.forward = forward

    def _linear(self, module: nn.Linear) -> Callable[[Tensor], Tensor]:
        def forward(values: Tensor) -> Tensor:
            call, self._call = self._call, self._call + 1
            if self._seen is not None:
                self._seen.append(values.float().aminmax())
                return functional.linear(values, module.weight, module.bias)
            rounded = (
                within(values, self.ranges.low[call], self.ranges.high[call]) if self.ranges is not None else activation(values, self._mask)
            )
            return functional.linear(rounded, weight(module.weight, **self._options), module.bias)

        return forward

    def _embedding(self, module: nn.Embedding) -> Callable[[Tensor], Tensor]:
        def forward(ids: Tensor) -> Tensor:
            values = module.weight if self._seen is not None else table(module.weight)
            return functional.embedding(ids, values, module.padding_idx)

        return forward
