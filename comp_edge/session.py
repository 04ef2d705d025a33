"""One run of `prune`, with everything that a checkpoint must bring back."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from comp_edge.budget import Budget
from comp_edge.card import write_card
from comp_edge.checkpoint import write_model
from comp_edge.cost import MacsCost
from comp_edge.errors import InputError
from comp_edge.families import family_of
from comp_edge.files import check_writable, whole_folder, write_json, write_text
from comp_edge.masks import UnitMasks
from comp_edge.memory import collect_garbage, peak_bytes, reset_peak, return_memory_at_once
from comp_edge.optim import Optimizer, load_state, save_state, use_muon, warmup_cosine, with_prefix
from comp_edge.plan import CostRecord, Plan, plan_of
from comp_edge.proposals import Limits, Proposer
from comp_edge.recovery import Distillation
from comp_edge.schedule import attach
from comp_edge.selectors import Setting, apply_state, make_selector
from comp_edge.settings import Progress, PruneConfig, PruneResult
from comp_edge.state import State
from comp_edge.strategy import STRATEGIES
from comp_edge.surgery import apply_plan
from comp_edge.tasks import Task, take_examples

WORK_SUFFIX = ".work"  # the folder beside the output in which a run keeps its checkpoint until it is complete
STATE_FILE, TRACE_FILE, METRICS_FILE = "state.safetensors", "trace.jsonl", "metrics.json"
FADE = 2 / 3  # share of a stage over which masks fade; the rest of it recovers
WARMUP = 20  # steps
CHUNK = 100  # fine-tuning steps between checkpoints
FINE_TUNING = 10_000  # data chunks of fine-tuning are numbered from here, those of stages from 0


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
        self.seed, self.config, self.on_progress = seed, config, on_progress
        self.family = family_of(model)
        self.modes = self._modes(config.modes, deploy)
        self.out = None if out is None else Path(out)
        self.work = None
        if self.out is not None:
            check_writable(self.out)
            self.work = self.out.with_name(self.out.name + WORK_SUFFIX)
        self.streams = self.family.streams(model)
        self.start_plan = plan_of(model)
        self.state = State.of(model, request=self.family.request(model, task.example_inputs()), base=base)
        self.cost = budget.cost_model(model)
        self.dense_cost = self.cost.predict(self.state.plan())
        self.target = budget.target(self.dense_cost) / self.dense_cost
        limits = Limits(round_to=config.round_to, share=config.stage_share)
        self.proposer = Proposer(self.family, model, self.streams, cost=self.cost, dense=self.dense_cost, limits=limits)
        self._check_reachable()
        self.identity = {
            "strategy": strategy,
            "seed": seed,
            "deploy": deploy,
            "base": base,
            "budget": budget.to_json(),
            "cost": self.cost.name,
            "target": self.target,
            "config": json.loads(json.dumps(asdict(config))),
        }
        self.validation = list(take_examples(task.val_batches(), config.val_examples))
        if not self.validation:
            raise InputError("the task has no validation batches; they are what steers the pruning.")
        self.macs = MacsCost(model)
        # Without training there is nothing to learn from a copy of the dense model.
        self.distillation = Distillation(model, task, weight=config.distill) if config.trains else None
        self.masks = UnitMasks(self.streams)
        self.schedule = attach(model, self.state.tokens)
        self.selector = make_selector(strategy, config)
        self.setting = Setting(
            model=model,
            task=task,
            masks=self.masks,
            schedule=self.schedule,
            proposer=self.proposer,
            modes=self.modes,
            config=config,
            seed=seed,
            calibration=list(itertools.islice(task.train_batches(seed * 7919 + 1), config.calibration_batches)),
            probe=list(itertools.islice(task.train_batches(seed * 7919 + 2), config.calibration_batches)),
            loss=lambda m, batch: float(task.loss(m, batch)),
        )
        # Decided once: what is left at the end may be small enough.
        self.muon = use_muon(model.parameters()) if config.muon is None else config.muon
        self.optimizer = self._new_optimizer()
        if not config.trains:
            model.requires_grad_(False)
            return_memory_at_once()
        self.stage, self.tuned = 0, 0
        self.score = self.dense_score = math.nan
        self.dense_test_score: float | None = None
        self.trace: list[dict[str, Any]] = []
        self.seconds = {"training": 0.0, "selection": 0.0, "scoring": 0.0}

    # ---- set-up

    def _modes(self, wanted: Sequence[str] | None, deploy: str) -> list[str]:
        modes = list(self.family.modes(self.model))
        unknown = [mode for mode in wanted or () if mode not in modes]
        if unknown:
            raise InputError(f"mode {unknown[0]!r} is not one of the model's: {', '.join(modes)}.")
        modes = [mode for mode in modes if wanted is None or mode in wanted]
        return [mode for mode in modes if not (deploy == "stock" and mode == "language_tokens")]

    def _check_reachable(self) -> None:
        lowest = self.proposer.lowest(self.state, self.modes)
        if self.target < lowest:
            raise InputError(
                f"the budget asks for {self.target:.4f} of the dense cost; the lowest that {', '.join(self.modes)} can "
                f"reach is {lowest:.4f}."
            )

    # ---- stages

    def start(self, *, evaluate: bool) -> None:
        """Score the dense model, and leave a first checkpoint."""
        self.score = self.dense_score = self._score()
        if evaluate and self.distillation is None:  # later there is no copy of it to score
            self.dense_test_score = self.task.score(self.model, self.task.test_batches())
        self._apply(self.state, self.state, 0.0)
        self._checkpoint()

    def advance(self) -> None:
        """Run stages until the state meets the target."""
        cost = self.proposer.price(self.state)
        while cost > self.target and self.tuned == 0:
            cost = self._run_stage(cost)

    def _run_stage(self, cost: float) -> float:
        started = time.perf_counter()
        if not self.config.trains:
            collect_garbage()
        reset_peak()
        goal = min((1 - self.target) / self.config.stages, cost - self.target)
        self.model.eval()
        chosen, choice = self.selector.select(self.setting, self.state, goal=goal, stage=self.stage)
        self.seconds["selection"] += time.perf_counter() - started
        if chosen is None:
            raise InputError(
                f"no mode of {', '.join(self.modes)} can save any more at {cost:.4f} of the dense cost; the budget asks "
                f"for {self.target:.4f}."
            )
        loss = self._train_stage(self.state, chosen.state)
        self.state = chosen.state
        before, self.score = self.score, self._score()
        after = self.proposer.price(self.state)
        self.selector.booked(chosen.mode, stage=self.stage, score_change=self.score - before, cost_change=after - cost)
        self.stage += 1
        record = {
            "stage": self.stage,
            "mode": chosen.mode,
            "action": chosen.action,
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
        self._tell("prune", f"stage {self.stage} {chosen.name}, cost {after:.3f}, score {self.score:.3f}")
        return after

    def _train_stage(self, old: State, new: State) -> float | None:
        """Interleave training with the fading; the mean loss of the stage, None without steps."""
        started, steps = time.perf_counter(), self.config.stage_steps
        losses = []
        self.model.train()
        for step, batch in enumerate(itertools.islice(self._batches(self.stage), steps)):
            self._apply(old, new, max(0.0, 1 - (step + 1) / max(1.0, steps * FADE)))
            losses.append(self._step(batch, min(1.0, (self.stage * steps + step + 1) / WARMUP)))
            self._tell("prune", step=step + 1)
        self._apply(new, new, 0.0)
        self.seconds["training"] += time.perf_counter() - started
        return sum(losses) / len(losses) if losses else None

    def _apply(self, old: State, new: State, fade: float) -> None:
        apply_state(self.masks, self.schedule, old, new, fade=fade, cit=self.config.cit)

    def _step(self, batch: dict[str, Tensor], factor: float) -> float:
        objective, loss = self.distillation.objective(self.model, batch)
        self.optimizer.step(objective, factor=factor)
        return loss

    # ---- the end

    def finish(self) -> None:
        """Freeze the plan, shrink the model, fine-tune what is left."""
        if plan_of(self.model) is self.start_plan:
            self._shrink()
        steps = self.config.steps_after(self.stage)
        self.model.train()
        while self.tuned < steps:
            started = time.perf_counter()
            chunk = itertools.islice(self._batches(FINE_TUNING + self.tuned // CHUNK), min(CHUNK, steps - self.tuned))
            for batch in chunk:
                self._step(batch, warmup_cosine(self.tuned, steps, warmup=WARMUP))
                self.tuned += 1
                self._tell("fine-tune")
            self.seconds["training"] += time.perf_counter() - started
            self._checkpoint()
        self.model.eval()

    def _shrink(self) -> None:
        self.masks.detach()
        apply_plan(self.model, self.final_plan())
        self.optimizer = self._new_optimizer()

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
            "steps": self.stage * self.config.stage_steps + self.config.steps_after(self.stage),
            "dense": {"val_score": self.dense_score, "macs": dense["total"], "macs_by_part": dense},
            "pruned": {"val_score": self._score(), "macs": pruned["total"], "macs_by_part": pruned},
            "macs_kept": pruned["total"] / dense["total"],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "seconds": {name: round(value, 2) for name, value in self.seconds.items()},
            "peak_memory_bytes": max([peak_bytes(), *(stage["peak_memory_bytes"] for stage in self.trace)]),
        }
        if evaluate:
            metrics["pruned"]["test_score"] = self.task.score(self.model, self.task.test_batches())
            if self.distillation is not None:
                self.dense_test_score = self.task.score(self.distillation.dense, self.task.test_batches())
            metrics["dense"]["test_score"] = self.dense_test_score
        if self.out is not None:
            with whole_folder(self.out) as staging:
                write_model(self.model, plan, staging, processor=processor)
                write_text(staging / TRACE_FILE, "".join(json.dumps(line) + "\n" for line in self.trace))
                write_json(staging / METRICS_FILE, metrics)
                write_card(staging, self.model, plan, metrics=metrics)
            (self.work / STATE_FILE).unlink(missing_ok=True)
            self.work.rmdir()
        return PruneResult(model=self.model, plan=plan, metrics=metrics, trace=self.trace, folder=self.out)

    # ---- checkpoints

    def _checkpoint(self) -> None:
        if self.work is None:
            return
        tensors: dict[str, Tensor] = {}
        if self.config.trains:  # otherwise the weights are what they were
            tensors = {f"model.{k}": v for k, v in self.model.state_dict().items()}
            tensors |= {f"optimizer.{k}": v for k, v in self.optimizer.state_tensors().items()}
        progress = {
            "identity": self.identity,
            "stage": self.stage,
            "tuned": self.tuned,
            "score": self.score,
            "dense_score": self.dense_score,
            "dense_test_score": self.dense_test_score,
            "state": self.state.to_json(),
            "selector": self.selector.to_json(),
            "trace": self.trace,
            "seconds": self.seconds,
        }
        save_state(self.work / STATE_FILE, tensors, progress)

    def resume(self) -> None:
        """Take up the run whose checkpoint lies beside the output.

        Raises:
            InputError: there is none, it is damaged, or it is of a run with other options.
        """
        if self.work is None:
            raise InputError("resume needs the output folder of the interrupted run.")
        tensors, progress = load_state(self.work / STATE_FILE)
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
        self.state.restore(progress["state"])
        self.selector.restore(progress["selector"])
        if self.tuned:
            self._shrink()
        else:
            self._apply(self.state, self.state, 0.0)
        if self.config.trains:
            self.model.load_state_dict(with_prefix(tensors, "model."))
            self.optimizer.load_state_tensors(with_prefix(tensors, "optimizer."))

    # ---- small things

    def _new_optimizer(self) -> Optimizer | None:
        if not self.config.trains:
            return None
        config = self.config
        return Optimizer(self.model.named_parameters(), matrix_lr=config.matrix_lr, lr=config.lr, muon=self.muon)

    def _batches(self, chunk: int) -> Iterable[dict[str, Tensor]]:
        return self.task.train_batches(self.seed * 100_003 + 17 + chunk)

    @torch.no_grad()
    def _score(self) -> float:
        started = time.perf_counter()
        self.model.eval()
        score = self.task.score(self.model, self.validation)
        self.seconds["scoring"] += time.perf_counter() - started
        return score

    def _tell(self, phase: str, message: str = "", *, step: int = 0) -> None:
        done = self.stage * self.config.stage_steps + step + self.tuned
        left = (self.proposer.price(self.state) - self.target) / (1 - self.target) * self.config.stages
        stages = max(0, math.ceil(left))
        ahead = max(0, stages * self.config.stage_steps - step)
        total = done + ahead + self.config.steps_after(self.stage + stages) - self.tuned
        self.on_progress(Progress(phase=phase, done=done, total=total, message=message))
