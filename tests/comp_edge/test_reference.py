"""The shipped models: what they are, that they score what their metrics say, and that they can be trained again."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from comp_edge.checkpoint import load_dense, load_processor
from comp_edge.families import family_of
from comp_edge.reference import REFERENCE_MODELS, STEPS, asset_folder, blip_digits, clip_digits, llava_digits
from comp_edge.tasks import digits, load_task, task_class

ROOT = Path(__file__).parents[2]
MODULES = {"llava-digits": llava_digits, "blip-digits": blip_digits, "clip-digits": clip_digits}
CLASSES = {
    "llava-digits": (transformers.LlavaForConditionalGeneration, transformers.LlavaProcessor),
    "blip-digits": (transformers.BlipForQuestionAnswering, transformers.BlipProcessor),
    "clip-digits": (transformers.CLIPModel, transformers.CLIPProcessor),
}
STREAMS = {
    "llava-digits": {"vision": 6, "language": 4},
    "blip-digits": {"vision": 6, "language": 3, "cross": 3},
    "clip-digits": {"vision": 6, "language": 3},
}
LOWEST = {"llava-digits": 0.98, "blip-digits": 0.98, "clip-digits": 0.95}

each_model = pytest.mark.parametrize("name", sorted(REFERENCE_MODELS))


def metrics(name: str) -> dict[str, Any]:
    return json.loads((asset_folder(name) / "metrics.json").read_text())


def scenes(count: int) -> list[digits.Scene]:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        n = int(rng.integers(3, 7))
        found.append(
            digits.Scene(cells=rng.permutation(16)[:n], colors=rng.permutation(6)[:n], digits=rng.integers(0, 10, n))
        )
    return found


def asked(count: int = 400) -> list[tuple[str, str]]:
    """Questions of all kinds and their answers; so many scenes have every colour with every digit."""
    rng = np.random.default_rng(1)
    return sorted({digits.ask(rng, kind, scene) for scene in scenes(count) for kind in digits.KINDS})


@pytest.fixture
def few_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds with a vocabulary of a few hundred texts: reading all takes seconds."""
    texts = [f"{question} {answer}" for question, answer in asked(100)]
    rng = np.random.default_rng(2)
    for module in (llava_digits, blip_digits):
        monkeypatch.setattr(module, "questions_and_answers", lambda: texts)
    monkeypatch.setattr(clip_digits, "captions", lambda: [digits.caption(rng, scene) for scene in scenes(100)])


# ---- what is shipped


@each_model
def test_the_genuine_classes(name: str) -> None:
    model, processor = load_dense(name), load_processor(name)
    assert (type(model), type(processor)) == CLASSES[name]
    family = family_of(model)
    assert {stream: len(view.layers) for stream, view in family.streams(model).items()} == STREAMS[name]
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    assert sum(tensor.numel() for tensor in model.parameters()) == metrics(name)["parameters"] < 2_000_000


@each_model
def test_only_safetensors_and_text(name: str) -> None:
    suffixes = {path.suffix for path in asset_folder(name).iterdir()}
    assert {".safetensors", ".json"} <= suffixes <= {".safetensors", ".json", ".jinja"}


@each_model
def test_its_metrics_say_how_it_came_to_be(name: str) -> None:
    found = metrics(name)
    assert found["seed"] == 0 and found["steps"] == STEPS[name]
    assert found["test_score"] >= LOWEST[name] and found["val_score"] >= LOWEST[name]
    task = "digit_pairs" if name == "clip-digits" else "digit_vqa"
    assert found["task"] == task
    assert shlex.split(found["command"]) == ["comp-edge", "train", "--task", task, "--model", name, "-o", name]


@each_model
def test_its_score_on_a_part_of_the_test_split(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the first images it is what the metrics say, up to four standard errors."""
    # Images are drawn one after the other, so these are the first of the whole split.
    monkeypatch.setattr(digits, "SIZES", {"train": 100, "val": 20, "test": 250 if name == "clip-digits" else 100})
    monkeypatch.setenv("COMP_EDGE_CACHE", str(tmp_path / "cache"))
    model, found = load_dense(name), metrics(name)
    task = load_task(found["task"], load_processor(name), model)
    part = list(task.test_batches())
    examples = sum(len(batch["image_ids"]) for batch in part)
    assert examples == (250 if name == "clip-digits" else 500)
    expected = found["test_score"]
    assert abs(task.score(model, part) - expected) <= 4 * (expected * (1 - expected) / examples) ** 0.5


@pytest.mark.slow
@each_model
def test_its_score_on_the_whole_test_split(name: str) -> None:
    model, found = load_dense(name), metrics(name)
    task = load_task(found["task"], load_processor(name), model)
    # Another processor rounds otherwise, which may turn an answer that was as good as undecided.
    assert abs(task.score(model, task.test_batches()) - found["test_score"]) <= 0.002


# ---- vocabularies


@pytest.mark.parametrize("name", ["llava-digits", "blip-digits"])
def test_questions_and_answers_come_back(name: str) -> None:
    tokenizer = load_processor(name).tokenizer
    for texts in zip(*asked(), strict=True):
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids


def test_answers_of_blip_are_single_words() -> None:
    """A digit, a colour or a verdict is one token, and so is every word of a question: no piece is worth more than another."""
    tokenizer = load_processor("blip-digits").tokenizer
    answers = {answer for _, answer in asked()}
    assert answers == {*map(str, range(10)), *digits.NAMES, "yes", "no"}
    for text in {question for question, _ in asked()} | answers:
        assert tokenizer.tokenize(text) == text.split()


def test_captions_come_back() -> None:
    tokenizer = load_processor("clip-digits").tokenizer
    rng = np.random.default_rng(3)
    for scene in scenes(100):
        text = digits.caption(rng, scene)
        ids = tokenizer(text)["input_ids"]
        assert len(ids) <= clip_digits.LENGTH
        assert len(ids) == len(text.replace(",", " ,").split()) + 2  # a token a word, between two marks
        assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ,", ",") == text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llava-digits", "blip-digits"])
@pytest.mark.parametrize("task", ["digit_vqa", "easy_vqa"])
def test_every_question_and_answer_is_in_the_vocabulary(name: str, task: str) -> None:
    tokenizer = load_processor(name).tokenizer
    for split in ("train", "val", "test"):
        rows = task_class(task)(None).split(split).questions
        for text in {row[1] for row in rows} | {row[2] for row in rows}:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
            assert name != "blip-digits" or tokenizer.tokenize(text) == text.split()


# ---- training anew


@each_model
def test_a_seed_is_a_model(name: str, few_texts: None) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        return list(REFERENCE_MODELS[name](seed)[0].state_dict().values())

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@each_model
def test_what_is_built_is_what_is_shipped(name: str, few_texts: None) -> None:
    """Up to the vocabulary, for which all texts would have to be read."""
    model, processor = REFERENCE_MODELS[name](0)
    shipped = load_dense(name)
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in shipped.state_dict().items()}
    assert (type(model), type(processor)) == CLASSES[name]
    assert len(processor.tokenizer) <= model.config.get_text_config().vocab_size


@pytest.mark.slow
@each_model
def test_the_vocabulary_is_made_again(name: str) -> None:
    """The same in another process. (The shipped one may break ties otherwise; models are saved with theirs.)"""
    model, processor = REFERENCE_MODELS[name](0)
    command = "import json, sys; from comp_edge.reference import REFERENCE_MODELS as models; "
    command += "print(json.dumps(models[sys.argv[1]](0)[1].tokenizer.get_vocab()))"
    arguments = [sys.executable, "-c", command, name]
    other = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert json.loads(other.splitlines()[-1]) == processor.tokenizer.get_vocab()
    assert len(load_processor(name).tokenizer) == len(processor.tokenizer)
    built, found = model.config.to_dict(), load_dense(name).config.to_dict()
    for config, key in itertools.product((built, found), ("dtype", "architectures", "_name_or_path")):
        config.pop(key, None)
    assert {k: v for k, v in built.items() if not isinstance(v, dict)} == {
        k: v for k, v in found.items() if not isinstance(v, dict)
    }


@each_model
def test_weights_have_room_to_move(name: str, few_texts: None) -> None:
    """None of the matrices starts at next to nothing, as BLIP's own vision weights do: 1e-10."""
    model, _ = REFERENCE_MODELS[name](0)
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            assert parameter.std() >= 0.005, parameter_name


@each_model
def test_a_processor_reads_pictures_of_any_size(name: str) -> None:
    images = load_processor(name).image_processor
    picture = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    assert images(images=[picture], return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
