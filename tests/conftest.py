"What the tests share: a tiny net with every kind of layer that holds state, small data, and counters of work"
import copy
from collections import Counter

import matplotlib
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders, TfmdDL
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastrain.attacks.pgd import PGD
from fastrain.core import seed_all
from fastrain.data.sources import get_dls

matplotlib.use('Agg')

@pytest.fixture(autouse=True)
def _seed(): seed_all(0)

class Net(nn.Module):
    "Convolution, BatchNorm and ReLU twice, dropout, linear"
    def __init__(self, n_classes=10, width=8, bn=True, drop=0.):
        super().__init__()
        norm = nn.BatchNorm2d if bn else lambda n: nn.Identity()
        self.conv1,self.bn1 = nn.Conv2d(3, width, 3, 2, 1),norm(width)
        self.conv2,self.bn2 = nn.Conv2d(width, 2*width, 3, 2, 1),norm(2*width)
        self.pool,self.drop,self.fc = nn.AdaptiveAvgPool2d(4),nn.Dropout(drop),nn.Linear(32*width, n_classes)
    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        x = self.bn2(self.conv2(x)).relu()
        return self.fc(self.drop(self.pool(x).flatten(1)))

def net(seed=0, **kwargs):
    "A `Net` whose weights depend on `seed` alone"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net(**kwargs)

_digits = {}
def digits(part, n):
    "The first `n` digits as floats (n,3,32,32), and their classes"
    if not _digits:
        for name,dl in zip(('train', 'test'), get_dls('digits', bs=360, augment=False, device='cpu').loaders):
            xs,ys = zip(*[(x.as_subclass(Tensor), y.as_subclass(Tensor)) for x,y in dl.new(shuffle=False, drop_last=False)])
            _digits[name] = torch.cat(xs),torch.cat(ys)
    x,y = _digits[part]
    return x[:n].clone(),y[:n].clone()

def plain_dls(x, y, bs=8, n_valid=24, shuffle=True, drop_last=True, seed=0):
    "Loaders of plain tensors, which draw nothing but their order, and that by `seed` alone"
    seed_all(seed)
    x_valid,y_valid = digits('test', n_valid)
    train,valid = list(zip(x, y)),list(zip(x_valid.type_as(x), y_valid))
    return DataLoaders(TfmdDL(train, bs=bs, shuffle=shuffle, drop_last=drop_last, num_workers=0), TfmdDL(valid, bs=bs, num_workers=0), device='cpu')

def digit_dls(n=32, bs=8, double=False, **kwargs):
    x,y = digits('train', n)
    return plain_dls(x.double() if double else x, y, bs=bs, **kwargs)

def quick(steps=2, eps=.1, alpha=.05, **kwargs): return PGD(eps, alpha, steps, **kwargs)

def make_learner(dls, model, cbs=None, metrics=accuracy, **kwargs):
    return Learner(dls, model, CrossEntropyLossFlat(), cbs=cbs, metrics=metrics, **kwargs)

def quietly(learn, n_epoch=1, lr=None, method='fit', **kwargs):
    "`learn.fit` without bars or rows"
    with learn.no_bar(), learn.no_logging(): getattr(learn, method)(n_epoch, lr, **kwargs)
    return learn

def snapshot(model): return copy.deepcopy(model.state_dict())

def same(a, b):
    "Are two containers of tensors equal bit for bit? NaN equals NaN"
    if isinstance(a, Tensor): return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(v, b[k]) for k,v in a.items())
    if isinstance(a, (list, tuple)) or type(a).__name__ == 'L': return len(a) == len(b) and all(same(*o) for o in zip(a, b))
    return a == b or (a != a and b != b)

class Backwards(TorchDispatchMode):
    "Counts the backward passes of each convolution, by the address of its weight: for its input alone, and with its weight's gradient"
    def __init__(self):
        super().__init__()
        self.input_only,self.full,self.mm = Counter(),Counter(),0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default: (self.full if args[-1][1] or args[-1][2] else self.input_only)[args[2].data_ptr()] += 1
        self.mm += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))

class Forwards:
    "Counts the forward passes of a model"
    def __init__(self, model): self.n,self.handle = 0,model.register_forward_pre_hook(self._count)
    def _count(self, *args): self.n += 1

class Call(Callback):
    "Calls `f(learn)` at one `event`"
    def __init__(self, event, f, order=0, name='call'):
        self.order,self._name = order,name
        setattr(self, event, lambda: f(self.learn))
    @property
    def name(self): return self._name

def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
