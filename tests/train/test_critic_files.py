"""Licensed files that nobody can ship: absent, broken or foreign ones are named in one line."""

import dataclasses
import functools
import zipfile

import jax
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop import catalog, checkpoint
from train.naming import ConfigError
from train.video_critics import build_critics, load_face_model

NETWORKS = {
    "lpips": {"net": "alex", "width_divisor": 32},
    "identity": {"width_divisor": 32, "se_reduction": 2},
    "landmarks": {"width_divisor": 32, "num_modules": 1},
    "mesh": {"width_divisor": 32, "stages": (1, 1, 1, 1), "hidden": 8},
}


@functools.cache
def critics_of(term):
    """Critics of one term, and its variables' shapes."""
    weights = {name: float(name == term) for name in NETWORKS}
    args = {"weights": weights, "networks": {term: NETWORKS[term]}, "files": {term: "x"}}
    critics = build_critics(args, say=lambda text: None)
    return critics, jax.eval_shape(critics.init, jax.random.key(0))


def critics_with(term, path):
    """The same with the network to come from `path`."""
    critics, shapes = critics_of(term)
    return dataclasses.replace(critics, files={term: str(path)}), shapes


@pytest.mark.parametrize("term", NETWORKS)
def test_an_absent_network_is_named_with_the_setting_that_does_without_it(term):
    critics, shapes = critics_with(term, "absent.pth")
    with pytest.raises(FileNotFoundError) as error:
        critics.load(shapes)
    assert f"no file 'absent.pth'; config.task_args.weights.{term}=0 runs" in str(error.value)


@pytest.mark.parametrize("term", NETWORKS)
def test_a_broken_or_foreign_network_is_named(term, tmp_path):
    broken, foreign = tmp_path / "broken.pth", tmp_path / "foreign.safetensors"
    broken.write_bytes(np.random.default_rng(0).bytes(300))
    checkpoint.write_safetensors(foreign, {"stem.weight": np.zeros((2, 2), np.float32)})
    for path, message in ((broken, "broken.pth"), (foreign, "stem.weight")):
        critics, shapes = critics_with(term, path)
        with pytest.raises(ValueError) as error:
            critics.load(shapes)
        assert message in str(error.value)


def test_the_landmark_networks_published_archive_is_named_with_the_way_to_export_it(tmp_path):
    path = tmp_path / "2DFAN4-cd938726ad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("data.pkl", "constants.pkl"):
            archive.writestr(f"2DFAN4/{name}", b"\x80\x02}q\x00.")
    critics, shapes = critics_with("landmarks", path)
    with pytest.raises(ValueError, match=r"TorchScript archive; save torch\.jit\.load\(it\)"):
        critics.load(shapes)


def test_lpips_takes_its_trunk_and_its_linear_maps_from_two_files(tmp_path):
    module, variables = jaxmodels.load("video.lpips", **NETWORKS["lpips"])
    state = catalog.export("video.lpips", module, variables)
    trunk = {f"features.{k.split('.', 2)[2]}": v for k, v in state.items() if k.startswith("net.")}
    linear = {k: v for k, v in state.items() if k.startswith("lin") and not k.startswith("lins")}
    files = [tmp_path / "alexnet.safetensors", tmp_path / "lpips.safetensors"]
    for path, tensors in zip(files, (trunk, linear)):
        checkpoint.write_safetensors(path, tensors)
    critics, shapes = critics_with("lpips", f"{files[0]}+{files[1]}")
    loaded = critics.load(shapes)["lpips"]["params"]
    jax.tree.map(np.testing.assert_array_equal, loaded, variables["params"])
    files[1].unlink()
    with pytest.raises(FileNotFoundError) as error:
        critics.load(shapes)
    assert f"no file '{files[1]}'" in str(error.value)


def flame(vertices=12, **changes):
    """Arrays of FLAME's names and forms."""
    rng = np.random.default_rng(0)
    arrays = {
        "v_template": rng.normal(size=(vertices, 3)),
        "shapedirs": rng.normal(size=(vertices, 3, 400)),
        "posedirs": rng.normal(size=(vertices, 3, 36)),
        "J_regressor": rng.normal(size=(5, vertices)),
        "weights": rng.normal(size=(vertices, 5)),
        "f": rng.integers(0, vertices, (8, 3)),
        "kintree_table": np.array([[4294967295, 0, 1, 1, 1], [0, 1, 2, 3, 4]]),
    }
    return {k: v for k, v in {**arrays, **changes}.items() if v is not None}


MISFITS = {
    "lacks weights": {"weights": None},
    "weights is [12, 4], wanted [12, 5]": {"weights": np.zeros((12, 4))},
    "J_regressor is [5, 9], wanted [5, 12]": {"J_regressor": np.zeros((5, 9))},
    "posedirs is [12, 3, 9], wanted [12, 3, 36] or [36, 36]": {"posedirs": np.zeros((12, 3, 9))},
    "shapedirs hold 40 directions, too few for 50": {"shapedirs": np.zeros((12, 3, 40))},
    "f names vertices beyond its 12": {"f": np.full((2, 3), 12)},
    "v_template is [], wanted": {"v_template": np.zeros(())},
}


@pytest.mark.parametrize("message", MISFITS)
def test_a_face_model_that_does_not_fit_itself_is_named(message, tmp_path):
    np.savez(tmp_path / "flame.npz", **flame(**MISFITS[message]))
    with pytest.raises(ConfigError) as error:
        load_face_model(str(tmp_path / "flame.npz"), "config.task_args.weights.mesh=0")
    assert message in str(error.value) and "flame.npz" in str(error.value)


def test_face_models_are_npz_files_and_absent_ones_are_named(tmp_path):
    switch = "config.task_args.weights.mesh=0"
    with pytest.raises(FileNotFoundError, match=f"no file 'flame.npz'; {switch} runs without"):
        load_face_model("flame.npz", switch)
    (tmp_path / "generic_model.pkl").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(ConfigError, match=r"generic_model\.pkl is no npz file; a pickle"):
        load_face_model(str(tmp_path / "generic_model.pkl"), switch)
    (tmp_path / "broken.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"broken\.npz: not a readable npz file"):
        load_face_model(str(tmp_path / "broken.npz"), switch)
    np.savez(tmp_path / "flame.npz", **flame())
    face = load_face_model(str(tmp_path / "flame.npz"), switch)
    assert face.v_template.shape == (12, 3) and face.shape_size == 100


def test_control_wants_the_landmarks_of_a_face_model(tmp_path):
    from configs.pose_control import get_config
    from train.building import build_task

    np.savez(tmp_path / "flame.npz", **flame())
    config = get_config()
    config.task_args.face_model_from = str(tmp_path / "flame.npz")
    with pytest.raises(ConfigError, match=r"flame\.npz has no landmarks \(full_lmk_faces_idx"):
        build_task(config)
