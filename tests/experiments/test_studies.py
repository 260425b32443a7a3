"""Studies: their closed forms against each other, and the command that runs them."""

import json
import math
from dataclasses import replace
from functools import partial

import pyro.distributions as dist
import pytest
import torch
from typer.testing import CliRunner

import pyro_mm as mm
from pyro_mm.cli import app
from pyro_mm.datasets.simulated import clustered, orthonormal_loadings
from pyro_mm.experiments import reproduce as command
from pyro_mm.experiments.studies import STUDIES, identifiable, linear, quadrature
from pyro_mm.experiments.studies import diagonal_optimum as optimum
from pyro_mm.experiments.studies.set_posteriors import OBJECTIVES, POSTERIORS
from pyro_mm.experiments.studies.study import build_table
from pyro_mm.models import LinearGaussian


def loadings(private=2, scale=None, seed=0):
    """Orthonormal, or of independent normal entries."""
    found = orthonormal_loadings({"a": 8, "b": 9}, 2, private, seed)
    if scale is None:
        return found
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(w.shape, generator=generator) * (w != 0) for name, w in found.items()}


def test_at_the_truth_every_term_is_an_evidence():
    r"""With diagonal posteriors, E ELBO(x_S) = E log p(x_S), and the rest's term is E log p(x_rest | x_S): minus the
    entropy of a Gaussian of covariance C, (log det C + d + d log 2 pi) / 2."""
    population = optimum._Population([w.double() for w in loadings().values()])
    w, size = population.truth, population.latent
    means, log_variances = {}, {}
    for s in population.subsets:
        seen = w[population.rows[s]]
        precision = torch.eye(size, dtype=torch.float64) + seen.T @ seen
        means[s] = torch.linalg.solve(precision, seen.T)
        log_variances[s] = -precision.diagonal().log()
    value = optimum._Value(population, w, means, log_variances)

    def entropy(s):
        rows = population.rows[s]
        covariance = population.covariance[rows][:, rows]
        return 0.5 * (torch.logdet(covariance).item() + len(rows) * (1 + math.log(2 * math.pi))) if len(rows) else 0.0

    full = population.all
    for s in population.subsets:
        rest = tuple(m for m in full if m not in s)
        assert (value.likelihood(s, s) - value.kl(s)).item() == pytest.approx(-entropy(s), abs=1e-6)
        conditional = (value.likelihood(full, rest) - value.kl(full, s)).item()
        assert conditional == pytest.approx(entropy(s) - entropy(full), abs=1e-6)
    assert value.masked().item() == pytest.approx(population.evidence(w), abs=1e-6)


def test_the_closed_forms_are_the_objectives_of_the_library():
    """Diagonal posteriors that are not exact, on 20,000 rows: the two objectives within six standard errors."""
    torch.manual_seed(0)
    story = LinearGaussian(loadings(scale=0.7), 1.0)
    rows, names = story.sample(20_000), ("a", "b")
    population = optimum._Population([w.detach().double() for w in story.loadings.values()])
    generator = torch.Generator().manual_seed(1)
    means, log_variances = {}, {}
    for s in population.subsets:
        shape = population.latent, len(population.rows[s])
        means[s] = 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        log_variances[s] = 0.3 * torch.randn(population.latent, generator=generator, dtype=torch.float64)
    value = optimum._Value(population, population.truth, means, log_variances)

    class Affine(torch.nn.Module):
        """q(z | x_S) with the weights and variances of every S."""

        def forward(self, batch):
            masks = torch.stack([batch.present[name] for name in names])
            loc = torch.zeros(*masks.shape[1:], population.latent, dtype=torch.float64)
            scale = torch.ones_like(loc)
            for s in population.subsets:
                x = torch.cat([batch[names[m]].double() for m in s], -1) if s else torch.zeros(batch.size, 0).double()
                chosen = torch.stack([masks[m] == (m in s) for m in range(2)]).all(0)[..., None]
                loc = torch.where(chosen, x @ means[s].T, loc)
                scale = torch.where(chosen, (0.5 * log_variances[s]).exp(), scale)
            return dist.Normal(loc, scale).to_event(1)

    guide, story = mm.Guide(z=Affine()), story.double()
    expected = {"masked": value.masked().item(), "mixture bound": value.mixture_bound().item()}
    for name, table in (
        ("masked", mm.objectives.masked()),
        ("mixture bound", mm.objectives.subset_mean(1, empty=True)),
    ):
        parts = [rows[i : i + 500] for i in range(0, 20_000, 500)]
        draws = torch.tensor([-table.loss(story, guide, part) / 500 for part in parts])
        assert abs(draws.mean().item() - expected[name]) < 6 * draws.std().item() / len(draws) ** 0.5, name


def test_the_masked_objective_loses_nothing_where_posteriors_are_diagonal_and_the_mixture_bound_does():
    story = LinearGaussian(loadings(), 1.0)
    gap, evidence = optimum.diagonal_optimum(story, "masked")
    covariance = torch.cat(list(story.loadings.values())).detach().double()
    covariance = covariance @ covariance.T + torch.eye(17, dtype=torch.float64)
    assert evidence == pytest.approx(-0.5 * (torch.logdet(covariance).item() + 17 * (1 + math.log(2 * math.pi))), 1e-6)
    assert abs(gap) < 1e-9 and optimum.diagonal_optimum(story, "mixture bound")[0] > 1e-2


def test_the_optimum_does_not_hang_on_where_it_starts():
    """Where posteriors are not diagonal the truth is not the best, and from elsewhere the same evidence is found."""
    some = [w.double()[:4] for w in loadings(private=0, scale=1.0).values()]
    population, again = optimum._Population(some), optimum._Population(some)
    found = population.evidence(population.best("masked"))
    assert population.evidence(population.truth) - found > 1e-5
    generator = torch.Generator().manual_seed(0)
    again.truth = again.truth + 0.2 * torch.randn(again.truth.shape, generator=generator, dtype=torch.float64)
    assert population.evidence(again.best("masked")) == pytest.approx(found, abs=1e-5)


def test_the_best_factor_analysis_of_the_rows():
    """Its loadings, as Tipping & Bishop have them, attain it; those of the truth, and any near it, do not exceed it."""
    sample = linear.sample_data(2, 1, seed=1)
    best = linear._best_evidence(sample.train, sample.truth)
    x = torch.cat([sample.train[name] for name in sample.train], -1).double()
    values, vectors = torch.linalg.eigh(torch.cov(x.T, correction=0))
    w = vectors[:, -7:] * (values[-7:] - 1).sqrt()
    names, sizes = list(sample.train), [sample.train[name].shape[1] for name in sample.train]
    model = LinearGaussian(
        dict(zip(names, w.split(sizes), strict=True)), 1.0, dict(zip(names, x.mean(0).split(sizes), strict=True))
    )
    rows = mm.Batch({name: sample.train[name].double() for name in names})
    assert model.log_prob(rows).mean().item() == pytest.approx(best, abs=1e-8)
    assert sample.truth.log_prob(sample.train).mean().item() < best
    with torch.no_grad():
        for loading in model.loadings.values():
            loading += 0.01 * torch.randn(loading.shape, dtype=torch.float64)
    assert model.log_prob(rows).mean().item() < best


def test_quadrature_of_a_study_agrees_with_draws_of_the_prior():
    """Against 100,000 draws of the prior for each of 20 rows: six standard errors, and these below 0.2."""
    torch.manual_seed(0)
    sources = clustered(20, 2, {"x": 2}, noise=0.3, label="label", seed=7)
    found, means = quadrature.posterior(sources, "x", "label", 0.3)
    u = sources.batch["label"]
    z = sources.centres[u] + sources.scales[u] * torch.randn(100_000, 20, 2, dtype=torch.float64)
    mean = sources.mixing["x"](z)
    log_w = dist.Normal(mean, 0.3).log_prob(sources.batch["x"].double()).sum(-1)
    weight = (log_w - log_w.max(0).values).exp()
    error = weight.std(0) / weight.mean(0) / 100_000**0.5
    expected = weight.mean(0).log() + log_w.max(0).values - math.log(5)
    assert error.max() < 0.2
    assert ((found - expected).abs() < 6 * error + 1e-3).all()
    share = weight / weight.sum(0)
    drawn = (share[..., None] * z).sum(0)
    error = (share[..., None] * (z - drawn)).square().sum(0).sqrt()
    assert ((means - drawn).abs() < 6 * error + 1e-3).all()


def test_the_truth_is_among_the_identifiable_stories():
    """Its numbers in the places of a recipe's: the evidence is that of the quadrature, with and without the axes."""
    torch.manual_seed(0)
    sources = clustered(40, 2, {"x": 2}, noise=0.3, label="label", seed=7)
    z, mixing = sources.latents.double(), sources.mixing["x"]
    rows = mm.Batch({"x": sources.batch["x"].double(), "label": sources.batch["label"]}, covariates={"z": z})
    run = identifiable.recipe(rows, POSTERIORS["SumPooling"], OBJECTIVES["masked"], latent=2, width=2, noise=0.3)
    turn = torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    first, second = (m for m in run.model.decoders["x"].modules() if isinstance(m, torch.nn.Linear))
    truth, _ = quadrature.posterior(sources, "x", "label", 0.3)
    for axes in (torch.eye(2, dtype=torch.float64), turn):
        with torch.no_grad():
            prior = run.model.double().prior
            prior.loc.copy_(sources.centres)
            prior.log_scale.copy_(sources.scales.log())
            prior.mixing.copy_(axes)
            first.weight.copy_(mixing.inner @ axes.T)  # axes.T undoes them
            second.weight.copy_(mixing.outer)
            first.bias.zero_()
            second.bias.zero_()
        guide = mm.Guide(z=lambda b, axes=axes: dist.Normal(b.covariates["z"] @ axes.T, 1.5).to_event(1))
        found = mm.log_marginal(run.model, guide, rows, num_particles=20_000, seed=0)
        # within 4.5 standard errors on 40 rows, seed fixed
        assert ((found.log_prob - truth).abs() < 4.5 * found.standard_error + 1e-3).all()
        assert found.standard_error.max() < 0.1
        torch.testing.assert_close(prior.sources(z @ axes.T), z)


def test_cells_of_a_study_are_means_and_deviations_over_seeds():
    runs = {"a": [{"x": 1.0, "y": (2.0, 0.5)}, {"x": 2.0, "y": (4.0, 0.5)}], "b": [{"x": 0.001}]}
    header, lines = build_table(runs, {"b": "0.5"})
    assert header == ["", "x", "y", "published"]
    assert lines == [["a", "1.500 ± 0.707", "3.00 ± 1.41", "–"], ["b", "1.0e-03", "–", "0.5"]]
    assert build_table({"a": [{"y": (2.0, 0.5)}]}, {})[1] == [["a", "2.00 ± 0.50"]]


def short(name):
    """A study of few rows and small networks, with one of its groups and every other row."""
    study = STUDIES[name]
    group, draw = next(iter(study.groups.items()))

    def few(seed, directory):
        sample = draw(seed, directory)
        truth = sample.truth
        if isinstance(truth, tuple):
            truth = tuple(each._replace(batch=each.batch[:60], latents=each.latents[:60]) for each in truth)
        return type(sample)(sample.train[:60], sample.test[:60], truth)

    chosen = [*study.members][::2]
    members = {key: partial(study.members[key], width=8) for key in chosen}
    return replace(study, groups={group: few}, members=members, full=replace(study, epochs=1, members=members))


@pytest.mark.parametrize("name", ["hirt-linear", "hirt-identifiable", "hirt-identifiable-multi"])
def test_a_study_is_run_row_by_row_and_seed_by_seed(name, monkeypatch, tmp_path):
    monkeypatch.setattr(linear, "PARTICLES", 10)
    monkeypatch.setattr(quadrature, "NODES", 51)
    study = short(name)
    if name.startswith("hirt-identifiable"):
        study = replace(study, measure=partial(identifiable.measure, 50))
    monkeypatch.setattr(command, "STUDIES", {"small": study})

    def run(*arguments):
        fitted = [] if name == "hirt-linear" else ["--no-fitted"]
        options = ["--epochs", "2", "--no-compile", *fitted, "--out", str(tmp_path), *arguments]
        result = CliRunner().invoke(app, ["reproduce", "small", *options])
        assert result.exit_code == 0, result.output
        return result.output

    text = run("--seeds", "2")
    (group,) = study.groups
    rows = [*study.known, *study.members]
    for row in rows:
        found = [json.loads(p.read_text()) for p in sorted((tmp_path / group / row).glob("measured-*.json"))]
        assert len(found) == 2 and found[0].keys() == found[1].keys() and (found[0] != found[1] or "best" in row), row
        values = [x if isinstance(x, float) else x[0] for each in found for x in each.values()]
        assert all(map(math.isfinite, values)), row
    lines = (tmp_path / "table.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines[2:]] == rows and "±" in lines[-1]
    if name == "hirt-linear":  # a fitted proposal is the posterior, of which 10 draws are as good as the evidence
        found = json.loads(next((tmp_path / group / row).glob("measured-fitted-2-*.json")).read_text())
        assert found["gap, K = 10"] == pytest.approx(found["gap"], abs=2e-3)
        assert abs(found["gap, K = 10, by the guide"] - found["gap"]) > 1e-2
    assert "epoch 2/2" in text and "epoch" not in run("--seeds", "2").replace("2 epochs", "").replace("s/epoch", "")


def test_reproduce_runs_only_the_rows_of_a_study_that_are_named(monkeypatch, tmp_path):
    study = replace(short("hirt-linear"), known={})
    monkeypatch.setattr(command, "STUDIES", {"small": study})
    options = [
        "--epochs",
        "1",
        "--no-compile",
        "--out",
        str(tmp_path),
        "--seeds",
        "1",
        "--only",
        "two modalities, mixture",
    ]
    result = CliRunner().invoke(app, ["reproduce", "small", *options])
    assert result.exit_code == 0, result.output
    names = [p.name for p in (tmp_path / "two modalities").iterdir()]
    assert names == [name for name in study.members if name.startswith("mixture")] != []
    result = CliRunner().invoke(app, ["reproduce", "small", *options[:-1], "PoEt"])
    assert result.exit_code == 2 and "no row" in result.output


def test_seeds_have_data_of_their_own_and_keep_them():
    from_files = {"hirt-mnist", "mfm-mosi", "mfm-mmmo", "mfm-pom", "mfm-digits", "wae-mnist"}
    from_files |= {"wu-goodman-scenes", "wu-goodman-kanji", "wu-goodman-scenes-small", "wu-goodman-kanji-small"}
    from_files |= {"jmvae-gan-mnist", "wu-goodman-digits", "flow-mnist"}  # the same rows for all seeds
    for study in (study for name, study in STUDIES.items() if name not in from_files):
        for draw in study.groups.values():
            first, again, other = draw(0, None), draw(0, None), draw(1, None)
            name = next(iter(first.train))
            assert torch.equal(first.train[name], again.train[name])
            assert first.train[name].shape != other.train[name].shape or not torch.equal(
                first.train[name], other.train[name]
            )
