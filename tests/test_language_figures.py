"""The pictures of language models show the numbers of the records, and refuse records that do not fit."""

import numpy as np
import pytest

from eval import language_figures
from eval.figures import save

BAND = {"low": 0, "high": None, "num_targets": 10, "loss": 2.0, "loss_low": 1.5, "loss_high": 3.0, "perplexity": 7.4}


def learning_curves(offset, num_seeds=2):
    steps = np.array([0, 10, 100, 1000])
    loss = np.array([6.0, 5.0, 4.0, 3.0])
    return [
        {"step": steps, "tokens": 64 * steps, "seconds": 2 * steps, "loss": loss + offset + 0.1 * seed}
        for seed in range(num_seeds)
    ]


def drawn(draw, *arguments, **options):
    """The axes of a figure after `draw`, rendered as it would be saved."""
    figures = []
    save(options.pop("path"), (6, 4), lambda figure: (draw(figure, *arguments, **options), figures.append(figure)))
    return figures[0].axes


def test_curves_show_means_ranges_and_differences(tmp_path):
    arms = {"lookup": learning_curves(0.0), "low_rank": learning_curves(0.5)}
    axes = drawn(language_figures.draw_curves, arms, "lookup", path=tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert len(axes) == 6
    for ax, factor in zip(axes[:3], (1, 64, 2), strict=True):
        assert ax.get_xscale() == "log"
        lookup, low_rank = ax.get_lines()
        np.testing.assert_allclose(lookup.get_xdata(), factor * np.array([10, 100, 1000]))
        np.testing.assert_allclose(lookup.get_ydata(), [5.05, 4.05, 3.05])
        np.testing.assert_allclose(low_rank.get_ydata(), [5.55, 4.55, 3.55])
    for ax in axes[3:]:
        lookup, low_rank = ax.get_lines()
        np.testing.assert_allclose(lookup.get_ydata(), 0, atol=1e-12)
        np.testing.assert_allclose(low_rank.get_ydata(), 0.5)
    assert len(drawn(language_figures.draw_curves, arms, path=tmp_path / "a.png")) == 3


def test_bands_are_relative_to_the_reference(tmp_path):
    arms = {
        "lookup": [[BAND | {"loss": 2.0}], [BAND | {"loss": 2.2}]],
        "separable": [[BAND | {"loss": 1.9}], [BAND | {"loss": 2.1}]],
    }
    (ax,) = drawn(language_figures.draw_bands, arms, "lookup", path=tmp_path / "a.png")
    dots = [container.lines[0].get_ydata()[0] for container in ax.containers]
    np.testing.assert_allclose(dots, np.exp([0.0, -0.1]))
    bars = ax.containers[1].lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose(bars, np.exp([-0.2, 0.0]), atol=1e-12)


def test_bands_of_one_run_have_its_interval_and_leave_out_empty_ones(tmp_path):
    empty = {"low": 0, "high": 9, "num_targets": 0, "loss": None, "loss_low": None, "loss_high": None}
    arms = {"model": [[empty, BAND | {"low": 10}]]}
    (ax,) = drawn(language_figures.draw_bands, arms, path=tmp_path / "a.png")
    assert [label.get_text() for label in ax.get_xticklabels()] == ["10 or more\n10 targets"]
    bars = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    np.testing.assert_allclose(bars, np.exp([1.5, 3.0]))


def test_the_spectrum_is_summed_up(tmp_path):
    arms = {"separable": [[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]]}
    (ax,) = drawn(language_figures.draw_spectrum, arms, path=tmp_path / "a.png")
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), [60, 90, 100])


def test_the_grid_puts_every_token_in_its_place(tmp_path):
    values, order = np.array([1.0, 2.0, np.nan, 4.0]), np.array([5, 0, 1, 3])
    ax = drawn(language_figures.draw_grid, {"count": values}, 3, order, path=tmp_path / "a.png")[0]
    grid = ax.get_images()[0].get_array()
    np.testing.assert_array_equal(grid.filled(-1), [[2, -1, -1], [4, -1, 1]])
    ax = drawn(language_figures.draw_grid, {"count": values}, 3, path=tmp_path / "a.png")[0]
    np.testing.assert_array_equal(ax.get_images()[0].get_array().filled(-1), [[1, 2, -1], [4, -1, -1]])


@pytest.mark.parametrize(
    ("draw", "arguments", "message"),
    [
        ("curves", [{}], "expected 1 to"),
        ("curves", [{"lookup": []}], "expected 1 to"),
        ("curves", [{str(i): learning_curves(i) for i in range(7)}], "expected 1 to"),
        ("curves", [{"lookup": learning_curves(0)}, "separable"], "none of the arms"),
        ("curves", [{"a": [{"step": [1], "tokens": [1], "seconds": [1], "loss": []}]}], "expected one number"),
        ("curves", [{"a": [{"step": [0], "tokens": [0], "seconds": [0], "loss": [1]}]}], "after step 0"),
        ("bands", [{"a": [[BAND]], "b": [[BAND | {"num_targets": 9}]]}], "different bands or targets"),
        ("spectrum", [{"a": [[1.0], [0.5, 0.5]]}], "expected one number"),
        ("grid", [{"a": np.ones(4)}, 1], "base = 1"),
        ("grid", [{"a": np.full(4, np.nan)}, 2], "a number in each"),
        ("grid", [{"a": np.ones(0)}, 2], "a number in each"),
        ("grid", [{"a": np.ones(4), "b": np.ones(5)}, 2], "one"),
        ("grid", [{"a": np.ones((2, 2))}, 2], "one"),
        ("grid", [{"a": np.ones(4)}, 2, np.arange(5)], "one"),
    ],
)
def test_records_that_do_not_fit_are_refused(tmp_path, draw, arguments, message):
    with pytest.raises(ValueError, match=message):
        drawn(getattr(language_figures, f"draw_{draw}"), *arguments, path=tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
