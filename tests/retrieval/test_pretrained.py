"""Students and rerankers from one pre-trained encoder's state dict."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop import catalog
from jaxmodels.retrieval.pretrained import prepare_state

SIZES = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 8,
    "type_vocab_size": 4,
}
IDS = jnp.array([[2, 5, 6, 3, 0], [2, 7, 3, 0, 0]])


@pytest.fixture(scope="module")
def parent():
    module, variables = jaxmodels.load("language.bert", num_hidden_layers=3, **SIZES)
    states = module.apply(variables, IDS, IDS != 0, method="hidden_states")
    return catalog.export("language.bert", module, variables), states


@pytest.mark.parametrize(("blocks", "prefix"), [(1, "bert."), (3, "ernie.")])
def test_a_student_of_n_blocks_gives_the_parents_hidden_state_n(parent, blocks, prefix):
    state, states = parent
    # Files of pre-training carry a prefix and heads.
    file = {f"{prefix}{k}": v for k, v in state.items()} | {"cls.predictions.bias": np.zeros(20)}
    if prefix == "ernie.":  # it has task types, which a plain BERT does not read
        file["ernie.embeddings.task_type_embeddings.weight"] = np.ones((3, 8), np.float32)
    module = catalog.find("retrieval.dual_encoder").build(num_hidden_layers=blocks, **SIZES)
    student, variables = jaxmodels.load(
        "retrieval.dual_encoder",
        prepare_state(file, module),
        num_hidden_layers=blocks,
        **SIZES,
    )
    for vectors in student.apply(variables, IDS, None, IDS):
        np.testing.assert_allclose(vectors, states[blocks][:, 0], rtol=1e-5, atol=1e-6)


def test_a_retrievers_own_file_keeps_its_names_and_loses_blocks():
    module, variables = jaxmodels.load("retrieval.dual_encoder", num_hidden_layers=2, **SIZES)
    state = catalog.export("retrieval.dual_encoder", module, variables)
    smaller = module.clone(num_hidden_layers=1)
    kept = prepare_state(state, smaller)
    assert set(kept) == {k for k in state if ".layer.1." not in k}


def test_a_deeper_student_than_its_parent_is_refused(parent):
    module = catalog.find("retrieval.cross_encoder").build(num_hidden_layers=4, **SIZES)
    with pytest.raises(ValueError, match="a student of 4 blocks from a parent of 3"):
        prepare_state(parent[0], module)
    assert "encoder.embeddings.word_embeddings.weight" in prepare_state(
        parent[0], module.clone(num_hidden_layers=2)
    )
