"""Images that stay in files until a minibatch needs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..batch.batch import Batch


class Pictures(Dataset[Batch]):
    """A torch data set of N rows of images in files, whose items are batches.

    Pass ``pictures.loader(128)`` to ``fit`` if the rows do not fit into memory.

    Args:
        paths: modality -> N files.
        read: a function from a file to a tensor, of one shape for all files of a modality. It must be picklable for
            worker processes.
        values: further modalities held in memory, ``(N, ...)`` each.
        covariates: name -> tensor ``(N, ...)``, as of a batch.

    Raises:
        ValueError: modalities and covariates differ in their numbers of rows.
    """

    def __init__(
        self,
        paths: Mapping[str, Sequence[Path]],
        read: Callable[[Path], Tensor],
        values: Mapping[str, Tensor] | None = None,
        covariates: Mapping[str, Tensor] | None = None,
    ):
        self.paths = {name: list(files) for name, files in paths.items()}
        self.read = read
        self.values = dict(values or {})
        self.covariates = dict(covariates or {})
        columns: dict[str, Any] = {**self.paths, **self.values, **self.covariates}
        sizes = {name: len(column) for name, column in columns.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"expected as many rows in every modality, got {sizes}")
        self.size = next(iter(sizes.values()))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, row: int) -> Batch:
        """Return one row, as a batch of size 1."""
        return self.__getitems__([range(self.size)[row]])

    def __getitems__(self, rows: Sequence[int]) -> Batch:
        """Return several rows as one batch.

        Raises:
            ValueError: files of one modality hold images of different shapes.
        """
        values: dict[str, Tensor] = {}
        for name, files in self.paths.items():
            first = self.read(files[rows[0]])
            values[name] = first.new_empty(len(rows), *first.shape)  # torch.stack would hold all of them twice
            for place, row in enumerate(rows):
                picture = first if place == 0 else self.read(files[row])
                if picture.shape != first.shape:
                    raise ValueError(
                        f"{files[row]} is of shape {tuple(picture.shape)}, and {files[rows[0]]} of {tuple(first.shape)}"
                    )
                values[name][place] = picture
        index = torch.as_tensor(rows)
        values |= {name: value[index] for name, value in self.values.items()}
        return Batch(values, covariates={name: value[index] for name, value in self.covariates.items()})

    def batch(self, rows: int | None = None) -> Batch:
        """Load the first ``rows`` rows, by default all, into memory.

        Raises:
            ValueError: ``rows`` is below 1.
        """
        if rows is not None and rows < 1:
            raise ValueError(f"expected at least one row, got {rows}")
        return self.__getitems__(range(self.size if rows is None else min(rows, self.size)))

    def loader(
        self, batch_size: int, *, shuffle: bool = True, workers: int = 0, seed: int | None = None
    ) -> DataLoader[Any]:
        """Make a loader of minibatches of all rows, for ``fit``.

        Args:
            batch_size: rows per minibatch; the last one may be smaller.
            shuffle: shuffle the rows anew in each epoch.
            workers: number of processes that read files.
            seed: the seed of the orders; None uses torch's generator.

        Returns:
            A ``DataLoader`` whose items are batches.
        """
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return DataLoader(
            self, batch_size, shuffle=shuffle, num_workers=workers, generator=generator, collate_fn=_identity
        )


def _identity(batch: Any) -> Any:
    """Return the batch as it is: ``__getitems__`` has collated it already."""
    return batch


def read_rgb(path: Path, size: int | None = None, crop: int | None = None) -> Tensor:
    """Read an image as float32 ``(3, H, W)`` in [0, 1].

    Args:
        path: a file that Pillow can read.
        size: the side of the result in pixels, by bilinear interpolation with an antialias filter; None keeps the
            size.
        crop: the side of a centred square, in pixels, that is cut out first; None keeps the whole image.

    Returns:
        The pixels, float32 ``(3, H, W)``; ``H = W = size`` if ``size`` is given.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the square is larger than the image, or the file is damaged or no image; names the path.
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
