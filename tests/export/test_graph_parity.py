"""The deployment forms compute what the transformers model computes."""

import pytest
import torch

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

# Two programs of the same function in fp32, ~10 layers deep, activations of order 1-10: rounding stays below this.
TOLERANCE = 1e-5
KINDS = ["dense", "tokens", "parameters", "everything"]
RANK = GraphOptions(selection="rank")
PATCHES = 16


def images(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(seed))


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1.0)).item()


@pytest.mark.parametrize("options", [EXECUTORCH, COREML, RANK], ids=["executorch", "coreml", "rank"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_vision_encoder(case, kind, options):
    one = case(kind)
    encoder = VisionEncoder(one.model, one.tokens["vision"], options)
    for image in images(4):
        # transformers' side pads with zeros to the dense number of image tokens.
        expected = torch.stack(list(one.model.model.get_image_features(image[None]).pooler_output))
        expected = expected[:, : one.image_tokens]
        got = encoder(image[None])
        assert got.shape == expected.shape == (1, one.image_tokens, 64)
        assert relative(got, expected) <= TOLERANCE


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "relu"])
@torch.no_grad()
def test_vision_activations(case, act):
    one = case("dense", vision_act=act)
    expected = torch.stack(list(one.model.model.get_image_features(images(1)).pooler_output))
    assert relative(VisionEncoder(one.model, one.tokens["vision"], EXECUTORCH)(images(1)), expected) <= TOLERANCE


@torch.no_grad()
def test_an_earlier_feature_layer(case):
    one = case("dense", feature_layer=-2)
    expected = torch.stack(list(one.model.model.get_image_features(images(1)).pooler_output))
    encoder = VisionEncoder(one.model, one.tokens["vision"], EXECUTORCH)
    assert len(encoder.tower.layers) == 3
    assert relative(encoder(images(1)), expected) <= TOLERANCE


def reference(model, ids, pixels, steps, pads=0):
    """Logits after the prompt and after each of `steps` greedily generated tokens, by transformers' own forward."""
    mask = torch.ones_like(ids)
    if pads:
        ids = torch.cat([ids.new_zeros(1, pads), ids], 1)
        mask = torch.cat([mask.new_zeros(1, pads), mask], 1)
    out = model.generate(
        input_ids=ids,
        attention_mask=mask,
        pixel_values=pixels,
        do_sample=False,
        max_new_tokens=steps + 1,
        min_new_tokens=steps + 1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[0, ids.shape[1] :].tolist(), torch.cat(out.logits)


def run_scheduled(one, encoder, prefill, decode, ids, pixels, tokens):
    """The same through the graph modules, fed the reference's tokens."""
    lm = prefill.language
    features = encoder(pixels)
    embeddings = TokenEmbedding(one.model)(ids)
    image = (ids[0] == 3).nonzero()[:, 0]
    sequence = torch.cat([embeddings[:, : image[0]], features, embeddings[:, image[-1] + 1 :]], 1)
    start = lm.prompt - sequence.shape[1]
    # What stands in the pads must not matter.
    sequence = torch.cat([torch.full((1, start, sequence.shape[2]), 7.0), sequence], 1)
    logits = [prefill(sequence, torch.tensor([start]))]
    for t, token in enumerate(tokens[:-1]):
        logits.append(decode(torch.tensor([[token]]), torch.tensor([lm.prompt + t]), torch.tensor([start])))
    return torch.cat(logits)


@pytest.mark.parametrize("options", [EXECUTORCH, COREML, RANK], ids=["executorch", "coreml", "rank"])
@pytest.mark.parametrize("text", [10, 8, 4])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_prefill_and_decode(case, prompt, kind, text, options):
    one = case(kind)
    lm = LanguageModel(one.model, one.tokens["language"], new_tokens=6, options=options)
    encoder = VisionEncoder(one.model, one.tokens["vision"], options)
    prefill, decode = Prefill(lm), Decode(lm)
    # Two prompts in a row: the second must find nothing of the first in the caches.
    for seed in (1, 2):
        ids, pixels = prompt(PATCHES, text, seed), images(1, seed)
        tokens, expected = reference(one.model, ids, pixels, 5)
        got = run_scheduled(one, encoder, prefill, decode, ids, pixels, tokens)
        assert relative(got, expected) <= TOLERANCE


@torch.no_grad()
def test_left_padding_of_the_reference_changes_nothing(case, prompt):
    one = case("tokens")
    ids, pixels = prompt(PATCHES, 7), images(1)
    tokens, plain = reference(one.model, ids, pixels, 4)
    padded_tokens, padded = reference(one.model, ids, pixels, 4, pads=3)
    assert tokens == padded_tokens
    assert relative(padded, plain) <= TOLERANCE


@pytest.mark.parametrize("kind", ["dense", "parameters"])
@torch.no_grad()
def test_text_decoder_in_segments(case, prompt, kind):
    one = case(kind)
    decoder = TextDecoder(one.model, context=40, options=EXECUTORCH)
    encoder = VisionEncoder(one.model, one.tokens["vision"], EXECUTORCH)
    embed = TokenEmbedding(one.model)
    for seed in (1, 2):
        ids, pixels = prompt(PATCHES, 9, seed), images(1, seed)
        tokens, expected = reference(one.model, ids, pixels, 5)
        segments = [embed(ids[:, :3]), encoder(pixels), embed(ids[:, 3 + PATCHES :])]
        segments += [embed(torch.tensor([[token]])) for token in tokens[:-1]]
        position, logits = 0, []
        for segment in segments:
            logits.append(decoder(segment, torch.tensor([position])))
            position += segment.shape[1]
        assert relative(torch.cat(logits[2:]), expected) <= TOLERANCE
