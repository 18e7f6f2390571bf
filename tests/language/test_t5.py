import functools
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop import catalog, checkpoint
from jaxmodels.language import decoding, t5, t5_generation

SIZES = {
    "vocab_size": 40,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 3,
    "eos_token_id": 2,
}
GATED = {**SIZES, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
IDS = np.array([[5, 9, 11, 30, 7, 2], [8, 3, 2, 0, 0, 0]])
MASK = (IDS > 0).astype(np.int32)
TARGET = np.array([[0, 1, 6, 20, 4], [0, 1, 33, 21, 22]])


@functools.cache
def tiny(gated=False, seed=0):
    """A model with random numbers everywhere, norms included; no program is compiled for it."""
    module = catalog.find("language.t5").build(**(GATED if gated else SIZES))
    rng = np.random.default_rng(seed)
    draw = lambda s: rng.normal(size=s.shape).astype(s.dtype) * 0.7  # noqa: E731
    return module, jax.tree.map(draw, catalog.shapes(module))


@functools.cache
def apply(gated=False):
    module, _ = tiny(gated)
    return jax.jit(module.apply)


@pytest.mark.parametrize("gated", [False, True])
def test_states_go_through_a_checkpoint_byte_for_byte_and_tied_copies_are_one_parameter(
    gated, tmp_path
):
    module, variables = tiny(gated)
    jaxmodels.save(tmp_path / "model.safetensors", "language.t5", module, variables)
    state = checkpoint.read(tmp_path / "model.safetensors").tensors
    assert state["encoder.block.1.layer.1.DenseReluDense.wo.weight"].shape == (16, 24)
    assert state["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"].shape == (
        32,
        3,
    )
    assert ("lm_head.weight" in state) and ("decoder.embed_tokens.weight" in state)
    assert (state["lm_head.weight"] is not None) and (
        np.array_equal(state["lm_head.weight"], state["shared.weight"]) != gated
    )
    again = jaxmodels.load("language.t5", tmp_path / "model.safetensors", **module_args(gated))[1]
    chex.assert_trees_all_equal(again["params"], variables["params"])
    for key, value in catalog.export("language.t5", module, again).items():
        assert value.tobytes() == state[key].tobytes(), key


def module_args(gated):
    return GATED if gated else SIZES


def test_a_sharded_folder_without_tied_copies_loads_by_its_config(tmp_path):
    module, variables = tiny()
    state = catalog.export("language.t5", module, variables)
    state = {k: v for k, v in state.items() if "embed_tokens" not in k and "lm_head" not in k}
    keys = sorted(state)
    shards = {"a.safetensors": keys[::2], "b.safetensors": keys[1::2]}
    for name, part in shards.items():
        checkpoint.write_safetensors(tmp_path / name, {k: state[k] for k in part})
    places = {k: name for name, part in shards.items() for k in part}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config = {**SIZES, "model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, again = t5_folder(tmp_path)
    assert loaded.tie_word_embeddings and loaded.is_scaled and loaded.num_heads == 3
    chex.assert_trees_all_equal(again["params"], variables["params"])


def test_an_encoder_alone_loads_from_its_folder_and_out_of_a_whole_checkpoint(tmp_path):
    module, variables = tiny()
    whole = catalog.export("language.t5", module, variables)
    state = {k: v for k, v in whole.items() if k.startswith(("shared", "encoder"))}
    checkpoint.write_safetensors(tmp_path / "model.safetensors", state)
    config = {**SIZES, "model_type": "t5", "architectures": ["T5EncoderModel"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    encoder, own = t5_folder(tmp_path)
    assert set(own["params"]) == {"shared", "encoder"}
    again = catalog.export("language.t5:T5Encoder", encoder, own)
    assert {k: v.tobytes() for k, v in again.items()} == {k: v.tobytes() for k, v in state.items()}
    part = jaxmodels.load("language.t5:T5Encoder", whole, **SIZES)[1]
    chex.assert_trees_all_equal(part["params"], own["params"])
    want = module.apply(variables, IDS, MASK, method="encode")
    np.testing.assert_array_equal(encoder.apply(own, IDS, MASK), want)
    seen = encoder.apply(own, IDS, MASK, method="intermediates")
    np.testing.assert_array_equal(seen["encoder_hidden_2"], want)


def t5_folder(path):
    from jaxmodels.interop import huggingface

    return huggingface.load(path)


def test_the_tensors_say_whether_the_head_is_tied_whatever_the_flag_says():
    module, variables = tiny(gated=True)
    state = catalog.export("language.t5", module, variables)
    arguments = t5.arguments_of_config({**GATED, "tie_word_embeddings": True}, state)
    assert not arguments["tie_word_embeddings"] and arguments["scale_decoder_outputs"]
    arguments = t5.arguments_of_config({**GATED, "scale_decoder_outputs": False}, state)
    assert not arguments["scale_decoder_outputs"]


def test_files_that_do_not_fit_are_refused_in_a_line():
    module, variables = tiny(gated=True)
    state = catalog.export("language.t5", module, variables)
    tied = {**GATED, "tie_word_embeddings": True}
    with pytest.raises(ValueError, match=r"lm_head.weight differs from shared.weight.*by up to"):
        jaxmodels.load("language.t5", state, **tied)
    with pytest.raises(ValueError, match="not fit"):
        jaxmodels.load("language.t5", state, **{**GATED, "feed_forward_proj": "relu"})
    del state["lm_head.weight"]
    with pytest.raises(ValueError, match=r"no lm_head.weight.*tie_word_embeddings=True"):
        jaxmodels.load("language.t5", state, **GATED)
    with pytest.raises(ValueError, match=r"gated-swish.*known"):
        jaxmodels.load("language.t5", **{**SIZES, "feed_forward_proj": "gated-swish"})


@pytest.mark.parametrize(
    "variant, parameters",
    [("codet5_small", 60_492_288), ("codet5_base", 222_882_048), ("coditt5", 222_900_480)],
)
def test_published_sizes(variant, parameters):
    module = catalog.find(f"language.t5:{variant}").build()
    shapes = catalog.shapes(module)["params"]
    assert sum(np.prod(s.shape) for s in jax.tree.leaves(shapes)) == parameters


def test_padding_on_the_right_changes_nothing_at_real_tokens():
    module, variables = tiny()
    encode = jax.jit(functools.partial(module.apply, method="encode"))
    whole = encode(variables, IDS, MASK)
    short = encode(variables, IDS[1:, :3], MASK[1:, :3])
    np.testing.assert_allclose(whole[1, :3], short[0], atol=1e-5)
    logits = apply()(variables, IDS, TARGET, MASK)
    alone = apply()(variables, IDS[1:, :3], TARGET[1:], MASK[1:, :3])
    np.testing.assert_allclose(logits[1], alone[0], atol=1e-4)


@pytest.mark.parametrize("gated", [False, True])
def test_cached_decoding_equals_full_decoding_and_beams_of_an_input_share_its_memory(gated):
    module, variables = tiny(gated)
    full = apply(gated)(variables, IDS, TARGET, MASK)
    rows = np.repeat(TARGET, 2, axis=0)

    @jax.jit
    def run(variables):
        step, cache = t5_generation.cached_decoder(module, variables, IDS, MASK, rows=4, length=5)
        logits = []
        for position in range(5):
            one, cache = step(rows[:, position], position, cache)
            logits.append(one)
        return jnp.stack(logits, axis=1)

    cached = run(variables)
    np.testing.assert_allclose(cached[::2], full, atol=2e-4)
    np.testing.assert_allclose(cached[1::2], full, atol=2e-4)


def test_a_beam_of_one_is_greedy_and_scores_are_the_rescored_log_probabilities():
    module, variables = tiny()
    generate = lambda **k: jax.jit(functools.partial(t5_generation.generate, module, **k))(  # noqa: E731
        variables, IDS, MASK
    )
    greedy = generate(max_length=9)
    two = generate(max_length=9, num_beams=2, num_return_sequences=2, length_penalty=0.7)
    tokens, lengths, scores = (np.asarray(x) for x in two)
    for i in range(2):
        for row, n, score in zip(tokens[i], lengths[i], scores[i]):
            labels = np.full((1, 8), t5.LABEL_PADDING)
            labels[0, :n] = row[1 : 1 + n]
            ids = t5.shift_right(jnp.asarray(labels))
            logits = apply()(variables, IDS[i : i + 1], ids, MASK[i : i + 1])
            total = -float(t5.token_nll(logits, jnp.asarray(labels)).sum())
            np.testing.assert_allclose(score, total / n**0.7, rtol=1e-4)

    @jax.jit
    def one_beam(variables):
        step, cache = t5_generation.cached_decoder(module, variables, IDS, MASK, rows=2, length=8)
        rules = decoding.Constraints(start=0, eos=2, pad=0, max_new=8)
        return decoding.beam_search(step, cache, rules, batch=2, beams=1)

    one = one_beam(variables)
    np.testing.assert_array_equal(one.tokens, greedy.tokens)
    np.testing.assert_array_equal(one.lengths, greedy.lengths)


def test_sampling_with_one_candidate_is_greedy_and_beams_cannot_sample():
    module, variables = tiny()
    run = jax.jit(functools.partial(t5_generation.generate, module, max_length=6, top_k=1))
    sampled = run(variables, IDS, MASK, jax.random.key(0))
    greedy = jax.jit(functools.partial(t5_generation.generate, module, max_length=6))(
        variables, IDS, MASK
    )
    assert sampled.tokens.tolist() == greedy.tokens.tolist()
    with pytest.raises(ValueError, match="sampling with 2 beams"):
        t5_generation.generate(
            module, variables, IDS, rng=jax.random.key(0), max_length=4, num_beams=2
        )


def test_layers_are_one_scanned_block_so_that_programs_do_not_grow_with_depth():
    def size(layers):
        module = catalog.find("language.t5").build(**{**SIZES, "num_layers": layers})
        shapes = catalog.shapes(module)
        text = jax.jit(module.apply).lower(shapes, IDS, TARGET, MASK).as_text()
        return len(text.splitlines())

    assert size(2) == size(9)


def test_remat_and_unrolling_change_no_gradient_under_the_same_dropout():
    module, variables = tiny()

    def gradient(module):
        def loss(params, rng):
            inputs = {"params": params}, IDS, MASK, True
            return jnp.square(module.apply(*inputs, method="encode", rngs={"dropout": rng})).sum()

        compiled = jax.jit(jax.grad(loss))
        return lambda seed: compiled(variables["params"], jax.random.key(seed))

    plain, changed = gradient(module), gradient(module.clone(remat=True, scan_unroll=2))
    first = plain(0)
    chex.assert_trees_all_close(changed(0), first, rtol=1e-4, atol=1e-4)
    table = lambda grads: grads["shared"]["embedding"]  # noqa: E731
    assert not np.allclose(table(plain(1)), table(first), atol=1e-2)


def test_shifted_labels_and_the_two_ways_to_count_padding():
    labels = jnp.array([[5, 6, 0, 0], [7, 8, 9, 0]])
    counted = t5.ignore_padding(labels)
    assert t5.shift_right(counted).tolist() == [[0, 5, 6, 0], [0, 7, 8, 9]]
    assert counted.tolist() == [[5, 6, -100, -100], [7, 8, 9, -100]]
    logits = jax.random.normal(jax.random.key(0), (2, 4, 12))
    each = t5.token_nll(logits, labels)
    np.testing.assert_allclose(t5.mean_nll(logits, labels), each.mean(), rtol=1e-6)
    wanted = (each[0, :2].sum() + each[1, :3].sum()) / 5
    np.testing.assert_allclose(t5.mean_nll(logits, counted), wanted, rtol=1e-6)
    np.testing.assert_allclose(t5.likelihood(logits, counted)[0], -each[0, :2].mean(), rtol=1e-6)


def test_generation_traces_once_for_inputs_of_one_shape():
    module, variables = tiny()
    traced = []

    @jax.jit
    def run(variables, ids, mask):
        traced.append(ids.shape)
        return t5_generation.generate(module, variables, ids, mask, max_length=4)

    for shift in range(3):
        found = run(variables, IDS + shift, MASK)
    assert len(traced) == 1
    assert decoding.trim(found)[0].shape[0] == 2


def test_added_tokens_get_rows_and_the_others_stay():
    _, variables = tiny()
    params = t5.resize_embedding(variables["params"], 64)
    assert params["shared"]["embedding"].shape == (64, 16)
    np.testing.assert_array_equal(
        params["shared"]["embedding"][:40], variables["params"]["shared"]["embedding"]
    )
    assert np.std(params["shared"]["embedding"][40:]) > 0.5
    with pytest.raises(ValueError, match="30 rows wanted, the embedding has 40"):
        t5.resize_embedding(variables["params"], 30)
    with pytest.raises(ValueError, match="untied"):
        t5.resize_embedding(tiny(gated=True)[1]["params"], 64)


def test_a_file_of_fewer_rows_is_refused_with_both_sizes_or_gets_rows_where_asked():
    module, variables = tiny()
    state = catalog.export("language.t5", module, variables)
    larger = {**SIZES, "vocab_size": 64}
    with pytest.raises(ValueError, match=r"has 40 rows, vocab_size is 64; resize_checkpoint=True"):
        jaxmodels.load("language.t5", state, **larger)
    for prefix in ("", "model."):
        file = {f"{prefix}{k}": v for k, v in state.items()}
        params = jaxmodels.load("language.t5", file, **larger, resize_checkpoint=True)[1]["params"]
        table = params["shared"]["embedding"]
        assert table.shape == (64, 16) and 0.8 < np.std(table[40:]) < 1.2
        np.testing.assert_array_equal(table[:40], variables["params"]["shared"]["embedding"])
    untied = catalog.export("language.t5", *tiny(gated=True))
    with pytest.raises(ValueError, match="has 40 rows, vocab_size is 64"):
        jaxmodels.load("language.t5", untied, **{**GATED, "vocab_size": 64}, resize_checkpoint=True)


def test_ids_outside_the_vocabulary_and_empty_rows_are_named():
    t5.check_ids(IDS, 40)
    with pytest.raises(ValueError, match=r"input \[0, 3\]: token id 30 is not in 0..29"):
        t5.check_ids(IDS, 30)
    module, variables = tiny()
    with pytest.raises(ValueError, match=r"input \[1\] is empty"):
        t5_generation.generate(module, variables, IDS * [[1], [0]], max_length=4)
    for wrong in (40, -4):
        ids = np.where(IDS == 3, wrong, IDS)
        for call in (
            lambda ids=ids: module.apply(variables, ids, TARGET),
            lambda ids=ids: module.apply(variables, TARGET, ids),
            lambda ids=ids: t5_generation.generate(module, variables, ids, max_length=4),
        ):
            with pytest.raises(ValueError, match=rf"input \[1, 1\]: token id {wrong} is not in 0"):
                call()


def test_a_lightning_checkpoint_loads_by_its_prefix():
    module, variables = tiny()
    state = {f"model.{k}": v for k, v in catalog.export("language.t5", module, variables).items()}
    old = "model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    state[old] = np.zeros((32, 3), np.float32)
    again = jaxmodels.load("language.t5", state, **SIZES)[1]
    chex.assert_trees_all_equal(again["params"], variables["params"])
