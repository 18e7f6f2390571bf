"""Change points in a dynamic graph: one step factorizes a batch of windows and scores what follows.

Nothing is learned across targets. The state carries what a stream needs: the last factors (for a
warm start), the scores and objective traces so far, and the window of signatures.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.graphs import change_baselines, change_scores
from jaxmodels.graphs.change_detection import Options, detect, score_rows, starting_factors
from jaxmodels.graphs.latent_evolution import Factors
from train.data import pipeline
from train.naming import ConfigError

SERIES = ("prediction", "normal", "mixed")
_LISTED_EVENTS = 12
# These form n x n products of every snapshot; LAD alone takes sparse ones.
_DENSE_BASELINES = tuple(name for name in change_baselines.BASELINES if name != "lad")


@dataclasses.dataclass(frozen=True)
class ChangePoints:
    """Scores of targets, in order of time.

    Attributes:
      options: of the factorization and the scores.
      num_nodes: n. num_snapshots: T. directed: whether snapshots may be asymmetric.
      seed: of the starting factors, which are a function of (seed, target).
      continues: the run's first warm start takes the factors it was given.
      count: points to report; 0: as many as there are events.
      baselines: names of `change_baselines.BASELINES` to report beside.
      lad: settings of LAD (short, long, num_eigen, ...).
    """

    options: Options
    num_nodes: int
    num_snapshots: int
    directed: bool
    seed: int = 0
    continues: bool = False
    count: int = 0
    baselines: tuple[str, ...] = ("lad",)
    lad: tuple[tuple[str, Any], ...] = ()
    model: nn.Module | None = None

    @property
    def signature_size(self) -> int:
        return self.options.signature_size or self.num_nodes

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Starting factors and an empty record."""
        del rng, batch
        factors = starting_factors(
            jax.random.key(self.seed),
            self.options.window,
            {"window": jnp.zeros(1)},
            self.options,
            self.num_nodes,
            jnp.float32,
        )
        length = self.num_snapshots
        record = {
            "frobenius": {name: jnp.zeros(length) for name in SERIES},
            "objective": jnp.zeros((length, self.options.iters + 1)),
            "sweeps": jnp.zeros(length, jnp.int32),
            "scored": jnp.zeros(length, jnp.int32),
            "next": jnp.int32(self.options.window if self.continues else -1),
        }
        if self.options.spectral:
            record["spectral"] = {name: jnp.zeros(length) for name in SERIES}
            record["context"] = jnp.zeros((self.options.window, self.signature_size))
        return dict(factors._asdict()), {"record": record}

    def update(self, state, batch, rng):
        """Fit and score the targets of a batch; the loss is J over the windows' squares."""
        del rng
        options = self.options
        rows = {k: v for k, v in batch.items() if k not in ("target", "mask")}
        targets, record = batch["target"], state.extra["record"]
        # A batch that runs past the last target wraps to the first ones, which have been scored.
        ahead = targets == targets[0] + jnp.arange(len(targets))
        continues = targets[0] == record["next"]
        found = score_rows(
            rows,
            targets,
            jax.random.key(self.seed),
            options,
            directed=self.directed,
            num_nodes=self.num_nodes,
            previous=Factors(**state.params),
            continues=continues,
        )
        place = jnp.where(ahead, targets, self.num_snapshots)

        def put(whole, values):
            return whole.at[place].set(values, mode="drop")

        new = {
            **record,
            "frobenius": jax.tree.map(put, record["frobenius"], found.frobenius._asdict()),
            "objective": put(record["objective"], found.objective),
            "sweeps": put(record["sweeps"], found.sweeps),
            "scored": put(record["scored"], jnp.ones_like(targets)),
        }
        last = ahead.sum() - 1
        new["next"] = (targets[last] + 1).astype(jnp.int32)
        if options.spectral:
            distances, context = self._spectral(rows, found, record["context"], continues, last)
            new["spectral"] = jax.tree.map(put, record["spectral"], distances._asdict())
            new["context"] = context
        factors = jax.tree.map(lambda x: x[last], found.factors)
        weights = rows["weights"][:, :-1] if "weights" in rows else rows["window"]
        squares = jnp.square(weights.astype(jnp.float32)).reshape(len(targets), -1).sum(-1)
        loss = (found.objective[:, -1] / jnp.maximum(squares, 1e-12)).mean()
        metrics = {"distance": found.frobenius.mixed.mean(), "sweeps": found.sweeps.mean()}
        state = state.replace(params=dict(factors._asdict()), extra={"record": new})
        return state, loss, metrics

    def _spectral(self, rows, found, context, continues, last):
        """Distances on signatures, the window before the batch being carried from step to step."""
        size, w = self.options.signature_entries, self.options.window

        def first_window():
            return change_scores.signature(rows["window"][0].astype(jnp.float32), size)

        context = jax.lax.cond(continues, lambda: context, first_window)
        actual = change_scores.signature(rows["snapshot"].astype(jnp.float32), size)
        predicted = change_scores.signature(found.prediction, size)
        stream = jnp.concatenate([context, actual])
        windows = jnp.stack([stream[i : i + w] for i in range(len(actual))])
        distances = change_scores.spectral_distances(windows, actual, predicted, self.options.alpha)
        return distances, jax.lax.dynamic_slice_in_dim(stream, last + 1, w)

    def evaluate(self, variables, batch):
        """Sums over targets: their recorded distance, and whether they have been scored."""
        record, mask, target = variables["record"], batch["mask"], batch["target"]
        return {
            "distance": (self._series(record)["mixed"][target] * mask).sum(),
            "scored": (record["scored"][target] * mask).sum(),
            "count": mask.sum(),
        }

    def _series(self, record):
        return record["spectral" if self.options.scorer == "spectral" else "frobenius"]

    def scores(self, record) -> np.ndarray:
        """Z* [T] of a record."""
        return change_scores.rises(np.asarray(self._series(record)["mixed"]), self.options.window)

    def report(self, variables, sums, config):
        """Hits@n, precision and ranks of the events, causal alarms, and the baselines' Hits@n."""
        del sums
        from train.data import dynamic_graphs

        graph = dynamic_graphs.sequence(pipeline.resolve(config.data)[1])
        unscored = int(
            (np.asarray(variables["record"]["scored"])[self.options.window :] == 0).sum()
        )
        if unscored:
            # A ranking without some targets would say nothing.
            return {"targets_without_score": unscored}
        scores = self.scores(variables["record"])
        if not graph.events:
            top = change_scores.top_points(scores, self.count or 1)
            return {"top": ", ".join(graph.labels[t] for t in top)}
        count = self.count or len(graph.events)
        found = change_scores.hits_at(scores, graph.events, count)
        raised = change_scores.alarms(
            scores, change_scores.causal_threshold(scores, self.options.window)
        )
        caught = len(set(raised.tolist()) & set(graph.events))
        ranks = list(found.ranks.values())
        listed = ", ".join(f"{e}: {r}" for e, r in found.ranks.items())
        numbers = {
            f"hits_at_{count}": found.hits,
            f"precision_at_{count}": found.precision,
            "event_ranks": listed if len(ranks) <= _LISTED_EVENTS else f"{len(ranks)} events",
            "mean_event_rank": float(np.mean(ranks)),
            "alarms": len(raised),
            "alarms_that_are_events": caught,
            "hits_by_chance": count / (self.num_snapshots - self.options.window),
        }
        for name in self.baselines:
            settings = dict(self.lad) if name == "lad" else {}
            if name == "lad":
                baseline = change_baselines.lad(
                    graph.snapshots, directed=graph.directed, **settings
                )
            else:
                baseline = change_baselines.BASELINES[name](graph.dense())
            other = change_scores.hits_at(baseline, graph.events, count)
            numbers[f"{name}_hits_at_{count}"] = other.hits
            numbers[f"{name}_mean_event_rank"] = float(np.mean(list(other.ranks.values())))
        return numbers

    def predict(self, variables, path, config):
        """Scores of another sequence: rows (t, label, distance, score, threshold, alarm, rank).

        `path` takes the place of `data.options.path`; generators and `num_nodes` do not matter.
        """
        from train.data import dynamic_graphs

        del variables  # nothing is learned that another sequence could use
        _, options = pipeline.resolve(config.data)
        kind = options["kind"] if options["kind"] in ("edges", "reviews", "git") else "edges"
        options |= {"kind": kind, "path": str(path), "num_nodes": 0}
        # The events are those of the sequence that the config reads, not of this one.
        options |= {"events": (), "events_path": "", "releases": ""}
        graph = dynamic_graphs.sequence(options)
        found = detect(
            graph.snapshots,
            self.options,
            seed=self.seed,
            directed=graph.directed,
            sparse=options["sparse"],
        )
        chosen = found.spectral if self.options.scorer == "spectral" else found.frobenius
        thresholds = change_scores.causal_threshold(found.scores, self.options.window)
        order = np.argsort(-found.scores, kind="stable")
        ranks = np.empty(len(order), int)
        ranks[order] = np.arange(1, len(order) + 1)
        rows = [("t", "label", "distance", "score", "threshold", "alarm", "rank")]
        for t, label in enumerate(graph.labels):
            alarm = int(found.scores[t] > thresholds[t])
            values = (float(chosen.mixed[t]), float(found.scores[t]), float(thresholds[t]))
            rows.append((t, label, *values, alarm, int(ranks[t])))
        return rows


def from_config(config) -> ChangePoints:
    """The task of a config; `window` stands in `data.options`, for the rows are cut by it."""
    from train.building import build_model
    from train.data import dynamic_graphs

    if config.parallel.mode == "pmap":
        raise ConfigError(
            "config.parallel.mode: change points run under jit, which shards targets by itself"
        )
    family, options = pipeline.resolve(config.data)
    if family is not dynamic_graphs:
        raise ConfigError(
            f"config.data.name: {config.data.name!r}; the task change_points takes dynamic_graphs"
        )
    arguments = dict(config.task_args)
    for name in ("window",):
        if name in arguments:
            raise ConfigError(f"config.task_args.{name}: set config.data.options.{name} instead")
    own = {f.name for f in dataclasses.fields(Options)}
    fitted = {k: arguments.pop(k) for k in list(arguments) if k in own}
    chosen = Options(window=options["window"], **fitted)
    length, num_nodes = dynamic_graphs.sequence_shape(options)
    chosen.check(num_nodes, length)
    sparse = dynamic_graphs.is_sparse(options)
    if sparse and chosen.spectral:
        raise ConfigError(
            "config.task_args.scorer: spectra need dense windows; data.options.sparse=False"
        )
    baselines = tuple(arguments.pop("baselines", ("lad",)))
    for name in baselines:
        if name not in change_baselines.BASELINES:
            known = ", ".join(change_baselines.BASELINES)
            raise ConfigError(f"config.task_args.baselines: {name!r}; known: {known}")
    if sparse and set(baselines) & set(_DENSE_BASELINES):
        raise ConfigError("config.task_args.baselines: on sparse windows only lad")
    arguments["lad"] = tuple(sorted(dict(arguments.pop("lad", {})).items()))
    sizes = {"num_nodes": num_nodes, "window": chosen.window, "rank": chosen.rank}
    with config.unlocked():
        config.model_args = sizes
    return ChangePoints(
        options=chosen,
        num_nodes=num_nodes,
        num_snapshots=length,
        directed=dynamic_graphs.is_directed(options),
        seed=config.seed,
        continues=bool(config.init_from) and chosen.warm_start,
        baselines=baselines,
        model=build_model(config),
        **arguments,
    )
