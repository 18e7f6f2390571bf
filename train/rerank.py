"""One model's beam re-ranked by another, in either direction (CoditT5, arXiv 2208.05446).

python -m train.rerank --config FILE --checkpoint RUN --reranker_config FILE --reranker RUN
    --input FILE --output FILE
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jaxmodels.platform_choice import choose_platform

choose_platform()

from jaxmodels.language import edit_metrics, edit_plans, reranking  # noqa: E402
from train.command_line import load_config, read_flags, stop_with_one_line  # noqa: E402
from train.naming import ConfigError  # noqa: E402
from train.predict import predict_from  # noqa: E402

FLAGS = {
    "checkpoint": "the model that writes: a run directory or a PyTorch checkpoint",
    "reranker_config": "the config of the model that re-ranks",
    "reranker": "its run directory or PyTorch checkpoint",
    "input": "a file of lines `old <s> context1 <s> context2`",
    "output": "the CSV file to write",
}
# What the second model shares with the first: where data and vocabulary are.
SHARED = (
    "path",
    "tokenizer",
    "vocabulary",
    "vocabulary_of",
    "packages",
    "repository",
    "dataset",
    "limit",
    "words",
)


class Reranked(NamedTuple):
    """Hypotheses of one input, best first as the base has them, and which of them won."""

    targets: list[str]
    best: int


def scored_form(task, old: str, hypothesis: str, *, own: bool) -> str:
    """What a model scores of a hypothesis: `plan <s> target`, or the target alone.

    The plan is the hypothesis's own, or, for another model's hypothesis (`own` false), the diff
    between the old text and its target; comments are then without @return, @param and @throws.
    """
    target, plan, _ = edit_plans.split_prediction(hypothesis)
    text = " ".join(target)
    if task.comments and not own:
        old, text = (edit_metrics.remove_tags(t) for t in (old, text))
    if not task.writes_plans:
        return text
    return f"{' '.join(plan)} <s> {text}" if own else edit_plans.model_output(old, text)


def rerank(
    base,
    variables,
    reranker,
    reranker_variables,
    lines: Sequence[tuple[str, list[str]]],
    beams: int,
) -> list[Reranked]:
    """Re-rank `base`'s beam by the sum of both models' mean token log-likelihoods.

    Args:
      base, reranker: `train.tasks.editing.Editing` tasks, with their variables.
      lines: (old, contexts) of every input.
      beams: hypotheses an input (the paper's 20).
    """
    old = [line[0] for line in lines]
    sources = [edit_plans.model_input(*line) for line in lines]
    written = base.hypotheses(variables, sources, beams=beams, returned=beams)

    def forms(task, own):
        pairs = zip(old, written)
        return [[scored_form(task, o, h, own=own) for h in group] for o, group in pairs]

    best = reranking.best_indices(
        base.likelihoods(variables, sources, forms(base, own=True)),
        reranker.likelihoods(reranker_variables, sources, forms(reranker, own=False)),
    )
    targets = [[base.target_of(h) for h in group] for group in written]
    return [Reranked(group, int(i)) for group, i in zip(targets, best)]


def main(argv: list[str]) -> int:
    """Load both models and write (line, prediction, rank, first) as CSV."""
    config, paths = read_flags(argv, need_workdir=False, strings=FLAGS)
    from train.data import edits
    from train.initialization import starting_variables
    from train.loop import Plan
    from train.process import prepare_process

    prepare_process()
    if not Path(paths["input"]).is_file():
        raise ConfigError(f"--input {paths['input']}: no such file")
    other = load_config(paths["reranker_config"])
    for key in SHARED:
        if key in config.data.options:
            other.data.options[key] = config.data.options[key]
    loaded = []
    for one, checkpoint in ((config, paths["checkpoint"]), (other, paths["reranker"])):
        predict_from(one, checkpoint)
        plan = Plan(one)
        if not hasattr(plan.task, "likelihoods"):
            raise ConfigError(f"config.task {one.task}: re-ranking wants the task editing")
        params, extra = starting_variables(one, plan.abstract, plan.task, plan.make)
        loaded.append((plan.task, {"params": params, **extra}))
    lines = edits.read_lines(paths["input"])
    found = rerank(*loaded[0], *loaded[1], lines, loaded[0][0].test_beams)
    rows = [("line", "prediction", "rank", "first")]
    rows += [(n, r.targets[r.best], r.best, r.targets[0]) for n, r in enumerate(found, 1)]
    output = Path(paths["output"])
    part = output.with_name(output.name + ".part")
    with open(part, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    part.replace(output)
    print(f"{len(found)} predictions in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(stop_with_one_line(main, sys.argv))
