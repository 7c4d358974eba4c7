"""Posteriors of a layer's heads: calibration and recovery on small random layers, and layers of a trained model."""
