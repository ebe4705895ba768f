"The program: help without torch, options in groups, errors of one line, Ctrl-C, and what a log file holds"
import errno, inspect, io, re, signal, subprocess, sys, time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch

import fastrain.runs.evaluate
import fastrain.runs.train
import fastrain.training.methods
from conftest import digit_dls, make_learner, net, quick
from fastai.callback.progress import ProgressCallback
from fastai.learner import defaults
from fastprogress import fastprogress
from fastrain import __version__, cli
from fastrain.core import atomic_path, load_tensors, read_json, save_tensors, save_text
from fastrain.training.callback import TRAINCallback
from fastrain.training.progress import TimeLeft, _in_words, plain_output

PROGRAM = [sys.executable, '-c', 'from fastrain.cli import main; main()']

def heed_interrupts():
    "Whatever started the tests: a job in the background ignores them, and so would its programs"
    signal.signal(signal.SIGINT, signal.SIG_DFL)

def start(*args, **kwargs):
    return subprocess.run([*PROGRAM, *args], capture_output=True, text=True, timeout=300, preexec_fn=heed_interrupts, **kwargs)

@pytest.fixture
def shell(monkeypatch, tmp_path):
    "The program in this process, in a folder of its own"
    monkeypatch.chdir(tmp_path)
    def call(*args):
        monkeypatch.setattr(sys, 'argv', ['fastrain', *map(str, args)])
        cli.main()
    return call

def raises(error):
    "A function that does"
    def f(*args, **kwargs): raise error
    return f

# --- what needs no torch

LIGHT = [['--help'], ['--version'], ['train', '--help'], ['methods', '-h'], ['evaluate', '--help'], ['trian'], ['train', '--epocs', '3'],
         ['train', '--epochs', 'x'], ['train', '--lr'], ['methods', 'a'], ['compare', '--out']]

def test_torch_is_not_imported_for_help_and_typing_errors():
    "In a fresh process, all in turn"
    code = f'''
import sys
from fastrain import cli
for args in {LIGHT}:
    sys.argv = ['fastrain', *args]
    try: cli.main()
    except SystemExit: pass
print('heavy:', [m for m in ('torch', 'fastai', 'timm', 'pandas', 'numpy', 'fastprogress', 'matplotlib') if m in sys.modules])
'''
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert res.stdout.endswith('heavy: []\n') and 'Traceback' not in res.stderr, res

def test_the_program_itself_is_a_tiny_import():
    "So that Ctrl-C finds nobody importing before `main` looks after it"
    code = 'import sys; before = {*sys.modules}; import fastrain.cli; print(*sorted({*sys.modules} - before))'
    res = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=60)
    assert not any(m.split('.')[0] in ('torch', 'fastcore', 'fastai', 'numpy') for m in res.stdout.split())

def test_version(shell, capsys):
    shell('--version')
    assert capsys.readouterr().out == f'fastrain {__version__}\n'

@pytest.mark.parametrize('args, match, code', [
    (['trian'], "Unknown command 'trian'. Did you mean 'train'", 1),
    (['train', '--epocs', '3'], "Unknown option '--epocs'. Did you mean '--epochs'", 1),
    (['train', '--epocs=3'], "'--epochs'", 1), (['methods', 'a'], "no place for 'a'", 2), (['train', '--lr'], 'expected one argument', 2),
    (['train', '--epochs', 'x'], "--epochs: 'x' is no whole number. See fastrain train --help", 2),
    (['train', '--epochs', '1.5'], "'1.5' is no whole number", 2), (['train', '--lr', 'big'], "'big' is no number", 2)])
def test_typing_errors(shell, capsys, args, match, code):
    with pytest.raises(SystemExit) as e: shell(*args)
    line = e.value.code if isinstance(e.value.code, str) else capsys.readouterr().err
    assert match in line and line.strip().count('\n') == 0 and line.startswith('fastrain')
    assert isinstance(e.value.code, str) or e.value.code == code

# --- help

def help_text(name, shell, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    with pytest.raises(SystemExit) as e: shell(name, '--help')
    assert not e.value.code
    return capsys.readouterr().out

@pytest.mark.parametrize('name', cli._commands)
def test_help(name, shell, capsys, monkeypatch):
    "Each option once, each with a text, on 80 columns"
    text = help_text(name, shell, capsys, monkeypatch)
    assert max(map(len, text.splitlines())) < 80
    for k,p in inspect.signature(cli._commands[name]).parameters.items():
        if p.default is p.empty: continue
        lines = re.findall(rf'^  --{k.replace("_", "-")}( .*)?$', text, re.M)
        assert len(lines) == 1, k

def test_the_ten_that_matter_come_first(shell, capsys, monkeypatch):
    text = help_text('train', shell, capsys, monkeypatch)
    first = re.findall(r'^  --([a-z-]+)', text, re.M)[:10]
    assert first == ['data', 'method', 'out', 'backbone', 'epochs', 'eps', 'attacks', 'seed', 'device', 'resume']

@pytest.mark.parametrize('name', cli._groups)
def test_groups_name_options_that_there_are(name):
    named = [n for names in cli._groups[name].values() for n in names.split()]
    assert len({*named}) == len(named) and {*named} <= {*inspect.signature(cli._commands[name]).parameters}

@pytest.mark.parametrize('name', cli._commands)
def test_every_option_is_explained(name): assert all(a.help for a in cli._parser(name)._actions)

def test_help_names_all_pictures():
    from fastcore.docments import docments
    from fastrain.runs.gallery import pictures
    said = docments(cli.evaluate)['pictures'].split(':')[1].split(';')[0]
    assert re.findall(r'\w+', said) == [name for name,f in pictures.items() if f.__module__.startswith('fastrain.')]

# --- lists

@pytest.mark.parametrize('args', [
    ['train', '--method', 'at,,trades'], ['train', '--method', 'at,'], ['train', '--method', ','],
    ['train', '--attacks', 'natural,,pgd20'], ['train', '--attacks', ' '], ['train', '--load', 'a.py,'], ['train', '--drops', '5,,9'],
    ['evaluate', 'run', '--attacks', ',natural'],
    ['evaluate', 'run', '--eps', '2/255,,4/255'], ['evaluate', 'run', '--pictures', 'curves,'],
    ['evaluate', 'run', '--method', ',at'], ['evaluate', 'run', '--which', 'last,,best'], ['evaluate', 'run', '--load', ','],
    ['methods', '--load', ',,']])
def test_an_empty_item_in_a_list(shell, tmp_path, args):
    option = args[-2]
    with pytest.raises(SystemExit, match=f'fastrain {args[0]}: {option} .*: an item is empty') as e: shell(*args)
    assert '\n' not in e.value.code and not any(tmp_path.iterdir())

# --- errors

OWN = 'def f():\n    return [][1]\nf()\n'

@pytest.mark.parametrize('error, told', [
    (ValueError('a\nb'), 'a'), (OSError('disk full: x'), 'disk full: x'), (RuntimeError('c'), 'c'), (FloatingPointError('d'), 'd'),
    (PermissionError(13, 'Permission denied', 'x.csv'), 'x.csv: Permission denied'),
    (ValueError('Exception occured in `TRAINCallback` when calling event `before_batch`:\n\tlabels'), 'labels'),
    (ValueError('Caught ValueError in DataLoader worker process 0.\nFile\nValueError: Cannot read x\n'), 'Cannot read x'),
    (MemoryError(), 'there is not enough memory. Give a smaller --bs'),
    (torch.cuda.OutOfMemoryError('CUDA out'), 'there is not enough memory'),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"), 'there is not enough memory'), (ValueError(), 'ValueError')])
def test_errors_are_one_line(shell, monkeypatch, error, told):
    monkeypatch.setattr(cli, '_run', lambda argv: exec(compile('raise error', '<test>', 'exec'), dict(error=error)))
    monkeypatch.setattr('fastrain.runs.own._is_own', lambda file: False) # this file is not the user's
    with pytest.raises(SystemExit) as e: shell('methods')
    assert e.value.code.startswith(f'fastrain methods: {told}') and '\n' not in e.value.code

@pytest.mark.parametrize('error', [KeyError('x'), TypeError('x'), AssertionError('x'), AttributeError('x')])
def test_a_mistake_of_ours_keeps_its_traceback(shell, monkeypatch, error):
    monkeypatch.setattr(cli, '_run', raises(error))
    monkeypatch.setattr('fastrain.runs.own._is_own', lambda file: False)
    with pytest.raises(SystemExit) as e: shell('methods')
    assert 'Traceback' in e.value.code and 'in main' in e.value.code and 'please report it' in e.value.code.splitlines()[-1]

def test_an_error_in_a_users_file(shell, tmp_path):
    (tmp_path/'own.py').write_text(OWN)
    with pytest.raises(SystemExit) as e: shell('methods', '--load', 'own.py')
    lines = e.value.code.splitlines()
    assert lines[0] == 'fastrain methods: an error in a file of yours' and lines[-1] == 'IndexError: list index out of range'
    assert 'own.py", line 3, in <module>' in lines[1] and 'fastrain/' not in '\n'.join(lines[1:])

def test_a_users_file_that_is_no_python(shell, tmp_path):
    (tmp_path/'own.py').write_text('def f(:\n')
    with pytest.raises(SystemExit, match=r'(?s)file of yours.*own.py", line 1.*SyntaxError') as e: shell('methods', '--load', 'own.py')
    assert 'Traceback' not in e.value.code

@pytest.mark.parametrize('device', ['gpu', 'cuda:99', 'meta', 'cpu:x'])
@pytest.mark.parametrize('command', [['train'], ['evaluate', 'run']])
def test_devices_that_are_not_there(shell, tmp_path, command, device):
    with pytest.raises(SystemExit, match=f'--device {device}: there is no such device'): shell(*command, '--device', device)
    assert not any(tmp_path.iterdir())

def test_a_standard_model_that_is_not_there(shell, tmp_path):
    args = 'train', '--standard', 'nowhere.pt', '--device', 'cpu'
    with pytest.raises(SystemExit, match='There is no run or file nowhere.pt'): shell(*args)
    assert not any(f for f in tmp_path.rglob('*') if not f.name.startswith('.') and f.is_file())

@pytest.mark.parametrize('options', [['--method', 'at'], ['--which', 'last'], ['--method', 'at', '--which', 'best']])
def test_a_checkpoint_is_one_model_already(shell, tmp_path, monkeypatch, options):
    monkeypatch.setattr('fastrain.runs.run.checkpoint_in_run', lambda file: (tmp_path, 'at', 'last'))
    match = f'{options[0]}.*: run/last.pt is one model of a run already'
    with pytest.raises(SystemExit, match=match): shell('evaluate', 'run/last.pt', *options)

# --- Ctrl-C, and a reader who goes

def test_interrupted(shell, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(fastrain.runs.train, 'train_run', raises(KeyboardInterrupt()))
    monkeypatch.setattr(fastrain.runs.evaluate, 'evaluate_run', raises(KeyboardInterrupt()))
    monkeypatch.setattr(fastrain.training.methods, 'methods_text', raises(KeyboardInterrupt()))
    def told(*args):
        with pytest.raises(SystemExit) as e: shell(*args)
        assert e.value.code == 130
        return capsys.readouterr().err.strip()
    assert told('train') == 'fastrain train: interrupted. Nothing is trained yet: give the same command again'
    save_text(tmp_path/'r'/'settings.json', '{}')
    for out in (['--out', 'r'], ['--out=r']):
        assert told('train', *out) == 'fastrain train: interrupted. The same command with --resume goes on from the last epoch'
    assert told('evaluate', 'r') == 'fastrain evaluate: interrupted. The same command goes on where it stopped'
    assert told('methods') == 'fastrain methods: interrupted. Give the same command again'

def test_a_library_that_swallows_an_interrupt(tmp_path):
    (tmp_path/'own.py').write_text('import sys; sys.path.insert(0, "."); import library')
    (tmp_path/'library.py').write_text('import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept BaseException: pass')
    done = start('methods', '--load', 'own.py', cwd=tmp_path)
    assert done.returncode == 130 and done.stderr.strip() == 'fastrain methods: interrupted. Give the same command again'
    assert done.stdout == ''

def interrupted_after(seconds, cwd):
    p = subprocess.Popen([*PROGRAM, 'train', '--epochs', '50', '--n-train', '140', '--n-test', '30', '--method', 'at', '--device', 'cpu'],
                         cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed_interrupts)
    time.sleep(seconds)
    p.send_signal(signal.SIGINT)
    _,err = p.communicate(timeout=120)
    assert p.returncode == 130 and 'Traceback' not in err and re.fullmatch(r'\s*fastrain train: interrupted\. .*\n', err), (seconds, err)

def test_interrupted_while_importing(tmp_path): interrupted_after(1., tmp_path)

@pytest.mark.slow
@pytest.mark.parametrize('seconds', [.2, .5, 2, 3, 4, 5, 7, 9, 12, 16])
def test_interrupted_at_any_moment(tmp_path, seconds): interrupted_after(seconds, tmp_path)

def test_a_reader_who_goes(tmp_path):
    "As `head` does"
    p = subprocess.Popen([*PROGRAM, 'methods'], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    assert p.stderr.read() == '' and p.wait(60) == 141

# --- in a log file

@contextmanager
def log():
    "What is printed inside the `with`, as a file keeps it"
    stream,text = io.TextIOWrapper(io.BytesIO(), encoding='utf-8', newline=''),[]
    with redirect_stdout(stream): yield text
    stream.flush()
    text.append(stream.buffer.getvalue().decode('utf-8'))

def test_rows_instead_of_bars():
    before = list(defaults.callbacks)
    with log() as text, plain_output():
        learn = make_learner(digit_dls(), net(1), [TRAINCallback(net(2), attack=quick()), TimeLeft(4)])
        learn.fit(2)
        bar = fastprogress.progress_bar([1, 2])
        assert list(bar) == [1, 2]
    lines = text[0].splitlines()
    assert not re.search('[█\r]', text[0]) and len(lines) == 3
    assert lines[0].split()[:3] == ['epoch', 'train_loss', 'valid_loss']
    assert lines[1].split()[0] == '0' and re.search(r'1 of 4 epochs, about \d+ s left$', lines[1])
    starts = [[m.start() for m in re.finditer(r'\S+', line)][:6] for line in lines]
    assert starts[0] == starts[1] == starts[2] # a table
    assert defaults.callbacks == before and ProgressCallback in before and not fastprogress.NO_BAR and 'print' not in vars(fastprogress)

def test_no_rows_where_none_are_wanted():
    with log() as text, plain_output():
        learn = make_learner(digit_dls(), net(1))
        with learn.no_logging(): learn.fit(1)
    assert text == ['']

def test_a_sign_that_cannot_be_written(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
    monkeypatch.setattr(sys, 'stdout', stream)
    with plain_output(): print('ε = 0.15')
    stream.flush()
    assert stream.buffer.getvalue() == b'? = 0.15\n'

@pytest.mark.slow
def test_the_log_of_a_whole_run(tmp_path):
    tiny = ['--epochs', '1', '--warmup', '1', '--steps', '1', '--n-train', '140', '--n-test', '30', '--device', 'cpu']
    res = start('train', *tiny, '--method', 'standard,at+train', cwd=tmp_path)
    assert res.returncode == 0 and not res.stderr, res.stderr
    assert not re.search('[█\r]', res.stdout)
    assert re.search(r'^0 .* 1 of 3 epochs, about \d+ s left$', res.stdout, re.M) and re.search(r'^0 .* 3 of 3 epochs$', res.stdout, re.M)
    assert len(re.findall('^epoch ', res.stdout, re.M)) == 2 # the warm-up has one line

# --- time left

class Clock:
    "Epochs of a given length"
    def __init__(self): self.now = 0.
    def perf_counter(self): return self.now

def test_time_left_of_all_methods(monkeypatch):
    "The present method at its pace, the rest at the slowest"
    clock = Clock()
    monkeypatch.setattr('fastrain.training.progress.time', clock)
    left,seen = TimeLeft(epochs=9),[]
    for seconds in (10, 60, 20):
        left.n_epoch = 3
        left.before_fit()
        for left.epoch in range(3):
            left.before_train()
            clock.now += seconds
            left.after_epoch()
            seen.append(str(left))
    assert seen[0] == '1 of 9 epochs, about 80 s left' and seen[2] == '3 of 9 epochs, about 60 s left'
    assert seen[3] == '4 of 9 epochs, about 5 min left' and seen[5] == '6 of 9 epochs, about 3 min left'
    assert seen[6] == '7 of 9 epochs, about 40 s left' and seen[8] == '9 of 9 epochs'

def test_epochs_trained_before_say_nothing_about_the_pace(monkeypatch):
    clock = Clock()
    monkeypatch.setattr('fastrain.training.progress.time', clock)
    left = TimeLeft(epochs=3)
    left.n_epoch = 3
    left.before_fit()
    left.epoch = 0
    left.after_epoch() # skipped by `Checkpoint`
    assert str(left) == '1 of 3 epochs'
    left.epoch = 1
    left.before_train()
    clock.now += 50
    left.after_epoch()
    assert str(left) == '2 of 3 epochs, about 50 s left'

def test_the_warm_up_counts_once_it_is_over(tmp_path):
    left = TimeLeft(epochs=5, warmup=2, warm=tmp_path/'warm.pt')
    assert left.done == 0
    (tmp_path/'warm.pt').touch()
    assert left.done == 2

@pytest.mark.parametrize('seconds, words', [(0, '1 s'), (89, '89 s'), (90, '2 min'), (89*60, '89 min'), (90*60, '1 h 30 min')])
def test_times_in_words(seconds, words): assert _in_words(seconds) == words

# --- files

def full(*args, **kwargs): raise OSError(errno.ENOSPC, 'No space left on device')

class FullDisk(io.BytesIO):
    "A file on a disk that has room for 1000 bytes"
    def write(self, content): return full() if self.tell() > 1000 else super().write(content)

@pytest.mark.parametrize('save', [lambda f: save_text(f, 'new'), lambda f: save_tensors(f, dict(w=torch.zeros(100_000)))])
def test_a_full_disk_is_named(tmp_path, monkeypatch, save):
    "What was there stays, and nothing is left beside it; torch would say `unexpected pos 704 vs 598`"
    file = tmp_path/'last.pt'
    save_text(file, 'old')
    monkeypatch.setattr(Path, 'write_text', full)
    monkeypatch.setattr('fastrain.core.open', lambda *args: FullDisk(), raising=False)
    with pytest.raises(OSError, match='^disk full: .*last.pt could not be written. Make space') as e: save(file)
    assert e.value.errno == errno.ENOSPC
    assert file.read_text() == 'old' and [f.name for f in tmp_path.iterdir()] == ['last.pt']

def test_where_nothing_can_be_written(tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(OSError, match='file/x.json could not be written: '): save_text(tmp_path/'file'/'x.json', '')
    with pytest.raises(OSError, match='^something else$'):
        with atomic_path(tmp_path/'y'): raise OSError('something else')

@pytest.mark.parametrize('content', [b'', b'[1,', b'{"a": 1}}', b'\xff\xfe', b'['*100_000, b'{"a": ' + b'9'*5000 + b'}'])
def test_damaged_json(tmp_path, content):
    (tmp_path/'settings.json').write_bytes(content)
    with pytest.raises(ValueError, match='settings.json is damaged: its text is not JSON') as e: read_json(tmp_path/'settings.json')
    assert '\n' not in str(e.value)
    with pytest.raises(FileNotFoundError, match='There is no file .*nowhere.json'): read_json(tmp_path/'nowhere.json')

TORCHS = re.compile('weights_only|arbitrary code|stack trace|enforce fail|inline_container|Re-running|Unpickl', re.I)

def checkpoints():
    "`{name: (what to write into a file, what is said)}`"
    whole,script = io.BytesIO(),io.BytesIO()
    torch.save(dict(w=torch.zeros(1000)), whole)
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), script)
    module,evil = io.BytesIO(),io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), module)
    class Evil:
        def __reduce__(self): return print, ('it ran',)
    torch.save(Evil(), evil)
    b = whole.getvalue()
    return dict(
        empty=(b'', 'damaged'), text=(b'<html>', 'damaged'), half=(b[:len(b)//2], 'damaged'), cut=(b[:-1], 'damaged'),
        head=(b'\0'*4 + b[4:], 'damaged'),
        module=(module.getvalue(), 'it holds torch.nn.modules.linear.Linear'), evil=(evil.getvalue(), 'it holds .*print'),
        script=(script.getvalue(), 'TorchScript'))

@pytest.mark.filterwarnings('ignore')
def test_checkpoints_that_cannot_be_loaded(tmp_path, capsys):
    for name,(content,said) in checkpoints().items():
        file = tmp_path/f'{name}.pt'
        file.write_bytes(content)
        with pytest.raises(ValueError, match=f'{name}.pt is not a checkpoint that can be loaded safely: .*{said}') as e: load_tensors(file)
        assert '\n' not in str(e.value) and not TORCHS.search(str(e.value)) and not e.value.__cause__
    assert 'it ran' not in capsys.readouterr().out
