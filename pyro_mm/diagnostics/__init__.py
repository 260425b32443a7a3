"""Reports on a pair: bounds, gradients, calibration, comparisons."""
