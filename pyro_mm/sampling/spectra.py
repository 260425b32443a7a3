r"""Functions of the eigenvalues of many symmetric matrices, by their eigenvectors or by matrix products alone.

On a GPU, torch finds the eigenvectors of matrices of more than 32 rows one matrix after the other, about 4 ms each. A
few hundred products of all matrices at once take a few milliseconds in all, so there the functions are put together
from the absolute value

.. math:: |X| = X \, \mathrm{sign}(X), \qquad \mathrm{sign}(X) = \lim_k X_k, \quad
          X_0 = X / \|X\|_F, \quad X_{k+1} = \tfrac32 X_k - \tfrac12 X_k^3

(Newton-Schulz), in double precision. The first steps are :math:`a X + b X^3 + c X^5`, which makes small eigenvalues
larger by a factor of 3.44 each, and takes those above to between 0.7 and 1.21. An eigenvalue below
:math:`3.44^{-k} \|X\|_F` after k of them has a smaller absolute value than its own, which these functions then err by.

References:
    Higham 2008, "Functions of matrices", SIAM, chapter 5. Jordan et al. 2024, "Muon: an optimizer for hidden layers in
    neural networks" (the coefficients of degree 5).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LARGEST_BATCHED = 32  # rows of the largest matrices whose eigenvectors torch finds for all at once on a GPU
ENLARGING = (3.4445, -4.7750, 2.0315)  # coefficients of X, X^3 and X^5
ENLARGING_STEPS = 16
NEWTON_STEPS = 6


def clamp_eigenvalues(matrix: Tensor, least: float, most: float, *, by_products: bool | None = None) -> Tensor:
    """Clamp the eigenvalues of symmetric matrices ``(.., D, D)``; ``by_products=None`` takes the faster way."""
    if not _by_products(matrix, by_products):
        values, vectors = torch.linalg.eigh(matrix)
        clamped: Tensor = (vectors * values.clamp(least, most)[..., None, :]) @ vectors.mT
        return clamped
    return _clamp_by_products(matrix.double(), least, most).to(matrix.dtype)


def clamp_singular_values(root: Tensor, least: float, most: float, *, by_products: bool | None = None) -> Tensor:
    """Return a square root of ``root @ root.T`` whose singular values are clamped, ``(.., D, D)``."""
    if not _by_products(root, by_products):
        return _rescale(root, lambda s: s.clamp(least, most))
    wide = root.double()
    square = _clamp_by_products(wide @ wide.mT, least**2, most**2)
    return _cholesky(square).to(root.dtype)


def widen_singular_values(root: Tensor, share: float, *, by_products: bool | None = None) -> Tensor:
    """Return a square root of ``root @ root.T`` with s(1 + share (1 - s^2)) for each singular value s below 1."""
    if not _by_products(root, by_products):
        return _rescale(root, lambda s: s * (1 + share * (1 - s.square()).clamp(min=0)))
    wide = root.double()
    square = wide @ wide.mT
    identity = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    missing = identity - square
    factor = identity + 0.5 * share * (missing + _absolute(missing))
    square = factor @ square @ factor  # all three have the same eigenvectors
    return _cholesky(square).to(root.dtype)


def _by_products(matrix: Tensor, chosen: bool | None) -> bool:
    """Return the choice, or True for matrices whose eigenvectors torch finds one after the other on a GPU."""
    if chosen is not None:
        return chosen
    return matrix.is_cuda and matrix.shape[-1] > LARGEST_BATCHED


def _rescale(root: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Change the singular values of square roots of covariances by eigenvectors."""
    squares, axes = torch.linalg.eigh(root @ root.mT)
    rescaled: Tensor = axes * change(squares.clamp(min=0).sqrt())[..., None, :]
    return rescaled


def _clamp_by_products(matrix: Tensor, least: float, most: float) -> Tensor:
    """Clamp eigenvalues as (least + most + |x - least| - |x - most|) / 2."""
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    above, below = _absolute(matrix - least * identity), _absolute(matrix - most * identity)
    return 0.5 * ((least + most) * identity + above - below)


def _absolute(matrix: Tensor) -> Tensor:
    """Return |X| of symmetric matrices, by steps to the sign."""
    norm = torch.linalg.matrix_norm(matrix, keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
    sign = matrix / norm
    linear, cubic, quintic = ENLARGING
    for _ in range(ENLARGING_STEPS):
        square = sign @ sign
        sign = linear * sign + sign @ (cubic * square + quintic * (square @ square))
    for _ in range(NEWTON_STEPS):
        sign = 1.5 * sign - 0.5 * (sign @ sign @ sign)
    absolute = matrix @ sign
    symmetric: Tensor = 0.5 * (absolute + absolute.mT)
    return symmetric


def _cholesky(square: Tensor) -> Tensor:
    """Return lower triangular roots of matrices that are symmetric up to rounding; NaN for one that has none."""
    identity = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
    rounding = torch.finfo(square.dtype).eps * square.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    root, info = torch.linalg.cholesky_ex(0.5 * (square + square.mT) + rounding * identity)
    return torch.where((info == 0)[..., None, None], root, torch.nan)
