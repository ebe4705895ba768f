"""Twenty kills at random points of a table that four processes work through on one ledger: are the figures those of a run that nobody
disturbed, is nothing run twice, and is nothing lost? `python bench/kills.py [--kills 20] [--out bench/results/kills.json]`"""
import argparse, contextlib, io, json, multiprocessing, random, sys, tempfile, time
from pathlib import Path

import pandas as pd
import torch

from fastrain.core import environment, save_json
from fastrain.studies.ledger import Ledger, read_ledger
from fastrain.studies.reproduce import code_revision, reproduce
from fastrain.studies.rows import table_experiments

fork = multiprocessing.get_context('fork')

def study(): return table_experiments('6', 'tiny', attacks=('natural', 'pgd20-lbgat'), epochs=4, n_train=200, n_test=100)

def work(out):
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()): reproduce(study(), out, 'cpu')

def start(out):
    p = fork.Process(target=work, args=(out,))
    p.start()
    return p

def disturb(out, n_processes, kills, rng) -> list: # Seconds after the start, and states of the rows
    "Processes on one ledger, of which one after the other is killed and started anew"
    began,killed = time.perf_counter(),[]
    processes = [start(out) for _ in range(n_processes)]
    while any(p.is_alive() for p in processes):
        time.sleep(rng.uniform(.1, 3))
        alive = [i for i,p in enumerate(processes) if p.is_alive()]
        if len(killed) < kills and alive:
            i = rng.choice(alive)
            processes[i].kill()
            processes[i].join()
            counts = Ledger(out/'ledger.sqlite').counts() if (out/'ledger.sqlite').exists() else {}
            killed.append((round(time.perf_counter() - began, 2), counts))
            processes[i] = start(out)
    for p in processes: p.join()
    return killed

def figures(out):
    found = read_ledger(out)
    found = found[found.figure != 'seconds_per_epoch'].drop(columns=['seconds', 'id'])
    return found.sort_values(['key', 'which', 'figure']).reset_index(drop=True)

def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--processes', type=int, default=4)
    parser.add_argument('--seed', type=int, default=1)
    parser.add_argument('--out', default='bench/results/kills.json')
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as d:
        whole,killed = Path(d)/'whole',Path(d)/'killed'
        begun = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()): reproduce(study(), whole, 'cpu')
        undisturbed = time.perf_counter() - begun
        kills = disturb(killed, args.processes, args.kills, random.Random(args.seed))
        work(killed) # what the last one may have left
        rows = Ledger(killed/'ledger.sqlite').rows()
        same = figures(whole).equals(figures(killed))
        epochs = [pd.read_csv(f) for f in sorted(killed.glob('runs/*/history.csv'))]
        once = len(epochs) == len(rows) and all(list(e.epoch) == list(range(4)) for e in epochs)
        found = dict(kills=len(kills), processes=args.processes, rows=len(rows), done=sum(r['state'] == 'done' for r in rows),
                     taken_over=sum(r['turn'] - 1 for r in rows), figures=len(figures(killed)), same_figures=bool(same),
                     each_epoch_once=bool(once), shared_models=len(list((killed/'shared').glob('*.pt'))),
                     seconds_undisturbed=round(undisturbed, 1), seed=args.seed, at=kills,
                     revision=code_revision(), environment=environment('cpu'))
    save_json(args.out, found)
    print(json.dumps({k: v for k,v in found.items() if k not in ('at', 'environment')}))
    if not (same and once and found['done'] == len(rows) and len(kills) == args.kills): sys.exit('not as it was to be')

if __name__ == '__main__': main()
