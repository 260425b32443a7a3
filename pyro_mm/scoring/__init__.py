"""The log densities of a (model, guide) pair on a batch, the structure of the pair, and its audit."""
