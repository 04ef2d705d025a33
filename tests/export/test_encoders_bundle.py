"""Bundles of encoders: the golden file, the text recipe, the runner, and what a user can get wrong. Nothing is lowered."""

import json

import pytest
import torch
from safetensors.torch import save_file

from comp_edge.errors import InputError
from export.bundle import (
    AnswerSpec,
    Bundle,
    BundleError,
    MethodSpec,
    TensorSpec,
    TextGolden,
    finish_bundle,
    read_text_golden,
    write_text_golden,
)
from export.coreml.__main__ import main as coreml
from export.coreml.encoders import method_specs
from export.encoder_compare import Comparison, ModuleEngine, unclear
from export.encoder_methods import method_spec
from export.encoder_runner import EncoderRunner, Response, runner_of
from export.encoders import encoder_reference, load_encoders, read_encoder_requests, synthetic_encoder_requests
from export.executorch.__main__ import main as executorch
from export.graph import COREML, EXECUTORCH
from export.reference import Requests, image_spec, write_processor
from tests.export.encoder_models import NAMES, TEXT_TOKENS, make_source, pruned_folder

TEXTS = ("", "Red house!", "the red house above the river  market", "green engine " * 20)


def golden(writes=False):
    tensors = {"pixel_values": torch.randn(3, 3, 4, 4), "input_ids": torch.ones(3, 5, dtype=torch.int64)}
    more = {"tokens": ((1,), (2, 3), (4,)), "logits": tuple(torch.randn(n, 7) for n in (1, 2, 1))} if writes else {}
    return TextGolden(texts=("a", "é", ""), tensors=tensors | {"text_embeds": torch.randn(3, 6)}, **more)


@pytest.mark.parametrize("writes", [False, True])
def test_golden_round_trip(tmp_path, writes):
    before = golden(writes)
    write_text_golden(tmp_path / "g.safetensors", before)
    after = read_text_golden(tmp_path / "g.safetensors")
    assert after.texts == before.texts and after.tokens == before.tokens
    assert all(torch.equal(after.tensors[name], value) for name, value in before.tensors.items())
    assert all(torch.equal(a, b) for a, b in zip(after.logits, before.logits, strict=True))
    chosen = after.take([2, 1])
    assert chosen.texts == ("", "é") and torch.equal(chosen.tensors["text_embeds"][1], before.tensors["text_embeds"][1])
    assert chosen.tokens == (((4,), (2, 3)) if writes else ())


@pytest.mark.parametrize("damage", ["rows", "ids", "lengths"])
def test_a_damaged_golden_file(tmp_path, damage):
    one = golden(writes=True)
    tensors = {
        **one.tensors,
        "tokens": torch.arange(4),
        "logits": torch.zeros(4, 7),
        "lengths": torch.tensor([1, 2, 1]),
    }
    if damage == "rows":
        tensors["text_embeds"] = tensors["text_embeds"][:2]
    elif damage == "ids":
        del tensors["input_ids"]
    else:
        tensors["lengths"] = torch.tensor([1, 2, 2])
    path = tmp_path / "g.safetensors"
    save_file({k: v.clone() for k, v in tensors.items()}, path, metadata={"questions": '["a", "b", "c"]'})
    with pytest.raises(BundleError, match="golden file"):
        read_text_golden(path)


@pytest.fixture(scope="module")
def eager(tmp_path_factory):
    """`eager(name)`: a bundle folder without a program, and an engine that runs its modules."""

    def make(name):
        source, folder = make_source(name, "pruned"), tmp_path_factory.mktemp(name)
        (folder / "model.pte").write_bytes(b"none")
        write_processor(source, folder)
        parts = source.parts(EXECUTORCH)
        specs = [
            method_spec(n, part, file="model.pte", floats="float32", integers="int64", pixels=(-1.0, 1.0))
            for n, part in parts.items()
        ]
        finish_bundle(
            folder,
            backend="executorch",
            profile="encoders",
            model_type="x",
            base="x",
            precision="float32",
            methods=specs,
            image=image_spec(source),
            text=source.text,
            answer=source.answer,
            tokens=source.tokens,
        )
        return source, Bundle.open(folder), ModuleEngine({n: part.module for n, part in parts.items()})

    cache = {}
    return lambda name: cache.setdefault(name, make(name)) if name not in cache else cache[name]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_the_runner_does_what_an_application_does(eager, name):
    """Token ids by the manifest's rules alone equal the processor's, and a request equals transformers' answer."""
    source, bundle, engine = eager(name)
    runner = runner_of(bundle, engine=engine)
    requests = Requests(torch.randn(len(TEXTS), 3, *source.size, generator=torch.Generator().manual_seed(1)), TEXTS)
    expected = encoder_reference(source, requests)
    compared = Comparison(expected, 1e-4)
    for index, text in enumerate(TEXTS):
        ids = runner.input_ids(text)
        assert torch.equal(ids[0], expected.tensors["input_ids"][index])
        compared.add(runner.respond(requests.pixel_values[index : index + 1], ids), index, counts=True)
    assert compared.failures() == [] and all(compared.matched) and compared.error > 0
    assert len(runner.token_ids(TEXTS[-1])) == source.text.max_tokens  # cut
    if source.generates:
        assert {len(tokens) for tokens in expected.tokens} <= set(range(1, source.new_tokens + 1))


def test_what_rounding_decides_is_told(eager):
    source, bundle, engine = eager("clip")
    requests = synthetic_encoder_requests(source, count=3)
    expected = encoder_reference(source, requests)
    modules = source.parts(EXECUTORCH)
    assert unclear(bundle, {name: part.module for name, part in modules.items()}, expected) == [False] * 3
    # A tower without attention's differences ranks all tokens alike: every cut is a draw.
    modules = {name: part.module for name, part in source.parts(EXECUTORCH).items()}
    for layer in modules["image_encoder"].tower.layers:
        if layer.attention is not None:
            layer.attention.q.weight.zero_(), layer.attention.q.bias.zero_()
    assert unclear(bundle, modules, expected) == [True] * 3


def test_a_comparison_notices_what_differs():
    one = golden(writes=True)
    right = [
        Response({"text_embeds": one.tensors["text_embeds"][i : i + 1]}, one.tokens[i], tuple(one.logits[i].split(1)))
        for i in range(3)
    ]
    found = Comparison(one, 1e-4)
    assert [found.add(response, i, counts=True) for i, response in enumerate(right)] == [0.0] * 3
    assert found.matched == [True] * 3 and found.failures() == []
    found.add(Response({"text_embeds": right[0].tensors["text_embeds"] + 1}, (2,), right[0].logits), 0, counts=False)
    assert found.matched[-1] is False and found.error == 0.0
    found.add(
        Response({"text_embeds": right[0].tensors["text_embeds"] * torch.nan}, (1,), right[0].logits), 0, counts=True
    )
    assert "text_embeds differ by nan" in found.failures()[0]
    found.add(Response({"text_embeds": torch.zeros(1, 5)}, (1,), right[0].logits), 0, counts=True)
    assert "nan" in found.failures()[0]  # another shape


def test_prompts_and_texts_do_not_mix(eager):
    _, bundle, _ = eager("clip")
    value = json.loads((bundle.folder / "manifest.json").read_text())
    value["text"] = None
    (bundle.folder / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(BundleError, match="exactly one of 'prompt' and 'text'"):
        Bundle.open(bundle.folder)
    other = bundle.manifest.model_copy(update={"text": None})
    with pytest.raises(BundleError, match="takes prompts"):
        EncoderRunner(Bundle(folder=bundle.folder, manifest=other))


def test_core_mls_packages_are_named_as_mobileclips(eager):
    for name, methods in (
        ("clip", ["image_encoder", "text_encoder"]),
        ("blip-vqa", ["vision_encoder", "prefill", "decode"]),
    ):
        source = make_source(name, "pruned")
        specs = method_specs(source, source.parts(COREML), "fp16")
        kind = source.plan.model_type
        assert list(specs) == methods
        files = [f"{kind}_fp16_image.mlpackage"] + [f"{kind}_fp16_text.mlpackage"] * (len(methods) - 1)
        assert [spec.file for spec in specs.values()] == files
        assert {port.dtype for spec in specs.values() for port in spec.inputs} == {"float16", "int32"}
    # Caches are states, what the image gave is handed on; a layer without attention has neither.
    decode = specs["decode"]
    assert {state.name for state in decode.states} == {f"decoder_{k}_{i}" for k in ("keys", "values") for i in range(3)}
    assert [port.name for port in decode.inputs[:3]] == ["token", "position", "padding"]
    assert specs["prefill"].states == () and specs["prefill"].outputs[0].name == "padding"


def test_specs_say_what_ports_hold():
    source = make_source("blip-captioning", "dense")
    parts = source.parts(EXECUTORCH)
    spec = method_spec("decode", parts["decode"], file="f", floats="float32", integers="int64", pixels=(0.0, 1.0))
    assert isinstance(spec, MethodSpec) and isinstance(spec.inputs[0], TensorSpec)
    assert spec.inputs[1].range == (0, TEXT_TOKENS + source.new_tokens - 1)
    assert source.answer == AnswerSpec(
        start_token_id=None, eos_token_ids=(source.processor.tokenizer.sep_token_id,), max_new_tokens=source.new_tokens
    )


# ---- what a user can get wrong


def run(capsys, main, *arguments):
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err.strip()


@pytest.mark.parametrize("main", [executorch, coreml], ids=["executorch", "coreml"])
@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("clip", ("--prompt", "<image>{question}"), "<image>{question}"),
        ("clip", ("--max-new-tokens", "4"), "generates nothing"),
        ("clip", ("--prompt-tokens", "9"), "plan that fixes them"),
        ("clip", ("--image-size", "32x32"), "takes 64x64"),
        ("siglip2", ("--image-size", "64x64"), "images of 20"),
        ("siglip2", ("--image-size", "60x64"), "multiples of 16"),
        ("siglip2", (), "give --image-size"),
        ("blip-captioning", ("--max-new-tokens", "60"), "74 positions"),
    ],
)
def test_bad_arguments(capsys, tmp_path, main, name, arguments, said):
    code, out, err = run(capsys, main, pruned_folder(name), "-o", tmp_path / "b", *arguments)
    lines = [line for line in err.splitlines() if not line.startswith(("exporting", "lowering"))]
    assert code == 2 and not out and len(lines) == 1 and said in lines[0], err
    assert not (tmp_path / "b").exists()


def test_profiles_are_of_other_models(capsys, tmp_path):
    code, _, err = run(capsys, executorch, pruned_folder("clip"), "-o", tmp_path / "b", "--profile", "stock")
    assert code == 2 and "--profile stock" in err and "has no profiles" in err and err.count("\n") == 0


def test_requests_from_a_file(tmp_path):
    source = load_encoders(pruned_folder("clip"))
    path = tmp_path / "g.safetensors"
    save_file({"pixel_values": torch.ones(2, 3, 64, 64)}, path, metadata={"questions": '["one", "two"]'})
    assert read_encoder_requests(path, source, count=1).questions == ("one",)
    with pytest.raises(InputError, match="2 questions; 3 are"):
        read_encoder_requests(path, source, count=3)
    save_file({"pixel_values": torch.ones(1, 3, 32, 32)}, path, metadata={"questions": '["one"]'})
    with pytest.raises(InputError, match=r"takes \[3, 64, 64\]"):
        read_encoder_requests(path, source, count=1)
    with pytest.raises(InputError, match="does not exist"):
        read_encoder_requests(tmp_path / "none", source, count=1)


def test_made_up_texts_are_of_every_length():
    source = load_encoders(pruned_folder("clip"))
    requests = synthetic_encoder_requests(source, count=24)
    lengths = [len(source.token_ids(text)) for text in requests.questions]
    assert requests.questions[0] == "" and max(lengths) == TEXT_TOKENS and len(set(lengths)) > 5
    assert synthetic_encoder_requests(source, count=24).questions == requests.questions
