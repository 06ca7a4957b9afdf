"""`{results} KIND`: a table or a sentence of tables.py, made from benchmarks/results while the site is built.

So no figure of a measured page is typed by hand, and none can be out of date.
"""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from _site.tables import KINDS, RESULTS


class Results(SphinxDirective):
    required_arguments = 1

    def run(self):
        for path in RESULTS.glob("*.json"):
            self.env.note_dependency(str(path))
        kind = self.arguments[0]
        if kind not in KINDS:
            raise self.error(f"results: expected one of {', '.join(KINDS)}, but got {kind}")
        made = self.parse_text_to_nodes("\n".join(KINDS[kind]()))
        for node in made:
            for figures in node.findall(nodes.table):
                figures["classes"].append("figures")
        return made


def setup(app: Sphinx) -> dict:
    app.add_directive("results", Results)
    return {"parallel_read_safe": True}
