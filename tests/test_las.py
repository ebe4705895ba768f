"LAS: its tables, its draws, its plans, REINFORCE by loops, each piece of the reward, what it leaves alone, and that it learns"
import copy, math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conftest import Call, digit_dls, digits, make_learner, net, quietly, same, snapshot
from fastrain.attacks.pgd import PGD
from fastrain.training.callback import TRAINCallback
from fastrain.training.checkpoint import Checkpoint
from fastrain.core import seed_all
from fastrain.pieces.las import LAS, _after_one_step, _batch_accuracy, _variants, las_settings
from fastrain.pieces.losses import AT, TRADES
from fastrain.pieces.base import Views
from fastrain.training.schedules import torch_sgd
from fastrain.pieces.strategies import Strategy
from fastrain.pieces.weights import AWP

def slow(*params): return pytest.param(*params, marks=pytest.mark.slow)

EPS = .16 # a unit of .02
WIDTH = dict(at=30, trades=21, awp=22)

def pieces(variant, **kwargs):
    "Robust loss, strategy and perturbation of a variant, with a tiny strategy network"
    las = LAS(variant, **{'net': net(7, n_classes=WIDTH[variant], width=4), 'interval': 1, **kwargs})
    return dict(robust=TRADES() if variant == 'trades' else AT(.7 if variant == 'at' else 1.), strategy=las,
                perturb=AWP() if variant == 'awp' else None)

def learner(n=16, bs=8, double=False, main=None, lr=.05, cbs=(), **kwargs):
    main = main or net(1)
    return make_learner(digit_dls(n, bs, double), main.double() if double else main,
                        [TRAINCallback(None, attack=PGD(EPS, EPS/4, 3), **kwargs), *cbs], opt_func=torch_sgd, lr=lr)

def ready(**kwargs):
    "A callback whose pieces are set up, on the threshold of the first batch"
    learn = learner(**kwargs)
    quietly(learn, 0)
    learn.opt.set_hyper('lr', .05)
    learn.model.train()
    return learn.train_cb

def batch(n=8, double=False, pct=0.):
    x,y = digits('train', n)
    return Views(x.double() if double else x, y, pct=pct)

def crafted(cb, v, las=None):
    "Plan and adversarial images of a batch, as the callback makes them"
    plan = (las or cb.strategy).plan(cb.learn.model, v, cb.attack)
    v.x_adv,v.notes = cb.attack(cb.learn.model, v.x, v.y, objective=cb.robust.objective, start=cb.robust.start, plan=plan),plan.notes
    return plan

# --- the tables

R = lambda a, b: list(range(a, b + 1)) # noqa: E731
@pytest.mark.parametrize('variant, n, eps, steps, alpha, beta, interval, r2, r3, clip, mom', [
    ('at', 10, R(3, 15), R(3, 14), R(1, 5), None, 20, 4, 2, 10, 0), ('at', 100, R(3, 15), R(3, 12), R(1, 5), None, 20, 4, 2, 10, .9),
    ('trades', 10, R(5, 9), R(7, 14), R(2, 4), R(5, 9), 1, 8, 4, 20, .9),
    ('trades', 100, R(5, 10), R(7, 14), R(2, 4), R(5, 9), 1, 8, 2, 20, .9),
    ('awp', 10, R(7, 15), R(8, 16), R(2, 5), None, 1, 1, 1, 10, 0), ('awp', 100, R(7, 15), R(8, 15), R(2, 5), None, 10, 4, 2, 10, .9)])
def test_published(variant, n, eps, steps, alpha, beta, interval, r2, r3, clip, mom):
    dls = digit_dls(16)
    dls.c = n
    want = dict(eps=eps, steps=steps, alpha=alpha, **({'beta': beta} if beta else {}))
    las = LAS(variant, net=net(7, n_classes=sum(map(len, want.values()))))
    robust = TRADES() if variant == 'trades' else AT()
    quietly(make_learner(dls, net(1, n_classes=n), TRAINCallback(None, robust=robust, strategy=las, attack=PGD(EPS))), 0)
    group = las._opt.param_groups[0]
    assert las.choices == want and (las._interval, las._r2, las._r3, las._published['clip']) == (interval, r2, r3, clip)
    assert (group['lr'], group['momentum'], group['weight_decay']) == (1e-4, mom, 5e-4 if mom else 0) and type(las._opt) is torch.optim.SGD

@pytest.mark.parametrize('n', [99, 100, 101])
def test_from_a_hundred_classes_on(n): assert (las_settings('at', n)['choices']['steps'] == (3, 12)) == (n >= 100)

def test_variants_by_robust_loss():
    for variant,robust,width,want in ((None, AT(), 30, 'at'), (None, TRADES(), 21, 'trades'), ('awp', AT(), 22, 'awp'),
                                      ('awp', TRADES(), 22, 'awp'), ('at', TRADES(), 30, 'at')):
        assert ready(robust=robust, strategy=LAS(variant, net=net(n_classes=width))).strategy._variant == want
    assert Strategy.registry['las'] is LAS and LAS.robust == 'at:confidence=.7' and set(_variants) == {'at', 'trades', 'awp'}

def test_given_replaces_published():
    las = ready(robust=AT(), strategy=LAS(net=net(n_classes=30), lr=.3, interval=5, r2=0, r3=7)).strategy
    assert (las._interval, las._r2, las._r3, las._opt.param_groups[0]['lr']) == (5, 0, 7, .3)

def test_network_by_name():
    dls = digit_dls(16)
    before = torch.get_rng_state()
    las = LAS(net='resnet10t_16')
    quietly(make_learner(dls, net(1), TRAINCallback(None, strategy=las, attack=PGD(EPS))), 0)
    assert torch.equal(before, torch.get_rng_state())
    assert las._net(digits('train', 2)[0]).shape == (2, 30) and las._net.settings['img_size'] == 32

@pytest.mark.parametrize('kwargs, match', [(dict(variant='trade'), "Unknown variant 'trade'"), (dict(net=3), 'net=3'),
                                           (dict(lr=0), 'lr=0'), (dict(lr=float('nan')), 'lr=nan'), (dict(interval=0), 'interval=0'),
                                           (dict(interval=2.5), 'interval=2.5'), (dict(r2=-1), 'r2=-1'), (dict(r3=float('nan')), 'r3=nan')])
def test_bad_parameters(kwargs, match):
    with pytest.raises(ValueError, match=match): LAS(**kwargs)

def test_bad_networks():
    with pytest.raises(ValueError, match=r'Net has outputs of shape \(29,\).*expected 30: 13 for eps, 12 for steps, 5 for alpha'):
        ready(strategy=LAS(net=net(n_classes=29)))
    with pytest.raises(ValueError, match=r'outputs of shape \(30, 32, 32\)'): ready(strategy=LAS(net=nn.Conv2d(3, 30, 1)))
    with pytest.raises(ValueError, match='Unknown backbone'): ready(strategy=LAS(net='resnet18x'))
    with pytest.raises(ValueError, match="variant='trades' chooses the β.*AT"):
        ready(robust=AT(), strategy=LAS('trades', net=net(n_classes=21)))

# --- draws and plans

@pytest.mark.parametrize('learns', [False, True])
def test_draws_follow_softmax(learns):
    "Frequencies of each value for each of two images, against the softmax of the network's logits for its head"
    n = 6000
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 30)) # 2x2 images
    las = ready(strategy=LAS(net=net(n_classes=30), interval=1 if learns else 2)).strategy
    las._net,las._iter = model,1
    two = torch.rand(2, 3, 2, 2)
    plan = las.plan(None, Views(two.repeat_interleave(n, 0), None), PGD(EPS))
    logits = model(two)
    for i in range(2):
        for name,unit,(a,b) in (('eps', EPS/8, (0, 13)), ('steps', 1, (13, 25)), ('alpha', EPS/8, (25, 30))):
            drawn,(first,_) = getattr(plan, name)[i*n:(i + 1)*n]/unit,_variants['at']['choices'][name]
            for k,p in enumerate(logits[i,a:b].exp()/logits[i,a:b].exp().sum()):
                p,got = p.item(),(drawn - first - k).abs().lt(1e-3).float().mean().item()
                assert abs(got - p) < 5*math.sqrt(p*(1 - p)/n)
        assert (las.probs(two)['steps'][i] - logits[i,13:25].softmax(0)).abs().max() < 1e-6

@pytest.mark.parametrize('double', [False, True])
@pytest.mark.parametrize('eps', [8/255, .16])
@pytest.mark.parametrize('variant', _variants)
def test_plan(variant, eps, double):
    las = ready(double=double, **pieces(variant)).strategy
    v = batch(double=double)
    plan = las.plan(None, v, PGD(eps))
    for name,unit in (('eps', eps/8), ('alpha', eps/8), ('steps', 1)):
        got = getattr(plan, name)/unit
        assert got.shape == (8,) and torch.allclose(got, got.round(), atol=1e-4)
        assert set(got.round().int().tolist()) <= set(las.choices[name])
    assert plan.eps.dtype == plan.alpha.dtype == v.x.dtype and not plan.eps.requires_grad
    assert plan.start_eps == (None if variant == 'trades' else pytest.approx(eps))
    assert plan.clamp == (pytest.approx(eps) if variant == 'awp' else None)
    assert set(plan.notes) == ({'beta'} if variant == 'trades' else set())
    assert (variant != 'trades' or set(plan.notes['beta'].tolist()) <= {5, 6, 7, 8, 9})
    assert len(set(plan.eps.tolist())) > 1 # not one for all

def test_images_stay_in_their_balls():
    for variant in _variants:
        cb = ready(**pieces(variant))
        v = batch()
        plan = crafted(cb, v)
        size = (v.x_adv - v.x).abs().flatten(1).amax(1)
        assert (size <= (plan.eps if plan.clamp is None else plan.eps.clamp_max(EPS)) + 1e-6).all() and size.max() > 0
        if variant == 'at': assert size.max() > EPS # some go farther than 8 units

def test_modes_and_heads():
    "Train mode with a graph where the network learns, eval mode without one elsewhere; the network alone decides the draw"
    cb = ready(**pieces('at', interval=2))
    las,seen = cb.strategy,[]
    las._net.register_forward_hook(lambda m, i, o: seen.append((m.training, o.requires_grad)))
    stats = snapshot(las._net)['bn1.running_mean']
    las.plan(None, batch(), PGD(EPS))
    assert not torch.equal(stats, las._net.bn1.running_mean)
    stats = snapshot(las._net)
    las.plan(None, batch(), PGD(EPS))
    las.probs(batch().x)
    assert seen == [(True, True), (False, False), (False, False)] and same(stats, snapshot(las._net)) and las._log_prob is None

def test_autocast_leaves_the_policy_alone():
    cb = ready(**pieces('at'))
    x = batch().x
    want = cb.strategy.probs(x)
    with torch.autocast('cpu', torch.bfloat16): assert same(want, cb.strategy.probs(x))

# --- REINFORCE

def places(las, plan):
    "Index of each drawn value in its list, for each head and image"
    drawn = dict(eps=plan.eps/EPS*8, steps=plan.steps, alpha=plan.alpha/EPS*8, **plan.notes)
    return {n: [values.index(round(float(d))) for d in drawn[n]] for n,values in las.choices.items()}

def reinforce(model, las, x, chosen, reward):
    "The gradient of −R Σ_h mean_i log π_h(a_ih|x_i), image by image and head by head, clipped to norm 1"
    logits,total,start = model(x),0.,0
    for name,values in las.choices.items():
        for i in range(len(x)):
            z = [logits[i,start + k] for k in range(len(values))]
            total = total + (z[chosen[name][i]] - sum(o.exp() for o in z).log())/len(x)
        start += len(values)
    grads = torch.autograd.grad(-reward*total, list(model.parameters()))
    norm = math.sqrt(sum((g**2).sum().item() for g in grads))
    return [g/max(1, norm) for g in grads], norm

@pytest.mark.parametrize('reward', [.01, 3., 17.])
@pytest.mark.parametrize('variant', _variants)
def test_reinforce(variant, reward):
    "Two steps, so that momentum and weight decay are seen where a variant has them"
    cb = ready(double=True, **pieces(variant, lr=.1))
    las,mom = cb.strategy,_variants[variant]['sgd']
    las.reward = lambda step: torch.tensor(reward, dtype=torch.float64)
    velocity,clipped = None,[]
    for _ in range(2):
        v,before = batch(double=True),copy.deepcopy(las._net).train()
        plan = las.plan(None, v, cb.attack)
        grads,norm = reinforce(before, las, v.x, places(las, plan), reward)
        las.attacked(cb._make_step(v))
        grads = [g + mom.get('weight_decay', 0)*p.detach() for g,p in zip(grads, before.parameters())]
        velocity = grads if velocity is None else [mom.get('momentum', 0)*m + g for m,g in zip(velocity, grads)]
        # clipping adds 1e-6 to the norm
        for old,m,new in zip(before.parameters(), velocity, las._net.parameters()):
            torch.testing.assert_close(new, old - .1*m, rtol=1e-5, atol=1e-9)
        clipped.append(norm > 1)
    assert clipped == [reward > 1]*2

@pytest.mark.parametrize('interval', [1, 3, 4])
def test_interval(interval):
    "The first batch, and each that comes `interval` after one; epochs do not matter"
    at = []
    class Counted(LAS):
        def reward(self, step):
            at.append(round(step.views.pct*9))
            return torch.tensor(0.)
    las = Counted(net=net(n_classes=30, width=4), interval=interval)
    quietly(learner(24, strategy=las), 3) # 3 batches per epoch
    assert at == [i for i in range(9) if i % interval == 0] and las._iter == 9

@pytest.mark.parametrize('variant, pct, times', [('at', 0, 1), ('at', .95, 1), ('trades', .7499, 1), ('trades', .75, .1),
                                                 ('trades', .8999, .1), ('trades', .9, .01), ('awp', .4999, 1), ('awp', .5, .1),
                                                 ('awp', .75, .01), ('awp', 1, .01)])
def test_learning_rate_drops(variant, pct, times):
    cb = ready(**pieces(variant, lr=.3))
    las = cb.strategy
    las.reward = lambda step: torch.tensor(1.)
    v = batch(pct=pct)
    for _ in range(2): # does not add up
        las.plan(None, v, cb.attack)
        las.attacked(cb._make_step(v))
        assert las._opt.param_groups[0]['lr'] == pytest.approx(.3*times)

# --- the reward, by independent code

def at_loss(logits, y, conf):
    return sum(-(conf*o.log_softmax(0)[k] + (1 - conf)/9*(o.log_softmax(0).sum() - o.log_softmax(0)[k])) for o,k in zip(logits, y))/len(y)

def trades_loss(nat, adv, y, beta):
    total = 0.
    for a,b,k,w in zip(nat, adv, y, beta):
        p,q = a.softmax(0),b.softmax(0)
        total = total - p[k].log() + w*(p*(p/q).log()).sum()
    return total/len(y)

def objective(model, variant, v):
    if variant == 'trades': return trades_loss(model(v.x), model(v.x_adv), v.y, v.notes['beta'])
    return at_loss(model(v.x_adv), v.y, .7 if variant == 'at' else 1.)

def reference_step(model, variant, v, lr):
    "A copy after one step; for LAS-AWP at displaced weights, displacement taken back"
    model = copy.deepcopy(model).train()
    moved = {}
    if variant == 'awp':
        clone = copy.deepcopy(model) # its running statistics are thrown away
        params = {n: p for n,p in clone.named_parameters() if 'weight' in n and p.ndim > 1}
        for (n,p),g in zip(params.items(), torch.autograd.grad(objective(clone, variant, v), list(params.values()))):
            moved[n] = .01*p.detach().norm()*g/g.norm()
    with torch.no_grad():
        for n,p in model.named_parameters(): p += moved.get(n, 0)
    grads = torch.autograd.grad(objective(model, variant, v), list(model.parameters()))
    with torch.no_grad():
        for (n,p),g in zip(model.named_parameters(), grads): p -= lr*(g + 5e-4*p) + moved.get(n, 0)
    return model

def reference_robust(model, x, y):
    "What is right after each of two PGD-10 that move only what is still right: ε of 8 units, steps of 2"
    model = copy.deepcopy(model).eval()
    survived = [True]*len(y)
    for _ in range(2):
        start = (x + (torch.empty_like(x).uniform_(-1, 1))*EPS).clamp(0, 1)
        for i in range(len(y)):
            z = start[i:i+1]
            for _ in range(10):
                z = z.detach().requires_grad_()
                logits = model(z)
                if logits.argmax() != y[i]: break
                g, = torch.autograd.grad(F.cross_entropy(logits, y[i:i+1]), z)
                z = (z + EPS/4*g.sign()).clamp(x[i:i+1] - EPS, x[i:i+1] + EPS).clamp(0, 1)
            survived[i] &= bool(model(z).argmax() == y[i])
    return sum(survived)/len(y)

_trained = []
def trained():
    "A target that gets some of the digits right, with and without an attack"
    if not _trained: _trained.append(quietly(make_learner(digit_dls(320, 16), net(1), opt_func=torch_sgd, lr=.05), 3).model.double())
    return copy.deepcopy(_trained[0])

@pytest.mark.parametrize('variant', _variants)
def test_stepped(variant):
    cb = ready(double=True, main=trained(), **pieces(variant))
    v = batch(double=True)
    crafted(cb, v)
    for p in cb.learn.model.parameters(): p.grad = torch.ones_like(p) # as in gradient accumulation: not the copy's
    got,want = _after_one_step(cb._make_step(v)),reference_step(cb.learn.model, variant, v, .05)
    for a,b in zip(got.state_dict().values(), want.state_dict().values()): torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    assert not same(snapshot(got), snapshot(cb.learn.model)) and got.training

def test_batch_accuracy():
    model = trained()
    v = batch(64, double=True)
    seed_all(3)
    nat,adv = _batch_accuracy(model, v, PGD(EPS, .001, 1)) # step and steps of the training attack do not matter
    seed_all(3)
    want = reference_robust(model, v.x, v.y)
    assert adv.item() == pytest.approx(want) and nat.item() == pytest.approx((model.eval()(v.x).argmax(1) == v.y).float().mean().item())
    assert 0 < want < nat.item()

@pytest.mark.parametrize('restarts', [1, 2, 3])
def test_restarts(restarts):
    "From half of the starts the way up leads to an error: an image must survive all of them"
    class Valley(nn.Module):
        def forward(self, x):
            m = x.flatten(1) - .5
            return torch.cat([torch.zeros_like(m), torch.maximum(100*m, -10*m) - 1], 1)
    v = Views(torch.full((4000, 1, 1, 1), .5), torch.zeros(4000, dtype=torch.long))
    nat,adv = _batch_accuracy(Valley(), v, PGD(.05), **({} if restarts == 2 else dict(restarts=restarts)))
    assert nat == 1 and abs(adv.item() - .5**restarts) < .04

def test_only_what_is_still_right_moves():
    "Wrong in a band that the way up crosses: whoever is there, or comes there, must stay; who starts above it survives"
    class Band(nn.Module):
        def forward(self, x):
            m = x.flatten(1) - .5
            return torch.cat([torch.zeros_like(m), m + torch.where(m.abs() < .02, 1., -1.)], 1)
    v = Views(torch.full((4000, 1, 1, 1), .5), torch.zeros(4000, dtype=torch.long))
    nat,adv = _batch_accuracy(Band(), v, PGD(.05), restarts=1)
    assert nat == 0 and abs(adv.item() - .3) < .04

@pytest.mark.parametrize('r2, r3', [(0., 0.), (5., 0.), (0., 3.), (None, None)])
@pytest.mark.parametrize('variant', _variants)
def test_reward(variant, r2, r3):
    cb = ready(double=True, main=trained(), **pieces(variant, r2=r2, r3=r3))
    v,las = batch(16, double=True),cb.strategy
    crafted(cb, v)
    model = copy.deepcopy(cb.learn.model).eval()
    # plain labels, also for LAS-AT
    first = trades_loss(model(v.x), model(v.x_adv), v.y, v.notes['beta']) if variant == 'trades' else at_loss(model(v.x_adv), v.y, 1.)
    seed_all(5)
    got = las.reward(cb._make_step(v))
    copied = reference_step(cb.learn.model, variant, v, .05)
    seed_all(5)
    adv = reference_robust(copied, v.x, v.y)
    nat = (copied.eval()(v.x).argmax(1) == v.y).double().mean().item()
    cap,default = (20, (8, 4)) if variant == 'trades' else (10, (4, 2) if variant == 'at' else (1, 1))
    weights = default if r2 is None else (r2, r3)
    assert got.item() == pytest.approx(min(first.item(), cap) + weights[0]*adv + weights[1]*nat, rel=1e-5)
    assert not got.requires_grad and got.ndim == 0
    assert nat > 0 and adv > 0

@pytest.mark.parametrize('variant, cap', [('at', 10), ('trades', 20), ('awp', 10)])
def test_loss_in_the_reward_is_clipped(variant, cap):
    main = net(1)
    with torch.no_grad(): main.fc.weight.mul_(3000)
    cb = ready(main=main, **pieces(variant, r2=0, r3=0))
    v = batch()
    crafted(cb, v)
    assert cb.strategy.reward(cb._make_step(v)).item() == cap

# --- the target is left alone

@pytest.mark.parametrize('variant', _variants)
def test_target_is_untouched(variant):
    cb = ready(main=net(1, drop=.2), **pieces(variant))
    model,v = cb.learn.model,batch()
    model.bn1.eval() # as in a frozen body
    for p in model.parameters(): p.grad = torch.randn_like(p)
    crafted(cb, v)
    weights = snapshot(model)
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    opt = copy.deepcopy(cb.learn.opt.state_dict())
    policy = snapshot(cb.strategy._net)
    cb.strategy.attacked(cb._make_step(v))
    assert same(weights, snapshot(model)) and same(grads, [p.grad for p in model.parameters()])
    assert modes == [m.training for m in model.modules()]
    assert same(opt, cb.learn.opt.state_dict()) and (cb.perturb is None or cb.perturb._moved == {}) and cb.strategy._log_prob is None
    assert not same(policy, snapshot(cb.strategy._net))

def test_interrupted_on_the_copy():
    "AWP remembers a displacement of the copy, which must not be taken back from the target"
    cb = ready(**pieces('awp'))
    v = batch()
    crafted(cb, v)
    weights,calls = snapshot(cb.learn.model),[]
    class Interrupted(AT):
        def __call__(self, v):
            calls.append(1)
            if len(calls) == 2: raise KeyboardInterrupt # the ascent is the first
            return super().__call__(v)
    cb.robust = Interrupted()
    with pytest.raises(KeyboardInterrupt): _after_one_step(cb._make_step(v))
    assert len(calls) == 2
    cb.perturb.restore()
    assert same(weights, snapshot(cb.learn.model))

def test_a_batch_without_update_costs_nothing():
    cb = ready(**pieces('at', interval=2))
    las = cb.strategy
    las.reward = None # would fail
    las._iter = 1
    v = batch()
    crafted(cb, v)
    policy = snapshot(las._net)
    las.attacked(cb._make_step(v))
    assert same(policy, snapshot(las._net))

# --- it learns

@pytest.mark.parametrize('name, value', [('eps', 12), ('steps', 4), ('alpha', 5)])
def test_prefers_what_is_rewarded(name, value):
    "A planted problem: the reward is how often one value is drawn, in batches of three images"
    class Bias(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(30))
        def forward(self, x): return self.w.expand(len(x), -1)
    las = LAS(net=Bias(), interval=1, lr=.3)
    cb = ready(strategy=las)
    before = las.probs(batch(1).x)[name][0]
    for _ in range(400):
        plan = las.plan(None, batch(3), cb.attack)
        drawn = getattr(plan, name)*(1 if name == 'steps' else 8/EPS)
        las.reward = lambda step: (drawn.round() == value).float().mean() # noqa: B023
        las.attacked(cb._make_step(batch(3)))
    after,i = las.probs(batch(1).x)[name][0],las.choices[name].index(value)
    assert before[i] == pytest.approx(1/len(before)) and after[i] > .8

def test_tells_images_apart():
    "Bright images are rewarded for many steps, dark ones for few"
    las = LAS(net=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 30)), interval=1, lr=.5)
    cb = ready(strategy=las)
    levels = torch.tensor([-1., 1.])
    for i in range(600):
        x = levels[i % 2].expand(3, 3, 4, 4)
        plan = las.plan(None, Views(x, None), cb.attack)
        las.reward = lambda step: ((plan.steps > 8) == (x[0,0,0,0] > 0)).float().mean() # noqa: B023
        las.attacked(cb._make_step(Views(x, None)))
    dark,bright = las.probs(levels.view(2, 1, 1, 1).expand(2, 3, 4, 4))['steps']@torch.arange(3., 15)
    assert dark < 6.5 and bright > 10.5

# --- in training

@pytest.mark.parametrize('variant', ['at', slow('trades'), slow('awp')])
def test_trains(variant):
    learn = learner(96, 16, **pieces(variant, interval=4, lr=.01))
    las = learn.train_cb.strategy
    quietly(learn, 0)
    before,target = snapshot(las._net),snapshot(learn.model)
    quietly(learn, 3)
    losses = [v[learn.recorder.metric_names.index('robust_loss') - 1] for v in learn.recorder.values]
    assert losses[-1] < losses[0] and not same(before, snapshot(las._net)) and not same(target, snapshot(learn.model)) and las._iter == 18
    assert all(p.isfinite().all() for p in las._net.parameters())

def test_lr_find_leaves_it_as_it_was():
    learn = learner(64, 8, **pieces('trades'))
    las = learn.train_cb.strategy
    quietly(learn, 0)
    before = copy.deepcopy(las.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=5, show_plot=False)
    assert same(before, las.state_dict())

def test_state_round_trip():
    a,b = (ready(**pieces('trades', net=net(seed, n_classes=21, width=4), interval=2)) for seed in (3, 4))
    for _ in range(3):
        v = batch()
        crafted(a, v)
        a.strategy.attacked(a._make_step(v))
    b.strategy.load_state_dict(copy.deepcopy(a.strategy.state_dict()))
    for _ in range(2):
        for cb in (a, b):
            seed_all(8)
            v = batch()
            crafted(cb, v)
            cb.strategy.attacked(cb._make_step(v))
        assert same(a.strategy.state_dict(), b.strategy.state_dict()) and a.strategy._iter == b.strategy._iter
    with pytest.raises(ValueError, match='does not fit Net'): ready(**pieces('at')).strategy.load_state_dict(a.strategy.state_dict())

@pytest.mark.parametrize('variant', ['awp', slow('at'), slow('trades')])
def test_resumed(tmp_path, variant):
    "Stopped after two of three epochs and continued in a learner of other weights; updates on batches 0, 4 and 8, 3 are an epoch"
    def build(seed):
        strategy_net = net(seed + 5, n_classes=WIDTH[variant], width=4)
        return learner(24, 8, main=net(seed, drop=.2), **pieces(variant, net=strategy_net, interval=4, lr=.1))
    def stop(learn):
        if learn.epoch == 1: raise KeyboardInterrupt
    def run(learn, path, resume=False, cbs=()):
        return quietly(learn, 3, .02, 'fit_one_cycle', cbs=[Checkpoint(tmp_path/path, 'accuracy', resume=resume), *cbs])
    whole = run(build(1), 'a')
    with pytest.raises(KeyboardInterrupt): run(build(1), 'b', cbs=[Call('after_epoch', stop, 99)])
    parts = run(build(2), 'b', resume=True)
    assert same(snapshot(whole.model), snapshot(parts.model))
    assert same(whole.train_cb.strategy.state_dict(), parts.train_cb.strategy.state_dict())
    assert whole.train_cb.strategy._iter == 9
