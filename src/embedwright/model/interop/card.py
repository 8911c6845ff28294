"""Writes the model card of an embedder: a README.md whose front matter the Hugging Face hub reads.

`model_card` takes plain values, since only training knows data, stages and scores; `facts` gives those of the model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

from huggingface_hub import ModelCard, ModelCardData

from embedwright.errors import as_input_error
from embedwright.locate import PUBLISHED, text_of
from embedwright.model.adapters.lora import has_lora
from embedwright.model.formats.detect import detect
from embedwright.model.interop.save import opens_as_stock
from embedwright.model.network import EmbedwrightModel
from embedwright.model.verify.selftest import TASK
from embedwright.text import Contract, TextTokenizer

Row = Mapping[str, str | float | None]
Form = Literal["stock", "ours", "adapter"]

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TOLD_FIRST = ("of", "kept", "removed", "by", "recipe", "stages", "teacher", "data", "loss")
_KEPT = ("license", "license_name", "license_link", "base_model", "language")
_SECTION = re.compile(r"^## ((?:Training|Data|Commands|Licences)\b[^\n]*)\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
_OF_EVERY_RUN = ("model", "adapter")  # folders that training writes: their names tell nothing
_TITLE = re.compile(r"^# (.+)$", re.MULTILINE)
_DATASET = re.compile(r"(?:https://(?:huggingface\.co|hf\.co)/datasets/)?([\w.-]+/[\w.-]+)/?")
_QUERY = "how do tides work?"
_PASSAGE = "Tides are the rise and fall of sea levels, caused by the gravity of the moon and the sun."


class Card(NamedTuple):
    """A model's name, its card, or "", and the front matter of that."""

    name: str
    text: str
    front: dict[str, Any]


def facts(network: EmbedwrightModel, tokenizer: TextTokenizer) -> dict[str, Any]:
    """Returns the arguments of `model_card` that the model itself knows."""
    backbone, origin = network.backbone, network.origin
    base = origin.name if origin is not None and origin.kind == "decoder" else None
    return {
        "contract": network.contract,
        "form": "adapter" if has_lora(backbone) else "stock" if opens_as_stock(network, tokenizer) else "ours",
        "pooling": network.pooling.kind,
        "attention": "causal" if backbone.config.is_causal else "bidirectional",
        "dimensions": int(backbone.config.hidden_size),
        "base": None if base is None or Path(base).is_absolute() else base,
        "history": network.config.history or (),
    }


def model_card(
    name: str,
    *,
    contract: Contract,
    form: Form,
    pooling: str,
    attention: str,
    dimensions: int,
    base: str | None = None,
    license: str | None = None,
    language: Sequence[str] = (),
    stages: Sequence[Row] = (),
    data: Sequence[Row] = (),
    scores: Sequence[Row] = (),
    history: Sequence[Row] = (),
    commands: Sequence[str] = (),
    path: str | None = None,
) -> str:
    """Returns the text of README.md.

    Args:
        form: The format of the folder, as `facts` says it.
        base, license: Names as on the hub, or a packaged name. Any other base is named in the text alone.
        stages, data, scores: The rows of three tables; the keys of the rows are the columns. Data rows have `task`,
            `rows`, `licence` and `source`; a source that is a data set on the hub goes into the front matter.
        history: What `embedwright compress` did, one step after the other.
        commands: How the model was trained and scored. `MODEL` in them becomes `path`.
        path: What a reader loads, if that is not `name`.
    """
    hub_id, licence = PUBLISHED.get(base or "", (base, None))
    from_hub = hub_id if hub_id and _HUB_ID.fullmatch(hub_id) and not Path(hub_id).exists() else None
    sources = [_DATASET.fullmatch(str(row.get("source") or "")) for row in data]
    adapter = form == "adapter"
    front = ModelCardData(
        base_model=from_hub,
        base_model_relation="adapter" if adapter and from_hub else None,
        datasets=list(dict.fromkeys(found[1] for found in sources if found)) or None,
        language=list(language) or None,
        # the library whose own call gives the vectors, without an import of another one: peft would open an adapter
        # folder, around a decoder that reads one way and pools nothing
        library_name="sentence-transformers" if form == "stock" else "embedwright",
        license=license,
        pipeline_tag="feature-extraction",
        tags=["embedwright", "text-embeddings", *(["peft", "lora"] if adapter else ["sentence-transformers"])],
    )
    made = f", made from {base}" if base else ""
    made += f" ({hub_id}, licence {licence})" if licence else ""
    sections = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}",
        f"A text-embedding model{made}: {dimensions} dimensions, unit length, compared by cosine. Trained and run with "
        "Embedwright.",
        "## Use",
        _use(path or name, contract, form),
        "## What it reads",
        markdown_table(_reading(contract, pooling, attention)),
    ]
    if history:
        sections += ["## History", "\n".join(f"1. {line}" for line in history_lines(history))]
    licensed = [{**row, "licence": row.get("licence") or "not stated"} for row in data]
    for title, rows in (("Training", stages), ("Data", licensed), ("Scores", scores)):
        if rows:
            sections += [f"## {title}", markdown_table(rows)]
    if commands:
        lines = "\n".join(command.replace("MODEL", path or name) for command in commands)
        sections += ["## Commands", f"```sh\n{lines}\n```"]
    return "\n\n".join(sections) + "\n"


def inherited(card: str, before: Sequence[Card]) -> str:
    """Returns a card with what those of the models that it was made from say of licence, base, data and training.

    Keys that `card` has already keep their values. Of several models, the keys on which all agree are taken, and a
    table has the licence of each. `datasets` has those of all.
    """
    if any(front for _, _, front in before):
        made, taken = ModelCard(card), dict[str, Any]()
        for key in _KEPT:
            values = [front.get(key) for _, _, front in before]
            if made.data.get(key) is None and values[0] is not None and values.count(values[0]) == len(values):
                made.data[key] = taken[key] = values[0]
        datasets = [made.data.get("datasets"), *(front.get("datasets") for _, _, front in before)]
        listed = [[names] if isinstance(names, str) else names or [] for names in datasets]
        made.data["datasets"] = list(dict.fromkeys(chain.from_iterable(listed))) or None
        card = str(made)
        for hub_id, licence in PUBLISHED.values():
            if taken.get("base_model") == hub_id:
                card = f"{card.rstrip()}\n\n## Base\n\n{hub_id}, licence {licence}\n"
    if len(before) > 1:
        licences = [front.get("license_name") or front.get("license") or "not stated" for _, _, front in before]
        rows = [{"model": name, "licence": said} for (name, _, _), said in zip(before, licences, strict=True)]
        card = f"{card.rstrip()}\n\n## Licences of the models\n\n{markdown_table(rows)}\n"
    for name, text, _ in before:
        for title, part in _SECTION.findall(text):
            card = f"{card.rstrip()}\n\n## {title if ' of ' in title else f'{title} of {name}'}\n\n{part.strip()}\n"
    return card


def card_of(model: str) -> Card:
    """Reads the card of a model, whose name is that of the hub or its folder; in a folder of a run, that of the card.

    Raises InputError for a front matter that is no YAML.
    """
    place = detect(model)[0]
    text = text_of(place.path, "README.md") or ""
    with as_input_error(place.path / "README.md", "has a front matter that cannot be read"):
        front = vars(ModelCard(text, ignore_metadata_errors=True).data) if text.startswith("---") else {}
    title, folder = _TITLE.search(text), place.path.resolve().name
    return Card(place.hub_id or (title[1] if title and folder in _OF_EVERY_RUN else folder), text, front)


def _use(path: str, contract: Contract, form: Form) -> str:
    where, queries, passages = _quoted(path), f"[{_quoted(_QUERY)}]", f"[{_quoted(_PASSAGE)}]"
    ask = ask_them = f"encode_query({queries})"
    if not contract.default_task:
        ask = f"encode({queries}, task={_quoted(TASK)})"
        ask_them = f"encode({queries}, prompt={_quoted(contract.prefix(TASK))})"
    ours = f"""from embedwright import Embedder

model = Embedder.load({where})
queries = model.{ask}
passages = model.encode({passages})
print(queries @ passages.T)"""
    if form == "adapter":
        return f"These are LoRA adapters; the base that they belong to is opened with them.\n\n```python\n{ours}\n```"
    first = "" if form == "stock" else "import embedwright  # registers the model's type\n"
    theirs = f"""{first}from sentence_transformers import SentenceTransformer

model = SentenceTransformer({where})
queries = model.{ask_them}
passages = model.encode({passages})
print(queries @ passages.T)"""
    return f"```python\n{ours}\n```\n\nThe same vectors in sentence-transformers:\n\n```python\n{theirs}\n```"


def _reading(contract: Contract, pooling: str, attention: str) -> list[Row]:
    """Describes the text contract in words."""
    mean = "all tokens, the instruction's too" if contract.mask_rule == "all" else "all tokens but the instruction's"
    cut = "cut off with the rest" if contract.mask_rule == "count" else "also after a text that is cut"
    rows = {
        "in front of a query": f"`{_quoted(contract.query_template)}`",
        "after a query": f"`{_quoted(contract.query_suffix)}`" if contract.query_suffix else None,
        "in front of a document": f"`{_quoted(contract.document_template)}`"
        if contract.document_template
        else "nothing",
        "end of a text": "nothing" if contract.eos_id is None else f"EOS (id {contract.eos_id}), {cut}",
        "longest text": f"{contract.max_tokens} tokens, every one counted; cut on the right",
        "attention": attention,
        "pooling": f"{pooling}, {'the last token' if pooling == 'last' else mean}",
        "instruction of a query without one": contract.default_task or None,
    }
    return [{"part": part, "value": value} for part, value in rows.items() if value is not None]


def history_lines(history: Sequence[Row]) -> list[str]:
    """Returns a line for each step of a model's history: its name, then what it did, in one order for all formats."""
    lines = []
    for step in history:
        keys = [*(key for key in _TOLD_FIRST if key in step), *sorted(step.keys() - {"step", *_TOLD_FIRST})]
        lines.append(f"{step.get('step')}: " + ", ".join(f"{key} {_cell(step[key])}" for key in keys))
    return lines


def markdown_table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table. Its columns are the keys of all rows, in order; a key that a row lacks is an empty
    cell.
    """
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [keys, ["---"] * len(keys), *([_cell(row.get(key)) for key in keys] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: str | float | None) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
    return " ".join(str(value).split()).replace("|", "\\|")


def _quoted(text: str) -> str:
    """Returns the text as a Python string in double quotes."""
    return json.dumps(text, ensure_ascii=False)
