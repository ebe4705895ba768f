"""Other libraries as oracle: the same attack on the same net and images must give the same images, the same counts the same interval

They are no dependencies of fastrain: `pip install foolbox adversarial-robustness-toolbox statsmodels`,
`pip install --no-deps torchattacks`, then `pytest -m peers`. A test whose library is missing is skipped.
"""
import copy
import importlib
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import digits, net
from fastrain.attacks.named import named_attack
from fastrain.attacks.pgd import FGSM, PGD
from fastrain.core import seed_all
from fastrain.evaluation.scores import mcnemar, mean_spread, topology_score, wilson

pytestmark = pytest.mark.peers

def peer(name, package):
    "A fixture that is the module `name`, or skips the test"
    @pytest.fixture(scope='module', name=package.replace('-', '_'))
    def load():
        try: return importlib.import_module(name)
        except ImportError as e: pytest.skip(f'{package} is not installed ({e})')
    return load

load_torchattacks = peer('torchattacks', 'torchattacks')
load_foolbox = peer('foolbox', 'foolbox')
load_art = peer('art.attacks.evasion', 'adversarial-robustness-toolbox')
load_pyautoattack = peer('pyautoattack', 'pyautoattack')
load_proportion = peer('statsmodels.stats.proportion', 'statsmodels')
load_tables = peer('statsmodels.stats.contingency_tables', 'statsmodels-tables')

# --- the net and the images

N = 64 # a power of two: means and sums over the batch then have gradients of exactly the same sign

@pytest.fixture(scope='module')
def trained():
    "A net that is right on most digits, and that attacks of 8/255 to 24/255 break in part"
    x,y = digits('train', 1437)
    model = net(0)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    gen = torch.Generator().manual_seed(0)
    for _ in range(12):
        for i in torch.randperm(len(x), generator=gen).split(64):
            loss = F.cross_entropy(model(x[i] + .1*torch.randn(x[i].shape, generator=gen)), y[i])
            opt.zero_grad()
            loss.backward()
            opt.step()
    return model.eval().requires_grad_(False)

@pytest.fixture(scope='module')
def double(trained): return copy.deepcopy(trained).double()

def images(n=N, double=False):
    x,y = digits('test', n)
    return x.double() if double else x,y

def inner_images(n=N):
    "Images that no attack of these sizes pushes out of [0,1], in double precision"
    x,y = images(n, double=True)
    return x*.4 + .3,y

def broken(model, x, y):
    with torch.no_grad(): return model(x).argmax(1) != y

def equal(a, b, tol): assert (a - b).abs().max().item() <= tol

def given(start): return lambda x, eps, norm, clip: start

EPS = [2/255, 8/255, 16/255, 24/255]
SINGLE,DOUBLE = 1e-6,1e-12 # tolerances in pixel units of images in float32 and float64

def test_the_net_can_tell_attacks_apart(trained):
    x,y = images(360)
    assert broken(trained, x, y).float().mean() < .1
    shares = [broken(trained, PGD(e, e/4, 10, start='natural')(trained, x, y), y).float().mean().item() for e in EPS]
    assert shares == sorted(shares) and shares[0] < .2 and shares[-1] > .5, shares

# --- torchattacks

def torchattack(lib, name, model, x, y, **kwargs):
    attack = getattr(lib, name)(model, **kwargs)
    return attack(x, y)

@pytest.mark.parametrize('eps', EPS)
def test_torchattacks_fgsm(torchattacks, trained, double, eps):
    for model,tol in ((trained, SINGLE), (double, DOUBLE)):
        x,y = images(double=model is double)
        equal(FGSM(eps)(model, x, y), torchattack(torchattacks, 'FGSM', model, x, y, eps=eps), tol)

@pytest.mark.parametrize('eps', EPS)
def test_torchattacks_pgd(torchattacks, trained, double, eps):
    settings = dict(eps=eps, alpha=eps/4, steps=10)
    for model,tol in ((trained, SINGLE), (double, DOUBLE)):
        x,y = images(double=model is double)
        other = torchattack(torchattacks, 'PGD', model, x, y, random_start=False, **settings)
        equal(PGD(**settings, start='natural')(model, x, y), other, tol)

@pytest.mark.parametrize('eps', EPS)
def test_torchattacks_pgd_from_the_same_random_numbers(torchattacks, double, eps):
    x,y = images(double=True)
    seed_all(3)
    other = torchattack(torchattacks, 'PGD', double, x, y, eps=eps, alpha=eps/10, steps=20)
    seed_all(3)
    equal(named_attack('pgd20', eps)(double, x, y), other, DOUBLE)
    seed_all(3)
    equal(named_attack(f'pgd20@{eps}', .1)(double, x, y), other, DOUBLE)

@pytest.mark.parametrize('eps', [.2, .5, 1., 2.])
def test_torchattacks_l2(torchattacks, double, eps):
    x,y = images(double=True)
    settings = dict(eps=eps, alpha=eps/5, steps=10)
    other = torchattack(torchattacks, 'PGDL2', double, x, y, random_start=False, eps_for_division=0, **settings)
    equal(PGD(**settings, norm='l2', start='natural')(double, x, y), other, DOUBLE)

def test_torchattacks_trades_adversary(torchattacks, double):
    x,y = inner_images()
    seed_all(3)
    other = torchattack(torchattacks, 'TPGD', double, x, y, eps=8/255, alpha=2/255, steps=10)
    seed_all(3)
    equal(PGD(8/255, 2/255, 10, objective='kl', start='gaussian')(double, x, y), other, DOUBLE)

# --- foolbox

def fool(lib, attack, model, x, y, eps):
    "Images of a foolbox attack"
    return attack.run(lib.PyTorchModel(model, bounds=(0, 1), device='cpu'), x, lib.Misclassification(y), epsilon=eps)

def fool_pgd(lib, norm='Linf', steps=10, alpha=None, start=None, margin=False):
    "Foolbox's PGD; its start and its loss are methods to be overridden"
    class Attack(getattr(lib.attacks, f'{norm}ProjectedGradientDescentAttack')):
        def get_random_start(self, x0, epsilon): return super().get_random_start(x0, epsilon) if start is None else start(x0)
        def get_loss_fn(self, model, labels): return cw_loss(lib, model, labels) if margin else super().get_loss_fn(model, labels)
    return Attack(abs_stepsize=alpha, steps=steps, random_start=start is not False)

def cw_loss(lib, model, labels):
    "The loss of foolbox's own C&W attack, unclamped"
    best_other = importlib.import_module('foolbox.attacks.carlini_wagner').best_other_classes
    def loss(x):
        logits = model(x)
        rows = range(len(logits))
        return (logits[rows, best_other(logits, labels)] - logits[rows, labels]).sum()
    return loss

@pytest.mark.parametrize('eps', EPS)
def test_foolbox_fgsm(foolbox, trained, double, eps):
    for model,tol in ((trained, SINGLE), (double, DOUBLE)):
        x,y = images(double=model is double)
        equal(FGSM(eps)(model, x, y), fool(foolbox, foolbox.attacks.LinfFastGradientAttack(), model, x, y, eps), tol)

def test_foolbox_l2_fgsm(foolbox, double):
    x,y = images(double=True)
    equal(FGSM(1., norm='l2')(double, x, y), fool(foolbox, foolbox.attacks.L2FastGradientAttack(), double, x, y, 1.), DOUBLE)

@pytest.mark.parametrize('eps', EPS)
def test_foolbox_pgd(foolbox, trained, double, eps):
    for model,tol in ((trained, SINGLE), (double, DOUBLE)):
        x,y = images(double=model is double)
        other = fool(foolbox, fool_pgd(foolbox, alpha=eps/4, start=False), model, x, y, eps)
        equal(PGD(eps, eps/4, 10, start='natural')(model, x, y), other, tol)

@pytest.mark.parametrize('norm,eps', [('linf', 8/255), ('linf', 16/255), ('l2', .5), ('l2', 2.)])
def test_foolbox_pgd_from_a_given_start(foolbox, double, norm, eps):
    x,y = images(double=True)
    start = (x + (torch.rand_like(x) - .5)*eps/(1 if norm == 'linf' else 30)).clamp(0, 1)
    attack = fool_pgd(foolbox, dict(linf='Linf', l2='L2')[norm], alpha=eps/4, start=lambda x0: type(x0)(start))
    other = fool(foolbox, attack, double, x, y, eps)
    equal(PGD(eps, eps/4, 10, norm=norm, start=given(start))(double, x, y), other, DOUBLE)

@pytest.mark.parametrize('eps', [.2, .5, 1., 2.])
def test_foolbox_l2(foolbox, double, eps):
    x,y = images(double=True)
    other = fool(foolbox, fool_pgd(foolbox, 'L2', alpha=eps/5, start=False), double, x, y, eps)
    equal(PGD(eps, eps/5, 10, norm='l2', start='natural')(double, x, y), other, DOUBLE)

@pytest.mark.parametrize('norm,eps', [('linf', 4/255), ('linf', 16/255), ('l2', 1.)])
def test_foolbox_cw_margin(foolbox, double, norm, eps):
    x,y = images(double=True)
    attack = fool_pgd(foolbox, dict(linf='Linf', l2='L2')[norm], 20, eps/10, False, margin=True)
    mine = PGD(eps, eps/10, 20, norm=norm, objective='margin', start='natural')(double, x, y)
    equal(mine, fool(foolbox, attack, double, x, y, eps), DOUBLE)

@pytest.mark.parametrize('name,margin', [('pgd20', False), ('cw20', True)])
def test_foolbox_names_from_the_same_random_numbers(foolbox, double, name, margin):
    x,y = images(double=True)
    seed_all(5)
    other = fool(foolbox, fool_pgd(foolbox, steps=20, alpha=.8/255, margin=margin), double, x, y, 8/255)
    seed_all(5)
    equal(named_attack(name, 8/255)(double, x, y), other, DOUBLE)

@pytest.mark.parametrize('norm,sizes', [('linf', EPS), ('l2', [.2, .5, 1., 2.])])
def test_foolbox_sweep_of_sizes(foolbox, trained, norm, sizes):
    "Foolbox's public call: which of the images are broken at each size"
    x,y = images(128)
    attack = getattr(foolbox.attacks, f'{dict(linf="Linf", l2="L2")[norm]}PGD')(rel_stepsize=.1, steps=20, random_start=False)
    _,_,success = attack(foolbox.PyTorchModel(trained, bounds=(0, 1), device='cpu'), x, y, epsilons=sizes)
    mine = [broken(trained, PGD(e, .1*e, 20, norm=norm, start='natural')(trained, x, y), y) for e in sizes]
    assert torch.equal(success, torch.stack(mine))
    assert 0 < success[0].sum() < success[-1].sum(), 'sizes too alike to tell attacks apart'

# --- adversarial-robustness-toolbox, in float32

def art_classifier(model):
    from art.estimators.classification import PyTorchClassifier
    return PyTorchClassifier(copy.deepcopy(model), nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1), device_type='cpu')

def art_images(attack, x, y): return torch.from_numpy(attack.generate(x.float().numpy(), F.one_hot(y, 10).numpy()))

def art_pgd(lib, model, norm, eps, alpha, steps=10, starts=0):
    return lib.ProjectedGradientDescent(art_classifier(model), norm=norm, eps=eps, eps_step=alpha, max_iter=steps, num_random_init=starts,
                                        batch_size=N, verbose=False)

@pytest.mark.parametrize('eps', EPS)
def test_art_fgsm(adversarial_robustness_toolbox, trained, eps):
    x,y = images()
    attack = adversarial_robustness_toolbox.FastGradientMethod(art_classifier(trained), eps=eps, batch_size=N)
    equal(FGSM(eps)(trained, x, y), art_images(attack, x, y), SINGLE)

@pytest.mark.parametrize('eps', EPS)
def test_art_pgd(adversarial_robustness_toolbox, trained, eps):
    x,y = images()
    other = art_images(art_pgd(adversarial_robustness_toolbox, trained, np.inf, eps, eps/4), x, y)
    equal(PGD(eps, eps/4, 10, start='natural')(trained, x, y), other, SINGLE)

def test_art_pgd_from_a_given_start(adversarial_robustness_toolbox, trained, monkeypatch):
    x,y = images()
    eps = 8/255
    noise = (torch.rand_like(x)*2 - 1)*eps
    module = importlib.import_module('art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch')
    monkeypatch.setattr(module, 'random_sphere', lambda *args: noise.flatten(1).numpy())
    other = art_images(art_pgd(adversarial_robustness_toolbox, trained, np.inf, eps, eps/4, starts=1), x, y)
    equal(PGD(eps, eps/4, 10, start=given((x + noise).clamp(0, 1)))(trained, x, y), other, SINGLE)

@pytest.mark.parametrize('eps', [.2, .5, 1., 2.])
def test_art_l2(adversarial_robustness_toolbox, trained, eps):
    "ART clips before it projects, so that the two agree only on images that are never clipped"
    x,y = (o.float() if o.is_floating_point() else o for o in inner_images())
    other = art_images(art_pgd(adversarial_robustness_toolbox, trained, 2, eps, eps/5), x, y)
    equal(PGD(eps, eps/5, 10, norm='l2', start='natural')(trained, x, y), other, 1e-5*eps)

# --- random starts: the same images are broken as often

SEEDS = 20

def breaks(attack, model, x, y):
    "How often each image is broken by `attack(x, y)`"
    hits = torch.zeros(len(x))
    for seed in range(SEEDS):
        seed_all(1000 + seed)
        hits += broken(model, attack(x, y), y)
    return hits

def check_as_often(mine, other):
    "The counts of two attacks, image by image: their sum, and their spread, may differ by 4 standard deviations of binomial counts"
    p = (mine + other)/(2*SEEDS)
    var = 2*SEEDS*p*(1 - p)
    open_ = var > 0
    assert open_.sum() >= 6, f'only {int(open_.sum())} images are broken by some starts and not by others: nothing is tested'
    z = (mine - other).sum()/var.sum().sqrt()
    assert z.abs() < 4, f'{int(mine.sum())} images broken, {int(other.sum())} by the other library: {z:.1f} standard deviations apart'
    n,chi2 = int(open_.sum()),((mine - other)[open_]**2/var[open_]).sum().item()
    assert chi2 < n + 4*math.sqrt(2*n) + 4, f'chi² = {chi2:.1f} over {n} images: other images are broken than by the other library'

RANDOM = dict(linf=(14/255, 3/255, 3), l2=(1.2, .3, 3)) # size, step and steps: few, so that the start matters

def my_breaks(model, norm, x, y):
    eps,alpha,steps = RANDOM[norm]
    attack = PGD(eps, alpha, steps, norm=norm, start='uniform')
    return breaks(lambda x, y: attack(model, x, y), model, x, y)

def test_torchattacks_random_starts(torchattacks, trained):
    x,y = images(360)
    eps,alpha,steps = RANDOM['linf']
    attack = torchattacks.PGD(trained, eps=eps, alpha=alpha, steps=steps)
    seed_all(99)
    shift = torch.randint(2**40, ())
    def run(x, y):
        torch.manual_seed(torch.initial_seed() + int(shift)) # not our random numbers
        return attack(x, y)
    check_as_often(my_breaks(trained, 'linf', x, y), breaks(run, trained, x, y))

@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_foolbox_random_starts(foolbox, trained, norm):
    x,y = images(360)
    eps,alpha,steps = RANDOM[norm]
    attack = fool_pgd(foolbox, dict(linf='Linf', l2='L2')[norm], steps, alpha)
    def run(x, y):
        torch.manual_seed(torch.initial_seed() + 10**6)
        return fool(foolbox, attack, trained, x, y, eps)
    check_as_often(my_breaks(trained, norm, x, y), breaks(run, trained, x, y))

def test_art_random_starts(adversarial_robustness_toolbox, trained):
    x,y = images(360)
    eps,alpha,steps = RANDOM['linf']
    attack = art_pgd(adversarial_robustness_toolbox, trained, np.inf, eps, alpha, steps, 1)
    check_as_often(my_breaks(trained, 'linf', x, y), breaks(lambda x, y: art_images(attack, x, y), trained, x, y))

# --- AutoAttack by its own entry point

def official(lib, model, x, y, eps, norm='Linf', only=None, version='standard', seed=0):
    adversary = lib.AutoAttack(model, norm=norm, eps=eps, version=version, seed=seed, device='cpu')
    if only: adversary.attacks_to_run = [only]
    return adversary.run_standard_evaluation(x, y, batch_size=len(x))[0]

@pytest.mark.parametrize('norm,eps,n', [('linf', 14/255, 12), ('l2', 2., 8)])
def test_autoattack(pyautoattack, trained, norm, eps, n):
    x,y = images(n)
    mine = named_attack('aa', eps, norm=norm)(trained, x, y)
    assert torch.equal(mine, official(pyautoattack, trained, x, y, eps, dict(linf='Linf', l2='L2')[norm]))
    assert broken(trained, mine, y).sum() > broken(trained, x, y).sum()

@pytest.mark.parametrize('name,version', [('aa-rand', 'rand'), ('aa-plus', 'plus')])
def test_autoattack_versions(pyautoattack, trained, name, version):
    x,y = images(6)
    mine = named_attack(name, 20/255)(trained, x, y)
    assert torch.equal(mine, official(pyautoattack, trained, x, y, 20/255, version=version))

@pytest.mark.parametrize('name', ['apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square'])
def test_single_attacks_of_autoattack(pyautoattack, trained, name, seed=7):
    x,y = images(8)
    mine = named_attack(name, 24/255, seed=seed)(trained, x, y)
    assert torch.equal(mine, official(pyautoattack, trained, x, y, 24/255, only=name, seed=seed))
    assert broken(trained, mine, y).sum() > broken(trained, x, y).sum()

# --- statistics

@pytest.mark.parametrize('confidence', [.68, .9, .95, .99])
def test_wilson(statsmodels, confidence):
    for n in (1, 2, 7, 100, 10_000):
        for hits in sorted({0, 1, n//3, n//2, n - 1, n}):
            other = statsmodels.proportion_confint(hits, n, alpha=1 - confidence, method='wilson')
            assert wilson(hits, n, confidence) == pytest.approx(other, abs=1e-12)

def paired(only_first, only_second, both=5, neither=3):
    "Two lists of right answers with these counts"
    counts = {(1, 0): only_first, (0, 1): only_second, (1, 1): both, (0, 0): neither}
    rows = [pair for pair,n in counts.items() for _ in range(n)]
    return [bool(a) for a,_ in rows],[bool(b) for _,b in rows]

@pytest.mark.parametrize('first,second', [(1, 0), (0, 3), (2, 2), (3, 9), (12, 4), (40, 61), (0, 25), (150, 151)])
def test_mcnemar(statsmodels_tables, first, second):
    a,b = paired(first, second)
    other = statsmodels_tables.mcnemar([[5, first], [second, 3]], exact=True)
    mine = mcnemar(a, b)
    assert (mine['only_first'], mine['only_second']) == (first, second)
    assert mine['p_value'] == pytest.approx(other.pvalue, rel=1e-10)

def test_mean_spread():
    rng = np.random.default_rng(0)
    method = np.repeat(['at', 'trades', 'at+train'], [5, 2, 1])
    df = pd.DataFrame(dict(method=method, natural=rng.uniform(40, 60, 8), pgd20=rng.normal(30, 5, 8)))
    table = mean_spread(df, 'method')
    for method,rows in df.groupby('method'):
        for column in ('natural', 'pgd20'):
            v = rows[column].to_numpy()
            spread = f' ± {np.std(v, ddof=1):.2f}' if len(v) > 1 else ''
            assert table.loc[method, column] == f'{np.mean(v):.2f}{spread}'
        assert table.loc[method, 'seeds'] == len(rows)

# --- kNN in feature space

@pytest.mark.parametrize('noise', [.3, 1., 3.])
def test_topology_score_is_sklearns_knn(noise):
    from sklearn.neighbors import KNeighborsClassifier
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(7, 16, generator=rng, dtype=torch.double)
    def features(n):
        y = torch.randint(7, (n,), generator=rng)
        scale = torch.rand(n, 1, generator=rng, dtype=torch.double)*9 + 1 # lengths must not matter
        return scale*(centres[y] + noise*torch.randn(n, 16, generator=rng, dtype=torch.double)),y
    (support,classes),(queries,labels) = features(300),features(500)
    ks = (1, 2, 5, 10, 30, 300)
    scores = topology_score(support, classes, queries, labels, ks)
    for k in ks:
        knn = KNeighborsClassifier(k, metric='cosine', algorithm='brute').fit(support.numpy(), classes.numpy())
        assert scores[k] == pytest.approx(knn.score(queries.numpy(), labels.numpy()), abs=1e-7), k

def test_topology_score_of_the_nets_features(trained):
    from sklearn.neighbors import KNeighborsClassifier
    (x,y),(x_test,y_test) = digits('train', 400),digits('test', 200)
    with torch.no_grad(): support,queries = trained(x).double(),trained(x_test).double()
    for k,score in topology_score(support, y, queries, y_test).items():
        knn = KNeighborsClassifier(k, metric='cosine', algorithm='brute').fit(support.numpy(), y.numpy())
        assert score == pytest.approx(knn.score(queries.numpy(), y_test.numpy()), abs=1e-7), k
