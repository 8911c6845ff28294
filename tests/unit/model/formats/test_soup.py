"""Soups of saved folders, against sums and rotations made here with plain tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from torch import Tensor

from embedwright.fingerprint import aligned_with
from embedwright.model.embedder import Embedder
from embedwright.model.formats import soup as soup_module
from embedwright.model.formats.soup import soup

TEXTS = ["how do tides work?", "a", "naïve café, 漢字 🙂", "long " * 60]
TASK = "Find the answer"

Make = Callable[..., Embedder]
Save = Callable[..., Path]


@pytest.fixture
def save(tiny_embedder: Make, tmp_path: Path) -> Save:
    """`save("a", noise=0.1, seed=1, pooling="latent", **from_decoder's)`: a folder with noise on every weight."""

    def make(name: str, noise: float = 0.0, seed: int = 1, pooling: str = "latent", **options: Any) -> Path:
        model = tiny_embedder(pooling, **options)
        stir(model, lambda t, random: noise * t.std(correction=0) * random, seed)
        model.save(tmp_path / name)
        return tmp_path / name

    return make


def stir(model: Embedder, added: Callable[[Tensor, Tensor], Tensor], seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for parameter in model.network.parameters():
        noise = torch.randn(parameter.shape, generator=random).to(parameter.dtype)
        parameter.data += added(parameter.data, noise)


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def rounded_once(tensor: Tensor, exact: Tensor) -> bool:
    """Whether every number is within half a step of its type, and the sum's own error in the wider one."""
    half = torch.finfo(tensor.dtype).eps / 2
    own = (1e-7 if tensor.element_size() == 2 else 1e-15) * exact.abs().max()
    smallest = torch.finfo(tensor.dtype).smallest_normal * half
    return bool(((tensor.double() - exact).abs() <= half * exact.abs() + own + smallest).all())


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


# ---- what comes out


@pytest.mark.parametrize("pooling", ["latent", "mean"])
@pytest.mark.parametrize("weights", [None, [2, 1, 1], [0.2, 0.3, 0.5]])
def test_the_average_is_the_weighted_sum_of_every_tensor(
    pooling: str, weights: list[float] | None, save: Save, tmp_path: Path
) -> None:
    folders = [save(name, 0.2, seed, pooling) for seed, name in enumerate("abc")]
    soup(folders, tmp_path / "new" / "soup", weights=weights)
    made, parts = tensors(tmp_path / "new" / "soup"), [tensors(folder) for folder in folders]
    shares = np.array(weights or [1, 1, 1]) / sum(weights or [1, 1, 1])
    assert made.keys() == parts[0].keys()
    for name, tensor in made.items():
        expected = sum(share * part[name].double() for share, part in zip(shares, parts, strict=True))
        assert tensor.dtype == torch.float32 and rounded_once(tensor, expected), name
        assert not torch.equal(tensor, parts[0][name])
    assert files_of(tmp_path / "new" / "soup") == files_of(folders[0]) | {"README.md"}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["soup"]


def test_the_result_is_a_model_with_its_own_selftest(save: Save, tmp_path: Path) -> None:
    a, b = save("a", pooling="mean"), save("b", 0.2, pooling="mean")
    soup([a, b], tmp_path / "soup")
    model, st = Embedder.load(tmp_path / "soup"), SentenceTransformer(str(tmp_path / "soup"), device="cpu")
    np.testing.assert_allclose(st.encode(TEXTS), model.encode(TEXTS), rtol=0, atol=1e-6)
    first = Embedder.load(a)
    assert model.contract == first.contract and abs(model.encode(TEXTS) - first.encode(TEXTS)).max() > 1e-3
    proofs = [json.loads((folder / "selftest.json").read_text())["texts"] for folder in (a, tmp_path / "soup")]
    assert [text["ids"] for text in proofs[0]] == [text["ids"] for text in proofs[1]]
    assert proofs[0] != proofs[1]


@pytest.mark.parametrize(("angle", "way"), [(0.6, 0.5), (0.6, 0.25), (0.9, 0.8), (0.02, 0.3)])
def test_slerp_turns_every_tensor_by_a_part_of_the_angle(
    angle: float, way: float, save: Save, tiny_embedder: Make, tmp_path: Path
) -> None:
    a, other = save("a"), tiny_embedder("latent")
    random = torch.Generator().manual_seed(3)
    arms = {}
    for name, parameter in other.network.named_parameters():  # the same length, `angle` away
        start, noise = parameter.data.double(), torch.randn(parameter.shape, generator=random).double()
        right = noise - (noise * start).sum() / (start * start).sum() * start
        arms[name] = start, right * start.norm() / right.norm()
        parameter.data = (math.cos(angle) * start + math.sin(angle) * arms[name][1]).float()
    other.save(tmp_path / "b")
    soup([a, tmp_path / "b"], tmp_path / "soup", how="slerp", weights=[1 - way, way])
    made, end = tensors(tmp_path / "soup"), tensors(tmp_path / "b")
    for name, (start, right) in arms.items():
        if angle > 0.1:
            expected = math.cos(way * angle) * start + math.sin(way * angle) * right
        else:  # a line
            expected = (1 - way) * start + way * end[name].double()
        torch.testing.assert_close(made[name].double(), expected, rtol=0, atol=2e-6 * float(start.abs().max()))


def test_a_tensor_of_zeros_has_no_direction(save: Save, tiny_embedder: Make, tmp_path: Path) -> None:
    a = save("a")
    model = tiny_embedder("latent")
    model.network.head.feed_forward.narrow.bias.data.zero_()
    model.save(tmp_path / "b")
    soup([a, tmp_path / "b"], tmp_path / "soup", how="slerp", weights=[3, 1])
    name = "head.feed_forward.narrow.bias"
    torch.testing.assert_close(tensors(tmp_path / "soup")[name], 0.75 * tensors(a)[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("how", ["average", "slerp"])
def test_a_model_and_itself_are_that_model(how: Any, dtype: str, save: Save, tmp_path: Path) -> None:
    a = save("a", dtype=dtype)
    soup([a, a], tmp_path / "soup", how=how, weights=[0.3, 0.7])
    before, after = tensors(a), tensors(tmp_path / "soup")
    assert all(
        torch.equal(after[name], tensor) and after[name].dtype == tensor.dtype for name, tensor in before.items()
    )
    np.testing.assert_array_equal(Embedder.load(tmp_path / "soup").encode(TEXTS), Embedder.load(a).encode(TEXTS))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sums_of_16_bits_are_rounded_once(dtype: str, save: Save, tmp_path: Path) -> None:
    weights = [0.3, 0.3, 0.4]
    folders = [save(name, 0.3, seed, dtype=dtype) for seed, name in enumerate("abc")]
    soup(folders, tmp_path / "soup", weights=weights)
    made, parts = tensors(tmp_path / "soup"), [tensors(folder) for folder in folders]
    for name, tensor in made.items():
        exact = sum(weight * part[name].double() for weight, part in zip(weights, parts, strict=True))
        assert tensor.dtype == parts[0][name].dtype and rounded_once(tensor, exact), name


def test_the_first_model_says_the_type(save: Save, tmp_path: Path) -> None:
    a, b = save("a", 0.1, dtype="bfloat16", pooling="mean"), save("b", 0.1, 2, dtype="float32", pooling="mean")
    soup([a, b], tmp_path / "soup")
    assert {tensor.dtype for tensor in tensors(tmp_path / "soup").values()} == {torch.bfloat16}
    assert Embedder.load(tmp_path / "soup").network.backbone.dtype == torch.bfloat16


@pytest.mark.parametrize("pooling", ["mean", "latent"])  # the two formats that keep a history
def test_a_soup_of_aligned_students_is_aligned_no_more(pooling: str, tiny_embedder: Make, tmp_path: Path) -> None:
    model = tiny_embedder(pooling)
    model.network.config.history = [{"step": "distil", "aligned_with": "teacher"}]
    model.save(tmp_path / "a")
    a = Embedder.load(tmp_path / "a")
    assert aligned_with(a) == "teacher"
    soup([tmp_path / "a", tmp_path / "a"], tmp_path / "soup")
    made = Embedder.load(tmp_path / "soup")
    assert (
        made.network.config.history == [*a.network.config.history, {"step": "soup", "of": "a, a"}]
        and aligned_with(made) is None
    )


def test_only_what_save_writes_is_taken_from_the_first_model(save: Save, tmp_path: Path) -> None:
    a, b = save("a", 0.1, pooling="mean"), save("b", 0.1, 2, pooling="mean")
    for name in ("compression.json", "notes.json", "1_Pooling/mine.json"):  # of `compress --report`, and a user's
        (a / name).write_text("{}")
    soup([a, b], tmp_path / "soup")
    written, plain = ({file.relative_to(folder) for file in folder.rglob("*.*")} for folder in (tmp_path / "soup", b))
    assert written == plain | {Path("README.md")}


def test_the_card_has_what_the_models_agree_on_and_each_licence(save: Save, tmp_path: Path) -> None:
    a, b = save("a", 0.1), save("b", 0.1, 2)
    for folder, licence in ((a, "mit"), (b, "cc-by-nc-4.0")):
        front = f"---\nlicense: {licence}\nbase_model: google/gemma-3-270m\n---\n"
        (folder / "README.md").write_text(f"{front}\n# x\n\n## Data\n\nrows of {folder.name}\n")
    soup([a, b], tmp_path / "soup")
    card = ModelCard((tmp_path / "soup" / "README.md").read_text())
    told = card.data.to_dict()
    assert told["base_model"] == "google/gemma-3-270m" and "license" not in told
    assert "| a | mit |\n| b | cc-by-nc-4.0 |" in card.text and "# soup\n" in card.text
    assert "## Data of a\n\nrows of a" in card.text and "## Data of b\n\nrows of b" in card.text


def test_adapters_are_merged_first(save: Save, tmp_path: Path) -> None:
    base = save("base")
    merged = []
    for seed, name in enumerate("ab"):
        model = Embedder.load(base).add_lora(2)
        with torch.no_grad():
            for parameter_name, parameter in model.network.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.normal_(std=0.02, generator=torch.Generator().manual_seed(seed))
        model.save(tmp_path / name)
        model.merge().save(tmp_path / f"merged-{name}")
        merged.append(tensors(tmp_path / f"merged-{name}"))
    soup([tmp_path / "a", tmp_path / "b"], tmp_path / "soup")
    for name, tensor in tensors(tmp_path / "soup").items():
        torch.testing.assert_close(tensor, (merged[0][name] + merged[1][name]) / 2, rtol=0, atol=1e-6)
    assert not (tmp_path / "soup" / "adapter_config.json").exists()


def test_weights_in_several_files(save: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = save("a", 0.1), save("b", 0.1, 2)
    soup([a, b], tmp_path / "one")
    monkeypatch.setattr(soup_module, "_SHARD", "30KB")
    soup([a, b], tmp_path / "many")
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    largest = max(tensor.nbytes for tensor in tensors(a).values())
    assert len(files) > 3 and max(file.stat().st_size for file in files) < max(30_000, largest) + 5_000
    soup([tmp_path / "many", tmp_path / "one"], tmp_path / "again")  # read from several files too
    for folder in ("many", "again"):
        found, expected = tensors(tmp_path / folder), tensors(tmp_path / "one")
        assert found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())
        assert len(list((tmp_path / folder).glob("*.safetensors"))) == len(files)
    vectors = [Embedder.load(tmp_path / folder).encode(TEXTS) for folder in ("one", "many")]
    np.testing.assert_array_equal(*vectors)


# ---- what does not go together


def refused(models: list[Path], out: Path, reason: str, error: type[Exception] = ValueError, **options: Any) -> None:
    before = set(out.parent.iterdir())
    with pytest.raises(error, match=reason):
        soup(models, out, **options)
    assert set(out.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"max_tokens": 99}, "a and .*b do not go together: contract.max_tokens is 512 in the first and 99 in"),
        ({"layers": 2}, "do not go together: backbone.num_hidden_layers is 3 in the first and 2"),
        ({"attention": "causal"}, "do not go together: backbone.is_causal is false in the first and true"),
        ({"latents": 5}, "do not go together: pooling.latents is 6 in the first and 5"),
        ({"family": "qwen3"}, "do not go together: backbone"),
        ({"bos": True}, "do not go together: backbone|contract.bos_ids"),
        ({"pooling": "mean"}, "do not go together"),
        ({"pooling": "self"}, 'do not go together: pooling.kind is "latent" in the first and "self"'),
    ],
)
def test_another_kind_of_model_is_refused(options: dict[str, Any], reason: str, save: Save, tmp_path: Path) -> None:
    refused([save("a"), save("b", **options)], tmp_path / "soup", reason)


def test_another_tokenizer_is_refused(save: Save, tmp_path: Path) -> None:
    a, b = save("a"), save("b")
    content = json.loads((b / "tokenizer.json").read_text())
    first, second = [piece for piece, number in content["model"]["vocab"].items() if number in (300, 301)]
    vocab = content["model"]["vocab"]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (b / "tokenizer.json").write_text(json.dumps(content))
    refused([a, b], tmp_path / "soup", "do not go together: tokenizer is")


def test_weights_of_another_origin_are_refused(tiny_embedder: Make, save: Save, tmp_path: Path) -> None:
    a = save("a", 0.3)
    for what, part in (("backbone", "backbone"), ("pooling block", "head")):
        model = tiny_embedder("latent")
        random = torch.Generator().manual_seed(5)
        for parameter in getattr(model.network, part).parameters():
            if parameter.dim() > 1:
                parameter.data = 0.2 * torch.randn(parameter.shape, generator=random)
        model.save(tmp_path / part)
        refused([a, tmp_path / part], tmp_path / "soup", f"the weights of the {what} have little in common")


def test_a_head_that_began_at_zero_may_go_its_own_way(tiny_decoder: Callable[..., Path], tmp_path: Path) -> None:
    """Runs of one recipe: the same latents and projections at the start, other output projections behind it."""
    for seed, name in enumerate("ab"):
        model = Embedder.from_decoder(tiny_decoder("llama"), latents=6, heads=2, multiple=1)
        random = torch.Generator().manual_seed(seed)
        for matrix in (model.network.head.attention.to_out, model.network.head.feed_forward.narrow):
            assert not matrix.weight.any()
            matrix.weight.data = 0.1 * torch.randn(matrix.weight.shape, generator=random)
        model.save(tmp_path / name)
    soup([tmp_path / "a", tmp_path / "b"], tmp_path / "soup")
    for name, seed in (("c", 1), ("d", 2)):
        Embedder.from_decoder(tiny_decoder("llama"), latents=6, heads=2, multiple=1, seed=seed).save(tmp_path / name)
    refused([tmp_path / "c", tmp_path / "d"], tmp_path / "e", "the pooling block have little in common.*the same seed")


def test_other_names_and_shapes_are_refused(save: Save, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    a, b = save("a"), save("b")
    whole = tensors(b)
    save_file({**whole, "head.latents": whole["head.latents"][:4]}, b / "model.safetensors", metadata={"format": "pt"})
    refused([a, b], tmp_path / "soup", r"head.latents is \[6, 32\] in the first and \[4, 32\]")
    del whole["head.latents"]
    save_file(whole, b / "model.safetensors", metadata={"format": "pt"})
    refused([a, b], tmp_path / "soup", "only one of them has head.latents")


@pytest.mark.parametrize(
    ("count", "options", "reason"),
    [
        (1, {}, "two models or more, not of 1"),
        (3, {"how": "slerp"}, "slerp is between two models, not 3"),
        (2, {"how": "mean"}, "how='mean' is none of average, slerp"),
        (2, {"weights": [1, 2, 3]}, "weights: 3 for 2 models"),
        (2, {"weights": [1, 0]}, "all must be positive"),
        (2, {"weights": [1, float("nan")]}, "all must be positive"),
    ],
)
def test_what_makes_no_soup(count: int, options: dict[str, Any], reason: str, save: Save, tmp_path: Path) -> None:
    refused([save("a")] * count, tmp_path / "soup", reason, **options)


def test_what_is_no_saved_model_and_a_full_folder(
    save: Save, tiny_decoder: Callable[..., Path], tmp_path: Path
) -> None:
    a, released = save("a"), Path(__file__).parents[3] / "parity" / "fixtures" / "nvembed-tiny-v2"
    refused([a, tiny_decoder("llama")], tmp_path / "soup", "not a folder that Embedder.save wrote")
    refused([a, released], tmp_path / "soup", "not a folder that Embedder.save wrote")
    refused([a, Path("./absent")], tmp_path / "soup", "absent does not exist", FileNotFoundError)
    refused([a, Path("some/model")], tmp_path / "soup", "some/model does not exist", FileNotFoundError)
    refused([a, save("b")], a, "a exists and is not an empty folder", FileExistsError)
