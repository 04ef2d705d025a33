"""plan.json: what round-trips, what is refused and where the error points."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from comp_edge.errors import InputError
from comp_edge.plan import PLAN_FILE, CostRecord, LayerPlan, Plan, StreamPlan
from comp_edge.units import check_plan, dense_plan, kept_kv_heads

indices = st.lists(st.integers(0, 200), unique=True, max_size=12).map(sorted)


@st.composite
def streams(draw: st.DrawFn) -> dict:
    layers = draw(st.lists(st.fixed_dictionaries({"heads": indices, "ffn": indices}), max_size=5))
    tokens = draw(st.lists(st.integers(1, 600), min_size=len(layers), max_size=len(layers)))
    return {"layers": layers, "tokens": sorted(tokens, reverse=True)}


plans = st.fixed_dictionaries(
    {
        "schema": st.just(1),
        "model_type": st.sampled_from(["llava", "blip"]),
        "base": st.text(max_size=8),
        "streams": st.dictionaries(st.sampled_from(["vision", "language", "cross"]), streams(), max_size=3),
        "budget": st.dictionaries(st.text(max_size=4), st.one_of(st.integers(), st.text(max_size=3)), max_size=2),
        "cost": st.one_of(
            st.none(),
            st.fixed_dictionaries(
                {"name": st.text(max_size=4), "dense": st.floats(0, 1e15), "pruned": st.floats(0, 1e15)}
            ),
        ),
        "strategy": st.sampled_from(["comp", "probe"]),
        "seed": st.integers(0, 2**31),
    }
)


@given(value=plans)
def test_json_round_trip(value):
    plan = Plan.parse(value)
    assert plan.to_json() == value
    assert Plan.parse(json.loads(json.dumps(plan.to_json()))) == plan


@settings(max_examples=20)
@given(value=plans)
def test_file_round_trip(value, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    plan = Plan.parse(value)
    assert plan.save(folder) == folder / PLAN_FILE
    assert plan.save(folder / "other.json") == folder / "other.json"
    assert Plan.load(folder) == Plan.load(str(folder / PLAN_FILE)) == Plan.load(folder / "other.json") == plan
    assert json.loads((folder / PLAN_FILE).read_text()) == value


def valid() -> dict:
    layer = {"heads": [0, 2], "ffn": [1, 5, 7]}
    stream = {"layers": [layer, copy.deepcopy(layer), {"heads": [], "ffn": []}], "tokens": [17, 9, 9]}
    return {
        "schema": 1,
        "model_type": "llava",
        "base": "x",
        "streams": {"vision": stream, "language": copy.deepcopy(stream)},
    }


def edit(path: str, value: object) -> dict:
    """The valid plan with one value replaced; ... as the value deletes it."""
    plan = node = valid()
    *parents, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    for part in parents:
        node = node[part]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return plan


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("streams/vision/layers/1/heads", [2, 0], ["vision.layers.1", "heads", "[2, 0]"]),
        ("streams/vision/layers/1/heads", [1, 1], ["vision.layers.1", "heads", "[1, 1]"]),
        ("streams/language/layers/0/ffn", [3, 2], ["language.layers.0", "ffn", "[3, 2]"]),
        ("streams/language/layers/0/ffn", [-1, 2], ["language.layers.0.ffn.0"]),
        ("streams/language/layers/0/ffn", ["a"], ["language.layers.0.ffn.0"]),
        ("streams/language/layers/0/ffn", 3, ["language.layers.0.ffn"]),
        ("streams/language/layers/0/ffn", None, ["language.layers.0.ffn"]),
        ("streams/language/layers/0/ffn", ..., ["language.layers.0.ffn"]),
        ("streams/language/layers/0/more", [], ["language.layers.0.more"]),
        ("streams/language/layers/0", [], ["language.layers.0"]),
        ("streams/vision/tokens", [17, 9, 10], ["vision", "9 in layer 1", "10 in layer 2"]),
        ("streams/vision/tokens", [17, 9], ["vision", "2 entries", "3 layers"]),
        ("streams/vision/tokens", [17, 9, 0], ["vision.tokens.2"]),
        ("streams/vision/tokens", [17, 9, 1.5], ["vision.tokens.2"]),
        ("streams/vision", [], ["streams.vision"]),
        ("streams", ..., ["streams"]),
        ("model_type", ..., ["model_type"]),
        ("surprise", 1, ["surprise"]),
        ("cost", {"name": "macs"}, ["cost.dense"]),
        ("seed", "x", ["seed"]),
        ("schema", 2, ["schema 2", "schema 1"]),
        ("schema", "1", ["schema '1'"]),
        ("schema", True, ["schema True"]),
        ("schema", ..., ["schema None"]),
    ],
)
def test_invalid_plans_are_refused_with_the_place(path, value, says):
    with pytest.raises(InputError) as caught:
        Plan.parse(edit(path, value), where="somewhere.json")
    message = str(caught.value)
    assert all(part in message for part in ["somewhere.json", *says]), message
    assert "\n" not in message and message.endswith(".")


@pytest.mark.parametrize("value", [[], None, 3, "plan", [valid()]])
def test_a_plan_is_an_object(value):
    with pytest.raises(InputError, match="JSON object"):
        Plan.parse(value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[1, 2]", "JSON object"),
    ],
)
def test_damaged_files(tmp_path, content, says):
    (tmp_path / PLAN_FILE).write_bytes(content)
    with pytest.raises(InputError, match=says) as caught:
        Plan.load(tmp_path)
    assert PLAN_FILE in str(caught.value)


def test_a_folder_without_a_plan(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        Plan.load(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        Plan.load(tmp_path / "nowhere")


def test_plans_do_not_change():
    plan = Plan.parse(valid())
    with pytest.raises(ValueError):
        plan.seed = 3
    changed = plan.with_tokens("vision", [17, 8, 3])
    assert changed.streams["vision"].tokens == (17, 8, 3)
    assert plan.streams["vision"].tokens == (17, 9, 9)
    assert changed.streams["language"] == plan.streams["language"]
    with pytest.raises(ValueError, match="must not rise"):
        plan.with_tokens("vision", [17, 8, 9])


def test_cost_is_recorded():
    record = CostRecord(name="pixel", dense=12.5, pruned=4.0)
    plan = Plan(model_type="llava", base="x", streams={}, cost=record, budget={"latency_ms": 4.0})
    assert Plan.parse(plan.to_json()).cost == record


# ---- against a model


@pytest.fixture(scope="module")
def model(make_model):
    return make_model()


def change(plan: Plan, stream: str, *, tokens=None, **layers: dict) -> Plan:
    """`change(plan, "vision", l1={"heads": (0,)})`"""
    old = plan.streams[stream]
    new = [layer.model_copy(update=layers.get(f"l{i}", {})) for i, layer in enumerate(old.layers)]
    return plan.model_copy(
        update={"streams": plan.streams | {stream: StreamPlan(layers=tuple(new), tokens=tokens or old.tokens)}}
    )


def test_the_dense_plan_keeps_everything(model):
    plan = dense_plan(model, prompt_tokens=8, base="tiny")
    check_plan(model, plan)
    assert plan.streams["vision"].tokens == (17,) * 3
    assert plan.streams["language"].tokens == (16 + 8,) * 3
    for stream in plan.streams.values():
        assert all(layer == LayerPlan(heads=tuple(range(4)), ffn=tuple(range(64))) for layer in stream.layers)


def test_plans_that_fit(model):
    plan = dense_plan(model, prompt_tokens=8, base="")
    check_plan(model, change(plan, "language", l0={"heads": (0, 3)}, l1={"heads": (2, 3)}, l2={"heads": (), "ffn": ()}))
    check_plan(model, change(plan, "vision", l0={"heads": (1,)}, l1={"heads": ()}, tokens=(17, 17, 9)))


@pytest.mark.parametrize(
    ("stream", "changes", "says"),
    [
        ("vision", {"l1": {"heads": (0, 4)}}, ["heads index 4", "layer 1", "'vision'", "4 there"]),
        ("language", {"l2": {"ffn": (64,)}}, ["ffn index 64", "layer 2", "'language'", "64 there"]),
        ("language", {"l1": {"heads": (0, 1, 2)}}, ["layer 1", "'language'", "same number"]),
        ("vision", {"tokens": (16, 16, 16)}, ["all 17 tokens", "says 16"]),
        ("language", {"tokens": (16, 16, 16)}, ["16 image tokens", "says 16"]),
        ("vision", {"l0": {"heads": ()}, "tokens": (17, 9, 9)}, ["'vision'", "before layer 1", "attention head"]),
        (
            "language",
            {"l0": {"heads": ()}, "l1": {"heads": ()}, "tokens": (24, 24, 9)},
            ["'language'", "before layer 2"],
        ),
    ],
)
def test_plans_that_do_not_fit_the_model(model, stream, changes, says):
    plan = change(dense_plan(model, prompt_tokens=8, base=""), stream, **changes)
    with pytest.raises(InputError) as caught:
        check_plan(model, plan)
    assert all(part in str(caught.value) for part in says), str(caught.value)


def test_plans_of_other_models(model, make_model):
    plan = dense_plan(model, prompt_tokens=8, base="")
    with pytest.raises(InputError, match="'blip'.*'llava'"):
        check_plan(model, plan.model_copy(update={"model_type": "blip"}))
    with pytest.raises(InputError, match="streams"):
        check_plan(model, plan.model_copy(update={"streams": {"vision": plan.streams["vision"]}}))
    with pytest.raises(InputError, match="3 layers in stream 'language', the model has 2"):
        check_plan(make_model(language_layers=2), plan)
    with pytest.raises(InputError, match="'gpt2' is not supported"):
        check_plan(type("Other", (), {"config": type("Config", (), {"model_type": "gpt2"})()})(), plan)


def test_unused_vision_layers_are_not_in_the_plan(make_model):
    model = make_model(feature_layer=-2)
    plan = dense_plan(model, prompt_tokens=8, base="")
    assert len(plan.streams["vision"].layers) == 2
    check_plan(model, plan)


@given(kv_heads=st.integers(1, 5), group=st.integers(1, 4), data=st.data())
def test_groups_that_stay_keep_equally_many_heads(kv_heads, group, data):
    kept = data.draw(st.lists(st.integers(0, kv_heads * group - 1), unique=True).map(sorted))
    counts = [sum(head // group == g for head in kept) for g in range(kv_heads)]
    if len({c for c in counts if c}) > 1:
        with pytest.raises(ValueError, match="same number"):
            kept_kv_heads(kept, heads=kv_heads * group, kv_heads=kv_heads)
    else:
        expected = [g for g, c in enumerate(counts) if c]
        assert kept_kv_heads(kept, heads=kv_heads * group, kv_heads=kv_heads) == expected
