"""lmms-eval's own evaluator on a local task: its scores are those of our own generation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import comp_edge
from comp_edge.checkpoint import load_any
from comp_edge.errors import InputError
from comp_edge.surgery import apply_plan
from tests.comp_edge.plans import tiny_plan

WRONG = 3  # every third answer of the task's data is one that the model does not give

TASK = """\
task: {name}
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: image
doc_to_text: question
doc_to_target: answer
generation_kwargs: {generation}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""

# A question, then what was answered and the question again, then the end: the answers of both rounds are the result.
ROUNDS = """\
def ask(doc, lmms_eval_specific_kwargs=None, previous_output=None, round_idx=None, previous_round_info=None):
    if round_idx is None:
        return doc["question"]
    seen = (previous_round_info or []) + [round_idx]
    if round_idx == 2:
        assert seen == [1, 2]
        return None, None, True, previous_output, None
    return [doc["image"]], doc["question"] + " " + previous_output[-1], False, previous_output, seen


def see(doc):
    return [doc["image"]]


def judge(doc, results):
    rounds = results[0]
    return {"both": float(rounds == [doc["answer"], doc["second"]])}
"""
ROUNDS_TASK = """\
task: tiny_rounds
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until_multi_round
doc_to_visual: !function rounds.see
doc_to_text: !function rounds.ask
doc_to_target: answer
process_results: !function rounds.judge
generation_kwargs: {generation}
metric_list:
  - {{metric: both, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture(scope="session")
def lmms(tmp_path_factory: Any) -> Any:
    """lmms-eval, with its copies of data sets in a folder of the session."""
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (it is optional; `make test` installs it)")
    with pytest.MonkeyPatch.context() as patch:
        # Read once a process.
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("lmms-eval")))
        import lmms_eval.evaluator

        yield lmms_eval


@pytest.fixture(scope="session")
def folders(make_model: Any, processor: Any, tiny_task: Any, tmp_path_factory: Any) -> dict[str, Path]:
    """A dense and a pruned model folder."""
    found = {name: tmp_path_factory.mktemp("models") / name for name in ("dense", "pruned")}
    dense, pruned, plan = make_model(seed=1), make_model(seed=2), tiny_plan(prompt=tiny_task.prompt_length - 16)
    dense.save_pretrained(found["dense"])
    processor.save_pretrained(found["dense"])
    apply_plan(pruned, plan)
    comp_edge.save_pretrained(pruned, plan, found["pruned"], processor=processor)
    return found


@pytest.fixture(scope="session")
def own(folders: dict[str, Path], tiny_task: Any) -> Callable[[str], list[str]]:
    """`own(name)`: what our own task makes a model say to all test questions."""
    batch = tiny_task.batch("test", list(range(len(tiny_task.split("test").questions))))
    said: dict[str, list[str]] = {}

    def say(name: str) -> list[str]:
        if name not in said:
            said[name] = tiny_task.generate(load_any(folders[name]), batch)
        return said[name]

    return say


@pytest.fixture(scope="session")
def write_task(lmms: Any, tiny_task: Any) -> Callable[..., Path]:
    """`write_task(folder, answers, template=TASK, …)`: the test questions as a local data set, and a task file for them."""

    def write(
        folder: Path,
        answers: list[str],
        *,
        name: str = "tiny_vqa",
        template: str = TASK,
        generation: Any = None,
        **more: Any,
    ) -> Path:
        import datasets

        split = tiny_task.split("test")
        questions = split.questions[: len(answers)]
        columns = {
            "image": [Image.fromarray(split.images[row[0]]) for row in questions],
            "question": [row[1] for row in questions],
            "answer": answers,
            **more,
        }
        features = {name: datasets.Value("string") for name in columns} | {"image": datasets.Image()}
        folder.mkdir(exist_ok=True)
        data = folder / f"{name}.parquet"
        datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(str(data))
        generation = json.dumps({"max_new_tokens": tiny_task.answer_length, **(generation or {})})
        (folder / f"{name}.yaml").write_text(template.format(name=name, data=data.name, generation=generation))
        return folder

    return write


@pytest.fixture
def evaluate(lmms: Any, folders: dict[str, Path]) -> Callable[..., dict[str, Any]]:
    """`evaluate(model, task folder, task)`: the results of lmms-eval's evaluator, which finds our class by its name."""

    def run(model: str, tasks: Path, task: str, *, batch_size: int = 7) -> dict[str, Any]:
        manager = lmms.tasks.TaskManager(include_path=str(tasks), include_defaults=False, model_name="comp_edge")
        return lmms.evaluator.simple_evaluate(
            model="comp_edge",
            model_args=f"pretrained={folders[model]}",
            tasks=[task],
            task_manager=manager,
            batch_size=batch_size,
            device="cpu",
        )

    return run


def partly_wrong(said: list[str]) -> list[str]:
    return ["nothing" if i % WRONG == 0 else text for i, text in enumerate(said)]


@pytest.mark.parametrize("model", ["dense", "pruned"])
def test_the_score_is_that_of_our_own_generation(
    model: str, own: Any, write_task: Any, evaluate: Any, tmp_path: Path
) -> None:
    said = own(model)
    truths = partly_wrong(said)
    results = evaluate(model, write_task(tmp_path, truths), "tiny_vqa")
    right = sum(text == truth for text, truth in zip(said, truths, strict=True))
    assert 0 < right < len(said)
    assert results["results"]["tiny_vqa"]["exact_match,none"] == pytest.approx(right / len(said))
    samples = sorted(results["samples"]["tiny_vqa"], key=lambda sample: sample["doc_id"])
    assert [sample["filtered_resps"][0].strip() for sample in samples] == said
    assert len(set(said)) > 10
    assert results["config"]["model_backend"] == "comp_edge.evaluators.lmms.CompEdge (chat)"
    counts = [sample["token_counts"][0] for sample in samples]
    assert results["throughput"]["total_gen_tokens"] == sum(count["output_tokens"] for count in counts)


def test_an_answer_ends_before_a_stop_string(own: Any, write_task: Any, evaluate: Any, tmp_path: Path) -> None:
    said = own("pruned")
    stop = max({text[-1] for text in said if len(text) > 1}, key=lambda end: sum(text.endswith(end) for text in said))
    expected = [text.split(stop)[0].strip() for text in said]
    assert expected != said
    results = evaluate("pruned", write_task(tmp_path, expected, generation={"until": [stop]}), "tiny_vqa")
    assert results["results"]["tiny_vqa"]["exact_match,none"] == 1.0


@pytest.mark.parametrize(
    ("generation", "greedy"), [({"do_sample": True, "temperature": 0}, True), ({"temperature": 2.0}, False)]
)
def test_a_task_may_sample(
    generation: dict[str, Any], greedy: bool, own: Any, write_task: Any, evaluate: Any, tmp_path: Path
) -> None:
    results = evaluate("pruned", write_task(tmp_path, own("pruned")[:20], generation=generation), "tiny_vqa")
    assert (results["results"]["tiny_vqa"]["exact_match,none"] == 1.0) == greedy


def test_rounds_see_what_was_said_before(
    folders: dict[str, Path], processor: Any, tiny_task: Any, write_task: Any, evaluate: Any, tmp_path: Path
) -> None:
    split, model = tiny_task.split("test"), load_any(folders["pruned"])

    def say(question: str, image: int) -> str:
        inputs = processor(images=[split.images[image]], text=[tiny_task.prompt(question)], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=tiny_task.answer_length, do_sample=False)
        return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    rows = split.questions[:10]
    first = [say(row[1], row[0]) for row in rows]
    second = [say(f"{row[1]} {text}", row[0]) for row, text in zip(rows, first, strict=True)]
    assert first != second
    (tmp_path / "rounds.py").write_text(ROUNDS)
    write_task(tmp_path, first, name="tiny_rounds", template=ROUNDS_TASK, second=[*second[:-2], "x", "y"])
    results = evaluate("pruned", tmp_path, "tiny_rounds", batch_size=4)
    assert results["results"]["tiny_rounds"]["both,none"] == pytest.approx(0.8)


@pytest.mark.slow
def test_the_command_line_finds_the_model_by_name(
    folders: dict[str, Path], own: Any, write_task: Any, tmp_path: Path
) -> None:
    said = own("pruned")
    write_task(tmp_path / "tasks", partly_wrong(said))
    options = {"model": "comp_edge", "model_args": f"pretrained={folders['pruned']}", "tasks": "tiny_vqa"}
    paths = {"include_path": tmp_path / "tasks", "output_path": tmp_path / "out"}
    command = [f"--{name}={value}" for name, value in (options | paths | {"batch_size": 16}).items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|tiny_vqa|" in done.stdout
    (written,) = (tmp_path / "out").rglob("*_results.json")
    wrong = len(range(0, len(said), WRONG))
    score = json.loads(written.read_text())["results"]["tiny_vqa"]["exact_match,none"]
    assert score == pytest.approx(1 - wrong / len(said))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no model was given; --model_args pretrained=FOLDER"),
        ({"pretrained": "no such"}, "unknown model 'no such'"),
        ({"pretrained": "llava-digits", "batch_size": "auto"}, "batch size 'auto' is not a positive number"),
        ({"pretrained": "llava-digits", "batch_size": 0}, "batch size 0 is not a positive number"),
        ({"pretrained": "llava-digits", "dtype": "bfloat16"}, "unknown model argument 'dtype'; accepted: pretrained, "),
    ],
)
def test_bad_arguments_are_named(lmms: Any, arguments: dict[str, Any], message: str) -> None:
    from comp_edge.evaluators.lmms import CompEdge

    with pytest.raises(InputError, match=message):
        CompEdge(**arguments)


def test_a_model_that_cannot_generate_is_named(lmms: Any, processor: Any, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    from comp_edge.evaluators.lmms import CompEdge

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    CLIPModel(CLIPConfig(text_config={**sizes, "vocab_size": 64}, vision_config=vision)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="(?i)clip"):
        CompEdge(pretrained=str(tmp_path))


def test_log_likelihoods_are_declined(lmms: Any, folders: dict[str, Path]) -> None:
    from lmms_eval.api.instance import Instance

    from comp_edge.evaluators.lmms import CompEdge

    request = Instance("loglikelihood", ("a", "b"), 0, {"task": "mmstar_ppl", "doc_id": 0, "repeats": 1})
    with pytest.raises(InputError, match="task 'mmstar_ppl' scores log-likelihoods; comp_edge models run tasks that"):
        CompEdge(pretrained=str(folders["pruned"])).loglikelihood([request])


def test_without_lmms_eval_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.setitem(sys.modules, "lmms_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "comp_edge.evaluators.lmms", raising=False)
    with pytest.raises(InputError, match=r"needs lmms-eval .*pip install 'comp-edge\[lmms-eval\]'"):
        import comp_edge.evaluators.lmms  # noqa: F401
