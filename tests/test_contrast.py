"CRD against its formula, its memory banks, and what it does in training"
import copy, math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from conftest import Call, digit_dls, make_learner, net, quick, quietly, same, snapshot
from fastrain.attacks.pgd import PGD
from fastrain.training.callback import TRAINCallback
from fastrain.training.metrics import history
from fastrain.pieces.crd import CRD, _OtherClasses, _bank_dots, _train_labels, nce_loss
from fastrain.core import get_rng_state, seed_all
from fastrain.data.sources import get_dls
from fastrain.pieces.losses import AT, TRADES
from fastrain.pieces.base import Output, Training, Views
from fastrain.pieces.relations import Relation, Topology
from fastrain.training.standard import Frozen
from test_resume import build, check, run

labels = torch.randint(0, 4, (80,), generator=torch.Generator().manual_seed(0))

def fake(labels=labels, dtype=torch.float64):
    "What `setup` reads of a training"
    dl = SimpleNamespace(idxs=None, rows=torch.arange(len(labels)), images=SimpleNamespace(y=labels))
    main,std = net(1, width=1).to(dtype),net(2, width=2).to(dtype)
    return Training(main, std, dl=dl)

def ready(labels=labels, dtype=torch.float64, **kwargs):
    crd = CRD(**{'k':12, 'dim':6, **kwargs})
    crd.setup(fake(labels, dtype))
    return crd

def batch(idx, labels=labels, dtype=torch.float64):
    idx = torch.tensor(idx)
    def out(d): return Output(None, torch.randn(len(idx), d, dtype=dtype, requires_grad=True))
    return Views(torch.zeros(len(idx), 1), labels[idx], adv=out(32), std=out(64), idx=idx)

# --- the formula, with loops

class Reference:
    "CRD one image and one negative at a time"
    def __init__(self, crd):
        self.crd,self.v_s,self.v_t,self.z = crd,*([*b] for b in copy.deepcopy(crd._banks)),None # banks as lists of rows
        self.n = len(self.v_s)
    def embed(self, f, layer):
        e = [sum(layer.weight[:,j]*r[j] for j in range(len(r))) + layer.bias for r in f]
        return [r/(r*r).sum().sqrt() for r in e]
    def __call__(self, v, negatives, T=.07, eps=1e-7, m=.5):
        e_s,e_t = self.embed(v.adv.features, self.crd.module[0]),self.embed(v.std.features.detach(), self.crd.module[1])
        c,total,raw = negatives.shape[1]/self.n,0.,{}
        for name,e,bank in (('t', e_t, self.v_s), ('s', e_s, self.v_t)):
            raw[name] = [[((e[b]*bank[i]).sum()/T).exp() for i in [v.idx[b].item(), *negatives[b].tolist()]] for b in range(len(e))]
        if self.z is None: self.z = {k: sum(o.item() for row in rows for o in row)/sum(map(len, rows))*self.n for k,rows in raw.items()}
        for name,rows in raw.items():
            for row in rows:
                s = [r/self.z[name] for r in row]
                total = total - ((s[0]/(s[0] + c + eps)).log() + sum((c/(k + c + eps)).log() for k in s[1:]))/len(rows)
        for bank,e in ((self.v_s, e_s), (self.v_t, e_t)):
            for b,i in enumerate(v.idx.tolist()):
                new = m*bank[i] + (1 - m)*e[b].detach()
                bank[i] = new/(new*new).sum().sqrt()
        return total

@pytest.mark.parametrize('k', [1, 12]) # rows copied from the bank, and products with all of it
def test_equals_the_formula(k):
    crd = ready(k=k)
    assert (k == 1) == (len(labels) > 32*(1 + k))
    reference = Reference(crd)
    for idx in ([3, 7, 50, 12, 0], [79, 3, 4, 12, 41]): # rows 3 and 12 twice, in another order
        v = batch(idx)
        state = torch.get_rng_state()
        negatives = crd._others.draw(v.y, k)
        torch.set_rng_state(state) # so that the term draws the same
        got,want = crd(v),reference(v, negatives)
        assert got.item() == pytest.approx(want.item(), rel=1e-9)
        wrt = [v.adv.features, *crd.module.parameters()]
        for a,b in zip(torch.autograd.grad(got, wrt), torch.autograd.grad(want, wrt)):
            assert a.any()
            torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-10)
        for a,b in zip(crd._banks, (reference.v_s, reference.v_t)): torch.testing.assert_close(a, torch.stack(b))

def test_nce_gradient():
    log_s = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: nce_loss(s, .3), log_s)

def test_nce_is_finite_at_the_ends_of_the_scores():
    z = math.log(5e4)
    for a in (-1, 1):
        for b in (-1, 1):
            log_s = (torch.tensor([[a] + [b]*100])/.07 - z).requires_grad_()
            loss = nce_loss(log_s, 16384/5e4)
            assert loss.isfinite() and torch.autograd.grad(loss, log_s)[0].isfinite().all()
            assert loss.item() == pytest.approx(nce_loss(log_s.double(), 16384/5e4).item(), rel=1e-4)

def test_both_ways_to_the_scores():
    e = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    bank = torch.randn(40, 6, dtype=torch.float64)
    places = torch.randint(40, (5, 9))
    a,b = _bank_dots(e, bank, places),_bank_dots(e, bank, places, dense=0)
    torch.testing.assert_close(a, b)
    assert a[2,3].item() == pytest.approx((e[2]*bank[places[2,3]]).sum().item())
    w = torch.randn_like(a)
    torch.testing.assert_close(*(torch.autograd.grad((o*w).sum(), e)[0] for o in (a, b)))

# --- negatives

@pytest.mark.parametrize('labels', [labels, torch.tensor([0, 1]), torch.tensor([3, 3, 1, 3, 1, 0])]) # class 2 of the last is empty
def test_negatives(labels):
    others,y = _OtherClasses(labels),labels.unique()
    drawn = others.draw(y, 20000)
    for c,row in zip(y, drawn):
        want = (labels != c).nonzero()[:,0]
        assert row.unique().tolist() == want.tolist() # all of the others, and none of its own
        share = row.bincount(minlength=len(labels))[want]/20000
        assert (share*len(want) - 1).abs().max() < 6*math.sqrt(len(want)/20000) # equally often
    assert others.least == min((labels != c).sum() for c in y)

def test_one_class():
    with pytest.raises(ValueError, match='of one class'): _OtherClasses(torch.zeros(5, dtype=torch.long))

def test_k_is_capped():
    y = torch.tensor([0]*7 + [1]*3)
    crd,seen = ready(y, k=16384),[]
    draw = crd._others.draw
    crd._others.draw = lambda y,k: (seen.append(k), draw(y, k))[1]
    crd(batch([0, 8, 9], y))
    assert seen == [3] and crd.k == 16384 # the three images of class 1

def test_c_is_that_of_the_negatives_drawn():
    y = torch.tensor([0]*7 + [1]*3)
    a,b = ready(y, k=16384),ready(y, k=3)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    v = batch([0, 8, 9], y)
    values = []
    for crd in (a, b):
        seed_all(3)
        values.append(crd(v).item())
    assert values[0] == values[1]

# --- setup and state

def test_setup():
    before = get_rng_state()
    crd = ready(dim=12)
    assert same(before, get_rng_state()) # it draws, but leaves the generators as they were
    assert [(m.in_features, m.out_features) for m in crd.module] == [(32, 12), (64, 12)]
    for bank in crd._banks:
        assert bank.shape == (80, 12) and bank.dtype == torch.float64 and not bank.requires_grad
        assert .95*.5 < bank.abs().max() <= .5 and bank.mean().abs() < .05 # ±1/√(12/3)
    assert not same(*crd._banks) and crd.module[0].weight.dtype == torch.float64
    assert crd.settings() == dict(k=12, dim=12, T=.07, momentum=.5, weight=.8)

def test_setup_again_continues():
    crd = ready()
    crd(batch([1, 2, 3]))
    before,module = copy.deepcopy(crd.state_dict()),crd.module
    crd.setup(fake())
    assert same(before, crd.state_dict()) and crd.module is module

def test_other_training_set():
    crd = ready()
    with pytest.raises(ValueError, match=r'\(80, 6\).*\(40, 6\)'): crd.setup(fake(labels[:40]))
    with pytest.raises(ValueError, match=r'\(40, 6\).*\(80, 6\)'): crd.load_state_dict(ready(labels[:40]).state_dict())

def test_first_batch_sets_z():
    crd = ready()
    assert crd.state_dict()['log_z'] is None
    crd(batch([1, 2, 3]))
    z = [t.clone() for t in crd._log_z]
    crd(batch([4, 5, 6]))
    assert same(z, crd._log_z) and not any(t.requires_grad for t in z) and not torch.equal(*z)

@pytest.mark.parametrize('seen', [0, 2])
def test_state_round_trip(seen):
    a = ready()
    for i in range(seen): a(batch([i, i + 1, i + 2]))
    state = copy.deepcopy(a.state_dict())
    b = ready()
    b(batch([7, 8, 9])) # a past of its own
    b.load_state_dict(state)
    assert same(copy.deepcopy(b.state_dict()), state)
    v,values = batch([5, 6, 7]),[]
    for crd in (a, b):
        seed_all(0)
        values.append(crd(v).item())
    assert values[0] == values[1] and same(a.state_dict(), b.state_dict())

def test_standard_model_is_constant():
    crd,v = ready(),batch([1, 2, 3])
    g = torch.autograd.grad(crd(v), (v.std.features, v.adv.features), allow_unused=True)
    assert g[0] is None and g[1].any()

def test_autocast_changes_nothing():
    crd,v = ready(dtype=torch.float32),batch([1, 2, 3], dtype=torch.float32)
    state,values = copy.deepcopy(crd.state_dict()),[]
    for enabled in (False, True):
        crd.load_state_dict(copy.deepcopy(state))
        seed_all(0)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled): values.append(crd(v))
    assert values[0].item() == values[1].item() and values[1].dtype == crd._banks[0].dtype == torch.float32

def test_zero_features_are_finite():
    crd,v = ready(dtype=torch.float32),batch([1, 2, 3], dtype=torch.float32)
    for m in crd.module: torch.nn.init.zeros_(m.bias)
    f = torch.zeros(3, 32, requires_grad=True)
    loss = crd(v.seen(adv=Output(None, f)))
    assert loss.isfinite() and torch.autograd.grad(loss, f)[0].isfinite().all() and all(b.isfinite().all() for b in crd._banks)

@pytest.mark.parametrize('bad, match', [(dict(k=0), 'k=0'), (dict(k=2.5), 'k=2.5'), (dict(dim=0), 'dim=0'), (dict(T=0), 'T=0'),
                                        (dict(momentum=1), 'momentum=1'),
                                        (dict(momentum=-.1), 'momentum=-0.1'), (dict(weight=-1), 'weight=-1')])
def test_bad_settings(bad, match):
    with pytest.raises(ValueError, match=match): CRD(**bad)

def test_registered():
    crd = Relation.named('crd')
    assert (crd.k, crd.dim, crd.T, crd.momentum, crd.weight, crd.term, crd.joint) == (16384, 128, .07, .5, .8, 'crd', False)
    assert crd.needs == ('std', 'adv', 'features') and crd.module is None and Relation.named('crd', weight=None).weight is None

# --- in training

def fit(relation, robust=AT, std=None, n_epoch=1, lr=3e-3, cbs=(), attack=None, n=64, lam=5., **kwargs):
    seed_all(0)
    dls = get_dls('digits', bs=16, n_train=n, n_test=24, device='cpu', **kwargs)
    cb = TRAINCallback(net(2) if std is None else std, robust=robust(), relation=relation, attack=attack or quick(), lam=lam)
    learn = make_learner(dls, net(1, width=6), [cb, *cbs])
    seed_all(0)
    return quietly(learn, n_epoch, lr)

def small(**kwargs): return CRD(**{'k':24, 'dim':16, **kwargs})

@pytest.mark.parametrize('robust, policy', [(AT, 'cotrained'), (TRADES, 'frozen'), pytest.param(AT, 'frozen', marks=pytest.mark.slow),
                                            pytest.param(TRADES, 'cotrained', marks=pytest.mark.slow)])
def test_trains(robust, policy):
    "With the term in the loss, less of it is left than where the embeddings alone learn"
    def std(): return Frozen(net(2)) if policy == 'frozen' else net(2)
    on,off = small(weight=5.),small(weight=0)
    a,b = (history(fit(crd, robust, std(), n_epoch=4)) for crd in (on, off))
    assert [*a.columns] == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'robust_loss', 'crd', 'std_accuracy']
    assert a.crd.iloc[-1] < .95*b.crd.iloc[-1]

def test_embeddings_learn():
    crd,first = small(),[]
    fit(crd, cbs=[Call('before_train', lambda learn: first or first.append(snapshot(crd.module)))])
    assert all(not torch.equal(first[0][k], v) for k,v in crd.module.state_dict().items())
    still = small()
    fit(still, lr=0)
    assert same(first[0], snapshot(still.module)) # and it is the learner's rate by which they do

def test_who_gets_gradient():
    crd,std,seen = small(),net(2),[]
    def look(learn):
        if not learn.training: return
        term = learn.train_cb.terms['crd']
        for m,gets in ((learn.model, True), (std, False), (crd.module, True)):
            g = torch.autograd.grad(term, [*m.parameters()], retain_graph=True, allow_unused=True)
            assert any(o is not None and o.any() for o in g) == gets
            if not gets: assert all(o is None for o in g)
        seen.append(1)
    fit(crd, TRADES, std, cbs=[Call('after_loss', look, 7)])
    assert len(seen) == 4

def test_standard_model_is_what_it_is_without():
    "Bit for bit; without augmentation, as CRD draws from the same generator"
    a,b,c = (snapshot(fit(r, n_epoch=2, augment=False).train_cb.standard_learner.model) for r in (small(), False, Topology(detach=False)))
    assert same(a, b) and not same(a, c)

def test_each_row_once_per_epoch_and_never_by_the_attack():
    crd,calls,attacks = small(),[],[]
    class Watch(PGD):
        def __call__(self, *args, **kwargs):
            before = copy.deepcopy(crd.state_dict())
            out = super().__call__(*args, **kwargs)
            attacks.append(same(before, crd.state_dict()))
            return out
    def look(learn):
        if learn.training: calls.append((copy.deepcopy(crd._banks), learn.dl.idxs.clone()))
    start = []
    learn = fit(crd, attack=Watch(.1, .05, 5), cbs=[Call('before_train', lambda l: start.append(copy.deepcopy(crd._banks))),
                                                    Call('after_loss', look, 7)])
    assert attacks == [True]*4 and len(calls) == 4
    before = start[0]
    for banks,idx in calls:
        for a,b in zip(before, banks): assert (a != b).any(1).nonzero()[:,0].tolist() == sorted(idx.tolist()) # the rows of the batch alone
        before = banks
    assert sorted(i for _,idx in calls for i in idx.tolist()) == list(range(64))
    assert all(torch.allclose(b.norm(dim=1), torch.ones(64)) for b in crd._banks)
    with learn.no_bar(), learn.no_logging():
        kept = copy.deepcopy(crd.state_dict())
        learn.validate(); learn.get_preds()
        assert same(kept, crd.state_dict())

def test_labels_and_places():
    dls = get_dls('digits', bs=16, n_train=40, device='cpu', augment=False)
    y = _train_labels(dls.train)
    for _,yb in dls.train: assert torch.equal(y[dls.train.idxs], yb.as_subclass(torch.Tensor))

def test_fit_twice_continues():
    crd,seen = small(),[]
    learn = fit(crd, cbs=[Call('before_train', lambda l: seen.append(copy.deepcopy(crd.state_dict())), 90)])
    end,opt = copy.deepcopy(crd.state_dict()),learn.train_cb._side
    quietly(learn, 1, 3e-3)
    assert same(seen[1], end) and learn.train_cb._side is opt and same(seen[1]['log_z'], crd._log_z) and not same(end['banks'], crd._banks)

def test_lr_find_leaves_no_trace():
    crd = small()
    learn = fit(crd)
    before = copy.deepcopy(crd.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=4, show_plot=False)
    assert same(before, crd.state_dict())

def test_lr_find_first_leaves_z_unset():
    crd = small()
    cb = TRAINCallback(net(2), relation=crd, attack=quick())
    learn = make_learner(get_dls('digits', bs=16, n_train=64, n_test=24, device='cpu'), net(1), cb)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=4, show_plot=False)
    assert crd._log_z is None

def test_loader_without_places():
    learn = make_learner(digit_dls(), net(1), TRAINCallback(net(2), relation=CRD(), attack=quick()))
    with pytest.raises(ValueError, match='which images a batch holds'): quietly(learn)

def test_loader_without_images():
    with pytest.raises(ValueError, match='pixel_dls'): _train_labels(SimpleNamespace(idxs=None, rows=None))

def test_images_that_are_opened_as_needed(tmp_path):
    for part,n in (('train', 6), ('test', 3)):
        for c in 'ab':
            (tmp_path/part/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(np.random.randint(0, 256, (80, 80, 3), dtype=np.uint8)).save(tmp_path/part/c/f'{i}.png')
    dls = get_dls(tmp_path, bs=4, img_size=72, holdout=0, device='cpu')
    assert not dls.train.in_memory
    labels = _train_labels(dls.train)
    for _,y in dls.train: assert torch.equal(labels[dls.train.idxs], y.as_subclass(torch.Tensor))

def with_crd(): return TRAINCallback(net(2, drop=.2), relation=[small(), Topology()], attack=quick())

@pytest.mark.parametrize('stops', [(1,), pytest.param((0,), marks=pytest.mark.slow), pytest.param((1, 2), marks=pytest.mark.slow)])
def test_resumed(tmp_path, stops):
    whole,parts = check(tmp_path, with_crd, stops=stops)
    a,b = (l.train_cb.relations[0].state_dict() for l in (whole, parts))
    assert same(a, b)
    assert same(*(l.train_cb._side.opt.state_dict()['state'] for l in (whole, parts)))
    x,y = (torch.load(tmp_path/p/'ckpt'/'last.pt', weights_only=True)['callbacks']['train_cb'] for p in 'ab')
    assert same(x, y) and same(x['pieces']['relations.crd']['banks'], [*a['banks']]) and len(x['pieces']['relations.crd']['log_z']) == 2
