"""Beside a picture that has a twin for dark pages, NAME-dark.svg, that one: the theme shows what fits the page.

So pages name a picture once, in plain Markdown.
"""

from __future__ import annotations

from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform


class Twins(SphinxTransform):
    default_priority = 100  # before Sphinx collects pictures

    def apply(self, **_):
        folder = Path(self.env.doc2path(self.env.docname)).parent
        for image in list(self.document.findall(nodes.image)):
            path = Path(image["uri"])
            twin = path.with_name(f"{path.stem}-dark{path.suffix}")
            if path.stem.endswith("-dark") or image.get("classes") or not (folder / twin).is_file():
                continue
            other = image.deepcopy()
            other["uri"] = str(twin)
            image["classes"] = ["only-light"]
            other["classes"] = ["only-dark"]
            image.parent.insert(image.parent.index(image) + 1, other)


def setup(app: Sphinx) -> dict:
    app.add_transform(Twins)
    return {"parallel_read_safe": True}
