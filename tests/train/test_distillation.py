"""LEAD and PROD as runs: published file formats, joint training, frozen models, resuming."""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import lead as lead_configs
from configs import prod as prod_configs
from tests.train import retrieval_files
from tests.train.stoppable_runs import assert_bit_identical, state_of
from train.data import pipeline
from train.loop import Plan, fit
from train.naming import ConfigError
from train.progression import run_progression, stage_config
from train.step import make_train_step
from train.tasks import lead, prod, ranking


@pytest.fixture(scope="module")
def marco(tmp_path_factory):
    return retrieval_files.write_marco(tmp_path_factory.mktemp("marco"))


@pytest.fixture(scope="module")
def psgs(tmp_path_factory):
    return retrieval_files.write_psgs(tmp_path_factory.mktemp("psgs"))


def single(config):
    """The config as one run."""
    config.order = ()
    return config


def rows(workdir: Path, kind: str):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if r["kind"] == kind]


# -- PROD ------------------------------------------------------------------------------------------


def prod_stage(marco, **changes):
    config = single(retrieval_files.reduce(prod_configs.get_config("paper"), marco))
    config.steps, config.checkpoint.every = 20, 10
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def stage_run(marco, tmp_path_factory):
    """Twenty steps of PROD's third stage, at reduced size."""
    workdir = tmp_path_factory.mktemp("stage")
    numbers = fit(prod_stage(marco), workdir)
    return workdir, numbers


def test_the_papers_stage_runs_twenty_steps_on_marco_files(stage_run):
    workdir, numbers = stage_run
    seen = rows(workdir, "train")
    assert [r["step"] for r in seen] == [5, 10, 15, 20]
    assert all(np.isfinite([r["loss"], r["hard"], r["soft"]]).all() for r in seen)
    assert all(r["regularizer"] > 0 for r in seen)
    assert 0 <= numbers["validation_mrr@10"] <= 1


def test_frozen_models_keep_every_byte_and_have_no_optimizer_memory(stage_run, marco):
    workdir, _ = stage_run
    late = state_of(workdir, 20)
    fresh = Plan(prod_stage(marco)).fresh()
    first = {
        "/".join(("extra", *(k.key for k in path))): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(fresh.extra)[0]
    }
    assert {k.split("/")[1] for k in first} == {"teacher", "frozen"}
    for name, value in first.items():
        assert late[name].tobytes() == value.tobytes(), name
    moments = [k for k in late if k.startswith("opt_state/")]
    assert moments and not [k for k in moments if "teacher" in k or "frozen" in k]
    trained = [k for k in late if k.startswith("params/")]
    # What the stage began with is the frozen copy, not the student of the last step.
    changed = [k for k in trained if (late[k] != late[f"extra/frozen/{k[7:]}"]).any()]
    assert len(changed) > len(trained) / 2


def test_a_stage_that_goes_on_from_its_middle_ends_bit_for_bit_the_same(stage_run, marco, tmp_path):
    workdir, _ = stage_run
    again = tmp_path / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "20")
    fit(prod_stage(marco), again)
    assert_bit_identical(state_of(workdir, 20), state_of(again, 20))


def test_a_stages_run_serves_as_a_plain_dual_encoder(stage_run, marco, tmp_path):
    from train.ranker_search import ranker_of_run, search

    workdir, numbers = stage_run
    ranker = ranker_of_run(workdir)
    found = ranker.retrieval_set("validation")
    ranking = search(ranker, found.query_rows, 24)
    assert found.measure(ranking)["mrr@10"] == pytest.approx(numbers["validation_mrr@10"])
    questions = tmp_path / "questions.txt"
    questions.write_text("\n".join(found.query_texts) + "\n")
    config = prod_stage(marco)
    task = Plan(config).task
    header, *rows_ = task.predict({"params": ranker.params}, questions, config)
    assert header == ("query", "rank", "document", "score") and len(rows_) == 4 * 10
    assert [r[2] for r in rows_[:10]] == [found.document_ids[d] for d in ranking[0, :10]]
    encoder = task.encoder({"params": ranker.params}, "encode_queries", 8, 4, None)
    np.testing.assert_allclose(
        encoder(found.query_rows), ranker.encoder("queries")(found.query_rows), atol=1e-5
    )


def test_a_pretrained_encoder_starts_student_and_cross_encoder(marco, tmp_path):
    import jaxmodels
    from jaxmodels.interop import catalog, checkpoint

    tower = {**retrieval_files.TOWER, "num_hidden_layers": 3}
    module, variables = jaxmodels.load("language.bert", **tower)
    file = tmp_path / "encoder.safetensors"
    checkpoint.write_safetensors(file, catalog.export("language.bert", module, variables))
    config = prod_stage(marco, **{"task_args.student_from": str(file)})
    config.task_args.teacher_from = str(file)
    state = Plan(config).fresh()
    words = variables["params"]["embeddings"]["word_embeddings"]["embedding"]
    for tree in (
        state.params["question_model"],
        state.params["ctx_model"],
        state.extra["frozen"]["ctx_model"],
        state.extra["teacher"]["encoder"],
    ):
        found = tree["embeddings"]["word_embeddings"]["embedding"]
        np.testing.assert_array_equal(found, words)
    config.task_args.student_from = str(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="student_from: no file or directory"):
        Plan(config).fresh()


def test_random_negatives_differ_between_epochs_and_descending_ones_never(marco):
    def of(sampling, seed):
        config = prod_stage(marco)
        config.data.options.update(sampling=sampling, rows=())
        batches = pipeline.train_batches(config.data, batch_size=11, seed=seed)
        epochs = [next(batches)["doc_ids"] for _ in range(3)]
        batches.close()
        # By query: the order of queries is another in every epoch.
        return [e[np.lexsort(e[:, 0].T)] for e in epochs]

    first, second, third = of("random", 1)
    assert (first != second).any() and (second != third).any()
    chex.assert_trees_all_equal(of("random", 1), [first, second, third])
    assert (of("random", 2)[0] != first).any()
    hardest = of("descend", 1)
    chex.assert_trees_all_equal(hardest[0], hardest[1], hardest[2])


def short_progression(marco):
    """Warm-up, mining, cross encoder, selection and the last distillation, two steps each."""
    config = retrieval_files.reduce(prod_configs.get_config("paper"), marco)
    config.order = ("W1_student", "M4", "C2", "D1", "D2")
    stages = config.stages
    stages.M4.uses.encoder = "W1_student"
    stages.M4.changes.update(depth=8, count=6)
    stages.C2.uses.data.options.lists = "M4"
    # One block, unscanned: what is looked at is the order of work.
    tower = {**retrieval_files.TOWER, "num_hidden_layers": 1}
    config.model_args = tower
    stages.C2.changes.model_args = tower
    # The official rule wants a teacher that knows something; this one takes any that is better.
    stages.D1.changes.update(rule="nq", window=8, depth=8)
    stages.D2.uses.task_args.student_from = "W1_student"
    config.task_args.teacher_args = tower
    return config


def test_one_command_runs_a_progression_and_a_change_runs_only_what_hangs_on_it(marco, tmp_path):
    config = short_progression(marco)
    numbers = run_progression(config, tmp_path, command="python -m train ...")
    assert numbers["M4.queries"] == retrieval_files.QUERIES and numbers["D1.selected"] >= 1
    assert "D2.validation_mrr@10" in numbers and "| D1 |" in (tmp_path / "report.md").read_text()
    lists = json.loads((tmp_path / "D1" / "lists.json").read_text())
    mined = {e["query_id"]: e for e in json.loads((tmp_path / "M4" / "lists.json").read_text())}
    assert [mined[e["query_id"]] for e in lists] == lists
    buckets = json.loads((tmp_path / "D1" / "buckets.json").read_text())
    assert buckets["student.top1"] + buckets["student.2t15"] <= retrieval_files.QUERIES
    before = {n: (tmp_path / n / "stage.json").stat().st_mtime_ns for n in config.order}
    assert run_progression(config, tmp_path)["D2.loss"] == numbers["D2.loss"]
    config.stages.D1.changes.window = 7
    run_progression(config, tmp_path)
    after = {n: (tmp_path / n / "stage.json").stat().st_mtime_ns for n in config.order}
    assert [n for n in config.order if after[n] != before[n]] == ["D1", "D2"]
    config.stages.D1.changes.update(rule="marco", window=1)
    with pytest.raises(ConfigError, match=r"no confusing query among 12 .*a wider window"):
        run_progression(config, tmp_path)


def test_a_mistake_in_a_late_stage_is_said_before_the_first_one_runs(marco, tmp_path):
    config = short_progression(marco)
    config.task_args.kd_type = "KD_sofmax"
    with pytest.raises(ConfigError, match="kd_type 'KD_sofmax'"):
        run_progression(config, tmp_path)
    assert not list(tmp_path.iterdir())


# -- LEAD ------------------------------------------------------------------------------------------


def lead_config(psgs, preset, **changes):
    config = single(retrieval_files.reduce(lead_configs.get_config(preset), psgs))
    config.task_args.layers = 2
    config.update_from_flattened_dict(changes)
    return config


def batch_of(config):
    batches = pipeline.train_batches(config.data, batch_size=config.batch_size, seed=0)
    batch = next(batches)
    batches.close()
    return jax.tree.map(jnp.asarray, batch)


def test_the_papers_late_interaction_run_makes_twenty_steps_on_its_files(psgs, tmp_path):
    config = lead_config(psgs, "paper_late", steps=20)
    numbers = fit(config, tmp_path)
    seen = rows(tmp_path, "train")
    assert [r["step"] for r in seen] == [5, 10, 15, 20]
    for name in ("loss", "student", "teacher", "response", "layers"):
        assert np.isfinite([r[name] for r in seen]).all(), name
    assert 0 <= numbers["validation_mrr@10"] <= 1


@pytest.mark.parametrize("preset", ["paper", "paper_cross"])
def test_teacher_and_student_move_and_redraws_compile_nothing(psgs, preset):
    config = lead_config(psgs, preset)
    config.task_args.reselect_every = 1
    plan = Plan(config)
    traces = []

    def step(state, batch):
        traces.append(1)
        return plan.step(state, batch)

    compiled = jax.jit(step)
    start = state = plan.fresh()
    batch, drawn = batch_of(config), set()
    for _ in range(3):
        chosen = plan.task.selected(state.extra["progress"]["micro_batches"])
        drawn.add(tuple(np.concatenate(chosen).tolist()))
        state, _ = compiled(state, batch)
    assert len(traces) == 1 and len(drawn) > 1
    for part in ("teacher", "question_model"):
        moved = jax.tree.map(
            lambda a, b: bool((a != b).any()), start.params[part], state.params[part]
        )
        assert sum(jax.tree.leaves(moved)) > len(jax.tree.leaves(moved)) / 2, part


@pytest.mark.parametrize(
    ("configs", "preset"),
    [
        (lead_configs, "small"),
        (lead_configs, "late"),
        (lead_configs, "cross"),
        (prod_configs, "small"),
    ],
)
def test_every_network_of_a_small_preset_is_small(configs, preset):
    """A stage that forgets its sizes trains BERT's, 110 million parameters, without a word."""
    config = configs.get_config(preset)
    for name, one in config.stages.items():
        if one.kind == "train":
            own = stage_config(config, name)
            for arguments in (own.model_args, own.task_args.get("teacher_args")):
                if arguments is not None:
                    assert arguments.hidden_size <= 128 and arguments.num_hidden_layers <= 4, name


@pytest.mark.parametrize(("preset", "blocks"), [("student", 6), ("student_large", 12)])
def test_both_of_leads_students_can_be_read_alone(preset, blocks):
    config = lead_configs.get_config(preset)
    assert (config.task, config.order) == ("ranking", ())
    assert config.model_args.num_hidden_layers == blocks and config.model_args.share_weight
    assert (config.model_args.get("architecture") == "distilbert") == (blocks == 6)


def test_each_model_is_clipped_on_its_own():
    from train.optimizers import clip_by_group_norms

    clip = clip_by_group_norms(2.0, ("^teacher",))
    grads = {"teacher": {"w": jnp.full(4, 50.0)}, "a": jnp.array([3.0]), "b": jnp.array([4.0])}
    clipped, _ = clip.update(grads, clip.init(grads))
    np.testing.assert_allclose(clipped["teacher"]["w"], np.full(4, 1.0), rtol=1e-6)
    np.testing.assert_allclose([clipped["a"][0], clipped["b"][0]], [1.2, 1.6], rtol=1e-6)


def test_a_frozen_teacher_is_no_parameter_and_stays_as_it_is(psgs):
    config = lead_config(psgs, "paper")
    config.task_args.train_teacher = False
    with pytest.raises(ConfigError, match="clip_groups names the teacher"):
        Plan(config)
    config.optimizer.clip_groups = ()
    plan = Plan(config)
    state = plan.fresh()
    assert "teacher" not in state.params
    step = make_train_step(plan.task, plan.optimizer)
    new = jax.jit(step)(state, batch_of(config))[0]
    chex.assert_trees_all_equal(new.extra["teacher"], state.extra["teacher"])


def test_a_mesh_of_eight_computes_what_one_device_does(psgs):
    losses, start = {}, None
    for name, axes in {"one": (1, 1), "eight": (4, 2)}.items():
        config = lead_config(psgs, "paper_late", batch_size=8)
        config.parallel.data, config.parallel.fsdp = axes
        # One block of each model, unscanned: both programs are compiled for this one step.
        config.task_args.layers = 1
        for arguments in (config.model_args, config.task_args.teacher_args):
            arguments.update(num_hidden_layers=1, scan_layers=False)
        plan = Plan(config, jax.devices()[: axes[0] * axes[1]])
        start = plan.fresh() if start is None else start
        batch = {k: np.asarray(v) for k, v in batch_of(config).items()}
        state = plan.run.place(jax.tree.map(jnp.copy, start))
        _, metrics = plan.run.step(state, plan.run.put(batch))
        losses[name] = jax.device_get(metrics)
    chex.assert_trees_all_close(losses["one"], losses["eight"], rtol=2e-5, atol=1e-6)


# -- collections -----------------------------------------------------------------------------------


def mining_config(folder):
    """LEAD's first stages: the negative miner, two steps of it, and the negatives that it finds."""
    config = retrieval_files.reduce(lead_configs.get_config("paper"), folder)
    config.order = ("W_miner", "M")
    config.stages.M.changes.update(depth=12, count=6)
    arguments = config.stages.W_miner.changes.model_args
    arguments.update(num_hidden_layers=1, scan_layers=False)
    return config


@pytest.fixture(scope="module")
def mined(psgs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("mined")
    return workdir, run_progression(mining_config(psgs), workdir)


def test_leads_negatives_are_mined_for_the_queries_of_its_training_file(mined):
    workdir, numbers = mined
    assert numbers["M.queries"] == retrieval_files.QUERIES
    lists = json.loads((workdir / "M" / "lists.json").read_text())
    assert [e["query_string"] for e in lists] == retrieval_files.texts()[1]
    assert all(e["pos_id"] == [str(i)] and len(e["neg_id"]) == 6 for i, e in enumerate(lists))


def test_natural_questions_count_passages_that_contain_an_answer(mined, tmp_path, monkeypatch):
    from train import progression_stages
    from train.data.judged_texts import read_collection, read_lists
    from train.ranker_search import ranker_of_run

    folder = retrieval_files.write_nq(tmp_path / "nq")
    texts = read_collection("nq", str(folder))
    assert texts.document_ids[0] == "1"
    entry = read_lists(folder / "train.json", texts)[3]
    assert entry.positives == (3,) and entry.negatives[0] == 4
    run = tmp_path / "run"
    shutil.copytree(mined[0] / "W_miner", run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["options"] |= {"collection": "nq", "path": str(folder)}
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "M").mkdir()
    progression_stages.mine(tmp_path / "M", encoder=run, depth=24, count=24)
    answers = {q: a[0] for q, a in texts.answers.items()}
    lists = json.loads((tmp_path / "M" / "lists.json").read_text())
    assert len(lists) == retrieval_files.QUERIES
    for one in lists:
        holding = {
            d
            for d, t in zip(texts.document_ids, texts.texts)
            if answers[one["query_id"]] in t.split()
        }
        assert holding and set(one["neg_id"]) == set(texts.document_ids) - holding
    # A teacher that turns the student's order around.
    monkeypatch.setattr(progression_stages, "ranker_of_run", lambda _: ranker_of_run(run))
    monkeypatch.setattr(
        progression_stages,
        "relevance",
        lambda _, queries, ranking: np.arange(ranking.size).reshape(ranking.shape),
    )
    (tmp_path / "D").mkdir()
    lists_file = tmp_path / "M" / "lists.json"
    progression_stages.select(
        tmp_path / "D", lists=lists_file, reranker=run, rule="nq", window=15, depth=24
    )
    with np.load(tmp_path / "M" / "ranking.npz") as stored:
        ids, ranking = stored["query_ids"].tolist(), stored["ranking"]
    wanted = []
    for query, row in zip(ids, ranking):
        hits = [k for k, d in enumerate(row) if answers[query] in texts.texts[int(d)].split()]
        if 23 - hits[-1] < hits[0] and 23 - hits[-1] < 15:
            wanted.append(query)
    kept = json.loads((tmp_path / "D" / "lists.json").read_text())
    assert [e["query_id"] for e in kept] == wanted and 0 < len(wanted) < len(ids)


def test_answers_are_looked_for_in_texts_and_not_in_titles(mined, tmp_path, monkeypatch):
    from train import retrieve

    folder = retrieval_files.write_nq(tmp_path / "nq")
    documents, queries = retrieval_files.texts()
    answers = [f"w{i}" for i in range(4)]
    lines = [f"{q}\t['{a}']\t{i}" for i, (q, a) in enumerate(zip(queries, answers))]
    (tmp_path / "qa.csv").write_text("\n".join(lines) + "\n")
    config = stage_config(mining_config(folder), "W_miner")
    config.data.options.collection = "nq"
    config.retrieve.answers = str(tmp_path / "qa.csv")
    paths = {"checkpoint": str(mined[0] / "W_miner"), "output": str(tmp_path / "out")}
    monkeypatch.setattr(retrieve, "read_flags", lambda *_, **__: (config.lock(), paths))
    assert retrieve.main(["retrieve"]) == 0
    found = [line.split() for line in (tmp_path / "out" / "run.trec").read_text().splitlines()]
    hits = {
        query
        for query, _, document, rank, *_ in found
        if int(rank) <= 5 and answers[int(query)] in documents[int(document) - 1].split()
    }
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())["measures"]
    assert measured["success@5"] == len(hits) / 4


def test_marcos_documents_are_one_text_without_a_title(tmp_path):
    from train.data import ranked_lists
    from train.data.judged_texts import read_lists

    folder = retrieval_files.write_marcodoc(tmp_path)
    options = {"collection": "marcodoc", "path": str(folder), "vocabulary": "vocab.txt"}
    rows = ranked_lists.collection_rows({**ranked_lists.OPTIONS, **options, "document_length": 9})
    assert list(rows.texts.texts) == ["w1<sep>w2<sep>w3 w4", "w5<sep>w6", "w7<sep>"]
    words = [rows.rows.words.words[i] for i in rows.document(1)]
    assert words == ["[CLS]", "w5", "<", "sep", ">", "w6", "[SEP]"]
    assert len(rows.document(0)) == 9 and rows.document(0)[-1] == rows.rows.words.separator
    # PROD's lists have numbers where the collection has a D before them.
    assert read_lists(folder / "train.json", rows.texts)[0].negatives == (1, 2)
    assert rows.texts.judgments["validation"] == {"2": {"D8": 1}}


def test_evaluation_scales_vectors_as_training_does(marco, psgs, monkeypatch):
    vectors = jnp.ones((4, 3)), jnp.arange(36.0).reshape(12, 3)
    monkeypatch.setattr(ranking, "vectors_of", lambda *_: vectors)
    nearly_none = {"task_args.embedding_scale": 1e-9}, {"task_args.student_scale": 1e-9}
    for task in (
        prod.from_config(prod_stage(marco, **nearly_none[0])),
        lead.from_config(lead_config(psgs, "paper", **nearly_none[1])),
    ):
        sums = task.evaluate({"params": {}}, {"mask": jnp.ones(4)})
        assert sums["loss"] / sums["count"] == pytest.approx(np.log(3), rel=1e-5)


# -- mistakes --------------------------------------------------------------------------------------

WORDS = len(retrieval_files.WORDS)
PROD_MISTAKES = {
    "distillation needs a teacher": {"task_args": {"kd_weight": 0.9}},
    "lwf is on but lwf_weight is not set": {"task_args.lwf_weight": None},
    "the regularizer belongs to cross-encoder teachers": {
        "task_args.teacher": "retrieval.dual_encoder"
    },
    "did you mean 'KD_softmax'": {"task_args.kd_type": "KD_softmx"},
    "needs dkd_alpha and dkd_beta": {"task_args.kd_type": "DKD"},
    "cross-encoder stages need at least one negative": {"data.options.number_neg": 0},
    "use jit": {"parallel.mode": "pmap"},
    "is no dual encoder": {"model": "retrieval.cross_encoder"},
    f"model_args.vocab_size: 8 rows for .* of {WORDS} words": {"model_args.vocab_size": 8},
}
LEAD_MISTAKES = {
    "3 layers cannot be selected: the student has 2, the teacher 3": {"task_args.layers": 3},
    "did you mean 'last'": {"task_args.selection": "lst"},
    "temperature must be positive": {"task_args.temperature": 0.0},
    "LEAD needs a teacher": {"task_args": {}},
    "needs at least one negative": {"data.options.number_neg": 0},
    "attention maps are compared between towers": {"task_args.attention_weight": 1.0},
    f"teacher_args.vocab_size: 8 rows for .* of {WORDS} words": {
        "task_args.teacher_args.vocab_size": 8
    },
}


def change(config, changes):
    for key, value in changes.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[last] = value
    return config


@pytest.mark.parametrize("message", PROD_MISTAKES)
def test_a_mistake_in_prods_config_is_named(marco, message):
    with pytest.raises(ConfigError, match=message):
        Plan(change(prod_stage(marco), PROD_MISTAKES[message]))


@pytest.mark.parametrize("message", LEAD_MISTAKES)
def test_a_mistake_in_leads_config_is_named(psgs, message):
    with pytest.raises(ConfigError, match=message):
        Plan(change(lead_config(psgs, "paper_cross"), LEAD_MISTAKES[message]))


def lists_with(marco, tmp_path, **changes):
    entries = json.loads((marco / "marco_train.json").read_text())
    entries[1].update(changes)
    file = tmp_path / "lists.json"
    file.write_text(json.dumps(entries))
    config = prod_stage(marco)
    config.data.options.lists = str(file)
    return pipeline.resolve(config.data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"neg_id": ["1", "2"]}, "query '101': document '1' is positive and negative"),
        ({"neg_id": [1, 2]}, "query '101': document '1' is positive and negative"),
        ({"neg_id": ["x"]}, "query '101': no document 'x' in the collection"),
        ({"query_id": 100}, "query id '100' in entries 0 and 1"),
    ],
)
def test_training_lists_that_contradict_themselves_are_refused(marco, tmp_path, changes, message):
    family, options = lists_with(marco, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        family.source("train", options)


def test_lists_keep_string_ids_numbers_and_lead_shifts_by_one(psgs, marco):
    from train.data.judged_texts import read_collection, read_lists

    texts = read_collection("psgs", str(psgs))
    assert texts.document_ids[0] == "0" and texts.texts[0] == retrieval_files.texts()[0][0]
    assert texts.judgments["validation"]["2"] == {"2": 1}
    entry = read_lists(psgs / "train.json", texts)[3]
    assert entry.positives == (3,) and entry.negatives[:2] == (4, 5)
    other = read_collection("marco", str(marco))
    assert other.titles[:2] == ["w0", ""]


def test_a_file_of_one_network_does_not_begin_a_run_of_two(marco, tmp_path):
    file = tmp_path / "student.bin"
    file.touch()
    plan = Plan(change(prod_stage(marco), {"init_from": str(file)}))
    with pytest.raises(ConfigError, match=r"begins with config\.task_args\.student_from and"):
        plan.fresh()
