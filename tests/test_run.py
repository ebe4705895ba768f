"A run's folder: who may work in it, what is found wrong with its files, and what becomes of it when one of them is missing"
import errno, fcntl, json, shutil, signal, subprocess, sys, time

import pytest
from fastprogress import fastprogress

import fastrain.runs.evaluate
from fastrain.runs.recipe import make_recipe
from fastrain.runs.run import Run
from fastrain.runs.train import resume_run, train_run

TINY = dict(epochs=2, steps=1, warmup=1, n_train=64, n_test=20, bs=16, n_valid=5)
def tiny(**kwargs): return make_recipe(**TINY | kwargs)

@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    "No bars, and no pictures, which take most of the time"
    monkeypatch.setattr(fastprogress, 'NO_BAR', True)
    monkeypatch.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None)

def files_of(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob('*') if f.is_file()}

# --- the lock

HOLD = '''
import sys
from fastrain.runs.run import Run
with Run(sys.argv[1]).lock():
    print('held', flush=True)
    sys.stdin.read()
'''

@pytest.fixture
def new(tmp_path):
    "A run with nothing trained yet"
    return Run.create(tmp_path/'run', tiny(), ['at'], 'cpu')

@pytest.fixture
def holder(new):
    "Another process that has the folder"
    process = subprocess.Popen([sys.executable, '-c', HOLD, str(new.out)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == 'held'
    yield process
    process.kill()
    process.wait()

@pytest.mark.slow
def test_one_process_at_a_time(new, holder):
    "Another one is told who has the folder, and changes nothing; when that one is killed, the folder is free"
    before = files_of(new.out)
    with pytest.raises(BlockingIOError, match=rf'in use by process {holder.pid} on .*give the same command again'): resume_run(new.out, 'cpu')
    with pytest.raises(BlockingIOError): Run(new.out).add(['trades'])
    assert files_of(new.out) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Run(new.out).lock(): pass

def test_the_same_process_may_lock_again(new):
    with new.lock(), Run(new.out).lock(): assert (new.out/'.holder').exists()
    assert not (new.out/'.holder').exists()

def test_file_system_without_locks(new, monkeypatch):
    "It works without, and says so"
    def no_locks(*args): raise OSError(errno.ENOLCK, 'No locks available')
    monkeypatch.setattr(fcntl, 'flock', no_locks)
    with pytest.warns(UserWarning, match='without locks'):
        with new.lock(): pass

def test_folder_that_a_killed_process_left(tmp_path):
    "Locked, and killed before anything was written: it is still new"
    (tmp_path/'run').mkdir()
    for name in ('.lock', '.holder', '.settings-abc.json'): (tmp_path/'run'/name).write_text('')
    assert Run.create(tmp_path/'run', tiny(), ['at'], 'cpu').methods == ['at']
