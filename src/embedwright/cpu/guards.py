"""Decides when a faster form may replace a stock module, and when the stock code must run."""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as all_modules

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Original = tuple[Any, str, Any]  # owner (a class or module), name, the function that was there


def is_inference(module: nn.Module, known: tuple[Original, ...], *tensors: Tensor) -> bool:
    """Returns whether a call is plain inference: `usable` tensors, no gradient, evaluation mode, `known` unpatched.

    GradCache's first pass has no gradient either, but it runs in training mode: it needs the numbers and the dropout of
    the second pass.
    """
    return not module.training and not torch.is_grad_enabled() and is_unpatched(known) and usable(*tensors)


def usable(*tensors: Tensor) -> bool:
    """Returns whether a kernel may read these: `on_cpu`, all float32 or all bfloat16, outside of autocast."""
    return (
        on_cpu(*tensors)
        and all(x.dtype == tensors[0].dtype for x in tensors)
        and tensors[0].dtype != torch.float16
        and not torch.is_autocast_enabled("cpu")
    )


def on_cpu(*tensors: Tensor) -> bool:
    """Returns whether these are plain CPU tensors, each of `FLOATS`, the first not empty."""
    return (
        is_eager(*tensors)
        and all(x.device.type == "cpu" and x.dtype in FLOATS for x in tensors)
        and tensors[0].numel() > 0
    )


def is_eager(*tensors: Tensor) -> bool:
    """Returns whether these are plain tensors that nothing traces or transforms.

    Compile, export, jit, fake tensors, vmap, forward gradients and dispatch modes do. C code sees only addresses: under
    these it would read invalid memory, or its step would be missing from the trace.
    """
    return (
        not torch.compiler.is_compiling()
        and all(type(x) in (Tensor, nn.Parameter) for x in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.maybe_current_level() is None
        and torch._C._get_tracing_state() is None
        and forward_ad._current_level < 0
    )


def has_hooks(*modules: nn.Module) -> bool:
    """Returns whether any of these modules has a hook. It must then be called, and its output not be overwritten."""
    return bool(all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks for module in modules
    )


def stock_functions(*named: tuple[Any, str]) -> tuple[Original, ...] | None:
    """Returns the functions of these owners and names. None if one comes from another file, so it is patched."""
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


def is_unpatched(known: tuple[Original, ...]) -> bool:
    """Returns whether each function is still in place. A patch after the load counts as well."""
    return all(getattr(owner, name) is function for owner, name, function in known)


def subclass(make: Any, stock: Any, forward: Any, known: tuple[Original, ...], *how: Any) -> Any:
    """Makes a subclass of `stock` with another forward. `known` is the stock code that it replaces.

    `make(stock, *how)` must give this class again: that is how it is unpickled in another process, as in the pools of
    sentence-transformers.
    """

    def reduced(self: nn.Module, protocol: Any) -> Any:
        return _instance, (make, stock, *how), self.__dict__

    members = {"forward": forward, "stock_class": stock, "known": known, "__reduce_ex__": reduced}
    return type(stock.__name__, (stock,), members)


def _instance(make: Any, *how: Any) -> nn.Module:
    kind = make(*how)
    empty: nn.Module = kind.__new__(kind)
    return empty
