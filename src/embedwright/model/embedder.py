"""`Embedder`: a network, its tokenizer and its text contract. Made from a decoder or loaded, encodes, saves.

N texts, E embedding, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.cpu import accelerate as cpu
from embedwright.errors import InputError
from embedwright.fingerprint import Digest, Facts, config_facts, dtypes, facts, tokenizer_fact
from embedwright.host import loading
from embedwright.model.adapters import fourbit
from embedwright.model.adapters.lora import add_lora, has_lora, merge_lora
from embedwright.model.backbone import AttentionKind, decoder_config, load_backbone, origin_of, positions
from embedwright.model.encode import NotFiniteError, Precision, check_precision, quantize, shortened, vectors_of
from embedwright.model.formats.base import build_network, resolve_base
from embedwright.model.formats.open import open_embedder
from embedwright.model.interop import hub
from embedwright.model.interop.save import opens_as_stock, save_network
from embedwright.model.network import EmbedwrightModel, check_fit
from embedwright.model.pooling import FOLDED, FoldedLatent, Kind, LatentPooling, PoolingConfig
from embedwright.model.verify import probe, selftest
from embedwright.model.verify.modes import evaluating
from embedwright.packing import PackedTexts, pack
from embedwright.text import (
    BOUNDARY_TEMPLATE,
    INSTRUCTION_TEMPLATE,
    Contract,
    NoTokenError,
    TextTokenizer,
    check_limit,
    check_text,
    check_texts,
    check_whole,
    leading_ids,
    load_tokenizer,
    private_copy,
    read,
)

Backend = Literal["packed", "sdpa", "eager"]

_FOLDED_FLOAT32, _FOLDED_16_BITS = 1e-4, 0.1  # how far folding may move a unit vector


class Embedder:
    """Encodes texts into unit vectors. `network` is a `torch.nn.Module`; training works on it directly.

    `tokenizer` is the caller's, to count tokens or look at them. The model reads and saves with a copy of it
    (`own_tokenizer`, `text_tokenizer`) that was made with the model: tokens added to `tokenizer`, its truncation,
    padding and templates change no vector and no saved folder. To add tokens, add them to the base's folder first.
    """

    def __init__(self, network: EmbedwrightModel, tokenizer: Any) -> None:
        self.network = network
        self.tokenizer = tokenizer
        self.contract: Contract = network.contract
        self._digests, self._unfolded = (Digest(), Digest()), dict[str, str]()
        check_fit(network, tokenizer)
        self.own_tokenizer = private_copy(tokenizer)
        self.text_tokenizer = TextTokenizer(self.own_tokenizer.backend_tokenizer)

    # -- made, loaded, saved

    @classmethod
    @loading()
    def from_decoder(
        cls,
        base: str | Path,
        *,
        revision: str | None = None,
        pooling: Kind = "latent",
        attention: AttentionKind = "bidirectional",
        layers: int | None = None,
        max_tokens: int | None = None,
        pool_prompt: bool = False,
        dtype: str = "float32",
        four_bit: bool = False,
        device: str | None = None,
        backend: Backend = "packed",
        seed: int = 0,
        **sizes: Any,
    ) -> Embedder:
        """A new embedder from a decoder: local folder, .gguf file, packaged name or hub id, looked for in this order.

        `revision` is a branch, tag or commit of a hub id (also written `org/name@revision`); config, weights and
        tokenizer are all read from the one commit that it names.
        `layers` keeps the first so many. `max_tokens`: 512, or fewer where the decoder has fewer positions.
        `pool_prompt` pools the tokens of the instruction, BOS and EOS too: for servers that pool every token.
        `sizes` are those of `PoolingConfig` (latents, heads, head_dim, multiple).
        `four_bit` holds the weights of the linear layers in 4 bits and computes in `dtype`, to train adapters on: such
        a model can be neither merged nor saved (ImportError without the extra [qlora]).
        A fresh pooling block is the identity, so the new model is its decoder with mean pooling. Raises ValueError
        for a model that is no decoder, FileNotFoundError for a missing path, ProbeError if the result is not
        bidirectional (or causal) as asked.
        """
        config = PoolingConfig(kind=pooling, **sizes)
        folder = resolve_base(base, revision)
        decoder = decoder_config(folder, attention=attention, layers=layers)
        tokenizer = load_tokenizer(folder)
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer of {base} has no EOS token")
        if max_tokens is None:
            max_tokens = min(512, positions(decoder))
        contract = new_contract(tokenizer, pooling, max_tokens, pool_prompt)
        if contract.max_tokens > positions(decoder):
            raise InputError(f"max_tokens={max_tokens}: {base} has positions for {positions(decoder)} tokens")
        quantization = fourbit.config(_dtype(dtype)) if four_bit else None
        backbone = load_backbone(folder, decoder, _dtype(dtype), quantization)
        if four_bit:
            fourbit.keep_trainable(backbone)
        network = build_network(backbone, config, contract)
        network.origin = origin_of(base, backbone, "decoder", revision)
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds GPUs too
        network.head.reset()
        return cls(network, tokenizer)._ready(device, backend)

    @classmethod
    @loading()
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        backend: Backend = "packed",
    ) -> Embedder:
        """An embedder that `save` wrote: a local folder or a hub id. `dtype` None keeps the stored one.

        `revision` is a branch, tag or commit of a hub id (also written `org/name@revision`).
        Of an adapter folder, ours or peft's, the base is opened where `adapter_config.json` says. `dtype` is then the
        base's; what trains is float32. FileNotFoundError without the base, ValueError where it is another one.
        """
        network, tokenizer = open_embedder(path, dtype=None if dtype is None else _dtype(dtype), revision=revision)
        model = cls(network, tokenizer)._ready(device, backend)
        folder = Path(network.config.name_or_path)
        reload = lambda kept: open_embedder(path, dtype=kept, revision=revision)[0]  # noqa: E731
        selftest.check(network, model.text_tokenizer, folder, reload)
        return model

    def save(self, path: str | Path) -> None:
        """Write a new folder: stock (opens in plain sentence-transformers) for mean and last, ours for the others.

        With adapters that are not merged it is an adapter folder: LoRA and pooling block, in peft's format, and where
        the base is. FileExistsError where the folder is not empty, ValueError where the weights below the adapters are
        on no disk, ProbeError where the adapters are not at work.
        """
        if isinstance(self.network.head, FoldedLatent):
            raise InputError(FOLDED)
        save_network(self.network, self.own_tokenizer, Path(path))
        if not has_lora(self.network.backbone):
            stock = opens_as_stock(self.network, self.text_tokenizer)
            self.network.origin = origin_of(path, self.network.backbone, "stock" if stock else "whole")

    def to_sentence_transformer(self) -> Any:
        """A SentenceTransformer (6.x) of the same weights: training it, as with its own trainer, trains this model.

        Transformer -> Pooling -> Normalize, as if this model had been saved and opened there, with the same vectors.
        What it saves is a whole model of our format, adapters merged; `save` writes the rest of what this one can be.
        ImportError without sentence-transformers, ValueError for a folded model.
        """
        return hub.sentence_transformer(self.network, self.own_tokenizer)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        card: str | Mapping[str, Any] | None = None,
    ) -> str:
        """Upload what `save` writes, with a model card, to the Hugging Face hub; gives the repository's address.

        The repository is made if it is not there (`private` then says which kind). `token`: None for the one that
        `hf auth login` keeps. `card`: arguments of `model.interop.card.model_card` beside those that the model
        knows, such as `base`, `license`, `data` and `scores`; or a whole text. ValueError as in `save`, and for
        adapters whose base others cannot open.
        """
        return hub.push_to_hub(self.network, self.own_tokenizer, repo_id, private=private, token=token, card=card)

    @loading()
    def add_lora(self, rank: int = 16, alpha: int = 32, dropout: float = 0.0) -> Embedder:
        """LoRA on every linear layer of the backbone, in place. Vectors stay as they are until it is trained.

        The adapters and, in full, the pooling block are what trains from here on, both in float32; the rest is frozen.
        A warning names weights that are no linear layers, such as the experts of a mixture: they get no adapter.
        ValueError where the model has adapters already or is folded.
        """
        if isinstance(self.network.head, FoldedLatent):
            raise InputError(FOLDED)
        add_lora(self.network.backbone, rank=rank, alpha=alpha, dropout=dropout, mixed=self.network.mixed)
        self.network.head.float().requires_grad_(True)
        return self

    def merge(self) -> Embedder:
        """Fold the adapters into the weights, in place: the model is a plain one again, with the same vectors.

        Proved on a few texts, then probed. ValueError where there is nothing to merge or an adapter is not at work;
        RuntimeError where vectors moved by more than rounding: that model is lost, load it again.
        """
        texts = self.tokenize([text for text, _ in selftest.TEXTS])
        merge_lora(self.network, texts.to(self.device))
        probe.check(self.network)
        return self

    def fold(self) -> Embedder:
        """For inference alone, in place: a latent block becomes two small matrices, with the same vectors to 1e-5.

        Saves the released NV-Embed sizes two thirds of the block's parameters and half of its work. Other heads stay as
        they are. Saving, exporting or training a folded model is a ValueError: its block is gone, load it again.
        Proved on a few texts: RuntimeError where vectors moved by more than rounding, and the model stays as it was.
        """
        head = self.network.head
        if isinstance(head, LatentPooling):
            before = Digest().of(dict(head.named_parameters()))
            texts = self.tokenize([text for text, _ in selftest.TEXTS])
            folded = FoldedLatent(head)  # in the mode of the block, before it is switched
            with evaluating(self.network), torch.no_grad():
                unfolded_NE = self.embed(texts).float()
            self.network.head = folded
            with evaluating(self.network), torch.no_grad():
                moved = float((self.embed(texts).float() - unfolded_NE).norm(dim=-1).max())
            if not moved <= (_FOLDED_FLOAT32 if head.latents.dtype == torch.float32 else _FOLDED_16_BITS):
                self.network.head = head
                raise RuntimeError(f"folding the latent block moved vectors by {moved:.1e}: the model stays unfolded")
            self.network.requires_grad_(False)
            self._unfolded[Digest().of(dict(self.network.head.named_parameters()))] = before  # one fingerprint for both
        return self

    def _ready(self, device: str | None, backend: Backend) -> Embedder:
        self.network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        probe.check(self.network)
        if backend != "packed":
            self.network.attend_by(backend)
        elif self.device.type == "cpu":
            cpu.accelerate(self.network)
        return self

    # -- facts

    @property
    def max_tokens(self) -> int:
        return self.contract.max_tokens

    @property
    def longest(self) -> int:
        """The largest `max_tokens` that a call may ask for."""
        known = max(self.contract.max_tokens, positions(self.network.backbone.config))
        return min(known, self.network.longest)

    @property
    def embedding_dim(self) -> int:
        return int(self.network.backbone.config.hidden_size)

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.network.parameters()).device
        return device

    def fingerprint(self) -> Facts:
        """What this model is known by: equal for two models exactly when they give the same vectors.

        Weights (adapters too), contract, pooling, backbone, tokenizer and dtype; no name and no folder. Kept beside
        stored vectors. The weights are hashed once, and again after they have changed.
        """
        network, contract = self.network, self.contract
        backbone, head = network.backbone.state_dict(keep_vars=True), dict(network.head.named_parameters())
        weights, pooling = (digest.of(tensors) for digest, tensors in zip(self._digests, (backbone, head), strict=True))
        return {
            "kind": "embedwright",
            "weights": weights,
            "dtype": dtypes(backbone) + (", mixed" if network.mixed else ""),
            "tokenizer": tokenizer_fact(self.own_tokenizer.backend_tokenizer, contract.mask_rule == "count"),
            **config_facts("backbone", network.backbone.config),
            **facts("contract", contract.model_dump(mode="json")),
            **facts("pooling", network.pooling.model_dump(mode="json", include=None if head else {"kind"})),
            "pooling.weights": self._unfolded.get(pooling, pooling),
            "pooling.dtype": dtypes(head),
        }

    # -- texts to vectors

    def tokenize(
        self,
        texts: Sequence[str],
        task: str | None = None,
        prefix: str | None = None,
        max_tokens: int | None = None,
    ) -> PackedTexts:
        """The texts as this model reads them, in one packed row, in the order given."""
        in_front, limit = self._frame(task, prefix, max_tokens)
        return pack(read(self.text_tokenizer, self.contract, check_texts(texts), in_front, limit))

    def _frame(self, task: str | None, prefix: str | None, max_tokens: int | None) -> tuple[str, int]:
        """The string in front of each text, and the tokens to which texts are cut; both checked."""
        for name, value in (("task", task), ("prefix", prefix)):
            if value is not None:
                check_text(value, name)
        if task is not None and prefix is not None:
            raise InputError("give task or prefix, not both")
        in_front = self.contract.prefix(task) if prefix is None else prefix
        limit = check_limit(self.contract, self.contract.max_tokens if max_tokens is None else max_tokens)
        if limit > self.longest:
            raise InputError(f"max_tokens={limit}: the model has positions for {self.longest} tokens")
        return in_front, limit

    def encode(
        self,
        texts: Sequence[str],
        task: str | None = None,
        *,
        prefix: str | None = None,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        dim: int | None = None,
        precision: Precision = "float32",
        progress: bool = False,
    ) -> NDArray[Any]:
        """Vectors of the texts: float32 (N, E) of unit length, in the order given, whatever the batches were.

        `task` is an instruction for queries (None: documents); `prefix` is the raw string in front, instead of it.
        `batch_tokens` bounds the tokens of a batch (default: 256 for each thread of a CPU, 1,024 at least; on a GPU
        32,768); a longer text is one of its own. `dim` keeps the first so many dimensions and normalises again.
        `precision`: `int8` scales each vector's largest component to 127, `binary` packs the signs into uint8
        (N, dim/8). TypeError and ValueError name the index of a bad text.
        """
        texts = check_texts(texts)
        in_front, limit = self._frame(task, prefix, max_tokens)
        batch_tokens = self._batch_tokens() if batch_tokens is None else batch_tokens
        self._check_sizes(dim, batch_tokens, precision)
        unique = list(dict.fromkeys(texts))
        vectors = np.empty((len(unique), self.embedding_dim), dtype=np.float32)
        found = vectors_of(
            unique,
            lambda some: read(self.text_tokenizer, self.contract, list(some), in_front, limit),
            self._embed_alone,
            self.device,
            batch_tokens,
        )
        try:
            with evaluating(self.network), _progress_bar(len(unique), progress) as bar:
                for rows, embedded in found:
                    vectors[rows] = embedded
                    bar.update(len(rows))
        except NoTokenError as error:  # its index is among the distinct texts: name the caller's
            raise NoTokenError(error.prefix, error.limit, texts.index(unique[error.index])) from None
        except NotFiniteError as error:
            raise self._overflow(texts.index(unique[error.index])) from None
        if len(unique) != len(texts):
            row = {text: i for i, text in enumerate(unique)}
            vectors = vectors[[row[text] for text in texts]]
        return quantize(vectors if dim is None else shortened(vectors, dim), precision)

    def _check_sizes(self, dim: int | None, batch_tokens: int, precision: str) -> None:
        check_precision(precision)
        check_whole(batch_tokens, "batch_tokens")
        if batch_tokens < 1:
            raise InputError(f"batch_tokens={batch_tokens} must be positive")
        if dim is not None:
            check_whole(dim, "dim")
            if not 1 <= dim <= self.embedding_dim:
                raise InputError(f"dim={dim}: the model has {self.embedding_dim} dimensions")

    def _overflow(self, index: int) -> InputError:
        """The error for a text whose states overflow the type of the weights, or meet weights that are not finite."""
        dtype = str(self.network.backbone.dtype).removeprefix("torch.")
        help = 'load the model with dtype="float32" or "bfloat16"' if dtype == "float16" else "its weights are broken"
        return InputError(f"texts[{index}]: the model computes no finite vector of it in {dtype}: {help}")

    def _embed_alone(self, packed: PackedTexts) -> Tensor:
        """Embeds without gradients."""
        with torch.inference_mode(not self.network.sharded), torch.no_grad():
            return self.embed(packed)

    def _batch_tokens(self) -> int:
        """Where the caller gives none. More are up to a tenth faster on two threads, and take more memory."""
        return max(1024, 256 * torch.get_num_threads()) if self.device.type == "cpu" else 32_768

    def embed(self, packed: PackedTexts) -> Tensor:
        """(N, E) with gradient: what training calls."""
        return self.network.embed(packed.to(self.device))


def new_contract(tokenizer: Any, pooling: Kind, max_tokens: int, pool_prompt: bool = False) -> Contract:
    """The text contract of an embedder that is made from the decoder with this tokenizer."""
    bos_ids = leading_ids(tokenizer.backend_tokenizer)
    # mean and last are saved as stock sentence-transformers folders, whose prompts end where a token ends
    stock = pooling in ("mean", "last") and not bos_ids and not pool_prompt
    contract = Contract(
        query_template=BOUNDARY_TEMPLATE if stock else INSTRUCTION_TEMPLATE,
        eos_id=tokenizer.eos_token_id,
        bos_ids=bos_ids,
        mask_rule="all" if pool_prompt else "boundary" if stock else "offsets",
    )
    return contract.model_copy(update={"max_tokens": check_limit(contract, max_tokens)})


def _dtype(name: str) -> torch.dtype:
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in dtypes:
        raise InputError(f"dtype={name!r} is none of {', '.join(dtypes)}")
    return dtypes[name]


def _progress_bar(total: int, shown: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(total=total, unit="text", desc="encode", disable=not shown)
