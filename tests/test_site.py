"The documentation's own claims, and the distributions"
import re, subprocess, sys
from pathlib import Path

import pytest

import fastrain

root = Path(__file__).resolve().parent.parent


def test_one_version():
    assert f'version: {fastrain.__version__}\n' in (root/'CITATION.cff').read_text(encoding='utf-8')
    assert f'## {fastrain.__version__}' in (root/'CHANGELOG.md').read_text(encoding='utf-8')

def test_pages_of_the_site_are_in_the_sdist():
    endings = set(re.findall(r'\*(\.\w+)', re.search(r'recursive-include docs (.*)', (root/'MANIFEST.in').read_text())[1]))
    kept = [f for f in (root/'docs').rglob('*') if f.is_file() and '_build' not in f.parts and '__pycache__' not in f.parts]
    assert {f.suffix for f in kept} <= endings

@pytest.mark.slow
def test_first_page_runs():
    block = re.search(r'```python\n(.*?)```', (root/'docs'/'index.md').read_text(encoding='utf-8'), re.S)[1]
    small = block.replace('bs=64', 'bs=64, n_train=128').replace('steps=10', 'steps=1').replace('fit_one_cycle(3', 'fit_one_cycle(1')
    assert small != block
    space = {}
    exec('from fastai.vision.all import *\nfrom fastrain.all import *\n' + small, space)
    assert space['learn'].recorder.values

@pytest.mark.slow
def test_distributions():
    subprocess.run([sys.executable, root/'.ci'/'dist.py', '--files-only'], check=True)
