"""GanLM trained: the paper's recipes on small files, the mesh, schedules, prediction."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.data.test_ganlm_data import PIECES, SIZE, corpus, pairs  # noqa: F401
from train import predict, vocabulary
from train.__main__ import main
from train.building import build_task
from train.checkpoints import load_params
from train.command_line import read_flags, stop_with_one_line
from train.data import documents, pipeline
from train.data.fairseq_files import mask_id
from train.loop import Plan
from train.naming import ConfigError

SMALLER = {
    "embed_dim": 32,
    "encoder_ffn_embed_dim": 32,
    "decoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_layers": 1,
    "generator_decoder_layers": 1,
    "discriminator_decoder_layers": 1,
    "max_source_positions": 40,
    "max_target_positions": 40,
    "vocab_size": SIZE,
}


def flags(preset, **changes):
    given = {f"model_args.{k}": v for k, v in SMALLER.items()}
    given |= {
        "data.options.workers": 0,
        "data.options.vocab_size": SIZE,
        "precision": "float32",
        "optimizer.accumulate": 1,
        "parallel.data": 1,
        "parallel.fsdp": 1,
        "batch_size": 8,
        "steps": 20,
        "schedule.peak": 0.005,
        "schedule.warmup_steps": 5,
        "log_every": 5,
        "eval.every": 0,
        "eval.batch_size": 8,
        "checkpoint.every": 10,
    }
    given |= changes
    return ["train", f"--config=configs/ganlm.py:{preset}"] + [
        f"--config.{k}={v}" for k, v in given.items()
    ]


def pretraining(folder, **changes):
    return flags(
        "paper",
        **{
            "data.options.path": folder,
            "data.options.prepared": folder / "prepared",
            "data.options.max_tokens": 32,
            "task_args.mask_id": mask_id(PIECES),
        },
        **changes,
    )


def rows_of(workdir, kind="train"):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def paper_run(corpus, tmp_path_factory):  # noqa: F811
    workdir = tmp_path_factory.mktemp("ganlm")
    assert main([*pretraining(corpus), f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def tuning(corpus, pairs, tmp_path_factory):  # noqa: F811
    """Pairs in the pieces of the corpus, and its model for reading text."""
    root = tmp_path_factory.mktemp("tuning") / "pairs"
    shutil.copytree(pairs, root)
    for side in ("dict.de.txt", "dict.en.txt", "sw/input0/dict.txt", "sw/input1/dict.txt"):
        shutil.copy(corpus / "dict.txt", root / side)
    shutil.copy(corpus / "spm.model", root)
    return root


def test_the_paper_recipe_runs_twenty_steps_on_text_shards(paper_run):
    rows = rows_of(paper_run)
    assert [row["step"] for row in rows] == [5, 10, 15, 20]
    assert rows[-1]["generator_loss"] < rows[0]["generator_loss"]
    assert rows[0]["discriminator_weight"] == 10 and rows[0]["denoising_weight"] == 1
    report = (paper_run / "report.md").read_text()
    for name in ("majority_accuracy", "verdict_entropy", "detection_accuracy", "unigram_entropy"):
        assert name in report


def test_a_killed_run_resumed_ends_where_the_whole_one_did(paper_run, corpus, tmp_path):  # noqa: F811
    words = pretraining(corpus)
    config, _ = read_flags([*words, f"--workdir={tmp_path}"], need_workdir=True)
    shutil.copytree(paper_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    assert main([*words, f"--workdir={tmp_path / 'run'}"]) == 0
    whole, resumed = (load_params(p, ema=False)["params"] for p in (paper_run, tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    del config


def test_the_schedule_of_the_extra_losses_follows_the_update(corpus, tmp_path):  # noqa: F811
    words = pretraining(
        corpus,
        **{
            "task_args.discriminator_warmup_steps": 10,
            "task_args.discriminator_start_warmup_steps": 5,
            "steps": 10,
        },
    )
    assert main([*words, f"--workdir={tmp_path}"]) == 0
    weights = [row["discriminator_weight"] for row in rows_of(tmp_path)]
    np.testing.assert_allclose(weights, [0, np.mean([0, 1, 2, 3, 4])], atol=1e-6)
    # Evaluation knows no schedule: it measures every loss.
    measured = rows_of(tmp_path, "eval")[-1]
    assert measured["discriminator_loss"] > 0 and measured["denoising_loss"] > 0


def gradient_step(config, devices):
    """Parameters after one step of the plan on its first batch."""
    from train.data import pipeline

    plan = Plan(config, devices)
    state = plan.run.place(plan.fresh())
    batch = next(pipeline.train_batches(config.data, batch_size=8, seed=0))
    # Rows of unequal numbers of targets, so that a mean of means would show.
    batch["targets"][:4, 2:] = 1
    state, measured = plan.run.step(state, plan.run.put(batch))
    return jax.device_get(plan.run.whole(state).params), jax.device_get(measured)


def test_a_step_on_eight_devices_is_the_step_on_one(corpus):  # noqa: F811
    # Without draws, which follow the key and the batch's own shape alone, nothing is random.
    changes = {
        "model_args.dropout": 0.0,
        "model_args.attention_dropout": 0.0,
        "optimizer.name": "sgd",
    }
    wanted = None
    for spread in ({}, {"parallel.data": 4, "parallel.fsdp": 2}):
        words = pretraining(corpus, **{**changes, **spread})
        config, _ = read_flags([*words, "--workdir=x"], need_workdir=True)
        with config.unlocked():
            config.optimizer.args = {}
        devices = jax.devices() if spread else jax.devices()[:1]
        params, measured = gradient_step(config, devices)
        if wanted is None:
            wanted = params, measured
        for name in ("generator_loss", "discriminator_loss", "denoising_loss", "loss"):
            np.testing.assert_allclose(measured[name], wanted[1][name], rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, wanted[0])


def test_micro_batches_weigh_by_their_targets(corpus):  # noqa: F811
    # Cross-entropy alone: its sum over all targets does not depend on how rows are grouped.
    results = []
    for accumulate in (1, 4):
        words = pretraining(
            corpus,
            **{
                "model_args.dropout": 0.0,
                "model_args.attention_dropout": 0.0,
                "optimizer.name": "sgd",
                "optimizer.accumulate": accumulate,
                "task_args.discriminator_weight": 0.0,
                "task_args.inconsistency_weight": 0.0,
            },
        )
        config, _ = read_flags([*words, "--workdir=x"], need_workdir=True)
        with config.unlocked():
            config.optimizer.args = {}
        results.append(gradient_step(config, jax.devices()[:1]))
    np.testing.assert_allclose(results[0][1]["loss"], results[1][1]["loss"], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), results[0][0], results[1][0]
    )


def test_fine_tuning_to_generate_starts_from_pre_training_and_writes_text(
    paper_run, tuning, tmp_path
):
    words = flags(
        "xsum",
        **{
            "data.options.path": tuning,
            "data.options.max_source": 12,
            "data.options.max_target": 8,
            "task_args.mask_id": mask_id(PIECES),
            "task_args.decoded": 5,
            "task_args.search.max_len_b": 6,
            "task_args.search.min_len": 1,
            "init_from": paper_run,
        },
    )
    assert main([*words, f"--workdir={tmp_path}"]) == 0
    rows = rows_of(tmp_path)
    assert rows[-1]["generator_loss"] < rows[0]["generator_loss"]
    report = (tmp_path / "report.md").read_text()
    for name in ("bleu", "rougeL", "greedy_bleu", "greedy_exact_match"):
        assert f"| {name} |" in report
    (tmp_path / "lines.txt").write_text("ba di\nku mo\n", "utf-8")
    words = [w for w in words if "init_from" not in w]
    out = [f"--checkpoint={tmp_path}", f"--input={tmp_path / 'lines.txt'}",
           f"--output={tmp_path / 'out.csv'}"]  # fmt: skip
    assert predict.main([*words, *out]) == 0
    lines = (tmp_path / "out.csv").read_text().splitlines()
    assert lines[0] == "line,text,score"
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2"]


def test_a_run_keeps_its_pieces_and_other_data_are_read_with_them_or_refused(
    paper_run, corpus, tuning, tmp_path  # noqa: F811
):  # fmt: skip
    def config_of(words):
        return read_flags([*words, "--workdir=x"], need_workdir=True)[0]

    other = tmp_path / "other"
    shutil.copytree(corpus, other, ignore=shutil.ignore_patterns("prepared"))
    # Other text: a dictionary of as many pieces in another order.
    lines = (other / "dict.txt").read_text("utf-8").splitlines()
    (other / "dict.txt").write_text("\n".join(lines[::-1]) + "\n", "utf-8")
    with pytest.raises(ConfigError, match="not the vocabulary of these data: they have changed"):
        vocabulary.keep(paper_run, config_of(pretraining(other)))
    started = config_of(pretraining(other, init_from=paper_run))
    build_task(started)
    vocabulary.keep(tmp_path / "run", started)
    kept = [documents.symbols(pipeline.resolve(c.data)[1])
            for c in (started, config_of(pretraining(corpus)))]  # fmt: skip
    assert kept[0] == kept[1]
    # Binarized pairs are tokens of their own dictionary.
    moved = tmp_path / "pairs"
    shutil.copytree(tuning, moved)
    for file in moved.glob("dict.*.txt"):
        file.write_text("\n".join(lines[::-1]) + "\n", "utf-8")
    binarized = config_of(flags("xsum", **{"data.options.path": moved, "init_from": paper_run}))
    with pytest.raises(ConfigError, match="another vocabulary than these data: token 4 is"):
        vocabulary.keep(tmp_path / "tuned", binarized)


def test_fine_tuning_to_understand_starts_from_pre_training_and_labels_pairs(
    paper_run, tuning, tmp_path
):
    words = flags(
        "xnli",
        **{
            "data.options.path": tuning,
            "data.options.max_tokens": 20,
            "data.options.languages": "('sw',)",
            "data.options.eval_languages": "('sw',)",
            "init_from": paper_run,
            "init_skip": "classification_heads",
        },
    )
    assert main([*words, f"--workdir={tmp_path}"]) == 0
    assert "majority_accuracy" in (tmp_path / "report.md").read_text()
    (tmp_path / "lines.txt").write_text("ba di\tku\n", "utf-8")
    # `init_skip` was for the pre-trained checkpoint: the run's own has the head that it learned.
    words = [w for w in words if "init_from" not in w]
    out = [f"--checkpoint={tmp_path}", f"--input={tmp_path / 'lines.txt'}",
           f"--output={tmp_path / 'out.csv'}"]  # fmt: skip
    assert predict.main([*words, *out]) == 0
    label = (tmp_path / "out.csv").read_text().splitlines()[1].split(",")[1]
    assert label in ("yes", "no", "maybe")
    head = "classification_heads.sentence_classification_head"
    taken, learned = predict.load_run([*words, *out])[3], load_params(tmp_path, ema=False)
    jax.tree.map(np.testing.assert_array_equal, taken["params"][head], learned["params"][head])


MISTAKES = {
    "--config.task_args.mask_id=999": "mask_id 999 and its 100 sentinels lie outside",
    "--config.model_args.initialization_strategy=generator": "pre-training needs a generator and",
    "--config.model_args.initialization_strategy=both2": "'both2'; known: pretraining",
    "--config.task_args.discriminator_sampling_temperature=0": "must be positive, not 0",
    "--config.task_args.lambda_d=3": "unexpected keyword argument 'lambda_d'",
    "--config.model_args.embed_dim=33": "33 is not divisible by encoder_attention_heads 2",
    "--config.data.options.vocab_size=80": "data.options.vocab_size is 80",
    "--config.model_args.vocab_size=180": f"180 rows for the dictionary of {SIZE} entries",
    "--config.task_args.mask_id=120": "mask_id 120 and its 100 sentinels lie outside",
}


@pytest.mark.parametrize("flag", MISTAKES)
def test_a_mistake_gets_one_line(flag, corpus, tmp_path, capsys):  # noqa: F811
    argv = [*pretraining(corpus), f"--workdir={tmp_path}", flag]
    assert stop_with_one_line(main, argv) == 2
    assert MISTAKES[flag] in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_unknown_argument_of_the_search_is_named(tmp_path, capsys):
    argv = [*flags("xsum"), "--config.task_args.search.beams=3", f"--workdir={tmp_path}"]
    assert stop_with_one_line(main, argv) == 2
    assert "config.task_args.search: no 'beams'" in capsys.readouterr().err
    argv = [*flags("xsum"), "--config.task_args.search.beam_size=0", f"--workdir={tmp_path}"]
    assert stop_with_one_line(main, argv) == 2
    assert "search.beam_size: 1 returned rows from 0 beams" in capsys.readouterr().err


def test_the_head_has_as_many_classes_as_there_are_labels():
    words = flags("xnli", **{"data.options.num_classes": 2})
    config, _ = read_flags([*words, "--workdir=x"], need_workdir=True)
    with pytest.raises(ConfigError, match="num_classes: 3 classes for the 2 labels"):
        build_task(config)


def test_all_three_passes_need_the_place_of_the_mask():
    config, _ = read_flags([*flags("xsum"), "--workdir=x"], need_workdir=True)
    with config.unlocked():
        del config.task_args.mask_id
    with pytest.raises(ConfigError, match="mask_id: strategy 'both' needs the index of <mask>"):
        build_task(config)
    with config.unlocked():
        config.model_args.initialization_strategy = "generator"
    assert build_task(config).objective.mask_id == SIZE - 101
