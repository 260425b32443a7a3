"""Rows whose pictures stay on disk until they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..batch.batch import Batch


class Pictures(Dataset[Batch]):
    """N rows of pictures in files, as a data set of torch whose items are batches.

    ``pictures.loader(128)`` is what ``fit`` takes in the place of rows that do not fit into memory.

    Args:
        paths: modality -> N files.
        read: a function of a file: a tensor, of one shape for all files of a modality. Worker processes need one that
            can be pickled.
        values: further modalities, ``(N, ...)`` each, held in memory.
        covariates: as those of a batch.
    """

    def __init__(
        self,
        paths: Mapping[str, Sequence[Path]],
        read: Callable[[Path], Tensor],
        values: Mapping[str, Tensor] | None = None,
        covariates: Mapping[str, Tensor] | None = None,
    ):
        self.paths, self.read = {name: list(files) for name, files in paths.items()}, read
        self.values, self.covariates = dict(values or {}), dict(covariates or {})
        held: dict[str, Any] = {**self.paths, **self.values, **self.covariates}
        sizes = {name: len(column) for name, column in held.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"expected as many rows in every modality, got {sizes}")
        self.size = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Batch:
        """One row, a batch of size 1."""
        return self.__getitems__([range(self.size)[row]])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """Several rows, one batch."""
        values: dict[str, Tensor] = {}
        for name, files in self.paths.items():
            first = self.read(files[rows[0]])
            values[name] = first.new_empty(len(rows), *first.shape)  # filled: a stack would hold all of them twice
            for place, row in enumerate(rows):
                picture = self.read(files[row]) if place else first
                if picture.shape != first.shape:
                    raise ValueError(
                        f"{files[row]} is of shape {tuple(picture.shape)}, and {files[rows[0]]} of {tuple(first.shape)}"
                    )
                values[name][place] = picture
        index = torch.as_tensor(rows)
        values |= {name: value[index] for name, value in self.values.items()}
        return Batch(values, covariates={name: value[index] for name, value in self.covariates.items()})

    def batch(self, rows: int | None = None) -> Batch:
        """The first ``rows`` rows, or all, in memory."""
        if rows is not None and rows < 1:
            raise ValueError(f"expected at least one row, got {rows}")
        return self.__getitems__(range(self.size if rows is None else min(rows, self.size)))

    def loader(
        self, batch_size: int, *, shuffle: bool = True, workers: int = 0, seed: int | None = None
    ) -> DataLoader[Any]:
        """Minibatches of all rows, for ``fit``.

        Args:
            batch_size: rows of one; the last one may be smaller.
            shuffle: whether each epoch has an order of its own.
            workers: processes that read files.
            seed: of the orders; None goes on with torch's generator.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(self, batch_size, shuffle=shuffle, num_workers=workers, generator=generator, collate_fn=_same)


def _same(batch: Any) -> Any:
    return batch


def read_rgb(path: Path, size: int | None = None, crop: int | None = None) -> Tensor:
    """A picture as float32 ``(3, H, W)`` in [0, 1].

    Args:
        path: a file that Pillow reads.
        size: the side of the result in pixels, from bilinear interpolation with an antialias filter; None leaves it.
        crop: the side of the square in the middle that is kept before that; None keeps all.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the square is larger than the picture, or the file is damaged or none; with its path.
    """
    import numpy as np
    from PIL import Image  # here: most users have no pictures

    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:  # Pillow has a dozen types for it, one of them for pictures that would fill the memory
        raise ValueError(f"{path} is damaged, no picture, or too large: {type(error).__name__} {error}") from error
    if crop is not None:
        if not 1 <= crop <= min(image.size):
            raise ValueError(f"{path} has {image.size[0]} x {image.size[1]} pixels: no square of side {crop} fits")
        left, top = (image.size[0] - crop) // 2, (image.size[1] - crop) // 2
        image = image.crop((left, top, left + crop, top + crop))
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = np.array(image, dtype=np.float32).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels)).div_(255)
