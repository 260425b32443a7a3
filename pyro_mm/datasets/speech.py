"""Recordings as pictures of fixed size: log-mel spectrograms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import check_tensor

RATE = 8000  # samples a second
WINDOW, HOP = 256, 160  # samples: 32 ms and 20 ms
BANDS, FRAMES = 32, 32
SAMPLES = WINDOW + HOP * (FRAMES - 1)  # 5216: 0.652 s
FLOOR = 1e-6  # added to the power: 60 dB under white noise of variance 1
CHUNK = 256


def filters() -> Tensor:
    r"""Triangles over the bins of the transform, ``(BANDS, WINDOW // 2 + 1)``.

    Their corners are BANDS + 2 equal steps on the mel scale :math:`2595 \log_{10}(1 + f / 700)` (f in Hz) from 0 to
    RATE / 2; the peak of each is 1, at the second of its three corners. O'Shaughnessy 1987.
    """
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    f = np.fft.rfftfreq(WINDOW, 1 / RATE)
    low, mid, high = (corners[i : i + BANDS, None] for i in range(3))
    return torch.from_numpy(np.minimum((f - low) / (mid - low), (high - f) / (high - mid)).clip(0)).float()


def log_mel(waves: Tensor) -> Tensor:
    r"""Log-mel spectrograms of recordings at 8 kHz.

    .. math:: s_{bt} = \log\Big(10^{-6} + \sum_k F_{bk} |X_{kt}|^2 / \textstyle\sum_n w_n^2\Big), \qquad
              X_{kt} = \sum_{n < 256} w_n x_{160 t + n} e^{-2 \pi i k n / 256}

    with w Hann's periodic window and F of :func:`filters`: 32 bands by 32 frames, low bands and early frames first.

    Args:
        waves: ``(N, 5216)``, in [-1, 1]; see :func:`clipped`.

    Returns:
        ``(N, 32, 32)``, the log of a power.
    """
    check_tensor("waves", waves)
    if waves.dim() != 2 or waves.shape[1] != SAMPLES:
        raise ValueError(f"expected waves of shape (N, {SAMPLES}), got {tuple(waves.shape)}")
    window, f = torch.hann_window(WINDOW, device=waves.device), filters().to(waves.device)
    parts = []
    for part in waves.float().split(CHUNK):
        x = torch.stft(part, WINDOW, HOP, window=window, center=False, return_complex=True)
        parts.append((f @ x.abs().square() / window.square().sum() + FLOOR).log())
    return torch.cat(parts)


def clipped(audio: np.ndarray, offsets: np.ndarray) -> Tensor:
    """Recordings of 0.652 s, ``(N, 5216)`` in [-1, 1]: the middle of longer ones, shorter ones between two silences.

    Args:
        audio: all recordings one after the other, int16.
        offsets: where each begins, and where the last one ends: ``(N + 1,)``.
    """
    waves = np.zeros((len(offsets) - 1, SAMPLES), np.float32)
    for wave, start, stop in zip(waves, offsets, offsets[1:], strict=False):
        n = min(SAMPLES, stop - start)
        skip, before = (stop - start - n) // 2, (SAMPLES - n) // 2
        wave[before : before + n] = audio[start + skip : start + skip + n] / np.float32(32768)
    return torch.from_numpy(waves)
