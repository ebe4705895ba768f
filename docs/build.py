"""Builds the site: `pip install -e '.[docs]' && python docs/build.py`. It is then in docs/_build/html"""
import argparse, ast, json, os, re, shutil, subprocess, sys, time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

os.environ.setdefault('MPLBACKEND', 'agg')
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import pages, pictures

build = pages.docs/'_build'
source,site = build/'source',build/'html'


def run_nbdev(workers):
    "Process all notebooks as `nbdev-proc-nbs` does, without its attempt to install Quarto"
    from nbdev.serve import proc_nbs
    os.chdir(pages.root)
    proc_nbs(n_workers=workers)

def write_sources():
    "Everything that Sphinx reads"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir(parents=True)
    found = pages.read_pages()
    for page in found.values(): page.write(found, source)
    for name,text in {**pages.reference_pages(found), **pages.lesson_pages(found)}.items():
        file = source/f'{name}.md'
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + '\n', encoding='utf-8')
    pictures.draw_all(source/'pictures')
    return found

def run_sphinx(workers):
    command = [sys.executable, '-m', 'sphinx', '-b', 'html', '-W', '--keep-going', '-q', '-j', str(workers)]
    if subprocess.run([*command, '-c', str(pages.docs), '-d', str(build/'doctrees'), str(source), str(site)]).returncode:
        sys.exit('Sphinx has something to say, see above')


class Anchors(HTMLParser):
    "The links of a page, and what can be linked to on it"
    def __init__(self, file):
        super().__init__()
        self.links,self.ids = [],set()
        self.feed(file.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs.get('id'), attrs.get('name')}
        self.links += [attrs[k] for k in ('href', 'src') if attrs.get(k)]

def dead_links():
    "Links inside the site that lead nowhere"
    found = {f: Anchors(f) for f in site.rglob('*.html') if '_static' not in f.parts}
    return [f'{f.relative_to(site)}: {link}' for f,page in found.items() for link in page.links if not alive(f, link, found)]

def alive(file, link, found):
    parts = urlsplit(link)
    if parts.scheme or parts.netloc: return True
    target = (file.parent/unquote(parts.path)).resolve() if parts.path else file
    if target.is_dir(): target /= 'index.html'
    return target.is_file() and (not parts.fragment or target not in found or unquote(parts.fragment) in found[target].ids)

def unnamed(found):
    "Public names that no page describes, and those that the search does not find"
    from sphinx.util.inventory import InventoryFile
    import posixpath
    with open(site/'objects.inv', 'rb') as f: inventory = InventoryFile.load(f, '', posixpath.join)
    described = {name for kind,names in inventory.items() if kind.startswith('py:') for name in names}
    public = [f'{p.module}.{n}' for p in found.values() for n in p.public]
    return sorted(set(public) - described), sorted(set(public) - searchable())

def searchable():
    "Full names that the search finds"
    text = (site/'searchindex.js').read_text(encoding='utf-8')
    objects = json.loads(text.removeprefix('Search.setIndex(').removesuffix(')'))['objects']
    return {'.'.join(filter(None, [prefix, entry[4]])) for prefix,entries in objects.items() for entry in entries}


def stale_messages():
    "Messages on the page of questions that the code does not have; `…` there stands for any value"
    shown = re.findall(r':class: message\n(.*?)\n```', (pages.docs/'questions.md').read_text(encoding='utf-8'), re.S)
    modules = (pages.root/'fastrain').rglob('*.py')
    known = ['\n'.join(texts(ast.parse(f.read_text(encoding='utf-8')))) for f in modules] # a message may be put together from several
    parts = {s: [p.strip() for p in s.split('…') if len(p.strip()) > 5] for s in shown}
    return [s for s,ps in parts.items() if not any(all(p in t for p in ps) for t in known)]

def texts(tree):
    "Strings of a module, with `…` for each value that is filled in"
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr): yield ''.join(v.value if isinstance(v, ast.Constant) else '…' for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str): yield node.value


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--workers', type=int, default=os.cpu_count(), help='Processes')
    parser.add_argument('--fresh', action='store_true', help='Forget what earlier calls have made')
    args = parser.parse_args()
    if args.fresh: [shutil.rmtree(f, ignore_errors=True) for f in (build, pages.proc)]
    began = time.time()
    def say(text): print(f'{time.time() - began:5.0f} s  {text}', flush=True)
    say('notebooks by nbdev')
    run_nbdev(args.workers)
    say('pages')
    found = write_sources()
    say('Sphinx')
    run_sphinx(args.workers)
    undescribed,unfound = unnamed(found)
    wrong = [f'dead link in {o}' for o in dead_links()]
    wrong += [f'no page describes {o}' for o in undescribed] + [f'the search does not find {o}' for o in unfound]
    wrong += [f'docs/questions.md shows a message that the code does not have: {o}' for o in stale_messages()]
    if wrong: sys.exit('\n'.join(wrong))
    say(f'{len(list(site.rglob("*.html")))} pages in {site.relative_to(pages.root)}: no warning, no dead link, every public name described')

if __name__ == '__main__': main()
