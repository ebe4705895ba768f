"Sphinx settings of the site. `python docs/build.py` writes the pages that this file renders"
import importlib.util, re, sys
from pathlib import Path

from fastcore.docments import docments, empty

here = Path(__file__).resolve().parent
sys.path.insert(0, str(here.parent))
import fastrain
from fastrain.runs.report import sort_tables

project = 'fastrain'
author = 'The fastrain developers'
copyright = f'{author}. Apache-2.0'
version = release = fastrain.__version__

extensions = [
    'myst_nb', 'sphinx_design', 'sphinx_copybutton', # notebooks, cards and tabs, a button that copies code
    'sphinx.ext.autodoc', 'sphinx.ext.viewcode', # public names from the modules, with links to their source
    'sphinx.ext.mathjax', # formulas
]
nb_execution_mode = 'off' # outputs are those that the notebooks hold; `nbdev-test` checks them
nb_merge_streams = True
highlight_language = 'none' # of blocks that name no language: what is printed is not Python
nb_render_markdown_format = 'myst' # tables among the outputs, which plain CommonMark has not
myst_enable_extensions = ['dollarmath', 'amsmath', 'attrs_inline', 'attrs_block', 'colon_fence', 'deflist', 'fieldlist']
myst_heading_anchors = 4
myst_links_external_new_tab = False
copybutton_exclude = '.linenos, .gp, .go'
templates_path = []
exclude_patterns = [f'mathjax/{name}' for name in ('sre', '*-svg*', 'mml-*', '*-full*', 'node-main.js', 'output/svg*')] # not used

html_context = dict(default_mode='auto') # light or dark, as the reader's system is
html_theme = 'pydata_sphinx_theme'
html_title = f'fastrain {version}'
# a package that holds MathJax, so that formulas need no network
mathjax = Path(importlib.util.find_spec('sphinx-mathjax-offline').origin).parent/'static'
mathjax_path = 'mathjax/tex-chtml.js'
html_static_path = [str(here/'static'), str(mathjax)]
html_css_files = ['site.css']
html_favicon = html_logo = str(here/'static'/'logo.svg')
html_copy_source = html_show_sourcelink = False
html_sidebars = {page: [] for page in ('index', 'results', 'questions', 'contribute', 'search', 'genindex', 'py-modindex')}
html_theme_options = dict(
    logo=dict(text='fastrain', alt_text='fastrain, to the first page'),
    navbar_start=['navbar-logo', 'site_version'], header_links_before_dropdown=7, show_nav_level=2, navigation_depth=4,
    navigation_with_keys=False, show_prev_next=True, secondary_sidebar_items=['page-toc'], use_edit_page_button=False,
    footer_start=['copyright'], footer_center=[], footer_end=['sphinx-version'],
    pygments_light_style='a11y-high-contrast-light', pygments_dark_style='a11y-high-contrast-dark',
)
templates_path = [str(here/'templates')]

autodoc_member_order = 'bysource'
autodoc_preserve_defaults = True # `8/255` as it is written, not 0.0313...
autodoc_typehints = 'none' # types stand beside the arguments
autodoc_class_signature = 'mixed'
autodoc_default_options = dict(members=False)
add_module_names = False
python_use_unqualified_type_names = True
maximum_signature_line_length = 90
toc_object_entries_show_parents = 'hide'
default_role = 'code'
smartquotes_action = 'D' # only dashes: quotes are Python's more often than not

def _known():
    "`{name: full name}` of what the notebooks document, for names that are not ambiguous"
    from fastrain._modidx import d
    found = {}
    for module,symbols in d['syms'].items():
        if module == 'fastrain.cli': continue # its commands are named like the functions behind them
        for full in symbols: found.setdefault(full.removeprefix(module + '.'), []).append(full)
    return {name: full[0] for name,full in found.items() if len(full) == 1}
known = _known()

def rst(text):
    "Docstrings and comments on arguments are Markdown; autodoc reads reStructuredText"
    parts = re.split(r'(`[^`]+`|\$[^$]+\$)', text)
    return ''.join(_literal(p) if i % 2 else re.sub(r'([\\*_|<>`])', r'\\\1', p) for i,p in enumerate(parts))

def _literal(part):
    content = part[1:-1].strip()
    if part[0] == '$': return rf'\ :math:`{content}`\ '
    if content in known: return rf'\ :py:obj:`{content} <{known[content]}>`\ '
    return rf'\ ``{content}``\ '

def _type_name(annotation):
    if annotation in (None, empty, type(None)): return ''
    name = annotation if isinstance(annotation, str) else getattr(annotation, '__name__', '')
    return name if re.fullmatch(r'[A-Za-z_]+', name) and name not in ('DefaultValue', 'builtin_function_or_method') else ''

def with_arguments(app, what, name, obj, options, lines):
    "Under a docstring: the comments that stand beside the arguments in the source (fastcore's docments)"
    lines[:] = [rst(line) for line in lines]
    if not callable(obj) or what in ('data', 'attribute', 'property'): return
    try: arguments = docments(obj, full=True)
    except (TypeError, ValueError): return
    result = arguments.pop('return', None)
    fields = [f':param {_type_name(a["anno"])} {n}: {rst(" ".join(a["docment"].split()))}' for n,a in arguments.items() if a['docment']]
    if result and result['docment']: fields.append(f':returns: {rst(" ".join(result["docment"].split()))}')
    if fields: lines += ['', *fields, '']

def setup(app):
    app.connect('autodoc-process-docstring', with_arguments)
    app.add_js_file(None, body=sort_tables) # as in the reports of runs
