"""Log-mel spectrograms of short recordings: images of fixed size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..utils.arguments import check_tensor

RATE = 8000  # samples per second
WINDOW, HOP = 256, 160  # samples: 32 ms and 20 ms
BANDS, FRAMES = 32, 32
SAMPLES = WINDOW + HOP * (FRAMES - 1)  # 5216: 0.652 s
FLOOR = 1e-6  # added to the power: 60 dB below white noise of variance 1
WAVES_AT_ONCE = 256


def mel_filters() -> Tensor:
    r"""Return triangular mel filters over the bins of the Fourier transform.

    Their corners are BANDS + 2 equal steps on the mel scale :math:`2595 \log_{10}(1 + f / 700)` (f in Hz) from 0 to
    RATE / 2; each filter has three consecutive corners, and its peak is 1, at the second one.

    Returns:
        float32 ``(BANDS, WINDOW // 2 + 1)``.

    References:
        O'Shaughnessy 1987.
    """
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    f = np.fft.rfftfreq(WINDOW, 1 / RATE)
    low, mid, high = (corners[i : i + BANDS, None] for i in range(3))
    return torch.from_numpy(np.minimum((f - low) / (mid - low), (high - f) / (high - mid)).clip(0)).float()


def log_mel(waves: Tensor) -> Tensor:
    r"""Compute log-mel spectrograms of recordings at 8 kHz.

    .. math:: s_{bt} = \log\Big(10^{-6} + \sum_k F_{bk} |X_{kt}|^2 / \textstyle\sum_n w_n^2\Big), \qquad
              X_{kt} = \sum_{n < 256} w_n x_{160 t + n} e^{-2 \pi i k n / 256}

    with w the periodic Hann window and F the filters of :func:`mel_filters`.

    Args:
        waves: amplitudes in [-1, 1], ``(N, 5216)``, which are 0.652 s; see :func:`clip_recordings`.

    Returns:
        The log of a power, float32 ``(N, 32, 32)``: bands from low to high by frames in time.

    Raises:
        TypeError: ``waves`` is no tensor.
        ValueError: it has another shape.
    """
    check_tensor("waves", waves)
    if waves.dim() != 2 or waves.shape[1] != SAMPLES:
        raise ValueError(f"expected waves of shape (N, {SAMPLES}), got {tuple(waves.shape)}")
    window = torch.hann_window(WINDOW, device=waves.device)
    f = mel_filters().to(waves.device)
    parts = []
    for part in waves.float().split(WAVES_AT_ONCE):
        x = torch.stft(part, WINDOW, HOP, window=window, center=False, return_complex=True)
        parts.append((f @ x.abs().square() / window.square().sum() + FLOOR).log())
    return torch.cat(parts)


def clip_recordings(audio: np.ndarray, offsets: np.ndarray) -> Tensor:
    """Cut or pad recordings to 0.652 s: the middle of longer ones, shorter ones between two silences.

    Args:
        audio: samples of all recordings one after the other, int16 ``(samples,)``.
        offsets: the first sample of each recording, and the end of the last one, ``(N + 1,)``.

    Returns:
        Amplitudes in [-1, 1], float32 ``(N, 5216)``.
    """
    waves = np.zeros((len(offsets) - 1, SAMPLES), np.float32)
    for wave, start, stop in zip(waves, offsets, offsets[1:], strict=False):
        n = min(SAMPLES, stop - start)
        skip = (stop - start - n) // 2
        before = (SAMPLES - n) // 2
        wave[before : before + n] = audio[start + skip : start + skip + n] / np.float32(32768)
    return torch.from_numpy(waves)
