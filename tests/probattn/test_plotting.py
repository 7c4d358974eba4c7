"""Figures by what they draw: lines, marks, labels, scales and colours, and the axes they draw on."""

import inspect
import re
import subprocess
import sys
import warnings
from functools import cache, partial

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from probattn import plotting
from probattn.errors import InputError
from probattn.plotting.style import COLOURS, STYLES, finish, label_rows, panel, panels, visible, words

BLUE, ORANGE, GREY = COLOURS[0], COLOURS[1], "#777777"
NEUTRAL = {"#000000", "#808080", GREY, "#d9d9d9"}
NAMES = tuple(plotting.__all__)


def inputs(seed=0):
    """By function, arguments of the right shapes with random numbers, and how many panels they need."""
    rng = np.random.default_rng(seed)
    grid, two = np.linspace(0.1, 1, 5), ("one", "one_sided")

    def positive(*shape):
        return rng.uniform(0.2, 0.9, shape)

    def triple():
        centre = rng.normal(size=3)
        return centre, centre - 0.5, centre + 0.5

    context = {name: positive(5) for name in ("residual", "density", "plain")}
    context |= {"title": "past", "u": grid, "mass": float(positive()), "plain_mass": 1.0, "turning_points": (0.3, 0.6)}
    history = ("step", "objective", "cross_entropy", "barrier", "smallest_margin", "embedding_norm")
    losses = {family: (grid, {arm: positive(5) for arm in two}) for family in ("absolute", "relative")}
    return {
        "plot_margins": (({kind: positive(4) for kind in ("determinant", "singular_value")}, "a \n$", [1]), 2),
        "plot_bounds": (({"max_error": float(positive())}, {"max_error": 1.0}), 1),
        "plot_conditional": (([context, context],), 4),
        "plot_barriers": ((grid, 0.5, {"logdet": positive(5), "one_sided": positive(5)}), 1),
        "plot_mass": ((grid, positive(5), 0.5), 1),
        "plot_masses": ((1 + positive(4), *positive(4, 4)), 1),
        "plot_cost": (({axis: {"at": [64, 128], "ours": positive(2), "torch": positive(2)} for axis in two},), 2),
        "plot_training": (({name: positive(3) for name in history},), 5),
        "plot_posterior": (({name: positive(40) for name in "abcde"}, {"a": positive(40)}, {"b": 0.5}), 5),
        "plot_chains": (({name: positive(2, 6) for name in two}, rng.uniform(size=(2, 6)) < 0.3), 2),
        "plot_margin_bands": ((positive(20, 4), rng.normal(size=(20, 4))), 2),
        "plot_comparison": (({"best": (0.0, 0.0), "two_heads": (-float(positive()), 0.2)},), 1),
        "plot_rank_bands": (
            ({f"nuts_{k}": {"noise_scale": positive(9)} for k in range(5)}, (grid, grid - 0.1, grid + 0.1), 0.99),
            5,
        ),
        "plot_recovery": ((grid, {"NUTS": positive(5)}, (grid - 0.2, grid + 0.2), [8, 32], {"NUTS": positive(2)}), 2),
        "plot_boundary": (
            (grid, {50: positive(5)}, {"free": (np.array([50.0, 100.0]), positive(2), positive(2))}, 4 / 27),
            2,
        ),
        "plot_excess": ((grid, positive(5), 4 / 27), 1),
        "plot_growth": (
            (np.array([10, 100]), [0.1], {"free": positive(2, 1, 2), "held at zero": positive(2, 1, 2)}),
            2,
        ),
        "plot_rotation": ((90 * grid, positive(5), np.array([0.0, 60.0]), positive(2)), 1),
        "plot_arm_differences": ((["a", "b", "c"], {family: triple() for family in two}, {"one": 0.1}), 2),
        "plot_layer_map": (({name: rng.normal(size=(3, 6)) for name in two}, {"one": 0.0}), 2),
        "plot_layer_profiles": (([0, 1, 2], {title: {arm: triple() for arm in two} for title in two}, {"one": 0.0}), 2),
        "plot_loss_curves": ((losses,), 2),
        "plot_norms_and_margins": (
            ({arm: positive(4) for arm in two}, {"det J": {arm: np.sort(positive(5)) for arm in two}}),
            2,
        ),
        "plot_predictors": (({title: (["a", "b", "c"], {"KL": triple()}) for title in two}, "rho"), 2),
        "plot_profiles_in_training": (([0, 1, 10], positive(2, 3), {title: positive(2, 3, 4) for title in two}), 3),
        "plot_survival": ((positive(4), positive(4) / 9, rng.integers(0, 6, 9), positive(4), positive(6), -3.0), 2),
    }


def draw(name, seed=0, **options):
    return getattr(plotting, name)(*inputs(seed)[name][0], **options)


@cache
def own(name):
    """A figure to look at, not to draw on."""
    return draw(name)


def narrow(name):
    """The narrowest figure: of what there can be one or many, one."""

    def first(argument):
        if isinstance(argument, dict):
            return dict([next(iter(argument.items()))])
        return argument[:1]

    arguments = list(inputs()[name][0])
    for place in WIDTH[name]:
        arguments[place] = first(arguments[place])
    return getattr(plotting, name)(*arguments)


WIDTH = {
    "plot_margins": [0],
    "plot_conditional": [0],
    "plot_cost": [0],
    "plot_posterior": [0],
    "plot_chains": [0],
    "plot_comparison": [0],
    "plot_rank_bands": [0],
    "plot_growth": [2],
    "plot_arm_differences": [1],
    "plot_layer_map": [0],
    "plot_layer_profiles": [1],
    "plot_loss_curves": [0],
    "plot_norms_and_margins": [1],
}
FIGURES = [
    *(pytest.param(partial(own, name), id=name) for name in NAMES),
    *(pytest.param(partial(narrow, name), id=f"narrow {name}") for name in WIDTH),
]


def on_axes(name, axes):
    """The keyword with which a function takes these axes."""
    single = "ax" in inspect.signature(getattr(plotting, name)).parameters
    return {"ax": axes[0]} if single else {"axes": axes}


def content(axis):
    """What an axes shows, in numbers and words."""
    shown = [(line.get_xydata().tolist(), to_hex(line.get_color()), line.get_marker()) for line in axis.lines]
    shown += [(path.vertices.tolist(),) for group in axis.collections for path in group.get_paths()]
    shown += [(np.asarray(group.get_offsets()).tolist(),) for group in axis.collections]
    shown += [(patch.get_path().vertices.tolist(), patch.get_extents().bounds[2] > 0) for patch in axis.patches]
    shown += [(np.asarray(image.get_array()).tolist(),) for image in axis.images]
    return repr((shown, axis.get_xscale(), axis.get_yscale()))


def line(axis, label):
    """The data of the line with that label."""
    (found,) = [line for line in axis.lines if line.get_label() == label]
    return found.get_xydata()


def words_of(axis):
    """Texts of an axes that are seen: title, labels of the axes and of their ticks, legend, notes."""
    shown = [axis.title, axis.xaxis.label, axis.yaxis.label, *axis.texts]
    for side, (low, high) in ((axis.xaxis, axis.get_xlim()), (axis.yaxis, axis.get_ylim())):
        shown += [tick.label1 for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
    if axis.get_legend() is not None:
        shown += axis.get_legend().get_texts()
    return [text for text in shown if text.get_text() and text.get_visible()]


def labels(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def ends(collection):
    """Rows (x1, x2) of horizontal lines."""
    return np.array([segment[:, 0] for segment in collection.get_segments() if len(segment)])


class TestEveryFigure:
    def test_all_are_here(self):
        assert set(inputs()) == set(NAMES)

    @pytest.mark.parametrize("name", NAMES)
    def test_a_figure_of_its_own_that_pyplot_does_not_know(self, name):
        known = plt.get_fignums()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = draw(name)
            figure.draw_without_rendering()
        assert isinstance(figure, Figure)
        assert sum(axis.axison for axis in figure.axes) == inputs()[name][1]
        assert plt.get_fignums() == known

    @pytest.mark.parametrize("name", NAMES)
    def test_it_shows_its_data(self, name):
        first, other = ([content(axis) for axis in figure.axes] for figure in (own(name), draw(name, seed=1)))
        assert first != other

    @pytest.mark.parametrize("name", NAMES)
    def test_it_draws_on_the_callers_axes_and_on_nothing_else_of_that_figure(self, name):
        count = inputs()[name][1]
        figure = Figure(figsize=(3 * count + 3, 3), layout="constrained")
        axes = figure.subplots(1, count + 1, squeeze=False)[0]
        untouched = content(axes[-1])
        assert draw(name, **on_axes(name, axes[:-1])) is figure
        assert figure.axes == list(axes)
        assert content(axes[-1]) == untouched
        assert (figure.get_suptitle(), figure.get_supxlabel(), figure.legends) == ("", "", [])
        for mine, theirs in zip(axes[:-1], [axis for axis in own(name).axes if axis.axison], strict=True):
            assert [line.get_xydata().tolist() for line in mine.lines] == [
                line.get_xydata().tolist() for line in theirs.lines
            ]
            assert (mine.get_xscale(), mine.get_yscale()) == (theirs.get_xscale(), theirs.get_yscale())

    @pytest.mark.parametrize("name", NAMES)
    def test_wrong_axes_are_refused_with_the_number_needed(self, name):
        count = inputs()[name][1]
        axis = Figure().add_subplot()
        if "ax" in on_axes(name, [axis]):
            with pytest.raises(InputError, match="sequence of 1 matplotlib axes"):
                draw(name, ax="left")
            return
        for wrong in ([axis] * (count + 1), [axis] * (count - 1), np.array([[axis] * count]), ["left"] * count):
            with pytest.raises(InputError, match=f"sequence of {count} matplotlib axes"):
                draw(name, axes=wrong)

    @pytest.mark.parametrize("name", NAMES)
    def test_its_colours_are_of_the_palette(self, name):
        allowed = {colour.lower() for colour in COLOURS} | NEUTRAL
        for axis in own(name).axes:
            assert {to_hex(line.get_color()) for line in axis.lines} <= allowed
            for group in axis.collections:
                faces = [*group.get_facecolor(), *group.get_edgecolor()]
                assert {to_hex(colour) for colour in faces} <= allowed

    @pytest.mark.parametrize("name", NAMES)
    def test_its_axes_have_words_and_no_names_of_variables(self, name):
        figure = own(name)
        for axis in figure.axes:
            if axis.axison:
                said = [axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), figure.get_supxlabel()]
                assert any(said)
                said += [text.get_text() for text in [*axis.get_xticklabels(), *axis.get_yticklabels()]]
                said += axis.get_legend_handles_labels()[1]
                assert [text for text in said if "_" in re.sub(r"\$.*?\$", "", text)] == []

    @pytest.mark.parametrize("figure", FIGURES)
    def test_its_words_can_be_read_and_are_not_cut_off(self, figure):
        figure = figure()
        figure.draw_without_rendering()
        texts = [text for axis in figure.axes if axis.axison for text in words_of(axis)]
        texts += [text for text in (figure._suptitle, figure._supxlabel) if text is not None]
        texts += [text for legend in figure.legends for text in legend.get_texts()]
        for text in texts:
            assert text.get_fontsize() >= 8, text
            box = text.get_window_extent()
            assert box.x0 >= -1, text
            assert box.y0 >= -1, text
            assert box.x1 <= figure.bbox.x1 + 1, text
            assert box.y1 <= figure.bbox.y1 + 1, text

    @pytest.mark.parametrize("name", ["plot_margins", "plot_cost", "plot_posterior", "plot_chains", "plot_loss_curves"])
    def test_nothing_to_draw_is_refused(self, name):
        arguments = [{} for _ in inputs()[name][0]]
        with pytest.raises(InputError, match="nothing to draw"):
            getattr(plotting, name)(*arguments)


class TestStyle:
    def test_the_palette_is_told_apart_by_every_kind_of_colour_vision(self):
        # Dichromacy as a linear map of linear RGB (Machado, Oliveira and Fernandes, 2009), then distances in CIELAB.
        kinds = {
            "full": np.eye(3),
            "protan": [
                [0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998],
            ],
            "deutan": [
                [0.367322, 0.860646, -0.227968],
                [0.280085, 0.672501, 0.047413],
                [-0.011820, 0.042940, 0.968881],
            ],
            "tritan": [
                [1.255528, -0.076749, -0.178779],
                [-0.078411, 0.930809, 0.147602],
                [0.004733, 0.691367, 0.303900],
            ],
        }

        def smallest(colours):
            rgb = np.array([to_rgb(colour) for colour in colours])
            rgb = np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
            to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
            found = []
            for kind in kinds.values():
                xyz = (rgb @ np.transpose(kind)).clip(0, 1) @ np.transpose(to_xyz) / (0.9505, 1, 1.089)
                f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
                lab = np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)
                gaps = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
                found.append(gaps[np.triu_indices(len(lab), 1)].min())
            return min(found)

        assert smallest(COLOURS) > 10
        assert smallest(("#d62728", "#8c564b", "#2ca02c")) < 10  # the control: red, brown and green

    def test_many_curves_have_each_their_own_look(self):
        assert len(set(STYLES)) == len(STYLES) == 4 * len(COLOURS)

    def test_characters_that_cannot_be_seen(self):
        assert [visible(character) for character in "a \n\t$"] == ["a", "␣", "↵", "⇥", r"\$"]

    def test_names_become_words(self):
        assert [words(name) for name in ("singular_value", "plain")] == ["singular value", "plain"]

    def test_rows_go_from_the_top_down(self):
        axis = Figure().add_subplot()
        assert label_rows(axis, ["first", "second_row"]).tolist() == [1, 0]
        assert [label.get_text() for label in axis.get_yticklabels()] == ["first", "second row"]
        low, high = axis.get_ylim()
        assert low < 0 < 1 < high

    def test_words_that_are_not_given_stay(self):
        axis = Figure().add_subplot()
        finish(axis, "x", "y", "title")
        finish(axis, ylabel="other")
        assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title(), axis.get_legend()) == (
            "x",
            "other",
            "title",
            None,
        )

    def test_a_grid_leaves_its_last_places_empty(self):
        figure, drawn = panels(None, 3, (4, 4), columns=2)
        assert [axis.axison for axis in figure.axes] == [True, True, True, False]
        assert drawn == figure.axes[:3]

    def test_the_figure_of_a_subfigure_is_the_whole(self):
        whole = Figure()
        part = whole.subfigures(1, 2)[1]
        assert panel(part.subplots(), (1, 1))[0] is whole

    def test_importing_takes_neither_matplotlib_nor_pyplot(self):
        program = (
            "import sys, probattn; assert 'matplotlib' not in sys.modules\n"
            "import probattn.plotting; assert 'matplotlib.figure' in sys.modules\n"
            "assert 'matplotlib.pyplot' not in sys.modules\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


class TestBlocks:
    def test_margins(self):
        values = np.array([0.001, np.nan, 1.0, 0.5])
        figure = plotting.plot_margins({"singular_value": values, "spectral": values - 0.1}, "a \n$", [0, 3])
        upper, lower = figure.axes
        np.testing.assert_array_equal(upper.lines[0].get_ydata(), values)
        assert line(upper, "support tokens").tolist() == [[0, 0.001], [3, 0.5]]
        assert line(lower, "support tokens").tolist() == [[0, 0.001 - 0.1], [3, 0.4]]
        # Logarithmic where all are positive and far apart; the same less a constant is not.
        assert (upper.get_yscale(), lower.get_yscale()) == ("log", "linear")
        assert [label.get_text() for label in lower.get_xticklabels()] == ["a", "␣", "↵", r"\$"]
        assert [axis.get_ylabel() for axis in figure.axes] == ["singular value", "spectral"]
        assert labels(upper) == ["support tokens"]

    def test_more_margins_than_colours(self):
        figure = plotting.plot_margins({f"kind {k}": np.ones(2) * k for k in range(9)}, "ab", [])
        assert [axis.lines[0].get_ydata()[0] for axis in figure.axes] == list(range(9))

    def test_bounds(self):
        measured = {"zero": 0.0, "below": 1e-5, "above": 1e-2, "inf": np.inf, "nan": np.nan, "minus": -np.inf}
        (axis,) = plotting.plot_bounds(measured, dict.fromkeys(measured, 1e-3)).axes
        marks = [mark for mark in axis.lines if len(mark.get_xdata()) == 1]
        left, right = 1e-6, 1e-1
        expected = {"zero": left, "below": 1e-5, "above": 1e-2, "inf": right, "nan": right, "minus": left}
        np.testing.assert_allclose([mark.get_xdata()[0] for mark in marks], list(expected.values()))
        assert [mark.get_marker() for mark in marks] == ["o", "o", "X", "X", "X", "o"]
        assert [mark.get_color() for mark in marks] == [BLUE, BLUE, ORANGE, ORANGE, ORANGE, BLUE]
        bars = [bar.get_xdata()[1] for bar in axis.lines if len(bar.get_xdata()) == 2]
        np.testing.assert_allclose(bars, 1e-3)
        assert axis.get_xscale() == "log"
        assert [mark.get_ydata()[0] for mark in marks] == [5, 4, 3, 2, 1, 0]  # the first on top
        assert axis.get_ylim()[0] < axis.get_ylim()[1]

    def test_a_conditional_has_maps_above_and_densities_below(self):
        u = np.linspace(-1, 1, 5)

        def context(title, points):
            shared = {"u": u, "residual": 2 * u, "density": u**2, "plain": 0.5 * u**2, "turning_points": points}
            return shared | {"title": title, "mass": 1.25, "plain_mass": 0.5}

        axes = plotting.plot_conditional([context("regular", ()), context("folded", (-0.5, 0.5))]).axes
        assert [axis.get_ylabel() for axis in axes] == ["residual map e(u)"] * 2 + ["density"] * 2
        assert [axis.get_title() for axis in axes] == ["regular", "folded", "", ""]
        np.testing.assert_array_equal(axes[0].lines[0].get_ydata(), 2 * u)
        np.testing.assert_array_equal(line(axes[2], "with |det J|: mass 1.250")[:, 1], u**2)
        np.testing.assert_array_equal(line(axes[3], "without: mass 0.500")[:, 1], 0.5 * u**2)
        upright = [[mark.get_xdata()[0] for mark in axis.lines if np.ptp(mark.get_xdata()) == 0] for axis in axes]
        assert upright == [[], [-0.5, 0.5], [], [-0.5, 0.5]]
        top = axes[2].get_legend()
        top.figure.draw_without_rendering()
        assert axes[2].transData.transform((0, 1))[1] < top.get_window_extent().y0  # the legend is above the curves

    def test_barriers_leave_a_gap_where_they_are_infinite(self):
        factor = np.array([0.0, 1.0, 2.0])
        kinds = {"log-determinant": np.array([0.0, np.inf, -1.0]), "one-sided": np.array([0.7, np.nan, 0.3])}
        (axis,) = plotting.plot_barriers(
            factor, 1.0, {"logdet": kinds["log-determinant"], "one_sided": kinds["one-sided"]}
        ).axes
        for kind, values in kinds.items():
            np.testing.assert_array_equal(line(axis, kind)[:, 1], [values[0], np.nan, values[2]])
        assert [text.get_text() for text in axis.texts] == ["det J = 0"]
        widths = [curve.get_linewidth() for curve in axis.lines[:2]]
        assert widths[0] > widths[1]  # both are seen where they coincide

    def test_mass(self):
        slopes, masses = np.array([0.5, 2.0]), np.array([1.0, 1.5])
        (axis,) = plotting.plot_mass(slopes, masses, 1.25).axes
        np.testing.assert_array_equal(axis.lines[0].get_xydata(), np.stack([slopes, masses], axis=1))
        assert line(axis, "first fold, a = 1.250")[:, 0].tolist() == [1.25, 1.25]

    def test_masses_have_bars_of_two_standard_errors(self):
        exact, error = np.array([1.0, 2.0]), np.array([0.1, 0.3])
        (axis,) = plotting.plot_masses(exact, exact + 0.1, error, np.ones(2), error / 2).axes
        modulus, signed = axis.containers
        for container, centre, half in ((modulus, exact + 0.1, 2 * error), (signed, np.ones(2), error)):
            np.testing.assert_allclose(container[0].get_ydata(), centre)
            heights = np.array([segment[:, 1] for segment in container[2][0].get_segments()])
            np.testing.assert_allclose(heights, np.stack([centre - half, centre + half], axis=1))
        assert {"with |det J|", "with det J", "equal", "one"} == set(labels(axis))


class TestCost:
    def test_curves_on_logarithmic_axes(self):
        curves = {"length T": {"at": [64, 256], "ours": [0.1, 0.2], "torch": [0.3, 0.9]}}
        (axis,) = plotting.plot_cost(curves).axes
        assert line(axis, "torch").tolist() == [[64, 0.3], [256, 0.9]]
        assert labels(axis) == ["ours", "torch"]
        assert (axis.get_xscale(), axis.get_yscale(), axis.get_xlabel()) == ("log", "log", "length T")
        assert [label.get_text() for label in axis.get_xticklabels()] == ["64", "256"]

    def test_more_competitors_than_markers(self):
        curve = {"at": [1, 2]} | {f"rival {k}": [1.0, 2.0 + k] for k in range(9)}
        (axis,) = plotting.plot_cost({"T": curve}).axes
        assert len(labels(axis)) == 9


class TestTraining:
    def test_training_has_one_panel_a_number(self):
        names = ("objective", "cross_entropy", "barrier", "smallest_margin", "embedding_norm")
        history = {"step": [0, 10]} | {name: [k, k + 0.5] for k, name in enumerate(names)}
        axes = plotting.plot_training(history).axes
        assert [axis.lines[0].get_xydata().tolist() for axis in axes] == [[[0, k], [10, k + 0.5]] for k in range(5)]
        assert "barrier" in axes[2].get_title()


class TestPosterior:
    def test_posterior_with_its_intervals_and_prior(self):
        draws = np.linspace(0, 1, 1001)
        far = np.linspace(-50, 50, 2001)  # most of this prior lies outside the panel
        figure = plotting.plot_posterior({"a": draws, "b": draws}, {"a": far}, {"b": 0.25})
        first, second = figure.axes
        steps = {patch.get_label(): patch.get_data() for patch in first.patches}
        assert set(steps) == {"posterior", "prior"}
        for name, height in (("posterior", 1.0), ("prior", 0.01)):  # uniform densities
            heights, edges, _ = steps[name]
            assert (heights * np.diff(edges)).sum() == pytest.approx(0.998, abs=2e-3)
            np.testing.assert_allclose(heights, height, rtol=0.1)
        low, high = first.get_xlim()
        assert -1 < low < 0 < 1 < high < 2
        bars = [curve.get_xdata() for curve in second.lines[:2]]
        np.testing.assert_allclose(bars, [[0.05, 0.95], [0.25, 0.75]], atol=1e-12)
        assert line(second, "truth")[:, 0].tolist() == [0.25, 0.25]
        assert [patch for patch in second.patches if patch.get_label() == "prior"] == []  # none was given for it
        assert [curve for curve in first.lines if curve.get_label() == "truth"] == []

    def test_a_posterior_that_does_not_vary_is_drawn(self):
        (axis,) = plotting.plot_posterior({"a": np.full(20, 0.5)}, {}).axes
        low, high = axis.get_xlim()
        assert low < 0.5 < high

    def test_heavy_tails_leave_the_centre_in_view(self):
        draws = np.random.default_rng(0).standard_cauchy(4000)
        (axis,) = plotting.plot_posterior({"a": draws}, {}).axes
        heights, edges, _ = axis.patches[0].get_data()
        assert len(edges) < 10_000
        tallest = heights.argmax()
        assert edges[tallest] < 0.5
        assert edges[tallest + 1] > -0.5

    def test_chains_with_marks_where_one_diverged(self):
        draws = np.arange(8.0).reshape(2, 4)
        diverging = np.array([[False, True, False, False], [False, True, False, True]])
        figure = plotting.plot_chains({"a": draws}, diverging)
        *paths, marks = figure.axes[0].lines
        assert [path.get_ydata().tolist() for path in paths] == draws.tolist()
        assert marks.get_xydata().tolist() == [[1, 0], [3, 0]]
        assert figure.get_suptitle() == "2 chains; 3 divergences (black marks)"
        calm = plotting.plot_chains({"a": draws}, diverging & False)
        assert len(calm.axes[0].lines[-1].get_xdata()) == 0

    def test_margin_bands_are_quantiles(self):
        margin = np.linspace(0, 1, 101)[:, None] * np.array([1.0, 2.0])
        upper, lower = plotting.plot_margin_bands(margin, -margin).axes
        for axis, sign in ((upper, 1), (lower, -1)):
            assert [group.get_label() for group in axis.collections] == ["90%", "50%"]
            wide, narrow = (group.get_paths()[0].vertices[:, 1] for group in axis.collections)
            assert sorted({wide.min() * sign, wide.max() * sign}) == pytest.approx([0.05, 1.9])
            assert sorted({narrow.min() * sign, narrow.max() * sign}) == pytest.approx([0.25, 1.5])
            np.testing.assert_allclose(line(axis, "median")[:, 1], [0.5 * sign, sign])
        assert "degeneracy boundary" in [text.get_text() for text in upper.figure.legends[0].get_texts()]
        assert [curve for curve in lower.lines if curve.get_label() == "degeneracy boundary"] == []

    def test_comparison_has_bars_of_one_and_two_standard_errors(self):
        (axis,) = plotting.plot_comparison({"best": (0.0, 0.0), "other": (-10.0, 2.0)}).axes
        wide, narrow = axis.collections
        assert ends(wide).tolist() == [[0, 0], [-14, -6]]
        assert ends(narrow).tolist() == [[0, 0], [-12, -8]]
        assert axis.lines[0].get_xydata().tolist() == [[0, 1], [-10, 0]]  # the best on top
        assert [label.get_text() for label in axis.get_yticklabels()] == ["best", "other"]


class TestCalibration:
    def test_ranks_that_are_uniform_lie_at_zero(self):
        points = np.linspace(0, 1, 11)
        quantities = {f"A_{k}": points for k in range(8)} | {"biased": np.zeros(10)}
        figure = plotting.plot_rank_bands({"NUTS": quantities}, (points, points - 0.1, points + 0.2), 0.99)
        (axis,) = figure.axes
        assert abs(line(axis, "A 0")[:, 1]).max() < 0.1
        np.testing.assert_allclose(line(axis, "biased")[:, 1], 1 - points)
        heights = axis.collections[0].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == pytest.approx((-0.1, 0.2))
        looks = {(curve.get_color(), curve.get_linestyle()) for curve in axis.lines}
        assert len(looks) == len(quantities)
        assert figure.legends[0].get_texts()[0].get_text() == "99 % band"

    def test_recovery(self):
        levels = np.array([0.1, 0.95])
        coverage = {"with": levels, "without": 0 * levels}
        errors = {"with": [0.4, 0.2], "without": [1.0, 1.0]}
        left, right = plotting.plot_recovery(levels, coverage, (levels - 0.2, levels + 0.2), [8, 32], errors).axes
        heights = left.collections[0].get_paths()[0].vertices[:, 1]
        assert (heights.min(), heights.max()) == (0, 1)  # a share stays one
        assert line(left, "without")[:, 1].tolist() == [0, 0]
        np.testing.assert_allclose(line(right, "1 / √N")[:, 1], [0.4, 0.2])
        assert line(right, "without").tolist() == [[8, 1], [32, 1]]
        assert (right.get_xscale(), right.get_yscale()) == ("log", "log")


class TestProcess:
    def test_boundary(self):
        spreads = np.array([0.1, 0.3, 0.5])
        curves = {length: spreads / length for length in range(1, 10)}  # more than there are colours
        critical = {f"case {k}": (np.array([50.0]), np.array([0.15]), np.array([0.01])) for k in range(9)}
        left, right = plotting.plot_boundary(spreads, curves, critical, 4 / 27).axes
        mean_field = line(left, "mean field, V (1 − aV)²")
        assert mean_field[:, 1].max() == pytest.approx(4 / 27, rel=1e-3)
        for length, values in curves.items():
            np.testing.assert_array_equal(line(left, f"n = {length}")[:, 1], values)
        assert len(right.containers) == len(critical)
        (bar,) = right.containers[0][2][0].get_segments()
        np.testing.assert_allclose(bar[:, 1], [0.15 - 0.0196, 0.15 + 0.0196])
        assert len({container[0].get_xdata()[0] for container in right.containers}) == len(critical)

    def test_excess_that_is_not_positive_leaves_a_gap(self):
        slopes, excess = np.array([0.1, 0.2, 0.3]), np.array([-1e-17, 0.0, 1e-3])
        (axis,) = plotting.plot_excess(slopes, excess, 4 / 27).axes
        np.testing.assert_array_equal(axis.lines[0].get_ydata(), [np.nan, np.nan, 1e-3])
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")

    def test_growth_says_what_escapes(self):
        lengths = np.array([10, 100, 1000])
        measured = np.array([[1.0, 2.0, 3.0], [1.0, 4.0, np.inf]])
        (axis,) = plotting.plot_growth(lengths, [0.1, 0.2], {"free": (measured, measured / 2)}).axes
        np.testing.assert_allclose(line(axis, "aσ² = 0.1")[:, 1], [0.1, 0.2, 0.3])
        np.testing.assert_allclose(line(axis, "aσ² = 0.2")[:, 1], [0.2, 0.8, np.nan])
        dashed = [curve.get_ydata() for curve in axis.lines if curve.get_linestyle() == "--"]
        np.testing.assert_allclose(dashed, [[0.05, 0.1, 0.15], [0.1, 0.4, np.nan]])
        (escape,) = [text for text in axis.texts if text.get_text() == "escapes"]
        assert escape.xy == (100, 0.8)
        assert escape.get_color() == ORANGE

    def test_rotation_without_an_end_is_not_drawn(self):
        angles = np.array([0.0, 60.0])
        (axis,) = plotting.plot_rotation(angles, angles + 1, np.array([0, 90, 120]), np.array([0.1, 2, np.inf])).axes
        assert line(axis, "end of the branch, by continuation").tolist() == [[0, 0.1], [90, 2]]
        assert axis.get_yscale() == "log"


class TestRobustness:
    def test_differences_are_coloured_by_their_interval(self):
        centre, low, high = np.array([[-2.0, 2, 0, np.nan], [-3, 1, -1, np.nan], [-1, 3, 1, np.nan]])
        arms = ["better", "worse", "open", "none"]
        families = {"clean": (centre, low, high), "noise": (centre, low, high)}
        first, second = plotting.plot_arm_differences(arms, families, {"clean": 0.5}).axes
        intervals, points = first.collections
        np.testing.assert_array_equal(ends(intervals), [[-3, -1], [1, 3], [-1, 1]])  # none is not drawn
        assert [to_hex(colour) for colour in intervals.get_colors()[:3]] == [BLUE.lower(), ORANGE.lower(), GREY]
        assert points.get_offsets()[:3].tolist() == [[-2, 3], [2, 2], [0, 1]]
        assert np.ma.getmaskarray(points.get_offsets())[3].all()
        assert [label.get_text() for label in first.get_yticklabels()] == arms
        limits = [
            [curve.get_xdata()[0] for curve in axis.lines if curve.get_linestyle() == "--"] for axis in (first, second)
        ]
        assert limits == [[0.5], []]

    def test_arms_are_named_once_on_the_callers_axes(self):
        axes = Figure().subplots(1, 2)
        draw("plot_arm_differences", axes=axes)
        seen = [[label.get_text() for label in axis.get_yticklabels() if label.get_visible()] for axis in axes]
        assert seen == [["a", "b", "c"], []]

    def test_loss_curves_of_many_arms(self):
        levels = np.array([0.0, 0.1])
        losses = {f"arm {k}": np.array([2.0, 2.0 + k]) for k in range(9)}
        figure = plotting.plot_loss_curves({"noise": (levels, losses)})
        (axis,) = figure.axes
        for arm, values in losses.items():
            np.testing.assert_array_equal(line(axis, arm)[:, 1], values)
        assert len({(curve.get_color(), curve.get_linestyle()) for curve in axis.lines}) == len(losses)
        assert [text.get_text() for text in figure.legends[0].get_texts()] == list(losses)

    @pytest.mark.parametrize(("factor", "scale"), [(1, "linear"), (1000, "symlog")])
    def test_norms_and_margins(self, factor, scale):
        quantiles = factor * np.array([-0.9, 0.1, 0.3, 0.5, 0.8])
        paths = {"plain": np.array([1.0, 1.5, 2.0])}
        first, second = plotting.plot_norms_and_margins(paths, {"det J": {"plain": quantiles}}).axes
        assert line(first, "plain").tolist() == [[0, 1], [0.5, 1.5], [1, 2]]
        thin, thick, median = second.collections
        np.testing.assert_allclose(ends(thin), [quantiles[[0, -1]]])
        np.testing.assert_allclose(ends(thick), [quantiles[[-3, -1]]])
        np.testing.assert_allclose(median.get_offsets(), [[quantiles[-2], 0]])
        assert second.get_xscale() == scale


class TestLanguage:
    def test_survival(self):
        survival, lengths = np.array([0.5, 0.25, 0.125]), np.array([0, 0, 1, 2])
        arguments = survival, survival / 10, lengths, np.array([0.75, 0.7, 0.6]), np.array([0.5, 0.01, 0.0])
        left, right = plotting.plot_survival(*arguments, np.log(1e-3)).axes
        (direct,) = left.containers
        assert direct[0].get_xydata().tolist() == [[1, 0.5], [2, 0.25]]  # no string reached 3
        half = 2 * np.sqrt(0.25 / 4)
        np.testing.assert_allclose(direct[2][0].get_segments()[0][:, 1], [0.5 - 0.45, 0.5 + half])
        np.testing.assert_array_equal(left.lines[0].get_ydata(), survival)
        assert left.get_yscale() == "log"
        assert sum(bar.get_height() for bar in right.containers[0]) == 3
        assert line(right, "proved floor δ, in every context")[:, 0] == pytest.approx(-3)
        many = np.full(200, 0.5)
        (bars,) = plotting.plot_survival(many, many / 10, np.full(3, 200), many, np.full(6, 0.5)).axes[0].containers
        assert len(bars[0].get_xdata()) == 40  # more would hide the line
        unproved = plotting.plot_survival(*arguments).axes[1]
        assert list(unproved.lines) == []
