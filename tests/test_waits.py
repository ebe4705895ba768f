"On a GPU nothing waits for the numbers of a single batch; what is wrong with them is said before anything is saved"
import math

import pytest
import torch
from fastai.callback.core import Callback
from fastai.learner import AvgSmoothLoss
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import digit_dls, make_learner, net, quick, quietly, same, snapshot
from fastrain.training import batches
from fastrain.training.callback import TRAINCallback
from fastrain.training.checkpoint import Checkpoint
from fastrain.training.metrics import LossOnDevice

@pytest.fixture
def as_on_a_gpu(monkeypatch): monkeypatch.setattr(batches, '_must_be_waited_for', lambda values: True)

class Fetches(TorchDispatchMode):
    "Counts the numbers that are fetched from tensors, which on a GPU are waited for"
    n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))

class CountInTraining(Callback):
    order = -100
    def before_train(self): self.fetches = Fetches().__enter__()
    def after_train(self): self.fetches.__exit__(None, None, None)

@pytest.mark.parametrize('robust', ['at', 'trades'])
def test_waits_do_not_grow_with_the_batches(as_on_a_gpu, robust):
    def fetched(n_batches):
        count = CountInTraining()
        cb = TRAINCallback(net(2), robust=robust, perturb='awp', average='ema', attack=quick())
        quietly(make_learner(digit_dls(8*n_batches), net(1), [cb, count]))
        return count.fetches.n
    assert fetched(6) == fetched(2)

class Diverge(Callback):
    "The weights are no numbers any more after batch 2 of the second epoch"
    order = TRAINCallback.order-1
    def after_step(self):
        if (self.epoch, self.iter) == (1, 2):
            with torch.no_grad(): self.model.fc.weight.fill_(math.nan)

@pytest.mark.parametrize('together', [2, 32])
def test_what_diverged_is_not_saved(as_on_a_gpu, monkeypatch, tmp_path, together):
    monkeypatch.setattr(batches, '_judged_together', together)
    learn = make_learner(digit_dls(56), net(1), [TRAINCallback(net(2), attack=quick()), Diverge(), Checkpoint(tmp_path)])
    with pytest.raises(FloatingPointError, match=r'became nan in epoch 1, batch 3 \(ce = nan, .*last\.pt'): quietly(learn, 3)
    assert len(learn.recorder.values) == 1 and all(p.isfinite().all() for p in torch.load(tmp_path/'last.pt')['model'].values())
    assert learn.iter < 6 if together == 2 else learn.iter == 6

def test_first_error_in_the_order_of_the_batches(as_on_a_gpu):
    watch,x,y = batches.BatchWatch(n_classes=10),torch.rand(2, 3, 4, 4),torch.arange(2)
    def see(x, y, loss, note):
        watch.look(x, y)
        assert watch.keep(loss, note) is None
    see(x, y, torch.tensor(1.), 0)
    see(x, y, torch.tensor(math.inf), 1)
    see(9*x, y, torch.tensor(1.), 2)
    assert watch.judge() == 1 and watch.judge() is None
    see(9*x, y, torch.tensor(math.nan), 3)
    with pytest.raises(ValueError, match='Images lie in'): watch.judge()

def trained(monkeypatch, kind):
    if kind: monkeypatch.setattr(LossOnDevice, 'put_into', lambda recorder: None)
    learn = make_learner(digit_dls(40), net(1), TRAINCallback(net(2), attack=quick()))
    return quietly(learn, 2)

def test_smoothed_loss_is_fastais(monkeypatch):
    ours,theirs = trained(monkeypatch, None).recorder,trained(monkeypatch, AvgSmoothLoss).recorder
    assert [row[0] for row in ours.values] == [row[0] for row in theirs.values] and list(ours.losses) == list(theirs.losses)
    assert type(ours.smooth_loss) is AvgSmoothLoss and ours.smooth_loss.value == theirs.smooth_loss.value

def test_float64(monkeypatch):
    learn = make_learner(digit_dls(16, double=True), net(1).double(), TRAINCallback(None, attack=quick()))
    assert math.isfinite(quietly(learn).recorder.values[0][0])

def test_later_is_the_same(as_on_a_gpu, monkeypatch):
    def train(): return snapshot(quietly(make_learner(digit_dls(40), net(1), TRAINCallback(net(2), attack=quick()))).model)
    later = train()
    monkeypatch.undo()
    assert same(later, train())
