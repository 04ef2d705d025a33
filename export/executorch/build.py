"""Writing a bundle: lower, save, load back, compare; a folder appears only when everything was right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from comp_edge.files import whole_folder
from export.bundle import GOLDEN_FILE, GOLDEN_KEPT, BundleError, Manifest, finish_bundle, write_golden
from export.executorch.lower import delegation_warnings, lower
from export.executorch.profiles import PROGRAM_FILE, Profile, build_methods, constants
from export.executorch.verify import verify
from export.graph.stock import stock_obstacle
from export.progress import Report, counter
from export.reference import Requests, image_spec, prompt_spec, reference, write_processor
from export.source import Source, without_language_drops


class VerificationError(RuntimeError):
    """The written program does not compute what the model computes."""


def build_profile(profile: Profile, source: Source, requests: Requests, folder: Path, *, report: Report) -> Manifest:
    """Export one profile into `folder`, an existing empty folder, and verify it there.

    Raises:
        InputError: the model has no deployment form.
        VerificationError: the program loads or computes wrongly.
    """
    lifted = None
    if profile == "stock":
        language = source.tokens["language"]
        if len(set(language)) > 1:
            lifted = language
        source = without_language_drops(source)
    report(0, 1, f"{profile}: lowering to XNNPACK")
    methods = build_methods(profile, source)
    constant = constants(profile, source)
    lowered = lower(methods, constants=constant)
    (folder / PROGRAM_FILE).write_bytes(lowered.program)
    write_processor(source, folder)
    golden = reference(source, requests, progress=counter(report, len(requests), f"{profile}: reference answers"))
    fields = {
        "backend": "executorch",
        "profile": profile,
        "model_type": source.plan.model_type,
        "base": source.plan.base,
        "precision": "float32",
        "methods": tuple(method.spec for method in methods.values()),
        "constants": constant,
        "image": image_spec(source),
        "prompt": prompt_spec(source),
        "tokens": source.tokens,
        "lifted_language_drops": lifted,
        "delegation": lowered.delegation,
        "warnings": (*source.notes, *delegation_warnings(lowered.delegation)),
    }
    # Large models: the modules and the program in memory are not needed any more.
    del methods, lowered
    finish_bundle(folder, **fields)
    try:
        outcome = verify(folder, golden, source, progress=counter(report, len(requests), f"{profile}: verifying"))
    except BundleError as error:
        raise VerificationError(f"profile {profile!r} was written but does not run: {error}") from None
    if outcome.failures:
        raise VerificationError(f"profile {profile!r} is not right: {'; '.join(outcome.failures)}.")
    write_golden(folder / GOLDEN_FILE, golden.take(outcome.clear[:GOLDEN_KEPT]))
    return finish_bundle(folder, **fields, verification=outcome.verification)


def build_bundle(
    profiles: tuple[Profile, ...], source: Source, requests: Requests, out: Path, *, report: Report
) -> dict[str, Manifest]:
    """Export profiles into `out`, each into a folder of its name. Nothing is written unless all of them are right.

    Of several profiles those that the model can have are written, with a note on the others.

    Raises:
        InputError, VerificationError: see `build_profile`.
    """
    manifests = {}
    if len(profiles) > 1 and (reason := stock_obstacle(source.model)):
        profiles = tuple(profile for profile in profiles if profile != "stock")
        source = dataclasses.replace(source, notes=(*source.notes, reason))
    # `scheduled` first: `stock` changes the live model's schedule.
    for_stock_last = sorted(profiles, key=lambda profile: profile == "stock")
    with whole_folder(out) as staging:
        for profile in for_stock_last:
            (staging / profile).mkdir()
            manifests[profile] = build_profile(profile, source, requests, staging / profile, report=report)
    return manifests
