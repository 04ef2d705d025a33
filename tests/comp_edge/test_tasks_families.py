"""Tasks with every model family: through its real processor, on small genuine models, dense and pruned."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

import comp_edge
from comp_edge.calibrate import model_inputs
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.reference.processors import build_processor, config_for
from comp_edge.selectors import cut
from comp_edge.settings import PruneConfig
from comp_edge.surgery import apply_plan
from comp_edge.tasks import Task, load_task, vqa
from comp_edge.tasks.packing import ROWS, image_rows, take_rows
from comp_edge.tasks.pairs import PairTask
from comp_edge.tasks.synthetic import Synthetic, image_side, make_split, random_words
from comp_edge.tasks.vqa import Split, VQATask, answer_loss
from comp_edge.train import _auxiliary_head, _patch_features
from tests import families, tiny
from tests.comp_edge.plans import family_plan

CORPUS = tiny.corpus()
ASKED = [
    case.name for case in families.CASES if case.name not in ("clip", "siglip", "siglip2", "blip-retrieval")
]  # models that answer questions
PLACEHOLDERS = [name for name in ASKED if not name.startswith("blip")]
PAIRED = ["clip", "siglip", "siglip2", "blip-retrieval"]
TOLERANCE = 1e-5
SHORT: dict[str, Any] = {"seed": 3, "images": {"train": 8, "val": 4, "test": 4}}


@cache
def _small(name: str) -> tuple[type, Any, Any]:
    """Class and configuration of the family's small model, and the processor that both agree on."""
    model = families.case_named(name).model(**({"feature_layer": -1} if name == "llava" else {}))
    processor = build_processor(model.config.model_type, model.config, CORPUS)
    return type(model), config_for(processor, model.config), processor


def make_processor(name: str) -> Any:
    return _small(name)[2]


@cache
def _built(name: str, seed: int) -> Any:
    kind, config, _ = _small(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(copy.deepcopy(config)).eval()
        families._enliven(model)
    return model


def make_model(name: str, *, pruned: bool = False, task: Any = None, seed: int = 2) -> Any:
    """The family's small model with the token ids of its processor; pruned for the task's request where asked for."""
    model = copy.deepcopy(_built(name, seed))
    if pruned:
        request = family_of(model).request(model, task.example_inputs())
        apply_plan(model, family_plan(model, request))
    return model


class Asking(VQATask):
    """Six images of digits, three questions of different lengths each."""

    name = "asking"

    def __init__(self, processor: Any, **options: Any) -> None:
        if hasattr(processor.image_processor, "do_image_splitting"):
            options.setdefault("image_options", {"do_image_splitting": False})
        super().__init__(processor, images_per_batch=3, questions_per_image=3, eval_batch=6, **options)

    def load_split(self, split: str) -> Split:
        images, questions = tiny.tiny_split(split, 6)
        return Split(images=images, questions=questions)


class Pictures(Asking):
    """The same with other sizes of image, for processors that make tiles of them."""

    def __init__(self, processor: Any, side: int, **options: Any) -> None:
        super().__init__(processor, **options)
        self.side = side

    def load_split(self, split: str) -> Split:
        rng, data = np.random.default_rng(0), super().load_split(split)
        images = rng.integers(0, 256, (len(data.images), self.side, self.side, 3), dtype=np.uint8)
        return Split(images=images, questions=data.questions)


@cache
def asking(name: str) -> Asking:
    """Tasks are never changed by a test."""
    return Asking(make_processor(name))


def user_inputs(task: Asking, split: str, index: int) -> Any:
    """What the processor makes of one question, as a user would ask it: no padding, no other questions."""
    data = task.split(split)
    image, question = data.images[data.questions[index][0]], data.questions[index][1]
    processor = task.processor
    if not getattr(processor, "chat_template", None):
        return processor(images=[image], text=[question], return_tensors="pt")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    return processor(images=[[image]], text=[text], return_tensors="pt", **task.image_options)


@contextmanager
def seen_by(module: Any) -> Iterator[list[Any]]:
    """What a module gives while the context is open."""
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda m, args, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def plain_logits(name: str, model: Any, task: Asking, index: int) -> torch.Tensor:
    """Answer logits [answer, vocabulary] of one question by the model's own forward, with nothing shared or padded."""
    inputs = dict(user_inputs(task, "train", index))
    answer = task.answer_ids(task.split("train").questions[index][2])
    ids = inputs["input_ids"]
    if name == "blip-vqa":
        start = model.config.text_config.bos_token_id
        with seen_by(model.text_decoder) as seen:
            model(**inputs, decoder_input_ids=torch.tensor([[start, *answer[:-1]]]))
        return seen[0].logits[0]
    if name == "blip-captioning":
        start = model.config.text_config.bos_token_id
        row = torch.tensor([[start, *ids[0, 1:-1].tolist(), *answer[:-1]]])
        logits = model(pixel_values=inputs["pixel_values"], input_ids=row).logits[0]
        return logits[ids.shape[1] - 2 :]
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if key in inputs:
            more = {"input_ids": torch.tensor([answer]), "attention_mask": torch.ones(1, len(answer), dtype=torch.long)}
            fill = more.get(key, torch.zeros(1, len(answer), dtype=torch.int))
            inputs[key] = torch.cat([inputs[key], fill.to(inputs[key])], 1)
    labels = inputs["input_ids"].clone()
    labels[:, : ids.shape[1]] = -100
    return model(**inputs, labels=labels).logits[0, ids.shape[1] - 1 : -1]


# ---- questions


@pytest.mark.parametrize("name", ASKED)
def test_a_batch_trains_and_is_scored(name: str) -> None:
    task, model = asking(name), make_model(name)
    batch = next(task.train_batches(0))
    assert {len(value) for value in batch.values()} == {9} and batch["image_ids"].unique().numel() == 3
    loss = task.loss(model, batch)
    assert torch.isfinite(loss) and loss.ndim == 0
    loss.backward()
    for stream in family_of(model).streams(model).values():
        for layer in stream.layers:
            part = layer.attn or layer.mlp
            gradient = (part.out if layer.attn else part.down).weight.grad
            assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().max() > 0, stream.name
    truths = {task.layout.readable(truth) for truth in task.truths(batch)}
    assert truths <= {row[2] for row in task.split("train").questions}
    assert 0 <= task.score(model, [batch]) <= 1


@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("name", ASKED)
def test_logits_are_those_of_the_plain_forward(name: str, pruned: bool) -> None:
    task = asking(name)
    model = make_model(name, pruned=pruned, task=task)
    batch = next(task.train_batches(1))
    with torch.no_grad():
        found = task.logits(model, batch)
    targets = task.targets(batch)
    assert found.shape[:2] == targets.shape
    for row, index in enumerate(batch["question_ids"].tolist()):
        expected = plain_logits(name, model, task, index)
        answered = targets[row] != -100
        assert targets[row][answered].tolist() == task.answer_ids(task.split("train").questions[index][2])
        assert (found[row][answered] - expected).abs().max() <= TOLERANCE
    assert found.std() > 0.1  # the comparison is about something


@torch.no_grad()
@pytest.mark.parametrize("pruned", [False, True], ids=["dense", "pruned"])
@pytest.mark.parametrize("name", ASKED)
def test_answers_are_those_of_asking_one_by_one(name: str, pruned: bool) -> None:
    task = asking(name)
    model = make_model(name, pruned=pruned, task=task)
    batch, tokenizer = next(task.val_batches()), task.processor.tokenizer
    together = task.generate(model, batch)
    options: dict[str, Any] = {"max_new_tokens": task.answer_length, "do_sample": False}
    if name in PLACEHOLDERS:
        options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    for row, index in enumerate(batch["question_ids"].tolist()):
        inputs = user_inputs(task, "val", index)
        length = {"blip-vqa": 1, "blip-captioning": inputs["input_ids"].shape[1] - 1}.get(
            name, inputs["input_ids"].shape[1]
        )
        output = model.generate(**inputs, **options)[0, length:]
        assert together[row] == tokenizer.decode(output, skip_special_tokens=True).strip()
    assert len(set(together)) > 1


@torch.no_grad()
@pytest.mark.parametrize("name", ASKED)
def test_an_image_is_encoded_once_for_its_questions(name: str) -> None:
    task, model = asking(name), make_model(name)
    batch = next(task.train_batches(0))
    stream = family_of(model).streams(model)["vision"]
    for run in (task.logits, task.generate):
        with seen_by(stream.layers[0].module) as seen:
            run(model, batch)
        rows = [(output[0] if isinstance(output, tuple) else output).shape[0] for output in seen]
        if stream.packed:
            rows = [tokens // (256 * 3) * 3 for tokens in rows]
        if name == "blip-captioning" and run == task.generate:
            continue  # questions of different lengths are asked apart
        assert rows == [3]


@pytest.mark.parametrize("name", ASKED)
def test_example_inputs_are_one_request_of_forward(name: str) -> None:
    model = make_model(name)
    task = Asking(make_processor(name), model=model)
    inputs = task.example_inputs()
    family = family_of(model)
    with torch.no_grad():
        model(**inputs)
    request = family.request(model, inputs)
    assert request.text_tokens + request.images * (name in PLACEHOLDERS) * family.image_tokens(
        model, request.vision_tokens
    ) == (task.prompt_length)
    user = set(user_inputs(task, "val", 0))
    extra = {"decoder_input_ids", "decoder_attention_mask"} if name == "blip-vqa" else set()
    assert set(inputs) == user | extra
    for key in user:
        assert inputs[key].ndim == user_inputs(task, "val", 0)[key].ndim, key


@pytest.mark.parametrize("name", PLACEHOLDERS)
def test_prompts_are_the_processor_s(name: str) -> None:
    """With tiles, too: what stands for the image is asked for once, and must fit every question."""
    for side in (64, 96):
        options = {} if side == 64 else {"image_options": {}}
        task = Pictures(make_processor(name), side, **options)
        for index in (0, 1, 2):
            question = task.split("val").questions[index][1]
            assert task.prompt_ids(question) == user_inputs(task, "val", index)["input_ids"][0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("name", ["idefics3", "internvl", "qwen2.5-vl"])
def test_images_of_several_tiles(name: str) -> None:
    """17 tiles of Idefics3, 5 of InternVL; Qwen's patches of a larger image."""
    task = Pictures(make_processor(name), 96, image_options={})
    model = make_model(name)
    batch = task.batch("train", [0, 1])
    pixels = {"idefics3": (2, 17, 3, 64, 64), "internvl": (2, 5, 3, 64, 64), "qwen2.5-vl": (2, 576, 96)}[name]
    assert tuple(batch["pixel_values"].shape) == pixels and {len(value) for value in batch.values()} == {2}
    found = task.logits(model, batch)
    for row, index in enumerate((0, 1)):
        expected = plain_logits(name, model, task, index)
        assert (found[row, : len(expected)] - expected).abs().max() <= TOLERANCE
    inputs = task.example_inputs()
    assert family_of(model).request(model, inputs).images == (1 if name == "qwen2.5-vl" else pixels[1])
    model(**inputs)


@pytest.mark.parametrize("name", ["idefics3", "qwen2.5-vl", "internvl"])
def test_images_of_different_sizes_are_refused(name: str) -> None:
    task = Pictures(make_processor(name), 64, image_options={})
    sizes = [np.zeros((64, 64, 3), np.uint8), np.zeros((64, 160, 3), np.uint8)]
    with pytest.raises(InputError, match=r"images of the task become \d+ to \d+ tokens"):
        task.layout.images(sizes, task.prompt("how many"))
    with pytest.raises(InputError, match="no number of rows an image explains"):
        image_rows({"pixel_values": torch.zeros(5, 3)}, 2)
    # The prompts of the task were made for one size.
    task.prompt_ids("how many")
    with pytest.raises(InputError, match="give all of them the same size"):
        task.layout.images(sizes[1:], task.prompt("how many"))


@torch.no_grad()
@pytest.mark.parametrize("name", ASKED + PAIRED)
def test_batches_can_be_cut(name: str) -> None:
    """Every row carries all that is its own: parts of a batch, run by the model's forward, are parts of the whole."""
    task = asking(name) if name in ASKED else Synthetic(make_processor(name), model=make_model(name), **SHORT)
    model = make_model(name)
    batch = next(task.train_batches(0))
    case, inputs = families.case_named(name), model_inputs(model, batch)
    assert ROWS not in inputs and inputs.keys() <= batch.keys()
    if name == "blip-vqa":
        return  # padding of a question leaks into its answer where nothing sees to it
    whole = case.outputs(model, inputs)
    done = 0
    for part in cut([batch], 4, least=2):
        rows = case.outputs(model, model_inputs(model, part))
        assert len(rows) >= 2
        for a, b in zip(rows, whole[done : done + len(rows)], strict=True):
            assert torch.allclose(a, b, atol=TOLERANCE)
        done += len(rows)
    assert done == len(next(iter(batch.values()))) // 2 * 2


def test_batches_that_cannot_be_cut_stay_whole() -> None:
    """As a processor gives them: the patches of two images behind each other."""
    batch = {"input_ids": torch.zeros(2, 5), "pixel_values": torch.zeros(40, 96)}
    assert [part is batch for part in cut([batch], 4, least=1)] == [True]
    single = {"input_ids": torch.zeros(1, 5)}
    assert [len(part["input_ids"]) for part in cut([single], 4, least=2)] == [1]


def test_large_images_make_small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vqa, "MOST_PIXELS", 4 * 3 * 64 * 64)
    task = Asking(make_processor("llava"))
    assert task.rows_that_fit == 4
    batch = next(task.train_batches(0))
    assert batch["image_ids"].tolist() == batch["image_ids"][:1].tolist() * 3  # one image, three questions
    sizes = [len(batch["input_ids"]) for batch in task.val_batches()]
    assert sizes == [4, 4, 4, 4, 2]
    monkeypatch.setattr(vqa, "MOST_PIXELS", 1)
    assert len(next(Asking(make_processor("llava")).train_batches(0))["input_ids"]) == 1


def test_a_prompt_longer_than_the_data_s_keeps_its_image() -> None:
    task = asking("qwen2.5-vl")
    prompt = task.prompt_ids(" ".join(["is there a 3"] * 9))
    text = task.layout.text([prompt], [[5]], prompt_length=task.prompt_length, answer_length=2)
    ids, token = text["input_ids"][0].tolist(), task.processor.image_token_id
    assert ids.count(token) == prompt.count(token) and ids[: ids.index(token)] == prompt[: prompt.index(token)]
    assert ids[task.prompt_length - 5 : task.prompt_length] == prompt[-5:]
    longest = prompt[: task.prompt_length - 2]
    assert task.layout._fitted(longest, task.prompt_length - 4) is not longest


def test_an_answer_follows_the_prompt_s_end() -> None:
    """Behind a line break no space belongs; behind a word or a colon one does."""
    qwen, llava = asking("qwen2.5-vl"), asking("llava")
    decode = qwen.processor.tokenizer.decode
    assert decode(qwen.answer_ids("red")) == "red<|im_end|>"
    assert llava.processor.tokenizer.decode(llava.answer_ids("red")) == " red</s>"


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_models_that_compare_answer_no_questions(name: str) -> None:
    with pytest.raises(InputError, match="asks questions, and models with the processor .* answer none"):
        Asking(make_processor(name)).example_inputs()
    task, model = asking("blip-vqa"), make_model("blip-retrieval")
    with pytest.raises(InputError, match="BlipForImageTextRetrieval answers no questions"):
        task.loss(model, next(task.train_batches(0)))


def test_a_processor_without_a_template_is_refused() -> None:
    processor = build_processor("llava", families.case_named("llava").model().config, CORPUS)
    processor.chat_template = None
    with pytest.raises(InputError, match="LlavaProcessor has no chat template"):
        Asking(processor).example_inputs()


# ---- pairs


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_train_and_are_scored(name: str) -> None:
    model = make_model(name)
    task = Synthetic(make_processor(name), model=model, **SHORT)
    assert isinstance(task, PairTask) and isinstance(task, Task)
    batch = next(task.train_batches(0))
    assert {len(value) for value in batch.values()} == {4} and batch["pair_ids"].unique().numel() == 4
    loss = task.loss(model, batch)
    loss.backward()
    assert torch.isfinite(loss)
    for stream in family_of(model).streams(model).values():
        assert all((layer.attn.out.weight.grad.abs().max() > 0) for layer in stream.layers)
    model(**task.example_inputs())


@torch.no_grad()
@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2"])
def test_the_loss_is_the_family_s_own(name: str) -> None:
    model = make_model(name)
    task = Synthetic(make_processor(name), **SHORT)
    batch = next(task.train_batches(0))
    own = float(model(**model_inputs(model, batch), return_loss=True).loss)
    # SigLIP's sums the verdicts of an image, and averages over the images.
    assert float(task.loss(model, batch)) == pytest.approx(own / (1 if name == "clip" else 4), rel=1e-5)
    # The score is over all images, not those of a batch.
    batches = list(task.val_batches()) + list(task.test_batches())
    outputs = [model(**model_inputs(model, batch)) for batch in batches]
    images, texts = (torch.cat([output[key] for output in outputs]) for key in ("image_embeds", "text_embeds"))
    best = (images @ texts.T).argmax(1)
    assert task.score(model, batches) == float((best == torch.arange(8)).float().mean())
    with pytest.raises(ValueError, match="no batches"):
        task.score(model, [])


@torch.no_grad()
def test_the_matcher_reads_image_and_text_together() -> None:
    model = make_model("blip-retrieval")
    task = Synthetic(make_processor("blip-retrieval"), model=model, **SHORT)
    batch = next(task.train_batches(0))

    def verdict(image: int, text: int) -> torch.Tensor:
        ids = batch["input_ids"][text][batch["attention_mask"][text] > 0][None]
        return model(pixel_values=batch["pixel_values"][[image]], input_ids=ids).itm_score[0]

    expected = [verdict(i, i) for i in range(4)] + [verdict(i, (i + 1) % 4) for i in range(4)]
    assert (task.logits(model, batch)[:, 0] - torch.stack(expected)).abs().max() <= TOLERANCE
    assert task.targets(batch).flatten().tolist() == [1] * 4 + [0] * 4
    loss = answer_loss(task.logits(model, batch), task.targets(batch))
    assert float(task.loss(model, batch)) == pytest.approx(float(loss))
    best = [max(range(4), key=lambda text: float(verdict(image, text).diff())) for image in range(4)]
    assert task.score(model, [batch]) == sum(i == text for i, text in enumerate(best)) / 4
    with seen_by(model.vision_model) as seen:
        task.logits(model, batch)
    assert len(seen) == 1


def test_texts_have_the_length_that_the_model_reads() -> None:
    clip, siglip = (Synthetic(make_processor(name), **SHORT) for name in ("clip", "siglip"))
    batch = next(siglip.train_batches(0))
    assert batch["input_ids"].shape[1] == families.SIGLIP_TEXT and "attention_mask" not in batch
    batch = next(clip.train_batches(0))
    assert batch["input_ids"].shape[1] == clip.text_length < 32
    assert "attention_mask" in batch
    with pytest.raises(InputError, match="begin with CLIP, Siglip, Blip; LlavaProcessor is none of them"):
        PairTask(make_processor("llava")).comparison  # noqa: B018


# ---- made-up data


@pytest.mark.parametrize("name", [case.name for case in families.CASES])
def test_synthetic_data_are_a_function_of_the_seed(name: str) -> None:
    model, processor = make_model(name), make_processor(name)
    task = load_task("synthetic", processor, model)
    assert isinstance(task, Task)
    assert isinstance(task, PairTask if name in PAIRED else VQATask)
    assert [len(task.split(split).images) for split in task.splits] == [64, 16, 16]
    assert {q[0] for q in task.split("train").questions} == set(range(64))
    batch, again = next(task.train_batches(0)), next(load_task("synthetic", processor, model).train_batches(0))
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    other = next(Synthetic(processor, model=model, seed=1).train_batches(0))
    assert not torch.equal(batch["pixel_values"], other["pixel_values"])
    rows = len(batch["input_ids"])
    assert rows == (4 if name in PAIRED else 1)
    # One tile at the model's own resolution.
    request = family_of(model).request(model, task.example_inputs())
    assert request.images == 1 and torch.isfinite(task.loss(model, batch))


def test_without_a_model_blip_s_processor_means_questions() -> None:
    processor = make_processor("blip-vqa")
    assert isinstance(load_task("synthetic", processor), VQATask)
    assert isinstance(load_task("synthetic", processor, make_model("blip-retrieval")), PairTask)


def test_synthetic_words_and_images() -> None:
    tokenizer = make_processor("llava").tokenizer
    words = random_words(tokenizer, 40, seed=0)
    assert len(set(words)) == 40 and all(word.isalpha() and word.islower() for word in words)
    assert words == random_words(tokenizer, 40, seed=0) != random_words(tokenizer, 40, seed=1)
    data = make_split(tokenizer, "val", 5, side=48, seed=0)
    assert data.images.shape == (5, 48, 48, 3) and data.images.std() > 20
    assert all(len(question.split()) == 8 and " " not in answer for _, question, answer, _ in data.questions)
    assert not np.array_equal(data.images, make_split(tokenizer, "test", 5, side=48, seed=0).images)


def test_images_have_the_size_that_the_processor_wants() -> None:
    sides = {name: image_side(make_processor(name)) for name in ("clip", "siglip2", "idefics3", "internvl", "blip-vqa")}
    assert set(sides.values()) == {64}
    assert image_side(make_processor("qwen2.5-vl")) == 32 * families.QWEN_PATCH


# ---- the whole pass

QUICK = PruneConfig(
    stages=2, stage_steps=2, final_steps=1, val_examples=4, calibration_batches=1, round_to=8, lr=1e-3, matrix_lr=1e-3
)
FAST = {("smolvlm", "probe"), ("qwen2.5-vl", "comp"), ("blip-vqa", "comp"), ("clip", "probe")}
RUNS = [
    pytest.param(case.name, strategy, marks=[] if (case.name, strategy) in FAST else pytest.mark.slow)
    for case in families.CASES
    for strategy in ("probe", "comp")
]


@pytest.mark.parametrize(("name", "strategy"), RUNS)
def test_every_family_is_pruned_on_synthetic_data(name: str, strategy: str, tmp_path: Any) -> None:
    model, processor = make_model(name), make_processor(name)
    options = {"side": 64} if name == "qwen2.5-vl" else {}
    task = Synthetic(processor, model=model, **SHORT, **options)
    modes = family_of(model).modes(model)
    result = comp_edge.prune(
        model, task, budget=comp_edge.Budget(macs=0.5), strategy=strategy, config=QUICK, base=name, out=tmp_path / "out"
    )
    assert result.metrics["macs_kept"] <= 0.5
    used = {line["mode"] for line in result.trace}
    assert used <= set(modes)
    if strategy == "comp" and len(result.trace) >= len(modes):
        assert used == set(modes)  # each is tried once at the start
    assert all(np.isfinite(line["loss"]) for line in result.trace)
    loaded = comp_edge.load_pretrained(tmp_path / "out")
    batch = next(task.val_batches())
    with torch.no_grad():
        assert (task.logits(loaded, batch) - task.logits(result.model, batch)).abs().max() <= 1e-6
    assert result.metrics["pruned"]["test_score"] == task.score(loaded, task.test_batches())


@pytest.mark.parametrize("strategy", ["probe", "comp"])
@pytest.mark.parametrize("name", ["qwen2.5-vl", "internvl"])
def test_packed_images_are_pruned_by_several_a_batch(name: str, strategy: str) -> None:
    """Importance is taken from parts of batches, whose images lie behind each other only inside the model."""
    task, model = asking(name), make_model(name)
    config = PruneConfig(**{**QUICK.__dict__, "stages": 1, "stage_steps": 1, "final_steps": 0, "stage_share": 0.5})
    result = comp_edge.prune(
        model, task, budget=comp_edge.Budget(macs=0.8), strategy=strategy, config=config, evaluate=False
    )
    assert result.metrics["macs_kept"] <= 0.8


# ---- dense training


def test_the_auxiliary_loss_needs_one_grid_of_patches() -> None:
    class Helped(Asking):
        def auxiliary_head(self, width: int, patches: int) -> torch.nn.Module:
            return torch.nn.Linear(width, patches)

    grids = {"llava": 16, "smolvlm": 64, "internvl": 64, "blip-vqa": 16}
    for name, patches in grids.items():
        model, task = make_model(name), Helped(make_processor(name))
        width = model.config.vision_config.hidden_size
        head = _auxiliary_head(model, task)
        assert (head.in_features, head.out_features) == (width, patches)
        batch = next(task.train_batches(0))
        assert _patch_features(model, batch).shape == (9, patches, width)
    assert _auxiliary_head(make_model("qwen2.5-vl"), Helped(make_processor("qwen2.5-vl"))) is None
    tiled = Helped(make_processor("smolvlm"), image_options={})
    tiled.eval_batch = 1
    assert _auxiliary_head(make_model("smolvlm"), tiled) is None
    assert _auxiliary_head(make_model("clip"), Synthetic(make_processor("clip"), **SHORT)) is None


def test_parts_of_a_batch_keep_rows_together() -> None:
    task = asking("qwen2.5-vl")
    batch = next(task.train_batches(0))
    part = take_rows(batch, torch.tensor([4, 2]))
    assert torch.equal(part["pixel_values"][1], batch["pixel_values"][2])
    inputs = model_inputs(make_model("qwen2.5-vl"), part)
    assert inputs["pixel_values"].shape == (2 * 256, 96) and len(inputs["image_grid_thw"]) == 2
