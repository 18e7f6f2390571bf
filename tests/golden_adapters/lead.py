"""LEAD's cases: official teacher names and coefficients to ours."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop import checkpoint
from jaxmodels.retrieval import lead
from jaxmodels.retrieval.late_interaction import unit
from tests.golden_adapters.dense_retrieval_common import encoder_arguments
from train.data.candidates import CandidateRows, choose_candidates
from train.data.wordpiece import WordPiece, cross_row

# Official short name -> (our kind, name of the teacher's own loss).
TEACHERS = {"de": "loss_dual", "col": "loss_col", "ce": "loss_ce"}


def run(case) -> dict[str, Any]:
    """Every wanted output of one case."""
    if case.model == "distill_loss":
        return _loss(case)
    if "Dataset" in case.model:
        return _batch(case)
    return _end_to_end(case)


def _batch(case) -> dict[str, Any]:
    config, inputs = case.config, case.inputs
    words = WordPiece([str(w) for w in inputs["vocab"]], config.get("do_lower_case", True))
    rows = CandidateRows(words, "lead", config["max_query_length"], config["max_doc_length"])
    queries, groups = [], []
    for question, candidates in zip(inputs["questions"], inputs["candidate_docs"].tolist()):
        first, *negatives = [c for c in candidates if c >= 0]
        chosen = choose_candidates(
            [first], negatives, config["num_hard_negatives"], rng=None, sampling="descend"
        )
        queries.append(rows.query(str(question)))
        groups.append(
            [rows.document(str(inputs["titles"][c]), str(inputs["texts"][c])) for c in chosen]
        )
    documents = [document for group in groups for document in group]
    # The official rows are padded to the longest of the batch, ours to one length for all batches.
    pairs = [(q, d) for q, own in zip(queries, groups) for d in own]
    longest = max(len(cross_row(q, d)) for q, d in pairs)
    ids = {
        "query": rows.queries(queries),
        "doc": rows.documents(documents),
        "col_query": rows.late_queries(queries),
        "col_doc": rows.late_documents(documents),
        "ce": np.stack([rows.cross(q, own, longest) for q, own in zip(queries, groups)]),
    }
    return {
        **{f"{name}_ids": x for name, x in ids.items()},
        **{f"{name}_mask": (x != 0).astype(np.int64) for name, x in ids.items()},
        "positive_index": np.arange(len(queries)) * (1 + config["num_hard_negatives"]),
    }


def _teacher(case) -> str:
    """The official short name of the teacher's kind, by the names of the terms where it is none."""
    if isinstance(case.config.get("teacher"), str):
        return case.config["teacher"]
    return next((t for t in TEACHERS if f"term.loss_{t}_db_dis" in case.wanted), "de")


def _objective(case) -> lead.LayerDistillation:
    config, short = case.config, _teacher(case)
    official = {
        "student_weight": "distill_para_db",
        "teacher_weight": f"distill_para_{short}",
        "response_weight": f"distill_para_{short}_db_dis",
        "layer_weight": f"distill_para_{short}_db_layer_score",
        "attention_weight": f"distill_para_{short}_db_attention",
        "temperature": "temperature",
        "layer_temperature": "layer_temperature",
        "reweight": "layer_score_reweight",
        "train_teacher": "train_teacher",
    }
    given = {
        ours: config[theirs] for ours, theirs in official.items() if config.get(theirs) is not None
    }
    return lead.LayerDistillation(own_group=short == "ce", **given)


def _terms(terms: lead.Terms, short: str, train_teacher: bool) -> dict[str, Any]:
    outputs = {
        "loss": terms.total,
        "term.loss_db": terms.student,
        f"term.loss_{short}_db_dis": terms.response,
        f"term.loss_db_{short}_dis": terms.reverse,
        f"term.loss_{short}_db_layer_dis": terms.layers,
        f"term.loss_db_{short}_layer_dis": jnp.zeros(()),  # there is no reverse layer term
        "teacher_layer_nll": terms.teacher_layer_nll,
        "layer_weight": terms.layer_weights,
    }
    if train_teacher:
        outputs[f"term.{TEACHERS[short]}"] = terms.teacher
    for i, value in enumerate(terms.layer_divergences):
        outputs[f"term.loss_score_layer_dis_{i}"] = value
    return outputs


def _loss(case) -> dict[str, Any]:
    config, short = case.config, _teacher(case)
    objective = _objective(case)
    chosen = [jnp.asarray(config[f"selected_{who}_layers"]) for who in ("student", "teacher")]
    features = {k: jnp.asarray(v) for k, v in case.inputs.items() if k != "tea_doc_mask"}
    mask = case.inputs.get("tea_doc_mask")
    if mask is None and short == "col":  # every token is real
        mask = np.ones((len(features["tea_d_hidden"]), features["tea_d_hidden"].shape[2]), bool)

    @jax.jit
    def loss_of(features):
        student = lead.dual_scores(features["stu_q_hidden"], features["stu_d_hidden"], chosen[0])
        if short == "ce":
            teacher = lead.cross_scores(features["tea_layer_scores"], chosen[1])
        elif short == "col":
            teacher = lead.late_scores(
                features["tea_q_hidden"], features["tea_d_hidden"], jnp.asarray(mask), chosen[1]
            )
        else:
            teacher = lead.dual_scores(
                features["tea_q_hidden"], features["tea_d_hidden"], chosen[1]
            )
        terms = objective(student, teacher)
        return terms.total, terms

    (_, terms), gradients = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(features)
    outputs = _terms(terms, short, objective.train_teacher)
    return outputs | {f"grad.{name}": value for name, value in gradients.items()}


def _states(module, variables, ids, mask, side: str) -> jax.Array:
    """Hidden states of every block, [rows, layers, tokens, width]."""
    states = module.apply(variables, ids, mask, method=f"{side}_states")
    return jnp.stack(states[1:], axis=1)  # the first entry is the embeddings' output


def _end_to_end(case) -> dict[str, Any]:
    config, x = case.config, {k: jnp.asarray(v) for k, v in case.inputs.items()}
    tensors = checkpoint.read(case.weights).tensors
    short, scale = _teacher(case), config.get("embedding_scale", 1.0)
    outputs: dict[str, Any] = {}
    scores = {}
    for who, name in (("student", "stu"), ("teacher", "tea")):
        prefix = f"{who}."
        own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        arguments = encoder_arguments(config[who], own)
        chosen = jnp.asarray(config[f"selected_{who}_layers"])
        if who == "teacher" and short == "ce":
            arguments["binary_head"] = any(k.startswith("binary.") for k in own)
            module, variables = jaxmodels.load("retrieval.cross_encoder", own, **arguments)
            every = module.apply(variables, x["ce_ids"], x.get("ce_mask"), method="layer_relevance")
            outputs |= {"teacher_logits": every[-1], "tea_layer_scores": every}
            scores[who] = lead.cross_scores(every, chosen)
            continue
        module, variables = jaxmodels.load(
            "retrieval.dual_encoder", own, share_weight=config["share_weight"], **arguments
        )
        query = _states(module, variables, x["query_ids"], x.get("query_mask"), "query")
        document = _states(module, variables, x["doc_ids"], x.get("doc_mask"), "document")
        outputs[f"{name}_q_hidden"], outputs[f"{name}_d_hidden"] = query, document
        if who == "teacher" and short == "col":
            mask = x.get("doc_mask", x["doc_ids"] != 0)
            scores[who] = lead.late_scores(query, document, mask, chosen, scale)
            outputs["tea_q_emb"], outputs["tea_d_emb"] = unit(query[:, -1]), unit(document[:, -1])
            continue
        outputs[f"{name}_q_emb"], outputs[f"{name}_d_emb"] = module.apply(
            variables, x["query_ids"], x.get("query_mask"), x["doc_ids"], x.get("doc_mask")
        )
        scores[who] = lead.dual_scores(query, document, chosen, scale)
    objective = _objective(case)
    terms = objective(scores["student"], scores["teacher"])
    return outputs | _terms(terms, short, objective.train_teacher)
