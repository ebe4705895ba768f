"""Break tiny commands at each of their writes, in each way that a machine can, and give the same command again: are the results those
of a command that nothing stopped? `python bench/faults.py --result faults.json`

A write is whatever changes a file or folder: opening for writing, making, renaming, removing. Python announces each of them before it
happens; that is where the fault is made. Needs fork, so Linux or macOS."""
import errno, json, os, resource, shutil, signal, sys, tempfile, traceback
from collections import Counter
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault('OMP_NUM_THREADS', '1') # one thread each, and figures that are the same bit for bit

import pandas as pd
import torch
from fastcore.script import call_parse
from torch import Tensor

import fastrain.all # once, where each fork finds it
from fastrain import cli
from fastrain.core import environment, load_tensors, save_json

class Fault(NamedTuple):
    command:str # One of `COMMANDS`
    kind:str # One of `KINDS`
    at:int # Number of the write, from 0

# -- faults ------------------------------------------------------------------------------------------------------------------
def _no_space(): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
def _no_access(): raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
def _kill(): os.kill(os.getpid(), signal.SIGKILL)
def _interrupt(): signal.raise_signal(signal.SIGINT)
def _cut(): resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64)) # from now on, whatever is written ends after 64 bytes
KINDS = dict(ENOSPC=_no_space, EACCES=_no_access, SIGKILL=_kill, SIGINT=_interrupt, cut=_cut)

_writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_changes = 'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.truncate', 'os.link', 'os.symlink'

class Writes:
    "Counts the writes under `root`, and makes a fault before one of them"
    def __init__(self, root, kind=None, at=None):
        self.root,self.fault,self.at = str(root),kind and KINDS[kind],at
        self.n,self.names = 0,[]

    def __call__(self, event, args):
        if not self._is_write(event, args): return
        self.n += 1
        self.names.append(f'{event} {Path(os.fsdecode(args[0])).suffix}')
        if self.fault and self.n - 1 == self.at: self.fault()

    def _is_write(self, event, args):
        if event == 'open' and not (args[2] or 0) & _writing: return False
        if event != 'open' and event not in _changes: return False
        return isinstance(args[0], (str, bytes, os.PathLike)) and os.fsdecode(args[0]).startswith(self.root)

# -- a command in a process of its own ----------------------------------------------------------------------------------------
class Ended(NamedTuple):
    status:int # Exit status; negative: number of the signal that ended it
    text:str # What it printed
    writes:list # What it wrote, in order; empty if it was killed

def run_command(args, folder, kind=None, at=None) -> Ended:
    "`fastrain *args` in a fork of this process, with its current folder `folder`"
    with tempfile.TemporaryDirectory() as logs:
        log,counted = Path(logs)/'log',Path(logs)/'writes'
        pid = os.fork()
        if pid == 0: _child(args, folder, Writes(folder, kind, at), log, counted)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        writes = counted.read_text().splitlines() if counted.exists() else []
        return Ended(status, log.read_text(), writes)

def _child(args, folder, writes, log, counted):
    "Never returns"
    status = 70
    try:
        fd = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN) # a write that is cut is an error, not the end
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        sys.argv = ['fastrain', *args]
        sys.addaudithook(writes)
        status = _status(cli.main)
        writes.fault = None
        sys.stdout.flush()
        counted.write_text('\n'.join(writes.names))
    except BaseException: traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)

def _status(main) -> int:
    "The exit status that Python would give, its message printed"
    try: main()
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    return 0

# -- the commands, and what they leave -----------------------------------------------------------------------------------------
_sizes = ['--epochs', '2', '--n-train', '24', '--n-test', '20', '--holdout', '4', '--bs', '8', '--steps', '1', '--warmup', '1',
          '--device', 'cpu', '--attacks', 'natural,fgsm']
_train = ['train', '--method', 'at,at+train+ema', *_sizes]
COMMANDS = dict(
    train=[*_train, '--out', 'run'],
    evaluate=['evaluate', 'run', '--attacks', 'natural,pgd2', '--n', '10', '--images', '--device', 'cpu'],
    compare=['compare', 'run', 'other', '--out', 'compared'])

def prepare(folder, command):
    "What the command finds"
    if command == 'train': return
    _sound(run_command([*_train, '--out', 'run'], folder))
    if command == 'compare': _sound(run_command([*_train, '--out', 'other', '--seed', '2'], folder))

def repeated(command, folder) -> list:
    "The command as the program asks for it after an interruption"
    begun = command == 'train' and (Path(folder)/'run'/'settings.json').is_file()
    return [*COMMANDS[command], '--resume'] if begun else COMMANDS[command]

def _sound(ended):
    if ended.status: raise RuntimeError(ended.text)
    return ended

# measured by the clock, or what was typed: the second command has --resume
_circumstances = 'seconds', 'seconds_per_epoch', 'environment', 'time', 's/epoch', 'command', 'commands'

def outcome(folder) -> dict:
    "Everything in a folder that must be the same each time: tensors, figures and tables by file; the names of the rest"
    files = sorted(p for p in Path(folder).rglob('*') if p.is_file() and p.name not in ('.lock', '.holder'))
    return {str(f.relative_to(folder)): _content(f) for f in files}

def _content(file):
    if file.suffix == '.pt': return _untimed(load_tensors(file))
    if file.suffix == '.json': return _untimed(json.loads(file.read_text()))
    if file.suffix == '.csv': return _untimed(pd.read_csv(file).to_dict('list'))
    return file.stat().st_size > 0

def _untimed(o):
    "`o` without what differs from time to time; tensors as numbers"
    if isinstance(o, dict): return {k: _untimed(v) for k,v in o.items() if k not in _circumstances}
    if isinstance(o, (list, tuple)): return [_untimed(v) for v in o]
    if isinstance(o, Tensor): return o.dtype, o.shape, o.contiguous().numpy().tobytes()
    return repr(o)

# -- one fault after the other ---------------------------------------------------------------------------------------------------
def survive(fault:Fault, before, wanted:dict) -> str: # What went wrong; nothing if all is well
    "Give a command, break it, give it again, and compare what it leaves with `wanted`"
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)/'work'
        shutil.copytree(before, folder)
        broken = run_command(COMMANDS[fault.command], folder, fault.kind, fault.at)
        if 'Traceback' in broken.text: return f'traceback\n{broken.text}'
        if broken.status == 0: return differences(outcome(folder), wanted) # it went on without
        again = run_command(repeated(fault.command, folder), folder)
        if again.status: return f'{broken.text}\n-- again --\n{again.text}'
        return differences(outcome(folder), wanted)

def differences(found:dict, wanted:dict) -> str:
    odd = [f'{f} is left over' for f in found if f not in wanted]
    odd += [f'{f} is missing' for f in wanted if f not in found]
    odd += [f'{f} differs' for f in wanted if f in found and found[f] != wanted[f]]
    return ', '.join(odd)

def points(command, folder) -> tuple: # Folder before, outcome after, what was written
    "Run a command undisturbed"
    before,after = Path(folder)/f'{command}-before',Path(folder)/f'{command}-after'
    before.mkdir()
    prepare(before, command)
    shutil.copytree(before, after)
    ended = _sound(run_command(COMMANDS[command], after))
    return before,outcome(after),ended.writes

def _try(job):
    fault,before,wanted = job
    return fault,survive(fault, before, wanted)

def _kinds_at(at, kinds, each): return kinds if each else [kinds[at % len(kinds)]]

@call_parse
def main(
    result:str='runs/faults.json', # File for the counts
    commands:str=','.join(COMMANDS), # Commands, comma-separated
    kinds:str=','.join(KINDS), # Kinds of faults, comma-separated
    each:bool=False, # Make each kind at each write? Else the kinds take turns
    workers:int=2 # Processes at once
):
    "Make a fault at each write"
    torch.set_num_threads(1)
    jobs,counts,failed = [],{},[]
    with tempfile.TemporaryDirectory() as tmp:
        for command in commands.split(','):
            before,wanted,writes = points(command, tmp)
            counts[command] = dict(writes=len(writes), **Counter(w.split()[0] for w in writes))
            print(command, counts[command])
            for at in range(len(writes)):
                jobs += [(Fault(command, kind, at), before, wanted) for kind in _kinds_at(at, kinds.split(','), each)]
        with get_context('fork').Pool(workers) as pool:
            for i,(fault,wrong) in enumerate(pool.imap_unordered(_try, jobs)):
                if wrong: failed.append(dict(fault._asdict(), wrong=wrong))
                if wrong: print(f'{fault}: {wrong}')
                if i % 50 == 49: print(f'{i + 1} of {len(jobs)} faults, {len(failed)} not survived', flush=True)
    survived = len(jobs) - len(failed)
    save_json(result, dict(writes=counts, faults=len(jobs), survived=survived, failed=failed, environment=environment('cpu')))
    print(f'{survived} of {len(jobs)} faults survived')
    if failed: sys.exit(1)
