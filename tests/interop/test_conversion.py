"""The rule between Flax paths and PyTorch keys, and models found by name."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop import catalog, checkpoint, conversion
from jaxmodels.interop.conversion import CheckpointMismatch, same_bytes
from tests.interop import tiny_model

NAME = "vision.tiny"


@pytest.fixture(autouse=True)
def tiny(tmp_path, monkeypatch):
    """A package folder in which the only model is `vision.tiny`."""
    (tmp_path / "package" / "vision").mkdir(parents=True)
    (tmp_path / "package" / "vision" / "tiny.py").touch()
    monkeypatch.setattr(catalog, "_PACKAGE", tmp_path / "package")
    monkeypatch.setitem(sys.modules, "jaxmodels.vision.tiny", tiny_model)


def state(dtype=np.float32) -> dict[str, np.ndarray]:
    r = np.random.default_rng(0)

    def normalization(owner):
        return {
            f"{owner}.weight": r.normal(size=4).astype(dtype),
            f"{owner}.bias": r.normal(size=4).astype(dtype),
            f"{owner}.running_mean": r.normal(size=4).astype(dtype),
            f"{owner}.running_var": r.uniform(1, 2, size=4).astype(dtype),
            f"{owner}.num_batches_tracked": np.array(12345678901, np.int64),
        }

    return {
        "stem.0.weight": r.normal(size=(4, 2, 3, 3)).astype(dtype),
        **normalization("stem.1"),
        **normalization("tower"),
        "gamma": r.normal(size=4).astype(dtype),
        "classifier.weight": r.normal(size=(3, 4)).astype(dtype),
        "classifier.bias": r.normal(size=3).astype(dtype),
        "grid": np.array([5, 6, 7], np.int32),
    }


def test_import_puts_every_kind_of_leaf_where_flax_has_it():
    _, variables = jaxmodels.load(NAME, state())
    params, want = variables["params"], state()
    np.testing.assert_array_equal(
        params["stem.0"]["kernel"], want["stem.0.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(params["classifier"]["kernel"], want["classifier.weight"].T)
    np.testing.assert_array_equal(params["stem.1"]["scale"], want["stem.1.weight"])
    stats = variables["batch_stats"]["tower"]
    np.testing.assert_array_equal(stats["var"], want["tower.running_var"])
    assert variables["buffers"]["tower"]["num_batches_tracked"] == 12345678901
    np.testing.assert_array_equal(variables["buffers"]["grid"], [5, 6, 7])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_export_equals_the_imported_file_byte_for_byte(tmp_path, dtype):
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    checkpoint.write_safetensors(first, state(dtype))
    module, variables = jaxmodels.load(NAME, first)
    jaxmodels.save(second, NAME, module, variables)
    assert first.read_bytes() == second.read_bytes()


def test_the_loaded_model_runs_and_param_dtype_casts():
    module, variables = jaxmodels.load(NAME, state(np.float16), param_dtype=jnp.float32)
    assert variables["params"]["gamma"].dtype == np.float32
    assert variables["buffers"]["tower"]["num_batches_tracked"].dtype == np.int64
    output = jax.jit(module.apply)(variables, jnp.ones((2, 5, 5, 2)))
    assert output.shape == (2, 3) and np.isfinite(output).all()


def test_a_fresh_model_exports_pytorchs_counters_and_is_a_function_of_the_seed():
    module, variables = jaxmodels.load(NAME, seed=3)
    exported = catalog.export(NAME, module, variables)
    assert set(exported) == set(state())
    counter = exported["tower.num_batches_tracked"]
    assert counter.dtype == np.int64 and counter.shape == () and counter == 0
    again = catalog.export(NAME, module, jaxmodels.load(NAME, seed=3)[1])
    assert all(same_bytes(exported[k], again[k]) for k in exported)
    other = catalog.export(NAME, module, jaxmodels.load(NAME, seed=4)[1])
    assert not same_bytes(exported["stem.0.weight"], other["stem.0.weight"])


def test_counters_that_went_through_jit_are_exported_as_int64():
    module, variables = jaxmodels.load(NAME, state())
    variables = jax.jit(lambda v: v)(
        {**variables, "buffers": jax.tree.map(lambda x: x % 1000, variables["buffers"])}
    )
    assert catalog.export(NAME, module, variables)["tower.num_batches_tracked"].dtype == np.int64


def test_a_file_without_counters_is_exported_without_them():
    old = {k: v for k, v in state().items() if not k.endswith("num_batches_tracked")}
    module, variables = jaxmodels.load(NAME, old)
    assert set(catalog.export(NAME, module, variables, like=old)) == set(old)


def test_all_that_does_not_fit_is_reported_at_once_with_the_nearest_names():
    bad = state()
    bad["stem.0.wieght"] = bad.pop("stem.0.weight")
    bad["classifier.weight"] = np.zeros((7, 4), np.float32)
    bad["stem.1.runing_mean"] = bad.pop("stem.1.running_mean")
    bad["extra.thing"] = np.zeros(9, np.float32)
    with pytest.raises(CheckpointMismatch) as error:
        jaxmodels.load(NAME, bad)
    text = str(error.value)
    assert "2 missing, 3 unexpected, 1 mis-shaped" in text.splitlines()[0]
    assert "missing    stem.0.weight [4, 2, 3, 3]  (nearest in the file: stem.0.wieght" in text
    assert "unexpected stem.1.runing_mean [4]  (nearest in the model: stem.1.running_mean)" in text
    assert "classifier.weight is [7, 4] in the file, [3, 4] in the model" in text
    assert "unexpected extra.thing [9]" in text


def test_a_square_kernel_is_transposed_whatever_its_shape():
    weight = np.arange(16, dtype=np.float32).reshape(4, 4)
    template = {"params": {"proj": {"kernel": jax.ShapeDtypeStruct((4, 4), jnp.float32)}}}
    variables, _ = conversion.from_torch({"proj.weight": weight}, template)
    np.testing.assert_array_equal(variables["params"]["proj"]["kernel"], weight.T)


def test_skip_leaves_the_classifier_fresh_and_takes_the_rest():
    wanted = {**state(), "classifier.weight": np.zeros((9, 4)), "classifier.bias": np.zeros(9)}
    _, variables = jaxmodels.load(NAME, wanted, skip="classifier", num_classes=5)
    assert variables["params"]["classifier"]["kernel"].shape == (4, 5)
    assert np.any(np.asarray(variables["params"]["classifier"]["kernel"]))
    np.testing.assert_array_equal(variables["params"]["gamma"], state()["gamma"])


@pytest.mark.parametrize("fresh", [0, 1])
def test_skipping_one_of_scanned_layers_takes_the_others(fresh):
    r = np.random.default_rng(0)
    wanted = {}
    for i in range(2):
        wanted[f"encoder.layer.{i}.weight"] = r.normal(size=(4, 4)).astype(np.float32)
        wanted[f"encoder.layer.{i}.bias"] = np.full(4, 5.0, np.float32)
    module, variables = jaxmodels.load("tiny_stack", wanted, skip=rf"encoder\.layer\.{fresh}")
    found, own = (v["params"]["encoder.layer.*"] for v in (variables, catalog.initialize(module)))
    taken = 1 - fresh
    np.testing.assert_array_equal(found["kernel"][taken], wanted[f"encoder.layer.{taken}.weight"].T)
    np.testing.assert_array_equal(found["kernel"][fresh], own["kernel"][fresh])
    np.testing.assert_array_equal(found["bias"].sum(-1), [20 * taken, 20 * fresh][::-1])


def test_a_prefix_on_every_name_is_found_and_other_parts_are_left_out():
    prefixed = {f"backbone.{k}": v for k, v in state().items()} | {"head.weight": np.zeros(3)}
    found = catalog.find(NAME)
    variables, done = catalog.import_state(found, found.build(), prefixed)
    assert done.prefix == "backbone." and done.dropped == ["head.weight"]
    np.testing.assert_array_equal(variables["params"]["gamma"], state()["gamma"])


def test_a_usual_prefix_is_reported_and_an_unknown_one_refused_until_it_is_named(caplog):
    def behind(prefix):
        return {f"{prefix}{k}": v for k, v in state().items()} | {"head.weight": np.zeros(3)}

    with caplog.at_level("INFO"):
        jaxmodels.load(NAME, behind("module.encoder."))
    said = "taken from prefix module.encoder.; left out: 1 entries, first head.weight"
    assert said in caplog.text
    with pytest.raises(CheckpointMismatch) as error:
        jaxmodels.load(NAME, behind("foo."))
    text = str(error.value)
    assert "'foo.', which is no usual prefix" in text and "prefix='foo.' takes it" in text
    assert all(f"unexpected {key}" in text for key in behind("foo."))
    _, variables = jaxmodels.load(NAME, behind("foo."), prefix="foo.")
    np.testing.assert_array_equal(variables["params"]["gamma"], state()["gamma"])
    with pytest.raises(CheckpointMismatch, match=r"no name begins with the prefix 'bar\.'"):
        jaxmodels.load(NAME, behind("foo."), prefix="bar.")
    template = catalog.shapes(catalog.find(NAME).build())
    _, done = conversion.from_torch(behind("foo."), template, {"prefixes": ["foo"]})
    assert done.prefix == "foo."


def test_scanned_layers_are_numbered_in_the_checkpoint():
    r = np.random.default_rng(1)
    layers = {}
    for n in range(2):
        layers[f"encoder.layer.{n}.weight"] = r.normal(size=(4, 4)).astype(np.float32)
        layers[f"encoder.layer.{n}.bias"] = r.normal(size=4).astype(np.float32)
    module, variables = jaxmodels.load("tiny_stack", layers)
    kernel = variables["params"]["encoder.layer.*"]["kernel"]
    np.testing.assert_array_equal(kernel[1], layers["encoder.layer.1.weight"].T)
    exported = catalog.export("tiny_stack", module, variables)
    assert all(same_bytes(exported[k], layers[k]) for k in layers) and set(exported) == set(layers)
    x = r.normal(size=(2, 4)).astype(np.float32)
    want = x
    for n in range(2):
        want = want @ layers[f"encoder.layer.{n}.weight"].T + layers[f"encoder.layer.{n}.bias"]
    np.testing.assert_allclose(module.apply(variables, x), want, rtol=1e-5, atol=1e-5)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_two_paths_that_join_to_one_name_are_refused():
    with pytest.raises(ValueError, match=r"join to 'params/a\.b\.kernel'"):
        conversion.entries(
            {"params": {"a.b": {"kernel": leaf(2, 2)}, "a": {"b": {"kernel": leaf(2, 2)}}}}
        )
    with pytest.raises(ValueError, match=r"both convert to 'n\.weight'"):
        conversion.entries({"params": {"n": {"scale": leaf(2), "weight": leaf(2)}}})


def test_rules_for_tied_weights_renamed_prefixes_and_other_layouts():
    template = {"params": {"wte": {"embedding": leaf(5, 3)}, "up": {"kernel": leaf(2, 2, 3, 4)}}}
    rules = {
        "aliases": {"lm_head.weight": "wte.weight"},
        "names": [("up.", "decoder.up.")],
        "arrays": [(r"decoder\.up\.weight", *conversion.TRANSPOSED_CONVOLUTION)],
        "travels": [r"position_ids"],
        "drops": [r"loss\..*"],
    }
    rules = conversion.resolve_rules(rules)
    table = np.arange(15, dtype=np.float32).reshape(5, 3)
    up = np.arange(48, dtype=np.float32).reshape(3, 4, 2, 2)
    file = {
        "wte.weight": table, "lm_head.weight": table, "decoder.up.weight": up,
        "position_ids": np.arange(4), "loss.weight": np.zeros(2),
    }  # fmt: skip
    variables, done = conversion.from_torch(file, template, rules)
    assert done.aliases == ["lm_head.weight"] and done.dropped == ["loss.weight"]
    np.testing.assert_array_equal(
        variables["params"]["up"]["kernel"], up[:, :, ::-1, ::-1].transpose(2, 3, 0, 1)
    )
    exported = conversion.to_torch(variables, rules)
    assert set(exported) == set(file) - {"loss.weight"}
    assert all(same_bytes(exported[k], file[k]) for k in exported)
    only_alias = {k: v for k, v in file.items() if k != "wte.weight"}
    variables, _ = conversion.from_torch(only_alias, template, rules)
    np.testing.assert_array_equal(variables["params"]["wte"]["embedding"], table)
    exported = conversion.to_torch(variables, rules, like=only_alias)
    assert set(exported) == set(only_alias) - {"loss.weight"}
    with pytest.raises(CheckpointMismatch, match=r"differs from wte\.weight"):
        conversion.from_torch({**file, "lm_head.weight": table + 1}, template, rules)


def test_a_misspelt_rule_is_named():
    with pytest.raises(ValueError, match="no entry 'alias', did you mean 'aliases'"):
        conversion.resolve_rules({"alias": {}})


def test_the_models_own_check_speaks_before_the_conversion():
    with pytest.raises(ValueError, match="a folded checkpoint: construct"):
        jaxmodels.load(NAME, {"stem.folded.weight": np.zeros(3)})


def test_names_resolve_to_modules_variants_and_classes():
    assert jaxmodels.list() == [NAME, f"{NAME}:tiny_wide", f"{NAME}:tiny_stack"]
    assert catalog.find("tiny_wide").build().width == 6
    assert catalog.find(f"{NAME}:tiny_wide").build(width=8).width == 8
    assert catalog.find(f"{NAME}:TinyHead").build(features=2).features == 2
    module, variables = jaxmodels.load(f"{NAME}:TinyHead", features=2, inputs=leaf(1, 3))
    assert variables["params"]["kernel"].shape == (3, 2) and module.features == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vision.tini", r"no model module 'vision\.tini', did you mean 'vision\.tiny'"),
        ("vision.tiny:tiny_wid", r"no variant or class 'tiny_wid', did you mean 'tiny_wide'"),
        ("tiny_wyde", r"no model 'tiny_wyde', did you mean 'tiny_wide'"),
    ],
)
def test_a_misspelt_name_gets_the_nearest_right_one(name, message):
    with pytest.raises(ValueError, match=message) as error:
        jaxmodels.load(name)
    assert "\n" not in str(error.value)


def test_a_misspelt_argument_and_absent_example_inputs_are_named():
    with pytest.raises(ValueError, match="no argument 'widht', did you mean 'width'"):
        jaxmodels.load(NAME, widht=3)
    with pytest.raises(ValueError, match=r"TinyHead has no example_inputs\(\)"):
        jaxmodels.load(f"{NAME}:TinyHead", features=2)
