"""Writes dist/index.html, a list of the wheels beside it that `pip install --find-links dist/index.html` takes.

pip chooses among them by what each requires: a wheel requires the very torch that it was built for. The page works
from a folder and from any web server, and carries each file's hash.
"""

import argparse
import hashlib
import html
from pathlib import Path
from urllib.parse import quote

PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>fusednorm: wheels</title></head>
<body>
<h1>fusednorm: wheels</h1>
<p>Each is for one torch, which its name tells behind <code>+torch</code>, and for Python 3.11 and newer.</p>
<pre>python -m pip install torch==VERSION fusednorm --find-links URL-OF-THIS-PAGE</pre>
<p>For a torch that is not here: <code>python -m pip install --no-build-isolation SOURCES</code> with the source
distribution or a checkout compiles it for the torch that is installed, and needs a C++ compiler.</p>
{links}
</body>
</html>
"""


def link(file):
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return f'<a href="{quote(file.name)}#sha256={digest}">{html.escape(file.name)}</a><br>'


def write(folder):
    """The page's path. Source distributions are left out: pip would compile one rather than say that no wheel fits."""
    wheels = sorted(folder.glob("fusednorm-*.whl"))
    if not wheels:
        raise SystemExit(f"{folder} holds no wheel: make wheel")
    page = folder / "index.html"
    page.write_text(PAGE.format(links="\n".join(map(link, wheels))))
    return page


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=Path("dist"))
    print(f"==> {write(parser.parse_args().folder)}")


if __name__ == "__main__":
    main()
