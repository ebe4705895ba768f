"A sample of what `bench/faults.py` does at every write: break a command, give it again, and find what an undisturbed one leaves"
import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location('bench_faults', Path(__file__).parents[1]/'bench'/'faults.py')
faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(faults)
pytestmark = pytest.mark.slow

@pytest.mark.parametrize('command, every', [('train', 23), ('evaluate', 19), ('compare', 2)])
def test_faults(command, every, tmp_path):
    before,wanted,writes = faults.points(command, tmp_path)
    assert len(writes) >= 10
    kinds = list(faults.KINDS)
    for i,at in enumerate(range(0, len(writes), every)): # the kinds take turns
        fault = faults.Fault(command, kinds[i % len(kinds)], at)
        assert not faults.survive(fault, before, wanted), fault

def test_what_differs_is_found(tmp_path):
    (tmp_path/'a.csv').write_text('x\n1\n')
    was = faults.outcome(tmp_path)
    (tmp_path/'a.csv').write_text('x\n2\n')
    (tmp_path/'b.txt').write_text('left')
    assert faults.differences(faults.outcome(tmp_path), was) == 'b.txt is left over, a.csv differs'
    assert faults.differences({}, was) == 'a.csv is missing'
