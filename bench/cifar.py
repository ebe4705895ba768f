"""Where the topology loss helps and where not, on a subset of CIFAR-10 (JPEG): `python bench/cifar.py DIR --out runs/cifar`.

DIR has train/<class>/ and test/<class>/. A folder that exists is resumed, and methods that it lacks are added, so that an interrupted measurement continues."""
import sys
from pathlib import Path

import torch
from fastcore.script import call_parse
from fastprogress import fastprogress

from fastrain.core import save_json
from fastrain.recipes import make_recipe
from fastrain.run import environment, evaluate_run, resume_run, train_run

SMALL = dict(profile='everyday', backbone='resnet10t_16', standard='resnet10t_16', small_images=False, epochs=12, warmup=30, steps=5, n_train=5000, n_test=1000, n_valid=500)
ATTACKS = 'natural', 'cw20', 'pgd20' # L_TP is measured on the images of the last one

@call_parse
def main(
    data:str, # Folder of images
    out:str='runs/cifar', # Folder for a run per seed
    result:str=None, # File for all records
    seeds:str='1,2,3', # Seeds, comma-separated
    methods:str='standard,at,at+train,trades,trades+train,trades+lbgat,trades+lbgat+train,mart,mart+train', # Methods, comma-separated; the first is the anchor of L_TP
    threads:int=None # CPU threads (default: as torch chooses)
):
    "Train each method with each seed, and evaluate natural, C&W-20, PGD-20 and L_TP"
    fastprogress.NO_BAR = not sys.stdout.isatty() # in a log file, only the rows
    if threads: torch.set_num_threads(threads)
    records = []
    for seed in map(int, seeds.split(',')):
        folder = Path(out)/str(seed)
        recipe = make_recipe(**SMALL, data=data, seed=seed)
        resume_run(folder, methods=methods.split(',')) if (folder/'settings.json').exists() else train_run(folder, recipe, methods.split(','))
        records += [dict(r, seed=seed) for r in evaluate_run(folder, ATTACKS)]
    if result: save_json(result, dict(recipe=dict(recipe.settings(), data='CIFAR-10 (JPEG)'), environment=environment(), records=records))
