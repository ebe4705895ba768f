"The worked example of nbs/own_pieces.ipynb, as a user has it: a file outside the package"
import json, subprocess, sys
from pathlib import Path

import pytest
import torch

from conftest import digits

nb = json.loads((Path(__file__).parent.parent/'nbs'/'own_pieces.ipynb').read_text(encoding='utf-8'))
code = '\n\n'.join(s for c in nb['cells'] if (s := ''.join(c['source'])).startswith('# own_pieces.py'))

def cli(*args, cwd): return subprocess.run([sys.executable, '-W', 'ignore', '-c', 'from fastrain.cli import main; main()', *args], capture_output=True, text=True, cwd=cwd)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    d = tmp_path_factory.mktemp('own')
    (d/'own_pieces.py').write_text(code, encoding='utf-8')
    return d

def test_trained_and_resumed_with_more_methods(folder):
    args = ['train', '--load', 'own_pieces.py', '--out', 'run', '--epochs', '1', '--warmup', '1', '--steps', '1', '--n-train', '200', '--n-test', '50']
    first = cli(*args, '--method', 'standard,js:beta=6+cka', cwd=folder)
    assert first.returncode == 0, first.stderr
    more = cli('train', '--load', 'own_pieces.py', '--out', 'run', '--resume', '--method', 'at+cka', cwd=folder)
    assert more.returncode == 0, more.stderr
    assert [r['method'] for r in json.loads((folder/'run'/'results.json').read_text())] == ['standard', 'js:beta=6+cka', 'at+cka']
    header,*rows = (folder/'run'/'history.csv').read_text().splitlines()
    assert 'cka' in header.split(',') and len(rows) == 3

def test_without_the_file_the_names_are_unknown(folder):
    p = cli('train', '--out', 'other', '--method', 'js', cwd=folder)
    assert p.returncode == 1 and "Unknown method 'js'" in p.stderr
    p = cli('methods', '--load', 'nowhere.py', cwd=folder)
    assert p.returncode == 1 and 'no such file' in p.stderr

def test_listed_with_parameters(folder):
    p = cli('methods', '--piece', 'js', '--load', 'own_pieces.py', cwd=folder)
    assert p.returncode == 0 and 'beta=12.0: Weight of the divergence' in p.stdout
