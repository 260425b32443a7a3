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
)
from pyro_mm.experiments.studies.image_and_text import MEMBERS, Sizes, adam
from pyro_mm.experiments.studies.scene_generation import FACTS, draw_scenes, facts_right, judged_class
from pyro_mm.experiments.studies.study import with_gain

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
    value, error = known_share(knowing, sample.truth.rows, sample.test, labels, "image", 0)
    assert 0.9 < value < 1 and error < 0.01
    blind = scenes.SCENES.known["nothing"](sample, 0)
    assert abs(blind["known"][0]) < 0.05
    assert known_share(knowing, sample.truth.rows, sample.test, ["shape"], "image", 0)[0] > 0.9


def test_pairs_are_taken_apart_in_training_rows_alone(sample, characters):
    four = ("image", "pen", "components", "strokes")
    for found, names in ((sample._replace(truth=sample.truth.rows), ("image", "caption")), (characters, four)):
        assert found.train.names == found.test.names == names
        whole = torch.stack([found.train.present[name] for name in names]).all(0)
        assert int(whole.sum()) == round(found.train.size / 2)
        assert all(rows.present[name].all() for rows in (found.test, found.truth) for name in names)
    assert not sample.train.covariates["held_out"].any() and sample.test.covariates["held_out"].any()


@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_trains_on_scenes_and_is_measured(sample, name):
    """Under another default device: on a GPU, a tensor that is made without one would not mix with the others."""
    torch.manual_seed(0)
    run = MEMBERS[name](sample.train, SMALL)
    with torch.device("meta"):
        mm.fit(*run, sample.train, epochs=1, batch_size=50, seed=0, progress=False, device="cpu")
        found = scenes.measure(run, sample, seed=0)
        shown = draw_scenes(run, sample, seed=0)
    assert all(torch.tensor(cell).isfinite().all() for cell in found.values())
    expected = {*scenes.SCENES.known["nothing"](sample, 0), "distance × 1000"}
    if name != "implicit images":
        expected.add("log p(image)")
    has_means = name not in ("implicit images", "flow of images")
    if has_means:
        expected.add("distance × 1000, means")
    if name != "image alone":
        expected |= {"known from text", "known from both", "image from caption", "facts from image"}
        expected |= {"image from caption, means"} if has_means else set()
    assert set(found) == expected
    assert all(each.values.shape == each.truth.shape == (8, 3, 16, 16) for each in shown.values())
    assert ("given the caption" in shown) == (name != "image alone")


def test_pairs_without_the_other_rows_make_as_long_an_epoch(sample):
    found = scenes.sample_data(0, part=4, rows=(80, 20), side=16, source="digits", unpaired=False)
    assert found.train.size == 80 and all(present.all() for present in found.train.present.values())
    assert len(found.train["image"].flatten(1).unique(dim=0)) == 20


def test_captions_are_judged_fact_by_fact(sample):
    """A row's own caption is right, that of another row where both rows agree, and what is no sentence nowhere."""
    rows = sample.test
    assert facts_right(rows["caption"], rows) == (1.0, 0.0)
    facts = torch.stack([rows.covariates[name] for name in FACTS], -1)
    expected = (facts == facts.roll(1, 0)).double().mean().item()
    assert facts_right(rows["caption"].roll(1, 0), rows)[0] == pytest.approx(expected)
    assert facts_right(torch.ones_like(rows["caption"]), rows)[0] == 0


def test_the_judge_of_images_is_measured_on_real_ones(sample):
    found = scenes.SCENES.known["real images"](sample, 0)
    right = sample.truth.judge(sample.test["image"]).argmax(-1) == judged_class(sample.test)
    assert found["image from caption"][0] == pytest.approx(right.double().mean().item())
    assert abs(found["distance × 1000"][0]) < 5 * found["distance × 1000"][1], "halves of one sample"


@pytest.mark.parametrize("name", kanji.ROWS)
def test_every_member_trains_on_kanji_and_is_measured(characters, name):
    torch.manual_seed(0)
    run = MEMBERS[name](characters.train, SMALL)
    with torch.device("meta"):
        mm.fit(*run, characters.train, epochs=1, batch_size=50, drop_last=True, seed=0, progress=False, device="cpu")
        found = measure_kanji(run, characters, seed=0)
        shown = kanji.draw_kanji(run, characters, seed=0)
    assert all(torch.tensor(cell).isfinite().all() for cell in found.values())
    blind = set(measure_kanji_blindly(characters, 0))
    pen = {"components from pen", "strokes from pen"}
    assert set(found) == (blind if name == "image alone" else blind | pen)
    assert all(each.values.shape == each.truth.shape == (9, 16, 16) for each in shown.values())
    assert set(shown) >= {"from the prior", "given the image"} and len(shown) == (2 if name == "image alone" else 4)


def test_text_is_weighted_in_both_terms(sample):
    objective = MEMBERS["text x 20, product of experts"](sample.train, SMALL).objective
    assert "likelihood" in repr(objective) and repr(objective).count("20") >= 2


def test_critics_and_discriminators_have_smaller_steps(sample):
    for name, rate in (("joint encoder", 2e-3), ("VAE-GAN of images", 1e-3), ("implicit images", 1e-3)):
        run = MEMBERS[name](sample.train, SMALL)
        assert adam(run, run.model.parameters()).defaults["lr"] == rate


def test_a_gain_is_the_difference_seed_by_seed():
    runs = {
        "base": {0: {"known": (0.5, 0.03)}, 1: {"known": (0.25, 0.03)}},
        "row": {0: {"known": (0.75, 0.04), "other": 1.0}, 2: {"known": (0.5, 0.04)}},
    }
    found = with_gain(runs, "known", "base")
    assert found["base"] == runs["base"] and found["row"][2] == runs["row"][2]
    assert found["row"][0] == {"known": (0.75, 0.04), "other": 1.0, "known, gain": (0.25, pytest.approx(0.05))}
    assert with_gain({"base": {0: {"a": 1.0}}, "row": {0: {"a": 3.0}}}, "a", "base")["row"][0]["a, gain"] == 2.0
