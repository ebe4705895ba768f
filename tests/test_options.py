"""Every option of the command line with values that it must refuse: before any work, in one line that names option or value, and with
nothing written. A new option that is not in `BAD` fails. With FASTRAIN_MESSAGES=FILE the lines are kept, to be read for their tone"""
import hashlib, inspect, os, signal, sys
from pathlib import Path

import pytest

import fastrain.runs.evaluate
from fastrain import cli

LONG = 'x'*2000
COUNT = ['abc', '-1', '1.5', '1e400', ''] # for a whole number
NUMBER = ['abc', 'nan', 'inf', '-1', ''] # for a number
SIZE = ['abc', '-1', 'nan', 'inf', '8/', '1/0', ''] # for a size of a perturbation
NAME = ['nowhere', '', LONG]
FILES = ['nowhere.py', '', 'a.py,,b.py', LONG]
ATTACKS = ['nowhere', 'pgd20,,fgsm', 'pgd20@', 'pgd20@-1', 'pgd20+', 'topology+pgd20', '', LONG]
METHODS = ['nowhere', 'at+', '+train', 'at,,trades', 'trades(', 'trades(beta=3', 'trades(beta=abc)', 'trades(nowhere=1)', 'trades:',
           'trades:beta=3,beta=4', 'trades:beta=abc', 'at+trades', '', LONG]
SEED = ['abc', '1.5', str(2**64), '']

BAD = dict(
    train=dict(
        data=NAME, method=['at,at', *METHODS], out=['', LONG], backbone=[*NAME, 'hf-hub:nobody/nothing'],
        standard=[*NAME, 'nowhere.pt', 'pretrained:nowhere', 'hf-hub:nobody/nothing'],
        epochs=[*COUNT, '0'], bs=[*COUNT, '0', '2', '1000000'], lr=[*NUMBER, '0'], wd=NUMBER,
        drops=['abc', '5,3', '-1', '3,,5', '0', '3.5', ''], eps=[*SIZE, '255', '1.5'], alpha=[*SIZE, '0'],
        steps=[*COUNT, '0'], norm=NAME, eval_eps=[*SIZE, '255'], lam=NUMBER, lam_schedule=NAME, warmup=COUNT,
        holdout=[*NUMBER, '1e9'], n_train=[*COUNT, '0', '1000000'], n_test=[*COUNT, '0', '1000000'],
        img_size=[*COUNT, '0', '1', '100000'], path=['nowhere', '', LONG], profile=NAME, precision=[*NAME, 'fp8'], device=NAME, seed=SEED,
        fast=['=maybe'], channels_last=['=maybe'], fold=['=maybe'], chunk=[*COUNT, '0'], compile=['=maybe'],
        sync_bn=['=maybe'], apart=['=maybe'],
        attacks=ATTACKS, load=FILES, resume=['=maybe'], recipe=['nowhere.toml', '', LONG]),
    evaluate=dict(
        run=NAME, attacks=ATTACKS, n=[*COUNT, '0', '1000000'], eps=[*SIZE, '255', '1/255,,2/255'], images=['=maybe'], rescore=['=maybe'],
        pictures=[*NAME, 'eps', 'curves,,images'], method=['trades', *METHODS],
        which=[*NAME, 'last,,best', 'average'], n_support=[*COUNT, '0', '1000000', '1'],
        path=['nowhere', '', LONG], device=NAME, load=FILES, fast=['=maybe'],
        # These are for models that are not of a run
        data=NAME, weights=['nowhere.pt'], backbone=NAME, standard=['nowhere.pt'], img_size=COUNT,
        bs=COUNT, norm=NAME, seed=SEED, out=['new']),
    compare=dict(runs=['nowhere', '', LONG], out=['', LONG, 'RUN'], against=NAME, load=FILES),
    methods=dict(piece=['nowhere', LONG], load=FILES),
    tables={},
    table=dict(number=NAME),
    recipe=dict(
        row=['6', '6/', '6/TRADES + TRANE', '66/TRADES', *NAME], scale=NAME, seed=SEED, data=NAME, backbone=NAME, standard=NAME,
        epochs=[*COUNT, '0'], bs=[*COUNT, '0', '2'], lam=NUMBER, n_train=[*COUNT, '0'], n_test=[*COUNT, '0'], attacks=ATTACKS))

BAD |= dict(
    reproduce=dict(
        what=['nowhere', 'nowhere.toml', '', LONG], scale=NAME, seeds=['1,,2', *SEED], out=['', LONG], epochs=[*COUNT, '0'],
        n_train=[*COUNT, '0'], backbone=NAME, data=NAME, path=['nowhere', '', LONG], device=NAME, again=['=maybe'], commands=['=maybe'],
        on=NAME, cpus=[*NUMBER, '0', '2'], gpus=[*NUMBER, '2'],
        dry_run=['=maybe'], load=FILES),
    report=dict(ledgers=['nowhere', '', LONG], out=['', LONG]),
    pareto=dict(
        families=['nowhere', 'at+train lam=x', '', LONG], scale=NAME, seeds=['1,,2', *SEED], out=['', LONG],
        attacks=['natural', *ATTACKS], epochs=[*COUNT, '0'], n_train=[*COUNT, '0'], backbone=NAME, data=NAME, path=['nowhere', '', LONG],
        device=NAME, again=['=maybe'], dry_run=['=maybe'], load=FILES,
        on=NAME, cpus=[*NUMBER, '0', '2'], gpus=[*NUMBER, '2'], commands=['=maybe']))

CASES = [(command, option, value) for command,options in BAD.items() for option,values in options.items() for value in values]

BASE = dict(
    train=['--out', 'new', '--epochs', '1', '--warmup', '0', '--n-train', '24', '--n-test', '20', '--bs', '8', '--steps', '1',
           '--attacks', 'natural', '--device', 'cpu'],
    evaluate=['RUN', '--attacks', 'natural,fgsm,topology', '--n', '10', '--device', 'cpu'],
    compare=['RUN', '--out', 'new'],
    methods=[],
    table=[],
    recipe=['6/TRADES + TRAIN', '--scale', 'tiny'])
POSITIONAL = dict(evaluate='run', compare='runs', methods='piece', table='number', recipe='row')
BASE |= dict(
    reproduce=['6/Vanilla AT', '--scale', 'tiny', '--out', 'new', '--device', 'cpu'],
    report=['RUN'],
    pareto=['at+train lam=1', '--scale', 'tiny', '--seeds', '1', '--out', 'new', '--device', 'cpu'])
POSITIONAL |= dict(reproduce='what', report='ledgers', pareto='families')

def typed(command, option, value, run) -> list:
    "The command line"
    rest = list(BASE[command])
    if option == POSITIONAL.get(command): rest = [value, *rest[rest[:1] in (['RUN'], ['6/TRADES + TRAIN']):]]
    elif value.startswith('='): rest.append(f'--{option}{value}')
    else: rest.append(f'--{option.replace("_", "-")}={value}')
    return [command, *(str(run) if a == 'RUN' else a.replace('=RUN', f'={run}') for a in rest)]

def refusal(args, capsys, monkeypatch) -> str:
    "What the program prints as it ends with an error"
    monkeypatch.setattr(sys, 'argv', ['fastrain', *args])
    with pytest.raises(SystemExit) as end: cli.main()
    assert end.value.code not in (None, 0)
    printed = capsys.readouterr().err
    text = end.value.code if isinstance(end.value.code, str) else printed.strip().splitlines()[-1]
    return text.strip()

def contents(folder):
    "What is in a folder"
    files = [p for p in Path(folder).rglob('*') if p.name not in ('.lock', '.holder')]
    return {str(p.relative_to(folder)): p.is_file() and hashlib.md5(p.read_bytes()).hexdigest() for p in files}

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A run that is trained"
    out = tmp_path_factory.mktemp('options')/'run'
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None) # they take most of the time
        cli.train(method='standard,at+train', out=str(out), epochs=1, warmup=0, n_train=24, n_test=20, bs=8, steps=1,
                  attacks='natural', device='cpu')
    return out

@pytest.fixture(autouse=True)
def in_time():
    "A value that is accepted, and trained with, must not hold up the suite"
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail('still busy after 30 s'))
    signal.alarm(30)
    yield
    signal.alarm(0)

@pytest.mark.parametrize('command', BAD)
def test_every_option_has_bad_values(command):
    assert set(BAD[command]) == set(inspect.signature(getattr(cli, command)).parameters)

@pytest.mark.parametrize('command,option,value', CASES, ids=lambda s: s[:20])
def test_bad_value(command, option, value, run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = contents(run)
    text = refusal(typed(command, option, value, run), capsys, monkeypatch)
    if file := os.environ.get('FASTRAIN_MESSAGES'):
        with open(file, 'a') as f: print(f'{command} --{option} {value[:40]!r}\n    {text[:600]}', file=f)
    assert text.startswith('fastrain') and len(text) < 500 + len(value) and '\n' not in text and 'Traceback' not in text
    named = (option.replace('_', '-'), option.replace('_', ' '), option)
    assert any(n in text for n in named) or (value and value.split(':')[-1][:20] in text), text
    assert contents(run) == before and not contents(tmp_path)
