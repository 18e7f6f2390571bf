import numpy as np
import pytest

from jaxmodels.language import edit_corruption as ec
from jaxmodels.language import edit_plans as ep

WORDS = [f"w{i}" for i in range(40)]


def kinds(corrupted, original):
    return [s.kind for s in ep.opcodes(corrupted, original) if s.kind != "keep"]


def sample(modality, seed, length=40):
    rng = np.random.default_rng(seed)
    settings = ec.settings_of(modality)
    mask = ec.draw_mask(length, settings, rng)
    actions = [ec.draw_action(settings, rng) for _ in ec.spans_of(mask)]
    return mask, actions


@pytest.mark.parametrize("modality", ["code", "nl"])
def test_gold_edits_restore_the_original_and_every_action_shows_as_its_plan_kind(modality):
    seen = set()
    for seed in range(400):
        mask, actions = sample(modality, seed)
        corrupted = ec.corrupt_words(WORDS, mask, actions)
        full = ep.edit_sequence(corrupted, WORDS)
        assert ep.apply_strict(full, corrupted) == WORDS
        spans = ec.spans_of(mask)
        if all(b - a > 1 for a, b in spans):
            assert kinds(corrupted, WORDS) == actions
            seen.update(actions)
    assert seen == set(ec.ACTIONS)


def test_a_single_token_deletion_loses_its_token_and_shows_up_as_a_replacement():
    mask = np.zeros(40, np.int8)
    mask[7] = 1
    corrupted = ec.corrupt_words(WORDS, mask, ["delete"])
    assert corrupted[7] == "<extra_id_0>" and "w7" not in corrupted
    assert kinds(corrupted, WORDS) == ["replace"]
    mask[8] = 1
    corrupted = ec.corrupt_words(WORDS, mask, ["delete"])
    assert corrupted[7:10] == ["<extra_id_0>", "w7", "w8"]
    assert kinds(corrupted, WORDS) == ["delete"]


def test_long_inputs_lose_12_words_in_2_spans_and_comments_4_in_1_and_the_last_word_is_noise():
    for modality, noise, spans in (("code", 12, 2), ("nl", 4, 1)):
        for seed in range(50):
            mask, _ = sample(modality, seed, 100)
            assert mask.sum() == noise and len(ec.spans_of(mask)) == spans
            assert mask[0] == 0 and mask[-1] == 1


def test_actions_come_at_the_mined_rates():
    for modality, rates in (("code", (0.495, 0.215, 0.29)), ("nl", (0.07, 0.11, 0.82))):
        rng = np.random.default_rng(0)
        settings = ec.settings_of(modality)
        drawn = [ec.ACTIONS.index(ec.draw_action(settings, rng)) for _ in range(20_000)]
        np.testing.assert_allclose(np.bincount(drawn) / 20_000, rates, atol=0.01)


def test_span_lengths_are_uniform_compositions():
    found = ec.statistics(ec.settings_of("code"), np.random.default_rng(1), draws=4000, length=60)
    np.testing.assert_allclose(found["first_span_length_hist"][1:12], 1 / 11, atol=0.02)
    assert found["mask_rate_by_position"][0] == 0 and found["mask_rate_by_position"][-1] == 1


def test_corrupted_ids_decode_to_the_corrupted_words():
    for seed in range(60):
        mask, actions = sample("code", seed)
        ids, labels = ec.corrupt_ids(
            [str(i) for i in range(300, 340)],
            mask,
            actions,
            lambda text: [int(w) for w in text.split()],
            vocabulary=1000,
            space=225,
        )
        plain = [i for i in ids if i != 225]
        assert len(labels) == len(plain)
        numbers = [f"<extra_id_{999 - i}>" if i > 900 else f"w{i - 300}" for i in plain]
        assert numbers == ec.corrupt_words(WORDS, mask, actions)
        at = [i for i, label in enumerate(labels) if label in ("<DELETE>", "<REPLACE>")]
        assert all(plain[i] > 900 for i in at)


def test_what_is_too_short_or_unknown_is_refused():
    rng = np.random.default_rng(0)
    for length, modality in ((1, "nl"), (0, "code"), (13, "code"), (11, "code")):
        with pytest.raises(ec.NotCorruptible, match=f"{length} words"):
            ec.corrupt(WORDS[:length], modality, rng)
    ec.corrupt(WORDS[:14], "code", rng)
    with pytest.raises(ec.NotCorruptible, match="20 words: 2 of them noise in 4 spans"):
        ec.noise_counts(20, ec.Settings(3.0, 0.5, 0.1, 0.2))
    with pytest.raises(ValueError, match="known: code, nl"):
        ec.corrupt(WORDS, "java", rng)
    with pytest.raises(ValueError, match="1 actions for 2 noise spans"):
        ec.corrupt_words(WORDS, np.array([0, 1, 0, 1]), ["insert"])
    with pytest.raises(ValueError, match="known: delete, insert, replace"):
        ec.corrupt_words(WORDS, np.array([0, 1]), ["swap"])
    with pytest.raises(ec.NotCorruptible, match="2 kept runs for 1 noise runs"):
        ec.mask_of([False], [True])
