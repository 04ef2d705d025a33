"""What a request takes on a device under a plan, fitted from a profile; the pruner sees it as a cost like any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from comp_edge.errors import InputError
from comp_edge.plan import Plan
from devices.errors import DeviceError
from devices.latency import stairs
from devices.latency.features import COUNTS, FEATURES, Vector
from devices.latency.fitting import Data, Fit, Rows, choose, fit
from devices.latency.program import Layers, Program, Work
from devices.latency.report import report as report_of
from devices.profiles import Point, Profile

FEWEST = 3  # points that a method needs
DISTURBED = 0.1  # relative noise of a measurement that never settled, however alike its rounds are
BEYOND = 0.1  # outside the measured range by more than this is extrapolation


class LayerCost(NamedTuple):
    """Milliseconds of one layer in one call of a method; the drop is the one before the layer."""

    method: str
    stream: str
    layer: int
    attention: float
    ffn: float
    drop: float


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Predicts milliseconds of a request; satisfies `comp_edge.cost.Cost`.

    A request calls every method once (the vision encoder once an image), and `decode` for each token after the first.

    Attributes:
        profile: what it was fitted from.
        program: the model's methods.
        data: measurements by method.
        fits: coefficients by method.
        held_out: by method, [n] predictions of its rows by fits without their points.
        steps: whether latency is a staircase in the number of tokens.
        decode_tokens: tokens generated after the first.
    """

    profile: Profile
    program: Program
    data: Data
    fits: Mapping[str, Fit]
    held_out: Mapping[str, np.ndarray]
    steps: stairs.Stairs
    decode_tokens: int = 0

    @classmethod
    def fit(cls, profile: Profile | str | Path) -> LatencyModel:
        """Fit a profile, or the file of one.

        Raises:
            DeviceError: the file cannot be used, its points do not fit its model, or they are too few; says which.
        """
        if not isinstance(profile, Profile):
            profile = Profile.load(profile)
        program = Program.of(profile.model)
        measured = _measured(program, profile)
        found = stairs.find(lambda step: _data(program.with_step(step), measured))
        program = program.with_step(found.step)
        data = _data(program, measured)
        choices, held_out = choose(data)
        return cls(profile, program, data, fit(data, choices), held_out, found)

    @property
    def name(self) -> str:
        """What plans and reports call this cost."""
        return f"latency_ms:{self.profile.device.name}"

    def with_decode_tokens(self, count: int) -> LatencyModel:
        """The same for requests that generate `count` tokens after the first.

        Raises:
            DeviceError: a negative number, a model that generates nothing, or a profile in which `decode` was not measured.
        """
        if count < 0 or (count and "decode" not in self.fits):
            can = "0 or more" if "decode" in self.fits else "0: the profile has no 'decode'"
            raise DeviceError(f"decode_tokens {count} was asked for; accepted: {can}.")
        return replace(self, decode_tokens=count)

    # ---- predictions

    def predict(self, plan: Plan) -> float:
        """Milliseconds of one request.

        Raises:
            DeviceError: the plan is not of the measured model.
        """
        calls = self.program.calls(plan, self.decode_tokens)
        parts = self._parts(plan, [method for method in self.fits if calls[method]])
        return sum([calls[method] * ms for method, ms in parts.items()])

    def parts(self, plan: Plan) -> dict[str, float]:
        """Milliseconds of one call of each method.

        Raises:
            DeviceError: see `predict`.
        """
        return self._parts(plan, self.fits)

    def by_layer(self, plan: Plan) -> list[LayerCost]:
        """Where the time of one call of each method goes; what is outside the layers is the rest of `parts`.

        A drop behind the connector is a layer behind the last.

        Raises:
            DeviceError: see `predict`.
        """
        sums, parts = self._sums(plan, self.fits), self.parts(plan)
        found = []
        for layers in self.program.layers_of(plan):
            run = self.program.runs[layers.run]
            if run.method not in self.fits:
                continue
            scale = parts[run.method] / sums[run.method] if sums[run.method] else 0.0
            for index, work in enumerate(self.program.steps(layers)):
                costs = [scale * _dot(part, self._weights[run.method]) for part in self.program.work(*work)]
                found.append(LayerCost(run.method, run.stream, index, *costs))
        return found

    def _parts(self, plan: Plan, methods: Collection[str]) -> dict[str, float]:
        fits = self.fits
        return {method: fits[method].curve(total) for method, total in self._sums(plan, methods).items()}

    def _sums(self, plan: Plan, methods: Collection[str]) -> dict[str, float]:
        """Milliseconds by method, as the sum of their parts."""
        self.program.check(plan)
        sums = {method: _dot(self.program.outside_of(method, plan), self._weights[method]) for method in methods}
        for layers in self.program.layers_of(plan):
            method = self.program.runs[layers.run].method
            if method in sums:
                sums[method] += self._run(layers)
        return sums

    @cached_property
    def _weights(self) -> dict[str, Vector]:
        return {method: tuple(fitted.per_feature.tolist()) for method, fitted in self.fits.items()}

    # A pruner asks for thousands of plans that consist of few different layers, and that differ in few of them.

    @cached_property
    def _run(self) -> Callable[[Layers], float]:
        layer, steps = self._layer, self.program.steps
        return lru_cache(maxsize=2**12)(lambda layers: sum([layer(work) for work in steps(layers)]))

    @cached_property
    def _layer(self) -> Callable[[Work], float]:
        of, runs, weights = self.program.work, self.program.runs, self._weights
        return lru_cache(maxsize=2**17)(
            lambda work: sum([_dot(part, weights[runs[work[0]].method]) for part in of(*work)])
        )

    # ---- how far to trust them

    def uncertainty(self, plan: Plan) -> float:
        """Milliseconds that the prediction may be off by (one standard deviation).

        From the leave-one-out errors of whole models, or of all points where there are few; more, the farther the plan is
        from what was measured (its leverage on the fit).

        Raises:
            DeviceError: see `predict`.
        """
        parts, vectors = self.parts(plan), self.program.vectors(plan)
        calls, squares = self.program.calls(plan, self.decode_tokens), 0.0
        for method, ms in parts.items():
            rows, fitted = self.data[method], self.fits[method]
            errors = self.held_out[method] / rows.ms - 1
            if rows.whole.sum() >= FEWEST:
                errors = errors[rows.whole]
            spread = max(float(np.sqrt((errors**2).mean())), float(np.median(rows.noise)))
            used = fitted.per_feature > 0
            seen = (rows.features * fitted.per_feature)[:, used] / rows.ms[:, None]
            asked = (vectors[method] * fitted.per_feature)[used] / max(ms, 1e-12)
            leverage = float(asked @ np.linalg.pinv(seen.T @ seen, rcond=1e-6) @ asked)
            squares += (calls[method] * ms * spread) ** 2 * (1 + leverage)
        return math.sqrt(squares)

    def check(self, plan: Plan, *, strict: bool = False) -> list[str]:
        """What of a plan lies outside the measured range by more than 10 %, a sentence each; predictions are guesses there.

        The range is that of whole models, where there are a few: blocks of layers are below it in everything.

        Raises:
            DeviceError: see `predict`; with `strict`, also where anything does.
        """
        self.program.check(plan)
        found, calls = [], self.program.calls(plan, self.decode_tokens)
        for method, values in self.program.vectors(plan).items():
            if method not in self.data or not calls[method]:
                continue
            rows = self.data[method]
            features = rows.features[rows.whole] if rows.whole.sum() >= FEWEST else rows.features
            for name, value, low, high in zip(
                FEATURES, values.tolist(), features.min(0).tolist(), features.max(0).tolist(), strict=True
            ):
                if value > high * (1 + BEYOND) or value < low * (1 - BEYOND):
                    what = name if name in COUNTS else FEATURES[name]
                    found.append(f"{method}: {value:.4g} {what}; measured were {low:.4g} to {high:.4g}.")
        if found and strict:
            raise DeviceError(f"the plan is outside what was measured: {found[0]}")
        return found

    def report(self) -> dict[str, Any]:
        """How good the fit is, what it says, and what is wrong with it; see `devices.latency.report`."""
        return report_of(self)


def _dot(values: Vector, weights: Vector) -> float:
    return sum([a * b for a, b in zip(values, weights, strict=True) if b])


def _measured(program: Program, profile: Profile) -> list[tuple[Point, Plan]]:
    """The points that measured a method of the program, with their plans."""
    found = []
    for point in profile.points:
        where = f"point {point.id!r} of the profile"
        try:
            plan = point.parsed_plan()
            program.check(plan, whole=point.kind == "whole")
            program.vectors(plan)
        except (DeviceError, InputError) as error:
            raise DeviceError(f"{where}: {error}") from None
        for name, measurement in point.methods.items():
            if not measurement.steady > 0:
                raise DeviceError(f"{where}: {name!r} took {measurement.steady} ms; a measurement is above 0.")
        found.append((point, plan))
    for method in program.methods:
        count = sum(method in point.methods for point, _ in found)
        # Without `decode` requests up to the first token can still be predicted, where that is the prefill's.
        if count < FEWEST and (count or method != "decode" or program.kind == "answers"):
            raise DeviceError(f"the profile measured {method!r} in {count} points; a fit needs {FEWEST} or more.")
    return found


def _data(program: Program, measured: list[tuple[Point, Plan]]) -> dict[str, Rows]:
    lines: dict[str, list[tuple]] = {}
    for index, (point, plan) in enumerate(measured):
        for method, features in program.vectors(plan).items():
            if (m := point.methods.get(method)) is not None:
                noise = m.noise if m.settled else max(m.noise, DISTURBED)
                lines.setdefault(method, []).append((index, features, m.steady, noise, point.kind == "whole"))
    return {method: Rows(*(np.array(column) for column in zip(*rows, strict=True))) for method, rows in lines.items()}
