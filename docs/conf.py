"""Sphinx: `sphinx-build -W docs docs/_build` after `pip install -e ".[docs]"`."""

import pathlib
import re
import runpy

import jaxcert

project = "jaxcert"
author = "The jaxcert authors"
release = jaxcert.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
# The table of rules on the page on bounds, from the rules themselves.
_coverage = runpy.run_path(str(pathlib.Path(__file__).with_name("coverage.py")))
myst_enable_extensions = ["substitution"]
myst_substitutions = {"coverage": _coverage["table"](), "legend": _coverage["LEGEND"]}
del _coverage
suppress_warnings = ["myst.xref_missing"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
default_role = "code"


def setup(app):
    """Docstrings are plain text with formulas: stars and bars in them are no markup."""
    app.connect("autodoc-process-docstring", _escape, priority=400)


def _escape(app, what, name, obj, options, lines):
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = re.sub(r"(`[^`]*`)|([*|])", lambda m: m[1] or "\\" + m[2], line)
