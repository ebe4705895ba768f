"What `--fast` gains: training steps of AT and TRADES against a plain loop, and against the passes of the official TRADES code"
import copy, datetime, statistics, sys
from pathlib import Path

import pandas as pd
import torch
from fastai.callback.progress import ProgressCallback
from fastcore.script import anno_parser
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from step import ALPHA, BETA, EPS, LR, Plain, Watch, learner, ratios

from fastrain.core import environment, save_json, seed_all
from fastrain.evaluation.tables import markdown_table
from fastrain.models.backbone import create_backbone
from fastrain.speed.fast import machine
from fastrain.speed.options import Speed

AIMS = ( # what is divided by what, and the least ratio on a CPU without and with instructions for bfloat16
    ('AT: plain float32 loop / --fast', 'at plain', 'at fast', 1.3, 2.4),
    ('TRADES: official passes / float32', 'trades official', 'trades float32', 1.4, 1.4),
    ('TRADES: official passes / --fast', 'trades official', 'trades fast', 1.7, 3.2),
    ('official TRADES / TRADES+TRAIN --fast', 'trades official', 'trades+train fast', 1.5, 1.5))

# -- the forms of a step -----------------------------------------------------------------------------------------------------
class Official(Plain):
    "TRADES by the passes of its official code: the natural images anew in each step of the attack, and twice in the loss"
    def attack(self, x):
        self.model.eval()
        x_adv = x + .001*torch.randn_like(x)
        for _ in range(self.steps):
            x_adv.requires_grad_()
            loss = F.kl_div(F.log_softmax(self.model(x_adv), 1), F.softmax(self.model(x), 1), reduction='sum')
            grad, = torch.autograd.grad(loss, x_adv)
            x_adv = x_adv.detach() + ALPHA*grad.sign()
            x_adv = torch.min(torch.max(x_adv, x - EPS), x + EPS).clamp(0, 1)
        self.model.train()
        return x_adv

    def step(self, x, y):
        x_adv = self.attack(x)
        self.opts[0].zero_grad()
        natural = F.cross_entropy(self.model(x), y)
        robust = F.kl_div(F.log_softmax(self.model(x_adv), 1), F.softmax(self.model(x), 1), reduction='sum')/len(x)
        (natural + BETA*robust).backward()
        self.opts[0].step()

class OneBatch:
    "The training data of a learner: one batch"
    n = None
    def __init__(self, batch): self.batch,self.device = batch,batch[0].device
    def __len__(self): return 1
    def one_batch(self): return self.batch
    def __iter__(self): yield self.batch

class Driven:
    "A learner in the middle of an epoch, which makes single steps"
    def __init__(self, method, batch, models, steps, speed=None):
        self.learn = learner(method, OneBatch(batch), *map(copy.deepcopy, models), steps)
        if speed: self.learn.to_speed(speed)
        self._begin()

    def _begin(self):
        learn = self.learn
        learn.remove_cbs(ProgressCallback)
        learn.logger = lambda *_: None
        learn.create_opt()
        learn.opt.set_hypers(lr=LR, wd=learn.wd)
        learn.n_epoch,learn.epoch,learn.loss,learn.dl = 10**6,0,torch.tensor(0.),learn.dls.train
        for event in ('before_fit', 'before_epoch', 'before_train'): learn(event)
        learn.n_iter = 10**6

    def step(self, x, y): self.learn.one_batch(1, (x, y))

def chosen(method, batch, models, steps, seconds) -> Speed:
    "What `to_fast` finds for a method"
    learn = learner(method, OneBatch(batch), *map(copy.deepcopy, models), steps).to_fast(seconds=seconds)
    return learn.train_cb.speed

# -- run ---------------------------------------------------------------------------------------------------------------------
def main(
    backbone:str='resnet18', # Adversarial model M'
    standard:str='resnet18', # Standard model M of TRAIN
    bs:int=64, # Batch size
    steps:int=10, # Steps of PGD
    img_size:int=32, # Side of the images in pixels
    repeats:int=4, # Timed steps of each form, after one that is not
    seconds:float=10., # For the choice of each method
    device:str=None, # cpu, cuda, ... (default: a GPU if there is one)
    threads:int=None, # CPU threads (default: as torch chooses)
    result:str=None # File for settings, times and verdicts as JSON
) -> dict: # What is written
    "Time steps in turns: plain, official, in float32 and with what `--fast` chooses"
    if threads: torch.set_num_threads(threads)
    device = torch.device(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    seed_all(0)
    batch = torch.rand(bs, 3, img_size, img_size, device=device), torch.randint(10, (bs,), device=device)
    models = [create_backbone(name, 10, img_size=img_size).to(device) for name in (backbone, standard)]
    speeds = {m: chosen(m, batch, models, steps, seconds) for m in ('at', 'trades')}
    seconds = take_turns(forms(batch, models, steps, speeds), batch, repeats)
    about = dict(backbone=backbone, standard=standard, bs=bs, steps=steps, img_size=img_size, repeats=repeats,
                 threads=torch.get_num_threads())
    res = dict(settings=about, date=str(datetime.date.today()), machine=machine(device), environment=environment(device),
               chosen={m: str(s) for m,s in speeds.items()}, seconds=seconds, targets=targets(seconds, machine(device)))
    if result: save_json(result, res)
    print(text(res))
    return res

def forms(batch, models, steps, speeds) -> dict: # `{name: with a method step(x, y)}`
    "Each from the same weights"
    def driven(method, speed=None): return Driven(method, batch, models, steps, speed)
    def plain(cls, method): return cls(method, *map(copy.deepcopy, models), steps)
    return {'at plain': plain(Plain, 'at'), 'at fast': driven('at', speeds['at']),
            'trades official': plain(Official, 'trades'), 'trades float32': driven('trades', Speed()),
            'trades fast': driven('trades', speeds['trades']), 'trades+train fast': driven('trades+train', speeds['trades'])}

def take_turns(forms, batch, repeats) -> dict: # `{name: list of seconds}`
    times = {name: [] for name in forms}
    for i in range(1 + repeats):
        for name,form in forms.items():
            with Watch(batch) as watch: form.step(*batch)
            if i: times[name].append(watch.seconds)
    return times

def targets(seconds, machine) -> list:
    "Each aim with its verdict"
    bf16 = machine['limit'] is None and any(f in machine['instructions'] for f in ('avx512_bf16', 'amx_bf16'))
    found = []
    for name,over,under,without,with_bf16 in AIMS:
        r,limit = ratios(seconds[over], seconds[under]),with_bf16 if bf16 else without
        found.append(dict(target=name, **r, limit=limit, verdict='pass' if r['ratio'] >= limit else 'fail'))
    return found

def text(res) -> str:
    "The results as Markdown"
    s,m = res['settings'],res['machine']
    times = [{'form': name, 'ms per step': f'{1000*statistics.median(t):.0f}'} for name,t in res['seconds'].items()]
    aims = [{'target': t['target'], 'ratio of medians': f'{t["ratio"]:.2f}',
             'turn by turn': f'{t["pairs"]["min"]:.2f} to {t["pairs"]["max"]:.2f}', 'at least': t['limit'], 'verdict': t['verdict']}
            for t in res['targets']]
    table = lambda rows, key: markdown_table(pd.DataFrame(rows).set_index(key))
    limit = f', instructions up to {m["limit"]}' if m['limit'] else ''
    head = (f'{s["backbone"]} with {s["standard"]} as standard model, {s["bs"]} images of {s["img_size"]}x{s["img_size"]}, '
            f'PGD-{s["steps"]}; '
            f'{m["processor"]}{limit}, {m["device"]}, torch {m["torch"]}, {res["date"]}; medians of {s["repeats"]} steps')
    chosen = '; '.join(f'{method}: {speed}' for method,speed in res['chosen'].items())
    return f'{head}\n\n--fast has chosen {chosen}\n\n{table(times, "form")}\n\n{table(aims, "target")}'

if __name__ == '__main__':
    args = vars(anno_parser(main, prog='speed.py').parse_args())
    main(**{k: v for k,v in args.items() if k not in ('pdb', 'xtra')})
