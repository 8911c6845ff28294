"""The masked loss against stock transformers, text by text; micro-batches, precision (test_parallel.py: processes)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from embedwright.config import ConfigError
from embedwright.cpu import onednn
from embedwright.model.embedder import Embedder
from embedwright.packing import TokenizedText
from embedwright.processes import ALONE
from embedwright.training.masked.batch import MaskedBatch, MaskedText
from embedwright.training.masked.loss import accumulate, language_head, masked_loss, measure
from embedwright.training.parts import ModelPart


def texts(lengths: tuple[int, ...] = (9, 30, 5, 30, 17, 2)) -> list[MaskedText]:
    random = np.random.default_rng(2)
    made = []
    for length in lengths:
        places = np.sort(random.permutation(np.arange(1, length))[: max(length // 4, 1)])
        ids, targets = random.integers(2, 400, length), random.integers(2, 400, len(places))
        made.append(MaskedText(TokenizedText(ids, np.ones(length, dtype=bool)), places, targets))
    return made


def reference(folder: Path, made: list[MaskedText]) -> tuple[float, float, int]:
    """Stock transformers, one text at a time: summed loss, tokens predicted correctly, masked tokens."""
    config = AutoConfig.from_pretrained(folder)
    config.is_causal = False
    for key in ("sliding_window", "use_sliding_window"):
        if config.model_type not in ("gemma3_text", "cohere2") and hasattr(config, key):
            setattr(config, key, None if key == "sliding_window" else False)
    if config.model_type in ("mistral", "qwen3", "phi3") and getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    if config.model_type == "cohere2":
        config.sliding_window = 2**30
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="sdpa").eval()
    loss, right, count = 0.0, 0.0, 0
    with torch.no_grad():
        for text in made:
            ids = torch.from_numpy(text.tokens.ids)[None]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double()
            for place, target in zip(text.positions, text.targets, strict=True):
                loss -= float(logits[place - 1].log_softmax(-1)[target])
                right += float(logits[place - 1].argmax() == target)
                count += 1
    return loss, right, count


def opened(folder: Path, **options: Any) -> tuple[Any, Any]:
    network = Embedder.from_decoder(folder, pooling="mean", **options).network
    return network, language_head(network, ModelPart(base=str(folder)))


# gemma scales its embedding, cohere2 its logits; both tie the head, the others here do not
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gemma3", "cohere2"])
def test_the_loss_is_that_of_stock_transformers(name: str, tiny_decoder: Callable[..., Path]) -> None:
    folder, made = tiny_decoder(name), texts()
    network, head = opened(folder)
    loss, right, count = reference(folder, made)
    with torch.no_grad():
        ours, told = masked_loss(network, head, made)
    assert float(ours) / count == pytest.approx(loss / count, rel=1e-5)
    assert int(told) == right
    measured = measure(network, head, made, ALONE, 40)
    assert measured == {"masked": count, "loss": pytest.approx(loss / count, rel=1e-5), "accuracy": right / count}


def test_the_reference_sees_both_ways(tiny_decoder: Callable[..., Path]) -> None:
    """Else the test above would hold for a causal model, too."""
    folder, made = tiny_decoder("llama"), texts()
    network, head = opened(folder, attention="causal")
    with torch.no_grad():
        causal, _ = masked_loss(network, head, made)
    assert abs(float(causal) - reference(folder, made)[0]) > 0.01 * float(causal)


def test_the_gradient_is_that_of_the_stock_model(tiny_decoder: Callable[..., Path]) -> None:
    """With all weights trained: the tied embedding learns as embedding and as head."""
    folder, made = tiny_decoder("gemma"), texts()
    network, head = opened(folder)
    network.requires_grad_(True)
    loss, tokens = accumulate(network, head, MaskedBatch([], made), ALONE, batch_tokens=40, seed=0)
    config = AutoConfig.from_pretrained(folder)
    config.is_causal = False
    stock = AutoModelForCausalLM.from_pretrained(folder, config=config, attn_implementation="sdpa")
    count, whole = sum(len(text.positions) for text in made), torch.zeros(())
    for text in made:
        ids = torch.from_numpy(text.tokens.ids)[None]
        logits = stock(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, text.positions - 1]
        whole = whole + torch.nn.functional.cross_entropy(logits, torch.from_numpy(text.targets), reduction="sum")
    (whole / count).backward()
    assert loss == pytest.approx(float(whole.detach()) / count, rel=1e-5)
    assert tokens == sum(len(text.tokens.ids) for text in made)
    theirs = dict(stock.model.named_parameters())
    assert theirs.keys() == dict(network.backbone.named_parameters()).keys()
    for name, parameter in network.backbone.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("mixed", [False, True], ids=["fp32", "bf16"])
def test_micro_batches_add_up_to_the_whole(tiny_decoder: Callable[..., Path], mixed: bool) -> None:
    found = {}
    for budget in (8192, 40, 1):
        model = Embedder.from_decoder(tiny_decoder("llama"), pooling="mean", dtype="bfloat16" if mixed else "float32")
        torch.manual_seed(0)
        model.add_lora(4, 8)
        for parameter in model.network.backbone.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.network.mixed = mixed
        head = language_head(model.network, ModelPart(base=str(tiny_decoder("llama"))))
        loss, _ = accumulate(model.network, head, MaskedBatch([], texts()), ALONE, batch_tokens=budget, seed=0)
        trained = [p for p in model.network.backbone.parameters() if p.requires_grad]
        found[budget] = loss, torch.cat([p.grad.flatten() for p in trained if p.grad is not None])
    for budget in (40, 1):
        assert found[budget][0] == pytest.approx(found[8192][0], rel=3e-3 if mixed else 1e-6)
        near = torch.nn.functional.cosine_similarity(found[budget][1], found[8192][1], dim=0)
        assert near > (0.99 if mixed else 1 - 1e-6)


@pytest.mark.parametrize("family", ["llama", "gemma"])  # gemma ties its head to the embedding, which trains
def test_where_the_processor_has_no_bfloat16_the_head_multiplies_in_float32(
    tiny_decoder: Callable[..., Path], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not onednn.available():
        pytest.skip("oneDNN's linear is not there on this machine")
    shapes: list[torch.Size] = []
    linear, found = onednn.linear, {}
    monkeypatch.setattr(onednn, "linear", lambda x, w, bias: shapes.append(w.shape) or linear(x, w, bias))
    for has in (True, False):
        network, _ = opened(tiny_decoder(family))
        network.mixed = True
        monkeypatch.setattr(onednn, "has_product", lambda dtype, has=has: has and dtype != torch.float32)
        head = language_head(network, ModelPart(base=str(tiny_decoder(family))))
        shapes.clear()
        loss, _ = accumulate(network, head, MaskedBatch([], texts()), ALONE, batch_tokens=8192, seed=0)
        size = head.lm_head.weight.shape
        assert (size in shapes) != has
        gradients = [p.grad.flatten() for p in network.backbone.parameters() if p.grad is not None]
        found[has] = loss, torch.cat(gradients)
    assert found[True][0] == pytest.approx(found[False][0], rel=3e-3)
    assert torch.nn.functional.cosine_similarity(found[True][1], found[False][1], dim=0) > 0.99


def test_no_text_sees_another(tiny_decoder: Callable[..., Path]) -> None:
    network, head = opened(tiny_decoder("llama"))
    first, *others = texts()
    with torch.no_grad():
        alone, both = masked_loss(network, head, [first])[0], masked_loss(network, head, [first, *others])[0]
        rest = masked_loss(network, head, others)[0]
    assert float(both) == pytest.approx(float(alone + rest), rel=1e-6)


def test_an_untied_head_is_read_from_the_base_or_refused(
    tiny_decoder: Callable[..., Path], tiny_embedder: Callable[..., Embedder], tmp_path: Path
) -> None:
    model = tiny_embedder("mean", "llama")
    model.save(tmp_path / "embedder")
    loaded = Embedder.load(tmp_path / "embedder")
    with pytest.raises(ConfigError, match=r"head of .*embedder.*lm_head\.weight.*model\.base"):
        language_head(loaded.network, ModelPart.model_validate({"from": str(tmp_path / "embedder")}))
    _, head = opened(tiny_decoder("llama"))
    assert [name for name, p in head.named_parameters()] == ["lm_head.weight"] and not head.lm_head.weight.requires_grad
    tied = tiny_embedder("mean", "gemma")
    tied.save(tmp_path / "tied")  # whose head is its embedding, also after it has trained
    again = Embedder.load(tmp_path / "tied").network
    assert language_head(again, ModelPart.model_validate({"from": str(tmp_path / "tied")})).lm_head.weight is (
        again.backbone.get_input_embeddings().weight
    )
