"""`Embedder`: a network with its tokenizer and text contract, which encodes texts, trains and saves.

N texts, E embedding, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from embedwright.cpu import accelerate as cpu
from embedwright.fingerprint import Digest, Facts, tokenizer_fact
from embedwright.host import loading
from embedwright.model import encode
from embedwright.model.adapters.lora import add_lora, has_lora, merge_lora
from embedwright.model.backbone import AttentionKind, dtype_named, origin_of, positions
from embedwright.model.formats.base import new_embedder
from embedwright.model.formats.detect import warn_of_embedder
from embedwright.model.formats.open import check_record, open_embedder, open_in_int8
from embedwright.model.interop import hub
from embedwright.model.interop.save import opens_as_stock, save_network
from embedwright.model.network import EmbedwrightModel, check_fit, fold, network_facts
from embedwright.model.pooling import Kind, PoolingConfig, check_unfolded
from embedwright.model.quantized import warn_of_gpu
from embedwright.model.verify import probe, selftest
from embedwright.model.verify.modes import evaluating
from embedwright.packing import PackedTexts, pack
from embedwright.text import Contract, TextTokenizer, check_texts, tokenize_checked, with_backend, without_backend

Backend = Literal["packed", "sdpa", "eager"]


class Embedder:
    """Encodes texts into unit vectors.

    `network` is a `torch.nn.Module`; training works on it directly. `tokenizer` is for the caller, to count tokens or
    look at them. The model uses its own copies (`own_tokenizer`, `text_tokenizer`), so changes to `tokenizer` change no
    vector and no saved folder. To add tokens, add them to the base's folder first.
    """

    def __init__(self, network: EmbedwrightModel, tokenizer: Any) -> None:
        self.network, self.tokenizer = network, tokenizer
        self.contract: Contract = network.contract
        self._digests, self._unfolded = (Digest(), Digest()), dict[str, str]()
        check_fit(network, tokenizer)
        self._shell, self.text_tokenizer = without_backend(tokenizer), TextTokenizer(tokenizer.backend_tokenizer)

    @cached_property
    def own_tokenizer(self) -> Any:
        """The transformers tokenizer as it was when the model was made, which folders hold. It is made when needed."""
        return with_backend(self._shell, self.text_tokenizer.plain)

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
        default_task: str | None = None,
        dtype: str = "float32",
        four_bit: bool = False,
        device: str | None = None,
        backend: Backend = "packed",
        seed: int = 0,
        **sizes: Any,
    ) -> Embedder:
        """Makes a new embedder from a decoder.

        A fresh pooling block is the identity, so the new model equals its decoder with mean pooling.

        Args:
            base: Local folder, .gguf file, packaged name or hub id, looked for in this order.
            revision: Branch, tag or commit of a hub id (also written `org/name@revision`): all files are read from it.
            pooling: `latent`, `mean`, `last`, `self` or `mlp`.
            attention: `bidirectional` or `causal`.
            layers: Keep this many of the first layers. Default: all.
            max_tokens: Tokens after which a text is cut. Default: 512, or the decoder's positions if fewer.
            pool_prompt: Also pool the tokens of the instruction, BOS and EOS, for servers that pool every token.
            default_task: The model's own instruction, used for queries given without one. Default: none.
            dtype: `float32`, `bfloat16` or `float16`.
            four_bit: Linear layers in 4 bits, to train adapters on. The model cannot be merged or saved. Needs [qlora].
            device: Default: the GPU if there is one, else the CPU.
            backend: For tests alone. `sdpa` and `eager` run transformers' own attention, one text at a time.
            seed: Seeds the weights of the pooling block.
            sizes: Sizes of the pooling block, as in `PoolingConfig`: latents, heads, head_dim, multiple.

        Raises:
            ValueError: The base is not a decoder, or an argument does not fit it.
            FileNotFoundError: There is no such path.
            ProbeError: The result is not bidirectional (or causal) as asked.
        """
        warn_of_embedder(str(base), revision)
        network, tokenizer = new_embedder(
            base,
            revision,
            pooling=PoolingConfig(kind=pooling, **sizes),
            attention=attention,
            layers=layers,
            max_tokens=max_tokens,
            pool_prompt=pool_prompt,
            default_task=default_task,
            dtype=dtype_named(dtype),
            four_bit=four_bit,
            seed=seed,
        )
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
        """Loads an embedder: one that `save` wrote, a released NV-Embed, or another published decoder embedder.

        Args:
            path: Local folder or hub id. The base of an adapter folder is opened where `adapter_config.json` says.
            revision: Branch, tag or commit of a hub id (also written `org/name@revision`).
            device: Default: the GPU if there is one, else the CPU.
            dtype: `float32`, `bfloat16` or `float16`. Default: the stored one. Adapters stay in float32. `int8`: the
                linear layers of the blocks in 8 bits, adapters merged, for inference; faster than bfloat16 on CPUs.
            backend: For tests alone. `sdpa` and `eager` run transformers' own attention, one text at a time.

        Raises:
            FileNotFoundError: There is no such folder, or no base.
            ValueError: The folder holds no embedder, or its base is not the one that the adapters were trained on.
            ProbeError: The model does not give the vectors that were stored with it, or does not attend as it says.
        """
        if dtype == "int8":
            return cls(*open_in_int8(path, revision))._ready(device, backend)
        kept = None if dtype is None else dtype_named(dtype)
        model = cls(*open_embedder(path, dtype=kept, revision=revision))._ready(device, backend)
        check_record(model.network, model.text_tokenizer, path, revision)
        return model

    def save(self, path: str | Path, dtype: str | None = None) -> None:
        """Saves the model into a new folder. `dtype` is the type of the weights there; without it they keep theirs.

        `mean` and `last` models without BOS or with `pool_prompt` also open in plain sentence-transformers, others once
        embedwright is imported. A model with unmerged adapters is saved as an adapter folder in peft's format: LoRA,
        pooling block, and where the base is.

        Raises:
            FileExistsError: The folder is not empty.
            ValueError: The model is folded, a weight does not fit in `dtype`, or the adapters' base is not on disk.
            ProbeError: The adapters are not active.
        """
        network, given = self.network, None if dtype is None else dtype_named(dtype)
        check_unfolded(network.head)
        save_network(network, self.own_tokenizer, Path(path), given)
        if not has_lora(network.backbone) and given in (None, network.backbone.dtype):  # else the folder has others
            stock = opens_as_stock(network, self.text_tokenizer)
            network.origin = origin_of(path, network.backbone, "stock" if stock else "whole", head=network.head)

    def to_sentence_transformer(self) -> Any:
        """Wraps the same weights as a SentenceTransformer (6.x), with the same vectors. Training it trains this model.

        What it saves is a whole model in our format, adapters merged. Raises ValueError for a folded model.
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
        """Uploads what `save` writes, with a model card, to the Hugging Face hub. Returns the repository's address.

        A new repository is made where there is none, `private` or not. `token` is by default the one that `hf auth
        login` keeps. `card` is a whole text, or arguments of `model.interop.card.model_card` that the model does not
        know by itself, such as `license`. Raises ValueError as `save` does, and if others cannot open the base.
        """
        return hub.push_to_hub(self.network, self.own_tokenizer, repo_id, private=private, token=token, card=card)

    @loading()
    def add_lora(self, rank: int = 16, alpha: int = 32, dropout: float = 0.0) -> Embedder:
        """Adds LoRA to every linear layer of the backbone, in place. Vectors do not change until it is trained.

        From then on the adapters and the whole pooling block train, both in float32; the rest is frozen. A warning
        names weights that are not linear layers, such as the experts of a mixture: they get no adapter. Raises
        ValueError for a model that has adapters already, or is folded.
        """
        check_unfolded(self.network.head)
        add_lora(self.network.backbone, rank=rank, alpha=alpha, dropout=dropout, mixed=self.network.mixed)
        self.network.head.float().requires_grad_(True)
        return self

    def merge(self) -> Embedder:
        """Merges the adapters into the weights, in place. The vectors stay the same, which a few texts prove.

        Raises ValueError if there are no adapters or one is not active, and RuntimeError if vectors moved by more than
        rounding: the model is lost then, load it again.
        """
        merge_lora(self.network, self.tokenize([text for text, _ in selftest.TEXTS]).to(self.device))
        probe.check(self.network)
        return self

    def fold(self) -> Embedder:
        """Replaces a latent block by two small matrices, in place, for inference. Vectors stay the same to 1e-5.

        At the released NV-Embed's sizes this saves two thirds of the block's parameters and half of its work. Other
        heads stay as they are. A folded model cannot be saved, exported or trained: load it again for that. Raises
        RuntimeError, and changes nothing, where the vectors of a few texts move by more than rounding.
        """
        head = self.network.head
        if fold(self.network, self.tokenize([text for text, _ in selftest.TEXTS]).to(self.device)):
            before, after = (Digest().of(dict(block.named_parameters())) for block in (head, self.network.head))
            self._unfolded[after] = before  # one fingerprint for both
        return self

    def _ready(self, device: str | None, backend: Backend) -> Embedder:
        self.network.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
        probe.check(self.network)
        if backend != "packed":
            self.network.attend_by(backend)
        else:
            (cpu.accelerate if self.device.type == "cpu" else warn_of_gpu)(self.network)
        return self

    @property
    def max_tokens(self) -> int:
        return self.contract.max_tokens

    @property
    def longest(self) -> int:
        """The largest `max_tokens` that a call may give."""
        return min(max(self.contract.max_tokens, positions(self.network.backbone.config)), self.network.longest)

    @property
    def embedding_dim(self) -> int:
        return int(self.network.backbone.config.hidden_size)

    @property
    def device(self) -> torch.device:
        return torch.device(next(self.network.parameters()).device)

    def fingerprint(self) -> Facts:
        """Returns what identifies the model: equal for two models exactly if both give the same vectors up to rounding.

        They cover weights (adapters too), contract, pooling, backbone, tokenizer and dtype, but no name and no folder.
        Stored vectors carry them. The weights are hashed once, and again after they have changed.
        """
        parts = self.network.backbone.state_dict(keep_vars=True), dict(self.network.head.named_parameters())
        weights, pooling = (digest.of(tensors) for digest, tensors in zip(self._digests, parts, strict=True))
        tokenizer = tokenizer_fact(self.text_tokenizer.plain, self.contract.mask_rule == "count")
        digests = {"weights": weights, "tokenizer": tokenizer, "pooling.weights": self._unfolded.get(pooling, pooling)}
        return digests | network_facts(self.network, self.contract)

    def tokenize(
        self, texts: Sequence[str], task: str | None = None, prefix: str | None = None, max_tokens: int | None = None
    ) -> PackedTexts:
        """Tokenises texts as the model reads them. Returns them in one packed row, in the order given."""
        in_front, limit = encode.prefix_and_limit(self.contract, self.longest, task, prefix, max_tokens)
        return pack(tokenize_checked(self.text_tokenizer, self.contract, check_texts(texts), in_front, limit))

    def encode(
        self,
        texts: Sequence[str],
        task: str | None = None,
        *,
        prefix: str | None = None,
        max_tokens: int | None = None,
        batch_tokens: int | None = None,
        dim: int | None = None,
        precision: encode.Precision = "float32",
        progress: bool = False,
    ) -> NDArray[Any]:
        """Encodes texts into vectors. The batches do not change them.

        Args:
            texts: A list or another ordered series of texts.
            task: The instruction, for queries; "" for queries without one. None: the texts are documents.
            prefix: The raw string in front of each text, in place of `task`.
            max_tokens: Tokens after which a text is cut. Default: the model's.
            batch_tokens: Tokens of a batch at most; a longer text is a batch of its own. Default: 32,768 on a GPU; 256
                for each thread of a CPU, at least 1,024.
            dim: Keep this many of the first dimensions and normalise again.
            precision: `float32`; `int8`, each vector's largest number at 127; or `binary`, the signs as bits of uint8.
            progress: Show a progress bar.

        Returns:
            (N, E), in the order of the texts; float32 vectors have unit length.

        Raises:
            TypeError: A text is not a str, or an argument has another type. A text is named by its index.
            ValueError: A text has no token to pool or no finite vector (named by its index), or an argument is invalid.
        """
        texts = check_texts(texts)
        in_front, limit = encode.prefix_and_limit(self.contract, self.longest, task, prefix, max_tokens)
        batch_tokens = self.batch_tokens if batch_tokens is None else batch_tokens
        encode.check_sizes(dim, batch_tokens, precision, self.embedding_dim)
        try:
            with evaluating(self.network):
                vectors = encode.encoded(
                    texts,
                    lambda some: tokenize_checked(self.text_tokenizer, self.contract, list(some), in_front, limit),
                    self._embed_without_gradients,
                    device=self.device,
                    batch_tokens=batch_tokens,
                    width=self.embedding_dim,
                    progress=progress,
                )
        except encode.NotFiniteError as error:
            raise encode.NotFiniteError(error.index, self.network.backbone.dtype) from None
        return encode.quantize(vectors if dim is None else encode.shortened(vectors, dim), precision)

    def encode_query(self, texts: Sequence[str], task: str | None = None, **options: Any) -> NDArray[Any]:
        """Encodes queries, under the instruction `task` or the model's own. `options` are those of `encode`.

        Raises ValueError if there is neither, since queries would be read as documents. `task=""` asks for none.
        """
        task = self.contract.query_task(task) if options.get("prefix") is None else task
        return self.encode(texts, task, **options)

    def encode_document(self, texts: Sequence[str], **options: Any) -> NDArray[Any]:
        """Encodes documents. `options` are those of `encode`; a document has no task."""
        return self.encode(texts, None, **options)

    def _embed_without_gradients(self, packed: PackedTexts) -> Tensor:
        with torch.inference_mode(not self.network.sharded), torch.no_grad():
            return self.embed(packed)

    @property
    def batch_tokens(self) -> int:
        """The default of `batch_tokens`. Larger ones take more memory, and are at most a tenth faster."""
        return max(1024, 256 * torch.get_num_threads()) if self.device.type == "cpu" else 32_768

    def embed(self, packed: PackedTexts) -> Tensor:
        """Embeds packed texts with gradient: (N, E) float32 of unit length. Training calls it."""
        return self.network.embed(packed.to(self.device))
