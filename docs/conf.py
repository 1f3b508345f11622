"""Sphinx builds the pages from here: `sphinx-build -W docs docs/_build`."""

project = "jaxprune"
copyright = "the jaxprune authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build", "extending/example", "results/*.html"]
html_theme = "furo"
html_title = "jaxprune"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # shapes and dtypes stand in the docstrings
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
suppress_warnings = ["toc.not_included"]  # tables of results are linked from the page about them
