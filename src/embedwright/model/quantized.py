"""Linear layers that hold their weights in 8 or 4 bits, put in place of those of a decoder's blocks.

O outputs, I inputs, G groups of neighbouring inputs that share a scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from embedwright.errors import InputError


class QuantizedLinear(nn.Module):
    """A linear layer whose weight (O, I) is held as whole numbers and scales. It is for inference alone.

    `codes` is int8 (O, I); or, for 4 bits, uint8 (O, I/2), where a byte holds two neighbouring inputs, the first in its
    low half, each plus 8. `scales` is float32 (O, G). A code times the scale of its group is a weight of the layer as
    `rotated` in blocks of so many inputs; with 1 it is the weight itself. `bias` is (O,) or None.
    """

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None = None, rotation: int = 1) -> None:
        super().__init__()
        self.rotation = rotation
        for name, tensor in (("codes", codes), ("scales", scales), ("bias", bias)):
            self.register_buffer(name, tensor)

    @property
    def bits(self) -> int:
        return 4 if self.codes.dtype == torch.uint8 else 8

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1]) * 8 // self.bits

    @property
    def out_features(self) -> int:
        return len(self.codes)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Returns the weight (O, I) in this type. It is rounded once."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), -1).to(torch.int8) - 8
        groups = codes.reshape(*self.scales.shape, -1) * self.scales[..., None]
        matrix = rotated(torch.eye(self.rotation, device=codes.device), self.rotation)
        return (groups.reshape(-1, self.rotation) @ matrix).to(dtype).view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.dequantized(input.dtype), bias)

    def extra_repr(self) -> str:
        groups = self.scales.shape[1]
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, {groups=}, rotation={self.rotation}"


def rotated(x: Tensor, block: int) -> Tensor:
    """Multiplies each block of neighbouring numbers (..., I) by the Hadamard matrix of its size, scaled to length 1.

    It spreads an outlier over its block. Applied to inputs and weights alike it changes no product, and applied twice
    it changes nothing. `block` is a power of 2 that divides I. The order of the sums is fixed, so that the bits of a
    weight are the same on every machine.
    """
    shape, apart = x.shape, 1
    while apart < block:
        first, second = x.reshape(-1, 2, apart).unbind(1)
        x, apart = torch.stack((first + second, first - second), 1), 2 * apart
    return (x / block**0.5).reshape(shape) if block > 1 else x


def quantized(linear: nn.Linear, bits: int = 8, group: int | None = None, rotation: int = 1) -> QuantizedLinear:
    """Makes a `QuantizedLinear` of a linear layer: each weight, rotated, becomes the nearest code.

    `group` inputs share a scale, by which the largest of their weights becomes the largest code. None: all inputs. A
    block of the rotation is the largest power of 2 that divides the inputs, but at most `rotation`; 1: none.

    Raises:
        InputError: `group` does not divide the inputs, or a weight is not finite.
    """
    inputs, largest = linear.in_features, 2 ** (bits - 1) - 1
    if inputs % (group or inputs) or (bits == 4 and inputs % 2):
        raise InputError(f"{inputs} inputs cannot be cut into groups of {group or inputs} for {bits} bits")
    block = min(inputs & -inputs, rotation)
    weight_OI = rotated(linear.weight.detach().float(), block)
    if not weight_OI.isfinite().all():
        raise InputError("a weight is not finite")
    weight_OGi = weight_OI.view(len(weight_OI), -1, group or inputs)
    scales_OG = weight_OGi.abs().amax(-1) / largest
    divisor_OG1 = scales_OG.masked_fill(scales_OG == 0, 1)[..., None]  # the codes of a group of zeros are zeros
    codes_OI = (weight_OGi / divisor_OG1).round().to(torch.int8).view(weight_OI.shape)
    if bits == 4:
        shifted = (codes_OI + 8).to(torch.uint8)
        codes_OI = shifted[:, ::2] | shifted[:, 1::2] << 4
    return QuantizedLinear(codes_OI, scales_OG, None if linear.bias is None else linear.bias.detach(), block)


def quantize_layers(network: Any, bits: int = 8, group: int | None = None, rotation: int = 1) -> None:
    """Quantises every linear layer of the decoder's blocks, in place. Embeddings, norms and pooling block stay.

    Call it before the network is accelerated. `group` and `rotation` are those of `quantized`. Raises InputError, and
    names the layer, where one cannot be quantised.
    """
    backbone = network.backbone
    for name, linear in list(backbone.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            try:
                made = quantized(linear, bits, group, rotation)
            except InputError as error:
                raise InputError(f"{name}: {error}") from None
            setattr(backbone.get_submodule(parent), leaf, made.train(linear.training))
    network.requires_grad_(False)


def in_few_bits(network: nn.Module) -> bool:
    """Says whether layers of this network are quantised."""
    return any(isinstance(module, QuantizedLinear) for module in network.modules())


def widen(network: Any) -> None:
    """Has a quantised network compute in float32 between its linear layers, in place.

    Norms become float32, and so does what the embedding gives: so the sums of all blocks are rounded least. The
    embedding itself is held in 16 bits, and the pooling block stays as it is.
    """
    table = network.backbone.get_input_embeddings()
    if table.weight.dtype == torch.float32:
        table.weight.data = table.weight.data.bfloat16()
    table.register_forward_hook(_in_float32)
    for module in network.backbone.modules():
        for parameter in module.parameters(recurse=False):
            if module is not table:
                parameter.data = parameter.data.float()


def _in_float32(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.float()
