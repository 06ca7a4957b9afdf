"""The site's configuration: `make docs`. Nothing is fetched while it is built.

With TORCH_INVENTORY naming an objects.inv of torch's documentation, torch's names link there; else they are plain.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import fusednorm  # noqa: E402

project = "fusednorm"
author = "the fusednorm authors"
copyright = f"{author}; MIT licence"
release = fusednorm.__version__

extensions = ["myst_parser"]
extensions += [f"sphinx.ext.{name}" for name in ("autodoc", "napoleon", "viewcode", "intersphinx")]
extensions += [f"_site.{name}" for name in ("worked", "twins", "public")]
exclude_patterns = ["_site"]  # code
if not (HERE.parent / "CHANGELOG.md").is_file():
    exclude_patterns.append("changelog.md")

myst_heading_anchors = 3
default_role = "code"  # docstrings quote names as Markdown does
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True

inventory = os.environ.get("TORCH_INVENTORY")
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", inventory)} if inventory else {}
nitpick_ignore_regex = [  # what others document, types that are internal to this package, and types in prose
    (r"py:.*", r"(torch|nn|collections|typing|types)\..*"),
    (r"py:.*", r"(Tensor|Module|GraphModule|Any|Self|Callable|Iterable|Iterator|Mapping|Sequence|optional|torch|nn)"),
    (r"py:.*", r"(.*\.)?_\w+(\..*)?"),
    (r"py:exc", r".*\s.*"),
]
napoleon_use_rtype = False  # "Returns:" speaks of shapes, not of types

html_theme = "furo"
html_title = f"fusednorm {release}"
html_favicon = "_static/icon.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False


def setup(app):
    def leave_out_absent(app, docname, source):
        """Pages that are made elsewhere have their places in the index, and a checkout may lack them."""
        if docname == "index":
            absent = {"gallery", "how-it-works", "changelog"} - app.env.found_docs
            source[0] = "\n".join(line for line in source[0].splitlines() if line not in absent)

    app.connect("source-read", leave_out_absent)
