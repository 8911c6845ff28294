"""What all formats share: the decoder below an embedder, the check of its weights, and the network around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from embedwright.errors import InputError, NotFoundError
from embedwright.locate import fetch_weights, find
from embedwright.model.adapters import fourbit
from embedwright.model.backbone import AttentionKind, decoder_config, load_backbone, origin_of, positions
from embedwright.model.formats.folder import (
    ADAPTER,
    check_floats,
    check_folder,
    check_layers,
    is_adapter,
    read_object,
    weights_in,
)
from embedwright.model.formats.gguf import convert_gguf
from embedwright.model.network import EmbedwrightConfig, EmbedwrightModel
from embedwright.model.pooling import WEIGHTLESS, Kind, PoolingConfig
from embedwright.text import (
    BOUNDARY_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    Contract,
    check_limit,
    check_text,
    leading_ids,
    load_tokenizer,
)


class Outline(NamedTuple):
    """What an embedder is, without its weights."""

    decoder: Any  # its config, attention included
    pooling: PoolingConfig
    contract: Contract
    tokenizer: Any


def resolve_base(base: str | Path, revision: str | None = None, *, weights: bool = True) -> str:
    """Finds a decoder by its name and returns its folder, in Hugging Face format and checked.

    `base` is a folder on disk, a .gguf file, a packaged name or a hub id, looked for in this order. A .gguf file is
    converted once and cached; a hub id is read from the snapshot of one commit. Without `weights`, config and tokenizer
    are enough. Raises NotFoundError if nothing is there, InputError if the folder holds something else.
    """
    place = find(base, revision)
    folder = place.path
    if folder.suffix == ".gguf" and folder.is_file():
        return str(convert_gguf(folder))
    if is_adapter(folder):
        raise InputError(f"{base} holds {ADAPTER}, so it is an adapter, not a decoder: merge it into its base first")
    if not (folder / "config.json").is_file():
        raise NotFoundError(f"base model folder {base} has no config.json")
    if weights:
        fetch_weights(place)
    check_folder(folder)
    if weights:
        check_weights(folder)
    return str(folder)


def check_weights(folder: Path) -> None:
    """Raises InputError if a folder lacks weights of its config, a file is cut off, or a weight is not a float."""
    stored, config = weights_in(folder), read_object(folder / "config.json")
    ours = isinstance(config.get("backbone"), dict)
    check_layers(stored, config["backbone"] if ours else config, folder / "config.json")
    whole = (".codes", ".steps") if ours and config.get("quantization") else ()
    codes = {name for name in stored if name.endswith(whole)}
    check_floats(stored, [name for name in stored if name not in codes and (ours or name.endswith(".weight"))])
    if odd := [name for name in sorted(codes) if stored[name].dtype not in ("I8", "U8")]:
        raise InputError(f"{stored[odd[0]].file}: {odd[0]} is stored as {stored[odd[0]].dtype}, but codes are I8 or U8")


def build_network(backbone: Any, pooling: PoolingConfig, contract: Contract, **kept: Any) -> EmbedwrightModel:
    """Builds the network around a loaded backbone. The weights of its pooling block are still to be set."""
    config = EmbedwrightConfig(
        backbone=backbone.config.to_dict(), pooling=pooling.model_dump(), contract=contract.model_dump(), **kept
    )
    return EmbedwrightModel(config, backbone=backbone)


def new_embedder(
    base: str | Path,
    revision: str | None,
    *,
    pooling: PoolingConfig,
    attention: AttentionKind,
    layers: int | None,
    max_tokens: int | None,
    pool_prompt: bool,
    default_task: str | None,
    dtype: torch.dtype,
    four_bit: bool,
    seed: int,
) -> tuple[EmbedwrightModel, Any]:
    """Builds the network and loads the tokenizer of a new embedder. `Embedder.from_decoder` explains the arguments."""
    folder = resolve_base(base, revision)
    decoder = decoder_config(folder, attention=attention, layers=layers)
    tokenizer = load_tokenizer(folder)
    if tokenizer.eos_token_id is None:
        raise InputError(f"the tokenizer of {base} has no EOS token")
    if max_tokens is None:
        max_tokens = min(512, positions(decoder))
    contract = new_contract(tokenizer, pooling.kind, max_tokens, pool_prompt, default_task)
    if contract.max_tokens > positions(decoder):
        raise InputError(f"max_tokens={max_tokens}: {base} has positions for {positions(decoder)} tokens")
    backbone = load_backbone(folder, decoder, dtype, fourbit.config(dtype) if four_bit else None)
    if four_bit:
        fourbit.keep_trainable(backbone)
    network = build_network(backbone, pooling, contract)
    network.origin = origin_of(base, backbone, "decoder", revision)
    torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs too
    network.head.reset()
    return network, tokenizer


def new_contract(
    tokenizer: Any,
    pooling: Kind,
    max_tokens: int,
    pool_prompt: bool = False,
    default_task: str | None = None,
    mask_rule: Literal["offsets", "boundary"] | None = None,
) -> Contract:
    """Returns the text contract of a new embedder with this tokenizer.

    Without `mask_rule`, the pooling decides. InputError if the rule is `boundary` and texts begin with BOS.
    """
    check_text(default_task or "", "default_task")
    bos_ids = leading_ids(tokenizer.backend_tokenizer)
    if mask_rule == "boundary" and bos_ids:
        raise InputError("boundary: this tokenizer begins texts with BOS, which the rule lacks: use offsets")
    # mean and last are saved as stock sentence-transformers folders, whose prompts end where a token ends
    rule = mask_rule or ("boundary" if pooling in WEIGHTLESS and not bos_ids else "offsets")
    contract = Contract(
        query_template=BOUNDARY_TEMPLATE if rule == "boundary" and not pool_prompt else INSTRUCTION_TEMPLATE,
        eos_id=tokenizer.eos_token_id,
        bos_ids=bos_ids,
        mask_rule="all" if pool_prompt else rule,
        default_task=default_task or "",
    )
    return contract.model_copy(update={"max_tokens": check_limit(contract, max_tokens)})
