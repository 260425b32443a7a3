"""A cheap fingerprint of a data set: size, names, shapes, dtypes, and a hash of some rows."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from ..batch.batch import Batch

MIN_HASHED_ROWS = 64  # rows that are hashed at least
MAX_HASHED_BYTES = 2**23  # hashed of more rows: all rows of a small data set


def describe_contents(batch: Batch) -> dict[str, str]:
    """Describe the contents of a batch: name of a modality, covariate or length -> dtype and shape per row.

    A modality without values in any row has an empty text.
    """
    held = {f"modality {name}": _kind(batch[name]) if batch.holds(name) else "" for name in batch}
    held |= {f"covariate {name}": _kind(x) for name, x in batch.covariates.items()}
    return held | {f"length {name}": _kind(x) for name, x in batch.lengths.items()}


def rows_hash(batch: Batch) -> str:
    """Return a hash of evenly spaced rows, the first and the last included, and of their masks.

    Values under a mask are left out, since nothing depends on them. The hash is the same on every device.
    """
    tensors = {f"modality {name}": batch[name] for name in batch if batch.holds(name)}
    tensors |= {f"covariate {name}": x for name, x in batch.covariates.items()}
    tensors |= {f"length {name}": x for name, x in batch.lengths.items()}
    nbytes = sum(x.nbytes for x in tensors.values()) / max(1, batch.size)
    count = min(batch.size, max(MIN_HASHED_ROWS, int(MAX_HASHED_BYTES / max(1.0, nbytes))))
    # not torch.linspace, whose rounding is that of the device
    rows = torch.tensor([i * (batch.size - 1) // max(1, count - 1) for i in range(count)], dtype=torch.long)
    digest = hashlib.blake2b(digest_size=16)
    for name, x in tensors.items():
        chosen = x[rows.to(x.device)].cpu()
        kind, _, modality = name.partition(" ")
        if kind == "modality":
            there = batch.present[modality].cpu()[rows]
            chosen = chosen[there]
            digest.update(_bytes(there))
        digest.update(name.encode())
        digest.update(_bytes(chosen))
    return digest.hexdigest()


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape[1:])}"


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
