"""Which programs are measured."""

from dataclasses import replace

import pytest

from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.units import check_plan
from comp_edge.units import text_tokens as prompt_length
from devices.depth import with_layers
from devices.errors import DeviceError
from devices.latency.program import Program
from devices.points import WHOLE_KEEP, WHOLE_PROMPTS, choose_points, held_out_plans, prompted
from devices.programs import Subject

NAMES = ("llava-digits", "blip-digits", "clip-digits", "random:smolvlm-256m", "random:clip-vit-b-16")


@pytest.fixture(scope="module", params=NAMES)
def subject(request):
    return Subject.of(request.param)


def test_points_are_plans_of_their_models(subject):
    points = choose_points(subject)
    for point in points:
        model = subject.shallow(point.layers if point.kind == "block" else None)
        check_plan(model, point.plan)
        assert point.layers == {name: len(stream.layers) for name, stream in point.plan.streams.items()}
        assert (point.kind == "whole") == (point.methods == ())
    assert len({point.id for point in points}) == len(points)
    methods = Program(subject.shallow(None), room=subject.new_tokens).methods
    assert sum(len(point.methods or methods) for point in points) <= 24
    assert points == choose_points(subject), "a profile can be taken up again"


def test_whole_models_have_the_shares_that_they_are_named_by(subject):
    cost = MacsCost(subject.shallow(None))
    whole = [point for point in choose_points(subject) if point.kind == "whole"]
    assert whole[0].plan == subject.dense(subject.shallow(None))
    for point, keep, share in zip(whole, WHOLE_KEEP, WHOLE_PROMPTS, strict=True):
        model = subject.shallow(None)
        asked = prompted(subject, model, share)
        assert prompt_length(model, point.plan) == asked.text_tokens
        assert cost.predict(point.plan) / cost.predict(asked.dense(model)) == pytest.approx(keep, abs=0.02)


def test_blocks_differ_in_every_size(subject):
    for name in ("vision", "language"):
        blocks = [point.plan.streams[name] for point in choose_points(subject) if point.id.startswith(name)]
        assert len({len(layer.heads) for stream in blocks for layer in stream.layers}) >= 3
        assert len({len(layer.ffn) for stream in blocks for layer in stream.layers}) >= 3
        assert len({stream.schedule[-1] for stream in blocks}) >= 3


def test_a_layer_of_each_block_computes_on_what_a_drop_has_left(subject):
    """Where one row is read, that takes a layer more: only keys and values of the last one see all tokens."""
    program = Program(subject.shallow(None), room=subject.new_tokens)
    for point in choose_points(subject):
        for layers in program.layers_of(point.plan) if point.kind == "block" else ():
            run = program.runs[layers.run]
            if point.id.startswith(run.stream) and not run.decodes:
                assert layers.tokens[-1] in [read for _, _, _, _, read, _, _ in program.steps(layers)], point.id


def test_held_out_plans_are_others_of_all_sizes(subject):
    plans = held_out_plans(subject, 8, seed=5)
    model = subject.shallow(None)
    cost = MacsCost(model)
    prompts = [prompt_length(model, plan) for plan in plans]
    assert min(prompts) < 0.4 * subject.text_tokens and max(prompts) > 0.7 * subject.text_tokens
    dense = [cost.predict(replace(subject, text_tokens=prompt).dense(model)) for prompt in prompts]
    shares = sorted(cost.predict(plan) / whole for plan, whole in zip(plans, dense, strict=True))
    assert shares[0] < 0.35 and shares[-1] > 0.7
    measured = [point.plan for point in choose_points(subject)]
    for plan in plans:
        check_plan(model, plan)
        assert plan not in measured
    assert plans == held_out_plans(subject, 8, seed=5) != held_out_plans(subject, 8, seed=6)
    assert plans[:3] == held_out_plans(subject, 3, seed=5), "a run can be extended"


def test_prompts_that_are_too_long():
    assert Subject.of("clip-digits", text_tokens=20).text_tokens == 20
    for asked, said in ((33, "at most 32"), (1, "at least 2")):
        with pytest.raises(InputError, match=f"prompts of {asked} tokens are none for 'clip-digits', .* {said}"):
            Subject.of("clip-digits", text_tokens=asked)


def test_fewer_layers(subject):
    config = with_layers(subject.config, {"vision": 1, "language": 2})
    assert subject.config.to_dict() != config.to_dict()
    model = subject.shallow({"vision": 1, "language": 2})
    assert {name: len(stream.layers) for name, stream in subject.dense(model).streams.items()}["vision"] == 1
    with pytest.raises(DeviceError, match="99 layers in stream 'vision'"):
        with_layers(subject.config, {"vision": 99})
    with pytest.raises(DeviceError, match="'audio'"):
        with_layers(subject.config, {"audio": 1})


def test_texts_that_are_always_padded_have_one_length():
    subject = Subject.of("random:siglip-base-patch16-224")
    model = subject.shallow(None)
    assert prompted(subject, model, 0.1).text_tokens == subject.text_tokens
