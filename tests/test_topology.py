"L_TP against the paper's formulas, its gradient, its edge cases, and the course of its weight"
import math

import numpy as np
import pytest
import torch

from fastrain.pieces.base import Output, Views
from fastrain.pieces.relations import Topology, cosine_distance, neighbour_probs, topology_loss
from fastrain.training.schedules import LambdaSchedule, as_lambda, multi_step, schedules

printed,ramp = schedules['printed'],schedules['ramp']

def graph(f):
    "Lines 1 to 4 of the definition, with loops"
    n = len(f)
    d,k,p = np.zeros((n, n)),np.zeros((n, n)),np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            d[i,j] = 1 - sum(a*b for a,b in zip(f[i], f[j]))/math.sqrt(sum(a*a for a in f[i]))/math.sqrt(sum(b*b for b in f[j]))
    for j in range(n):
        rho = min(d[i,j] for i in range(n) if i != j)
        for i in range(n):
            if i != j: k[i,j] = 2 - (d[i,j] - rho)
        for i in range(n):
            if i != j: p[i,j] = k[i,j]/sum(k[m,j] for m in range(n) if m != j)
    return p

def reference(std, adv):
    "Line 5, in float64"
    p,q,total = graph(std.double().numpy()),graph(adv.double().numpy()),0.
    for j in range(len(p)):
        for i in range(len(p)):
            if i != j: total += p[i,j]*math.log(p[i,j]/q[i,j]) + (1-p[i,j])*math.log((1-p[i,j])/(1-q[i,j]))
    return total

def pair(n=8, d=6, d2=None, relu=False, dtype=torch.float64):
    f = torch.randn(n, d, dtype=dtype),torch.randn(n, d2 or d, dtype=dtype)
    return tuple(t.relu() + .01 for t in f) if relu else f

@pytest.mark.parametrize('relu', [False, True])
@pytest.mark.parametrize('n, d, d2', [(3, 2, 2), (4, 5, 3), (9, 7, 7), (16, 12, 40), (33, 64, 16)])
def test_equals_the_formula(n, d, d2, relu):
    std,adv = pair(n, d, d2, relu)
    want = reference(std, adv)
    assert want > 0
    assert topology_loss(std, adv).item() == pytest.approx(want, rel=1e-10)
    assert topology_loss(std, adv, 'batchmean').item() == pytest.approx(want/n, rel=1e-10)
    assert topology_loss(std.float(), adv.float()).item() == pytest.approx(want, rel=1e-3, abs=1e-6)

def test_probabilities():
    p = neighbour_probs(pair(7)[0])
    torch.testing.assert_close(p.sum(0), torch.ones(7, dtype=p.dtype))
    assert (p.diagonal() == 0).all() and (p >= 0).all()
    assert not torch.allclose(p.sum(1), torch.ones(7, dtype=p.dtype)) # columns, not rows

def test_zero_for_equal_graphs():
    f = pair(6)[0]
    assert topology_loss(f, f).item() == 0
    # angles survive a rotation
    assert topology_loss(f, f@torch.linalg.qr(torch.randn(6, 6, dtype=f.dtype))[0]).item() == pytest.approx(0, abs=1e-12)

@pytest.mark.parametrize('reduction', ['sum', 'batchmean'])
@pytest.mark.parametrize('n, d, d2', [(3, 4, 4), (6, 5, 3)])
def test_gradient(n, d, d2, reduction):
    std,adv = pair(n, d, d2)
    adv.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: topology_loss(std, a, reduction), adv)
    std.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, a: topology_loss(s, a, reduction, detach=False), (std, adv))

def test_anchor_is_constant():
    std,adv = (t.requires_grad_() for t in pair())
    g = torch.autograd.grad(topology_loss(std, adv), (std, adv), allow_unused=True)
    assert g[0] is None and g[1].abs().sum() > 0
    g = torch.autograd.grad(topology_loss(std, adv, detach=False), std)
    assert g[0].abs().sum() > 0

def test_detached_rho():
    std,adv = pair()
    adv.requires_grad_()
    a,b = topology_loss(std, adv),topology_loss(std, adv, detach_rho=True)
    assert a.item() == b.item()
    ga,gb = (torch.autograd.grad(o, adv)[0] for o in (a, b))
    assert (ga - gb).abs().max() > 1e-3*ga.abs().max()

def edge_cases(dtype):
    r = torch.randn(5, 4, dtype=dtype)
    zero_row,twins,opposite = r.clone(),r.clone(),r.clone()
    zero_row[2] = 0
    twins[1] = twins[0]
    opposite[1:] = -opposite[0]
    return dict(zero_row=zero_row, all_zero=torch.zeros_like(r), twins=twins, all_same=r[:1].repeat(5, 1), opposite=opposite,
                one_against_all=torch.cat([r[:1], -r[:1].repeat(4, 1)]),
                tiny=r*1e-30, huge=r*1e15, orthogonal=torch.eye(5, dtype=dtype), three=r[:3])

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('name', edge_cases(torch.float32))
def test_finite(name, dtype):
    f = edge_cases(dtype)[name]
    other = torch.randn(len(f), 3, dtype=dtype)
    for std,adv in ((other, f), (f, other), (f, f)):
        std,adv = std.clone().requires_grad_(),adv.clone().requires_grad_()
        loss = topology_loss(std, adv, detach=False)
        loss.backward()
        assert loss.isfinite() and loss >= -1e-6
        assert std.grad.isfinite().all() and adv.grad.isfinite().all()

def test_zero_feature():
    f = torch.randn(4, 3)
    f[1] = 0
    d = cosine_distance(f)
    assert (d[1, [0, 2, 3]] == 1).all() and (d[[0, 2, 3], 1] == 1).all()

@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_not_finite_stays_so(bad):
    "Features that are not numbers are no zero features: the loss must show them"
    std,adv = pair()
    for f in (std, adv):
        broken = f.clone()
        broken[2,1] = bad
        assert not topology_loss(*(broken if o is f else o for o in (std, adv))).isfinite()

@pytest.mark.parametrize('n', [0, 1, 2])
def test_too_few(n):
    with pytest.raises(ValueError, match='at least 3'): topology_loss(torch.randn(n, 4), torch.randn(n, 4))

@pytest.mark.parametrize('a, b, match', [((4, 3, 2), (4, 3), r'std_features has shape \(4, 3, 2\)'),
                                         ((4, 3), (4,), r'adv_features has shape \(4,\)'), ((4, 3), (5, 3), '4 and 5 images')])
def test_wrong_shapes(a, b, match):
    with pytest.raises(ValueError, match=match): topology_loss(torch.randn(a), torch.randn(b))

def test_wrong_reduction():
    with pytest.raises(ValueError, match='batchmean'): topology_loss(*pair(), reduction='batch_mean')
    with pytest.raises(ValueError, match='batchmean'): Topology('mean')

def test_autocast_changes_nothing():
    std,adv = pair(16, 32, dtype=torch.float32)
    adv.requires_grad_()
    plain = topology_loss(std, adv)
    want = torch.autograd.grad(plain, adv)[0]
    with torch.autocast('cpu', torch.bfloat16):
        assert (std@adv.T).dtype == torch.bfloat16 # or this would test nothing
        loss = topology_loss(std, adv)
    assert loss.dtype == torch.float32 and loss.item() == plain.item()
    assert torch.equal(torch.autograd.grad(loss, adv)[0], want) # the backward runs outside of autocast, as in fastai

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_features(dtype):
    std,adv = (t.to(dtype) for t in pair(16, 32))
    adv.requires_grad_()
    loss = topology_loss(std, adv)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == topology_loss(std.float(), adv.float()).item()
    assert adv.grad.dtype == dtype and adv.grad.isfinite().all() and adv.grad.any()

def test_invariances():
    std,adv = pair(10)
    want = topology_loss(std, adv).item()
    scales = torch.rand(2, 10, 1, dtype=std.dtype)*100 + .01
    assert topology_loss(std*scales[0], adv*scales[1]).item() == pytest.approx(want, rel=1e-10) # only angles count
    perm = torch.randperm(10)
    assert topology_loss(std[perm], adv[perm]).item() == pytest.approx(want, rel=1e-10)
    assert topology_loss(std[perm], adv).item() != pytest.approx(want, rel=1e-3) # but both in the same order

def test_relation_passes_its_settings():
    std,adv = pair()
    v = Views(None, None, adv=Output(None, adv.requires_grad_()), std=Output(None, std.requires_grad_()))
    assert Topology()(v).item() == topology_loss(std, adv).item()
    assert Topology('batchmean')(v).item() == topology_loss(std, adv, 'batchmean').item()
    assert torch.autograd.grad(Topology()(v), std, allow_unused=True)[0] is None
    assert torch.autograd.grad(Topology(detach=False)(v), std)[0].any()
    assert not torch.equal(*(torch.autograd.grad(Topology(detach_rho=o)(v), adv)[0] for o in (True, False)))

# --- λ(t)

def test_schedules():
    assert printed(0) == pytest.approx(2/(1 + math.exp(-1)), abs=1e-12) and round(printed(0), 4) == 1.4621
    assert printed(100) == pytest.approx(2, abs=1e-4) and printed(100) < 2
    assert ramp(0) == 0 and ramp(100) == pytest.approx(1, abs=1e-4) and ramp(50) == pytest.approx(2/(1 + math.exp(-5)) - 1)
    for a in (printed, ramp): assert all(a(t) < a(t+1) for t in range(100))

def test_progress_or_epoch():
    by_progress,by_epoch = LambdaSchedule(20., 'printed'),LambdaSchedule(20., 'printed', by='epoch')
    assert by_progress(0., 70) == 20*printed(0) and by_progress(.5, 70) == 20*printed(50)
    assert by_epoch(.9, 0) == 20*printed(1) and by_epoch(.9, 99) == 20*printed(100) # epochs count from 1
    assert LambdaSchedule(5.)(0.) == LambdaSchedule(5.)(1.) == 5
    assert LambdaSchedule(2., lambda t: t/100)(.25) == .5

def test_as_lambda():
    assert as_lambda(3)(.7) == 3 and as_lambda(lambda pct: pct**2)(.5) == pytest.approx(.25)
    lam = LambdaSchedule(2.)
    assert as_lambda(lam) is lam

def test_drops():
    lr = [multi_step(i/400, .1, 100, (75, 90)) for i in range(401)] # 4 batches per epoch
    assert lr[:300] == [.1]*300 and lr[300:360] == [.1*.1]*60 and lr[360:] == [.1*.1**2]*41
    assert multi_step(0., warmup_lr=.02) == multi_step(.0099, warmup_lr=.02) == .02 and multi_step(.01, warmup_lr=.02) == .1
