"""Simulated images, strings and series from known factors: one that explains a label, and one for each modality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..batch.batch import Batch
from ..utils.arguments import check_choice, check_counts, check_integer, check_mapping, check_number, check_tensor
from .pairing import numpy_generator

Link = Literal["sigmoid", "softmax", "tanh"]

SIDE = 12  # pixels of the image
CHANNELS = 3  # of the series
VOCABULARY = 9  # the end token 0, and 8 letters
WAVES = 4  # cosines per dimension that a pattern consists of
GAINS: dict[Link, float] = {"sigmoid": 3.0, "softmax": 2.0, "tanh": 1.0}  # root mean square of what a link is given
RADIUS, SPREAD = 1.3, 0.4  # of the classes: their distance from 0, and the standard deviation within


class Renderer:
    """The map from factors to the expected values of a modality: a link function of a linear map.

    Args:
        loadings: ``(*event, S + P)``.
        link: ``"sigmoid"``, ``"softmax"`` over the last dimension of the event, or ``"tanh"``.
    """

    def __init__(self, loadings: Tensor, link: Link):
        self.loadings = loadings
        self.link = link

    def __call__(self, shared: Tensor, private: Tensor) -> Tensor:
        """Return expected values, in the dtype of the factors: of a string the probabilities of its letters.

        Args:
            shared: ``(.., S)``.
            private: ``(.., P)``.

        Returns:
            ``(.., *event)``.
        """
        factors = torch.cat([shared, private], -1)
        loadings = self.loadings.to(factors)
        flat = factors @ loadings.flatten(0, -2).T
        linear = flat.reshape(*factors.shape[:-1], *loadings.shape[:-1])
        return linear.softmax(-1) if self.link == "softmax" else getattr(linear, self.link)()


class Factors(NamedTuple):
    """Simulated rows with the factors that they were sampled from.

    Attributes:
        batch: N rows.
        shared: the factor f_y that explains the label, float32 ``(N, S)``.
        private: modality -> its own factor f_m, float32 ``(N, P)``.
        renderers: modality -> the map from f_y and f_m to its expected values.
    """

    batch: Batch
    shared: Tensor
    private: Mapping[str, Tensor]
    renderers: Mapping[str, Renderer]

    def means(self, shared: Tensor | None = None, private: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Return the expected values of all modalities but the label, of all steps.

        Args:
            shared: other shared factors ``(.., S)``; None for those of the rows.
            private: modality -> other private factors ``(.., P)``; for one that is not named, those of the rows.

        Returns:
            modality -> ``(.., *event)``, of strings ``(.., steps, letters)`` the probabilities of the tokens 1, 2, ..

        Raises:
            ValueError: an unknown modality.
        """
        given = check_mapping("private", {} if private is None else private, "tensors")
        if unknown := [name for name in given if name not in self.renderers]:
            raise ValueError(f"private: unknown modality {unknown[0]!r}, expected one of {', '.join(self.renderers)}")
        of_label = self.shared if shared is None else check_tensor("shared", shared)
        own = {name: check_tensor(f"private[{name!r}]", x) for name, x in given.items()}
        return {name: render(of_label, own.get(name, self.private[name])) for name, render in self.renderers.items()}


def factors(
    rows: int,
    shared: int = 2,
    private: int = 2,
    *,
    classes: int = 4,
    label: Literal["class", "real"] = "class",
    steps: int = 12,
    noise: float = 0.2,
    seed: int = 0,
    part: int = 0,
) -> Factors:
    r"""Simulate an image, a string and a series that share a factor with a label, and have a factor of their own each.

    .. math:: f_y = \mu_y + 0.4 \, \epsilon, \quad f_m \sim N(0, I), \qquad
              E[x_m] = g_m(A_m f_y + B_m f_m)

    with the :math:`\mu_y` on a circle, and N(0, I) for f_y if the label is a real number. Modalities:

    * ``image``, float32 ``(12, 12)``, 0 or 1: Bernoulli with a sigmoid of smooth patterns;
    * ``text``, int64 ``(steps,)`` with ``lengths``: letters 1 to 8, each Categorical by itself, a softmax that depends
      on the place in the string; then the end token 0, which the length counts, and padding 0;
    * ``series``, float32 ``(steps, 3)`` with ``lengths``: tanh of smooth curves, with Normal noise; then padding;
    * ``label``, the class y, int64 ``()``; or a real number, float32 ``()``: the mean of f_y's entries, times
      :math:`\sqrt S`, with the same noise.

    Numbers of letters and of steps are uniform from half of what there is room for, and independent of all factors.
    Both factors have about unit variance and the same gain in each modality, so that neither explains more than the
    other by construction. Use :func:`missing` to take modalities or labels away.

    Args:
        rows: N.
        shared: S, the size of the shared factor.
        private: P, the size of every private factor.
        classes: the number of classes, equally frequent up to one row; unused if the label is a real number.
        label: ``"class"`` or ``"real"``.
        steps: steps of the series, and places of the string, the end token included; 2 at least.
        noise: the standard deviation of the series given the factors, and of a real label.
        seed: the seed of the story and of its rows.
        part: rows of one story: each part has rows of its own (0 to train on, 1 to test on).

    Returns:
        The rows with their factors.

    Raises:
        TypeError, ValueError: an argument of another kind or out of range.

    Example:
        >>> truth = factors(5)
        >>> {name: tuple(truth.batch[name].shape) for name in truth.batch}
        {'image': (5, 12, 12), 'text': (5, 12), 'series': (5, 12, 3), 'label': (5,)}
        >>> swapped = truth.means(private={"series": truth.private["series"].roll(1, 0)})
        >>> [bool((swapped[name] == truth.means()[name]).all()) for name in ("image", "text", "series")]
        [True, True, False]

    References:
        Tsai et al. 2019 (arXiv:1806.06176), for the story.
    """
    check_counts(rows=rows, shared=shared, private=private, classes=classes)
    check_integer("steps", steps, least=2)
    check_choice("label", label, ("class", "real"))
    check_number("noise", noise, above=0)
    check_integer("seed", seed)
    check_integer("part", part, 0)

    renderers = _renderers(numpy_generator(seed, 0), shared, private, steps)
    rng = numpy_generator(seed, 1 + part)
    f_y, y = _shared_factor(rng, rows, shared, classes if label == "class" else None, noise)
    own = {name: torch.from_numpy(rng.standard_normal((rows, private))) for name in renderers}
    means = {name: render(f_y, own[name]).numpy() for name, render in renderers.items()}

    image = (rng.uniform(size=means["image"].shape) < means["image"]).astype(np.float32)
    text, text_lengths = _strings(rng, means["text"])
    lengths = rng.integers((steps + 1) // 2, steps + 1, rows)
    series = means["series"] + noise * rng.standard_normal(means["series"].shape)
    series[np.arange(steps) >= lengths[:, None]] = 0

    values = {
        "image": torch.from_numpy(image),
        "text": torch.from_numpy(text),
        "series": torch.from_numpy(series.astype(np.float32)),
        "label": y,
    }
    batch = Batch(values, lengths={"text": torch.from_numpy(text_lengths), "series": torch.from_numpy(lengths)})
    return Factors(batch, f_y.float(), {name: x.float() for name, x in own.items()}, renderers)


def _renderers(rng: np.random.Generator, shared: int, private: int, steps: int) -> dict[str, Renderer]:
    """Sample the maps from factors to expected values."""
    size = shared + private
    waves = np.arange(WAVES)
    pixels, times = (np.cos(np.pi * waves[:, None] * (np.arange(n) + 0.5) / n) for n in (SIDE, steps))
    image = np.einsum("jkl,kx,ly->xyj", rng.standard_normal((size, WAVES, WAVES)), pixels, pixels)
    text = rng.standard_normal((steps - 1, VOCABULARY - 1, size))
    series = np.einsum("jck,kt->tcj", rng.standard_normal((size, CHANNELS, WAVES)), times)
    links: dict[str, tuple[np.ndarray, Link]] = {
        "image": (image, "sigmoid"), "text": (text, "softmax"), "series": (series, "tanh")
    }  # fmt: skip
    return {name: Renderer(_balanced(x, shared, GAINS[link]), link) for name, (x, link) in links.items()}


def _balanced(loadings: np.ndarray, shared: int, gain: float) -> Tensor:
    """Scale loadings ``(*event, S + P)`` so that either factor gives a variance of ``gain**2 / 2``."""
    halves = [loadings[..., :shared], loadings[..., shared:]]
    scaled = [x * gain / np.sqrt(2 * np.square(x).sum(-1).mean()) for x in halves]
    return torch.from_numpy(np.concatenate(scaled, -1))


def _shared_factor(
    rng: np.random.Generator, rows: int, size: int, classes: int | None, noise: float
) -> tuple[Tensor, Tensor]:
    """Sample the shared factor, float64 ``(N, S)``, and the label that it explains; classes of None for a real one."""
    if classes is None:
        f = rng.standard_normal((rows, size))
        label = f.mean(1) * np.sqrt(size) + noise * rng.standard_normal(rows)
        return torch.from_numpy(f), torch.from_numpy(label.astype(np.float32))
    y = rng.permutation(np.arange(rows) % classes)
    angle = 2 * np.pi * np.arange(classes) / classes
    centres = np.zeros((classes, size))
    if size == 1:
        centres[:, 0] = RADIUS * np.linspace(-1, 1, classes)
    else:
        centres[:, 0] = RADIUS * np.cos(angle)
        centres[:, 1] = RADIUS * np.sin(angle)
    within = np.full(size, 1.0)
    within[:2] = SPREAD
    return torch.from_numpy(centres[y] + within * rng.standard_normal((rows, size))), torch.from_numpy(y)


def _strings(rng: np.random.Generator, probabilities: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sample strings that end with token 0.

    Args:
        rng: the generator.
        probabilities: of the letters 1, 2, .. at each place, ``(N, steps - 1, letters)``.

    Returns:
        Tokens, int64 ``(N, steps)``, and lengths with the end token, int64 ``(N,)``.
    """
    rows, most, _ = probabilities.shape
    uniform = rng.uniform(size=(rows, most, 1))
    # the last sum is 1 up to rounding, which must not yield a letter too many
    letters = 1 + (uniform > probabilities.cumsum(-1)[..., :-1]).sum(-1)
    numbers = rng.integers((most + 1) // 2, most + 1, rows)
    tokens = np.zeros((rows, most + 1), np.int64)
    tokens[:, :-1] = np.where(np.arange(most) < numbers[:, None], letters, 0)
    return tokens, numbers + 1
