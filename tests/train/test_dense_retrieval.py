"""The published recipe on files in the published format: train, resume, encode, search, mine."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxmodels.interop import catalog
from jaxmodels.retrieval.dual_encoder import DualEncoder
from train import predict, retrieve
from train.__main__ import main
from train.command_line import read_flags
from train.data.retrieval_files import read_run
from train.encoding import Encoder, ShardedVectors, buckets, mean_view
from train.naming import ConfigError
from train.tasks.dense_retrieval import DenseRetrieval

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "capstone.py")
TOPICS = ["banana", "graph", "matrix", "poet", "river", "violin", "engine", "cloud"]


@pytest.fixture(scope="module")
def marco(tmp_path_factory):
    """Two passages on each of eight topics; eight training and sixteen dev queries, each of which
    both passages of its topic answer."""
    folder = tmp_path_factory.mktemp("marco")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *TOPICS, "about", "the", "what", "is"]
    texts = [
        f"{TOPICS[i % 8]}\tthe {TOPICS[i % 8]} is the {TOPICS[(i + 3 + i // 8) % 8]}"
        for i in range(16)
    ]
    files = {
        "vocab.txt": "\n".join(words),
        "corpus.tsv": "\n".join(f"{i}\t{t}" for i, t in enumerate(texts)),
        "train.query.txt": "\n".join(f"{100 + i}\twhat is the {t}" for i, t in enumerate(TOPICS)),
        "qrels.train.tsv": "\n".join(f"{100 + i}\t0\t{i}\t1" for i in range(8)),
        "qidpidtriples.train.full.2.tsv": "\n".join(
            f"{100 + i}\t{i}\t{(i + n) % 8 + 8}" for i in range(8) for n in (1, 3)
        ),
        "other_queries.tsv": "999\t0\t1",
        "dev.query.txt": "\n".join(
            f"{200 + i}\twhat {('is', 'about')[i // 8]} the {TOPICS[i % 8]}" for i in range(16)
        ),
        "qrels.dev.tsv": "\n".join(f"{200 + i}\t{i % 8 + n}" for i in range(16) for n in (0, 8)),
        # Not in the order of the documents.
        "pseudo_queries.tsv": "\n".join(
            f"{i}\tabout {TOPICS[i % 8]}\twhat is {TOPICS[i % 8]}\tthe {TOPICS[(i + 3) % 8]}"
            for i in reversed(range(16))
        ),
    }
    for name, text in files.items():
        (folder / name).write_text(text + "\n")
    return folder


def flags_of(marco):
    return [
        f"--config={CONFIG}:paper",
        "--config.model=retrieval.dual_encoder",
        "--config.model_args.vocab_size=17",
        "--config.model_args.hidden_size=16",
        "--config.model_args.num_hidden_layers=1",
        "--config.model_args.num_attention_heads=2",
        "--config.model_args.intermediate_size=16",
        "--config.model_args.max_position_embeddings=24",
        "--config.model_args.initializer_range=0.2",
        "--config.model_args.pooler=False",
        "--config.model_args.hidden_dropout_prob=0.0",
        "--config.model_args.attention_probs_dropout_prob=0.0",
        f"--config.data.options.path={marco}",
        "--config.data.options.workers=0",
        "--config.data.options.query_length=8",
        "--config.data.options.document_length=20",
        "--config.data.options.negatives=3",
        "--config.data.options.curriculum_steps=80",
        "--config.batch_size=4",
        "--config.eval.batch_size=8",
        "--config.precision=float32",
        "--config.parallel.data=2",
        "--config.parallel.fsdp=2",
        "--config.retrieve.shard_size=6",
        "--config.retrieve.depth=10",
        "--config.data.options.views=2",
    ]


@pytest.fixture(scope="module")
def paper_run(marco, tmp_path_factory):
    """Eighty steps of `:paper` at reduced size, on four devices: all parts of the curriculum."""
    workdir = tmp_path_factory.mktemp("paper")
    run = [
        "--config.steps=80",
        "--config.schedule.peak=0.006",
        "--config.schedule.warmup_steps=2",
        "--config.log_every=20",
        "--config.checkpoint.every=40",
    ]
    whole, traces = DenseRetrieval.loss, []

    def counted(self, *arguments):
        traces.append(1)
        return whole(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DenseRetrieval, "loss", counted)
        assert main(["train", *flags_of(marco), *run, f"--workdir={workdir}"]) == 0
    assert len(traces) == 1, "the step was traced again when the part changed"
    return workdir, flags_of(marco), run


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_paper_recipe_learns_on_published_files(paper_run):
    workdir, _, _ = paper_run
    rows = rows_of(workdir)
    losses = [r["loss"] for r in rows if r["kind"] == "train"]
    assert len(losses) == 4 and np.isfinite(losses).all() and losses[-1] < losses[0]
    # In random order it is 0.30: two of sixteen passages answer a query.
    assert rows[-1]["mrr@10"] > 0.55


def test_resumed_in_the_middle_of_a_part_it_ends_as_it_did(paper_run, tmp_path):
    workdir, flags, run = paper_run
    shutil.copytree(workdir, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "80")
    assert main(["train", *flags, *run, f"--workdir={tmp_path / 'again'}"]) == 0
    drop = "examples_per_s"
    wanted, got = (
        [{k: v for k, v in r.items() if k != drop} for r in rows_of(w)]
        for w in (workdir, tmp_path / "again")
    )
    assert got == wanted


def test_encoding_goes_on_where_it_was_killed_and_the_run_is_evaluated(paper_run, tmp_path, capsys):
    workdir, flags, _ = paper_run
    arguments = [*flags, f"--checkpoint={workdir}", f"--output={tmp_path}"]
    assert retrieve.main(["retrieve", *arguments]) == 0
    first = capsys.readouterr().out
    assert "shard 3/3" in first and "| mrr@10 |" in first
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["queries"] == 16
    # The same measure as at the end of training, from shards, one of them encoded again.
    assert report["measures"]["mrr@10"] == pytest.approx(rows_of(workdir)[-1]["mrr@10"])
    lines = (tmp_path / "run.trec").read_text()
    shards = sorted((tmp_path / "vectors").glob("*.npy"))
    shards[1].unlink()
    kept = shards[0].stat().st_mtime_ns
    assert retrieve.main(["retrieve", *arguments, "--config.retrieve.index=faiss:Flat"]) == 0
    again = capsys.readouterr().out
    assert "2 of 3 shards are there already" in again and "shard 2/3" in again
    assert shards[0].stat().st_mtime_ns == kept
    ours, theirs = (
        {x.split()[2] for x in t.splitlines()[:3]}
        for t in (lines, (tmp_path / "run.trec").read_text())
    )
    assert len(ours & theirs) >= 2
    with pytest.raises(ConfigError, match="holds vectors of another checkpoint"):
        retrieve.main(["retrieve", *arguments, "--config.data.options.views=1"])


def test_a_run_with_another_vocabulary_is_refused(paper_run, tmp_path):
    from train import predict

    workdir, flags, _ = paper_run
    shutil.copytree(workdir, tmp_path / "run")
    listing = tmp_path / "run" / "vocabulary" / "symbols.json"
    listing.write_text(json.dumps(["[PAD]", "other", *json.loads(listing.read_text())[2:]]))
    arguments = [*flags, f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
    wanted = r"another vocabulary than these data: token 1 is 'other' there and '\[UNK\]' here"
    with pytest.raises(ConfigError, match=wanted):
        retrieve.main(["retrieve", *arguments])
    with pytest.raises(ConfigError, match=wanted):
        predict.main(["predict", *arguments, f"--input={listing}"])


def test_mined_negatives_train_the_second_stage(paper_run, marco, tmp_path):
    workdir, flags, run = paper_run
    mine = ["--config.retrieve.split=train", "--config.retrieve.negatives=5"]
    arguments = [*flags, *mine, f"--checkpoint={workdir}", f"--output={tmp_path}"]
    assert retrieve.main(["retrieve", *arguments]) == 0
    mined = json.loads((tmp_path / "negatives.json").read_text())
    assert len(mined) == 8 and all(len(n) == 5 for n in mined.values())
    assert all(str(int(q) - 100) not in names for q, names in mined.items())
    shutil.copy(tmp_path / "negatives.json", marco / "negatives.json")
    from train.data import msmarco, pipeline

    config, _ = read_flags(
        [
            "train",
            *flags,
            *run,
            f"--workdir={tmp_path}",
            "--config.data.options.negatives_file=negatives.json",
        ],
        need_workdir=True,
    )
    batch = next(pipeline.train_batches(config.data, batch_size=4, seed=0))
    # The same in another process, whose files were never parsed there.
    options = pipeline.resolve(config.data)[1]
    again = pickle.loads(pickle.dumps(msmarco.train_transform(options)))
    one = again({"query": 3}, np.random.default_rng(0))["doc_ids"]
    same = msmarco.train_transform(options)({"query": 3}, np.random.default_rng(0))["doc_ids"]
    np.testing.assert_array_equal(one, same)
    msmarco.collection(options).write_training(marco / "training.json")
    given = msmarco.collection({**options, "training_json": "training.json"}).training
    assert given.texts == msmarco.collection(options).training.texts
    assert batch["doc_ids"].shape == (4, 4, 20) and (batch["doc_ids"][:, :, 0] == 2).all()


def test_files_of_ones_own_are_encoded_and_searched(paper_run, marco, tmp_path, capsys):
    workdir, flags, _ = paper_run
    arguments = [
        *flags,
        f"--checkpoint={workdir}",
        f"--output={tmp_path / 'out'}",
        f"--config.retrieve.documents={marco / 'corpus.tsv'}",
        f"--config.retrieve.pseudo_queries={marco / 'pseudo_queries.tsv'}",
        f"--config.retrieve.queries={marco / 'dev.query.txt'}",
        f"--config.retrieve.judgments={marco / 'qrels.dev.tsv'}",
    ]
    assert retrieve.main(["retrieve", *arguments]) == 0
    assert "16 queries, 10 documents each" in capsys.readouterr().out
    (marco / "qa.csv").write_text("what is the banana\t['banana']\t1\nabout\t['nothing']\t2\n")
    by_answer = [a for a in arguments if "retrieve.queries=" not in a]
    by_answer += [f"--config.retrieve.answers={marco / 'qa.csv'}"]
    assert retrieve.main(["retrieve", *by_answer]) == 0
    assert "| success@10 | 0.5 |" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="documents are expanded; name the file"):
        retrieve.main(["retrieve", *[a for a in arguments if "pseudo" not in a]])


def test_a_folder_of_beir_is_searched_without_the_queries_themselves(paper_run, marco, tmp_path):
    workdir, flags, _ = paper_run
    lines = [line.split("\t") for line in (marco / "corpus.tsv").read_text().splitlines()]
    words = {name: " ".join(rest) for name, *rest in lines}
    first, second, other = list(words)[:3]
    documents = [json.dumps({"_id": k, "title": "", "text": t}) for k, t in words.items()]
    (tmp_path / "corpus.jsonl").write_text("\n".join(documents) + "\n")
    # As in ArguAna, queries are documents; the last is of another split.
    asked = [json.dumps({"_id": k, "text": words[k]}) for k in (first, second, other)]
    (tmp_path / "queries.jsonl").write_text("\n".join(asked) + "\n")
    judged = f"query-id\tcorpus-id\tscore\n{first}\t{second}\t1\n{second}\t{first}\t1\n"
    (tmp_path / "test.tsv").write_text(judged)
    pseudo = marco / "pseudo_queries.tsv"
    arguments = [
        *flags,
        f"--checkpoint={workdir}",
        f"--output={tmp_path / 'out'}",
        "--config.retrieve.layout=beir",
        f"--config.retrieve.documents={tmp_path / 'corpus.jsonl'}",
        f"--config.retrieve.pseudo_queries={pseudo}",
        f"--config.retrieve.queries={tmp_path / 'queries.jsonl'}",
        f"--config.retrieve.judgments={tmp_path / 'test.tsv'}",
        f"--config.retrieve.depth={len(words)}",
    ]
    assert retrieve.main(["retrieve", *arguments]) == 0
    run = read_run(tmp_path / "out" / "run.trec")
    assert {q: set(found) for q, found in run.items()} == {
        q: set(words) - {q} for q in (first, second)
    }
    shallow = [*arguments, "--config.retrieve.depth=5"]
    assert retrieve.main(["retrieve", *shallow]) == 0
    run = read_run(tmp_path / "out" / "run.trec")
    assert all(len(found) == 5 and q not in found for q, found in run.items())


def test_a_document_without_a_title_is_what_it_was_in_training(marco, tmp_path):
    from train.data import docstrings, msmarco
    from train.data.retrieval_files import Corpus
    from train.data.wordpiece import WordPiece

    (tmp_path / "corpus.tsv").write_text("7\t\tthe banana\n")
    corpus, words = Corpus(tmp_path / "corpus.tsv"), WordPiece.read(marco / "vocab.txt")
    fields = retrieve._Texts(corpus, words, "", msmarco.EMPTY_TITLES).fields(0)
    assert fields == [[], words.pieces("the banana")]
    options = {**msmarco.OPTIONS, "path": str(tmp_path), "vocabulary": str(marco / "vocab.txt")}
    assert [list(f) for f in msmarco.collection(options).fields(0)] == fields
    fields = retrieve._Texts(corpus, words, "", docstrings.EMPTY_TITLES).fields(0)
    assert fields == [words.pieces("the banana")]


def test_prediction_lists_the_best_documents(paper_run, tmp_path):
    workdir, flags, _ = paper_run
    (tmp_path / "questions.txt").write_text("what is the banana\n\nabout river\n")
    output = tmp_path / "found.csv"
    arguments = [f"--checkpoint={workdir}", f"--input={tmp_path / 'questions.txt'}"]
    assert predict.main(["predict", *flags, *arguments, f"--output={output}"]) == 0
    lines = output.read_text().splitlines()
    assert lines[0] == "query,rank,document,score" and len(lines) == 1 + 2 * 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--config.data.options.expansion=3part", "data.options.expansion: .*'3part'"),
        ("--config.data.options.corpus=nothing.tsv", "data.options.corpus: no file"),
        ("--config.data.options.triples=other_queries.tsv", "no training query has hard negatives"),
        ("--config.task_args.gather_gradient=mean", "gather_gradient: 'mean'; known: true"),
        ("--config.task_args.scale=0", "scale: must be positive, not 0"),
        ("--config.model_args.vocab_size=16", "vocab_size: 16 rows for .* of 17 words"),
        ("--config.model_args.num_attention_heads=3", "hidden_size 16 is not divisible"),
    ],
)
def test_mistakes_are_one_line(marco, tmp_path, change, message):
    words = ["train", *flags_of(marco), change, f"--workdir={tmp_path}"]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        main(words)


TINY = DualEncoder(
    vocab_size=30,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=32,
)


def test_vectors_depend_on_neither_company_nor_padding_and_shapes_are_few():
    variables = catalog.initialize(TINY)
    traces = []

    def encode(variables, ids):
        traces.append(ids.shape)
        return TINY.apply(variables, ids, method="encode_documents")

    encoder = Encoder(encode, variables, longest=32, batch_size=4)
    rng = np.random.default_rng(0)
    rows = [rng.integers(1, 30, n).tolist() for n in rng.integers(1, 33, 23)]
    together = encoder(rows)
    assert set(traces) == {(4, n) for n in buckets(32)} and len(traces) == len(buckets(32))
    alone = np.concatenate([encoder([row]) for row in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(encoder(rows[::-1])[::-1], together, atol=1e-5)
    mean = mean_view(encoder, lambda row, view: rows[(row + view) % 23], range(23), 2, chunk=5)
    np.testing.assert_allclose(mean, (together + np.roll(together, -1, 0)) / 2, atol=1e-5)
    with pytest.raises(ValueError, match="a row of 40 tokens; the longest is 32"):
        encoder([[1] * 40])


def test_shards_are_whole_or_absent(tmp_path):
    store = ShardedVectors(tmp_path, 5, 2, {"checkpoint": "a"})
    assert store.missing() == [0, 1, 2] and store.missing(1, 2) == [1]
    for shard in (0, 2):
        store.write(shard, np.full((len(store.rows(shard)), 3), shard))
    again = ShardedVectors(tmp_path, 5, 2, {"checkpoint": "a"})
    assert again.missing() == [1] and list(again.rows(2)) == [4]
    with pytest.raises(ConfigError, match="1 of 3 shards are not there"):
        again.read()
    again.write(1, np.ones((2, 3)))
    assert [len(v) for v in again.read()] == [2, 2, 1]
    with pytest.raises(ConfigError, match="holds vectors of another checkpoint"):
        ShardedVectors(tmp_path, 5, 2, {"checkpoint": "b"})
