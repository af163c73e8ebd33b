"""GRPO of the selector with TRL: groups of sampled selections, rewarded by what a frozen generator answers from them.

Group relative policy optimisation (DeepSeekMath, 2024, arXiv 2402.03300): several selections are sampled per question,
and each is pushed up or down by its reward minus the mean of its group. TRL computes the loss. This module samples with
the project's own prompts and constraints, and scores the model on held-out questions.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from dynamicrag.llm.completion import Completion, Request
from dynamicrag.llm.policy import PolicyEngine
from dynamicrag.llm.requests import RequestBuilder
from dynamicrag.rows.row import Row
from dynamicrag.stage import derive_seed


class Scored(NamedTuple):
    """What a selection is worth: the score of the answer from it, in [0, 1], and its number of documents (None if it cannot be read)."""

    score: float
    documents: int | None


Score = Callable[[Sequence[Row], RequestBuilder], list[Scored]]  # of rows, by the selections that the builder gives


@dataclass(frozen=True)
class GrpoOptions:
    """How the selector is trained: the flags of grpo_selector.py, which describe them."""

    num_samples: int = 8
    temperature: float = 1.0
    questions_per_step: int = 8
    rows_per_pass: int = 8
    epochs: float = 1.0
    max_steps: int | None = None
    learning_rate: float = 1e-6
    beta: float = 0.04
    loss_type: str = "dapo"
    lora_rank: int = 0
    eval_steps: int = 10
    patience: int = 3
    document_cost: float = 0.0
    seed: int = 42


class _Replay:
    """An engine that gives completions which exist already, in order."""

    def __init__(self, engine: PolicyEngine, completions: list[Completion]):
        self.fits, self._completions = engine.fits, completions

    def complete(self, requests: list[Request]) -> list[Completion]:
        assert len(requests) == len(self._completions)
        return self._completions


def replaying(chooser: RequestBuilder, completions: list[Completion]) -> RequestBuilder:
    """Return a selector that gives these completions, one for each row that it is asked about."""
    builder = copy(chooser)
    builder.engine = _Replay(chooser.engine, completions)  # type: ignore[assignment]
    return builder


class Groups:
    """The questions that are trained on, and the reward of the selections sampled for them."""

    def __init__(self, rows: Sequence[Row], shown: Sequence[list], chooser: RequestBuilder, policy: PolicyEngine, score: Score, options: GrpoOptions):
        self._rows = {row["id"]: (row, docs) for row, docs in zip(rows, shown, strict=True)}
        self._chooser, self._policy, self._score, self._options = chooser, policy, score, options

    def _request(self, row_id: str) -> Request:
        row, docs = self._rows[row_id]
        return self._chooser.select(row, docs, "sample", n=self._options.num_samples, temperature=self._options.temperature)

    def rollout(self, ids: list[str], trainer: Any) -> dict[str, list | None]:
        """Sample the selections of questions, each of which is in `ids` once per sample (TRL's rollout function).

        The seeds follow from the question and the step, so that an interrupted training continues with the same samples.
        """
        step, questions = trainer.state.global_step, list(dict.fromkeys(ids))
        requests = {row_id: self._request(row_id) for row_id in questions}
        samples = dict(zip(questions, self._policy.sample([replace(request, seed=derive_seed(request.seed, step)) for request in requests.values()]), strict=True))
        taken: Counter[str] = Counter()
        completions = []
        for row_id in ids:
            completions.append(samples[row_id][taken[row_id] % self._options.num_samples])
            taken[row_id] += 1
        prompts = [self._policy.prompts.ids(requests[row_id].messages) for row_id in ids]
        return {"prompt_ids": prompts, "completion_ids": completions, "logprobs": None}

    def reward(self, prompts: list[str], completion_ids: list[list[int]], log_metric: Callable[[str, float], None] = lambda *_: None, **_: object) -> list[float | None]:
        """Return the reward of each sample: its score minus the cost of its documents (TRL's reward function).

        All samples of a group whose scores are equal, because all answers are right or all are wrong, have none: they would
        only teach the number of documents.
        """
        completions = [self._policy.completion(self._request(row_id), [ids]) for row_id, ids in zip(prompts, completion_ids, strict=True)]
        scored = self._score([self._rows[row_id][0] for row_id in prompts], replaying(self._chooser, completions))
        n, rewards, left_out = self._options.num_samples, [], 0
        for start in range(0, len(scored), n):
            group = scored[start : start + n]
            equal = len({sample.score for sample in group}) == 1
            left_out += equal
            rewards += [None if equal else sample.score - self._options.document_cost * (sample.documents or 0) for sample in group]
        log_metric("left_out", left_out)
        log_metric("score", sum(sample.score for sample in scored) / len(scored))
        log_metric("documents", sum(sample.documents or 0 for sample in scored) / len(scored))
        return rewards


def schedule(ids: Sequence[str], options: GrpoOptions) -> list[str]:
    """Return the questions in the order of training: each epoch in another order, without the rest that fills no step.

    The order is made here, because TRL's sampler begins with that of the first epoch when a training continues.
    """
    order: list[str] = []
    for epoch in range(math.ceil(options.epochs)):
        shuffled = random.Random(derive_seed(options.seed, "epoch", epoch)).sample(list(ids), len(ids))
        share = min(1.0, options.epochs - epoch)
        steps = max(1, round(share * len(ids)) // options.questions_per_step)
        order += shuffled[: steps * options.questions_per_step]
    return order


def make_trainer(model: Any, groups: Groups, ids: list[str], policy: PolicyEngine, dev: Callable[[], list[Scored]] | None, options: GrpoOptions, folder: Path) -> Any:
    """Return TRL's trainer of a model, with checkpoints in `folder`. `dev` scores the model on held-out questions."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # rollout_func is marked as experimental
    import logging
    import warnings

    import torch
    from datasets import Dataset

    with warnings.catch_warnings():  # TRL names the versions of vLLM that it knows, but does not use vLLM here
        warnings.simplefilter("ignore")
        from trl.models.utils import unwrap_model_for_generation
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer
    from transformers import EarlyStoppingCallback

    logging.getLogger("trl").setLevel(logging.ERROR)  # it prints a whole prompt for every group that is left out

    class SelectorTrainer(GRPOTrainer):
        """GRPO whose evaluation is the greedy selection on held-out questions."""

        def evaluate(self, *_: object, metric_key_prefix: str = "eval", **__: object) -> dict[str, float]:
            assert dev and self.model
            scored, training = dev(), self.model.training
            means = {"score": statistics.fmean(sample.score for sample in scored), "documents": statistics.fmean(sample.documents or 0 for sample in scored)}
            metrics = {f"{metric_key_prefix}_{name}": mean for name, mean in means.items()}
            self.model.eval()  # the log of an evaluation is told from that of a step by this
            self.log(metrics)
            self.model.train(training)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def compute_loss(self, model: Any, inputs: dict[str, Any], *given: Any, **more: Any) -> Any:
            """Return the loss of the samples that have an advantage: no pass is spent on groups that are left out."""
            kept = inputs["advantages"] != 0
            if not kept.any():
                return 0.0 * next(weights for weights in model.parameters() if weights.requires_grad).sum()
            some = {key: value[kept] if torch.is_tensor(value) and value.shape[:1] == kept.shape else value for key, value in inputs.items()}
            # DAPO divides by the tokens of the whole step, the others by the samples that they are given
            return super().compute_loss(model, some, *given, **more) * (1.0 if self.loss_type == "dapo" else float(kept.float().mean()))

        def create_model_card(self, *_: object, **__: object) -> None:
            """Write no card: publish.py does."""

    on_gpu = torch.cuda.is_available()
    order = schedule(ids, options)
    steps = len(order) // options.questions_per_step
    passes = options.questions_per_step * options.num_samples // options.rows_per_pass
    config = GRPOConfig(
        output_dir=str(folder), seed=options.seed, num_generations=options.num_samples, num_generations_eval=1, temperature=options.temperature,
        per_device_train_batch_size=options.rows_per_pass, per_device_eval_batch_size=1, gradient_accumulation_steps=passes, beta=options.beta,
        loss_type=options.loss_type, learning_rate=options.learning_rate, lr_scheduler_type="cosine", warmup_steps=0.1, num_train_epochs=1,
        shuffle_dataset=False, max_steps=min(steps, options.max_steps or steps), disable_dropout=True, bf16=on_gpu and torch.cuda.is_bf16_supported(), use_cpu=not on_gpu, gradient_checkpointing=on_gpu,
        logging_steps=1, report_to="none", save_strategy="steps", save_steps=options.eval_steps, save_total_limit=2, eval_strategy="steps" if dev else "no",
        eval_steps=options.eval_steps, eval_on_start=bool(dev) and last_checkpoint(folder) is None, load_best_model_at_end=bool(dev), metric_for_best_model="eval_score", greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # how long the score has not risen
    )
    tokenizer = policy.prompts.tokenizer
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    questions = Dataset.from_dict({"prompt": order})
    trainer = SelectorTrainer(
        model=model, reward_funcs=groups.reward, rollout_func=groups.rollout, args=config, train_dataset=questions, eval_dataset=questions if dev else None,
        processing_class=tokenizer, peft_config=_adapter(options), callbacks=[EarlyStoppingCallback(options.patience)] if dev else [],
    )
    policy.unwrapped = lambda: unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator)
    return trainer


def _adapter(options: GrpoOptions) -> Any:
    """Return the configuration of a LoRA adapter; None if all weights are trained."""
    if not options.lora_rank:
        return None
    from peft import LoraConfig

    return LoraConfig(r=options.lora_rank, lora_alpha=2 * options.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM")


def last_checkpoint(folder: Path) -> str | None:
    """Return the last whole checkpoint. The trainer writes its state last, so that one that was cut off has none."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return str(checkpoint)
    return None
