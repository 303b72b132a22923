"""Settings of the site (Sphinx), which .site/build.py makes of the pages of the repository."""

from bgen.version import __version__

project, author, release = "bgen", "The bgen authors", __version__
project_copyright = "The bgen authors; Apache-2.0"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "sphinx_book_theme", "bgen"
myst_heading_anchors = 4  # links to a heading, as repositories show them
myst_enable_extensions = ["dollarmath"]
nb_execution_mode = "off"  # notebooks are kept with their outputs, which a test makes again
autodoc_typehints = "none"  # the signature has them
autodoc_member_order = "bysource"
napoleon_google_docstring = False
suppress_warnings = ["misc.highlighting_failure"]  # cells of the tutorial that are shell commands
exclude_patterns = ["_build"]
