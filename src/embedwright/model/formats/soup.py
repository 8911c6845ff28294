"""Model soups: merges several fine-tunes of one base, tensor by tensor, by an average or by slerp.

Averages: Wortsman et al. 2022 (arXiv 2203.05482). Slerp is the arc between two directions (Shoemake 1985), taken for
each tensor as mergekit does it and as Qwen3-Embedding was merged (arXiv 2506.05176). Memory holds one file of the
result, whatever the number of models.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, get_args

import torch
from torch import Tensor

from embedwright.errors import InputError, NotFoundError, check_choice
from embedwright.files import check_new_folder, whole_folder, write_json, write_text
from embedwright.fingerprint import Facts, config_facts, facts, tokenizer_fact
from embedwright.locate import local
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import detect, history_file, history_of, is_quantized
from embedwright.model.formats.folder import INDEX, SAVED, Stored, read_object, weights_in, write_weights
from embedwright.model.formats.open import outline
from embedwright.model.interop.card import card_of, inherited, model_card
from embedwright.model.interop.card import facts as card_facts
from embedwright.model.verify import selftest

How = Literal["average", "slerp"]
Weights = dict[str, Stored]  # by the tensor's name

_SHARD = "1GB"
_PIECE = 2**22  # numbers of a tensor at a time
_MADE_ANEW = ("*.safetensors", INDEX, selftest.FILE)  # all else that `save` writes is the first model's
_STRAIGHT = 0.9995  # cosine from which an arc is a line, as in mergekit
# Fine-tunes of one base keep nearly all of its direction; weights that began from other random numbers share none.
_KIN, _KIN_ROWS = 0.5, 64


def soup(
    models: Sequence[str | Path], out: str | Path, *, how: How = "average", weights: Sequence[float] | None = None
) -> None:
    """Writes a new model folder with a mean of the weights of two or more models.

    `models` are folders that `save` wrote; adapters are merged first. `weights` says what each model counts (their sum
    is made 1); None: all the same. Slerp of two goes `weights[1]` of the way from the first. Sums are made in float32
    of 16-bit weights, in float64 of others, and rounded once, to the type of the first model. The result is opened,
    probed and given its own `selftest.json`, and a card with what the models' cards agree on.

    Raises ValueError if models differ in architecture, tokenizer, contract or pooling, naming the key; where a backbone
    or pooling block began from other numbers than the first's; and for weights that make no average. FileExistsError if
    `out` is not empty.
    """
    names = [str(model) for model in models]
    factors = _factors(len(names), how, weights)
    check_new_folder(out)
    with whole_folder(out) as temp:
        with TemporaryDirectory(prefix=".merged-", dir=temp) as scratch:
            folders = [_plain(name, Path(scratch) / str(i)) for i, name in enumerate(names)]
            parts = [weights_in(folder) for folder in folders]
            for name, folder, part in zip(names[1:], folders[1:], parts[1:], strict=True):
                both = f"{names[0]} and {name} do not go together"
                _check_facts(both, folders[0], folder)
                _check_weights(both, parts[0], part)
            for file in (file for pattern in SAVED for file in folders[0].glob(pattern)):
                if not any(file.match(pattern) for pattern in _MADE_ANEW):
                    target = temp / file.relative_to(folders[0])
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(file, target)
            planned = {name: torch.empty_like(parts[0][name].read(), device="meta") for name in sorted(parts[0])}
            write_weights(
                temp, planned, lambda name: _mixed(name, [part[name].read() for part in parts], factors, how), _SHARD
            )
            history = history_of(folders[0])  # the first model's history; the soup has other vectors
        if history:
            file = history_file(temp)
            step = {"step": "soup", "of": ", ".join(Path(name).name for name in names)}
            write_json(file, read_object(file) | {"history": [*history, step]})
        model = Embedder.load(temp, device="cpu")
        selftest.write(model.network, model.text_tokenizer, temp)
        card = model_card(Path(out).name, **card_facts(model.network, model.text_tokenizer))
        write_text(temp / "README.md", inherited(card, [card_of(name) for name in names]))


def _factors(models: int, how: How, weights: Sequence[float] | None) -> list[float]:
    """Returns the weight of each model; they sum to 1."""
    check_choice("how", how, get_args(How))
    if models < 2:
        raise InputError(f"a soup is made of two models or more, not of {models}")
    if how == "slerp" and models != 2:
        raise InputError(f"slerp is between two models, not {models}: use average")
    given = [1.0] * models if weights is None else [float(weight) for weight in weights]
    if len(given) != models:
        raise InputError(f"weights: {len(given)} for {models} models")
    if not all(math.isfinite(weight) and weight > 0 for weight in given):
        raise InputError(f"weights={given}: all must be positive")
    return [weight / sum(given) for weight in given]


def _plain(name: str, scratch: Path) -> Path:
    """Returns the folder of a whole model: that of this name, or `scratch` with its adapters merged."""
    folder = local(name)
    if folder is None:
        raise NotFoundError(f"model folder {name} does not exist")
    form = detect(str(folder))[1]
    if form == "adapter":
        Embedder.load(folder).merge().save(scratch)
        return scratch
    if is_quantized(folder):
        raise InputError(f"{name}: quantised weights have no average: merge the models that they were made from")
    if form not in ("ours", "stock"):
        raise InputError(f"{name} is not a folder that Embedder.save wrote: open it with Embedder.load and save that")
    return folder


# ---- whether the models go together


def _check_facts(both: str, first: Path, other: Path) -> None:
    """Raises InputError if decoder, contract, pooling or tokenizer differ, naming the key."""
    a, b = _facts(first), _facts(other)
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            raise InputError(f"{both}: {key} is {a.get(key)} in the first and {b.get(key)} in the second")


def _facts(folder: Path) -> Facts:
    decoder, pooling, contract, tokenizer = outline(str(folder))
    return {
        "tokenizer": tokenizer_fact(tokenizer.backend_tokenizer, with_specials=True),
        **config_facts(decoder),
        **facts("contract", contract.model_dump(mode="json")),
        **facts("pooling", pooling.model_dump(mode="json")),
    }


def _check_weights(both: str, a: Weights, b: Weights) -> None:
    """Raises InputError if names or shapes differ, or if the models have no common start: their sum would be noise."""
    if odd := sorted(a.keys() ^ b.keys()):
        raise InputError(f"{both}: only one of them has {odd[0]}")
    for name in sorted(a):
        if a[name].shape != b[name].shape:
            shapes = list(a[name].shape), list(b[name].shape)
            raise InputError(f"{both}: {name} is {shapes[0]} in the first and {shapes[1]} in the second")
    matrices = [name for name in sorted(a) if len(a[name].shape) > 1]
    for what, needs in (
        ("backbone", "the same base"),
        ("pooling block", "the same seed, or one stage that both went on from"),
    ):
        names = [name for name in matrices if name.startswith("head.") == (what == "pooling block")]
        products = [_products(a[name].read(_KIN_ROWS), b[name].read(_KIN_ROWS)) for name in names]
        if products and (cosine := _cosine(torch.stack(products).sum(0))) < _KIN:
            raise InputError(
                f"{both}: the weights of the {what} have little in common (cosine {cosine:.2f}), so no sum of them is "
                f"a model. They need {needs}"
            )


# ---- sums


def _mixed(name: str, tensors: list[Tensor], factors: Sequence[float], how: How) -> Tensor:
    first = tensors[0]
    if all(torch.equal(first, other) for other in tensors[1:]):  # frozen while they were trained
        return first.clone()
    if not first.is_floating_point():
        raise InputError(f"{name} holds whole numbers that differ between the models: they have no average")
    if how == "slerp":
        factors = _arc(first, tensors[1], factors[1])
    wide = torch.float32 if first.element_size() == 2 else torch.float64
    result = torch.empty_like(first, memory_format=torch.contiguous_format)
    pieces = zip(result.view(-1).split(_PIECE), *(t.reshape(-1).split(_PIECE) for t in tensors), strict=True)
    for target, *sources in pieces:
        total = torch.zeros_like(target, dtype=wide)
        for factor, source in zip(factors, sources, strict=True):
            total.add_(source.to(wide), alpha=factor)
        target.copy_(total)
    if not result.isfinite().all():
        raise InputError(f"{name}: the result is not finite in {first.dtype}")
    return result


def _arc(a: Tensor, b: Tensor, way: float) -> tuple[float, float]:
    """Returns the factors of a and b whose sum lies `way` of the angle from a to b."""
    cosine = _cosine(_products(a, b))
    if abs(cosine) > _STRAIGHT:
        return 1 - way, way
    angle = math.acos(cosine)
    return math.sin((1 - way) * angle) / math.sin(angle), math.sin(way * angle) / math.sin(angle)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Returns (3,) float64: a.b, a.a and b.b."""
    total = torch.zeros(3, dtype=torch.float64)
    for x, y in zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True):
        x, y = x.double(), y.double()
        total += torch.stack((x @ y, x @ x, y @ y))
    return total


def _cosine(products: Tensor) -> float:
    """Returns the cosine; 1.0 if one of the two tensors is zero, since it has no direction to differ in."""
    ab, aa, bb = products.tolist()
    lengths = math.sqrt(aa) * math.sqrt(bb)
    return max(-1.0, min(1.0, ab / lengths)) if lengths else 1.0
