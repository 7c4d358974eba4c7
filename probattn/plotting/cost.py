"""What things cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from probattn.plotting.style import COLOURS

__all__ = ["plot_cost"]


def plot_cost(curves: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Seconds of competitors along several axes, both scales logarithmic.

    Args:
        curves: by axis: ``at`` (where it was measured), and the seconds of each competitor by name.
    """
    figure = Figure(figsize=(3.8 * len(curves), 3.6), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for panel, (name, curve) in zip(panels, curves.items(), strict=True):
        others = [competitor for competitor in curve if competitor != "at"]
        for competitor, colour, marker in zip(others, COLOURS, "osD^v", strict=False):
            panel.plot(curve["at"], curve[competitor], color=colour, marker=marker, markersize=4, label=competitor)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(list(curve["at"]), [f"{value:g}" for value in curve["at"]])
        panel.set_xlabel(name)
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("seconds, forward and backward")
    panels[0].legend(fontsize=8)
    return figure
