"""Handlers, and all code that relies on private names of Pyro or torch."""
