"""The verification report: one HTML file that holds the text, the figures and the verdicts, and needs no network."""

from probattn.inference.reports.verify.figures import critical_slope, draw_figures
from probattn.inference.reports.verify.page import render_report
from probattn.inference.reports.verify.pictures import Picture, save_figures

__all__ = ["Picture", "critical_slope", "draw_figures", "render_report", "save_figures"]
