"""Data of the built-in tasks, the task protocol, and tasks of one's own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from comp_edge.errors import InputError
from comp_edge.files import cache_folder
from comp_edge.tasks import BUILT_IN, Task, load_task, task_class
from comp_edge.tasks.cache import cached_split
from comp_edge.tasks.digit_vqa import DigitVQA
from comp_edge.tasks.vqa import Split, answer_loss
from tests import tiny

# ---- the cache


def a_split(value: int = 7) -> Split:
    return Split(
        images=np.full((2, 4, 4, 3), value, np.uint8),
        questions=[[0, "what ü", "a", 1], [1, "why", "b", 0]],
        extra={"cells": np.arange(4, dtype=np.int8)},
    )


def same(a: Split, b: Split) -> bool:
    cells = np.array_equal(a.extra["cells"], b.extra["cells"])
    return np.array_equal(a.images, b.images) and a.questions == b.questions and cells and set(a.extra) == {"cells"}


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("COMP_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never() -> Split:
    raise AssertionError("the split should have come from the cache")


def test_made_once(cache):
    assert same(cached_split("x", a_split), a_split())
    assert same(cached_split("x", never), a_split())
    assert [path.name for path in cache.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize(
    "damage", ["truncated", "garbage", "empty", "no questions", "no images", "no metadata", "folder"]
)
def test_a_damaged_cache_is_made_anew(cache, damage):
    from safetensors.numpy import save

    cached_split("x", a_split)
    path = cache / "x.safetensors"
    images = {"images": a_split().images}
    contents = {
        "truncated": path.read_bytes()[:-5],
        "garbage": b"\x80\x04" + bytes(200),
        "empty": b"",
        "no questions": save(images, metadata={"other": "1"}),
        "no images": save({"cells": np.arange(4)}, metadata={"questions": "[]"}),
        "no metadata": save(images),
    }
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(contents[damage])
    assert same(cached_split("x", lambda: a_split(9)), a_split(9))
    if damage != "folder":
        assert same(cached_split("x", never), a_split(9))
        assert [p.name for p in cache.iterdir()] == ["x.safetensors"]


def test_a_cache_that_cannot_be_written_costs_time_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/self")):
        monkeypatch.setenv("COMP_EDGE_CACHE", str(folder))
        assert same(cached_split("x", a_split), a_split())


def test_a_read_only_cache_costs_time_only(cache, monkeypatch):
    """On a read-only file system Linux refuses even to unlink what is not there."""
    import errno

    cache.mkdir()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    for name in ("write_bytes", "unlink"):
        monkeypatch.setattr(Path, name, refuse)
    assert same(cached_split("x", a_split), a_split())


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("COMP_EDGE_CACHE", str(tmp_path / "a"))
    assert cache_folder() == tmp_path / "a"
    monkeypatch.delenv("COMP_EDGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    assert cache_folder() == tmp_path / "b" / "comp-edge"


# ---- batches


def test_a_batch(tiny_task):
    batch = next(tiny_task.train_batches(0))
    tokenizer, length = tiny_task.processor.tokenizer, tiny_task.prompt_length
    data = tiny_task.split("train")
    assert {value.shape[0] for value in batch.values()} == {12}
    assert batch["image_ids"].unique().numel() == 4
    for i in range(12):
        _, question, reply, _ = data.questions[int(batch["question_ids"][i])]
        live = batch["attention_mask"][i] == 1
        ids = batch["input_ids"][i]
        assert tokenizer.decode(ids[:length][live[:length]]).replace("<image>", "").split() == [
            "USER:",
            *question.split(),
        ]
        assert tokenizer.decode(ids[length:][live[length:]]) == f" {reply}</s>"
        assert int((ids == tiny.IMAGE).sum()) == tiny.IMAGE_TOKENS
        # Left-padded: what is real is one run, and the prompt ends where the answers begin.
        assert bool(live[length - 1]) and int(live.int().diff().clamp(min=0).sum()) <= 1
        labels = batch["labels"][i]
        assert bool((labels[:length] == -100).all())
        assert torch.equal(labels[length:][live[length:]], ids[length:][live[length:]])
        assert bool((labels[~live] == -100).all())
    again = next(tiny_task.train_batches(0))
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(next(tiny_task.train_batches(1))["question_ids"], batch["question_ids"])


def test_evaluation_goes_through_every_question_once(tiny_task):
    for name, batches in (("val", tiny_task.val_batches()), ("test", tiny_task.test_batches())):
        found = list(batches)
        ids = torch.cat([batch["question_ids"] for batch in found]).tolist()
        assert ids == list(range(len(tiny_task.split(name).questions)))
        assert [t for batch in found for t in tiny_task.truths(batch)] == [
            q[2] for q in tiny_task.split(name).questions
        ]


def test_example_inputs(tiny_task, tiny_model):
    inputs = tiny_task.example_inputs()
    assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}
    assert inputs["input_ids"].shape == (1, tiny_task.prompt_length) and inputs["pixel_values"].shape == (1, 3, 64, 64)
    with torch.no_grad():
        assert tiny_model(**inputs).logits.shape == (1, tiny_task.prompt_length, tiny.VOCABULARY)


def test_prompts_come_from_the_chat_template(tiny_task):
    assert tiny_task.prompt("is there a 3") == "USER: <image> is there a 3"
    ids = tiny_task.prompt_ids("is there a 3")
    assert ids.count(tiny.IMAGE) == tiny.IMAGE_TOKENS
    ids.clear()
    assert tiny_task.prompt_ids("is there a 3"), "callers get a copy"


def test_sharing_the_prompts_beginning_changes_nothing(tiny_task, tiny_model):
    """Loss of a batch whose questions share images, against each question on its own."""
    batch = next(tiny_task.train_batches(2))
    with torch.no_grad():
        together = tiny_task.logits(tiny_model, batch)
        one_by_one = torch.cat(
            [tiny_task.logits(tiny_model, {k: v[i : i + 1] for k, v in batch.items()}) for i in range(12)]
        )
        plain = tiny_model(**{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values")}).logits
        expected = plain[:, tiny_task.prompt_length - 1 : -1]
    answered = tiny_task.targets(batch) != -100
    torch.testing.assert_close(together[answered], expected[answered], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(one_by_one[answered], expected[answered], atol=2e-5, rtol=1e-4)
    loss = tiny_task.loss(tiny_model, batch)
    assert float(loss.detach()) == pytest.approx(float(answer_loss(expected, tiny_task.targets(batch))), rel=1e-4)


def test_the_score_is_exact_match(tiny_task, tiny_model, monkeypatch):
    batch = next(iter(tiny_task.val_batches()))
    truths = tiny_task.truths(batch)
    replies = [truth if i % 3 else truth + "x" for i, truth in enumerate(truths)]
    monkeypatch.setattr(tiny_task, "generate", lambda model, batch: replies)
    right = sum(i % 3 > 0 for i in range(len(truths)))
    assert tiny_task.score(tiny_model, [batch]) == right / len(truths)
    with pytest.raises(ValueError, match="no batches"):
        tiny_task.score(tiny_model, [])


def test_generated_answers_are_what_the_logits_say(tiny_task, tiny_model):
    """Greedy generation from the prompt; its first token is the answer logits' first choice."""
    batch = next(iter(tiny_task.val_batches()))
    with torch.no_grad():
        first = tiny_task.logits(tiny_model, batch)[:, 0].argmax(-1)
    decode = tiny_task.processor.tokenizer.decode
    for text, token in zip(tiny_task.generate(tiny_model, batch), first.tolist(), strict=True):
        start = decode([token], skip_special_tokens=True).strip()
        assert text.startswith(start) or "\ufffd" in start


# ---- tasks of one's own

TINY = Path(tiny.__file__)


def test_a_task_in_a_file(processor):
    task = load_task(f"{TINY}:TinyVQA", processor)
    assert isinstance(task, Task) and type(task).__name__ == "TinyVQA"
    assert next(task.train_batches(0))["input_ids"].shape == (12, task.prompt_length + task.answer_length)


def test_a_relative_path(processor, monkeypatch):
    monkeypatch.chdir(TINY.parent.parent)
    assert isinstance(load_task("tests/tiny.py:TinyVQA", processor), Task)


def test_built_in_tasks():
    assert sorted(BUILT_IN) == ["digit_pairs", "digit_vqa", "easy_vqa", "synthetic"]
    assert task_class("digit_vqa") is DigitVQA


METHODS = "".join(
    f"    def {name}(self, *args): ...\n"
    for name in ("train_batches", "val_batches", "test_batches", "loss", "score", "example_inputs")
)
GOOD = f"class Good:\n    def __init__(self, processor): self.processor = processor\n{METHODS}"


@pytest.mark.parametrize(
    ("content", "name", "says"),
    [
        (GOOD, "Missing", ["no class 'Missing'", "Good"]),
        ("x = 1\n", "Good", ["no class 'Good'", "none"]),
        ("Good = 3\n", "Good", ["no class 'Good'"]),
        ("class Good:\n    def loss(self): ...\n", "Good", ["'Good'", "lacks train_batches, val_batches"]),
        ("class Good:\n    loss = 3\n", "Good", ["lacks", "loss"]),
        ("class Good(:\n", "Good", ["cannot be imported", "SyntaxError"]),
        ("import no_such_module_here\n", "Good", ["cannot be imported", "no_such_module_here"]),
        ("raise RuntimeError('my own')\n", "Good", ["cannot be imported", "RuntimeError: my own"]),
        ("raise SystemExit(0)\n", "Good", ["cannot be imported"]),
        ("\0", "Good", ["cannot be imported"]),
        (f"class Good:\n    def __init__(self): ...\n{METHODS}", "Good", ["'Good'", "processor"]),
    ],
)
def test_files_that_hold_no_task(tmp_path, processor, content, name, says):
    (tmp_path / "mine.py").write_text(content)
    with pytest.raises(InputError) as caught:
        load_task(f"{tmp_path}/mine.py:{name}", processor)
    message = str(caught.value)
    assert all(part in message for part in says), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("digits", ["unknown task 'digits'", "digit_vqa, easy_vqa, synthetic", "file.py:ClassName"]),
        ("", ["unknown task ''"]),
        ("mine.py", ["unknown task 'mine.py'", "ClassName"]),
        ("no/such/file.py:Mine", ["no/such/file.py", "does not exist"]),
        ("{folder}:Mine", ["{folder}"]),
        ("{folder}/notes.txt:Mine", ["notes.txt", "not a Python file"]),
        (":Mine", [":Mine"]),
        ("{folder}/good.py:", ["good.py"]),
    ],
)
def test_names_that_are_no_task(tmp_path, processor, spec, says):
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "good.py").write_text(GOOD)
    with pytest.raises(InputError) as caught:
        load_task(spec.format(folder=tmp_path), processor)
    assert all(part.format(folder=tmp_path) in str(caught.value) for part in says), str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_model_is_given_where_it_is_asked_for(tmp_path, processor):
    asks = GOOD.replace("processor): self.processor = processor", "processor, *, model=None): self.model = model")
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "asks.py").write_text(asks)
    assert load_task(f"{tmp_path}/good.py:Good", processor, "a model").processor is processor
    assert load_task(f"{tmp_path}/asks.py:Good", processor, "a model").model == "a model"
    assert load_task(f"{tmp_path}/asks.py:Good", processor).model is None


def test_a_minimal_task_of_ones_own(tmp_path, processor):
    (tmp_path / "good.py").write_text(GOOD)
    task = load_task(f"{tmp_path}/good.py:Good", processor)
    assert task.processor is processor and isinstance(task, Task)


@pytest.mark.slow
def test_importing_the_tasks_is_light():
    """`comp-edge --help` names the tasks; it must not read data or import scikit-learn for that."""
    code = "import sys, json, comp_edge.tasks; print(json.dumps([m in sys.modules for m in ('sklearn', 'easy_vqa')]))"
    root = TINY.parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert json.loads(done.stdout) == [False, False], done.stderr
