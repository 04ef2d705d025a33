"""CLIP, SigLIP and BLIP: the deployment forms compute what the transformers model computes, padded as it is or not."""

import dataclasses

import pytest
import torch

from comp_edge.errors import InputError
from export.encoder_compare import INPUTS, ModuleEngine, difference
from export.encoder_methods import kind_of
from export.encoders import encoder_reference, synthetic_encoder_requests
from export.graph import COREML, EXECUTORCH
from export.graph.pooled import AttentionPool
from export.graph.text import EndOfText
from tests.export.encoder_models import NAMES, TEXT_TOKENS, make_source

# Two programs of the same function in fp32, 3 to 6 layers deep, outputs of order 1, logits of order 10.
TOLERANCE = {"logits": 5e-5}
RANK = dataclasses.replace(COREML, selection="rank")
OPTIONS = pytest.mark.parametrize("options", [EXECUTORCH, RANK], ids=["executorch", "coreml-rank"])


@pytest.fixture(scope="module")
def sample():
    """Source, requests and what transformers makes of them, by family and kind."""
    cache = {}

    def get(name, kind):
        if (name, kind) not in cache:
            source = make_source(name, kind)
            requests = synthetic_encoder_requests(source, count=3)
            cache[name, kind] = source, encoder_reference(source, requests)
        return cache[name, kind]

    return get


def outputs(parts, engine, golden, index, answer, length):
    """Outputs by name, and the logits along the golden tokens."""
    values = {name: golden.tensors[name][index : index + 1] for name in INPUTS}
    for name, part in parts.items():
        if name != "decode":
            found = engine.call_all(name, *[values[port.name] for port in part.inputs])
            assert [tuple(value.shape) for value in found] == [port.shape for port in part.outputs]
            values.update(zip([port.name for port in part.outputs], found, strict=True))
    if answer is None:
        return values
    tokens = list(golden.tokens[index][:-1])
    if answer.start_token_id is None:
        logits, position = [values.pop("logits")], length
    else:
        tokens, logits, position = [answer.start_token_id, *tokens], [], 0
    for step, token in enumerate(tokens):
        values |= {"token": torch.tensor([[token]]), "position": torch.tensor([position + step])}
        logits += engine.call_all("decode", *[values[port.name] for port in parts["decode"].inputs])
    return values | {"logits": torch.cat(logits)}


@OPTIONS
@pytest.mark.parametrize("kind", ["dense", "tokens", "units", "pruned"])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_transformers_computes(sample, name, kind, options):
    source, golden = sample(name, kind)
    parts = source.parts(options)
    engine = ModuleEngine({name: part.module for name, part in parts.items()})
    lengths = [len(source.token_ids(text)) for text in golden.texts]
    for index in range(len(golden.texts)):
        found = outputs(parts, engine, golden, index, source.answer, lengths[index])
        for output, expected in golden.tensors.items():
            assert difference(found[output][0], expected[index]) <= TOLERANCE.get(output, 1e-5), output
        if golden.tokens:
            assert difference(found["logits"], golden.logits[index]) <= TOLERANCE["logits"]
    # The requests are about something: lengths from the shortest to the longest, and rows that differ.
    assert min(lengths) <= 2 and len(set(lengths)) == 3
    last = next(reversed(golden.tensors.values()))
    assert (last[0] - last[1]).abs().max() > 0.01


@torch.no_grad()
def test_what_stands_behind_a_text_does_not_matter(sample):
    for name, method in (("clip", "text_encoder"), ("blip-retrieval", "matcher")):
        source, golden = sample(name, "pruned")
        part = source.parts(EXECUTORCH)[method]
        text = next(text for text in golden.texts if 2 < len(source.token_ids(text)) < source.text.max_tokens)
        ids, length = source.input_ids(text), len(source.token_ids(text))
        more = [golden.tensors["image_features"][:1]] if method == "matcher" else []
        expected = part.module(ids, *more)
        other = ids.clone()
        if name == "clip":
            other[:, length:] = 20  # behind the first end of text
            assert torch.equal(part.module(other, *more), expected)
        other[:, 1] = 21
        assert difference(part.module(other, *more), expected) > 1e-3


@pytest.mark.parametrize("ids", [[5, 9, 7, 9, 9], [9, 9, 9, 9, 9], [5, 6, 7, 8, 9]])
def test_the_first_end_of_text(ids):
    counts, end = EndOfText(9, 5)(torch.tensor([ids]))
    first = ids.index(9)
    assert counts.flatten().tolist() == [float(i <= first) for i in range(5)]
    assert end.flatten().tolist() == [float(i == first) for i in range(5)]


@torch.no_grad()
def test_clips_legacy_end_of_text(sample):
    """eos_token_id 2 means the largest id, which is the tokenizer's end of text or an error."""
    source, golden = sample("clip", "pruned")
    legacy = dataclasses.replace(source)
    legacy.model.text_model.eos_token_id = 2
    try:
        with pytest.raises(InputError, match="513"):  # the vocabulary has 514 entries for the tokenizer's 514
            dataclasses.replace(legacy, model=_with_vocabulary(legacy.model, 600)).parts(EXECUTORCH)
        found = legacy.parts(EXECUTORCH)["text_encoder"].module(golden.tensors["input_ids"][:1])
        assert difference(found, golden.tensors["text_embeds"][:1]) <= 1e-5
    finally:
        source.model.text_model.eos_token_id = source.processor.tokenizer.eos_token_id


def _with_vocabulary(model, size):
    import copy

    other = copy.copy(model)
    other.config = copy.deepcopy(model.config)
    other.config.text_config.vocab_size = size
    return other


@torch.no_grad()
def test_attention_pooling_is_torchs(sample):
    """Against the head itself, with activations of another size than a tower's."""
    source, _ = sample("siglip", "dense")
    vision = source.model.vision_model
    pool = AttentionPool(vision.head, vision.post_layernorm, EXECUTORCH)
    for seed in range(3):
        x = 5 * torch.randn(1, 9, vision.config.hidden_size, generator=torch.Generator().manual_seed(seed)) + 1
        assert difference(pool(x)[0], vision.head(vision.post_layernorm(x))) <= 1e-5


def test_kinds(sample):
    kinds = {name: kind_of(sample(name, "dense")[0].model) for name in NAMES}
    assert kinds == {
        "clip": "towers",
        "siglip": "towers",
        "siglip2": "towers",
        "blip-retrieval": "matcher",
        "blip-vqa": "answers",
        "blip-captioning": "captions",
    }


def test_models_and_sizes_that_have_no_form(sample):
    source, _ = sample("siglip", "dense")
    source.model.vision_model.use_head = False
    try:
        with pytest.raises(InputError, match="vision_use_head false"):
            source.parts(EXECUTORCH)
    finally:
        source.model.vision_model.use_head = True
    writer, _ = sample("blip-captioning", "dense")
    with pytest.raises(InputError, match=f"{TEXT_TOKENS} tokens and 60 new tokens need 74 positions; the model has 64"):
        dataclasses.replace(writer, new_tokens=60).parts(EXECUTORCH)
    naflex, _ = sample("siglip2", "dense")
    with pytest.raises(InputError, match="starts with 16 tokens"):
        dataclasses.replace(naflex, size=(64, 64)).parts(EXECUTORCH)
