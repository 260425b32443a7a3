"""Arguments of public functions and constructors: what is wrong is refused at the door, in words."""

import re
import traceback
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_mm as mm
from pyro_mm import conditionals, metrics, models, plots, posteriors
from pyro_mm.datasets import simulated
from pyro_mm.evidence import protocols
from pyro_mm.models import priors

PACKAGE = str(Path(mm.__file__).parent)
PYTHONS_OWN = re.compile(
    r"object is not|has no (len|attribute)|unsupported operand|not supported between|argument after|object cannot be|"
    r"not iterable|positional argument|required positional|object does not|indices must be"
)


@pytest.fixture(scope="module")
def things():
    """A pair, and rows of two modalities and a covariate."""
    torch.manual_seed(0)
    net = lambda i, o: mm.nn.MLP(i, o, ())  # noqa: E731
    decoders = {"x": conditionals.Normal(net(2, 3), scale=1.0), "y": conditionals.Categorical(net(2, 3))}
    experts = {"x": conditionals.Normal(net(3, 4)), "y": conditionals.Normal(nn.Embedding(3, 4))}
    model = models.SharedLatent(dist.Normal(torch.zeros(2), 1.0).to_event(1), decoders)
    guide = mm.Guide(z=posteriors.ProductOfExperts(experts))
    batch = mm.Batch({"x": torch.randn(6, 3), "y": torch.arange(6) % 3}, covariates={"u": torch.arange(6) % 2})
    return model, guide, batch


class Logger:
    """A logger that logs nothing."""

    def log_metrics(self, metrics, step):
        pass


class MixtureOfTwo(models.SharedLatent):
    """A story of one modality, whose prior is a mixture."""

    def __init__(self):
        super().__init__(priors.MixturePrior(2, 2), {"x": conditionals.Normal(mm.nn.MLP(2, 3, ()), scale=1.0)})


def evaluations(m, g, b):
    """Function -> valid arguments, by keyword."""
    pair = {"model": m, "guide": g, "batch": b}
    judge = {"target": "y", "given": "x", "classifier": lambda p: p, "labels": b["y"]}
    names = {"target": ["y"], "given": ["x"], "num_particles": 2}
    chains = {"num_chains": 1, "temperatures": 1, "leapfrog_steps": 1, "pilot_chains": 2, "start": "guide"}
    common = {"seed": 0, "vectorize": True, "audit": True}
    sampled = {"num_samples": 1, "resample": False, "num_particles": 2}
    likelihood = {"num_particles": 2, "chunk": 4, "stratify": True, "prior_share": 0.0, "draws": "independent"}
    x = torch.randn(20, 2)
    boxed = mm.Batch({name: b[name] for name in b}, covariates={"boxes": torch.rand(b.size, 4)})
    return {
        mm.log_marginal: pair | common | likelihood | {"proposal": None},
        mm.log_conditional: pair | common | likelihood | {"target": "y", "given": "x", "proposal": None},
        mm.class_probabilities: {
            "model": MixtureOfTwo(), "guide": g, "batch": b, "site": "z", "num_particles": 2, "chunk": 4,
            "proposal": None,
        } | common,
        mm.log_weights: pair | {"num_particles": 1, "vectorize": True, "audit": True},
        mm.generate: pair | common | sampled | {"mean": False, "resample": True, "proposal": mm.Proposal("antithetic")},
        mm.posterior_draws: pair | common | sampled | {"resample": True, "proposal": mm.Proposal(prior_share=0.5)},
        mm.simulate: {"model": m, "batch": b, "audit": True},
        mm.encode: pair | common | {"fitted": mm.Fitted(rounds=1, draws=2)},
        mm.annealed_importance: pair | common | chains,
        mm.bidirectional: pair | common | chains,
        mm.calibration: pair | common | {"num_draws": 2, "chunk": 99, "quantities": None},
        mm.compare: {
            "candidates": {"a": (m, g), "b": (m, g)}, "batch": b, "target": "y", "given": "x", "baseline": "a",
            "seed": 0, "num_particles": 2, "proposal": mm.Proposal(stratify=False),
        },
        mm.check: pair | {
            "objective": mm.objectives.elbo(), "num_particles": 2, "repeats": 2, "seed": 0, "proposal": None,
        },
        mm.to_arviz: pair | common | {"num_samples": 2, "resample": False, "evidence": None, "prior": False},
        protocols.joint: pair | names,
        protocols.single: pair | names,
        protocols.multiple: pair | names,
        protocols.conditional: pair | names | {"prior_draws": 2, "seed": 0},
        protocols.both_ways: pair | names | {"seed": 0},
        metrics.amortization_gap: pair | common | {
            "num_particles": 2, "family": "diagonal", "rounds": 1, "proposal": mm.Proposal(),
        },
        metrics.class_probabilities: pair | {"target": "y", "given": "x", "num_samples": 1, "audit": True},
        metrics.cross_modal_accuracy: pair | {"target": "y", "given": "x", "num_samples": 1, "audit": True},
        metrics.cross_modal_coherence: pair | judge | {"num_samples": 1, "mean": True, "seed": 0, "audit": True},
        metrics.joint_coherence: {
            "model": m, "like": b, "classifiers": {"x": lambda x: x, "y": lambda p: p}, "n": 2, "mean": True,
            "seed": 0, "audit": True,
        },
        metrics.linear_probe: {
            "guide": g, "train": b, "test": b, "label": "y", "given": "x", "sites": "z", "regularisation": 1.0,
            "seed": 0, "audit": True,
        },
        metrics.label_information: {
            "guide": g, "train": b, "test": b, "label": "y", "given": "x", "sites": "z", "regularisation": 1.0,
            "seed": 0, "audit": True,
        },
        metrics.box_overlap: {
            "guide": g, "train": boxed, "test": boxed, "boxes": "boxes", "given": "x", "sites": "z",
            "regularisation": 1.0, "seed": 0, "audit": True,
        },
        metrics.intersection_over_union: {"first": torch.zeros(3, 4), "second": torch.zeros(3, 4)},
        metrics.hsic_ratios: pair | {
            "sites": "z", "kernel": "gaussian", "bandwidth": 1.0, "unbiased": True, "seed": 0, "audit": True,
        },
        metrics.gradient_norms: pair | {
            "sites": "z", "sequences": "x", "standardise": False, "seed": 0, "audit": True
        },
        metrics.swaps: pair | {"sites": "z", "partners": None, "seed": 0, "audit": True},
        metrics.robustness: pair | {
            "labels": "y", "noise": (0.0, 1.0), "corrupt": None, "num_samples": 1, "seed": 0, "audit": True,
        },
        metrics.mean_correlation: {"latents": x, "estimates": x, "kind": "pearson", "fitted": 10},
        metrics.frechet_distance: {"real": x, "fake": x, "features": None},
        metrics.kernel_distance: {
            "real": x, "fake": x, "features": None, "kernel": "gaussian", "bandwidth": 1.0, "paired": True,
            "permutations": 1, "seed": 0,
        },
        metrics.precision_recall: {
            "real": x, "fake": x, "features": None, "neighbours": 1, "paired": False, "seed": 0
        },
        metrics.sample_quality: pair | {
            "target": "y", "given": "x", "features": lambda y: nn.functional.one_hot(y, 3),
            "classifier": lambda y: torch.zeros(len(y), 3), "labels": b["y"], "kernel": "gaussian", "neighbours": 1,
            "permutations": 1, "mean": False, "seed": 0, "audit": True,
        },
        metrics.confusion_matrix: {"true": b["y"], "predicted": b["y"], "num_classes": 3},
        metrics.classifier: {
            "values": b["x"], "labels": b["y"], "test_values": b["x"], "test_labels": b["y"], "epochs": 1,
            "batch_size": 6, "lr": 0.1, "hidden": 2, "seed": 0,
        },
    }  # fmt: skip


NO_RECIPES = {"RECIPES", "Networks", "Recipe", "jnf_second", "jnf"}


def recipe_of(name):
    size = 4 if name == "vaevae_flow" else 3  # a flow of images halves them
    batch = mm.Batch({"image": torch.rand(4, size, size), "label": torch.arange(4) % 2})
    factorised = {"private": 1, "labels": "label", "generation": 0.5}
    extra = {
        "vae": {"modality": "image"}, "cvae": {"target": "image", "given": "label", "learn_given": False},
        "mfm": factorised | {"mmd": 1.0, "reconstruct_missing": True}, "mfm_variational": factorised | {"kl": 1.0},
    }  # fmt: skip
    return {
        "batch": batch,
        "latent": 2,
        "hidden": (2,),
        "estimator": None,
        "networks": {"image": "grey"},
        **extra.get(name, {}),
    }


def constructors():
    """Constructor -> valid arguments, by keyword."""
    prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    normal = dist.Normal(0.0, 1.0)
    net, part = mm.nn.MLP(2, 4, ()), conditionals.Normal(mm.nn.MLP(2, 4, ()))
    pool = posteriors.SumPooling({"x": net}, part, 4)
    table = posteriors.ProductOfCategoricals({"x": conditionals.Categorical(net)})
    x = torch.zeros(5, 2)
    return {
        mm.Batch: {"values": {"x": x}, "present": None, "covariates": None, "lengths": None},
        mm.Guide: {"z": part},
        mm.Stream: {"source": [{"x": 0.0}, {"x": 1.0}], "size": 2, "buffer": 2, "collate": None},
        mm.Proposal: {"draws": "quasi", "stratify": True, "prior_share": 0.1},
        mm.Fitted: {
            "rounds": 2, "draws": 8, "components": 2, "guide_share": 0.1, "prior_share": 0.1, "widen": 0.1, "pilot": 20,
        },
        mm.callbacks.EarlyStopping: {"patience": 3, "column": "loss", "maximize": False, "min_delta": 0.1},
        mm.callbacks.BestWeights: {"column": "loss", "maximize": False},
        mm.callbacks.WeightAverage: {"decay": 0.9, "start": 1},
        mm.callbacks.Log: {"logger": Logger(), "every": 10},
        models.SharedLatent: {"prior": prior, "decoders": {"x": part}},
        models.PrivateLatents: {"prior": prior, "private_priors": {"x": prior}, "decoders": {"x": part}},
        models.Factorized: {
            "prior": prior, "private_priors": {"x": prior}, "decoders": {"x": conditionals.Normal(mm.nn.MLP(4, 4, ()))},
            "labels": {"y": part}, "factor": mm.nn.MLP(2, 2, ()), "private_factors": {"x": mm.nn.MLP(2, 2, ())},
        },
        models.ConditionalLatent: {
            "prior": prior, "condition": ("y", prior), "features": net, "decoders": {"x": part}
        },
        models.Labelled: {
            "classes": dist.Categorical(torch.ones(3)), "prior": prior, "decoders": {"x": part}, "independent": (),
            "label": "label", "annotator": None,
        },
        models.LinearGaussian: {"loadings": {"x": torch.ones(3, 2)}, "noise": 1.0, "offsets": None},
        conditionals.Normal: {"net": net, "event_shape": (2,), "scale": None},
        conditionals.Laplace: {"net": net, "event_shape": (2,), "scale": None},
        conditionals.Bernoulli: {"net": net, "event_shape": (2,)},
        conditionals.Categorical: {"net": net, "event_shape": (2,)},
        conditionals.Poisson: {"net": net, "event_shape": (2,)},
        conditionals.NegativeBinomial: {"net": net, "event_shape": (2,), "shared_dispersion": True},
        conditionals.MultivariateNormal: {"net": net},
        conditionals.Delta: {"net": net, "event_shape": (2,)},
        conditionals.NormalMixture: {"net": net, "components": 2},
        conditionals.Flow: {"net": net, "flow": net},
        conditionals.ImageFlow: {
            "net": net, "image_shape": (4, 4), "context": 2, "scales": 1, "steps": 1, "hidden": 2,
            "context_channels": 1, "bounds": (0.0, 1.0), "margin": 0.0,
        },
        conditionals.Dequantized: {"conditional": part, "levels": 4},
        conditionals.Implicit: {"generator": mm.nn.MLP(6, 4, ()), "noise": 4, "event_shape": (2, 2)},
        conditionals.Tokens: {"net": mm.nn.RecurrentTokens(2, 3), "steps": 4, "end": 0},
        posteriors.ProductOfExperts: {"experts": {"x": part}, "prior": normal},
        posteriors.MixtureOfExperts: {"experts": {"x": part}, "weights": None},
        posteriors.MixtureOfProducts: {"experts": {"x": part}, "prior": normal, "subsets": [["x"]]},
        posteriors.DependentExperts: {"experts": {"x": part}, "correlation": 0.1},
        posteriors.HoelderPooling: {"experts": {"x": part}},
        posteriors.ProductOfCategoricals: {"experts": {"x": part}, "prior": None},
        posteriors.JointEncoder: {"features": {"x": net}, "head": part, "partial": None},
        posteriors.Either: {"experts": {"x": part}},
        posteriors.Given: {"names": "x", "posterior": part, "otherwise": prior},
        posteriors.Private: {"name": "x", "encoder": part, "missing": prior},
        posteriors.Label: {"name": "x", "posterior": table},
        posteriors.SumPooling: {"features": {"x": net}, "head": part, "size": 4},
        posteriors.SelfAttention: {
            "features": {"x": net}, "head": part, "size": 4, "heads": 2, "layers": 1, "normalized": True
        },
        posteriors.PrivateOf: {"pool": pool, "name": "x", "whole": net, "own": net, "head": part},
        priors.MixturePrior: {"components": 2, "latent": 2, "mixing": False},
        priors.Component: {"prior": priors.MixturePrior(2, 2)},
        priors.Flow: {"flow": net},
        priors.GivenCovariate: {"name": "u", "conditional": part},
        mm.nn.MLP: {"in_features": 2, "out_features": 2, "hidden": (2,), "activation": nn.ReLU},
        mm.nn.Blocks: {"net": net, "rows": 4, "event_dim": 1},
        mm.nn.Convolutional: {"image_shape": (8, 8), "out_features": 2, "channels": (2,), "activation": nn.ReLU},
        mm.nn.Deconvolutional: {"in_features": 2, "image_shape": (8, 8), "channels": (2,), "activation": nn.ReLU},
        mm.nn.Recurrent: {
            "in_features": 2, "out_features": 2, "hidden": 2, "recurrence": nn.LSTM, "layers": 1, "vocabulary": 3
        },
        mm.nn.TemporalConvolutional: {
            "in_features": 2, "out_features": 2, "channels": (2,), "kernel": 3, "activation": nn.ReLU, "vocabulary": 3
        },
        mm.nn.Attention: {
            "in_features": 2, "out_features": 2, "width": 4, "heads": 2, "layers": 1, "dropout": 0.0, "vocabulary": 3
        },
        mm.nn.RecurrentDecoder: {
            "in_features": 2, "steps": 2, "out_features": 2, "hidden": 2, "recurrence": nn.GRU, "layers": 1
        },
        mm.nn.RecurrentTokens: {
            "in_features": 2, "vocabulary": 3, "hidden": 2, "embedding": 2, "recurrence": nn.GRU, "layers": 1
        },
        mm.nn.AttentionTokens: {
            "in_features": 2, "vocabulary": 3, "width": 4, "heads": 2, "layers": 1, "dropout": 0.0
        },
        mm.distributions.Mixture: {
            "components": dist.Normal(torch.zeros(2, 3), 1.0), "log_weights": torch.zeros(2, 3)
        },
        mm.distributions.Where: {"mask": torch.ones(2).bool(), "p": normal, "q": normal},
        mm.distributions.product_of_normals: {"locs": [x], "scales": [x + 1], "masks": None, "prior": normal},
        mm.distributions.diagonal: {"d": normal},
        mm.distributions.gumbel: {"uniform": torch.rand(3)},
        mm.distributions.squared_mmd: {
            "x": x, "y": x, "kernel": "imq", "bandwidth": 1.0, "unbiased": False, "paired": False, "mask": x[:, 0] == 0
        },
        mm.distributions.hsic: {
            "x": x, "y": x, "kernel": "imq", "bandwidth": 1.0, "unbiased": False, "mask": x[:, 0] == 0
        },
        mm.distributions.sliced_wasserstein: {"x": x, "y": x, "projections": 2, "p": 2.0, "mask": x[:, 0] == 0},
        mm.objectives.MMD: {
            "site": "z", "encode": "x", "kernel": "imq", "bandwidth": (1.0, 2.0), "unbiased": True, "reference": "y",
            "reference_site": "w",
        },
        mm.objectives.SlicedWasserstein: {
            "site": "z", "encode": "x", "projections": 2, "p": 2.0, "reference": "y", "reference_site": "w"
        },
        mm.objectives.Discriminator: {
            "net": net, "weight": 2.0, "latents": "uniform", "penalty": 0.1, "optimizer": None,
            "decoder_optimizer": None, "every": 2,
        },
        mm.objectives.VAEGAN: {
            "table": mm.objectives.elbo(), "discriminators": {"x": mm.objectives.Discriminator(net)},
        },
        mm.objectives.HSIC: {
            "a": "z", "b": "w", "encode": "x", "kernel": "imq", "bandwidth": 1.0, "unbiased": True
        },
        mm.estimators.IWAE: {
            "num_particles": 2, "stratified": None, "resample": False, "vectorize_particles": True
        },
        mm.estimators.AnalyticKL: {"num_particles": 1, "vectorize_particles": True},
        mm.estimators.DReG: {"num_particles": 2, "vectorize_particles": True},
        mm.estimators.StickTheLanding: {"num_particles": 2, "vectorize_particles": True},
        mm.estimators.Renyi: {"alpha": 0.5, "num_particles": 2, "vectorize_particles": True},
        mm.datasets.load: {"name": "digits"},
        mm.datasets.paired: {"batch": mm.Batch({"x": x, "y": x}), "fraction": 0.5, "seed": 0},
        mm.datasets.dequantize: {
            "batch": mm.Batch({"x": torch.zeros(2, 2)}), "name": "x", "levels": 4, "seed": 0
        },
        mm.datasets.quantize: {"values": x, "levels": 4},
        mm.datasets.words: {"labels": torch.arange(3)},
        mm.datasets.spell: {"tokens": [[1, 2]]},
        mm.datasets.word_logits: {"tokens": torch.zeros(2, 6).long()},
        mm.datasets.log_mel: {"waves": torch.zeros(1, 5216)},
        mm.datasets.caption_text: {"tokens": torch.ones(2, 3).long()},
        mm.datasets.parse_caption: {"text": "a red seven above a blue disc"},
        mm.datasets.scenes: {
            "directory": None, "rows": (2, 1), "side": 16, "source": "digits", "modalities": ("image",), "held_out": 0,
            "seed": 0,
        },
        simulated.missing: {"batch": mm.Batch({"x": x, "y": x}), "rate": 0.5, "seed": 0},
        simulated.orthonormal_loadings: {"dims": {"x": 3}, "shared": 2, "private": 1, "seed": 0},
        simulated.factors: {
            "rows": 5, "shared": 2, "private": 1, "classes": 2, "label": "class", "steps": 4, "noise": 0.1, "seed": 0,
            "part": 0,
        },
        simulated.clustered: {
            "rows": 5, "latent": 2, "dims": {"x": 3}, "noise": 0.1, "clusters": 2, "seed": 0, "part": 0
        },
        mm.recipes.Networks: {"encoder": lambda out: net, "decoder": lambda inputs: part, "kind": "vector"},
        **{getattr(mm.recipes, name): recipe_of(name) for name in mm.recipes.__all__ if name not in NO_RECIPES},
    }  # fmt: skip


def title(function):
    """Return a name by which two functions of one name in two modules differ."""
    return f"{function.__module__.rpartition('.')[2]}.{function.__name__}"


EVALUATED = [title(f) for f in evaluations(None, None, mm.Batch({"x": [0.0], "y": [0]}))]
MADE = [title(f) for f in constructors()]
BAD = {
    "None": None, "string": "nonsense", "minus one": -1, "2.5": 2.5, "dictionary": {"nonsense": 1}, "class": nn.ReLU,
    "tensor": torch.zeros(2, 2), "list": [None],
}  # fmt: skip


NEVER_BAD = {
    "model",
    "guide",
    "batch",
    "num_particles",
    "num_samples",
    "vectorize",
    "target",
    "num_draws",
    "num_chains",
}


def refused(function, arguments):
    """Call, and hold an error to be one of ours: raised here, a TypeError or a ValueError, in words of our own."""
    try:
        function(**arguments)
    except (TypeError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1].filename
        assert where.startswith(PACKAGE), f"raised in {where}: {error!r}"
        assert not PYTHONS_OWN.search(str(error)), repr(error)
        assert len(str(error)) > 15, repr(error)
        return error
    return None


@pytest.mark.parametrize("name", EVALUATED)
def test_every_bad_argument_of_an_evaluation_is_refused_by_an_error_of_ours(name, things):
    table = evaluations(*things)
    (function,) = [f for f in table if title(f) == name]
    valid = table[function]
    function(**valid)
    for argument in valid:
        bads = dict(BAD)
        if argument in ("batch", "like", "train", "test"):
            bads["empty batch"] = things[2][:0]
        for bad, value in bads.items():
            error = refused(function, valid | {argument: value})
            if argument in (
                "model",
                "guide",
                "batch",
                "num_particles",
                "num_samples",
                "vectorize",
                "target",
                "num_draws",
            ):
                may = (argument in ("target",) and bad == "None") or (argument == "batch" and bad == "None")
                assert error is not None or (may and function is mm.compare), (argument, bad)


@pytest.mark.parametrize("name", MADE)
def test_every_bad_argument_of_a_constructor_is_refused_by_an_error_of_ours(name):
    table = constructors()
    (function,) = [f for f in table if title(f) == name]
    valid = table[function]
    if function not in (conditionals.Flow, priors.Flow, posteriors.ProductOfCategoricals):
        function(**valid)
    for argument in valid:
        for value in BAD.values():
            refused(function, valid | {argument: value})


def test_the_tables_name_every_public_function():
    """All that mm and its modules name, but what is made by the package itself and what other tests hold to this."""
    known = {f.__name__ for f in (*evaluations(None, None, mm.Batch({"x": [0.0], "y": [0]})), *constructors())}
    results = {
        "Calibration",
        "Check",
        "AmortizationGap",
        "ClassProbabilities",
        "FittedPosterior",
        "Comparison",
        "Evidence",
        "History",
        "MeanCorrelation",
        "HSICRatios",
        "GradientNorms",
        "Swaps",
        "Robustness",
        "KernelDistance",
        "PRDC",
        "SampleQuality",
        "BoxOverlap",
        "LabelInformation",
        "Share",
        "Conditional",
    }
    elsewhere = {"fit", "stage", "replay", "save", "load", "gaussian_frechet", "Loss", "Player", "TrainingObjective"}
    modules = [mm, conditionals, metrics, models, posteriors, priors, mm.nn, mm.distributions, protocols]
    public = {n for module in modules for n in module.__all__ if callable(getattr(module, n))}
    public -= {"STANDARD_NORMAL"}
    assert public - results - elsewhere <= known


# -- what the messages say --------------------------------------------------------------------------------------------

TABLE = {
    "a class": (
        lambda m, g, b: mm.log_marginal(models.SharedLatent, g, b), TypeError, "make an instance, SharedLatent"
    ),
    "a recipe": (
        lambda m, g, b: mm.log_marginal((m, g), g, b), TypeError, "expected model to be a function of batch.*unpack it"
    ),
    "a recipe that was not called": (
        lambda m, g, b: mm.log_marginal(lambda batch, latent: m, g, b), TypeError, "was its result meant"
    ),
    "None": (lambda m, g, b: mm.log_marginal(None, g, b), TypeError, "expected model to be a function .* got None"),
    "a dictionary": (
        lambda m, g, b: mm.log_marginal(m, g, {"x": b["x"]}), TypeError, "to be a pyro_mm.Batch, .*Batch\\(values\\)"
    ),
    "no rows": (lambda m, g, b: mm.generate(m, g, b[:0]), ValueError, "batch to have one row at least, got none"),
    "K of 2.5": (
        lambda m, g, b: mm.log_marginal(m, g, b, num_particles=2.5), TypeError,
        "num_particles to be an integer >= 1, got 2.5",
    ),
    "K of 0": (lambda m, g, b: mm.log_marginal(m, g, b, num_particles=0), ValueError, "num_particles >= 1, got 0"),
    "chunk of 0": (lambda m, g, b: mm.log_marginal(m, g, b, chunk=0), ValueError, "chunk >= 1, got 0"),
    "S of 0": (lambda m, g, b: mm.generate(m, g, b, num_samples=0), ValueError, "num_samples >= 1, got 0"),
    "given None": (
        lambda m, g, b: mm.log_conditional(m, g, b, target="y", given=None), TypeError, "given to be names.*got None"
    ),
    "an unknown target": (
        lambda m, g, b: mm.log_conditional(m, g, b, target="label"), ValueError,
        "target: unknown modality 'label', expected one of 'x', 'y'",
    ),
    "a seed in words": (lambda m, g, b: mm.generate(m, g, b, seed="0"), TypeError, "seed to be an integer, got '0'"),
    "a share": (
        lambda m, g, b: mm.log_marginal(m, g, b, prior_share=2), ValueError, "prior_share >= 0 and <= 1, got 2"
    ),
    "draws": (lambda m, g, b: mm.log_marginal(m, g, b, draws="sobol"), ValueError, "one of 'independent', .* 'sobol'"),
    "a proposal": (
        lambda m, g, b: mm.log_marginal(m, g, b, proposal=3), TypeError, "expected proposal to be a function"
    ),
    "vectorize": (lambda m, g, b: mm.generate(m, g, b, vectorize=1), TypeError, "vectorize to be True or False, got 1"),
    "an option": (
        lambda m, g, b: mm.posterior_draws(m, g, b, resample=True, drws="quasi"), TypeError,
        "unexpected keyword argument 'drws'",
    ),
    "an objective": (lambda m, g, b: mm.check(m, g, "elbo", b), TypeError, "expected objective to be an objective"),
    "a label": (
        lambda m, g, b: metrics.linear_probe(g, b, b, "v"), ValueError, "unknown modality or covariate 'v', .* 'u', 'x'"
    ),
    "chains": (
        lambda m, g, b: mm.annealed_importance(m, g, b, pilot_chains=1), ValueError, "pilot_chains >= 2, got 1"
    ),
    "a start": (
        lambda m, g, b: mm.annealed_importance(m, g, b, start="posterior"), ValueError, "start to be one of 'guide'"
    ),
    "only a list": (lambda m, g, b: b.only(["x"]), TypeError, "only: expected names of modalities one by one"),
    "a float row": (lambda m, g, b: b[2.5], TypeError, "a row, a slice, a mask or an index of rows, got 2.5"),
    "another mask": (lambda m, g, b: b[torch.ones(3).bool()], ValueError, "expected a mask of 6 rows, got one of 3"),
    "floats for rows": (lambda m, g, b: b[torch.ones(3)], TypeError, "an index of rows, got Tensor"),
    "one row for six": (
        lambda m, g, b: b.replaced({"x": torch.zeros(1, 3)}), ValueError, "'x': expected 6 rows, got shape"
    ),
    "an array for a tensor": (
        lambda m, g, b: b.replaced({"x": [1]}), TypeError, "'x': expected a tensor, got the list"
    ),
    "padded": (lambda m, g, b: b.padded(2), ValueError, "size >= 6, got 2"),
    "a device": (lambda m, g, b: b.to("gpu"), ValueError, "device to be the name of a device, got 'gpu'"),
    "no device": (lambda m, g, b: b.to(None), TypeError, "device to be the name of a device, got None"),
    "like": (lambda m, g, b: mm.Batch.empty(2, {"x": 1}), TypeError, "expected like to be a pyro_mm.Batch"),
    "a plate": (lambda m, g, b: mm.Batch({"data": b["x"]}), ValueError, "modality 'data': a plate has that name"),
    "a number for a name": (lambda m, g, b: mm.Batch({3: b["x"]}), TypeError, "values to map names .* the key 3"),
    "a tensor for values": (lambda m, g, b: mm.Batch(b["x"]), TypeError, "values to map names to arrays, got Tensor"),
    "a dot": (
        lambda m, g, b: models.SharedLatent(m.prior, {"x.y": m.decoders["x"]}), ValueError, "torch forbids .* 'x.y'"
    ),
    "torch's own": (
        lambda m, g, b: posteriors.ProductOfExperts({"values": nn.ReLU()}), ValueError,
        "of its own for the name 'values'"
    ),
    "a latent's name": (
        lambda m, g, b: models.SharedLatent(m.prior, {"z": m.decoders["x"]}), ValueError, "'z': the story has a site"
    ),
    "a decoder's class": (
        lambda m, g, b: models.SharedLatent(m.prior, {"x": conditionals.Normal}), TypeError, r"decoders\['x'\].* class"
    ),
    "a function for a module": (
        lambda m, g, b: models.SharedLatent(m.prior, {"x": lambda z: z}), TypeError, "make it the forward of"
    ),
    "a prior": (lambda m, g, b: models.SharedLatent(0.5, {"x": nn.ReLU()}), TypeError, "prior to be a distribution"),
    "a posterior's class": (
        lambda m, g, b: mm.Guide(z=posteriors.ProductOfExperts), TypeError, "make an instance, ProductOfExperts"
    ),
    "a scale": (lambda m, g, b: conditionals.Normal(nn.ReLU(), scale=-1), ValueError, "scale > 1e-30, got -1"),
    "a shape": (lambda m, g, b: conditionals.Bernoulli(nn.ReLU(), 784), TypeError, "event_shape to be a shape"),
    "an activation": (lambda m, g, b: mm.nn.MLP(2, 2, activation=nn.ReLU()), TypeError, "pass ReLU itself"),
    "hidden sizes": (lambda m, g, b: mm.nn.MLP(2, 2, 64), TypeError, "hidden to be sizes of layers"),
    "a data set": (lambda m, g, b: mm.datasets.load("mnst"), ValueError, "unknown data set 'mnst', expected one of"),
    "an option of it": (
        lambda m, g, b: mm.datasets.load("digits", size=3), TypeError, "'digits': unknown option 'size'"
    ),
    "images": (lambda m, g, b: plots.image_grid(torch.zeros(3, 4)), ValueError, r"images of shape \(R, C, H, W\)"),
    "a curve": (lambda m, g, b: plots.training_curve([1.0]), TypeError, "what fit returned, or its columns"),
    "points": (lambda m, g, b: plots.latent_view(b["x"], b["y"][:3]), ValueError, r"labels of shape \(6,\)"),
    "ranks": (lambda m, g, b: plots.ranks(None), TypeError, "what pyro_mm.calibration returned"),
    "evidence to plot": (lambda m, g, b: plots.convergence(None), TypeError, "expected evidence to be an Evidence"),
    "a matrix": (lambda m, g, b: plots.confusion([1, 2]), ValueError, r"matrix of counts \(C, C\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_the_message_says_what_was_expected_and_what_was_found(case, things):
    call, kind, message = TABLE[case]
    with pytest.raises(kind, match=message) as raised:
        call(*things)
    assert raised.type is kind


def test_a_decoder_or_a_posterior_that_gives_no_distribution_is_named(things):
    model, guide, batch = things
    with pytest.raises(TypeError, match=r"site 'x': expected a distribution, .* got Tensor"):
        mm.generate(models.SharedLatent(model.prior, {"x": nn.Linear(2, 3)}), guide, batch)
    with pytest.raises(TypeError, match="site 'z': expected a posterior that gives a distribution"):
        mm.encode(mm.Guide(z=lambda batch: batch["x"]), batch)


def without_mean():
    class Odd(dist.TorchDistribution):
        arg_constraints = {}
        support = torch.distributions.constraints.real

        def sample(self, sample_shape=()):
            return torch.zeros(self.shape(sample_shape))

        def expand(self, batch_shape, _instance=None):
            return Odd(torch.Size(batch_shape))

        def log_prob(self, value):
            return -value.abs()

    return Odd


def story(family):
    def model(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))
            batch.observe("x", family(torch.Size([batch.size])))

    def guide(batch):
        with batch.plate():
            pyro.sample("z", dist.Normal(torch.zeros(batch.size), 1.0))

    return model, guide, mm.Batch({"x": torch.zeros(3)})


def test_a_mean_that_is_not_known_is_said():
    model, guide, batch = story(without_mean())
    assert mm.generate(model, guide, batch)["x"].shape == (1, 3)
    with pytest.raises(ValueError, match="'x': Odd has no mean that is known: take draws"):
        mm.generate(model, guide, batch, mean=True)


def test_a_family_without_a_density_is_said():
    odd = without_mean()
    del odd.log_prob
    model, guide, batch = story(odd)
    assert mm.generate(model, guide, batch)["x"].shape == (1, 3), "draws need none"
    for evaluate in (
        lambda: mm.log_marginal(model, guide, batch, num_particles=2, audit=False),
        lambda: mm.objectives.elbo().loss(model, guide, batch),
    ):
        with pytest.raises(ValueError, match="site 'x': Odd has no density"):
            evaluate()
