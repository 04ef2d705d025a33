"""Programs to be timed: a model of random weights under a plan, lowered as the exporter lowers it, with inputs for a request.

How long a program takes does not depend on what its weights are, so none are loaded; and nothing is verified here, which
`export.executorch` does for what is deployed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comp_edge.checkpoint import RANDOM, load_processor
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.inspection import structure
from comp_edge.plan import Plan, plan_of
from comp_edge.reference.processors import config_for
from comp_edge.reference.shapes import random_model
from comp_edge.structure import empty_model
from comp_edge.surgery import apply_plan
from comp_edge.units import dense_plan
from comp_edge.units import text_tokens as prompt_length
from devices.agent.onnx_export import write_onnx
from devices.depth import with_layers
from devices.errors import DeviceError
from devices.profiles import NEW_TOKENS, ModelRecord
from export.encoder_methods import Shape, method_spec, parts_of
from export.executorch.lower import Method, lower
from export.executorch.profiles import build_methods
from export.graph import EXECUTORCH
from export.source import Source

DENSE_PROMPT = 32  # text tokens of a dense model's prompt, where nothing else is said
IGNORED = ("token_embedding",)  # a look-up: its microseconds are not worth a measurement


@dataclass(frozen=True)
class Subject:
    """A dense model whose pruned forms are to be timed; weights are never loaded.

    Attributes:
        config: transformers' configuration of the dense model.
        processor: says what prompts look like.
    """

    name: str
    config: Any
    processor: Any
    text_tokens: int
    new_tokens: int

    @classmethod
    def of(cls, ref: str | Path, *, text_tokens: int | None = None, new_tokens: int = NEW_TOKENS) -> Subject:
        """From whatever names a model: a folder (dense or pruned), a reference model, a hub id or `random:SHAPE`.

        Args:
            text_tokens: of the prompt; a pruned folder's plan says it itself.

        Raises:
            InputError: there is no such model, or no family knows it.
        """
        model = structure(ref)
        plan = plan_of(model)
        if plan is not None and text_tokens is not None:
            raise InputError(f"prompt tokens {text_tokens} were given, but {str(ref)!r} has a plan that fixes them.")
        config = copy.deepcopy(model.config)
        if plan is not None:
            text_tokens = prompt_length(model, plan)
        elif text_tokens is None:
            most = getattr(config.text_config, "max_position_embeddings", DENSE_PROMPT)
            text_tokens = most if family_of(model).fusion(model) is None and most <= 77 else min(DENSE_PROMPT, most)
        elif (taken := family_of(model).default_request(model, text_tokens).text_tokens) != text_tokens:
            bound = "most" if taken < text_tokens else "least"
            raise InputError(
                f"prompts of {text_tokens} tokens are none for {str(ref)!r}, which takes at {bound} {taken}."
            )
        processor = load_processor(ref)
        if str(ref).startswith(RANDOM):  # its processor is made up, and so are its token ids
            config = config_for(processor, config)
        return cls(str(ref), config, processor, text_tokens, new_tokens)

    def with_prompt_of(self, model: Any, plan: Plan) -> Subject:
        """The same with the prompt of a plan of the model."""
        return replace(self, text_tokens=prompt_length(model, plan))

    def with_config(self, config: Any) -> Subject:
        """The same with another configuration, such as the one that a profile was measured with."""
        return replace(self, config=config)

    @property
    def record(self) -> ModelRecord:
        """What a profile says of it."""
        return ModelRecord(
            name=self.name,
            model_type=self.config.model_type,
            config=json.loads(json.dumps(self.config.to_dict())) | {"architectures": list(self.config.architectures)},
            text_tokens=self.text_tokens,
            new_tokens=self.new_tokens,
        )

    def shallow(self, layers: Mapping[str, int] | None) -> Any:
        """The model without weights, with fewer layers."""
        return empty_model(self.config if layers is None else with_layers(self.config, layers))

    def dense(self, model: Any) -> Plan:
        """The plan that keeps all of a (shallow) model."""
        return dense_plan(model, base=self.name, prompt_tokens=self.text_tokens)


@dataclass(frozen=True)
class Program:
    """A program's file, and for each of its methods a file with the raw bytes of its inputs."""

    path: Path
    inputs: dict[str, Path]


def write_programs(
    subject: Subject,
    plan: Plan,
    folder: Path,
    *,
    layers: Mapping[str, int] | None = None,
    methods: Sequence[str] = (),
    form: str = "pte",
    seed: int = 0,
) -> list[Program]:
    """Lower a model of random weights under a plan.

    Args:
        plan: of the model with `layers`.
        methods: only these; by default all that are worth timing.
        form: "pte", one program of all methods for ExecuTorch; "onnx", one for each method.

    Raises:
        DeviceError: the model has none of these methods.
        InputError: the model or the plan has no deployment form.
    """
    config = subject.config if layers is None else with_layers(subject.config, layers)
    model = random_model(config, seed=seed).requires_grad_(False)
    apply_plan(model, plan)
    found = deployed_methods(model, plan, subject)
    chosen = {name: method for name, method in found.items() if (name in methods if methods else name not in IGNORED)}
    if not chosen:
        raise DeviceError(f"{subject.name!r} has methods {', '.join(found)}; {', '.join(methods)} were asked for.")
    if form == "onnx":
        written = {name: write_onnx(name, method.module, method.inputs, folder) for name, method in chosen.items()}
        return [Program(file.path, {name: file.inputs}) for name, file in written.items()]
    folder.mkdir(parents=True, exist_ok=True)
    program = Program(folder / "model.pte", {name: folder / f"{name}.bin" for name in chosen})
    for name, method in chosen.items():
        raw = b"".join(tensor.contiguous().numpy().tobytes() for tensor in method.inputs)
        program.inputs[name].write_bytes(raw)
    program.path.write_bytes(lower(chosen, constants={}).program)
    return [program]


def deployed_methods(model: Any, plan: Plan, subject: Subject) -> dict[str, Method]:
    """The methods of a model that is pruned to a plan, as they are deployed, with inputs of a request of full length."""
    side = _image_side(model, plan)
    if family_of(model).fusion(model) is not None:
        source = Source(
            model=model,
            plan=plan,
            processor=subject.processor,
            template="",
            new_tokens=subject.new_tokens,
            size=(side, side),
        )
        return build_methods("scheduled", source)
    tokenizer = subject.processor.tokenizer
    shape = Shape(plan.schedules, (side, side), tokenizer.pad_token_id, tokenizer.eos_token_id, subject.new_tokens)
    options = {"file": "model.pte", "floats": "float32", "integers": "int64", "pixels": (0.0, 1.0)}
    return {
        name: Method(module=part.module, inputs=part.example(), spec=method_spec(name, part, **options))
        for name, part in parts_of(model, shape, EXECUTORCH).items()
    }


def _image_side(model: Any, plan: Plan) -> int:
    """Side of the square images of a request, in pixels."""
    vision = model.config.vision_config
    if family_of(model).variable_images:
        return round(plan.streams["vision"].tokens[0] ** 0.5) * vision.patch_size
    return vision.image_size if isinstance(vision.image_size, int) else vision.image_size[0]
