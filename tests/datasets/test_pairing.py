"""Pairs by label, weak supervision, words and sound."""

import numpy as np
import pytest
import torch

from pyro_mm import Batch, datasets
from pyro_mm.datasets import pairing, speech
from pyro_mm.datasets.spelling import LETTERS, NAMES

LABELS = [np.array([0] * 7 + [1] * 2 + [2] * 3), np.array([1] * 5 + [0] * 3 + [3] * 4)]


def rng():
    return pairing.numpy_generator(5, 0)


# -- matches --------------------------------------------------------------------------------------------------------


def test_matches_have_one_label_and_use_no_row_twice():
    rows, label = pairing.match_rows(LABELS, rng())
    for index, labels in zip(rows, LABELS, strict=True):
        assert np.array_equal(labels[index], label) and len(set(index.tolist())) == len(index)
    assert np.bincount(label).tolist() == [3, 2]  # the smaller number of each class that both have
    assert label.tolist() != sorted(label)


def test_with_repeats_each_row_is_used_before_any_is_used_again():
    rows, label = pairing.match_rows(LABELS, rng(), repeat=True)
    assert np.bincount(label).tolist() == [7, 5]
    for index, labels in zip(rows, LABELS, strict=True):
        assert np.array_equal(labels[index], label)
        for c in (0, 1):
            uses = np.bincount(index, minlength=len(labels))[labels == c]
            assert uses.max() - uses.min() <= 1 and uses.sum() == (7, 5)[c]


def test_matches_are_those_of_the_seed():
    draws = [
        pairing.match_rows(LABELS, pairing.numpy_generator(seed, part))
        for seed, part in ((0, 0), (0, 0), (1, 0), (0, 1))
    ]
    same = [np.array_equal(np.stack(draws[0][0]), np.stack(other[0])) for other in draws]
    assert same == [True, True, False, False]


def test_matched_and_omitted_rows_are_drawn_at_random():
    labels = [np.zeros(50, np.uint8), np.zeros(30, np.uint8)]
    (one, other), _ = pairing.match_rows(labels, rng())
    order = one.argsort()
    assert (np.diff(other[order]) < 0).any()  # not in the order of the rows
    assert one.max() >= 30 and sorted(other) == list(range(30))  # nor the first ones


# -- weak supervision -----------------------------------------------------------------------------------------------


def three(n=50):
    values = {name: torch.arange(n).float() + m for m, name in enumerate("abc")}
    values["c"] = values["c"][:, None].expand(n, 4)
    return Batch(values, covariates={"u": torch.arange(n)}, lengths={"c": torch.full((n,), 4)})


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.97, 1.0])
def test_a_fraction_stays_paired_and_each_other_row_keeps_one_modality(fraction):
    batch = three()
    weak = datasets.paired(batch, fraction)
    there = torch.stack([weak.present[n] for n in "abc"])
    kept, whole = there.sum(0), round(50 * fraction)
    assert (kept == 3).sum() == whole and (kept == 1).sum() == 50 - whole
    alone = there[:, kept == 1].sum(1)
    assert alone.max() - alone.min() <= 1
    for name in "abc":
        assert torch.equal(weak[name], batch[name]) and bool(batch.present[name].all())
    assert torch.equal(weak.covariates["u"], batch.covariates["u"])
    assert torch.equal(weak.lengths["c"], batch.lengths["c"])
    assert weak.names == batch.names and (fraction < 1 or weak.presence("a") is True)


def test_rows_that_stay_paired_are_drawn_at_random():
    masks = [datasets.paired(three(), 0.5, seed).present["a"] for seed in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])
    whole = (torch.stack(list(datasets.paired(three(), 0.5).present.values())).sum(0) == 3).nonzero()[:, 0]
    assert whole.tolist() != list(range(25)) and datasets.paired(three(), 0.5)[whole].presence("b").all()


def test_unpairing_keeps_missing_modalities_missing():
    batch = Batch({"a": torch.zeros(40), "b": torch.ones(40), "c": None}, {"a": torch.arange(40) % 2 == 0})
    weak = datasets.paired(batch, 0.25)
    assert not (weak.present["a"] & ~batch.present["a"]).any() and weak.presence("c") is False
    assert 10 <= weak.present["b"].sum() < 40
    rows = weak.rows
    assert torch.equal(rows, weak.present["a"] | weak.present["b"])  # and not what it was before


@pytest.mark.parametrize("fraction", [-0.1, 1.5, float("nan")])
def test_a_paired_fraction_outside_of_0_to_1_is_refused(fraction):
    with pytest.raises(ValueError, match="fraction >= 0 and <= 1"):
        datasets.paired(three(), fraction)


# -- words ----------------------------------------------------------------------------------------------------------


def test_words_are_spelled():
    tokens, lengths = datasets.words(torch.arange(10))
    assert datasets.spell(tokens) == list(NAMES)
    assert tokens.dtype == torch.int64 and tokens.shape == (10, 6) and tokens.max() < LETTERS
    assert lengths.tolist() == [len(name) + 1 for name in NAMES]
    for row, n in zip(tokens, lengths, strict=True):
        assert (row[: n - 1] > 0).all() and (row[n - 1 :] == 0).all()
    assert datasets.spell([[1, 0, 2, 3], [26, 26, 26, 26], [0, 0, 0, 0]]) == ["a", "zzzz", ""]


def test_word_logits_read_whole_words_only():
    tokens, _ = datasets.words(torch.tensor([3, 7, 7, 7]))
    tokens[2, 0] = 1
    tokens[3, 5] = 19  # sevens
    assert datasets.word_logits(tokens).argmax(-1).tolist() == [3, 7, 10, 10]
    probabilities = 0.6 * torch.nn.functional.one_hot(tokens, 27) + 0.4 / 27
    assert torch.equal(datasets.word_logits(probabilities), datasets.word_logits(tokens))


# -- sound ----------------------------------------------------------------------------------------------------------


def test_a_spectrogram_is_its_formula():
    wave = np.random.default_rng(0).uniform(-1, 1, speech.SAMPLES)
    got = datasets.log_mel(torch.from_numpy(wave)[None])[0].double().numpy()
    mel = np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 34)
    corners = 700 * (10 ** (mel / 2595) - 1)
    n = np.arange(256)
    window = 0.5 - 0.5 * np.cos(2 * np.pi * n / 256)
    for t in (0, 5, 31):
        for b in (0, 9, 31):
            total = 0.0
            for k in range(129):
                x = np.sum(window * wave[160 * t : 160 * t + 256] * np.exp(-2j * np.pi * k * n / 256))
                total += np.interp(k * 8000 / 256, corners[b : b + 3], [0, 1, 0]) * abs(x) ** 2
            np.testing.assert_allclose(got[b, t], np.log(1e-6 + total / np.sum(window**2)), rtol=1e-4)


def test_filters_share_every_frequency_out():
    f = speech.mel_filters()
    assert f.shape == (32, 129) and (f >= 0).all() and (f.sum(1) > 0).all()
    inner = slice(2, 119)  # between the first and the last peak, 40 and 3730 Hz, neighbours sum to 1
    torch.testing.assert_close(f.sum(0)[inner], torch.ones(129)[inner])


@pytest.mark.parametrize("hertz", [250, 1000, 3000])
def test_a_tone_is_loudest_in_its_band(hertz):
    t = torch.arange(speech.SAMPLES) / 8000
    sound = datasets.log_mel(0.5 * torch.sin(2 * torch.pi * hertz * t)[None])[0]
    centres = 700 * (10 ** (np.linspace(0, 2595 * np.log10(1 + 4000 / 700), 34)[1:-1] / 2595) - 1)
    assert (sound.argmax(0) == int(np.abs(centres - hertz).argmin())).all()
    silence = datasets.log_mel(torch.zeros(1, speech.SAMPLES))
    torch.testing.assert_close(silence, torch.full((1, 32, 32), float(np.log(1e-6))))


def test_chunks_of_recordings_change_nothing():
    waves = torch.randn(speech.WAVES_AT_ONCE + 5, speech.SAMPLES)
    parts = torch.cat([datasets.log_mel(part) for part in waves.split(100)])
    torch.testing.assert_close(datasets.log_mel(waves), parts)
    with pytest.raises(ValueError, match=r"\(N, 5216\)"):
        datasets.log_mel(waves[:, 1:])


def test_recordings_are_cut_and_padded_about_their_middle():
    audio = np.arange(1, 10_001).astype(np.int16)
    waves = speech.clip_recordings(audio, np.array([0, 4000, 10_000])) * 32768
    assert waves.shape == (2, 5216)
    assert waves[0].nonzero()[[0, -1], 0].tolist() == [608, 4607] and waves[0, 608] == 1 and waves[0, 4607] == 4000
    assert waves[1, 0] == 4000 + 392 + 1 and waves[1, -1] == 10_000 - 392
