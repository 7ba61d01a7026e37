"""How the reference is built from the docstrings, without a network; the command is in the README."""

from lightning_softprune import __version__

project = "lightning-softprune"
version = release = __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"  # a single backtick in a docstring is code

html_theme = "alabaster"
html_theme_options = {"description": "Structured pruning inside Lightning training runs", "page_width": "1100px"}
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True}
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 100  # a long signature has a line per argument

nitpicky = True  # a name that leads nowhere is a warning, and with -W an error
nitpick_ignore_regex = [
    ("py:.*", r"(torch|lightning|numpy|collections|pathlib|argparse|jsonargparse)\..*"),  # of other libraries
    ("py:.*", r"(Module|MisconfigurationException|Outcome)"),
    ("py:.*", r"lightning_softprune\.\w+\..*"),  # types of what is inside
    ("py:.*", r"dict\[str|typing\.Literal\[.*"),  # Sphinx cuts annotations at their commas
]
