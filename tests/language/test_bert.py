"""BERT-family encoders: padding, layouts of checkpoints, construction, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop import catalog, conversion
from jaxmodels.interop.conversion import CheckpointMismatch
from jaxmodels.language import bert
from jaxmodels.language.bert import Bert
from jaxmodels.layers.activations import ACTIVATIONS

TINY = dict(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=12,
)


@functools.cache
def tiny(**changes):
    module = Bert(**{**TINY, **changes})
    return module, catalog.initialize(module, 1)


def state_of(module, variables):
    return {k: np.asarray(v) for k, v in catalog.export("language.bert", module, variables).items()}


IDS = jnp.asarray(np.random.default_rng(0).integers(1, 50, (3, 7)))
MASK = (jnp.arange(7)[None] < jnp.array([7, 4, 1])[:, None]).astype(jnp.int32)


def test_appended_padding_and_batch_order_change_no_vector():
    module, variables = tiny()
    first = module.apply(variables, IDS, MASK)[:, 0]
    wide = module.apply(variables, jnp.pad(IDS, ((0, 0), (0, 5))), jnp.pad(MASK, ((0, 0), (0, 5))))
    np.testing.assert_allclose(wide[:, 0], first, atol=1e-6)
    order = jnp.array([2, 0, 1])
    moved = module.apply(variables, IDS[order], MASK[order])[:, 0]
    np.testing.assert_allclose(moved, first[order], atol=1e-6)


def test_scanned_and_rematerialized_blocks_compute_the_same():
    module, variables = tiny()
    state = state_of(module, variables)
    outputs = module.apply(variables, IDS, MASK, method="intermediates")
    scanned, stacked = jaxmodels.load("language.bert", state, **TINY, scan_layers=True, remat=True)
    assert stacked["params"]["encoder.layer.*"]["output.dense"]["kernel"].shape == (3, 24, 16)
    for name, value in scanned.apply(stacked, IDS, MASK, method="intermediates").items():
        np.testing.assert_allclose(value, outputs[name], atol=2e-6, err_msg=name)
    again = state_of(scanned, stacked)
    assert all(conversion.same_bytes(again[k], state[k]) for k in state) and len(again) == len(
        state
    )


def test_initialization_is_the_published_one():
    _, variables = tiny(hidden_size=64, vocab_size=400)
    table = variables["params"]["embeddings"]["word_embeddings"]["embedding"]
    assert not table[0].any() and abs(float(table[1:].std()) - 0.02) < 5e-4
    block = variables["params"]["encoder.layer.0"]
    assert abs(float(block["intermediate.dense"]["kernel"].std()) - 0.02) < 1e-3
    assert not block["intermediate.dense"]["bias"].any()


@pytest.mark.parametrize(
    ("variant", "millions"),
    [
        ("bert-base-uncased", 109.48),
        ("ernie-2.0-base-en", 109.48),
        ("ernie-2.0-large-en", 335.14),
        ("distilbert-base-uncased", 66.36),
    ],
)
def test_variants_have_the_published_sizes(variant, millions):
    module = catalog.find(f"language.bert:{variant}").build(scan_layers=True)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *module.example_inputs())
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    assert count / 1e6 == pytest.approx(millions, abs=0.01)


def test_old_and_prefixed_files_load_and_pretraining_heads_are_left():
    module, variables = tiny()
    state = state_of(module, variables)
    old = {
        "module.bert."
        + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): v
        for k, v in state.items()
    }
    old["module.cls.predictions.bias"] = np.zeros(50, np.float32)
    old["module.bert.embeddings.position_ids"] = np.arange(12)[None]
    _, loaded = jaxmodels.load("language.bert", old, **TINY)
    np.testing.assert_array_equal(
        module.apply(loaded, IDS, MASK), module.apply(variables, IDS, MASK)
    )
    plain = {**state, "cls.predictions.bias": np.zeros(50, np.float32)}
    jaxmodels.load("language.bert", plain, **TINY)


def test_a_missing_block_is_named():
    module, variables = tiny()
    state = state_of(module, variables)
    lost = {k: v for k, v in state.items() if "layer.1.output.dense.weight" not in k}
    with pytest.raises(CheckpointMismatch, match=r"encoder\.layer\.1\.output\.dense\.weight"):
        jaxmodels.load("language.bert", lost, **TINY)


def test_a_student_of_n_blocks_is_the_parents_hidden_state_n():
    module, variables = tiny()
    student_state = bert.first_blocks(state_of(module, variables), 2)
    shapes = {k: v.shape for k, v in student_state.items()}
    arguments = bert.arguments_of_checkpoint(shapes, num_attention_heads=2)
    assert arguments["num_hidden_layers"] == 2 and arguments["pooler"]
    student, loaded = jaxmodels.load("language.bert", student_state, **arguments)
    wanted = module.apply(variables, IDS, MASK, method="hidden_states")[2]
    np.testing.assert_allclose(student.apply(loaded, IDS, MASK), wanted, atol=1e-6)
    with pytest.raises(ValueError, match="4 blocks from a parent of 3"):
        bert.first_blocks(state_of(module, variables), 4)
    with pytest.raises(ValueError, match="num_attention_heads must be given"):
        bert.arguments_of_checkpoint(shapes)


def test_a_folder_with_config_json_needs_no_arguments(tmp_path):
    import json

    module, variables = tiny(hidden_act="relu", layer_norm_eps=1e-5)
    jaxmodels.save(tmp_path / "model.safetensors", "language.bert", module, variables)
    config = {**TINY, "hidden_act": "relu", "layer_norm_eps": 1e-5, "model_type": "bert"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}))
    loaded, weights = jaxmodels.load("language.bert", tmp_path)
    assert loaded.layer_norm_eps == 1e-5 and loaded.hidden_act == "relu"
    np.testing.assert_array_equal(loaded.apply(weights, IDS), module.apply(variables, IDS))
    distil = bert.arguments_of_config(
        {"model_type": "distilbert", "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 9}
    )
    assert distil["architecture"] == "distilbert" and distil["hidden_size"] == 8
    with pytest.raises(ValueError, match="model_type 'roberta'; known"):
        bert.arguments_of_config({"model_type": "roberta"})


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS.at[0, 0].set(50), None, r"input_ids holds 50; vocab_size is 50"),
        (jnp.ones((1, 13), jnp.int32), None, r"rows of 13 tokens; the position table ends at 12"),
        (IDS, MASK.at[2].set(0), r"row 2 is all padding"),
        (IDS, (1.0 - MASK) * -1e9, r"wanted bool or integers"),
        (IDS, 1 - MASK, r"row 0 is all padding"),
        (IDS[1:], 1 - MASK[1:], r"row 0 hides its first token: inverted\?"),
        (IDS, MASK * 2, r"attention_mask holds 0\.\.2"),
        (IDS, MASK[:2], r"attention_mask \(2, 7\) for input_ids \(3, 7\)"),
    ],
)
def test_wrong_inputs_are_refused(ids, mask, message):
    module, variables = tiny()
    with pytest.raises(ValueError, match=message):
        module.apply(variables, ids, mask)


def test_wrong_constructions_are_refused():
    with pytest.raises(ValueError, match="hidden_size 16 is not divisible by num_attention_heads"):
        Bert(**{**TINY, "num_attention_heads": 3})
    with pytest.raises(ValueError, match="hidden_act 'gelo'"):
        Bert(**TINY, hidden_act="gelo")
    with pytest.raises(ValueError, match="architecture 'bart', did you mean 'bert'"):
        Bert(**TINY, architecture="bart")


@pytest.mark.parametrize(
    ("name", "at_minus_one", "at_twelve"),
    [
        ("gelu_10", -0.158655, 10),
        ("gelu_fast", -0.158808, 12),
        ("quick_gelu", -0.154204, 12),
        ("relu2", 0, 144),
        ("relu6", 0, 6),
        ("leaky_relu", -0.01, 12),
        ("hardswish", -1 / 3, 12),
        ("mish", -0.303401, 12),
        ("linear", -1, 12),
    ],
)
def test_activations_are_those_that_transformers_has_under_the_name(name, at_minus_one, at_twelve):
    values = ACTIVATIONS[name](jnp.array([-1.0, 12.0]))
    np.testing.assert_allclose(values, [at_minus_one, at_twelve], atol=2e-6)
    assert tiny(hidden_act=name)[0].hidden_act == name
