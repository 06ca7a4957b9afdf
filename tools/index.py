"""Writes dist/index.html, a list of the packages beside it that `pip install --find-links dist/index.html` takes.

pip chooses among them by what each requires: a wheel requires the very torch that it was built for. For a torch that
has none the source distribution is left, if it is there: pip compiles it, or ends with what it takes to do so. The page
works from a folder and from any web server, and carries each file's hash.
"""

import argparse
import hashlib
import html
from pathlib import Path
from urllib.parse import quote

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>fusednorm: packages</title></head>
<body>
<h1>fusednorm: packages</h1>
<p>A wheel is for one torch, which its name tells behind <code>+torch</code>, and for Python 3.11 and newer.</p>
<pre>python -m pip install --find-links URL-OF-THIS-PAGE torch==VERSION fusednorm</pre>
<p>For another torch, once that is installed, this compiles the source distribution; it needs a C++ compiler.</p>
<pre>python -m pip install --find-links URL-OF-THIS-PAGE \\
    --no-build-isolation --no-deps --no-binary=fusednorm fusednorm</pre>
{links}
</body>
</html>
"""


def link(file):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f'<a href="{quote(file.name)}#sha256={digest}">{html.escape(file.name)}</a><br>'


def write(folder):
    """The page's path."""
    packages = sorted([*folder.glob("fusednorm-*.whl"), *folder.glob("fusednorm-*.tar.gz")])
    if not packages:
        raise SystemExit(f"{folder} holds no package: make wheel sdist")
    page = folder / "index.html"
    page.write_text(PAGE.format(links="\n".join(map(link, packages))))
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("dist"))
    print(f"==> {write(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
