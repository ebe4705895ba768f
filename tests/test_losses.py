"The robust losses against loops written from the formulas, values and gradients, in float64"
import math

import pytest
import torch
from torch.nn import functional as F

from conftest import digit_dls, digits, make_learner, net, quick, quietly, same, snapshot
from fastrain.attacks.pgd import PGD, Plan
from fastrain.training.callback import TRAINCallback
from fastrain.core import fork_rng, seed_all
from fastrain.pieces.losses import ALP, AT, MART, MCA, TRADES, GAIRAT, Natural, RobustLoss, soft_targets, supcon_loss
from fastrain.pieces.base import CrossEntropy, Output, Views
from fastrain.core import unit_vectors

def views(n=7, c=5, d=6, scale=3., dtype=torch.float64, seed=0, **kwargs):
    "A batch whose logits and features are leaves, and these leaves"
    g = torch.Generator().manual_seed(seed)
    leaves = [(scale*torch.randn(n, k, generator=g, dtype=torch.float64)).to(dtype).requires_grad_() for k in (c, d, c, d)]
    y = torch.randint(c, (n,), generator=g)
    return Views(None, y, nat=Output(*leaves[:2]), adv=Output(*leaves[2:]), **kwargs),leaves

def probs(z):
    "Softmax of one row, as a list of scalars"
    e = [torch.exp(v) for v in z]
    return [v/sum(e) for v in e]

def mean(values): return sum(values)/len(values)
def ce(p, c): return -torch.log(p[c])
def kl(p, q): return sum(a*(torch.log(a) - torch.log(b)) for a,b in zip(p, q))

def batch(v): return v.y.tolist(),[probs(z) for z in v.nat.logits],[probs(z) for z in v.adv.logits]

def ref_at(v):
    y,_,q = batch(v)
    return dict(ce=mean([ce(b, c) for b,c in zip(q, y)]))

def ref_smooth(v, s=.7):
    y,_,q = batch(v)
    return dict(ce=mean([sum((s if k == c else (1 - s)/(len(b) - 1))*ce(b, k) for k in range(len(b))) for b,c in zip(q, y)]))

def ref_trades(v, beta=6.):
    y,p,q = batch(v)
    beta = v.notes.get('beta', [beta]*len(y))
    return dict(ce=mean([ce(a, c) for a,c in zip(p, y)]), kl=mean([w*kl(a, b) for w,a,b in zip(beta, p, q)]))

def ref_standard(v):
    y,p,_ = batch(v)
    return dict(ce=mean([ce(a, c) for a,c in zip(p, y)]))

def ref_alp(v, w=1.):
    y,p,q = batch(v)
    square = [(a - b)**2 for s,t in zip(v.nat.logits, v.adv.logits) for a,b in zip(s, t)]
    return dict(ce=mean([.5*ce(a, c) + .5*ce(b, c) for a,b,c in zip(p, q, y)]), pair=w*mean(square))

def ref_mart(v, beta=6.):
    bce,term = [],[]
    for c,p,q in zip(*batch(v)):
        rival = max((k for k in range(len(q)) if k != c), key=lambda k: q[k].item())
        bce.append(-torch.log(q[c]) - torch.log(1.0001 - q[rival] + 1e-12))
        term.append(sum(a*(torch.log(a) - torch.log(b + 1e-12)) for a,b in zip(p, q))*(1.0000001 - p[c]))
    return dict(bce=mean(bce), kl=beta*mean(term))

def ref_gairat(v, lam=-1., shape='tanh'):
    y,_,q = batch(v)
    k,n = v.notes['kappa'].tolist(),v.notes['steps'].tolist()
    arg = [lam + 5*(1 - 2*a/b) for a,b in zip(k, n)]
    omega = dict(tanh=[(1 + math.tanh(a))/2 for a in arg], sigmoid=[1/(1 + math.exp(-a)) for a in arg],
                 linear=[(b + 1 - a)/(b + 1) for a,b in zip(k, n)])[shape]
    return dict(ce=mean([len(y)*w/sum(omega)*ce(b, c) for w,b,c in zip(omega, q, y)]))

def ref_supcon(rows, y, t, past=()):
    rows = [r/torch.sqrt(sum(a*a for a in r)) for r in rows]
    others,labels = rows + [r for r,_ in past],y + [c for _,c in past]
    sim = lambda a, b: sum(s*u for s,u in zip(a, b))/t
    total = []
    for i,a in enumerate(rows):
        bottom = sum(torch.exp(sim(a, o)) for j,o in enumerate(others) if j != i)
        total.append(-mean([torch.log(torch.exp(sim(a, o))/bottom) for j,o in enumerate(others) if j != i and labels[j] == y[i]]))
    return mean(total)

def ref_mca(v, w=1., t=.1): return dict(ref_at(v), contrast=w*ref_supcon([*v.nat.features, *v.adv.features], v.y.tolist()*2, t))

def counts(n=7, steps=10): return dict(kappa=torch.arange(n)*3 % (steps + 1), steps=torch.full((n,), steps))
betas = dict(beta=torch.tensor([5., 9., 0., 6.5, 7., 5., 8.], dtype=torch.float64))

# loss, reference, notes, and the leaves with a gradient: natural logits and features, adversarial logits and features
cases = dict(at=(AT(), ref_at, {}, '..l.'), smooth=(AT(confidence=.7), ref_smooth, {}, '..l.'),
             trades=(TRADES(), ref_trades, {}, 'l.l.'), trades_1=(TRADES(1.), lambda v: ref_trades(v, 1.), {}, 'l.l.'),
             trades_each=(TRADES(), ref_trades, betas, 'l.l.'), standard=(Natural(), ref_standard, {}, 'l...'),
             alp=(ALP(), ref_alp, {}, 'l.l.'), alp_half=(ALP(.5), lambda v: ref_alp(v, .5), {}, 'l.l.'),
             mart=(MART(), ref_mart, {}, 'l.l.'), mart_5=(MART(5.), lambda v: ref_mart(v, 5.), {}, 'l.l.'),
             gairat_before=(GAIRAT(), ref_at, {}, '..l.'), gairat=(GAIRAT(), ref_gairat, counts(), '..l.'),
             gairat_0=(GAIRAT(lam=0), lambda v: ref_gairat(v, 0.), counts(steps=7), '..l.'),
             gairat_sigmoid=(GAIRAT(shape='sigmoid'), lambda v: ref_gairat(v, -1., 'sigmoid'), counts(), '..l.'),
             gairat_linear=(GAIRAT(shape='linear'), lambda v: ref_gairat(v, -1., 'linear'), counts(), '..l.'),
             mca=(MCA(), ref_mca, {}, '.flf'),
             mca_warm=(MCA(.3, .7), lambda v: ref_mca(v, .3, .7), {}, '.flf'), mca_0=(MCA(0.), lambda v: ref_mca(v, 0.), {}, '..l.'))

def grads(total, leaves):
    "Gradients, zeros where there is none"
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True, retain_graph=True)

@pytest.mark.parametrize('n, c', [(7, 5), (7, 2), (1, 3)])
@pytest.mark.parametrize('name', cases)
def test_equals_the_formula(name, n, c):
    loss,ref,notes,reached = cases[name]
    v,leaves = views(n, c, notes={k: t[:n] for k,t in notes.items()})
    got,want = loss(v),ref(v)
    assert got.keys() == want.keys()
    for k in want:
        assert got[k].item() == pytest.approx(want[k].item(), rel=1e-10, abs=1e-12), k
        for a,b in zip(grads(got[k], leaves), grads(want[k] + 0*sum(t.sum() for t in leaves), leaves)):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    if n > 1: assert [g.abs().sum().item() > 0 for g in grads(sum(got.values()), leaves)] == [r != '.' for r in reached]

def test_references_differ():
    "Or a loss could be mistaken for another"
    v,_ = views(notes=counts())
    # each of these three is one of the others
    values = [sum(cases[k][1](v).values()).item() for k in cases if k not in ('gairat_before', 'mca_0', 'trades_each')]
    assert min(abs(a - b) for i,a in enumerate(values) for b in values[:i]) > 1e-3

@pytest.mark.parametrize('name', ['smooth', 'trades_each', 'mart', 'mca', 'gairat'])
def test_gradcheck(name):
    loss,_,notes,_ = cases[name]
    v,leaves = views(4, 3, scale=1., notes={k: t[:4] for k,t in notes.items()})
    assert torch.autograd.gradcheck(lambda *t: sum(loss(v.seen(nat=Output(*t[:2]), adv=Output(*t[2:]))).values()), leaves)

@pytest.mark.parametrize('name', cases)
def test_float32(name):
    loss,_,notes,_ = cases[name]
    v,leaves = views(dtype=torch.float32, notes={k: t.float() if k == 'beta' else t for k,t in notes.items()})
    wide,_ = views(notes=notes)
    got = loss(v)
    for k,t in loss(wide).items():
        assert got[k].dtype == torch.float32 and got[k].item() == pytest.approx(t.item(), rel=1e-4, abs=1e-5)

@pytest.mark.parametrize('scale', [0., 1e-4, 100., 1e4])
@pytest.mark.parametrize('name', cases)
def test_finite(name, scale):
    "No logits and no features of any size break a loss or its gradient"
    loss,_,notes,_ = cases[name]
    v,leaves = views(scale=scale, dtype=torch.float32, notes={k: t.float() if k == 'beta' else t for k,t in notes.items()})
    got = loss(v)
    assert all(t.isfinite() for t in got.values()) and all(g.isfinite().all() for g in grads(sum(got.values()), leaves))

@pytest.mark.parametrize('name', cases)
def test_autocast_changes_nothing(name):
    loss,_,notes,_ = cases[name]
    v,leaves = views(dtype=torch.float32, notes={k: t.float() if k == 'beta' else t for k,t in notes.items()})
    plain = loss(v)
    with torch.autocast('cpu', torch.bfloat16):
        assert (leaves[0]@leaves[2].T).dtype == torch.bfloat16 # or this would test nothing
        cast = loss(v)
    for k,t in plain.items(): assert torch.equal(cast[k], t)

def test_empty_notes_and_order_of_images():
    for name,(loss,_,notes,_) in cases.items():
        v,_ = views(notes=notes)
        order = torch.randperm(7)
        pick = lambda o: Output(o.logits[order], o.features[order])
        w = v.seen(y=v.y[order], nat=pick(v.nat), adv=pick(v.adv), notes={k: t[order] for k,t in notes.items()})
        for a,b in zip(loss(v).values(), loss(w).values()): assert a.item() == pytest.approx(b.item(), rel=1e-10), name

@pytest.mark.parametrize('key, needs, objective, start, replaceable',
                         [('at', 'adv', 'ce', 'uniform', ()), ('trades', 'nat adv', 'kl', 'gaussian', ('ce',)),
                          ('alp', 'nat adv', 'ce', 'gaussian', ('ce',)),
    ('mart', 'nat adv', 'ce', 'gaussian', ()), ('gairat', 'adv', 'ce', 'uniform', ()),
    ('mca', 'nat adv features', 'ce', 'uniform', ()), ('standard', 'nat', 'ce', 'uniform', ())])
def test_as_published(key, needs, objective, start, replaceable):
    loss = RobustLoss.named(key)
    assert (loss.needs, loss.objective, loss.start, loss.replaceable) == (tuple(needs.split()), objective, start, replaceable)
    assert loss.paper and bool(loss.approximate) == (key == 'mca')
    assert set(replaceable) <= set(loss(views()[0]))

@pytest.mark.parametrize('make, match', [(lambda: AT(0), 'confidence=0'), (lambda: AT(1.1), 'confidence=1.1'),
                                         (lambda: AT(math.nan), 'confidence=nan'), (lambda: TRADES(-1), 'beta=-1'),
    (lambda: TRADES(math.nan), 'beta=nan'), (lambda: TRADES(math.inf), 'beta=inf'), (lambda: ALP(-.5), 'weight=-0.5'),
    (lambda: MART(-1), 'beta=-1'), (lambda: GAIRAT(begin=-1), 'begin=-1'),
    (lambda: GAIRAT(lam=-math.inf), 'lam=-inf'), (lambda: GAIRAT(lam=math.nan), 'lam=nan'),
    (lambda: GAIRAT(shape='cosine'), 'cosine'), (lambda: MCA(-1), 'weight=-1'),
    (lambda: MCA(temperature=0), 'temperature=0'), (lambda: MCA(temperature=math.nan), 'temperature=nan'),
    (lambda: MCA(queue=-1), 'queue=-1'), (lambda: MCA(queue=1.5), 'queue=1.5')])
def test_bad_parameters(make, match):
    with pytest.raises(ValueError, match=match): make()

def test_settings():
    assert GAIRAT().settings() == dict(begin=59, of=120, lam=-1., shape='tanh')
    assert MCA(queue=4).settings() == dict(weight=1., temperature=.1, queue=4)
    assert repr(ALP()) == 'ALP(weight=1.0)' and repr(MART()) == 'MART(beta=6.0)'

# --- labels

@pytest.mark.parametrize('confidence', [.6, .7, 1.])
def test_soft_targets(confidence):
    t = soft_targets(torch.tensor([2, 0]), 4, confidence, torch.float64)
    torch.testing.assert_close(t.sum(1), torch.ones(2, dtype=torch.float64))
    assert t[0].tolist() == pytest.approx([(1 - confidence)/3]*2 + [confidence, (1 - confidence)/3], abs=0)

# --- TRADES

def test_beta_of_each_image():
    v,_ = views()
    each = [TRADES(b)(Views(None, v.y[[i]], nat=Output(v.nat.logits[[i]], None), adv=Output(v.adv.logits[[i]], None)))['kl'].item()
            for i,b in enumerate(betas['beta'].tolist())]
    assert TRADES()(v.seen(notes=betas))['kl'].item() == pytest.approx(mean(each))
    assert TRADES(7.)(v)['kl'].item() == pytest.approx(TRADES()(v.seen(notes=dict(beta=torch.full((7,), 7.))))['kl'].item())

# --- MART

def test_constants_of_mart():
    "Where they are all there is: certain and wrong, certain and right"
    z = torch.tensor([[200., 0., 0.], [0., 200., 0.]], dtype=torch.float64)
    y = torch.tensor([1, 1])
    got = MART()(Views(None, y, nat=Output(z, None), adv=Output(z, None)))
    assert got['bce'].item() == pytest.approx((200 - math.log(.0001 + 1e-12) - math.log(1.0001 + 1e-12))/2, rel=1e-9)
    got = MART(1.)(Views(None, y[:1], nat=Output(z[1:], None), adv=Output(z[:1], None))) # natural right, adversarial wrong
    assert got['kl'].item() == pytest.approx(-math.log(1e-12)*1e-7, rel=1e-6)

def test_weight_of_mart_has_a_gradient():
    "Held constant, it would give another one"
    v,leaves = views(5, 4)
    got,held = grads(MART()(v)['kl'], leaves[:1])[0],[]
    for z,q,c in zip(v.nat.logits, v.adv.logits, v.y):
        p,w = probs(z),1.0000001 - probs(z.detach())[c]
        held.append(w*sum(a*(torch.log(a) - torch.log(b + 1e-12)) for a,b in zip(p, probs(q))))
    assert (got - grads(6*mean(held), leaves[:1])[0]).abs().max() > 1e-2

# --- GAIRAT

def kappa_by_hand(model, x, y, attack, start):
    "PGD as a plain loop, which looks at each iterate before its step"
    kappa = torch.zeros_like(y)
    z = start
    for _ in range(attack.steps):
        z = z.detach().requires_grad_()
        logits = model(z)
        kappa += logits.argmax(1) == y
        g, = torch.autograd.grad(F.cross_entropy(logits, y, reduction='sum'), z)
        z = (z.detach() + attack.alpha*g.sign()).clamp(x - attack.eps, x + attack.eps).clamp(0, 1)
    return kappa,z

def trained():
    "A net that is right about most digits"
    learn = make_learner(digit_dls(160, 16), net(1))
    return quietly(learn, 8, 5e-3).model.double().eval()

def test_kappa():
    model,(x,y) = trained(),digits('train', 32)
    x,attack = x.double(),PGD(.2, .008, 6, start='natural')
    v = Views(x, y, epoch=59, epochs=120)
    plan = GAIRAT().plan(model, v, attack)
    x_adv = attack(model, x, y, plan=plan)
    kappa,want = kappa_by_hand(model, x, y, attack, x)
    # of 7 possible values several, or nothing is tested
    assert torch.equal(plan.notes['kappa'], kappa) and len(kappa.unique()) > 3 and kappa.max() == 6
    assert plan.notes['steps'].tolist() == [6]*32
    torch.testing.assert_close(x_adv, want, rtol=0, atol=1e-12)
    assert torch.equal(x_adv, attack(model, x, y)) # nobody stops early

@pytest.mark.parametrize('epochs, of, begin, first', [(120, 120, 59, 59), (4, 120, 59, 2), (12, 120, 60, 6), (4, None, 2, 2),
                                                      (4, None, 0, 0), (1, 120, 59, None), (4, None, 4, None)])
def test_begin(epochs, of, begin, first):
    loss,(x,y) = GAIRAT(begin, of),digits('train', 4)
    plans = [loss.plan(None, Views(x, y, epoch=e, epochs=epochs), PGD()) for e in range(epochs)]
    assert [p is not None for p in plans] == [first is not None and e >= first for e in range(epochs)]

def test_no_steps_no_weights():
    x,y = digits('train', 4)
    assert GAIRAT(begin=0).plan(None, Views(x, y), PGD(steps=0)) is None

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('shape', ['tanh', 'sigmoid', 'linear'])
@pytest.mark.parametrize('lam', [-1e4, -30., -1., 0., 30., math.inf])
@pytest.mark.parametrize('kappa', [[10]*4, [0]*4, [0, 10, 10, 10], [10], [3, 5, 7, 10]])
def test_weights(kappa, lam, shape, dtype):
    "Mean 1, never NaN, and falling with κ"
    kappa = torch.tensor(kappa, dtype=dtype)
    w = GAIRAT(lam=lam, shape=shape).weights(kappa, torch.full_like(kappa, 10))
    assert w.isfinite().all() and (w >= 0).all() and w.mean().item() == pytest.approx(1, rel=1e-5)
    order = kappa.argsort()
    assert (w[order].diff() <= 1e-5).all()
    if len(kappa.unique()) == 1: torch.testing.assert_close(w, torch.ones_like(w))

def test_infinite_lam_is_at():
    v,leaves = views(notes=counts())
    a,b = GAIRAT(lam=math.inf)(v)['ce'],AT()(v)['ce']
    assert a.item() == pytest.approx(b.item(), rel=1e-12)

def fit(cb, n_epoch=2, n=32, **kwargs):
    dls = digit_dls(n)
    learn = make_learner(dls, net(1), cb, **kwargs)
    seed_all(0)
    return quietly(learn, n_epoch, 3e-3)

def test_gairat_trains_as_at_until_it_begins():
    models = [snapshot(fit(TRAINCallback(None, robust=r, attack=quick())).model)
              for r in (AT(), GAIRAT(begin=2, of=None), GAIRAT(begin=1, of=None))]
    assert same(models[0], models[1]) and not same(models[0], models[2])

@pytest.mark.parametrize('make', [ALP, MART, lambda: GAIRAT(begin=1, of=None), lambda: MCA(queue=24)])
def test_trains(make):
    learn = fit(TRAINCallback(net(2), robust=make(), attack=quick()), 3)
    values = [v[learn.recorder.metric_names.index('robust_loss') - 1] for v in learn.recorder.values]
    assert values[-1] < values[0] and not same(snapshot(learn.model), snapshot(net(1)))

# --- MCA

@pytest.mark.parametrize('n_past', [1, 9])
def test_supcon_with_past(n_past):
    seed_all(3)
    f = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    y = [0, 0, 1, 2, 1, 2]
    past = unit_vectors(torch.randn(n_past, 4, dtype=torch.float64))
    labels = [i % 4 for i in range(n_past)]
    got = supcon_loss(unit_vectors(f), torch.tensor(y), .3, (past, torch.tensor(labels)))
    want = ref_supcon(list(f), y, .3, list(zip(past, labels)))
    assert got.item() == pytest.approx(want.item(), rel=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(t, f)[0] for t in (got, want)))
    assert abs(got.item() - ref_supcon(list(f), y, .3).item()) > 1e-2

def test_unit():
    f = torch.randn(3, 4, dtype=torch.float64)
    f[1] = 0
    f.requires_grad_()
    u = unit_vectors(f)
    assert u.norm(dim=1).tolist() == pytest.approx([1, 0, 1])
    g, = torch.autograd.grad(u.sum(), f)
    assert g.isfinite().all() and not g[1].any() and g[0].any()
    assert unit_vectors(torch.tensor([[math.nan, 1.]])).isnan().any()

def parts(loss, seeds, n=3, **kwargs):
    "The contrastive terms of consecutive batches"
    return [loss(views(n, 4, seed=s, **kwargs)[0])['contrast'].item() for s in seeds]

@pytest.mark.parametrize('queue', [1, 4, 6, 10, 12, 100]) # one batch makes 6 features
def test_queue(queue):
    "Each batch is compared with the newest `queue` features of those before it"
    loss,past = MCA(queue=queue),[]
    for s in range(5):
        v,_ = views(3, 4, seed=s)
        rows,labels = [*v.nat.features, *v.adv.features],v.y.tolist()*2
        want = ref_supcon(rows, labels, .1, past)
        assert loss(v)['contrast'].item() == pytest.approx(want.item(), rel=1e-10)
        past = ([(r.detach()/r.detach().norm(), c) for r,c in zip(rows, labels)] + past)[:queue]
    features,labels = loss.state_dict()['past']
    torch.testing.assert_close(features, torch.stack([r for r,_ in past]))
    assert labels.tolist() == [c for _,c in past] and not features.requires_grad

def test_same_batch_again():
    "The ascent of AWP looks at a batch before its step does: it is in the queue once, as it was last seen"
    once,twice = MCA(queue=8),MCA(queue=8)
    for s in range(3):
        v,other = views(3, 4, seed=s)[0],views(3, 4, seed=s + 10)[0]
        first = twice(v.seen(nat=other.nat, adv=other.adv))['contrast']
        assert first.item() != twice(v)['contrast'].item() == once(v)['contrast'].item()
    assert same(once.state_dict(), twice.state_dict())

def test_no_queue_remembers_nothing():
    loss = MCA()
    assert parts(loss, (0, 1)) == parts(MCA(), (0,)) + parts(MCA(), (1,))
    assert loss.state_dict() == dict(past=None)

@pytest.mark.parametrize('after', [0, 1, 3])
def test_state_of_the_queue(after, tmp_path):
    a,b = MCA(queue=10),MCA(queue=10)
    parts(a, range(after))
    torch.save(a.state_dict(), tmp_path/'state.pt')
    parts(b, (7, 8)) # something else, to be forgotten
    b.load_state_dict(torch.load(tmp_path/'state.pt', weights_only=True))
    assert parts(a, range(5, 8)) == parts(b, range(5, 8)) and same(a.state_dict(), b.state_dict())

# --- adversaries

def test_only_gairat_plans():
    x,y = digits('train', 4)
    v = Views(x, y, epoch=119, epochs=120)
    planned = {k for k,loss in RobustLoss.registry.items() if loss.__module__ == 'fastrain.pieces.losses'
               and loss().plan(None, v, PGD()) is not None}
    assert planned == {'gairat'} and isinstance(GAIRAT().plan(None, v, PGD()), Plan)

# --- class weights and label smoothing of the learner's loss function

def _outputs(n=6, classes=4):
    g = torch.Generator().manual_seed(0)
    def out(): return Output(torch.randn(n, classes, generator=g), torch.randn(n, 5, generator=g))
    return Views(None, torch.tensor([0, 1, 2, 3, 3, 1]), adv=out(), nat=out())

def _labels_term(key, v, weight, smoothing, plain):
    "What of a loss is computed of labels, written out; and the rest from the loss with plain cross-entropy"
    def ce(z, **kwargs): return F.cross_entropy(z, v.y, weight, label_smoothing=smoothing, **kwargs)
    w = weight[v.y]
    if key in ('at', 'gairat', 'mca'): return dict(plain, ce=ce(v.adv.logits))
    if key in ('trades', 'standard'): return dict(plain, ce=ce(v.nat.logits))
    if key == 'mix': return dict(ce=ce(v.nat.logits)/2, adv=ce(v.adv.logits)/2)
    if key == 'alp': return dict(plain, ce=ce(v.nat.logits)/2 + ce(v.adv.logits)/2)
    rival = v.adv.logits.softmax(1).scatter(1, v.y[:,None], -1).amax(1)
    return dict(plain, bce=ce(v.adv.logits) - (w*(1.0001 - rival + 1e-12).log()).sum()/w.sum())

@pytest.mark.parametrize('key', ['at', 'trades', 'alp', 'mart', 'gairat', 'mca', 'mix', 'standard'])
@pytest.mark.parametrize('smoothing', [0., .2])
def test_weights_and_smoothing_in_every_loss(key, smoothing):
    v,weight = _outputs(),torch.tensor([1., 2., .5, 3.])
    loss = RobustLoss.named(key)
    assert loss.uses_ce
    want = _labels_term(key, v, weight, smoothing, loss(v))
    got = loss(v.seen(ce=CrossEntropy(weight, smoothing)))
    for n in want: torch.testing.assert_close(got[n], want[n])

def test_weights_of_gairat_and_smoothed_targets():
    v,weight = _outputs(),torch.tensor([1., 2., .5, 3.])
    w,z = weight[v.y],v.adv.logits
    notes = dict(kappa=torch.tensor([0, 3, 6, 9, 10, 2]), steps=torch.full((6,), 10))
    loss = RobustLoss.named('gairat')
    omega = loss.weights(notes['kappa'].float(), notes['steps'].float())
    got = loss(v.seen(ce=CrossEntropy(weight), notes=notes))['ce']
    torch.testing.assert_close(got, (omega*w*F.cross_entropy(z, v.y, reduction='none')).sum()/w.sum())
    smooth = AT(confidence=.7)(v.seen(ce=CrossEntropy(weight)))['ce']
    target = soft_targets(v.y, 4, .7)
    torch.testing.assert_close(smooth, -(weight*target*z.log_softmax(1)).sum()/w.sum())
    for ce in (CrossEntropy(), CrossEntropy(torch.ones(4))):
        torch.testing.assert_close(AT(confidence=.7)(v.seen(ce=ce))['ce'], F.cross_entropy(z, target))
