"""Configuration of the documentation: ``python -m sphinx -W -b html docs build/html`` from the root of the checkout."""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT), str(DOCS)]  # the package and the generators of pages, installed or not

import generate_pages  # noqa: E402

project = "pyro_mm"
author = "The pyro_mm authors"
copyright = "The pyro_mm authors, Apache-2.0"
release = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)[1]

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["README.md"]
html_theme = "furo"
html_title = f"pyro_mm {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_copy_source = False

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # signatures stay short; sections "Args" give types and shapes in words
autodoc_default_options = {"members": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks are shown with the outputs that they were saved with
nb_merge_streams = True

# Links of the files of this folder that lead out of it, so that the same files read well outside of the site.
LINKS = {
    "../data/README.md": "_generated/data.md",
    "../CONTRIBUTING.md": "_generated/contributing.md",
    "../notebooks/": "_generated/notebooks/",
}


def redirect_links(app, name, source):
    """Replace links out of this folder by those to the copies that the site holds."""
    for link, copy in LINKS.items():
        source[0] = source[0].replace(f"]({link}", f"]({copy}")


def setup(app):
    """Write the generated pages before the sources are looked for."""
    generate_pages.write_all(DOCS / "_generated")
    app.connect("source-read", redirect_links)
