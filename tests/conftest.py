"What the tests share: a tiny net with every kind of layer that holds state, small data, and counters of work"
import copy, os
from collections import Counter

os.environ.setdefault('OMP_NUM_THREADS', '1') # before torch is imported: workers side by side must not fight for cores

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
torch.set_num_threads(1)

@pytest.fixture(autouse=True)
def _seed(): seed_all(0)

class Net(nn.Module):
    "Convolution, BatchNorm and ReLU twice, dropout, linear"
    def __init__(self, n_classes=10, width=8, bn=True, drop=0.):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1)
        self.bn1 = nn.BatchNorm2d(width) if bn else nn.Identity()
        self.conv2 = nn.Conv2d(width, 2*width, 3, 2, 1)
        self.bn2 = nn.BatchNorm2d(2*width) if bn else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.drop = nn.Dropout(drop)
        self.fc = nn.Linear(32*width, n_classes)

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
        dls = get_dls('digits', bs=360, augment=False, device='cpu')
        for name,dl in zip(('train', 'test'), dls.loaders):
            xs,ys = zip(*dl.new(shuffle=False, drop_last=False))
            _digits[name] = torch.cat(xs).as_subclass(Tensor), torch.cat(ys).as_subclass(Tensor)
    x,y = _digits[part]
    return x[:n].clone(), y[:n].clone()

def plain_dls(x, y, bs=8, n_valid=24, shuffle=True, drop_last=True, seed=0):
    "Loaders of plain tensors, which draw nothing but their order, and that by `seed` alone"
    seed_all(seed)
    x_valid,y_valid = digits('test', n_valid)
    train = TfmdDL(list(zip(x, y)), bs=bs, shuffle=shuffle, drop_last=drop_last, num_workers=0)
    valid = TfmdDL(list(zip(x_valid.type_as(x), y_valid)), bs=bs, num_workers=0)
    return DataLoaders(train, valid, device='cpu')

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
    if isinstance(a, Tensor): return isinstance(b, Tensor) and _same_tensor(a, b)
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(v, b[k]) for k,v in a.items())
    if isinstance(a, (list, tuple)) or type(a).__name__ == 'L':
        return len(a) == len(b) and all(same(*o) for o in zip(a, b))
    return a == b or (a != a and b != b)

def _same_tensor(a, b):
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())

class Backwards(TorchDispatchMode):
    "Counts the backward passes of each convolution by its weight's address: for its input alone, and with its weight's gradient"
    def __init__(self):
        super().__init__()
        self.input_only,self.full = Counter(),Counter()
        self.mm = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            _,weight_gradient,bias_gradient = args[-1]
            counter = self.full if weight_gradient or bias_gradient else self.input_only
            counter[args[2].data_ptr()] += 1
        self.mm += func is torch.ops.aten.mm.default
        return func(*args, **(kwargs or {}))

class Forwards:
    "Counts the forward passes of a model"
    def __init__(self, model):
        self.n = 0
        self.handle = model.register_forward_pre_hook(self._count)
    def _count(self, *args): self.n += 1

class Call(Callback):
    "Calls `f(learn)` at one `event`"
    def __init__(self, event, f, order=0, name='call'):
        self.order = order
        self._name = name
        setattr(self, event, lambda: f(self.learn))
    @property
    def name(self): return self._name

def hooks(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
