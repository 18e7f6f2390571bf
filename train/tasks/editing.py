"""Editing with CoditT5: the model writes an edit plan and the new text, or the new text alone."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmodels.language import decoding, edit_metrics, edit_plans, t5, t5_generation
from train.building import build_model
from train.data import code_tokenizer, edits, pipeline
from train.naming import ConfigError

METRICS = ("exact_match", "bleu4", "sari", "gleu", "copy_rate")


@dataclasses.dataclass(frozen=True)
class Editing:
    """A T5 from `input_ids` [B, S] to `labels` [B, T], both padded with 0, scored by its edits.

    Attributes:
      model: `jaxmodels.language.t5.T5`.
      data: the options of the data family, for its tokenizer and its kind of target.
      count_padding: the loss counts padding as labels, as the official code does (its micro-batches
        of one have none); else it is the mean over real labels.
      example_mean: the mean over examples of each one's mean over its labels, which is what the
        official micro-batches of one come to; else the mean over all labels of the batch.
      eval_beams: beams of the evaluations during training; 0 evaluates the loss alone.
      test_beams: beams of the final report and of predictions.
      comments: sub-tokenize before scoring, as the comment-updating task does.
      report_split: split of the final report, "" for none.
    """

    model: nn.Module
    data: tuple[tuple[str, Any], ...]
    count_padding: bool = False
    example_mean: bool = False
    eval_beams: int = 5
    test_beams: int = 20
    comments: bool = False
    report_split: str = "test"

    weighted_by = "averaged"

    @property
    def options(self) -> dict[str, Any]:
        """Options of the data family."""
        return dict(self.data)

    @property
    def writes_plans(self) -> bool:
        """Whether the model writes plans before its targets."""
        return self.options["target"] == "plan"

    def init(self, rng: jax.Array, batch) -> tuple[Any, Any]:
        """Fresh parameters; no other collections."""
        ids = batch["input_ids"][:1, :8]
        return self.model.init(rng, ids, ids)["params"], {}

    def _logits(self, params, batch, train, rng=None, *, count_padding=None):
        labels = batch["labels"]
        if not (self.count_padding if count_padding is None else count_padding):
            labels = t5.ignore_padding(labels)
        return labels, self.model.apply(
            {"params": params},
            batch["input_ids"],
            t5.shift_right(labels, self.model.decoder_start_token_id, self.model.pad_token_id),
            batch["input_ids"] != self.model.pad_token_id,
            train,
            rngs={"dropout": rng} if train else {},
        )

    def loss(self, params, extra, batch, rng):
        """Mean NLL of the labels, and the share of them that are the likeliest token.

        `averaged` is the number of labels, or of examples, that the loss is the mean of.
        """
        labels, logits = self._logits(params, batch, True, rng)
        counted = labels != t5.LABEL_PADDING
        hits = (logits.argmax(-1) == labels) & counted
        averaged = counted.sum().astype(jnp.float32)
        metrics = {"token_accuracy": hits.sum() / jnp.maximum(averaged, 1)}
        if self.example_mean:
            loss, averaged = -t5.likelihood(logits, labels).mean(), jnp.float32(len(labels))
        else:
            loss = t5.mean_nll(logits, labels)
        return loss, (extra, {**metrics, "averaged": averaged})

    def evaluate(self, variables, batch):
        """Sums of row losses over unpadded rows, and what was generated, for `score`."""
        labels, logits = self._logits(variables["params"], batch, False)
        loss = -t5.likelihood(logits, labels)
        sums = {"loss": (loss * batch["mask"]).sum(), "count": batch["mask"].sum()}
        if not self.eval_beams:
            return sums
        found = self._generate(variables, batch["input_ids"], self.eval_beams, 1)
        rows = {k: batch[k] for k in ("input_ids", "labels", "mask")}
        return {**sums, "generated": found.tokens[:, 0], **rows}

    def score(self, sums):
        """Text metrics of the generated rows, as sums of numbers between 0 and 100."""
        if "generated" not in sums:
            return sums
        real = np.asarray(sums["mask"]) > 0
        bpe = edits.tokenizer(self.options)
        rows = [
            [bpe.decode(row) for row in np.asarray(sums[name])[real]]
            for name in ("input_ids", "labels")
        ]
        # An input is decoded up to its first </s>: that is the old text.
        old, new = rows[0], [self.target_of(text) for text in rows[1]]
        written = [bpe.decode(row[1:]) for row in np.asarray(sums["generated"])[real]]
        found = {"loss": sums["loss"], "count": sums["count"]}
        found["output_bleu4"] = sum(map(self._bleu4, written, rows[1]))
        return {**found, **self._text_sums(written, new, old)}

    def _bleu4(self, written: str, wanted: str) -> float:
        """BLEU-4 of a whole output, its plan included: what the published recipe selects by."""
        pair = (edit_metrics.subtokenize(t) if self.comments else t for t in (written, wanted))
        return edit_metrics.bleu4(*(" ".join(t.split()) for t in pair))

    def target_of(self, text: str) -> str:
        """The new text of a model's output."""
        return " ".join(edit_plans.split_prediction(text)[0])

    def _text_sums(self, written: Sequence[str], new: Sequence[str], old: Sequence[str]):
        names = [*METRICS, *(("consistent", "unparsed") if self.writes_plans else ())]
        if not written:
            return dict.fromkeys(names, 0.0)
        predictions = [self.target_of(text) for text in written]
        texts = [[" ".join(t.split()) for t in part] for part in (predictions, new, old)]
        means = edit_metrics.scores(*texts, comments=self.comments)
        if self.writes_plans:
            parts = [edit_plans.split_prediction(text) for text in written]
            means["consistent"] = 100 * np.mean(
                [edit_plans.explains(plan, o.split(), t) for (t, plan, _), o in zip(parts, old)]
            )
            means["unparsed"] = 100 * np.mean([not parsed for *_, parsed in parts])
        return {name: means[name] * len(written) for name in names}

    def _generate(self, variables, input_ids, beams, returned):
        return t5_generation.generate(
            self.model,
            variables,
            input_ids,
            input_ids != self.model.pad_token_id,
            max_length=self.options["max_target"],
            num_beams=beams,
            num_return_sequences=returned,
        )

    @functools.cached_property
    def _compiled(self):
        return jax.jit(self._generate, static_argnums=(2, 3)), jax.jit(self._likelihood)

    def _likelihood(self, variables, batch):
        # Padding never counts here, whatever the loss does: outputs differ in length.
        labels, logits = self._logits(variables["params"], batch, False, count_padding=False)
        return t5.likelihood(logits, labels)

    def hypotheses(
        self, variables, sources: Sequence[str], *, beams: int, returned: int = 1, rows: int = 16
    ) -> list[list[str]]:
        """Decoded outputs, best first, `returned` an input; inputs are encoded as in training."""
        bpe, options = edits.tokenizer(self.options), self.options
        found: list[list[str]] = []
        for start in range(0, len(sources), rows):
            part = [
                code_tokenizer.padded(
                    bpe.encode(text), options["max_source"], truncate=options["truncate"]
                )
                for text in sources[start : start + rows]
            ]
            ids = np.zeros((rows, options["max_source"]), np.int32)
            ids[: len(part)] = part
            ids[len(part) :, 0] = code_tokenizer.EOS
            t5.check_tokens(ids, self.model)
            tokens = np.asarray(self._compiled[0](variables, ids, beams, returned).tokens)
            found += [[bpe.decode(row[1:]) for row in tokens[i]] for i in range(len(part))]
        return found

    def likelihoods(
        self, variables, sources: Sequence[str], outputs: Sequence[Sequence[str]], rows: int = 16
    ) -> np.ndarray:
        """Minus the mean token NLL `[N, K]` of K outputs for each source, by teacher forcing."""
        bpe, options = edits.tokenizer(self.options), self.options
        pairs = [(s, o) for s, group in zip(sources, outputs, strict=True) for o in group]
        scores: list[float] = []
        for start in range(0, len(pairs), rows):
            part = pairs[start : start + rows]
            part += [part[-1]] * (rows - len(part))
            batch = {
                name: np.stack(
                    [
                        code_tokenizer.padded(bpe.encode(pair[side]), options[size], truncate=True)
                        for pair in part
                    ]
                )
                for side, (name, size) in enumerate(
                    (("input_ids", "max_source"), ("labels", "max_target"))
                )
            }
            scores += np.asarray(self._compiled[1](variables, batch)).tolist()
        return np.asarray(scores[: len(pairs)]).reshape(len(sources), -1)

    def report(self, variables, sums, config) -> dict[str, float]:
        """Metrics of the report's split at `test_beams`, beside those of copying the input."""
        if not self.report_split:
            return {}
        examples = edits.eval_examples(self.report_split, self.options)
        sources, old, new = ([getattr(e, n) for e in examples] for n in ("source", "old", "new"))
        written = [h[0] for h in self.hypotheses(variables, sources, beams=self.test_beams)]
        found = self._text_sums(written, new, old)
        numbers = {f"{self.report_split}_{k}": v / len(new) for k, v in found.items()}
        copied = edit_metrics.scores(old, new, old, comments=self.comments)
        return {**numbers, **{f"copying_{k}": copied[k] for k in METRICS if k != "copy_rate"}}

    def predict(self, variables, path, config):
        """Rows (line, prediction, plan, consistent, parsed) for lines `old <s> context <s> ...`."""
        lines = edits.read_lines(path)
        sources = [edit_plans.model_input(old, contexts) for old, contexts in lines]
        rows: list[tuple] = [("line", "prediction", "plan", "consistent", "parsed")]
        for n, ((old, _), written) in enumerate(
            zip(lines, self.hypotheses(variables, sources, beams=self.test_beams)), 1
        ):
            target, plan, parsed = edit_plans.split_prediction(written[0])
            agrees = edit_plans.explains(plan, old.split(), target)
            rows.append((n, " ".join(target), " ".join(plan), int(agrees), int(parsed)))
        return rows


def from_config(config) -> Editing:
    """The task of a config: its T5, the data's options, and `task_args`."""
    model = build_model(config)
    options = pipeline.resolve(config.data)[1]
    if not isinstance(model, t5.T5):
        raise ConfigError(f"config.model: editing wants a language.t5, not {config.model}")
    # Ids beyond the embedding would be clipped without a word.
    if options["tokenizer"]:
        edits.tokenizer(options).check_rows(model.vocab_size)
    elif options["vocabulary"] > model.vocab_size:
        raise ConfigError(
            f"config.model_args.vocab_size: {model.vocab_size} rows for data.options.vocabulary of "
            f"{options['vocabulary']} tokens (edit tokens included)"
        )
    if options["task"] in edits.FILES and options["path"]:
        _check_files(options, model, config.task_args.get("report_split", Editing.report_split))
    comments = options["task"] in edits.FILES and options["dataset"] == "comment-update"
    arguments = {"comments": comments, **config.task_args}
    task = Editing(model=model, data=_frozen(options), **arguments)
    for name in ("eval_beams", "test_beams"):
        beams = getattr(task, name)
        if beams or name == "test_beams":
            try:
                decoding.check_beams(beams, 1, model.vocab_size)
            except ValueError as error:
                raise ConfigError(f"config.task_args.{name}: {error}") from None
    return task


def _check_files(options: Mapping[str, Any], model: t5.T5, report_split: str) -> None:
    """Say at the start what a run would otherwise miss after its first epoch, or never tell."""
    if not options["tokenizer"] and options["vocabulary"] != model.vocab_size:
        raise ConfigError(
            "config.data.options.tokenizer: the folder of the model's vocab.json and merges.txt is "
            f"wanted; one trained on the data would have data.options.vocabulary = "
            f"{options['vocabulary']} tokens, the model has {model.vocab_size} rows"
        )
    for split in filter(None, (edits.SPLITS[1], report_split)):
        edits.check_split(split, options)


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple((k, tuple(v) if isinstance(v, list | tuple) else v) for k, v in options.items())
