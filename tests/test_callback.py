"What one batch costs, that M and M' are exactly what they would be alone, and what is recorded"
import csv
import json
from functools import partial

import pytest
import torch
from fastai.callback.progress import CSVLogger
from fastai.data.core import DataLoaders
from fastai.data.transforms import Normalize
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from fastai.vision.augment import RandomErasing
from torch import nn
from torch.nn import functional as F

from conftest import Backwards, Call, Forwards, digit_dls, digits, hooks, make_learner, net, plain_dls, quick, quietly, same, snapshot
from fastrain.attacks.named import named_attack
from fastrain.attacks.pgd import FGSM, PGD
from fastrain.training import batches
from fastrain.training.batches import BatchWatch
from fastrain.training.callback import TRAINCallback
from fastrain.core import seed_all
from fastrain.data.sources import get_dls
from fastrain.training.metrics import RobustAccuracy
from fastrain.pieces.losses import AT, TRADES, Natural
from fastrain.pieces.weights import AWP
from fastrain.models.backbone import create_backbone
from fastrain.models.features import logits_and_features
from fastrain.pieces.relations import Topology, topology_loss
from fastrain.training.schedules import LambdaSchedule, schedules, torch_sgd
from fastrain.training.standard import CoTrained, Frozen

losses = dict(at=AT, trades=TRADES)
opts = dict(adam=(Adam, 3e-3), sgd=(torch_sgd, .05))

def fit(cb=None, main=None, n_epoch=2, opt='adam', method='fit_one_cycle', n=32, seed=0, cbs=(), metrics=accuracy, double=False, **kwargs):
    "A fresh learner on the same batches, trained; everything random starts from `seed`"
    opt_func,lr = opts[opt]
    dls = digit_dls(n, seed=seed, double=double)
    learn = make_learner(dls, net(1) if main is None else main, [*([cb] if cb else []), *cbs], metrics, opt_func=opt_func, **kwargs)
    if double: learn.remove_cbs([learn.progress, learn.recorder]) # fastai's recorder takes float32 alone
    seed_all(seed)
    return quietly(learn, n_epoch, lr, method)

# --- work

class Work:
    "Forwards and backwards of each training batch, by model"
    def __init__(self, **models):
        self.models,self.rows = models,[]
        self.forwards,self.backwards = {n: Forwards(m) for n,m in models.items()},Backwards()
    def _now(self):
        return {n: (self.forwards[n].n, self.backwards.input_only[w], self.backwards.full[w]) for n,
                m in self.models.items() for w in [m.conv2.weight.data_ptr()]}
    def start(self, learn):
        if learn.training: self.before = self._now()
    def stop(self, learn):
        if learn.training: self.rows.append({n: tuple(b - a for a,b in zip(self.before[n], v)) for n,v in self._now().items()})
    def run(self, learn, n_epoch=1):
        with self.backwards:
            quietly(learn, n_epoch, cbs=[Call('before_batch', self.start, -100, 'a'), Call('after_batch', self.stop, 100, 'b')])
        assert self.rows and all(r == self.rows[0] for r in self.rows)
        return self.rows[0]

# TRADES' one backward passes both of its forwards
@pytest.mark.parametrize('robust, expected', [('at', (4+1, 4, 1)), ('trades', (4+3, 4, 2))])
@pytest.mark.parametrize('policy', ['none', 'cotrained', 'frozen'])
def test_work_per_batch(robust, expected, policy):
    main,std = net(1),net(2)
    standard = dict(none=None, cotrained=std, frozen=Frozen(std))[policy]
    work = Work(main=main, std=std).run(make_learner(digit_dls(), main, TRAINCallback(standard, robust=losses[robust](), attack=quick(4))))
    assert work == dict(main=expected, std=dict(none=(0, 0, 0), cotrained=(1, 0, 1), frozen=(1, 0, 0))[policy])

def test_one_backward_per_batch(monkeypatch):
    calls,backward = [],torch.Tensor.backward
    monkeypatch.setattr(torch.Tensor, 'backward', lambda self, *args, **kwargs: (calls.append(1), backward(self, *args, **kwargs))[1])
    fit(TRAINCallback(net(2), robust=TRADES(), attack=quick()), n_epoch=1)
    assert len(calls) == 4

def test_natural_training_makes_no_attack():
    class Never(PGD):
        def __call__(self, *args, **kwargs): raise AssertionError('attacked')
    main = net(1)
    assert Work(main=main).run(make_learner(digit_dls(), main, TRAINCallback(None, robust=Natural(), attack=Never())))['main'] == (1, 0, 1)

def test_attack_sees_eval_mode_and_leaves_train_mode():
    modes = []
    class Watch(PGD):
        def __call__(self, model, *args, **kwargs):
            stats = {k: v.clone() for k,v in model.state_dict().items()}
            modes.append(model.training)
            out = super().__call__(model, *args, **kwargs)
            assert same(stats, dict(model.state_dict())) and model.training
            assert all(p.grad is None or not p.grad.any() for p in model.parameters())
            return out
    main = net(1, drop=.5)
    fit(TRAINCallback(None, attack=Watch(.1, .05, 2)), main, n_epoch=1)
    assert modes == [True]*4 and main.bn1.num_batches_tracked == 4 # one update per batch, none of the attack

# --- M is what it would be alone

def alone(std, opt='adam', n_epoch=2, method='fit_one_cycle', **kwargs):
    return fit(main=std, opt=opt, n_epoch=n_epoch, method=method, **kwargs)

@pytest.mark.parametrize('robust', losses)
@pytest.mark.parametrize('opt', opts)
@pytest.mark.parametrize('method', ['fit', 'fit_one_cycle'])
def test_standard_model_is_that_trained_alone(opt, robust, method):
    cb = TRAINCallback(net(2), robust=losses[robust](), attack=quick())
    fit(cb, net(1, width=6, drop=.3), opt=opt, method=method)
    want = alone(net(2), opt=opt, method=method)
    assert same(snapshot(cb.standard_learner.model), snapshot(want.model)) # weights and BatchNorm buffers, bit for bit
    assert same(cb.standard_learner.opt.state_dict()['state'], want.opt.state_dict()['state'])
    assert not same(snapshot(want.model), snapshot(net(2)))

def test_weight_decay_follows():
    cb = TRAINCallback(net(2), attack=quick())
    fit(cb, opt='sgd', wd=.1, wd_bn_bias=True, moms=(.8,)*3)
    want = alone(net(2), opt='sgd', wd=.1, wd_bn_bias=True, moms=(.8,)*3)
    assert same(snapshot(cb.standard_learner.model), snapshot(want.model))
    assert not same(snapshot(want.model), snapshot(alone(net(2), opt='sgd', wd=0.).model))

def test_undetached_graph_does_reach_the_standard_model(): # or the tests above would prove nothing
    cb = TRAINCallback(net(2), attack=quick(), relation=Topology(detach=False))
    fit(cb)
    assert not same(snapshot(cb.standard_learner.model), snapshot(alone(net(2)).model))

@pytest.mark.parametrize('robust', losses)
def test_no_gradient_from_adversarial_loss_to_standard_model(robust):
    std,seen = net(2),[]
    def look(learn):
        if not learn.training: return
        cb = learn.train_cb
        grads = torch.autograd.grad(cb.objective(cb.views)[0], [*std.parameters()], allow_unused=True, retain_graph=True)
        seen.append(all(g is None for g in grads))
    fit(TRAINCallback(std, robust=losses[robust](), attack=quick()), cbs=[Call('after_loss', look, 7)], n_epoch=1)
    assert seen == [True]*4

# --- M' is what it would be alone

@pytest.mark.parametrize('robust, standard', [('at', 'module'), ('trades', 'module'), ('at', 'name'),
                                              pytest.param('trades', 'name', marks=pytest.mark.slow)])
def test_lam_0_is_plain_adversarial_training(robust, standard):
    std = net(2) if standard == 'module' else 'resnet10t_16'
    cb = TRAINCallback(std, robust=losses[robust](), attack=quick(), lam=0)
    with_train = fit(cb, net(1, drop=.3))
    plain = fit(TRAINCallback(None, robust=losses[robust](), attack=quick()), net(1, drop=.3))
    assert same(snapshot(with_train.model), snapshot(plain.model))
    assert same(with_train.opt.state_dict()['state'], plain.opt.state_dict()['state'])
    l_tp = with_train.recorder.values[-1][with_train.recorder.metric_names.index('l_tp') - 1]
    assert l_tp > 0 # measured all the same
    other = fit(TRAINCallback(std if standard == 'name' else net(2), robust=losses[robust](), attack=quick(), lam=5), net(1, drop=.3))
    assert not same(snapshot(other.model), snapshot(plain.model))

def loop(robust, eps=.1, alpha=.05, steps=2, lam=0., n_epoch=2, lr=.05):
    "Adversarial training in plain PyTorch, as the papers print it; in float64, as rounding decides the sign of TRADES' first gradients"
    dls,main,std = digit_dls(double=True),net(1).double(),net(2).double()
    opt = torch.optim.SGD(main.parameters(), lr, momentum=.9, weight_decay=5e-4)
    std_opt = torch.optim.SGD(std.parameters(), lr, momentum=.9, weight_decay=5e-4)
    seed_all(0)
    for _ in range(n_epoch):
        main.train(); std.train()
        for x,y in dls.train:
            main.eval()
            if robust == 'trades':
                x_adv,target = x + .001*torch.randn_like(x),main(x).softmax(1).detach()
                loss = lambda z: F.kl_div(z.log_softmax(1), target, reduction='sum')
            else:
                x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
                loss = lambda z: F.cross_entropy(z, y, reduction='sum')
            for _ in range(steps):
                x_adv.requires_grad_()
                g, = torch.autograd.grad(loss(main(x_adv)), x_adv)
                x_adv = (x_adv.detach() + alpha*g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
            main.train()
            if robust == 'trades':
                nat = main(x)
                z,features = logits_and_features(main, x_adv)
                total = F.cross_entropy(nat, y) + 6*F.kl_div(z.log_softmax(1), nat.softmax(1), reduction='batchmean')
            else:
                z,features = logits_and_features(main, x_adv)
                total = F.cross_entropy(z, y)
            std_z,anchor = logits_and_features(std, x)
            if lam: total = total + lam*topology_loss(anchor.detach(), features)
            for loss_,o in ((total, opt), (F.cross_entropy(std_z, y), std_opt)):
                o.zero_grad()
                loss_.backward()
                o.step()
        for _ in dls.valid: pass # loaders draw a number each time they start
    return main,std

@pytest.mark.parametrize('robust', losses)
@pytest.mark.parametrize('lam', [0., 5.])
def test_equals_a_plain_loop(robust, lam):
    main,std = loop(robust, lam=lam)
    cb = TRAINCallback(net(2).double() if lam else None, robust=losses[robust](), attack=quick(), lam=lam)
    learn = fit(cb, net(1).double(), opt='sgd', method='fit', wd=5e-4, wd_bn_bias=True, double=True)
    for k,v in snapshot(main).items(): torch.testing.assert_close(learn.model.state_dict()[k], v, rtol=0, atol=1e-10)
    if lam: assert same(snapshot(cb.standard_learner.model), snapshot(std))

def test_loops_differ(): # or the tolerance above would be too wide
    states = [snapshot(loop(robust, lam=lam)[0])['fc.weight'] for robust in losses for lam in (0., 5.)]
    assert min((a - b).abs().max() for i,a in enumerate(states) for b in states[:i]) > 1e-3

# --- what is recorded

def column(learn, name): return [v[learn.recorder.metric_names.index(name) - 1] for v in learn.recorder.values]

def test_columns(tmp_path):
    learn = fit(TRAINCallback(net(2), attack=quick()), cbs=[CSVLogger('log.csv')], path=tmp_path)
    names = ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'robust_loss', 'l_tp', 'lambda', 'std_accuracy', 'time']
    assert list(learn.recorder.metric_names) == names
    rows = list(csv.DictReader(open(tmp_path/'log.csv')))
    assert list(rows[0]) == names and len(rows) == 2
    for n in names[1:-1]: assert [float(r[n]) for r in rows] == pytest.approx(column(learn, n), rel=1e-6)
    assert column(learn, 'lambda') == [5, 5] and min(column(learn, 'l_tp')) > 0
    assert list(learn.metrics.attrgot('name')) == ['accuracy'] # the columns are there only while it trains

@pytest.mark.parametrize('cb, names', [(lambda: TRAINCallback(None, attack=quick()), ['robust_loss']),
    (lambda: TRAINCallback(net(2), relation=False, attack=quick()), ['robust_loss', 'std_accuracy']),
    (lambda: TRAINCallback(None, robust=Natural()), ['robust_loss'])])
def test_fewer_columns(cb, names):
    assert list(fit(cb()).recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', *names, 'time']

def test_recorded_values_are_means_of_the_batches():
    terms = []
    def keep(learn):
        if learn.training:
            cb = learn.train_cb
            lam = cb.lam(learn.pct_train, learn.epoch)
            terms.append({**{k: v.item() for k,v in cb.terms.items()}, 'lam': lam, 'loss': float(learn.loss)})
    learn = fit(TRAINCallback(net(2), robust=TRADES(), attack=quick(), lam=LambdaSchedule(3., 'printed')),
                cbs=[Call('after_loss', keep, 6)])
    for epoch in range(2):
        rows = terms[4*epoch:4*epoch+4]
        assert column(learn, 'robust_loss')[epoch] == pytest.approx(sum(r['ce'] + r['kl'] for r in rows)/4, rel=1e-5)
        assert column(learn, 'l_tp')[epoch] == pytest.approx(sum(r['l_tp'] for r in rows)/4, rel=1e-5)
        lam = sum(3*schedules['printed'](100*(4*epoch + i)/8) for i in range(4))/4
        assert column(learn, 'lambda')[epoch] == pytest.approx(lam, rel=1e-6)
    for r in terms: assert r['loss'] == pytest.approx(r['ce'] + r['kl'] + r['lam']*r['l_tp'], rel=1e-5)

def test_lambda_by_epoch():
    learn = fit(TRAINCallback(net(2), attack=quick(), lam=LambdaSchedule(20., 'printed', by='epoch')), n_epoch=3)
    assert column(learn, 'lambda') == pytest.approx([20*schedules['printed'](e) for e in (1, 2, 3)])

def test_validation_sees_natural_images():
    seen = []
    def look(learn):
        if not learn.training: seen.append(learn.xb[0].clone())
    learn = fit(TRAINCallback(net(2), attack=quick()), cbs=[Call('after_loss', look, 90)], n_epoch=1)
    x,y = digits('test', 24)
    assert torch.equal(torch.cat(seen), x)
    with torch.no_grad(): z = learn.model.eval()(x)
    assert column(learn, 'valid_loss')[0] == pytest.approx(F.cross_entropy(z, y).item(), rel=1e-5)
    assert column(learn, 'accuracy')[0] == pytest.approx((z.argmax(1) == y).float().mean().item())

def test_standard_accuracy():
    cb = TRAINCallback(net(2), attack=quick())
    learn = fit(cb, n=64, n_epoch=3)
    x,y = digits('test', 24)
    with torch.no_grad(): want = (cb.standard_learner.model.eval()(x).argmax(1) == y).float().mean().item()
    assert column(learn, 'std_accuracy')[-1] == pytest.approx(want)

# --- ways to attach

def test_learner_or_fit():
    a,b = TRAINCallback(net(2), attack=quick()),TRAINCallback(net(2), attack=quick())
    one = fit(a, method='fit')
    two = make_learner(digit_dls(), net(1))
    seed_all(0)
    quietly(two, 2, opts['adam'][1], cbs=b)
    assert same(snapshot(one.model), snapshot(two.model)) and same(snapshot(a.standard_learner.model), snapshot(b.standard_learner.model))
    assert list(two.metrics.attrgot('name')) == ['accuracy'] and not hasattr(two, 'train_cb')
    before = snapshot(two.model)
    quietly(two) # the callback is gone: this is standard training
    assert list(two.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']
    assert not same(before, snapshot(two.model))

def test_second_fit_continues():
    cb = TRAINCallback(net(2), attack=quick())
    learn = fit(cb, n_epoch=1, method='fit')
    opt = cb.standard_learner.opt
    steps = opt.state[cb.standard_learner.model.fc.weight]['step']
    quietly(learn, 1, 3e-3)
    assert cb.standard_learner.opt is opt and opt.state[cb.standard_learner.model.fc.weight]['step'] == 2*steps == 8
    want = alone(net(2), n_epoch=1, method='fit')
    quietly(want, 1, 3e-3)
    assert same(snapshot(cb.standard_learner.model), snapshot(want.model))

# --- policies

def test_standard_by_name():
    cb = TRAINCallback('resnet10t_16', attack=quick())
    learn = make_learner(digit_dls(), net(1), cb)
    with pytest.raises(ValueError, match='made when `fit` starts'): cb.standard_learner
    quietly(learn)
    assert cb.standard_learner.model.settings['name'] == 'resnet10t_16' and cb.standard_learner.model.settings['n_classes'] == 10
    assert isinstance(cb.standard_learner, Learner)
    with cb.standard_learner.no_bar(): loss,acc = cb.standard_learner.validate()
    assert acc == pytest.approx(column(learn, 'std_accuracy')[-1])

def test_standard_learner_of_ones_own():
    own = make_learner(digit_dls(), net(2), opt_func=torch_sgd)
    cb = TRAINCallback(own, attack=quick())
    fit(cb)
    assert cb.standard_learner is own and own.opt.__class__.__name__ == 'OptimWrapper' and not same(snapshot(own.model), snapshot(net(2)))

def test_warmup():
    cb = TRAINCallback(CoTrained(net(2), warmup=2), attack=quick())
    epochs = []
    learn = fit(cb, n_epoch=1, method='fit', cbs=[Call('before_epoch', lambda learn: epochs.append(learn.epoch))])
    assert epochs == [0] and cb.standard_learner.model.bn1.num_batches_tracked == 3*4
    quietly(learn)
    assert cb.standard_learner.model.bn1.num_batches_tracked == 4*4 # only once
    plain = TRAINCallback(net(2), attack=quick(), lam=0)
    warm = TRAINCallback(CoTrained(net(2), warmup=2), attack=quick(), lam=0)
    assert same(snapshot(fit(plain).model), snapshot(fit(warm).model)) # M' sees the same batches and the same starts

def test_warmup_is_one_cycle_alone():
    keep = []
    cb = TRAINCallback(CoTrained(net(2), warmup=2, warmup_lr=3e-3), attack=quick())
    fit(cb, cbs=[Call('before_batch', lambda learn: keep.append(snapshot(cb.standard_learner.model)))], n_epoch=1)
    assert same(keep[0], snapshot(alone(net(2)).model))

def test_frozen():
    std,modes = net(2, drop=.5),[]
    std.conv1.weight.requires_grad_(False)
    std.register_forward_pre_hook(lambda m, inp: modes.append((m.training, torch.is_grad_enabled())))
    before = snapshot(std)
    learn = fit(TRAINCallback(Frozen(std), attack=quick()), n_epoch=1)
    assert same(before, snapshot(std)) and all(p.grad is None for p in std.parameters())
    assert not any(t for t,_ in modes) and len(modes) == 4 + 3 # of 4 training and 3 validation batches
    assert [p.requires_grad for p in std.parameters()].count(False) == 1
    assert min(column(learn, 'l_tp')) > 0

def test_own_learning_rate():
    lrs = []
    def look(learn): lrs.append((learn.opt.hypers[-1]['lr'], learn.train_cb.standard_learner.opt.hypers[0]['lr']))
    own = make_learner(digit_dls(), net(2), lr=1e-4)
    fit(TRAINCallback(CoTrained(own, follow=False), attack=quick()), cbs=[Call('after_step', look, 90)])
    assert len({a for a,_ in lrs}) == 8 and {b for _,b in lrs} == {1e-4}
    lrs.clear()
    fit(TRAINCallback(CoTrained(net(2)), attack=quick()), cbs=[Call('after_step', look, 90)])
    assert all(a == b for a,b in lrs) and len(lrs) == 8

def test_another_optimizer():
    cb = TRAINCallback(CoTrained(net(2), opt_func=torch_sgd, follow=False), attack=quick())
    assert fit(cb).opt.__class__.__name__ == 'Optimizer' and cb.standard_learner.opt.__class__.__name__ == 'OptimWrapper'

def test_modes_of_the_standard_model():
    modes = []
    cb = TRAINCallback(net(2), attack=quick())
    fit(cb, cbs=[Call('after_loss', lambda learn: modes.append((learn.training, cb.standard_learner.model.training)), 90)])
    assert set(modes) == {(True, True), (False, False)}

# --- RobustAccuracy

class Spy:
    "An attack that keeps what it is shown"
    steps = 7
    def __init__(self): self.seen = []
    def __call__(self, model, x, y):
        self.seen.append((x.clone(), y.clone()))
        return (x + .1*torch.randn_like(x)).clamp(0, 1)

@pytest.mark.parametrize('n, count', [(None, 24), (10, 10), (1, 1), (100, 24)])
def test_robust_accuracy_attacks_the_same_images(n, count):
    spy = Spy()
    learn = fit(TRAINCallback(None, attack=quick()), metrics=[RobustAccuracy(spy, n=n)])
    assert learn.recorder.metric_names[3] == 'pgd7_accuracy'
    x,y = (torch.cat(o) for o in zip(*spy.seen))
    assert len(x) == 2*count and torch.equal(x[:count], x[count:]) and torch.equal(y[:count], y[count:])
    if n == 10: assert len({tuple(i.flatten().tolist()) for i in x[:count]}) == 10

def test_robust_accuracy_counts():
    attack = quick(start='natural')
    metrics = [accuracy, RobustAccuracy(attack), RobustAccuracy(attack, n=9, name='few')]
    learn = fit(TRAINCallback(None, attack=quick()), n=64, metrics=metrics)
    x,y = digits('test', 24)
    hits = learn.model.eval()(quick(start='natural')(learn.model, x, y)).argmax(1) == y
    assert column(learn, 'pgd2_accuracy')[-1] == pytest.approx(hits.float().mean().item())
    assert column(learn, 'few')[-1]*9 == pytest.approx(round(column(learn, 'few')[-1]*9))

def test_robust_accuracy_disturbs_nothing():
    def run(metrics):
        seed_all(0)
        dls = get_dls('digits', bs=16, n_train=64, n_test=30, device='cpu') # shuffled and augmented
        seed_all(0)
        return snapshot(quietly(make_learner(dls, net(1, drop=.5), TRAINCallback(net(2, drop=.5), attack=quick()), metrics), 3, 3e-3).model)
    assert same(run([accuracy]), run([accuracy, RobustAccuracy(quick(), n=12), RobustAccuracy(quick(3))]))

def test_nothing_is_left_on_the_models():
    main,std = net(1),net(2)
    fit(TRAINCallback(std, robust=TRADES(), attack=quick()), main, metrics=[RobustAccuracy(quick())])
    assert hooks(main) == hooks(std) == 0

def test_data_augmented_by_fastai():
    dls = get_dls('digits', bs=8, n_train=40, n_test=20, device='cpu')
    cb = TRAINCallback('resnet10t_16', attack=quick())
    learn = quietly(Learner(dls, net(1), CrossEntropyLossFlat(), cbs=cb, metrics=accuracy), 1)
    assert cb.standard_learner.model.settings['img_size'] == 32 and column(learn, 'robust_loss')[0] > 0

def test_plain_fastai_loaders():
    from fastai.data.load import DataLoader
    dls = DataLoaders(*(DataLoader(list(zip(*digits(part, 16))), bs=8, num_workers=0) for part in ('train', 'test')), device='cpu')
    assert len(quietly(make_learner(dls, net(1), TRAINCallback(net(2), attack=quick()))).recorder.values) == 1

def test_torch_loaders():
    from torch.utils.data import DataLoader, TensorDataset
    train,valid = (DataLoader(TensorDataset(*digits(part, 16)), batch_size=8) for part in ('train', 'test'))
    learn = quietly(make_learner(DataLoaders(train, valid, device='cpu'), net(1), TRAINCallback(net(2), attack=quick())))
    assert len(learn.recorder.values) == 1

def test_relation_without_standard_model():
    with pytest.raises(ValueError, match='needs a standard model'): TRAINCallback(None, relation=Topology())

# --- what trains, by name

def test_settings_say_what_trains():
    cb = TRAINCallback('resnet10t_16', robust=TRADES(beta=3), attack=PGD(.1, .05, 2), lam=2)
    found = cb.settings()
    assert found['robust'] == dict(kind='TRADES', beta=3.) and found['attack']['eps'] == .1 and found['lam']['lam_max'] == 2
    assert found['relations.l_tp']['detach'] and found['standard']['standard'] == 'resnet10t_16' and found['perturb'] is None
    assert json.loads(json.dumps(found)) == found
    other = TRAINCallback('resnet10t_16', robust=TRADES(beta=4), attack=PGD(.1, .05, 2), lam=2).settings()
    assert [n for n in found if found[n] != other[n]] == ['robust']

def test_settings_stay_the_same():
    "Before a training and after it, of a name and of its backbone, and wherever a warm-up is kept"
    def make(standard, keep=None):
        return TRAINCallback(CoTrained(standard, keep=keep, opt_func=partial(Adam, mom=.8)), attack=quick(), lam=lambda t: 5*t)
    cb = make('resnet10t_16')
    before = cb.settings()
    fit(cb, n_epoch=1)
    backbone = create_backbone('resnet10t_16', 10, small_images=False)
    assert dict(cb.settings(), loss_func=None) == before == make(backbone, 'warm.pt').settings()
    assert ' at 0x' not in json.dumps(before)
    for own in (net(2), make_learner(digit_dls(), net(2))): assert make(own).settings()['standard']['standard'] == 'Net'

# --- names where objects are taken

def test_names_of_pieces():
    cb = TRAINCallback('resnet18', robust='TRADES:beta=3', relation='lbgat', strategy='sat', perturb='awp:gamma=.01',
                       average='ema', attack=8/255)
    assert [type(p).__name__ for p in cb.pieces.values()] == ['TRADES', 'SAT', 'AWP', 'EMA', 'LBGAT']
    assert cb.robust.beta == 3 and cb.perturb.gamma == .01 and cb.relations[0].key == 'lbgat'
    assert cb.attack.settings() == PGD(8/255, 2/255).settings()
    for relation in ('lbgat+train', ['lbgat', 'train'], ('lbgat', Topology())):
        assert [r.key for r in TRAINCallback('resnet18', relation=relation).relations] == ['lbgat', 'train']

def test_sizes_may_be_typed():
    for attack in (PGD(eps='8/255', alpha='2/255'), TRAINCallback(None, attack='8/255').attack, RobustAccuracy('8/255').attack):
        assert attack.eps == 8/255 and attack.alpha == 2/255
    assert FGSM('4/255').alpha == 4/255 == named_attack('fgsm', '4/255').eps

def test_names_train_as_objects():
    a = fit(TRAINCallback(net(2), robust='trades:beta=3', relation='train', perturb='awp:warmup=0', attack=quick()), n_epoch=1)
    b = fit(TRAINCallback(net(2), robust=TRADES(3), relation=Topology(), perturb=AWP(warmup=0), attack=quick()), n_epoch=1)
    assert same(snapshot(a.model), snapshot(b.model))

@pytest.mark.parametrize('kwargs, match', [
    (dict(robust='tardes'), "robust='tardes': Unknown method 'tardes'.*'trades'"),
    (dict(robust='lbgat'), "robust='lbgat': expected one of at,"),
    (dict(robust='at+awp'), "robust='at[+]awp': expected one of"),
    (dict(robust=3), 'robust=3: expected an instance of RobustLoss or the name of one: at,'),
    (dict(robust=TRADES), 'robust=<class .*TRADES.*expected an instance of RobustLoss'),
    (dict(robust='trades:beta=x'), "robust='trades:beta=x': trades: beta='x'"),
    (dict(relation='trades'), "relation='trades': expected one of train,"),
    (dict(relation=5), 'relation=5: expected an instance of Relation'),
    (dict(relation=True), 'relation=True: expected an instance of Relation'), (dict(relation=['train', 3]), 'relation=3: expected'),
    (dict(relation='train+'), "relation='': Unknown method ''"), (dict(strategy='awp'), "strategy='awp': expected one of fat,"),
    (dict(strategy=AT()), 'strategy=AT.*expected an instance of Strategy'),
    (dict(perturb=.01), 'perturb=0.01: expected an instance of Perturbation'),
    (dict(average=True), 'average=True: expected an instance of Averaging or the name of one: ema'),
    (dict(average=.999), 'average=0.999: expected'),
    (dict(attack='fgsm'), "attack='fgsm': eps='fgsm' is not a size"), (dict(attack=8), 'attack=8: eps=8 is larger.*8/255'),
    (dict(attack=True), 'attack=True: expected a PGD'), (dict(attack=PGD), 'attack=<class .*expected a PGD'),
    (dict(attack=[.1]), 'attack=\\[0.1\\]: expected a PGD'), (dict(attack=0), 'attack=0: eps=0: expected a size'),
    (dict(lam='ramp'), "lam='ramp': expected a number, a schedule")])
def test_what_is_no_piece(kwargs, match):
    with pytest.raises(ValueError, match=match) as e: TRAINCallback('resnet18', **kwargs)
    assert '\n' not in str(e.value)

def test_what_is_no_size():
    for make in (PGD, FGSM, RobustAccuracy, lambda eps: named_attack('pgd20', eps)):
        with pytest.raises(ValueError, match="eps='big' is not a size: write a fraction such as 8/255"): make('big')
    with pytest.raises(ValueError, match="alpha='1/0' is not a size"): PGD(alpha='1/0')

# --- every batch is looked at

def later(change, batch=2):
    "Data whose first batches are sound"
    x,y = digits('train', 32)
    x,y = x.clone(),y.clone()
    change(x[8*batch:], y[8*batch:])
    return plain_dls(x, y, shuffle=False)

wrong_batches = dict(
    bytes=(lambda x, y: x.mul_(255), r'Images lie in .*expected \[0, 1\]'), nan=(lambda x, y: x[0].fill_(float('nan')), 'not numbers'),
    below=(lambda x, y: x[3, 0, 0].fill_(-.1), 'Images lie in'), label=(lambda x, y: y[1:2].fill_(10), 'Label 10 has no output'),
    ignored=(lambda x, y: y[:1].fill_(-100), 'Label -100 has no output'))

@pytest.mark.parametrize('change, match', wrong_batches.values(), ids=wrong_batches)
@pytest.mark.parametrize('cb', [lambda: TRAINCallback(None, attack=quick()),
                                lambda: TRAINCallback(net(2), robust='trades', attack=quick())])
def test_wrong_batch_after_the_first(change, match, cb):
    learn = make_learner(later(change), net(1), cb())
    with pytest.raises(ValueError, match=match): quietly(learn)
    forwards = 4 if "nat" in learn.train_cb.needs else 2 # of the two batches before
    assert learn.model.bn1.num_batches_tracked == forwards and hooks(learn.model) == 0

def test_natural_training_takes_any_images_and_no_wrong_labels():
    change,_ = wrong_batches['bytes']
    quietly(make_learner(later(change), net(1), TRAINCallback(None, robust=Natural())))
    with pytest.raises(ValueError, match='Label 10'):
        quietly(make_learner(later(wrong_batches['label'][0]), net(1), TRAINCallback(None, robust=Natural())))

def test_random_erasing_is_refused():
    dls = get_dls('digits', bs=8, n_train=40, n_test=20, device='cpu')
    dls.add_tfms([RandomErasing(p=1e-9)], 'after_batch')
    learn = make_learner(dls, net(1), TRAINCallback(net(2), attack=quick()))
    with pytest.raises(ValueError, match='RandomErasing.*noise outside'): quietly(learn)
    with learn.no_bar(): make_learner(dls, net(1), metrics=[RobustAccuracy(quick())]).validate() # not applied there

@pytest.fixture
def as_on_a_gpu(monkeypatch):
    "Batches are judged when a number is read"
    monkeypatch.setattr(batches, '_must_be_waited_for', lambda values: True)

def test_on_a_gpu_a_batch_is_judged_with_the_next_number(as_on_a_gpu):
    watch,(x,y) = BatchWatch((0., 1.), 10),digits('train', 8)
    assert torch.equal(watch.look(x, y + 5), (y + 5).clamp(0, 9)) # nothing is waited for, and no label may stop the GPU
    with pytest.raises(ValueError, match='has no output'): watch.read(2.5)
    assert watch.read(torch.tensor(2.5)) == 2.5 # once
    watch.look(x*255, y)
    with pytest.raises(ValueError, match='Images lie in'): watch.read(torch.tensor(2.5))
    watch.look(x, y)
    assert watch.read(torch.tensor(2.5)) == 2.5
    with pytest.raises(ValueError, match='has no output'): watch.look(x, y + 5, now=True)

@pytest.mark.parametrize('change, match', wrong_batches.values(), ids=wrong_batches)
def test_wrong_batch_on_a_gpu(as_on_a_gpu, change, match):
    learn = make_learner(later(change), net(1), TRAINCallback(net(2), robust='trades', attack=quick()), [RobustAccuracy(quick())])
    with pytest.raises(ValueError, match=match): quietly(learn)
    assert learn.model.bn1.num_batches_tracked == 2*4 # said when the epoch is over

def test_waiting_changes_nothing(monkeypatch):
    def train(): return fit(TRAINCallback(net(2), robust='trades', attack=quick()), metrics=[RobustAccuracy(quick(), n=13)], n_epoch=1)
    at_once = train()
    monkeypatch.setattr(batches, '_must_be_waited_for', lambda values: True)
    later = train()
    assert same(snapshot(at_once.model), snapshot(later.model)) and at_once.recorder.values[0][:5] == later.recorder.values[0][:5]

# --- what RobustAccuracy refuses

def validate(change=None, model=None, transform=None, n=None, attack=None):
    x,y = digits('test', 24)
    x,y = x.clone(),y.clone()
    if change: change(x[16:], y[16:])
    dls = plain_dls(*digits('train', 16))
    dls.valid.dataset[:] = list(zip(x, y))
    if transform: dls.valid.after_batch.add(transform)
    metrics = [RobustAccuracy(attack or quick(), n=n)]
    learn = make_learner(dls, net(1) if model is None else model, metrics=metrics)
    learn.loss_func = lambda z, y: z.mean() # so that nothing else stumbles over the labels
    with learn.no_bar(): return learn.validate()[1]

@pytest.mark.parametrize('change, match', wrong_batches.values(), ids=wrong_batches)
def test_robust_accuracy_of_wrong_images(change, match):
    for n in (None, 23):
        with pytest.raises((ValueError, FloatingPointError), match=match): validate(change, n=n)

def test_robust_accuracy_of_normalised_images():
    with pytest.raises(ValueError, match='Normalize.*create_backbone'): validate(transform=Normalize.from_stats([.5]*3, [.3]*3, cuda=False))

def test_robust_accuracy_of_wrong_logits():
    with pytest.raises(ValueError, match='probabilities'): validate(model=nn.Sequential(net(1), nn.Softmax(1)))
    def nan_after(model, x, y):
        model.fc.weight.data.fill_(float('nan'))
        return x
    nan_after.steps = 3
    with pytest.raises(FloatingPointError, match='pgd3_accuracy'): validate(attack=nan_after)
    assert 0 <= validate() <= 1
