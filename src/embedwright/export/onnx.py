"""Writes a model as a folder for ONNX Runtime, in the layout of optimum, and proves it there before it is in place.

N texts, L longest, E embedding.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from embedwright.cpu.accelerate import restore
from embedwright.errors import InputError, MissingPackageError, check_choice
from embedwright.export import graph
from embedwright.files import check_new_folder, scratch_folder, whole_folder
from embedwright.model.adapters.fourbit import ONLY_TRAINED, in_four_bits
from embedwright.model.adapters.lora import has_lora
from embedwright.model.embedder import Embedder
from embedwright.model.formats.detect import ONNX_GRAPH, STOCK_SETTINGS
from embedwright.model.formats.folder import read_object
from embedwright.model.interop.save import write_files, write_tokenizer
from embedwright.model.interop.tokenizer import STOCK_TRANSFORMER, sentence_transformers_files
from embedwright.model.network import EmbedwrightModel
from embedwright.model.quantized import has_quantized_layers
from embedwright.model.verify import probe, selftest
from embedwright.model.verify.modes import evaluating
from embedwright.model.verify.probe import ProbeError
from embedwright.packing import pack
from embedwright.text import Contract, TextTokenizer, TokenizedText, tokenize, tokenize_checked

Weights = Literal["float32", "int8"]

TOLERANCE = 1e-5  # largest difference in one dimension of a unit vector, between ONNX Runtime and this library
_ROUNDING = 4  # times the rounding of float32: how far a graph may be from float64 where that is more than TOLERANCE
_LONGEST = 1024  # tokens: texts of the proof are no longer
_OTHER_MACHINE = 0.02  # int8 products saturate on processors without VNNI: how far a cosine may fall there


def export_onnx(model: Embedder, path: str | Path, weights: Weights = "float32") -> str:
    """Writes a new folder with the model as an ONNX graph. Returns a line that says how equal it is.

    ONNX Runtime runs the graph before the folder is in place: in float32 its vectors are those of `model` to 1e-5, in
    batches and lengths that were not traced. Some decoders have a few states so large that float32 loses more digits
    than that: such a text is held to the model in float64, as near as the rounding of float32 lets it be.

    `int8` holds the weights of all products in 8 bits, a scale for each output, by ONNX Runtime's dynamic quantisation
    of that graph; the line says what it costs. Without onnxruntime there is float32 alone, and the line says that it
    was not verified.

    Raises:
        InputError: The model has adapters, weights in another type than float32, or a decoder that torch cannot trace.
        MissingPackageError: A package of the extra [onnx] is missing.
        ProbeError: The graph gives other vectors than the model. Nothing is written.
    """
    check_new_folder(path)
    _check(model.network, weights)
    probe.check(model.network)
    with whole_folder(path) as temp:
        file = temp / ONNX_GRAPH
        file.parent.mkdir()
        graph.write(graph.trace(model.network), file)
        made: dict[str, Any] = {"weights": weights, "verified": False}
        if find_spec("onnxruntime") is not None:
            made |= _proven(model, file, weights)
        _write_settings(model, temp, made)
    return _said(made)


def _check(network: EmbedwrightModel, weights: Weights) -> None:
    check_choice("weights", weights, get_args(Weights))
    needed = ["onnx", "onnxscript", *(["onnxruntime"] if weights == "int8" else [])]
    if lacking := [name for name in needed if find_spec(name) is None]:
        raise MissingPackageError(f"an ONNX export needs {' and '.join(lacking)}: pip install 'embedwright[onnx]'")
    if in_four_bits(network.backbone):
        raise InputError(f"cannot export: {ONLY_TRAINED}")
    if has_lora(network.backbone):
        raise InputError("LoRA adapters are not merged, and a graph has no place for them: merge them first")
    if has_quantized_layers(network):
        raise InputError("its weights are quantised: export the model that they were made from")
    types = {parameter.dtype for parameter in network.parameters()}
    if types != {torch.float32} or network.mixed:
        raise InputError('an ONNX graph computes in float32: load the model with dtype="float32"')


def _proven(model: Embedder, file: Path, weights: Weights) -> dict[str, Any]:
    """Compares the graph in `file` with the model, and for int8 puts the quantised one in its place."""
    rows = _rows(model)
    with evaluating(model.network), torch.inference_mode():
        expected_NE = model.network.embed(pack(rows).to(model.device)).cpu().numpy()
    session = session_of(file)
    order = [*range(len(rows))[::-1]]
    difference_N, found_NE = np.zeros(len(rows)), expected_NE.copy()
    for batch in (order, order[:1], order[-1:], order[1:4]):  # together, and in the smallest batches
        for i, vector_E in zip(batch, vectors_of(session, [rows[i] for i in batch]), strict=True):
            difference = float(np.abs(vector_E - expected_NE[i]).max())
            if difference > difference_N[i] or np.isnan(difference):  # once NaN, it stays
                difference_N[i], found_NE[i] = difference, vector_E
    largest = float(difference_N.max())
    made: dict[str, Any] = {"verified": True, "texts": len(rows), "largest_difference": largest}
    if not largest <= TOLERANCE:
        exact_NE = _in_float64(model.network, rows)
        own_N, theirs_N = (np.abs(vectors_NE - exact_NE).max(1) for vectors_NE in (expected_NE, found_NE))
        if not (theirs_N <= np.maximum(TOLERANCE, _ROUNDING * own_N)).all():
            raise ProbeError(f"ONNX Runtime gives other vectors than the model: they differ by {largest:.1e}")
        made["rounding_of_float32"] = float(own_N.max())
    if weights == "int8":
        _quantize(file)
        session = session_of(file)
        alone_NE = np.concatenate([vectors_of(session, [row]) for row in rows])  # inputs share one scale in a batch
        cosines_2N = (np.stack([vectors_of(session, rows), alone_NE]) * expected_NE).sum(-1)
        if not np.isfinite(cosines_2N).all():
            raise ProbeError("in int8 the graph gives vectors that are not finite")
        made |= {"lowest_cosine": float(cosines_2N.min()), "mean_cosine": float(cosines_2N.mean())}
    return made


def _in_float64(network: EmbedwrightModel, rows: Sequence[TokenizedText]) -> NDArray[np.float64]:
    """Computes the vectors of texts, (N, E), by a copy of the network in float64."""
    twin = copy.deepcopy(network)
    restore(twin)
    twin.attend_by("sdpa")
    with evaluating(twin.double()), torch.inference_mode():
        vectors_NE: NDArray[np.float64] = twin.embed(pack(rows).to(network.device)).cpu().double().numpy()
    return vectors_NE


def _rows(model: Embedder) -> list[TokenizedText]:
    """Reads the texts of the proof: as queries and as documents, from a few tokens to more than most windows have."""
    limit = min(max(model.max_tokens, 256), model.network.longest, _LONGEST)
    texts = [text for text, _ in selftest.TEXTS]
    texts.append(texts[1] * 40)
    prefixes = [model.contract.prefix(task) for task in (None, selftest.TASK)]
    tokenizer, contract = model.text_tokenizer, model.contract
    return [row for prefix in prefixes for row in tokenize_checked(tokenizer, contract, texts, prefix, limit)]


def session_of(file: Path) -> Any:
    """Opens a graph in ONNX Runtime, on the CPU, with as many threads as torch has."""
    if find_spec("onnxruntime") is None:
        raise MissingPackageError(f"{file} needs onnxruntime: pip install 'embedwright[onnx]'")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors: it warns of the pool mask, which may be given or not
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def vectors_of(session: Any, texts: Sequence[TokenizedText]) -> NDArray[np.float32]:
    """Runs texts in one batch, padded on the right. Returns (N, E)."""
    shape = len(texts), max(len(text.ids) for text in texts)
    ids_NL, attended_NL, pool_NL = inputs = [np.zeros(shape, np.int64) for _ in graph.INPUTS]
    for i, text in enumerate(texts):
        length = len(text.ids)
        ids_NL[i, :length], attended_NL[i, :length], pool_NL[i, :length] = text.ids, 1, text.pool
    vectors_NE: NDArray[np.float32]
    (vectors_NE,) = session.run([graph.VECTORS], dict(zip(graph.INPUTS, inputs, strict=True)))
    return vectors_NE


def _quantize(file: Path) -> None:
    """Replaces a graph by one with int8 weights in its products. Embeddings and norms stay in float32."""
    import onnx_ir
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with scratch_folder(file) as scratch:
        model = onnx_ir.load(file)
        # else it advises, on the root logger, to fold constants first: torch's exporter has
        model.metadata_props["onnx.quant.pre_process"] = "onnxruntime.quant"
        graph.write(model, scratch / "whole.onnx")
        quantize_dynamic(
            scratch / "whole.onnx",
            scratch / "small.onnx",
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=True,
        )
        for old in file.parent.glob(f"{file.name}*"):
            old.unlink()
        graph.write(onnx_ir.external_data.load_to_model(onnx_ir.load(scratch / "small.onnx")), file)


def _write_settings(model: Embedder, folder: Path, made: dict[str, Any]) -> None:
    """Writes all but the graph: what optimum and sentence-transformers read, the contract, and vectors on record."""
    network, contract, tokenizer = model.network, model.contract, model.own_tokenizer
    network.backbone.config.save_pretrained(folder)
    write_tokenizer(tokenizer, contract, folder)
    pad = (contract.eos_id or 0) if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    plain.enable_truncation(contract.max_tokens)
    plain.enable_padding(pad_id=pad, pad_token=plain.id_to_token(pad))
    plain.save(str(folder / "tokenizer.json"))
    # the states are scaled so that their mean is the model's own pooling, whichever that is
    files = sentence_transformers_files(contract, "mean", model.embedding_dim, STOCK_TRANSFORMER)
    settings = {"contract": contract.model_dump(), "pooling": network.pooling.model_dump(), "onnx": made}
    write_files(folder, {**files, STOCK_SETTINGS: settings})
    selftest.write(network, model.text_tokenizer, folder)


def _said(made: dict[str, Any]) -> str:
    if not made["verified"]:
        return "float32, not verified: onnxruntime is not installed"
    difference = f"largest difference {made['largest_difference']:.1e} on {made['texts']} texts"
    if "rounding_of_float32" in made:
        difference += f" (the model itself is {made['rounding_of_float32']:.1e} from float64)"
    if made["weights"] == "float32":
        return f"float32, in ONNX Runtime: {difference}"
    return (
        f"int8, in ONNX Runtime: cosine with the float32 vectors {made['mean_cosine']:.4f}, lowest "
        f"{made['lowest_cosine']:.4f}; before rounding, {difference}"
    )


def examine(folder: Path) -> Iterator[tuple[str, bool, str]]:
    """Yields proofs of a folder that `export_onnx` wrote: their names, whether they hold, and what was found."""
    settings = read_object(folder / STOCK_SETTINGS)
    made, contract = settings["onnx"], Contract.model_validate(settings["contract"])
    size = sum(file.stat().st_size for file in (folder / ONNX_GRAPH).parent.iterdir()) / 1e6
    pooling = settings["pooling"]["kind"]
    yield "ONNX export", True, f"{made['weights']}, {pooling} pooling, {size:,.0f} MB; onnxruntime runs it"
    tokenizer = TextTokenizer(Tokenizer.from_file(str(folder / "tokenizer.json")))
    stored = json.loads((folder / selftest.FILE).read_text(encoding="utf-8"))["texts"]
    rows = [
        tokenize(tokenizer, contract, [text], contract.prefix(selftest.TASK if query else None), len(row["ids"]) + 1)[0]
        for (text, query), row in zip(selftest.TEXTS, stored, strict=True)
    ]
    same = all(row["ids"] == text.ids.tolist() for text, row in zip(rows, stored, strict=True))
    yield "tokens as recorded", same, "ids of tokenizer.json, by the contract of embedwright.json"
    expected = np.array([row["vector"] for row in stored], dtype=np.float32)
    found = vectors_of(session_of(folder / ONNX_GRAPH), rows)[:, : expected.shape[1]]
    yield "as recorded when it was exported", *_close(found, expected, made)
    yield "other programs", True, _readers(contract, pooling)


def _close(found: NDArray[np.float32], expected: NDArray[np.float32], made: dict[str, Any]) -> tuple[bool, str]:
    """Compares vectors, or their stored parts, with those of the float32 model."""
    if made["weights"] == "float32":
        difference = float(np.abs(found - expected).max())
        return difference <= 1e-4, f"largest difference {difference:.1e}"
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    lowest = float(((found * expected).sum(1) / lengths).min())
    ok = lowest >= made["lowest_cosine"] - _OTHER_MACHINE
    return ok, f"lowest cosine with the float32 vectors {lowest:.4f}, {made['lowest_cosine']:.4f} at the export"


def _readers(contract: Contract, pooling: str) -> str:
    """Says which vectors are right in programs that give ids and attention mask, and no pool mask."""
    names = "FastEmbed without pooling, sentence-transformers' and text-embeddings-inference's ONNX backends"
    if contract.mask_rule == "count" or contract.template_specials or contract.eos_id is None:
        return f"{names}: no, they read texts by another contract; ONNX Runtime with ids and masks of your own"
    if contract.mask_rule == "all" or pooling == "last":
        return f"{names}: queries and documents, with their prompts"
    if contract.document_template:
        return f"{names}: no, they pool the prompts too; ONNX Runtime with a pool mask"
    return f"{names}: documents; queries in ONNX Runtime with a pool mask"
