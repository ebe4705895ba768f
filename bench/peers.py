"""Evaluation against other libraries: PGD-20 of torchattacks, foolbox and ART, and AutoAttack by its own package.

`python bench/peers.py --result bench/results/peers.json`; a library that is missing is left out, with the line that installs it."""
import importlib, sys, warnings
from functools import partial
from pathlib import Path

import torch
from fastcore.script import call_parse
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))
from turns import judged, report, take_turns

from fastrain.attacks.pgd import PGD
from fastrain.core import seed_all
from fastrain.data.sources import get_dls
from fastrain.evaluation.evaluate import evaluate
from fastrain.models.backbone import create_backbone
from fastrain.speed.attacked import attacked_copies

EPS,STEPS = 8/255,20
ALPHA = EPS/10
INSTALL = dict(
    torchattacks='pip install --no-deps torchattacks', foolbox='pip install foolbox', art='pip install adversarial-robustness-toolbox',
    pyautoattack='pip install pyautoattack')

# -- PGD-20 from the image itself, by each library: () → images --------------------------------------------------------------
def of_torchattacks(model, batches):
    attack = importlib.import_module('torchattacks').PGD(model, eps=EPS, alpha=ALPHA, steps=STEPS, random_start=False)
    return lambda: [attack(x, y) for x,y in batches]

def of_foolbox(model, batches):
    fb = importlib.import_module('foolbox')
    wrapped = fb.PyTorchModel(model, bounds=(0, 1), device=batches[0][0].device)
    attack = fb.attacks.LinfPGD(abs_stepsize=ALPHA, steps=STEPS, random_start=False)
    return lambda: [attack.run(wrapped, x, fb.criteria.Misclassification(y), epsilon=EPS) for x,y in batches]

def of_art(model, batches):
    estimators = importlib.import_module('art.estimators.classification')
    evasion = importlib.import_module('art.attacks.evasion')
    x,n_classes = batches[0][0],model(batches[0][0][:1]).shape[1]
    place = 'gpu' if x.is_cuda else 'cpu'
    wrapped = estimators.PyTorchClassifier(model, torch.nn.CrossEntropyLoss(), x.shape[1:], n_classes, clip_values=(0, 1),
                                           device_type=place)
    attack = evasion.ProjectedGradientDescent(wrapped, eps=EPS, eps_step=ALPHA, max_iter=STEPS, batch_size=len(x), verbose=False)
    def run(): return [attack.generate(x.cpu().numpy(), F.one_hot(y, n_classes).cpu().numpy()) for x,y in batches]
    return lambda: [torch.as_tensor(x_adv, device=y.device) for x_adv,(_,y) in zip(run(), batches)]

def of_fastrain(model, batches):
    attack = PGD(EPS, ALPHA, STEPS, start='natural')
    return lambda: [attack(model, x, y) for x,y in batches]

PEERS = dict(torchattacks=of_torchattacks, foolbox=of_foolbox, art=of_art)
AIMS = dict(torchattacks=1.2, foolbox=1.2, art=1.8)

def available(name) -> bool:
    "Can the library be imported? If not, the line that installs it is printed"
    try: importlib.import_module(name)
    except ImportError as e:
        print(f'{name} is left out ({e}): {INSTALL[name]}', file=sys.stderr)
        return False
    return True

@torch.no_grad()
def survivors(model, images, batches): return sum((model(x_adv).argmax(1) == y).sum().item() for x_adv,(_,y) in zip(images, batches))

def same_figure(model, forms, batches) -> int:
    "How many images survive; an error if the libraries do not agree on it, but for one in a hundred"
    counts = {name: survivors(model, f(), batches) for name,f in forms.items()}
    n = sum(len(y) for _,y in batches)
    if max(counts.values()) - min(counts.values()) > .01*n:
        raise SystemExit(f'peers.py: they do not do the same, so that times mean nothing: {counts}')
    return counts['fastrain']

def of_fast(model, batches):
    "What `evaluate(..., fast=True)` does; the copy of the model is measured before anything is timed"
    attack = PGD(EPS, ALPHA, STEPS, start='natural')
    copy = attacked_copies(model, *batches[0], dict(pgd=attack)).get('pgd', model)
    return lambda: [attack(copy, x, y) for x,y in batches]

OURS = {'fastrain': of_fastrain, 'fastrain --fast': of_fast}

def pgd(model, batches, repeats) -> list:
    forms = {name: make(model, batches) for name,make in PEERS.items() if available(name)}
    forms |= {name: make(model, batches) for name,make in OURS.items()}
    n = same_figure(model, forms, batches)
    seconds = take_turns(forms, repeats)
    return [judged(f'PGD-{STEPS}: {name} / {ours}', seconds[name], seconds[ours], AIMS[name], at_least=True, survive=n)
            for ours in OURS for name in forms if name not in OURS]

# -- AutoAttack --------------------------------------------------------------------------------------------------------------
def directly(model, x, y, bs) -> int:
    "The package as its authors call it: images that survive"
    package = importlib.import_module('pyautoattack')
    adversary = package.AutoAttack(model, norm='Linf', eps=EPS, version='standard', seed=0, device=x.device)
    x_adv,_ = adversary.run_standard_evaluation(x, y, batch_size=bs)
    return survivors(model, [x_adv], [(x, y)])

def by_evaluate(model, batches, fast=False) -> int:
    return int(evaluate(model, batches, 'aa', eps=EPS, checks=False, progress=False, fast=fast).right('aa').sum())

def autoattack(model, batches, repeats, target) -> list:
    x,y = map(torch.cat, zip(*batches))
    found = {}
    def keep(name, f): found[name] = f()
    forms = dict(directly=partial(keep, 'directly', lambda: directly(model, x, y, len(batches[0][1]))),
                 fastrain=partial(keep, 'fastrain', lambda: by_evaluate(model, batches)))
    forms['fastrain --fast'] = partial(keep, 'fastrain --fast', lambda: by_evaluate(model, batches, fast=True))
    seconds = take_turns(forms, repeats)
    if len(set(found.values())) > 1: raise SystemExit(f'peers.py: AutoAttack has several figures: {found}')
    return [judged(f'AutoAttack: pyautoattack directly / {ours}', seconds['directly'], seconds[ours], target, at_least=True,
                   survive=found[ours]) for ours in OURS]

# -- run ---------------------------------------------------------------------------------------------------------------------
def trained(backbone, x, y, epochs, eps=EPS):
    "A model that some attacks break on some images: a few epochs of FGSM training"
    model = create_backbone(backbone, 10, small_images=False if backbone.startswith('resnet10t') else None).train()
    opt,attack = torch.optim.SGD(model.parameters(), .05, .9),PGD(eps, eps, 1)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = F.cross_entropy(model(attack(model, x[rows], y[rows])), y[rows])
            opt.zero_grad()
            loss.backward()
            opt.step()
    return model.eval()

@call_parse
def main(
    backbone:str='resnet18', # Model for PGD-20
    n:int=256, # Images for PGD-20
    bs:int=64, # Batch size
    small:str='resnet10t_16', # Model for AutoAttack, which takes some ten thousand passes of it for an image
    n_aa:int=64, # Images for AutoAttack
    epochs:int=2, # Epochs of training before
    repeats:int=5, # Timed rounds of PGD-20
    aa_repeats:int=3, # Timed rounds of AutoAttack
    threads:int=None, # CPU threads (default: as torch chooses)
    tiny:bool=False, # Seconds, to see that it runs
    result:str=None # File for the results as JSON
):
    "Time evaluation by fastrain and by other libraries, on the same images"
    warnings.filterwarnings('ignore') # of the other libraries
    if threads: torch.set_num_threads(threads)
    if tiny: backbone,n,bs,n_aa,epochs,repeats,aa_repeats = small,16,8,0,1,1,1
    seed_all(0)
    dls = get_dls('digits', bs=64, device='cpu')
    (x,y),(x_test,y_test) = [tuple(torch.cat(o) for o in zip(*dl.new(shuffle=False, drop_last=False))) for dl in dls.loaders]
    x,y,x_test,y_test = (o.as_subclass(torch.Tensor) for o in (x, y, x_test, y_test))
    if tiny: x,y = x[:128],y[:128]
    def batches(n): return list(zip(x_test[:n].split(bs), y_test[:n].split(bs)))
    rows = pgd(trained(backbone, x, y, epochs), batches(n), repeats)
    if n_aa: rows += autoattack(trained(small, x, y, epochs), batches(n_aa), aa_repeats, 1.3)
    settings = dict(backbone=backbone, small=small, n=n, n_aa=n_aa, bs=bs, repeats=repeats, aa_repeats=aa_repeats,
                    threads=torch.get_num_threads(), eps=EPS)
    return report(result, settings, rows, f'Evaluation of {n} digits, of {n_aa} by AutoAttack, ratios of medians')
