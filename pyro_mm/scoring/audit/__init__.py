"""Checks of a (model, guide) pair on a few rows, before an evaluation or a training."""
