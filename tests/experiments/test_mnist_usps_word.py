"""The study of two pictures and a word: what a pixel and a letter are, and the table, on small files of its own."""

import json
import math
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from typer.testing import CliRunner

import pyro_mm as mm
from pyro_mm.cli import app
from pyro_mm.experiments import reproduce as command
from pyro_mm.experiments.studies import mnist_usps_word as pictures
from pyro_mm.experiments.studies.set_posteriors import OBJECTIVES, POSTERIORS
from tests.support.small_files import small  # noqa: F401, a fixture

SMALL = {"latent": 2, "hidden": (8,), "size": 8}


@pytest.fixture
def folder(small):  # noqa: F811
    pictures.judges.cache_clear()
    yield str(small[0])
    pictures.judges.cache_clear()


def rows(n=6):
    word, lengths = mm.datasets.words(torch.arange(n))
    values = {"mnist": torch.rand(n, 28, 28).round(), "usps": torch.rand(n, 16, 16).round(), "word": word}
    return mm.Batch(values, lengths={"word": lengths}).with_end_marks()


def test_the_probabilities_of_all_words_sum_to_one(double):
    """Words of three places over an end mark and three letters, those with letters after the end mark included."""
    decoder = pictures.spelled(2, (8,), length=3, letters=4)
    z = torch.randn(5, 1, 2)
    every = torch.tensor(list(product(range(4), repeat=3)))
    log_prob = decoder(z).log_prob(every)
    assert log_prob.shape == (5, 64)
    torch.testing.assert_close(log_prob.exp().sum(-1), torch.ones(5), atol=1e-12, rtol=0)
    logits = decoder.net[0](z[:, 0]).reshape(5, 3, 4)
    for word, found in zip(every, log_prob.T, strict=True):  # every place counts, that of the padding too
        by_hand = sum(logits[:, place].log_softmax(-1)[:, letter] for place, letter in enumerate(word))
        torch.testing.assert_close(found, by_hand, atol=1e-12, rtol=0)


def test_the_likelihood_of_words_is_an_integral_over_the_latent(double):
    batch = rows()
    model, guide, _ = pictures.recipe(batch, POSTERIORS["SumPooling"], OBJECTIVES["masked"], **(SMALL | {"latent": 1}))
    for p in model.decoders["word"].parameters():
        p.data.mul_(3)  # so that words depend on z
    evidence = mm.log_marginal(model, guide, batch.only("word"), num_particles=4000, seed=0)
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z = torch.from_numpy(nodes)[:, None, None]
    given = model.decoders["word"](z).log_prob(batch["word"])
    exact = (given + torch.from_numpy(weights / math.sqrt(2 * math.pi)).log()[:, None]).logsumexp(0)
    assert exact.std() > 0.1
    assert ((evidence.log_prob - exact).abs() < 5 * evidence.standard_error + 1e-6).all()


def test_padding_is_a_letter_to_the_encoder():
    net = pictures.reader(5, (8,))
    words = mm.datasets.words(torch.arange(10))[0]
    torch.testing.assert_close(net(words), net[1](torch.eye(27)[words].flatten(1)))
    assert words[1].tolist() == [15, 14, 5, 0, 0, 0]
    other = words[1].clone()
    other[5] = 1
    assert not torch.allclose(net(words[1]), net(other))
    assert all(not p.requires_grad for p in net[0].parameters())


def test_a_mixture_given_nothing_is_the_prior(double):
    """Where the objective hides all of a row, its values stay in the batch: nothing may look at them."""
    batch = rows()
    _, guide, _ = pictures.recipe(batch, POSTERIORS["MoE"], OBJECTIVES["mixture bound"], **SMALL)
    q, z = guide.posteriors["z"], torch.randn(6, 2)
    some = torch.tensor([True, False] * 3)
    one = mm.Batch({name: batch[name] for name in batch}, present={n: some & (n == "word") for n in batch})
    log_q = q(one).log_prob(z)
    prior = dist.Normal(0, 1).expand([2]).to_event(1).log_prob(z)
    expert = q.experts["word"](batch["word"]).log_prob(z)
    torch.testing.assert_close(log_q, torch.where(some, expert, prior))


def test_a_bounded_expert_keeps_a_least_precision():
    raw = torch.tensor([[0.5, -40.0], [0.5, 0.0], [0.5, 1e4]])
    q = mm.conditionals.Normal(pictures.Bounded(torch.nn.Identity()))(raw).base_dist
    assert torch.equal(q.loc, raw[:, :1]) and q.scale[0] < 1e-3 and q.scale[1] == pytest.approx(1, abs=0.05)
    assert 3.5 < q.scale[2] < 3.6 and q.scale[2] ** -2 == pytest.approx(0.08, abs=0.005)


def test_a_pixel_is_one_above_half(folder):
    sample, other = pictures.sample_data(3, folder), pictures.sample_data(4, folder)
    grey = [mm.datasets.mnist_usps_word(folder, repeat=part == 0, seed=3)[part] for part in (0, 1)]
    for part, of_grey in zip(sample[:2], grey, strict=True):
        for name in pictures.PICTURES:
            assert (
                torch.equal(part[name], torch.where(of_grey[name] > 0.5, 1.0, 0.0)) and part[name].unique().numel() == 2
            )
        assert torch.equal(part["word"], of_grey["word"])
    assert not torch.equal(sample.train["usps"], other.train["usps"])
    assert other.truth is sample.truth and set(sample.truth.each) == {*pictures.PICTURES, "word"}
    found = pictures.measure_true_rows(sample, 0)
    labels = sample.train.covariates["label"].tolist()
    shares = [math.log(labels.count(c) / len(labels)) for c in sample.test.covariates["label"].tolist()]
    assert found["log p(word)"] == pytest.approx(sum(shares) / len(shares))
    assert found["word from mnist"][0] == 1
    right = sample.truth.each["usps"](sample.test["usps"]).argmax(-1) == sample.test.covariates["label"]
    assert found["usps from mnist, word"][0] == pytest.approx(right.double().mean().item())


def test_the_table_has_all_rows_and_columns(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(pictures, "PARTICLES", 20)
    monkeypatch.setattr(pictures, "JOINT", 50)
    members = {name: partial(member, **SMALL) for name, member in pictures.MNIST.members.items()}
    study = replace(pictures.MNIST, members=members, batch_size=32)
    monkeypatch.setattr(command, "STUDIES", {"small": study})
    options = ["--epochs", "1", "--seeds", "1", "--no-compile", "--data", folder, "--out", str(tmp_path / "out")]

    def table_of(*arguments):
        result = CliRunner().invoke(app, ["reproduce", "small", *options, *arguments])
        assert result.exit_code == 0, result.output
        lines = [line for line in (tmp_path / "out" / "table.md").read_text().splitlines() if line.startswith("|")]
        header, _, *body = [[cell.strip() for cell in line.replace("\\|", "¦").split("|")[1:-1]] for line in lines]
        return header, body

    header, body = table_of("--no-fitted")
    names = ["mnist", "usps", "word"]
    columns = {
        "log p(all)",
        *(f"log p({name})" for name in names),
        "log p(usps ¦ mnist)",
        "k-hat > 0.7",
        "of one class",
    }
    columns |= {f"{target} from {given}" for target in names for given in names if given != target}
    columns |= {f"{names[i]} from {', '.join(n for n in names if n != names[i])}" for i in range(3)}
    assert {*header} == {"", "s/epoch", *columns}
    table = {name: dict(zip(header[1:], cells, strict=True)) for name, *cells in body}
    assert [*table] == ["true rows", *study.members] and len(study.members) == 9
    for name in study.members:
        assert all("±" in cell for column, cell in table[name].items() if "from" in column or "log" in column), name
        found = json.loads(next((tmp_path / "out" / "three modalities" / name).glob("measured-*.json")).read_text())
        joint, first, conditional = (found[c][0] for c in ("log p(all)", "log p(mnist)", "log p(usps | mnist)"))
        # at the start pixels are coins, and letters dice of 27 sides
        assert joint == pytest.approx(-(784 + 256) * math.log(2) - 6 * math.log(27), rel=0.1)
        assert conditional == pytest.approx(-256 * math.log(2), rel=0.1) and first == pytest.approx(
            -784 * math.log(2), rel=0.1
        )
    assert table["true rows"]["log p(all)"] == "–" and table["true rows"]["word from mnist"].startswith("1.000")

    # by fitted proposals, with the numbers of before beside them; a row is not trained again
    member = "mixture bound, MoE"
    wider, body = table_of("--only", member)
    (row,) = [cells for cells in body if cells[0] == member]
    assert {*wider} - {*header} == {"log p(all), by the guide", "k-hat > 0.7, by the guide"}
    both = dict(zip(wider[1:], row[1:], strict=True))
    assert both["log p(all), by the guide"] == table[member]["log p(all)"] != both["log p(all)"]
    assert both["of one class"] == table[member]["of one class"]
