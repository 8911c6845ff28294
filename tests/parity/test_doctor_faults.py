"""Silent faults, seeded one at a time into healthy models: each must be refused when the model is opened, or found.

`doctor_faults.md` lists them; a test holds the list to this file.
"""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from embedwright.model import attention, embedder, network
from embedwright.model import encode as encoding
from embedwright.model.adapters.lora import add_lora
from embedwright.model.embedder import Embedder
from embedwright.model.network import EmbedwrightModel
from embedwright.model.verify import doctor
from embedwright.model.verify.probe import ProbeError
from embedwright.text import TokenizedText

LIST = Path(__file__).with_name("doctor_faults.md")
FIXTURES = Path(__file__).parent / "fixtures"

# kind -> how its healthy folder is made
KINDS: dict[str, dict[str, Any]] = {
    "latent": {"pooling": "latent"},
    "mean": {"pooling": "mean"},  # a stock folder
    "bos": {"pooling": "latent", "family": "gemma", "bos": True},
    "windows": {"pooling": "mean", "family": "gemma3", "bos": True},  # keeps its windows
    "mistral": {"pooling": "latent", "family": "mistral"},  # loses them
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory, tiny_embedder: Callable[..., Embedder]) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "model"
            if kind == "nv-embed":
                Embedder.load(FIXTURES / "nvembed-tiny-v2", dtype="float32").save(made[kind])
            else:
                tiny_embedder(**KINDS[kind]).save(made[kind])
        return made[kind]

    return make


# ---- faults in a folder


def _json(name: str, change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def _contract(**values: Any) -> Callable[[Path], None]:
    return _json("config.json", lambda c: c["contract"].update(values))


def _weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return edit


def _merged_again(tensors: dict[str, torch.Tensor]) -> None:
    weight = tensors["backbone.layers.1.mlp.up_proj.weight"]
    random = torch.Generator().manual_seed(0)
    rows, columns = weight.shape
    weight += 0.05 * torch.randn(rows, 2, generator=random) @ torch.randn(2, columns, generator=random)


def _rounded(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        tensors[name] = tensor.bfloat16().float()


def _layers_swapped(tensors: dict[str, torch.Tensor]) -> None:
    a, b = "backbone.layers.0.mlp.up_proj.weight", "backbone.layers.1.mlp.up_proj.weight"
    tensors[a], tensors[b] = tensors[b], tensors[a]


def _lowercase(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Lowercase"}


def _other_vocabulary(content: dict[str, Any]) -> None:
    vocabulary = content["model"]["vocab"]
    names = [name for name in vocabulary if name not in ("<s>", "</s>")]
    for name, number in zip(names, [vocabulary[n] for n in reversed(names)], strict=True):
        vocabulary[name] = number


def _no_bos(content: dict[str, Any]) -> None:
    content["post_processor"] = None


def _no_normalize(folder: Path) -> None:
    modules = json.loads((folder / "modules.json").read_text())
    (folder / "modules.json").write_text(json.dumps(modules[:2]))


def _only_text(content: dict[str, Any]) -> None:
    content["modality_config"].pop("message", None)


IN_FOLDER: dict[str, tuple[str, Callable[[Path], None]]] = {
    "config edited to causal": ("latent", _json("config.json", lambda c: c["backbone"].update(is_causal=True))),
    "config of a stock folder edited to causal": ("mean", _json("config.json", lambda c: c.update(is_causal=True))),
    "window of a family that keeps its own is one wider": (
        "windows",
        _json("config.json", lambda c: (c.get("backbone") or c).update(sliding_window=9)),
    ),
    "tokenizer lower-cases": ("latent", _json("tokenizer.json", _lowercase)),
    "tokenizer of another model": ("latent", _json("tokenizer.json", _other_vocabulary)),
    "tokenizer no longer adds BOS": ("bos", _json("tokenizer.json", _no_bos)),
    "BOS gone from the contract": ("bos", _contract(bos_ids=[])),
    "another EOS in the contract": ("latent", _contract(eos_id=7)),
    "query template edited": ("latent", _contract(query_template="{task}: ")),
    "mask rule edited to a count": ("latent", _contract(mask_rule="count")),
    "mask rule of NV-Embed edited to offsets": ("nv-embed", _contract(mask_rule="offsets")),
    "pooling edited from mean to last": ("mean", _json("embedwright.json", lambda c: c["pooling"].update(kind="last"))),
    "pooling of the sentence-transformers files edited": (
        "mean",
        _json("1_Pooling/config.json", lambda c: c.update(pooling_mode="cls")),
    ),
    "normalisation gone from the sentence-transformers files": ("latent", _no_normalize),
    "sentence-transformers made to count prompt tokens": ("nv-embed", _json("sentence_bert_config.json", _only_text)),
    "adapter merged twice": ("latent", _weights(_merged_again)),
    "weights rounded to bf16 and called float32": ("latent", _weights(_rounded)),
    "two layers' weights swapped": ("latent", _weights(_layers_swapped)),
}


# ---- faults in a loaded model


@dataclass
class Case:
    model: Embedder
    patch: pytest.MonkeyPatch

    def tokens(self, change: Callable[[TokenizedText], TokenizedText], prefixed: bool = False) -> None:
        """Tokenised text by text as before, then changed; `prefixed`: only where there is an instruction."""
        right = embedder.tokenize_checked

        def wrong(tokenizer: Any, contract: Any, texts: Any, prefix: str = "", max_tokens: Any = None) -> Any:
            rows = right(tokenizer, contract, texts, prefix, max_tokens)
            return rows if prefixed and not prefix else [change(row) for row in rows]

        self.patch.setattr(embedder, "tokenize_checked", wrong)

    def backbone(self) -> Any:
        return self.model.network.backbone


def _pool(change: Callable[[np.ndarray[Any, Any]], None]) -> Callable[[TokenizedText], TokenizedText]:
    def changed(row: TokenizedText) -> TokenizedText:
        pool = row.pool.copy()
        change(pool)
        return TokenizedText(row.ids, pool)

    return changed


def _one_more(pool: np.ndarray[Any, Any]) -> None:
    pool[max(int(pool.argmax()) - 1, 0)] = True


def _one_fewer(pool: np.ndarray[Any, Any]) -> None:
    pool[int(pool.argmax())] = False


def _set(index: Any, value: bool) -> Callable[[np.ndarray[Any, Any]], None]:
    def change(pool: np.ndarray[Any, Any]) -> None:
        pool[index] = value

    return change


def _without_last(row: TokenizedText) -> TokenizedText:
    return TokenizedText(row.ids[:-1], row.pool[:-1]) if len(row.ids) > 2 else row


def _without_first(row: TokenizedText) -> TokenizedText:
    return TokenizedText(row.ids[1:], row.pool[1:])


def _first_twice(row: TokenizedText) -> TokenizedText:
    return TokenizedText(np.append(row.ids[0], row.ids), np.append(False, row.pool))


def _causal(case: Case) -> None:
    allowed, window = attention.build_mask, attention.flash_window
    case.patch.setattr(attention, "build_mask", lambda rows, keys, _, *rest: allowed(rows, keys, True, *rest))
    case.patch.setattr(attention, "flash_window", lambda _, w: window(True, w))


def _one_way_layer(case: Case) -> None:
    layer = case.backbone().layers[1].self_attn
    layer.config = copy.deepcopy(layer.config)
    layer.config.is_causal = True


def _window_on(case: Case) -> None:
    layer = case.backbone().layers[2].self_attn
    layer.config = copy.deepcopy(layer.config)
    layer.config.sliding_window = 300  # longer than the texts at hand


def _window_lost(case: Case) -> None:
    for layer in case.backbone().layers:
        layer.self_attn.sliding_window = None


def _window_narrow(case: Case) -> None:
    allowed, window = attention.build_mask, attention.flash_window
    case.patch.setattr(attention, "build_mask", lambda r, k, c, w, device: allowed(r, k, c, w and w - 1, device))
    case.patch.setattr(attention, "flash_window", lambda causal, w: window(causal, w and w - 1))


def _leak(case: Case) -> None:
    right = attention.attend

    def over_the_row(q: Any, k: Any, v: Any, packed: Any, *rest: Any, **named: Any) -> Any:
        whole = replace(packed, runs=((1, q.shape[1]),), cu_seqlens=packed.cu_seqlens[[0, -1]])
        return right(q, k, v, whole, *rest, **named)

    case.patch.setattr(attention, "attend", over_the_row)


def _wrapped_causal(case: Case) -> None:
    """LoRA around a causal decoder, with the switch set on the wrapper alone."""
    config = copy.deepcopy(case.backbone().config)
    config.is_causal = True
    causal = AutoModel.from_config(config, attn_implementation=attention.PACKED)
    causal.load_state_dict(case.backbone().state_dict())
    wrapped = get_peft_model(causal, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.config = copy.deepcopy(config)
    wrapped.config.is_causal = False
    case.model.network.backbone = wrapped


def _pads_seen(case: Case) -> None:
    right = EmbedwrightModel.forward

    def forward(self: Any, input_ids: Any, attention_mask: Any = None, pool_mask: Any = None, **rest: Any) -> Any:
        return right(self, input_ids, None, pool_mask, **rest)

    case.patch.setattr(EmbedwrightModel, "forward", forward)


def _not_normalised(case: Case) -> None:
    def embed(self: Any, packed: Any) -> Any:
        return network.pool_tokens(self.token_states(packed), packed, self.pooling.kind)

    case.patch.setattr(EmbedwrightModel, "embed", embed)


def _everything_pooled(case: Case) -> None:
    right = network.pool_tokens

    def pool_tokens(x: Any, packed: Any, kind: Any) -> Any:
        return right(x, replace(packed, pool_mask_T=torch.ones_like(packed.pool_mask_T)), kind)

    case.patch.setattr(network, "pool_tokens", pool_tokens)


def _wrong_weight(case: Case) -> None:
    """A mean in which every text weighs its first token twice."""
    right = network.pool_tokens

    def pool_tokens(x: Any, packed: Any, kind: Any) -> Any:
        x = x.clone()
        x[packed.cu_seqlens[1:].long() - 1] *= 2
        return right(x, packed, kind)

    case.patch.setattr(network, "pool_tokens", pool_tokens)


def _head_skipped(case: Case) -> None:
    case.patch.setattr(EmbedwrightModel, "token_states", lambda self, packed: self.hidden(packed))


def _last_layer_norm_skipped(case: Case) -> None:
    torch.nn.init.ones_(case.backbone().norm.weight)


def _sorted_results(case: Case) -> None:
    right = Embedder.encode

    def encode(self: Any, texts: Any, *rest: Any, **named: Any) -> Any:
        return right(self, sorted(texts, key=len), *rest, **named)

    case.patch.setattr(Embedder, "encode", encode)


def _task_ignored(case: Case) -> None:
    right = encoding.prefix_and_limit

    def without_task(contract: Any, longest: int, task: str | None, *rest: Any) -> tuple[str, int]:
        return right(contract, longest, None, *rest)

    case.patch.setattr(encoding, "prefix_and_limit", without_task)


def _half_rotary(case: Case) -> None:
    rotary = case.backbone().rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()


def _mixed_types(case: Case) -> None:
    case.backbone().layers[1].mlp.bfloat16()


def _not_finite(case: Case) -> None:
    case.backbone().embed_tokens.weight.data[5] = float("nan")


def _training(case: Case) -> None:
    case.model.network.train()


def _adapters(case: Case) -> list[Any]:
    add_lora(case.backbone(), rank=2, alpha=4, dropout=0.0)
    for name, parameter in case.backbone().named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return [m for m in case.backbone().modules() if hasattr(m, "disable_adapters") and hasattr(m, "merge")]


def _idle(case: Case) -> None:
    _adapters(case)
    for name, parameter in case.backbone().named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)


def _one_idle(case: Case) -> None:
    _adapters(case)
    torch.nn.init.zeros_(next(p for n, p in case.backbone().named_parameters() if "lora_B" in n))


def _switched_off(case: Case) -> None:
    for layer in _adapters(case):
        layer.enable_adapters(False)


def _merged_and_kept(case: Case) -> None:
    for layer in _adapters(case):
        layer.merge()
        layer.merged_adapters.clear()
        layer.get_base_layer().weight.data += layer.get_delta_weight("default")


def _merged_still_there(case: Case) -> None:
    for layer in _adapters(case):
        layer.merge()


def _cut_loses_eos(case: Case) -> None:
    right = embedder.tokenize_checked

    def wrong(tokenizer: Any, contract: Any, texts: Any, prefix: str = "", max_tokens: Any = None) -> Any:
        rows = right(tokenizer, contract, texts, prefix, None)
        return [TokenizedText(r.ids[:max_tokens], r.pool[:max_tokens]) for r in rows]

    case.patch.setattr(embedder, "tokenize_checked", wrong)


def _special_text(case: Case) -> None:
    """`</s>` in a text becomes the special token."""
    right = embedder.tokenize_checked

    def wrong(tokenizer: Any, contract: Any, texts: Any, *rest: Any) -> Any:
        rows = right(tokenizer, contract, texts, *rest)
        for i, text in enumerate(texts):
            if "</s>" in text:
                ids = [
                    *contract.bos_ids,
                    *tokenizer.special.encode(text, add_special_tokens=False).ids,
                    contract.eos_id,
                ]
                rows[i] = TokenizedText(np.array(ids), np.ones(len(ids), dtype=bool))
        return rows

    case.patch.setattr(embedder, "tokenize_checked", wrong)


IN_MODEL: dict[str, tuple[str, Callable[[Case], None]]] = {
    "attention causal, config says not": ("latent", _causal),
    "one layer causal": ("latent", _one_way_layer),
    "LoRA around a causal decoder": ("mean", _wrapped_causal),
    "a window left on in one layer": ("mistral", _window_on),
    "windows lost where the family keeps them": ("windows", _window_lost),
    "windows one narrower": ("windows", _window_narrow),
    "texts of a batch see each other": ("latent", _leak),
    "pads attended to": ("latent", _pads_seen),
    "one prompt token pooled": ("latent", lambda c: c.tokens(_pool(_one_more), prefixed=True)),
    "one text token not pooled": ("latent", lambda c: c.tokens(_pool(_one_fewer))),
    "one text token not pooled, NV-Embed": ("nv-embed", lambda c: c.tokens(_pool(_one_fewer), prefixed=True)),
    "one prompt token pooled, NV-Embed": ("nv-embed", lambda c: c.tokens(_pool(_one_more), prefixed=True)),
    "instruction pooled": ("latent", lambda c: c.tokens(_pool(_set(slice(None), True)))),
    "EOS not pooled": ("latent", lambda c: c.tokens(_pool(_set(-1, False)))),
    "EOS missing": ("latent", lambda c: c.tokens(_without_last)),
    "EOS missing, NV-Embed": ("nv-embed", lambda c: c.tokens(_without_last)),
    "EOS cut off with a long text": ("latent", _cut_loses_eos),
    "BOS missing": ("bos", lambda c: c.tokens(_without_first)),
    "BOS twice": ("bos", lambda c: c.tokens(_first_twice)),
    "BOS pooled": ("bos", lambda c: c.tokens(_pool(_set(0, True)))),
    "special token written in a text taken as one": ("latent", _special_text),
    "instruction ignored": ("latent", _task_ignored),
    "mean over the prompt too": ("latent", _everything_pooled),
    "mean with wrong weights": ("mean", _wrong_weight),
    "pooling block skipped": ("latent", _head_skipped),
    "final norm skipped": ("mean", _last_layer_norm_skipped),
    "normalisation missing": ("latent", _not_normalised),
    "results in the order of length": ("latent", _sorted_results),
    "rotary frequencies rounded": ("latent", _half_rotary),
    "one block in another type": ("latent", _mixed_types),
    "a weight not finite": ("latent", _not_finite),
    "left in training mode": ("latent", _training),
    "adapters all zero": ("latent", _idle),
    "one adapter zero": ("latent", _one_idle),
    "adapters switched off": ("latent", _switched_off),
    "adapters merged and still added": ("latent", _merged_and_kept),
    "adapters merged and still there": ("latent", _merged_still_there),
}


# ---- the tests

RECORD = "as recorded when it was saved"  # catches most: where it is not the only one, the list names another
REFUSED = "refused when opened"


def listed() -> dict[str, str]:
    """Fault -> the proof that finds it, or `refused when opened`: the table of the list."""
    rows = re.findall(r"^\| ([^|]+?) +\| (found: [^|]+?|refused when opened) +\|$", LIST.read_text(), re.MULTILINE)
    return {fault: how.removeprefix("found: ") for fault, how in rows}


def bad(findings: list[doctor.Finding]) -> dict[str, str]:
    return {finding.name: finding.detail for finding in findings if not finding.ok}


@pytest.mark.parametrize("kind", [*KINDS, "nv-embed"])
def test_the_healthy_are_healthy(kind: str, healthy: Callable[[str], Path]) -> None:
    folder = healthy(kind)
    findings = doctor.examine(Embedder.load(folder), folder)
    assert bad(findings) == {} and len(findings) > 14


@pytest.mark.parametrize("fault", IN_FOLDER)
def test_a_fault_in_a_folder(fault: str, healthy: Callable[[str], Path], tmp_path: Path) -> None:
    kind, seed = IN_FOLDER[fault]
    folder = Path(shutil.copytree(healthy(kind), tmp_path / "model"))
    seed(folder)
    if listed()[fault] == REFUSED:
        with pytest.raises(ProbeError, match=r"saved with|attention"):
            Embedder.load(folder)
    else:
        assert listed()[fault] in bad(doctor.examine(Embedder.load(folder), folder))


@pytest.mark.parametrize("fault", IN_MODEL)
def test_a_fault_in_a_model(fault: str, healthy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, seed = IN_MODEL[fault]
    folder = healthy(kind)
    model = Embedder.load(folder)
    seed(Case(model, monkeypatch))
    assert listed()[fault] in bad(doctor.examine(model, folder))


def test_the_list_has_the_faults() -> None:
    assert sorted(listed()) == sorted([*IN_FOLDER, *IN_MODEL]) and len(listed()) >= 25
    assert [fault for fault, how in listed().items() if how == RECORD] == ONLY_BY_RECORD


ONLY_BY_RECORD = ["final norm skipped", "adapters merged and still added"]
