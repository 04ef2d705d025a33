"""Families without placeholders (CLIP, SigLIP, BLIP): the same promises for every one of them, on small genuine models."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, BlipConfig, BlipForQuestionAnswering

from comp_edge.calibrate import collect
from comp_edge.checkpoint import load_pretrained, save_pretrained
from comp_edge.cost import MacsCost, macs
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.files import read_json
from comp_edge.masks import UnitMasks
from comp_edge.plan import Plan, plan_of
from comp_edge.reference import ASSETS
from comp_edge.schedule import active_schedule, attach
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan, sites
from tests.comp_edge.plans import family_plan, layer, mask_units
from tests.families import CASES, CLIP_EOS, FamilyCase, case_named

PAIRED = [case for case in CASES if case.name in ("clip", "siglip", "siglip2") or case.name.startswith("blip")]
every_family = pytest.mark.parametrize("case", PAIRED, ids=str)
every_layout = pytest.mark.parametrize(
    ("case", "padding"),
    [(case, padding) for case in PAIRED for padding in case.paddings],
    ids=lambda value: str(value) if isinstance(value, FamilyCase) else value or "equal lengths",
)
writing = pytest.mark.parametrize("name", ["blip-vqa", "blip-captioning"])
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def reference(case: FamilyCase, model: Any) -> Any:
    """The request of row 0 alone."""
    return family_of(model).request(model, case.inputs([0]))


def with_heads(plan: Plan, stream: str, index: int, heads: Any) -> Plan:
    """The plan with other heads in one layer."""
    layers = list(plan.streams[stream].layers)
    layers[index] = layer(heads, layers[index].ffn)
    changed = plan.streams[stream].model_copy(update={"layers": tuple(layers)})
    return plan.model_copy(update={"streams": {**plan.streams, stream: changed}})


def pruned(case: FamilyCase, **options: Any) -> Any:
    model = case.model()
    apply_plan(model, family_plan(model, reference(case, model), **options))
    return model


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def flops(run: Any) -> dict[str, float]:
    """MACs that torch saw, by module and in all ("Global"); its counter counts two per multiply-accumulate."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return {name: sum(kinds.values()) / 2 for name, kinds in counter.get_flop_counts().items()}


@torch.no_grad()
@every_layout
def test_masked_equals_shrunk(case: FamilyCase, padding: str | None) -> None:
    model = case.model(seed=1)
    plan, inputs = family_plan(model, reference(case, model)), case.inputs(4, padding=padding)
    dense = case.outputs(model, inputs)
    masks = mask_units(model, plan)
    masked = case.outputs(model, inputs)
    masks.detach()
    apply_plan(model, plan)
    assert distance(case.outputs(model, inputs), masked) <= 1e-5
    assert distance(dense, masked) > 0.02  # the comparison is about something


@torch.no_grad()
@every_family
def test_the_dense_plan_changes_nothing(case: FamilyCase) -> None:
    model, inputs = case.model(), case.inputs(3, padding=None if case.leaks else case.paddings[0])
    before = case.outputs(model, inputs)
    apply_plan(model, dense_plan(model, base="", request=reference(case, model)))
    assert distance(case.outputs(model, inputs), before) <= 1e-5


@torch.no_grad()
@every_family
def test_layers_compute_on_the_tokens_of_the_plan(case: FamilyCase) -> None:
    model = pruned(case)
    streams, plan = active_schedule(model).streams, plan_of(model)
    seen: dict[str, list[int]] = {name: [] for name in streams}
    keys: list[int] = []
    for name, stream in streams.items():
        for part in stream.layers:
            norm = part.norm_attn if stream.follows else part.norm_mlp
            norm.register_forward_hook(lambda m, args, out, n=name: seen[n].append(args[0].shape[1]))
            if stream.follows and part.attn is not None:
                part.attn.k.register_forward_hook(lambda m, args, out: keys.append(args[0].shape[1]))
    model(**case.inputs([0]))
    assert {name: tuple(counts) for name, counts in seen.items()} == {n: s.tokens for n, s in plan.streams.items()}
    assert set(keys) <= {plan.streams["vision"].tokens[-1]}
    assert plan.streams["vision"].tokens[-1] < plan.streams["vision"].tokens[0]
    assert (plan.streams["language"].tokens[-1] < plan.streams["language"].tokens[0]) == ("captioning" not in case.name)


@torch.no_grad()
@every_layout
def test_examples_do_not_depend_on_their_batch(case: FamilyCase, padding: str | None) -> None:
    model = pruned(case)
    together = case.outputs(model, case.inputs(5, padding=padding))
    for row in range(5):
        assert distance(case.outputs(model, case.inputs([row], padding=padding)), [together[row]]) <= 1e-5


@torch.no_grad()
@writing
def test_generate_with_cache_equals_without(name: str) -> None:
    """Token for token, with self-attention and the attention to the image gone in a layer each, the first included."""
    case = case_named(name)
    for skipped in ((), ("language",), ("language", "cross")):
        model = case.model()
        plan = family_plan(model, reference(case, model), tokens="language" not in skipped)
        for stream in skipped:
            plan = with_heads(plan, stream, 0, ())
        apply_plan(model, plan)
        inputs = case.generate_inputs(4)
        cached = model.generate(**inputs, **OPTIONS)
        assert torch.equal(cached, model.generate(**inputs, **OPTIONS, use_cache=False))
        assert len({tuple(row) for row in cached.tolist()}) > 1  # the rows do say different things
        for row in range(4):
            alone = model.generate(**case.generate_inputs([row]), **OPTIONS)
            assert torch.equal(alone[0], cached[row])


@torch.no_grad()
def test_decoding_by_hand_counts_what_has_passed() -> None:
    """transformers asks the first layer's cache for positions, also where that layer has no attention any more."""
    case = case_named("blip-captioning")
    model = case.model()
    plan = family_plan(model, reference(case, model))
    apply_plan(model, with_heads(plan, "language", 0, ()))
    inputs = case.inputs(3, padding=None)
    ids, image = inputs["input_ids"], model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    whole = model.text_decoder(input_ids=ids, encoder_hidden_states=image).logits
    cache = None
    for start, stop in ((0, 3), (3, 4), (4, ids.shape[1])):
        step = model.text_decoder(
            input_ids=ids[:, start:stop], encoder_hidden_states=image, past_key_values=cache, use_cache=True
        )
        cache = step.past_key_values
        assert torch.allclose(step.logits, whole[:, start:stop], atol=1e-5) and cache.get_seq_length() == stop


@torch.no_grad()
@writing
def test_beams_do_not_depend_on_the_batch(name: str) -> None:
    case = case_named(name)
    model = pruned(case)
    options = OPTIONS | {"num_beams": 3}
    together = model.generate(**case.generate_inputs(3), **options)
    assert torch.equal(together, model.generate(**case.generate_inputs(3), **options, use_cache=False))
    for row in range(3):
        assert torch.equal(model.generate(**case.generate_inputs([row]), **options)[0], together[row])


@torch.no_grad()
def test_answers_do_not_read_the_padding_of_their_question() -> None:
    """transformers loses the mask; with a schedule, be it dense, more padding is the same question."""
    case = case_named("blip-vqa")
    model = case.model()
    inputs = case.inputs(3)
    more = {name: torch.nn.functional.pad(inputs[name], (0, 3)) for name in ("input_ids", "attention_mask")}
    leaky = distance(case.outputs(model, inputs), case.outputs(model, inputs | more))
    for plan in (
        dense_plan(model, base="", request=reference(case, model)),
        family_plan(model, reference(case, model)),
    ):
        apply_plan(model, plan)
        assert distance(case.outputs(model, inputs), case.outputs(model, inputs | more)) <= 1e-5
        generated = [model.generate(**{k: v for k, v in given.items() if k != "labels"}, **OPTIONS)
                     for given in (inputs, inputs | more)]  # fmt: skip
        assert torch.equal(*generated)
    assert leaky > 1e-3


@every_family
def test_saved_equals_loaded(case: FamilyCase, tmp_path: Path) -> None:
    model = pruned(case)
    dense = case.model().state_dict()
    folder = save_pretrained(model, plan_of(model), tmp_path / "folder")
    loaded = load_pretrained(folder)
    inputs = case.inputs(3)
    with torch.no_grad():
        assert distance(case.outputs(loaded, inputs), case.outputs(model, inputs)) <= 1e-6
    assert plan_of(loaded) == plan_of(model)
    # What is left carries the names that it had; a skipped sub-layer leaves at most a bias.
    new = set(loaded.state_dict()) - set(dense)
    assert all(name.endswith((".self_attn.bias", ".mlp.bias")) for name in new)
    assert all(value.shape <= dense[name].shape for name, value in loaded.state_dict().items() if name in dense)
    with safe_open(folder / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert set(stored) <= set(loaded.state_dict()) and all(0 not in shape for shape in stored.values())
    assert all(parameter.device.type == "cpu" for parameter in loaded.parameters())
    assert type(AutoConfig.from_pretrained(folder)) is type(model.config)  # transformers reads it, too


@every_family
def test_training_changes_the_loss(case: FamilyCase) -> None:
    model, inputs = pruned(case).train(), case.inputs(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    before = case.loss(model, inputs)
    before.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    for stream in active_schedule(model).streams.values():
        for view in (part.attn for part in stream.layers if part.attn is not None):
            assert torch.isfinite(view.q.weight).all() and view.out.weight.grad.abs().max() > 0
    # Only norms before what was pruned away, and projections for a use other than this, have nothing to learn.
    assert all("norm" in name or "_proj." in name for name in without)
    optimizer.step()
    assert case.loss(model, inputs).item() < before.item()


@torch.no_grad()
@every_family
def test_a_pruned_model_can_be_pruned_again(case: FamilyCase, tmp_path: Path) -> None:
    """First half of the plan, through a folder, then all of it: equals the whole plan at once, and the masked model."""
    whole, steps, masked = case.model(), case.model(), case.model()
    request = reference(case, whole)
    plan, first = family_plan(whole, request), family_plan(whole, request, tokens=False)
    for name, stream in dense_plan(whole, base="", request=request).streams.items():
        heads = stream.layers[2].heads
        first = with_heads(with_heads(first, name, 1, heads[1:]), name, 2, heads)
    apply_plan(whole, plan)
    apply_plan(steps, first)
    steps = load_pretrained(save_pretrained(steps, first, tmp_path / "first"))
    apply_plan(steps, plan)
    mask_units(masked, plan)
    inputs = case.inputs(3)
    expected = case.outputs(whole, inputs)
    assert distance(case.outputs(steps, inputs), expected) <= 1e-6
    assert distance(case.outputs(masked, inputs), expected) <= 1e-5
    assert plan_of(steps) == plan
    shapes = [{name: value.shape for name, value in model.state_dict().items()} for model in (steps, whole)]
    assert shapes[0] == shapes[1]


def counted_parts(case: FamilyCase, seen: dict[str, float], layers: int = 3) -> dict[str, float]:
    """What torch counted, by the parts that comp-edge reports."""

    def of(name: str) -> float:
        return sum(value for key, value in seen.items() if key.split(".", 1)[1:] == [name])

    total, vision = seen["Global"], of("vision_model")
    if case.name == "clip":
        parts = {"vision": vision, "language": of("text_model")}
    elif case.name.startswith("siglip"):
        parts = {"vision": vision - of("vision_model.head"), "language": of("text_model") - of("text_model.head")}
    else:
        text = "text_decoder.bert" if case.name == "blip-captioning" else "text_encoder"
        cross = sum(of(f"{text}.encoder.layer.{index}.crossattention") for index in range(layers))
        parts = {"vision": vision, "language": of(text) - cross, "cross": cross}
        if case.name == "blip-vqa":
            parts["decoder"] = of("text_decoder.bert")
    return parts | {"head": total - sum(parts.values()), "total": total}


@every_family
@pytest.mark.parametrize("kind", ["dense", "tokens", "units", "pruned"])
def test_macs_agree_with_torchs_flop_counter(case: FamilyCase, kind: str) -> None:
    model, inputs = case.model(), case.inputs([0])
    request = reference(case, model)
    plan = family_plan(model, request, tokens=kind in ("tokens", "pruned"), units=kind in ("units", "pruned"))
    predicted = macs(model, plan)
    apply_plan(model, plan)
    assert macs(model) == predicted
    if inputs.pop("labels", None) is not None:
        inputs["decoder_input_ids"] = torch.tensor([[model.decoder_start_token_id]])
    if case.name == "blip-captioning":
        inputs["logits_to_keep"] = 1
    for name, value in counted_parts(case, flops(lambda: model(**inputs))).items():
        assert predicted[name] == pytest.approx(value, rel=0.01), name
    assert predicted["total"] == predicted["vision"] + predicted["prefill"]


@torch.no_grad()
def test_macs_of_a_decoded_token() -> None:
    captioning = case_named("blip-captioning")
    model, inputs = pruned(captioning), captioning.inputs([0])
    tower = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    words = {"encoder_hidden_states": tower, "use_cache": True}
    cache = model.text_decoder(input_ids=inputs["input_ids"], **words).past_key_values
    step = flops(lambda: model.text_decoder(input_ids=torch.tensor([[20]]), past_key_values=cache, **words))
    assert macs(model)["decode_per_token"] == pytest.approx(step["Global"], rel=0.01)

    answering = case_named("blip-vqa")
    model, inputs = pruned(answering), answering.inputs([0])
    question = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    tower = model.vision_model(pixel_values=inputs["pixel_values"]).last_hidden_state
    states = model.text_encoder(**question, encoder_hidden_states=tower).last_hidden_state
    assert states.shape[1] == question["input_ids"].shape[1]
    words = {"encoder_hidden_states": states, "use_cache": True}
    cache = model.text_decoder(input_ids=torch.tensor([[1]]), **words).past_key_values
    step = flops(lambda: model.text_decoder(input_ids=torch.tensor([[20]]), past_key_values=cache, **words))
    assert macs(model)["decode_per_token"] == pytest.approx(step["Global"], rel=0.01)


def test_blips_vision_tower_counts_as_in_the_papers() -> None:
    """ViT-B/16 at 384 px: 55.54 G an image, 111.08 G for the pair of NLVR2, in fvcore's convention."""
    values = read_json(ASSETS / "shapes" / "blip-vqa-base.json", what="config")
    with torch.device("meta"):
        model = BlipForQuestionAnswering(BlipConfig.from_dict(values))
    count = MacsCost(model).fvcore(dense_plan(model, base="", prompt_tokens=16))
    assert round(count / 1e9, 2) == 55.54 and round(2 * count / 1e9, 2) == 111.08


@torch.no_grad()
@every_family
def test_calibration_reaches_every_site(case: FamilyCase) -> None:
    """Attention to the image included, whose tokens are those of the text stream."""
    model = case.model()
    plan = family_plan(model, reference(case, model), units=False)
    schedule = attach(model, plan.schedules)
    masks = UnitMasks(schedule.streams)
    statistics = collect(model, masks, schedule, [case.inputs(3)], cip=True, cit=True, norm="mean")
    scores = statistics.wanda()
    assert set(scores) == set(sites(schedule.streams))
    assert all(torch.isfinite(value).all() and (value > 0).all() for value in scores.values())


@torch.no_grad()
@every_family
def test_a_copied_model_has_hooks_of_its_own(case: FamilyCase) -> None:
    model, inputs = pruned(case), case.inputs(2)
    twin, expected = copy.deepcopy(model), case.outputs(model, inputs)
    active_schedule(model).detach()
    assert distance(case.outputs(twin, inputs), expected) == 0
    assert active_schedule(twin) is not None and active_schedule(model) is None


def test_what_can_be_pruned() -> None:
    streams = {"clip": 4, "siglip": 4, "siglip2": 4, "blip-vqa": 5, "blip-retrieval": 5, "blip-captioning": 4}
    for case in PAIRED:
        model = case.model()
        modes = family_of(model).modes(model)
        assert len(modes) == streams[case.name] and {"vision_params", "language_params", "vision_tokens"} <= set(modes)
        assert ("cross_params" in modes) == case.name.startswith("blip")
        assert ("language_tokens" in modes) == (case.name != "blip-captioning")


@torch.no_grad()
@pytest.mark.parametrize("name", ["blip-retrieval", "blip-captioning"])
def test_a_tower_that_is_wider_than_the_text(name: str) -> None:
    """Keys and values of the attention to the image are computed from another width (BLIP-large)."""
    case = case_named(name)
    model = case.model(vision_heads=6)
    plan, inputs = family_plan(model, reference(case, model)), case.inputs(3)
    masks = mask_units(model, plan)
    masked = case.outputs(model, inputs)
    masks.detach()
    apply_plan(model, plan)
    assert distance(case.outputs(model, inputs), masked) <= 1e-5
    seen = counted_parts(case, flops(lambda: model(**case.inputs([0]))))
    assert macs(model)["cross"] == pytest.approx(seen["cross"], rel=0.01)


@torch.no_grad()
@every_family
def test_tokens_that_are_read_at_the_end_stay(case: FamilyCase) -> None:
    """CLS, the end of CLIP's text, the last position of SigLIP's, the first of BLIP's: whatever else goes."""
    model, inputs = case.model(), case.inputs(5)
    request = reference(case, model)
    plan = dense_plan(model, base="", request=request)
    for name, stream in family_of(model).streams(model).items():
        if stream.drops:
            tokens = plan.streams[name].tokens
            plan = plan.with_tokens(name, (tokens[0],) * (len(tokens) - 1) + (2,))
    schedule = attach(model, plan.schedules)
    model(**inputs)
    start, ends = torch.zeros(5, dtype=torch.long), (inputs["input_ids"] == CLIP_EOS).int().argmax(1)
    final = torch.full((5,), inputs["input_ids"].shape[1] - 1)
    read = {
        "clip": {"vision": start, "language": ends},
        "siglip": {"language": final},
        "siglip2": {"language": final},
        "blip-captioning": {"vision": start},
    }
    for name, wanted in read.get(case.name, {"vision": start, "language": start}).items():
        assert (schedule.kept(name) == wanted[:, None]).any(1).all(), name


@torch.no_grad()
def test_clips_text_ends_where_transformers_reads_it() -> None:
    """The first end of text, or the largest id where the config says 2; what follows the end does not matter."""
    case = case_named("clip")
    inputs, embeddings = case.inputs(3, prompt_lengths=(3, 5, 9)), []
    for eos in (CLIP_EOS, 2):
        model = case.model()
        model.text_model.eos_token_id = eos
        apply_plan(model, family_plan(model, reference(case, model)))
        other = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 20)
        embeddings += [model(**inputs | {"input_ids": ids}).text_embeds for ids in (inputs["input_ids"], other)]
    assert all(torch.allclose(one, embeddings[0], atol=1e-5) for one in embeddings)


@torch.no_grad()
def test_more_empty_patches_are_the_same_image() -> None:
    case = case_named("siglip2")
    model, inputs = pruned(case), case.inputs(4)
    more = {
        "pixel_values": torch.nn.functional.pad(inputs["pixel_values"], (0, 0, 0, 4), value=0.5),
        "pixel_attention_mask": torch.nn.functional.pad(inputs["pixel_attention_mask"], (0, 4)),
    }
    assert distance(case.outputs(model, inputs), case.outputs(model, inputs | more)) <= 1e-5


def test_requests_and_plans_that_do_not_fit() -> None:
    clip = case_named("clip")
    model = clip.model()
    family = family_of(model)
    assert family.default_request(model, 0).text_tokens == 2
    assert family.default_request(model, 1000).text_tokens == model.config.text_config.max_position_embeddings
    inputs = clip.inputs([0]) | {"pixel_values": torch.zeros(1, 3, 48, 48)}
    with pytest.raises(InputError, match="images of 48x48 pixels, the model takes 64x64"):
        family.request(model, inputs)
    case = case_named("blip-captioning")
    model = case.model()
    plan = dense_plan(model, base="", request=reference(case, model))
    first = plan.streams["language"].tokens[0]
    with pytest.raises(InputError, match="'language' cannot drop tokens before layer 1; it can before: none"):
        apply_plan(model, plan.with_tokens("language", (first, first - 1, first - 1)))
    with pytest.raises(InputError, match="'cross' must compute on the tokens of stream 'language'"):
        apply_plan(model, plan.with_tokens("cross", (first, first, first - 1)))


def test_config_names_what_layers_keep(tmp_path: Path) -> None:
    model = pruned(case_named("blip-vqa"))
    save_pretrained(model, plan_of(model), tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    layers = config["text_config"]["per_layer_config"]
    assert layers["0"] == {"num_attention_heads": 3, "num_cross_attention_heads": 3, "intermediate_size": 32}
    assert layers["1"] == {
        "intermediate_size": 61,
        "num_cross_attention_heads": 0,
        "skip": ["attention", "cross_attention"],
    }
    assert config["vision_config"]["per_layer_config"]["2"] == {"num_attention_heads": 3, "skip": ["mlp"]}
