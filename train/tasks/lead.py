"""LEAD: a student dual encoder and a better teacher, trained together, layer by layer.

The teacher is a dual encoder, a late-interaction model or a cross encoder (`train.tasks.ranking`
has the batches). Both models are parameters of the run: the student's at the top, so that a run
serves as a plain dual encoder's, the teacher's below `teacher`; `clip_groups = ("^teacher",)` clips
each on its own. A frozen teacher is a collection of its own, without optimizer memory. Which layers
meet is a function of the seed and of the optimizer step: redraws compile nothing again.
"""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.retrieval import lead
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

TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class Lead(AnswersQueries):
    """Joint training.

    Attributes:
      model, name: the student and its name. teacher, teacher_name: likewise.
      objective: the losses and their weights; its `train_teacher` decides where the teacher lives.
      layers: K, how many layers of each model meet. selection: random | last | skip.
      reselect_every: optimizer steps between draws. selection_seed: of the draws.
      accumulate: micro-batches of an optimizer step.
      student_scale, teacher_scale: factors of features before products, see `lead.dual_scores`.
      student_from, teacher_from: run directories or PyTorch files to begin with.
    """

    model: nn.Module
    name: str
    teacher: nn.Module
    teacher_name: str
    objective: lead.LayerDistillation
    layers: int = 4
    selection: str = "random"
    reselect_every: int = 10
    selection_seed: int = 0
    accumulate: int = 1
    student_scale: float = 1.0
    teacher_scale: float = 1.0
    student_from: str = ""
    teacher_from: str = ""

    def init(self, rng: jax.Array, batch):
        """Parameters of both models, and the count of micro-batches seen."""
        own, other = jax.random.split(rng)
        student = init_ranker(self.model, own, batch)
        teacher = init_ranker(self.teacher, other, batch)
        return self._placed(student, teacher)

    def _placed(self, student, teacher):
        extra = {"progress": {"micro_batches": jnp.zeros((), jnp.int32)}}
        if self.objective.train_teacher:
            return {**student, TEACHER: teacher}, extra
        return student, {**extra, TEACHER: teacher}

    def own_params(self, params):
        """The student's parameters."""
        return {k: v for k, v in params.items() if k != TEACHER}

    def _models(self, params, extra):
        """(student's parameters, teacher's)."""
        if self.objective.train_teacher:
            return self.own_params(params), params[TEACHER]
        return params, jax.lax.stop_gradient(extra[TEACHER])

    def start(self, params, extra):
        """Both models as their runs left them."""
        student, teacher = self._models(params, extra)
        if self.student_from:
            key = "config.task_args.student_from"
            student = load_ranker(self.student_from, self.name, self.model, student, key)
        if self.teacher_from:
            key = "config.task_args.teacher_from"
            teacher = load_ranker(self.teacher_from, self.teacher_name, self.teacher, teacher, key)
        return self._placed(student, teacher)

    def selected(self, micro_batches: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(student's layers [K], teacher's layers [K]) at a point of training."""
        return lead.layers_at(
            micro_batches // self.accumulate,
            jax.random.key(self.selection_seed),
            self.model.num_hidden_layers,
            self.teacher.num_hidden_layers,
            self.layers,
            selection=self.selection,
            reselect_every=self.reselect_every,
        )

    def _states(self, module, params, batch, rng, kind):
        """Hidden states of every block, queries [B, L, ..] and documents [D, L, ..].

        Those of [CLS] alone unless `kind` is `late` or attention maps are compared.
        """
        train = rng is not None
        rngs = (None, None) if rng is None else jax.random.split(rng)
        tokens = kind == "late" or self.objective.attention_weight > 0
        found = []
        for ids, side, key in zip(rows_of(batch, kind), ("query", "document"), rngs):
            states = module.apply(
                {"params": params},
                ids,
                train=train,
                rngs={"dropout": key} if train else None,
                method=f"{side}_states",
            )
            lead.check_hidden_states(len(states) - 1, module.num_hidden_layers)
            # The first entry is the embeddings' output, which is no layer.
            found.append(jnp.stack([x if tokens else x[:, 0] for x in states[1:]], axis=1))
        return tuple(found)

    def _teacher_scores(self, params, batch, rng, chosen):
        kind = kind_of(self.teacher)
        if kind == "cross":
            scores = self.teacher.apply(
                {"params": params},
                batch["cross_ids"],
                train=rng is not None,
                rngs=None if rng is None else {"dropout": rng},
                method="layer_relevance",
            )
            return lead.cross_scores(scores, chosen), None
        states = self._states(self.teacher, params, batch, rng, kind)
        if kind == "dual":
            return lead.dual_scores(*states, chosen, self.teacher_scale), states
        documents = rows_of(batch, kind)[1]
        mask = documents != self.teacher.pad_token_id
        return lead.late_scores(*states, mask, chosen, self.teacher_scale), states

    def loss(self, params, extra, batch, rng):
        """The objective; metrics are its terms."""
        student, teacher = self._models(params, extra)
        count = extra["progress"]["micro_batches"]
        own, other = self.selected(count)
        rngs = jax.random.split(rng)
        states = self._states(self.model, student, batch, rngs[0], "dual")
        trained = self.objective.train_teacher
        t, t_states = self._teacher_scores(teacher, batch, rngs[1] if trained else None, other)
        attention = 0.0
        if self.objective.attention_weight > 0:
            queries, documents = rows_of(batch, "dual")
            attention = lead.attention_distance(
                states, t_states, queries != 0, documents != 0, own, other
            )
        s = lead.dual_scores(*states, own, self.student_scale)
        terms = self.objective(s, t, attention)
        metrics = {
            "student": terms.student,
            "teacher": terms.teacher,
            "response": terms.response,
            "layers": terms.layers,
            "accuracy": _first_places(s.final, batch),
        }
        progress = {"micro_batches": count + 1}
        return terms.total, ({**extra, "progress": progress}, metrics)

    def evaluate(self, variables, batch):
        """Sums of the student's NLL and first places among the query's own documents."""
        params = self.own_params(variables["params"])
        return dual_group_sums(self.model, params, batch, self.student_scale)


def _first_places(scores: jax.Array, batch) -> jax.Array:
    """Share of queries whose best document of the batch is their positive."""
    own = batch["doc_ids"].shape[1]
    return (scores.argmax(-1) == jnp.arange(len(scores)) * own).mean()


_OWN = (
    "layers",
    "selection",
    "reselect_every",
    "selection_seed",
    "student_scale",
    "teacher_scale",
    "student_from",
    "teacher_from",
)


def from_config(config) -> Lead:
    """`task_args`: `teacher` (a model's name), `teacher_args`, the fields of `Lead`, and the
    arguments of `LayerDistillation`.

    Raises ConfigError for a teacher that is missing, layers that cannot be selected, clipping of a
    teacher that is frozen.
    """
    forbid_pmap(config)
    args = dict(config.task_args)
    own = {k: args.pop(k) for k in _OWN if k in args}
    teacher_name, teacher_args = args.pop("teacher", ""), args.pop("teacher_args", {})
    if not teacher_name:
        raise ConfigError("config.task_args.teacher: LEAD needs a teacher, a model's name")
    model = build_model(config)
    teacher = build_named(config, teacher_name, teacher_args, "config.task_args.teacher")
    kind = kind_of(teacher)
    check_vocabulary(config, model)
    check_vocabulary(config, teacher, "config.task_args.teacher_args")
    if kind_of(model) != "dual":
        raise ConfigError(f"config.model: the student {config.model!r} is no dual encoder")
    try:
        objective = lead.LayerDistillation(own_group=kind == "cross", **args)
        task = Lead(
            model=model,
            name=config.model,
            teacher=teacher,
            teacher_name=teacher_name,
            objective=objective,
            accumulate=config.optimizer.accumulate,
            **{"selection_seed": config.seed, **own},
        )
        jax.eval_shape(task.selected, jnp.zeros((), jnp.int32))
    except ValueError as error:
        raise ConfigError(f"config.task_args: {error}") from None
    if not objective.train_teacher and any("teacher" in g for g in config.optimizer.clip_groups):
        raise ConfigError(
            "config.optimizer.clip_groups names the teacher, which task_args.train_teacher = False "
            "freezes"
        )
    if objective.attention_weight and kind == "cross":
        raise ConfigError(
            "config.task_args.attention_weight: attention maps are compared between towers"
        )
    if kind == "cross" and config.data.options.get("number_neg", 1) < 1:
        raise ConfigError(
            "config.data.options.number_neg: a cross-encoder teacher needs at least one negative"
        )
    return task
