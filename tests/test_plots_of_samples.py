"""Pictures of samples, latents and stories show the rows, the truth, and what a pair makes of them."""

import sys
import types

import numpy as np
import pytest
import torch

import pyro_mm as mm
from pyro_mm import plots
from pyro_mm.plots.figure import styles_of_classes


@pytest.fixture(scope="module")
def pair():
    """A trained-by-nobody pair of a colour image, a grey one, a string, a series and a class, and its rows."""
    torch.manual_seed(0)
    n = 8
    values = {
        "photo": torch.rand(n, 3, 6, 5), "image": torch.rand(n, 6, 6), "text": torch.randint(1, 4, (n, 4)),
        "series": torch.randn(n, 5, 2), "label": torch.arange(n) % 3,
    }  # fmt: skip
    lengths = {"text": torch.arange(n) % 4 + 1, "series": torch.arange(n) % 5 + 1}
    present = {"photo": torch.arange(n) != 1}
    rows = mm.Batch(values, present, lengths=lengths)
    model, guide, _ = mm.recipes.mvae(rows, latent=2, hidden=(6,))
    return model, guide, rows


def test_image_grids_and_captions_take_colour(tmp_path):
    images = torch.rand(2, 3, 3, 4, 5)
    axes = plots.image_grid(images).axes
    shown = axes[4].get_images()[0].get_array()
    np.testing.assert_allclose(shown, images[1, 1].movedim(0, -1))
    figure = plots.captions(images[0], ["one", "two words that are too long for one line", ""], columns=2)
    figure.savefig(tmp_path / "picture.png")
    assert figure.axes[0].get_xlabel() == "one" and "\n" in figure.axes[1].get_xlabel()
    assert len(figure.axes[3].get_images()) == 0
    with pytest.raises(ValueError, match="expected 3 captions, one per image, got 1"):
        plots.captions(images[0], ["one"])
    with pytest.raises(TypeError, match="one caption per image"):
        plots.captions(images[0], "one")
    with pytest.raises(ValueError, match=r"images of shape \(N, H, W\)"):
        plots.captions(images[0, 0, 0], ["one"])


def test_a_cross_modal_grid_has_what_is_given_the_truth_and_samples(pair, tmp_path):
    model, guide, rows = pair
    figure = plots.cross_modal(model, guide, rows, "photo", ("label", "series"), rows=(2, 1), num_samples=3, seed=0)
    figure.savefig(tmp_path / "picture.png")
    axes = np.array(figure.axes).reshape(2, 6)
    assert [ax.get_title() for ax in axes[0, :3]] == ["label", "series", "truth"]
    assert axes[0, 3].get_title(loc="left") == "photo, means"
    assert axes[0, 0].texts[0].get_text() == "2"
    np.testing.assert_allclose(axes[0, 1].lines[1].get_ydata(), rows["series"][2, :3, 1])
    np.testing.assert_allclose(axes[0, 2].get_images()[0].get_array(), rows["photo"][2].movedim(0, -1))
    assert not axes[1, 2].get_images()  # the photo of row 1 is missing
    shown = axes[1, 4].get_images()[0].get_array()
    again = plots.cross_modal(model, guide, rows, "photo", ("label", "series"), rows=(2, 1), num_samples=3, seed=0)
    np.testing.assert_array_equal(again.axes[10].get_images()[0].get_array(), shown)


@pytest.mark.parametrize("mean", [True, False])
def test_samples_in_a_grid_are_those_of_generate(mean):
    torch.manual_seed(0)
    model = mm.models.LinearGaussian({"x": torch.randn(5, 2), "y": torch.ones(2, 2)})
    rows, guide = model.sample(4).only("x", "y"), mm.Guide(z=model.posterior)
    figure = plots.cross_modal(model, guide, rows, "x", "y", rows=(0, 3), num_samples=2, mean=mean, seed=3)
    draws = mm.generate(model, guide, rows[torch.tensor([0, 3])].only("y"), 2, mean=mean, seed=3)["x"]
    axes = np.array(figure.axes).reshape(2, 4)
    shown = [[ax.lines[0].get_ydata() for ax in line[2:]] for line in axes]
    np.testing.assert_array_equal(np.array(shown), draws.transpose(0, 1))


@pytest.mark.parametrize(("target", "mean"), [("text", False), ("series", True), ("label", True), ("label", False)])
def test_a_target_of_any_kind_is_shown(pair, target, mean, tmp_path):
    model, guide, rows = pair
    figure = plots.cross_modal(model, guide, rows, target, "image", num_samples=2, mean=mean, seed=0)
    figure.savefig(tmp_path / "picture.png")
    assert len(figure.axes) == 6 * 4
    if target == "label":
        assert {ax.texts[0].get_text() for ax in figure.axes[2::4]} <= set("012")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "photo", "given": "photo"}, "'photo' is both the target and given"),
        ({"target": "image", "given": "photo", "rows": (0, 1)}, "'photo' is given, and missing in some of the rows"),
        ({"target": "image", "given": "label", "rows": (99,)}, "rows"),
        ({"target": "image", "given": "label", "rows": ()}, "one at least, got none"),
        ({"target": "sound", "given": "label"}, "'sound'"),
        ({"target": "text", "given": "label", "mean": True}, "mean=False"),
    ],
)
def test_a_grid_that_cannot_be_drawn_is_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        plots.cross_modal(*pair, **options, seed=0)


# -- latents ------------------------------------------------------------------------------------------------------


def test_a_traversal_decodes_one_coordinate_at_each_position(tmp_path):
    """Of a linear story the mean moves by a column of the loadings."""
    loadings = torch.randn(16, 3)
    model = mm.models.LinearGaussian({"x": loadings, "y": torch.ones(2, 3)})
    rows = model.sample(4).only("x", "y")
    guide = mm.Guide(z=model.posterior)
    figure = plots.traversal(model, guide, rows, "x", row=2, coordinates=(2, 0), positions=(-1, 0, 2), seed=0)
    figure.savefig(tmp_path / "picture.png")
    axes = np.array(figure.axes).reshape(2, 5)
    assert [ax.get_title() for ax in axes[0]] == ["truth", "draw", "-1", "0", "2"]
    np.testing.assert_allclose(axes[0, 0].lines[0].get_ydata(), rows["x"][2])
    curves = np.array([[ax.lines[0].get_ydata() for ax in line[2:]] for line in axes])
    for line, coordinate in zip(curves, (2, 0), strict=True):
        for places, step in (((0, 1), 1), ((1, 2), 2)):
            moved = line[places[1]] - line[places[0]]
            np.testing.assert_allclose(moved, step * loadings[:, coordinate], rtol=1e-3, atol=1e-4)
    assert axes[1, 2].get_ylabel() == "z[0]" and not axes[1, 0].get_visible()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"site": "w"}, "'w'"),
        ({"coordinates": (5,)}, "coordinates"),
        ({"positions": ()}, "positions to be one at least"),
        ({"row": 8}, "row"),
        ({"target": "sound"}, "'sound'"),
    ],
)
def test_a_traversal_that_cannot_be_drawn_is_refused(pair, options, message):
    with pytest.raises(ValueError, match=message):
        plots.traversal(*pair, **{"target": "image", **options}, seed=0)


def test_points_at_given_coordinates_are_plotted_as_they_are():
    points, labels = torch.randn(20, 2), torch.arange(20) % 3
    ax = plots.latent_view(points, labels, projection="given")
    shown = np.concatenate([c.get_offsets().data for c in ax.collections])
    np.testing.assert_allclose(np.sort(shown, 0), np.sort(points.numpy(), 0))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["0", "1", "2"]
    (dots,) = plots.latent_view(points, points[:, 0], projection="given").collections[:1]
    np.testing.assert_allclose(dots.get_array(), points[:, 0])
    assert plots.latent_view(points).get_legend() is None
    for bad, message in ((points[:, :1], r"points \(N, 2\)"), (points / 0, "finite")):
        with pytest.raises(ValueError, match=message):
            plots.latent_view(bad, projection="given")
    with pytest.raises(ValueError, match="unknown projection 'umap'"):
        plots.latent_view(points, projection="umap")


@pytest.mark.parametrize("n", [1, 8, 10, 16, 30])
def test_classes_have_colours_and_markers_that_differ(n):
    styles = [(str(style["color"]), style["marker"]) for style in styles_of_classes(n)]
    assert len(set(styles)) == n


# -- the story ----------------------------------------------------------------------------------------------------


def test_a_graph_without_graphviz_says_what_to_install(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "graphviz", None)
    model, _, rows = pair
    with pytest.raises(ImportError, match="pip install graphviz, and the programs"):
        plots.graph(model, rows)


def test_a_graph_has_the_sites_and_edges_of_the_story(pair, monkeypatch):
    """With a stand-in of graphviz that writes down what is drawn."""

    class Digraph:
        def __init__(self, *_, **__):
            self.nodes, self.edges = {}, set()

        def node(self, name, **style):
            self.nodes[name] = style

        def edge(self, cause, effect, **_):
            self.edges.add((cause, effect))

        def subgraph(self, graph=None, **_):
            if graph is not None:
                self.nodes |= graph.nodes
                return None
            return self

        def attr(self, **_):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setitem(sys.modules, "graphviz", types.SimpleNamespace(Digraph=Digraph))
    monkeypatch.setattr("pyro.infer.inspect.graphviz", sys.modules["graphviz"], raising=False)
    model, _, rows = pair
    model.train()
    state = torch.get_rng_state()
    drawn = plots.graph(model, rows)
    assert drawn.edges == {("z", name) for name in rows.names}
    assert {n: s.get("fillcolor") for n, s in drawn.nodes.items()} == {n: "gray" for n in rows.names} | {"z": "white"}
    assert model.training and torch.equal(torch.get_rng_state(), state)
