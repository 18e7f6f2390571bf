import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmodels.language import edit_plans as ep

CODE = "if ( x == null ) { return ; }".split()
FIXED = "if ( x == null || x . isEmpty ( ) ) { return ; }".split()


def random_pairs(count, seed=0):
    """Old and new sequences, a third over three words, where everything repeats."""
    rng = np.random.default_rng(seed)
    for k in range(count):
        words = [f"w{i}" for i in range(3 if k % 3 == 0 else 30)]
        old = list(rng.choice(words, rng.integers(0, 25)))
        new = list(old)
        for _ in range(rng.integers(0, 4)):
            at, size = rng.integers(0, len(new) + 1), rng.integers(0, 4)
            new[at : at + size] = rng.choice(words, rng.integers(0, 4))
        yield [str(w) for w in old], [str(w) for w in new]


def test_the_example_of_the_paper():
    assert " ".join(ep.plan(CODE, FIXED)) == "<INSERT> || x . isEmpty ( ) <INSERT_END>"
    assert ep.model_input(" ".join(CODE), ["add a check", "b"]) == (
        "if ( x == null ) { return ; } </s> add a check </s> b"
    )
    assert ep.model_input("a", []) == "a </s> "
    assert ep.model_output("a b", "a b") == " <s> a b"
    assert ep.read_raw_line("a b <s> one <s> two three\n") == ("a b", ["one", "two three"])


def test_there_are_24_edit_tokens_in_their_published_order():
    assert len(set(ep.EDIT_TOKENS)) == 24
    assert ep.EDIT_TOKENS[4:8] == (
        "<REPLACE_OLD_KEEP_BEFORE>",
        "<REPLACE_NEW_KEEP_BEFORE>",
        "<REPLACE_OLD_KEEP_AFTER>",
        "<REPLACE_NEW_KEEP_AFTER>",
    )
    assert ep.EDIT_TOKENS[12] == "<INSERT>" and ep.EDIT_TOKENS[-1] == "<KEEP_END>"


def test_strict_application_is_lossless_on_10000_random_pairs_and_plans_are_never_longer():
    lossy = 0
    for old, new in random_pairs(10_000):
        full = ep.edit_sequence(old, new)
        assert ep.apply_strict(full, old) == new
        short = ep.plan(old, new)
        assert len(short) <= len(full)
        assert ep.explains(short, old, new)
        assert (short == []) == (old == new)
        lossy += ep.apply_official(full, old) != new
    assert 0 < lossy < 300  # the published applier loses some pairs of repeated words


def test_anchored_plans_of_both_markings_are_lossless_where_their_old_parts_are_unique():
    for old, new in random_pairs(3000, seed=1):
        for markers in ("anchored", "plain"):
            edits = ep.anchored_plan(old, new, markers=markers)
            assert ep.apply_anchored_strict(edits, old) == new


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=12))
def test_any_two_sequences_go_through_plan_and_back(old, new):
    assert ep.apply_strict(ep.edit_sequence(old, new), old) == new
    text = ep.model_output(" ".join(old), " ".join(new))
    target, edits, parsed = ep.split_prediction(text)
    assert (target, edits, parsed) == (new, ep.plan(old, new), True)


def test_two_hundred_tokens_follow_difflibs_popularity_heuristic():
    old = [f"t{i % 7}" for i in range(230)]
    new = [*old[:100], "x", *old[100:]]
    long_plan = ep.plan(old, new)
    assert len(long_plan) > 10  # every token is popular, so difflib matches next to nothing
    assert ep.apply_strict(ep.edit_sequence(old, new), old) == new
    assert ep.plan(old[:150], [*old[:75], "x", *old[75:150]]) == ["<INSERT>", "x", "<INSERT_END>"]


def test_predictions_without_edit_tokens_are_whole_targets_and_told_apart():
    assert ep.split_prediction("a b") == (["a", "b"], [], False)
    assert ep.split_prediction("<s> a b") == (["a", "b"], [], True)
    plan = ["<DELETE>", "x", "<DELETE_END>"]
    assert ep.split_prediction("<DELETE> x <DELETE_END> <s> a") == (["a"], plan, True)
    assert ep.split_prediction("<DELETE> x <DELETE_END> a") == (["a"], plan, True)
    assert ep.split_prediction("") == ([], [], False)
    for broken in ("<DELETE> x", "<DELETE> <INSERT> x <INSERT_END>", "y <DELETE> x <DELETE_END>"):
        target, plan, parsed = ep.split_prediction(f"{broken} <s> a")
        assert not parsed and plan and target[-1] == "a"


def test_a_plan_that_contradicts_its_target_explains_nothing():
    edits = ep.plan(CODE, FIXED)
    assert ep.explains(edits, CODE, FIXED)
    assert not ep.explains(edits, CODE, CODE)
    assert not ep.explains([*edits, "<DELETE>", "zzz", "<DELETE_END>"], CODE, FIXED)
    assert not ep.explains(edits[:-1], CODE, FIXED)


@pytest.mark.parametrize(
    "edits, message",
    [
        (
            "<KEEP> a <KEEP_END> <INSERT> b",
            r"token 3: '<INSERT>' is never closed by '<INSERT_END>'",
        ),
        (
            "<DELETE> a <INSERT> b <INSERT_END> <DELETE_END>",
            r"token 2: '<INSERT>' inside '<DELETE>'",
        ),
        ("<REPLACE_OLD> a <REPLACE_END>", r"token 2: '<REPLACE_END>' inside '<REPLACE_OLD>'"),
        ("<INSERT_AT> b <INSERT_END>", r"token 0: unknown edit tag '<INSERT_AT>'"),
        ("<INSERT> b <REPLACE_X> c <INSERT_END>", r"token 2: unknown edit tag '<REPLACE_X>'"),
        ("a <INSERT> b <INSERT_END>", r"token 0: 'a' stands outside any span"),
        ("<KEEP_END>", r"token 0: '<KEEP_END>' ends no span"),
        ("<KEEP> b <KEEP_END>", r"token 0: keep of 'b' does not match .* position 0: 'a'"),
        ("<KEEP> a <KEEP_END>", r"cover 1 of the 3 old tokens"),
    ],
)
def test_malformed_edits_are_named_with_their_token(edits, message):
    with pytest.raises(ep.EditPlanError, match=message):
        ep.apply_strict(edits.split(), ["a", "b", "c"])


def test_anchored_appliers_refuse_what_they_cannot_place():
    with pytest.raises(ep.EditPlanError, match=re.escape("'a' stands 2 times")):
        ep.apply_anchored_strict("<DELETE> a <DELETE_END>".split(), ["a", "b", "a"])
    with pytest.raises(ep.EditPlanError, match="does not open an anchored span"):
        ep.apply_anchored_official("<INSERT> a <INSERT_END>".split(), ["a"])
    with pytest.raises(ValueError, match="markers"):
        ep.anchored_plan(["a"], ["b"], markers="none")
