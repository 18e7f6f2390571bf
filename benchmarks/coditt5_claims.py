"""CoditT5's claims on held-out files: plans against plain generation, and re-ranking both ways.

python -m benchmarks.coditt5_claims --plans RUN --generator RUN [--path DATA] [--beams 5]
    [--examples 256]

RUN are finished runs of `configs/coditt5.py` and `configs/coditt5.py:generator`.
"""

from __future__ import annotations

import argparse

from benchmarks.measure import markdown
from configs.coditt5 import get_config
from jaxmodels.language import edit_metrics
from train.data import edits
from train.initialization import starting_variables
from train.loop import Plan, compilation_cache
from train.rerank import rerank

METRICS = ("exact_match", "copy_rate", "bleu4", "sari", "gleu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", required=True)
    parser.add_argument("--generator", required=True)
    parser.add_argument("--path")
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--examples", type=int, default=256)
    arguments = parser.parse_args()
    compilation_cache()
    models = {}
    for name, preset, run in (
        ("CoditT5", "small", arguments.plans),
        ("generator", "generator", arguments.generator),
    ):
        config = get_config(preset)
        config.data.options.path = arguments.path
        config.data.options.evaluated = arguments.examples
        config.init_from = run
        plan = Plan(config)
        params, _ = starting_variables(config, plan.abstract, plan.task, plan.make)
        models[name] = (plan.task, {"params": params})
    examples = edits.eval_examples("test", models["CoditT5"][0].options)
    old, new = [e.old for e in examples], [e.new for e in examples]
    rows = [row("copying the input", old, new, old)]
    lines = [(text, []) for text in old]
    for name, other in (("CoditT5", "generator"), ("generator", "CoditT5")):
        found = rerank(*models[name], *models[other], lines, arguments.beams)
        rows.append(row(name, [r.targets[0] for r in found], new, old))
        best = [r.targets[r.best] for r in found]
        rows.append(row(f"{name} re-ranked by {other}", best, new, old))
        within = [new[i] if new[i] in r.targets else "" for i, r in enumerate(found)]
        rows.append(row(f"{name}, the best of its {arguments.beams}", within, new, old))
    print(markdown(["system", *METRICS], rows))


def row(name: str, predictions: list[str], new: list[str], old: list[str]) -> list[str]:
    """One line of the table, scores x 100."""
    scores = edit_metrics.scores(predictions, new, old)
    return [name, *(f"{scores[m]:.1f}" for m in METRICS)]


if __name__ == "__main__":
    main()
