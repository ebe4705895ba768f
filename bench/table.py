"""Every piece, and TRAIN on top of every robust loss, on the digits: `python bench/table.py --out bench/results/table.json`.

It shows that everything trains under the same conditions, with the processor seconds it takes; a training of 6 epochs does
not show which method is best. Methods that are in the file already are not trained again, so that an interrupted measurement
continues. With `--jobs 2` the seeds are shared out over processes of one thread each."""
import json, sys, time
from multiprocessing import get_context
from pathlib import Path

import torch
from fastcore.script import call_parse
from fastprogress import fastprogress

from fastrain.core import environment, save_json, seed_all
from fastrain.evaluation.evaluate import evaluate
from fastrain.runs.recipe import make_recipe, recipe_dls, recipe_fit, recipe_learner
from fastrain.training.callback import history
from fastrain.training.methods import canonical, parse_method

ROBUST = ['AT', 'TRADES', 'ALP', 'MART', 'AT + LBGAT', 'LBGAT6', 'LBGAT0', 'FAT', 'FAT-TRADES', 'FAT-MART',
          'GAIRAT', 'SAT', 'LAS-AT', 'LAS-TRADES', 'LAS-AWP', 'ECAS', 'MCA']
OTHER = ['AT + RKD', 'AT + RKD-D', 'AT + RKD-A', 'AT + CRD', 'AT + PKT', "AT + TRAIN'", 'AT + TRAIN*', 'AT + LBGAT_detach',
         'AT-AWP', 'TRADES-AWP', 'AT + EMA', 'TRADES + LBGAT + TRAIN + AWP + EMA']
METHODS = ['standard', *(m for r in ROBUST for m in (r, f'{r} + TRAIN')), *OTHER]
SETTINGS = dict(epochs=6, steps=4, n_train=1000, n_valid=10)
# Strategy network as small as the other two, and it learns from every 20th batch: as published, from each,
# LAS-TRADES takes about twice as long
LAS = 'net=resnet10t_16,interval=20'

def record(method, seed, standard=None) -> tuple: # What is written, the trained model
    "Train and evaluate one method"
    seed_all(seed)
    r = make_recipe(**SETTINGS, seed=seed)
    dls,name = recipe_dls(r, 'cpu'),_small(canonical(method))
    start = time.process_time() # of this process, which has one thread: other work on the machine does not count
    learn = recipe_learner(r, name, dls, keep=f'{KEEP}-{seed}.pt')
    with learn.no_bar(), learn.no_logging(): recipe_fit(r, learn)
    seconds,average = time.process_time() - start,learn.train_cb.average
    attacks = dict(natural=None, pgd20=r.eval_attack('pgd20'))
    def evaluated(model): return evaluate(model, dls, attacks, standard=standard or model, seed=seed, checks=False, progress=False)
    ev = evaluated(learn.model)
    res = dict(method=method, pieces=name, approximate=parse_method(name).approximate, seed=seed, seconds=seconds,
               losses=history(learn).robust_loss.tolist(), **ev.figures, n=ev.n)
    res['seconds_with_evaluation'] = time.process_time() - start
    if average: res['average'] = evaluated(average.model).figures
    return res,learn.model

def _small(name): return '+'.join(p + (':' if ':' not in p else ',') + LAS if p.split(':')[0] == 'las' else p for p in name.split('+'))

KEEP = None # where the warmed-up standard models are, one for each seed

def run_seed(seed, methods, part, keep):
    "All methods of one seed, each written as soon as it is there"
    global KEEP
    KEEP,fastprogress.NO_BAR = keep,True
    torch.set_num_threads(1)
    done,standard = json.loads(Path(part).read_text()) if Path(part).exists() else [],None
    for m in methods:
        if m != 'standard' and any(r['method'] == m for r in done): continue
        res,model = record(m, seed, standard)
        if m == 'standard': standard = model.eval() # trained again when continuing: L_TP is measured against it
        done = [r for r in done if r['method'] != m] + [res]
        save_json(part, done)
        shares = f'{100*res["natural"]:6.2f} {100*res["pgd20"]:6.2f}'
        print(f'seed {seed}  {m:36} {shares} {res["l_tp"]:.3f} {res["seconds"]:5.1f} s', flush=True)

@call_parse
def main(
    out:str='runs/table/table.json', # File for all records
    seeds:str='1,2,3', # Seeds, comma-separated
    methods:str=None, # Methods, separated by semicolons (default: all)
    jobs:int=2 # Processes, each with one thread
):
    "Train every method with every seed, and evaluate natural accuracy, PGD-20 and L_TP"
    methods,seeds,out = methods.split(';') if methods else METHODS,[int(s) for s in seeds.split(',')],Path(out)
    if methods[0] != 'standard': sys.exit('table.py: the first method must be standard, which L_TP is measured against')
    out.parent.mkdir(parents=True, exist_ok=True)
    parts = {s: out.with_name(f'{out.stem}-{s}.json') for s in seeds}
    keep = str(out.with_name(f'{out.stem}-warm'))
    work = [(seed, methods, part, keep) for seed,part in parts.items()]
    with get_context('spawn').Pool(jobs) as pool: pool.starmap(run_seed, work, chunksize=1)
    records = [r for p in parts.values() for r in json.loads(p.read_text())]
    minutes = sum(r['seconds_with_evaluation'] for r in records)/60
    save_json(out, dict(recipe=make_recipe(**SETTINGS).settings(), environment=environment(), minutes=minutes, records=records))
