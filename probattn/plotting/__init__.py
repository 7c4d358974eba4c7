"""Figures, each a function of arrays that returns a matplotlib ``Figure``; nothing is shown or saved here."""

from probattn.plotting.blocks import plot_barriers, plot_bounds, plot_conditional, plot_margins, plot_mass, plot_masses
from probattn.plotting.calibration import plot_rank_bands, plot_recovery
from probattn.plotting.cost import plot_cost
from probattn.plotting.language import plot_survival
from probattn.plotting.layers import plot_layer_map, plot_layer_profiles, plot_predictors, plot_profiles_in_training
from probattn.plotting.posterior import plot_chains, plot_comparison, plot_margin_bands, plot_posterior
from probattn.plotting.process import plot_boundary, plot_excess, plot_growth, plot_rotation
from probattn.plotting.robustness import plot_arm_differences, plot_loss_curves, plot_norms_and_margins
from probattn.plotting.training import plot_training

__all__ = [
    "plot_arm_differences",
    "plot_barriers",
    "plot_boundary",
    "plot_bounds",
    "plot_chains",
    "plot_comparison",
    "plot_conditional",
    "plot_cost",
    "plot_excess",
    "plot_growth",
    "plot_layer_map",
    "plot_layer_profiles",
    "plot_loss_curves",
    "plot_margin_bands",
    "plot_margins",
    "plot_mass",
    "plot_masses",
    "plot_norms_and_margins",
    "plot_posterior",
    "plot_predictors",
    "plot_profiles_in_training",
    "plot_rank_bands",
    "plot_recovery",
    "plot_rotation",
    "plot_survival",
    "plot_training",
]
