"A run's folder: who may work in it, what is found wrong with its files, and what becomes of it when one of them is missing"
import errno, fcntl, json, re, shutil, signal, subprocess, sys

import pytest
from fastprogress import fastprogress

import fastrain.runs.evaluate
from fastrain import cli
from fastrain.runs.evaluate import evaluate_run
from fastrain.runs.recipe import make_recipe
from fastrain.runs.run import Run, lock_folder, read_history
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
    told = rf'in use by process {holder.pid} on .*give the same command again'
    with pytest.raises(BlockingIOError, match=told): resume_run(new.out, 'cpu')
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

def test_what_killed_processes_left_is_removed(tmp_path):
    "In a folder that is worked in, and not in a folder of another run inside it"
    for place in ('mine', 'mine/evaluation/parts', 'mine/runs/other'): (tmp_path/place).mkdir(parents=True)
    (tmp_path/'mine/runs/other/.lock').write_text('')
    for place in ('mine', 'mine/evaluation/parts', 'mine/runs/other'): (tmp_path/place/'.unfinished-a.png').write_text('')
    with lock_folder(tmp_path/'mine'): pass
    assert [str(f.relative_to(tmp_path)) for f in tmp_path.rglob('.unfinished*')] == ['mine/runs/other/.unfinished-a.png']

@pytest.mark.parametrize('command', [['compare', 'trained'], ['evaluate', 'mine.py:make', '--data', 'digits']])
def test_a_folder_that_another_process_works_in(command, trained, holder, new, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, 'trained')
    (tmp_path/'mine.py').write_text('import torch\ndef make(): return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))')
    (tmp_path/'out').mkdir()
    (tmp_path/'out'/'.lock').symlink_to(new.out/'.lock') # the same lock
    monkeypatch.setattr(sys, 'argv', ['fastrain', *command, '--out', 'out'])
    with pytest.raises(SystemExit, match='out is in use by'): cli.main()

# --- a run goes on with its own settings

@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A run of two methods, with drops, so that it may become longer"
    out = tmp_path_factory.mktemp('trained')/'run'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastprogress, 'NO_BAR', True)
        m.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None)
        train_run(out, tiny(drops=(1,)), ['standard', 'at+train'], 'cpu', ['natural', 'pgd2'])
    return out

@pytest.fixture
def run(trained, tmp_path):
    "A copy to work on"
    shutil.copytree(trained, tmp_path/'run')
    return tmp_path/'run'

def figures(out): return [(r['method'], r[w]['epoch'], r[w]['figures']) for r in Run(out).results for w in ('last', 'best') if w in r]

def edit(file, change):
    saved = json.loads(file.read_text())
    change(saved)
    file.write_text(json.dumps(saved))

@pytest.mark.parametrize('settings, match', [
    (dict(eps=.3, bs=32), r'eps: 0.15 there, 0.3 now; bs: 16 there, 32 now\. Leave these options out'),
    (dict(epochs=1), 'epochs: 2 there, 1 now'), (dict(epochs=3, seed=5), 'epochs: 2 there, 3 now; seed: 1 there, 5 now'),
    (dict(profile='las'), r'backbone: .resnet10t_16. there, .wide_resnet34_10. now'),
    (dict(data='cifar10'), "data: 'digits' there, 'cifar10' now"),
    (dict(eps=-1), 'eps=-1: expected'), (dict(epsilon=1), "Unknown setting 'epsilon'")])
def test_resume_with_other_settings(run, settings, match):
    before = files_of(run)
    with pytest.raises(ValueError, match=match): resume_run(run, 'cpu', settings=settings)
    assert files_of(run) == before

def test_resume_with_other_attacks(run):
    before = files_of(run)
    with pytest.raises(ValueError, match=r"attacks: \['natural', 'pgd2'\] there, .*fastrain evaluate"):
        resume_run(run, 'cpu', attacks=['natural', 'fgsm'])
    assert files_of(run) == before

def test_resume_with_the_same_settings(run):
    "The command that made it, once more"
    before = files_of(run)
    given = dict(TINY, drops=[1], data='digits', profile='digits') | dict(epochs=2, bs=16)
    resume_run(run, 'cpu', ['at+train'], ['pgd2', 'natural'], given)
    changed = {f for f,data in files_of(run).items() if before.get(f) != data}
    assert not changed - {'report.md', 'report.html'}

def test_resume_after_settings_were_edited(run):
    "The checkpoint says what trained it"
    (run/'results.json').unlink()
    edit(run/'settings.json', lambda s: s['recipe'].update(lam=7.))
    with pytest.raises(ValueError, match=r'last.pt is of another training: .*lam: 5.0 in the checkpoint, 7.0 now'): resume_run(run, 'cpu')

@pytest.mark.slow
def test_a_longer_run(run, tmp_path):
    "Bit for bit the figures of one that was as long from the start, with the same warm-up"
    resume_run(run, 'cpu', settings=dict(epochs=3))
    train_run(tmp_path/'whole', tiny(drops=(1,), epochs=3), ['standard', 'at+train'], 'cpu', ['natural', 'pgd2'])
    assert figures(run) == figures(tmp_path/'whole') and Run(run).recipe.epochs == 3
    with pytest.raises(ValueError, match='epochs: 3 there, 2 now'): resume_run(run, 'cpu', settings=dict(epochs=2))

@pytest.mark.parametrize('change, methods, match', [
    (dict(drops=None), ['at'], 'cannot have 3: the learning rate of one cycle'), (dict(lam_schedule='ramp'), ['at'], 'ramp course'),
    (dict(), ['at', 'at+sat', 'trades+fat'], 'sat and fat follows a schedule over all of them. Train 3 epochs in another folder')])
def test_a_run_that_cannot_be_longer(tmp_path, change, methods, match):
    Run.create(tmp_path/'run', tiny(**dict(drops=(1,)) | change), methods, 'cpu')
    with pytest.raises(ValueError, match=match): resume_run(tmp_path/'run', 'cpu', settings=dict(epochs=3))

def test_shell_resumes(run, monkeypatch, capsys):
    from fastrain import cli
    def shell(*args):
        monkeypatch.setattr(sys, 'argv', ['fastrain', 'train', '--out', str(run), '--resume', '--device', 'cpu', *args])
        cli.main()
    with pytest.raises(SystemExit, match='epochs: 2 there, 99 now; eps: 0.15 there, 0.3 now'):
        shell('--eps', '.3', '--epochs', '99')
    shell('--eps', '.15', '--epochs', '2', '--backbone', 'resnet10t_16', '--attacks', 'natural,pgd2')
    assert 'pgd2' in capsys.readouterr().out.lower().replace('-', '')

# --- any one file may be missing

FILES = [
    'settings.json', 'recipe.toml', 'results.json', 'history.csv', 'report.md', 'report.html', '.lock', 'checkpoints/warm.pt',
    'checkpoints/standard/best.pt', 'checkpoints/at+train/best.pt', 'checkpoints/standard/last.pt', 'checkpoints/at+train/last.pt',
    'evaluation/at+train-last/per_image.csv', 'evaluation/at+train-last/evaluation.json', 'evaluation/at+train-last/evaluation.md']

def slowly(*files): return [pytest.param(f, marks=pytest.mark.slow) for f in files]

def test_all_files_are_tried(trained):
    there = {str(f.relative_to(trained)) for f in trained.rglob('*') if f.is_file() and 'parts' not in f.parts}
    assert {f for f in there if 'standard-' not in f and '-best' not in f} == {*FILES}

@pytest.mark.parametrize('file', FILES)
def test_resume_without_one_file(run, file):
    "Methods that are done keep their figures"
    before = figures(run)
    (run/file).unlink()
    resume_run(run, 'cpu')
    assert figures(run) == before and {f for f in FILES if 'last.pt' in f or 'json' in f or 'csv' in f} - {file} <= {*files_of(run)}
    assert (run/'settings.json').exists() and (run/'history.csv').exists() and (run/'results.json').exists()

@pytest.mark.parametrize('file', ['checkpoints/at+train/best.pt', *slowly('settings.json', 'history.csv', 'checkpoints/warm.pt',
                                                                           'checkpoints/at+train/last.pt', 'checkpoints/standard/last.pt')])
def test_resume_without_results_and_one_file(run, file):
    "What is trained is found in the checkpoints; without one, it is trained again. A best epoch before the last one is lost"
    before,history = figures(run),Run(run).history.drop(columns='seconds')
    if 'best' in file: before = [b for i,b in enumerate(before) if i != 3]
    (run/'results.json').unlink()
    (run/file).unlink()
    resume_run(run, 'cpu')
    assert figures(run) == before
    assert Run(run).history.drop(columns='seconds').sort_values(['method', 'epoch'], ignore_index=True).equals(
        history.sort_values(['method', 'epoch'], ignore_index=True))

FEW = ['results.json', 'checkpoints/at+train/last.pt']

@pytest.mark.parametrize('file', [*FEW, *slowly(*(f for f in FILES if f not in FEW))])
def test_evaluate_without_one_file(run, file):
    "The other checkpoints are evaluated, and the figures of the others stay"
    before = figures(run)
    (run/file).unlink()
    if file == 'results.json':
        with pytest.raises(FileNotFoundError, match='it was removed. Continue it with --resume'):
            evaluate_run(run, ['natural'], device='cpu')
        return
    evaluate_run(run, ['natural', 'pgd2'], device='cpu', pictures='all', progress=False)
    assert figures(run) == before

def test_evaluate_what_was_removed(run):
    (run/'checkpoints/at+train/last.pt').unlink()
    with pytest.raises(ValueError, match='has no checkpoint last or average of at\\+train. .*remove results.json'):
        evaluate_run(run, ['natural'], device='cpu', methods=['at+train'], which=['last', 'average'])

def test_settings_of_an_old_run_are_lost(run):
    "Its checkpoints do not have them"
    import torch
    (run/'settings.json').unlink()
    for f in run.glob('checkpoints/*/last.pt'):
        state = torch.load(f, weights_only=True)
        del state['callbacks']['history']['run']
        torch.save(state, f)
    with pytest.raises(FileNotFoundError, match='has no settings.json, and its checkpoints .*put a copy of it back'): resume_run(run, 'cpu')

# --- damaged files

DAMAGE = [b'', b'{', b'[1,2]', b'{}', b'5', b'null', b'"x"', b'[{}]', b'[{"method": 5}]', b'\xff\xfe\x00',
          b'{"recipe": {}, "methods": ["at"]}', b'{"recipe": 5, "methods": ["at"]}', b'[' * 3000]

def one_line(e): return '\n' not in str(e.value) and 'Error(' not in str(e.value)

@pytest.mark.parametrize('file', ['settings.json', 'results.json', 'evaluation.json'])
@pytest.mark.parametrize('text', DAMAGE)
def test_damaged_json(run, file, text):
    (run/file).write_bytes(text)
    before = files_of(run)
    with pytest.raises(ValueError, match=re.escape(str(run/file))) as e: resume_run(run, 'cpu')
    assert one_line(e) and files_of(run) == before

@pytest.mark.parametrize('change, match', [
    (lambda s: s.update(methods=[5]), r'the methods are \[5\]'), (lambda s: s.update(methods=[]), r'the methods are \[\]'),
    (lambda s: s.update(methods='at'), "the methods are 'at'"), (lambda s: s['recipe'].update(eps='big'), "eps='big'"),
    (lambda s: s['recipe'].update(norm={}), 'norm'), (lambda s: s['recipe'].pop('eps'), 'the recipe has no eps'),
    (lambda s: s['recipe'].update(data=None), 'data'), (lambda s: s['recipe'].update(drops=[3, 2]), 'drops')])
def test_damaged_settings(run, change, match):
    edit(run/'settings.json', change)
    with pytest.raises(ValueError, match=match) as e: resume_run(run, 'cpu')
    assert one_line(e) and str(run/'settings.json') in str(e.value)

@pytest.mark.parametrize('state', [[1, 2], {}, 5])
def test_warm_up_of_another_kind(run, state):
    import torch
    for file in ('results.json', 'checkpoints/at+train/last.pt'): (run/file).unlink()
    torch.save(state, run/'checkpoints'/'warm.pt')
    with pytest.raises(ValueError, match='warm.pt is no standard model after its warm-up: remove it'): resume_run(run, 'cpu')

@pytest.mark.parametrize('text', [b'', b'x', b'\x00\x01', b'{}\n'])
def test_damaged_history(run, text):
    (run/'history.csv').write_bytes(text)
    with pytest.raises(ValueError, match='history.csv is damaged.*Remove it'): resume_run(run, 'cpu')

def test_history_is_read_exactly_and_without_a_word(tmp_path, recwarn):
    numbers = [1/3, 1e-8/7, 2/3e7, 0.1 + 0.2]
    (tmp_path/'history.csv').write_text('method,epoch,a\n' + ''.join(f'at,{i},{x!r}\n' for i,x in enumerate(numbers)))
    assert list(read_history(tmp_path/'history.csv').a) == numbers and not recwarn.list

@pytest.mark.parametrize('state', [[1, 2], {}, 5, dict(epoch=3)])
def test_checkpoint_of_another_kind(run, state):
    import torch
    torch.save(state, run/'checkpoints'/'at+train'/'last.pt')
    with pytest.raises(ValueError, match=r'last.pt is no checkpoint of a run: it has no .*Put a copy of it back, or remove it'):
        Run(run).model('at+train')
