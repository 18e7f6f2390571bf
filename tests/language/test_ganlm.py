"""What must hold of GanLM's network, checkpoints and decoding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels.interop import catalog, checkpoint
from jaxmodels.interop.conversion import CheckpointMismatch
from jaxmodels.language import ganlm_generation as generation
from jaxmodels.language.ganlm import GanLM, count_parameters, rotate_right
from jaxmodels.language.ganlm_objective import Objective, three_passes
from jaxmodels.language.ganlm_stacks import ClassificationHead, DetectionHead, position_indices
from tests import golden_case

SIZES = dict(
    vocab_size=160,
    embed_dim=16,
    encoder_ffn_embed_dim=24,
    decoder_ffn_embed_dim=24,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_layers=2,
    generator_decoder_layers=2,
    discriminator_decoder_layers=1,
    max_source_positions=24,
    max_target_positions=24,
)
PAD, EOS = 1, 2


@functools.cache
def model(**changes):
    module = GanLM(**SIZES, **changes)
    variables = catalog.initialize(module, seed=1)
    # Initial biases and norms are zeros and ones: moved, or mistakes in them would not show.
    rng = np.random.default_rng(0)
    moved = jax.tree.map(
        lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(x.dtype), variables
    )
    return module, moved


@pytest.fixture(scope="module")
def tokens():
    rng = np.random.default_rng(3)
    return (
        jnp.asarray(rng.integers(4, 50, (2, 9)), jnp.int32),
        jnp.asarray(rng.integers(4, 50, (2, 7)), jnp.int32),
    )


@functools.cache
def passes(module):
    def run(module, source, target):
        memory = module.encode(source)
        return (
            memory,
            module.generate(target, memory, source),
            module.detect(target, memory, source),
        )

    return jax.jit(lambda v, s, t: module.apply(v, s, t, method=run))


def test_the_generator_is_causal_and_the_discriminator_is_not(tokens):
    module, variables = model()
    source, target = tokens
    _, logits, verdicts = passes(module)(variables, source, target)
    _, changed, moved = passes(module)(variables, source, target.at[:, -1].add(1))
    np.testing.assert_allclose(changed[:, :-1], logits[:, :-1], atol=1e-6)
    assert np.abs(moved[:, :-1] - verdicts[:, :-1]).max() > 1e-4


def test_padding_drawn_among_real_tokens_gets_no_gradient(tokens):
    # PyTorch's tables have a padding_idx; a generator may draw that id.
    module, variables = model()
    source, target = tokens[0], tokens[1].at[0, 2].set(PAD)

    def loss(params):
        logits = module.apply(
            {"params": params},
            method=lambda m: m.detect(target, m.encode(source), source),
        )
        return (logits**2).sum()

    grads = jax.jit(jax.grad(loss))(variables["params"])
    for stack, table in (
        ("encoder.discriminator", "embed_tokens"),
        ("decoder.discriminator", "embed_positions"),
    ):
        rows = np.abs(grads[stack][table]["embedding"]).sum(-1)
        assert rows[PAD] == 0 and rows.max() > 0


def test_both_heads_have_the_activation_that_they_are_given():
    x = jax.random.normal(jax.random.key(0), (3, 8))
    types = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    head, classifier = (
        DetectionHead("relu", 1e-5, **types),
        ClassificationHead(4, "relu", 0, **types),
    )
    for module in (head, classifier):
        params = module.init(jax.random.key(1), x)["params"]
        # Before the activation everything is negative, so that relu leaves the last bias alone.
        params["dense"]["bias"] = jnp.full(8, -100.0)
        bias = params.get("out_proj", params)["bias"]
        y = module.apply({"params": params}, x)
        np.testing.assert_array_equal(y, jnp.broadcast_to(bias, y.shape))


def test_left_and_right_padding_of_the_source_give_real_tokens_the_same_output(tokens):
    module, variables = model()
    source, target = tokens
    gap = jnp.full((2, 3), PAD, jnp.int32)
    right = jnp.concatenate([source, gap], axis=1)
    left = jnp.concatenate([gap, source], axis=1)
    memory, logits, _ = passes(module)(variables, right, target)
    shifted, same, _ = passes(module)(variables, left, target)
    np.testing.assert_allclose(shifted[:, 3:], memory[:, :9], atol=1e-5)
    np.testing.assert_allclose(same, logits, atol=1e-5)
    np.testing.assert_array_equal(position_indices(left, PAD), [[1, 1, 1, *range(2, 11)]] * 2)


@pytest.mark.parametrize("strategy", ["generator", "discriminator"])
def test_cached_decoding_gives_the_logits_and_the_beams_of_full_decoding(strategy, tokens):
    module, variables = model(initialization_strategy=strategy)
    source, target = tokens

    @jax.jit
    def both(variables):
        memory = module.apply(variables, source, method="encode")
        full = module.apply(variables, target, memory, source, method="generate")
        return full, generation.cached_logits(module, variables, source, target)

    full, cached = both(variables)
    np.testing.assert_allclose(cached, full, atol=1e-4)
    search = jax.jit(
        lambda v: generation.generate(
            module, v, source, beam_size=3, max_len_b=6, no_repeat_ngram_size=2
        )
    )
    found = search(variables)
    scores = jax.jit(lambda v: generation.token_scores(module, v, source, found))(variables)
    np.testing.assert_allclose(np.asarray(scores.sum(-1)) / found.lengths, found.scores, atol=1e-4)


def test_the_classifier_is_fed_the_sequence_rotated_within_its_length():
    rows = jnp.asarray([[0, 5, 6, 2, 1, 1], [0, 7, 8, 9, 10, 2]])
    np.testing.assert_array_equal(
        rotate_right(rows, PAD), [[2, 0, 5, 6, 1, 1], [2, 0, 7, 8, 9, 10]]
    )


def test_shared_layers_are_one_set_of_parameters_used_with_both_masks(tokens):
    module, variables = model(share_generator_discriminator=True)
    assert "layers.*" not in variables["params"].get("decoder.discriminator", {})
    source, target = tokens

    def detection(params):
        return passes(module)({"params": params}, source, target)[2].sum()

    gradient = jax.grad(detection)(variables["params"])["decoder.generator"]["layers.*"]
    kernel = np.asarray(gradient["fc1"]["kernel"])
    assert np.abs(kernel[0]).max() > 0 and np.abs(kernel[1]).max() == 0


def test_dropout_differs_between_two_passes_and_the_discriminator_has_none(tokens):
    module, variables = model(remat=True)
    source, target = tokens

    def run(module):
        memory = module.encode(source)
        two = [module.generate(target, memory, source, True) for _ in range(2)]
        return two, [module.detect(target, memory, source, True) for _ in range(2)]

    (first, second), (one, other) = jax.jit(
        lambda v: module.apply(v, method=run, rngs={"dropout": jax.random.key(0)})
    )(variables)
    assert np.abs(first - second).max() > 1e-2
    np.testing.assert_array_equal(one, other)


def test_rescaled_initialization_divides_the_residual_outputs_of_every_stack():
    scaled, plain = (
        catalog.initialize(GanLM(**SIZES, rescale_init=rescale))["params"]
        for rescale in (True, False)
    )
    for stack in ("encoder.discriminator", "decoder.generator", "decoder.discriminator"):
        ours, theirs = scaled[stack]["layers.*"], plain[stack]["layers.*"]
        outputs = [["self_attn", "out_proj"], ["fc2"]]
        if stack.startswith("decoder"):
            outputs.append(["encoder_attn", "out_proj"])
        for path in outputs:
            a, b = (functools.reduce(dict.__getitem__, path, tree) for tree in (ours, theirs))
            for layer in range(len(a["kernel"])):
                want = b["kernel"][layer] / np.sqrt(2 * (layer + 1))
                np.testing.assert_allclose(a["kernel"][layer], want, rtol=1e-5)
        np.testing.assert_array_equal(ours["fc1"]["kernel"], theirs["fc1"]["kernel"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"initialization_strategy": "generator"},
        {"initialization_strategy": "discriminator", "num_classes": 3},
        {"share_generator_discriminator": True},
    ],
)
def test_the_parameter_formula_counts_what_is_there(changes):
    module = GanLM(**SIZES, **changes)
    leaves = jax.tree.leaves(catalog.shapes(module))
    assert count_parameters(module)["total"] == sum(int(np.prod(x.shape)) for x in leaves)


def test_the_formula_gives_the_published_counts():
    large = catalog.find("ganlm_large_multilingual")
    assert count_parameters(large.build())["total"] == 1_032_934_914  # the launch log
    generator = large.build(initialization_strategy="generator")
    assert round(count_parameters(generator)["total"] / 1e6, 1) == 963.6
    base = count_parameters(catalog.find("ganlm_base_multilingual").build())
    assert {k: round(v / 1e6, 1) for k, v in base.items()} == {
        "embedding": 192.1,
        "encoder": 85.5,
        "generator": 113.8,
        "discriminator": 38.8,
        "total": 430.1,
    }


@functools.cache
def official():
    module, variables = model()
    return catalog.export("language.ganlm", module, variables)


def load(state, **changes):
    return jaxmodels.load("language.ganlm", state, **{**SIZES, **changes})


@pytest.mark.parametrize(
    "name",
    ["finetune_both", "finetune_understanding", "finetune_generation",
     "pretrain_losses_shared_schedule"],
)  # fmt: skip
def test_official_checkpoints_come_back_byte_for_byte_under_the_same_keys(name):
    case = golden_case.GoldenCase(golden_case.COMMITTED / "ganlm" / name, f"ganlm/{name}")
    arguments = golden_case.adapter_of("ganlm").arguments_of(case.config)
    module, variables = jaxmodels.load("language.ganlm", case.weights, **arguments)
    exported = catalog.export("language.ganlm", module, variables)
    state = checkpoint.read(case.weights).tensors
    assert exported.keys() == state.keys()
    assert all(exported[key].tobytes() == state[key].tobytes() for key in state)


def test_a_pre_training_checkpoint_gives_each_strategy_its_parts():
    state = official()
    _, small = load(state, initialization_strategy="generator")
    assert "decoder.discriminator" not in small["params"]
    _, reader = load(state, initialization_strategy="discriminator")
    assert "output_projection" not in reader["params"]["decoder.discriminator"]
    exported = catalog.export(
        "language.ganlm", *load(state, initialization_strategy="discriminator")
    )
    assert exported["decoder.discriminator.output_projection.weight"].shape == (160, 16)


def test_old_layouts_and_half_precision_are_read():
    state = dict(official())
    prefix = "encoder.discriminator.layers.0.self_attn"
    for leaf in ("weight", "bias"):
        parts = [state.pop(f"{prefix}.{p}_proj.{leaf}") for p in "qkv"]
        state[f"{prefix}.in_proj_{leaf}"] = np.concatenate(parts)
    _, variables = load(state)
    want = load(official())[1]
    jax.tree.map(np.testing.assert_array_equal, variables, want)
    half = {k: v.astype(np.float16) for k, v in official().items()}
    leaves = jax.tree.leaves(load(half)[1])
    assert all(leaf.dtype == np.float32 for leaf in leaves)


def test_another_dictionary_or_length_is_an_error_that_names_both_unless_resizing_is_asked_for():
    with pytest.raises(ValueError, match="dictionary has 160 rows, the model's 168"):
        load(official(), vocab_size=168)
    with pytest.raises(ValueError, match="table of target positions has 24 rows, the model's 12"):
        load(official(), max_target_positions=12)
    changes = dict(vocab_size=168, max_target_positions=12, resize_checkpoint=True)
    _, variables = load(official(), **changes)
    table = variables["params"]["encoder.discriminator"]["embed_tokens"]["embedding"]
    assert table.shape == (168, 16) and not table[160:].any() and table[150].any()


def test_checkpoints_that_do_not_fit_say_why():
    only_reader = {k: v for k, v in official().items() if not k.startswith("decoder.generator")}
    with pytest.raises(ValueError, match=r"no key below 'decoder\.generator'"):
        load(only_reader, initialization_strategy="generator")
    untied = dict(official())
    key = "decoder.generator.output_projection.weight"
    untied[key] = untied[key] + 0.5
    with pytest.raises(
        CheckpointMismatch, match=rf"{key} differs from encoder.*embed_tokens.weight.* 0\.5"
    ):
        load(untied)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 15}, "embed_dim 15 is not divisible by encoder_attention_heads 2"),
        (
            {"share_generator_discriminator": True, "discriminator_decoder_layers": 3},
            "discriminator's 3 layers are the generator's first, which has 2",
        ),
        ({"initialization_strategy": "generater"}, "known: pretraining, generator"),
        ({"activation": "gleu"}, "known: gelu, gelu_new"),
        ({"pooler_activation": "softmax"}, "pooler_activation 'softmax'; known: gelu"),
    ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        GanLM(**{**SIZES, **changes})


@pytest.mark.parametrize("wrong", [400, -3])
def test_tokens_outside_the_dictionary_are_named_outside_jit(tokens, wrong):
    module, variables = model()
    message = f"token id {wrong} is not in a dictionary of 160 entries"
    source, target = tokens
    bad = [t.at[1, 2].set(wrong) for t in tokens]
    objective = Objective(50)
    for call in (
        lambda: module.apply(variables, bad[0], target),
        lambda: module.apply(variables, source, bad[1]),
        lambda: generation.generate(module, variables, bad[0], max_len_b=4),
        lambda: three_passes(
            *(module, variables["params"], bad[0], target, target, objective),
            rng=jax.random.key(0),
        ),
        lambda: three_passes(
            *(module, variables["params"], source, target, bad[1], objective),
            rng=jax.random.key(0),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="mask_id 100 and its 100 sentinels"):
        three_passes(module, variables["params"], source, target, target, Objective(100))


def test_sequences_beyond_the_position_table_are_named(tokens):
    module, variables = model()
    long = jnp.full((1, 25), 7, jnp.int32)
    for arguments in ((long, tokens[1][:1]), (tokens[0][:1], long)):
        with pytest.raises(ValueError, match="25 tokens exceed max positions 24"):
            jax.eval_shape(lambda v, a=arguments: module.apply(v, *a), variables)
    with pytest.raises(ValueError, match="exceed max positions"):
        generation.generate_greedily(module, variables, tokens[0], 25)
