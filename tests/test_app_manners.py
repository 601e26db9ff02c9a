"""What the tabs of eval.app share: limits on inputs, errors as sentences, frames of a film."""

import math

import numpy as np
import pytest

gradio = pytest.importorskip("gradio", reason="needs the extra app")

from eval import app_manners  # noqa: E402


@pytest.mark.parametrize("value", [None, "3", math.nan, math.inf, True, -0.1, 5.1, [1], 10**400])
def test_what_is_no_number_in_range_is_refused(value):
    with pytest.raises(ValueError, match=r"^the size = .*; expected a number from 0 to 5\.$"):
        app_manners.number("the size", value, 0, 5)


def test_what_was_given_is_not_echoed_at_length():
    with pytest.raises(ValueError, match=r"expected") as refused:
        app_manners.number("the size", "x" * 10_000, 0, 5)
    assert len(str(refused.value)) < 120


def test_numbers_in_range_pass():
    assert app_manners.number("n", 3.0, 0, 5, whole=True) == 3
    assert isinstance(app_manners.number("n", 3.0, 0, 5, whole=True), int)
    with pytest.raises(ValueError, match=r"whole number"):
        app_manners.number("n", 3.5, 0, 5, whole=True)


@pytest.mark.parametrize("error", [ValueError("rank = 0; expected more"), OSError("no room")])
def test_what_a_user_can_cause_is_shown_as_a_sentence(error):
    def fails(_):
        raise error

    def streams(_):
        yield 1
        raise error

    expected = {"rank = 0; expected more": "Rank = 0; expected more.", "no room": "No room."}[str(error)]
    with pytest.raises(gradio.Error) as shown:
        app_manners.plainly(fails)(0)
    assert shown.value.message == expected
    stream = app_manners.plainly(streams)(0)
    assert next(stream) == 1
    with pytest.raises(gradio.Error, match=r"\w"):
        next(stream)


def test_what_only_we_can_cause_is_not_dressed_up():
    def fails(_):
        raise KeyError("name")

    with pytest.raises(KeyError):
        app_manners.plainly(fails)(0)


def test_frames_of_a_film_have_one_size_and_differ():
    def draw(figure):
        (line,) = figure.subplots().plot([0, 1], [0, 1])
        for height in (0.2, 0.8):
            yield lambda height=height: line.set_ydata([height, height])

    first, second = app_manners.film((3, 2), draw)
    assert first.shape == second.shape == (220, 330, 3)
    assert first.dtype == np.uint8
    assert (first != second).any()
