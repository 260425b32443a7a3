"""Diagnostics of a pair: checks of sites, bounds and gradients, calibration, comparison, and conversion to ArviZ."""
