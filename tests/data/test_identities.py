"""Letters as identities: who is trained, who is verified."""

import numpy as np
import pytest

from train.data import identities

OPTIONS = {**identities.OPTIONS, **identities.VARIANTS["glyphs"], "image_size": 24}


def test_held_out_letters_are_verified_and_never_trained():
    options = {**OPTIONS, "held_out": 13}
    train, test = (identities.source(split, options) for split in ("train", "test"))
    assert not set(train.letters) & set(test.letters)
    assert sorted((*train.letters, *test.letters)) == list(range(52))
    assert len(test.letters) == 13 and identities.num_classes(options) == 39
    # Capitals and small letters are among both.
    assert min(test.letters) < 26 <= max(test.letters)
    labels = {int(train[i]["label"]) for i in range(100)}
    assert labels == set(range(39))
    assert {int(test[i]["label"]) for i in range(40)} == set(range(13))


def test_a_label_is_the_letters_place():
    options = {**OPTIONS, "held_out": 13}
    for split in identities.SPLITS:
        found = identities.source(split, options)
        i = 20
        letter = found.letters[i % len(found.letters)]
        seed = identities._SEEDS[split]
        drawn = identities.draw_glyph(np.random.default_rng((seed, i)), letter, 24)
        np.testing.assert_array_equal(found[i]["image"], drawn)


def test_without_held_out_letters_all_are_both():
    for split in identities.SPLITS:
        assert identities.source(split, OPTIONS).letters == tuple(range(52))
    assert identities.num_classes(OPTIONS) == 52


@pytest.mark.parametrize("held_out", [1, 51, -2])
def test_too_few_letters_on_one_side_are_refused(held_out):
    with pytest.raises(ValueError, match=rf"held_out: {held_out}; 0, or 2 to 50 letters"):
        identities.source("train", {**OPTIONS, "held_out": held_out})


def test_folders_hold_out_what_their_test_part_holds():
    with pytest.raises(ValueError, match="held_out is for letters"):
        identities.element_spec({**OPTIONS, "set": "folders", "held_out": 4})
