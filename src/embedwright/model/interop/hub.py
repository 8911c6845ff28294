"""Gives a model to other libraries: as a SentenceTransformer around this network, or as a repository on the hub.

Here no weight is copied, and what a SentenceTransformer trains is this model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi
from torch import Tensor

from embedwright.errors import InputError, MissingPackageError
from embedwright.files import write_text
from embedwright.model.adapters.lora import has_lora
from embedwright.model.formats.detect import seal_history
from embedwright.model.formats.families import split_family
from embedwright.model.formats.folder import SAVED
from embedwright.model.interop.card import facts, model_card
from embedwright.model.interop.save import end_alignment, save_network, write_ours
from embedwright.model.interop.tokenizer import (
    OUR_TRANSFORMER,
    EmbedwrightTokenizer,
    sentence_transformers_files,
    tokenizer_for,
)
from embedwright.model.network import EmbedwrightModel, check_fit
from embedwright.model.pooling import check_unfolded
from embedwright.model.verify.probe import lora_faults
from embedwright.text import TextTokenizer


def sentence_transformer(network: EmbedwrightModel, tokenizer: Any) -> Any:
    """See `Embedder.to_sentence_transformer`."""
    check_unfolded(network.head)
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.base.modules.normalize import Normalize
        from sentence_transformers.sentence_transformer.modules.pooling import Pooling
    except ImportError:
        raise MissingPackageError("needs sentence-transformers 6: pip install 'sentence-transformers>=6,<7'") from None
    hidden = network.backbone.config.hidden_size
    # the network's token outputs are scaled so that their mean is its own pooling, whichever that is
    files = sentence_transformers_files(network.contract, "mean", hidden, OUR_TRANSFORMER)
    with TemporaryDirectory() as folder:  # its constructor reads config and tokenizer from disk
        network.config.save_pretrained(folder)
        tokenizer_for(tokenizer, network.contract).save_pretrained(folder)
        first = _transformer()(folder, model_kwargs={"at_hand": network}, **files["sentence_bert_config.json"])
    return SentenceTransformer(
        modules=[first, Pooling(hidden, "mean", include_prompt=network.contract.mask_rule == "all"), Normalize()],
        device=str(network.device),
        trust_remote_code=False,
        **files["config_sentence_transformers.json"],
    )


@cache
def _transformer() -> Any:
    """Returns a sentence-transformers Transformer around a network, which saves it with merged adapters."""
    from sentence_transformers.base.modules.transformer import Transformer

    def load_model(self: Any, *args: Any, at_hand: EmbedwrightModel | None = None, **kwargs: Any) -> Any:
        return Transformer._load_model(self, *args, **kwargs) if at_hand is None else at_hand

    def save(self: Any, output_path: str, *_: Any, **__: Any) -> None:
        end_alignment(self.model)
        with _reading_as(self.model, self.processor):
            write_ours(self.model, output_path, merged_weights(self.model))
        seal_history(Path(output_path))
        self.processor.save_pretrained(output_path)
        self.save_config(output_path)

    # Under its parent's name, which goes into modules.json: the saved folder then asks for no class of ours.
    methods = {"_load_model": load_model, "save": save, "__module__": Transformer.__module__}
    return type(Transformer.__name__, (Transformer,), methods)


@contextmanager
def _reading_as(network: EmbedwrightModel, tokenizer: EmbedwrightTokenizer) -> Iterator[None]:
    """Within the block the network has the contract of `tokenizer`, which has the `max_seq_length` that is set there.

    Raises InputError for a length that the network cannot read.
    """
    own, network.contract = network.contract, tokenizer.text_contract
    try:
        check_fit(network, tokenizer)
        yield
    finally:
        network.contract, network.config.contract = own, own.model_dump()


@torch.no_grad()
def merged_weights(network: EmbedwrightModel) -> dict[str, Tensor]:
    """Returns the tensors that the network would have after `Embedder.merge`; the network itself stays as it is.

    Sums are made in float32 and rounded once. Raises InputError for adapters that are not active, or not ours.
    """
    tensors: dict[str, Tensor] = dict(network.state_dict())
    if not has_lora(network):
        return tensors
    from peft.tuners.lora import LoraLayer

    if not hasattr(network.backbone, "peft_config"):
        raise InputError("the adapters are not ours: merge them with peft first")
    if faults := lora_faults(network.backbone):
        raise InputError(faults[0])
    for name, module in network.named_modules():
        if isinstance(module, LoraLayer):
            layer: Any = module
            base = layer.get_base_layer().weight
            delta = layer.get_delta_weight(layer.active_adapters[0]).float()
            tensors[f"{name}.base_layer.weight"] = (base.float() + delta).to(base.dtype)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if "lora_" not in name}


def push_to_hub(
    network: EmbedwrightModel,
    tokenizer: Any,
    repo_id: str,
    *,
    private: bool,
    token: str | None,
    card: str | Mapping[str, Any] | None,
) -> str:
    """See `Embedder.push_to_hub`."""
    check_unfolded(network.head)
    base = split_family("" if network.origin is None else network.origin.name)[1]
    if has_lora(network.backbone) and Path(base).is_absolute():
        raise InputError(
            f"the adapters belong to a base on this machine, {base}, which others cannot open: "
            "merge them, or push that base and add them to it"
        )
    known = facts(network, TextTokenizer(tokenizer.backend_tokenizer))
    text = card if isinstance(card, str) else model_card(repo_id, **{**known, **(card or {})})
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        save_network(network, tokenizer, folder)
        write_text(folder / "README.md", text)
        api = HfApi(token=token)
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        old, said = list(SAVED), "Upload an Embedwright model"  # a model of another form would lie beside this one
        api.upload_folder(repo_id=url.repo_id, folder_path=folder, commit_message=said, delete_patterns=old)
    return str(url)
