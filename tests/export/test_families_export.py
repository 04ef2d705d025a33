"""Every generative family through the real exporters: written, loaded back, and equal to transformers' own `generate`.

Lowering takes seconds a layer, so that each family goes through each exporter once or twice, dense or pruned by turns; that
all of them compute the right thing in every form is in `test_families_graph.py`.
"""

import pytest

from comp_edge.checkpoint import save_pretrained
from export.bundle import Bundle
from export.coreml.build import build_bundle as build_coreml
from export.executorch.build import build_bundle as build_executorch
from export.reference import synthetic_requests
from export.source import load_source
from runtime_tests.__main__ import main as runtime_tests
from tests.export.family_models import make_sample

pytestmark = pytest.mark.slow
# The last vision layer, which ranks the tokens, is one of windows.
SMALL = {"vision_layers": 2, "language_layers": 2, "full_layers": (0,)}


@pytest.fixture(scope="module")
def requested(tmp_path_factory):
    """`requested(name, kind)`: the family's model as an exporter gets it, with three requests."""
    made = {}

    def get(name, kind):
        if (name, kind) not in made:
            one = make_sample(name, kind, text_tokens=60, **SMALL)
            folder = tmp_path_factory.mktemp("families") / name
            save_pretrained(one.model, one.plan, folder, processor=one.processor)
            source = load_source(folder, new_tokens=4)
            made[name, kind] = source, synthetic_requests(source, count=3)
        return made[name, kind]

    return get


@pytest.mark.parametrize(
    ("name", "kind", "written"),
    [
        ("smolvlm", "pruned", ["scheduled", "stock"]),
        ("internvl", "dense", ["stock"]),
        ("qwen2.5-vl", "pruned", ["scheduled"]),
    ],
)
def test_executorch(requested, tmp_path, name, kind, written):
    source, requests = requested(name, kind)
    out = tmp_path / "bundle"
    profiles = ("stock",) if written == ["stock"] else ("stock", "scheduled")
    manifests = build_executorch(profiles, source, requests, out, report=lambda *_: None)
    assert sorted(manifests) == sorted(path.name for path in out.iterdir()) == written
    for manifest in manifests.values():
        assert manifest.verification.matched == 3 and manifest.verification.ambiguous == 0
        assert manifest.verification.max_abs_error <= 1e-4
        assert manifest.verification.details["image_features_max_abs_error"] <= 1e-4
        assert not any("outside XNNPACK" in warning for warning in manifest.warnings)
        assert manifest.prompt.image_tokens == source.image_tokens
    # Two positions a token: what the stock runner cannot tell is said, and what prefill takes is there.
    if scheduled := manifests.get("scheduled"):
        two = name == "qwen2.5-vl"
        inputs = [port.name for port in scheduled.method("prefill").inputs]
        assert inputs == ["inputs_embeds", "start"] + ["positions"] * two
        assert any("no profile 'stock'" in warning for warning in scheduled.warnings) == two
    assert runtime_tests([str(out), "--rounds", "0"]) == 0


@pytest.mark.parametrize(
    ("name", "kind", "precisions", "selection"),
    [
        ("idefics3", "dense", ("fp32",), "topk"),
        ("internvl", "pruned", ("fp16",), "topk"),
        ("qwen2.5-vl", "pruned", ("fp32",), "rank"),
    ],
)
def test_coreml(requested, tmp_path, name, kind, precisions, selection):
    source, requests = requested(name, kind)
    manifests = build_coreml(precisions, source, requests, tmp_path / "bundle", selection=selection)
    for precision in precisions:
        found = manifests[precision].verification
        assert found.matched == 3 and found.max_abs_error <= {"fp32": 1e-4, "fp16": 1e-3}[precision]
        assert found.details["image_features_max_abs_error"] <= found.tolerance
        # Drops behind the connector count, too.
        drops = 0 if kind == "dense" else 2
        assert found.details["kept_sets"]["compared"] == 3 * drops
        bundle = Bundle.open(tmp_path / "bundle" / precision)
        swift = bundle.path("CoreMLExample.swift").read_text()
        assert '"positions": Self.positions(' in swift if name == "qwen2.5-vl" else "positions" not in swift
    assert runtime_tests([str(tmp_path / "bundle"), "--rounds", "0"]) == 0
