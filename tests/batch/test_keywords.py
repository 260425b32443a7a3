"""Lengths and covariates reach networks by keyword, through every door of the package."""

import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import pyro_mm as mm
from pyro_mm import conditionals, posteriors
from pyro_mm.utils import network_keywords
from pyro_mm.utils.global_state import override_validation
from pyro_mm.utils.network_calls import ROWS
from pyro_mm.utils.network_keywords import keywords_of

STEPS, LATENT = 5, 2


class Packed(nn.Module):
    """A GRU on packed sequences, which stops at their ends."""

    def __init__(self, out):
        super().__init__()
        self.gru, self.head = nn.GRU(1, 4, batch_first=True), nn.Linear(4, out)

    def forward(self, x, lengths):
        packed = pack_padded_sequence(x, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
        return self.head(self.gru(packed)[1][0])


class ValidSteps(nn.Module):
    """A decoder whose likelihood counts the valid steps alone."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(LATENT, STEPS)

    def forward(self, z, *, lengths):
        loc = self.net(z)[..., None]
        valid = torch.arange(STEPS) < lengths[..., None]
        return dist.Normal(loc, 1.0).mask(valid[..., None]).to_event(2)


ENCODERS = {
    "packed": lambda: conditionals.Normal(Packed(2 * LATENT)),
    "recurrent": lambda: conditionals.Normal(mm.nn.Recurrent(1, 2 * LATENT, hidden=4)),
    "first of a sequence": lambda: conditionals.Normal(
        nn.Sequential(nn.Sequential(Packed(6)), nn.Linear(6, 2 * LATENT))
    ),
    "wrapped": lambda: conditionals.Normal(nn.DataParallel(Packed(2 * LATENT))),
}


@pytest.fixture(params=ENCODERS)
def pair(request):
    return pair_with(request.param)


def pair_with(encoder):
    torch.manual_seed(0)
    prior = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)
    other = conditionals.Normal(nn.Linear(LATENT, 3), scale=1.0)
    model = mm.models.SharedLatent(prior, {"s": ValidSteps(), "x": other})
    experts = {"s": ENCODERS[encoder](), "x": conditionals.Normal(nn.Linear(3, 2 * LATENT))}
    return model, mm.Guide(z=posteriors.ProductOfExperts(experts))


def rows(padding, n=7, missing=True):
    """Sequences and vectors; what lies behind the end of a sequence is the padding."""
    generator = torch.Generator().manual_seed(1)
    s, x = torch.randn(n, STEPS, 1, generator=generator), torch.randn(n, 3, generator=generator)
    lengths = torch.arange(n) % STEPS + 1
    s[torch.arange(STEPS) >= lengths[:, None]] = padding
    present = {"s": torch.arange(n) % 4 != 2, "x": torch.arange(n) % 3 != 1} if missing else None
    return mm.Batch({"s": s, "x": x}, present, lengths={"s": lengths})


def value_and_gradient(pair, evaluate):
    for program in pair:
        program.zero_grad()
    pyro.set_rng_seed(3)
    value = evaluate(*pair)
    value.sum().backward()
    parameters = [p for program in pair for p in program.parameters()]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]  # of a modality left out
    assert all(g.isfinite().all() for g in gradients) and sum(bool(g.any()) for g in gradients) > len(gradients) / 2
    return [value.detach(), *gradients]


OBJECTIVES = {
    "elbo": lambda: mm.objectives.elbo(),
    "IWAE": lambda: mm.objectives.elbo(mm.estimators.IWAE(3)),
    "particle by particle": lambda: mm.objectives.elbo(mm.estimators.IWAE(3), vectorize=False),
    "stacked terms": lambda: mm.objectives.mvae(),
    "stacked terms with particles": lambda: mm.objectives.unimodal_mean(mm.estimators.IWAE(2)),
    "conditional terms": lambda: mm.objectives.jmvae_kl(0.3),
    "random subsets": lambda: mm.objectives.masked(),
    "subsampled": lambda: mm.objectives.elbo().subsampled(1),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_padding_changes_neither_value_nor_gradient_of_an_objective(pair, objective):
    objective = OBJECTIVES[objective]()
    found = [
        value_and_gradient(pair, lambda m, g, p=p: objective.differentiable_loss(m, g, rows(p))) for p in (0.0, 1e4)
    ]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


EVALUATIONS = {
    "encode": lambda m, g, b: mm.encode(g, b)["z"].mean,
    "log_marginal": lambda m, g, b: mm.log_marginal(m, g, b, num_particles=6, seed=0).log_prob,
    "in chunks": lambda m, g, b: mm.log_marginal(m, g, b, num_particles=6, seed=0, chunk=4).log_prob,
    "log_conditional": lambda m, g, b: (
        mm.log_conditional(m, g, b, target="x", given="s", num_particles=6, seed=0).log_prob
    ),
    "annealed": lambda m, g, b: mm.annealed_importance(m, g, b, num_chains=2, temperatures=3, seed=0).log_prob,
    "generate": lambda m, g, b: mm.generate(m, g, b.only("s"), num_samples=2, seed=0)["x"],
    "posterior_draws": lambda m, g, b: mm.posterior_draws(m, g, b, num_samples=2, seed=0)["z"],
}


@pytest.mark.parametrize("evaluation", EVALUATIONS)
def test_padding_changes_no_evaluation(pair, evaluation):
    complete = evaluation in ("log_conditional", "annealed")
    one, other = (EVALUATIONS[evaluation](*pair, rows(padding, missing=not complete)) for padding in (0.0, 1e4))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_an_encoder_sees_each_sequence_up_to_its_end(pair):
    """Against the network on one sequence at a time, cut to its length."""
    _, guide = pair
    expert = guide.posteriors["z"].experts["s"]
    batch = rows(1e4, missing=False)
    found = batch.encode("s", expert).mean
    for n, length in enumerate(batch.lengths["s"].tolist()):
        alone = expert(batch["s"][n : n + 1, :length], lengths=torch.tensor([length]))
        torch.testing.assert_close(found[n], alone.mean[0])


def test_lengths_are_those_of_the_rows_in_each_block():
    torch.manual_seed(0)
    encoder = ENCODERS["packed"]().eval()
    own = OwnNormal(Packed(LATENT)).eval()
    batch = rows(1e4, n=ROWS + 300, missing=False)
    for module in (encoder, own):
        whole = batch.encode("s", module).mean
        with torch.no_grad():
            torch.testing.assert_close(batch.encode("s", module).mean, whole)


class OwnNormal(nn.Module):
    """A module of a user's own in the place of a conditional."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, lengths=None):
        assert lengths is not None and len(lengths) == len(x)
        return dist.Normal(self.net(x, lengths), 1.0).to_event(1)


def test_a_compiled_step_takes_lengths_as_an_input():
    """A graph traced on some rows, run on others with other lengths and padding, against the step as it is."""
    torch.manual_seed(0)
    prior = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)
    model = mm.models.SharedLatent(prior, {"s": ValidSteps()})
    guide = mm.Guide(z=posteriors.ProductOfExperts({"s": ENCODERS["recurrent"]()}))
    objective = mm.objectives.elbo(mm.estimators.IWAE(2))
    first = rows(0.0, missing=False).without("x")
    step = mm.stage(objective, model, guide, first, backend=None)
    step(first)
    lengths = first.lengths["s"].flip(0)
    values = torch.randn(7, STEPS, 1)
    clean = torch.where((torch.arange(STEPS) < lengths[:, None])[..., None], values, 0.0)
    padded = torch.where((torch.arange(STEPS) < lengths[:, None])[..., None], values, 1e4)
    losses, gradients = [], []
    for run, s in ((objective_step(objective, model, guide), clean), (step, clean), (step, padded)):
        pyro.set_rng_seed(5)
        model.zero_grad(), guide.zero_grad()
        losses.append(run(mm.Batch({"s": s, "x": None}, lengths={"s": lengths})))
        gradients.append([p.grad.clone() for p in guide.parameters()])
    for loss, gradient in zip(losses[1:], gradients[1:], strict=True):
        assert float(loss) == pytest.approx(float(losses[0]), rel=1e-5)
        for one, other in zip(gradient, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def objective_step(objective, model, guide):
    def step(batch):
        loss = objective.differentiable_loss(model, guide, batch)
        loss.backward()
        return loss.detach()

    return step


def test_a_step_that_packs_sequences_is_said_to_run_uncompiled():
    pair = pair_with("packed")
    with pytest.warns(UserWarning, match="the step is not compiled, and runs as it is"):
        mm.fit(*pair, mm.objectives.elbo(), rows(0.0), epochs=1, compile=True, progress=False, seed=0)


# -- covariates ----------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """A decoder conditioned on the site of a row, by keyword or as a parent."""

    def __init__(self):
        super().__init__()
        self.net, self.shift = nn.Linear(LATENT, 3), nn.Embedding(4, 3)

    def forward(self, z, covariates):
        site = covariates["site"] if isinstance(covariates, dict) else covariates
        return self.net(z) + self.shift(site)


class ByHand(nn.Module):
    """The story that hands the covariate over as a parent."""

    def __init__(self, decoders):
        super().__init__()
        self.decoders = nn.ModuleDict(decoders)

    def forward(self, batch):
        with batch.plate():
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENT), 1.0).to_event(1))
            for m in pyro.plate("modalities", 2):
                name = "xy"[m]
                net = self.decoders[name].net
                batch.observe(
                    name, lambda z, u, net=net: dist.Normal(net(z, u), 0.5).to_event(1), z, batch.covariates["site"]
                )


def stories():
    torch.manual_seed(0)
    decoders = {name: conditionals.Normal(Shifted(), scale=0.5) for name in "xy"}
    keyword = mm.models.SharedLatent(dist.Normal(torch.zeros(LATENT), 1.0).to_event(1), decoders)
    experts = {name: conditionals.Normal(nn.Linear(3, 2 * LATENT)) for name in "xy"}
    return keyword, ByHand(decoders), mm.Guide(z=posteriors.ProductOfExperts(experts))


def sites(n=8):
    generator = torch.Generator().manual_seed(1)
    values = {name: torch.randn(n, 3, generator=generator) for name in "xy"}
    present = {"x": torch.arange(n) % 3 != 0, "y": torch.arange(n) % 4 != 1}
    return mm.Batch(values, present, covariates={"site": torch.arange(n) % 4})


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_decoder_given_a_covariate_by_keyword_is_that_by_hand_in_an_objective(objective):
    keyword, by_hand, guide = stories()
    objective = OBJECTIVES[objective]()
    loss = lambda m, g: objective.differentiable_loss(m, g, sites())  # noqa: E731
    for one, other in zip(
        value_and_gradient((keyword, guide), loss), value_and_gradient((by_hand, guide), loss), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [8, ROWS + 5])
@pytest.mark.parametrize("evaluation", ["log_marginal", "in chunks", "generate", "from the prior"])
def test_a_decoder_given_a_covariate_by_keyword_is_that_by_hand_in_evaluations(evaluation, n):
    keyword, by_hand, guide = stories()
    run = {
        "log_marginal": EVALUATIONS["log_marginal"],
        "in chunks": lambda m, g, b: mm.log_marginal(m, g, b, num_particles=2, seed=0, chunk=ROWS // 2).log_prob,
        "generate": lambda m, g, b: mm.generate(m, g, b.only("x"), num_samples=2, seed=0)["y"],
        "from the prior": lambda m, g, b: mm.generate(m, g, b.only(), num_samples=2, seed=0)["y"],
    }[evaluation]
    torch.testing.assert_close(run(keyword, guide, sites(n)), run(by_hand, guide, sites(n)))


def test_a_compiled_step_takes_covariates_as_an_input():
    keyword, by_hand, guide = stories()
    objective = mm.objectives.mvae()
    batch = sites()
    step = mm.stage(objective, keyword, guide, batch, backend=None)
    step(batch)
    other = mm.Batch({n: batch[n] for n in "xy"}, batch.present, covariates={"site": (torch.arange(8) + 1) % 4})
    pyro.set_rng_seed(3)
    found = float(step(other))
    pyro.set_rng_seed(3)
    assert found == pytest.approx(float(objective.differentiable_loss(by_hand, guide, other)), rel=1e-5)


def test_an_encoder_of_a_drawn_latent_gets_covariates_too():
    """A guide whose second posterior encodes the first one's draw, against that with the covariate of the batch."""
    torch.manual_seed(0)
    net = Shifted()
    guide = mm.Guide(
        w=lambda b: dist.Normal(b["x"][:, :LATENT], 1.0).to_event(1),
        z=lambda b: dist.Normal(b.encode("w", net), 1.0).to_event(1),
    )
    pyro.set_rng_seed(0)
    trace = pyro.poutine.trace(guide).get_trace(sites())
    expected = net(trace.nodes["w"]["value"], sites().covariates["site"])
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean, expected)


# -- signatures ----------------------------------------------------------------------------------------------------


def test_the_first_module_of_a_sequence_that_has_the_parameter_gets_the_lengths():
    torch.manual_seed(0)
    table, recurrent = nn.Embedding(5, 3), mm.nn.Recurrent(3, 2, hidden=4)
    batch = mm.Batch({"w": torch.tensor([[1, 2, 3], [4, 1, 1]])}, lengths={"w": [3, 1]})
    found = batch.encode("w", nn.Sequential(nn.Sequential(table, nn.Identity()), nn.Sequential(recurrent, nn.ReLU())))
    assert torch.equal(found, recurrent(table(batch["w"]), batch.lengths["w"]).relu())


def test_a_network_without_the_parameters_is_called_as_before():
    seen = []

    def encoder(*inputs, **keywords):
        seen.append((len(inputs), keywords))
        return inputs[0]

    batch = mm.Batch({"a": torch.zeros(3, 2)}, covariates={"u": torch.zeros(3)}, lengths={"a": [1, 2, 2]})
    batch.encode("a", encoder)
    batch.encode("a", torch.relu)
    batch.encode("a", nn.Identity())
    assert seen == [(1, {})]


def test_lengths_handed_over_as_a_parent_are_not_passed_again_by_keyword():
    """Stories of before, which hand lengths over as a parent."""

    def decode(z, lengths):
        return dist.Normal(z + lengths[:, None], 1.0).to_event(1)

    batch = mm.Batch({"a": torch.zeros(3, 2)}, lengths={"a": [1, 2, 2]})
    with batch.plate():
        run = poutine.trace(batch.observe).get_trace("a", decode, torch.zeros(3, 2), batch.lengths["a"])
    each = dist.Normal(torch.tensor([[1.0], [2.0], [2.0]]), 1.0).log_prob(torch.zeros(3, 2))
    by_hand = torch.stack([each[0, 0], each[1].sum(), each[2].sum()])  # of the valid steps
    torch.testing.assert_close(run.nodes["a"]["fn"].log_prob(torch.zeros(3, 2)), by_hand)


class Method:
    def decode(self, z, *, covariates=None):
        return covariates

    def __call__(self, z, lengths=None):
        return lengths


def test_a_conditional_of_several_parents_asks_for_covariates_in_any_place_of_the_signature():
    """The parents reach the network as one input, so that none of them fills its second parameter."""

    class Shift(nn.Module):
        def forward(self, x, covariates):
            return x + covariates["u"][:, None]

    batch = mm.Batch({"a": torch.zeros(3, 4)}, covariates={"u": torch.tensor([1.0, 2.0, 3.0])})
    decoder = conditionals.Normal(Shift(), scale=1.0)
    with poutine.trace() as traced, batch.plate():
        batch.observe("a", decoder, torch.zeros(3, 2), torch.ones(3, 2))
    loc = traced.trace.nodes["a"]["fn"].mean
    assert loc.tolist() == [[1, 1, 2, 2], [2, 2, 3, 3], [3, 3, 4, 4]]


def test_keywords_are_read_from_signatures_of_functions_methods_and_objects():
    names = lambda network: [k.name for k in keywords_of(network)]  # noqa: E731
    decode = Method().decode
    assert names(decode) == ["covariates"] and names(Method()) == ["lengths"]
    assert names(lambda z, lengths, covariates: z) == ["lengths", "covariates"]
    assert names(lambda lengths: lengths) == ["lengths"] and keywords_of(lambda lengths: lengths)[0].position == 0

    assert (
        names(partial(Method(), lengths=3)) == [] and keywords_of(partial(lambda a, z, lengths: z, 1))[0].position == 1
    )
    with override_validation(True):  # which is put back: torch.compile switches the checks of distributions off
        compiled = torch.compile(Packed(2))
    assert names(compiled) == ["lengths"]
    assert names(dist.Normal) == [] and names(torch.relu) == [] and names(nn.Sequential()) == []


def test_a_signature_is_read_once_per_network(monkeypatch):
    read, signature = [], network_keywords._read
    monkeypatch.setattr(network_keywords, "_read", lambda network: (read.append(network), signature(network))[1])
    net = nn.Linear(2, 2)
    batch = mm.Batch({"a": torch.zeros(3, 2)}, covariates={"u": torch.zeros(3)})
    for _ in range(3):
        module = conditionals.Normal(net, scale=1.0)
        batch.encode("a", net)
        batch.encode("a", lambda x, covariates: x)
    assert len(read) == 2
    for _ in range(3):
        batch.encode("a", module)
    assert len(read) == 3, "of the conditional, whose network's is known"


def test_a_network_put_into_a_conditional_later_is_seen():
    module = conditionals.Normal(nn.Flatten(), scale=1.0)
    assert not keywords_of(module)
    module.net = Packed(2)
    assert [k.name for k in keywords_of(module)] == ["lengths"]


def test_a_keyword_that_a_network_needs_and_the_batch_lacks_is_named():
    batch = mm.Batch({"a": torch.zeros(3, 4, 1), "b": torch.zeros(3, 2, 1)}, lengths={"b": [1, 2, 2]})
    with pytest.raises(ValueError, match=r"Packed, a network of modality 'a', needs lengths; .* of \['b'\]"):
        batch.encode("a", conditionals.Normal(Packed(2)))
    message = "Shifted, a network of modality 'a', needs covariates; this batch has none"
    with pytest.raises(ValueError, match=message), batch.plate():
        batch.observe("a", conditionals.Normal(Shifted(), (4, 1), scale=1.0), torch.zeros(3, LATENT))
    other = mm.Batch({"a": torch.zeros(3, 3)}, covariates={"age": torch.zeros(3)})
    message = r"Shifted, a network of modality 'a', is given the covariate 'site'; this batch has \['age'\]"
    for error in (ValueError, KeyError):
        with pytest.raises(error, match=message), other.plate():
            other.observe("a", conditionals.Normal(Shifted(), scale=1.0), torch.zeros(3, LATENT))


@pytest.mark.parametrize(
    ("covariates", "words"),
    [
        ({}, "needs covariates; this batch has none"),
        ({"age": torch.zeros(8)}, r"given the covariate 'site'.*\['age'\]"),
    ],
)
def test_an_evaluation_names_the_covariate_that_is_missing(covariates, words):
    keyword, _, guide = stories()
    batch = mm.Batch({n: sites()[n] for n in "xy"}, covariates=covariates)
    for run in (
        lambda: mm.log_marginal(keyword, guide, batch, num_particles=2),
        lambda: mm.fit(keyword, guide, mm.objectives.elbo(), batch, epochs=1, progress=False),
    ):
        with pytest.raises(ValueError, match=f"at site 'x': Shifted, a network of modality 'x', (is )?{words}"):
            run()


@pytest.mark.parametrize("objective", [mm.objectives.elbo, mm.objectives.mvae])
def test_features_of_what_a_story_is_conditioned_on_get_covariates(objective):
    """``ConditionalLatent`` with a network of its condition by keyword, and with one that knows the covariate."""
    batch = sites()

    class Features(nn.Module):
        def __init__(self, by_keyword):
            super().__init__()
            self.net, self.by_keyword = nn.Linear(3, 2), by_keyword

        def forward(self, y, covariates=None):
            site = covariates["site"] if self.by_keyword else batch.covariates["site"][: y.shape[-2]]
            return self.net(y) + site[:, None]

    found = []
    for by_keyword in (True, False):
        torch.manual_seed(0)
        normal = dist.Normal(torch.zeros(3), 1.0).to_event(1)
        decoders = {"y": conditionals.Normal(nn.Linear(LATENT + 2, 3), scale=1.0)}
        prior = dist.Normal(torch.zeros(LATENT), 1.0).to_event(1)
        model = mm.models.ConditionalLatent(prior, ("x", normal), Features(by_keyword), decoders)
        experts = {name: conditionals.Normal(nn.Linear(3, 2 * LATENT)) for name in "xy"}
        guide = mm.Guide(z=posteriors.ProductOfExperts(experts))
        pyro.set_rng_seed(1)
        found.append(objective().differentiable_loss(model, guide, batch))
    torch.testing.assert_close(*found)


def test_a_network_that_gets_the_lengths_counts_as_reading_them(pair):
    model, guide = pair
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mm.log_marginal(model, guide, rows(0.0), num_particles=2, seed=0)
    assert not [w for w in caught if "lengths" in str(w.message)]


# -- posteriors of several modalities, and their heads ---------------------------------------------------------------


SETS = {
    "JointEncoder": lambda features, head: posteriors.JointEncoder(features, head),
    "SumPooling": lambda features, head: posteriors.SumPooling(features, head, 4),
    "SelfAttention": lambda features, head: posteriors.SelfAttention(features, head, 4, heads=2),
}


@pytest.mark.parametrize("objective", ["elbo", "stacked terms", "stacked terms with particles"])
@pytest.mark.parametrize("posterior", SETS)
def test_features_of_a_posterior_of_sets_stop_at_the_end_of_a_sequence(posterior, objective):
    def evaluate(padding):
        model, _ = pair_with("packed")
        torch.manual_seed(1)
        head = conditionals.Normal(nn.Linear(8 if posterior == "JointEncoder" else 4, 2 * LATENT))
        guide = mm.Guide(z=SETS[posterior]({"s": Packed(4), "x": nn.Linear(3, 4)}, head))
        batch, loss = rows(padding), OBJECTIVES[objective]()
        return value_and_gradient((model, guide), lambda *pair: loss.evaluate(*pair, batch, step=0).total)

    for one, other in zip(evaluate(0.0), evaluate(1e6), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class ShiftedHead(nn.Module):
    """A head conditioned on the site of a row."""

    def __init__(self, size):
        super().__init__()
        self.net, self.shift = nn.Linear(size, 2 * LATENT), nn.Embedding(4, 2 * LATENT)

    def forward(self, x, *, covariates):
        return self.net(x) + self.shift(covariates["site"])


class HeadByHand(nn.Module):
    """The posterior that computes the head of another one from its features and the covariate."""

    def __init__(self, posterior):
        super().__init__()
        self.posterior = posterior

    def forward(self, batch):
        if isinstance(self.posterior, posteriors.SumPooling):
            state = self.posterior.pooled(batch)
        else:
            each = []
            for name, net in self.posterior.features.items():
                mask = batch.presence(name)
                mask = mask[..., None] if isinstance(mask, torch.Tensor) else torch.tensor(mask)
                each.append(torch.where(mask, net(batch[name]), 0.0))
            lead = torch.broadcast_shapes(*(x.shape[:-1] for x in each))
            state = torch.cat([x.expand(*lead, -1) for x in each], -1)
        head = self.posterior.head
        net = head if isinstance(head, ShiftedHead) else head.net
        out = net.net(state) + net.shift(batch.covariates["site"])
        return conditionals.Normal(nn.Identity())(out)


class BareHead(ShiftedHead):
    """A head that returns the distribution by itself, whose covariates may come in second place too."""

    def forward(self, x, covariates):
        return conditionals.Normal(nn.Identity())(super().forward(x, covariates=covariates))


@pytest.mark.parametrize("head", [lambda size: conditionals.Normal(ShiftedHead(size)), BareHead], ids=["net", "bare"])
@pytest.mark.parametrize("posterior", SETS)
def test_a_head_given_covariates_by_keyword_is_that_by_hand(posterior, head):
    torch.manual_seed(0)
    keyword, _, _ = stories()
    made = SETS[posterior]({name: nn.Linear(3, 4) for name in "xy"}, head(8 if posterior == "JointEncoder" else 4))
    for objective in (mm.objectives.elbo(), mm.objectives.mvae(), mm.objectives.unimodal_mean(mm.estimators.IWAE(2))):
        loss = partial(objective.evaluate, batch=sites(), step=0)
        results = [
            value_and_gradient((keyword, mm.Guide(z=q)), lambda *pair, loss=loss: loss(*pair).total)
            for q in (made, HeadByHand(made))
        ]
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other)
    many = sites(ROWS + 3)
    with torch.no_grad():
        made.eval()
        torch.testing.assert_close(made(many).mean, HeadByHand(made)(many).mean)


@pytest.mark.parametrize("posterior", SETS)
def test_a_compiled_step_takes_covariates_of_a_head_as_an_input(posterior):
    torch.manual_seed(0)
    keyword, _, _ = stories()
    head = conditionals.Normal(ShiftedHead(8 if posterior == "JointEncoder" else 4))
    made = SETS[posterior]({name: nn.Linear(3, 4) for name in "xy"}, head)
    objective, batch = mm.objectives.mvae(), sites()
    step = mm.stage(objective, keyword, mm.Guide(z=made), batch, backend=None)
    step(batch)
    other = mm.Batch({n: batch[n] for n in "xy"}, batch.present, covariates={"site": (torch.arange(8) + 1) % 4})
    pyro.set_rng_seed(3)
    found = float(step(other))
    pyro.set_rng_seed(3)
    by_hand = float(objective.evaluate(keyword, mm.Guide(z=HeadByHand(made)), other, step=0).total)
    assert step.reasons == [] and found == pytest.approx(by_hand, rel=1e-5)


def test_a_prior_given_a_covariate_gets_the_others_by_keyword():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = ShiftedHead(1)

        def forward(self, age, covariates):
            return self.net(age, covariates=covariates)

    net, age, site = Both(), torch.randn(6, 1), torch.arange(6) % 4
    prior = mm.priors.GivenCovariate("age", conditionals.Normal(net))
    batch = mm.Batch({"x": torch.zeros(6, 3)}, covariates={"age": age, "site": site})
    out = net.net.net(age) + net.net.shift(site)
    torch.testing.assert_close(prior(batch).mean, out[:, :LATENT])
    lacking = mm.Batch({"x": torch.zeros(6, 3)}, covariates={"age": age})
    with pytest.raises(ValueError, match=r"Both, the conditional of GivenCovariate, is given the covariate 'site'"):
        prior(lacking)


def test_a_head_that_needs_what_it_cannot_get_is_refused_in_words():
    features = {"x": nn.Linear(3, 4)}
    for make in (
        lambda: posteriors.SumPooling(features, conditionals.Normal(Packed(4)), 4),
        lambda: posteriors.JointEncoder(features, Packed(4)),
        lambda: mm.priors.GivenCovariate("u", conditionals.Normal(Packed(4))),
    ):
        with pytest.raises(TypeError, match="got Packed, which needs lengths: networks of a modality get them"):
            make()
    pool = posteriors.SumPooling(features, conditionals.Normal(nn.Linear(4, 4)), 4)
    with pytest.raises(TypeError, match=r"expected whole .* got ShiftedHead, which needs covariates"):
        posteriors.PrivateOf(pool, "x", ShiftedHead(4), nn.Linear(4, 4), conditionals.Normal(nn.Linear(4, 4)))
    pool = posteriors.SumPooling(features, conditionals.Normal(ShiftedHead(4)), 4)
    with pytest.raises(ValueError, match="ShiftedHead, the head of a posterior, needs covariates; this batch has none"):
        pool(mm.Batch({"x": torch.zeros(2, 3)}))
