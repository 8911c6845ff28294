"""What `embedwright doctor` says: the environment, and proofs on the model at hand.

Each proof compares the model with something that it does not compute itself: its text contract read by hand, the stock
attention masks one text at a time, a fresh copy of what is not stored, the other doors, the record of its own making.

T tokens of one text, D hidden, E embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedwright import threads
from embedwright.cpu import accelerate as cpu
from embedwright.cpu import kernels
from embedwright.encoders.open import open_model
from embedwright.encoders.sentence_transformers import SentenceTransformerEncoder
from embedwright.model.adapters.lora import has_lora, idle_adapters
from embedwright.model.backbone import text_hidden
from embedwright.model.embedder import Embedder
from embedwright.model.formats import storage
from embedwright.model.interop.readers import others_read
from embedwright.model.network import EmbedwrightConfig
from embedwright.model.verify import selftest
from embedwright.model.verify.probe import ProbeError, lora_faults, probe
from embedwright.packing import pack
from embedwright.text import TokenizedText, leading_ids

TASK = selftest.TASK
TEXTS = (
    "tides",
    "why is the sky blue?",
    "naïve café, Straße 漢字 🙂",
    "two  spaces, and a\ttab",
    "</s> and <|im_end|> inside",
    "a longer text, which says nothing of note; " * 8,
)
_FAR = 1024  # tokens at which masks are read
_WHOLE = 1024  # max_tokens under which no text is cut, whatever the model's own
_SHORT = 16  # max_tokens under which the longest text is cut
_NEEDS_BOS = ("gemma",)  # families that were never trained without one


Encoder = Embedder | SentenceTransformerEncoder
Result = tuple[bool, str] | None  # None: does not apply to this model


@dataclass(frozen=True)
class Finding:
    """One proof: what was looked at, whether it holds, and the number behind it."""

    name: str
    ok: bool
    detail: str


def environment() -> dict[str, str]:
    """Versions, device and threads, by name."""
    packages = ("torch", "transformers", "tokenizers", "peft", "sentence-transformers", "faiss-cpu")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        **{name: _version(name) for name in packages},
        "gpu": gpu,
        "cores / torch threads": f"{os.cpu_count()} / {torch.get_num_threads()}",
        "threads": threads.described(),
        "kernels": kernels.described(),
    }


def examine_name(name: str) -> list[Finding]:
    """Open a model by name or folder, as every command does, and examine it; what cannot be trusted is a finding."""
    try:
        model = open_model(name)
    except ProbeError as refused:
        return [Finding("opens", False, str(refused))]
    if isinstance(model, Embedder):
        return examine(model, Path(model.network.config.name_or_path))
    return _carry_out(_OF_ANY, model, None)


def examine(model: Embedder, folder: Path | None = None) -> list[Finding]:
    """Every proof that applies to this model; `folder`: where it was loaded from, for what is stored there.

    A proof that cannot be carried out is a finding that is not ok, with the reason.
    """
    return _carry_out(_OF_ANY | _OF_OURS, model, folder)


def _carry_out(proofs: dict[str, Callable[..., Result]], model: Any, folder: Path | None) -> list[Finding]:
    findings = []
    for name, proof in proofs.items():
        try:
            result = proof(model, folder)
        except Exception as error:  # whatever a sick model does: the other proofs still say something
            result = False, f"{type(error).__name__}: {error}"
        if result is not None:
            findings.append(Finding(name, *result))
    return findings


def _tolerance(model: Encoder) -> float:
    """Of vectors that ought to be equal, computed in another order."""
    half = isinstance(model, Embedder) and _dtype(model) != torch.float32
    return 3e-2 if half else 1e-4


def _dtype(model: Embedder) -> torch.dtype:
    dtype: torch.dtype = next(model.network.backbone.parameters()).dtype
    return dtype


def _equal(model: Encoder, got: NDArray[Any], expected: NDArray[Any]) -> tuple[bool, str]:
    difference = float(np.abs(got - expected).max())
    return difference <= _tolerance(model), f"largest difference {difference:.1e}"


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
    """Another order, another batch: the same vectors, each in its own row."""
    order = [3, 0, 5, 2, 1, 4]
    alone = np.concatenate([model.encode([text], task=TASK) for text in TEXTS])
    shuffled = model.encode([TEXTS[i] for i in order], task=TASK)
    together = model.encode(TEXTS, task=TASK)
    return _equal(model, np.stack([together[order], shuffled]), np.stack([alone[order]] * 2))


def _pads(model: Embedder, _: Path | None) -> Result:
    """The padded door, with pads on the right and on the left, of an id that means something."""
    rows = [_tokens(model, text, TASK) for text in TEXTS[:3]]
    longest = max(len(row.ids) for row in rows)
    expected = model.encode(TEXTS[:3], task=TASK)
    vectors = []
    for left in (False, True):
        ids, attended, pooled = (torch.zeros(len(rows), longest, dtype=torch.long) for _ in range(3))
        ids += int(rows[0].ids[-2])
        for i, row in enumerate(rows):
            where = slice(longest - len(row.ids), None) if left else slice(0, len(row.ids))
            ids[i, where], attended[i, where], pooled[i, where] = (
                torch.tensor(row.ids),
                1,
                torch.tensor(row.pool).long(),
            )
        with torch.inference_mode():
            batch = (x.to(model.device) for x in (ids, attended, pooled))
            vectors.append(model.network(*batch).pooler_output.float().cpu().numpy())
    return _equal(model, np.stack(vectors), np.stack([expected] * 2))


# ---- from text to vector, by hand


def _tokens(model: Embedder, text: str, task: str | None, max_tokens: int | None = None) -> TokenizedText:
    if max_tokens is not None:
        max_tokens = min(max_tokens, model.longest)
    packed = model.tokenize([text], task=task, max_tokens=max_tokens)
    return TokenizedText(packed.ids_T.numpy(), packed.pool_mask_T.numpy())


def _readable(model: Embedder) -> list[str]:
    """TEXTS, less the one with special tokens where the templates have some too: by hand they cannot be told apart."""
    return [text for text in TEXTS if not (model.contract.template_specials and "</s>" in text)]


def _by_hand(model: Embedder, text: str, task: str | None) -> tuple[list[int], list[bool]]:
    """Ids and pool mask of a text that is not cut, read from the contract with nothing but the tokenizer's pipeline."""
    contract, prefix = model.contract, model.contract.prefix(task)
    suffix = contract.query_suffix if prefix != contract.document_template else ""
    backend = Tokenizer.from_str(model.own_tokenizer.backend_tokenizer.to_str())
    if contract.mask_rule == "count":
        eos_text = model.own_tokenizer.convert_ids_to_tokens(contract.eos_id)
        ids = backend.encode(prefix + text + eos_text).ids
        front = len(backend.encode(prefix, add_special_tokens=False).ids) if prefix else 0
        return ids, [i >= front for i in range(len(ids))]
    everything = contract.mask_rule == "all"
    # special tokens in a text are plain text, unless the templates have some
    backend.encode_special_tokens = not contract.template_specials
    encoding = backend.encode(prefix + text + suffix, add_special_tokens=False)
    end = len(prefix) + len(text) if suffix else len(prefix) + len(text) + 1
    inside = [everything or (stop > len(prefix) and start < end) for start, stop in encoding.offsets]
    eos = [] if contract.eos_id is None else [contract.eos_id]
    return [*contract.bos_ids, *encoding.ids, *eos], [everything] * len(contract.bos_ids) + inside + [True] * len(eos)


def _contract(model: Embedder, _: Path | None) -> Result:
    """Ids and pool masks as the contract has them; the instruction is attended to and not pooled."""
    left_out = total = 0
    for task in (None, TASK):
        for text in _readable(model):
            got, (ids, pooled) = _tokens(model, text, task, _WHOLE), _by_hand(model, text, task)
            if got.ids.tolist() != ids:
                return False, f"token ids of {text[:20]!r} are not prefix + text + EOS"
            if got.pool.tolist() != pooled:
                return False, f"{int(got.pool.sum())} tokens of {text[:20]!r} are pooled, not {sum(pooled)}"
            left_out, total = left_out + len(ids) - sum(pooled), total + len(ids)
    return True, f"{left_out} of {total} tokens left out of pooling"


@torch.inference_mode()
def _stock(model: Embedder, _: Path | None) -> Result:
    """One text at a time through transformers' own code and mask, pooled and normalised by hand."""
    expected, texts = [], _readable(model)
    with cpu.stock(model.network) as twin:
        for text in texts:
            ids, pooled = _by_hand(model, text, TASK)
            hidden_TD = text_hidden(twin.backbone, torch.tensor(ids, device=model.device))
            one = pack([TokenizedText(np.array(ids), np.array(pooled))]).to(model.device)
            weight = next(twin.head.parameters(), hidden_TD)
            states_TD = twin.head(hidden_TD.to(weight.dtype), one).double().cpu().numpy()
            vector = states_TD[-1] if model.network.pooling.kind == "last" else states_TD[pooled].mean(0)
            expected.append(vector / np.linalg.norm(vector))
    return _equal(model, model.encode(texts, task=TASK, max_tokens=min(_WHOLE, model.longest)), np.stack(expected))


def _fast(model: Embedder, _: Path | None) -> Result:
    """Each faster block, and packed attention, against transformers' own on the same input."""
    if model.device.type != "cpu":
        return None
    return not (fault := cpu.fault(model.network)), fault or f"{len(cpu.changed(model.network))} modules are faster"


def _ends(model: Embedder, _: Path | None) -> Result:
    """EOS behind every text; under `count` a text that is cut loses it, as the reference does."""
    eos, backend = model.contract.eos_id, model.own_tokenizer.backend_tokenizer
    if eos is None:
        return None
    if eos not in {id for id, token in backend.get_added_tokens_decoder().items() if token.special}:
        return False, f"id {eos} is no special token of the tokenizer"
    cut = () if model.contract.mask_rule == "count" else ((TEXTS[-1], None, _SHORT),)
    for text, task, limit in (*((t, k, None) for t in TEXTS for k in (None, TASK)), *cut):
        got = _tokens(model, text, task, limit)
        if got.ids[-1] != eos or not got.pool[-1]:
            return False, f"{text[:20]!r} ends in id {got.ids[-1]}, pooled: {bool(got.pool[-1])}"
    by_hand = "" if backend.encode("a").ids[-1] == eos else "; appended by id, the tokenizer alone adds none"
    return True, f"id {eos}, pooled{', also of a text that is cut' if cut else ''}{by_hand}"


def _begins(model: Embedder, _: Path | None) -> Result:
    bos = model.contract.bos_ids
    own = leading_ids(model.own_tokenizer.backend_tokenizer)
    family = model.network.backbone.config.model_type
    if bos != own:
        return False, f"the contract has {list(bos)}, the tokenizer puts {list(own)} in front"
    if not bos and family.startswith(_NEEDS_BOS):
        return False, f"{family} needs one, and none is added"
    for text in TEXTS:
        ids = _tokens(model, text, None).ids.tolist()
        if ids[: len(bos)] != list(bos) or (bos and bos[0] in ids[len(bos) :]):
            return False, f"{text[:20]!r} begins with {ids[:3]}"
    return True, f"ids {list(bos)}" if bos else "none, as in its tokenizer"


def _round_trip(model: Embedder, folder: Path | None) -> Result:
    """Text -> ids -> text, ids within the embedding table, and the ids of the folder's own tokenizer.json."""
    backend = model.own_tokenizer.backend_tokenizer
    file = folder / "tokenizer.json" if folder is not None else None
    stored = Tokenizer.from_file(str(file)) if file is not None and file.is_file() else backend
    rows = model.network.backbone.get_input_embeddings().weight.shape[0]
    if backend.get_vocab_size() > rows:
        return False, f"{backend.get_vocab_size()} tokens, but the model has rows for {rows}"
    for text in (t for t in TEXTS if "</s>" not in t):  # special tokens come back as they like
        ids = backend.encode(text, add_special_tokens=False).ids
        if stored.encode(text, add_special_tokens=False).ids != ids:
            return False, f"tokenizer.json gives other ids for {text[:20]!r}"
        back = backend.decode(ids, skip_special_tokens=False)
        if back.strip() != text.strip():
            return False, f"{text[:20]!r} comes back as {back[:20]!r}"
    return True, f"{backend.get_vocab_size()} tokens"


# ---- numbers


def _unit(model: Encoder, _: Path | None) -> Result:
    lengths = np.linalg.norm(model.encode(TEXTS), axis=1)
    return bool(np.allclose(lengths, 1, atol=1e-4)), f"{lengths.min():.6f} to {lengths.max():.6f}"


def _repeats(model: Encoder, _: Path | None) -> Result:
    """Dropout that was left on, or a cache that is not what it was."""
    if isinstance(model, Embedder) and model.network.training:
        return False, "the network is in training mode"
    return bool(np.array_equal(model.encode(TEXTS), model.encode(TEXTS))), "twice the same bits"


def _distinct(model: Embedder, _: Path | None) -> Result:
    """Vectors that say nothing: of all texts alike, or the same with and without an instruction."""
    plain, instructed = model.encode(TEXTS), model.encode(TEXTS, task=TASK)
    alike = (plain @ plain.T)[np.triu_indices(len(TEXTS), 1)].max()
    moved = (plain * instructed).sum(1).min()
    limit = 1 - 1e-5
    return bool(
        alike < limit and moved < limit
    ), f"highest cosine of two texts {alike:.3f}, with instruction {moved:.3f}"


def _types(model: Embedder, _: Path | None) -> Result:
    """One type in the backbone, finite weights, and what is computed and never stored in float32, as made anew."""
    backbone = model.network.backbone
    own = {p.dtype for name, p in backbone.named_parameters() if "lora_" not in name}
    if len(own) != 1:
        return False, f"mixed types: {', '.join(sorted(map(str, own)))}"
    if bad := next((n for n, p in model.network.named_parameters() if not torch.isfinite(p).all()), None):
        return False, f"{bad} is not finite"
    rotary = next((m for n, m in backbone.named_modules() if n.endswith("rotary_emb")), None)
    if rotary is not None:
        fresh = dict(type(rotary)(config=backbone.config).named_buffers())
        for name, buffer in rotary.named_buffers():
            if buffer.dtype != fresh[name].dtype or not torch.equal(buffer.cpu(), fresh[name].cpu()):
                return False, f"rotary {name} is not what its config gives"
    return True, str(own.pop()).removeprefix("torch.")


def _head(model: Embedder, _: Path | None) -> Result:
    """How much the pooling block does: a fresh one is the identity, which is no fault, but worth knowing."""
    if not list(model.network.head.parameters()):
        return None
    packed = model.tokenize(TEXTS).to(model.device)
    with torch.inference_mode():
        hidden_TD, tokens_TD = model.network.hidden(packed).float(), model.network.tokens(packed).float()
    change = float(((tokens_TD - hidden_TD).norm(dim=1) / hidden_TD.norm(dim=1)).mean())
    return bool(np.isfinite(change)), f"changes states by {change:.1e}" + (" (untrained: the identity)" * (change == 0))


# ---- what was stored, other doors


def _recorded(model: Embedder, folder: Path | None) -> Result:
    if folder is None:
        return None
    reload = lambda kept: storage.load(folder, dtype=kept)[0]  # noqa: E731
    found = selftest.compare(model.network, model.text_tokenizer, folder, reload)
    return None if found is None else (found.ok, found.describe())


def _auto_model(model: Embedder, folder: Path | None) -> Result:
    """AutoTokenizer and AutoModel on the folder, as any transformers user would."""
    if folder is None or not _is_ours(folder):
        return None
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    network = AutoModel.from_pretrained(folder, dtype=_dtype(model), trust_remote_code=False).to(model.device)
    batch = tokenizer(list(TEXTS), prefix=model.contract.prefix(TASK), padding=True, return_tensors="pt")
    with torch.inference_mode():
        vectors = network(**batch.to(model.device)).pooler_output
    return _equal(model, vectors.float().cpu().numpy(), model.encode(TEXTS, task=TASK))


def _sentence_transformers(model: Embedder, folder: Path | None) -> Result:
    if folder is None or not (folder / "modules.json").is_file() or find_spec("sentence_transformers") is None:
        return None
    if not (_is_ours(folder) or (folder / "embedwright.json").is_file()):
        return None
    from sentence_transformers import SentenceTransformer

    door = SentenceTransformer(
        str(folder), device=str(model.device), trust_remote_code=False, model_kwargs={"dtype": _dtype(model)}
    )
    texts = list(TEXTS)
    got = np.stack([door.encode(texts, prompt=model.contract.prefix(TASK)), door.encode(texts)])
    return _equal(model, got, np.stack([model.encode(TEXTS, task=TASK), model.encode(TEXTS)]))


def _others(_: Embedder, folder: Path | None) -> Result:
    return None if folder is None else others_read(folder)


def _is_ours(folder: Path) -> bool:
    config = folder / "config.json"
    return config.is_file() and bool(json.loads(config.read_text()).get("model_type") == EmbedwrightConfig.model_type)


def _adapter(model: Embedder, _: Path | None) -> Result:
    """Adapters that are there and do nothing, or do it twice."""
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


_OF_ANY: dict[str, Callable[..., Result]] = {
    "one batch or another, any order": _batch,
    "vectors of unit length": _unit,
    "the same twice": _repeats,
}
_OF_OURS: dict[str, Callable[..., Result]] = {
    "attention as configured, near": _near,
    "attention as configured, far": _far,
    "pads change nothing": _pads,
    "tokens and pool mask as the contract": _contract,
    "packed = one by one, stock masks": _stock,
    "fast path = stock blocks": _fast,
    "EOS ends every text": _ends,
    "BOS as the tokenizer has it": _begins,
    "tokenizer round trip": _round_trip,
    "texts and instructions tell apart": _distinct,
    "one type, finite weights": _types,
    "pooling block": _head,
    "as recorded when it was saved": _recorded,
    "through AutoModel": _auto_model,
    "through sentence-transformers": _sentence_transformers,
    "adapter active": _adapter,
    "other programs": _others,
}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
