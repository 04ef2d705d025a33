"""The report: self-contained, escaped, honest about what was kept, and clear about malformed input."""

from __future__ import annotations

import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import comp_edge
from comp_edge.cli import common
from comp_edge.cli import report as command
from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.plan import CostRecord
from comp_edge.report import page, theme, tokens, verification, words, write_picture, write_report
from comp_edge.report.facts import Stage, read_facts
from comp_edge.surgery import apply_plan
from tests import tiny
from tests.comp_edge.plans import tiny_plan

TASK = f"{tiny.__file__}:TinyVQA"
HOSTILE = "<script>alert('x')</script>\"><img src=https://evil.example/x> $\\frac{ & {{ 7*7 }}"
VERIFICATION = {
    "dense": {"score": 0.99, "macs": 10, "latency_ms": 6.0},
    "pruned": {"score": 0.98, "macs": 3, "latency_ms": 2.5, "folder": "pruned"},
    "executorch": {
        "stock": {
            "path": "a",
            "max_abs_error": 3e-6,
            "tokens_equal": True,
            "latency_ms": 2.7,
            "questions": 200,
            "matched": 200,
        },
        "scheduled": {"path": "b", "max_abs_error": 2e-3, "tokens_equal": False, "latency_ms": 2.5},
    },
    "coreml": {"path": "c", "fp32_max_abs_error": 2e-5, "fp16_max_abs_error": 6e-4, "kept_set_agreement": 0.9975},
    "report": "r",
}


def stage(number: int, **changes: Any) -> dict[str, Any]:
    """A line of a trace, as `comp_edge.prune` writes it."""
    modes = ("vision_params", "language_params", "vision_tokens", "language_tokens")
    mode = modes[number % 4]
    costs = {"vision_params": 0.2, "language_params": math.inf, "vision_tokens": -0.1}
    line = {
        "mode": mode, "why": "cheapest", "costs": costs | {mode: 0.0}, "stage": number,
        "score": 0.9 - number / 100, "loss": 1.0, "cost": 100.0, "cost_fraction": 1 - number / 10,
        "macs": 1e6 * (1 - number / 10), "saved": 0.1, "seconds": 0.5, "plan": {},
    }  # fmt: skip
    return line | changes


@pytest.fixture(scope="module")
def made(make_model: Any, processor: Any, tiny_task: Any, tmp_path_factory: Any) -> Path:
    """A pruned folder with every kind of damage to a layer, a trace and metrics."""
    plan = tiny_plan(prompt=tiny_task.prompt_length - 16)
    model = make_model(seed=1)
    cost = MacsCost(model)
    dense = cost.parts(comp_edge.plan.Plan.parse(page_dense(model, plan)))
    pruned = cost.parts(plan)
    plan = plan.model_copy(
        update={
            "budget": {"macs": 0.3, "decode_tokens": 0}, "strategy": "probe", "seed": 3,
            "cost": CostRecord(name="macs", dense=dense["total"], pruned=pruned["total"]),
        }
    )  # fmt: skip
    apply_plan(model, plan)
    folder = tmp_path_factory.mktemp("report") / "model"
    comp_edge.save_pretrained(model, plan, folder, processor=processor)
    (folder / "trace.jsonl").write_text("".join(json.dumps(stage(i)) + "\n" for i in range(1, 8)))
    metrics = {
        "strategy": "probe", "seed": 3, "stages": 7, "steps": 600, "seconds": {"training": 60.0},
        "dense": {"val_score": 0.99, "test_score": 0.988, "macs": dense["total"], "macs_by_part": dense},
        "pruned": {"val_score": 0.97, "test_score": 0.969, "macs": pruned["total"], "macs_by_part": pruned},
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


def page_dense(model: Any, plan: Any) -> dict[str, Any]:
    """The dense plan of a model, as JSON."""
    from comp_edge.units import dense_plan

    prompt = plan.streams["language"].tokens[0] - (plan.streams["vision"].tokens[-1] - 1)
    return dense_plan(model, prompt_tokens=prompt, base="tiny").to_json()


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


class _Page(HTMLParser):
    """Tags and what they refer to; complains about tags that do not nest."""

    VOID = frozenset("meta img br link input hr circle line path use".split())

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "action", "data", "poster")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read(path: Path) -> _Page:
    """A parsed report."""
    parsed = _Page(path.read_text(encoding="utf-8"))
    assert parsed.open == []
    return parsed


# ---- the page


@pytest.fixture(scope="module")
def full(made: Path, tmp_path_factory: Any) -> Path:
    """A report with everything in it."""
    return write_report(made, task=TASK, verification=VERIFICATION, out=tmp_path_factory.mktemp("page") / "full.html")


def test_page_needs_nothing_else(full: Path) -> None:
    text = full.read_text(encoding="utf-8")
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link", text)
    parsed = read(full)
    assert parsed.references
    assert all(ref.startswith(("data:image/png;base64,", "#")) for ref in parsed.references)
    assert "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    # Charts follow the scheme of the page: none of their colours is fixed.
    charts = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.S))
    assert not {light for light, _ in theme.PALETTE.values()} & set(re.findall(r"#[0-9a-f]{6}\b", charts))


def test_page_has_every_section(full: Path) -> None:
    parsed = read(full)
    for expected in (
        "tiny at", "0.988", "0.969", "\u22120.019", "keep 0.3 of the MACs", "comp-edge prune --model tiny", "2.40\u00d7 faster",
        "The way to the budget", "Which mode ran when", "Widths and tokens", "Where the multiply-accumulates go",
        "What the model still looks at", "Verification", "yes, 200 of 200", "infinite",
    ):  # fmt: skip
        assert expected in parsed.text, expected
    assert parsed.tags.count("img") == 3 * page.EXAMPLES
    assert parsed.tags.count("s") > 0


def test_page_is_the_same_every_time(made: Path, tmp_path: Path) -> None:
    first, second = (write_report(made, out=tmp_path / name).read_bytes() for name in ("a.html", "b.html"))
    assert first == second


def test_page_without_task_and_verification(folder: Path) -> None:
    path = write_report(folder)
    assert path == folder / "report.html"
    parsed = read(path)
    assert "img" not in parsed.tags
    assert "still looks at" not in parsed.text and "Verification" not in parsed.text and "Latency" not in parsed.text
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []


def test_page_for_a_task_that_is_not_about_images(folder: Path, tmp_path: Path) -> None:
    methods = ("train_batches", "val_batches", "test_batches", "loss", "score", "example_inputs")
    body = "".join(f"    def {name}(self, *a): return None\n" for name in methods)
    (tmp_path / "plain.py").write_text(f"class Plain:\n    def __init__(self, processor): pass\n{body}")
    assert "still looks at" not in read(write_report(folder, task=f"{tmp_path / 'plain.py'}:Plain")).text


def test_hostile_values_are_text(folder: Path) -> None:
    line = stage(1, mode="vision_params", why=HOSTILE)
    (folder / "trace.jsonl").write_text(json.dumps(line) + "\n")
    plan = json.loads((folder / "plan.json").read_text())
    plan |= {"base": HOSTILE, "strategy": HOSTILE, "budget": {"macs": HOSTILE, "speedup": HOSTILE}}
    plan["cost"]["name"] = HOSTILE
    (folder / "plan.json").write_text(json.dumps(plan))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["dense"]["macs_by_part"][HOSTILE] = 5
    (folder / "metrics.json").write_text(json.dumps(metrics))
    parsed = read(write_report(folder))
    assert "script" not in parsed.tags and "img" not in parsed.tags
    assert parsed.references == [ref for ref in parsed.references if ref.startswith("#")]
    assert HOSTILE in parsed.text


def test_hostile_questions_and_answers_are_text() -> None:
    card = {
        "question": HOSTILE, "answer": HOSTILE, "truth": HOSTILE, "right": False, "text": [(HOSTILE, True), (HOSTILE, False)],
        "patches": 4, "pixelated": True, "panels": [],
    }  # fmt: skip
    context = {
        "title": HOSTILE, "kept": "", "rows": [], "latency": None, "command": HOSTILE, "strategy": HOSTILE, "seed": 0,
        "budget": HOSTILE, "stage_count": 0, "steps": 0, "minutes": 0.0, "checks": None, "score_chart": "", "macs_chart": "",
        "device": None, "timed": False,
        "examples": {"cards": [card], "right": 0}, "layer_charts": [], "dropped": {}, "starts": {}, "stages": [], "modes": (),
        "zero": 0.5, "priced": False, "ways": [{"tokens": HOSTILE, "loss": HOSTILE, "taken": True}],
        "reasons": set(), "shares": {}, "cost_name": HOSTILE,
        "parts": {"rows": [], "decode": None, "biggest": HOSTILE},
    }  # fmt: skip
    parsed = _Page(page.render(context))
    assert "script" not in parsed.tags and "img" not in parsed.tags


# ---- malformed input


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("trace.jsonl", "", "is empty"),
        ("trace.jsonl", json.dumps(stage(1)) + "\n{\"stage\": 2, ", "line 2 is not valid JSON"),
        ("trace.jsonl", "[1]\n", "line 1"),
        ("trace.jsonl", json.dumps(stage(1, score="high")), "line 1: score"),
        ("trace.jsonl", json.dumps(stage(1, score=math.nan)), "line 1: score"),
        ("trace.jsonl", json.dumps(stage(1, costs={"vision_params": "dear"})), "line 1: costs.vision_params"),
        ("trace.jsonl", json.dumps(stage(1, walks=[{"tokens": 2, "loss": 1.0}])), "line 1: walks.0.tokens"),
        ("trace.jsonl", json.dumps(stage(1, mode="audio_params")), "'audio_params'; the model has vision_params"),
        ("trace.jsonl", "[" * 100_000, "line 1 is not valid JSON"),
        ("metrics.json", "{", "not valid JSON"),
        ("metrics.json", "[]", "metrics"),
        ("metrics.json", "{}", "strategy: Field required"),
        ("plan.json", '{"schema": 2}', "schema 2"),
        ("plan.json", "", "not valid JSON"),
    ],
)  # fmt: skip
def test_malformed_files_are_named(folder: Path, name: str, content: str, says: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(InputError) as caught:
        write_report(folder)
    assert says in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize("name", ["plan.json", "trace.jsonl", "metrics.json"])
def test_missing_files_are_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"has no {name}"):
        write_report(folder)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"executorch": 3}, "executorch must be an object"),
        ({"executorch": {"stock": []}}, "executorch.stock must be an object"),
        ({"executorch": {"stock": {"max_abs_error": "small"}}}, "executorch.stock.max_abs_error must be a number"),
        ({"executorch": {"stock": {"tokens_equal": 1}}}, "executorch.stock.tokens_equal must be true or false"),
        ({"coreml": {"fp32_max_abs_error": True}}, "coreml.fp32_max_abs_error must be a number"),
        ({"dense": {"latency_ms": 0}, "pruned": {"latency_ms": 1}}, "latency_ms must be above 0"),
    ],
)
def test_malformed_verification_is_named(made: Path, tmp_path: Path, value: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        write_report(made, verification=value, out=tmp_path / "r.html")


# ---- verification


def test_checks_judge_against_their_limits() -> None:
    judged = {(c.program, c.what): c.passed for c in verification.checks(VERIFICATION)}
    assert judged == {
        ("ExecuTorch, stock", "largest error of the logits"): True,
        ("ExecuTorch, stock", "generated tokens equal"): True,
        ("ExecuTorch, stock", "latency"): None,
        ("ExecuTorch, scheduled", "largest error of the logits"): False,
        ("ExecuTorch, scheduled", "generated tokens equal"): False,
        ("ExecuTorch, scheduled", "latency"): None,
        ("Core ML", "largest error, fp32"): True,
        ("Core ML", "largest error, fp16"): True,
        ("Core ML", "same image tokens kept"): None,
    }


def test_an_error_that_is_no_number_fails() -> None:
    (check,) = verification.checks({"coreml": {"fp32_max_abs_error": math.nan}})
    assert check.passed is False


# ---- what the model keeps


def test_examples_keep_as_many_tokens_as_the_plan_says(made: Path, tiny_task: Any) -> None:
    facts = read_facts(made)
    examples = tokens.run_examples(facts.model, tiny_task, count=6)
    assert len(examples) == 6
    vision, language = (facts.plan.streams[name].tokens for name in ("vision", "language"))
    longest = max(len(e.text) for e in examples)
    for example in examples:
        assert len(example.fate.seen) == vision[-1] - 1
        assert set(example.fate.read) <= set(example.fate.seen)
        left = len(example.fate.read) + sum(kept for _, kept in example.text)
        assert left == (language[-1] if len(example.text) == longest else min(left, language[-1]))
        assert example.text[-1][1], "the last token predicts the answer and is never dropped"
        assert example.question in "".join(piece for piece, _ in example.text)
    images = tiny_task.split("val").images
    assert any((examples[0].image == image).all() for image in images)


def test_reached_agrees_with_kept(made: Path, tiny_task: Any) -> None:
    from comp_edge.schedule import active_schedule

    model = comp_edge.load_pretrained(made)
    schedule = active_schedule(model)
    assert schedule.reached("vision") is None
    batch, length = tiny_task.batch("val", [0, 1, 2]), tiny_task.prompt_length
    with torch.no_grad():
        model(
            input_ids=batch["input_ids"][:, :length], attention_mask=batch["attention_mask"][:, :length],
            pixel_values=batch["pixel_values"],
        )  # fmt: skip
    reached, kept = schedule.reached("vision"), schedule.kept("vision")
    assert reached.shape == (3, 17)
    assert [row.nonzero()[:, 0].tolist() for row in reached] == kept.tolist()


# ---- prices, numbers, command


def test_prices_share_one_axis() -> None:
    trace = [Stage(**stage(1, costs={"a": -1.0, "b": 2.0})), Stage(**stage(2, costs={"a": 50.0, "b": math.inf}))]
    scale = page.price_scale(tuple(trace))
    places = [page.place(v, scale) for v in (-math.inf, -1.0, 0.0, 2.0, 50.0, math.inf, math.nan)]
    assert places[:2] == [0.0, 0.0] and places[4:] == [1.0, 1.0, 1.0]
    assert 0 < places[2] < places[3] < 1
    assert page.place(0.0, page.price_scale((Stage(**stage(1, costs={})),))) == 0.0


def test_words() -> None:
    assert [words.amount(v) for v in (512, 51_300, 85_660_800, 1.3e9)] == ["512", "51.3 k", "85.7 M", "1.30 G"]
    assert words.change(0.99, 0.97) == "\u22120.020" and words.change(0.9, 0.9001) == "unchanged"
    assert words.price(-math.inf) == "\u2212infinite" and words.price(0.1234) == "+0.123"


def test_dense_side_counts_what_was_there(made: Path, make_model: Any) -> None:
    facts = read_facts(made)
    dense = make_model(seed=1)
    assert facts.parameters[0] == sum(p.numel() for p in dense.parameters())
    assert facts.parameters[1] < facts.parameters[0]
    assert {len(layer.ffn) for layer in facts.dense.streams["vision"].layers} == {64}
    assert set(facts.dense.streams["vision"].tokens) == {17}


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def run(*argv: str) -> int:
        return common.main((command,), parser=common.Parser(prog="comp-edge"), argv=["report", *argv])

    given, out = tmp_path / "demo.json", tmp_path / "new" / "page.html"
    given.write_text(json.dumps(VERIFICATION))
    assert run(str(folder), "--verification", str(given), "-o", str(out), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out), "bytes": out.stat().st_size}
    given.write_text("[]")
    assert run(str(folder), "--verification", str(given)) == 2
    assert run(str(folder), "--task", "nothing") == 2
    assert run(str(tmp_path / "nowhere")) == 2
    assert run(str(tmp_path)) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("comp-edge report: ") for line in errors)


def test_picture(made: Path, tmp_path: Path) -> None:
    path = write_picture(made, tmp_path / "picture.png", task=TASK)
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 800
        assert np.asarray(image).std() > 10
