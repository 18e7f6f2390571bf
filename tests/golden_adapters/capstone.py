"""CAPSTONE's cases: schedules, parts, ROUGE, expanded documents, many views."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxmodels
from jaxmodels.interop import checkpoint
from jaxmodels.language import porter_stemmer, rouge
from jaxmodels.retrieval import capstone
from tests.golden_case import adapter_of
from train.data.expansion import hard_negatives
from train.data.wordpiece import WordPiece, cross_row, padded


def run(case) -> dict[str, Any]:
    """Every wanted output of one case."""
    for start, function in {
        "TraditionDataset.reset_select_generated_query": _schedule,
        "TraditionDataset.create_passage_queries": _relevance,
        "PorterStemmer": _porter,
        "TraditionDataset.__getitem__": _batch,
        "RenewTools": _retrieval,
        "BiBertEncoder": _views,
    }.items():
        if case.model.startswith(start):
            return function(case)
    raise ValueError(f"no call for {case.model!r}")


def _schedule(case):
    outputs = {}
    for j, arguments in enumerate(case.config["cases"]):
        gold = arguments["mode"] == "gradual-gold"
        selection = capstone.Selection.parse(
            arguments["mode"], arguments["total_part"], arguments.get("gold_query_prob", 0.0)
        )
        parts = capstone.curriculum_part(
            case.inputs[f"{j}.step"], arguments["max_steps"], arguments["total_part"], gold
        )
        outputs[f"{j}.part"] = parts
        outputs[f"{j}.gold_prob"] = np.array(
            [selection.at_part(int(p)).gold_query_prob for p in parts]
        )
    return outputs


def _relevance(case):
    real, pseudo = str(case.inputs["query"]), [str(q) for q in case.inputs["pseudo_queries"]]
    ranked = capstone.rank_pseudo_queries(
        real,
        pseudo,
        metric=case.config["metric"],
        filter_threshold=case.config.get("filter_threshold", 1.0),
    )
    named = dict(zip(ranked.queries, ranked.scores))
    ordered = sorted(named)
    rows = [
        (n, k, *capstone.part_range(len(named), n, k), len(named))
        for n, k in case.outputs["part_ranges"][:, :2].tolist()
    ]
    return {
        "unique_queries": np.array(ordered),
        "rouge_l": np.array([named[q] for q in ordered]),
        "score_by_rank": ranked.scores[ranked.order],
        "part_ranges": np.array(rows),
    }


def _porter(case):
    pairs = zip(case.inputs["reference"], case.inputs["prediction"])
    return {
        "stems": np.array([porter_stemmer.porter_stem(str(w)) for w in case.inputs["words"]]),
        "rouge_l": np.concatenate([rouge.rouge_l(str(r), [str(p)]) for r, p in pairs]),
    }


def _batch(case):
    config, inputs = case.config, case.inputs
    words = WordPiece([str(w) for w in inputs["vocab"]], config["do_lower_case"])
    length, query_length = config["max_seq_length"], config["max_query_length"]
    text = functools.partial(
        capstone.expand_document,
        mode="append" if config.get("append", True) else "prepend",
        delimiter=capstone.DELIMITERS[config["delimiter"]],
    )
    queries = [words.query(str(q), query_length) for q in inputs["questions"]]
    fields = [inputs[k] for k in ("titles", "texts")]
    pseudo = inputs.get("pseudo_query")  # none where documents are not expanded
    rows, cross, positive = [], [], []
    for query, candidates in zip(queries, inputs["candidate_docs"].tolist()):
        first, *negatives = [c for c in candidates if c >= 0]
        chosen = [first, *hard_negatives(negatives, config["number_neg"])]
        documents = [
            words.single(
                text(*(str(f[c]) for f in fields), None if pseudo is None else str(pseudo[c])),
                length,
            )
            for c in chosen
        ]
        positive.append(len(rows))
        rows += documents
        cross += [cross_row(query, d, last=True) for d in documents]
    # The official rows are padded to the longest of the batch, ours to one length for all batches.
    query_ids, doc_ids, cross = (padded(r, max(map(len, r))) for r in (queries, rows, cross))
    cross = cross.reshape(len(queries), -1, cross.shape[-1])
    return {
        "query_ids": query_ids,
        "query_mask": (query_ids != 0).astype(np.int64),
        "doc_ids": doc_ids,
        "doc_mask": (doc_ids != 0).astype(np.int64),
        "positive_index": np.array(positive),
        "ce_ids": cross,
        "ce_mask": (cross != 0).astype(np.int64),
    }


def _retrieval(case):
    queries, views = case.inputs["query_emb"], case.inputs["view_emb"]
    depth, count = min(case.config["retrieve_depth"], views.shape[1]), case.config["K"]
    outputs = {
        f"rank_max_views_{k}": capstone.search_views(queries, views[:k], depth, "max")[1]
        for k in range(1, count + 1)
    }
    outputs["rank_average"] = capstone.search_views(queries, views, depth)[1]
    for name, reduce in (("max", "max"), ("average", "mean")):
        outputs[f"score_{name}"] = capstone.view_scores(
            jnp.asarray(queries), jnp.asarray(views), reduce
        )
    return outputs


def _views(case):
    shared = adapter_of("dense_retrieval_common")
    config, inputs = case.config, {k: jnp.asarray(v) for k, v in case.inputs.items()}
    tensors = checkpoint.read(case.weights).tensors
    module, variables = jaxmodels.load(
        "retrieval.dual_encoder", case.weights, **shared.encoder_arguments(config, tensors)
    )
    outputs = shared.dual_encoder(module, variables, inputs, config, case.wanted)
    views = module.apply(variables, inputs["view_ids"], method="encode_documents")
    views = views.reshape(-1, config["K"], views.shape[-1])
    return {**outputs, "view_emb": views, "view_mean": capstone.mean_of_views(views)}
