"""Submissions: what is accepted, and every kind of offense refused before any score."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels.driving.frame_detector import FrameDetector
from jaxmodels.driving.patch_classifier import PatchClassifier
from jaxmodels.driving.vectornet import VectorNet
from jaxmodels.security.attribution import cluster_accuracy, open_world_metrics
from jaxmodels.security.face_track import face_mask
from train.building import build_task
from train.command_line import read_flags, stop_with_one_line
from train.competition import deepfake, driving, ego, face, street, submissions
from train.competition.__main__ import main, read_rules
from train.competition.deepfake import align_clusters
from train.competition.roster import Member, member_config, train_members
from train.competition.rules import check_rules
from train.competition.submissions import SubmissionError
from train.data import forgeries
from train.naming import ConfigError

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
        "empty": lambda: first.write_bytes(b""),
        "cut": lambda: first.write_bytes(first.read_bytes()[:-100]),
        "archive": lambda: np.savez(first.open("wb"), image),
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
        ("empty", "0000.npy: unreadable"),
        ("cut", "0000.npy: unreadable"),
        ("archive", "0000.npy: unreadable"),
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
        ("image,cluster\na,1\nb,99999999999\n", "line 3: cluster 99999999999 is not below"),
        ("image,cluster\na,1\nb,\udcff\n", "clusters.csv is unreadable"),
    ],
)
def test_malformed_clusters_are_refused(tmp_path, text, message):
    submissions.write_head(tmp_path, "deepfake")
    (tmp_path / "clusters.csv").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(SubmissionError, match=message):
        submissions.read_clusters(tmp_path, ["a", "b"])


def test_malformed_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", a=np.zeros(3, np.float32), b=np.full(2, np.inf, np.float32))
    with pytest.raises(SubmissionError, match="b: not finite"):
        submissions.read_arrays(tmp_path, "s.npz", {"a": (3,), "b": (2,)})
    with pytest.raises(SubmissionError, match=r"missing c.*unexpected b"):
        submissions.read_arrays(tmp_path, "s.npz", {"a": (3,), "c": (2,)})
    whole = (tmp_path / "s.npz").read_bytes()
    for content in (b"", whole[:-40], b"no archive"):
        (tmp_path / "s.npz").write_bytes(content)
        with pytest.raises(SubmissionError, match=r"s\.npz is unreadable"):
            submissions.read_arrays(tmp_path, "s.npz", {"a": (3,)})
    with (tmp_path / "s.npz").open("wb") as file:
        np.save(file, np.zeros(3, np.float32))
    with pytest.raises(SubmissionError, match="not an archive of arrays"):
        submissions.read_arrays(tmp_path, "s.npz", {"a": (3,)})


def test_large_cluster_ids_cost_no_memory():
    labels = np.arange(60) % 3
    names = np.asarray([7, 2**31 - 1, 12])[labels]
    assert cluster_accuracy(names, labels) == 1.0
    assert cluster_accuracy(np.zeros(60, int), labels) == pytest.approx(1 / 3)
    assert open_world_metrics(names, labels, 1)["novel_acc"] == 1.0


def test_novel_clusters_are_aligned_and_known_ones_left():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(6, 0.1), 200)
    order = np.array([0, 1, 5, 3, 2, 4])
    np.testing.assert_allclose(align_clusters(probs, probs[:, order], 2), probs)


SEEN = {"mean": forgeries.OPTIONS["mean"], "std": forgeries.OPTIONS["std"]}


@pytest.fixture(scope="module")
def forged(tmp_path_factory):
    """Rules of the deepfake track over 45 images, and a member that is right about all of them."""
    workdir = tmp_path_factory.mktemp("forged")
    entry = {
        "name": "m",
        "config": "configs/ai_security.py:small",
        "set": {"data.options.test_examples": 45, "data.options.image_size": 16},
    }
    rules = {**read_rules("configs/rules/deepfake.yaml"), "members": [entry]}
    config = member_config(entry, workdir)
    _, labels = deepfake.truth(rules, config)

    def features(variables, config):
        del variables, config
        return np.eye(9)[labels], None, labels

    member = Member("m", config, SimpleNamespace(features=features, known=5), None, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(deepfake, "train_members", lambda entries, workdir: [member])
        yield rules, workdir, labels


def test_the_deepfake_track_scores_what_is_submitted_under_the_images_names(forged):
    rules, workdir, labels = forged
    numbers = deepfake.attempt(rules, workdir, workdir / "right")
    assert numbers["score"] == pytest.approx(100) and numbers["known_acc"] == 1
    shown = sorted((workdir / "images").glob("*.png"))
    assert [f.stem for f in shown] == [f"{i:05d}" for i in range(len(labels))]
    # What a team sees is what the networks saw.
    config = member_config(rules["members"][0], workdir)
    names, _ = deepfake.truth(rules, config)
    seen = next(deepfake._batches(config))["image"]
    for name, image in list(zip(names, seen))[:3]:
        own = forgeries.read_image(
            workdir / "images" / f"{name}.png", {**config.data.options, **SEEN}
        )
        np.testing.assert_allclose(own, image, atol=1e-5)


def test_clusters_that_say_nothing_of_the_images_score_nothing(forged, tmp_path):
    rules, workdir, labels = forged
    names = [f"{i:05d}" for i in range(len(labels))]

    def scored(clusters):
        submissions.write_head(tmp_path, "deepfake")
        rows = "".join(f"{name},{cluster}\n" for name, cluster in zip(names, clusters))
        (tmp_path / "clusters.csv").write_text("image,cluster\n" + rows)
        return deepfake.score(rules, workdir, tmp_path)["score"]

    with pytest.raises(SubmissionError, match="45 clusters, the rules allow 9"):
        scored(range(45))
    # The split goes round the tools: in its own order a number would be the answer.
    assert scored(np.arange(45) % 9) < 60
    chance = [scored(np.random.default_rng(i).permutation(labels)) for i in range(5)]
    assert scored(np.arange(45) % 9) < np.mean(chance) + 15


def test_a_member_with_more_classes_than_clusters_count_is_not_trained(forged):
    rules, workdir, _ = forged
    with pytest.raises(ConfigError, match="m tells 9 classes apart, clusters allows 8"):
        deepfake.attempt({**rules, "clusters": 8}, workdir, workdir / "none")


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
    "pixels": {"minimal": {"models": ["w"], "largest": 200.0, "steps": 4, "rounds": 3}},
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
        assert 0 < numbers["median_minimal_linf/w"] < 200
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


@pytest.fixture
def systems(monkeypatch, tmp_path):
    """Rules of the driving track on the project's driving systems, with untrained networks."""
    small = dict(embedding_size=4, hidden_sizes=(4, 4, 6, 6), depths=(1, 1, 1, 1))
    forecaster = VectorNet(sub_width=4, sub_depth=1, global_width=4, dec_width=4, horizon=10)
    scenes = {"path": str(tmp_path), "scenes": (1, 2, 1), "horizon": 10}
    # name: (task, module, data, inputs)
    kinds = {
        "frames": ("frame_detection", FrameDetector(**small), "driving_detection", 64),
        "patches": ("patch_classification", PatchClassifier(**small), "driving_patches", 32),
        "others": ("patch_classification", PatchClassifier(**small), "driving_patches", 32),
        "forecaster": ("motion_forecasting", forecaster, "motion_scenes:highway", 0),
    }

    def member(entry):
        task, module, data, side = kinds[entry["name"]]
        options = {"image_size": side} if side else scenes
        images = (jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32),)
        inputs = images if side else module.example_inputs()
        tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        rng = np.random.default_rng(0)
        variables = jax.tree.map(
            lambda s: np.abs(rng.normal(0, 0.1, s.shape)).astype(np.float32), tree
        )
        config = SimpleNamespace(task=task, data={"name": data, "options": options})
        return Member(entry["name"], config, SimpleNamespace(model=module), variables, {})

    for module in (driving, ego, street):
        monkeypatch.setattr(
            module, "train_members", lambda entries, workdir: [member(e) for e in entries]
        )
    searched = {"restarts": 2, "iterations": 2}
    return {
        "seed": 0,
        "paint": [0.55, 0.57, 0.6],
        "perception": {"world": "street", "image_scale": 0.06, "frames": 2, "confidence": 0.02},
        "drives": 1,
        "frames": 3,
        "texture_attack": {"steps": 2, "batch": 2},
        "scenes": 1,
        "vehicles": 2,
        "draws": 1,
        "traffic": {"horizon": 2.0, "knots": 4},
        "search": {"methods": ["random"], "deception": 0.1, **searched},
        "ego": {"replan": 5, "forecaster": {"name": "forecaster"}},
        "trajectory_attack": {"scenes": 2, "methods": ["cem"], **searched},
        # The smaller network only: what is compiled here for seconds is tested by itself as well.
        "detectors": [{"name": "patches"}],
        "hidden_detector": [{"name": "patches"}, {"name": "others"}],
    }


def test_textures_are_judged_by_the_attacked_detectors_too(monkeypatch, tmp_path):
    entry = {"config": "configs/ai_security.py:driving", "set": {"model_args.width": 4}}

    def member(name):
        config = member_config({**entry, "name": name}, tmp_path)
        task = build_task(config)
        example = jnp.zeros((1, 64, 64, 3))
        variables = jax.jit(task.model.init)(jax.random.key(len(name)), example)
        return Member(name, config, task, variables, {})

    members = {name: member(name) for name in ("a", "bb", "hidden")}
    monkeypatch.setattr(
        driving, "train_members", lambda entries, workdir: [members[e["name"]] for e in entries]
    )
    # What each detector finds, in place of what its random weights would.
    found = {"a": [1, 1, 0], "bb": [1, 0, 0], "hidden": [1, 1, 1]}
    monkeypatch.setattr(
        driving,
        "detection_tables",
        lambda rules, member, textures: {
            name: np.full((1, 3), value, bool)
            for name, value in zip(textures, found[member.name], strict=True)
        },
    )
    rules = {
        "seed": 0,
        "paint": [0.5, 0.5, 0.5],
        "texture_attack": {"steps": 2, "batch": 2},
        "detectors": [{"name": "a"}, {"name": "bb"}],
        "hidden_detector": [{"name": "hidden"}],
        "drives": 1,
        "frames": 3,
    }
    base = driving.base_texture(rules)
    texture = driving.optimize(rules, tmp_path, base)
    assert texture.shape == base.shape and np.abs(texture - base).max() > 0.01
    rates = driving.white_box_rates(rules, tmp_path, texture)
    assert rates == {
        "white_box_rate/clean": 1.0, "white_box_rate/random": 0.5, "white_box_rate/attacked": 0.0
    }  # fmt: skip
    monkeypatch.undo()
    tables = driving.detection_tables(rules, members["a"], driving.judged_textures(rules, texture))
    assert {name: t.shape for name, t in tables.items()} == dict.fromkeys(
        ("clean", "random", "attacked"), (1, 3)
    )


def test_the_driving_track_attacks_the_projects_own_systems(systems, tmp_path):
    folder = tmp_path / "submission"
    numbers = driving.attempt(systems, tmp_path, folder)
    again = driving.score(systems, tmp_path, folder)
    # The first hidden detector is the attacked one here.
    for name in ("clean", "random", "attacked"):
        assert numbers[f"white_box_rate/{name}"] == numbers[f"detection_rate/{name}"]
    assert {name: numbers[name] for name in again} == again
    assert all(np.isfinite(v) for v in numbers.values())
    texture = np.load(folder / "texture.npz")["texture"]
    assert np.abs(texture - np.asarray(systems["paint"], np.float32)).max() > 0.01
    assert {"in_loop_ade/attacked", "in_loop_ade/calm", "others/detection_rate/attacked"} <= (
        numbers.keys()
    )
    frames, forecaster = street.train_members([{"name": "frames"}, {"name": "forecaster"}], None)
    assert callable(street.victim_of(frames))
    with pytest.raises(ConfigError, match="'motion_forecasting' is no victim of the street"):
        street.victim_of(forecaster)
    assert numbers["forecast_ade/cem"] >= numbers["forecast_ade/clean"] > 0
    for change, message in (
        ({"perception": {"world": "stret"}}, "perception.world is 'stret'.*street"),
        ({"ego": {"forecaster": "vectornet"}}, "ego.forecaster is 'vectornet'; known: constant"),
    ):
        with pytest.raises(ConfigError, match=message):
            driving.attempt({**systems, **change, "detectors": []}, tmp_path, folder)


def test_members_beyond_a_limit_are_no_victims(tmp_path):
    entry = {"name": "m", "config": "configs/vectornet.py:highway", "limit": {"DE@3s": 4.0}}
    folder = tmp_path / "members" / "m"
    config, _ = read_flags(
        ["x", f"--config={entry['config']}", f"--workdir={folder}"], need_workdir=True
    )
    folder.mkdir(parents=True)
    settings = json.loads(json.dumps(config.to_dict(), default=str))
    for numbers in ({"DE@3s": 4.5}, {}):
        text = json.dumps({"config": settings, "numbers": numbers})
        (folder / "numbers.json").write_text(text)
        with pytest.raises(ConfigError, match=r"m: DE@3s is (4\.5|None), the rules allow 4\.0"):
            train_members([entry], tmp_path)


def test_shuffled_clusters_are_at_chance():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 9, 900)
    right = open_world_metrics(labels, labels, 5)
    shuffled = open_world_metrics(rng.permutation(labels), labels, 5)
    assert right["all_nmi"] == pytest.approx(1) and shuffled["all_nmi"] < 0.05
    assert shuffled["known_acc"] < 0.25 and abs(shuffled["all_ari"]) < 0.02


def test_the_rules_of_every_track_are_there_and_mistakes_get_one_line(tmp_path, capsys):
    for name in ("deepfake", "driving", "driving_systems", "face"):
        rules = read_rules(f"configs/rules/{name}.yaml")
        assert rules["deadline"] is None
        check_rules(name.partition("_")[0], rules)
        groups = ("members", "detectors", "hidden_detector", "surrogates", "victims")
        entries = [entry for group in groups for entry in rules.get(group, [])]
        entries += [(rules.get("ego") or {}).get("forecaster")] * ("ego" in rules)
        assert len({entry["name"] for entry in entries}) == len(entries)
        for entry in entries:
            build_task(member_config(entry, tmp_path))
    for argv, message in (
        (["deepfakes", f"--workdir={tmp_path}"], "did you mean 'deepfake'?"),
        (["face"], "--workdir"),
        (["face", f"--workdir={tmp_path}", "--rules=none.yaml"], "--rules none.yaml"),
    ):
        assert stop_with_one_line(main, ["competition", *argv]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


RULE_MISTAKES = {
    "goal: dodge": "goal is 'dodge'; did you mean 'dodging'",
    "recipe: []": "recipe: no such key; did you mean 'recipes'",
    "pairs: 0": "pairs must be a positive number, got 0",
    "budget: {kind: pixels, norm: linf}": "budget.eps is missing",
    "budget: {kind: pixels, norm: l1, eps: 8}": "budget.norm is 'l1'",
    "budget: {kind: linf, eps: 8}": "budget.kind is 'linf'",
    "budget: {kind: patch, mask: hat, area: 0.1}": "budget.mask is 'hat'",
    "recipes: [{name: a, steps: 2, transform: [di]}]": "recipes[0].transform: no such key",
    "recipes: [{name: a, steps: 2, transforms: [dim]}]": "recipes[0].transforms is 'dim'",
    "recipes: [{name: a, steps: 2, models: [white_iresnet_7]}]": "recipes[0].models is 'white_ire",
    "victims: [{name: v}]": "victims[0].config is missing",
    "deadline: soon": "deadline: Invalid isoformat string: 'soon'",
    "seed: one": "seed must be a number of at least 0, got 'one'",
    "distance_weight: -3": "distance_weight must be a number from 0 to 1, got -3",
    "budget: {kind: patch, mask: glasses, area: 0.01}": "budget.area: the patch mask covers 6.77",
    "recipes: [{name: a, steps: 2, kernel: 0}]": "recipes[0].kernel must be a positive number",
    "recipes: [{name: a, steps: 2, momentum: -1}]": "recipes[0].momentum must be a number of at",
    "recipes: [{name: a, steps: 2, eot: maybe}]": "recipes[0].eot must be true or false",
    "minimal: {models: [white_iresnet_0], largest: 16, steps: 0}": "minimal.steps must be a posi",
}


@pytest.mark.parametrize("text", RULE_MISTAKES)
def test_a_mistake_in_the_rules_is_named_before_anything_is_trained(text, tmp_path, capsys):
    key = text.partition(":")[0]
    lines = (Path("configs/rules/face.yaml")).read_text().split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(f"{key}:")), len(lines))
    rest = lines[start + 1 :]
    while rest and (not rest[0] or rest[0][0] in " #"):
        rest.pop(0)
    (tmp_path / "rules.yaml").write_text("\n".join([*lines[:start], text, *rest]))
    argv = ["competition", "face", f"--workdir={tmp_path}", f"--rules={tmp_path / 'rules.yaml'}"]
    assert stop_with_one_line(main, argv) == 2
    assert RULE_MISTAKES[text] in capsys.readouterr().err
    assert not (tmp_path / "members").exists()


def test_driving_and_deepfake_rules_name_their_mistakes():
    driving_rules = read_rules("configs/rules/driving.yaml")
    for change, message in (
        ({"search": {"methods": ["gradients"]}}, "search.methods is 'gradients'"),
        ({"traffic": {"horizons": 2.0}}, "traffic.horizons: no such key; did you mean 'horizon'"),
        ({"texture_attack": {"step": 3}}, "texture_attack.step: no such key"),
        ({"vehicles": 0}, "vehicles must be a positive number"),
        ({"vehicles": 40}, "traffic: no room for 40 vehicles"),
        ({"texture_attack": {"objective": "hidee"}}, "texture_attack: objective 'hidee'; known"),
        ({"texture_attack": {"surface": "roof"}}, "texture_attack: surface 'roof'; known: rear"),
        ({"texture_attack": {"steps": 0}}, "texture_attack: texture attack: steps and batch must"),
        ({"texture_attack": {"diversity": 2}}, "diversity and diversity_rate are shares"),
        ({"search": {"methods": ["cem"], "restarts": 0}}, "search.restarts must be a positive"),
        ({"search": {"restarts": 4}}, "search.methods must be a list of at least one"),
        ({"traffic": {"dt": 0}}, "traffic: dt must be positive, got 0"),
        ({"traffic": {"lanes": 0}}, "traffic: lanes must be at least 1, got 0"),
        ({"traffic": {"miss": 1.5}}, "traffic: miss must lie in [0, 1)"),
        ({"paint": [2, 3]}, "paint: a color is three numbers of 0 to 1, got [2, 3]"),
        ({"perception": {"confidence": 7}}, "perception.confidence must be a number from 0 to 1"),
        ({"ego": {"replan": 0}}, "ego.replan must be a positive number, got 0"),
        ({"trajectory_attack": {"methods": ["cem"]}}, "trajectory_attack.scenes must be a positi"),
        (
            {"trajectory_attack": {"scenes": 2, "objective": "up"}},
            "trajectory_attack: objective 'up'; known: average",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_rules("driving", {**driving_rules, **change})
    with pytest.raises(ConfigError, match="metric is 'nmi'"):
        check_rules("deepfake", {**read_rules("configs/rules/deepfake.yaml"), "metric": "nmi"})
    with pytest.raises(ConfigError, match="clusters must be a positive number, got 0"):
        check_rules("deepfake", {**read_rules("configs/rules/deepfake.yaml"), "clusters": 0})
