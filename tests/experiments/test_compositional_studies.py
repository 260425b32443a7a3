"""Studies of scenes and kanji on few rows: probes of guides that know everything or nothing, and every member once."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.nn.functional import one_hot

import pyro_mm as mm
from pyro_mm.experiments.studies import kanji, scenes
from pyro_mm.experiments.studies.compositional_probes import (
    SCENE_LABELS,
    known_share,
    measure_kanji,
    measure_kanji_blindly,
    measure_scenes,
    measure_scenes_blindly,
)
from pyro_mm.experiments.studies.image_and_text import MEMBERS, Sizes

SMALL = Sizes(latent=3, hidden=8, channels=(4,), flow_steps=1, flow_channels=4)


@pytest.fixture(scope="module")
def sample():
    return scenes.sample_data(0, part=2, rows=(250, 120), side=16, source="digits")


def strokes(rng, number):
    """Paths of one random curve each."""
    points = torch.rand(number, 8, generator=rng).mul(90).add(5).tolist()
    texts = [" ".join(f"{x:.1f}" for x in each) for each in points]
    starts = [" ".join(text.split()[:2]) for text in texts]
    return "".join(f'<path d="M{a}C{" ".join(t.split()[2:])}"/>' for a, t in zip(starts, texts, strict=True))


@pytest.fixture(scope="module")
def characters(tmp_path_factory):
    """Sixty characters of two components, of which each has one, both or none, and of one to nine strokes."""
    folder, rng = tmp_path_factory.mktemp("kanji"), torch.Generator().manual_seed(0)
    for i in range(60):
        inner = strokes(rng, 1 + i % 9)
        for part, has in (("口", i % 2), ("木", i // 2 % 2)):
            inner = f'<g kvg:element="{part}">{inner}</g>' if has else inner
        text = f'<svg xmlns:kvg="http://kanjivg.tagaini.net">{inner}</svg>'
        (folder / f"{0x4E00 + i:05x}.svg").write_text(text, encoding="utf-8")
    return kanji.sample_data(0, str(folder), part=2, side=16, least=10)


def knowing(batch):
    """z is everything that a scene consists of."""
    with batch.plate():
        numbers = {"digit": 10, "digit_colour": 6, "shape": 4, "shape_colour": 6, "relation": 4}
        each = [one_hot(batch.covariates[name], number) for name, number in numbers.items()]
        pyro.sample("z", dist.Normal(torch.cat(each, -1).float(), 1.0).to_event(1))


def test_a_guide_that_knows_a_scene_knows_nearly_all_nats(sample):
    labels = [*SCENE_LABELS]
    value, error = known_share(knowing, sample.truth, sample.test, labels, "image", 0)
    assert 0.9 < value < 1 and error < 0.01
    blind = measure_scenes_blindly(sample, 0)
    assert abs(blind["known"][0]) < 0.05
    assert known_share(knowing, sample.truth, sample.test, ["shape"], "image", 0)[0] > 0.9


def test_pairs_are_taken_apart_in_training_rows_alone(sample, characters):
    for found, names in ((sample, ("image", "caption")), (characters, ("image", "pen", "components"))):
        assert found.train.names == found.test.names == names
        whole = torch.stack([found.train.present[name] for name in names]).all(0)
        assert int(whole.sum()) == round(found.train.size / 2)
        assert all(rows.present[name].all() for rows in (found.test, found.truth) for name in names)
    assert not sample.train.covariates["held_out"].any() and sample.test.covariates["held_out"].any()


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_trains_on_scenes_and_is_measured(sample, name):
    torch.manual_seed(0)
    run = MEMBERS[name](sample.train, SMALL)
    mm.fit(*run, sample.train, epochs=1, batch_size=50, seed=0, progress=False)
    found = measure_scenes(run, sample, seed=0)
    assert all(torch.tensor(cell).isfinite().all() for cell in found.values())
    text = {"known from text", "known from both"}
    blind = set(measure_scenes_blindly(sample, 0))
    assert set(found) == (blind if name == "image alone" else blind | text)


@pytest.mark.parametrize("name", kanji.ROWS)
def test_every_member_trains_on_kanji_and_is_measured(characters, name):
    torch.manual_seed(0)
    run = MEMBERS[name](characters.train, SMALL)
    mm.fit(*run, characters.train, epochs=1, batch_size=50, seed=0, progress=False)
    found = measure_kanji(run, characters, seed=0)
    assert all(torch.tensor(cell).isfinite().all() for cell in found.values())
    blind = set(measure_kanji_blindly(characters, 0))
    pen = {"components from pen", "strokes from pen"}
    assert set(found) == (blind if name == "image alone" else blind | pen)


def test_text_is_weighted_in_both_terms(sample):
    objective = MEMBERS["text x 20, product of experts"](sample.train, SMALL).objective
    assert "likelihood" in repr(objective) and repr(objective).count("20") >= 2
