"""Every generative family: the deployment forms compute what the transformers model computes."""

import pytest
import torch

from comp_edge.errors import InputError
from export.graph import (
    COREML,
    EXECUTORCH,
    Decode,
    GraphOptions,
    LanguageModel,
    Prefill,
    TextDecoder,
    TokenEmbedding,
    VisionEncoder,
)
from export.inputs import image_inputs, request_inputs
from export.positions import ImageGrid, prompt_positions
from tests.export.family_models import NAMES, make_sample
from tests.families import QWEN_MERGE, QWEN_PATCH

# Two programs of the same function in fp32, ~6 layers deep, activations of order 1-10: rounding stays below this.
TOLERANCE = 1e-5
RANK = GraphOptions(mask=1e4, norm="mean", selection="rank")
OPTIONS = pytest.mark.parametrize("options", [EXECUTORCH, COREML, RANK], ids=["executorch", "coreml", "rank"])
KINDS = pytest.mark.parametrize("kind", ["dense", "pruned"])
FAMILIES = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def sample():
    cache = {}

    def get(name, kind):
        if (name, kind) not in cache:
            cache[name, kind] = make_sample(name, kind)
        return cache[name, kind]

    return get


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()


def image_grid(one) -> ImageGrid | None:
    if one.name != "qwen2.5-vl":
        return None
    height, width = (side // QWEN_PATCH // QWEN_MERGE for side in one.size)
    return ImageGrid(height, width, one.image_tokens)


def expected_features(one, image):
    """What transformers delivers, [1, k, d], and which of the dense tokens: those dropped read zero."""
    rows = one.model.get_image_features(**image_inputs(one.model, image), return_dict=True).pooler_output
    rows = torch.cat([row.reshape(-1, row.shape[-1]) for row in rows])
    kept = (rows != 0).any(-1).nonzero()[:, 0]
    return rows[kept][None], kept


@OPTIONS
@KINDS
@FAMILIES
@torch.no_grad()
def test_vision_encoder(sample, name, kind, options):
    one = sample(name, kind)
    encoder = VisionEncoder(one.model, one.schedules["vision"], options, size=one.size)
    for image in one.images(3):
        features, kept = expected_features(one, image[None])
        got = encoder(image[None])
        if encoder.says_kept:
            got, places = got
            assert places[0].tolist() == kept.tolist()
        assert got.shape == features.shape == (1, one.image_tokens, one.model.config.text_config.hidden_size)
        assert relative(got, features) <= TOLERANCE
    assert encoder.says_kept == (name == "qwen2.5-vl" and kind == "pruned")


def prompts(one, text, seed):
    """Ids with the image token once, after three words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(20, 200, (text,), generator=generator).tolist()
    return [*words[:3], one.model.config.image_token_id, *words[3:]]


def reference(one, pixels, ids, steps):
    inputs = request_inputs(one.model, pixels, ids, image_tokens=one.dense_image_tokens)
    out = one.model.generate(
        **inputs,
        do_sample=False,
        max_new_tokens=steps,
        min_new_tokens=steps,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, inputs["input_ids"].shape[1] :].tolist(), torch.cat(out.logits)


def check_answers(one, options):
    """Prompts of two lengths, with five generated tokens each, against transformers' own `generate`."""
    grid = image_grid(one)
    language = LanguageModel(one.model, one.schedules["language"], new_tokens=6, options=options, grid=grid)
    encoder = VisionEncoder(one.model, one.schedules["vision"], options, size=one.size)
    prefill, decode, embed = Prefill(language), Decode(language), TokenEmbedding(one.model)
    for seed, text in ((1, 40), (2, 17)):
        ids, pixels = prompts(one, text, seed), one.images(1, seed)
        tokens, expected = reference(one, pixels, ids, 5)
        features = encoder(pixels)
        features, kept = features if encoder.says_kept else (features, [None])
        sequence = torch.cat([embed(torch.tensor([ids[:3]])), features, embed(torch.tensor([ids[4:]]))], 1)
        start = language.prompt - sequence.shape[1]
        # What stands in the pads must not matter.
        sequence = torch.cat([torch.full((1, start, sequence.shape[2]), 7.0), sequence], 1)
        more = ()
        if grid is not None:
            more = (prompt_positions(grid, slots=language.prompt, first=start + 3, kept=kept[0]),)
        logits = [prefill(sequence, torch.tensor([start]), *more)]
        for t, token in enumerate(tokens[:-1]):
            step = (torch.tensor([[token]]), torch.tensor([language.prompt + t]), torch.tensor([start]))
            logits.append(decode(*step))
        assert relative(torch.cat(logits), expected) <= TOLERANCE


@OPTIONS
@KINDS
@FAMILIES
@torch.no_grad()
def test_prefill_and_decode(sample, name, kind, options):
    check_answers(sample(name, kind), options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("internvl", {"qk_norm": True, "tied": True}),
        ("smolvlm", {"heads": 9, "kv_heads": 3, "tied": True}),
        ("qwen2.5-vl", {"heads": 4, "kv_heads": 1, "head_dim": 16, "tied": False, "full_layers": (0, 2)}),
        ("llava", {"feature_layer": -1, "heads": 4, "kv_heads": 4}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@torch.no_grad()
def test_variants(name, options):
    check_answers(make_sample(name, "dense", **options), EXECUTORCH)


@torch.no_grad()
def test_llava_with_its_class_token():
    one = make_sample("llava", "dense")
    one.model.config.vision_feature_select_strategy = "full"
    image = one.images(1)
    expected = torch.stack(list(one.model.get_image_features(image, return_dict=True).pooler_output))
    got = VisionEncoder(one.model, one.schedules["vision"], EXECUTORCH)(image)
    assert got.shape == expected.shape == (1, 17, 32) and relative(got, expected) <= TOLERANCE


@pytest.mark.parametrize("name", [name for name in NAMES if name != "qwen2.5-vl"])
@torch.no_grad()
def test_text_decoder(sample, name):
    one = sample(name, "dense")
    decoder, embed = TextDecoder(one.model, context=80, options=EXECUTORCH), TokenEmbedding(one.model)
    encoder = VisionEncoder(one.model, one.schedules["vision"], EXECUTORCH)
    ids, pixels = prompts(one, 9, 1), one.images(1, 1)
    tokens, expected = reference(one, pixels, ids, 5)
    segments = [embed(torch.tensor([ids[:3]])), encoder(pixels), embed(torch.tensor([ids[4:]]))]
    segments += [embed(torch.tensor([[token]])) for token in tokens[:-1]]
    position, logits = 0, []
    for segment in segments:
        logits.append(decoder(segment, torch.tensor([position])))
        position += segment.shape[1]
    assert relative(torch.cat(logits[2:]), expected) <= TOLERANCE


def test_two_positions_need_more_than_the_stock_runner(sample):
    one = sample("qwen2.5-vl", "dense")
    with pytest.raises(InputError, match="no profile 'stock'"):
        TextDecoder(one.model, context=80, options=EXECUTORCH)
