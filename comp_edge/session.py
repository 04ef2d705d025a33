"""One run of `prune`, with everything that a checkpoint must bring back."""

from __future__ import annotations

import itertools
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_edge.budget import Budget
from comp_edge.calibrate import Draws
from comp_edge.card import write_card
from comp_edge.checkpoint import write_model
from comp_edge.correction import Correction, Described
from comp_edge.cost import MacsCost
from comp_edge.digests import fingerprint
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.feasibility import (
    NO_TRAINING,
    NO_VALIDATION,
    check_reachable,
    check_score,
    check_splits,
    usable_modes,
)
from comp_edge.files import check_writable, whole_folder, write_json, write_text
from comp_edge.masks import UnitMasks
from comp_edge.memory import collect_garbage, peak_bytes, reset_peak, return_memory, return_memory_at_once
from comp_edge.optim import load_state, save_state, warmup_cosine
from comp_edge.parallel import ALONE, launched
from comp_edge.placement import device_of, placed
from comp_edge.plan import CostRecord, Plan, plan_of
from comp_edge.proposals import Limits, Proposal, Proposer
from comp_edge.schedule import attach
from comp_edge.scouting import ROWS, TRIAL
from comp_edge.selectors import Setting, apply_state, cut, make_selector
from comp_edge.settings import Progress, PruneConfig, PruneResult
from comp_edge.state import State
from comp_edge.strategy import STRATEGIES
from comp_edge.surgery import apply_plan
from comp_edge.tasks import Task, take_examples
from comp_edge.trainer import Trainer

WORK_SUFFIX = ".work"  # the folder beside the output in which a run keeps its checkpoint until it is complete
STATE_FILE, TRACE_FILE, METRICS_FILE = "state.safetensors", "trace.jsonl", "metrics.json"
FADE = 2 / 3  # share of a stage over which masks fade; the rest of it recovers
WARMUP = 20  # steps
CHUNK = 100  # fine-tuning steps between checkpoints
FINE_TUNING = 10_000  # data chunks of fine-tuning are numbered from here, those of stages from 0
TRIALS = 20_000  # the one that ways are walked on for trial
# Options that a run may be resumed with others of: they decide how it goes on, not what has been decided.
FREE = ("lr", "matrix_lr", "accumulate", "checkpointing")


class Session:
    """See `comp_edge.prune` for the arguments; `start` or `resume`, `advance`, `finish`, `save`, in this order."""

    def __init__(
        self,
        model: Any,
        task: Task,
        *,
        budget: Budget,
        strategy: str,
        out: str | Path | None,
        seed: int,
        config: PruneConfig,
        base: str,
        deploy: str,
        on_progress: Callable[[Progress], None],
    ) -> None:
        if strategy not in STRATEGIES:
            raise InputError(f"unknown strategy {strategy!r}; give one of {', '.join(STRATEGIES)}.")
        if deploy not in ("any", "stock"):
            raise InputError(f"unknown deployment {deploy!r}; give 'any' or 'stock'.")
        self.model, self.task, self.budget, self.strategy = model, task, budget, strategy
        self.seed, self.on_progress = seed, on_progress
        self.config = config = config.of(strategy)
        self.family = family_of(model)
        self.modes, possible = usable_modes(self.family, model, strategy=strategy, wanted=config.modes, deploy=deploy)
        self.out = None if out is None else Path(out)
        self.work = None
        if self.out is not None:
            check_writable(self.out)
            self.work = self.out.with_name(self.out.name + WORK_SUFFIX)
        check_splits(task)
        self.device = device_of(model)
        self.processes = launched(self.device)
        self.processes.align(model)
        self.streams = self.family.streams(model)
        self.start_plan = plan_of(model)
        self.state = State.of(model, request=self.family.request(model, task.example_inputs()), base=base)
        self.cost = budget.cost_model(model)
        self.dense_cost = self.cost.predict(self.state.plan())
        self.correction = Correction(budget.target(self.dense_cost))
        limits = Limits(round_to=config.round_to, share=config.stage_share)
        self.proposer = Proposer(self.family, model, self.streams, cost=self.cost, dense=self.dense_cost, limits=limits)
        check_reachable(self.proposer, self.state, self.modes, possible, target=self.target)
        self.identity = {
            "strategy": strategy,
            "seed": seed,
            "deploy": deploy,
            "base": base,
            "weights": fingerprint(model),
            "task": getattr(task, "name", type(task).__name__),
            "budget": budget.to_json(),
            "cost": self.cost.name,
            "dense_cost": self.dense_cost,
            "target": self.target,
            "config": {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in FREE},
        }
        self.validation = list(take_examples(task.val_batches(), config.val_examples))
        if not self.validation:
            raise InputError(NO_VALIDATION)
        self.macs = MacsCost(model)
        self.trainer = Trainer(model, task, config=config, seed=seed, processes=self.processes)
        self.masks = UnitMasks(self.streams)
        self.schedule = attach(model, self.state.tokens)
        self.selector = make_selector(strategy, config, self.modes)
        self.setting = Setting(
            model=model,
            task=task,
            masks=self.masks,
            schedule=self.schedule,
            proposer=self.proposer,
            modes=self.modes,
            config=config,
            seed=seed,
            calibration=Draws(task, seed * 7919 + 1, config.calibration_batches, self.device),
            probe=Draws(task, seed * 7919 + 2, config.calibration_batches, self.device),
            loss=lambda m, batch: float(task.loss(m, batch)),
            target=self.target,
            trial=self._trial,
            trial_steps=round(TRIAL * config.planned_steps),
        )
        batch = next(iter(self.setting.calibration), None)
        if batch is None:
            raise InputError(NO_TRAINING)
        self.trainer.check_batch(batch)
        self.trainer.begin()
        if not config.trains:
            model.requires_grad_(False)
            return_memory_at_once()
        self.stage, self.tuned = 0, 0
        self.tried = 0  # optimizer steps of ways that were walked for trial
        self.score = self.dense_score = math.nan
        self.dense_test_score: float | None = None
        self.trace: list[dict[str, Any]] = []
        self.seconds = {"training": 0.0, "selection": 0.0, "scoring": 0.0}
        self.peak = 0  # resident bytes, of what came before the present stage

    @property
    def target(self) -> float:
        """The predicted cost to come down to, as a fraction of the dense cost."""
        return self.correction.aim / self.dense_cost

    # ---- stages

    def start(self, *, evaluate: bool) -> None:
        """Score the dense model, and leave a first checkpoint."""
        self._checkpoint()  # a run that is killed from here on can be resumed
        self.score = self.dense_score = self._score()
        self._check_score()
        if evaluate and self.trainer.distillation is None:  # later there is no copy of it to score
            self.dense_test_score = self._test(self.model)
        self._apply(self.state, self.state, 0.0)
        self._checkpoint()

    def _check_score(self) -> None:
        """See `check_score`; a run that it stops leaves nothing behind."""
        batch = next(iter(self.setting.calibration))

        def in_ruins(compute: Callable[[], float]) -> float:
            self.masks.masks = {
                site: torch.zeros(len(alive), device=self.device) for site, alive in self.state.alive.items()
            }
            value = compute()
            self.masks.masks = {}
            return value

        try:
            check_score(
                self.task,
                dense=self.dense_score,
                ruined=lambda: in_ruins(self._score),
                losses=lambda: (self._loss(batch), in_ruins(lambda: self._loss(batch))),
            )
        except InputError:
            if self.work is not None and self.processes.main:
                shutil.rmtree(self.work, ignore_errors=True)
            raise

    def advance(self) -> None:
        """Run stages until the state meets the target, also when it is measured."""
        cost = self.proposer.price(self.state)
        while self.tuned == 0:
            while cost > self.target:
                cost = self._run_stage(cost)
            if not self._too_slow():
                return

    def _too_slow(self) -> bool:
        """Measure the plan, where that is possible; whether further stages have to follow."""
        found = self.processes.once(lambda: self.correction.look(self.cost, self.final_plan(), stage=self.stage))
        if found is None:
            return False
        again = self.correction.book(found)
        self._checkpoint()
        measured, predicted = f"{found['measured']:.2f}", f"{found['predicted']:.2f}"
        self._tell("prune", f"measured {measured} (predicted {predicted}, budget {self.correction.target:.2f})")
        return again

    def _run_stage(self, cost: float) -> float:
        started = time.perf_counter()
        if self.config.trains:
            return_memory()
        else:
            collect_garbage()
        self.peak = max(self.peak, peak_bytes())
        reset_peak()
        goal = min((1 - self.target) / self.config.stages, cost - self.target)
        self.model.eval()
        chosen, choice = self._choose(goal)
        self.seconds["selection"] += time.perf_counter() - started
        if chosen is None:
            raise InputError(
                f"no mode of {', '.join(self.modes)} can save any more at {cost:.4f} of the dense cost; the budget asks "
                f"for {self.target:.4f}."
            )
        return_memory()
        loss = self._train_stage(self.state, chosen.state)
        return_memory()
        self.state = chosen.state
        before, self.score = self.score, self._score()
        after = self.proposer.price(self.state)
        self.selector.booked(chosen.mode, stage=self.stage, score_change=self.score - before, cost_change=after - cost)
        self.stage += 1
        record = {
            "stage": self.stage,
            "mode": chosen.mode,
            **choice,
            "score": self.score,
            "loss": loss,
            "cost": after * self.dense_cost,
            "cost_fraction": after,
            "saved": chosen.saving,
            "macs": self.macs.predict(self.state.plan()),
            "plan": self.state.to_json(),
            "seconds": round(time.perf_counter() - started, 3),
            "peak_memory_bytes": peak_bytes(),
        }
        if self.budget.cost is not None:
            record["predicted_ms"] = after * self.dense_cost
        self.trace.append(record)
        self._checkpoint()
        self._tell("prune", f"stage {self.stage} {chosen.mode}, cost {after:.3f}, score {self.score:.3f}")
        return after

    def _choose(self, goal: float) -> tuple[Proposal | None, dict[str, Any]]:
        try:
            return self.processes.once(
                lambda: self.selector.select(self.setting, self.state, goal=goal, stage=self.stage)
            )
        except FloatingPointError as error:
            raise FloatingPointError(f"{error}, while stage {self.stage + 1} was chosen") from None

    def _train_stage(self, old: State, new: State) -> float | None:
        """Interleave training with the fading; the mean loss of the stage, None without steps."""
        started, steps = time.perf_counter(), self.config.steps_in(self.stage)
        losses = []
        self.model.train()
        with self.trainer.batches(self.stage, steps) as batches:
            for step, batch in enumerate(batches):
                self._apply(old, new, max(0.0, 1 - (step + 1) / max(1.0, steps * FADE)))
                factor = min(1.0, (self.stage * self.config.stage_steps + step + 1) / WARMUP)
                losses.append(self.trainer.step(batch, factor, where=f"step {step + 1} of stage {self.stage + 1}"))
                self._tell("prune", step=step + 1)
        self._apply(new, new, 0.0)
        self.seconds["training"] += time.perf_counter() - started
        return sum(losses) / len(losses) if losses else None

    def _trial(self, walk: Callable[[Callable[[State, int], None]], float]) -> float:
        """See `Setting.trial`: in this process alone, since others wait for what it chooses, and before the first stage."""
        done, total = 0, self.setting.trial_steps
        least = self.config.accumulate * getattr(self.task, "least_examples", 1)

        def train(state: State, steps: int) -> None:
            nonlocal done
            self._apply(state, state, 0.0)
            self.model.train()
            for batch in cut(itertools.islice(batches, steps), ROWS, least=least, most=1):
                factor = warmup_cosine(done, total, warmup=WARMUP)
                self.trainer.step(batch, factor, where=f"step {done + 1} of a way walked for trial", processes=ALONE)
                done += 1
                self.tried += 1
                self._tell("scout", f"way {(self.tried - 1) // total + 1} for trial, step {done} of {total}")
            self.model.eval()

        with self.trainer.batches(TRIALS, total) as drawn:
            batches = iter(drawn)
            try:
                return walk(train)
            finally:
                if done:
                    self.trainer.undo()
                self._apply(self.state, self.state, 0.0)

    def _apply(self, old: State, new: State, fade: float) -> None:
        apply_state(self.masks, self.schedule, old, new, fade=fade, cit=self.config.cit)

    # ---- the end

    def finish(self) -> None:
        """Freeze the plan, shrink the model, fine-tune what is left."""
        if plan_of(self.model) is self.start_plan:
            self._shrink()
        steps = self.config.steps_after(self.stage)
        self.model.train()
        while self.tuned < steps:
            started = time.perf_counter()
            with self.trainer.batches(FINE_TUNING + self.tuned // CHUNK, min(CHUNK, steps - self.tuned)) as chunk:
                for batch in chunk:
                    factor = warmup_cosine(self.tuned, steps, warmup=WARMUP)
                    self.trainer.step(batch, factor, where=f"step {self.tuned + 1} of fine-tuning")
                    self.tuned += 1
                    self._tell("fine-tune")
            self.seconds["training"] += time.perf_counter() - started
            self._checkpoint()
        self.trainer.end()
        self.model.eval()

    def _shrink(self) -> None:
        self.masks.detach()
        self.trainer.end()
        apply_plan(self.model, self.final_plan())
        self.trainer.begin()  # with the parts that are there now

    def final_plan(self) -> Plan:
        """The state as a validated plan."""
        plan = self.state.plan()
        cost = CostRecord(name=self.cost.name, dense=self.dense_cost, pruned=self.cost.predict(plan))
        update = {"budget": self.budget.to_json(), "cost": cost, "strategy": self.strategy, "seed": self.seed}
        return Plan.parse(plan.model_copy(update=update).to_json())

    def save(self, processor: Any, *, evaluate: bool) -> PruneResult:
        """Score, and write the folder."""
        plan = plan_of(self.model)
        dense, pruned = self.macs.parts(self.state.template), self.macs.parts(plan)
        self._tell("evaluate")
        metrics: dict[str, Any] = {
            "task": getattr(self.task, "name", type(self.task).__name__),
            "strategy": self.strategy,
            "seed": self.seed,
            "stages": self.stage,
            "steps": sum(map(self.config.steps_in, range(self.stage))) + self.tuned,
            "dense": {"val_score": self.dense_score, "macs": dense["total"], "macs_by_part": dense},
            "pruned": {"val_score": self._score(), "macs": pruned["total"], "macs_by_part": pruned},
            "macs_kept": pruned["total"] / dense["total"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "measured": self.correction.found,
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_memory_bytes": max(self.peak, peak_bytes(), *(stage["peak_memory_bytes"] for stage in self.trace)),
        }
        if evaluate:
            metrics["pruned"]["test_score"] = self._test(self.model)
            if self.trainer.distillation is not None:
                self.dense_test_score = self._test(self.trainer.distillation.dense)
            metrics["dense"]["test_score"] = self.dense_test_score
        if isinstance(self.cost, Described):
            metrics["device"] = self.cost.describe(self.state.template, plan)
        if self.out is not None:
            self.processes.once(lambda: self._write(plan, metrics, processor))
        return PruneResult(model=self.model, plan=plan, metrics=metrics, trace=self.trace, folder=self.out)

    def _write(self, plan: Plan, metrics: dict[str, Any], processor: Any) -> None:
        with whole_folder(self.out) as staging:
            write_model(self.model, plan, staging, processor=processor)
            write_text(staging / TRACE_FILE, "".join(json.dumps(line) + "\n" for line in self.trace))
            write_json(staging / METRICS_FILE, metrics)
            write_card(staging, self.model, plan, metrics=metrics)
        shutil.rmtree(self.work, ignore_errors=True)

    # ---- checkpoints

    @property
    def _begun(self) -> bool:
        """Whether the dense model has been scored: before that nothing is decided or changed."""
        return not math.isnan(self.dense_score)

    def _checkpoint(self) -> None:
        if self.work is None or not self.processes.main:
            return
        tensors: dict[str, Tensor] = {}
        if self.config.trains and self._begun:  # otherwise the weights are what they were
            tensors = self.trainer.state_tensors()
        save_state(self.work / STATE_FILE, tensors, self._progress())

    def _progress(self) -> dict[str, Any]:
        return {
            "identity": self.identity,
            "stage": self.stage,
            "tuned": self.tuned,
            "score": self.score,
            "dense_score": self.dense_score,
            "dense_test_score": self.dense_test_score,
            "state": self.state.to_json(),
            "selector": self.selector.to_json(),
            "measured": self.correction.found,
            "trace": self.trace,
            "seconds": self.seconds,
        }

    def resume(self, *, evaluate: bool) -> None:
        """Take up the run whose checkpoint lies beside the output; see `start` for one that had not begun.

        Raises:
            InputError: there is none, it is damaged, or it is of a run with other options or of another version.
        """
        if self.work is None:
            raise InputError("resume needs the output folder of the interrupted run.")
        tensors, progress = load_state(self.work / STATE_FILE)
        if missing := [name for name in self._progress() if name not in progress]:
            raise InputError(
                f"{str(self.work / STATE_FILE)!r} was written by another version of comp-edge: it does not say "
                f"{missing[0]!r}; start afresh."
            )
        for name, value in self.identity.items():
            if progress["identity"].get(name) != value:
                raise InputError(
                    f"the interrupted run had {name} {progress['identity'].get(name)!r}, this one has {value!r}; resume "
                    "with the same options, or start afresh."
                )
        self.stage, self.tuned = progress["stage"], progress["tuned"]
        self.score, self.dense_score = progress["score"], progress["dense_score"]
        self.dense_test_score = progress["dense_test_score"]
        self.trace, self.seconds = progress["trace"], progress["seconds"]
        self.correction.found = progress["measured"]
        self.state.restore(progress["state"])
        self.selector.restore(progress["selector"])
        self.processes.wait()  # the main process will write a new one
        if not self._begun:
            self.start(evaluate=evaluate)
            return
        if self.tuned:
            self._shrink()
        else:
            self._apply(self.state, self.state, 0.0)
        if self.config.trains:
            self.trainer.load_state_tensors(tensors)

    # ---- small things

    @torch.no_grad()
    def _loss(self, batch: dict[str, Tensor]) -> float:
        self.model.eval()
        return self.processes.once(lambda: float(self.task.loss(self.model, batch)))

    @torch.no_grad()
    def _score(self) -> float:
        """The validation score.

        Raises:
            FloatingPointError: it is not finite.
        """
        started = time.perf_counter()
        self.model.eval()
        score = self.processes.once(lambda: self.task.score(self.model, placed(self.validation, self.device)))
        self.seconds["scoring"] += time.perf_counter() - started
        if not math.isfinite(score):
            raise FloatingPointError(f"validation score {score} is not finite, after {self.stage} stages")
        return score

    def _test(self, model: Any) -> float:
        return self.processes.once(lambda: self.task.score(model, placed(self.task.test_batches(), self.device)))

    def _tell(self, phase: str, message: str = "", *, step: int = 0) -> None:
        if not self.processes.main:
            return
        trials = self.selector.ways * self.setting.trial_steps
        tried = trials if self.stage or step or self.tuned else self.tried
        done = self.stage * self.config.stage_steps + step + self.tuned
        left = (self.proposer.price(self.state) - self.target) / (1 - self.target) * self.config.stages
        stages = max(0, math.ceil(left))
        ahead = (
            max(0, stages * self.config.stage_steps - step) + self.config.steps_after(self.stage + stages) - self.tuned
        )
        self.on_progress(Progress(phase, done + tried, done + ahead + trials, message, step=done))
