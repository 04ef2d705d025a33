"""lmms-eval runs comp-edge models, dense or pruned: `lmms-eval --model comp_edge --model_args pretrained=FOLDER …`.

lmms-eval finds the class below through the entry point `comp_edge` of its group `lmms_eval.models`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from comp_edge.checkpoint import load_any, load_processor
from comp_edge.errors import InputError
from comp_edge.evaluators.chat import Answer, answers

try:
    from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
    from lmms_eval.api.model import lmms
    from lmms_eval.models.model_utils.gen_metrics import log_metrics
    from lmms_eval.protocol import ChatMessages
    from lmms_eval.utils import Collator
except ImportError as error:
    raise InputError(
        f"comp_edge.evaluators.lmms needs lmms-eval ({error}): pip install 'comp-edge[lmms-eval]', then "
        "pip install --no-deps lmms-eval==0.7.3."
    ) from None

NEW_TOKENS = 1024  # where neither the task nor the model's generation config says how many
MOST_ROUNDS = 100  # of a task that asks again and again
_PASSED_ON = ("max_new_tokens", "num_beams", "repetition_penalty")
_SAMPLING = ("temperature", "top_p", "top_k")


class CompEdge(lmms):
    """A dense or pruned model behind lmms-eval's chat interface: the task's messages and images in, text out.

    Args:
        pretrained: a shipped model's name, a folder (dense or pruned) or a hub id.
        batch_size: requests that are generated for at a time.
        device: where to compute; by default what accelerate chooses, which under `accelerate launch` is a device a process.

    Raises:
        InputError: an unknown argument, a batch size that is no positive number, a model that cannot be loaded or that
            cannot generate.
    """

    is_simple = False

    def __init__(
        self, pretrained: str | None = None, batch_size: int | str = 1, device: str | None = None, **unknown: Any
    ) -> None:
        super().__init__()
        if unknown:
            raise InputError(f"unknown model argument {min(unknown)!r}; accepted: pretrained, batch_size, device.")
        if pretrained is None:
            raise InputError(
                "no model was given; --model_args pretrained=FOLDER names a folder, a shipped model or a hub id."
            )
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise InputError(f"batch size {batch_size!r} is not a positive number.")
        self.batch_size = int(batch_size)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = torch.device(device) if device and self._world_size == 1 else self.accelerator.device
        model = load_any(pretrained)
        if not model.can_generate():
            raise InputError(
                f"model {pretrained!r} ({type(model).__name__}) cannot generate text, which is what lmms-eval scores."
            )
        self.processor = load_processor(pretrained)
        # A plain attribute, so that lmms-eval's `clean` frees it after the last request.
        self._model = model.to(self.device)

    # ---- lmms-eval's interface

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answer to every request, up to the task's stop strings."""
        return self._batched(requests, self._answer_once)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """For every request the answers of all its rounds; the task writes each round's prompt from the answers before."""
        return self._batched(requests, self._answer_in_rounds)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported.

        Raises:
            InputError: always.
        """
        names = ", ".join(sorted({request.task_name for request in requests}))
        raise InputError(f"task {names!r} scores log-likelihoods; comp_edge models run tasks that generate text.")

    # ---- how

    def _batched(self, requests: list[Instance], run: Callable[[list[tuple], dict[str, Any]], list[Any]]) -> list[Any]:
        """`run(arguments of requests, the task's generation arguments)` for all requests, in their order."""
        self._tokens, self._seconds = 0, 0.0
        # Longest first: what does not fit into memory fails at once.
        collator = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: -len(arguments[0]),
            group_fn=lambda arguments: arguments[2],
            grouping=True,
        )
        results: list[Any] = []
        with tqdm(total=len(requests), desc="comp_edge", disable=self.rank != 0) as bar:
            for batch in collator.get_batched(n=self.batch_size):
                results += run(batch, batch[0][2])
                bar.update(len(batch))
        log_metrics(self._seconds, self._tokens, self._tokens / self._seconds if self._seconds else 0.0)
        return collator.get_original(results)

    def _answer_once(self, batch: list[tuple], generation: dict[str, Any]) -> list[GenerationResult]:
        messages = [ask(doc) for ask, doc in self._questions(batch)]
        return [
            GenerationResult(text, TokenCounts(input_tokens=answer.prompt_tokens, output_tokens=answer.new_tokens))
            for text, answer in self._ask(messages, generation)
        ]

    def _answer_in_rounds(self, batch: list[tuple], generation: dict[str, Any]) -> list[list[str]]:
        questions = list(self._questions(batch))
        said: list[list[str]] = [[] for _ in batch]
        notes: list[Any] = [None] * len(batch)
        waiting = {i: ask(doc) for i, (ask, doc) in enumerate(questions)}
        for number in range(1, MOST_ROUNDS + 1):
            for i, (text, _) in zip(list(waiting), self._ask(list(waiting.values()), generation), strict=True):
                said[i] = [*said[i], text]
                ask, doc = questions[i]
                turn = ask(doc, round_idx=number, previous_output=said[i], previous_round_info=notes[i])
                del waiting[i]
                # A task with messages of its own and nothing to say about rounds gives the same messages again.
                if isinstance(turn, tuple):
                    messages, over, said[i], notes[i] = turn
                    if not over:
                        waiting[i] = messages
            if not waiting:
                return said
        raise InputError(f"task {batch[0][4]!r} asks for more than {MOST_ROUNDS} rounds.")

    def _questions(self, batch: list[tuple]) -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
        """For every request the task's function that writes messages, and the document that it takes."""
        for _, doc_to_messages, _, doc_id, task, split in batch:
            yield doc_to_messages, self.task_dict[task][split][doc_id]

    def _ask(self, messages: list[Any], generation: dict[str, Any]) -> list[tuple[str, Answer]]:
        """Answers to messages in lmms-eval's form, their text cut at the task's stop strings."""
        conversations = [ChatMessages(messages=one).to_hf_messages() for one in messages]
        start = time.perf_counter()
        given = answers(self._model, self.processor, conversations, **self._options(generation))
        self._seconds += time.perf_counter() - start
        self._tokens += sum(answer.new_tokens for answer in given)
        return [(_cut(answer.text, generation.get("until")), answer) for answer in given]

    def _options(self, generation: dict[str, Any]) -> dict[str, Any]:
        """transformers' options for a task's generation arguments; greedy unless the task wants to sample."""
        options = {name: generation[name] for name in _PASSED_ON if generation.get(name) is not None}
        options.setdefault("max_new_tokens", self._model.generation_config.max_new_tokens or NEW_TOKENS)
        temperature = generation.get("temperature")
        if temperature != 0 and generation.get("do_sample", bool(temperature)):
            sampling = {name: generation[name] for name in _SAMPLING if generation.get(name) is not None}
            return {**options, "do_sample": True, **sampling}
        # None: what the model's own generation config says of sampling would only raise warnings.
        return {**options, "do_sample": False, **dict.fromkeys(_SAMPLING)}


def _cut(text: str, stops: str | list[str] | None) -> str:
    """The text before the first of the stop strings."""
    for stop in [stops] if isinstance(stops, str) else stops or []:
        if stop:
            text = text.split(stop, 1)[0]
    return text
