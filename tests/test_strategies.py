"FAT, SAT and ECAS against loops over single images, their schedules at each boundary, and what they cost"
import copy, math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from conftest import Net, digit_dls, digits, make_learner, net, quick, quietly, same, snapshot
from fastrain.attacks.pgd import PGD
from fastrain.training.callback import TRAINCallback
from fastrain.core import fork_rng
from fastrain.pieces.losses import AT, TRADES
from fastrain.pieces.base import Training, Views
from fastrain.pieces.strategies import ECAS, FAT, SAT, Strategy

attack = PGD(.2, .05, 6)

def with_loss(strategy, key):
    "The strategy, as set up for a robust loss"
    strategy.setup(Training(None, robust=SimpleNamespace(key=key)))
    return strategy

def at_epoch(epoch, epochs=120, x=None, y=None): return Views(x, y, epoch=epoch, epochs=epochs)

_trained = []
def batch(n=24):
    "Images in float64 and a net that has learnt a little, so that some stay right for long and others not"
    if not _trained:
        model,(x,y) = net(4),digits('train', 256)
        opt = torch.optim.Adam(model.parameters(), 1e-2)
        for _ in range(20):
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
        _trained.append(model.double().eval())
    x,y = digits('train', n)
    return copy.deepcopy(_trained[0]), x.double(), y

def run(strategy, model, x, y, epoch=0, epochs=120, attack=attack, seed=3, **kwargs):
    with fork_rng(seed): return attack(model, x, y, plan=strategy.plan(model, at_epoch(epoch, epochs, x, y), attack), **kwargs)

def uniform_start(x, eps, seed=3):
    with fork_rng(seed): noise = torch.empty_like(x).uniform_(-1, 1)*eps
    return (x + noise).clamp(0, 1)

def ascend(model, x, start, y, eps, alpha):
    "One step of PGD on one image"
    z = start[None].clone().requires_grad_()
    grad, = torch.autograd.grad(-model(z).log_softmax(1)[0,y], z)
    return torch.min(torch.max(start + alpha*grad[0].sign(), x - eps), x + eps).clamp(0, 1)

class Images:
    "Counts the images that a model is shown"
    def __init__(self, model): self.n,self.handle = [],model.register_forward_pre_hook(lambda m, args: self.n.append(len(args[0])))

# --- FAT

def reference_fat(model, x, y, tau, steps=attack.steps):
    "Each image on its own, and the number of forwards that it takes part in"
    out,forwards,start = [],[],uniform_start(x, attack.eps)
    for i in range(len(x)):
        z,count,n = start[i],tau,0
        for _ in range(steps):
            n += 1
            if model(z[None]).argmax(1).item() != y[i]:
                if count == 0: break
                count -= 1
            z = ascend(model, x[i], z, y[i], attack.eps, attack.alpha)
        out.append(z)
        forwards.append(n)
    return torch.stack(out), forwards

@pytest.mark.parametrize('tau', range(5))
def test_fat_equals_the_loop(tau):
    model,x,y = batch()
    want,forwards = reference_fat(model, x, y, tau)
    shown = Images(model)
    got = run(FAT(breaks=(0,)*tau, noise=0), model, x, y)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert shown.n == [sum(n > t for n in forwards) for t in range(max(forwards))] # who has stopped is not looked at again
    assert len(set(forwards)) > (2 if tau < 3 else 0) # or this would test nothing

def test_fat_counts_misclassifications():
    "A counter pays for each wrong prediction, not for the steps since the first one"
    y = torch.tensor([0, 0, 0, 0])
    wrong = torch.tensor([[1,0,1,0,1], [1,1,1,1,1], [0,0,0,1,1], [0,0,0,0,0]]).bool() # image, step
    plan = FAT(breaks=(0,)).plan(None, at_epoch(0, x=torch.rand(4, 3), y=y), attack)
    active,stopped_at = torch.arange(4),[None]*4
    for t in range(5):
        logits = torch.stack([1 - wrong[active,t].float(), wrong[active,t].float()], 1)
        go = plan.moves(t, logits, ... if len(active) == 4 else active)
        for i in active[~go].tolist(): stopped_at[i] = t
        active = active[go]
    assert stopped_at == [2, 1, 4, None]

@pytest.mark.parametrize('tau, same_as_pgd', [(5, False), (6, True), (9, True)])
def test_fat_with_large_tau_is_pgd(tau, same_as_pgd):
    model,x,y = batch()
    y = (y + 5) % 10 # nearly all wrong from the start, so that each step counts
    with fork_rng(3): want = attack(model, x, y)
    assert torch.equal(run(FAT(breaks=(0,)*tau, noise=0), model, x, y), want) == same_as_pgd

def test_fat_everybody_and_nobody_wrong():
    model,x,_ = batch(8)
    shown = Images(model)
    start = uniform_start(x, attack.eps)
    y = model(start).argmax(1)
    assert torch.equal(run(FAT(noise=0), model, x, (y + 1) % 10), start) # emitted unattacked
    assert shown.n[1:] == [8]
    gentle = PGD(1e-6, 1e-7, 4)
    with fork_rng(3): want = gentle(model, x, y := model(x).argmax(1))
    assert torch.equal(run(FAT(noise=0), model, x, y, attack=gentle), want)

def test_fat_noise():
    "On each step, and within the ball"
    model,x,_ = batch(16)
    x,y = x*.5 + .25,model(x*.5 + .25).argmax(1)
    once = PGD(.1, .02, 1, start='natural')
    plain,noisy = (run(FAT(noise=o), model, x, y, attack=once) for o in (0, .002))
    assert (noisy - plain).std().item() == pytest.approx(.002, rel=.05)
    x_adv = run(FAT(breaks=(0,)*6, noise=.05), model, x, y)
    assert (x_adv - x).abs().max() <= attack.eps + 1e-12
    assert torch.equal(run(FAT(noise=.05), model, x, (y + 1) % 10, attack=once), x) # none for images that have stopped

@pytest.mark.parametrize('key, of, breaks, noise', [
    ('at', 120, (50, 90), .001), ('trades', 85, (30, 50, 70), 0), ('mart', 90, (20, 40, 60, 80), 0), ('another', 120, (50, 90), .001)])
def test_fat_as_published(key, of, breaks, noise):
    "1-based epochs of the paper: 0 up to the first break, 1 up to the second, ..."
    fat = with_loss(FAT(), key)
    want = [sum(epoch > b for b in breaks) for epoch in range(1, of + 1)]
    assert [fat.tau(at_epoch(e, of)) for e in range(of)] == want and want[0] == 0 and want[-1] == len(breaks)
    assert [fat.tau(at_epoch(e, 2*of)) for e in range(2*of)] == [t for t in want for _ in range(2)]
    assert [fat.tau(at_epoch(e, of//5)) for e in range(of//5)] == want[::5]
    y = torch.zeros(2).long()
    assert fat.plan(None, at_epoch(0, of, y=y), attack).noise == noise
    assert with_loss(FAT(noise=.5), key).plan(None, at_epoch(0, of, y=y), attack).noise == .5

def test_fat_breaks_of_ones_own():
    fat = with_loss(FAT(breaks=(2, 4)), 'trades')
    assert [fat.tau(at_epoch(e, 10)) for e in range(6)] == [fat.tau(at_epoch(e, 100)) for e in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [FAT(breaks=[2, 4], of=6).tau(at_epoch(e, 12)) for e in range(12)] == [0]*4 + [1]*4 + [2]*4
    assert [FAT(of=200).tau(at_epoch(e, 200)) for e in (49, 50, 89, 90)] == [0, 1, 1, 2] # published breaks in another length
    assert FAT(breaks=()).tau(at_epoch(119)) == 0 and FAT(breaks=(0, 0)).tau(at_epoch(0)) == 2

def test_fat_counters_are_fresh():
    model,x,y = batch()
    fat = FAT(breaks=(0,), noise=0)
    assert torch.equal(run(fat, model, x, y), run(fat, model, x, y))

# --- SAT

def reference_sat(model, x, y, threshold, steps=attack.steps):
    out,forwards,start = [],[],uniform_start(x, attack.eps)
    for i in range(len(x)):
        z,n = start[i],0
        for _ in range(steps):
            n += 1
            p = model(z[None]).softmax(1)[0].tolist()
            if max(p[k] for k in range(10) if k != y[i]) - p[y[i]] > threshold: break
            z = ascend(model, x[i], z, y[i], attack.eps, attack.alpha)
        out.append(z)
        forwards.append(n)
    return torch.stack(out), forwards

@pytest.mark.parametrize('threshold', [-.5, 0., .1, .4])
def test_sat_equals_the_loop(threshold):
    model,x,y = batch()
    want,forwards = reference_sat(model, x, y, threshold)
    shown = Images(model)
    got = run(SAT(threshold, threshold), model, x, y)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    n = [sum(n > t for n in forwards) for t in range(max(forwards))]
    assert shown.n == n and len(set(n)) > 2

def test_sat_extremes():
    model,x,y = batch()
    with fork_rng(3): want = attack(model, x, y)
    assert torch.equal(run(SAT(1, 1), model, x, y), want) # no gap is above 1: plain PGD
    shown = Images(model)
    assert torch.equal(run(SAT(-1, -1), model, x, y), uniform_start(x, attack.eps)) and shown.n == [len(x)] # all stop at once
    flat = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 10).double())
    flat[1].weight.data.zero_(); flat[1].bias.data.zero_()
    shown = Images(flat)
    run(SAT(), flat, x, y)
    assert shown.n == [len(x)]*attack.steps # a gap of exactly the threshold does not stop

def sat_course(epochs, **kwargs):
    sat = SAT(**kwargs)
    return [sat.threshold(at_epoch(e, epochs)) for e in range(epochs)]

def test_sat_linear():
    got = sat_course(100)
    assert got[:31] == [0]*31 and got[70:] == [.4]*30 # the first growth is seen in the epoch after 31 full ones
    assert got[31:70] == pytest.approx([.4*k/40 for k in range(1, 40)], abs=1e-12)
    assert sat_course(200)[::2] == got and sat_course(20) == got[::5]
    own = sat_course(8, start=-.2, end=.6, first=2, last=6, of=None)
    assert own == pytest.approx([-.2, -.2, -.2, 0, .2, .4, .6, .6], abs=1e-12)

def test_sat_steps():
    got = sat_course(100, shape='steps')
    assert got == pytest.approx([0]*40 + [.4/3]*20 + [.8/3]*20 + [.4]*20, abs=1e-12)
    assert sat_course(10, shape='steps') == got[::10]
    assert sat_course(6, shape='steps', start=.9, end=.3, first=0, last=4, of=None) == pytest.approx([.7, .7, .5, .5, .3, .3], abs=1e-12)

def test_sat_uses_its_threshold():
    model,x,y = batch()
    early,late = (run(SAT(), model, x, y, epoch, 100) for epoch in (0, 99))
    assert torch.equal(early, run(SAT(0, 0), model, x, y)) and torch.equal(late, run(SAT(.4, .4), model, x, y))
    assert not torch.equal(early, late)

# --- ECAS

tables = dict(at=(list(range(3, 13)), 9, 1.3/math.log(10), 2.275/math.log(10)),
              trades=([5, 6, 7, 8, 9], 7, 3.35/math.log(100), 4.582/math.log(100)),
              awp=(list(range(6, 16)), 12, 3.35/math.log(100), 4.582/math.log(100)))

class Sharp(nn.Module):
    "Logits that grow with an image's first value, which so sets their entropy; counts the modes and gradients of its forwards"
    def __init__(self, n_classes=10):
        super().__init__()
        self.n_classes,self.seen,self.bn = n_classes,[],nn.BatchNorm2d(3, affine=False)
    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled()))
        self.bn(x.float())
        z = torch.zeros(len(x), self.n_classes, dtype=x.dtype)
        z[:,1] = x[:,0,0,0]*20
        return z

def sharp_images(n=60):
    "From no idea to certainty"
    x = torch.rand(n, 3, 4, 4, dtype=torch.float64)
    x[:,0,0,0] = torch.linspace(0, 1, n).double()
    return x

def entropy_share(z):
    e = [math.exp(v) for v in z.tolist()]
    p = [v/sum(e) for v in e]
    return -sum(v*math.log(v) for v in p)/math.log(len(p))

@pytest.mark.parametrize('n_classes', [10, 100])
@pytest.mark.parametrize('variant', tables)
def test_ecas_equals_the_table(variant, n_classes):
    sizes,border,low,high = tables[variant]
    model,x,y = Sharp(n_classes),sharp_images(),torch.zeros(60).long()
    shares,drawn,eps = [entropy_share(z) for z in model(x)],set(),16/255
    assert min(shares) < low and max(shares) > high and any(low < h < high for h in shares)
    for epoch in range(3*len(sizes)):
        plan = ECAS(variant).plan(model, at_epoch(epoch, 1000, x, y), PGD(eps, .01, 5))
        now = sizes[epoch % len(sizes)]
        got = (plan.eps/eps*8).tolist()
        big = {round(g, 6) for g,h in zip(got, shares) if h < low}
        assert len(big) == 1 # one value for the batch
        drawn |= big
        for g,h in zip(got, shares):
            if h > high: assert g == pytest.approx(min(sizes))
            elif h >= low: assert g == pytest.approx(now)
        assert plan.alpha.tolist() == pytest.approx([2*now*eps/8/5]*60) and plan.steps is None
        assert plan.start_eps == plan.clamp == (eps if variant == 'awp' else None)
    assert drawn == {s for s in sizes if s > border}

def test_ecas_draws_evenly():
    model,x,y = Sharp(),sharp_images(4),torch.zeros(4).long()
    x[:,0,0,0] = 1
    drawn = [round(ECAS().plan(model, at_epoch(0, x=x, y=y), attack).eps[0].item()/attack.eps*8) for _ in range(600)]
    for size in (10, 11, 12): assert drawn.count(size)/600 == pytest.approx(1/3, abs=.08)

def test_ecas_leaves_the_model_as_it_was():
    model,x,y = Sharp().train(),sharp_images(8),torch.zeros(8).long()
    before = snapshot(model)
    ECAS().plan(model, at_epoch(0, x=x, y=y), attack)
    assert model.seen == [(False, False)] # one forward, in eval mode, without gradient
    assert same(snapshot(model), before) and model.training and model.bn.training

def test_ecas_in_half_precision():
    "Sizes of float32, from the entropy of the logits as they came"
    class Half(Sharp):
        def forward(self, x): return super().forward(x).bfloat16()
    class Rounded(Sharp):
        def forward(self, x): return super().forward(x).bfloat16().float()
    v = at_epoch(4, x=sharp_images().float(), y=torch.zeros(60).long())
    with fork_rng(1): got = ECAS().plan(Half(), v, attack)
    with fork_rng(1): want = ECAS().plan(Rounded(), v, attack)
    assert got.eps.dtype == got.alpha.dtype == torch.float32 and torch.equal(got.eps, want.eps)

@pytest.mark.parametrize('key, variant, want', [('at', None, 'at'), ('trades', None, 'trades'), ('mart', None, 'at'),
                                                ('at', 'awp', 'awp'), ('trades', 'at', 'at')])
def test_ecas_variant(key, variant, want):
    model,x,y = Sharp(),sharp_images(6),torch.zeros(6).long()
    x[:,0,0,0] = 0
    plan = with_loss(ECAS(variant), key).plan(model, at_epoch(0, x=x, y=y), attack)
    assert plan.eps.tolist() == pytest.approx([attack.eps/8*min(tables[want][0])]*6) # no idea: the smallest size
    assert (plan.clamp is not None) == (want == 'awp')

@pytest.mark.parametrize('variant', tables)
def test_ecas_equals_the_loop(variant):
    "Each image in a ball of its own; with awp from a start within 8, and in the end within 8"
    model,y = nn.Sequential(nn.Flatten(), nn.Linear(48, 10)).double(),torch.arange(32) % 10
    w = model[1].weight.data.normal_()*2
    x = .5 + torch.linspace(0, .2, 32).double()[:,None]*w[1].sign() # ever more of class 1
    model[1].weight.data,model[1].bias.data,x = w,-.5*w.sum(1),x.view(-1, 3, 4, 4)
    seen,eight = [],8/255
    hard,v = PGD(eight, 2/255, 10),at_epoch(9, x=x, y=y)
    with fork_rng(3):
        plan = ECAS(variant).plan(model, v, hard)
        model.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
        got,start = hard(model, x, y, plan=plan),seen[0]
    now = {'at': 12, 'trades': 9, 'awp': 15}[variant]
    assert len(plan.eps.unique()) > 1 and plan.eps.max() > eight
    reach = torch.full_like(plan.eps, eight) if variant == 'awp' else plan.eps
    far = (start - x).abs().amax((1, 2, 3))
    assert (far <= reach + 1e-12).all() and (far > .8*reach).all()
    for i,z in enumerate(start):
        for _ in range(10): z = ascend(model, x[i], z, y[i], plan.eps[i], 2*now/255/10)
        if variant == 'awp': z = torch.min(torch.max(z, x[i] - eight), x[i] + eight)
        torch.testing.assert_close(got[i], z, rtol=0, atol=1e-12)

# --- all of them

every = [FAT, SAT, ECAS]

def test_registry():
    assert [Strategy.named(c.key).__class__ for c in every] == every
    assert [c.robust for c in every] == ['at', 'at', 'at:confidence=.7']
    assert all(c.paper for c in every) and ECAS.approximate and SAT.approximate and not FAT.approximate
    assert repr(with_loss(FAT(), 'trades')) == 'FAT(breaks=None, of=None, noise=None)' and SAT(shape='steps').settings()['first'] == 40

@pytest.mark.parametrize('make', every)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_one_image(make, dtype):
    model,(x,y) = net(4).to(dtype),digits('train', 1)
    x_adv = run(make(), model, x.to(dtype), y)
    assert x_adv.dtype == dtype and x_adv.shape == x.shape and x_adv.isfinite().all()

@pytest.mark.parametrize('make', every)
def test_random_noise_of_no_steps(make):
    model,x,y = batch(6)
    x_adv = run(make(), model, x, y, attack=PGD(.1, .02, 0))
    assert (x_adv - x).abs().max() <= .1 + 1e-12 and not torch.equal(x_adv, x)

@pytest.mark.parametrize('robust', [AT, TRADES])
@pytest.mark.parametrize('make', every)
def test_in_training(make, robust):
    "Set up by the loss, with its objective and start, and told of the epoch"
    seen = []
    class Spy(make):
        key = None
        def plan(self, model, v, attack):
            seen.append((v.epoch, v.epochs, model.training, super().plan(model, v, attack)))
            return seen[-1][-1]
    cb = TRAINCallback(None, robust=robust(), attack=quick(3), strategy=Spy())
    learn = quietly(make_learner(digit_dls(16), Net(), cb), 2)
    assert [(e, n, t) for e,n,t,_ in seen] == [(0, 2, True)]*2 + [(1, 2, True)]*2
    assert all(p.isfinite().all() for p in learn.model.parameters())
    plans = [p for *_,p in seen]
    if make is FAT: assert [p.noise for p in plans] == [.001*(robust is AT)]*4 and cb.strategy.tau(cb.views) == 1
    if make is SAT: assert cb.strategy.threshold(cb.views) == pytest.approx(.2) # half of the training
    if make is ECAS:
        assert [p.alpha[0].item() for p in plans] == pytest.approx([2*.1/8*s/3 for s in ((3, 3, 4, 4) if robust is AT else (5, 5, 6, 6))])

@pytest.mark.parametrize('make, match', [
    (lambda: FAT(breaks=50), r'breaks=50: expected full epochs'), (lambda: FAT(breaks=(5, -1)), r'breaks=\(5, -1\): expected full epochs'),
    (lambda: FAT(of=0), 'of=0: expected'), (lambda: FAT(noise=-.1), r'noise=-0\.1: expected a standard deviation'),
    (lambda: FAT(noise=float('nan')), 'noise=nan: expected'),
    (lambda: SAT(start=-1.1), r'start=-1\.1: expected a softmax gap'), (lambda: SAT(end=2), 'end=2: expected a softmax gap'),
    (lambda: SAT(end=float('nan')), 'end=nan'),
    (lambda: SAT(first=-1), 'first=-1: expected'), (lambda: SAT(first=70), 'last=70: expected more than first=70'),
    (lambda: SAT(of=-5), 'of=-5: expected'),
    (lambda: SAT(shape='step'), "Did you mean 'steps'"), (lambda: ECAS('trade'), "Did you mean 'trades'")])
def test_bad_parameters(make, match):
    with pytest.raises(ValueError, match=match): make()
