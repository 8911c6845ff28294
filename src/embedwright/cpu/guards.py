"""When a faster form may stand in for a stock module, and when the stock code must run."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as all_modules

Original = tuple[Any, str, Any]  # owner (a class or module), name, the function that was there


def infers(module: nn.Module, known: tuple[Original, ...], *tensors: Tensor) -> bool:
    """Whether a faster form may take these `usable` tensors for a stock module: without a gradient, in evaluation mode.

    `known` is the stock code that it stands in for. GradCache's first pass has no gradient either, but is in training
    mode: it needs the numbers, and the dropout, of the second.
    """
    return not module.training and not torch.is_grad_enabled() and unchanged(known) and usable(*tensors)


def usable(*tensors: Tensor) -> bool:
    """Whether these are plain tensors on a CPU that are computed now, outside of autocast: all float32 or all bfloat16,
    the first not empty."""
    return (
        computed_now(*tensors)
        and all(x.device.type == "cpu" and x.dtype == tensors[0].dtype for x in tensors)
        and tensors[0].dtype in (torch.float32, torch.bfloat16)
        and tensors[0].numel() > 0
        and not torch.is_autocast_enabled("cpu")
    )


def computed_now(*tensors: Tensor) -> bool:
    """Whether these are plain tensors, and nothing traces or transforms what is done with them.

    Compile, export, jit, fake tensors, vmap, forward gradients and dispatch modes do. C code sees addresses only, which
    are those of nothing then, or it leaves the trace without its step.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, nn.Parameter) for x in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def listened_to(*modules: nn.Module) -> bool:
    """Whether there are hooks on these. What a hook hears of must be called, and what it is handed not written over."""
    return bool(all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks for module in modules
    )


def originals(*named: tuple[Any, str]) -> tuple[Original, ...] | None:
    """The functions of these owners and names. None where one is not of the owner's own file: it is patched."""
    found = tuple((owner, name, vars(owner).get(name)) for owner, name in named)
    return found if all(_genuine(*one) for one in found) else None


def _genuine(owner: Any, name: str, function: Any) -> bool:
    home = owner if isinstance(owner, type(sys)) else sys.modules[owner.__module__]
    return (
        isinstance(function, FunctionType)
        and function.__code__.co_filename == home.__file__
        and function.__code__.co_qualname == (name if owner is home else f"{owner.__qualname__}.{name}")
        and function.__globals__ is vars(home)
    )


def unchanged(known: tuple[Original, ...]) -> bool:
    """Whether each function is still there: a patch after the model was loaded counts as well."""
    return all(getattr(owner, name) is function for owner, name, function in known)


def subclass(make: Any, stock: Any, forward: Any, known: tuple[Original, ...], *how: Any) -> Any:
    """A class like `stock` with another forward, which `make(stock, *how)` gives: how another process finds it, to
    which a model is sent (sentence-transformers' pools). `known`: what it stands in for."""

    def reduced(self: nn.Module, protocol: Any) -> Any:
        return _instance, (make, stock, *how), self.__dict__

    members = {"forward": forward, "stock_class": stock, "known": known, "__reduce_ex__": reduced}
    return type(stock.__name__, (stock,), members)


def _instance(make: Any, *how: Any) -> nn.Module:
    kind = make(*how)
    empty: nn.Module = kind.__new__(kind)
    return empty
