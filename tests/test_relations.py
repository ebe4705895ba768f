"The terms that TRAIN is compared with: against their formulas, at their edges, and in training"
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import Call, digit_dls, make_learner, net, quick, quietly, same, snapshot
from fastrain.training.callback import TRAINCallback
from fastrain.training.metrics import history
from fastrain.core import seed_all
from fastrain.pieces.losses import AT, TRADES, Natural
from fastrain.pieces.base import Output, Views
from fastrain.pieces.relations import (LBGAT, PKT, AbsoluteCosine, Relation, RKDAngle, RKDDistance, Topology,
                                       _euclidean_distance, _triplet_angles)
from fastrain.training.standard import Frozen
from test_topology import edge_cases, pair

def views(std, adv): return Views(None, None, std=Output(None, std), adv=Output(None, adv))
def value(r, std, adv): return r(views(std, adv))

# --- the formulas, with loops

def pairs(n): return [(i, j) for i in range(n) for j in range(n)]
def cos(a, b): return (a*b).sum()/((a*a).sum()*(b*b).sum()).sqrt()
def huber(t): return t*t/2 if abs(t) < 1 else abs(t) - .5

def absolute(std, adv):
    n = len(std)
    return sum(abs(cos(std[i], std[j]) - cos(adv[i], adv[j])) for i,j in pairs(n) if i != j)/(n*n - n)

def rkd_d(std, adv):
    n,scaled = len(std),[]
    for f in (std, adv):
        d = {(i, j): ((f[i] - f[j])**2).sum().sqrt() if i != j else f.new_zeros(()) for i,j in pairs(n)}
        positive = [v for v in d.values() if v > 0]
        scaled.append({k: v/(sum(positive)/len(positive)) for k,v in d.items()})
    return sum(huber(scaled[1][k] - scaled[0][k]) for k in pairs(n))/n**2

def rkd_a(std, adv):
    n,total = len(std),0.
    def e(f, i, j): return f[i]*0 if i == j else (f[i] - f[j])/((f[i] - f[j])**2).sum().sqrt()
    for i,j in pairs(n):
        for k in range(n): total = total + huber((e(adv, i, j)*e(adv, i, k)).sum() - (e(std, i, j)*e(std, i, k)).sum())
    return total/n**3

def pkt(std, adv, mean=False):
    n,graphs = len(std),[]
    for f in (std, adv):
        u = [r/(r*r).sum().sqrt() for r in f]
        s = [[((a*b).sum() + 1)/2 for b in u] for a in u]
        graphs.append([[v/sum(row) for v in row] for row in s])
    p,q = graphs
    total = sum(p[i][j]*((p[i][j] + 1e-7)/(q[i][j] + 1e-7)).log() for i,j in pairs(n))
    return total/n**2 if mean else total

cases = dict(absolute=(AbsoluteCosine(), absolute), rkd_d=(RKDDistance(), rkd_d), rkd_a=(RKDAngle(), rkd_a), pkt=(PKT(), pkt),
             pkt_mean=(PKT('mean'), lambda s, a: pkt(s, a, True)))
terms = pytest.mark.parametrize('name', cases)

@terms
@pytest.mark.parametrize('n, d, d2', [(3, 4, 4), (5, 6, 3), (7, 3, 9)])
@pytest.mark.parametrize('far', [1, 30]) # one image far from all others reaches the linear part of the Huber function
def test_equals_the_formula(name, n, d, d2, far):
    r,reference = cases[name]
    std,adv = pair(n, d, d2)
    adv[0] = adv[0]*far + (far > 1)*5
    adv.requires_grad_()
    want,got = reference(std, adv),value(r, std, adv)
    assert want > 0 and got.item() == pytest.approx(want.item(), rel=1e-9)
    torch.testing.assert_close(*(torch.autograd.grad(o, adv)[0] for o in (got, want)), rtol=1e-7, atol=1e-10)
    assert value(r, std.float(), adv.detach().float()).item() == pytest.approx(want.item(), rel=1e-3, abs=1e-6)

def test_linear_part_is_reached(): # or the far image above would test nothing
    std,adv = pair(5)
    adv[0] = adv[0]*30 + 5
    d,e = (o/o[o > 0].mean() for o in map(_euclidean_distance, (std, adv)))
    assert (d - e).abs().max() > 1

def test_angles_reach_the_linear_part():
    std,adv = torch.tensor([[0., 0], [1, 0], [-1, 0]]),torch.tensor([[0., 0], [1, 0], [1, .1]])
    assert (_triplet_angles(std) - _triplet_angles(adv)).abs().max() > 1.5
    assert value(RKDAngle(), std.double(), adv.double()).item() == pytest.approx(rkd_a(std.double(), adv.double()).item(), rel=1e-9)

@terms
def test_gradient(name):
    r,(std,adv) = cases[name][0],pair(4, 5, 3)
    assert torch.autograd.gradcheck(lambda a: value(r, std, a), adv.requires_grad_())

@terms
def test_standard_model_is_constant(name):
    std,adv = (t.requires_grad_() for t in pair())
    g = torch.autograd.grad(value(cases[name][0], std, adv), (std, adv), allow_unused=True)
    assert g[0] is None and g[1].any()

@terms
def test_descends(name):
    r,(std,adv) = cases[name][0],pair(12)
    adv.requires_grad_()
    opt,values = torch.optim.Adam([adv], .05),[]
    for _ in range(80):
        opt.zero_grad()
        values.append(loss := value(r, std, adv))
        loss.backward()
        opt.step()
    assert values[-1] < .1*values[0]

@terms
def test_invariances(name):
    r,(std,adv) = cases[name][0],pair(9)
    want,by_angle = value(r, std, adv).item(),isinstance(r, (AbsoluteCosine, PKT))
    def unchanged(s, a): return value(r, s, a).item() == pytest.approx(want, rel=1e-9)
    perm,lengths = torch.randperm(9),torch.rand(9, 1, dtype=std.dtype) + .5
    assert unchanged(std[perm], adv[perm]) and not unchanged(std[perm], adv)
    assert unchanged(3*std, 5*adv@torch.linalg.qr(torch.randn(6, 6, dtype=std.dtype))[0])
    assert unchanged(std*lengths, adv) == unchanged(std, adv*lengths) == by_angle
    assert unchanged(std + 2, adv) == unchanged(std, adv - 3) == (not by_angle)
    assert value(r, std, 4*std).item() == pytest.approx(0, abs=1e-12)

@terms
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('case', edge_cases(torch.float32))
def test_finite(name, case, dtype):
    r,f = cases[name][0],edge_cases(dtype)[case]
    other = torch.randn(len(f), 3, dtype=dtype)
    for std,adv in ((other, f), (f, other), (f, f)):
        adv = adv.clone().requires_grad_()
        loss = value(r, std, adv)
        grad, = torch.autograd.grad(loss, adv)
        assert loss.isfinite() and loss >= -1e-6 and grad.isfinite().all()
        assert grad.abs().max() < 100 # equal features must not give huge gradients either

@terms
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_not_finite_stays_so(name, bad):
    std,adv = pair()
    broken = adv.clone()
    broken[2,1] = bad
    assert not value(cases[name][0], std, broken).isfinite()

@terms
def test_autocast_changes_nothing(name):
    r,(std,adv) = cases[name][0],pair(16, 32, dtype=torch.float32)
    adv.requires_grad_()
    plain = value(r, std, adv)
    with torch.autocast('cpu', torch.bfloat16): loss = value(r, std, adv)
    assert loss.dtype == torch.float32 and loss.item() == plain.item()
    assert torch.equal(*(torch.autograd.grad(o, adv)[0] for o in (loss, plain)))

@terms
def test_wrong_shapes(name):
    r = cases[name][0]
    with pytest.raises(ValueError, match='at least 3'): value(r, torch.randn(2, 4), torch.randn(2, 4))
    with pytest.raises(ValueError, match='4 and 5 images'): value(r, torch.randn(4, 3), torch.randn(5, 3))
    with pytest.raises(ValueError, match=r'adv_features has shape \(4,\)'): value(r, torch.randn(4, 3), torch.randn(4))

def test_angles_stay_small():
    "Triples of numbers, not of features"
    class Largest(TorchDispatchMode):
        n = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.n = max([self.n] + [o.numel() for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)])
            return out
    n,d = 12,50
    std,adv = pair(n, d)
    with Largest() as seen: value(RKDAngle(), std, adv.requires_grad_()).backward()
    assert n**3 <= seen.n <= n*n*max(n, d)

def test_registered():
    for key,weight in dict(absolute=None, lbgat=1., pkt=7.3, train=None, **{'rkd-d':25., 'rkd-a':50.}).items():
        r = Relation.named(key)
        assert (r.key, r.weight, r.joint) == (key, weight, False)
        assert r.needs == (('std', 'adv') if key == 'lbgat' else ('std', 'adv', 'features'))
        assert Relation.named(key, weight=2).weight == 2. and Relation.named(key, weight=None).weight is None
        assert 'weight=' in repr(r) and r.paper
        for bad in (-1, float('nan'), float('inf')):
            with pytest.raises(ValueError, match='weight='): Relation.named(key, weight=bad)
    with pytest.raises(ValueError, match="'mean'"): PKT('means')

def test_published_weight_of_pkt():
    std,adv = pair(64)
    assert 30000*value(PKT('mean'), std, adv).item() == pytest.approx(7.3*value(PKT(), std, adv).item(), rel=5e-3)

# --- LBGAT

def logits(n=4, c=3): return [torch.randn(n, c, dtype=torch.float64, requires_grad=True) for _ in range(2)]
def of(z_std, z_adv): return Views(None, None, std=Output(z_std, None), adv=Output(z_adv, None))

@pytest.mark.parametrize('detach', [False, True])
def test_lbgat(detach):
    z_std,z_adv = logits()
    loss = LBGAT(detach)(of(z_std, z_adv))
    assert loss.item() == pytest.approx(sum((z_adv[i,j] - z_std[i,j]).item()**2 for i in range(4) for j in range(3))/12)
    g_std,g_adv = torch.autograd.grad(loss, (z_std, z_adv), allow_unused=True)
    want = 2*(z_adv - z_std).detach()/12
    torch.testing.assert_close(g_adv, want)
    assert g_std is None if detach else torch.equal(g_std, -g_adv)

def test_lbgat_drops():
    assert [LBGAT().drops(o) for o in (AT(), TRADES())] == [(), ('ce',)]
    assert [LBGAT(ce=True).drops(o) for o in (AT(), TRADES())] == [(), ()]
    assert [LBGAT(ce=False).drops(o) for o in (AT(), TRADES())] == [('ce',), ('ce',)]

def test_lbgat_errors():
    with pytest.raises(ValueError, match=r'\(4, 5\).*\(4, 3\)'): LBGAT()(of(torch.zeros(4, 5), torch.zeros(4, 3)))
    with pytest.raises(ValueError, match=r'\(4, 1\)'): LBGAT()(of(torch.zeros(4, 1), torch.zeros(4, 3))) # would broadcast
    with pytest.raises(ValueError, match="ce='no'"): LBGAT(ce='no')

# --- in training

def fit(relation, robust=AT, std=None, n_epoch=1, lr=3e-3, cbs=(), lam=5., n=32, **kwargs):
    cb = TRAINCallback(net(2) if std is None else std, robust=robust(), relation=relation, attack=quick(**kwargs), lam=lam)
    learn = make_learner(digit_dls(n), net(1, width=6), [cb, *cbs])
    seed_all(0)
    return quietly(learn, n_epoch, lr)

def column(learn, name): return history(learn)[name].tolist()

makers = dict(absolute=AbsoluteCosine, rkd_d=RKDDistance, rkd_a=RKDAngle, pkt=PKT, lbgat=LBGAT, l_tp=Topology)

@pytest.mark.parametrize('term', makers)
def test_trains(term):
    "With the term in the loss, little of it is left at the end"
    strong,off = (column(fit(makers[term](weight=w), std=Frozen(net(2)), n_epoch=5, n=64, lr=1e-2), term) for w in (1e5, 0))
    assert strong[-1] < .7*off[-1] and strong[-1] < .7*strong[0]

def test_columns():
    learn = fit([r() for r in makers.values()])
    assert learn.recorder.metric_names == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'robust_loss', *makers, 'lambda',
                                           'std_accuracy', 'time']
    assert 'lambda' not in fit([RKDDistance(), RKDAngle(), LBGAT()]).recorder.metric_names

@pytest.mark.parametrize('robust', [AT, TRADES])
def test_who_gets_gradient(robust):
    pieces,seen,std = [AbsoluteCosine(), RKDDistance(), RKDAngle(), PKT(), LBGAT()],[],net(2)
    def look(learn):
        if not learn.training: return
        cb = learn.train_cb
        for r in (*pieces, LBGAT(detach=True), Topology(), Topology(detach=False)):
            g_adv,g_std = (torch.autograd.grad(r(cb.views), [*m.parameters()], retain_graph=True, allow_unused=True)
                           for m in (learn.model, std))
            assert any(g is not None and g.any() for g in g_adv), r
            both = r.joint or r.term == 'lbgat' and not r.detach
            assert any(g is not None and g.any() for g in g_std) == both, r
            if not both: assert all(g is None for g in g_std), r
        seen.append(1)
    fit(pieces, robust, std, cbs=[Call('after_loss', look, 7)])
    assert len(seen) == 4

def std_after(relation, **kwargs): return snapshot(fit(relation, n_epoch=2, **kwargs).train_cb.standard_learner.model)

@pytest.mark.parametrize('robust', [AT, TRADES])
def test_lbgat_alone_trains_the_standard_model(robust):
    alone = std_after(False, robust=robust)
    # bit for bit
    assert same(alone, std_after([AbsoluteCosine(), RKDDistance(), RKDAngle(), PKT(), LBGAT(detach=True), Topology()], robust=robust))
    assert not same(alone, std_after(LBGAT(), robust=robust))

def test_lbgat_with_a_frozen_standard_model():
    std = net(2)
    learn = fit(LBGAT(), std=Frozen(std), n_epoch=2)
    assert same(snapshot(std), snapshot(net(2))) and column(learn, 'lbgat')[0] > 0
    with pytest.raises(ValueError, match='detach=True'): fit(Topology(detach=False), std=Frozen(std))

@pytest.mark.parametrize('robust, ce, kept', [(AT, None, 'ce'), (AT, True, 'ce'), (AT, False, ''), (TRADES, None, 'kl'),
                                              (TRADES, True, 'ce kl'), (TRADES, False, 'kl')])
def test_what_lbgat_leaves_of_the_loss(robust, ce, kept):
    seen = []
    def look(learn):
        if not learn.training: return
        cb,kept_ = learn.train_cb,kept.split()
        v = cb.views
        ce_ = F.cross_entropy((v.nat if robust is TRADES else v.adv).logits, v.y)
        kl = 6*F.kl_div(v.adv.logits.log_softmax(1), v.nat.logits.softmax(1), reduction='batchmean') if robust is TRADES else 0
        want = ('ce' in kept_)*ce_ + ('kl' in kept_)*kl + .5*((v.adv.logits - v.std.logits)**2).mean() + F.cross_entropy(v.std.logits, v.y)
        torch.testing.assert_close(cb.total, want.detach())
        assert [*cb.terms] == [*kept_, 'lbgat', 'std_loss']
        seen.append(1)
    learn = fit(LBGAT(ce=ce, weight=.5), robust, cbs=[Call('after_loss', look, 7)])
    assert len(seen) == 4 and (column(learn, 'robust_loss')[0] > 0) == bool(kept)

def test_weights_in_the_loss():
    seen = []
    def look(learn):
        if not learn.training: return
        cb = learn.train_cb
        v = cb.views
        want = cb.terms['ce'] + cb.terms['std_loss'] + 5*AbsoluteCosine()(v) + 25*RKDDistance()(v) + 50*RKDAngle()(v) + 7.3*PKT()(v)
        torch.testing.assert_close(cb.total, want.detach())
        seen.append(1)
    fit([AbsoluteCosine(), RKDDistance(), RKDAngle(), PKT()], cbs=[Call('after_loss', look, 7)])
    assert len(seen) == 4

def test_refused():
    with pytest.raises(ValueError, match='makes none'): TRAINCallback(net(2), robust=Natural(), relation=LBGAT())
    with pytest.raises(ValueError, match='needs a standard model'): TRAINCallback(None, relation=RKDAngle())
    with pytest.raises(ValueError, match="two relation terms 'pkt'"): TRAINCallback(net(2), relation=[PKT(), PKT('mean')])

def test_lbgat_needs_no_features():
    assert 'features' not in TRAINCallback(net(2), relation=LBGAT()).needs
    assert all('features' in TRAINCallback(net(2), relation=m()).needs for n,m in makers.items() if n != 'lbgat')

@pytest.mark.parametrize('term', makers)
def test_huge_is_refused_by_the_callback_not_hidden(term):
    "Weights of M' that overflow end the training with the term's name"
    def spoil(learn):
        if learn.training: learn.model.conv2.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match=f'{term} = nan'): fit(makers[term](), cbs=[Call('after_step', spoil, 90)])
