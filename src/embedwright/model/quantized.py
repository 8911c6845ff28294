"""Linear layers that hold their weights in 8 or 4 bits, put in place of those of a decoder's blocks.

A weight is an int8 value times the scale of its output channel. In 4 bits, that int8 value is itself the product of a
code and the step of its group, which are neighbouring inputs of the channel (as in QServe, arXiv 2405.04532). So both
kinds can be multiplied in int8.

O outputs, I inputs, G groups, i inputs of a group.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor, nn

from embedwright.errors import InputError, error_prefix

logger = logging.getLogger(__name__)

QUANTIZED = (
    'quantised weights do not train: load the model without dtype="int8"; of a compressed folder, train the model that '
    "it was made from, and compress that"
)
GROUP = 32  # inputs that share a step
ROTATION = 64  # inputs rotated together before rounding to int8: on a trained model, a sixth of the error without it
_SLICE = 2**20  # weights that are made at a time: they stay in the processor's caches
_MAPPED = 2**25 + 2**12  # bytes
_LARGEST_STEP = 15  # times a code, at most -8, it is within int8
_TRIED = 3  # steps that are tried for a group, down from the one that cuts none of its weights

Bits = Literal[4, 8]


class Scheme(BaseModel):
    """How the weights of a model are quantised, as its config.json says.

    `rotation` is the largest block of inputs that is `rotated`. `folded`: the latent block is stored folded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: Bits
    rotation: int = Field(default=1, ge=1)
    folded: bool = False

    @field_validator("rotation")
    @classmethod
    def _power_of_2(cls, value: int) -> int:
        if value & (value - 1):
            raise ValueError("must be a power of 2")
        return value


INT8, INT4 = Scheme(bits=8, rotation=ROTATION), Scheme(bits=4, rotation=ROTATION)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight (O, I) is held as integers and scales. It is for inference alone.

    `scales` is float32 (O, 1), `bias` (O,) or None. With 8 bits, `codes` is int8 (O, I) and `steps` None. With 4 bits,
    `steps` is int8 (O, G); `codes` is uint8 (O, I/2), each code plus 8, and a byte holds those of input k in its low
    half and of input k + I/2 in its high half. What they stand for is the weight as `rotated` in blocks of `rotation`
    inputs; with 1 it is the weight itself.
    """

    codes: Tensor
    scales: Tensor
    steps: Tensor | None
    bias: Tensor | None

    def __init__(
        self, codes: Tensor, scales: Tensor, steps: Tensor | None, bias: Tensor | None, rotation: int = 1
    ) -> None:
        super().__init__()
        self.rotation = rotation
        for name, tensor in (("codes", codes), ("scales", scales), ("steps", steps), ("bias", bias)):
            self.register_buffer(name, tensor)

    @property
    def bits(self) -> Bits:
        return 8 if self.steps is None else 4

    @property
    def in_features(self) -> int:
        return int(self.codes.shape[1]) * 8 // self.bits

    @property
    def out_features(self) -> int:
        return len(self.codes)

    @property
    def shape(self) -> tuple[int, int]:
        """Returns the shape of the weight, (O, I)."""
        return self.out_features, self.in_features

    def int8_weight(self, rows: slice = slice(None)) -> Tensor:
        """Returns the weight divided by its scales, or some of its rows: int8 (O, I)."""
        codes = self.codes[rows]
        if self.steps is None:
            return codes
        half, shape = codes.shape[1], (len(codes), self.in_features)
        bytes_OI = _mapped_empty(shape, codes)
        torch.bitwise_and(codes, 15, out=bytes_OI[:, :half])
        torch.bitwise_right_shift(codes, 4, out=bytes_OI[:, half:])
        int8_OI, steps_OG = bytes_OI.view(torch.int8).sub_(8), self.steps[rows]
        int8_OI.view(*steps_OG.shape, -1).mul_(steps_OG[..., None])
        return int8_OI

    def dequantized(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """Returns the weight (O, I), or some of its rows, in this type. It is rounded once."""
        int8_OI, scales_O1 = self.int8_weight(rows), self.scales[rows]
        exact = _mapped_empty(int8_OI.shape, scales_O1)
        exact.copy_(int8_OI).mul_(scales_O1)  # a product of the two would make another copy, of floats
        if self.rotation > 1:
            matrix = rotated(torch.eye(self.rotation, device=exact.device, dtype=exact.dtype), self.rotation)
            turned = _mapped_empty(int8_OI.shape, scales_O1)
            torch.mm(exact.view(-1, self.rotation), matrix, out=turned.view(-1, self.rotation))
            exact = turned
        return exact.to(dtype)

    def forward(self, input: Tensor) -> Tensor:
        return sliced(input, lambda rows: self.dequantized(input.dtype, rows), self.shape, self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves the layer as any module, but leaves its types alone: scales in 16 bits would be other weights."""

        def moved(x: Tensor) -> Tensor:
            made = fn(x)
            return made if made.dtype == x.dtype else x.to(made.device)

        apply: Any = super()._apply  # torch leaves it untyped
        return apply(moved, recurse)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, rotation={self.rotation}"


def _mapped_empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Makes an empty tensor of this shape, of the type of another, in memory that the system maps for it alone.

    glibc maps blocks of more than 32 MB. Smaller ones come from the heap: small tensors that are kept would fill the
    gaps that they leave, and the heap would grow by the float weights of all layers. Pages are real once written to.
    """
    numbers = math.prod(shape)
    return like.new_empty(max(numbers, _MAPPED // like.element_size()))[:numbers].view(tuple(shape))


def sliced(input: Tensor, weight: Callable[[slice], Tensor], shape: tuple[int, ...], bias: Tensor | None) -> Tensor:
    """Computes what a linear layer with a weight of this shape (O, I) does, and never holds all of that.

    `weight(rows)` makes some of its rows.
    """
    made = [
        F.linear(input, weight(rows), None if bias is None else bias[rows].to(input.dtype)) for rows in slices(shape)
    ]
    return made[0] if len(made) == 1 else torch.cat(made, -1)


def slices(shape: tuple[int, ...]) -> Iterator[slice]:
    """Yields the rows of a weight, a few at a time, in multiples of 16."""
    step = max(16, _SLICE // shape[1] // 16 * 16)
    return (slice(start, start + step) for start in range(0, shape[0], step))


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


def quantized(linear: nn.Linear, scheme: Scheme) -> QuantizedLinear:
    """Makes a `QuantizedLinear` of a linear layer, a few rows at a time.

    Raises:
        InputError: The inputs cannot be cut into groups, or a weight is not finite.
    """
    made = empty_quantized(linear, scheme, linear.weight.device)
    for rows in slices(linear.weight.shape):
        part_OI = rotated(linear.weight[rows].detach().float(), made.rotation)
        if not part_OI.isfinite().all():
            raise InputError("a weight is not finite")
        largest_O1 = part_OI.abs().amax(1, keepdim=True)
        if made.steps is None:
            made.scales[rows] = largest_O1 / 127
            made.codes[rows] = (part_OI / _never_zero(made.scales[rows])).round_().to(torch.int8)
        else:
            made.scales[rows] = largest_O1 / (8 * _LARGEST_STEP)
            in_units_OI = part_OI / _never_zero(made.scales[rows])
            codes_OI, made.steps[rows] = _four_bits(in_units_OI.view(len(part_OI), -1, GROUP))
            low, high = (codes_OI + 8).to(torch.uint8).chunk(2, 1)
            made.codes[rows] = low | high << 4
    return made


def _four_bits(x_OGi: Tensor) -> tuple[Tensor, Tensor]:
    """Returns codes from -8 to 7 (O, I) and steps (O, G), so that their products are near x, -120 to 120.

    A step may be negative, so that the largest number of its group becomes -8. Steps are tried down from the one that
    reaches that number: the least squared error wins. Each number becomes the nearest code.
    """
    largest_OG1 = x_OGi.gather(-1, x_OGi.abs().argmax(-1, keepdim=True))
    reach_OG1 = (largest_OG1.abs() / 8).ceil()
    best = least = None
    for less in range(_TRIED):
        step_OG1 = (reach_OG1 - less).clamp_(1, _LARGEST_STEP).copysign_(-largest_OG1)
        codes_OGi = (x_OGi / step_OG1).round_().clamp_(-8, 7)
        error_OG1 = (codes_OGi * step_OG1).sub_(x_OGi).square_().sum(-1, keepdim=True)
        if best is None or least is None:
            best, least = (codes_OGi, step_OG1), error_OG1
        else:
            better_OG1 = error_OG1 < least
            best = torch.where(better_OG1, codes_OGi, best[0]), torch.where(better_OG1, step_OG1, best[1])
            least = torch.where(better_OG1, error_OG1, least)
    assert best is not None
    return best[0].flatten(1), best[1][..., 0].to(torch.int8)


def _never_zero(x: Tensor) -> Tensor:
    """Replaces zeros by ones: the codes of a channel of zeros are zero by any divisor."""
    return x.masked_fill(x == 0, 1)


def empty_quantized(linear: nn.Linear, scheme: Scheme, device: torch.device | None = None) -> QuantizedLinear:
    """Makes a quantised layer for a linear one, without values but its bias. Raises InputError as `quantized`."""
    outputs, inputs = linear.weight.shape
    four = scheme.bits == 4
    if four and inputs % GROUP:
        raise InputError(f"its {inputs} inputs cannot be cut into groups of {GROUP}, as 4 bits need it: take 8 bits")
    steps = torch.empty(outputs, inputs // GROUP, dtype=torch.int8, device=device) if four else None
    width, kind = (inputs // 2, torch.uint8) if four else (inputs, torch.int8)
    codes = torch.empty(outputs, width, dtype=kind, device=device)
    scales = torch.empty(outputs, 1, dtype=torch.float32, device=device)
    bias = None if linear.bias is None else linear.bias.detach().float()
    return QuantizedLinear(codes, scales, steps, bias, min(inputs & -inputs, scheme.rotation))


def quantize_layers(network: Any, scheme: Scheme = INT8) -> None:
    """Quantises every linear layer of the decoder's blocks, in place. Embeddings, norms and pooling block stay.

    Call it before the network is accelerated. Raises InputError, and names the layer, where one cannot be quantised.
    """
    _replace(network.backbone, lambda linear: quantized(linear, scheme))
    network.requires_grad_(False)


def replace_with_empty(backbone: nn.Module, scheme: Scheme) -> None:
    """Replaces all linear layers by quantised ones without values. InputError names a layer."""
    _replace(backbone, lambda linear: empty_quantized(linear, scheme))


def _replace(backbone: nn.Module, make: Callable[[nn.Linear], QuantizedLinear]) -> None:
    for name, linear in list(backbone.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            with error_prefix(name):
                made = make(linear)
            setattr(backbone.get_submodule(parent), leaf, made.train(linear.training))


def has_quantized_layers(network: nn.Module) -> bool:
    """Returns whether layers of this network are quantised."""
    return any(isinstance(module, QuantizedLinear) for module in network.modules())


def warn_of_gpu(network: nn.Module) -> None:
    """Logs a warning where layers of this network, which is on a GPU, are quantised."""
    if has_quantized_layers(network):
        logger.warning("quantised weights are dequantised for each batch on a GPU: bfloat16 is faster")


def compute_in_float32(network: Any) -> None:
    """Has a quantised network compute in float32 between its linear layers, in place.

    Norms become float32, and so does what the embedding gives: so the sums of all blocks are rounded least. The
    embedding itself is held in bfloat16, and the pooling block stays as it is.
    """
    table = network.backbone.get_input_embeddings()
    if table.weight.dtype != torch.bfloat16:
        table.weight.data = table.weight.data.bfloat16()
    table.register_forward_hook(_in_float32)
    for module in network.backbone.modules():
        for parameter in module.parameters(recurse=False):
            if module is not table:
                parameter.data = parameter.data.float()


def _in_float32(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return output.float()
