"The README's Python runs as it stands."
import re
from pathlib import Path

import pytest
from fastprogress import fastprogress

readme = (Path(__file__).parent.parent/'README.md').read_text()

@pytest.mark.slow
def test_python_of_the_readme(monkeypatch):
    monkeypatch.setattr(fastprogress, 'NO_BAR', True)
    blocks,names = re.findall(r'```python\n(.*?)```', readme, re.S),{}
    assert blocks
    for block in blocks: exec(block.replace('from fastai.vision.all import *', 'from fastai.vision.all import *; set_seed(0)'), names)
    assert {'pgd10_accuracy', 'robust_loss', 'l_tp', 'lambda', 'std_accuracy'} <= set(names['learn'].recorder.metric_names)

def test_links_of_the_readme_lead_somewhere():
    for link in re.findall(r'\]\((?!http)([^)#]+)\)', readme): assert (Path(__file__).parent.parent/link).exists(), link
