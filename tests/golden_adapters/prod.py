"""PROD's cases: official argument names to ours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop import checkpoint
from jaxmodels.retrieval import prod
from tests.golden_adapters.dense_retrieval_common import encoder_arguments
from train.data.candidates import CandidateRows, choose_candidates
from train.data.wordpiece import WordPiece

ARGUMENTS = {
    "KD_type": "kd_type",
    "TEMPERATURE": "temperature",
    "CE_WEIGHT": "ce_weight",
    "KD_WEIGHT": "kd_weight",
    "LwF_WEIGHT": "lwf_weight",
    "DKD_alpha": "dkd_alpha",
    "DKD_beta": "dkd_beta",
    "embedding_scale": "embedding_scale",
}


def run(case) -> dict[str, Any]:
    """Every wanted output of one case."""
    model = case.model
    if model in ("BiEncoderKDLoss", "CrossBERTKDLoss"):
        return _loss(case)
    if model == "divide_data":
        return _selection(case)
    if model == "hard negative list builder":
        return _negatives(case)
    if "Dataset" in model:
        return _batch(case)
    return _end_to_end(case)


def _batch(case) -> dict[str, Any]:
    config, inputs = case.config, case.inputs
    words = WordPiece([str(w) for w in inputs["vocab"]], config.get("do_lower_case", True))
    rows = CandidateRows(words, "prod", config["max_q_length"], config["max_seq_length"])
    queries, documents, cross = [], [], []
    for question, candidates in zip(inputs["questions"], inputs["candidate_docs"].tolist()):
        first, *negatives = [c for c in candidates if c >= 0]
        chosen = choose_candidates(
            [first], negatives, config["number_neg"], rng=None, sampling="descend"
        )
        queries.append(rows.query(str(question)))
        own = [rows.document(str(inputs["titles"][c]), str(inputs["texts"][c])) for c in chosen]
        documents += own
        cross.append(rows.cross(queries[-1], own))
    ids = {"query": rows.queries(queries), "doc": rows.documents(documents), "ce": np.stack(cross)}
    return {
        **{f"{name}_ids": x for name, x in ids.items()},
        **{f"{name}_mask": (x != 0).astype(np.int64) for name, x in ids.items()},
        "positive_index": np.arange(len(queries)) * (1 + config["number_neg"]),
    }


def _objective(config: dict[str, Any]) -> prod.ProgressiveLoss:
    given = {ARGUMENTS[k]: v for k, v in config.items() if k in ARGUMENTS}
    return prod.ProgressiveLoss(**given, teacher_scale=config.get("embedding_scale", 1.0))


def _loss(case) -> dict[str, Any]:
    objective = _objective(case.config)
    x = {k: jnp.asarray(v) for k, v in case.inputs.items()}

    def loss_of(q, d):
        if case.model == "BiEncoderKDLoss":
            parts = objective.in_batch(q, d, x["teacher_q"], x["teacher_d"])
        else:
            frozen = None
            if case.config.get("use_lwf", True) and "frozen_student_q" in x:
                frozen = (x["frozen_student_q"], x["frozen_student_d"])
            parts = objective.own_group(q, d, x["teacher_logits"], frozen)
        return parts.loss, parts

    step = jax.jit(jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True))
    (loss, parts), (grad_q, grad_d) = step(x["q"], x["d"])
    return {
        "loss": loss,
        "n_correct": parts.correct,
        "scores": parts.scores,
        "hard_loss": parts.hard,
        "soft_loss": parts.soft,
        "lwf_loss": parts.regularizer,
        "grad_q": grad_q,
        "grad_d": grad_d,
    }


def _weights(case, part: str) -> dict[str, np.ndarray]:
    """The tensors of one of the case's models, under their official names."""
    tensors = checkpoint.read(case.weights).tensors
    prefix = f"{part}."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _end_to_end(case) -> dict[str, Any]:
    config, x = case.config, {k: jnp.asarray(v) for k, v in case.inputs.items()}
    arguments = {
        who: encoder_arguments(config[who], _weights(case, who)) for who in ("student", "teacher")
    }
    shared = config.get("share_weight", False)
    vectors = {}
    for who in ("student", "frozen_student"):
        if not any(k.startswith("frozen_student.") for k in checkpoint.read(case.weights).tensors):
            vectors["frozen_student"] = None
            if who == "frozen_student":
                continue
        module, variables = jaxmodels.load(
            "retrieval.dual_encoder",
            _weights(case, who),
            share_weight=shared,
            **arguments["student"],
        )
        vectors[who] = module.apply(
            variables, x["query_ids"], x.get("query_mask"), x["doc_ids"], x.get("doc_mask")
        )
    objective, outputs = _objective(config), {}
    teacher = _weights(case, "teacher")
    if any(k.startswith("question_model.") for k in teacher):  # the first stage
        module, variables = jaxmodels.load(
            "retrieval.dual_encoder", teacher, share_weight=shared, **arguments["teacher"]
        )
        found = module.apply(
            variables, x["query_ids"], x.get("query_mask"), x["doc_ids"], x.get("doc_mask")
        )
        parts = objective.in_batch(*vectors["student"], *found)
        outputs["teacher_q_emb"], outputs["teacher_d_emb"] = found
    else:
        module, variables = jaxmodels.load(
            "retrieval.cross_encoder",
            teacher,
            binary_head=any(k.startswith("binary.") for k in teacher),
            **arguments["teacher"],
        )
        relevance = module.apply(variables, x["ce_ids"], x.get("ce_mask"))
        parts = objective.own_group(*vectors["student"], relevance, vectors["frozen_student"])
        outputs["teacher_logits"] = relevance
    outputs |= {
        "q_emb": vectors["student"][0],
        "d_emb": vectors["student"][1],
        "loss": parts.loss,
        "n_correct": parts.correct,
    }
    if vectors["frozen_student"] is not None:
        outputs["frozen_q_emb"], outputs["frozen_d_emb"] = vectors["frozen_student"]
    return outputs


def _selection(case) -> dict[str, Any]:
    relevant, judged = case.inputs["relevant"], case.inputs["has_qrel"]
    hits = {
        who: prod.first_hits(case.inputs[f"{who}_rank"], relevant) for who in ("student", "teacher")
    }
    outputs: dict[str, Any] = {f"{who}_first_hit": h for who, h in hits.items()}
    for who, h in hits.items():
        masks = prod.bucket_masks(h, judged)
        outputs |= {f"{who}_bucket.{name}": mask for name, mask in masks.items()}
    pair = (hits["student"], hits["teacher"])
    outputs["selected_marco"] = prod.confusing_queries(*pair, judged)
    for name in case.wanted:
        if name.startswith("selected_nq_top"):
            window = int(name.removeprefix("selected_nq_top"))
            outputs[name] = prod.confusing_queries(*pair, rule="nq", window=window)
    return outputs


def _negatives(case) -> dict[str, Any]:
    inputs = case.inputs
    negatives, kept = prod.hard_negatives(
        inputs["rank"], inputs["relevant"], inputs["has_qrel"], case.config["neg_num"]
    )
    return {"negatives": np.asarray(negatives), "kept": kept}
