"What the loop costs at small models, and what TRAIN adds where M' is a WRN-34-10: `python bench/loop.py --result bench/results/loop.json`"
import copy, sys
from pathlib import Path

import torch
from fastcore.script import call_parse

sys.path.insert(0, str(Path(__file__).parent))
from step import Pair, arithmetic, count_macs
from turns import judged, report

from fastrain.core import seed_all
from fastrain.models.backbone import create_backbone

OVERHEAD = 1.1 # fastrain over plain PyTorch, at 0.3 million parameters
TRAIN = dict(at=1.025, trades=1.025) # with TRAIN over without; the paper has 849/821 = 1.034 and 1109/1079 = 1.028

def nets(names, img_size):
    "Models by name; the small one with the stem that it has for the digits"
    return [create_backbone(n, 10, img_size=img_size, small_images=False if n.startswith("resnet10t") else None) for n in names]

def rounds(methods, models, batch, steps, repeats) -> dict: # `{method: (seconds in plain PyTorch, seconds in fastrain)}`
    "Each method in both forms, turn by turn"
    pairs = [Pair(m, batch, *models, steps) for m in methods]
    for _ in range(1 + repeats):
        for p in pairs: p.step()
    return {p.method: tuple(zip(*p.turns.pairs[1:])) for p in pairs}

def overhead(backbone, bs, steps, repeats, img_size) -> list:
    "fastai and fastrain over plain PyTorch, for a small model"
    models,batch = nets([backbone]*2, img_size),images(bs, img_size)
    params = sum(p.numel() for p in models[0].parameters())
    seconds = rounds(('at', 'trades', 'at+train'), models, batch, steps, repeats)
    return [judged(f'{m}, {backbone}: fastrain / plain PyTorch', ours, plain, OVERHEAD, params=params, bs=bs)
            for m,(plain,ours) in seconds.items()]

def train_adds(backbone, standard, bs, steps, repeats, img_size) -> list:
    "What TRAIN adds to AT and TRADES, beside what the arithmetic says"
    models,batch = nets([backbone, standard], img_size),images(bs, img_size)
    macs = [count_macs(copy.deepcopy(m).eval(), batch[0]) for m in models]
    seconds = rounds(('at', 'at+train', 'trades', 'trades+train'), models, batch, steps, repeats)
    rows = []
    for base,target in TRAIN.items():
        with_train = f'{base}+train'
        share = arithmetic(with_train, steps, *macs)/arithmetic(base, steps, *macs)
        rows.append(judged(f'{with_train} / {base}, {backbone} with {standard}', seconds[with_train][1], seconds[base][1], target,
                           arithmetic=share, bs=bs))
    return rows

def images(bs, img_size): return torch.rand(bs, 3, img_size, img_size), torch.randint(10, (bs,))

@call_parse
def main(
    small:str='resnet10t_16', # Small model, of 0.3 million parameters
    bs:int=64, # Its batch size, that of the digits
    backbone:str='wide_resnet34_10', # M' for TRAIN's share
    standard:str='resnet18', # M
    train_bs:int=4, # Its batch size, at least 3: the share hardly depends on it, and seconds do
    steps:int=10, # Steps of PGD
    repeats:int=9, # Rounds for the small model
    train_repeats:int=5, # Rounds for TRAIN's share
    img_size:int=32, # Side of the images in pixels
    threads:int=None, # CPU threads (default: as torch chooses)
    tiny:bool=False, # Seconds, to see that it runs
    result:str=None # File for the results as JSON
):
    "Overhead of the loop, and the share of TRAIN"
    if threads: torch.set_num_threads(threads)
    if tiny: backbone,standard,bs,steps,repeats,train_repeats,img_size = small,small,4,1,1,1,16
    seed_all(0)
    rows = overhead(small, bs, steps, repeats, img_size) + train_adds(backbone, standard, train_bs, steps, train_repeats, img_size)
    settings = dict(steps=steps, repeats=repeats, train_repeats=train_repeats, img_size=img_size, threads=torch.get_num_threads())
    return report(result, settings, rows, f'Steps of training with PGD-{steps}, ratios of medians')
