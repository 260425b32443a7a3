"""Scenes with captions: what is drawn is what captions, attributes and boxes say."""

import os

import numpy as np
import pytest
import torch

from pyro_mm import datasets
from pyro_mm.datasets.captions import COLOURS, OPPOSITE, RELATIONS, SHAPES, VOCABULARY
from pyro_mm.datasets.composed_scenes import RGB
from pyro_mm.datasets.spelling import NAMES

FACTORS = ("digit", "digit_colour", "shape", "shape_colour", "relation", "digit_first")
SIDE = 32


@pytest.fixture(scope="module")
def split():
    return datasets.scenes(source="digits", rows=(3000, 1500), seed=3)


def edges(box):
    """Return left, top, right and bottom of a box in pixels, which are whole numbers."""
    found = box.double() * SIDE
    assert torch.equal(found, found.round())
    return [int(x) for x in found]


def test_every_caption_parses_to_its_scene(split):
    for batch in split:
        texts = datasets.caption_text(batch["caption"])
        rows = np.array([datasets.parse_caption(text) for text in texts])
        for i, name in enumerate(FACTORS):
            np.testing.assert_array_equal(rows[:, i], batch.covariates[name], name)
        words = torch.tensor([len(text.split()) for text in texts])
        assert torch.equal(batch.lengths["caption"], words + 1)
        assert (batch["caption"].gather(1, words[:, None]) == 0).all()
        assert set(words.tolist()) == {7, 8} and len(set(texts)) > 0.8 * len(texts)


def test_a_caption_names_each_object_with_its_own_colour():
    either_way = {"a cyan two left of a red disc", "a red disc right of a cyan two"}
    described = {datasets.parse_caption(text)[:5] for text in either_way}
    assert described == {(2, COLOURS.index("cyan"), SHAPES.index("disc"), COLOURS.index("red"), 0)}
    above = datasets.parse_caption("a red disc above a cyan two")
    assert RELATIONS[above.relation] == "below" and above.digit_first == 0
    assert all(OPPOSITE[OPPOSITE[r]] == r for r in range(4)) and len(VOCABULARY) == 27


@pytest.mark.parametrize(
    "text",
    [
        "", "a red seven", "a red seven left a blue square", "a red seven above of a blue square",
        "a red seven left of a blue eight", "a red disc left of a blue square", "red a seven left of a blue square",
        "a red seven  above a blue square", "a pink seven above a blue square", "a red seven above a blue square of",
        "a red seven right a blue left of", "a red seven above a blue square a",
    ],
)  # fmt: skip
def test_what_is_no_caption_is_refused(text):
    with pytest.raises(ValueError, match="is no caption: expected"):
        datasets.parse_caption(text)


def test_captions_of_unknown_tokens_are_refused():
    for tokens in (torch.tensor([[27]]), torch.tensor([[-1]]), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="expected tokens, integers from 0 to 26"):
            datasets.caption_text(tokens)


def test_boxes_are_those_of_the_pixels_of_their_colour(split):
    """Both objects' pixels lie in their boxes, touch all four edges, and nothing is drawn outside."""
    for batch in split:
        image, boxes = batch["image"], batch.covariates["boxes"]
        for n in range(0, batch.size, 7):
            outside = image[n].clone()
            for box, colour in zip(boxes[n], ("digit_colour", "shape_colour"), strict=True):
                left, top, right, bottom = edges(box)
                patch = image[n, :, top:bottom, left:right]
                ink = patch.any(0)
                assert ink.any(0)[[0, -1]].all() and ink.any(1)[[0, -1]].all()
                rgb = torch.from_numpy(RGB[batch.covariates[colour][n]])
                assert (patch[:, ink] == rgb[:, None]).all()
                outside[:, top:bottom, left:right] = 0
            assert not outside.any()


def test_exactly_the_relation_of_the_caption_holds(split):
    for batch in split:
        (left, top, right, bottom), (left_2, top_2, right_2, bottom_2) = (
            batch.covariates["boxes"][:, i].T for i in (0, 1)
        )
        holds = torch.stack([right <= left_2, left >= right_2, bottom <= top_2, top >= bottom_2], 1)
        assert (holds.sum(1) == 1).all()
        assert torch.equal(holds.long().argmax(1), batch.covariates["relation"])


def test_attributes_are_the_factors(split):
    for batch in split:
        parts = batch["attributes"].split([len(NAMES), len(COLOURS), len(SHAPES), len(COLOURS)], 1)
        for part, name in zip(parts, FACTORS, strict=False):
            assert (part.sum(1) == 1).all() and torch.equal(part.argmax(1), batch.covariates[name])


@pytest.mark.parametrize("held_out", [0, 1, 2])
def test_held_out_combinations_are_never_in_training_rows(held_out):
    train, test = datasets.scenes(source="digits", rows=(3000, 1500), held_out=held_out, modalities=("caption",))

    def combinations(batch, thing):
        pairs = torch.stack([batch.covariates[thing], batch.covariates[f"{thing}_colour"]], 1)
        return pairs, {tuple(pair) for pair in pairs.tolist()}

    assert not train.covariates["held_out"].any()
    is_held_out = torch.zeros(test.size, dtype=torch.bool)
    for thing, number in (("digit", 10), ("shape", 4)):
        seen = combinations(train, thing)[1]
        assert len(seen) == 6 * (number - held_out), "all others occur in training"
        assert {a for a, _ in seen} == set(range(number)) and {b for _, b in seen} == set(range(6))
        pairs, found = combinations(test, thing)
        assert len(found) == 6 * number
        is_held_out |= torch.tensor([tuple(pair) not in seen for pair in pairs.tolist()])
    assert torch.equal(is_held_out, test.covariates["held_out"] == 1)


def test_scenes_depend_on_the_seed_alone(split):
    again = datasets.scenes(source="digits", rows=(3000, 1500), seed=3)
    for first, second in zip(split, again, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert all(torch.equal(first.covariates[name], second.covariates[name]) for name in first.covariates)
    other, fewer = (datasets.scenes(source="digits", rows=(n, 5), seed=seed)[0] for n, seed in ((3000, 4), (5, 3)))
    assert not torch.equal(other["caption"], split[0]["caption"]) and fewer.size == 5
    assert not torch.equal(split[0]["image"][:1500], split[1]["image"]), "test rows are drawn anew"


def test_digits_and_shapes_are_uniform_and_independent_of_relations(split):
    """50 z-scores of counts under one seed: one beyond 4.5 with probability 3e-4."""
    train = split[0]
    for name, number in (("relation", 4), ("digit_first", 2), ("shape", 4)):
        counts = torch.bincount(train.covariates[name], minlength=number)
        p = 1 / number
        assert ((counts - train.size * p).abs() < 4.5 * (train.size * p * (1 - p)) ** 0.5).all()
    both = torch.bincount(10 * train.covariates["relation"] + train.covariates["digit"], minlength=40)
    share = torch.bincount(train.covariates["digit"], minlength=10).repeat(4) / 4
    assert ((both - share).abs() < 4.5 * (0.75 * share) ** 0.5).all()


def test_a_canvas_of_another_size_and_fewer_modalities():
    train, test = datasets.load("scenes", source="digits", rows=(6, 4), side=49, modalities=("image",))
    assert train.names == ("image",) and train["image"].shape == (6, 3, 49, 49) and not train.lengths
    assert set(test["image"].unique().tolist()) == {0.0, 1.0}


@pytest.mark.skipif("PYRO_MM_DATA" not in os.environ, reason="PYRO_MM_DATA is not set: no files to read")
def test_scenes_of_mnist_use_training_and_test_digits():
    train, test = datasets.scenes(rows=(20, 12))
    assert train["image"].shape == (20, 3, 32, 32) and test.size == 12
    assert datasets.caption_text(train["caption"])[0].startswith("a ")
