"The standard model under each policy: whose gradient reaches whom, shared warm-ups, trained models, runs to which methods are added"
import copy, dataclasses, itertools, json, re, shutil

import pytest
import timm
import torch
from fastai.callback.core import CancelFitException
from torch import nn
from torch.nn import functional as F

import fastrain.runs.evaluate
from conftest import Call, digit_dls, digits, make_learner, net, quick, quietly, same, snapshot
from fastrain import cli
from fastrain.training.callback import TRAINCallback
from fastrain.training.checkpoint import Checkpoint, averaged_weights, standard_state
from fastrain.core import load_tensors, seed_all
from fastrain.evaluation.evaluate import evaluate
from fastrain.models.features import logits_and_features
from fastrain.pieces.losses import AT, TRADES
from fastrain.training.methods import parse_method, table_rows
from fastrain.models.backbone import create_backbone, load_weights
from fastrain.runs.recipe import make_recipe, recipe_callback, recipe_dls, recipe_learner, recipe_standard
from fastrain.pieces.relations import LBGAT, Topology
from fastrain.evaluation.tables import results_table
from fastrain.runs.evaluate import evaluate_run
from fastrain.runs.run import Run, load_run_model, method_folder, read_run
from fastrain.runs.train import resume_run, train_run
from fastrain.training.schedules import torch_sgd
from fastrain.training.standard import CoTrained, FitInput, Frozen, StandardPolicy, is_trained, trained_standard

# --- which of the two models gets which gradient; all in float64, on one batch

def look(m, x):
    "Logits and features of a `Net`, layer by layer"
    h = m.bn2(m.conv2(m.bn1(m.conv1(x)).relu())).relu()
    f = m.pool(h).flatten(1)
    return m.fc(f),f

def l_tp(std, adv):
    "Equations 9 and 13, pair by pair"
    def graph(f):
        n = len(f)
        d = [[1 - (f[i]@f[j])/(f[i].norm()*f[j].norm()) for j in range(n)] for i in range(n)]
        rho = [min((d[i][j] for i in range(n) if i != j), key=float) for j in range(n)]
        w = [[2 - (d[i][j] - rho[j]) for j in range(n)] for i in range(n)]
        return {(i,j): w[i][j]/sum(w[k][j] for k in range(n) if k != j) for i,j in itertools.permutations(range(n), 2)}
    p,q = graph(std),graph(adv)
    return sum(p[o]*(p[o]/q[o]).log() + (1-p[o])*((1-p[o])/(1-q[o])).log() for o in p)

class Seen:
    "Both models before the first batch, and what they and the batch are when its gradients are complete"
    def __init__(self, policy, relation, robust=AT, lam=3., **kwargs):
        self.std0,self.main0 = net(2).double(),net(1).double()
        std = net(2).double()
        self.cb = TRAINCallback(policy(std, **kwargs), robust=robust(), attack=quick(1), relation=relation, lam=lam)
        main = net(1).double()
        learn = make_learner(digit_dls(n=6, bs=6, double=True), main,
                             [self.cb, Call('before_step', lambda learn: self.keep(main, std), -90)], opt_func=torch_sgd)
        quietly(learn, 1, .05)
        self.after = std
    def keep(self, main, std):
        self.main,self.std,self.v,self.std_training = grads(main),grads(std),self.cb.views,std.training
        raise CancelFitException

def grads(m): return {n: None if p.grad is None else p.grad.clone() for n,p in m.named_parameters()}

def terms(s):
    "The terms of the objectives by name, of the models before the batch, which are in train mode"
    v,(nat,_),(adv,f_adv),(std,f_std) = s.v,look(s.main0, s.v.x),look(s.main0, s.v.x_adv),look(s.std0, s.v.x)
    log_p,log_q = nat.log_softmax(1),adv.log_softmax(1)
    return dict(ce=F.cross_entropy(adv, v.y), ce_nat=F.cross_entropy(nat, v.y), kl=6*(log_p.exp()*(log_p - log_q)).sum(1).mean(),
                std_ce=F.cross_entropy(std, v.y),
                tp=3*l_tp(f_std.detach(), f_adv), tp_both=3*l_tp(f_std, f_adv), mse=((adv - std)**2).mean(),
                mse_adv=((adv - std.detach())**2).mean())

cases = dict( # policy, relation, robust loss; terms that M' learns from, terms that M learns from
    train=(CoTrained, Topology(), AT, 'ce tp', 'std_ce'),
    train_undetached=(CoTrained, Topology(detach=False), AT, 'ce tp', 'std_ce tp_both'),
    train_frozen=(Frozen, Topology(), AT, 'ce tp', ''),
    train_trades=(CoTrained, Topology(), TRADES, 'ce_nat kl tp', 'std_ce'),
    lbgat=(CoTrained, LBGAT(), AT, 'ce mse_adv', 'std_ce mse'),
    lbgat_trades=(CoTrained, LBGAT(), TRADES, 'kl mse_adv', 'std_ce mse'),
    lbgat_detached=(CoTrained, LBGAT(detach=True), AT, 'ce mse_adv', 'std_ce'),
    lbgat_frozen=(Frozen, LBGAT(), AT, 'ce mse_adv', ''),
    both=(CoTrained, [LBGAT(), Topology()], TRADES, 'kl mse_adv tp', 'std_ce mse'),
    both_undetached=(CoTrained, [LBGAT(detach=True), Topology(detach=False)], AT, 'ce mse_adv tp', 'std_ce tp_both'),
    both_frozen=(Frozen, [LBGAT(), Topology()], AT, 'ce mse_adv tp', ''),
    none=(CoTrained, Topology(weight=0), AT, 'ce', 'std_ce'))

@pytest.mark.parametrize('name', cases)
def test_gradients(name):
    policy,relation,robust,main,std = cases[name]
    s = Seen(policy, relation, robust)
    if policy is Frozen: s.std0.eval()
    t = terms(s)
    for model,got,of in ((s.main0, s.main, main), (s.std0, s.std, std)):
        if not of:
            assert all(g is None for g in got.values()) and not s.std_training
            continue
        want = torch.autograd.grad(sum(t[n] for n in of.split()), list(model.parameters()), retain_graph=True)
        for (n,g),w in zip(got.items(), want): torch.testing.assert_close(g, w, rtol=1e-8, atol=1e-12, msg=n)
    # its own, bit for bit, as if it were alone
    if std == 'std_ce': assert same(list(s.std.values()), list(torch.autograd.grad(t['std_ce'], list(s.std0.parameters()))))
    assert same(snapshot(s.after), snapshot(net(2).double())) == (policy is Frozen) # weights and BatchNorm's statistics

def test_frozen_stays_through_training():
    "In eval mode, with statistics, weights and logits as they were; M' still learns from it"
    std,modes = net(2, drop=.5),[]
    before = snapshot(std)
    cb = TRAINCallback(Frozen(std), attack=quick())
    learn = quietly(make_learner(digit_dls(), net(1), [cb, Call('after_loss', lambda l: modes.append(std.training), 90)]), 2, 1e-3)
    assert same(before, snapshot(std)) and len(modes) > 8 and not any(modes)
    assert all(p.grad is None for p in std.parameters()) and cb.standard_learner.opt is None
    plain = quietly(make_learner(digit_dls(), net(1), TRAINCallback(None, attack=quick())), 2, 1e-3)
    assert not same(snapshot(learn.model), snapshot(plain.model))

# --- warm-ups

@pytest.fixture
def alone(monkeypatch):
    "Counts the warm-ups that are trained"
    calls,train = [],StandardPolicy._train_alone
    def counted(self, learn, *args): calls.append(self.warmup); train(self, learn, *args)
    monkeypatch.setattr(StandardPolicy, '_train_alone', counted)
    return calls

def fit(policy, n_epoch=1, cbs=(), seed=0):
    "A trained callback, and what the standard model was before the first batch"
    first = {}
    def keep(learn):
        if not first:
            first.update(model=snapshot(cb.policy.model), opt=cb.standard_learner.opt
                         and copy.deepcopy(cb.standard_learner.opt.state_dict()))
    cb,dls = TRAINCallback(policy, attack=quick()),digit_dls()
    seed_all(seed)
    learn = quietly(make_learner(dls, net(1), [cb, Call('before_batch', keep, -90), *cbs], opt_func=torch_sgd), n_epoch, .05)
    return learn,first

def end(learn): return snapshot(learn.model),snapshot(learn.train_cb.policy.model),[list(v)[:-1] for v in learn.recorder.values]

def test_second_takes_the_first_ones_warmup(tmp_path, alone):
    "Of other weights before it, and with the state of the optimizer"
    file = tmp_path/'sub'/'warm.pt'
    a,first = fit(CoTrained(net(2), warmup=2, seed=5, keep=file))
    written = file.read_bytes()
    b,second = fit(CoTrained(net(3), warmup=2, seed=5, keep=file))
    assert alone == [2] and file.read_bytes() == written
    assert same(first['model'], second['model']) and same(first['opt'], second['opt']) and first['opt']['state'] # momentum
    assert same(end(a), end(b)) and not same(first['model'], snapshot(net(2)))
    c,_ = fit(CoTrained(net(2), warmup=2, seed=5)) # the file changes nothing
    assert same(end(a), end(c)) and alone == [2, 2]

def test_seed_of_the_warmup():
    "Same seed, same dropout, whatever was drawn before; without one, as it comes"
    a,b,c,d,e = (fit(CoTrained(net(2, drop=.5), warmup=1, seed=seed), seed=before)[1]['model'] for seed,
                 before in ((5, 0), (5, 1), (6, 0), (None, 0), (None, 1)))
    assert same(a, b) and not same(a, c) and not same(d, e)

def test_warmup_of_another_model_is_refused(tmp_path):
    fit(CoTrained(net(2), warmup=1, keep=tmp_path/'warm.pt'))
    with pytest.raises(ValueError, match='does not fit'): fit(CoTrained(net(2, width=6), warmup=1, keep=tmp_path/'warm.pt'))

def test_frozen_after_the_warmup_is_cotrained_before_its_first_step(tmp_path, alone):
    "Whichever of the two was trained, and wrote the file that the other takes"
    def pair(std, a, b):
        return fit(CoTrained(std(), warmup=1, seed=5, keep=tmp_path/a)),fit(Frozen(std(), warmup=1, seed=5, keep=tmp_path/b))
    (_,co),(learn,frozen) = pair(lambda: net(2), 'co.pt', 'frozen.pt')
    assert same(co['model'], frozen['model']) and same(snapshot(learn.train_cb.policy.model), frozen['model'])
    assert not same(frozen['model'], snapshot(net(2)))
    (_,other),(again,_) = pair(lambda: net(3), 'frozen.pt', 'co.pt')
    assert same(other, co) and same(end(again), end(learn)) and alone == [1, 1]

@pytest.mark.parametrize('policy', [CoTrained, Frozen])
def test_resumed_without_another_warmup(tmp_path, alone, policy):
    def stop(learn):
        if learn.epoch == 0: raise KeyboardInterrupt
    def run(path, std, *cbs, resume=False):
        return fit(policy(std, warmup=1, seed=5, keep=path/'warm.pt'), 2, [Checkpoint(path, resume=resume), *cbs])[0]
    whole = run(tmp_path/'a', net(2))
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'b', net(2), Call('after_epoch', stop, 99))
    (tmp_path/'b'/'warm.pt').unlink() # it is in the checkpoint
    parts = run(tmp_path/'b', net(3), resume=True)
    assert alone == [1, 1] and not (tmp_path/'b'/'warm.pt').exists() and same(end(whole), end(parts))

# --- the standard model of a recipe

def tiny(**kwargs):
    return make_recipe('digits', **{**dict(epochs=1, warmup=1, n_train=24, n_test=20, holdout=4, bs=8, steps=1, n_valid=4, seed=3),
                                    **kwargs})

@pytest.fixture(scope='module')
def dls(): return recipe_dls(tiny(), 'cpu')

def standard(method, dls, keep=None, **kwargs): return recipe_standard(tiny(**kwargs), dls, parse_method(method), keep)

def test_by_name(dls, tmp_path):
    p = standard('at+train', dls, tmp_path/'warm.pt', lr=.07)
    assert type(p) is CoTrained and p.standard.settings['name'] == 'resnet10t_16'
    assert (p.warmup, p.warmup_lr, p.seed, p.keep, p.follow) == (1, .07, 3, tmp_path/'warm.pt', True)
    p = standard('at+train*', dls, tmp_path/'warm.pt')
    assert type(p) is Frozen and (p.warmup, p.keep) == (1, tmp_path/'warm.pt')
    p = standard('train+cotrained:follow=false', dls, tmp_path/'warm.pt')
    assert type(p) is CoTrained and not p.follow and p.keep == tmp_path/'warm.pt'

@pytest.mark.parametrize('method, warmup', [('lbgat', 0), ('trades+lbgat+train', 0), ('lbgat+cotrained', 0), ('lbgat:detach=true', 1),
    ('lbgat+frozen', 1), ('lbgat+train*', 1), ('lbgat+cotrained:warmup=2', 2), ("train'", 1)])
def test_models_that_grow_up_together(dls, method, warmup):
    "Those of LBGAT, which have no warm-up unless the method asks for one, or M is to be frozen"
    assert standard(method, dls).warmup == warmup

@pytest.mark.parametrize('policy', ['cotrained:warmup=2', 'frozen:warmup=2', 'cotrained:warmup_lr=.01', 'cotrained:seed=4'])
def test_warmup_of_a_methods_own(dls, tmp_path, policy):
    "Is not the one that the others share"
    p = standard(f'at+train+{policy}', dls, tmp_path/'warm.pt')
    name,value = policy.partition(':')[2].split('=')
    assert getattr(p, name) == float(value) and p.keep is None

def test_frozen_needs_a_trained_model(dls):
    with pytest.raises(ValueError, match='frozen needs a standard model that is trained.*--standard'): standard('train*', dls, warmup=0)
    with pytest.raises(ValueError, match='frozen needs'): standard('train+frozen:warmup=0', dls)
    assert standard('train+frozen:warmup=1', dls, warmup=0).warmup == 1 and standard('train', dls, warmup=0).warmup == 0

@pytest.mark.parametrize('policy, match', [('cotrained:warmup=-1', 'warmup=-1'), ('frozen:warmup=1.5', 'warmup=1.5')])
def test_bad_warmup(dls, policy, match):
    with pytest.raises(ValueError, match=match): standard(f'train+{policy}', dls)

# --- a standard model that is already trained

@pytest.fixture(autouse=True, scope='module')
def no_pictures():
    "They take most of the time of a tiny run"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None)
        yield

@pytest.fixture(scope='module')
def run(no_pictures, tmp_path_factory):
    "A run of three methods, one of which averages its weights"
    out = tmp_path_factory.mktemp('runs')/'run'
    train_run(out, tiny(), ['standard', 'at+ema', 'at+train'], 'cpu')
    return out

@pytest.fixture
def copied(run, tmp_path): return shutil.copytree(run, tmp_path/'copied')

def test_is_trained(run, tmp_path):
    for s in (run, str(run), run/'checkpoints'/'standard'/'last.pt', run/'checkpoints'/'warm.pt', 'pretrained:resnet18.a1_in1k'):
        assert is_trained(s)
    for s in ('resnet18', 'resnet18.a1_in1k', tmp_path, run/'checkpoints', tmp_path/'missing.pt'): assert not is_trained(s)

def test_from_a_run_or_a_file(run):
    x,want = digits('test', 4)[0],load_run_model(run, 'standard')[0]
    for source in (run, str(run), run/'checkpoints'/'standard'/'last.pt'):
        model = trained_standard(source, 10, 32)
        assert same(snapshot(model), snapshot(want)) and torch.equal(model.eval()(x), want(x))
    assert same(snapshot(trained_standard(run/'checkpoints'/'standard'/'best.pt', 10, 32)),
                snapshot(load_run_model(run, 'standard', 'best')[0]))
    assert same(snapshot(trained_standard(run/'checkpoints'/'warm.pt', 10, 32)), load_tensors(run/'checkpoints'/'warm.pt')['model'])

def test_refused_sources(run, tmp_path):
    good = run/'checkpoints'/'standard'/'last.pt'
    with pytest.raises(ValueError, match='has 10 classes, but the data have 7'): trained_standard(run, 7, 32)
    with pytest.raises(ValueError, match='checkpoints/standard/last.pt'): trained_standard(tmp_path, 10, 32)
    with pytest.raises(FileNotFoundError, match='missing.pt'): trained_standard(tmp_path/'missing.pt', 10, 32)
    (tmp_path/'cut.pt').write_bytes(good.read_bytes()[:5000])
    with pytest.raises(ValueError, match='cut.pt'): trained_standard(tmp_path/'cut.pt', 10, 32)
    state = load_tensors(good)
    state['model'].popitem()
    torch.save(state, tmp_path/'less.pt')
    with pytest.raises(ValueError, match='1 missing'): trained_standard(tmp_path/'less.pt', 10, 32)

@pytest.mark.parametrize('o', [torch.zeros(3), [1, 2], dict(net(1).state_dict()),
                               dict(settings=dict(name='resnet10t_16', n_classes=10, img_size=32))],
                               ids=['tensor', 'list', 'weights', 'settings'])
def test_file_of_something_else(tmp_path, o):
    torch.save(o, tmp_path/'other.pt')
    with pytest.raises(ValueError, match='other.pt'): trained_standard(tmp_path/'other.pt', 10, 32)

def test_mistyped_path(dls, tmp_path):
    with pytest.raises(FileNotFoundError, match='nothing'): standard('at+train', dls, standard=str(tmp_path/'nothing'))

def test_images_of_another_size(run):
    model,inner = trained_standard(run, 10, 48).eval(),load_run_model(run, 'standard')[0]
    x = torch.rand(4, 3, 48, 48)
    small = F.interpolate(x, (32, 32), mode='bilinear', antialias=True)
    assert isinstance(model, FitInput) and torch.equal(model(x), inner(small))
    for a,b in zip(logits_and_features(model, x), logits_and_features(inner, small)): assert torch.equal(a, b)
    other = FitInput(create_backbone(**inner.settings), 32)
    assert same(snapshot(load_weights(other, dict(model.state_dict()))), snapshot(model)) # as a run is resumed

@pytest.mark.parametrize('policy', [CoTrained, Frozen])
def test_resized_input_in_training(policy):
    "As if M had been given the smaller images"
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = net(2)
        def forward(self, x): return self.inner(F.interpolate(x, (20, 20), mode='bilinear', antialias=True))
    a,b = (quietly(make_learner(digit_dls(), net(1), TRAINCallback(policy(m), attack=quick(1))), 1, 1e-3)
           for m in (FitInput(net(2), 20), Small()))
    assert same(snapshot(a.model), snapshot(b.model))
    assert same(list(snapshot(a.train_cb.policy.model).values()), list(snapshot(b.train_cb.policy.model).values()))
    assert a.recorder.metric_names[-2] == 'std_accuracy'

def test_policy_of_a_trained_model(run, dls):
    "Frozen, unless the method says otherwise; never warmed up"
    want = snapshot(load_run_model(run, 'standard')[0])
    for method,cls in (('at+train', Frozen), ('lbgat', Frozen), ('at+train+frozen', Frozen), ('at+train+cotrained', CoTrained),
                       ("train'+cotrained:follow=false", CoTrained)):
        p = standard(method, dls, 'warm.pt', standard=str(run))
        assert type(p) is cls and p.warmup == 0 and p.keep is None and same(snapshot(p.standard), want)
    with pytest.raises(ValueError, match='would train the standard model.*co-trained'):
        recipe_callback(tiny(standard=str(run)), "at+train'", dls)
    assert recipe_callback(tiny(standard=str(run)), 'trades', dls).policy is None

@pytest.mark.parametrize('method', ['at+train', 'at+train+cotrained'])
def test_trained_with_a_trained_model(run, dls, method):
    learn,want = recipe_learner(tiny(standard=str(run)), method, dls),snapshot(load_run_model(run, 'standard')[0])
    quietly(learn, 1, .05)
    assert same(snapshot(learn.train_cb.policy.model), want) == (method == 'at+train') and learn.recorder.metric_names[-2] == 'std_accuracy'

def test_main_model_does_not_depend_on_where_the_standard_one_is_from(run, dls):
    learners = [(seed_all(1), recipe_learner(tiny(**kwargs), method, dls))[1] for method,
                kwargs in (('at', {}), ('at+train', {}), ('at+train', dict(standard=str(run))))]
    assert all(same(snapshot(l.model), snapshot(learners[0].model)) for l in learners)

# --- one of timm's

@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    "A model of timm's with weights in a local file, for images of 48 pixels and with a normalisation of its own"
    ref = timm.create_model('test_resnet').eval()
    with torch.no_grad():
        for m in ref.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, .1); m.running_var.uniform_(.5, 2); m.weight.uniform_(.5, 1.5); m.bias.normal_(0, .1)
    torch.save(ref.state_dict(), tmp_path/'weights.pth')
    name,create,cfg_of = 'test_resnet.r160_in1k',timm.create_model,timm.get_pretrained_cfg
    mine = dict(input_size=(3,48,48), mean=(.2,.4,.6), std=(.5,.3,.4))
    def make(model, *args, pretrained=False, **kwargs):
        return create(model, *args, pretrained=pretrained, **kwargs,
                      **(dict(pretrained_cfg_overlay=dict(file=str(tmp_path/'weights.pth'))) if pretrained else {}))
    monkeypatch.setattr(timm, 'create_model', make)
    monkeypatch.setattr(timm, 'get_pretrained_cfg', lambda n, *a,
                        **k: dataclasses.replace(cfg_of(n), **mine) if n == name else cfg_of(n, *a, **k))
    def features(x):
        "By hand, of images of any size"
        if x.shape[-1] != 48: x = F.interpolate(x, (48, 48), mode='bilinear', antialias=True)
        mean,std = (torch.tensor(mine[k])[:,None,None] for k in ('mean', 'std'))
        return ref.forward_head(ref.forward_features((x - mean)/std), pre_logits=True)
    return 'pretrained:' + name,ref,features

@pytest.mark.parametrize('size', [32, 48, 64])
def test_pretrained_features(pretrained, size):
    name,ref,features = pretrained
    model,x = trained_standard(name, 10, size).eval(),torch.rand(3, 3, size, size)
    assert isinstance(model, FitInput) == (size != 48)
    with torch.no_grad(): (logits,got),want = logits_and_features(model, x),features(x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, ref.fc(want), rtol=1e-4, atol=1e-5)
    assert logits.shape == (3, 1000) and (got[0] - got[1]).abs().max() > 1e-3

def test_trained_with_a_pretrained_model(pretrained, dls):
    "Topology needs features only; there is nothing to tell of its accuracy on classes that it does not know"
    learn = recipe_learner(tiny(standard=pretrained[0]), 'at+train', dls)
    before = snapshot(learn.model)
    quietly(learn, 1, .05)
    cb = learn.train_cb
    assert isinstance(cb.policy, Frozen) and list(learn.recorder.metric_names)[5:-1] == ['robust_loss', 'l_tp', 'lambda']
    assert 0 < learn.recorder.values[0][learn.recorder.metric_names.index('l_tp') - 1] < 100 and not same(before, snapshot(learn.model))
    assert same(list(snapshot(cb.policy.model).values()), list(snapshot(pretrained[1]).values()))

def test_pretrained_model_that_does_not_fit(pretrained, dls):
    for method,match in (('at+lbgat', r'\(8, 1000\).*\(8, 10\): LBGAT needs the same classes'),
                         ('at+train+cotrained', 'standard model has 1000 outputs.*10 classes')):
        learn = recipe_learner(tiny(standard=pretrained[0]), method, dls)
        before = snapshot(learn.model)
        with pytest.raises(ValueError, match=match): quietly(learn, 1, .05)
        assert all(torch.equal(p, before[n]) for n,p in learn.model.named_parameters())

@pytest.mark.parametrize('name', ['nosuch', 'resnet18.nosuch', 'resnet10t_16', ''])
def test_no_such_pretrained_model(name):
    with pytest.raises((ValueError, RuntimeError), match='pretrained.*' + name.partition('.')[2]):
        trained_standard(f'pretrained:{name}', 10, 32)

# --- runs

def standard_of(out, method): return standard_state(load_tensors(method_folder(out, method)/'last.pt'))['model']

def figure(record, name): return record.get('figures', record)[name]

def contents(folder): return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob('*.pt')}

@pytest.mark.slow
def test_run_with_a_pretrained_model(pretrained, tmp_path):
    "And no `standard` of its own to measure against"
    record, = train_run(tmp_path/'run', tiny(standard=pretrained[0]), ['at+train'], 'cpu')
    assert 0 < figure(record['last'], 'l_tp') < 100 and record['anchor']

@pytest.mark.slow
def test_run_without_a_schedule_of_lambda(tmp_path):
    train_run(tmp_path/'run', tiny(warmup=0), ['at+train:weight=3'], 'cpu')
    assert (tmp_path/'run'/'report.md').is_file()

@pytest.mark.slow
def test_methods_are_added(copied, tmp_path, alone):
    "Nothing is trained twice, and the new ones are what they would have been from the start"
    before,results = contents(copied),json.loads((copied/'results.json').read_text())
    again = resume_run(copied, 'cpu', ["at+train'", 'at+train', 'Vanilla AT + TRAIN*'])
    assert again[:3] == results
    assert [r['method'] for r in again] == ['standard', 'at+ema', 'at+train', "at+train'", 'Vanilla AT + TRAIN*'] == read_run(copied)[1]
    after = contents(copied)
    assert {f: after[f] for f in before} == before
    new = {f.split('/')[1] for f in after.keys() - before.keys() if f.startswith('checkpoints')}
    assert new == {'at+train_detach=false', 'at+train+frozen'}
    assert alone == [] # from the warm-up of the run
    assert json.loads((copied/'results.json').read_text()) == json.loads(json.dumps(again))
    assert "at+train'" in (copied/'report.md').read_text()
    assert set(re.findall(r'^([^,]+),', (copied/'history.csv').read_text(), re.M)) == {'method', *read_run(copied)[1]}
    train_run(tmp_path/'fresh', tiny(), ["at+train'"], 'cpu')
    (a,std_a),(b,std_b) = ((snapshot(load_run_model(o, "at+train'")[0]), standard_of(o, "at+train'")) for o in (copied, tmp_path/'fresh'))
    assert same(a, b) and same(std_a, std_b) and alone == [1]
    assert resume_run(copied, 'cpu') == again and contents(copied) == after and alone == [1]

def test_duplicates(tmp_path, copied):
    for methods in (['at', 'Vanilla AT'], ['at+train', 'Vanilla AT + Ours'], ['trades*', 'standard', 'TRADES']):
        with pytest.raises(ValueError, match='are the same method'): train_run(tmp_path/'new', tiny(), methods, 'cpu')
    assert not (tmp_path/'new').exists()
    settings = (copied/'settings.json').read_bytes()
    with pytest.raises(ValueError, match='are the same method'): Run(copied).add(['trades', 'TRADES*'])
    assert (copied/'settings.json').read_bytes() == settings
    assert Run(copied).add(['at+train', 'standard']).methods == ['standard', 'at+ema', 'at+train']

@pytest.mark.parametrize('method', ['Vanilla AT + TRAIN', 'AT+EMA', 'Standard*'])
def test_same_method_by_another_name_is_not_added(copied, method):
    try: Run(copied).add([method])
    except ValueError: pass
    assert read_run(copied)[1] == ['standard', 'at+ema', 'at+train']

@pytest.mark.parametrize('method', ['tardes', 'at+trades', 'at+las:net=nosuch', 'at+train+frozen:warmup=0', 'at+train+cotrained:warmup=-1'])
def test_method_that_cannot_be_added(copied, method):
    "Leaves the run as it was, to be resumed without it"
    before,files = (copied/'settings.json').read_bytes(),contents(copied)
    with pytest.raises(ValueError): resume_run(copied, 'cpu', [method])
    assert (copied/'settings.json').read_bytes() == before and contents(copied) == files

def test_folders():
    names = [*table_rows, 'at', "at+train'", 'at+train*', 'at+train', 'trades:beta=.5+train', 'trades:beta=5+train', 'las:net=a/b',
             r'TRADES $(\beta = 6.0)$ + LBGAT']
    folders = [method_folder('run', n) for n in names]
    assert len(set(folders)) == len(names)
    assert all(f.parent.name == 'checkpoints' and re.fullmatch(r'[\w.+=,-]{1,100}', f.name) for f in folders)
    joint,frozen = (method_folder('run', f'Vanilla AT + TRAIN{sign}').name for sign in "'*")
    assert joint != frozen == method_folder('run', 'at+train+frozen').name

def test_averaged_weights(run, dls):
    "Are evaluated in a row of their own"
    assert Run(run).has_average('at+ema') and not Run(run).has_average('at+train') and not Run(run).has_average('standard')
    model,epoch = load_run_model(run, 'at+ema', 'average')
    state = load_tensors(method_folder(run, 'at+ema')/'last.pt')
    assert epoch == 1 and not model.training
    assert same(dict(snapshot(model)), dict(averaged_weights(state)))
    assert not same(snapshot(model), snapshot(load_run_model(run, 'at+ema')[0]))
    results = json.loads((run/'results.json').read_text())
    record = next(r for r in results if r['method'] == 'at+ema')
    assert ['average' in r for r in results] == [False, True, False] and record['average']['epoch'] == 1
    assert record['average'] != record['last']
    got = evaluate(model, dls, dict(natural=None, pgd20=tiny().eval_attack('pgd20')), seed=3, progress=False)
    for k in ('natural', 'pgd20'): assert figure(record['average'], k) == got.figures[k]
    assert list(results_table(results).index) == ['standard', 'at+ema', 'at+ema, averaged weights', 'at+train']
    assert 'averaged weights' in (run/'report.md').read_text()
    assert list(results_table(results, 'best').index) == ['standard', 'at+ema', 'at+train']

@pytest.mark.slow
def test_averaged_weights_evaluated_again(copied):
    again = evaluate_run(copied, ('natural',), device='cpu')
    assert [('average' in r) for r in again] == [False, True, False]
    kept = json.loads((copied/'results.json').read_text())
    assert figure(again[1]['average'], 'natural') == figure(kept[1]['average'], 'natural')

def test_no_averaged_weights(run):
    with pytest.raises(ValueError, match='average'): load_run_model(run, 'at+train', 'average')

@pytest.mark.slow
def test_standard_on_the_command_line(run, tmp_path, capsys):
    args = dict(epochs=1, n_train=24, n_test=20, holdout=4., bs=8, steps=1, device='cpu')
    cli.train(method='at+train', out=str(tmp_path/'new'), standard=str(run), **args)
    assert read_run(tmp_path/'new')[0].standard == str(run)
    assert same(standard_of(tmp_path/'new', 'at+train'), dict(snapshot(load_run_model(run, 'standard')[0])))
    assert 0 < json.loads((tmp_path/'new'/'results.json').read_text())[0]['last']['figures']['l_tp'] < 100
    cli.train(method='at,at+train', out=str(tmp_path/'new'), resume=True, device='cpu')
    assert read_run(tmp_path/'new')[1] == ['at+train', 'at'] and not (tmp_path/'new'/'checkpoints'/'warm.pt').exists()
    assert 'at+train' in capsys.readouterr().out
