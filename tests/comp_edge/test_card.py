"""Model cards: what the Hub reads is valid, and nothing is said that was not counted or measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load

import comp_edge
from comp_edge.card import CARD_FILE, Subject, amount, card_text, hub_id, runs, subject_of, write_card
from comp_edge.plan import CostRecord, Plan
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan
from tests.comp_edge.plans import tiny_plan

HUB = "HuggingFaceTB/SmolVLM-256M-Instruct"
METRICS = {
    "task": "digit_vqa",
    "steps": 300,
    "dense": {"val_score": 0.97, "test_score": 0.968},
    "pruned": {"val_score": 0.95, "test_score": 0.9412},
}


@pytest.fixture(scope="module")
def pruned(make_model: Any, tiny_task: Any) -> Any:
    model = make_model(seed=1)
    apply_plan(model, tiny_plan(prompt=tiny_task.prompt_length - 16))
    return model


@pytest.fixture(scope="module")
def subject(pruned: Any) -> Subject:
    return subject_of(pruned, pruned.comp_edge_plan, processor=True)


def of_plan(subject: Subject, **changes: Any) -> Subject:
    """The same with another plan."""
    plan = subject.plan.model_copy(update=changes)
    return dataclasses.replace(subject, plan=plan, base_model=hub_id(plan.base))


def front(text: str) -> dict[str, Any]:
    """The front matter, as huggingface_hub parses it."""
    return ModelCard(text).data.to_dict()


def test_what_is_counted(subject: Subject, pruned: Any, make_model: Any, tiny_task: Any) -> None:
    whole = make_model(seed=1)
    dense = dense_plan(whole, base="tiny", prompt_tokens=tiny_task.prompt_length - 16)
    assert subject.dense == dense and subject.text_tokens == tiny_task.prompt_length - 16
    assert subject.macs == (comp_edge.macs(whole, dense), comp_edge.macs(pruned))
    assert subject.parameters == (whole.num_parameters(), pruned.num_parameters())
    text = card_text(subject)
    assert f"| MACs a request | {amount(subject.macs[0]['total'])} | {amount(subject.macs[1]['total'])} (" in text
    assert "| vision | 3 | 12 → 8 | 192 → 96 | 1 | 17 → 9 |" in text
    assert "| language | 3 | 12 → 4 | 192 → 113 | 1 | " in text
    assert "- vision: 17, 12, 9" in text


def test_a_shared_matrix_counts_once(make_model: Any, tiny_task: Any) -> None:
    model = make_model(seed=1)
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    parameters = model.num_parameters()
    plan = dense_plan(model, base="tiny", prompt_tokens=8)
    apply_plan(model, plan)
    assert subject_of(model, plan, processor=False).parameters == (parameters, parameters)


def test_the_hub_reads_it(subject: Subject) -> None:
    data = front(card_text(of_plan(subject, base=HUB), METRICS))
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "image-text-to-text"
    assert data["base_model"] == HUB and data["license"] == "other"
    assert data["license_link"] == f"https://huggingface.co/{HUB}"
    assert {"comp-edge", "pruned", "token-pruning"} <= set(data["tags"])
    (model,) = data["model-index"]
    found = {
        result["dataset"]["split"]: (result["dataset"]["name"], result["metrics"][0]["value"])
        for result in model["results"]
    }
    assert found == {"test": ("digit_vqa", 0.9412), "validation": ("digit_vqa", 0.95)}


def test_scores_stand_in_the_table(subject: Subject) -> None:
    text = card_text(subject, METRICS)
    assert "| score, test | 0.9680 | 0.9412 |" in text and "| score, validation | 0.9700 | 0.9500 |" in text
    assert "task `digit_vqa`" in text and "300 training steps" in text


@pytest.mark.parametrize(
    ("metrics", "said", "unsaid"),
    [
        (None, "Any score: measure it", "| score"),
        ({}, "Any score: measure it", "| score"),
        (
            {"pruned": {"val_score": float("nan"), "test_score": None}, "dense": None},
            "Any score: measure it",
            "| score",
        ),
        ({"pruned": {"val_score": 0.95}}, "The score on a test split", "| score, test"),
        ({"pruned": {"test_score": 0.95}}, "| score, test | not measured | 0.9500 |", "| score, validation"),
    ],
)
def test_nothing_is_made_up(subject: Subject, metrics: Any, said: str, unsaid: str) -> None:
    text = card_text(subject, metrics)
    assert said in text and unsaid not in text and "nan" not in text.lower() and "None" not in text
    assert ("model-index" in front(text)) == ("| score" in text)


def test_latency_is_called_a_prediction(subject: Subject) -> None:
    assert "Latency and memory on any device." in card_text(subject)
    text = card_text(of_plan(subject, cost=CostRecord(name="pixel-8", dense=120.0, pruned=41.25)))
    assert "The cost that steered it, pixel-8, went from 120 to 41.2." in text
    assert "the figures of `pixel-8` are a model's prediction" in text and "on any device" not in text


@pytest.mark.parametrize("base", [HUB, "tiny", "", "/home/someone/secret project/my-llava", "odd\nname `x` | y"])
def test_base_models(subject: Subject, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = card_text(of_plan(subject, base=base), METRICS)
    data = front(text)
    assert data.get("base_model") == (HUB if base == HUB else None)
    assert "/home" not in text and "someone" not in text
    heading = next(line for line in text.splitlines() if line.startswith("# "))
    assert heading == {
        HUB: "# SmolVLM-256M-Instruct, pruned",
        "": "# LlavaForConditionalGeneration, pruned",
        "tiny": "# tiny, pruned",
        "odd\nname `x` | y": "# odd name 'x' / y, pruned",
    }.get(base, "# my-llava, pruned")


def test_a_folder_here_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id("models/llava") == "models/llava"
    (tmp_path / "models" / "llava").mkdir(parents=True)
    assert hub_id("models/llava") is None
    assert hub_id("llava-digits") is None and hub_id("../x") is None and hub_id("a/b/c") is None


def test_only_what_happened_is_told(subject: Subject) -> None:
    text = card_text(subject)
    assert "has fewer attention heads and has narrower feed-forward layers and computes on fewer tokens" in text
    tokens_only = of_plan(subject, streams=_with_tokens(subject.dense, "vision", (17, 12, 9)).streams)
    text = card_text(tokens_only)
    assert "that computes on fewer tokens from layer to layer." in text and "has fewer" not in text
    assert "| vision | 3 | 12 | 192 | 0 | 17 → 9 |" in text
    text = card_text(of_plan(subject, streams=subject.dense.streams))
    assert "that keeps everything." in text and "Tokens that each layer" not in text and "token-pruning" not in text


def _with_tokens(plan: Plan, stream: str, tokens: tuple[int, ...]) -> Plan:
    return plan.with_tokens(stream, tokens)


@pytest.mark.parametrize(
    ("architecture", "model_type", "auto_class", "pipeline"),
    [
        ("BlipForQuestionAnswering", "blip", "AutoModelForVisualQuestionAnswering", "visual-question-answering"),
        ("BlipForImageTextRetrieval", "blip", "AutoModel", None),
        ("CLIPModel", "clip", "AutoModelForZeroShotImageClassification", "zero-shot-image-classification"),
        ("SmolVLMForConditionalGeneration", "smolvlm", "AutoModelForImageTextToText", "image-text-to-text"),
    ],
)
def test_how_to_load_fits_the_architecture(
    subject: Subject, architecture: str, model_type: str, auto_class: str, pipeline: str | None
) -> None:
    text = card_text(dataclasses.replace(subject, architecture=architecture, model_type=model_type), METRICS)
    assert f'model = {auto_class}.from_pretrained("FOLDER", trust_remote_code=True)' in text
    assert front(text).get("pipeline_tag") == pipeline
    assert front(text)["model-index"][0]["results"][0]["task"]["type"] == (pipeline or "other")


def test_code_in_the_card_is_python(subject: Subject) -> None:
    for processor in (True, False):
        text = card_text(dataclasses.replace(subject, processor=processor))
        blocks = text.split("```python\n")[1:]
        assert len(blocks) == 2
        for block in blocks:
            compile(block.split("```")[0], "card", "exec")
        assert ("AutoProcessor" in text) == processor and ("No processor was saved" in text) != processor


def test_saving_writes_it_and_metrics_complete_it(pruned: Any, processor: Any, tmp_path: Path) -> None:
    plan = pruned.comp_edge_plan
    folder = comp_edge.save_pretrained(pruned, plan, tmp_path / "m", processor=processor)
    assert "model-index" not in metadata_load(folder / CARD_FILE)
    assert "AutoProcessor" in (folder / CARD_FILE).read_text()
    assert write_card(folder, pruned, plan, metrics=json.loads(json.dumps(METRICS))) == folder / CARD_FILE
    assert len(metadata_load(folder / CARD_FILE)["model-index"][0]["results"]) == 2
    bare = comp_edge.save_pretrained(pruned, plan, tmp_path / "bare")
    assert "No processor was saved" in (bare / CARD_FILE).read_text()


def test_numbers() -> None:
    assert [amount(v) for v in (0, 7, 999, 1_300_000_000, 85_700_000, 0.35e6, 450_000)] == [
        "0", "7", "999", "1.30 G", "85.7 M", "350 k", "450 k",
    ]  # fmt: skip
    assert runs([577, 577, 577, 400, 9, 9]) == "577 ×3, 400, 9 ×2" and runs([]) == ""
