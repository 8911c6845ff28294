"""An exported folder: what it holds, that ONNX Runtime alone runs it, that a wrong one is never written."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exports import documented

from embedwright.cli import main as cli
from embedwright.errors import InputError, MissingPackageError
from embedwright.export import graph, onnx
from embedwright.export.onnx import export_onnx
from embedwright.model.embedder import Embedder
from embedwright.model.quantized import quantize_layers
from embedwright.model.verify import doctor
from embedwright.model.verify.probe import ProbeError

TASK = "Given a question, retrieve passages that answer it"
TEXTS = [
    "how do tides work?",
    "a",
    "",
    "  leading spaces",
    "\n\nleading lines",
    "naïve café, Straße, 漢字かな 🙂🙂🏽",
    "</s> and <s> inside, then </s>",
    "far too long " * 60,
]


def run(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", ["embedwright", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def settings(folder: Path) -> Any:
    return json.loads((folder / "embedwright.json").read_text(encoding="utf-8"))


@pytest.fixture
def same_graph(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing takes seconds: tests of what happens to a graph take that of `exported`."""
    import onnx_ir

    monkeypatch.setattr(graph, "trace", lambda network: onnx_ir.load(exported / "onnx" / "model.onnx"))


# ---- what is written


def test_the_folder_has_the_layout_that_others_read(exported: Path, latent: Embedder) -> None:
    files = {str(file.relative_to(exported)) for file in exported.rglob("*") if file.is_file()}
    assert {"onnx/model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "embedwright.json"} <= files
    assert {"modules.json", "1_Pooling/config.json", "selftest.json"} <= files
    assert not any(name.endswith(".safetensors") for name in files)
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "llama" and "_name_or_path" not in config
    made = settings(exported)
    assert made["contract"] == json.loads(latent.contract.model_dump_json()) and made["pooling"]["kind"] == "latent"
    assert made["onnx"]["weights"] == "float32" and 0 < made["onnx"]["largest_difference"] <= 1e-5
    said = (exported.parent / "said").read_text()
    assert re.fullmatch(r"float32, in ONNX Runtime: largest difference \d\.\de-\d\d on 10 texts", said)


def test_the_documented_lines_give_the_models_vectors(exported: Path, latent: Embedder) -> None:
    encode = documented(exported)
    for task in (None, TASK):
        expected = latent.encode(TEXTS, task)
        np.testing.assert_allclose(encode(TEXTS, task), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(encode(TEXTS[-1:], task), expected[-1:], rtol=0, atol=1e-5)
    assert latent.tokenize(TEXTS[-1:]).longest == 40


@pytest.mark.long
@pytest.mark.parametrize("pool_prompt", [False, True])
def test_the_documented_lines_under_the_other_rules(
    pool_prompt: bool, tiny_embedder: Callable[..., Embedder], tmp_path: Path, onnx_packages: None
) -> None:
    model = tiny_embedder("mean", "llama", layers=1, pool_prompt=pool_prompt, max_tokens=40)
    assert model.contract.mask_rule == ("all" if pool_prompt else "boundary")
    export_onnx(model, tmp_path / "out")
    encode = documented(tmp_path / "out")
    for task in (None, TASK):
        np.testing.assert_allclose(encode(TEXTS, task), model.encode(TEXTS, task), rtol=0, atol=1e-5)
    line = {f.name: f.detail for f in doctor.examine_name(str(tmp_path / "out"))}["other programs"]
    assert ("queries and documents" in line) == pool_prompt


def test_fastembed_gives_the_vectors_of_documents(exported: Path, latent: Embedder) -> None:
    if importlib.util.find_spec("fastembed") is None:
        pytest.skip("no fastembed: pip install fastembed")
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    TextEmbedding.add_custom_model(
        "exported", PoolingType.DISABLED, False, ModelSource(hf="none/none"), dim=32, model_file="onnx/model.onnx"
    )
    texts = [text for text in TEXTS if "</s>" not in text]  # it reads them as special tokens
    vectors = np.array(list(TextEmbedding("exported", specific_model_path=str(exported)).embed(texts)))
    np.testing.assert_allclose(vectors, latent.encode(texts), rtol=0, atol=1e-5)


@pytest.mark.parametrize("inline", [10_000, 2**30])
def test_int8_says_what_it_costs(
    inline: int, exported: Path, latent: Embedder, tmp_path: Path, same_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx as onnx_package

    monkeypatch.setattr(graph, "INLINE", inline)
    said = export_onnx(latent, tmp_path / "out", "int8")
    written = onnx_package.load(tmp_path / "out" / "onnx" / "model.onnx")
    names = [node.op_type for node in written.graph.node]
    linears = 7 + 4  # of the blocks, and of the folded head
    assert names.count("MatMulInteger") == linears and names.count("Gather") > 0
    scales = [i for i in written.graph.initializer if i.name.endswith("_scale") and len(i.dims) == 1 and i.dims[0] > 1]
    assert len(scales) >= linears  # one for each output
    files = {"model.onnx", "model.onnx_data"} if inline == 10_000 else {"model.onnx"}
    assert {file.name for file in (tmp_path / "out" / "onnx").iterdir()} == files
    # the loss that it says is the one that anybody measures, on the texts of the record, one by one
    encode, texts = documented(tmp_path / "out"), [text for text, _ in onnx.selftest.TEXTS]
    asked = [(text, task) for text in texts for task in (None, doctor.TASK)]
    cosines = [float(encode([text], task)[0] @ latent.encode([text], task)[0]) for text, task in asked]
    lowest = float(re.search(r"lowest ([\d.]+);", said)[1])  # type: ignore[index]
    assert said.startswith("int8, in ONNX Runtime: cosine") and 0.9 < lowest <= min(cosines) + 1e-4 and lowest < 0.99999
    found = {f.name: f for f in doctor.examine_name(str(tmp_path / "out"))}
    assert all(finding.ok for finding in found.values()) and "int8" in found["ONNX export"].detail


# ---- what is not written


def test_a_wrong_graph_is_never_written(
    exported: Path, latent: Embedder, tmp_path: Path, same_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with torch.no_grad():
        weight = latent.network.backbone.layers[0].mlp.up_proj.weight
        weight[3] += 0.05
        try:
            for weights in ("float32", "int8"):
                with pytest.raises(
                    ProbeError, match=r"ONNX Runtime gives other vectors than the model: they differ by"
                ):
                    export_onnx(latent, tmp_path / "out", weights)  # type: ignore[arg-type]
        finally:
            weight[3] -= 0.05
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_gives_no_number_in_one_batch_is_never_written(
    exported: Path, latent: Embedder, tmp_path: Path, same_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = onnx.vectors_of

    def broken(session: Any, texts: Any) -> Any:
        vectors = found(session, texts)
        return np.where(len(texts) > 5, np.nan, vectors)  # of all together; alone they are right

    monkeypatch.setattr(onnx, "vectors_of", broken)
    with pytest.raises(ProbeError, match="they differ by nan"):
        export_onnx(latent, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_where_float32_loses_digits_the_graph_is_held_to_float64(
    exported: Path, latent: Embedder, tmp_path: Path, same_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text is equal to the last bit, so that a tolerance of nothing sends each of them there."""
    monkeypatch.setattr(onnx, "TOLERANCE", 0.0)
    said = export_onnx(latent, tmp_path / "out")
    assert re.search(r"on 10 texts \(the model itself is \d\.\de-0[78] from float64\)$", said)
    with torch.no_grad():
        weight = latent.network.backbone.layers[0].mlp.up_proj.weight
        weight[3] += 1e-4
        try:
            with pytest.raises(ProbeError, match="other vectors than the model"):
                export_onnx(latent, tmp_path / "wrong")
        finally:
            weight[3] -= 1e-4
    assert not (tmp_path / "wrong").exists()


@pytest.mark.long
def test_a_decoder_whose_states_are_a_thousand_times_apart(
    smollm2_folder: Path, tmp_path: Path, onnx_packages: None
) -> None:
    """SmolLM2-135M as it comes, all layers: a text of two tokens is 6e-5 from float64."""
    model = Embedder.from_decoder(smollm2_folder, pooling="mean")
    assert "(the model itself is" in export_onnx(model, tmp_path / "out")
    for text in ("x", "how do tides work?"):
        np.testing.assert_allclose(documented(tmp_path / "out")([text]), model.encode([text]), rtol=0, atol=1e-4)
    assert all(finding.ok for finding in doctor.examine_name(str(tmp_path / "out")))


def test_without_onnxruntime_it_says_that_it_did_not_verify(
    exported: Path, latent: Embedder, tmp_path: Path, same_graph: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = {"onnxruntime"}
    monkeypatch.setattr(onnx, "find_spec", lambda name: None if name in lacking else object())
    assert export_onnx(latent, tmp_path / "out") == "float32, not verified: onnxruntime is not installed"
    assert settings(tmp_path / "out")["onnx"] == {"weights": "float32", "verified": False}
    assert {f.name: f.detail for f in doctor.examine_name(str(tmp_path / "out"))}["opens"].endswith(
        "needs onnxruntime: pip install 'embedwright[onnx]'"
    )
    with pytest.raises(MissingPackageError, match=r"needs onnxruntime: pip install 'embedwright\[onnx\]'"):
        export_onnx(latent, tmp_path / "other", "int8")
    lacking |= {"onnx", "onnxscript"}
    with pytest.raises(MissingPackageError, match="needs onnx and onnxscript"):
        export_onnx(latent, tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: quantize_layers(m.network), "its weights are quantised: export the model that they were made from"),
        (lambda m: m.add_lora(rank=2), "LoRA adapters are not merged"),
        (lambda m: m.network.to(torch.bfloat16), 'load the model with dtype="float32"'),
        (lambda m: setattr(m.network, "mixed", True), 'load the model with dtype="float32"'),
        (lambda m: setattr(m.network.backbone, "is_loaded_in_4bit", True), "in 4 bits, for training adapters"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    change: Callable[[Embedder], Any],
    reason: str,
    tiny_embedder: Callable[..., Embedder],
    tmp_path: Path,
    onnx_packages: None,
) -> None:
    model = tiny_embedder("mean")
    change(model)
    with pytest.raises(InputError, match=reason):
        export_onnx(model, tmp_path / "out")
    with pytest.raises(InputError, match="weights='INT8' is none of float32, int8"):
        export_onnx(model, tmp_path / "out", "INT8")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


# ---- the command, and what others say of the folder


@pytest.mark.long
def test_the_command_merges_adapters(
    tiny_embedder: Callable[..., Embedder],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    onnx_packages: None,
) -> None:
    tuned = tiny_embedder("mean", "llama").add_lora(rank=2, alpha=4)
    with torch.no_grad():
        for name, parameter in tuned.network.named_parameters():
            if "lora_" in name:
                parameter += 0.05 * torch.randn_like(parameter)
    tuned.save(tmp_path / "adapter")
    out = tmp_path / "out"
    assert run("export", tmp_path / "adapter", out, "--format", "onnx", monkeypatch=monkeypatch) == 0
    assert capsys.readouterr().out.startswith(f"{out}: onnx layout, float32, in ONNX Runtime: largest difference")
    np.testing.assert_allclose(documented(out)(TEXTS, TASK), tuned.encode(TEXTS, TASK), rtol=0, atol=1e-5)
    assert run("doctor", out, monkeypatch=monkeypatch) == 0
    assert re.search(r"ok +ONNX export +float32, mean pooling, \d+ MB", capsys.readouterr().out)


def test_embedwright_says_what_the_folder_is(exported: Path) -> None:
    with pytest.raises(InputError, match=r"is an ONNX export, which onnxruntime runs \(docs/export.md\)"):
        Embedder.load(exported)


def test_doctor_finds_what_was_changed(exported: Path, latent: Embedder, tmp_path: Path) -> None:
    assert all(finding.ok for finding in doctor.examine_name(str(exported)))

    def bad(name: str, content: bytes) -> set[str]:
        folder = shutil.copytree(exported, tmp_path / "changed")
        (folder / name).write_bytes(content)
        found = {finding.name for finding in doctor.examine_name(str(folder)) if not finding.ok}
        shutil.rmtree(folder)
        return found

    changed = settings(exported)
    changed["contract"]["query_template"] = "Task: {task}\nQuery: "
    recorded = "as recorded when it was exported"
    assert bad("embedwright.json", json.dumps(changed).encode()) == {"tokens as recorded", recorded}
    written = (exported / "onnx" / "model.onnx").read_bytes()
    assert bad("onnx/model.onnx", written[: len(written) // 2]) == {"opens"}
    column = latent.network.backbone.layers[0].mlp.up_proj.weight[:, 5].detach().numpy().tobytes()
    assert written.count(column) == 1  # the graph holds it transposed
    assert bad("onnx/model.onnx", written.replace(column, column[::-1])) == {recorded}
