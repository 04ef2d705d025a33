"""Models for the tests of exporters: a LLaVA small enough to export in seconds, dense or pruned, as an object or a folder."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comp_edge.plan import Plan, StreamPlan
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan

IMAGE, PAD, EOS = 3, 0, 2
SIDE, PATCH, PROMPT_TOKENS, VOCABULARY = 64, 16, 10, 512
TEXT_TOKENS = 24


@dataclass
class Case:
    """A model under test: transformers' own, its plan, and the dense model it came from."""

    model: Any
    plan: Plan

    @property
    def tokens(self) -> dict[str, tuple[int, ...]]:
        return {name: stream.tokens for name, stream in self.plan.streams.items()}

    @property
    def image_tokens(self) -> int:
        return self.tokens["vision"][-1] - 1


def build_model(
    *,
    vision_act: str = "quick_gelu",
    feature_layer: int = -1,
    layers: int = 4,
    vocabulary: int = VOCABULARY,
    seed: int = 0,
) -> Any:
    """CLIP `layers` x 48 (3 heads, 17 tokens), Llama `layers` x 64 (4 heads, 2 groups), with lively random weights."""
    from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=3,
            image_size=SIDE,
            patch_size=PATCH,
            hidden_act=vision_act,
            projection_dim=48,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        image_token_id=IMAGE,
        image_seq_length=(SIDE // PATCH) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.1)
            elif "embed" in name:
                parameter.normal_(0.0, 1.0)
            else:
                parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8)
    return model


def _edit(plan: Plan, stream: str, *, layers: dict[int, dict[str, Any]], tokens: tuple[int, ...]) -> Plan:
    new = [layer.model_copy(update=layers.get(i, {})) for i, layer in enumerate(plan.streams[stream].layers)]
    streams = dict(plan.streams)
    streams[stream] = StreamPlan(layers=tuple(new), tokens=tokens)
    return plan.model_copy(update={"streams": streams})


def _tokens_only(plan: Plan) -> Plan:
    plan = _edit(plan, "vision", layers={}, tokens=(17, 13, 13, 9))
    return _edit(plan, "language", layers={}, tokens=(18, 14, 14, 7))


def _parameters_only(plan: Plan) -> Plan:
    used = len(plan.streams["vision"].layers)
    plan = _edit(
        plan,
        "vision",
        layers={0: {"heads": (0, 2)}, 1: {"ffn": tuple(range(32))}, 2: {"heads": ()}},
        tokens=(17,) * used,
    )
    # Layer 0 loses one query head of each group, layer 1 a whole group, layer 2 its feed-forward.
    return _edit(
        plan,
        "language",
        layers={0: {"heads": (0, 3)}, 1: {"heads": (2, 3)}, 2: {"ffn": ()}, 3: {"ffn": tuple(range(0, 128, 2))}},
        tokens=plan.streams["language"].tokens,
    )


def _everything(plan: Plan) -> Plan:
    """Widths, tokens and sub-layers; drops ranked by scores that an earlier layer gave, and a last layer without attention."""
    plan = _edit(
        plan,
        "vision",
        layers={0: {"heads": (0, 2)}, 1: {"heads": ()}, 2: {"ffn": ()}, 3: {"ffn": tuple(range(32))}},
        tokens=(17, 14, 11, 9),
    )
    return _edit(
        plan,
        "language",
        layers={0: {"heads": (0, 3)}, 1: {"heads": (), "ffn": tuple(range(64))}, 2: {"ffn": ()}, 3: {"heads": ()}},
        tokens=(18, 15, 9, 4),
    )


PLANS: dict[str, Callable[[Plan], Plan]] = {
    "dense": lambda plan: plan,
    "tokens": _tokens_only,
    "parameters": _parameters_only,
    "everything": _everything,
}


def make_case(kind: str, **options: Any) -> Case:
    model = build_model(**options)
    plan = PLANS[kind](dense_plan(model, prompt_tokens=PROMPT_TOKENS, base="tiny"))
    model = copy.deepcopy(model)
    apply_plan(model, plan)
    return Case(model=model, plan=plan)


@functools.cache
def _workspace() -> tempfile.TemporaryDirectory:
    """A folder for the whole session, whichever test folder asks first; gone when Python ends."""
    return tempfile.TemporaryDirectory(prefix="comp-edge-tests-")


@functools.cache
def make_folders() -> dict[str, Path]:
    """Model folders with processor files: `dense`, and `pruned` (widths, and tokens in both streams), two layers each."""
    from comp_edge.checkpoint import save_pretrained
    from comp_edge.reference.llava_digits import build_processor

    colours, root = ("red", "green", "blue", "yellow"), Path(_workspace().name)
    corpus = [f"USER: <image>\nwhat is the {c} {d}? ASSISTANT: {c}" for c in colours for d in range(10)]
    processor = build_processor(corpus)
    made = {}
    for name in ("dense", "pruned"):
        # ExecuTorch's runner only samples tokens that the tokenizer knows.
        model = build_model(layers=2, vocabulary=len(processor.tokenizer))
        plan = dense_plan(model, prompt_tokens=TEXT_TOKENS, base="tiny")
        if name == "pruned":
            plan = _edit(plan, "vision", layers={0: {"heads": (0, 2)}}, tokens=(17, 9))
            plan = _edit(plan, "language", layers={1: {"heads": (0, 3), "ffn": tuple(range(64))}}, tokens=(32, 20))
        apply_plan(model, plan)
        made[name] = save_pretrained(model, plan, root / name, processor=processor)
    return made


@dataclass(frozen=True)
class Bundles:
    """What `python -m export.executorch` wrote of the pruned folder, and the JSON that it printed."""

    folder: Path
    result: dict[str, Any]


@functools.cache
def make_bundles() -> Bundles:
    """Both profiles, by the real command in a process of its own."""
    out = Path(_workspace().name) / "bundle"
    command = [sys.executable, "-m", "export.executorch", str(make_folders()["pruned"]), "-o", str(out)]
    done = subprocess.run([*command, "--verify", "6", "--json"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Bundles(folder=out, result=json.loads(done.stdout))
