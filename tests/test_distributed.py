"Several processes train and evaluate as one does: gloo on the CPU, one thread each"
import io, multiprocessing, os, socket
from contextlib import nullcontext

import pytest
import torch
from fastai.optimizer import SGD

from conftest import Net, digit_dls, digits, make_learner, net, plain_dls, quick, quietly, snapshot
from fastrain.attacks.pgd import PGD
from fastrain.core import seed_all
from fastrain.processes import is_first, joined, n_processes, process
from fastrain.training.callback import TRAINCallback
from fastrain.training.metrics import RobustAccuracy

fresh = multiprocessing.get_context('forkserver') # imports once, and then forks processes in which nothing has run yet
fresh.set_forkserver_preload(['test_distributed'])

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

methods = dict(
    at=dict(), trades=dict(robust='trades'), lbgat=dict(robust='trades', relation='lbgat+train'), mart=dict(robust='mart'),
    mca=dict(robust='mca', relation='rkd-d+pkt'), apart=dict(apart=True))

def by_pixels(x, eps, norm, clip):
    "A start for the attack that depends on the image alone; TRADES' loss has no gradient at the image itself"
    return (x + eps/2*torch.sin(100*x)).clamp(*clip)

def train(n, bs, name, perturb='awp:warmup=0', average='ema'):
    "Weights, losses and columns after three steps on the same images"
    dls = digit_dls(48, bs, double=True, shuffle=False, n_valid=24)
    learn = make_learner(dls, net(1, bn=False).double(), TRAINCallback(net(2, bn=False).double(), attack=quick(start=by_pixels),
        perturb=perturb, average=average, **methods[name]), opt_func=SGD)
    shared = learn.distrib_ctx(sync_bn=False) if n > 1 else nullcontext()
    with shared: quietly(learn, 1, .1)
    cb = learn.train_cb
    return dict(model=snapshot(learn.model), standard=snapshot(cb.standard_learner.model), ema=snapshot(cb.average.model) if average else {},
                losses=torch.stack(learn.recorder.losses), values=list(learn.recorder.values[-1]), names=list(learn.recorder.metric_names))

def train_all(n, names): return {name: train(n, 16//n, name) for name in names}

def close(a, b):
    "Are two containers of tensors and numbers equal up to rounding?"
    if isinstance(a, dict): return a.keys() == b.keys() and all(close(a[k], b[k]) for k in a)
    return torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=1e-6, atol=1e-9)

def check_equal(names):
    one = train_all(1, names)
    for rank,two in enumerate(together(2, train_all, 2, names)):
        assert isinstance(two, dict), two
        for name in names:
            for part in ('model', 'standard', 'ema'): assert close(one[name][part], two[name][part]), (rank, name, part)
            assert one[name]['names'] == two[name]['names'], name

def test_two_processes_take_the_steps_of_one(): check_equal(['lbgat'])
