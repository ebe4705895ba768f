"Several processes train and evaluate as one does: gloo on the CPU, one thread each"
import io, multiprocessing, os, shutil, signal, socket, subprocess, sys, time, warnings
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import SGD
from timm.layers import BatchNormAct2d
from torch import nn

from conftest import Call, digit_dls, digits, make_learner, net, quick, quietly, same, snapshot
from fastrain.core import seed_all
from fastrain.data.sources import get_dls
from fastrain.evaluation.evaluate import evaluate
from fastrain.pieces.crd import CRD
from fastrain.pieces.las import LAS
from fastrain.pieces.relations import Topology
from fastrain.pieces.strategies import FAT
from fastrain.processes import first_does, from_first, gather_objects, gather_rows, is_first, joined, n_processes, process, wait_for_all
from fastrain.training.callback import TRAINCallback
from fastrain.training.checkpoint import Checkpoint
from fastrain.training.distributed import Together, _synchronised
from fastrain.training.metrics import RobustAccuracy
from fastrain.training.standard import CoTrained

fresh = multiprocessing.get_context('forkserver') # imports once, and then forks processes in which nothing has run yet
fresh.set_forkserver_preload(['fastrain.all', 'fastai.vision.all'])

def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def _child(rank, n, port, sender, f, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        with joined(cpu=True): found = f(*args)
    except BaseException as e: found = f'{type(e).__name__}: {e}'
    file = io.BytesIO()
    torch.save(found, file)
    sender.send_bytes(file.getvalue())

def start(n, f, *args) -> list: # Of (process, receiver)
    port,group = free_port(),[]
    for rank in range(n):
        receiver,sender = fresh.Pipe(False)
        p = fresh.Process(target=_child, args=(rank, n, port, sender, f, args))
        p.start()
        sender.close()
        group.append((p, receiver))
    return group

def told(p, receiver, seconds=120):
    "What a process returned, or its error as text; None if it was killed"
    assert receiver.poll(seconds), 'no answer'
    try: found = torch.load(io.BytesIO(receiver.recv_bytes()), weights_only=False)
    except EOFError: found = None
    p.join()
    return found

def together(n, f, *args) -> list:
    "What `f` returns in each of `n` processes that work together"
    return [told(*member) for member in start(n, f, *args)]

# One step after the other

methods = dict(
    at={}, trades=dict(robust='trades'), lbgat=dict(robust='trades', relation='lbgat+train'), mart=dict(robust='mart'),
    mca=dict(robust='mca', relation='rkd-d+rkd-a+pkt'), alp=dict(robust='alp', relation='absolute'))

def by_pixels(x, eps, norm, clip):
    "A start for the attack that depends on the image alone; TRADES' loss has no gradient at the image itself"
    return (x + eps/2*torch.sin(100*x)).clamp(*clip)

def train(n, bs, name, perturb='awp:warmup=0', **kwargs):
    "Weights, losses and columns after three steps on the same images"
    dls = digit_dls(48, bs, double=True, shuffle=False, n_valid=24)
    loss = CrossEntropyLossFlat(weight=torch.linspace(.5, 2, 10)) if name in ('at', 'mart') else CrossEntropyLossFlat()
    cb = TRAINCallback(net(2, bn=False).double(), attack=quick(start=by_pixels), perturb=perturb, average='ema', **methods[name], **kwargs)
    learn = Learner(dls, net(1, bn=False).double(), loss, opt_func=SGD, cbs=cb, metrics=[accuracy, RobustAccuracy(quick(), n=11)])
    with learn.distrib_ctx(sync_bn=False) if n > 1 else nullcontext(): quietly(learn, 1, .1)
    names,values = learn.recorder.metric_names[1:-1],learn.recorder.values[-1]
    varies = {'pgd2_accuracy', 'valid_loss'} # by random starts; by class weights, in fastai's mean of the means of parts
    return dict(model=snapshot(learn.model), standard=snapshot(cb.standard_learner.model), ema=snapshot(cb.average.model),
                losses=torch.stack(learn.recorder.losses), columns={n: v for n,v in zip(names, values) if n not in varies})

def train_all(n, names): return {name: train(n, 16//n, name) for name in names}

def close(a, b, tol=1e-6):
    "Are two containers of tensors and numbers equal up to rounding?"
    if isinstance(a, dict): return a.keys() == b.keys() and all(close(a[k], b[k], tol) for k in a)
    return torch.allclose(torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64), rtol=tol, atol=1e-9)

def check_equal(names):
    one = train_all(1, names)
    for rank,two in enumerate(together(2, train_all, 2, names)):
        assert isinstance(two, dict), two
        for name in names:
            wrong = [part for part in one[name] if not close(one[name][part], two[name][part])]
            assert not wrong, (rank, name, wrong)

def test_two_processes_take_the_steps_of_one(): check_equal(['lbgat'])

@pytest.mark.slow
def test_two_processes_take_the_steps_of_one_whatever_the_loss(): check_equal(list(methods))

def _apart(): return train(2, 8, 'at', apart=True)['model']

def _strategies():
    "Weights with adversaries that are chosen, in both processes"
    found = {}
    for name,strategy in dict(las=LAS(net=net(3, n_classes=37), interval=1), fat=FAT(breaks=(0,))).items():
        cb = TRAINCallback(net(2), attack=quick(), strategy=strategy, perturb='awp', average='ema')
        learn = make_learner(digit_dls(32, 8), net(1), [cb, ChannelsLast()])
        with learn.distrib_ctx(sync_bn=False): quietly(learn, 1, .1)
        found[name] = dict(model=snapshot(learn.model), standard=snapshot(cb.standard_learner.model),
                           ema=snapshot(cb.average.model), strategy=snapshot(strategy._net) if name == 'las' else {})
    return found

@pytest.mark.slow
def test_processes_stay_equal():
    first,second = together(2, _apart)
    assert same(first, second), 'each compares its own images'
    assert not close(first, train(1, 16, 'at')['model']), 'and is another method'
    first,second = together(2, _strategies)
    assert same(first, second), first if isinstance(first, str) else 'with BatchNorm of each device, AWP, EMA, LAS and FAT'

# Stopped and continued

def build(path, cbs=()):
    "A learner whose augmentation, order, dropout, starts and negatives are all random"
    seed_all(1)
    dls = get_dls('digits', bs=8, n_train=64, n_test=24, device='cpu')
    cb = TRAINCallback(CoTrained(net(2, drop=.2), warmup=1, seed=3, keep=path/'warm.pt'), robust='trades', attack=quick(), average='ema',
                       relation=[Topology(), CRD(k=8, dim=4)])
    return Learner(dls, net(1, drop=.3), CrossEntropyLossFlat(), cbs=[cb, *cbs], metrics=[accuracy, RobustAccuracy(quick(), n=10)])

def _finish(path, n_epoch=3, cbs=()):
    learn = build(path, cbs)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        with learn.distrib_ctx(sync_bn=False) if n_processes() > 1 else nullcontext():
            quietly(learn, n_epoch, .05, cbs=Checkpoint(path/'ckpt', resume=True))
    notes = [str(w.message) for w in found if 'processes' in str(w.message)]
    return dict(model=snapshot(learn.model), standard=snapshot(learn.train_cb.standard_learner.model), notes=notes,
                values=[list(v)[:-1] for v in learn.recorder.values], starts=torch.rand(3))

def _stop_after(epoch):
    def stop(learn):
        wait_for_all()
        if learn.epoch == epoch: raise KeyboardInterrupt
    return Call('after_epoch', stop, 99)

def _interrupted(path):
    try: _finish(path, cbs=[_stop_after(1)])
    except KeyboardInterrupt: return 'stopped'

@pytest.mark.slow
def test_resumed(tmp_path):
    one,two = tmp_path/'one',tmp_path/'two'
    whole = together(2, _finish, one)
    assert isinstance(whole[0], dict), whole
    assert same(whole[0]['model'], whole[1]['model']) and same(whole[0]['values'], whole[1]['values'])
    assert not same(whole[0]['starts'], whole[1]['starts']), 'each has random numbers of its own'
    assert together(2, _interrupted, two) == ['stopped']*2
    assert not list(two.rglob('.unfinished*'))
    by_one = tmp_path/'by_one'
    two.rename(by_one)
    shutil.copytree(by_one, two)
    assert same(together(2, _finish, two), whole), 'by two processes: bit for bit'
    alone = _finish(by_one)
    assert len(alone['notes']) == 1 and 'batches of 8 images instead of 16' in alone['notes'][0]
    assert len(alone['values']) == 3 and same(alone['values'][:2], whole[0]['values'][:2])

def _long(path):
    return _finish(path, cbs=[Call('after_batch', lambda learn: time.sleep(.2 if learn.training else 0))])

@pytest.mark.slow
def test_one_is_killed(tmp_path):
    whole = together(2, _finish, tmp_path/'whole')
    first,second = start(2, _long, tmp_path/'killed')
    while not (tmp_path/'killed'/'ckpt'/'last.pt').exists(): time.sleep(.05)
    time.sleep(.3) # within the second epoch
    second[0].kill()
    began = time.monotonic()
    assert told(*first, 60).startswith('ConnectionError: another of the 2 processes has ended'), 'a clear error'
    assert time.monotonic() - began < 60 and told(*second) is None
    assert same(together(2, _finish, tmp_path/'killed'), whole), 'nothing is lost'

# Evaluation

def _evaluated(out=None, attacks='natural,pgd3,cw3,apgd-ce'):
    x,y = digits('test', 101)
    dl = [(x[i:i + 16], y[i:i + 16]) for i in range(0, 101, 16)]
    ev = evaluate(net(1), dl, attacks, eps=.05, out=out, standard=net(2), progress=False)
    return dict(per_image=ev.per_image.to_csv(), table=ev.table.drop(columns='s').to_csv(), notes=ev.notes, figures=ev.figures)

@pytest.mark.slow
@pytest.mark.parametrize('n', [2, 3])
def test_evaluation_in_parts(n, tmp_path):
    one = _evaluated(tmp_path/'one')
    for found in together(n, _evaluated, tmp_path/'many'): assert found == one, found
    def files(out): return sorted(str(f.relative_to(out)) for f in out.rglob('*') if f.is_file())
    assert files(tmp_path/'many') == files(tmp_path/'one')
    for name in ('per_image.csv',): assert (tmp_path/'many'/name).read_bytes() == (tmp_path/'one'/name).read_bytes()
    began = {f: f.stat().st_mtime_ns for f in (tmp_path/'many'/'parts').rglob('*.pt')}
    assert _evaluated(tmp_path/'many') == one, 'one process goes on with what many have left'
    assert began == {f: f.stat().st_mtime_ns for f in (tmp_path/'many'/'parts').rglob('*.pt')}, 'and attacks nothing again'

# What they tell each other

def _talk():
    rows, = gather_rows([torch.full((2, 3), process()+1., requires_grad=True)])
    def fails(): raise ValueError('not here')
    try: failed = first_does(fails)
    except (ValueError, SystemExit) as e: failed = repr(e)
    return dict(first=from_first(process()), all=gather_objects(process()), rows=rows[:,0].tolist(), failed=failed, is_first=is_first())

def test_what_processes_tell_each_other():
    first,second = together(2, _talk)
    assert first == dict(first=0, all=[0, 1], rows=[1, 1, 2, 2], failed="ValueError('not here')", is_first=True)
    assert second == dict(first, failed='SystemExit(1)', is_first=False)

# What is refused, and what needs a GPU as far as it can be tried without one

def test_refused():
    with pytest.raises(ValueError, match='remembers images of all processes'): TRAINCallback(net(2), relation=CRD(), apart=True)
    with pytest.raises(ValueError, match="sync_bn=True: PyTorch's synchronised BatchNorm works on GPUs alone"): _synchronised(net(1))

def test_batchnorm_is_synchronised_for_a_while():
    "Layers keep their tensors and their activation, and are there again afterwards"
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.BatchNorm2d(4)).to('meta')
    before,tensors = list(model),model.state_dict(keep_vars=True)
    shared = Together(SimpleNamespace(cbs=[]))
    shared._norms = _synchronised(model)
    assert [type(m).__name__ for m in model] == ['Conv2d', 'SyncBatchNormAct', 'SyncBatchNorm']
    now = model.state_dict(keep_vars=True)
    assert now.keys() == tensors.keys() and all(now[k] is tensors[k] for k in now)
    model.eval()
    shared.end()
    assert list(model) == before and not any(m.training for m in model)

# As it is typed

accelerate = ['accelerate.commands.launch', '--multi_gpu', '--num_processes=2', # the way of several processes, with or without GPUs
              '--num_machines=1', '--mixed_precision=no', '--dynamo_backend=no']
torchrun = ['torch.distributed.run', '--nproc-per-node=2']

def typed(launcher, *words):
    "The process of a launcher, whose output is a pipe"
    port = f'{"--master-port" if launcher is torchrun else "--main_process_port"}={free_port()}'
    command = [sys.executable, '-m', *launcher, port, '-m', 'fastrain', *map(str, words), '--device', 'cpu']
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONUNBUFFERED='1')
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)

def lasting(out, process):
    "Wait for the first checkpoint of a run, and kill a process that the launcher has started"
    while not list(out.glob('checkpoints/*/last.pt')): assert process.poll() is None, process.stdout.read()
    workers = [int(p) for p in Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()]
    os.kill(workers[-1], signal.SIGKILL)

@pytest.mark.slow
def test_as_it_is_typed(tmp_path):
    out = tmp_path/'run'
    options = '--epochs 20 --steps 1 --n-train 64 --n-test 20 --bs 8 --attacks natural --method at'.split()
    killed = typed(torchrun, 'train', '--out', out, *options)
    lasting(out, killed)
    said = killed.communicate(timeout=60)[0]
    assert killed.returncode and ('another of the 2 processes has ended' in said or 'stopped by the launcher' in said), said
    going_on = typed(accelerate, 'train', '--out', out, *options, '--resume')
    said = going_on.communicate(timeout=300)[0]
    assert not going_on.returncode, said
    assert said.count('Attack by attack') == 1 and said.count('More in') == 1, said
    assert len(pd.read_csv(out/'history.csv')) == 20 and len(list(out.glob('checkpoints/*/last.pt'))) == 1
    parts = typed(torchrun, 'evaluate', out, '--attacks', 'natural,pgd2', '--which', 'last')
    assert parts.communicate(timeout=300)[0].count('Attack by attack') == 1 and not parts.returncode
