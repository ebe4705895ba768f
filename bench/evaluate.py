"What `evaluate` costs beside the attacks, and what the topology score takes: `python bench/evaluate.py --out bench/results/evaluate.json`"
import resource, statistics, time
from functools import partial

import torch
from fastcore.script import call_parse
from torch.nn import functional as F

from fastrain.core import environment, fork_rng, save_json, seed_all
from fastrain.data.sources import get_dls
from fastrain.evaluation.evaluate import evaluate
from fastrain.evaluation.measure import Batches, batch_seed
from fastrain.evaluation.scores import topology_score
from fastrain.models.backbone import create_backbone

EPS = 8/255
ALPHA = 2/255
STEPS = 20

def cross_entropy(z, y): return F.cross_entropy(z, y, reduction='sum')

def margin(z, y):
    wrong = z.scatter(1, y[:,None], -torch.inf).amax(1)
    return (wrong - z.gather(1, y[:,None])[:,0]).sum()

def attacked(model, x, y, loss, seed):
    with fork_rng(seed): x_adv = (x + torch.empty_like(x).uniform_(-1, 1)*EPS).clamp(0, 1)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        grad, = torch.autograd.grad(loss(model(x_adv), y), x_adv)
        x_adv = torch.clamp(x_adv.detach() + ALPHA*grad.sign(), x - EPS, x + EPS).clamp(0, 1)
    return x_adv

@torch.no_grad()
def right(model, x, y): return (model(x).argmax(1) == y).sum().item()

def plain(model, batches, seed=0) -> list:
    "Natural accuracy, PGD-20 and C&W-20 in plain PyTorch: correct images of each"
    hits = [0, 0, 0]
    for i,(x,y) in enumerate(batches):
        hits[0] += right(model, x, y)
        hits[1] += right(model, attacked(model, x, y, cross_entropy, batch_seed(seed, i)), y)
        hits[2] += right(model, attacked(model, x, y, margin, batch_seed(seed, i)), y)
    return hits

def ours(model, batches, **kwargs) -> list:
    ev = evaluate(model, batches, 'natural,pgd20,cw20', eps=EPS, alpha=ALPHA, progress=False, **kwargs)
    return [int(ev.right(k).sum()) for k in ('natural', 'pgd20', 'cw20')]

def seconds(f, *args, **kwargs) -> tuple:
    start = time.perf_counter()
    res = f(*args, **kwargs)
    return time.perf_counter() - start,res

def neighbours(n_support, n_queries, width, n_classes=100) -> dict:
    "Topology scores for k from 5 to 50 of random features of so many images"
    features,labels = torch.randn(n_support + n_queries, width),torch.randint(n_classes, (n_support + n_queries,))
    support,queries = features.tensor_split([n_support])
    y,y_queries = labels.tensor_split([n_support])
    t,_ = seconds(topology_score, support, y, queries, y_queries, range(5, 51))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
    return dict(n_support=n_support, n_queries=n_queries, width=width, seconds=t, peak_gb=peak)

def compared(times, base) -> dict:
    "Median seconds, and the share of those of the base, turn by turn"
    ratios = [a/b for a,b in zip(times, base)]
    middle = statistics.median(times)
    return dict(seconds=middle, ratio=middle/statistics.median(base), low=min(ratios), high=max(ratios))

@call_parse
def main(
    backbone:str='resnet10t_16', # The smaller it is, the more everything else counts
    n:int=1797, # Digits that are evaluated, at most 1797
    bs:int=128, # Batch size
    repeats:int=5, # Rounds, each with all forms in turn
    threads:int=None, # CPU threads (default: as torch chooses)
    n_support:int=100_000, # Support of the topology score
    n_queries:int=10_000, # Its queries
    width:int=640, # Its features
    out:str=None # File for the results as JSON
):
    "Time evaluation against a plain loop with the same attacks, and the topology score"
    if threads: torch.set_num_threads(threads)
    seed_all(0)
    knn = neighbours(n_support, n_queries, width) # first: the peak of memory is that of the whole process
    dls = get_dls('digits', bs=bs, device='cpu')
    x,y = map(torch.cat, zip(*[b for dl in dls.loaders for b in Batches(dl)]))
    batches = list(zip(x[:n].split(bs), y[:n].split(bs)))
    model = create_backbone(backbone, 10, small_images=False).eval()
    forms = {'plain loop': plain, 'evaluate': partial(ours, checks=False), 'evaluate with checks': ours}
    if len({tuple(f(model, batches[:2])) for f in forms.values()}) > 1:
        raise SystemExit('evaluate.py: the forms do not agree, so that their times mean nothing')
    times = {k: [] for k in forms}
    for _ in range(repeats):
        for k,f in forms.items(): times[k].append(seconds(f, model, batches)[0])
    rows = {k: compared(t, times['plain loop']) for k,t in times.items()}
    settings = dict(backbone=backbone, n=len(x[:n]), bs=bs, repeats=repeats, threads=torch.get_num_threads(),
                    attacks='natural, PGD-20, C&W-20')
    if out: save_json(out, dict(settings=settings, rows=rows, topology=knn, environment=environment('cpu')))
    for k,r in rows.items():
        turns = f'single turns {r["low"]:.3f} to {r["high"]:.3f}'
        print(f'{k:22} {r["seconds"]:.2f} s, {r["ratio"]:.3f} of the plain loop ({turns})')
    print(f'topology score, {n_support:,} x {n_queries:,} x {width}, k from 5 to 50: {knn["seconds"]:.1f} s, '
          f'peak memory of the process {knn["peak_gb"]:.2f} GB')
