"""A path to write is refused before any work, with what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedwright.cli.main import app
from embedwright.cli.options import check_asked, check_opened, check_rows_file
from embedwright.errors import InputError


@pytest.mark.parametrize("name", ["x.csv", "x.json", "x.txt", "x.jsonl.zst"])
def test_rows_are_not_written_under_the_name_of_another_format(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"rows are written as \.jsonl, \.jsonl\.gz or \.parquet, not as \."):
        check_rows_file(tmp_path / name)


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.parquet", "a-folder", "v1.2"])
def test_other_names_pass(tmp_path: Path, name: str) -> None:
    assert check_rows_file(tmp_path / name) == tmp_path / name


def test_options_of_opened_models_are_refused_where_none_is_opened() -> None:
    """Else they would be ignored."""
    for names in (["http://127.0.0.1:1/v1#m"], ["bm25"], ["bm25", "http://127.0.0.1:1/v1#m"]):
        with pytest.raises(InputError, match="--max-tokens: no model is opened here"):
            check_opened(names, {"max_tokens": 16})
        check_opened(names, {})
    check_opened(["bm25", "minilm"], {"max_tokens": 16})


def test_options_of_servers_are_refused_where_none_is_asked() -> None:
    none = {"query_template": None, "cut": False}
    for name in ("query_template", "document_template", "cut", "api_key_env"):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')}: no server is asked here, only minilm, bm25"):
            check_asked(["minilm", "bm25"], {**none, name: "given"})
        check_asked(["minilm", "http://127.0.0.1:1/v1#m"], {**none, name: "given"})
    check_asked(["minilm"], none)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("data build fiqa --out {}/o.csv", "not as .csv"),
        ("data clean absent.jsonl --out {}/o.jsonl --against absent --leaks {}", "is a folder"),
        ("data clean absent.jsonl --out {}/o.jsonl --leaks {}/l.jsonl", "--leaks is of leaks: .* --against"),
        ("data check absent.jsonl --corpus", "--corpus is of leaks: .* --against"),
        ("data export absent.jsonl --out {}", "is a folder"),
    ],
)
def test_what_would_fail_or_be_ignored_after_the_work_is_refused_before_it(
    tmp_path: Path, arguments: str, said: str
) -> None:
    result = CliRunner().invoke(app, arguments.format(tmp_path, tmp_path).split())
    assert isinstance(result.exception, InputError)
    with pytest.raises(InputError, match=said):
        raise result.exception
