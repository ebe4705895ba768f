"The ledger of experiments: each row taken once, rows of dead processes taken over, damaged files refused; and studies that are killed"
import multiprocessing, os, signal, sqlite3, subprocess, sys, time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

import fastrain.studies.reproduce as studies
from fastrain import cli
from fastrain.runs.recipe import make_recipe
from fastrain.runs.train import train_run
from fastrain.studies.experiment import Experiment
from fastrain.studies.ledger import Ledger, process_start, read_ledger
from fastrain.studies.study_report import study_report
from fastrain.studies.reproduce import asked_experiments, reproduce, run_figures, share_warm_up, warm_up_name

fork = multiprocessing.get_context('fork') if hasattr(os, 'fork') else None
slow = pytest.mark.slow
NATURAL = dict(which='last', figure='natural', title='natural', value=.5, low=.4, high=.6, n=100)

def experiments(n): return [Experiment(f'5/{i}', make_recipe(epochs=1, seed=i), 'at', ('natural',), 'tiny') for i in range(n)]

@pytest.fixture
def file(tmp_path): return tmp_path/'ledger.sqlite'

def update(file, sql, *values):
    with closing(sqlite3.connect(file)) as db, db: db.execute(sql, values)

# --- who has what

def _work(file, ids, name):
    ledger = Ledger(file)
    while row := ledger.take(ids):
        with ledger.keeping(row): assert ledger.finish(row, [dict(NATURAL, value=os.getpid())], 1., {}, name)

def test_several_processes_take_each_row_once(file):
    ids = Ledger(file).enter(experiments(40))
    workers = [fork.Process(target=_work, args=(file, ids, f'worker {i}')) for i in range(4)]
    for w in workers: w.start()
    for w in workers: w.join(60)
    assert [w.exitcode for w in workers] == [0]*4
    rows = Ledger(file).rows(ids)
    assert {r['state'] for r in rows} == {'done'} and {r['turn'] for r in rows} == {1}
    assert len(read_ledger(file)) == 40

def test_several_processes_make_one_ledger(file):
    workers = [fork.Process(target=lambda: Ledger(file).enter(experiments(5))) for _ in range(4)]
    for w in workers: w.start()
    for w in workers: w.join(60)
    assert [w.exitcode for w in workers] == [0]*4 and Ledger(file).counts() == {'waiting': 5}

def _take_and_wait(file, ids, taken):
    Ledger(file).take(ids)
    taken.set()
    time.sleep(60)

def test_a_row_is_taken_over_when_its_process_is_killed(file):
    ledger,taken = Ledger(file),fork.Event()
    ids = ledger.enter(experiments(1))
    child = fork.Process(target=_take_and_wait, args=(file, ids, taken))
    child.start()
    assert taken.wait(30) and ledger.take(ids) is None
    os.kill(child.pid, signal.SIGKILL)
    time.sleep(.1) # it is not waited for: a zombie has its number still
    row = ledger.take(ids)
    child.join()
    assert row.turn == 2

def test_a_number_that_another_process_has_now_does_not_hold_a_row(file):
    ledger = Ledger(file)
    ids = ledger.enter(experiments(1))
    ledger.take(ids)
    assert ledger.take(ids) is None # this very process is alive
    update(file, 'UPDATE experiments SET began=?', '1')
    assert ledger.take(ids).turn == 2

@pytest.mark.parametrize('ago,free', [(1, False), (700, True)])
def test_of_another_machine_signs_of_life_count(file, ago, free):
    ledger = Ledger(file)
    ids = ledger.enter(experiments(1))
    ledger.take(ids)
    update(file, 'UPDATE experiments SET place=?, pid=?, heartbeat=?', 'elsewhere', 1, time.time() - ago)
    assert (ledger.take(ids) is not None) == free

def test_signs_of_life_are_given(file):
    ledger = Ledger(file, beat=.02)
    ids = ledger.enter(experiments(1))
    row = ledger.take(ids)
    update(file, 'UPDATE experiments SET heartbeat=0')
    with ledger.keeping(row): time.sleep(.2)
    assert ledger.rows(ids)[0]['heartbeat'] > time.time() - 10

def test_who_was_held_up_writes_nothing_into_the_work_of_another(file):
    ledger = Ledger(file)
    ids = ledger.enter(experiments(1))
    held_up = ledger.take(ids)
    update(file, 'UPDATE experiments SET began=?', '1')
    other = ledger.take(ids)
    assert not ledger.finish(held_up, [NATURAL], 1., {}) and not ledger.fail(held_up, 'late')
    ledger.release(held_up)
    assert ledger.rows(ids)[0]['state'] == 'taken'
    assert ledger.finish(other, [NATURAL], 1., {})

def test_an_interrupt_gives_the_row_back(file):
    ledger = Ledger(file)
    ids = ledger.enter(experiments(1))
    with pytest.raises(KeyboardInterrupt), ledger.keeping(ledger.take(ids)): raise KeyboardInterrupt
    assert ledger.counts() == {'waiting': 1}

def test_when_a_process_started():
    assert process_start(os.getpid()) and process_start(2**22 + 1) == ''

# --- what is done, failed, changed

def test_what_is_done_stays_done_unless_asked(file):
    ledger,(e,) = Ledger(file),experiments(1)
    ids = ledger.enter([e])
    ledger.finish(ledger.take(ids), [NATURAL], 1., {})
    assert ledger.enter([e]) == ids and ledger.take(ids) is None
    ledger.enter([e], again=True)
    row = ledger.take(ids)
    assert row.repeat == 1 and read_ledger(file).value.isna().all()

def test_what_failed_waits_again(file):
    ledger,(e,) = Ledger(file),experiments(1)
    ids = ledger.enter([e])
    ledger.fail(ledger.take(ids), 'no space')
    assert ledger.rows()[0]['error'] == 'no space' and ledger.take(ids) is None
    ledger.enter([e])
    assert ledger.take(ids).turn == 2

def test_other_settings_are_another_row_if_changed_by_hand_and_an_error_if_not(file):
    ledger,(e,) = Ledger(file),experiments(1)
    ids = ledger.enter([e])
    assert ledger.enter([replace(e, recipe=replace(e.recipe, lr=.2), changed=dict(lr=.2))]) != ids
    with pytest.raises(ValueError, match='lr: 0.1 there, 0.3 now. Run it once more with --again'):
        ledger.enter([replace(e, recipe=replace(e.recipe, lr=.3))])
    ledger.enter([replace(e, recipe=replace(e.recipe, lr=.3))], again=True)
    assert ledger.take(ids).experiment.recipe.lr == .3

def test_a_moved_copy_of_the_data_is_no_other_setting(file):
    ledger = Ledger(file)
    e = Experiment('5/a', make_recipe(data='cifar10'), 'at', ('natural',))
    assert ledger.enter([e]) == ledger.enter([replace(e, recipe=replace(e.recipe, path='elsewhere'))])

@pytest.mark.parametrize('damage', ['cut', 'overwritten', 'text', 'other'])
def test_damaged_and_foreign_files(file, damage):
    ledger = Ledger(file)
    ledger.enter(experiments(200))
    with closing(sqlite3.connect(file)) as db: db.execute('PRAGMA wal_checkpoint(TRUNCATE)')
    data = file.read_bytes()
    if damage == 'cut': file.write_bytes(data[:len(data)//2])
    elif damage == 'overwritten': file.write_bytes(data[:4096] + b'\xff'*8192 + data[12288:])
    elif damage == 'text': file.write_text('key,seed\n'*500)
    else:
        file.unlink()
        with closing(sqlite3.connect(file)) as db: db.execute('CREATE TABLE birds(name)')
    before = file.read_bytes()
    with pytest.raises(ValueError, match='damaged|no ledger of fastrain') as e: Ledger(file)
    assert str(file) in str(e.value) and '\n' not in str(e.value)
    assert file.read_bytes() == before

def test_pandas_reads_it_in_one_line(file):
    ledger = Ledger(file)
    ids = ledger.enter(experiments(2))
    ledger.finish(ledger.take(ids), [NATURAL], 1., {})
    df = pd.read_sql('select * from results', sqlite3.connect(file))
    assert df.value.tolist()[0] == .5 and df.state.tolist() == ['done', 'waiting']

# --- studies

TINY = dict(epochs=2, n_train=60, n_test=20, steps=1, bs=16, n_valid=10, backbone='test_byobnet', standard='test_byobnet')

def tiny(names=('TRADES + TRAIN', 'TRADES', 'Vanilla AT + TRAIN'), **changed):
    less = TINY | changed
    return [studies.row_experiment(f'6/{n}', 'tiny', attacks=('natural', 'fgsm'), **less) for n in names]

def figures(out): return read_ledger(out).query("figure != 'seconds_per_epoch'").drop(columns='seconds').reset_index(drop=True)

def test_a_failing_row_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def run(row, out, device=None):
        if 'TRADES + TRAIN' in row.experiment.key: raise ValueError('no such luck\nsecond line')
        return dict(figures=[NATURAL], seconds=1., environment={})
    monkeypatch.setattr(studies, 'run_row', run)
    monkeypatch.setattr('fastrain.studies.cost.study_cost', lambda *_: None)
    rows = reproduce(tiny(), tmp_path)
    assert [(r['state'], r['error']) for r in rows] == [('failed', 'no such luck'), ('done', None), ('done', None)]
    assert 'failed: 6/TRADES + TRAIN (tiny, seed 1): no such luck' in studies.states_text(rows)

def test_rows_share_a_warm_up_if_nothing_of_it_differs():
    a,b,_ = tiny()
    assert warm_up_name(a.recipe) == warm_up_name(replace(a.recipe, eps=.3, steps=4, epochs=9, lam=2., strict=False))
    for other in (dict(seed=2), dict(lr=.3), dict(n_train=50), dict(backbone='resnet10t_16'), dict(warmup=5)):
        assert warm_up_name(a.recipe) != warm_up_name(replace(a.recipe, **other)), other

def test_commands_are_self_contained(capsys):
    cli.reproduce('6', scale='tiny', seeds='1,2', epochs=3, out='here', commands=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2*len(asked_experiments(['6'], 'tiny')) and len({*lines}) == len(lines)
    assert lines[0].startswith("fastrain reproduce '6/") and '--seeds 2' in lines[-1] and '--epochs 3 --scale' not in lines[0]

@slow
def test_a_shared_warm_up_gives_the_figures_of_one_of_its_own(tmp_path):
    rows = tiny()
    reproduce(rows, tmp_path, 'cpu')
    assert len(list((tmp_path/'shared').glob('*.pt'))) == 1
    for e in rows:
        alone = train_run(tmp_path/e.key.replace('/', '-'), e.recipe, [e.method], 'cpu', e.attacks)[0]
        found = {(f['which'], f['figure']): f['value'] for f in run_figures(alone) if f['figure'] != 'seconds_per_epoch'}
        there = figures(tmp_path)[lambda df: df.key == e.key]
        assert dict(zip(zip(there.which, there.figure), there.value)) == found

@slow
@pytest.mark.parametrize('row, picture', [('F4/TRADES', 'tsne'), ('F3/β = 2', 'topology')])
def test_figures_of_the_paper_are_drawn_of_each_run_and_in_the_report(row, picture, tmp_path):
    attacks = ('natural', 'pgd20-lbgat', 'topology')
    rows = reproduce([studies.row_experiment(row, 'tiny', attacks=attacks, **TINY)], tmp_path, 'cpu')
    assert [(r['state'], r['error']) for r in rows] == [('done', None)]
    study_report([tmp_path])
    assert len(list(tmp_path.glob(f'runs/*/{picture}.png'))) == 1 and len(list(tmp_path.glob(f'table-F*{picture}.png'))) == 1

STUDY = '''
import sys
sys.path.insert(0, {here!r})
from test_ledger import reproduce, tiny
reproduce(tiny(), {out!r}, 'cpu')
'''

@slow
def test_killed_in_the_middle_it_goes_on_with_the_same_figures(tmp_path):
    reproduce(tiny(), tmp_path/'whole', 'cpu')
    code = STUDY.format(here=str(Path(__file__).parent), out=str(tmp_path/'killed'))
    program = [sys.executable, '-c', code]
    for epoch in ('last.pt', 'results.json'): # within a training, and after one
        process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list((tmp_path/'killed').rglob(epoch)): time.sleep(.01)
        process.kill()
    process.wait()
    reproduce(tiny(), tmp_path/'killed', 'cpu')
    pd.testing.assert_frame_equal(figures(tmp_path/'killed'), figures(tmp_path/'whole'))
