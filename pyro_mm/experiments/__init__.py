"""Experiments of papers and the commands that run them: data, training, evaluation and tables."""
