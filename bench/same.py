"""Does `--fast` change what is learnt? AT on the digits with and without it, over seeds.

`python bench/same.py --result bench/results/same.json`"""
import sys, tempfile
from pathlib import Path
from statistics import mean, stdev

import torch
from fastcore.script import call_parse

sys.path.insert(0, str(Path(__file__).parent))
from turns import report

from fastrain.core import read_json
from fastrain.runs.recipe import make_recipe
from fastrain.runs.train import train_run
from fastrain.speed.options import Speed

FIGURES = 'natural', 'pgd20'

def trained(folder, seed, fast, method, settings) -> dict:
    "Figures in % after the last epoch, and what was chosen"
    recipe = make_recipe('digits', seed=seed, fast=fast, **settings)
    record, = train_run(folder/f'{seed}-{fast}', recipe, [method], 'cpu', FIGURES)
    return {k: 100*record['last']['figures'][k] for k in FIGURES} | dict(chosen=_chosen(folder/f'{seed}-{fast}'))

def _chosen(folder):
    found = read_json(folder/'speed.json')
    return '' if found is None else str(Speed(**found['chosen']))

def compared(records, figure) -> dict:
    "The mean change by --fast, beside what seeds differ by"
    plain,fast = ([r[figure] for r in records if r['fast'] is f] for f in (False, True))
    change,spread = mean(fast) - mean(plain),stdev(plain)
    return dict(figure=figure, plain=mean(plain), fast=mean(fast), change=change, spread=spread, range=max(plain) - min(plain),
                verdict='pass' if abs(change) <= spread else 'fail')

@call_parse
def main(
    method:str='at', # What is trained
    seeds:str='1,2,3', # Comma-separated, at least two
    epochs:int=None, # Epochs (default: those of the profile)
    n_train:int=None, # Training images (default: all)
    steps:int=None, # Steps of PGD (default: those of the profile)
    threads:int=None, # CPU threads (default: as torch chooses)
    result:str=None # File for the results as JSON
):
    "Train with and without --fast from the same weights; the change should be within the spread over seeds"
    if threads: torch.set_num_threads(threads)
    settings = {k: v for k,v in dict(epochs=epochs, n_train=n_train, steps=steps).items() if v is not None}
    with tempfile.TemporaryDirectory() as tmp:
        records = [dict(seed=seed, fast=fast, **trained(Path(tmp), seed, fast, method, settings))
                   for seed in map(int, seeds.split(',')) for fast in (False, True)]
    rows = [compared(records, figure) for figure in FIGURES]
    about = dict(method=method, seeds=seeds, threads=torch.get_num_threads(), **settings)
    return report(result, about, rows, f'{method} on the digits without and with --fast, in %, seeds {seeds}', records=records)
