"""A parameter without gradient is named, with the likely reason, and after an epoch at the earliest."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO, TraceEnum_ELBO
from torch import nn

import pyro_mm as mm

QUIET = {"progress": False, "batch_size": 8, "seed": 0, "epochs": 1}
ROWS = mm.Batch({"image": torch.randn(24, 3), "label": torch.arange(24) % 2})


class Story(nn.Module):
    """Decoders under names of the user's, of which it uses those of modalities that the batch has."""

    def __init__(self, names=("image",)):
        super().__init__()
        self.decoders = nn.ModuleDict({name: nn.Linear(2, 3) for name in names})

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            for name, decoder in self.decoders.items():
                if name in batch:
                    batch.observe(name, lambda z, decoder=decoder: dist.Normal(decoder(z), 1.0).to_event(1), z)


def guide(name="image"):
    encoder = mm.conditionals.Normal(nn.Linear(3, 4))
    return mm.Guide(z=mm.posteriors.ProductOfExperts({name: encoder}))


def test_a_misspelt_decoder_is_not_to_be_deleted():
    with pytest.raises(ValueError, match=r"no gradient reaches model.decoders.imgae.weight") as error:
        mm.fit(Story(("imgae",)), guide(), mm.objectives.elbo(), ROWS, **QUIET)
    text = str(error.value)
    assert "Was 'image' meant?" in text
    assert "eave" not in text and "freeze" not in text


def test_check_reports_missing_gradients_as_fit_does():
    story, rows = Story(("image", "labell")), ROWS.only("image")
    found = mm.check(story, guide(), mm.objectives.elbo(), rows, num_particles=10, repeats=2)
    (text,) = [text for text in found.findings if "No gradient reaches" in text]
    assert "model.decoders.labell" in text and "Was 'label' meant?" in text and "freeze" not in text


def test_a_decoder_for_a_modality_that_no_row_has_says_so():
    rows = mm.Batch({"image": torch.randn(24, 3), "sketch": torch.randn(24, 3)}, {"sketch": torch.zeros(24).bool()})
    with pytest.raises(ValueError, match=r"No row of the epoch has 'sketch', which model.decoders.sketch"):
        mm.fit(Story(("image", "sketch")), guide(), mm.objectives.elbo(), rows, **QUIET)


def test_the_error_of_an_unused_parameter_says_how_to_freeze_it():
    story = Story()
    story.spare = nn.Parameter(torch.zeros(2))
    with pytest.raises(ValueError, match=r"no gradient reaches model.spare in an epoch.*requires_grad_\(False\)"):
        mm.fit(story, guide(), mm.objectives.elbo(), ROWS, **QUIET)


def clusters(enumerated):
    """A story of two clusters, y, and a guide whose network for y a sum over y does not look at."""
    classify, shift = nn.Linear(3, 2), nn.Parameter(torch.randn(2, 3))
    infer = {"enumerate": "parallel"} if enumerated else {}

    def story(batch):
        with batch.plate():
            y = pyro.sample("y", dist.Categorical(torch.ones(2) / 2))
            batch.observe("image", lambda y: dist.Normal(shift[y], 1.0).to_event(1), y)

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.classify = classify

        def forward(self, batch):
            with batch.plate():
                pyro.sample("y", dist.Categorical(logits=self.classify(batch["image"])), infer=infer)

    return story, Classifier()


def test_the_error_of_a_guide_beside_a_summed_latent_names_the_estimator_that_trains_it():
    story, classifier = clusters(True)
    rows = ROWS.only("image")
    with pytest.raises(
        ValueError, match=r"no gradient reaches guide.classify.*'y', a discrete latent.*TraceEnum_ELBO"
    ) as error:
        mm.fit(story, classifier, mm.objectives.elbo(), rows, **QUIET)
    assert "freeze" not in str(error.value)
    mm.fit(story, classifier, mm.objectives.elbo(TraceEnum_ELBO(max_plate_nesting=1)), rows, **QUIET)


class Domains(nn.Module):
    """A decoder for each domain, a covariate: rows of one domain run one of them."""

    def __init__(self):
        super().__init__()
        self.decoders = nn.ModuleList([nn.Linear(2, 3) for _ in range(3)])

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            domain = batch.covariates["domain"]
            loc = torch.zeros(*z.shape[:-1], 3)
            for i in domain.unique().tolist():
                loc = torch.where((domain == i)[:, None], self.decoders[i](z), loc)
            batch.observe("image", dist.Normal(loc, 1.0).to_event(1))


@pytest.mark.parametrize("functions", [False, True])
def test_a_network_for_rows_of_a_rare_kind_trains(functions):
    """The first minibatches and the first rows have no row of the last domain; a function finds its network too."""
    domain = torch.zeros(24, dtype=torch.long)
    domain[1], domain[23] = 1, 2
    rows = mm.Batch({"image": torch.randn(24, 3)}, covariates={"domain": domain})
    story = Domains()
    program = (lambda batch: story(batch)) if functions else story
    before = [p.clone() for p in story.parameters()]
    mm.fit(program, guide(), Trace_ELBO(), rows, **QUIET)
    assert not any(map(torch.equal, before, story.parameters()))


@pytest.mark.parametrize("objective", ["elbo", "mvae", "subsampled"])
def test_a_parameter_that_any_step_of_an_epoch_reaches_is_no_error(objective):
    """A modality of one row in 24, under objectives that decode it in that row alone."""
    made = {
        "elbo": mm.objectives.elbo,
        "mvae": mm.objectives.mvae,
        "subsampled": lambda: mm.objectives.elbo().subsampled(1),
    }
    values = {"image": torch.randn(24, 3), "sketch": torch.randn(24, 3)}
    rows = mm.Batch(values, {"sketch": torch.arange(24) == 20})
    experts = {n: mm.conditionals.Normal(nn.Linear(3, 4)) for n in ("image", "sketch")}
    both = mm.Guide(z=mm.posteriors.ProductOfExperts(experts))
    story = Story(("image", "sketch"))
    before = {n: p.detach().clone() for module in (story, both) for n, p in module.named_parameters()}
    mm.fit(story, both, made[objective](), rows, **QUIET)
    after = {n: p for module in (story, both) for n, p in module.named_parameters()}
    unmoved = {n for n in before if torch.equal(before[n], after[n])}
    rarely = {"decoders.sketch.weight", "decoders.sketch.bias"}  # which a random choice may never decode
    assert unmoved <= (rarely if objective == "subsampled" else set())
