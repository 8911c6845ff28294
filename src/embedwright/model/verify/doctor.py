"""What `embedwright doctor` says: the environment, and proofs on the model at hand.

Each proof compares the model with something that it does not compute itself: its text contract read by hand, the stock
attention masks one text at a time, a fresh copy of what is not stored, other libraries, the record of its own making.

T tokens of one text, D hidden, E embedding.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from embedwright import threads
from embedwright.cpu import accelerate as cpu
from embedwright.cpu import kernels
from embedwright.encoders.open import open_model
from embedwright.export.onnx import examine as examine_onnx
from embedwright.locate import local
from embedwright.model.adapters.lora import has_lora, idle_adapters
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import format_of, is_onnx
from embedwright.model.formats.open import open_embedder
from embedwright.model.interop.readers import check_readers
from embedwright.model.quantized import has_quantized_layers
from embedwright.model.verify import selftest
from embedwright.model.verify.by_hand import (
    TEXTS,
    Encoder,
    as_stock,
    as_the_contract,
    begins_with_bos,
    encoded,
    ends_with_eos,
    equal,
    room,
    round_trip,
    tokens_of,
)
from embedwright.model.verify.probe import ProbeError, lora_faults, probe
from embedwright.model.verify.selftest import TASK, Result

_FAR = 1024  # tokens at which masks are read
_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "sentence-transformers", "faiss-cpu")


@dataclass(frozen=True)
class Finding:
    """One proof: what was compared, whether it holds, and the number that says so."""

    name: str
    ok: bool
    detail: str


def environment() -> dict[str, str]:
    """Returns versions, device and threads, by name."""
    return {
        **{name: _version(name) for name in _PACKAGES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "cores / torch threads": f"{os.cpu_count()} / {torch.get_num_threads()}",
        "threads": threads.described(),
        "kernels": kernels.described(),
        "int8": kernels.int8_fault() or "by AVX-512 VNNI",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def examine_name(name: str) -> list[Finding]:
    """Opens a model by name or folder, as every command does, and examines it. A model that is refused is a finding."""
    if (folder := local(name)) is not None and is_onnx(folder):
        return _of_onnx(folder)
    try:
        model = open_model(name)
    except ProbeError as refused:
        return [Finding("opens", False, str(refused))]
    if isinstance(model, Embedder):
        return examine(model, Path(model.network.config.name_or_path))
    return _findings(_OF_ANY, model, None)


def _of_onnx(folder: Path) -> list[Finding]:
    findings = []
    try:
        for found in examine_onnx(folder):
            findings.append(Finding(*found))
    except Exception as error:  # what a folder lacks, or onnxruntime refuses: the proofs before it still say something
        findings.append(Finding("opens", False, f"{type(error).__name__}: {error}"))
    return findings


def examine(model: Embedder, folder: Path | None = None) -> list[Finding]:
    """Runs every proof that applies to this model; `folder` is where it was loaded from, for what is stored there.

    A proof that cannot be carried out is a finding that is not ok, with the reason.
    """
    return _findings(_OF_ANY | _OF_OURS, model, folder)


def _findings(proofs: dict[str, Callable[..., Result]], model: Any, folder: Path | None) -> list[Finding]:
    findings = []
    for name, proof in proofs.items():
        try:
            result = proof(model, folder)
        except Exception as error:  # whatever a sick model does: the other proofs still say something
            result = False, f"{type(error).__name__}: {error}"
        if result is not None:
            findings.append(Finding(name, *result))
    return findings


# ---- attention


def _near(model: Embedder, _: Path | None) -> Result:
    causal, seen = model.network.backbone.config.is_causal, probe(model.network)
    word = "causal" if causal else "bidirectional"
    return (seen.later_token > seen.tolerance) != causal, f"{word}; a later token changes {seen.later_token:.1e}"


def _far(model: Embedder, _: Path | None) -> Result:
    wrong = probe(model.network, mask_length=_FAR).wrong_masks
    layers = model.network.backbone.config.num_hidden_layers
    return not wrong, wrong[0] if wrong else f"{layers} masks as configured, at {_FAR} tokens or beyond the window"


def _batch(model: Encoder, _: Path | None) -> Result:
    """Texts alone, in one batch and in another order have the same vectors, each in its own row."""
    order = [3, 0, 5, 2, 1, 4]
    alone = np.concatenate([encoded(model, [text], TASK) for text in TEXTS])
    shuffled = encoded(model, [TEXTS[i] for i in order], TASK)
    together = encoded(model, TEXTS, TASK)
    return equal(model, np.stack([together[order], shuffled]), np.stack([alone[order]] * 2))


def _pads(model: Embedder, _: Path | None) -> Result:
    """`forward` on texts that are padded on the right or left, with an id that means something, gives the vectors."""
    rows = [tokens_of(model, text, TASK) for text in TEXTS[:3]]
    ids, pools = ([torch.as_tensor(values).long() for values in part] for part in zip(*rows, strict=True))
    attended = [torch.ones_like(row) for row in ids]
    vectors = []
    for side in ("right", "left"):
        batch = [
            pad_sequence(part, batch_first=True, padding_value=value, padding_side=side).to(model.device)
            for part, value in ((ids, int(ids[0][-2])), (attended, 0), (pools, 0))
        ]
        with torch.inference_mode():
            vectors.append(model.network(*batch).pooler_output.float().cpu().numpy())
    return equal(model, np.stack(vectors), np.stack([encoded(model, TEXTS[:3], TASK)] * 2))


def _fast(model: Embedder, _: Path | None) -> Result:
    """Each faster block, and packed attention, gives what transformers' own gives on the same input."""
    if model.device.type != "cpu":
        return None
    return not (fault := cpu.fault(model.network)), fault or f"{len(cpu.accelerated(model.network))} modules are faster"


# ---- numbers


def _unit(model: Encoder, _: Path | None) -> Result:
    lengths = np.linalg.norm(model.encode(TEXTS), axis=1)
    return bool(np.allclose(lengths, 1, atol=1e-4)), f"{lengths.min():.6f} to {lengths.max():.6f}"


def _repeats(model: Encoder, _: Path | None) -> Result:
    """Finds dropout that was left on, and whatever else changes from call to call."""
    if isinstance(model, Embedder) and model.network.training:
        return False, "the network is in training mode"
    return bool(np.array_equal(model.encode(TEXTS), model.encode(TEXTS))), "twice the same bits"


def _distinct(model: Embedder, _: Path | None) -> Result:
    """No two texts have one vector, and an instruction changes the vector of each."""
    plain, instructed = encoded(model, TEXTS), encoded(model, TEXTS, TASK)
    alike = (plain @ plain.T)[np.triu_indices(len(TEXTS), 1)].max()
    moved = (plain * instructed).sum(1).min()
    ok = bool(max(alike, moved) < 1 - 1e-5)
    return ok, f"highest cosine of two texts {alike:.3f}, with instruction {moved:.3f}"


def _own_instruction(model: Embedder, _: Path | None) -> Result:
    """A query that comes without an instruction is read under the model's own."""
    template, own = model.contract.query_template, model.contract.default_task
    if "{task}" in template and not own:
        return True, "none: queries want one (--task, task=)"
    ok, said = equal(model, model.encode_query(TEXTS), model.encode(TEXTS, prefix=template.replace("{task}", own)))
    return ok, f"{own or template!r}; {said}"


def _types(model: Embedder, _: Path | None) -> Result:
    """The backbone has one type, weights are finite, and rotary frequencies are those of the config, in float32."""
    backbone = model.network.backbone
    mixes = has_quantized_layers(backbone)  # the embedding in 16 bits, the rest in 32
    table = backbone.get_input_embeddings().weight if mixes else None
    own = {p.dtype for name, p in backbone.named_parameters() if "lora_" not in name and p is not table}
    if len(own) != 1:
        return False, f"mixed types: {', '.join(sorted(map(str, own)))}"
    if bad := next((n for n, p in model.network.named_parameters() if not torch.isfinite(p).all()), None):
        return False, f"{bad} is not finite"
    for rotary in [m for n, m in backbone.named_modules() if n.endswith("rotary_emb")][:1]:
        fresh = dict(type(rotary)(config=backbone.config).named_buffers())
        for name, buffer in rotary.named_buffers():
            if buffer.dtype != fresh[name].dtype or not torch.equal(buffer.cpu(), fresh[name].cpu()):
                return False, f"rotary {name} is not what its config gives"
    return True, ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in own))


def _head(model: Embedder, _: Path | None) -> Result:
    """Tells how much the pooling block changes: a fresh one is the identity, which is not a fault."""
    if not list(model.network.head.parameters()):
        return None
    packed = model.tokenize(TEXTS).to(model.device)
    with torch.inference_mode():
        hidden_TD, tokens_TD = model.network.hidden(packed).float(), model.network.token_states(packed).float()
    change = float(((tokens_TD - hidden_TD).norm(dim=1) / hidden_TD.norm(dim=1)).mean())
    return bool(np.isfinite(change)), f"changes states by {change:.1e}" + (" (untrained: the identity)" * (change == 0))


def _adapter(model: Embedder, _: Path | None) -> Result:
    """Every adapter is active, and vectors change without them."""
    backbone = model.network.backbone
    if not has_lora(backbone):
        return None
    from peft.tuners.lora import LoraLayer

    if faults := [*lora_faults(backbone), *(f"{name} is still zero" for name in idle_adapters(backbone))]:
        return False, f"{len(faults)} faults, e.g. {faults[0]}"
    active = model.encode(TEXTS)
    layers = [module for module in backbone.modules() if isinstance(module, LoraLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        change = float(np.abs(model.encode(TEXTS) - active).max())
    finally:
        for layer in layers:
            layer.enable_adapters(True)
    return change > 0, f"vectors change by {change:.1e} without it"


# ---- what was stored, and other libraries


def _recorded(model: Embedder, folder: Path | None) -> Result:
    if folder is None:
        return None
    reload = lambda kept: open_embedder(folder, dtype=kept)[0]  # noqa: E731
    return selftest.compare(model.network, model.text_tokenizer, folder, reload)


def _auto_model(model: Embedder, folder: Path | None) -> Result:
    """AutoTokenizer and AutoModel, as any user of transformers opens the folder, give the vectors."""
    if folder is None or format_of(folder, "") != "ours":
        return None
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    network = AutoModel.from_pretrained(folder, dtype=model.network.dtype, trust_remote_code=False).to(model.device)
    options: dict[str, Any] = {"padding": True, "return_tensors": "pt", "max_length": room(model)}
    batch = tokenizer(list(TEXTS), prefix=model.contract.prefix(TASK), **options)
    with torch.inference_mode():
        vectors: Tensor = network(**batch.to(model.device)).pooler_output
    return equal(model, vectors.float().cpu().numpy(), encoded(model, TEXTS, TASK))


def _sentence_transformers(model: Embedder, folder: Path | None) -> Result:
    if folder is None or format_of(folder, "") not in ("ours", "stock") or find_spec("sentence_transformers") is None:
        return None
    if not (folder / "modules.json").is_file():
        return None
    from sentence_transformers import SentenceTransformer

    options = {"dtype": model.network.dtype}
    other = SentenceTransformer(str(folder), device=str(model.device), trust_remote_code=False, model_kwargs=options)
    if other.max_seq_length != model.max_tokens:
        return False, f"it cuts texts at {other.max_seq_length} tokens, not at {model.max_tokens}"
    other.max_seq_length = room(model)
    got = np.stack([other.encode(list(TEXTS), prompt=model.contract.prefix(TASK)), other.encode(list(TEXTS))])
    return equal(model, got, np.stack([encoded(model, TEXTS, TASK), encoded(model, TEXTS)]))


def _readers(_: Embedder, folder: Path | None) -> Result:
    return None if folder is None else check_readers(folder)


_OF_ANY: dict[str, Callable[..., Result]] = {
    "independent of batch and order": _batch,
    "vectors of unit length": _unit,
    "deterministic": _repeats,
}
_OF_OURS: dict[str, Callable[..., Result]] = {
    "attention as configured, near": _near,
    "attention as configured, far": _far,
    "padding changes nothing": _pads,
    "tokens and pool mask follow the contract": as_the_contract,
    "packed = one by one, stock masks": as_stock,
    "fast path = stock blocks": _fast,
    "EOS ends every text": ends_with_eos,
    "BOS as the tokenizer has it": begins_with_bos,
    "tokenizer round trip": round_trip,
    "texts and instructions differ": _distinct,
    "own instruction": _own_instruction,
    "one type, finite weights": _types,
    "pooling block": _head,
    "as recorded when it was saved": _recorded,
    "through AutoModel": _auto_model,
    "through sentence-transformers": _sentence_transformers,
    "adapter active": _adapter,
    "other programs": _readers,
}
