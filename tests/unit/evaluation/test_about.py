"""The facts kept beside a score are JSON, name this machine, and hold the model's fingerprint as it was given."""

import json

import pytest
import torch

from embedwright.evaluation.about import about, processor


def test_the_facts_are_json_and_name_machine_and_versions() -> None:
    facts = json.loads(json.dumps(about("minilm", {"weights": "abc"})))
    assert (facts["model"], facts["fingerprint"]) == ("minilm", {"weights": "abc"})
    assert facts["machine"]["processor"] == processor() != ""
    assert facts["machine"]["cores"] >= 1
    assert facts["versions"]["torch"] == torch.__version__
    assert "sentence-transformers" in facts["versions"]


def test_the_command_is_what_a_person_types(monkeypatch: pytest.MonkeyPatch) -> None:
    for argv, command in (
        (["/x/bin/embedwright", "eval", "my model", "dev"], "embedwright eval 'my model' dev"),
        (["/x/src/embedwright/__main__.py", "eval", "minilm"], "python -m embedwright eval minilm"),
        (["embedwright", "bench", "http://me:pass@h/v1#a/b@c"], "embedwright bench 'http://h/v1#a/b@c'"),
    ):
        monkeypatch.setattr("sys.argv", argv)
        assert about("m")["command"] == command
    assert about("http://me:pass@h/v1#a/b@c")["model"] == "http://h/v1#a/b@c"
