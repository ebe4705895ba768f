"Weight perturbation against a loop as it was published, weight averaging against its formula, and that neither leaves anything behind"
import copy

import pytest
import torch
from fastai.callback.core import CancelBatchException, CancelFitException, CancelTrainException
from fastai.callback.schedule import * # noqa: F403  fit_one_cycle, lr_find
from fastai.callback.training import GradientAccumulation
from fastai.metrics import accuracy
from fastai.optimizer import Adam
from torch import nn
from torch.nn import functional as F

from conftest import Call, Forwards, Net, digit_dls, digits, make_learner, net, quick, quietly, same, snapshot
from fastrain.attacks.pgd import PGD, Plan
from fastrain.training.callback import TRAINCallback
from fastrain.core import seed_all
from fastrain.models.features import logits_and_features
from fastrain.pieces.losses import AT, MCA, TRADES, Natural, RobustLoss
from fastrain.pieces.base import Step, Training, Views
from fastrain.pieces.relations import topology_loss
from fastrain.training.schedules import torch_sgd
from fastrain.pieces.weights import AWP, EMA, Averaging, Perturbation, _ascent, _displace, _kept_buffers
from test_resume import check

losses = dict(at=AT, trades=TRADES)

def learner(cb, main=None, double=False, cbs=(), bs=8, n=32, **kwargs):
    learn = make_learner(digit_dls(n, bs, double=double), net(1) if main is None else main, [*([cb] if cb else []), *cbs],
                         opt_func=torch_sgd, wd=5e-4, wd_bn_bias=True, **kwargs)
    if double: learn.remove_cbs([learn.progress, learn.recorder]) # fastai's recorder takes float32 alone
    seed_all(0)
    return learn

def fit(cb, main=None, n_epoch=2, lr=.05, **kwargs): return quietly(learner(cb, main, **kwargs), n_epoch, lr)
def params(model): return {n: p.detach().clone() for n,p in model.named_parameters()}

def close(a, b, atol=1e-10):
    for k,v in a.items(): torch.testing.assert_close(v, b[k], rtol=0, atol=atol, msg=lambda m: f'{k}: {m}')

# --- AWP

def craft(main, x, y, robust, eps=.1, alpha=.05, steps=2):
    main.eval()
    if robust == 'trades': x_adv,p = x + .001*torch.randn_like(x),main(x).softmax(1).detach()
    else: x_adv = (x + torch.empty_like(x).uniform_(-eps, eps)).clamp(0, 1)
    for _ in range(steps):
        x_adv.requires_grad_()
        z = main(x_adv)
        loss = F.kl_div(z.log_softmax(1), p, reduction='sum') if robust == 'trades' else F.cross_entropy(z, y, reduction='sum')
        g, = torch.autograd.grad(loss, x_adv)
        x_adv = (x_adv.detach() + alpha*g.sign()).clamp(x - eps, x + eps).clamp(0, 1)
    main.train()
    return x_adv

def robust_terms(model, x, x_adv, y, robust):
    "L_robust and the adversarial features"
    if robust == 'at':
        z,features = logits_and_features(model, x_adv)
        return F.cross_entropy(z, y),features
    nat = model(x)
    z,features = logits_and_features(model, x_adv)
    return F.cross_entropy(nat, y) + 6*F.kl_div(z.log_softmax(1), nat.softmax(1), reduction='batchmean'),features

def published(robust, gamma, first, lam=0., n_epoch=2, lr=.05, proxy_lr=.01):
    "The proxy of the paper: copied, stepped uphill by SGD, its difference normalised, added, taken back after it; from epoch `first` on"
    dls,main,std = digit_dls(double=True),net(1).double().train(),net(2).double().train()
    opt,std_opt = (torch.optim.SGD(m.parameters(), lr, momentum=.9, weight_decay=5e-4) for m in (main, std))
    seed_all(0)
    for epoch in range(n_epoch):
        for x,y in dls.train:
            x_adv,v = craft(main, x, y, robust),{}
            if epoch >= first:
                proxy = copy.deepcopy(main)
                proxy_opt = torch.optim.SGD(proxy.parameters(), proxy_lr)
                proxy_opt.zero_grad()
                (-robust_terms(proxy, x, x_adv, y, robust)[0]).backward()
                proxy_opt.step()
                for (n,old),new in zip(main.named_parameters(), proxy.parameters()):
                    if 'weight' in n and old.ndim > 1:
                        diff = (new - old).detach()
                        v[n] = old.detach().norm()*diff/(diff.norm() + 1e-20)
            with torch.no_grad():
                for n,p in main.named_parameters():
                    if n in v: p += gamma*v[n]
            loss,features = robust_terms(main, x, x_adv, y, robust)
            std_z,anchor = logits_and_features(std, x)
            if lam: loss = loss + lam*topology_loss(anchor.detach(), features)
            for l,o in ((loss, opt), (F.cross_entropy(std_z, y), std_opt)):
                o.zero_grad()
                l.backward()
                o.step()
            with torch.no_grad():
                for n,p in main.named_parameters():
                    if n in v: p -= gamma*v[n]
        for _ in dls.valid: pass # loaders draw a number each time they start
    return main,std

def run(robust, awp, lam=0., **kwargs):
    cb = TRAINCallback(net(2).double() if lam else None, robust=losses[robust](), attack=quick(), perturb=awp, lam=lam)
    return fit(cb, net(1).double(), double=True, **kwargs)

# perturbation, its gamma, and the first of two epochs that it is applied in
settings = dict(default_at=('at', AWP(), .01, 0), default_trades=('trades', AWP(), .005, 1), large_at=('at', AWP(.1), .1, 0),
                large_trades=('trades', AWP(.1, 0), .1, 0),
                late_at=('at', AWP(.1, 1, of=None), .1, 1), never=('at', AWP(.1, 2, of=None), .1, 2))

together = { # all of them, and each λ
    'default_at': 5., 'default_trades': 5., 'large_at': 0., 'large_trades': 5., 'late_at': 0., 'never': 5.}
every = [pytest.param(name, lam, marks=() if together[name] == lam else pytest.mark.slow) for name in settings for lam in (0., 5.)]

@pytest.mark.parametrize('name, lam', every)
def test_equals_the_published_loop(name, lam):
    robust,awp,gamma,first = settings[name]
    main,std = published(robust, gamma, first, lam)
    learn = run(robust, copy.deepcopy(awp), lam)
    close(snapshot(main), snapshot(learn.model)) # BatchNorm's statistics too
    if lam: assert same(snapshot(learn.train_cb.standard_learner.model), snapshot(std))

def test_loops_differ(): # or the tolerance above would be too wide
    states = [snapshot(published(r, gamma, first, lam)[0])['fc.weight'] for r,gamma,first,
              lam in (('at', 0., 0, 0.), ('at', .01, 0, 0.), ('at', .1, 0, 0.), ('at', .1, 1, 0.), ('at', .1, 0, 5.),
                      ('trades', .1, 0, 0.), ('trades', .1, 1, 0.))]
    assert min((a - b).abs().max() for i,a in enumerate(states) for b in states[:i]) > 1e-4

def test_learning_rate_of_the_proxy_is_irrelevant(): close(*(snapshot(published('at', .1, 0, proxy_lr=lr)[0]) for lr in (.01, 1.)))

@pytest.mark.parametrize('n_epoch, awp, robust, first', [(4, AWP(), AT(), 0), (40, AWP(), TRADES(), 2), (200, AWP(), TRADES(), 10),
                                                         (20, AWP(), TRADES(), 1), (10, AWP(), TRADES(), 1), (1, AWP(), TRADES(), None),
    (4, AWP(warmup=100), AT(), 2), (4, AWP(warmup=2, of=None), AT(), 2), (4, AWP(warmup=4, of=None), AT(), None),
    (3, AWP(warmup=0), TRADES(), 0)])
def test_warmup(n_epoch, awp, robust, first, monkeypatch):
    moved = []
    def note(*args):
        moved.append(epoch)
        return {}
    monkeypatch.setattr('fastrain.pieces.weights._ascent', note)
    awp.setup(Training(net(), robust=robust))
    for epoch in range(n_epoch): awp.perturb(Step(net(), Views(None, None, epoch=epoch, epochs=n_epoch), robust))
    assert moved == list(range(n_epoch if first is None else first, n_epoch))

@pytest.mark.parametrize('robust', losses)
def test_gamma_0_is_none(robust):
    a,b = (fit(TRAINCallback(net(2), robust=losses[robust](), attack=quick(), perturb=p)) for p in (AWP(0., 0), None))
    assert same(snapshot(a.model), snapshot(b.model)) and same(a.opt.state_dict()['state'], b.opt.state_dict()['state'])

@pytest.mark.parametrize('robust', losses)
def test_standard_model_is_that_without(robust):
    a,b = (fit(TRAINCallback(net(2), robust=losses[robust](), attack=quick(), perturb=p)) for p in (AWP(.1, 0), None))
    assert same(snapshot(a.train_cb.standard_learner.model), snapshot(b.train_cb.standard_learner.model))
    assert not same(snapshot(a.model), snapshot(b.model))

def test_where_the_weights_are():
    "Displaced by gamma of each layer's norm from the attack to the step, back in place between batches and in validation"
    seen,awp = [],AWP(.1)
    def keep(learn): seen.append((learn.training, params(learn.model)))
    cbs = [Call('before_batch', keep, -90, 'a'), Call('after_pred', keep, 90, 'b'), Call('before_step', keep, 90, 'c')]
    learn = fit(TRAINCallback(None, attack=quick(), perturb=awp), cbs=cbs, n_epoch=1, lr=0.)
    start,train,valid = params(net(1)),[p for t,p in seen if t],[p for t,p in seen if not t]
    assert len(train) == 12 and len(valid) == 6
    for between in (*train[::3], *valid, params(learn.model)): close(start, between, 1e-6)
    for moved in (*train[1::3], *train[2::3]):
        for n,p in start.items():
            if n in ('conv1.weight', 'conv2.weight', 'fc.weight'):
                assert (moved[n] - p).norm().item() == pytest.approx(.1*p.norm().item(), rel=1e-3)
            else: assert torch.equal(moved[n], p)

def test_attack_sees_the_weights_in_place():
    seen = []
    class Watch(PGD):
        def __call__(self, model, *args, **kwargs):
            seen.append(params(model))
            return super().__call__(model, *args, **kwargs)
    fit(TRAINCallback(None, attack=Watch(.1, .05, 2), perturb=AWP(.1)), n_epoch=1, lr=0.)
    assert len(seen) == 4
    for p in seen: close(params(net(1)), p, 1e-6)

@pytest.mark.parametrize('robust, per_batch', [('at', 2), ('trades', 4)])
def test_work(robust, per_batch):
    "One more forward of each view, none of them seen by BatchNorm"
    main = net(1)
    counts = Forwards(main)
    fit(TRAINCallback(None, robust=losses[robust](), attack=quick(2), perturb=AWP(warmup=0)), main, n_epoch=1)
    attack = 2 + (robust == 'trades')
    assert counts.n == 4*(attack + per_batch) + 3 # and three batches of validation
    assert main.bn1.num_batches_tracked == 4*per_batch//2

def test_natural_training():
    "The loss of a method without adversary can be flattened, too"
    a,b = (fit(TRAINCallback(None, robust=Natural(), perturb=p)) for p in (AWP(.1), None))
    assert not same(snapshot(a.model), snapshot(b.model))

def test_features_and_memory():
    "The queue of a contrastive loss holds each batch once"
    loss = MCA(queue=1000)
    fit(TRAINCallback(None, robust=loss, attack=quick(), perturb=AWP(.1)), n_epoch=1)
    assert len(loss.state_dict()['past'][0]) == 4*2*8

def test_notes_reach_the_ascent():
    seen = []
    class Noted(RobustLoss):
        def plan(self, model, v, attack): return Plan(notes=dict(tag=v.y*2))
        def __call__(self, v):
            seen.append(torch.equal(v.notes['tag'], v.y*2))
            return dict(ce=F.cross_entropy(v.adv.logits, v.y))
    fit(TRAINCallback(None, robust=Noted(), attack=quick(), perturb=AWP(.1)), n_epoch=1)
    assert seen == [True]*8

# --- what the ascent moves

class Odd(Net):
    "With an unused layer, a frozen one, and a matrix that is not called weight"
    def __init__(self):
        super().__init__()
        self.unused,self.matrix = nn.Conv2d(3, 4, 3),nn.Parameter(torch.eye(10))
        self.conv1.weight.requires_grad_(False)
    def forward(self, x): return super().forward(x)@self.matrix

def test_only_weights_with_a_gradient():
    model,(x,y) = Odd(),digits('train', 8)
    d = _ascent(model, lambda: F.cross_entropy(model(x), y), .1)
    assert list(d) == ['conv2.weight', 'fc.weight'] and all(p.grad is None for p in model.parameters())
    before = params(model)
    learn = fit(TRAINCallback(None, attack=quick(), perturb=AWP(.1)), model)
    after = params(learn.model)
    assert {n for n in before if torch.equal(before[n], after[n])} == {'conv1.weight', 'unused.weight', 'unused.bias'}

def test_layer_without_slope_stays():
    model,(x,y) = net(1, bn=False),digits('train', 8)
    model.conv2.bias.data.fill_(-1e3) # nothing passes its ReLU
    d = _ascent(model, lambda: F.cross_entropy(model(x), y), .1)
    assert not d['conv1.weight'].any() and not d['conv2.weight'].any() and all(t.isfinite().all() for t in d.values())

def test_ascent_goes_uphill():
    model,(x,y) = net(1).double(),digits('train', 16)
    loss = lambda: F.cross_entropy(model(x.double()), y)
    before,values = snapshot(model),[loss().item()]
    d = _ascent(model, loss, .02)
    for sign in (1, -2):
        _displace(model, d, sign)
        values.append(loss().item())
    assert values[2] < values[0] < values[1]
    _displace(model, d)
    close(params(model), {k: before[k] for k in params(model)}, 1e-14)

def test_kept_buffers():
    model,(x,_) = net(1),digits('train', 8)
    before = snapshot(model)
    with _kept_buffers(model): model(x)
    assert same(before, snapshot(model))
    with pytest.raises(RuntimeError), _kept_buffers(model):
        model(x)
        raise RuntimeError
    assert same(before, snapshot(model))
    model(x)
    assert not same(before, snapshot(model))

def test_gradient_is_left_alone():
    "What was accumulated before the ascent is still there after it"
    grads = []
    def keep(learn): grads.append(learn.model.fc.weight.grad.clone())
    awp = AWP(.1)
    def look(learn):
        if awp._moved and learn.iter == 1: keep(learn)
    fit(TRAINCallback(None, attack=quick(), perturb=awp), n_epoch=1,
        cbs=[GradientAccumulation(16), Call('after_cancel_batch', keep, 90, 'a'), Call('after_pred', look, 90, 'b')])
    assert torch.equal(grads[0], grads[1]) and grads[0].any()

# --- batches without a step, and interrupts

def test_accumulation():
    "Weights return after each batch, of a step or not"
    seen,steps = [],[]
    def keep(learn): seen.append(params(learn.model))
    cbs = [GradientAccumulation(16), Call('before_batch', keep, -90, 'a'), Call('after_batch', keep, 90, 'b'),
           Call('after_step', lambda l: steps.append(1), 90, 'c')]
    learn = fit(TRAINCallback(None, attack=quick(), perturb=AWP(.1)), net(1).double(), double=True, cbs=cbs, n_epoch=1)
    train = seen[:8]
    assert len(steps) == 2
    for i in (0, 2): close(train[2*i], train[2*i + 1], 1e-14) # batches 0 and 2 make no step
    for i in (1, 3): assert (train[2*i]['fc.weight'] - train[2*i + 1]['fc.weight']).abs().max() > 1e-4

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_backward', 'before_step'])
def test_cancelled_batch(event):
    def cancel(learn):
        if learn.training: raise CancelBatchException
    learn = fit(TRAINCallback(None, attack=quick(), perturb=AWP(.1)), net(1).double(), double=True, cbs=[Call(event, cancel, 90)])
    close(params(net(1).double()), params(learn.model), 1e-13)

def stop_at(event, exc, n=2):
    def stop(learn):
        if learn.training and learn.iter == n: raise exc
    return Call(event, stop, 90, 'stop')

def until(n):
    "Weights after `n` batches"
    def stop(learn):
        if learn.training and learn.iter == n: raise CancelFitException
    return params(fit(TRAINCallback(None, attack=quick(), perturb=AWP(.1)), net(1).double(), double=True,
                      cbs=[Call('before_batch', stop, -90)]).model)

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_step'])
def test_interrupted_and_fitted_again(event):
    awp = AWP(.1)
    learn = learner(TRAINCallback(None, attack=quick(), perturb=awp), net(1).double(), double=True)
    with pytest.raises(KeyboardInterrupt): quietly(learn, 1, .05, cbs=stop_at(event, KeyboardInterrupt))
    assert awp._moved # or there would be nothing to put right
    seen = []
    quietly(learn, 1, .05, cbs=Call('before_batch', lambda l: seen.append(params(l.model)), -90))
    close(until(2), seen[0], 1e-13)

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_step'])
def test_interrupted_and_validated(event):
    learn = learner(TRAINCallback(None, attack=quick(), perturb=AWP(.1)), net(1).double(), double=True)
    with pytest.raises(KeyboardInterrupt): quietly(learn, 1, .05, cbs=stop_at(event, KeyboardInterrupt))
    seen = []
    learn.add_cb(Call('before_validate', lambda l: seen.append(params(l.model)), 90))
    with learn.no_bar(), learn.no_logging(): learn.get_preds()
    close(until(2), seen[0], 1e-13)

def test_interrupted_and_removed():
    "Where `fit` brought the callback and took it away"
    learn = learner(None, net(1).double(), double=True)
    with pytest.raises(KeyboardInterrupt):
        quietly(learn, 1, .05, cbs=[TRAINCallback(None, attack=quick(), perturb=AWP(.1)), stop_at('after_loss', KeyboardInterrupt)])
    close(until(2), params(learn.model), 1e-13)

@pytest.mark.parametrize('exc', [CancelFitException, CancelTrainException])
def test_stopped_within_a_batch(exc):
    seen = []
    cbs = [stop_at('after_loss', exc), Call('before_validate', lambda l: seen.append(params(l.model)), 90)]
    learn = fit(TRAINCallback(None, attack=quick(), perturb=AWP(.1)), net(1).double(), double=True, cbs=cbs, n_epoch=1)
    for p in (*seen, params(learn.model)): close(until(2), p, 1e-13)

def test_lr_find():
    cb = TRAINCallback(net(2), attack=quick(), perturb=AWP(.1), average=EMA())
    learn = learner(cb)
    before = snapshot(learn.model)
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert same(before, snapshot(learn.model)) and same(dict(before), dict(snapshot(cb.average.model)))
    assert cb.average.state_dict()['steps'] == 0
    a = quietly(learn, 1, .05)
    assert not same(before, snapshot(a.model))

@pytest.mark.parametrize('kwargs, match', [(dict(gamma=-1), 'gamma=-1'), (dict(gamma=float('nan')), 'gamma=nan'),
                                           (dict(gamma=float('inf')), 'gamma=inf'), (dict(warmup=-1), 'warmup=-1'),
                                           (dict(warmup=float('nan')), 'warmup=nan')])
def test_bad_perturbation(kwargs, match):
    with pytest.raises(ValueError, match=match): AWP(**kwargs)

# --- EMA

def reference_ema(start, states, decay, warmup):
    "The decay grows as 1 − (1 + k)^(−2/3) after k steps, up to `decay`; the first step is taken as it is"
    ema = {k: v.clone() for k,v in start.items()}
    for k,state in enumerate(states):
        d = 0 if k == 0 else min(decay, 1 - (1 + k)**(-2/3)) if warmup else decay
        ema = {n: d*ema[n] + (1 - d)*v if v.is_floating_point() else v.clone() for n,v in state.items()}
    return ema

def averaged(average, cbs=(), n_epoch=3, main=None, **kwargs):
    states,cb = [],TRAINCallback(None, attack=quick(), average=average, **kwargs)
    keep = Call('after_step', lambda l: states.append(snapshot(l.model)), 90, 'keep')
    return fit(cb, net(1).double() if main is None else main, double=main is None, n_epoch=n_epoch, cbs=[keep, *cbs]),states

@pytest.mark.parametrize('decay, warmup', [(.999, True), (.9, True), (.5, True), (.9, False), (.999, False), (0., True), (0., False)])
def test_average_equals_the_formula(decay, warmup):
    average = EMA(decay, warmup)
    learn,states = averaged(average)
    assert len(states) == 12
    want = reference_ema(snapshot(net(1).double()), states, decay, warmup)
    close(want, snapshot(average.model), 1e-12)
    if decay:
        assert (want['bn1.running_mean'] - states[-1]['bn1.running_mean']).abs().max() > 1e-4
        assert (want['fc.weight'] - states[-1]['fc.weight']).abs().max() > 1e-4
    else: assert same(dict(snapshot(average.model)), dict(states[-1]))

def test_average_of_steps_not_of_batches():
    average = EMA(.9)
    learn,states = averaged(average, [GradientAccumulation(16)])
    assert len(states) == average.state_dict()['steps'] == 6
    close(reference_ema(snapshot(net(1).double()), states, .9, True), snapshot(average.model), 1e-12)

def test_average_of_weights_in_place():
    "With AWP: of the weights between batches"
    average,seen = EMA(.9),[]
    learn,_ = averaged(average, [Call('after_batch', lambda l: l.training and seen.append(snapshot(l.model)), 90, 'b')], perturb=AWP(.1))
    close(reference_ema(snapshot(net(1).double()), seen, .9, True), snapshot(average.model), 1e-12)

@pytest.mark.parametrize('robust', losses)
def test_raw_weights_are_those_without(robust):
    a,b = (fit(TRAINCallback(net(2), robust=losses[robust](), attack=quick(), average=average), net(1, drop=.3))
           for average in (EMA(), None))
    assert same(snapshot(a.model), snapshot(b.model)) and same(a.opt.state_dict()['state'], b.opt.state_dict()['state'])
    assert same(snapshot(a.train_cb.standard_learner.model), snapshot(b.train_cb.standard_learner.model))

def test_column():
    average = EMA(.9)
    learn = fit(TRAINCallback(net(2), attack=quick(), average=average), net(1, drop=.3), n=64, n_epoch=4, metrics=accuracy)
    names = list(learn.recorder.metric_names)
    assert names[-2:] == ['ema_accuracy', 'time']
    x,y = digits('test', 24)
    assert not average.model.training
    with torch.no_grad(): want,raw = ((m.eval()(x).argmax(1) == y).float().mean().item() for m in (average.model, learn.model))
    column = [v[names.index('ema_accuracy') - 1] for v in learn.recorder.values]
    assert column[-1] == pytest.approx(want) and want != raw and len(set(column)) > 1

def test_average_goes_on_in_the_next_fit():
    average = EMA(.9)
    learn,states = averaged(average, n_epoch=1)
    quietly(learn, 2, .05)
    close(reference_ema(snapshot(net(1).double()), states, .9, True), snapshot(average.model), 1e-12)
    assert len(states) == 12

@pytest.mark.parametrize('decay', [-.1, 1, 1.5, float('nan')])
def test_bad_decay(decay):
    with pytest.raises(ValueError, match='decay='): EMA(decay)

# --- checkpoints

def with_ema(): return TRAINCallback(None, attack=quick(), average=EMA(.9))
def with_all(): return TRAINCallback(net(2, drop=.2), robust=TRADES(), attack=quick(), perturb=AWP(.1), average=EMA(.9))
def with_queue(): return TRAINCallback(None, robust=MCA(queue=50), attack=quick(), perturb=AWP(.1))

@pytest.mark.parametrize('cb', [with_all, *(pytest.param(cb, marks=pytest.mark.slow) for cb in (with_queue, with_ema))])
def test_resumed(tmp_path, cb):
    whole,parts = check(tmp_path, cb, opt_func=Adam)
    a,b = (learn.train_cb.state_dict()['pieces'] for learn in (whole, parts))
    assert a and same(a, b)

def test_registered():
    assert Perturbation.named('awp').settings() == dict(gamma=None, warmup=None, of=200)
    assert Averaging.named('ema').settings() == dict(decay=.999, warmup=True)
