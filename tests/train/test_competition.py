"""Submissions: what is accepted, and every kind of offense refused before any score."""

import json
from types import SimpleNamespace

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.security.attribution import open_world_metrics
from jaxmodels.security.face_track import face_mask
from train.command_line import stop_with_one_line
from train.competition import face, submissions
from train.competition.__main__ import main, read_rules
from train.competition.deepfake import align_clusters
from train.competition.roster import Member
from train.competition.submissions import SubmissionError

SHAPE = (4, 5, 3)


def images(folder, count=3, change=3.0):
    """A valid folder over gray originals; returns (names, originals)."""
    submissions.write_head(folder, "face")
    originals = np.full((count, *SHAPE), 100, np.float32)
    names = [f"{i:04d}.npy" for i in range(count)]
    for i, name in enumerate(names):
        np.save(folder / name, originals[i] + np.float32(change))
    return names, originals


def test_a_sound_submission_is_read_rounded_and_measured(tmp_path):
    names, originals = images(tmp_path, change=3.4)
    submissions.read_head(tmp_path, "face", None)
    found = submissions.read_images(tmp_path, names, SHAPE)
    np.testing.assert_array_equal(found, 103)
    distances = submissions.check_budget(names, found, originals, eps=3.0, must_change=True)
    np.testing.assert_array_equal(distances, 3)
    rms = submissions.check_budget(names, found, originals, eps=3.0, norm="l2")
    np.testing.assert_allclose(rms, 3)


def spoil(folder, names, how):
    first = folder / names[0]
    image = np.load(first)
    changes = {
        "missing": first.unlink,
        "extra": lambda: np.save(folder / "9999.npy", image),
        "dtype": lambda: np.save(first, image.astype(np.float64)),
        "shape": lambda: np.save(first, image[:3]),
        "nan": lambda: np.save(first, image * np.float32("nan")),
        "range": lambda: np.save(first, image + 200),
        "text": lambda: first.write_text("no array"),
        "pickle": lambda: np.save(first, np.array([{}], object), allow_pickle=True),
    }
    changes[how]()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "missing 0000.npy"),
        ("extra", "unexpected 9999.npy"),
        ("dtype", "0000.npy: dtype float64, not float32"),
        ("shape", r"0000.npy: shape \(3, 5, 3\), not \(4, 5, 3\)"),
        ("nan", "0000.npy: 60 pixels are not finite"),
        ("range", "pixels from 303 to 303, not 0..255"),
        ("text", "0000.npy: unreadable"),
        ("pickle", "0000.npy: unreadable"),
    ],
)
def test_malformed_images_are_refused(tmp_path, how, message):
    names, _ = images(tmp_path)
    spoil(tmp_path, names, how)
    with pytest.raises(SubmissionError, match=message):
        submissions.read_images(tmp_path, names, SHAPE)


def test_budgets_masks_and_unchanged_images_are_checked_after_rounding(tmp_path):
    names, originals = images(tmp_path, count=7)
    found = submissions.read_images(tmp_path, names, SHAPE)
    with pytest.raises(SubmissionError, match=r"distance 3 exceeds the budget 2.*and 2 more"):
        submissions.check_budget(names, found, originals, eps=2.0)
    mask = np.zeros((*SHAPE[:2], 1), np.float32)
    with pytest.raises(SubmissionError, match="changed by 3 outside the mask"):
        submissions.check_budget(names, found, originals, mask=mask)
    with pytest.raises(SubmissionError, match=r"0006\.npy|unchanged"):
        submissions.check_budget(names, originals, originals, eps=2.0, must_change=True)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"track": "driving", "submitted_at": "2022-01-01T00:00:00"}, "for track 'driving'"),
        ({"track": "face", "submitted_at": "2022-02-01T00:00:00"}, "late"),
        ({"track": "face"}, "unreadable"),
    ],
)
def test_late_and_foreign_heads_are_refused(tmp_path, head, message):
    (tmp_path / submissions.HEAD).write_text(json.dumps(head))
    with pytest.raises(SubmissionError, match=message):
        submissions.read_head(tmp_path, "face", "2022-01-15T00:00:00+00:00")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,cluster\na,1\n", "missing b"),
        ("image,cluster\na,1\nb,2\nc,3\n", "unexpected c"),
        ("image,cluster\na,1\na,2\nb,1\n", "a stands twice"),
        ("image,cluster\na,-1\nb,nan\n", "line 2: 'a,-1'"),
        ("a,1\nb,2\n", "the first line must be image,cluster"),
    ],
)
def test_malformed_clusters_are_refused(tmp_path, text, message):
    submissions.write_head(tmp_path, "deepfake")
    (tmp_path / "clusters.csv").write_text(text)
    with pytest.raises(SubmissionError, match=message):
        submissions.read_clusters(tmp_path, ["a", "b"])


def test_malformed_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", a=np.zeros(3, np.float32), b=np.full(2, np.inf, np.float32))
    with pytest.raises(SubmissionError, match="b: not finite"):
        submissions.read_arrays(tmp_path, "s.npz", {"a": (3,), "b": (2,)})
    with pytest.raises(SubmissionError, match=r"missing c.*unexpected b"):
        submissions.read_arrays(tmp_path, "s.npz", {"a": (3,), "c": (2,)})


def test_novel_clusters_are_aligned_and_known_ones_left():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(6, 0.1), 200)
    order = np.array([0, 1, 5, 3, 2, 4])
    np.testing.assert_allclose(align_clusters(probs, probs[:, order], 2), probs)


class Embed(nn.Module):
    """Faces to 12 numbers, smooth in every pixel."""

    @nn.compact
    def __call__(self, x):
        small = nn.avg_pool(x, (4, 4), (4, 4)).reshape(len(x), -1)
        return jnp.tanh(nn.Dense(12, use_bias=False, name="dense")(small))


@pytest.fixture
def faces(monkeypatch):
    """Rules whose networks need no training: two that attack, two hidden ones."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 0.3, (6 * 6 * 3, 12))

    def member(name):
        own = shared + 0.5 * np.random.default_rng(len(name)).normal(0, 0.3, shared.shape)
        data = {"name": "identities:glyphs", "options": {"image_size": 24, "test_examples": 104}}
        return Member(
            name,
            SimpleNamespace(data=data),
            SimpleNamespace(model=Embed()),
            {"params": {"dense": {"kernel": jnp.asarray(own, jnp.float32)}}},
            {"threshold": 0.5},
        )

    monkeypatch.setattr(
        face, "train_members", lambda entries, workdir: [member(e["name"]) for e in entries]
    )
    return {
        "goal": "impersonation",
        "pairs": 6,
        "seed": 0,
        "batch": 4,
        "budget": {"kind": "pixels", "norm": "linf", "eps": 24.0},
        "distance_weight": 0.5,
        "recipes": [{"name": "mi", "steps": 6}],
        "surrogates": [{"name": "w"}, {"name": "ww"}],
        "victims": [{"name": "hid"}, {"name": "hidd"}],
    }


FACES = {
    "pixels": {},
    "dodging_l2": {"goal": "dodging", "budget": {"kind": "pixels", "norm": "l2", "eps": 16.0}},
    "patch": {
        "budget": {"kind": "patch", "mask": "respirator", "area": 0.1},
        "recipes": [{"name": "eot", "steps": 6, "step": 40.0, "draws": 2, "smoothness": 0.5}],
    },
}


@pytest.mark.parametrize("kind", FACES)
def test_the_face_track_attacks_submits_and_scores_the_same_every_time(faces, kind, tmp_path):
    rules = {**faces, **FACES[kind]}
    folder = tmp_path / "submission"
    numbers = face.attempt(rules, tmp_path, folder)
    again = face.score(rules, tmp_path, folder)
    assert {name: numbers[name] for name in again} == again
    attackers, references = face.read_pairs(rules, face.train_members(rules["victims"], None)[0])
    images = np.stack([np.load(f) for f in sorted(folder.glob("*.npy"))])
    delta = images - attackers
    victims = face.train_members(rules["victims"], None)
    cosines, _ = face.judge(victims, images, references)
    clean, _ = face.judge(victims, attackers, references)
    sign = 1 if rules["goal"] == "impersonation" else -1
    assert (sign * (cosines - clean)).mean() > 0.005
    if kind == "pixels":
        assert np.abs(delta).max() <= 24 and numbers["mean_distance"] <= 24.5
    elif kind == "dodging_l2":
        assert np.sqrt(np.square(delta).mean((1, 2, 3))).max() <= 16.5
    else:
        mask = face_mask("respirator", (24, 24))
        assert not (delta * (1 - mask)).any() and np.abs(delta).max() > 24


def test_an_unchanged_face_scores_nothing(faces, tmp_path):
    victims = face.train_members(faces["victims"], None)
    for goal in ("impersonation", "dodging"):
        rules = {**faces, "goal": goal}
        attackers, _ = face.read_pairs(rules, victims[0])
        submissions.write_head(tmp_path, "face")
        for name, image in zip(face.file_names(len(attackers)), attackers):
            np.save(tmp_path / name, image.astype(np.float32))
        if goal == "impersonation":
            assert face.score(rules, tmp_path, tmp_path)["score"] == 0
        else:
            with pytest.raises(SubmissionError, match="the image is unchanged"):
                face.score(rules, tmp_path, tmp_path)


def test_shuffled_clusters_are_at_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, 900)
    right = open_world_metrics(labels, labels, 5)
    shuffled = open_world_metrics(rng.permutation(labels), labels, 5)
    assert right["all_nmi"] == pytest.approx(1) and shuffled["all_nmi"] < 0.05
    assert shuffled["known_acc"] < 0.25 and abs(shuffled["all_ari"]) < 0.02


def test_the_rules_of_every_track_are_there_and_mistakes_get_one_line(tmp_path, capsys):
    for track in ("deepfake", "driving", "face"):
        assert read_rules(f"configs/rules/{track}.yaml")["deadline"] is None
    for argv, message in (
        (["deepfakes", f"--workdir={tmp_path}"], "did you mean 'deepfake'?"),
        (["face"], "--workdir"),
        (["face", f"--workdir={tmp_path}", "--rules=none.yaml"], "--rules none.yaml"),
    ):
        assert stop_with_one_line(main, ["competition", *argv]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
