"""Sets of people who speak: padding, missing modalities, text, scaling and labels; errors; the real files."""

import os

import numpy as np
import pytest
import torch

from pyro_mm import datasets
from tests.support.sentiment_files import (
    PARTS,
    STEPS,
    sequence_arrays,
    utterance_arrays,
    utterance_splits,
    write_hdf5,
    write_npz,
    write_pickle,
)

needs_data = pytest.mark.skipif("PYRO_MM_DATA" not in os.environ, reason="PYRO_MM_DATA is not set: no files to read")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# -- MOSI -------------------------------------------------------------------------------------------------------------


def test_mosi_has_utterances_scaled_by_training_rows_and_a_class(rng, tmp_path):
    arrays = utterance_arrays(rng)
    arrays["audio_test"][1] = 0
    write_npz(tmp_path, "mosi_utterance.npz", arrays)
    train, test = datasets.load("mosi", directory=tmp_path)
    assert train.names == ("text", "audio", "video", "label") and test["label"].dtype == torch.int64
    assert train["video"].shape == (9, 2), "the feature that never varies is dropped"
    np.testing.assert_array_equal(test["label"], arrays["y_test"])
    assert test.presence("audio").tolist() == [True, False, True, True] and test.presence("text") is True
    for name in ("text", "audio", "video"):
        x = arrays[f"{name}_train"].astype(float)
        used = slice(0, train[name].shape[-1])
        for batch, part in ((train, "train"), (test, "test")):
            wanted = (arrays[f"{name}_{part}"][:, used] - x.mean(0)[used]) / x.std(0)[used]
            there = batch.present[name].numpy()
            np.testing.assert_allclose(batch[name].numpy()[there], wanted[there], rtol=1e-5, atol=1e-6)

    raw, _ = datasets.mosi(tmp_path, standardise=False, constant="keep")
    np.testing.assert_array_equal(raw["video"], arrays["video_train"])


def test_a_video_in_both_parts_of_mosi_is_refused(rng, tmp_path):
    arrays = utterance_arrays(rng)
    arrays["id_test"][2] = "train_video_99"
    write_npz(tmp_path, "mosi_utterance.npz", arrays)
    with pytest.raises(ValueError, match=r"utterances of 1 videos are in both parts, of train_video for instance"):
        datasets.mosi(tmp_path)


# -- MMMO, POM, YouTube -----------------------------------------------------------------------------------------------


def test_all_zero_steps_are_removed_and_a_modality_of_zeros_is_missing(rng, tmp_path):
    arrays = sequence_arrays(rng, "mmmo")
    arrays["audio_train"][0, 3:6] = arrays["audio_train"][1, -1]  # a gap behind it, and steps in front
    arrays["video_train"][4] = 0
    write_npz(tmp_path, "mmmo_mfn.npz", arrays)
    for aligned in (False, True):
        train, _ = datasets.sequences("mmmo", tmp_path, standardise=False, aligned=aligned)
        audio, video = arrays["audio_train"], arrays["video_train"]
        assert train.presence("audio") is True and (~train.presence("video")).nonzero().tolist() == [[4]]
        for row in range(9):
            for name, x in (("audio", audio), ("video", video)):
                if not train.present[name][row]:
                    continue
                measured = x[row].any(1)
                if aligned:
                    both = (audio[row] != 0).any(1) | (video[row] != 0).any(1)
                    first, last = both.nonzero()[0][[0, -1]]
                    wanted = x[row, first : last + 1]
                else:
                    wanted = x[row, measured]
                length = int(train.lengths[name][row])
                assert length == len(wanted)
                np.testing.assert_array_equal(train[name][row, :length], wanted)
                padding = train[name][row, length:]  # copies of the last step, as in every batch
                assert torch.equal(padding, train[name][row, length - 1].expand_as(padding))
        assert train.lengths["video"][4] == train.lengths["audio"][4], "a missing modality has the length of the other"
    assert datasets.sequences("mmmo", tmp_path, standardise=False)[0].lengths["audio"][0] == 4


def test_steps_are_scaled_by_valid_steps_of_training_rows(rng, tmp_path):
    arrays = sequence_arrays(rng, "pom")
    arrays["video_train"][2] = 0
    write_npz(tmp_path, "pom_mfn.npz", arrays)
    raw, scaled = (datasets.sequences("pom", tmp_path, standardise=s, held_out="validation") for s in (False, True))
    for name in ("audio", "video"):
        steps = arrays[f"{name}_train"].astype(float).reshape(-1, arrays[f"{name}_train"].shape[-1])
        steps = steps[steps.any(1)]
        for one, other in zip(raw, scaled, strict=True):
            valid = torch.arange(STEPS) < one.lengths[name][:, None]
            valid &= one.present[name][:, None]
            wanted = (one[name].double().numpy() - steps.mean(0)) / steps.std(0)
            np.testing.assert_allclose(other[name][valid], wanted[valid], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(scaled[1]["label"], arrays["y_valid"])
    assert scaled[1].size == PARTS["valid"] and scaled[1]["label"].shape == (3, 17)


def test_text_is_missing_where_the_files_lack_it(rng, tmp_path):
    for which in ("mmmo", "pom"):
        write_npz(tmp_path, f"{which}_mfn.npz", sequence_arrays(rng, which))
    train, test = datasets.sequences("mmmo", tmp_path, text=True)
    assert train.presence("text") is False and test.presence("text") is True
    assert test["text"].shape == (4, 20, 5) and test["text"].abs().max() > 1, "not scaled: there is none to train on"
    assert "text" not in datasets.sequences("mmmo", tmp_path)[1]
    with pytest.raises(ValueError, match=r"pom_mfn.npz has no text for test rows: leave text=False"):
        datasets.sequences("pom", tmp_path, text=True)


def test_training_rows_without_measurements_are_refused_with_their_share(rng, tmp_path):
    arrays = sequence_arrays(rng, "youtube")
    for name in ("audio", "video"):
        arrays[f"{name}_train"][:7] = 0
    write_npz(tmp_path, "youtube_mfn.npz", arrays)
    with pytest.raises(ValueError, match=r"7 of 9 training rows \(78%\) have none of audio, video.*allow_empty=True"):
        datasets.load("youtube", directory=tmp_path)
    train, _ = datasets.sequences("youtube", tmp_path, allow_empty=True)
    assert train.having(["audio", "video"]).tolist() == [False] * 7 + [True] * 2
    assert train["label"].tolist() == [0, 1, 2] * 3
    assert train.lengths["audio"][0] == STEPS, "nothing is known of it"


def test_the_published_hdf5_files_give_what_an_npz_file_does(rng, tmp_path):
    for which, text in (("mmmo", True), ("pom", False)):
        arrays = sequence_arrays(rng, which)
        write_npz(tmp_path, f"{which}_mfn.npz", arrays)
        other = tmp_path / "published"
        other.mkdir(exist_ok=True)
        write_hdf5(other / which, arrays)
        one, two = (datasets.sequences(which, folder, text=text) for folder in (tmp_path, other))
        for batch, same in zip(one, two, strict=True):
            assert str(batch) == str(same)
            for name in batch.names:
                assert not batch.holds(name) or torch.equal(batch[name], same[name])


def test_published_hdf5_files_that_do_not_fit_are_refused(rng, tmp_path):
    arrays = sequence_arrays(rng, "pom")
    write_hdf5(tmp_path / "pom", arrays | {"video_test": arrays["video_test"][:2]})
    with pytest.raises(ValueError, match=r"video_test.h5: an array of shape \(2, 20, 3\) does not fit the others"):
        datasets.sequences("pom", tmp_path)
    (tmp_path / "pom" / "video_test.h5").write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"video_test.h5 is damaged, or no HDF5 file"):
        datasets.sequences("pom", tmp_path)


# -- errors -----------------------------------------------------------------------------------------------------------


def damaged(arrays, what):
    """Arrays of MMMO with one mistake."""
    if what == "constant":
        arrays["audio_train"][arrays["audio_train"].any(-1), 2] = 0.3
    elif what == "enormous in training":
        arrays["audio_train"][3, -1, 1] = -2e7
    elif what == "enormous scaled":
        arrays["video_test"][2, -1, 1] = 9e4
    elif what == "rows in both":
        for name in ("audio", "video"):
            arrays[f"{name}_test"][:2] = arrays[f"{name}_train"][:2]
    elif what == "rating":
        arrays["y_train"][0] = 7
    return arrays


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("constant", r"'audio': 1 of 4 features never vary in the training rows \(feature 2\).*constant='drop'"),
        ("enormous in training", r"'audio', train rows: feature 1 reaches -2e\+07, beyond 1,000,000"),
        ("enormous scaled", r"'video', test rows: feature 1 is 90000, [\d,]+ standard deviations of the training rows"),
        ("rows in both", r"2 of the test rows are training rows, too, so that the split is a wrong one"),
        ("rating", r"expected train labels, numbers from 1 to 5, got .* to 7.0"),
    ],
)
def test_data_that_would_give_wrong_numbers_are_refused(rng, tmp_path, what, message):
    write_npz(tmp_path, "mmmo_mfn.npz", damaged(sequence_arrays(rng, "mmmo"), what))
    with pytest.raises(ValueError, match=r"mmmo_mfn.npz.*" + message):
        datasets.sequences("mmmo", tmp_path)


def test_features_that_never_vary_are_dropped_or_kept(rng, tmp_path):
    arrays = damaged(sequence_arrays(rng, "mmmo"), "constant")
    write_npz(tmp_path, "mmmo_mfn.npz", arrays)
    train, test = datasets.sequences("mmmo", tmp_path, constant="drop")
    assert train["audio"].shape[-1] == test["audio"].shape[-1] == 3
    with pytest.raises(
        ValueError, match=r"vary here \(feature 2\), so that no scale was fitted to them: constant='drop'"
    ):
        datasets.sequences("mmmo", tmp_path, constant="keep")
    arrays["audio_test"][arrays["audio_test"].any(-1), 2] = 0.3
    write_npz(tmp_path, "mmmo_mfn.npz", arrays)
    train, test = datasets.sequences("mmmo", tmp_path, constant="keep")
    assert train["audio"].shape[-1] == 4 and test["audio"][..., 2].abs().max() < 1e-6


@pytest.mark.parametrize(
    "wrong", [{"held_out": "valid"}, {"which": "mosei"}, {"constant": "omit"}], ids=lambda wrong: next(iter(wrong))
)
def test_an_unknown_choice_is_refused(wrong, tmp_path):
    ((argument, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{argument} to be one of .*{value}"):
        datasets.sequences(**{"which": "pom", "directory": tmp_path} | wrong)


# -- MOSEI and IEMOCAP ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_mosei_is_read_from_its_published_layout(rng, tmp_path, protocol):
    labels = {part: rng.uniform(-3, 3, (n, 1, 1)).astype(np.float32) for part, n in PARTS.items()}
    splits = utterance_splits(rng, labels)
    write_pickle(tmp_path / "mosei" / "mosei_senti_data.pkl", splits, protocol)
    train, valid = datasets.load("mosei", directory=tmp_path, held_out="validation", standardise=False)
    assert train.names == ("text", "audio", "video", "label") and (train.size, valid.size) == (9, 3)
    np.testing.assert_array_equal(valid["label"], labels["valid"][:, 0, 0])
    assert train.lengths["text"].tolist() == [1 + i % 6 for i in range(9)]
    assert train["audio"].isfinite().all() and train["audio"][0, 0, 0] == 0, "the logarithm of silence becomes 0"
    np.testing.assert_array_equal(train["video"][1, :2], splits["train"]["vision"][1, -2:])


def test_unaligned_mosei_has_unequal_steps(rng, tmp_path):
    labels = {part: np.zeros((n, 1, 1)) for part, n in PARTS.items()}
    write_pickle(tmp_path / "mosei" / "noalign.pkl", utterance_splits(rng, labels, steps=(4, 6, 8)))
    train, _ = datasets.mosei(tmp_path, file="noalign.pkl")
    assert [train[name].shape[1] for name in ("text", "audio", "video")] == [4, 6, 8]
    with pytest.raises(ValueError, match=r"aligned=True needs modalities of equal steps, got \{'text': 4"):
        datasets.mosei(tmp_path, file="noalign.pkl", aligned=True)
    with pytest.raises(ValueError, match=r"'../noalign.pkl', which leads out of its folder"):
        datasets.mosei(tmp_path, file="../noalign.pkl")


def test_iemocap_has_four_emotions(rng, tmp_path):
    there = {part: rng.integers(0, 2, (n, 4)) for part, n in PARTS.items()}
    labels = {part: np.stack([1 - y, y], -1) for part, y in there.items()}
    path = tmp_path / "iemocap" / "iemocap_data.pkl"
    write_pickle(path, utterance_splits(rng, labels))
    for part, batch in zip(("train", "test"), datasets.load("iemocap", directory=tmp_path), strict=True):
        np.testing.assert_array_equal(batch["label"], there[part])
        assert batch["label"].dtype == torch.float32
    labels["test"][0, 0] = 1
    write_pickle(path, utterance_splits(rng, labels))
    with pytest.raises(ValueError, match=r"test labels that are 1 for absent or for there, found both or neither"):
        datasets.iemocap(tmp_path)
    write_pickle(path, {"train": {}})
    with pytest.raises(ValueError, match=r"expected train labels as numbers of 3 dimensions, got NoneType, among \[\]"):
        datasets.iemocap(tmp_path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("made_by_a_pickle",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pickle(tmp_path / "iemocap" / "iemocap_data.pkl", {"train": Malicious()})
    with pytest.raises(ValueError, match=r"holds .*mkdir, which is no array: files are not allowed to run code"):
        datasets.iemocap(tmp_path)
    assert not (tmp_path / "made_by_a_pickle").exists()
    (tmp_path / "iemocap" / "iemocap_data.pkl").write_bytes(b"\x80\x05nonsense")
    with pytest.raises(ValueError, match=r"iemocap_data.pkl is damaged"):
        datasets.iemocap(tmp_path)


# -- the real files ---------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize(
    ("name", "options", "sizes", "shapes"),
    [
        ("mosi", {}, (1447, 752), {"text": (100,), "audio": (73,), "video": (68,), "label": ()}),
        ("mmmo", {}, (220, 80), {"audio": (20, 74), "video": (20, 36), "label": ()}),
        (
            "youtube", {"allow_empty": True, "constant": "drop"}, (173, 60),
            {"audio": (20, 72), "video": (20, 36), "label": ()},
        ),
        ("pom", {"held_out": "validation"}, (600, 100), {"audio": (20, 43), "video": (20, 41), "label": (17,)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_the_real_files_have_their_sizes_and_shapes(name, options, sizes, shapes):
    train, held_out = datasets.load(name, **options)
    assert (train.size, held_out.size) == sizes
    for batch in (train, held_out):
        assert {view: tuple(batch[view].shape[1:]) for view in batch.names} == shapes
        assert all(bool(batch[view].isfinite().all()) for view in shapes)
        assert all(length.min() > 0 for length in batch.lengths.values())
    if name == "youtube":
        assert int((~train.having(["audio", "video"])).sum()) == 125
    if name == "pom":
        assert int((~train.presence("video")).sum()) == 322 and train.presence("audio") is True


@needs_data
def test_most_training_rows_of_youtube_are_empty():
    with pytest.raises(ValueError, match=r"125 of 173 training rows \(72%\) have none of audio, video"):
        datasets.load("youtube")
