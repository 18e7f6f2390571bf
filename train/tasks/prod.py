"""One distillation stage of PROD: a student dual encoder learns from a frozen teacher.

A dual-encoder teacher is compared over all documents of the global batch, a cross encoder over each
query's own. With `lwf` a frozen copy of the student, taken where the stage begins, regularizes.
Batches are those of `train.tasks.ranking`. The student alone is trained and has optimizer memory:
its parameters are the run's `params`, so that a finished stage is a plain dual encoder's run; the
frozen models are collections of their own and travel in checkpoints, so that a resumed stage still
compares with its beginning.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.retrieval.prod import ProgressiveLoss
from train.building import build_model, build_named
from train.naming import ConfigError
from train.tasks.ranking import (
    AnswersQueries,
    check_vocabulary,
    dual_group_sums,
    forbid_pmap,
    init_ranker,
    kind_of,
    load_ranker,
    rows_of,
)


@dataclasses.dataclass(frozen=True)
class Progressive(AnswersQueries):
    """A stage.

    Attributes:
      model, name: the student and its name. teacher, teacher_name: likewise.
      objective: the losses and their weights.
      lwf: whether the frozen copy of the student regularizes (cross-encoder teachers).
      student_from, teacher_from: run directories or PyTorch files to begin with. A student may be
        the first blocks of a deeper encoder; without `teacher_from` the teacher is untrained.
    """

    model: nn.Module
    name: str
    teacher: nn.Module
    teacher_name: str
    objective: ProgressiveLoss
    lwf: bool = False
    student_from: str = ""
    teacher_from: str = ""

    def init(self, rng: jax.Array, batch):
        """Student parameters; the collections `teacher` and, with `lwf`, `frozen`."""
        own, other = jax.random.split(rng)
        params = init_ranker(self.model, own, batch)
        extra = {"teacher": init_ranker(self.teacher, other, batch)}
        if self.lwf:
            # A copy: the student's own buffers are donated.
            extra["frozen"] = jax.tree.map(jnp.copy, params)
        return params, extra

    def start(self, params, extra):
        """Both models as their runs left them; the frozen copy is the student that begins here."""
        if self.student_from:
            key = "config.task_args.student_from"
            params = load_ranker(self.student_from, self.name, self.model, params, key)
        if self.teacher_from:
            key = "config.task_args.teacher_from"
            teacher = load_ranker(
                self.teacher_from, self.teacher_name, self.teacher, extra["teacher"], key
            )
            extra = {**extra, "teacher": teacher}
        if self.lwf:
            extra = {**extra, "frozen": jax.tree.map(jnp.copy, params)}
        return params, extra

    def loss(self, params, extra, batch, rng):
        """The stage's objective; metrics `hard`, `soft`, `regularizer`, `accuracy`."""
        queries, documents = rows_of(batch, "dual")

        def vectors(params, train=False):
            rngs = {"dropout": rng} if train else None
            return self.model.apply(
                {"params": params}, queries, None, documents, None, train=train, rngs=rngs
            )

        student = vectors(params, True)
        frozen_models = jax.lax.stop_gradient(extra)
        teacher = {"params": frozen_models["teacher"]}
        if kind_of(self.teacher) == "cross":
            relevance = self.teacher.apply(teacher, batch["cross_ids"])
            frozen = vectors(frozen_models["frozen"]) if self.lwf else None
            parts = self.objective.own_group(*student, relevance, frozen)
        else:
            parts = self.objective.in_batch(
                *student, *self.teacher.apply(teacher, queries, None, documents, None)
            )
        metrics = {"hard": parts.hard, "soft": parts.soft, "accuracy": parts.correct / len(queries)}
        if self.lwf:
            metrics["regularizer"] = parts.regularizer
        return parts.loss, (extra, metrics)

    def evaluate(self, variables, batch):
        """Sums of the student's NLL and first places among the query's own documents."""
        scale = self.objective.embedding_scale
        return dual_group_sums(self.model, variables["params"], batch, scale)


def from_config(config) -> Progressive:
    """`task_args`: `teacher` (a model's name), `teacher_args`, `lwf`, `student_from`,
    `teacher_from`, and the arguments of `ProgressiveLoss`.

    Raises ConfigError for distillation weights without a teacher, the regularizer without its
    weight or with an in-batch teacher, cross-encoder stages without negatives.
    """
    forbid_pmap(config)
    args = dict(config.task_args)
    own = {k: args.pop(k) for k in ("lwf", "student_from", "teacher_from") if k in args}
    teacher_name, teacher_args = args.pop("teacher", ""), args.pop("teacher_args", {})
    if not teacher_name:
        raise ConfigError(
            "config.task_args.teacher: distillation needs a teacher (kd_weight is "
            f"{args.get('kd_weight', ProgressiveLoss.kd_weight)}); to train without one, use "
            "config.task = 'ranking'"
        )
    try:
        objective = ProgressiveLoss(**args)
    except ValueError as error:
        raise ConfigError(f"config.task_args: {error}") from None
    model = build_model(config)
    teacher = build_named(config, teacher_name, teacher_args, "config.task_args.teacher")
    cross = kind_of(teacher) == "cross"
    check_vocabulary(config, model)
    check_vocabulary(config, teacher, "config.task_args.teacher_args")
    if own.get("lwf") and objective.lwf_weight is None:
        raise ConfigError("config.task_args.lwf is on but lwf_weight is not set")
    if own.get("lwf") and not cross:
        raise ConfigError("config.task_args.lwf: the regularizer belongs to cross-encoder teachers")
    if not cross and objective.kd_type == "prob_loss":
        raise ConfigError("config.task_args.kd_type: prob_loss belongs to cross-encoder teachers")
    if cross and config.data.options.get("number_neg", 1) < 1:
        raise ConfigError(
            "config.data.options.number_neg: cross-encoder stages need at least one negative"
        )
    if kind_of(model) != "dual":
        raise ConfigError(f"config.model: the student {config.model!r} is no dual encoder")
    return Progressive(
        model=model,
        name=config.model,
        teacher=teacher,
        teacher_name=teacher_name,
        objective=objective,
        **own,
    )
