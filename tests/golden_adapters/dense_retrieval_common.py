"""The shared retrieval cases: encoders, dual and cross encoders, trec_eval's measures."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop import checkpoint
from jaxmodels.language.bert import EncoderFields, arguments_of_config
from jaxmodels.retrieval import losses, metrics

MODELS = {
    "HFBertEncoder": "language.bert",
    "HFDistilBertEncoder": "language.bert",
    "BiBertEncoder": "retrieval.dual_encoder",
    "Reranker": "retrieval.cross_encoder",
}
MEASURES = {
    "P": "precision",
    "map_cut": "map",
    "ndcg_cut": "ndcg",
    "recall": "recall",
    "success": "success",
}


def encoder_arguments(config: dict[str, Any], keys: Iterable[str] = ()) -> dict[str, Any]:
    """The constructor arguments among a case's `config`; the file's keys tell which parts it has.

    (A case's `config` names neither DistilBERT nor a missing pooler.)
    """
    names = {*EncoderFields.__dataclass_fields__, "share_weight"}
    arguments = {k: v for k, v in config.items() if k in names}
    keys = set(keys)
    if any(".transformer.layer." in f".{k}" for k in keys):
        arguments |= arguments_of_config({**config, "model_type": "distilbert"})
    elif keys and not any(k.endswith("pooler.dense.weight") for k in keys):
        arguments["pooler"] = False
    return arguments


def run(case) -> dict[str, Any]:
    """Every wanted output of one case."""
    if case.model == "trec_eval measures":
        return _metrics(case)
    name = next(ours for official, ours in MODELS.items() if case.model.startswith(official))
    tensors = checkpoint.read(case.weights).tensors
    arguments = encoder_arguments(case.config, tensors)
    if name == "retrieval.cross_encoder":
        arguments["binary_head"] = any(k.startswith("binary.") for k in tensors)
    module, variables = jaxmodels.load(name, case.weights, **arguments)
    inputs = {k: jnp.asarray(v) for k, v in case.inputs.items()}
    if name == "language.bert":
        return _encoder(module, variables, inputs)
    if name == "retrieval.cross_encoder":
        return _cross_encoder(module, variables, inputs)
    return dual_encoder(module, variables, inputs, case.config, case.wanted)


def _encoder(module, variables, inputs):
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    outputs = module.apply(
        variables, ids, mask, inputs.get("token_type_ids"), method="intermediates"
    )
    named = {k.replace("attention_", "attn_layer"): v for k, v in outputs.items()}
    named["cls_no_token_types"] = module.apply(variables, ids, mask)[:, 0]
    return named


def _cross_encoder(module, variables, inputs):
    heads = module.apply(
        variables, inputs["input_ids"], inputs.get("attention_mask"), method="heads"
    )
    named = {
        "relevance_logits": heads["relevance"],
        "listwise_ce": losses.nll(heads["relevance"])[0],
    }
    return {**named, "binary_logits": heads["binary"]} if "binary" in heads else named


def dual_encoder(module, variables, inputs, config, wanted=()):
    """Vectors, scores, the in-batch loss and its gradients."""
    queries, documents = module.apply(
        variables,
        inputs["query_ids"],
        inputs.get("query_mask"),
        inputs["doc_ids"],
        inputs.get("doc_mask"),
    )
    positive = inputs.get("positive_index")
    both = config.get("embedding_scale", 1.0)
    scales = (config.get("query_scale", both), config.get("doc_scale", both))

    def loss_of(q, d):
        return losses.in_batch_nll(q, d, positive, scales)

    gradient = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (loss, correct), (grad_q, grad_d) = gradient(queries, documents)
    groups = {}
    if "group_scores" in wanted:
        groups["group_scores"] = losses.group_scores(queries, documents)
    return {
        **groups,
        "q_emb": queries,
        "d_emb": documents,
        "score_matrix": losses.scores_of(queries, documents),
        "inbatch_nll": loss,
        "loss": loss,
        "n_correct": correct,
        "grad_q": grad_q,
        "grad_d": grad_d,
    }


def _measure(name: str) -> str:
    if name in ("map", "recip_rank", "ndcg"):
        return name.replace("recip_rank", "mrr")
    stem, _, cut = name.rpartition("_")
    return f"{MEASURES[stem]}@{cut}"


def _metrics(case) -> dict[str, Any]:
    config, inputs = case.config, case.inputs
    docs = [config["doc_id_format"] % i for i in range(config["n_docs"])]
    queries = [config["query_id_format"] % i for i in range(config["n_queries"])]
    rows = {doc: i for i, doc in enumerate(docs)}
    run_ = {
        query: {docs[d]: inputs["scores"][q, d] for d in np.flatnonzero(inputs["in_run"][q])}
        for q, query in enumerate(queries)
    }
    judgments = {
        query: {d: int(g) for d, g in zip(docs, inputs["qrels"][q]) if g >= 0}
        for q, query in enumerate(queries)
    }
    # As in a file of judgments, where a query without any has no line.
    judgments = {query: grades for query, grades in judgments.items() if grades}
    outputs: dict[str, Any] = {}
    for name in case.wanted:
        prefix, _, measure = name.partition(".")
        level = re.fullmatch(r"trec_l(\d+)", prefix)
        if level is None:
            continue
        ours = _measure(measure)
        found = metrics.evaluate(
            run_, judgments, [ours], relevance_level=int(level[1]), missing="skip"
        )
        outputs[name] = np.array(
            [found.per_query.get(q, {ours: np.nan})[ours] for q in queries], np.float64
        )
    for name in case.wanted:
        found = re.fullmatch(r"mrr_at_(\d+)_l(\d+)", name)
        if found:
            ours, level = f"mrr@{found[1]}", int(found[2])
            every = metrics.evaluate(run_, judgments, [ours], relevance_level=level)
            outputs[name] = np.array([every.per_query.get(q, {ours: 0.0})[ours] for q in queries])
    if "trec_rank" in case.outputs:
        rank = np.full_like(case.outputs["trec_rank"], -1)
        for q, query in enumerate(queries):
            order = [rows[d] for d in metrics.ranking(run_[query])]
            rank[q, : len(order)] = order
        outputs["trec_rank"] = rank
    return outputs
