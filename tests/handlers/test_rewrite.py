"""Handlers that are made of plain functions."""

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

from pyro_mm.handlers.rewrite import EditSites, RecordSites


def program():
    with pyro.plate("data", 2):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=torch.zeros(2))


def test_latent_and_observed_sites_are_edited_apart_and_plates_left_alone():
    latent, observed = [], []
    with EditSites(lambda msg: latent.append(msg["name"]), lambda msg: observed.append(msg["name"])):
        program()
    assert latent == ["z"] and observed == ["x"]
    with EditSites(None, lambda msg: msg.update(scale=3.0)):
        trace = poutine.trace(program).get_trace()
    assert trace.nodes["x"]["scale"] == 3.0 and trace.nodes["z"]["scale"] == 1.0


def test_a_latent_site_takes_the_value_that_it_is_given():
    def fix(msg):
        msg["value"], msg["done"] = torch.tensor([1.0, 2.0]), True

    with EditSites(fix):
        trace = poutine.trace(program).get_trace()
    assert trace.nodes["z"]["value"].tolist() == [1.0, 2.0]


def test_sites_are_recorded_with_their_values():
    values = {}
    with RecordSites(lambda msg: values.update({msg["name"]: msg["value"]})):
        trace = poutine.trace(program).get_trace()
    assert set(values) == {"z", "x"} and values["z"] is trace.nodes["z"]["value"]
