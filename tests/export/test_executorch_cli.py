"""`python -m export.executorch`: what a user can get wrong, before anything is lowered."""

import json

import pytest
import torch
from safetensors.torch import save_file

from export.bundle import Delegation
from export.executorch.__main__ import main
from export.executorch.lower import delegation_warnings
from export.reference import read_requests, synthetic_requests
from export.source import load_source


def golden_file(path, *, shape=(2, 3, 64, 64), questions=("a", "b")):
    save_file({"pixel_values": torch.zeros(*shape)}, path, metadata={"questions": json.dumps(list(questions))})
    return path


@pytest.fixture
def source(folders):
    return load_source(folders["pruned"])


def run(capsys, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err.strip()


def assert_one_sentence(result, *named):
    code, out, err = result
    assert code == 2 and not out and err.count("\n") == 0, err
    for text in named:
        assert str(text) in err


def test_models_that_cannot_be_loaded(capsys, tmp_path, folders):
    assert_one_sentence(run(capsys, "nowhere", "-o", tmp_path / "b"), "nowhere")
    (tmp_path / "empty").mkdir()
    assert_one_sentence(run(capsys, tmp_path / "empty", "-o", tmp_path / "b"), "empty")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--profile", "fast"),
        ("--verify", "0"),
        ("--max-new-tokens", "-1"),
        ("--prompt", "no image token {question}"),
        ("--prompt", "<image> no question"),
        ("--golden", "missing.safetensors"),
        ("--prompt-tokens", "8"),  # the plan has them
    ],
)
def test_bad_options(capsys, tmp_path, folders, option, value):
    assert_one_sentence(run(capsys, folders["pruned"], "-o", tmp_path / "b", option, value), value)
    assert not (tmp_path / "b").exists()


def test_an_output_that_cannot_be_written(capsys, tmp_path, folders):
    (tmp_path / "file").write_text("")
    assert_one_sentence(run(capsys, folders["pruned"], "-o", tmp_path / "file"), "file")


def test_golden_files_that_do_not_fit(capsys, tmp_path, folders):
    export = (folders["pruned"], "-o", tmp_path / "b", "--verify", "2", "--golden")
    size = golden_file(tmp_path / "size.safetensors", shape=(2, 3, 32, 32))
    assert_one_sentence(run(capsys, *export, size), "[3, 32, 32]", "64")
    few = golden_file(tmp_path / "few.safetensors", shape=(1, 3, 64, 64), questions=("a",))
    assert_one_sentence(run(capsys, *export, few), "1 questions")
    long = golden_file(tmp_path / "long.safetensors", questions=("a", "xyz " * 20))
    assert_one_sentence(run(capsys, *export, long), "xyz", "24")


def test_a_context_beyond_the_models_positions(capsys, tmp_path, folders):
    result = run(capsys, folders["pruned"], "-o", tmp_path / "b", "--max-new-tokens", "120")
    assert result[0] == 2 and "128" in result[2] and not (tmp_path / "b").exists()


def test_made_up_requests_fit_the_prompt(source):
    requests = synthetic_requests(source, count=20)
    assert requests.pixel_values.shape == (20, 3, 64, 64) and requests.pixel_values.abs().max() <= 1
    lengths = {len(source.prompt_ids(question)) - 1 for question in requests.questions}
    assert max(lengths) <= source.text_tokens and len(lengths) > 3
    assert synthetic_requests(source, count=20).questions == requests.questions


def test_requests_are_read_in_order(tmp_path, source):
    path = golden_file(tmp_path / "g.safetensors", shape=(3, 3, 64, 64), questions=("one", "two", "three"))
    assert read_requests(path, source, count=2).questions == ("one", "two")


def test_operations_outside_the_backend_are_named():
    quiet = Delegation(delegates=2, delegated_ops=9, other_ops={"aten_topk_default": 2})
    loud = Delegation(delegates=2, delegated_ops=9, other_ops={"aten_native_layer_norm_default": 3})
    assert delegation_warnings({"prefill": quiet}) == []
    assert "aten_native_layer_norm_default x3" in delegation_warnings({"prefill": loud})[0]
