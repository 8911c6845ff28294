"""Model soups: several fine-tunes of one base as one model, tensor by tensor, by an average or by slerp.

Averages: Wortsman et al. 2022 (arXiv 2203.05482). Slerp, the arc between two directions (Shoemake 1985), once a tensor
as mergekit does it and as Qwen3-Embedding was merged (arXiv 2506.05176). Weights are read and written a piece at a
time, so that memory holds one file of the result, whatever the number of models.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from embedwright.errors import InputError, NotFoundError
from embedwright.files import check_new_folder, whole_folder, write_json
from embedwright.locate import local
from embedwright.model.embedder import Embedder
from embedwright.model.formats.folder import Stored, check_folder, weights_in
from embedwright.model.formats.storage import form_of
from embedwright.model.verify import selftest

How = Literal["average", "slerp"]
Files = Mapping[str, Stored]  # by the tensor's name

_WEIGHTS, _SHARD = "model{suffix}.safetensors", "1GB"
_PIECE = 2**22  # numbers of a tensor at a time
_COPIED = {".json", ".model", ".jinja"}  # of the first model: config, contract, tokenizer, sentence-transformers' files
_NOT_COPIED = {"model.safetensors.index.json", selftest.FILE}
_NOT_COMPARED = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # no property of the weights
_STRAIGHT = 0.9995  # cosine from which an arc is a line, as in mergekit
# Fine-tunes of one base keep nearly all of its direction; weights that began from other random numbers share none.
_KIN, _KIN_ROWS = 0.5, 64


def soup(
    models: Sequence[str | Path], out: str | Path, *, how: How = "average", weights: Sequence[float] | None = None
) -> None:
    """Write a new model folder whose every weight is the average of those of `models`, or lies between two by slerp.

    `models`: two or more folders that `save` wrote; adapters are merged first. `weights`: what each counts (their sum
    is made 1); None: all the same. Slerp of two goes `weights[1]` of the way from the first. Sums are made in float32
    of 16-bit weights, in float64 of others, and rounded once, to the type of the first model. The result is opened,
    probed and given its own `selftest.json`.

    ValueError where models differ in architecture, tokenizer, contract or pooling, naming the key; where a backbone or
    pooling block began from other numbers than the first's; and for weights that make no average. FileExistsError where
    `out` is not empty.
    """
    names = [str(model) for model in models]
    shares = _shares(len(names), how, weights)
    check_new_folder(out)
    with whole_folder(out) as temp:
        with TemporaryDirectory(prefix=".merged-", dir=temp) as scratch:
            folders = [_plain(name, Path(scratch) / str(i)) for i, name in enumerate(names)]
            parts = [weights_in(folder) for folder in folders]
            for name, folder, files in zip(names[1:], folders[1:], parts[1:], strict=True):
                _check_settings(names[0], folders[0], name, folder)
                _check_weights(names[0], parts[0], name, files)
            _copy_settings(folders[0], temp)
            _write_weights(parts, shares, how, temp)
        model = Embedder.load(temp, device="cpu")
        selftest.write(model.network, model.text_tokenizer, temp)


def _shares(models: int, how: How, weights: Sequence[float] | None) -> list[float]:
    if how not in ("average", "slerp"):
        raise InputError(f"how={how!r} is none of average, slerp")
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


# ---- what goes in


def _plain(name: str, scratch: Path) -> Path:
    """The folder of a whole model: that of this name, or `scratch` with its adapters merged."""
    folder = local(name)
    if folder is None:
        raise NotFoundError(f"model folder {name} does not exist")
    check_folder(folder)
    form = form_of(folder, name)
    if form == "adapter":
        Embedder.load(folder).merge().save(scratch)
        return scratch
    if form not in ("ours", "stock"):
        raise InputError(f"{name} is no folder that Embedder.save wrote: open it with Embedder.load and save that")
    return folder


def _read(files: Files, name: str, rows: int | None = None) -> Tensor:
    with safe_open(files[name].file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name) if rows is None else opened.get_slice(name)[:rows]
    return tensor


def _shape(files: Files, name: str) -> list[int]:
    return list(files[name].shape)


# ---- whether it goes together


def _check_settings(first: str, first_folder: Path, name: str, folder: Path) -> None:
    a, b = _settings(first_folder), _settings(folder)
    for key in sorted(a.keys() | b.keys()):
        if a.get(key) != b.get(key):
            raise InputError(
                f"{first} and {name} do not go together: {key} is {_short(a.get(key))}, and {_short(b.get(key))}"
            )


def _settings(folder: Path) -> dict[str, Any]:
    """Dotted key -> value of config, contract, pooling and tokenizer."""
    files = {"config.json": "", "embedwright.json": "", "tokenizer.json": "tokenizer."}
    read = {file: json.loads((folder / file).read_text()) for file in files if (folder / file).is_file()}
    for key in ("truncation", "padding"):  # how the last batch was made
        read.get("tokenizer.json", {}).pop(key, None)
    return {key: value for file, content in read.items() for key, value in _flat(content, files[file])}


def _flat(content: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif key not in _NOT_COMPARED:
            yield f"{prefix}{key}", value


def _short(value: Any) -> str:
    written = repr(value)
    return written if len(written) <= 60 else f"{written[:57]}..."


def _check_weights(first: str, a: Files, name: str, b: Files) -> None:
    """The same names and shapes; and numbers that come from the same start, without which a sum of them is noise."""
    if odd := sorted(a.keys() ^ b.keys()):
        raise InputError(f"{first} and {name} do not go together: only one of them has {odd[0]}")
    for tensor in sorted(a):
        if _shape(a, tensor) != _shape(b, tensor):
            raise InputError(
                f"{first} and {name} do not go together: {tensor} is {_shape(a, tensor)}, and {_shape(b, tensor)}"
            )
    matrices = [tensor for tensor in sorted(a) if len(_shape(a, tensor)) > 1]
    head = [tensor for tensor in matrices if tensor.startswith("head.")]
    for what, tensors, needs in (
        ("backbone", [tensor for tensor in matrices if tensor not in head], "the same base"),
        ("pooling block", head, "the same seed, or one stage that both went on from"),
    ):
        sums = [_products(*(_read(files, tensor, _KIN_ROWS) for files in (a, b))) for tensor in tensors]
        if sums and (cosine := _cosine(*map(sum, zip(*sums, strict=True)))) < _KIN:
            raise InputError(
                f"{first} and {name} do not go together: the weights of the {what} have little in common "
                f"(cosine {cosine:.2f}), so no sum of them is a model. They need {needs}"
            )


def _products(a: Tensor, b: Tensor) -> tuple[float, float, float]:
    """a.b, a.a and b.b, in float64."""
    total = [0.0, 0.0, 0.0]
    for x, y in zip(a.reshape(-1).split(_PIECE), b.reshape(-1).split(_PIECE), strict=True):
        x, y = x.double(), y.double()
        for i, product in enumerate((x @ y, x @ x, y @ y)):
            total[i] += float(product)
    return total[0], total[1], total[2]


def _cosine(ab: float, aa: float, bb: float) -> float:
    """1.0 where one of them is zero: it has no direction to differ in."""
    lengths = math.sqrt(aa) * math.sqrt(bb)
    return max(-1.0, min(1.0, ab / lengths)) if lengths else 1.0


# ---- what comes out


def _copy_settings(folder: Path, out: Path) -> None:
    for file in (*folder.glob("*"), *folder.glob("[12]_*/*")):  # all that `save` writes
        if file.suffix in _COPIED and file.name not in _NOT_COPIED:
            target = out / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def _write_weights(parts: list[dict[str, Stored]], shares: list[float], how: How, out: Path) -> None:
    # planned without memory, written a shard at a time
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty_like(_read(parts[0], name), device="meta") for name in sorted(parts[0])},
        filename_pattern=_WEIGHTS,
        max_shard_size=_SHARD,
    )
    for file, names in plan.filename_to_tensors.items():
        shard = {name: _mixed(name, [_read(files, name) for files in parts], shares, how) for name in names}
        save_file(shard, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(out / "model.safetensors.index.json", index)


def _mixed(name: str, tensors: list[Tensor], shares: list[float], how: How) -> Tensor:
    first = tensors[0]
    if all(torch.equal(first, other) for other in tensors[1:]):  # frozen while they were trained
        return first.clone()
    if not first.is_floating_point():
        raise InputError(f"{name} holds whole numbers that differ between the models: they have no average")
    factors = _arc(first, tensors[1], shares[1]) if how == "slerp" else shares
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
    """What a and b are multiplied with: their sum stands `way` of the angle from a to b."""
    cosine = _cosine(*_products(a, b))
    if abs(cosine) > _STRAIGHT:
        return 1 - way, way
    angle = math.acos(cosine)
    return math.sin((1 - way) * angle) / math.sin(angle), math.sin(way * angle) / math.sin(angle)
