"""Estimates of marginal log-likelihoods, with standard errors and diagnostics."""
