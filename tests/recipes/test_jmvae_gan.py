"""JMVAE-GAN trains with missing modalities, in colour from files, and is JMVAE-kl but for its decoder's updates."""

import math

import pytest
import torch

import pyro_mm as mm
from tests.support.published_files import write_celeba

SMALL = {"latent": 3, "hidden": (8,)}
OPTIONS = {"batch_size": 64, "seed": 0, "progress": False}


def test_jmvae_gan_trains_evaluates_and_generates():
    rows = mm.datasets.digits(grey=True)[0][:100]
    assert 2 < rows["image"].unique().numel() <= 17 and rows["image"].max() == 1
    present = {"image": torch.arange(100) % 3 > 0, "label": torch.arange(100) % 4 > 0}
    rows = mm.Batch({name: rows[name] for name in rows.names}, present)
    torch.manual_seed(0)
    model, guide, objective = mm.recipes.jmvae_gan(rows, **SMALL, weight=2.0)
    assert list(objective.discriminators) == ["image"] and objective.discriminators["image"].weight == 2.0
    history = mm.fit(model, guide, objective, rows, epochs=8, **OPTIONS)
    assert history.columns["loss"][-1] < history.columns["loss"][0]
    assert math.isfinite(history.columns["image discriminator"][-1])
    assert math.isfinite(mm.log_marginal(model, guide, rows, num_particles=5, seed=0).mean()[0])
    assert mm.generate(model, guide, rows.only("label"), mean=True)["image"].shape == (1, 100, 8, 8)


def test_its_table_is_that_of_jmvae_kl():
    rows = mm.datasets.digits()[0][:20]
    values = []
    for make in (mm.recipes.jmvae_kl, mm.recipes.jmvae_gan):
        torch.manual_seed(0)
        model, guide, objective = make(rows, **SMALL, alpha=0.3)
        torch.manual_seed(1)
        values.append(objective.evaluate(model, guide, rows, step=0).total.item())
    assert values[0] == values[1]


def test_celeba_of_64_pixels_with_attributes_trains(tmp_path):
    """From files of the published format, read minibatch by minibatch; convolutions judge colour images."""
    write_celeba(tmp_path / "celeba", "0" * 6 + "2")
    pictures, _ = mm.datasets.celeba_pictures(tmp_path)
    rows = pictures.batch()
    assert rows["image"].shape == (6, 3, 64, 64) and rows["attributes"].shape == (6, 3)
    networks = {"attributes": mm.recipes.Networks(kind="bits")}
    torch.manual_seed(0)
    model, guide, objective = mm.recipes.jmvae_gan(rows, **SMALL, networks=networks)
    assert any(isinstance(part, torch.nn.Conv2d) for part in objective.discriminators["image"].net.modules())
    history = mm.fit(model, guide, objective, pictures.loader(3), epochs=1, progress=False)
    assert all(math.isfinite(column[-1]) for column in history.columns.values())
    drawn = mm.generate(model, guide, rows.only("attributes"), mean=True)
    assert drawn["image"].shape == (1, 6, 3, 64, 64)


def test_a_batch_without_images_needs_discriminators_by_name():
    rows = mm.Batch({"a": torch.arange(6) % 3, "b": torch.arange(6) % 2})
    with pytest.raises(ValueError, match=r"the batch has no images, .* name the modalities of discriminators"):
        mm.recipes.jmvae_gan(rows, **SMALL)
