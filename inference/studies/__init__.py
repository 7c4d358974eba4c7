"""Simulation studies: calibration, robustness, two-sample tests."""
