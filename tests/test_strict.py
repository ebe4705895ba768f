"`strict`: the passes of the official codes of TRADES, TRADES-AWP and LBGAT, each written here in plain PyTorch, and LAS's reward"
import copy

import pytest
import torch
from fastai.callback.core import Callback
from torch.nn import functional as F

from conftest import digits, make_learner, net, plain_dls, quietly
from fastrain.attacks.pgd import PGD
from fastrain.core import seed_all
from fastrain.pieces.base import order_of_passes
from fastrain.pieces.las import _batch_accuracy
from fastrain.pieces.losses import AT, TRADES
from fastrain.pieces.relations import LBGAT
from fastrain.pieces.strategies import FAT
from fastrain.pieces.weights import AWP
from fastrain.training.callback import TRAINCallback
from fastrain.training.methods import parse_method
from fastrain.training.schedules import torch_sgd
from test_las import batch, crafted, pieces, ready, reference_step, trades_loss, trained, at_loss

EPS,ALPHA,STEPS,BETA = .1,.03,4,6.
SGD = dict(lr=.1, momentum=.9, weight_decay=5e-4)
BATCHES,BS = 3,8

# --- the official codes, by their passes

def kl(adv, nat): return F.kl_div(F.log_softmax(adv, 1), F.softmax(nat, 1), reduction='batchmean')

def adversaries(model, x):
    model.eval()
    x_adv = x + .001*torch.randn_like(x)
    for _ in range(STEPS):
        x_adv.requires_grad_()
        grad, = torch.autograd.grad(kl(model(x_adv), model(x)), x_adv)
        x_adv = (x_adv.detach() + ALPHA*grad.sign()).clamp(x - EPS, x + EPS).clamp(0, 1)
    model.train()
    return x_adv

def trades(model, teacher, opt, x, y):
    x_adv = adversaries(model, x)
    loss = F.cross_entropy(model(x), y)
    loss = loss + BETA*kl(model(x_adv), model(x))
    step(opt, loss)

def trades_awp(model, teacher, opt, x, y):
    x_adv = adversaries(model, x)
    proxy = copy.deepcopy(model)
    loss = F.cross_entropy(proxy(x), y) + BETA*kl(proxy(x_adv), proxy(x))
    names = [n for n,p in proxy.named_parameters() if 'weight' in n and p.ndim > 1]
    grads = torch.autograd.grad(loss, [proxy.get_parameter(n) for n in names])
    moved = {n: .005*proxy.get_parameter(n).detach().norm()*g/(g.norm() + 1e-20) for n,g in zip(names, grads)}
    displace(model, moved, 1)
    robust = kl(model(x_adv), model(x))
    step(opt, F.cross_entropy(model(x), y) + BETA*robust)
    displace(model, moved, -1)

def lbgat(model, teacher, opt, x, y):
    x_adv = adversaries(model, x)
    adv,nat,std = model(x_adv), model(x), teacher(x)
    step(opt, F.mse_loss(adv, std) + F.cross_entropy(std, y) + BETA*kl(adv, nat))

def displace(model, moved, sign):
    with torch.no_grad():
        for n,d in moved.items(): model.get_parameter(n).add_(d, alpha=sign)

def step(opt, loss):
    opt.zero_grad()
    loss.backward()
    opt.step()

def official(code):
    "Model and teacher after three steps"
    model,teacher = net(1).double().train(),net(2).double().train()
    opt = torch.optim.SGD([{'params': model.parameters()}, {'params': teacher.parameters()}], **SGD)
    x,y = images()
    for i,(xb,yb) in enumerate(zip(x.split(BS), y.split(BS))):
        seed_all(100 + i)
        code(model, teacher, opt, xb, yb)
    return model, teacher

# --- the same through the callback

class SeedBatch(Callback):
    order = TRAINCallback.order-1
    def before_batch(self): seed_all(100 + self.iter)

def images():
    x,y = digits('train', BATCHES*BS)
    return x.double(), y

def ours(strict=True, relation=False, **pieces):
    "Model and standard model after an epoch of three batches"
    standard = net(2).double() if relation else None
    cb = TRAINCallback(standard, relation=relation, attack=PGD(EPS, ALPHA, STEPS), strict=strict, **pieces)
    learn = make_learner(plain_dls(*images(), bs=BS, shuffle=False), net(1).double(), [cb, SeedBatch()], metrics=[],
                         opt_func=torch_sgd, wd=SGD['weight_decay'], wd_bn_bias=True)
    learn.recorder.run = False # it averages in float32
    quietly(learn, 1, SGD['lr'])
    return learn.model, cb.standard_learner and cb.standard_learner.model

def distance(a, b, of=lambda t: True) -> float:
    "The largest difference of weights, statistics and counts"
    return max((p - b.state_dict()[n]).abs().max().item() for n,p in a.state_dict().items() if of(p))

CASES = [
    (trades, lambda: dict(robust=TRADES(BETA))),
    (trades_awp, lambda: dict(robust=TRADES(BETA), perturb=AWP(warmup=0))),
    (lbgat, lambda: dict(robust=TRADES(BETA), relation=LBGAT()))]

@pytest.mark.parametrize('code,made', CASES, ids=lambda o: o.__name__)
def test_official_passes(code, made):
    model,teacher = official(code)
    mine,standard = ours(**made())
    assert distance(model, mine) < 1e-10
    if standard: assert distance(teacher, standard) < 1e-10
    plain,_ = ours(strict=False, **made())
    assert distance(model, plain, torch.is_floating_point) > 1e-3 # running statistics, and what the attack makes of them

# --- who says which passes

@pytest.mark.parametrize('method,strict,plain', [
    ('at', ['adv'], ['adv']), ('standard', ['nat'], ['nat']), ('mart', ['nat', 'adv'], ['nat', 'adv']),
    ('trades', ['nat', 'adv', 'again'], ['nat', 'adv']), ('trades+train', ['nat', 'adv', 'again'], ['nat', 'adv']),
    ('trades+awp', ['adv', 'again', 'nat'], ['nat', 'adv']), ('at+awp', ['adv'], ['adv']),
    ('trades+lbgat', ['adv', 'nat'], ['nat', 'adv']), ('at+lbgat', ['adv'], ['adv']), ('trades+lbgat+awp', ['adv', 'nat'], ['nat', 'adv']),
    ('trades+fat', ['nat', 'adv'], ['nat', 'adv']), ('trades+las', ['nat', 'adv'], ['nat', 'adv'])])
def test_passes(method, strict, plain):
    m = parse_method(method)
    standard = net() if m.needs_standard else None
    for flag,passes in ((True, strict), (False, plain)):
        assert list(TRAINCallback(standard, strict=flag, **m.callback_args()).passes) == passes

def test_unknown_robust_loss_keeps_its_order():
    class Mine(AT): key,needs = None,('nat', 'adv')
    assert order_of_passes(Mine(), Mine.needs, [AWP(), FAT(), Mine()]) == ('nat', 'adv')

def test_recorded_and_checked():
    assert TRAINCallback(None, strict=True).settings()['strict'] and not TRAINCallback(None).settings()['strict']
    with pytest.raises(ValueError, match="strict='no'"): TRAINCallback(None, strict='no')

# --- LAS

def probed(model, x, y, eps, starts=2):
    "Accuracies as published: PGD-10 with the copy in train mode, the larger loss of two starts, judged in eval mode"
    largest,delta = torch.zeros(len(y), dtype=x.dtype),torch.zeros_like(x)
    for _ in range(starts):
        d = (x + torch.empty_like(x).uniform_(-1, 1)*eps).clamp(0, 1) - x
        for _ in range(10):
            z = d.clone().requires_grad_()
            logits = model(x + z)
            at = (logits.argmax(1) == y).nonzero()[:,0]
            if not len(at): break
            grad, = torch.autograd.grad(F.cross_entropy(logits, y), z)
            d[at] = (d[at] + eps/4*grad[at].sign()).clamp(-eps, eps).clamp(-x[at], 1 - x[at])
        with torch.no_grad(): loss = F.cross_entropy(model(x + d), y, reduction='none')
        better = loss >= largest
        delta[better] = d[better]
        largest = torch.max(largest, loss)
    model.eval()
    with torch.no_grad(): return [(model(o).argmax(1) == y).double().mean().item() for o in (x, x + delta)]

def test_published_probe():
    v,attack = batch(64, double=True),PGD(.16)
    mine,other = trained().train(),trained().train()
    seed_all(3)
    nat,adv = _batch_accuracy(mine, v, attack, strict=True)
    seed_all(3)
    want = probed(other, v.x, v.y, attack.eps)
    assert [nat.item(), adv.item()] == pytest.approx(want) and 0 < want[1] < want[0]
    assert distance(mine, other) < 1e-10 # the running statistics have moved in the same way

@pytest.mark.parametrize('variant', ['at', 'trades', 'awp'])
def test_reward(variant):
    cb = ready(double=True, main=trained(), strict=True, **pieces(variant))
    v,las,model = batch(16, double=True),cb.strategy,cb.learn.model
    crafted(cb, v)
    before = copy.deepcopy(model)
    seed_all(5)
    got = las.reward(cb._make_step(v)).item()
    seed_all(5)
    if variant == 'trades': # in train mode: the target's own statistics move
        first = trades_loss(before(v.x), before(v.x_adv), v.y, v.notes['beta'])
        copied = twice_seen(before, variant, v)
    else:
        first = at_loss(copy.deepcopy(before).eval()(v.x_adv), v.y, 1.)
        copied = reference_step(before, variant, v, .05)
    nat,adv = probed(copied, v.x, v.y, .16)
    r2,r3 = dict(at=(4, 2), trades=(8, 4), awp=(1, 1))[variant]
    assert got == pytest.approx(min(first.item(), 20) + r2*adv + r3*nat, rel=1e-5)
    assert distance(before, model) < 1e-10

def twice_seen(model, variant, v):
    "The copy of LAS-TRADES sees x once more than the step that `reference_step` makes"
    before = copy.deepcopy(model)
    copied = reference_step(model, variant, v, .05)
    before(v.x), before(v.x_adv), before(v.x)
    for (n,b),(_,seen) in zip(copied.named_buffers(), before.named_buffers()): b.copy_(seen)
    return copied
