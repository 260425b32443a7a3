"""Gradient descent on any (model, guide, objective)."""
