"Pages of the site: those that nbdev makes of the notebooks, in the form that Sphinx reads, and those that are made from the code"
import base64, importlib, inspect, json, posixpath, re
from functools import cached_property
from pathlib import Path

from fastcore.docments import docments
import yaml

import pictures

docs = Path(__file__).resolve().parent
root = docs.parent
proc = root/'_proc' # where nbdev leaves its pages

lessons = dict(learn='Learn', method='The method') # folders of notebooks that are no modules; those in no folder belong to the first
reading_order = ( # of lessons; others follow by name
    'folder', 'reading', 'choosing', 'own_code', 'own_pieces', 'going_on', 'gpu',
    'train', 'losses', 'adversaries', 'relations', 'weights', 'threats')


def wings():
    "`{folder: what stands in it}`, from the table in README.md"
    table = (root/'README.md').read_text(encoding='utf-8').partition('| wing |')[2].partition('\n\n')[0]
    rows = re.findall(r'^\| (`.+`) \| (.+) \|$', table, re.M)
    return {name: words for names,words in rows for name in re.findall(r'`(\w+)`', names)}

def markdown(text, **metadata): return dict(cell_type='markdown', metadata=metadata, source=text)
def block(text): return '```{eval-rst}\n' + text + '\n```'
def first_line(o): return (inspect.getdoc(o) or '').split('\n')[0]
def toctree(entries, *options): return '\n'.join(['```{toctree}', ':hidden:', *options, '', *entries, '```'])


class Page:
    "A notebook as nbdev leaves it in `_proc`. `name` is its path without the suffix, and that of its page"
    def __init__(self, file):
        self.source = root/'nbs'/file.relative_to(proc)
        self.name = file.relative_to(proc).with_suffix('').as_posix()
        if self.name == 'index': self.name = 'tour' # the site has a first page of its own
        self.nb = json.loads(file.read_text(encoding='utf-8'))
        front = self.nb['cells'][0]
        self.front = yaml.safe_load(''.join(front['source']).strip().strip('-')) if front['cell_type'] == 'raw' else {}

    @cached_property
    def module(self):
        "Name of the module that the notebook makes, if it makes one"
        source = json.loads(self.source.read_text(encoding='utf-8'))
        code = '\n'.join(''.join(c['source']) for c in source['cells'] if c['cell_type'] == 'code')
        found = re.search(r'^#\|\s*default_exp\s+(\S+)', code, re.M)
        return f'fastrain.{found[1]}' if found else None

    @property
    def folder(self): return self.name.split('/')[0] if '/' in self.name or self.module else 'learn'
    @property
    def title(self): return self.front.get('title', self.name.split('/')[-1])
    @property
    def heading(self):
        if self.name == 'tour': return 'On one page'
        return self.module.removeprefix('fastrain.') if self.module else self.title
    @property
    def subtitle(self): return self.front.get('description', '')
    @cached_property
    def public(self):
        "`{name: object}` of what the module offers"
        if not self.module: return {}
        module = importlib.import_module(self.module)
        return {name: getattr(module, name) for name in getattr(module, '__all__', [])}

    @cached_property
    def introduction(self):
        "What a notebook's first cell holds below title and subtitle, which nbdev leaves out"
        source = json.loads(self.source.read_text(encoding='utf-8'))
        return re.sub(r'\A#\s.*\n*(>.*\n*)*(-\s[\w-]+:.*\n*)*', '', ''.join(source['cells'][0]['source'])).strip()

    def write(self, pages, folder):
        "As a notebook for myst-nb"
        cells = [self._head(pages), *self._body(pages)]
        left = [n for n in self.public if n not in self._shown]
        if left: cells.append(markdown('## Also here\n\n' + block('\n'.join(map(self._data, left)))))
        for i,cell in enumerate(cells): cell['id'] = f'cell-{i}'
        kernel = dict(name='python3', display_name='Python 3', language='python')
        # by default, the cell 100 begins at line 1,000,000 for myst-nb, and reStructuredText in it is padded up to there
        metadata = dict(kernelspec=kernel, source_map=list(range(len(cells))))
        file = folder/f'{self.name}.ipynb'
        file.parent.mkdir(parents=True, exist_ok=True)
        nb = dict(cells=cells, metadata=metadata, nbformat=4, nbformat_minor=5)
        file.write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')

    def _head(self, pages):
        module = block(f'.. py:module:: {self.module}') + '\n\n' if self.module else ''
        lead = f'{{.lead}}\n{self.subtitle}' if self.subtitle else ''
        return markdown(f'# {self.heading}\n\n{module}{lead}\n\n{links(self.introduction, self, pages)}')

    def _body(self, pages):
        cells,self._shown = [],set()
        for cell in self.nb['cells']:
            source = ''.join(cell['source'])
            if cell['cell_type'] == 'raw' or source.startswith('<!-- WARNING'): continue
            if cell['cell_type'] == 'markdown': cells.append(markdown(links(source, self, pages)))
            elif shown := re.search(r'^show_doc\(([\w.]+)', source, re.M): cells.append(self._documented(shown[1]))
            else: cells.append(code(cell, source, lambda text: links(text, self, pages)))
        return by_line(cells)

    def _documented(self, name):
        "What stands for a `show_doc` cell: autodoc's directive"
        o = self._object(name)
        home = self._object(name.split('.')[0]) # methods are where their class is
        full = f'{inspect.unwrap(home).__module__}.{name}'
        kind = 'class' if inspect.isclass(o) else 'property' if isinstance(o, property) else 'method' if '.' in name else 'function'
        options = ['   :members:', '   :exclude-members: ' + ', '.join(self._own_cells(name))] if kind == 'class' else []
        if name in self._shown: options.append('   :no-index:')
        self._shown.add(name)
        return markdown(block('\n'.join([f'.. auto{kind}:: {full}', *options])), line=line_of(o))

    def _object(self, name):
        o = importlib.import_module(self.module)
        for part in name.split('.'): o = inspect.getattr_static(o, part)
        return getattr(o, '__func__', o)

    def _own_cells(self, name):
        "Methods of a class that are documented where they are patched in"
        sources = [''.join(c['source']) for c in self.nb['cells'] if c['cell_type'] == 'code']
        return [m for s in sources for m in re.findall(rf'^show_doc\({name}\.(\w+)', s, re.M)] or ['__init__']

    def _data(self, name):
        "A public name that is neither class nor function, with the comment on its first line; or one that has no cell of its own"
        o = self.public[name]
        if inspect.isclass(o): return f'.. autoclass:: {self.module}.{name}\n'
        if inspect.isfunction(o): return f'.. autofunction:: {self.module}.{name}\n'
        keys = ', '.join(map(str, o)) if isinstance(o, (dict, set)) and len(o) <= 40 else '' # what a registry holds
        words = '. '.join(filter(None, [self.comment(name).rstrip(':'), keys])) or 'A constant of the module'
        return f'.. py:data:: {name}\n\n   {re.sub(r"([*_|`])", chr(92) + chr(92) + "1", words)}\n'

    def comment(self, name):
        "What stands beside a constant"
        said = re.search(rf'^{name}\s*=.*?\s#\s*(.+)$', inspect.getsource(importlib.import_module(self.module)), re.M)
        return said[1] if said else ''

    def summary(self, name):
        "A public name in one line"
        o = self.public[name]
        return first_line(o) if inspect.isclass(o) or inspect.isfunction(o) else self.comment(name) or 'A constant'


def line_of(o):
    try: return inspect.getsourcelines(getattr(o, 'fget', o))[1]
    except (OSError, TypeError): return 0

def by_line(cells):
    "nbdev documents what one cell defines from the last to the first: neighbours in the order of the source"
    result,run = [],[]
    for cell in [*cells, None]:
        if cell and 'line' in cell['metadata']: run.append(cell)
        else:
            result += sorted(run, key=lambda c: c['metadata']['line'])
            run = []
            if cell: result.append(cell)
    for cell in result: cell['metadata'].pop('line', None)
    return result

def code(cell, source, link):
    "A cell of code without nbdev's and Quarto's directives, which become tags; `link` mends the links of a text"
    directives = dict(re.findall(r'^#\|\s*([\w-]+):?\s*(.*)$', source, re.M))
    effects = dict(echo='remove-input', output='remove-output', include='remove-cell')
    tags = [tag for name,tag in effects.items() if directives.get(name) == 'false']
    source = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip()
    outputs = [dict(o, execution_count=None) if o['output_type'] == 'execute_result' else o for o in cell['outputs']]
    metadata = dict(tags=tags)
    if width := next(filter(None, map(picture_width, outputs)), None): metadata['mystnb'] = dict(image=dict(width=f'{width}px'))
    for data in (o['data'] for o in outputs if 'text/markdown' in o.get('data', {})): data['text/markdown'] = link(''.join(data['text/markdown']))
    return dict(cell_type='code', execution_count=None, metadata=metadata, source=source, outputs=outputs)

def picture_width(output):
    "In pixels of the page, so that letters in a figure are about as large as those of the text, and no pixel is blown up"
    data = output.get('data', {})
    said = re.match(r'<Figure size (\d+)x', ''.join(data.get('text/plain', '')))
    if not said or 'image/png' not in data: return None
    there = int.from_bytes(base64.b64decode(data['image/png'][:32])[16:20], 'big') # the width in a PNG's first chunk
    return min(there, round(1.2*int(said[1])))

def links(text, page, pages):
    "nbdev's links to names become references, and those to pages lead to the notebooks of this site"
    here = Path('/'+page.name).parent
    def link(match):
        label,target,anchor = match[1],match[2],match[3] or ''
        name = re.sub(r'^/?(nbs/)?', '', target) if target.startswith(('/', 'nbs/')) else posixpath.normpath(here/target).lstrip('/')
        if name == 'index': name = 'tour'
        if name not in pages: return match[0]
        symbol = label.strip('`')
        if anchor and label.startswith('`') and pages[name].module:
            return f'{{py:obj}}`{symbol} <{pages[name].module}.{symbol}>`'
        return f'[{label}](/{name}.ipynb{anchor})'
    parts = re.split(r'(^```.*?^```)', text, flags=re.M | re.S)
    inside = r'\[([^\]]+)\]\((?!https?:)([\w./-]+)\.(?:html|ipynb)(#[\w.]*)?\)'
    return ''.join(p if i % 2 else re.sub(inside, link, p) for i,p in enumerate(parts))


def read_pages():
    pages = [Page(f) for f in sorted(proc.rglob('*.ipynb')) if '.ipynb_checkpoints' not in f.parts]
    return {p.name: p for p in pages}

def by_folder(pages):
    "`{folder: pages}`: wings from the lowest to the highest, then lessons"
    found = {}
    for p in pages.values(): found.setdefault(p.folder, []).append(p)
    height = pictures.heights(pictures.wing_imports())
    named = list(wings())
    def place(f): return height.get(f, 99), named.index(f) if f in named else 99 # wings of one height as README.md has them
    return {f: found[f] for f in sorted(found, key=place)}

def is_wing(pages): return any(p.module for p in pages)


def reference_pages(pages):
    "`{name: text}` of the pages of reference: by wing, by name, the command line, and the pieces of methods"
    groups = {f: ps for f,ps in by_folder(pages).items() if is_wing(ps)}
    result = {f'{f}/index': wing_page(f, ps) for f,ps in groups.items() if not alone(f, ps)}
    result['reference/index'] = reference_page(groups)
    result['reference/names'] = names_page(groups)
    result['reference/commands'] = commands_page()
    result['reference/pieces'] = pieces_page()
    result['reference/files'] = files_page()
    return result

def alone(folder, pages): return [p.name for p in pages] == [folder]
def entry(folder, pages): return f'{folder} </{folder}>' if alone(folder, pages) else f'{folder} </{folder}/index>'

def wing_page(folder, pages):
    rows = [f'| [{p.title}](/{p.name}.ipynb) | {p.subtitle} |' for p in pages]
    head = [f'# {folder}', '', f'{{.lead}}\n{sentence(folder)}', '', '| module | what it is for |', '| --- | --- |']
    return '\n'.join([*head, *rows, '', toctree([f'{p.title} </{p.name}>' for p in pages])])

def sentence(folder):
    words = wings().get(folder, f'the modules of {folder}')
    return words[:1].upper() + words[1:]

def reference_page(groups):
    cards = []
    for f,ps in groups.items():
        link = f'/{f}' if alone(f, ps) else f'/{f}/index'
        body = sentence(f) if alone(f, ps) else f'{sentence(f)}\n\n*' + ', '.join(p.title for p in ps) + '*'
        cards.append(f':::{{grid-item-card}} {f}\n:link: {link}\n:link-type: doc\n\n{body}\n:::')
    text = (docs/'reference.md').read_text(encoding='utf-8')
    entries = ['names', 'commands', 'pieces', 'files', *(entry(f, ps) for f,ps in groups.items())]
    return text.replace('<!-- wings -->', '::::{grid} 1 1 2 3\n:gutter: 2\n\n' + '\n'.join(cards) + '\n::::') + '\n' + toctree(entries)

def names_page(groups):
    import fastrain.all
    def home(p, name): return '' if hasattr(fastrain.all, name) else f' (in `{p.module}`)'
    lines = ['# All public names', '', 'After `from fastrain.all import *` they are at hand, but for those behind which a module is named. '
             'A name leads to its description.', '']
    for f,ps in groups.items():
        lines += [f'## {f}', '', sentence(f), '', '| name | what it is |', '| --- | --- |']
        lines += [f'| {{py:obj}}`{n} <{p.module}.{n}>` | {cell(p.summary(n))}{home(p, n)} |' for p in ps for n in p.public]
        lines.append('')
    return '\n'.join(lines)

def cell(text): return text.replace('|', '\\|').replace('<', '&lt;').replace('*', '\\*')

def commands_page():
    "Every option of every command, from the parser that answers `--help`"
    from fastrain.cli import _commands, _parser
    lines = ['# Command line', '', 'The options as `fastrain COMMAND --help` shows them, in the same groups.', '']
    for name,parser in {name: _parser(name) for name in _commands}.items():
        lines += [f'## fastrain {name}', '', parser.description, '', f'```sh\n{parser.usage}\n```', '']
        for group in parser._action_groups:
            if options := [option(a) for a in group._group_actions if a.dest != 'help']:
                lines += [f'### {group.title.capitalize()}', '', block('\n'.join([f'.. program:: fastrain {name}', '', *options])), '']
    return '\n'.join(lines)

def option(action):
    words = re.sub(r'([\\*_|<>])', r'\\\1', ' '.join(action.help.split()).replace('%%', '%'))
    words = re.sub(r'`(.+?)`|(--[\w-]+)', lambda m: '``' + re.sub(r'\\(.)', r'\1', m[1] or m[2]) + '``', words)
    names = [*action.option_strings[:1], *([] if action.nargs == 0 else [action.metavar])]
    return f'.. option:: {" ".join(names)}\n\n   {words}\n'

def pieces_page():
    "What methods are made of, from the registries of the package"
    from fastrain.core import Registered
    import fastrain.all
    times = pictures.step_times()
    lines = [(docs/'pieces.md').read_text(encoding='utf-8')]
    for family in Registered.__subclasses__():
        pieces = {k: c for k,c in family.registry.items() if c.__module__.startswith('fastrain.')}
        if not pieces or not any(getattr(c, 'paper', '') for c in pieces.values()): continue
        title = re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', family.__name__).capitalize() # RobustLoss → Robust loss
        lines += [f'## {title}', '', first_line(family), '', '| name | what it does | source | time |', '| --- | --- | --- | --: |']
        for key,c in pieces.items():
            guess = f' *Approximate: {cell(c.approximate)}.*' if getattr(c, 'approximate', '') else ''
            name = f'{{py:obj}}`{key} <{c.__module__}.{c.__qualname__}>`'
            lines.append(f'| {name} | {cell(first_line(c))}.{guess} | {cell(c.paper)} | {times.get(key, "")} |')
        lines.append('')
    return '\n'.join(lines)

def files_page():
    "What is in the files that are written, with the fields of two classes"
    from fastrain.cli import train
    from fastrain.evaluation.record import Row
    from fastrain.runs.recipe import Recipe
    options = {n: re.sub(r' \(default.*\)$', '', text) for n,text in docments(train).items() if text}
    more = dict(mom='Momentum of SGD', small_images='Stem for small images; null: by their size', high='See `low`')
    tables = {'<!-- recipe -->': fields_table(Recipe, options | more), '<!-- row -->': fields_table(Row, more)}
    text = (docs/'files.md').read_text(encoding='utf-8')
    for mark,table in tables.items(): text = text.replace(mark, table)
    return text

def fields_table(c, more):
    "Fields of a dataclass with the comments beside them, or `more` for those without"
    types = dict(str='text', int='number', float='number', bool='true or false', tuple='list of numbers')
    rows = ['| field | type | what it is |', '| --- | --- | --- |']
    for name,a in docments(c, full=True).items():
        words = (a['docment'] or more.get(name, '')).replace('None', 'null')
        if name != 'return': rows.append(f'| `{name}` | {types[a["anno"].__name__]} | {cell(words)} |')
    return '\n'.join(rows)


def lesson_pages(pages):
    "`{name: text}`: the first page, the lists of lessons, and the pages that are written by hand"
    groups = {f: [p for p in ps if p.name not in ('tour', 'results')] for f,ps in by_folder(pages).items() if not is_wing(ps)}
    result = {f.stem: f.read_text(encoding='utf-8') for f in docs.glob('*.md') if f.stem not in ('reference', 'pieces', 'files', *lessons)}
    for folder,title in lessons.items():
        if groups.get(folder) or folder == 'learn': result[f'{folder}/index'] = lesson_list(folder, title, groups.get(folder, []))
    sections = [f'{title} </{f}/index>' for f,title in lessons.items() if f'{f}/index' in result]
    entries = [*sections, 'Reference </reference/index>', 'Results </results>', 'Questions </questions>', 'Contribute </contribute>']
    for mark,text in pictures.tradeoff_texts().items(): result['index'] = result['index'].replace(mark, text)
    for mark,text in pictures.costs().items(): result['questions'] = result['questions'].replace(mark, text)
    result['index'] += '\n' + toctree(entries)
    return result

def lesson_list(folder, title, pages):
    pages = sorted(pages, key=lambda p: [*reading_order, p.name.split('/')[-1]].index(p.name.split('/')[-1]))
    first = ['| [On one page](/tour.ipynb) | What it does, in Python and in the shell |'] if folder == 'learn' else []
    rows = [f'| [{p.title}](/{p.name}.ipynb) | {p.subtitle} |' for p in pages]
    names = [*(['On one page </tour>'] if first else []), *(f'{p.title} </{p.name}>' for p in pages)]
    about = docs/f'{folder}.md' # what stands above the list
    head = about.read_text(encoding='utf-8') if about.is_file() else f'# {title}\n'
    return '\n'.join([head, '| page | what it is about |', '| --- | --- |', *first, *rows, '', toctree(names)])
