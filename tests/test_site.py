"The documentation's own claims, and the distributions"
import json, re
from dataclasses import fields
from pathlib import Path

import pytest

import fastrain

root = Path(__file__).resolve().parent.parent


def test_one_version():
    assert f'version: {fastrain.__version__}\n' in (root/'CITATION.cff').read_text(encoding='utf-8')
    assert f'## {fastrain.__version__}' in (root/'CHANGELOG.md').read_text(encoding='utf-8')

def test_readme_says_what_is_in_each_wing():
    table = (root/'README.md').read_text(encoding='utf-8').partition('| wing |')[2].partition('\n\n')[0]
    wings = {f.parent.name for f in (root/'fastrain').glob('*/*.py') if f.name != '__init__.py'}
    assert wings <= set(re.findall(r'^\| `(\w+)` \|', table, re.M))

def test_pages_of_the_site_are_in_the_sdist():
    endings = set(re.findall(r'\*(\.\w+)', re.search(r'recursive-include docs (.*)', (root/'MANIFEST.in').read_text())[1]))
    kept = [f for f in (root/'docs').rglob('*') if f.is_file() and '_build' not in f.parts and '__pycache__' not in f.parts]
    assert {f.suffix for f in kept} <= endings

@pytest.mark.slow
def test_page_of_files_names_all_that_is_written(tmp_path):
    from fastrain.core import load_tensors
    from fastrain.evaluation.record import Row
    from fastrain.runs.compare import compare_runs
    from fastrain.runs.evaluate import evaluate_run
    from fastrain.runs.recipe import Recipe, make_recipe
    from fastrain.runs.train import train_run
    run,compared = tmp_path/'run',tmp_path/'compared'
    recipe = make_recipe('digits', epochs=1, steps=1, warmup=1, n_train=48, n_test=20, bs=16)
    train_run(run, recipe, ('standard', 'at+train+ema'), attacks=('natural', 'pgd1'), command='fastrain train')
    evaluate_run(run, 'natural,pgd1+cw1,topology', images=True, n_support=20, pictures='all')
    evaluate_run(run, 'natural', methods=['standard'], n=10)
    compare_runs([run], compared)
    text = (root/'docs'/'files.md').read_text(encoding='utf-8')
    sections = dict(re.findall(r'^## (.+?)\n(.*?)(?=^## |\Z)', text, re.M | re.S))
    def named(title): return set(re.findall(r'`([^`]+)`', sections[title]))
    def first_column(title):
        entries = re.findall(r'^\| (`.*?) \|', sections[title], re.M)
        return {n for entry in entries for n in re.findall(r'`([^`]+)`', entry)}

    parts = 'parts/MODEL-ATTACK-SETTINGS/NUMBER-IMAGES.pt'
    for f in (f.relative_to(run) for f in run.rglob('*') if f.is_file()):
        if f.parts[0] == 'evaluation':
            inside = '/'.join(f.parts[2:])
            inside = parts if inside.startswith('parts/') else re.sub(r'-balanced-[\w-]+', '-SUBSET', inside)
            assert inside in named('The folder of an evaluation'), f
        else: assert re.sub(r'checkpoints/.+/', 'checkpoints/METHOD/', f.as_posix()) in named('The folder of a run'), f
    assert {f.name for f in compared.iterdir()} <= named('The folder of a comparison')

    settings = json.loads((run/'settings.json').read_text())
    assert set(settings) == first_column('settings.json')
    assert set(settings['recipe']) == {f.name for f in fields(Recipe)} # which the page lists
    several = [r for name in ('results', 'evaluation') for r in json.loads((run/f'{name}.json').read_text())]
    assert set().union(*several) == first_column('results.json and evaluation.json')
    records = [r[which] for r in several for which in ('last', 'best', 'average') if which in r]
    records += [json.loads(f.read_text()) for f in (run/'evaluation').glob('*/evaluation*.json')]
    assert set().union(*records) == first_column('A record')
    assert {r['version'] for r in records} == {2} and 'This is version 2.' in sections['A record']
    assert set().union(*(r['settings'] for r in records)) <= named('A record')
    assert {k for r in records for row in r['rows'] for k in row} == {f.name for f in fields(Row)}
    columns = set((run/'history.csv').read_text().split('\n')[0].split(','))
    assert columns <= first_column('history.csv')
    states = [load_tensors(f) for f in run.glob('checkpoints/**/*.pt')]
    assert set().union(*states) == first_column('Checkpoints')
    assert {s['version'] for s in states if 'version' in s} == {2}
    kept = [load_tensors(f) for f in run.glob('evaluation/*/parts/*/*.pt')]
    assert set().union(*kept) == {n for n in first_column('The folder of an evaluation') if re.fullmatch(r'\w+', n)}

@pytest.mark.slow
def test_first_page_runs():
    block = re.search(r'```python\n(.*?)```', (root/'docs'/'index.md').read_text(encoding='utf-8'), re.S)[1]
    small = block.replace('bs=64', 'bs=64, n_train=128').replace('steps=10', 'steps=1').replace('fit_one_cycle(3', 'fit_one_cycle(1')
    assert small != block
    space = {}
    exec('from fastai.vision.all import *\nfrom fastrain.all import *\n' + small, space)
    assert space['learn'].recorder.values
