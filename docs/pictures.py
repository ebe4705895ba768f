"Pictures of the site that no notebook holds, made from the records in bench/results and from the modules"
import ast, json, textwrap
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib
import matplotlib.pyplot as plt

root = Path(__file__).resolve().parent.parent
names = dict(at='AT', trades='TRADES', mart='MART')
names['trades+lbgat'] = 'TRADES + LBGAT'
inks = dict(light='#222832', dark='#ced6dd') # of the theme's text
base_colour,train_colour = '#8a94a0','#e4572e'


def load(name): return json.loads((root/'bench'/'results'/f'{name}.json').read_text(encoding='utf-8'))

def figure(record, name):
    "In %, of the last epoch; records of 0.1 have their figures one level higher"
    last = record['last']
    return 100*last.get('figures', last)[name]

def tradeoff_points(data):
    "`{base: ((natural, PGD-20) without TRAIN, with TRAIN)}`, means over the seeds"
    found = defaultdict(list)
    for r in data['records']:
        if r['part'] == 'main': found[r['method']].append(r)
    point = lambda method: tuple(mean(figure(r, n) for r in found[method]) for n in ('natural', 'pgd20'))
    return {base: (point(base), point(f'{base}+train')) for base in names}

def draw_tradeoff(ink):
    fig,ax = plt.subplots(figsize=(5, 2.9), layout='constrained')
    points = tradeoff_points(load('cifar'))
    for base,(plain,train) in points.items():
        ax.annotate('', train, plain, arrowprops=dict(arrowstyle='-|>', color=train_colour, lw=1.8, shrinkA=5, shrinkB=5))
        ax.plot(*plain, 'o', color=base_colour, ms=8)
        ax.plot(*train, 'o', color=train_colour, ms=8)
        # is there another arrow where the name would be?
        below = any(a[0] <= plain[0] <= b[0] and 0 < a[1] - plain[1] < 1.5 for a,b in points.values())
        ax.annotate(names[base], plain, (0, -15 if below else 8), textcoords='offset points', ha='center', color=ink, fontsize=9)
    ax.plot([], [], 'o', color=base_colour, label='without TRAIN')
    ax.plot([], [], 'o', color=train_colour, label='with TRAIN')
    ax.legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=2, frameon=False, labelcolor=ink, borderaxespad=0, handletextpad=.2)
    ax.margins(.2, .4)
    ax.set_aspect('equal') # a point of one accuracy is as long as a point of the other
    ax.set_xlabel('accuracy on natural images, %', color=ink)
    ax.set_ylabel('accuracy under PGD-20, %', color=ink)
    return fig, ax

def tradeoff_texts():
    "Picture and table for the first page, with what they were measured on"
    data = load('cifar')
    recipe = data['recipe']
    seeds = sorted({r['seed'] for r in data['records'] if r['part'] == 'main'})
    n = data['records'][0]['last']['n']
    rows = [f'| {names[b]} | {p[0]:.1f} | {t[0]:.1f} | {p[1]:.1f} | {t[1]:.1f} |' for b,(p, t) in tradeoff_points(data).items()]
    caption = (
        f'{recipe["data"]}, {recipe["n_train"]:,} training and {n:,} test images, '
        f'ε = {255*recipe["eps"]:.0f}/255, a small ResNet-10, {recipe["epochs"]} epochs, {recipe["warmup"]} more for the standard model, '
        f'means over {len(seeds)} seeds. Measured by `bench/cifar.py`. Network, data and training are far smaller than the paper\'s: '
        'see [Results](/results.ipynb).')
    alt = 'Accuracy under attack over accuracy on natural images: with TRAIN each method stands further to the right'
    images = [f'![{alt}](/pictures/tradeoff-{k}.svg){{.only-{k} .wide}}' for k in inks]
    table = ['| accuracy in % | natural | natural with TRAIN | PGD-20 | PGD-20 with TRAIN |', '| --- | --: | --: | --: | --: |', *rows]
    return {'<!-- tradeoff -->': '\n'.join([*images, '', '{.caption}', caption]),
            '<!-- tradeoff in figures -->': '\n'.join([':::{dropdown} The picture in figures', *table, ':::'])}

def step_times():
    "`{piece: time of a training step with it, AT alone being 1}`"
    times = {r['method']: r['ratio'] for r in load('methods')['rows']}
    return {name.removeprefix('at+'): f'{t:.2f}' for name,t in times.items() if '+' not in name.removeprefix('at+')}

def costs():
    "What an attack and TRAIN cost, for the page of questions"
    methods,step = load('methods'),load('step')
    plain = next(r['ratio'] for r in methods['rows'] if r['method'] == 'standard')
    train = next(t['ratio'] for t in step['targets'] if t['target'] == 'at+train / at')
    return {
        '<!-- cost of an attack -->': f': with {methods["settings"]["steps"]} steps a batch takes {1/plain:.1f} times as long as in '
            'standard training (`bench/results/methods.json`)',
        '<!-- cost of TRAIN -->': f', which takes {100*(train - 1):.0f} % more time than AT alone where both are a ResNet-18 '
            '(`bench/results/step.json`)'}


def wing_imports():
    "`{wing: wings that it imports}`"
    found = defaultdict(set)
    for f in (root/'fastrain').rglob('*.py'):
        parts = f.relative_to(root/'fastrain').with_suffix('').parts
        if parts[-1] in ('_modidx', 'all', '__init__'): continue
        nodes = ast.walk(ast.parse(f.read_text(encoding='utf-8')))
        found[parts[0]] |= {target for node in nodes for target in imported(node, parts)} - {parts[0], '__version__'}
    return dict(found)

def imported(node, parts):
    "First folders below `fastrain` that an import in the module `parts` names"
    if isinstance(node, ast.ImportFrom) and node.level:
        above = parts[:len(parts) - node.level]
        yield (*above, *(node.module or '').split('.'))[0] or (node.names[0].name)
    elif isinstance(node, ast.ImportFrom) and (node.module or '').startswith('fastrain.'): yield node.module.split('.')[1]

def heights(uses):
    "Each wing one storey above the highest that it stands on"
    level = {}
    def height(wing, below=()):
        if wing in below: return 0 # two wings that import each other
        if wing not in level: level[wing] = 1 + max((height(w, (*below, wing)) for w in uses.get(wing, ())), default=-1)
        return level[wing]
    for wing in sorted(uses): height(wing)
    return level

def draw_house(ink):
    uses = wing_imports()
    level = heights(uses)
    rows = defaultdict(list)
    for wing,h in sorted(level.items()): rows[h].append(wing)
    fig,ax = plt.subplots(figsize=(5, .6*len(rows)), layout='constrained')
    for h,row in rows.items():
        width = 12/len(row)
        for i,wing in enumerate(row):
            ax.add_patch(plt.Rectangle((i*width + .1, h + .08), width - .2, .84, facecolor='#2f6690', edgecolor='none'))
            ax.text((i + .5)*width, h + .68, wing, ha='center', va='center', color='white', fontsize=11, weight='bold')
            below = sorted(uses.get(wing, ()), key=lambda w: (level[w], w))
            words = textwrap.fill('on ' + ', '.join(below) if below else 'on nothing else', int(7*width))
            ax.text((i + .5)*width, h + .32, words, ha='center', va='center', color='white', fontsize=7.5, linespacing=.95)
    ax.set(xlim=(0, 12), ylim=(0, len(rows)))
    ax.set_axis_off()
    return fig, ax


def draw_all(folder):
    "Each picture on paper and on the dark page"
    folder.mkdir(parents=True, exist_ok=True)
    matplotlib.rcParams['svg.hashsalt'] = 'fastrain' # the same file from the same records
    for name,draw in dict(tradeoff=draw_tradeoff, house=draw_house).items():
        for mode,ink in inks.items():
            fig,ax = draw(ink)
            ax.tick_params(colors=ink)
            for side in ('top', 'right'): ax.spines[side].set_visible(False)
            for side in ('bottom', 'left'): ax.spines[side].set_color(ink)
            fig.savefig(folder/f'{name}-{mode}.svg', transparent=True, metadata=dict(Date=None))
            plt.close(fig)
