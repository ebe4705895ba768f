"Each sign of a broken attack from a model that was made to give it, none from healthy ones; logits, probabilities and balls"
import copy
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from conftest import digit_dls, digits, net, same, snapshot
from fastrain.attacks.pgd import PGD, random_noise
from fastrain.attacks.checks import Finding, check_ball, check_logits, check_not_probabilities, sanity_checks
from fastrain.core import fork_rng, get_rng_state, seed_all
from fastrain.data.sources import get_dls
from fastrain.evaluation.evaluate import _shared_images, evaluate

def train(adversarial, seed=0, n=1400):
    seed_all(seed)
    model,(x,y) = net(seed),digits('train', n)
    opt = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(3):
        for i in torch.randperm(n).split(64):
            x_adv = PGD(.1, .05, 3)(model, x[i], y[i]) if adversarial else x[i]
            opt.zero_grad()
            F.cross_entropy(model(x_adv), y[i]).backward()
            opt.step()
    return model.eval()

@pytest.fixture(scope='module')
def standard(): return train(False)

@pytest.fixture(scope='module')
def robust(): return train(True)

class Wrap(nn.Module):
    "A net with a function before and one after it"
    def __init__(self, model, before=None, after=None):
        super().__init__()
        self.model,self.before,self.after = model,before or nn.Identity(),after or nn.Identity()
    def forward(self, x): return self.after(self.model(self.before(x)))

class NoGrad(Wrap):
    @torch.no_grad()
    def forward(self, x): return super().forward(x)

class Signed(torch.autograd.Function):
    "The images themselves, whose gradient comes back times `sign`"
    @staticmethod
    def forward(ctx, x, sign): ctx.sign = sign; return x.clone()
    @staticmethod
    def backward(ctx, g): return ctx.sign*g,None

def turned(sign): return lambda model: Wrap(model, lambda x: Signed.apply(x, sign(x)))

def far(limit):
    "-1 for images that are further than `limit` from the sixteen greys that the digits have"
    return lambda x: torch.where((x - (x*16).round()/16).abs().flatten(1).amax(1) > limit, -1., 1.)[:,None,None,None]

def in_turn():
    signs = []
    def sign(x):
        signs.append(x.requires_grad)
        return 1. if sum(signs) % 2 == 1 else -1.
    return sign

planted = { # (the model, ε at which it shows, what is found), with a trained model inside that gives no finding
    'as it is': (lambda m: Wrap(m), .06, set()),
    'logits times 10': (lambda m: Wrap(m, after=lambda z: 10*z), .06, set()),
    'logits times 10,000': (lambda m: Wrap(m, after=lambda z: 1e4*z), .06, {'zero gradients', 'large eps'}),
    'quantised images': (lambda m: Wrap(m, lambda x: (x*16).round()/16), .06, {'zero gradients', 'large eps'}),
    'random logits': (lambda m: Wrap(m, after=lambda z: z + .1*torch.randn_like(z)), .06, {'randomised'}),
    'no_grad': (lambda m: NoGrad(m), .06, {'zero gradients'}),
    'detached logits': (lambda m: Wrap(m, after=torch.detach), .06, {'zero gradients'}),
    'detached images': (lambda m: Wrap(m, torch.detach), .06, {'zero gradients'}),
    'gradients that are not finite': (lambda m: Wrap(m, lambda x: x + 0*x.sqrt()), .06, {'non-finite gradients'}),
    'gradients that point home': (turned(lambda x: -1.), .1, {'random noise', 'large eps'}),
    'every second gradient points home': (lambda m: turned(in_turn())(m), .1, {'more steps'}),
    'gradients that point home from ε on': (turned(far(.024)), .02, {'larger eps', 'large eps'}),
    'gradients that point home from 2ε on': (turned(far(.024)), .01, {'large eps'})}

@pytest.mark.parametrize('name', planted)
def test_findings(standard, name):
    make,eps,want = planted[name]
    found = sanity_checks(make(standard), *digits('test', 64), eps)
    assert {f.name for f in found} == want and len(found) == len(want)
    assert all(isinstance(f, Finding) and str(f) == f'{f.name}: {f.text}' for f in found)

@pytest.mark.parametrize('name, want', [
    ('logits times 10,000', {'zero gradients', 'large eps'}), ('quantised images', {'zero gradients', 'large eps'}),
    ('random logits', {'randomised'}), ('gradients that point home', {'random noise', 'large eps'})])
def test_findings_l2(standard, name, want):
    assert {f.name for f in sanity_checks(planted[name][0](standard), *digits('test', 64), 2., 'l2')} == want

@pytest.mark.parametrize('kind, norm, eps', [
    ('standard', 'linf', .01), ('standard', 'linf', .2), ('standard', 'l2', .5),
    ('robust', 'linf', .031), ('robust', 'linf', .1), ('robust', 'l2', 2.),
    *[pytest.param(*case, marks=pytest.mark.slow) for case in (
        ('standard', 'linf', .031), ('standard', 'linf', .1), ('standard', 'l2', 2.),
        ('robust', 'linf', .01), ('robust', 'linf', .2), ('robust', 'l2', .5))]])
def test_healthy_models_give_no_finding(request, kind, norm, eps):
    model,(x,y) = request.getfixturevalue(kind),digits('test', 48)
    other = request.getfixturevalue(dict(standard='robust', robust='standard')[kind])
    assert sanity_checks(model, x, y, eps, norm) == sanity_checks(model, x, y, eps, norm, other) == []

def test_models_are_what_they_are_called(standard, robust):
    x,y = digits('test', 360)
    right = lambda model, x: (model(x).argmax(1) == y).float().mean().item()
    attack = PGD(.1, .025, 10)
    assert min(right(standard, x), right(robust, x)) > .85
    assert right(standard, attack(standard, x, y)) < .1 and right(robust, attack(robust, x, y)) > .5

def test_numbers_in_the_text(standard):
    x,y = digits('test', 64)
    model = Wrap(standard, lambda x: (x*16).round()/16)
    zero,large = sanity_checks(model, x, y, .06)
    assert zero.text == 'for 64 of 64 images the gradient of the cross-entropy is exactly zero'
    assert 'survive PGD-10 with ε = 0.5' in large.text
    x1 = x.clone().requires_grad_()
    model = Wrap(standard, after=lambda z: 1e4*z)
    grad, = torch.autograd.grad(F.cross_entropy(model(x1), y, reduction='sum'), x1)
    n = int((grad.flatten(1).abs().sum(1) == 0).sum())
    assert 0 < n < 64 and sanity_checks(model, x, y, .06)[0].text.startswith(f'for {n} of 64 images')
    random = Wrap(standard, after=lambda z: z + .1*torch.randn_like(z))
    gap = float(sanity_checks(random, x, y, .06)[0].text.split('up to ')[1].split(',')[0])
    assert .3 < gap < 1

@pytest.mark.parametrize('name', ['no_grad', 'detached logits', 'detached images'])
def test_no_gradient(standard, name):
    finding, = sanity_checks(planted[name][0](standard), *digits('test', 16), .06)
    assert finding.name == 'zero gradients' and 'no gradient' in finding.text

def test_transfer(standard, robust):
    "Images of the twin whose gradients are not masked break the model; its own attack does not"
    for model in (standard, robust):
        masked = Wrap(model, lambda x: (x*16).round()/16)
        found = sanity_checks(masked, *digits('test', 64), .1, source=model)
        transfer, = [f for f in found if f.name == 'transfer']
        moved,survive = [int(s.split()[0]) for s in transfer.text.split(', ')[0:2] for s in [s.replace('of', '')]]
        assert moved < survive - 2 and {f.name for f in found} == {'zero gradients', 'large eps', 'transfer'}
        assert 'transfer' not in {f.name for f in sanity_checks(masked, *digits('test', 64), .1)}

def test_slack():
    "A finding needs more than two images, whatever the share"
    class Stubborn(nn.Module): # right about the first `n` images, whose first pixel is white, come what may
        def forward(self, x):
            z = torch.stack([x[:,0].flatten(1).mean(1), -x[:,0].flatten(1).mean(1) + .5], 1)
            return torch.where((x.detach()[:,2,0,0] > .5)[:,None], torch.tensor([1., 0.]) + 1e-3*z, z)
    def found(n):
        x = torch.full((40, 3, 4, 4), .3)
        x[:,2,0,0] = (torch.arange(40) < n).float()
        return {f.name for f in sanity_checks(Stubborn(), x, torch.zeros(40, dtype=torch.long), .3)}
    assert found(0) == found(2) == set() and found(6) == {'large eps'}

@pytest.mark.parametrize('mode', ['train', 'mixed'])
def test_model_is_left_as_it_was(robust, mode):
    model = net(drop=.3)
    model.train()
    if mode == 'mixed': model.bn2.eval()
    before,modes = snapshot(model),[m.training for m in model.modules()]
    assert 'randomised' not in {f.name for f in sanity_checks(model, *digits('test', 16), .06, source=robust)} # dropout is off
    assert same(snapshot(model), before) and [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())

# --- in an evaluation

def test_findings_are_notes(standard):
    batches = [digits('test', 64)]
    masked = Wrap(standard, lambda x: (x*16).round()/16)
    def names(model, **kwargs):
        ev = evaluate(model, batches, 'natural,pgd2', eps=.06, progress=False, **kwargs)
        return [n.split(':')[0] for n in ev.notes]
    assert names(masked) == ['zero gradients', 'large eps']
    assert names(masked, standard=standard) == ['zero gradients', 'large eps', 'transfer']
    assert names(masked, checks=False) == [] and names(standard) == names(standard, standard=standard) == []

def test_checks_are_in_the_ball_of_the_attacks(standard):
    "The planted model shows itself at ε = 0.02 alone, and only in linf"
    model,batches = planted['gradients that point home from ε on'][0](standard),[digits('test', 64)]
    def notes(attacks, **kwargs):
        return {n.split(':')[0] for n in evaluate(model, batches, attacks, progress=False, **kwargs).notes}
    assert 'larger eps' in notes('natural,pgd2', eps=.02) & notes('pgd2@0.02,pgd2@0.01', eps=.1) & notes(dict(a=PGD(.02, .01, 2)), eps=.1)
    assert 'larger eps' not in notes('natural,pgd2', eps=.01) | notes('natural,pgd2', eps=2., norm='l2')

@pytest.mark.parametrize('attack', ['pgd3', 'cw3', 'fgsm', 'pgd3-las', 'pgd3+cw3'])
@pytest.mark.parametrize('name', ['no_grad', 'detached logits', 'detached images'])
def test_attacks_on_a_model_without_gradients(standard, name, attack):
    with pytest.raises(ValueError, match=f'^{attack.replace("+", ".")}: the model passes no gradient to its images.*square needs none'):
        evaluate(planted[name][0](standard), [digits('test', 16)], f'natural,{attack}', progress=False)

@pytest.mark.parametrize('name', ['no_grad', 'detached logits', 'detached images'])
def test_natural_and_noise_need_no_gradients(standard, name):
    ev = evaluate(planted[name][0](standard), [digits('test', 64)], 'natural,noise', progress=False)
    assert ev['natural'] > .8 and ev['noise'] > .8 and ev.notes == ['zero gradients: the model passes no gradient to its images at all']

def test_square_needs_no_gradients(standard, monkeypatch):
    from pyautoattack import autoattack as package
    before = package.AutoAttack._set_version
    def set_version(self, version):
        before(self, version)
        self.square.n_queries = 60
    monkeypatch.setattr(package.AutoAttack, '_set_version', set_version)
    ev = evaluate(planted['detached logits'][0](standard), [digits('test', 32)], 'natural,square', eps=.3, progress=False)
    assert ev['square'] < ev['natural'] - .1

# --- logits

def test_check_logits():
    z = torch.randn(4, 3)
    assert check_logits(z, 4) is z and check_logits(z.double(), 4).dtype == torch.float64
    for dtype in (torch.float16, torch.bfloat16): assert check_logits(z.to(dtype), 4).dtype == torch.float32
    check_logits(torch.zeros(4, 2), 4)

@pytest.mark.parametrize('logits, error, match', [
    ((torch.zeros(4, 3), torch.zeros(4)), ValueError, 'a tuple, expected a tensor'), ([torch.zeros(4, 3)], ValueError, 'a list'),
    (dict(logits=torch.zeros(4, 3)), ValueError, 'a dict'), (None, ValueError, 'a NoneType'),
    (torch.zeros(4), ValueError, r'shape \(4,\) for 4 images'), (torch.zeros(4, 3, 1), ValueError, r'\(4, 3, 1\)'),
    (torch.zeros(5, 3), ValueError, r'\(5, 3\) for 4 images'),
    (torch.zeros(4, 1), ValueError, 'one output'), (torch.zeros(4, 0), ValueError, 'at least two'),
    (torch.tensor([[0., float('nan')]]*4), FloatingPointError, 'not finite under pgd20'),
    (torch.tensor([[0., float('inf')]]*4), FloatingPointError, 'pgd20')])
def test_bad_logits(logits, error, match):
    with pytest.raises(error, match=match): check_logits(logits, 4, 'pgd20')

@pytest.mark.parametrize('after, match', [
    (lambda z: (z, z), 'tuple'), (lambda z: dict(z=z), 'dict'), (lambda z: z[:,:,None], r'\(8, 10, 1\)'),
    (lambda z: z[:,:1], 'one output'), (lambda z: z[:-1], r'\(7, 10\) for 8'),
    (lambda z: z/0, 'not finite under natural'), (lambda z: z.softmax(1), 'probabilities')])
def test_bad_logits_in_an_evaluation(after, match):
    with pytest.raises((ValueError, FloatingPointError), match=match):
        evaluate(Wrap(net(), after=after), [digits('test', 8)], 'natural,pgd2', progress=False)

def test_logits_that_are_bad_under_attack_only():
    x,y = digits('test', 8)
    class Fails(Wrap):
        def forward(self, z): return self.model(z) if (z == x).all() else self.model(z)/0
    model = Fails(net())
    with pytest.raises(FloatingPointError, match='under noise'): evaluate(model, [(x, y)], 'natural,noise', progress=False)

def test_check_not_probabilities():
    z = 3*torch.randn(50, 10)
    for p in (z.softmax(1), (1e3*z).softmax(1), torch.eye(10)):
        with pytest.raises(ValueError, match='probabilities'): check_not_probabilities(p)
    one_other = torch.cat([z.softmax(1), torch.rand(1, 10)])
    for fine in (z, z.log_softmax(1), z.sigmoid(), z.softmax(1) - .5, one_other, 2*z.softmax(1)): check_not_probabilities(fine)

def test_log_probabilities_are_logits(standard):
    ev = evaluate(Wrap(standard, after=lambda z: z.log_softmax(1)), [digits('test', 64)], 'natural,pgd5', eps=.06, progress=False)
    assert ev.notes == [] and ev['pgd5'] < .5 < .9 < ev['natural']

# --- balls

@pytest.mark.parametrize('change, error', [
    (lambda x: x.clone(), None), (lambda x: x + .0500009, None), (lambda x: x + .0502, 'more than its ε = 0.05'),
    (lambda x: x.index_fill(0, torch.tensor([2]), .6), '0.1'), (lambda x: x[1:], r'\(3, 3, 4, 4\) for \(4, 3, 4, 4\)'),
    (lambda x: x[:,:1], 'shape'), (lambda x: x.index_fill(0, torch.tensor([0]), float('nan')), 'pixels outside'),
    (lambda x: x - .6, 'pixels outside'), (lambda x: x + .501, 'pixels outside')])
@pytest.mark.parametrize('through', ['check_ball', 'evaluate'])
def test_check_ball(change, error, through):
    x,y = torch.full((4, 3, 4, 4), .5),torch.arange(4)
    class Attack:
        eps,norm = .05,'linf'
        def __call__(self, model, x, y): return change(x)
    def run():
        if through == 'check_ball': return check_ball(change(x), x, Attack())
        evaluate(net(), [(x, y)], dict(mine=Attack()), checks=False, progress=False)
    if error is None: return run()
    with pytest.raises(ValueError, match=error): run()

def test_check_ball_l2():
    x = torch.full((2, 3, 4, 4), .5)
    attack = random_noise(.5, norm='l2')
    step = torch.ones_like(x)/48**.5
    check_ball(x + .49*step, x, attack)
    one_too_far = torch.cat([x[:1], x[1:] + .6*step[1:]]) # each value has changed by no more than 0.09
    with pytest.raises(ValueError, match='0.6'): check_ball(one_too_far, x, attack)

def test_check_ball_without_a_size():
    x = torch.full((2, 3, 4, 4), .5)
    check_ball(x + .4, x, lambda model, x, y: x) # nothing is known of it but the range of pixels
    with pytest.raises(ValueError, match='pixels outside'): check_ball(x + .6, x, lambda model, x, y: x)
    check_ball(x - 1, x, None, clip=(-1., 1.))

def test_findings_can_be_repeated(standard):
    model = planted['gradients that point home'][0](standard)
    def run():
        with fork_rng(3): return sanity_checks(model, *digits('test', 64), .1)
    assert run() == run()
    state = get_rng_state()['torch']
    with fork_rng(): sanity_checks(model, *digits('test', 8), .1)
    assert torch.equal(get_rng_state()['torch'], state)

# --- figures that are not what they seem

class BatchNormed(nn.Module):
    "A net whose BatchNorm takes its statistics from the batch"
    def __init__(self, model, forced=False):
        super().__init__()
        self.model,self.forced = model,forced
        if forced: return
        for m in (model.bn1, model.bn2): m.track_running_stats,m.running_mean,m.running_var = False,None,None
    def forward(self, x):
        if not self.forced: return self.model(x)
        x = F.batch_norm(self.model.conv1(x), None, None, self.model.bn1.weight, self.model.bn1.bias, training=True).relu()
        x = self.model.bn2(self.model.conv2(x)).relu()
        return self.model.fc(self.model.pool(x).flatten(1))

@pytest.mark.parametrize('forced, match', [
    (False, 'for 2 BatchNorm layers \\(model.bn1, ...\\)'), (True, 'as with a BatchNorm that stays')])
def test_batch_statistics(standard, forced, match):
    model = BatchNormed(copy.deepcopy(standard), forced)
    found = [f for f in sanity_checks(model, *digits('test', 64), .06) if f.name == 'batch statistics']
    assert len(found) == 1 and re.search(match, found[0].text) and 'depends on the batch size' in found[0].text

class Vectors(nn.Module):
    def __init__(self): super().__init__(); self.fc,self.bn = nn.Linear(3072, 10),nn.BatchNorm1d(10, track_running_stats=False)
    def forward(self, x): return self.bn(self.fc(x.flatten(1)))

def test_batch_statistics_of_vectors():
    "One image alone is an error of torch"
    names = [n.split(':')[0] for n in evaluate(Vectors(), [digits('test', 40)], 'natural,pgd2', progress=False).notes]
    assert 'batch statistics' in names

@pytest.mark.parametrize('after, what', [(torch.sigmoid, r'\[0, 1\].*sigmoid'), (torch.tanh, r'\[-1, 1\].*tanh')])
def test_bounded_outputs(standard, after, what):
    found = [f for f in sanity_checks(Wrap(standard, after=lambda z: after(2*z)), *digits('test', 64), .06) if f.name == 'bounded outputs']
    assert len(found) == 1 and re.search(what, found[0].text) and 'Evaluate the logits before it' in found[0].text

def test_outputs_that_are_small_but_not_bounded(standard):
    x,y = digits('test', 64)
    for model in (net(), Wrap(standard, after=lambda z: z/z.abs().max()), Wrap(standard, after=lambda z: z.relu()),
                  Wrap(standard, after=lambda z: z.log_softmax(1)), Wrap(standard, after=lambda z: F.normalize(z, dim=1))):
        assert 'bounded outputs' not in {f.name for f in sanity_checks(model, x, y, .06)}

def natural_notes(model, n=120, **kwargs):
    notes = evaluate(model, [digits('test', n)], 'natural', progress=False, **kwargs).notes
    return [n for n in notes if n.split(':')[0] in ('at chance', 'one class')]

def test_at_chance(standard):
    permuted = Wrap(standard, after=lambda z: z.roll(1, 1)) # the order of classes
    note, = natural_notes(permuted)
    assert re.fullmatch(r'at chance: \d+ of 120 natural images are right \(95 % interval \d.\d to \d.\d %\), and guessing among 10 classes '
                        r'gets 10 %\. Is the model trained.*', note)
    assert natural_notes(standard) == [] == natural_notes(permuted, checks=False)

def test_one_class_everywhere(standard):
    note, = natural_notes(Wrap(standard, after=lambda z: z + 100*(torch.arange(10) == 3)))
    threes = int((digits('test', 120)[1] == 3).sum())
    assert note.startswith(f'one class: all 120 images are taken for class 3, which {threes} of them are. Is the model trained')

def leaking(n):
    "Digits of which `n` test images are training images"
    dls = get_dls('digits', bs=64, holdout=0, device='cpu', augment=False)
    images = dls.train.images
    images.x[dls.final.rows[:n]] = images.x[dls.train.rows[5:5+n]]
    return dls

def shared(dls): return [n for n in evaluate(net(), dls, 'natural', n=20, progress=False).notes if n.startswith('shared images')]

def test_shared_images():
    assert shared(leaking(1)) == shared(leaking(0)) == []
    assert shared(leaking(30)) == ['shared images: 30 of 360 test images are in the training set, too, byte for byte: '
                                   'what was learnt by heart counts as right. Take them out of one of both']

def test_shared_files(tmp_path):
    "Images that are too large to be kept"
    rng = np.random.default_rng(0)
    for part,n in (('train', 8), ('test', 4)):
        for c in 'ab':
            (tmp_path/part/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(tmp_path/part/c/f'{i}.png')
    def look(): return [f.text.split(' are')[0] for f in _shared_images(get_dls(tmp_path, bs=4, img_size=80, device='cpu'))]
    assert look() == []
    for i in range(3): shutil.copy(tmp_path/'train'/'a'/f'{i}.png', tmp_path/'test'/'a'/f'{i}.png')
    assert look() == ['3 of 8 test images']
    with pytest.MonkeyPatch.context() as m:
        m.setattr('fastrain.evaluation.evaluate._MOST_FILES', 2)
        assert look() == []

def test_shared_images_of_other_loaders():
    assert list(_shared_images(digit_dls())) == [] == list(_shared_images([digits('test', 8)]))
