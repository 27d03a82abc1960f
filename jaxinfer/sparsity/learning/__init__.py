"""Masks learned while the weights are trained, or from calibration data."""
