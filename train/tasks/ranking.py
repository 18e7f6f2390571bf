"""Training one ranker alone: dual encoder, late interaction or cross encoder.

The first two are trained with in-batch negatives over all documents of the global batch (their
columns are gathered over all devices, with the true gradient), a cross encoder listwise over the
documents of its own query. A batch has `query_ids` [B, Q], `doc_ids` [B, N, L], the positive
first, and what else the model reads: `late_query_ids`, `late_doc_ids`, or `cross_ids` [B, N, R].
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmodels.retrieval.cross_encoder import CrossEncoder
from jaxmodels.retrieval.dual_encoder import DualEncoder
from jaxmodels.retrieval.late_interaction import LateInteraction, maxsim
from jaxmodels.retrieval.losses import group_scores, nll, scores_of
from jaxmodels.retrieval.pretrained import is_single_encoder, prepare_state
from train.building import build_model
from train.data import pipeline
from train.encoding import Encoder
from train.initialization import variables_from
from train.naming import ConfigError


def kind_of(module: nn.Module) -> str:
    """`late`, `dual` or `cross`."""
    for cls, kind in ((LateInteraction, "late"), (DualEncoder, "dual"), (CrossEncoder, "cross")):
        if isinstance(module, cls):
            return kind
    raise ConfigError(f"config.model: {type(module).__name__} is neither dual nor cross encoder")


def rows_of(batch, kind: str) -> tuple[jax.Array, jax.Array]:
    """(queries [B, Q], documents [B * N, L]) as this kind of dual encoder reads them."""
    prefix = "late_" if kind == "late" else ""
    documents = batch[f"{prefix}doc_ids"]
    return batch[f"{prefix}query_ids"], documents.reshape(-1, documents.shape[-1])


def init_ranker(module: nn.Module, rng: jax.Array, batch) -> Any:
    """Fresh parameters for rows of the batch's lengths."""
    kind = kind_of(module)
    if kind == "cross":
        return module.init(rng, batch["cross_ids"])["params"]
    queries, documents = rows_of(batch, kind)
    return module.init(rng, queries, None, documents)["params"]


def load_ranker(source: str, name: str, module: nn.Module, wanted, key: str):
    """Parameters like `wanted` from a run directory or a PyTorch file.

    A file may be a ranker's own or that of the pre-trained encoder it begins with, which may have
    more blocks; a cross encoder's heads are then those in `wanted`.
    """

    def prepare(tensors):
        try:
            return prepare_state(tensors, module)
        except ValueError as error:
            raise ConfigError(f"{key} {source}: {error}") from None

    def fresh_heads(tensors) -> str:
        alone = is_single_encoder(tensors) and kind_of(module) == "cross"
        return "qa_classifier|binary" if alone else ""

    return variables_from(
        source,
        name,
        module,
        {"params": wanted},
        key=key,
        prepare=prepare,
        skip_of=fresh_heads,
        fresh=lambda: {"params": wanted},
    )["params"]


def check_vocabulary(config, module: nn.Module, key: str = "config.model_args") -> None:
    """Refuse a model with fewer word rows than the data's vocabulary: `jit` clamps ids silently.

    A vocabulary file that is not there is left to the data, which names it.

    Raises ConfigError with both sizes; `key` says whose arguments they are.
    """
    options = pipeline.resolve(config.data)[1]
    words = str(options.get("vocabulary", 0))
    size = int(words) if words.isdigit() else 0
    if not size:
        places = (Path(words), Path(options["path"] or "") / words)
        found = next((p for p in places if p.is_file()), None)
        size = len(found.read_text("utf-8").removesuffix("\n").split("\n")) if found else 0
    if size > module.vocab_size:
        raise ConfigError(
            f"{key}.vocab_size: {module.vocab_size} rows for config.data.options.vocabulary of "
            f"{size} words"
        )


def forbid_pmap(config) -> None:
    """In-batch negatives are those of the global batch, which `pmap` does not show a device."""
    if config.parallel.mode == "pmap":
        raise ConfigError(
            f"config.parallel.mode: task {config.task!r} compares all documents of the global "
            "batch; use jit"
        )


class AnswersQueries:
    """What every run that trains a dual encoder can do with it: final numbers, search, vectors.

    Who inherits it has `model`, the dual encoder, whose parameters are `own_params(params)`.
    """

    def own_params(self, params):
        """The parameters of `model` among those of the run."""
        return params

    def report(self, variables, sums, config):
        """Measures on the test queries, with BM25's; nothing where `model` is another ranker."""
        from train.ranker_search import report_of

        return report_of(self.model, self.own_params(variables["params"]), config)

    def predict(self, variables, path, config):
        """The best ten documents for every line of a file of queries."""
        from train.ranker_search import predict_rows

        return predict_rows(self.model, self.own_params(variables["params"]), path, config)

    def encoder(self, variables, method: str, longest: int, batch_size: int, mesh) -> Encoder:
        """Vectors of token rows by one of the towers (`encode_queries` | `encode_documents`)."""

        def encode(params, ids):
            return self.model.apply({"params": params}, ids, method=method)

        params = self.own_params(variables["params"])
        return Encoder(encode, params, longest, batch_size, mesh)


@dataclasses.dataclass(frozen=True)
class Ranking(AnswersQueries):
    """One model and its contrastive loss.

    Attributes:
      score_scale: factor of a dual encoder's products. From scratch, 1 / sqrt(width) keeps the
        first softmax from saturating; published recipes have 1.
      start_from: a run directory or PyTorch file to begin with ("" for none).
    """

    model: nn.Module
    name: str = ""
    score_scale: float = 1.0
    start_from: str = ""

    def init(self, rng: jax.Array, batch):
        """Fresh parameters; no other collections."""
        return init_ranker(self.model, rng, batch), {}

    def start(self, params, extra):
        """The parameters of `start_from`, where it is given."""
        if not self.start_from:
            return params, extra
        key = "config.task_args.start_from"
        return load_ranker(self.start_from, self.name, self.model, params, key), extra

    def _scores(self, params, batch, train: bool, rng=None):
        """([B, B * N] or a cross encoder's [B, N], positive columns)."""
        kind = kind_of(self.model)
        rngs = {"dropout": rng} if train else None
        apply_ = lambda *a: self.model.apply({"params": params}, *a, train=train, rngs=rngs)  # noqa: E731
        if kind == "cross":
            return apply_(batch["cross_ids"], None), 0
        queries, documents = rows_of(batch, kind)
        q, d = apply_(queries, None, documents, None)
        if kind == "late":
            scores = maxsim(q, d, documents != self.model.pad_token_id)
        else:
            scores = self.score_scale * scores_of(q, d)
        return scores, jnp.arange(len(queries)) * (len(documents) // len(queries))

    def loss(self, params, extra, batch, rng):
        """NLL of the positive and the share of queries that rank it first."""
        scores, positive = self._scores(params, batch, True, rng)
        loss, correct = nll(scores, positive)
        return loss, (extra, {"accuracy": correct / scores.shape[0]})

    def evaluate(self, variables, batch):
        """Sums of the NLL and of first places among the query's own documents."""
        return group_sums(self._own_scores(variables["params"], batch), batch["mask"])

    def _own_scores(self, params, batch):
        scores, _ = self._scores(params, batch, False)
        return own_columns(scores, batch)


def own_columns(scores: jax.Array, batch) -> jax.Array:
    """[B, N] of scores [B, B * N] or [B, N]."""
    queries = scores.shape[0]
    own = batch["doc_ids"].shape[1]
    if scores.shape[1] == own and queries > 1:
        return scores
    columns = jnp.arange(queries)[:, None] * own + jnp.arange(own)
    return jnp.take_along_axis(scores, columns, axis=1)


def group_sums(scores: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Sums over unpadded rows of NLL and first places, scores [B, N] with the positive first."""
    log_p = jax.nn.log_softmax(scores.astype(jnp.float32))
    return {
        "loss": -(log_p[:, 0] * mask).sum(),
        "accuracy": ((scores.argmax(-1) == 0) * mask).sum(),
        "count": mask.sum(),
    }


def vectors_of(model: DualEncoder, params, batch) -> tuple[jax.Array, jax.Array]:
    """(queries [B, H], documents [B * N, H]) in evaluation mode."""
    queries, documents = rows_of(batch, "dual")
    return model.apply({"params": params}, queries, None, documents, None)


def dual_group_sums(model: DualEncoder, params, batch, scale: float = 1.0) -> dict[str, jax.Array]:
    """`group_sums` of a dual encoder whose vectors are multiplied by `scale`, as in training."""
    scores = group_scores(*vectors_of(model, params, batch), (scale, scale))
    return group_sums(scores, batch["mask"])


def from_config(config) -> Ranking:
    """The task of a config: its model and `task_args`."""
    forbid_pmap(config)
    model = build_model(config)
    check_vocabulary(config, model)
    return Ranking(model=model, name=config.model, **config.task_args)
