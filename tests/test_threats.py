"AutoAttack against the authors' package image by image, its flags, worst cases, and the papers' PGD-20 and C&W-20 against plain loops"
import functools
import importlib.util
import logging
import sys

import pyautoattack
import pytest
import torch
from pyautoattack import autoattack as package
from pyautoattack import checks as package_checks
from torch import nn

from conftest import Forwards, digits, net, same, snapshot
from fastrain.attacks import autoattack
from fastrain.attacks.autoattack import AutoAttack, OfficialAttack
from fastrain.attacks.named import (AttackKind, PGDKind, WhileRight, known_settings, named_attack, own_attack, parse_attack,
                                    parse_attacks)
from fastrain.attacks.pgd import PGD, logit_margin, margin_objective
from fastrain.attacks.worst import WorstCase
from fastrain.core import fork_rng
from fastrain.evaluation.evaluate import evaluate

SINGLE = ('apgd-ce', 'apgd-dlr', 'apgd-t', 'fab', 'fab-t', 'square')

class Front(nn.Module):
    "A net behind a function of its images"
    def __init__(self, model, f): super().__init__(); self.model,self.f = model,f
    def forward(self, x): return self.model(self.f(x))

class Behind(Front):
    "A function behind a net"
    def forward(self, x): return self.f(self.model(x))

def rounded(model, levels=32): return Front(model, lambda x: (x*levels).round()/levels) # no gradient passes

class Dynamic(Front):
    "Takes a gradient when it is asked for logits"
    def forward(self, x):
        with torch.enable_grad():
            z = x.detach().clone().requires_grad_()
            g, = torch.autograd.grad(self.model(z).sum(), z)
        return self.model(x + 0*g)

def case(n=24, model=None, **kwargs):
    "A tiny net in eval mode, images, and its own predictions as labels, but for the first image"
    model = model or net(**kwargs).eval()
    x,_ = digits('test', n)
    with torch.no_grad(): z = model(x)
    y = z.argmax(1)
    y[0] = z[0].argmin()
    return model,x,y

@pytest.fixture(autouse=True)
def _fresh_counts(monkeypatch):
    "The package counts what models do for all models together"
    monkeypatch.setattr(package_checks, 'funcs', dict.fromkeys(package_checks.funcs, 0))

@pytest.fixture
def weak(monkeypatch):
    "The package with fewer steps, whoever asks it"
    before = package.AutoAttack._set_version
    def set_version(self, version='standard'):
        before(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 1
        self.apgd.eot_iter = min(2, self.apgd.eot_iter)
        self.fab.n_iter = 2
        self.square.n_queries = 60
    monkeypatch.setattr(package.AutoAttack, '_set_version', set_version)

def package_run(model, x, y, eps, norm, attacks=None, seed=0, version='standard', targets=None):
    "The package by itself, all images being one batch"
    adversary = pyautoattack.AutoAttack(model, norm=norm, eps=eps, seed=seed, version=version, device='cpu')
    if attacks: adversary.attacks_to_run = list(attacks)
    if targets: adversary.fab.n_target_classes = adversary.apgd_targeted.n_target_classes = targets
    return adversary.run_standard_evaluation(x, y, batch_size=len(x))

# --- AutoAttack is that of the package

@pytest.mark.parametrize('eps, norm, masked', [(.02, 'Linf', False), (.6, 'L2', False), (.15, 'Linf', True)])
def test_autoattack_is_the_package(weak, eps, norm, masked):
    model,x,y = case(model=rounded(net().eval(), 8) if masked else None)
    want,pred = package_run(model, x, y, eps, norm)
    got = AutoAttack(eps, norm.lower()).trace(model, x, y)
    assert torch.equal(got.x_adv, want)
    assert torch.equal(got.stage == -2, pred == y) and got.stage[0] == -1 and torch.equal(got.x_adv[0], x[0])
    for i in range(3): # the images broken after each attack are those of the package, if it runs only so far
        _,pred = package_run(model, x, y, eps, norm, AutoAttack(eps).stages[:i+1])
        assert torch.equal(pred != y, (got.stage >= -1) & (got.stage <= i))
    assert {*got.stage.tolist()} >= ({-2, -1, 3} if masked else {-2, -1, 0, 1, 2}) # else nothing would have been seen
    assert torch.equal(AutoAttack(eps, norm.lower())(model, x, y), want)

@pytest.mark.slow
def test_full_strength_is_the_package():
    "With no settings touched, on a model and images that are small enough for that"
    with fork_rng(0):
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 6)).eval()
        x = torch.rand(4, 3, 2, 2)
    with torch.no_grad(): y = model(x).argmax(1)
    want,pred = package_run(model, x, y, .12, 'Linf', targets=5)
    assert torch.equal(AutoAttack(.12)(model, x, y), want) and 0 < (pred == y).sum() < 4

@pytest.mark.parametrize('version', ['plus', 'rand'])
def test_other_versions_are_the_package(weak, version):
    model,x,y = case(8)
    assert torch.equal(AutoAttack(.02, version=version)(model, x, y), package_run(model, x, y, .02, 'Linf', version=version)[0])

@pytest.mark.parametrize('name', SINGLE)
def test_single_attacks_are_the_package(weak, name):
    model,x,y = case()
    attack = named_attack(name, .03)
    want,pred = package_run(model, x, y, .03, 'Linf', [name])
    assert torch.equal(attack(model, x, y), want) and (pred != y)[1:].any()
    assert same(attack.trace(model, x, y).flags, {})

def test_seed(weak):
    model,x,y = case(12)
    for seed in (0, 3):
        want = package_run(model, x, y, .02, 'Linf', seed=seed)[0]
        assert torch.equal(named_attack('aa', .02, seed=seed)(model, x, y), want)
        torch.rand(5) # the global generator has no say
        assert torch.equal(AutoAttack(.02, seed=seed)(model, x, y), want)
    assert not torch.equal(AutoAttack(.02, seed=0)(model, x, y), want)

def test_settings_are_those_of_the_paper(monkeypatch):
    "As methods.md has them"
    seen = {}
    def record(name, *attributes):
        def perturb(self, x, y, *args):
            key = name if name != 'apgd' else f'apgd-{self.loss}'
            seen[key] = {a: getattr(self, a) for a in attributes}
            return x
        return perturb
    monkeypatch.setattr(package.APGDAttack, 'perturb', record('apgd', 'n_iter', 'n_restarts', 'eot_iter', 'eps'))
    targeted = ('n_iter', 'n_restarts', 'n_target_classes')
    monkeypatch.setattr(package.APGDAttack_targeted, 'perturb', record('apgd-t', *targeted, 'loss'))
    monkeypatch.setattr(package.FABAttack_PT, 'perturb', record('fab-t', *targeted, 'targeted', 'alpha_max', 'eta', 'beta'))
    square = ('n_queries', 'n_restarts', 'p_init', 'loss', 'rescale_schedule')
    monkeypatch.setattr(package.SquareAttack, 'perturb', record('square', *square))
    AutoAttack(8/255)(*case(4))
    assert seen == {
        'apgd-ce': dict(n_iter=100, n_restarts=1, eot_iter=1, eps=8/255),
        'apgd-t': dict(n_iter=100, n_restarts=1, n_target_classes=9, loss='dlr-targeted'),
        'fab-t': dict(n_iter=100, n_restarts=1, n_target_classes=9, targeted=True, alpha_max=.1, eta=1.05, beta=.9),
        'square': dict(n_queries=5000, n_restarts=1, p_init=.8, loss='margin', rescale_schedule=False)}
    assert list(seen) == AutoAttack().stages

# --- numbers of classes

@pytest.mark.parametrize('n', [2, 3])
@pytest.mark.parametrize('name', ['aa', 'aa-plus', 'aa-rand', 'apgd-t', 'apgd-dlr'])
def test_too_few_classes(weak, name, n):
    with pytest.raises(ValueError, match=f'at least 4 classes.*the model has {n}.*apgd-ce, fab-t'):
        named_attack(name, .003)(*case(8, n_classes=n))

@pytest.mark.parametrize('name, n', [('apgd-ce', 2), ('fab-t', 2), ('apgd-ce', 3), ('fab-t', 3), ('square', 3), ('aa', 5), ('aa', 10)])
def test_fewer_classes_than_targets(weak, name, n):
    model,x,y = case(n_classes=n)
    got = named_attack(name, .06).trace(model, x, y)
    want,_ = package_run(model, x, y, .06, 'Linf', None if name == 'aa' else [name], targets=n-1)
    assert got.flags == {} and torch.equal(got.x_adv, want)
    assert n == 3 and name == 'square' or (model(got.x_adv).argmax(1) != y)[1:].any()

# --- flags

def models():
    base = net().eval()
    return {
        'healthy': base,
        'softmax output': Behind(base, lambda z: z.softmax(1)),
        'randomised': Behind(base, lambda z: z + .002*torch.randn_like(z)),
        'zero gradients': rounded(base),
        'optimises at inference': Dynamic(base, None)}

@pytest.mark.parametrize('name', models())
def test_flags(weak, name):
    model,x,y = case(8, models()[name])
    flags = OfficialAttack('apgd-t', .02).trace(model, x, y).flags
    assert list(flags) == ([] if name == 'healthy' else [name])
    assert AutoAttack(.02).trace(model, x, y).flags == flags
    if name == 'softmax output': return # is an error before that
    notes = evaluate(model, [(x, y)], 'natural,aa', eps=.02, checks=False, progress=False).notes
    want = [f'aa: AutoAttack\'s flag {k!r} (in 1 of 1 batches): {v}' for k,v in flags.items()]
    assert [n for n in notes if 'square' not in n] == want

def test_flag_is_of_this_model_alone(weak):
    model,x,y = case(8)
    assert 'optimises at inference' in OfficialAttack('apgd-ce', .02).trace(Dynamic(model, None), x, y).flags
    assert OfficialAttack('apgd-ce', .02).trace(model, x, y).flags == {}

def test_square_beats_white_box(weak):
    model,x,y = case(model=rounded(net().eval(), 8))
    ev = evaluate(model, [(x, y)], 'natural,aa', eps=.15, checks=False, progress=False)
    share = (ev.columns['aa']['stage'] == 3).float().mean().item()
    note, = [n for n in ev.notes if 'square beats white-box' in n]
    assert share > .002 and f'Square broke {100*share:.1f} %' in note and note.startswith('aa: ')
    fine = evaluate(model.model, [(x, y)], 'natural,aa', eps=.02, checks=False, progress=False)
    assert not any('square' in n for n in fine.notes)

def test_square_is_only_beaten_by_what_comes_before():
    "Square as the first or only attack has none to beat"
    model,x,y = case(8, rounded(net().eval(), 8))
    class Cheap(PGD): pass
    ev = evaluate(model, [(x, y)], dict(a=WorstCase(dict(square=Cheap(.2, .05, 3)))), checks=False, progress=False)
    assert ev['a'] < ev.right('a').numel() and not ev.notes

def test_nothing_is_printed(weak, capfd, caplog):
    with caplog.at_level(logging.WARNING):
        for name in ('zero gradients', 'randomised', 'optimises at inference'): AutoAttack(.02)(*case(8, models()[name]))
    assert capfd.readouterr() == ('', '') and not caplog.records

# --- what is left behind

@pytest.mark.parametrize('name', SINGLE)
def test_model_and_images_are_left_alone(weak, name):
    model,x,y = case(8, drop=.5)
    model.train().bn1.eval()
    before,x0,modes = snapshot(model),x.clone(),[m.training for m in model.modules()]
    named_attack(name, .02)(model, x, y)
    assert same(snapshot(model), before) and torch.equal(x, x0)
    assert [m.training for m in model.modules()] == modes and all(p.requires_grad for p in model.parameters())

@pytest.mark.parametrize('name', SINGLE)
def test_no_gradients_are_left_behind(weak, name):
    model,x,y = case(8)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    named_attack(name, .02)(model, x, y)
    assert model.fc.weight.grad.eq(1).all() and model.conv1.weight.grad is None

def test_random_numbers_go_on(weak):
    attack,args = OfficialAttack('apgd-ce', .02),case(8)
    attack(*args)
    a = torch.rand(3)
    attack(*args)
    assert not torch.equal(torch.rand(3), a)

def test_debugger_stays(weak):
    before,own = sys.gettrace(),lambda *args: None
    sys.settrace(own)
    try:
        OfficialAttack('apgd-ce', .02)(*case(4))
        assert sys.gettrace() is own
    finally: sys.settrace(before)

# --- worst cases

class Spy:
    "Replaces the images that it is to break by black ones, and notes what it was given"
    eps,norm = 1.,'linf'
    def __init__(self, breaks, cost=1): self.breaks,self.cost,self.given = breaks,cost,[]
    def __call__(self, model, x, y):
        self.given += self.numbers(x).tolist()
        return torch.where(torch.isin(self.numbers(x), torch.tensor(self.breaks, dtype=torch.long))[:,None], 0., x)
    @staticmethod
    def numbers(x): return (x[:,0]*100).round().long()

class Brightness(nn.Module):
    "Class 1 if there is light"
    def forward(self, x): return torch.stack([torch.full_like(x[:,0], .005), x[:,0]], 1)

def test_no_attack_is_given_what_is_broken():
    x = torch.arange(10)[:,None]/100 # image number i has the brightness i; number 0 is dark and wrong from the start
    a,b,c = Spy([1, 2, 3], 5),Spy([2, 4, 5], 7),Spy(range(1, 10), 11)
    ticks = []
    res = WorstCase(dict(a=a, b=b, c=c)).trace(Brightness(), x, torch.ones(10, dtype=torch.long), ticks.append)
    # each sees the natural images, not what those before it made
    assert (a.given, b.given, c.given) == ([*range(1, 10)], [*range(4, 10)], [6, 7, 8, 9])
    assert res.stage.tolist() == [-1, 0, 0, 0, 1, 1, 2, 2, 2, 2] and ticks == [5, 7, 11]

def test_what_none_breaks_stays():
    x = torch.arange(1, 5)[:,None]/100
    a,b = Spy([]),Spy([2])
    res = WorstCase(dict(a=a, b=b)).trace(Brightness(), x, torch.ones(4, dtype=torch.long))
    assert res.stage.tolist() == [-2, 1, -2, -2]
    assert torch.equal(res.x_adv[[0, 2, 3]], x[[0, 2, 3]]) and res.x_adv[1] == 0 and res.x_adv is not x

def test_nothing_left_asks_no_attack():
    a,b,ticks = Spy([1, 2]),Spy([]),[]
    WorstCase(dict(a=a, b=b)).trace(Brightness(), torch.tensor([[.01], [.02]]), torch.ones(2, dtype=torch.long), ticks.append)
    assert len(a.given) == 2 and not b.given and len(ticks) == 2 # a bar comes to its end all the same

def test_worst_case_by_name():
    attack,(model,x,y) = named_attack('fgsm+pgd3-las+cw3@0.05', .02),case()
    assert attack.stages == ['fgsm', 'pgd3-las', 'cw3@0.05']
    assert attack.eps == .05 and [a.eps for a in attack.attacks.values()] == [.02, .02, .05]
    with fork_rng(5): res = attack.trace(model, x, y)
    with fork_rng(5):
        left = torch.arange(1, 24)
        for i,a in enumerate(attack.attacks.values()):
            x_adv = a(model, x[left], y[left])
            broken = model(x_adv).argmax(1) != y[left]
            assert torch.equal(res.x_adv[left[broken]], x_adv[broken]) and (res.stage[left[broken]] == i).all()
            left = left[~broken]
    assert torch.equal(res.x_adv[left], x[left]) and (res.stage[left] == -2).all()
    assert res.flags == {} and {*res.stage.tolist()} >= {-2, -1, 0, 2}

# --- the package from the authors' repository

GIT = '''
import torch
calls = []
class Logger:
    def __init__(self, log_path): pass
    def log(self, s): print(s)
class Part:
    n_target_classes,logger = 9,None
class AutoAttack():
    def __init__(self, model, norm='Linf', eps=.3, seed=None, verbose=True, attacks_to_run=[], version='standard',
                 is_tf_model=False, device='cuda', log_path=None):
        if version in ['standard', 'plus', 'rand'] and attacks_to_run != []:
            raise ValueError("attacks_to_run will be overridden unless you use version='custom'")
        self.model,self.epsilon,self.attacks_to_run,self.logger = model,eps,attacks_to_run,Logger(log_path)
        self.apgd,self.apgd_targeted,self.fab = Part(),Part(),Part()
        self.init = dict(norm=norm, eps=eps, seed=seed, verbose=verbose, version=version, device=str(device))
    def run_standard_evaluation(self, x_orig, y_orig, bs=250, return_labels=False, state_path=None):
        targets = self.fab.n_target_classes
        calls.append(dict(self.init, bs=bs, attacks=list(self.attacks_to_run), targets=targets, training=self.model.training))
        self.logger.log('running apgd-ce')
        self.apgd_targeted.logger.log('Warning: there are 3 points with zero gradient! '
                                      'This might lead to unreliable evaluation with gradient-based attacks.')
        return (x_orig + self.epsilon).clamp(0., 1.)
'''

@pytest.fixture
def with_git_package(tmp_path, monkeypatch):
    "A second copy of `fastrain.attacks.autoattack`, made where the package of the repository is installed, too"
    (tmp_path/'autoattack.py').write_text(GIT)
    monkeypatch.syspath_prepend(tmp_path)
    spec = importlib.util.spec_from_file_location('fastrain.attacks._autoattack_again', autoattack.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop('autoattack', None)

def test_git_package_comes_first(with_git_package, capfd):
    model,x,y = case(12, n_classes=7)
    model.train()
    official = with_git_package.official
    assert official.__name__ == 'autoattack' and autoattack.official is pyautoattack
    res = with_git_package.OfficialAttack('fab-t', .02, 'l2', seed=9).trace(model, x, y)
    assert official.calls == [dict(norm='L2', eps=.02, seed=9, verbose=False, version='standard', device='cpu',
                                   bs=12, attacks=['fab-t'], targets=6, training=False)]
    assert torch.equal(res.x_adv, (x + .02).clamp(0, 1))
    assert list(res.flags) == ['zero gradients'] and '3 points' in res.flags['zero gradients']
    assert capfd.readouterr() == ('', '') and model.training

def test_git_package_in_autoattack(with_git_package):
    model,x,y = case(12)
    res = with_git_package.AutoAttack(.5).trace(model, x, y)
    calls = with_git_package.official.calls
    assert [c['attacks'] for c in calls] == [['apgd-ce'], ['apgd-t'], ['fab-t'], ['square']][:len(calls)]
    assert calls[0]['bs'] == 11 and calls[0]['seed'] == 0 # image 0 is wrong
    assert all(c['bs'] == int((res.stage >= i).sum() + (res.stage == -2).sum()) for i,c in enumerate(calls))

# --- PGD-20 and C&W-20 against plain loops

def reference(model, x, y, eps, step, steps, loss, clipped=True, while_right=False):
    "One image after the other; what is drawn at the start is drawn for all"
    starts,res = x + torch.empty_like(x).uniform_(-1, 1)*eps,[]
    for x0,a,c in zip(x, starts.clamp(0, 1) if clipped else starts, y.tolist()):
        for _ in range(steps):
            a = a.detach().requires_grad_()
            z, = model(a[None])
            if while_right and z.argmax() != c: break
            wrong = torch.stack([z[k] for k in range(len(z)) if k != c])
            value = wrong.max() - z[c] if loss == 'margin' else z.logsumexp(0) - z[c]
            g, = torch.autograd.grad(value, a)
            a = torch.max(torch.min(a + step*g.sign(), x0 + eps), x0 - eps).clamp(0, 1)
        res.append(a.detach())
    return torch.stack(res)

# methods.md 17: (step at ε = 0.031, step at 8/255, is the start clipped to [0,1]?, does an image stop once it is wrong?)
tables = {
    '': (.0031, .8/255, True, False),
    '-lbgat': (.003, .003/.031*8/255, False, False),
    '-las': (.031/4, 2/255, True, True),
    '-fat': (.031/4, 2/255, True, False)}

@pytest.mark.parametrize('kind', ['pgd', 'cw'])
@pytest.mark.parametrize('eps', [.031, 8/255])
@pytest.mark.parametrize('convention', tables)
def test_conventions_are_plain_loops(convention, eps, kind):
    step,step8,clipped,while_right = tables[convention]
    step = step if eps == .031 else step8
    model,x,y = case(6)
    model,x = model.double(),x.double()
    attack = named_attack(f'{kind}20{convention}', eps)
    assert (attack.eps, attack.steps, attack.alpha) == (eps, 20, pytest.approx(step, rel=1e-12))
    start = 'uniform' if clipped else 'uniform_unclipped'
    assert attack.start == (start if convention else None) and type(attack) is (WhileRight if while_right else PGD)
    loss = dict(pgd='ce', cw='margin')[kind]
    with fork_rng(3): got = attack(model, x, y)
    with fork_rng(3): want = reference(model, x, y, eps, step, 20, loss, clipped, while_right)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert (got - x).abs().max() <= eps + 1e-12 and (model(got).argmax(1) != y)[1:].any()

def test_number_of_steps():
    model,x,y = case(6)
    for steps in (1, 7):
        forwards = Forwards(model)
        named_attack(f'pgd{steps}', .01)(model, x, y)
        forwards.handle.remove()
        assert forwards.n == steps
    assert named_attack('pgd').steps == named_attack('cw').steps == 20

def test_las_moves_only_what_is_right():
    model,x,y = case(24)
    z = model(x).detach()
    def sizes(labels, eps=.02):
        seen = []
        handle = model.register_forward_pre_hook(lambda m, inp: seen.append(len(inp[0])))
        res = named_attack('pgd20-las', eps)(model, x, labels)
        handle.remove()
        return seen,res
    seen,_ = sizes(z.argmin(1), 1e-4) # all wrong: one look, and none moves
    assert seen == [24]
    seen,_ = sizes(z.argmax(1), 1e-4) # all right to the end
    assert seen == [24]*20
    seen,x_adv = sizes(y)
    assert len(seen) == 20 and all(a >= b for a,b in zip(seen, seen[1:])) and seen[-1] < seen[0] == 24
    assert (model(x_adv).argmax(1) != y).sum() >= 24 - seen[-1] # what stopped is wrong

# --- names

forms = { # ε, α, steps
    'natural': None, 'noise': (.03, .03, 0), 'fgsm': (.03, .03, 1), 'pgd20': (.03, .003, 20), 'cw20': (.03, .003, 20),
    'pgd10': (.03, .003, 10), 'pgd100': (.03, .003, 100), 'pgd0': (.03, .003, 0),
    'pgd20-lbgat': (.03, .03*3/31, 20), 'cw30-las': (.03, .0075, 30), 'pgd20-fat': (.03, .0075, 20),
    'pgd20@4/255': (4/255, .4/255, 20), 'pgd20@0.01': (.01, .001, 20), 'fgsm@2/255': (2/255, 2/255, 1),
    'noise@0.5': (.5, .5, 0), 'pgd20-las@4/255': (4/255, 1/255, 20)}

@pytest.mark.parametrize('name', forms)
def test_names(name):
    attack = named_attack(name, .03)
    if forms[name] is None: assert attack is None
    else:
        assert (attack.eps, attack.alpha, attack.steps) == pytest.approx(forms[name], rel=1e-12) and attack.norm == 'linf'
        assert attack.objective == ('margin' if 'cw' in name else None) and (attack.start == 'natural') == ('fgsm' in name)
        assert named_attack(name, .03, norm='l2').norm == 'l2'

@pytest.mark.parametrize('name', SINGLE)
@pytest.mark.parametrize('own', ['', '@4/255'])
def test_names_of_single_attacks(name, own):
    attack = named_attack(name + own, .03, norm='l2', seed=4)
    eps = 4/255 if own else .03
    assert (attack.name, attack.eps, attack.norm, attack.version, attack.seed) == (name, eps, 'l2', 'standard', 4)

@pytest.mark.parametrize('name, version, n', [
    ('aa', 'standard', 4), ('aa-plus', 'plus', 6), ('aa-rand', 'rand', 2), ('aa@4/255', 'standard', 4), ('aa-plus@4/255', 'plus', 6)])
def test_names_of_autoattack(name, version, n):
    attack = named_attack(name, .03, seed=4)
    assert len(attack.stages) == n and attack.eps == (4/255 if '@' in name else .03)
    assert {(a.version, a.seed) for a in attack.attacks.values()} == {(version, 4)}

def test_step_size_is_given_for_the_given_eps():
    alphas = lambda *names: [named_attack(n, .03, .01).alpha for n in names]
    assert alphas('pgd20', 'cw20') == [.01]*2 and alphas('pgd20@0.02', 'pgd20-las', 'fgsm') == pytest.approx([.002, .0075, .03])

@pytest.mark.parametrize('name, match', [
    ('pdg20', "'pgd'"), ('pgd-20', "'pgd'"), ('cw-20', "'cw'"), ('PGD20', "'pgd'"), ('fsgm', "'fgsm'"), ('naturl', "'natural'"),
    ('sqare', "'square'"), ('apgd', "'apgd-ce'"), ('', 'Choose one of aa'), ('pgd20+', 'Choose one of aa'),
    ('pgd20-lbgta', "'lbgat'"), ('cw20-laz', "'las'"), ('pgd20-trades', 'convention'), ('noise-las', 'Unknown attack'),
    ('fgsm5', 'only pgd and cw'), ('aa20', 'only pgd and cw'), ('square5', 'only pgd and cw'),
    ('pgd20@8', '8/255'), ('pgd20@abc', '8/255 or a number'), ('pgd20@0', 'eps=0'), ('pgd20@1/0', '8/255 or a number'),
    ('pgd20@', '8/255 or a number'), ('pgd20@8/255@4/255', "'8/255@4/255' is not a size"),
    ('natural@4/255', 'natural images have no ε'), ('pgd20+natural', "'natural,pgd20")])
def test_wrong_names(name, match):
    with pytest.raises(ValueError, match=match): named_attack(name)

@pytest.mark.parametrize('name, meant', [
    ('aa-pluss', 'aa-plus'), ('aa-random', 'aa-rand'), ('apgd-ec', 'apgd-ce'), ('apgd-dl', 'apgd-dlr'), ('fab-x', 'fab-t')])
def test_wrong_names_with_a_dash(name, meant):
    with pytest.raises(ValueError, match=f"'{meant}'"): named_attack(name)

def test_wrong_settings_of_official_attacks():
    with pytest.raises(ValueError, match="'apgd-ce'"): OfficialAttack('apgd_ce')
    with pytest.raises(ValueError, match="'standard'"): OfficialAttack('square', version='standart')
    with pytest.raises(ValueError, match="'plus'"): AutoAttack(version='pluss')
    with pytest.raises(ValueError, match="'linf'"): AutoAttack(norm='Linf')
    with pytest.raises(ValueError, match='8/255'): AutoAttack(8)

def test_repr_tells_attacks_apart():
    "By it their results are found again"
    def make():
        aa = [AutoAttack(.03), AutoAttack(.02), AutoAttack(.03, 'l2'), AutoAttack(.03, version='plus'), AutoAttack(.03, seed=1)]
        return [*aa, OfficialAttack('fab'), *map(named_attack, ('pgd20', 'cw20', 'pgd20-las', 'pgd20-fat', 'pgd20+cw20'))]
    first = list(map(repr, make()))
    assert first == list(map(repr, make())) and len(set(first)) == len(first)

# --- what a name says

@pytest.mark.parametrize('name, title', [
    ('natural', 'natural'), ('noise', 'noise'), ('cw20', 'C&W-20'), ('pgd20-las@4/255', 'PGD-20-las@4/255'), ('aa', 'AutoAttack'),
    ('aa-plus', 'AutoAttack+'), ('aa-rand@4/255', 'AutoAttack (rand)@4/255'), ('apgd-dlr', 'APGD-DLR'), ('fab-t', 'FAB-T'),
    ('square', 'Square'), ('pgd20+cw20@0.1', 'PGD-20+C&W-20@0.1')])
def test_titles(name, title): assert parse_attack(name).title == own_attack(name, None).title == title

def test_fields():
    a = parse_attack('pgd20-las@4/255', eps=.1, alpha=.05)
    assert (a.name, a.kind, a.base, a.size, a.steps, a.convention) == ('pgd20-las@4/255', 'pgd', 'pgd20-las', '4/255', 20, 'las')
    assert (a.eps, a.alpha, a.norm) == (a.attack.eps, a.attack.alpha, 'linf') == (4/255, 1/255, 'linf')
    natural = parse_attack('natural')
    assert (natural.kind, natural.attack, natural.eps, natural.norm, natural.stages) == ('natural', None, None, None, {})
    worst = parse_attack('fgsm+cw20@0.05', eps=.02)
    assert (worst.kind, worst.base, worst.size, worst.eps) == ('worst case', worst.name, '', .05)
    assert [p.title for p in worst.stages.values()] == ['FGSM', 'C&W-20@0.05'] and worst.sized
    assert [s.title for s in parse_attack('aa').stages.values()] == ['APGD-CE', 'APGD-T', 'FAB-T', 'Square']

def test_objects_have_the_name_of_the_user():
    attack = PGD(.1, .02, 7)
    for name,title in (('mine', 'mine'), ('pgd7', 'PGD-7'), ('seconds', 'seconds'), ('n', 'n'), ('my attack@0.1', 'my attack@0.1')):
        a = parse_attacks({name: attack})[name]
        assert (a.kind, a.title, a.attack, a.eps, a.steps) == ('own', title, attack, .1, 7)
    a = own_attack('my attack@0.1', attack)
    assert (a.base, a.size) == ('my attack', '0.1') and own_attack('else', a) is a and own_attack('plain', None).kind == 'natural'

@pytest.fixture
def own_kind():
    "A kind of the user's, which leaves the registry again"
    class Steps(PGDKind):
        key,title,steps = 'my-steps2','Steps',3
        def make(self, *, eps, steps, norm, **_): return PGD(eps, eps/2, steps, norm=norm, start='natural')
    class Plain(AttackKind):
        key = 'grey'
        def make(self, *, eps, **_): return lambda model, x, y: x + (.5 - x).clamp(-eps, eps)
    yield
    for kind in (Steps, Plain): del AttackKind.registry[kind.key]

def test_own_kind_works_by_name(own_kind):
    attacks = parse_attacks('natural,my-steps2,my-steps27-las@0.1,fgsm+my-steps2,grey', [.02, .05])
    assert list(attacks) == ['natural', 'my-steps2@0.02', 'my-steps2@0.05', 'my-steps27-las@0.1', 'fgsm+my-steps2@0.02',
                             'fgsm+my-steps2@0.05', 'grey@0.02', 'grey@0.05']
    assert attacks['my-steps27-las@0.1'].title == 'Steps-7-las@0.1' and attacks['my-steps27-las@0.1'].attack.steps == 7
    assert attacks['fgsm+my-steps2@0.05'].title == 'FGSM+Steps-3@0.05' and attacks['grey@0.05'].eps == .05
    ev = evaluate(net().eval(), [digits('test', 8)], 'natural,my-steps2,grey@0.1,fgsm+my-steps2', eps=.02, checks=False, progress=False)
    assert list(ev.table.index) == ['natural', 'Steps-3', 'grey@0.1', 'FGSM+Steps-3', 'FGSM+Steps-3 after FGSM',
                                    'FGSM+Steps-3 after Steps-3', 'worst case']
    assert [ev.attacks[k].kind for k in ev.attacks] == ['natural', 'my-steps2', 'grey', 'worst case']
    with pytest.raises(ValueError, match='only pgd and cw and my-steps2'): named_attack('grey5')
    with pytest.raises(ValueError, match="'my-steps2'"): named_attack('my-stepz')

def test_keys_that_names_could_not_have():
    for key in ('a+b', 'a@b', 'a,b', 'a b'):
        with pytest.raises(ValueError, match='have a meaning in the names'): type('Wrong', (AttackKind,), dict(key=key))
        assert key not in AttackKind.registry

# --- the margin

def test_margin_is_the_formula():
    with fork_rng(0): z,y = torch.randint(-2, 3, (200, 4)).float(),torch.randint(0, 4, (200,)) # whole numbers: many ties
    want = [max(v for k,v in enumerate(row) if k != c) - row[c] for row,c in zip(z.tolist(), y.tolist())]
    assert logit_margin(z, y).tolist() == want and want.count(0) > 10
    assert logit_margin(z[:,:2], y % 2).tolist() == [row[1-c] - row[c] for row,c in zip(z[:,:2].tolist(), (y % 2).tolist())]
    wrong = z.argmax(1) != y
    assert (logit_margin(z, y)[wrong] >= 0).all() and (logit_margin(z, y)[~wrong] <= 0).all()

def test_what_is_known_of_an_attack():
    known = [None, named_attack('pgd20'), named_attack('pgd20-las'), named_attack('cw20'), named_attack('noise'), named_attack('aa'),
             named_attack('square'), named_attack('fgsm+cw20'), PGD(objective=margin_objective)]
    texts = [known_settings(a) for a in known]
    assert None not in texts and len({*texts}) == len(known)
    def mine(model, x, y): return x
    class Own(PGD): pass
    class Holds(PGD):
        def __init__(self): super().__init__(); self.f = mine
    class Promises(PGD):
        settings = lambda self: dict(eps=self.eps, version=2)
    for unknown in (mine, lambda model, x, y: x, torch.nn.Identity(), Own(), Holds(), PGD(objective=mine), PGD(start=mine),
                    WorstCase(dict(a=PGD(), b=Own())), functools.partial(mine, 3)):
        assert known_settings(unknown) is None
    assert 'version' in known_settings(Promises()) and 'version' in known_settings(WorstCase(dict(a=Promises())))
