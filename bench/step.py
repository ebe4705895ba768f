"What a training step costs through fastai and fastrain, against the same algorithm written in plain PyTorch"
import copy, statistics, time

import pandas as pd
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastcore.script import anno_parser
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from fastrain.attacks.pgd import PGD
from fastrain.training.callback import TRAINCallback
from fastrain.core import save_json, seed_all
from fastrain.models.backbone import create_backbone
from fastrain.training.methods import parse_method
from fastrain.evaluation.tables import markdown_table
from fastrain.core import environment
from fastrain.training.schedules import torch_sgd
from fastrain.training.standard import CoTrained

METHODS = 'at', 'at+train', 'trades', 'trades+train'
EPS,ALPHA,BETA,LAM = 8/255,2/255,6.,5.
LR,WD,MOM = .01,5e-4,.9
OVERHEAD,SLACK = 1.05,1.03 # allowed: fastrain over plain PyTorch, and TRAIN's share over that of its arithmetic
# in float64, where rounding does not turn over the sign of a gradient; at first, terms such as KL and L_TP move the weights by little
TOLERANCE = 1e-6

# -- the algorithm in plain PyTorch ------------------------------------------------------------------------------------------
def attack(model, x, y, kl, steps):
    "PGD in eval mode: on cross-entropy from a uniform start, or on TRADES' KL from a Gaussian one"
    model.eval()
    if kl:
        with torch.no_grad(): target = F.log_softmax(model(x), 1)
        x_adv = x + .001*torch.randn_like(x)
    else: x_adv = (x + torch.empty_like(x).uniform_(-1, 1)*EPS).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        logits = model(x_adv)
        if kl: loss = F.kl_div(F.log_softmax(logits, 1), target, reduction='sum', log_target=True)
        else: loss = F.cross_entropy(logits, y, reduction='sum')
        grad, = torch.autograd.grad(loss, x_adv)
        x_adv = (x_adv.detach() + ALPHA*grad.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    model.train()
    return x_adv

def graph(features):
    "Neighbour probabilities of a batch, its columns summing to 1"
    unit = F.normalize(features)
    d,eye = 1 - unit@unit.T,torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    k = (2 - d + d.masked_fill(eye, torch.inf).amin(0)).masked_fill(eye, 0)
    return (k/k.sum(0))[~eye]

def topology(std_features, adv_features):
    "L_TP, the cross-entropy of the edges less their entropy"
    p,q = graph(std_features.detach()),graph(adv_features)
    return (p*(p/q).log() + (1-p)*((1-p)/(1-q)).log()).sum()

class Plain:
    "One method: a model, with TRAIN also a standard model, and an optimizer for each"
    def __init__(self, method, model, standard, steps):
        self.kl,self.train,self.steps = 'trades' in method,'train' in method,steps
        self.model,self.standard = model.train(),standard.train()
        self.opts = [torch.optim.SGD(m.parameters(), LR, MOM, weight_decay=WD) for m in self.models]
        self.features = {}
        for m in self.models: m.get_classifier().register_forward_pre_hook(lambda _,inp,m=m: self.features.update({m: inp[0]}))

    @property
    def models(self): return [self.model, self.standard] if self.train else [self.model]

    def step(self, x, y):
        x_adv = attack(self.model, x, y, self.kl, self.steps)
        nat = self.model(x) if self.kl else None
        adv = self.model(x_adv)
        if self.kl:
            kl = F.kl_div(F.log_softmax(adv, 1), F.log_softmax(nat, 1), reduction='batchmean', log_target=True)
            loss = F.cross_entropy(nat, y) + BETA*kl
        else: loss = F.cross_entropy(adv, y)
        if self.train:
            loss = loss + F.cross_entropy(self.standard(x), y)
            loss = loss + LAM*topology(self.features[self.standard], self.features[self.model])
        loss.backward()
        for opt in self.opts:
            opt.step()
            opt.zero_grad()

# -- the two side by side ----------------------------------------------------------------------------------------------------
class Turns:
    "The training data of a learner, which lets plain PyTorch make a step before it hands over each batch, and times both"
    n = None # whatever looks at the size of the data finds nothing to complain about
    def __init__(self, batch, plain): self.batch,self.plain,self.pairs = batch,plain,[]
    def __len__(self): return 1
    def one_batch(self): return self.batch
    def __iter__(self):
        with Watch(self.batch) as plain: self.plain.step(*self.batch)
        with Watch(self.batch) as ours: yield self.batch # until the learner has done with it and asks for the next
        self.pairs.append((plain.seconds, ours.seconds))

class Watch:
    "Seconds inside the `with`, which starts from the same random numbers each time and waits for the device"
    def __init__(self, batch): self.cuda = batch[0].is_cuda
    def __enter__(self):
        seed_all(0)
        self._wait()
        self.start = time.perf_counter()
        return self
    def __exit__(self, *exc):
        self._wait()
        self.seconds = time.perf_counter() - self.start
    def _wait(self):
        if self.cuda: torch.cuda.synchronize()

class Pair:
    "One method twice, from the same weights: in plain PyTorch and through fastai and fastrain"
    def __init__(self, method, batch, model, standard, steps):
        self.method,self.before = method,[copy.deepcopy(m.state_dict()) for m in (model, standard)]
        self.plain = Plain(method, copy.deepcopy(model), copy.deepcopy(standard), steps)
        self.turns = Turns(batch, self.plain)
        self.learn = learner(method, self.turns, copy.deepcopy(model), copy.deepcopy(standard), steps)

    def step(self):
        with self.learn.no_bar(), self.learn.no_logging(): self.learn.fit(1, LR)

    def models(self):
        "Pairs of models that must agree, with the state both were in at first"
        policy = self.learn.train_cb.policy
        ours = [self.learn.model] + ([policy.model] if policy else [])
        return zip(self.plain.models, ours, self.before)

    def difference(self) -> float:
        "By how much the two disagree on parameters and buffers, as a part of the change since the start; the worst of all"
        return max(_difference(a, b, before, names) for a,b,before in self.models() for names in _kinds(a))

def _kinds(model):
    return [n for n,_ in model.named_parameters()], [n for n,b in model.named_buffers() if b.is_floating_point() and 'running' in n]

def _difference(a, b, before, names):
    if not names: return 0.
    a,b,before = (torch.cat([o[n].flatten().double() for n in names]) for o in (a.state_dict(), b.state_dict(), before))
    return ((a - b).norm()/(a - before).norm()).item()

def learner(method, turns, model, standard, steps):
    "The method as users have it: a `Learner` with a `TRAINCallback`"
    m = parse_method(method)
    cb = TRAINCallback(CoTrained(standard) if m.needs_standard else None, attack=PGD(EPS, ALPHA, steps), lam=LAM, **m.callback_args())
    dls = DataLoaders(turns, [], device=turns.batch[0].device)
    return Learner(dls, model, CrossEntropyLossFlat(), opt_func=torch_sgd, lr=LR, wd=WD, wd_bn_bias=True, cbs=cb)

# -- what to expect ----------------------------------------------------------------------------------------------------------
def count_macs(model, x) -> int:
    "Multiply-accumulates of a forward, per image"
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model(x)
    return counter.get_total_flops()//2//len(x)

def arithmetic(method, steps, adv, std) -> float:
    "MACs of a step per image: forward 1, backward to the image 1, backward to the weights and on 2, in units of a model's forward"
    units = 1 + 2*steps + 2*3 if 'trades' in method else 2*steps + 3
    return units*adv + (3*std if 'train' in method else 0)

def ratios(over, under) -> dict:
    "The ratio of medians, and what the ratios of single pairs span"
    pairs = [a/b for a,b in zip(over, under)]
    return dict(ratio=statistics.median(over)/statistics.median(under),
                pairs=dict(min=min(pairs), median=statistics.median(pairs), max=max(pairs)))

def judge(name, limit, over, under, **kwargs) -> dict:
    "One target with its verdict"
    r = ratios(over, under)
    return dict(target=name, **kwargs, **r, limit=limit, verdict='pass' if r['ratio'] <= limit else 'fail')

def targets(seconds, steps, macs) -> list:
    "fastrain against plain PyTorch, then each method with TRAIN against the one without"
    res = [judge(f'{m}: fastrain / plain PyTorch', OVERHEAD, s['fastrain'], s['plain']) for m,s in seconds.items()]
    for m in METHODS:
        if '+' not in m: continue
        base = m.partition('+')[0]
        share = arithmetic(m, steps, *macs)/arithmetic(base, steps, *macs)
        res.append(judge(f'{m} / {base}', share*SLACK, seconds[m]['fastrain'], seconds[base]['fastrain'], arithmetic=share,
                         plain=ratios(seconds[m]['plain'], seconds[base]['plain'])))
    return res

# -- run ---------------------------------------------------------------------------------------------------------------------
def main(
    backbone:str='resnet18', # Adversarial model M'
    standard:str='resnet18', # Standard model M
    bs:int=32, # Batch size
    steps:int=10, # Steps of PGD
    img_size:int=32, # Side of the images in pixels
    repeats:int=7, # Timed steps of each method in each form
    device:str=None, # cpu, cuda, ... (default: a GPU if there is one)
    threads:int=None, # CPU threads (default: as torch chooses)
    out:str=None # File for settings, times and verdicts as JSON
) -> dict: # What is written
    "Time AT and TRADES, with and without TRAIN, in plain PyTorch and through fastai and fastrain, turn by turn"
    if threads: torch.set_num_threads(threads)
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    settings = dict(backbone=backbone, standard=standard, bs=bs, steps=steps, img_size=img_size, repeats=repeats,
                    device=str(device), threads=torch.get_num_threads())
    seed_all(0)
    batch = torch.rand(bs, 3, img_size, img_size, device=device), torch.randint(10, (bs,), device=device)
    models = [create_backbone(name, 10, img_size=img_size).to(device) for name in (backbone, standard)]
    macs = [count_macs(m.eval(), batch[0]) for m in models]
    differences = {m: check(m, batch, models, steps) for m in METHODS}
    pairs = [Pair(m, batch, *models, steps) for m in METHODS]
    for _ in range(1 + repeats):
        for p in pairs: p.step()
    seconds = {p.method: dict(zip(('plain', 'fastrain'), map(list, zip(*p.turns.pairs[1:])))) for p in pairs} # without the first
    res = dict(settings=settings, environment=environment(), macs=dict(zip(('backbone', 'standard'), macs)), difference=differences,
               seconds=seconds, targets=targets(seconds, steps, macs))
    if out: save_json(out, res)
    print(text(res))
    return res

def check(method, batch, models, steps, n=8) -> float:
    "A step in both forms in float64, on few images; an error if they are not the same algorithm"
    x,y = (o[:n] for o in batch)
    pair = Pair(method, (x.double(), y), *(copy.deepcopy(m).double() for m in models), steps)
    pair.learn.recorder.run = False # it averages losses in float32 only
    pair.step()
    d = pair.difference()
    if not d < TOLERANCE:
        raise RuntimeError(f'{method}: after one step the weights in plain PyTorch and in fastrain differ by {d:.2g} of the step')
    return d

def text(res) -> str:
    "The results as Markdown"
    s,env = res['settings'],res['environment']
    ms = lambda o: f'{1000*statistics.median(o):.1f}'
    rows = [dict(method=m, **{'plain, ms': ms(t['plain']), 'fastrain, ms': ms(t['fastrain']),
                              'difference': f'{res["difference"][m]:.1g}'}) for m,t in res['seconds'].items()]
    span = lambda t: f'{t["pairs"]["median"]:.3f} ({t["pairs"]["min"]:.3f} to {t["pairs"]["max"]:.3f})'
    aims = [{'target': t['target'], 'ratio of medians': f'{t["ratio"]:.3f}', 'pair by pair: median (span)': span(t),
             'the same in plain': f'{t["plain"]["ratio"]:.3f}' if 'plain' in t else '',
             'limit': f'{t["limit"]:.3f}', 'verdict': t['verdict']} for t in res['targets']]
    table = lambda rows, key: markdown_table(pd.DataFrame(rows).set_index(key))
    head = (f'{s["backbone"]} with {s["standard"]} as standard model, {s["bs"]} images of {s["img_size"]}x{s["img_size"]}, '
            f'PGD-{s["steps"]}; {env["device"]}, torch {env["torch"]}, fastai {env["fastai"]}; medians of {s["repeats"]} steps; '
            'difference: of the weights after a step in float64, as a part of the step')
    return f'{head}\n\n{table(rows, "method")}\n\n{table(aims, "target")}'

if __name__ == '__main__':
    args = vars(anno_parser(main, prog='step.py').parse_args())
    main(**{k: v for k,v in args.items() if k not in ('pdb', 'xtra')})
