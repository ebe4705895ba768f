"The worked example of nbs/learn/own_pieces.ipynb, as a user has it: a file outside the package"
import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastrain.runs.evaluate
from fastrain import cli
from fastrain.pieces.losses import RobustLoss
from fastrain.pieces.relations import Relation
from fastrain.pieces.strategies import Strategy

notebook = json.loads((Path(__file__).parent.parent/'nbs'/'learn'/'own_pieces.ipynb').read_text(encoding='utf-8'))
sources = [''.join(c['source']) for c in notebook['cells']]
code = '\n\n'.join(s for s in sources if s.startswith('# own_pieces.py'))
train = ['train', '--load', 'own_pieces.py', '--out', 'run']
tiny = ['--epochs', '1', '--warmup', '1', '--steps', '1', '--n-train', '140', '--n-test', '30']

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('own')
    (d/'own_pieces.py').write_text(code, encoding='utf-8')
    return d

@pytest.fixture
def run(folder, monkeypatch):
    "The program `fastrain` in that folder, in this process; afterwards the registries are as before"
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None) # they are no part of this, and slow
    for family in (RobustLoss, Strategy, Relation): monkeypatch.setattr(family, 'registry', dict(family.registry))
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastrain', *args])
        cli.main()
    return call

@pytest.mark.slow
def test_trained_and_resumed_with_more_methods(folder, run):
    run(*train, *tiny, '--method', 'js:beta=6+cka')
    run(*train, '--resume', '--method', 'patient+cka')
    results = json.loads((folder/'run'/'results.json').read_text())
    assert [r['method'] for r in results] == ['js:beta=6+cka', 'patient+cka']
    header,*rows = (folder/'run'/'history.csv').read_text().splitlines()
    assert 'cka' in header.split(',') and len(rows) == 2

def test_without_the_file_the_names_are_unknown(run):
    with pytest.raises(SystemExit, match="Unknown method 'js'"): run('train', '--out', 'other', '--method', 'js')
    with pytest.raises(SystemExit, match='no such file'): run('methods', '--load', 'nowhere.py')

def test_listed_with_parameters(run, capsys):
    run('methods', '--piece', 'js', '--load', 'own_pieces.py')
    assert 'beta=12.0: Weight of the divergence' in capsys.readouterr().out

@pytest.mark.slow
def test_in_a_process_of_its_own(folder):
    program = [sys.executable, '-W', 'ignore', '-c', 'from fastrain.cli import main; main()']
    def start(*args): return subprocess.run([*program, *args], capture_output=True, text=True, cwd=folder)
    p = start('train', '--load', 'own_pieces.py', '--out', 'alone', *tiny, '--method', 'js:beta=6+cka')
    assert p.returncode == 0, p.stderr
    p = start('train', '--out', 'other', '--method', 'js')
    assert p.returncode == 1 and "Unknown method 'js'" in p.stderr
