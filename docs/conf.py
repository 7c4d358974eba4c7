"""Configuration of the site; build it with `make docs`, or `sphinx-build -W --keep-going -n -aE docs build/docs`."""

from __future__ import annotations

import pkgutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from docutils.nodes import Element, Node
from docutils.parsers.rst import directives
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.nodes import make_refnode

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE / "_ext"))

import probattn  # noqa: E402  # after the path, as the extensions are

project = "probattn"
author = "The probattn developers"
project_copyright = "The probattn developers"
version = release = probattn.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "formulas",
    "ledger",
    "machine_index",
]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
nitpicky = True
templates_path: list[str] = []

# Pages. Notebooks are shown with their committed outputs and not executed again.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 4
myst_dmath_double_inline = True
# A short name in a signature may belong to two classes; the link then leads to the first of them.
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]

# Reference. Names of other libraries are not looked up, since that would need their sites.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100
_FOREIGN = (
    "torch|pyro|numpy|np|scipy|matplotlib|xarray|transformers|cyclopts|collections|logging|pathlib|types|typing|"
    "threading|http"
)
# Short names of other libraries, and aliases whose values are documented where they are used.
_SHORT = (
    "Tensor|Module|NDArray|Figure|Axes|DataTree|Dataset|Path|Any|Callable|Mapping|Sequence|Literal|Array|Form|Selection|"
    "Describe|Seed|Control|Kind|Map|Tables"
)
# Type variables have no entry of their own.
_VARIABLES = (
    r"probattn\.(cli\.command\.Options|inference\.runtime\.checkpoint\.State|inference\.runtime\.lock\.Result|numerics\.precision\.Method|"
    r"hf\.layers\.sublayer\._Tuple|hf\.layers\.volume\._Result)"
)
nitpick_ignore_regex = [("py:.*", rf"({_FOREIGN}|nn|dist|constraints)\..*"), ("py:.*", _SHORT), ("py:.*", _VARIABLES)]

html_theme = "furo"
html_title = f"probattn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "katex"
html_show_sourcelink = False
html_copy_source = False
html_theme_options: dict[str, Any] = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"
# Internal links and anchors are checked by every build; the few external ones by `sphinx-build -b linkcheck`.
linkcheck_anchors = False


def name_factories(app: Sphinx, what: str, name: str, obj: object, options: object, *signature: Any) -> Any:
    """Write ``...`` for a default that a factory makes, so that the signature remains readable as Python."""
    return tuple(part.replace("<factory>", "...") if part else part for part in signature)


def keep_first_colon(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Begin the documentation of a constant or a property with an empty comment.

    Napoleon would take what stands before a colon in the first line for a type.
    """
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]


def skip_fields(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """Omit the fields of a named tuple, which its docstring describes."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def find_by_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """Resolve an exported name, such as ``probattn.regime``, or a short one, such as ``Fit``, if one object fits."""
    if node.get("refdomain") != "py":
        return None
    wanted = node["reftarget"]
    with suppress(ImportError, AttributeError, ValueError):
        exported = pkgutil.resolve_name(wanted)
        wanted = f"{exported.__module__}.{exported.__qualname__}"
    objects = (entry for entry in env.get_domain("py").get_objects() if entry[2] != "module")
    found = {entry[3:5]: entry for entry in objects if f".{entry[0]}".endswith(f".{wanted}")}
    if len(found) != 1:
        return None
    ((_, _, _, page, anchor, _),) = found.values()
    return make_refnode(app.builder, node["refdoc"], page, anchor, content, wanted)


class ReferenceDirective(SphinxDirective):
    """Sections of the reference, one per module: ``{reference} probattn.solve`` documents the whole package.

    Each argument is a module or a package, which stands for all modules in it; a new file needs no new line.
    """

    required_arguments = 1
    optional_arguments = 20
    option_spec = {"show-inheritance": directives.flag}  # noqa: RUF012  # as docutils declares it

    def run(self) -> list[Node]:
        """Write a heading and an ``automodule`` for each module, as Markdown, and read that."""
        lines = []
        for name in self.arguments:
            for module in modules_under(name):
                packaged = hasattr(sys.modules[module], "__path__")  # its names are documented where they are defined
                options = [] if packaged else ["   :members:"]
                options += ["   :show-inheritance:"] if "show-inheritance" in self.options and not packaged else []
                lines += [f"## {module}", "", "```{eval-rst}", f".. automodule:: {module}", *options, "```", ""]
        return self.parse_text_to_nodes("\n".join(lines), allow_section_headings=True)


def modules_under(name: str) -> list[str]:
    """List a module, or a package and every public module in it.

    Args:
        name: full name of either.

    Returns:
        Full names, a package before its modules, those in alphabetical order.
    """
    package = pkgutil.resolve_name(name)
    found = [name]
    if hasattr(package, "__path__"):
        found += [module.name for module in pkgutil.walk_packages(package.__path__, f"{name}.")]
    public = [module for module in found if not any(part.startswith("_") for part in module.split("."))]
    for module in public:
        __import__(module)
    return public


def copy_notebooks(app: Sphinx) -> None:
    """Copy ``notebooks/`` into ``docs/``, where Sphinx finds them, and adapt their links to ``../docs/``."""
    target = HERE / "notebooks"
    found = {path.name: path for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    for stale in target.glob("*.ipynb"):
        if stale.name not in found:
            stale.unlink()
    for name, path in found.items():
        text = path.read_text(encoding="utf-8").replace("](../docs/", "](../")
        copy = target / name
        if not copy.exists() or copy.read_text(encoding="utf-8") != text:
            copy.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> None:
    """Register the directive and the handlers."""
    app.add_directive("reference", ReferenceDirective)
    app.connect("autodoc-process-docstring", keep_first_colon, priority=400)  # before Napoleon
    app.connect("autodoc-process-signature", name_factories)
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("missing-reference", find_by_short_name)
    app.connect("builder-inited", copy_notebooks)
