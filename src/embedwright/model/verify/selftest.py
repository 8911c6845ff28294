"""Records token ids and vectors of a few texts beside a saved model, and checks them whenever it is loaded.

This finds what breaks only on another machine or with another version of a library: a tokenizer that is rebuilt with
other rules, weights that were merged twice, a template or a pooling that was edited.

Vectors are computed in float32 from the weights as stored: in 16 bits the vectors of a deep model may turn by a third
on another processor.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from embedwright.cpu.accelerate import stock
from embedwright.errors import InputError, as_input_error
from embedwright.model.backbone import equal_but_for_type
from embedwright.model.network import EmbedwrightModel
from embedwright.model.pooling import pool_tokens
from embedwright.model.quantized import has_quantized_layers, sliced
from embedwright.model.verify.modes import evaluating
from embedwright.model.verify.probe import ProbeError
from embedwright.packing import pack
from embedwright.text import TextTokenizer, TokenizedText, tokenize

FILE = "selftest.json"
TASK = "Given a question, retrieve passages that answer it"
# (text, whether it is a query): capitals, spaces, accents, other scripts, digits, a special token as text
TEXTS = (
    ("How do tides work?", True),
    ("  The Moon's gravity, 1,234 km away,\n\tpulls the oceans.", False),
    ("naïve café 漢字 🙂 </s>", False),
    ("x", True),
)
_DIMS = 64  # leading dimensions recorded: enough to tell models apart, few enough to read
_TOLERANCE = 1e-4
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Reload = Callable[[torch.dtype], EmbedwrightModel]  # the same folder, in this type
Result = tuple[bool, str] | None  # whether a proof holds, and the number that says so; None: does not apply


def proof_max_tokens(network: EmbedwrightModel) -> int:
    """Returns a token limit that cuts no text or instruction of a proof, even if the model's own is shorter."""
    return min(max(network.contract.max_tokens, 256), network.longest)


def write(network: EmbedwrightModel, tokenizer: TextTokenizer, folder: Path) -> None:
    """Records the model's ids and vectors in `folder`."""
    rows = []
    for (text, _), tokens, vector in zip(TEXTS, *_computed(network, tokenizer), strict=True):
        kept = [round(float(x), 7) for x in vector[:_DIMS]]
        rows.append({"text": text, "ids": tokens.ids.tolist(), "pooled": int(tokens.pool.sum()), "vector": kept})
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in rows)
    dtype = str(next(network.backbone.parameters()).dtype).removeprefix("torch.")
    head = f'"dtype": "{dtype}", "computed_in": "float32", "task": {json.dumps(TASK)}'
    (folder / FILE).write_text(f'{{{head}, "texts": [\n  {lines}\n]}}\n', encoding="utf-8")


def compare(network: EmbedwrightModel, tokenizer: TextTokenizer, folder: Path, reload: Reload) -> Result:
    """Compares the model with what `write` recorded in `folder`; None if nothing was recorded.

    If the network's dtype is not the recorded one, the folder is reloaded in the recorded dtype. Then the reloaded
    network must match the record, and each weight of `network` must equal the reloaded one up to rounding.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    with as_input_error(file, "is not a selftest record"):
        stored = json.loads(file.read_text(encoding="utf-8"))
        dtype = _DTYPES[stored["dtype"]]
        rows = [(row["text"], row["ids"], row["pooled"]) for row in stored["texts"]]
        expected = np.array([row["vector"] for row in stored["texts"]], dtype=np.float32)
        if expected.ndim != 2 or len(expected) != len(TEXTS) or expected.shape[1] > network.backbone.config.hidden_size:
            raise InputError(f"{file} has vectors of the shape {expected.shape}, not those of {len(TEXTS)} texts")
    held = network
    if next(network.backbone.parameters()).dtype != dtype:
        held = reload(dtype)
        if (weight := _other_weight(network, held)) is not None:
            return False, f"{weight} is not what is stored, rounded"
    texts, vectors = _computed(held, tokenizer)
    for (text, ids, pooled), tokens in zip(rows, texts, strict=True):
        if ids != tokens.ids.tolist() or pooled != int(tokens.pool.sum()):
            return False, f"other token ids than when saved, for {text!r}"
    difference = float(np.abs(vectors[:, : expected.shape[1]] - expected).max())
    return difference <= _TOLERANCE, f"largest difference {difference:.1e}"


def _other_weight(network: EmbedwrightModel, stored: EmbedwrightModel) -> str | None:
    a, b = ({**dict(one.named_parameters()), **dict(one.named_buffers())} for one in (network, stored))
    same = {name for name in a.keys() & b.keys() if equal_but_for_type(a[name].cpu(), b[name].cpu())}
    return min((a.keys() | b.keys()) - same, default=None)


def check(network: EmbedwrightModel, tokenizer: TextTokenizer, folder: Path, reload: Reload) -> None:
    """Raises ProbeError if token ids or vectors differ from those recorded in `folder`. Passes if there is no record.

    `reload(dtype)` reads the network again in the dtype of the record, where it was loaded in another.
    """
    ok, detail = compare(network, tokenizer, folder, reload) or (True, "")
    if not ok:
        raise ProbeError(f"{folder} does not give the vectors that it was saved with: {detail}")


@torch.inference_mode()
def _computed(network: EmbedwrightModel, tokenizer: TextTokenizer) -> tuple[list[TokenizedText], NDArray[np.float32]]:
    contract = network.contract
    limit = proof_max_tokens(network)
    texts = [tokenize(tokenizer, contract, [t], contract.prefix(TASK if q else None), limit)[0] for t, q in TEXTS]
    packed = pack(texts).to(network.device)
    exact = {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    if exact and not network.mixed and not has_quantized_layers(network):
        with evaluating(network):
            return texts, network.embed(packed).cpu().numpy()
    with stock(network) as twin, _in_float32(twin):
        twin.mixed = False  # that of a network that trains in bf16
        states_TD = twin.head(twin.hidden(packed).float(), packed)
        vectors_NE = F.normalize(pool_tokens(states_TD, packed, twin.pooling.kind), dim=-1)
    return texts, vectors_NE.cpu().numpy()


@contextmanager
def _in_float32(twin: EmbedwrightModel) -> Iterator[None]:
    """Within the block the modules of this twin compute in float32, from their weights as they are.

    Embeddings cast what they look up, and linear layers a slice of their weights at a time, so that no large matrix is
    copied whole. Any other module casts its weights when it is called, and puts them back after.
    """

    def cast(module: nn.Module, _: Any) -> None:
        kept.append(dict(module._parameters))
        for name, weight in module._parameters.items():
            if weight is not None and weight.is_floating_point() and type(module) not in (nn.Embedding, nn.Linear):
                module._parameters[name] = nn.Parameter(weight.detach().float(), requires_grad=False)

    def put_back(module: nn.Module, _: Any, output: Any) -> Any:
        module._parameters.update(kept.pop())
        return output.float() if type(module) is nn.Embedding and isinstance(output, Tensor) else None

    def linear(module: nn.Linear, input: Tensor) -> Tensor:
        return sliced(input, lambda rows: module.weight[rows].float(), module.weight.shape, module.bias)

    kept: list[dict[str, Any]] = []
    hooks = []
    for module in twin.modules():
        if type(module) is nn.Linear:
            vars(module)["forward"] = partial(linear, module)
        hooks.append(module.register_forward_pre_hook(cast))
        hooks.append(module.register_forward_hook(put_back, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
