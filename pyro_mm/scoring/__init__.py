"""What a (model, guide) pair is worth on a batch: its structure, its checks, its log densities."""
