"""Kanji from small files of the format of KanjiVG, written here, and from the package where it is installed."""

from importlib.metadata import PackageNotFoundError, distribution

import numpy as np
import pytest
import torch

from pyro_mm import datasets
from pyro_mm.datasets.strokes import draw_strokes, parse_path, points_along

HEAD = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:kvg="http://kanjivg.tagaini.net" width="109" height="109">'
# a horizontal stroke; a cross of two strokes, the second one a curve in two pieces; a square of one stroke
FILES = {
    "04e00": ("一", [], ["M10,54.5c10,0,80,0,89,0"]),
    "05341": ("十", ["一", "丨"], ["M10,54.5C40,54.5,70,54.5,99,54.5", "M54.5,10c0,10,0,30,0,44.5s0,30,0,44.5"]),
    "056d7": ("囗", ["一"], ["M20,20C50,20,60,20,90,20S90,60,90,90"]),
    "05e72": ("干", ["十", "一"], ["M20,20c20,0,40,0,70,0", "M54,20c0,20,0,40,0,70", "M10,60c20,0,40,0,80,0"]),
}


def svg(character, parts, strokes):
    inner = "".join(f'<path id="s" d="{d}"/>' for d in strokes)
    for part in parts:
        inner = f'<g kvg:element="{part}">{inner}</g>'
    return f'<?xml version="1.0" encoding="UTF-8"?>{HEAD}<g kvg:element="{character}">{inner}</g></svg>'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("kanjivg")
    (root / "kanji").mkdir()
    for name, content in FILES.items():
        (root / "kanji" / f"{name}.svg").write_text(svg(*content), encoding="utf-8")
    (root / "kanji" / "04e00-Kaisho.svg").write_text("a variant is not read")
    (root / "kanji" / "03042.svg").write_text("kana are not read")
    return root


def load(folder, **options):
    """Both parts in the order of the codepoints."""
    parts = datasets.kanji(folder, **{"least": 1, "held_out": 0.3, "points": 3} | options)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    order = torch.cat([part.covariates["codepoint"] for part in parts]).argsort()
    lengths = torch.cat([part.lengths["pen"] for part in parts])[order]
    return {name: value[order] for name, value in whole.items()}, lengths, parts


def test_the_four_views_are_those_of_the_file(folder):
    found, lengths, (train, test) = load(folder)
    assert (train.size, test.size) == (3, 1)
    assert found["strokes"].tolist() == lengths.tolist() == [1, 2, 1, 3]
    assert datasets.kanji_components(folder, least=1) == ["一", "丨", "十"]
    assert found["components"].tolist() == [[0, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 1]]
    assert found["components"].dtype == found["image"].dtype == found["pen"].dtype == torch.float32
    assert found["pen"].shape == (4, 3, 6) and found["image"].shape == (4, 32, 32)

    unit = lambda x: 2 * x / 109 - 1  # noqa: E731
    expected = [unit(10), 0, 0, 0, unit(99), 0]
    torch.testing.assert_close(found["pen"][1, 0], torch.tensor(expected), atol=1e-5, rtol=0)
    torch.testing.assert_close(found["pen"][1, 1], torch.tensor(expected)[[1, 0, 3, 2, 5, 4]], atol=1e-5, rtol=0)
    codepoints = torch.cat([part.covariates["codepoint"] for part in (train, test)])
    assert {chr(c) for c in codepoints.tolist()} == set("一十囗干")


def test_pictures_have_the_pixels_near_the_strokes(folder):
    found, _, _ = load(folder, side=40)
    for n, (_, _, strokes) in enumerate(FILES.values()):
        dense = [points_along(parse_path(d) * 40 / 109, 4000) for d in strokes]
        centres = np.stack(np.meshgrid(np.arange(40), np.arange(40)), -1).reshape(-1, 1, 2) + 0.5
        distance = np.min([np.linalg.norm(centres - line, axis=-1).min(1) for line in dense], 0).reshape(40, 40)
        image = found["image"][n].numpy() > 0
        assert image[distance < 0.72].all() and not image[distance > 0.7501].any()
        assert image.any()


def test_paths_are_the_curves_that_they_say():
    """Against de Casteljau's construction at one half, in absolute and in relative commands."""
    controls = np.array([[3.0, 4.0], [10.0, -2.0], [6.0, 9.0], [12.0, 5.0]])
    thirds = [controls]
    while len(thirds[-1]) > 1:
        thirds.append((thirds[-1][1:] + thirds[-1][:-1]) / 2)
    absolute = parse_path("M3,4C10-2,6,9,12,5")
    relative = parse_path("M 3 4 c 7-6 3 5 9 1")
    np.testing.assert_allclose(absolute, relative, atol=1e-12)
    t = np.linspace(0, 1, len(absolute))
    polynomial = [np.polyfit(t, absolute[:, axis], 3) for axis in (0, 1)]  # exact for a cubic
    np.testing.assert_allclose([np.polyval(p, 0.5) for p in polynomial], thirds[-1][0], atol=1e-9)

    smooth = parse_path("M0,0C0,1,1,2,2,2S4,3,4,4")
    mirrored = parse_path("m0,0c0,1,1,2,2,2c1,0,2,1,2,2")
    np.testing.assert_allclose(smooth, mirrored, atol=1e-12)
    np.testing.assert_allclose(parse_path("M0,0c1,0,2,0,3,0,1,0,2,0,3,0")[-1], [6, 0], atol=1e-12)
    np.testing.assert_allclose(parse_path("M1,1s1,1,2,0"), parse_path("M1,1c0,0,1,1,2,0"), atol=1e-12)


@pytest.mark.parametrize(
    "text", ["", "c1,2,3,4,5,6", "M1,2L3,4", "M1,2c1,2,3", "M1,2C", "M1,2M3,4", "M1,2c1,2,3,4,5,6!", "5"]
)
def test_other_paths_are_refused(text):
    with pytest.raises(ValueError, match=r"expected the path of one stroke, a move M and then curves C or S, got"):
        parse_path(text)


def test_a_point_is_drawn_as_a_dot():
    picture = draw_strokes([np.array([[5.5, 5.5], [5.5, 5.5]])], 10, 10.0, 0.75)
    assert picture.sum() == 1 and picture[5, 5]
    assert draw_strokes([np.array([[0.1, 0.1], [0.1, 0.1]])], 10, 10.0, 0.75)[0, 0], "near the edge"


def test_the_split_is_by_seed(folder):
    first, again, other = (datasets.kanji(folder, least=1, held_out=0.5, seed=s)[0] for s in (0, 0, 3))
    first, again, other = (part.covariates["codepoint"] for part in (first, again, other))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_what_cannot_be_loaded_is_refused_in_words(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("PYRO_MM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r'has no such files. Install it, pip install "pyro-mm\[kanji\]"'):
        datasets.kanji(tmp_path)
    with pytest.raises(ValueError, match="stands in at least least=9 characters: the most frequent is in 3"):
        datasets.kanji(folder, least=9)
    with pytest.raises(ValueError, match="leaves no training or no test row"):
        datasets.kanji(folder, least=1, held_out=0.1)
    line, nothing = svg("一", [], ["M1,2L3,4"]), svg("一", [], [])
    for text, reason in (("<svg", "no element|unclosed"), (line, "a move M"), (nothing, "no path")):
        (tmp_path / "04e00.svg").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=f"04e00.svg: not a file of KanjiVG: .*({reason})"):
            datasets.kanji(tmp_path, least=1)


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("pyro_mm.datasets.kanjivg.distribution", missing)
    monkeypatch.delenv("PYRO_MM_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match=r"the package kanjivg is not installed. Install it, pip install"):
        datasets.load("kanji")


def is_installed():
    try:
        distribution("kanjivg")
    except PackageNotFoundError:
        return False
    return True


@pytest.mark.skipif(not is_installed(), reason="the package kanjivg is not installed: pip install 'pyro-mm[kanji]'")
def test_the_package_has_6413_characters():
    train, test = datasets.kanji()
    components = torch.cat([train["components"], test["components"]])
    assert (train.size, test.size) == (5451, 962) and components.shape == (6413, 70)
    assert (components.sum(0) >= 100).all() and train["pen"].shape == (5451, 30, 8)
    assert len(datasets.kanji_components(least=1)) > 1000
