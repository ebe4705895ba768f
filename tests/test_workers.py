"Where rows are run: places by name, errors of tasks, and a table on Ray of which a process is killed"
import os, signal, sys, threading, time

import pandas as pd
import pytest
from test_ledger import figures, reproduce, tiny

from fastrain import cli
from fastrain.studies import workers
from fastrain.studies.ledger import Ledger
from fastrain.studies.pareto import Family
from fastrain.studies.workers import Here, OnRay, make_workers

slow = pytest.mark.slow

# --- by name

@pytest.mark.parametrize('where, options, text', [
    ('rya', {}, 'ray'), ('here', dict(cpus=1), 'add --on ray'), ('here', dict(gpus=0), 'add --on ray'),
    ('ray', dict(cpus=0), 'cpus=0'), ('ray', dict(cpus=float('nan')), 'cpus=nan'), ('ray', dict(gpus=-1), 'gpus=-1'),
    ('ray', dict(gpus=1.5), 'gpus=1.5')])
def test_wrong_places(where, options, text):
    with pytest.raises(ValueError, match=text): make_workers(where, **options)

def test_without_ray_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ValueError, match=r'pip install "fastrain\[ray\]"'), make_workers('ray'): pass

def test_an_error_is_kept_for_who_asked_and_an_interrupt_is_not():
    def interrupt(): raise KeyboardInterrupt
    assert isinstance(Here().submit(divmod, 1, 0).exception(), ZeroDivisionError)
    with pytest.raises(KeyboardInterrupt): Here().submit(interrupt)

# --- rows in an order of their own, with a place that has room for three

class Backwards(Here):
    "Three at once, of which the last one ends first"
    def __init__(self): self.waiting,self.most = [],0
    def room(self): return 3
    def submit(self, f, *args):
        future = workers.Future()
        self.waiting.append((future, f, args))
        self.most = max(self.most, len(self.waiting))
        if len(self.waiting) == 3: threading.Timer(.05, self.end).start()
        return future
    def end(self):
        while self.waiting:
            future,f,args = self.waiting.pop()
            ended = Here().submit(f, *args)
            future.set_exception(ended.exception()) if ended.exception() else future.set_result(ended.result())

@pytest.fixture
def fake_rows(monkeypatch):
    def run(row, out, device=None):
        if row.experiment.key == '6/TRADES*': raise ValueError('no such luck\nmore of it')
        figure = dict(which='last', figure='natural', title='natural', value=row.id, low=None, high=None, n=1)
        return dict(figures=[figure], seconds=1., environment={})
    monkeypatch.setattr('fastrain.studies.reproduce.run_row', run)

def test_each_row_gets_its_own_end(tmp_path, fake_rows, capsys):
    place = Backwards()
    rows = reproduce(tiny(), tmp_path, workers=place)
    assert [(r['state'], r['error']) for r in rows] == [('done', None), ('failed', 'no such luck'), ('done', None)]
    assert place.most == 3 and 'failed: 6/TRADES* (tiny, seed 1): no such luck' in capsys.readouterr().out
    found = figures(tmp_path).dropna(subset='value')
    assert found.id.tolist() == found.value.tolist()

def test_an_interrupt_gives_all_rows_back(tmp_path, monkeypatch):
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr('fastrain.studies.reproduce.wait', interrupt)
    class Never(Backwards):
        def end(self): pass
    with pytest.raises(KeyboardInterrupt): reproduce(tiny(), tmp_path, workers=Never())
    assert Ledger(tmp_path/'ledger.sqlite').counts() == {'waiting': 3}

# --- commands of a queue

def test_members_as_commands(capsys):
    cli.pareto('at+train lam=1,5', 'trades:beta={} 1,2', seeds='1,2', out='here', epochs=2, commands=True)
    typed = capsys.readouterr().out.splitlines()
    assert len(typed) == 8 and len({*typed}) == 8
    assert typed[1] == "fastrain pareto 'at+train lam=5' --seeds 1 --out here --epochs 2"

def test_a_member_is_the_family_of_its_text():
    for text in ('at+train lam=1,5,20', 'trades:beta={} 1,2,4', 'at eps_share=.25,1'):
        family = Family.parse(text)
        alone = [m for one in family.texts() for m in Family.parse(one).members()]
        assert alone == family.members()

# --- Ray

@pytest.fixture(scope='module')
def ray():
    ray = pytest.importorskip('ray')
    os.environ.setdefault('RAY_worker_niceness', '0') # beside other work, too
    ray.init(num_cpus=2, num_gpus=0, logging_level='error', runtime_env=dict(env_vars=dict(PYTHONPATH=os.path.dirname(__file__))))
    yield ray
    ray.shutdown()

def wrong(): raise ValueError('no such luck\nmore of it')
def die(): os._exit(1)
def where_am_i(): return os.getcwd(), os.environ.get('OMP_NUM_THREADS')

@slow
def test_tasks_of_ray(ray, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, '_again', 0)
    own = tmp_path/'own.py'
    own.write_text('import os\nos.environ["OWN_WAS_READ"] = "yes"\n')
    with OnRay(load=[str(own)]) as place:
        assert place.room() == 2 and place.gpus == 0
        assert place.submit(where_am_i).result(120) == (os.getcwd(), '1')
        assert place.submit(os.getenv, 'OWN_WAS_READ').result(120) == 'yes'
        error = place.submit(wrong).exception(120)
        assert type(error) is ValueError and str(error) == 'no such luck\nmore of it'
        assert isinstance(died := place.submit(die).exception(120), ChildProcessError) and 'Ray says' in str(died)
        assert not place.running
    assert ray.is_initialized() # who began it ends it
    for needs,text in ((dict(cpus=64), 'cpus=64: no machine of the cluster has more than 2'), (dict(gpus=.5), 'gpus=0.5')):
        with pytest.raises(ValueError, match=text), OnRay(**needs): pass

def kill_one(out, killed):
    "Kill the first process that has trained an epoch"
    for _ in range(6000):
        for folder in out.glob('runs/*'):
            if not (folder/'.holder').is_file() or not list(folder.rglob('last.pt')): continue
            pid = int((folder/'.holder').read_text().split()[1])
            os.kill(pid, signal.SIGKILL)
            return killed.append(pid)
        time.sleep(.02)

@slow
def test_a_table_on_ray_with_a_process_killed_is_that_of_one_process(ray, tmp_path):
    rows,killed = tiny(epochs=2),[]
    reproduce(rows, tmp_path/'here', 'cpu')
    killer = threading.Thread(target=kill_one, args=(tmp_path/'ray', killed))
    killer.start()
    with OnRay(cpus=1) as place: found = reproduce(rows, tmp_path/'ray', 'cpu', workers=place)
    killer.join()
    assert len(killed) == 1 and killed[0] != os.getpid()
    assert [r['state'] for r in found] == ['done']*3 and {r['turn'] for r in found} == {1}
    pd.testing.assert_frame_equal(figures(tmp_path/'ray'), figures(tmp_path/'here'))
