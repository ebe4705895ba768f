"The attacks against plain loops, what they leave of a model, what they cost, and how strong they are"
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from conftest import Backwards, Forwards, Net, digits, net, same, snapshot
from fastrain.attacks.pgd import CW, FGSM, PGD, check_images, check_labels, logit_margin, norms, random_noise
from fastrain.core import fork_rng, seed_all
from fastrain.evaluation.evaluate import evaluate
from fastrain.attacks.named import named_attack

def norm(t): return t.flatten(1).norm(dim=1).view(-1, *[1]*(t.ndim-1))

def reference_start(x, eps, norm_name, start, clip):
    if start == 'natural': return x
    if start == 'gaussian': return x + .001*torch.randn(x.shape, dtype=x.dtype)
    if norm_name == 'linf': noise = torch.empty(x.shape, dtype=x.dtype).uniform_(-1, 1)*eps
    else:
        direction = torch.randn(x.shape, dtype=x.dtype)
        radius = torch.rand(len(x), dtype=x.dtype)**(1/x[0].numel())
        noise = direction/norm(direction)*radius.view(-1, 1, 1, 1)*eps
    if start == 'uniform_unclipped': return x + noise
    low,high = (torch.tensor(v, dtype=x.dtype) for v in clip)
    return torch.max(torch.min(x + noise, high), low)

def reference_pgd(model, x, y, eps, alpha, steps, norm_name, objective, start, clip):
    "PGD written out, one case after the other"
    model = copy.deepcopy(model).eval()
    x_adv = reference_start(x, eps, norm_name, start, clip)
    p = model(x).softmax(1).detach()
    for _ in range(steps):
        x_adv = x_adv.clone().detach().requires_grad_()
        z = model(x_adv)
        if objective == 'ce': loss = -sum(z.log_softmax(1)[i,c] for i,c in enumerate(y))
        if objective == 'kl': loss = (p*(p.log() - z.log_softmax(1))).sum()
        if objective == 'margin':
            best_wrong = [max(z[i,k] for k in range(z.shape[1]) if k != c) for i,c in enumerate(y.tolist())]
            loss = sum(w - z[i,c] for i,(w,c) in enumerate(zip(best_wrong, y.tolist())))
        loss.backward()
        g = x_adv.grad
        with torch.no_grad():
            if norm_name == 'linf': x_adv = torch.min(torch.max(x_adv + alpha*g.sign(), x - eps), x + eps)
            else:
                delta = x_adv + alpha*g/norm(g) - x
                x_adv = x + delta*torch.clamp(eps/norm(delta), max=1)
            x_adv = x_adv.clamp(*clip)
    return x_adv.detach()

sizes = dict(linf=(.1, .03), l2=(1.5, .4))
# not kl from the image itself: its gradient is zero there, and the sign of rounding would be compared
starts = ('natural', 'gaussian', 'uniform', 'uniform_unclipped')
cases = [(n, o, s) for n in sizes for o in ('ce', 'kl', 'margin') for s in starts if (o, s) != ('kl', 'natural')]

@pytest.mark.parametrize('clip', [(0., 1.), (-1., 1.)])
@pytest.mark.parametrize('norm_name, objective, start', cases)
def test_equals_a_plain_loop(norm_name, objective, start, clip):
    model,(x,y) = net(drop=.5).double(),digits('train', 6)
    x = x.double()*(clip[1] - clip[0]) + clip[0]
    eps,alpha = sizes[norm_name]
    attack = PGD(eps, alpha, 5, norm=norm_name, objective=objective, start=start, clip=clip)
    with fork_rng(3): got = attack(model.train(), x, y)
    with fork_rng(3): want = reference_pgd(model, x, y, eps, alpha, 5, norm_name, objective, start, clip)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert norms[norm_name].size(got - x).max() <= eps + 1e-12
    assert norms[norm_name].size(got - x).max() > .5*eps
    assert got.min() >= clip[0] and got.max() <= clip[1] and not got.requires_grad

@pytest.mark.parametrize('norm_name', sizes)
@pytest.mark.parametrize('make', [PGD, FGSM, CW, random_noise])
def test_stays_in_the_ball(make, norm_name):
    model,(x,y) = net(),digits('train', 16)
    eps = sizes[norm_name][0]
    kwargs = dict(norm=norm_name) | (dict(alpha=eps/2) if make in (PGD, CW) else {})
    x_adv = make(eps, **kwargs)(model, x, y)
    assert norms[norm_name].size(x_adv - x).max() <= eps*(1 + 1e-5) and not torch.equal(x_adv, x)
    assert x_adv.min() >= 0 and x_adv.max() <= 1 and x_adv.dtype == x.dtype and x_adv.shape == x.shape

def test_loss_supplies_what_the_attack_leaves_open():
    model,(x,y) = net(),digits('train', 8)
    def run(attack, **kwargs):
        with fork_rng(1): return attack(model, x, y, **kwargs)
    want = run(PGD(.1, .03, 3, objective='kl', start='gaussian'))
    assert torch.equal(run(PGD(.1, .03, 3), objective='kl', start='gaussian'), want)
    assert torch.equal(run(PGD(.1, .03, 3, objective='kl', start='gaussian'), objective='ce', start='uniform'), want) # its own come first
    assert torch.equal(run(PGD(.1, .03, 3)), run(PGD(.1, .03, 3, objective='ce', start='uniform')))
    def own_objective(model, x, y): return lambda z: F.cross_entropy(z, y, reduction='sum')
    assert torch.equal(run(PGD(.1, .03, 3, objective=own_objective)), run(PGD(.1, .03, 3)))

# --- what is left behind

class Fails(Net):
    "Raises in its third forward"
    calls = 0
    def forward(self, x):
        self.calls += 1
        if self.calls == 3: raise RuntimeError('out of memory')
        return super().forward(x)

def set_modes(model, mode):
    model.train(mode != 'eval')
    if mode == 'mixed': model.bn1.eval()
    model.conv1.weight.requires_grad_(False)

def everything(model):
    params = dict(model.named_parameters())
    return dict(state=snapshot(model),
                modes={n: m.training for n,m in model.named_modules()},
                requires_grad={n: p.requires_grad for n,p in params.items()},
                grad={n: None if p.grad is None else p.grad.clone() for n,p in params.items()},
                hooks=[len(m._forward_hooks) for m in model.modules()])

@pytest.mark.parametrize('objective', ['ce', 'kl', 'margin'])
@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('mode', ['train', 'eval', 'mixed'])
def test_model_is_left_as_it_was(mode, fails, objective):
    model,(x,y) = (Fails if fails else Net)(drop=.3),digits('train', 8)
    set_modes(model, mode)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    before,x0 = everything(model),x.clone()
    if fails:
        with pytest.raises(RuntimeError, match='out of memory'): PGD(.1, .03, 4, objective=objective)(model, x, y)
    else: PGD(.1, .03, 4, objective=objective)(model, x, y)
    assert same(everything(model), before)
    assert torch.equal(x, x0) and not x.requires_grad

def test_gradient_mode():
    model,(x,y) = net(),digits('train', 8)
    attack = PGD(.1, .03, 3, start='natural')
    want = attack(model, x, y)
    with torch.no_grad():
        assert torch.equal(attack(model, x, y), want) # metrics call it so
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()

def test_attacks_in_eval_mode():
    seen = []
    model = net(drop=.9).train()
    model.register_forward_pre_hook(lambda m, inp: seen.append((m.training, m.bn1.training, m.drop.training)))
    PGD(.1, .03, 2, objective='kl')(model, *digits('train', 4))
    assert seen == [(False,)*3]*3 and model.training

# --- what it costs

@pytest.mark.parametrize('objective, extra', [('ce', 0), ('margin', 0), ('kl', 1)])
def test_work(objective, extra):
    model,(x,y) = net(),digits('train', 8)
    forwards = Forwards(model)
    with Backwards() as backwards: PGD(.1, .03, 7, objective=objective)(model, x, y)
    assert forwards.n == 7 + extra
    weights = [m.weight.data_ptr() for m in (model.conv1, model.conv2)]
    assert dict(backwards.input_only) == {w: 7 for w in weights} and not backwards.full
    assert backwards.mm == 7 # of the linear layer's backward; its weight's gradient would be a second one each

def test_counter_sees_weight_gradients():
    model,(x,y) = net(),digits('train', 8)
    with Backwards() as backwards: F.cross_entropy(model(x.requires_grad_()), y).backward()
    assert sum(backwards.full.values()) == 2 and not backwards.input_only and backwards.mm == 2

def test_noise_asks_no_model():
    class Untouched(nn.Module):
        def forward(self, x): raise AssertionError('called')
    x,y = digits('train', 8)
    assert (random_noise(.1)(Untouched(), x, y) - x).abs().max() <= .1 + 1e-6

# --- how strong it is

@pytest.fixture(scope='module')
def trained():
    seed_all(0)
    model,(x,y) = net(width=16),digits('train', 1400)
    opt = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(5):
        for i in torch.randperm(len(x)).split(64):
            opt.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            opt.step()
    return model.eval()

def accuracies(model, attacks, n=200):
    x,y = digits('test', n)
    return evaluate(model, [(x, y)], attacks, checks=False, progress=False)

def test_strength(trained):
    acc = accuracies(trained, {n: named_attack(n, .06) for n in ('natural', 'noise', 'fgsm', 'pgd10', 'pgd20', 'cw20')})
    noise = .02 # all see the same 200 images; the random starts may decide about four of them
    assert acc['natural'] > .95
    assert acc['natural'] + noise >= acc['noise'] >= acc['fgsm'] + .1 # random noise is far weaker
    assert acc['fgsm'] + noise >= acc['pgd10'] and acc['pgd10'] + noise >= acc['pgd20']
    assert acc['pgd20'] < acc['fgsm'] and abs(acc['cw20'] - acc['pgd20']) < .1

def test_undefended_falls_to_zero(trained):
    acc = accuracies(trained, dict(moderate=PGD(.2, .02, 20), all=PGD(1., .1, 20), l2=PGD(8., .8, 20, norm='l2'), cw=CW(.2, .02)))
    assert max(acc[k] for k in ('moderate', 'all', 'l2', 'cw')) <= .01

def test_undefended_falls_under_kl(trained):
    "KL leaves the model's own prediction and never sees the label, so where an image starts matters: the worst of three starts counts"
    x,y = digits('test', 200)
    right = torch.ones(len(y), dtype=torch.bool)
    for seed in range(3):
        seed_all(seed)
        right &= trained(PGD(.2, .02, 20, objective='kl')(trained, x, y)).argmax(1) == y
    assert right.float().mean() <= .1

def test_accuracy_falls_with_eps(trained):
    acc = [accuracies(trained, dict(a=PGD(eps, eps/5, 10)))['a'] for eps in (.01, .03, .06, .1, .2)]
    assert all(a >= b for a,b in zip(acc, acc[1:])) and acc[0] > .8 and acc[-1] < .05

def test_steps_raise_the_loss(trained):
    x,y = digits('test', 100)
    def loss(steps):
        with torch.no_grad(): return F.cross_entropy(trained(PGD(.05, .01, steps, start='natural')(trained, x, y)), y).item()
    losses = [loss(k) for k in (0, 1, 3, 10, 40)]
    assert all(a < b for a,b in zip(losses, losses[1:]))

# --- pieces

def test_margin():
    z = torch.tensor([[2., 2., 1.], [0., 3., 1.], [5., 1., 1.]], requires_grad=True)
    assert logit_margin(z, torch.tensor([0, 2, 0])).tolist() == [0, 2, -4]
    logit_margin(z, torch.tensor([0, 2, 0])).sum().backward()
    assert z.grad.tolist() == [[-1, 1, 0], [0, 1, -1], [-1, .5, .5]] # two equally wrong logits share

def test_margin_ties_everywhere():
    z = torch.zeros(2, 4, requires_grad=True)
    logit_margin(z, torch.tensor([0, 3])).sum().backward()
    assert z.grad.isfinite().all() and z.grad.sum(1).abs().max() < 1e-6 and z.grad[0,0] == -1

@pytest.mark.parametrize('low, high, ok', [
    (0, 1, True), (-5e-5, 1 + 5e-5, True), (.2, .3, True),
    (-1e-3, 1, False), (0, 1.001, False), (0, 255, False), (-2, 2, False)])
def test_check_images(low, high, ok):
    x = torch.rand(2, 3, 4, 4)
    x[0,0,0,0],x[1,0,0,0] = low,high
    if ok: return check_images(x)
    with pytest.raises(ValueError, match='expected .0, 1.'): check_images(x)

@pytest.mark.parametrize('bad', [float('nan'), float('inf'), -float('inf')])
def test_check_images_not_finite(bad):
    x = torch.rand(2, 3, 4, 4)
    x[1,1,1,1] = bad
    with pytest.raises(ValueError): check_images(x)

def test_check_images_dtype():
    with pytest.raises(ValueError, match='uint8'): check_images(torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    check_images(torch.full((1, 3, 4, 4), -1.), clip=(-1., 1.))

def test_check_labels():
    check_labels(torch.tensor([0, 9]), 10)
    for y in (torch.tensor([0, 10]), torch.tensor([0., 1.]), torch.zeros(2, 10)):
        with pytest.raises(ValueError): check_labels(y, 10)

@pytest.mark.parametrize('y', [-1, -100])
def test_check_negative_labels(y):
    with pytest.raises(ValueError, match=str(y)): check_labels(torch.tensor([0, y]), 10) # -100 would be left out of the loss without a word

@pytest.mark.parametrize('kwargs, match', [
    (dict(eps=0), 'eps=0'), (dict(eps=-.1), 'eps=-0.1'), (dict(eps='8/'), "'8/' is not a size"), (dict(eps=8), 'write 8/255 instead of 8'),
    (dict(alpha=0), 'alpha=0'), (dict(alpha=-1), 'alpha=-1'), (dict(alpha=2), 'write 2/255 instead of 2'),
    (dict(eps=float('nan')), 'eps=nan'), (dict(eps=float('inf')), 'eps=inf'), (dict(alpha=float('nan')), 'alpha=nan'),
    (dict(steps=-1), 'steps=-1'), (dict(steps=1.5), 'steps=1.5'), (dict(norm='linfinity'), 'linf'),
    (dict(objective='cee'), "'ce'"), (dict(start='unifrom'), "'uniform'"), (dict(clip=(1., 0.)), 'low < high')])
def test_bad_settings(kwargs, match):
    with pytest.raises(ValueError, match=match): PGD(**kwargs)

def test_l2_size_is_of_the_whole_image():
    model,(x,y) = net(),digits('train', 4)
    PGD(8., 2., 1, norm='l2')(model, x, y) # at most √3072 = 55
    with pytest.raises(ValueError, match='128/255'): PGD(128., 2., 1, norm='l2')(model, x, y)
