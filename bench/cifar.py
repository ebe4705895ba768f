"""Where the topology loss helps and where it does not, on a subset of CIFAR-10 (JPEG):
`python bench/cifar.py DIR --out runs/cifar --result bench/results/cifar.json`.

DIR has train/<class>/ and test/<class>/. First the methods with and without TRAIN, then variants of TRAIN that ask why.
Folders that exist are resumed, and methods that they lack are added, so that an interrupted measurement continues;
`--part main` or `--part NAME,NAME` does only some of it, and whatever is there goes into the result."""
import csv, json, shutil, sys
from pathlib import Path

import torch
from fastcore.script import call_parse
from fastprogress import fastprogress

from fastrain.core import environment, save_json
from fastrain.runs.recipe import make_recipe
from fastrain.runs.run import Run
from fastrain.runs.train import resume_run
from fastrain.training.schedules import schedules

SMALL = dict(profile='everyday', backbone='resnet10t_16', standard='resnet10t_16', small_images=False,
             epochs=12, warmup=30, steps=5, n_train=5000, n_test=1000, n_valid=500)
METHODS = ['standard', 'at', 'at+train', 'trades', 'trades+train', 'trades+lbgat', 'trades+lbgat+train',
           'mart', 'mart+train'] # the first is the anchor of L_TP
ATTACKS = 'natural', 'cw20', 'pgd20' # L_TP is measured on the images of the last one
ORACLE = dict(n_train=None, epochs=8) # a standard model that has seen all 50,000 images

schedules.update(early=lambda t: float(t < 50), late=lambda t: float(t >= 50)) # in which half of training the term acts
# name: (what differs from SMALL, methods, seeds); TRAIN with the constant λ = 5 from a standard model
# that was warmed up for 30 epochs is in the main part
VARIANTS = {
    'ramp': (dict(lam_schedule='ramp'), ['at+train'], (1, 2, 3)), # 0 to 5
    'printed': (dict(lam_schedule='printed', lam=2.5), ['at+train'], (1, 2, 3)), # 3.7 to 5: the same end
    'scratch': (dict(warmup=0), ['at+train'], (1,)),
    'brief': (dict(warmup=8), ['at+train'], (1,)),
    'frozen': (dict(), ['at+train*'], (1,)),
    'oracle': (dict(standard='ORACLE'), ['at+train'], (1,)), # frozen, as a trained model is by default
    'strong': (dict(lam=20.), ['at+train'], (1,)),
    'early': (dict(lam_schedule='early'), ['at+train'], (1,)),
    'late': (dict(lam_schedule='late'), ['at+train'], (1,)),
    'capacity': (dict(backbone='resnet10t'), ['at', 'at+train'], (1,)), # four times the width of M'
}

def run(folder, methods, like=None, **settings) -> list:
    "The records of a run, which is begun, continued or only read"
    if not (folder/'settings.json').exists():
        Run.create(folder, make_recipe(**SMALL | settings), methods)
        if like: share(like, folder, 'standard', *([] if {'warmup', 'standard'} & set(settings) else ['warm.pt']))
    return resume_run(folder, methods=methods, attacks=ATTACKS)

def share(like, folder, *names):
    "The anchor of L_TP, and the warmed-up standard model, of another run"
    for n in names:
        source,to = like/'checkpoints'/n,folder/'checkpoints'/n
        shutil.copytree(source, to) if source.is_dir() else (to.parent.mkdir(exist_ok=True), shutil.copy(source, to))

def collect(out):
    "Every record that is there, with the part it belongs to and the accuracy of its standard model on the held-out images"
    for file in sorted(out.glob('*/results.json')):
        name,_,seed = file.parent.name.rpartition('-')
        for r in json.loads(file.read_text()):
            accuracy = _standard_accuracy(file.parent, r['method'])
            yield dict(r, part=name or 'main', seed=int(seed), standard_accuracy=accuracy)

def _standard_accuracy(folder, method):
    with (folder/'history.csv').open() as f: last = [r for r in csv.DictReader(f) if r['method'] == method][-1]
    return float(last['std_accuracy']) if last.get('std_accuracy') else None

@call_parse
def main(
    data:str, # Folder of images
    out:str='runs/cifar', # Folder for all runs
    result:str=None, # File for the records of everything that is there
    seeds:str='1,2,3', # Seeds of the main part, comma-separated
    methods:str=None, # Methods of the main part, comma-separated (default: all)
    part:str=None, # 'main', names of variants, comma-separated, or 'none' (default: everything)
    threads:int=None # CPU threads (default: as torch chooses)
):
    "Train and evaluate: natural accuracy, C&W-20, PGD-20 and L_TP"
    fastprogress.NO_BAR = not sys.stdout.isatty() # in a log file, only the rows
    if threads: torch.set_num_threads(threads)
    out,parts = Path(out),part.split(',') if part else ['main', *VARIANTS]
    if 'main' in parts:
        for seed in map(int, seeds.split(',')): run(out/str(seed), methods.split(',') if methods else METHODS, data=data, seed=seed)
    for name in (p for p in parts if p in VARIANTS):
        changes,variants,of = VARIANTS[name]
        for seed in of:
            if changes.get('standard') == 'ORACLE':
                oracle = out/f'oracle-standard-{seed}'
                run(oracle, ['standard'], data=data, seed=seed, **ORACLE)
                changes = dict(changes, standard=str(oracle))
            run(out/f'{name}-{seed}', variants, out/str(seed), data=data, seed=seed, **changes)
    if not result: return
    recipe = dict(make_recipe(**SMALL).settings(), data='CIFAR-10 (JPEG)')
    changes = {name: variant[0] for name,variant in VARIANTS.items()}
    save_json(result, dict(recipe=recipe, environment=environment(), variants=changes, records=list(collect(out))))
