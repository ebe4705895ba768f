"Options of speed change how a training computes, and not what comes out; their choice by measurement keeps to what is asked for"
import copy, json

import pytest
import torch
from fastai.callback.channelslast import ChannelsLast
from torch import nn

from conftest import Call, Net, digit_dls, digits, hooks, make_learner, net, quick, quietly, same, snapshot
from fastrain.attacks.pgd import PGD, Plan
from fastrain.core import get_rng_state, read_json, seed_all
from fastrain.evaluation.evaluate import evaluate
from fastrain.models.backbone import create_backbone
from fastrain.pieces.losses import TRADES
from fastrain.pieces.strategies import FAT
from fastrain.runs.recipe import make_recipe
from fastrain.runs.run import Run
from fastrain.runs.train import _choose_speed, start_run, train_method
from fastrain.speed import fast
from fastrain.speed.attacked import Attacked
from fastrain.speed.fast import Trial, choose, choice_text, is_as_strong, machine, take_turns
from fastrain.speed.options import DevicePrecision, Speed
from fastrain.speed.replica import Replica, current, find_pairs, make_replica
from fastrain.training.callback import TRAINCallback
from fastrain.training.schedules import torch_sgd

def moved(model, seed=1):
    "A model with running statistics, scales and shifts that are not those of the start"
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if not isinstance(m, nn.modules.batchnorm._BatchNorm): continue
        for t in (m.weight.data, m.running_var): t.copy_(.5 + torch.rand(t.shape, generator=g))
        for t in (m.bias.data, m.running_mean): t.copy_(torch.randn(t.shape, generator=g)*.1)
    return model

# --- folding

class Odd(nn.Module):
    "Of five convolutions with BatchNorm after them, only the last can be folded"
    def __init__(self):
        super().__init__()
        for i in range(5):
            self.add_module(f'conv{i}', nn.Conv2d(3, 3, 3, padding=1))
            self.add_module(f'bn{i}', nn.BatchNorm2d(3))
        self.fc = nn.Linear(3, 10)
    def forward(self, x):
        z = self.conv0(x)
        x = self.bn0(z) + z # a shortcut
        x = self.bn1(self.conv1(self.conv1(x))) # called twice
        x = self.bn2(self.conv2(x)) + self.bn2(x) # likewise
        x = self.bn3(self.conv3(x).relu()) # something between
        return self.fc(self.bn4(self.conv4(x)).mean((2, 3)))

def test_what_can_be_folded(): assert find_pairs(Odd(), torch.rand(2, 3, 8, 8)) == [('conv4', 'bn4')]

@pytest.mark.parametrize('name, size', [('resnet10t_16', 32), ('preact_resnet18', 16), ('mobilenetv3_small_050', 32), (None, 32)])
def test_folded_model_is_the_model(name, size):
    model = moved(create_backbone(name, 10, img_size=size) if name else Odd()).double()
    x = torch.rand(3, 3, size, size).double()
    before,n_hooks = snapshot(model),hooks(model)
    modes = [m.training for m in model.train().modules()]
    replica = make_replica(model, x, Speed(fold=True))
    assert isinstance(replica, Replica) and len(replica._folds) > 0
    assert same(snapshot(model), before) and hooks(model) == n_hooks and [m.training for m in model.modules()] == modes
    torch.testing.assert_close(replica(x), model.eval()(x), rtol=1e-9, atol=1e-11)
    moved(model, seed=2) # in place, as an optimizer does
    torch.testing.assert_close(current(replica)(x), model(x), rtol=1e-9, atol=1e-11)
    assert not any(p.requires_grad for p in replica.net.parameters())

def test_a_replica_follows_new_tensors():
    "As `model.to(device)` and loading with `assign` make them"
    model,x = net().eval(),torch.rand(2, 3, 32, 32)
    replica = make_replica(model, x, Speed(fold=True))
    model.load_state_dict({n: t + .01 for n,t in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(current(replica)(x), model(x))

class Uncopied(Net):
    def __deepcopy__(self, memo): raise TypeError('no copy of me')

def test_a_model_that_cannot_be_copied_is_attacked_as_it_is():
    model = Uncopied()
    with pytest.warns(UserWarning, match='Uncopied is attacked as it is.*no copy of me'):
        assert make_replica(model, torch.rand(2, 3, 32, 32), Speed(fold=True)) is model

def test_weights_are_cast_as_autocast_does():
    model,x = moved(net()).eval(),torch.rand(4, 3, 32, 32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        replica = make_replica(model, x, Speed('bf16'))
        assert replica.net.conv1.weight.dtype == torch.bfloat16 and replica.net.bn1.weight.dtype == torch.float32
        assert torch.equal(replica(x), model(x)) and replica(x).dtype == torch.bfloat16

def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(torch, 'compile', lambda model: lambda x: 1/0)
    model,x = net().eval(),torch.rand(2, 3, 32, 32)
    with pytest.warns(UserWarning, match='torch.compile does not work here.*runs without it') as warned:
        replica = make_replica(model, x, Speed(compile=True))
    assert len(warned) == 1 and torch.equal(replica(x), model(x))

# --- the attack in chunks

def moves(y): return lambda step, logits, at: logits.argmax(1) == y[at]

@pytest.mark.parametrize('plan', [
    lambda y: None, lambda y: Plan(moves=moves(y), noise=.01), lambda y: Plan(steps=1 + torch.arange(len(y)) % 3)])
@pytest.mark.parametrize('objective, norm', [('ce', 'linf'), ('kl', 'linf'), ('margin', 'l2')])
def test_chunks(objective, norm, plan):
    x,y = (t[:11] for t in digits('train', 16))
    model,attack = moved(net()).double(),PGD(.1, .05, 3, norm=norm, objective=objective)
    def adversaries(attack):
        seed_all(3)
        return attack(model, x.double(), y, plan=plan(y))
    torch.testing.assert_close(adversaries(attack.in_chunks(4)), adversaries(attack), rtol=0, atol=1e-12)
    assert attack._chunk is None and attack.in_chunks(4).settings() == attack.settings()

# --- a training

def trained(speed=None, double=True, n_epoch=2, **kwargs):
    seed_all(1)
    cb = TRAINCallback(**{'standard': net(2).double() if double else net(2), 'attack': quick(), **kwargs})
    learn = make_learner(digit_dls(double=double), net(1).double() if double else net(1), cbs=cb, opt_func=torch_sgd)
    learn.recorder.run = False # averages in float32 only
    if speed: learn.to_speed(speed)
    return quietly(learn, n_epoch, .05)

def weights(learn):
    both = learn.model,learn.train_cb.standard_learner.model
    return torch.cat([t.flatten().double() for model in both for t in model.parameters()])

SAME = [Speed(fold=True), Speed(channels_last=True), Speed(chunk=3), Speed(channels_last=True, fold=True, chunk=5)]

@pytest.mark.parametrize('kwargs', [dict(), dict(robust=TRADES()), dict(strategy=FAT())], ids=['at', 'trades', 'fat'])
def test_the_same_training_in_float64(kwargs):
    plain = weights(trained(**copy.deepcopy(kwargs)))
    for speed in SAME:
        learn = trained(speed, **copy.deepcopy(kwargs))
        assert (weights(learn) - plain).abs().max() < 1e-9, speed
        assert learn.train_cb._replica is None # nothing is kept

def test_default_is_the_plain_path():
    assert torch.equal(weights(trained(Speed())), weights(trained()))

def test_bfloat16_on_a_cpu():
    "Both models and the attack compute in bfloat16, weights stay, and the replica changes no bit"
    dtypes = {}
    def watch(learn):
        models = dict(main=learn.model, std=learn.train_cb.standard_learner.model)
        for name,m in models.items(): m.conv2.register_forward_hook(lambda m, i, o, name=name: dtypes.setdefault(name, set()).add(o.dtype))
    def fit(set_up):
        seed_all(1)
        learn = make_learner(digit_dls(), net(1), cbs=TRAINCallback(net(2), attack=quick()), opt_func=torch_sgd)
        return quietly(set_up(learn), 1, .05)
    plain = fit(lambda learn: learn.to_bf16())
    assert same(snapshot(plain.model), snapshot(fit(lambda learn: learn.to_speed(Speed('bf16'))).model))
    assert not same(snapshot(plain.model), snapshot(fit(lambda learn: learn).model))
    quietly(plain, 1, .05, cbs=Call('before_train', watch))
    assert dtypes == dict(main={torch.bfloat16}, std={torch.bfloat16})
    assert {p.dtype for p in plain.model.parameters()} == {torch.float32} and not torch.is_autocast_enabled('cpu')

def test_to_speed_replaces_what_was_set():
    learn = make_learner(digit_dls(), net(), cbs=TRAINCallback(None)).to_speed(Speed('bf16', channels_last=True, fold=True))
    assert [type(cb) for cb in learn.cbs[-2:]] == [DevicePrecision, ChannelsLast] and learn.train_cb.speed.fold
    learn.to_speed()
    assert not any(isinstance(cb, (DevicePrecision, ChannelsLast)) for cb in learn.cbs) and learn.train_cb.speed == Speed()
    with pytest.raises(ValueError, match='needs a GPU'): learn.to_speed(Speed('fp16'))

# --- as strong

def accuracies(speeds, n, steps, model):
    "Of a model that has learned the digits a little, under PGD computed in each way, all judged in float32"
    x,y = (torch.cat(parts)[:n] for parts in zip(digits('test', n), digits('train', n)))
    opt = torch.optim.SGD(model.parameters(), .05, .9)
    for i in range(12):
        batch = slice(50*i % len(y), 50*i % len(y) + 50)
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        opt.step()
        opt.zero_grad()
    trials = [Trial(model, a, b, PGD(.05, .0125, steps)) for a,b in zip(x.split(100), y.split(100))]
    return [100*(1 - sum(t.strength(s)['wrong'] for t in trials)/len(y)) for s in speeds]

def test_accuracy_under_attack():
    plain,*others = accuracies([Speed(), Speed(fold=True), Speed('bf16', channels_last=True, fold=True, chunk=40)], 200, 5, net())
    assert 5 < plain < 95 and all(abs(a - plain) <= 1.01 for a in others), (plain, others)

@pytest.mark.slow
def test_accuracy_under_attack_of_many():
    model = create_backbone('resnet10t_16', 10, img_size=32)
    plain,*others = accuracies([Speed(), *SAME, Speed('bf16'), Speed('bf16', channels_last=True, fold=True)], 1797, 10, model)
    assert 5 < plain < 95 and all(abs(a - plain) <= .3 for a in others), (plain, others)

# --- the choice

def trial(**kwargs):
    x,y = digits('train', 32)
    return Trial(net(), x, y, **{'attack': quick(), **kwargs})

@pytest.fixture
def timed(monkeypatch):
    "Seconds as they are given by `timed['of']`, and counted rounds"
    told = dict(of=lambda speed: 1., weak=())
    monkeypatch.setattr(fast, 'take_turns', lambda tasks, seconds: {k: told['of'](k) if isinstance(k, Speed) else 1. for k in tasks})
    strength = Trial.strength
    def weak(self, speed): return dict(rise=0. if speed.precision in told['weak'] else 1., wrong=5)
    monkeypatch.setattr(Trial, 'strength', weak)
    return told

def chosen(**kwargs): return Speed(**choose(trial(**kwargs))['chosen'])

def test_the_fastest_with_the_fewest_options(timed):
    assert chosen() == Speed()
    timed['of'] = lambda s: 1 - .3*s.fold - .005*s.channels_last
    assert chosen() == Speed(fold=True)
    timed['of'] = lambda s: 1 - .3*s.fold - .3*(s.precision == 'bf16') - .1*(s.chunk == 16)
    assert chosen() == Speed('bf16', fold=True, chunk=16)
    assert chosen(attack=None) == Speed() # nothing is attacked, so there is nothing to fold

def test_what_is_given_by_hand_stays(timed):
    timed['of'] = lambda s: 1 - .3*s.fold - .3*(s.precision == 'bf16') - .1*(s.chunk == 16)
    assert chosen(fixed=dict(precision='fp32')) == Speed(fold=True, chunk=16)
    assert chosen(fixed=dict(fold=False, chunk=5)) == Speed('bf16', chunk=5)
    timed['of'] = lambda s: 1 + s.channels_last
    assert chosen(fixed=dict(channels_last=True)) == Speed(channels_last=True)

def test_weaker_adversaries_are_refused(timed):
    timed.update(of=lambda s: 1 - .3*s.fold - .3*(s.precision == 'bf16'), weak=['bf16'])
    found = choose(trial())
    assert Speed(**found['chosen']) == Speed(fold=True)
    assert 'Refused, as its adversaries are weaker: bf16, fold\n' in choice_text(found)
    timed['weak'] = ['bf16', 'fp32']
    assert Speed(**choose(trial(fixed=dict(precision='bf16')))['chosen']).precision == 'bf16' # by hand

def test_a_precision_that_is_imitated_is_timed_on_a_few_images_alone(timed, monkeypatch):
    asked = []
    def turns(tasks, seconds):
        asked.extend(tasks)
        return {k: 20. if k == 'bf16' else 1. for k in tasks}
    monkeypatch.setattr(fast, 'take_turns', turns)
    found = choose(trial())
    whole = [k.precision if isinstance(k, Speed) else k[0] for k in asked if not isinstance(k, str)]
    assert {*whole} == {'fp32'} and 'bf16' in asked
    assert [r['gain'] for r in found['table'] if r['options'] == 'bf16'] == [pytest.approx(1/20)]
    assert Speed(**found['chosen']) == Speed() and 'bf16' in choice_text(found)
    chosen_by_hand = choose(trial(fixed=dict(precision='bf16')))['chosen']
    assert chosen_by_hand['precision'] == 'bf16'

def test_tolerance():
    plain = dict(rise=1., wrong=50)
    assert is_as_strong(dict(rise=.985, wrong=49), plain, 100) and is_as_strong(dict(rise=2., wrong=100), plain, 100)
    assert not is_as_strong(dict(rise=.97, wrong=50), plain, 100) and not is_as_strong(dict(rise=1., wrong=48), plain, 100)
    assert not is_as_strong(dict(rise=float('nan'), wrong=50), plain, 100)

def test_turns():
    calls,order = dict(a=0, b=0),[]
    def task(name, n):
        def f():
            calls[name] += 1
            order.append(name)
            sum(range(n))
        return f
    found = take_turns(dict(a=task('a', 100), b=task('b', 3_000_000)))
    assert found['a'] < found['b'] and calls == dict(a=6, b=3) and order[:4] == list('abab') # b is far behind after two rounds

# --- a learner

def learner(): return make_learner(digit_dls(), net(1), cbs=TRAINCallback(None, attack=quick()), opt_func=torch_sgd)

def test_to_fast_leaves_no_trace(capsys):
    seed_all(0)
    learn = learner()
    before,rng,order = snapshot(learn.model),get_rng_state(),learn.dls.train.rng.getstate()
    learn.to_fast(seconds=.01)
    assert same(get_rng_state(), rng) and learn.dls.train.rng.getstate() == order and same(snapshot(learn.model), before)
    assert all(p.grad is None for p in learn.model.parameters()) and 'Chosen:' in capsys.readouterr().out
    quietly(learn, 1, .05)

def test_what_was_measured_is_kept(tmp_path, timed, capsys):
    file = tmp_path/'speed.json'
    timed['of'] = lambda s: 1 - .3*s.fold
    assert learner().to_fast(keep=file).train_cb.speed == Speed(fold=True)
    timed['of'] = lambda s: 1 - .3*(s.precision == 'bf16')
    assert learner().to_fast(keep=file).train_cb.speed == Speed(fold=True)
    assert 'as measured before: float32, fold' in capsys.readouterr().out
    found = read_json(file)
    file.write_text(json.dumps(dict(found, machine=dict(found['machine'], processor='another'))))
    assert learner().to_fast(keep=file).train_cb.speed == Speed('bf16')
    assert 'measured on another machine: it is measured again' in capsys.readouterr().out
    assert read_json(file)['machine'] == machine() and read_json(file)['chosen']['precision'] == 'bf16'

def test_a_run_goes_on_as_it_was_measured(tmp_path, timed):
    "All methods are computed alike; a run that is continued ends bit for bit as one that was not interrupted"
    timed['of'] = lambda s: 1 - .3*s.fold - .3*(s.precision == 'bf16')
    recipe = make_recipe(epochs=2, warmup=0, n_train=24, n_test=20, bs=8, steps=2, n_valid=10, fast=True)
    def stop(learn):
        if learn.epoch == 0: raise KeyboardInterrupt
    for name in 'ab':
        _choose_speed(run := start_run(tmp_path/name, recipe, ['standard', 'at'], 'cpu'))
        if name == 'b':
            with pytest.raises(KeyboardInterrupt): train_method(run, 'at', [Call('after_epoch', stop, 99)])
            timed['of'] = lambda s: 1.
            _choose_speed(run := Run(tmp_path/name, 'cpu'))
        assert train_method(run, 'at').train_cb.speed == Speed('bf16', fold=True)
    assert train_method(run, 'standard').train_cb.speed == Speed('bf16', fold=True)
    a,b = (torch.load(tmp_path/name/'checkpoints'/'at'/'last.pt') for name in 'ab')
    assert same(a['model'], b['model']) and a['training']['learner']['precision'] == 'measured'

# --- evaluation

def learned():
    "A model that some attacks break on some images, and batches of test images"
    x,y = digits('train', 200)
    model = net()
    opt = torch.optim.SGD(model.parameters(), .05, .9)
    for rows in torch.arange(200).repeat(3).split(50):
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        opt.step()
        opt.zero_grad()
    return model.eval(),list(zip(*(t.split(50) for t in digits('test', 100))))

def figures(fast, out=None, attacks='natural,pgd10,cw5+pgd5', **kwargs):
    model,batches = learned()
    return evaluate(model, batches, attacks, eps=.02, fast=fast, out=out, checks=False, progress=False, **kwargs)

def test_evaluation_by_copies(timed, tmp_path):
    "The same figures; attacks that look at logits in between get float32, and the record says what each looked at"
    timed['of'] = lambda s: 1 - .3*s.fold - .2*(s.precision == 'bf16') - .1*s.channels_last
    plain,ours = figures(False),figures(True, tmp_path)
    assert .05 < plain['pgd10'] < .95 and plain['natural'] == ours['natural']
    assert all(abs(plain[k] - ours[k]) <= .01 for k in plain.figures)
    assert ours.settings['copies'] == {'cw5+pgd5': 'float32, channels_last, fold', 'pgd10': 'bf16, channels_last, fold'}
    assert 'PGD-10 in bf16, channels_last, fold' in ours.text() and 'copies' not in plain.settings
    assert torch.equal(ours.columns['cw5+pgd5']['stage'] == -2, ours.right('cw5+pgd5'))
    timed['of'] = lambda s: 1.
    again = figures(True, tmp_path)
    assert again.settings['copies'] == ours.settings['copies'] and again.figures == ours.figures # as it was measured before
    beside = figures(False, tmp_path, 'natural,cw5+pgd5') # now on the model; what PGD-10 looked at is still told
    assert 'copies' not in beside.settings and 'PGD-10 in bf16' in (tmp_path/'evaluation.md').read_text()
    assert set(read_json(tmp_path/'evaluation.json')['settings']['copies']) == {'pgd10'}

def test_nothing_is_copied_without_need(timed):
    assert 'copies' not in figures(True).settings # nothing is faster
    timed['of'] = lambda s: 1 - .3*s.fold
    own = figures(True, attacks=dict(natural=None, mine=lambda model, x, y: x.flip(0) if isinstance(model, Attacked) else x))
    assert 'copies' not in own.settings and own['mine'] == own['natural']

def test_what_evaluation_cannot_copy():
    model,batches = learned()
    with pytest.raises(ValueError, match='fast=True of an iterator'): evaluate(model, iter(batches), 'fgsm', fast=True, progress=False)
    with pytest.raises(ValueError, match='float64: expected float32'): evaluate(model.double(), batches, 'fgsm', fast=True, progress=False)
