"""`{worked}`: a block of Python that runs while the site is built, with what it printed below it.

The blocks of a page share their names. One that raises fails the build.
"""

from __future__ import annotations

import contextlib
import io

import torch
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Worked(SphinxDirective):
    has_content = True

    def run(self):
        names = self.env.temp_data.setdefault("worked", {"__name__": self.env.docname})
        source, printed = "\n".join(self.content), io.StringIO()
        if len(names) == 1:  # the page's first
            torch.manual_seed(0)
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(source, self.env.docname, "exec"), names)
        except Exception as error:
            raise self.error(f"worked: {type(error).__name__}: {error}") from error
        shown = [nodes.literal_block(source, source, language="python")]
        if text := printed.getvalue().rstrip():
            shown.append(nodes.literal_block(text, text, language="text", classes=["printed"]))
        return shown


def setup(app: Sphinx) -> dict:
    app.add_directive("worked", Worked)
    return {"parallel_read_safe": True}
