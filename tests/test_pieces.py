"How pieces are combined: what is refused, weights and places of relation terms, modules of a piece's own, notes, and plans of the attack"
import copy

import pytest
import torch
from fastai.callback.schedule import * # noqa: F403  fit_one_cycle, lr_find
from fastai.callback.training import GradientAccumulation, GradientClip
from fastai.optimizer import Adam
from torch import nn
from torch.nn import functional as F

from conftest import Call, digit_dls, digits, make_learner, net, quick, quietly, same, snapshot
from fastrain.attacks.pgd import PGD, Plan, norms
from fastrain.training.callback import TRAINCallback
from fastrain.core import fork_rng, seed_all
from fastrain.models.features import n_features
from fastrain.pieces.losses import AT, TRADES, GAIRAT, Natural, RobustLoss
from fastrain.pieces.relations import Relation, Topology
from fastrain.training.schedules import LambdaSchedule, torch_sgd
from fastrain.training.standard import Frozen
from fastrain.pieces.strategies import Strategy
from fastrain.pieces.weights import AWP, EMA
from test_resume import check

def fit(cb, n_epoch=2, lr=.05, method='fit', cbs=(), main=None, **kwargs):
    learn = make_learner(digit_dls(), net(1) if main is None else main, [cb, *cbs], opt_func=torch_sgd, wd=5e-4, wd_bn_bias=True, **kwargs)
    seed_all(0)
    return quietly(learn, n_epoch, lr, method)

def column(learn, name): return [v[learn.recorder.metric_names.index(name) - 1] for v in learn.recorder.values]

class Gap(Relation):
    "Squared distance of the logits of M'(x') and M(x)"
    term,needs = 'gap',('std', 'adv')
    def __init__(self, weight=None, term='gap'): self.weight,self.term = weight,term
    def __call__(self, v): return F.mse_loss(v.adv.logits, v.std.logits.detach())

class InPlace(Gap):
    "And in the place of what may be replaced"
    def drops(self, robust): return robust.replaceable

class Joint(Gap): joint = True

class Still(Strategy):
    "Leaves everything as the attack has it, and notes the labels"
    def __init__(self): self.after = []
    def plan(self, model, v, attack): return Plan(notes=dict(tag=2*v.y))
    def attacked(self, step):
        v = step.views
        self.after.append((v.pct, torch.equal(v.notes['tag'], 2*v.y), v.x_adv.shape == v.x.shape))

# --- what is refused, with the reason

class NeedsStd(RobustLoss): needs = ('adv', 'std')

refusals = dict(
    relation_without_attack=(lambda: TRAINCallback(net(), robust=Natural()),
                             r'Topology.*adversarial images, but Natural \(standard\) makes none'),
    strategy_without_attack=(lambda: TRAINCallback(None, robust=Natural(), strategy=Still()),
                             r'Still.*adversarial images, but Natural \(standard\) makes none'),
    two_strategies=(lambda: TRAINCallback(None, robust=GAIRAT(), strategy=Still()), r'GAIRAT.*brings a strategy of its own, which Still'),
    relation_without_standard=(lambda: TRAINCallback(None, relation=Topology()), r'Topology.*needs a standard model'),
    robust_without_standard=(lambda: TRAINCallback(None, robust=NeedsStd()), r'NeedsStd.*needs a standard model'),
    same_term=(lambda: TRAINCallback(net(), relation=[Gap(), Topology(), Gap(1.)]), "two relation terms 'gap'"),
    joint_and_frozen=(lambda: TRAINCallback(Frozen(net()), relation=[Topology(), Joint()]), r'Joint.*would train the standard model'),
    undetached_and_frozen=(lambda: TRAINCallback(Frozen(net()), relation=Topology(detach=False)),
                           r'Topology.*would train the standard model'))

@pytest.mark.parametrize('name', refusals)
def test_refused(name):
    make,match = refusals[name]
    with pytest.raises(ValueError, match=match): make()

@pytest.mark.parametrize('make', [lambda: TRAINCallback(net(), relation=[Gap(), Topology()]),
                                  lambda: TRAINCallback(net(), relation=[Gap(), Gap(term='other')]), lambda: TRAINCallback(Frozen(net())),
    lambda: TRAINCallback(net(), relation=[Joint()]), lambda: TRAINCallback(net(), robust=NeedsStd()),
    lambda: TRAINCallback(None, robust=GAIRAT()), lambda: TRAINCallback(net(), robust=Natural(), relation=False),
    lambda: TRAINCallback(None, robust=TRADES(), strategy=Still())])
def test_not_refused(make): make()

@pytest.mark.parametrize('relation, terms', [(None, ['l_tp']), (False, []), (Gap(), ['gap']),
                                             ([Gap(), Topology()], ['gap', 'l_tp']), ((), [])])
def test_relations(relation, terms): assert [r.term for r in TRAINCallback(net(), relation=relation).relations] == terms

def test_what_is_looked_at():
    "Views and features that no piece needs are not made"
    def look(learn):
        if not learn.training: return
        v = learn.train_cb.views
        seen.append({n for n in ('nat', 'adv', 'std') if getattr(v, n) is not None})
        if any(o is not None and o.features is not None for o in (v.nat, v.adv)): seen[-1].add('features')
    for cb,want in ((TRAINCallback(None, attack=quick()), {'adv'}),
                    (TRAINCallback(None, robust=TRADES(), attack=quick()), {'nat', 'adv'}),
                    (TRAINCallback(None, robust=Natural()), {'nat'}),
                    (TRAINCallback(net(2), attack=quick(), relation=Gap()), {'adv', 'std'}),
                    (TRAINCallback(net(2), attack=quick()), {'adv', 'std', 'features'})):
        seen = []
        fit(cb, 1, cbs=[Call('after_loss', look, 90)])
        assert seen == [want]*4

# --- names of terms

class Remembering(Gap):
    "Counts its batches"
    def __init__(self, term):
        super().__init__(1., term)
        self.n = 0
    def __call__(self, v):
        self.n += 1
        return super().__call__(v)
    def state_dict(self): return dict(n=self.n)
    def load_state_dict(self, state): self.n = state['n']

@pytest.mark.parametrize('term', ['average', 'robust', 'strategy', 'perturb', 'attack'])
def test_term_may_be_called_as_a_family(tmp_path, term):
    "Its state is its own, beside that of the piece of that family"
    def cb(): return TRAINCallback(net(2), attack=quick(), relation=Remembering(term), average=EMA(), perturb=AWP(.01))
    learn = fit(cb())
    assert min(column(learn, term)) > 0 and learn.train_cb.relations[0].n == 8
    state = copy.deepcopy(learn.train_cb.state_dict())
    assert state['pieces'].keys() == {'average', f'relations.{term}'}
    other = fit(cb(), 0)
    other.train_cb.load_state_dict(state)
    assert other.train_cb.relations[0].n == 8 and same(state, other.train_cb.state_dict())

@pytest.mark.parametrize('term', ['robust_loss', 'lambda', 'std_accuracy', 'accuracy', 'std_loss', 'valid_loss'])
def test_term_of_another_column(term):
    with pytest.raises(ValueError, match=f"'{term}', which is another column"): TRAINCallback(net(2), relation=Gap(term=term))

@pytest.mark.parametrize('term', ['ema_accuracy', 'mine'])
def test_term_of_a_column_of_this_learner(term):
    def mine(inp, target): return inp.sum()
    cb = TRAINCallback(net(2), attack=quick(), relation=Gap(term=term), average=EMA())
    with pytest.raises(ValueError, match=f"'{term}', which is another column"): fit(cb, metrics=[mine])

# --- weights of the terms

def terms_of(cb, **kwargs):
    rows = []
    def keep(learn):
        if learn.training:
            rows.append({k: t.item() for k,t in cb.terms.items()} | dict(loss=learn.loss.item(), lam=cb.lam(learn.pct_train, learn.epoch)))
    return fit(cb, cbs=[Call('after_loss', keep, 90)], **kwargs),rows

def test_constant_weight_beside_lambda():
    cb = TRAINCallback(net(2), attack=quick(), relation=[Gap(.3), Topology()], lam=LambdaSchedule(4., 'ramp'))
    learn,rows = terms_of(cb)
    assert len({r['lam'] for r in rows}) == 8
    for r in rows: assert r['loss'] == pytest.approx(r['ce'] + .3*r['gap'] + r['lam']*r['l_tp'], rel=1e-6)
    assert list(learn.recorder.metric_names[4:-1]) == ['robust_loss', 'gap', 'l_tp', 'lambda', 'std_accuracy']
    for n,k in (('robust_loss', 'ce'), ('gap', 'gap'), ('l_tp', 'l_tp')):
        assert column(learn, n)[1] == pytest.approx(sum(r[k] for r in rows[4:])/4, rel=1e-5)

def test_constant_weight_is_a_constant_lambda():
    a,b,c = (fit(TRAINCallback(net(2), attack=quick(), relation=Gap(w), lam=lam)) for w,lam in ((.5, 100.), (None, .5), (.7, .5)))
    assert same(snapshot(a.model), snapshot(b.model)) and not same(snapshot(a.model), snapshot(c.model))
    assert 'lambda' in b.recorder.metric_names and 'lambda' not in a.recorder.metric_names # shown where it is used

def test_weight_0_measures_only():
    a,b = (fit(cb) for cb in (TRAINCallback(net(2), attack=quick(), relation=[Gap(0.), Topology(weight=0)]),
                              TRAINCallback(None, attack=quick())))
    assert same(snapshot(a.model), snapshot(b.model)) and min(column(a, 'gap') + column(a, 'l_tp')) > 0

@pytest.mark.parametrize('robust, left', [(TRADES, ['kl', 'gap']), (AT, ['ce', 'gap'])])
def test_term_in_the_place_of_another(robust, left):
    learn,rows = terms_of(TRAINCallback(net(2), robust=robust(), attack=quick(), relation=InPlace(1.)))
    for r in rows:
        assert [k for k in r if k in ('ce', 'kl', 'gap')] == left
        assert r['loss'] == pytest.approx(sum(r[k] for k in left), rel=1e-6)
    assert column(learn, 'robust_loss')[0] == pytest.approx(sum(r[left[0]] for r in rows[:4])/4, rel=1e-5)

# --- modules of a piece's own

class Mapped(Relation):
    "Squared distance of the features, those of M' being mapped"
    term,needs = 'mapped',('std', 'adv', 'features')
    def __init__(self, weight=1., width=None): self.weight,self.width,self.made = weight,width,0
    def setup(self, training):
        if self.module is not None: return
        self.made += 1
        with fork_rng(5): self.module = nn.Linear(n_features(training.model), n_features(training.standard))
    def __call__(self, v):
        return F.mse_loss(self.module(v.adv.features.to(self.module.weight)), v.std.features.detach().to(self.module.weight))
    def state_dict(self): return self.module.state_dict()
    def load_state_dict(self, state): self.module.load_state_dict(state)

def with_module(weight=1.): return TRAINCallback(net(2), attack=quick(), relation=[Topology(), Mapped(weight)])
def module(learn): return learn.train_cb.pieces['relations.mapped'].module

@pytest.mark.parametrize('method', ['fit', 'fit_one_cycle'])
@pytest.mark.parametrize('clip', [False, True])
def test_module_is_trained(method, clip):
    "As by torch's SGD with the learning rate, momentum, weight decay and clipping of M'"
    grads,states,hypers = [],[],[]
    def before(learn): grads.append([p.grad.clone() for p in module(learn).parameters()])
    def after(learn):
        states.append(snapshot(module(learn)))
        hypers.append({k: float(learn.opt.hypers[-1][k]) for k in ('lr', 'mom')})
        assert all(p.grad is None or not p.grad.any() for p in module(learn).parameters())
    learn = fit(with_module(), method=method, cbs=[Call('before_step', before, -90, 'a'), Call('after_step', after, 90, 'b'),
                                                   *([GradientClip(.01)] if clip else [])])
    with fork_rng(5): want = nn.Linear(256, 256)
    opt = torch.optim.SGD(want.parameters(), .05, momentum=.9, weight_decay=5e-4)
    assert len(grads) == 8 and (len({h['lr'] for h in hypers}) > 4) == (method == 'fit_one_cycle')
    for g,state,h in zip(grads, states, hypers):
        for p,t in zip(want.parameters(), g): p.grad = t
        if clip: nn.utils.clip_grad_norm_(want.parameters(), .01)
        opt.param_groups[0].update(lr=h['lr'], momentum=h['mom'])
        opt.step()
        for k,v in want.state_dict().items(): torch.testing.assert_close(state[k], v, rtol=1e-5, atol=1e-7)
    assert not same(states[0], states[-1])

def test_module_leaves_the_rest_alone():
    "Its relation without weight: M' and M as without the piece, and the module not trained"
    a,b = fit(with_module(0.)),fit(TRAINCallback(net(2), attack=quick()))
    assert same(snapshot(a.model), snapshot(b.model))
    assert same(snapshot(a.train_cb.standard_learner.model), snapshot(b.train_cb.standard_learner.model))
    with fork_rng(5): assert same(snapshot(module(a)), nn.Linear(256, 256).state_dict())
    c = fit(with_module())
    assert not same(snapshot(a.model), snapshot(c.model))
    assert same(snapshot(a.train_cb.standard_learner.model), snapshot(c.train_cb.standard_learner.model))

def test_module_is_made_once():
    learn = fit(with_module(), 1)
    side,before = learn.train_cb._side,snapshot(module(learn))
    with learn.no_bar(), learn.no_logging(): learn.validate()
    assert same(before, snapshot(module(learn)))
    quietly(learn, 1, .05)
    assert learn.train_cb.pieces['relations.mapped'].made == 1 and learn.train_cb._side is side
    assert not same(before, snapshot(module(learn)))

def test_module_and_accumulation():
    "Stepped when M' is"
    changed = []
    def after(learn):
        if learn.training: changed.append(not same(seen[-1], snapshot(module(learn))))
    seen = []
    fit(with_module(), 1, cbs=[GradientAccumulation(16), Call('before_batch', lambda l: seen.append(snapshot(module(l))), 90, 'a'),
                               Call('after_batch', after, 90, 'b')])
    assert changed == [False, True, False, True]

def test_module_and_lr_find():
    learn = fit(with_module(), 1)
    before,opt = snapshot(module(learn)),copy.deepcopy(learn.train_cb._side.opt.state_dict()['state'])
    with learn.no_bar(), learn.no_logging(): learn.lr_find(num_it=6, show_plot=False)
    assert same(before, snapshot(module(learn))) and same(opt, learn.train_cb._side.opt.state_dict()['state'])

@pytest.mark.parametrize('opt_func', [torch_sgd, pytest.param(Adam, marks=pytest.mark.slow)])
def test_module_resumed(tmp_path, opt_func):
    whole,parts = check(tmp_path, with_module, opt_func=opt_func)
    a,b = (learn.train_cb for learn in (whole, parts))
    assert same(snapshot(module(whole)), snapshot(module(parts))) and same(a._side.opt.state_dict(), b._side.opt.state_dict())
    for f in ('last.pt', 'best.pt'):
        assert 'weight' in torch.load(tmp_path/'b'/'ckpt'/f, weights_only=True)['callbacks']['train_cb']['pieces']['relations.mapped']

# --- plans and notes reach where they should

class Noted(RobustLoss):
    "AT, which looks at what was noted"
    def __init__(self): self.seen = []
    def __call__(self, v):
        self.seen.append(v.notes.get('tag'))
        return dict(ce=F.cross_entropy(v.adv.logits, v.y))

class Planned(Noted):
    def __init__(self): super().__init__(); self.calls = []
    def plan(self, model, v, attack):
        self.calls.append((model.training, v.epoch, v.epochs, attack.steps, v.x_adv is None))
        return Plan(notes=dict(tag=2*v.y), steps=torch.zeros_like(v.y))

def test_notes_of_a_strategy():
    robust,strategy,labels = Noted(),Still(),[]
    learn = fit(TRAINCallback(None, robust=robust, strategy=strategy, attack=quick()),
                cbs=[Call('before_batch', lambda l: l.training and labels.append(l.yb[0].clone()), 90)])
    assert len(robust.seen) == 8 and all(torch.equal(t, 2*y) for t,y in zip(robust.seen, labels))
    assert strategy.after == [(pytest.approx(i/8), True, True) for i in range(8)]
    assert same(snapshot(learn.model), snapshot(fit(TRAINCallback(None, attack=quick())).model)) # an empty plan changes nothing

def test_plan_of_a_loss():
    robust,adv = Planned(),[]
    fit(TRAINCallback(None, robust=robust, attack=quick(start='natural')),
        cbs=[Call('before_batch', lambda l: l.training and adv.append(torch.equal(l.xb[0], l.train_cb.views.x)), 90)])
    assert robust.calls == [(True, e, 2, 2, True) for e in (0, 1) for _ in range(4)]
    assert adv == [True]*8 and all(t is not None for t in robust.seen) # no steps were planned

def test_no_plan_no_notes():
    robust = Noted()
    fit(TRAINCallback(None, robust=robust, attack=quick()), 1)
    assert robust.seen == [None]*4

def test_strategy_comes_before_the_loss():
    class Two(Planned): plan = RobustLoss.plan
    robust = Two()
    fit(TRAINCallback(None, robust=robust, strategy=Still(), attack=quick(), perturb=AWP(.1)), 1)
    assert robust.calls == [] and len(robust.seen) == 8 and all(t is not None for t in robust.seen)

# --- plans in PGD

sizes = dict(linf=(torch.tensor([.1, .02, .3, .05, .1, .2]), torch.tensor([.03, .01, .05, .02, .004, .1])),
             l2=(torch.tensor([1.5, .3, 3., 1., 2., 1.]), torch.tensor([.4, .1, .9, .2, .05, .7])))
steps = torch.tensor([3, 1, 5, 0, 5, 2])

def start_somewhere(x, eps, norm, clip):
    "Within the ball, and the same each time"
    delta = torch.sin(50*x + 1)
    return (x + .5*eps*delta/norm.size(delta).view(-1, 1, 1, 1)).clamp(*clip)

def data(n=6): return net(drop=.5).double(),*(t.double() if t.is_floating_point() else t for t in digits('train', n))
def one_by_one(model, x, y, make, **kwargs): return torch.cat([make(i)(model, x[i:i+1], y[i:i+1], **kwargs) for i in range(len(x))])

@pytest.mark.parametrize('varied', ['eps', 'alpha', 'steps', 'eps alpha', 'eps alpha steps'])
@pytest.mark.parametrize('objective', ['ce', 'kl', 'margin'])
@pytest.mark.parametrize('norm', sizes)
def test_sizes_of_each_image(norm, objective, varied):
    "As if each image were attacked alone with its own settings"
    model,x,y = data()
    eps,alpha = (t.double() for t in sizes[norm])
    own = {k: t for k,t in dict(eps=eps, alpha=alpha, steps=steps).items() if k in varied.split()}
    common = dict(eps=.1, alpha=.03, steps=4) if norm == 'linf' else dict(eps=1.5, alpha=.4, steps=4)
    kwargs = dict(norm=norm, objective=objective, start=start_somewhere)
    got = PGD(**common, **kwargs)(model, x, y, plan=Plan(**own))
    want = one_by_one(model, x, y, lambda i: PGD(**common | {k: t[i].item() for k,t in own.items()}, **kwargs))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    plain = PGD(**common, **kwargs)(model, x, y)
    assert (got - plain).flatten(1).abs().amax(1).max() > 1e-3
    ball = own.get('eps', torch.full((6,), common['eps'], dtype=torch.float64))
    assert (norms[norm].size(got - x) <= ball + 1e-12).all() and not got.requires_grad

def reference(model, x, y, attack, plan, go=None):
    "One image at a time; `go(logits, y, t)` says whether it steps on"
    model = copy.deepcopy(model).eval()
    out,forwards = [],[]
    for i in range(len(x)):
        a,c = x[i:i+1],y[i:i+1]
        z,n = start_somewhere(a, attack.eps, norms['linf'], (0, 1)),0
        for t in range(attack.steps if plan.steps is None else plan.steps[i].item()):
            z = z.detach().requires_grad_()
            logits,n = model(z),n + 1
            if go and not go(logits[0], c.item(), t): break
            g, = torch.autograd.grad(F.cross_entropy(logits, c), z)
            z = (z.detach() + attack.alpha*g.sign()).clamp(a - attack.eps, a + attack.eps).clamp(0, 1)
        out.append(z.detach())
        forwards.append(n)
    return torch.cat(out),forwards

rules = dict(parity=lambda logits, y, t: t < 3 + y % 3, margin=lambda logits, y, t: logits[y] > logits.mean(), never=lambda logits,
             y, t: False, always=lambda logits, y, t: True,
             first_only=lambda logits, y, t: t == 0, even=lambda logits, y, t: y % 2 == 0)

@pytest.mark.parametrize('with_steps', [False, True])
@pytest.mark.parametrize('rule', rules)
def test_moves(rule, with_steps):
    "An image that stops stays as it is, and is not looked at again"
    model,x,y = data()
    attack,plan,seen,batches = PGD(.2, .03, 5, start=start_somewhere),Plan(steps=steps if with_steps else None),[],[]
    def moves(t, logits, at):
        assert not logits.requires_grad
        who = torch.arange(6)[at]
        seen.extend(who.tolist())
        return torch.tensor([rules[rule](z, y[i].item(), t) for z,i in zip(logits, who)])
    want,forwards = reference(model, x, y, attack, plan, rules[rule])
    plan.moves = moves
    handle = model.register_forward_pre_hook(lambda m, inp: batches.append(len(inp[0])))
    got = attack(model, x, y, plan=plan)
    handle.remove()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    assert [seen.count(i) for i in range(6)] == forwards and sum(batches) == sum(forwards)
    if rule in ('parity', 'even', 'margin'): assert len(set(forwards)) > 1

def test_moves_of_none_go_on():
    model,x,y = data()
    attack,looked = PGD(.2, .03, 5, start=start_somewhere),[]
    got = attack(model, x, y, plan=Plan(moves=lambda t, logits, at: looked.append((t, len(logits), at is ...))))
    assert torch.equal(got, attack(model, x, y)) and looked == [(t, 6, True) for t in range(5)]

@pytest.mark.parametrize('start', ['uniform', 'gaussian', 'natural', 'uniform_unclipped'])
def test_empty_plan_is_none(start):
    model,x,y = data()
    runs = []
    for plan in (None, Plan()):
        with fork_rng(3): runs.append(PGD(.1, .03, 3, start=start)(model, x, y, plan=plan))
    assert torch.equal(*runs)

@pytest.mark.parametrize('norm', sizes)
@pytest.mark.parametrize('each', [False, True])
def test_start_of_another_size(norm, each):
    model,x,y = data()
    eps,wide = (.05, .2) if norm == 'linf' else (.5, 2.)
    start_eps = torch.linspace(.5, 1, 6, dtype=torch.float64)*wide if each else wide
    attack = PGD(eps, eps/4, 3, norm=norm, start='uniform')
    with fork_rng(3): got = attack(model, x, y, plan=Plan(start_eps=start_eps))
    def start(x, eps, norm, clip): return (x + norm.sample(x, start_eps.view(-1, 1, 1, 1) if each else wide)).clamp(*clip)
    with fork_rng(3): want = PGD(eps, eps/4, 3, norm=norm, start=start)(model, x, y)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (norms[norm].size(got - x) <= eps + 1e-12).all()
    with fork_rng(3): assert not torch.allclose(got, attack(model, x, y))
    with fork_rng(3):
        own = attack(model, x, y, plan=Plan(eps=torch.full((6,), 2*eps, dtype=torch.float64), steps=torch.zeros(6, dtype=torch.long)))
    # the ball of the plan, where it names no start
    with fork_rng(3): torch.testing.assert_close(own, (x + norms[norm].sample(x, 2*eps)).clamp(0, 1))

@pytest.mark.parametrize('norm', sizes)
def test_clamped_at_the_end(norm):
    model,x,y = data()
    eps,small = (.2, .05) if norm == 'linf' else (2., .5)
    attack = PGD(eps, eps/4, 5, norm=norm, start=start_somewhere)
    got,free = attack(model, x, y, plan=Plan(clamp=small)),attack(model, x, y)
    for a,b,o in zip(got, free, x):
        d = b - o
        d = d.clamp(-small, small) if norm == 'linf' else d*min(1, small/d.norm().item())
        torch.testing.assert_close(a, (o + d).clamp(0, 1), rtol=0, atol=1e-12)
    assert norms[norm].size(free - x).min() > small

def test_noise():
    model,x,y = data()
    attack = PGD(.1, .03, 4, start=start_somewhere)
    with fork_rng(3): got = attack(model, x, y, plan=Plan(noise=.02))
    z = start_somewhere(x, .1, norms['linf'], (0, 1))
    model.eval()
    with fork_rng(3):
        for _ in range(4):
            z = z.detach().requires_grad_()
            g, = torch.autograd.grad(F.cross_entropy(model(z), y, reduction='sum'), z)
            z = (z.detach() + .03*g.sign() + .02*torch.randn_like(x)).clamp(x - .1, x + .1).clamp(0, 1)
    torch.testing.assert_close(got, z, rtol=0, atol=1e-10)
    assert not torch.allclose(got, attack(model, x, y))

@pytest.mark.parametrize('start', ['natural', lambda x, eps, norm, clip: x])
@pytest.mark.parametrize('plan', [Plan(), Plan(steps=steps), Plan(moves=lambda t, logits, at: torch.arange(len(logits)) % 2 == 0),
                                  Plan(noise=.1, clamp=.01), Plan(eps=sizes['linf'][0], alpha=sizes['linf'][1], steps=steps)])
def test_nothing_given_is_changed(start, plan):
    model,x,y = data()
    before,state = (x.clone(), y.clone(), *(t.clone() for t in (plan.eps, plan.alpha, plan.steps) if t is not None)),snapshot(model)
    got = PGD(.2, .05, 4, start=start)(model.train(), x, y, plan=plan)
    assert all(torch.equal(*o) for o in zip(before, (x, y, *(t for t in (plan.eps, plan.alpha, plan.steps) if t is not None))))
    assert same(state, snapshot(model)) and model.training and not x.requires_grad and not torch.equal(got, x)

def test_nobody_steps():
    model,x,y = data()
    batches = []
    model.register_forward_pre_hook(lambda m, inp: batches.append(len(inp[0])))
    assert torch.equal(PGD(.2, .05, 4, start='natural')(model, x, y, plan=Plan(steps=torch.zeros(6, dtype=torch.long))), x)
    assert batches == []
