"What each method costs: forwards and backwards per batch, counted, and the time of a step relative to AT's"
import copy, statistics, time
from collections import Counter

import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import get_model
from fastcore.script import call_parse
from torch.utils._python_dispatch import TorchDispatchMode

from fastrain.attacks.pgd import PGD
from fastrain.training.callback import TRAINCallback
from fastrain.core import environment, save_json, seed_all
from fastrain.data.sources import get_dls
from fastrain.training.methods import parse_method
from fastrain.models.backbone import create_backbone
from fastrain.evaluation.tables import markdown_table
from fastrain.training.schedules import torch_sgd
from fastrain.training.standard import CoTrained

METHODS = ('at', 'standard', 'alp', 'trades', 'mart', 'mca', 'gairat', 'fat', 'trades+fat', 'sat', 'ecas', 'las:net=NET',
           'trades+las:net=NET', 'las-awp', 'at+lbgat', 'trades+lbgat',
           'at+train', 'trades+train', 'trades+lbgat+train', "at+train'", 'at+train*', 'at+absolute', 'at+rkd-d', 'at+rkd-a',
           'at+pkt', 'at+crd', 'at+awp', 'trades+awp', 'at+ema')
EPOCHS = 10 # of one batch each, so that every schedule runs from its start to its end

class Stems(TorchDispatchMode):
    "Counts passes through first layers (convolutions of 3 channels), in images, by model: forward, and backward to images or weights"
    def __init__(self, **models):
        super().__init__()
        self.names,self.counts = {},Counter()
        for name,model in models.items():
            self.names[next(m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)).data_ptr()] = name
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution.default and args[1].shape[1] == 3: self._add(args[1], 'forward', args[0])
        if func is torch.ops.aten.convolution_backward.default and args[2].shape[1] == 3:
            self._add(args[2], 'weights' if args[-1][1] else 'images', args[1])
        return func(*args, **(kwargs or {}))
    def _add(self, weight, what, x): self.counts[self.names.get(weight.data_ptr(), 'other'), what] += len(x)

class Batches:
    "A loader of one batch that knows its places in the training set"
    def __init__(self, dl, batch):
        self.batch,self.dataset,self.images,self.rows,self.idxs,self.n = batch,dl.dataset,dl.images,dl.rows,torch.arange(len(batch[1])),None
    def __len__(self): return 1
    def __iter__(self): yield self.batch
    def one_batch(self): return self.batch

class Subject:
    "A method, with models that start each round from the same weights"
    def __init__(self, method, dl, batch, model, standard, steps, net):
        self.method,self.batch,self.start = method,batch,copy.deepcopy(model.state_dict())
        self.model,self.standard = copy.deepcopy(model),copy.deepcopy(standard)
        m = parse_method(method.replace('NET', net).replace('las-awp', f'at+las:variant=awp,net={net}+awp'))
        policy = (m.policy or CoTrained)(self.standard, **m.policy_args) if m.needs_standard else None
        cb = TRAINCallback(policy, attack=PGD(.15, .0375, steps), **m.callback_args())
        self.learn = Learner(DataLoaders(Batches(dl, batch), [], device=batch[0].device), self.model, CrossEntropyLossFlat(),
                             opt_func=torch_sgd, lr=1e-4, cbs=cb)
        self.times = []

    def train(self):
        get_model(self.learn.model).load_state_dict(self.start)
        seed_all(0)
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(EPOCHS, 1e-4)

    def count(self) -> dict: # Passes per batch, in batches
        with Stems(adversarial=self.model, standard=self.standard) as stems: self.train()
        return {' '.join(k): n/EPOCHS/len(self.batch[1]) for k,n in stems.counts.items()}

    def time(self):
        start = time.perf_counter()
        self.train()
        self.times.append((time.perf_counter() - start)/EPOCHS)

@call_parse
def main(
    backbone:str='resnet18', # Both models; strategy networks, too
    bs:int=64, # Batch size
    steps:int=10, # Steps of PGD
    warm:int=4, # Epochs of AT before anything is measured: what stops early depends on what the model knows
    repeats:int=5, # Rounds that are timed, each with all methods in turn
    methods:str=None, # Methods, separated by blanks (default: all)
    threads:int=None, # CPU threads (default: as torch chooses)
    out:str=None # File for the records as JSON
):
    "Count and time the steps of all methods"
    if threads: torch.set_num_threads(threads)
    seed_all(0)
    dls = get_dls('digits', bs=bs)
    batch = dls.train.one_batch()
    batch = tuple(t.as_subclass(torch.Tensor) for t in batch)
    model,standard = (create_backbone(backbone, 10, small_images=False) for _ in range(2))
    learn = Learner(dls, model, CrossEntropyLossFlat(), opt_func=torch_sgd, lr=.05, cbs=TRAINCallback(None, attack=PGD(.15, .05, 5)))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(warm, .05)
    accuracy = (model.eval()(batch[0]).argmax(1) == batch[1]).float().mean().item()
    subjects = [Subject(m, dls.train, batch, model, standard, steps, backbone) for m in (methods.split() if methods else METHODS)]
    counts = [s.count() for s in subjects]
    for _ in range(repeats):
        for s in subjects: s.time()
    base = statistics.median(subjects[0].times)
    rows = [dict(method=s.method.replace(':net=NET', ''), **c, seconds=statistics.median(s.times),
                 ratio=statistics.median(s.times)/base, low=min(s.times)/base, high=max(s.times)/base) for s,c in zip(subjects, counts)]
    settings = dict(backbone=backbone, bs=bs, steps=steps, repeats=repeats, epochs=EPOCHS, accuracy_of_the_batch=accuracy,
                    threads=torch.get_num_threads())
    if out: save_json(out, dict(settings=settings, environment=environment(), rows=rows))
    df = pd.DataFrame(rows).fillna(0).set_index('method')
    print(settings, markdown_table(df.round(2)), sep='\n\n')
