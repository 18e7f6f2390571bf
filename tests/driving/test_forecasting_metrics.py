"""Displacement errors: what counts as the best guess, and mistakes."""

import numpy as np
import pytest

from jaxmodels.driving.forecasting_metrics import (
    displacement_errors,
    guess_metrics,
    smallest_average_error,
)

RNG = np.random.default_rng(0)
TRUTH = np.zeros((1, 4, 2))
# Guess 0 ends 1 m off but strays 9 m on the way; guess 1 is 2 m off all along.
PREDICTED = np.array([[[[9, 0], [9, 0], [9, 0], [1, 0]], [[2, 0]] * 4]], float)


def test_the_average_error_is_that_of_the_guess_with_the_smallest_final_error():
    found = guess_metrics(PREDICTED, TRUTH, guesses=2)
    assert found == {"minADE": 7.0, "minFDE": 1.0, "MR": 0.0}
    assert smallest_average_error(PREDICTED, TRUTH) == 2.0


def test_a_miss_is_strictly_beyond_the_threshold():
    assert guess_metrics(PREDICTED[:, 1:], TRUTH, guesses=1)["MR"] == 0.0
    assert guess_metrics(PREDICTED[:, 1:] + 1e-9, TRUTH, guesses=1)["MR"] == 1.0


def test_the_most_probable_guesses_count_and_their_probabilities_are_renormalized():
    guesses = np.concatenate([PREDICTED, PREDICTED[:, 1:]], 1)
    found = guess_metrics(guesses, TRUTH, guesses=2, probability=np.array([[0.1, 0.3, 0.1]]))
    assert found["minFDE"] == 1.0
    np.testing.assert_allclose(found["p-minFDE"], 1 - np.log(0.25))
    np.testing.assert_allclose(found["p-MR"], 0.75)
    np.testing.assert_allclose(found["brier-minFDE"], 1 + 0.75**2)
    unlikely = guess_metrics(guesses, TRUTH, guesses=2, probability=np.array([[0.01, 0.99, 0.0]]))
    np.testing.assert_allclose(unlikely["p-minFDE"], 1 - np.log(0.05))


def test_more_guesses_than_there_are_take_all():
    want = guess_metrics(PREDICTED, TRUTH, guesses=2)
    assert guess_metrics(PREDICTED, TRUTH, guesses=6) == want


def test_errors_at_seconds_are_those_of_the_tenth_steps():
    predicted = np.zeros((1, 30, 2))
    predicted[0, :, 0] = np.arange(1, 31)
    found = displacement_errors(predicted, np.zeros((1, 30, 2)))
    assert found == {"DE@1s": 10.0, "DE@2s": 20.0, "DE@3s": 30.0, "ADE": 15.5}


@pytest.mark.parametrize(
    "arguments, text",
    [
        ({"guesses": 0}, "guesses = 0 must be at least 1"),
        ({"probability": np.array([[0.5, -0.5]])}, "must be finite and not negative"),
        ({"probability": np.zeros((1, 2))}, "probabilities of agent 0 are all zero"),
        ({"probability": np.ones((1, 3))}, r"\[N, K\] = \(1, 2\), got \(1, 3\)"),
    ],
)
def test_mistakes_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        guess_metrics(PREDICTED, TRUTH, **{"guesses": 1, **arguments})
    with pytest.raises(ValueError, match="truth"):
        guess_metrics(PREDICTED, TRUTH[:, :3], guesses=1)
