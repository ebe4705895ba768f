"What `evaluate` leaves behind, on which images it measures, how it goes on, and whether its files, figures and notes agree"
import copy
import dataclasses
import io
import json
import random
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.data.core import TfmdDL
from torch import nn
from torch.nn import functional as F

from conftest import Forwards, digit_dls, digits, make_learner, net, same, snapshot
from fastrain.attacks.named import named_attack, parse_attacks
from fastrain.attacks.pgd import PGD, logit_margin
from fastrain.attacks.worst import WorstCase
from fastrain.core import fork_rng, get_rng_state
from fastrain.data.sources import get_dls
from fastrain.evaluation.evaluate import evaluate, parse_figures, rescore, saved_images
from fastrain.evaluation.measure import Batches, Job, measure
from fastrain.evaluation.record import read_evaluation, read_record
from fastrain.evaluation.scores import Measure, l_tp_score, topology_score, wilson
from fastrain.evaluation.tables import evaluation_text, results_table
from fastrain.models.features import logits_and_features

def batches(n=24, bs=8, part='test'):
    x,y = digits(part, n)
    return list(zip(x.split(bs), y.split(bs)))

def run(model=None, dl=None, attacks='natural,pgd2', **kwargs):
    if model is None: model = trained()
    if dl is None: dl = batches()
    return evaluate(model, dl, attacks, **{**dict(eps=.06, checks=False, progress=False), **kwargs})

_trained = []
def trained():
    "A net that knows most digits"
    if not _trained:
        model,(x,y) = net(),digits('train', 1400)
        opt = torch.optim.Adam(model.parameters(), 5e-3)
        with fork_rng(0): order = torch.cat([torch.randperm(1400) for _ in range(2)])
        for i in order.split(64):
            opt.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            opt.step()
        _trained.append(model)
    return copy.deepcopy(_trained[0]).requires_grad_().eval()

def columns(ev, leave_out=('seconds', 'files')):
    return {k: {n: v for n,v in c.items() if n not in leave_out} for k,c in ev.columns.items()}

def without_features(ev): return columns(ev, ('seconds', 'files', 'features'))

class Counted(PGD):
    "PGD that counts its calls, and is interrupted in that number `stop`"
    calls,stop = 0,None
    settings = lambda self: {k: v for k,v in super(Counted, self).settings().items() if k not in ('calls', 'stop')}
    def __call__(self, *args, **kwargs):
        if self.calls == self.stop: raise KeyboardInterrupt
        self.calls += 1
        return super().__call__(*args, **kwargs)

# --- what is left behind

def everything(model):
    return dict(state=snapshot(model),
                modes=[m.training for m in model.modules()],
                requires_grad=[p.requires_grad for p in model.parameters()],
                grads=[None if p.grad is None else p.grad.clone() for p in model.parameters()],
                hooks=[len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()])

def mixed():
    model = net(drop=.5).train()
    model.bn1.eval(); model.drop.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    return model

attack_lists = ['natural,pgd2', 'natural,noise,fgsm,cw2', 'pgd2+cw2', 'topology']

@pytest.mark.parametrize('attacks', attack_lists)
def test_models_are_left_as_they_were(attacks):
    model,standard = mixed(),mixed()
    before = everything(model)
    run(model, batches(), attacks, standard=standard, support=batches(part='train'), checks=True)
    assert same(everything(model), before) and same(everything(standard), before)

@pytest.mark.parametrize('error', [RuntimeError('out of memory'), KeyboardInterrupt()])
def test_models_are_left_as_they_were_after_an_error(error):
    model,calls = mixed(),[]
    def attack(model, x, y):
        calls.append(1)
        if len(calls) == 2: raise error
        return x
    before,tf32,state = everything(model),torch.backends.cuda.matmul.allow_tf32,get_rng_state()
    with pytest.raises(type(error)): run(model, batches(), dict(natural=None, mine=attack), standard=net())
    assert same(everything(model), before) and torch.backends.cuda.matmul.allow_tf32 == tf32 and same(get_rng_state(), state)

def test_bad_images_leave_the_model_as_it_was():
    model = mixed()
    before = everything(model)
    with pytest.raises(ValueError): run(model, [(torch.rand(4, 3, 32, 32) + 1, torch.zeros(4, dtype=torch.long))])
    assert same(everything(model), before)

def untouched(f):
    "Are the generators of Python, NumPy and torch where they were?"
    random.seed(5); np.random.seed(5); torch.manual_seed(5)
    state = get_rng_state()
    f()
    return same(get_rng_state(), state)

@pytest.mark.parametrize('attacks', attack_lists)
def test_random_state(attacks): assert untouched(lambda: run(trained(), batches(), attacks, support=batches(part='train'), n=12))

def test_random_state_with_checks(): assert untouched(lambda: run(checks=True))

def test_random_state_with_loaders():
    dls = digit_dls()
    assert untouched(lambda: run(dl=dls))

def test_attack_that_trains():
    def attack(model, x, y):
        model.bn2.train()
        return x
    model = trained()
    with pytest.raises(RuntimeError, match=r'^mine left the model in training mode \(bn2\)'):
        run(model, attacks=dict(natural=None, mine=attack))
    assert not model.bn2.training

def test_measured_in_eval_mode():
    model,seen = net(drop=.5).train(),[]
    model.register_forward_hook(lambda m, *args: seen.append(any(o.training for o in m.modules())))
    training = columns(run(model, attacks='natural,pgd2,pgd2+cw2', checks=True))
    assert same(training, columns(run(model.eval(), attacks='natural,pgd2,pgd2+cw2'))) and not any(seen)

# --- precision

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_weights_are_evaluated_in_float32(dtype):
    model = trained().to(dtype)
    before = everything(model)
    ev = run(model)
    assert ev.notes == [f'precision: the weights are {str(dtype)[6:]}, evaluated as float32'] and same(everything(model), before)
    assert same(columns(ev), columns(run(copy.deepcopy(model).float()))) and ev['natural'] > .8 and not run().notes

def test_autocast_does_not_reach_an_evaluation():
    want = columns(run())
    with torch.autocast('cpu', torch.bfloat16): assert same(columns(run()), want)

def test_half_standard_model():
    assert run(standard=trained().bfloat16())['l_tp'] == run(standard=trained().bfloat16().float())['l_tp']

def test_float64_model():
    ev = run(trained().double(), attacks='natural,pgd2,pgd2+cw2')
    assert ev.columns['pgd2']['margin'].dtype == torch.float64
    assert abs(ev['pgd2'] - run(attacks='pgd2')['pgd2']) < .1

def test_float64_is_named(): assert run(trained().double()).settings['precision'] == 'float64'

def test_autoattack_on_float64(): run(trained().double(), attacks='apgd-ce')

# --- kinds of data

def test_kinds_of_loaders():
    model,dls = trained(),digit_dls(bs=8)
    want = run(model, batches())
    xs = list(zip(*(t.split(8) for t in digits('test', 24))))
    generator = ((x, y) for x,y in xs)
    torch_dl = torch.utils.data.DataLoader(list(zip(*digits('test', 24))), batch_size=8)
    for dl in (dls, dls.valid, xs, generator, dls.valid.new(shuffle=True), torch_dl):
        assert same(columns(run(model, dl)), columns(want))
    assert run(make_learner(dls, model), dls)['pgd2'] == want['pgd2'] and want.n == 24 and want['natural'] > want['pgd2']

def test_dataloaders_are_their_test_set():
    dls = get_dls('digits', bs=64, holdout=60, n_test=100, augment=False, device='cpu')
    assert [run(dl=dl, attacks='natural').n for dl in (dls, dls.valid, digit_dls())] == [100, 60, 24]

def test_training_images_are_plain_and_in_order():
    dls = get_dls('digits', bs=64, n_train=200, augment=True, device='cpu')
    raw = get_dls('digits', bs=200, n_train=200, augment=False, device='cpu').train.new(shuffle=False, drop_last=False).one_batch()
    for _ in range(2):
        x,y = (torch.cat(o) for o in zip(*Batches(dls.train)))
        assert len(x) == 200 and torch.equal(x, raw[0]) and torch.equal(y, raw[1]) and type(x) is torch.Tensor # nothing is dropped, either
    assert not torch.equal(dls.train.one_batch()[0][:3], raw[0][:3]) # it would be

def test_subset():
    dls = get_dls('digits', bs=64, n_test=120, augment=False, device='cpu')
    x,y = (torch.cat(o) for o in zip(*Batches(dls)))
    items = list(zip(x, y))
    kinds = dict(dls=dls, dl=dls.valid, shuffled=dls.valid.new(shuffle=True), items=TfmdDL(items, bs=50, num_workers=0),
                 batches=list(zip(x.split(17), y.split(17))), torch=torch.utils.data.DataLoader(items, batch_size=9))
    subsets = {k: Batches(dl, 33) for k,dl in kinds.items()}
    first = subsets['dls']
    assert first.name.startswith('balanced-33-seed0-') and torch.equal(first.rows, first.rows.sort()[0]) and len(first.rows.unique()) == 33
    assert {int(c) for c in y[first.rows].bincount(minlength=10)} <= {3, 4}
    for k,b in subsets.items():
        for _ in range(2):
            got = [torch.cat(o) for o in zip(*b)]
            assert torch.equal(got[0], x[first.rows]) and torch.equal(got[1], y[first.rows]), k
        assert b.name == first.name and torch.equal(b.rows, first.rows)
    assert Batches(dls, 33, seed=1).name != first.name and Batches(dls, 32).name != first.name and Batches(dls).name == 'all'

def test_subset_of_uneven_classes():
    y = torch.tensor([0]*20 + [1]*2 + [2]*8)
    rows = Batches([(torch.rand(30, 3, 4, 4), y)], 12).rows
    assert y[rows].bincount().tolist() == [5, 2, 5]

def test_subset_in_an_evaluation():
    x,y = digits('test', 24)
    ev = run(n=10)
    subset = Batches(batches(), 10)
    assert ev.n == 10 and ev.settings['subset'] == subset.name and subset.name in ev.text()
    table = ev.per_image
    assert table.image.tolist() == subset.rows.tolist() and table.label.tolist() == y[subset.rows].tolist()
    with torch.no_grad(): assert table.natural.tolist() == trained()(x[subset.rows]).argmax(1).tolist()
    assert same(columns(run(n=10)), columns(ev)) and run().per_image.image.tolist() == list(range(24))

def test_subset_of_a_shuffled_torch_loader():
    x,y = digits('test', 120)
    subset = Batches(torch.utils.data.DataLoader(list(zip(x, y)), batch_size=20, shuffle=True), 30)
    with pytest.raises(ValueError, match='another order'): list(subset)

@pytest.mark.parametrize('n, dl, match', [
    (0, batches, 'n=0'), (-3, batches, 'n=-3'), (2.5, batches, 'n=2.5'), (25, batches, 'n=25, but there are only 24'),
    (25, digit_dls, 'only 24'), (5, lambda: iter(batches()), 'of an iterator'), (5, lambda: (b for b in batches()), 'iterated twice')])
def test_bad_subsets(n, dl, match):
    with pytest.raises(ValueError, match=match): run(dl=dl(), n=n)

def bad(x=lambda x: x, y=lambda y: y, at=0):
    return [(x(a), y(b)) if i == at else (a, b) for i,(a,b) in enumerate(batches())]

@pytest.mark.parametrize('at', [0, 1])
@pytest.mark.parametrize('change, match', [
    (lambda x: x + .2, r'expected \[0, 1\]'), (lambda x: x*2 - 1, r'\[-1, 1\]'), (lambda x: x*255, r'\[0, 255\]'),
    (lambda x: (x*255).byte(), 'uint8.*divide by 255'), (lambda x: x*float('nan'), 'NaN')])
def test_bad_images(change, match, at):
    with pytest.raises(ValueError, match=match): run(dl=bad(x=change, at=at))

@pytest.mark.parametrize('at', [0, 1])
@pytest.mark.parametrize('change, match', [
    (lambda y: y + 10, 'has no output: the model has the classes 0 to 9'), (lambda y: y - 10, r'Label -\d+ has no output')])
def test_labels_without_an_output(change, match, at):
    with pytest.raises(ValueError, match=match): run(dl=bad(y=change, at=at), attacks='natural')

@pytest.mark.parametrize('change', [lambda y: F.one_hot(y, 10).float(), lambda y: y[:,None], lambda y: y.float()])
def test_labels_of_another_kind(change):
    with pytest.raises(ValueError, match='expected class indices'): run(dl=bad(y=change))

@pytest.mark.parametrize('dtype', [torch.int32, torch.uint8])
def test_labels_of_other_integers(dtype): assert run(dl=[(x, y.to(dtype)) for x,y in batches()])['pgd2'] == run()['pgd2']

def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match='no images'): run(dl=[])
    with pytest.raises(ValueError, match='no images'): run(dl=iter([]))
    with pytest.raises(ValueError, match='no attacks'): run(attacks=[])
    with pytest.raises(TypeError, match='NoneType cannot be iterated'): evaluate(net(), None)
    with pytest.raises(TypeError, match='no nn.Module'): run(lambda x: x)
    with pytest.raises(TypeError, match='no nn.Module'): run(standard=lambda x: x)

def test_empty_batch_counts_for_nothing():
    x,y = digits('test', 8)
    assert run(dl=[(x, y), (x[:0], y[:0])], attacks='natural').n == 8

# --- figures

def test_figures_are_those_of_a_plain_loop():
    model,(x,y) = trained(),digits('test', 24)
    ev = run(model, attacks='natural,fgsm,pgd2')
    with torch.no_grad():
        z = model(x)
        assert torch.equal(ev.columns['natural']['pred'], z.argmax(1))
        assert ev['natural'] == pytest.approx((z.argmax(1) == y).double().mean().item(), abs=1e-7)
        torch.testing.assert_close(ev.columns['natural']['margin'], logit_margin(z, y), rtol=1e-5, atol=1e-5)
    x_adv = torch.cat([named_attack('fgsm', .06)(model, *b) for b in batches()])
    assert torch.equal(ev.right('fgsm'), model(x_adv).argmax(1) == y)
    for row in ev.rows:
        hits = round(ev[row.name]*24)
        assert (row.hits, row.n, row.low, row.high) == (hits, 24, *wilson(hits, 24)) and row.accuracy == hits/24
    table = ev.table
    assert list(table.index) == ['natural', 'FGSM', 'PGD-2', 'worst case']
    shown = table.loc['PGD-2', ['accuracy, %', 'ε', 'step', 'steps', 'seed', 'n']].tolist()
    assert shown == [f'{100*ev["pgd2"]:.2f}', '0.06', '0.006', '2', 0, 24]

def test_figures_do_not_depend_on_other_attacks():
    alone = {k: without_features(run(attacks=['natural', k]))[k] for k in ('noise', 'pgd2', 'cw2', 'pgd2+cw2')}
    together = without_features(run(attacks=['cw2', 'pgd2+cw2', 'fgsm', 'noise', 'pgd2']))
    assert all(same(together[k], c) for k,c in alone.items())
    assert same(without_features(run(attacks=['natural', 'noise'], checks=True, standard=net()))['noise'], alone['noise'])
    torch.rand(7)
    assert same(without_features(run(attacks=['natural', 'noise']))['noise'], alone['noise']) # nor on the global generator

def test_seeds_differ():
    a,b = (run(attacks='noise', seed=s) for s in (0, 1))
    assert not torch.equal(a.columns['noise']['margin'], b.columns['noise']['margin']) and b.settings['seed'] == 1
    x,y = digits('test', 8)
    first,second = run(dl=[(x, y), (x, y)], attacks='noise').columns['noise']['margin'].split(8)
    assert not torch.equal(first, second) # each batch has its own

def test_worst_case_is_point_by_point():
    ev = run(attacks='natural,fgsm,cw3,noise', eps=.04)
    right = ev.right('fgsm') & ev.right('cw3') & ev.right('noise')
    assert ev['worst case'] == int(right.sum())/len(right) <= min(ev['fgsm'], ev['cw3'], ev['noise'])
    assert torch.equal(ev.worst(['fgsm', 'cw3', 'noise']), right)
    assert 'worst case' not in run(attacks='natural,pgd2').figures
    assert ev.accuracies == ['natural', 'fgsm', 'cw3', 'noise', 'worst case']

def test_several_eps():
    ev = run(attacks='natural,fgsm,noise,pgd2@1/255', eps='4/255,8/255')
    assert list(ev.figures) == ['natural', 'fgsm@4/255', 'fgsm@8/255', 'noise@4/255', 'noise@8/255', 'pgd2@1/255',
                                'worst case@4/255', 'worst case@8/255']
    assert [a.eps and round(a.eps*255, 6) for a in ev.attacks.values()] == [None, 4, 8, 4, 8, 1]
    assert [(r.base, r.size) for r in ev.rows[1:3]] == [('fgsm', '4/255'), ('fgsm', '8/255')]
    for e in (4, 8):
        right = ev.right(f'fgsm@{e}/255') & ev.right(f'noise@{e}/255')
        assert ev[f'worst case@{e}/255'] == pytest.approx(right.float().mean().item())
    alone = without_features(run(attacks='fgsm,noise', eps=8/255))
    assert all(same(without_features(ev)[f'{k}@8/255'], c) for k,c in alone.items())
    for eps in ([4/255, 8/255], ('4/255', '8/255'), '4/255, 8/255'):
        assert list(parse_attacks('natural,fgsm', eps)) == ['natural', 'fgsm@4/255', 'fgsm@8/255']
    assert list(parse_attacks('fgsm', '0.031,0.1')) == ['fgsm@0.031', 'fgsm@0.1'] and list(parse_attacks('fgsm', ['8/255'])) == ['fgsm']

def test_worst_cases_of_two_norms():
    ev = run(attacks={f'{k}{i}': PGD(.5, .1, i, norm=k) for k in ('linf', 'l2') for i in (1, 2)})
    worst = [r.hits for r in ev.rows if r.kind == 'worst case']
    assert worst == [int(ev.worst([f'{k}1', f'{k}2']).sum()) for k in ('linf', 'l2')]

class OwnLinear(nn.Module):
    "Uses the weights of its last layer without calling it"
    def __init__(self): super().__init__(); self.fc = nn.Linear(3072, 10)
    def forward(self, x): return x.flatten(1)@self.fc.weight.T

def test_accuracies_need_no_features(): assert run(OwnLinear()).n == 24

class Planted:
    "Turns the first `n` images of each batch black"
    norm = 'linf'
    def __init__(self, n, eps): self.n,self.eps = n,eps
    def __repr__(self): return f'Planted({self.n}, {self.eps})'
    def __call__(self, model, x, y): return torch.cat([0*x[:self.n], x[self.n:]])

class Light(nn.Module):
    "Class 1 if there is light"
    def forward(self, x): return torch.stack([0*x[:,0,0,0] + .1, x.flatten(1).mean(1)], 1)

def lit(n=100, bs=50): return list(zip(torch.rand(n, 3, 4, 4).split(bs), torch.ones(n, dtype=torch.long).split(bs)))

@pytest.mark.parametrize('breaks, notes', [((10, 20, 30), 0), ((10, 9, 30), 0), ((10, 8, 30), 1), ((30, 10, 5), 2)])
def test_accuracy_that_rises_with_eps(breaks, notes):
    attacks = {f'mine@{e}': Planted(n, e) for n,e in zip(breaks, (1., 1.5, 2.))}
    ev = run(Light(), lit(), attacks | {'other@1.2': Planted(49, 1.2)}) # another attack is another curve
    assert len(ev.notes) == notes and all(n.startswith('larger eps: ') for n in ev.notes)
    if notes: assert f'{100 - 2*breaks[1]} of 100 images survive mine with ε = 1.5, only {100 - 2*breaks[0]} with 1' in ev.notes[0]

# --- going on

def test_second_call_attacks_nothing(tmp_path):
    attack,model = Counted(.06, .02, 3),trained()
    attacks = dict(natural=None, mine=attack, both=WorstCase(dict(a=attack, b=PGD(.06, .02, 2, objective='margin'))))
    first = run(model, attacks=attacks, out=tmp_path, images=True)
    calls,forwards = attack.calls,Forwards(model)
    again = run(model, attacks=attacks, out=tmp_path, images=True)
    assert same(columns(again), columns(first)) and again.rows == first.rows # the seconds, too
    assert attack.calls == calls == 6
    assert forwards.n == 1 + 3 + 3 # the look at the first batch; of each batch logits and a gradient, which tell that the model is the same
    assert same(columns(run(model, attacks=attacks)), columns(first))

@pytest.mark.parametrize('stop', [0, 1, 3, 5])
def test_interruption(tmp_path, stop):
    def attacks(stop=None):
        attack = Counted(.06, .02, 3)
        attack.stop = stop
        worst = WorstCase(dict(noise=named_attack('noise', .06), mine=attack))
        return attack,dict(natural=None, fgsm=named_attack('fgsm', .06), mine=attack, worst=worst)
    attack,whole = attacks()
    want = run(attacks=whole, out=tmp_path/'whole', images=True)
    total = attack.calls
    attack,todo = attacks(stop)
    with pytest.raises(KeyboardInterrupt): run(attacks=todo, out=tmp_path/'cut', images=True)
    assert not (tmp_path/'cut'/'evaluation.json').exists()
    done,(attack,todo) = attack.calls,attacks()
    torch.rand(3)
    got = run(attacks=todo, out=tmp_path/'cut', images=True)
    assert done == stop and attack.calls == total - done
    assert same(columns(got), columns(want))
    assert (tmp_path/'cut'/'per_image.csv').read_bytes() == (tmp_path/'whole'/'per_image.csv').read_bytes()
    for k in ('fgsm', 'mine', 'worst'): assert same(list(saved_images(tmp_path/'cut', k)), list(saved_images(tmp_path/'whole', k)))
    assert not list((tmp_path/'cut').rglob('.*'))

def test_parts_are_not_mistaken(tmp_path):
    "Each evaluation in a folder where the others were is what it is without one"
    def changed(f): model = trained(); f(model); return model
    data = batches()
    pixel = [(x.clone(), y) for x,y in data]; pixel[1][0][0] = 1 - pixel[1][0][0]
    label = [(x, y.clone()) for x,y in data]; label[2][1][3] = 9 - label[2][1][3]
    attack = dict(attacks='natural,pgd2')
    settings = [dict(), dict(eps=.03), dict(alpha=.05), dict(norm='l2', eps=1.), dict(seed=1), dict(dl=pixel), dict(dl=label),
                dict(dl=data[::-1]), dict(dl=batches(bs=6)), dict(n=12), dict(model=trained().double()),
                dict(model=changed(lambda m: m.conv1.weight.data.view(-1)[:9].neg_())),
                dict(model=changed(lambda m: m.bn1.running_mean.add_(.1))),
                dict(model=changed(lambda m: m.fc.bias.data[3:4].add_(3)))]
    worst = WorstCase(dict(pgd2=named_attack('pgd2', .06)))
    objects = [PGD(.06, .02, 5), PGD(.06, .006, 2, start='natural'), worst]
    cases = [*(attack | s for s in settings), dict(attacks='cw2'), dict(attacks='pgd2-las'), *(dict(attacks=dict(pgd2=a)) for a in objects)]
    want = [columns(run(**c)) for c in cases]
    assert sum(same(a, b) for i,a in enumerate(want) for b in want[:i]) == 0 # else nothing would be seen
    for _ in range(2): assert all(same(columns(run(out=tmp_path, **c)), w) for c,w in zip(cases, want))

def test_features_and_images_are_added(tmp_path):
    "Parts without what is asked for now are made again"
    attack = Counted(.06, .02, 3)
    run(attacks=dict(natural=None, mine=attack), out=tmp_path)
    with pytest.raises(ValueError, match="no images of 'mine'.*images=True"): list(saved_images(tmp_path, 'mine'))
    run(attacks=dict(natural=None, mine=attack), out=tmp_path, images=True)
    assert attack.calls == 6 and sum(len(y) for _,y in saved_images(tmp_path, 'mine')) == 24

def test_objectives_are_not_mistaken(tmp_path):
    def make(sign):
        def objective(model, x, y): return lambda z, at=...: sign*F.cross_entropy(z, y[at], reduction='sum')
        return {'mine': PGD(.06, .03, 3, start='natural', objective=lambda *args: objective(*args))}
    down,up = (run(attacks=make(s))['mine'] for s in (-1, 1))
    assert down > up and [run(attacks=make(s), out=tmp_path)['mine'] for s in (-1, 1)] == [down, up]

def test_functions_are_not_mistaken(tmp_path):
    make,held = lambda c: lambda model, x, y: 0*x + c,[]
    margins = lambda attack, **kwargs: run(attacks=dict(mine=attack), **kwargs).columns['mine']['margin']
    first = make(0.)
    address = repr(first)
    black = margins(first, out=tmp_path)
    del first
    while repr(grey := make(.5)) != address and len(held) < 10_000: held.append(grey) # in practice it is there at once
    want = margins(make(.5))
    assert not torch.equal(want, black) and torch.equal(margins(grey, out=tmp_path), want)

class Scaled(nn.Module):
    def __init__(self, model, scale): super().__init__(); self.model,self.scale = model,scale
    def forward(self, x): return self.model(x)*self.scale

class Shifted(nn.Module):
    def __init__(self, model, shift):
        super().__init__()
        self.model = model
        self.register_buffer('shift', torch.tensor(shift), persistent=False)
    def forward(self, x): return self.model((x + self.shift).clamp(0, 1))

@pytest.mark.parametrize('make', [Scaled, Shifted])
def test_models_are_not_mistaken(tmp_path, make):
    def measured(v, **kwargs): return columns(run(make(trained(), v), attacks='natural', **kwargs))
    want = [measured(v) for v in (-1., .5)]
    assert not same(*want) and same([measured(v, out=tmp_path) for v in (-1., .5)], want)

def defined_anew(sign):
    "A class of the same name in the next cell of a notebook"
    class Mine(nn.Module):
        def __init__(self): super().__init__(); self.model = trained()
        def forward(self, x): return self.model(x if sign > 0 else 1 - x)
    return Mine()

class Masked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x): return x.clone()
    @staticmethod
    def backward(ctx, g): return -g

class Holds(nn.Module):
    "A net with something before it that is neither a weight nor a plain value"
    def __init__(self, before): super().__init__(); self.model,self.held = trained(),before
    def forward(self, x):
        held = self.held.get('f') if isinstance(self.held, dict) else self.held
        return self.model(held(x) if callable(held) else (x*torch.as_tensor(held).to(x)).clamp(0, 1))

def hooked(f):
    model = trained()
    model.register_forward_pre_hook(lambda m, x: (f(x[0]),))
    return model

def keeps(x): return x
def inverts(x): return 1 - x
inverts.__name__ = inverts.__qualname__ = 'keeps'

changed_behaviour = { # twice the same weights and the same text
    'forward': (lambda: defined_anew(1), lambda: defined_anew(-1)),
    'hook': (lambda: hooked(keeps), lambda: hooked(inverts)),
    'function': (lambda: Holds(keeps), lambda: Holds(inverts)),
    'dictionary': (lambda: Holds(dict(f=keeps)), lambda: Holds(dict(f=inverts))),
    'array': (lambda: Holds(np.ones((3, 32, 32))), lambda: Holds(np.zeros((3, 32, 32)))),
    'way back': (lambda: Holds(keeps), lambda: Holds(Masked.apply))}

@pytest.mark.parametrize('kind', changed_behaviour)
def test_what_a_model_answers_tells_it_apart(tmp_path, kind):
    "No weight differs"
    first,second = changed_behaviour[kind]
    want = [columns(run(make())) for make in (first, second)]
    assert not same(*want)
    for _ in range(2): assert same([columns(run(make(), out=tmp_path)) for make in (first, second)], want)

def test_a_change_is_seen_after_an_interruption(tmp_path):
    "The first batches are of the second model already, the others still of the first"
    first,second = changed_behaviour['way back']
    def part(n): return run(second(), batches()[:n], out=tmp_path)
    run(first(), out=tmp_path)
    part(1)
    assert same(columns(run(second(), out=tmp_path)), columns(run(second())))

def test_standard_model_and_support_are_asked_again(tmp_path):
    first,second = changed_behaviour['hook']
    def figures(make, of, **kwargs):
        models = dict(model=trained(), standard=trained()) | {of: make()}
        ev = run(attacks='natural,fgsm,topology', support=batches(part='train'), ks=(5,), **models, **kwargs)
        return ev.figures
    for of in ('standard', 'model'):
        want = [figures(make, of) for make in (first, second)]
        assert want[0] != want[1] and [figures(make, of, out=tmp_path/of) for make in (first, second)] == want

def test_features_are_asked_again(tmp_path):
    "The layer that counts as classifier changes, and with it features; no logit does"
    class Picks(nn.Module):
        def __init__(self, i):
            super().__init__()
            self.model,self.pick = trained(),[lambda m: m.fc, lambda m: m.extra][i]
            self.model.extra = nn.Linear(3, 2)
        def forward(self, x):
            self.model.extra(x.flatten(2).mean(2))
            return self.model(x)
        def get_classifier(self): return self.pick(self.model)
    first,second = Picks(0),Picks(1)
    second.load_state_dict(first.state_dict())
    want = [columns(run(m, attacks='natural,fgsm')) for m in (first, second)]
    assert not same(*want) and same([columns(run(m, attacks='natural,fgsm', out=tmp_path)) for m in (first, second)], want)

def own_objective(sign):
    def mine(model, x, y): return lambda z, at=...: sign*F.cross_entropy(z, y[at], reduction='sum')
    return {'mine': PGD(.06, .03, 3, start='natural', objective=mine)}

def own_module(eps):
    class Attack(nn.Module):
        def __init__(self): super().__init__(); self.size = eps
        def forward(self, model, x, y): return (x + self.size).clamp(0, 1)
    return {'mine': Attack()}

def own_class(sign):
    class Attack:
        eps,norm = .3,'linf'
        def __repr__(self): return 'Attack()'
        def __call__(self, model, x, y): return (x + sign*self.eps).clamp(0, 1)
    return {'mine': Attack()}

def own_loop(sign):
    class Loop(PGD):
        def __call__(self, model, x, y, **kwargs): return (x + sign*self.eps).clamp(0, 1)
    return {'mine': Loop(.3, .1, 1)}

@pytest.mark.parametrize('make', [own_objective, own_module, own_class, own_loop, lambda c: {'mine': WorstCase(own_objective(c))}])
def test_attacks_that_cannot_be_known_are_run_again(tmp_path, make):
    a,b = (1., -1.) if make is not own_module else (.3, .6)
    want = [columns(run(attacks=make(c))) for c in (a, b)]
    assert not same(*want) and same([columns(run(attacks=make(c), out=tmp_path)) for c in (a, b)], want)

def test_objective_that_is_entered_under_a_name(tmp_path, monkeypatch):
    from fastrain.attacks.pgd import objectives
    def measured(sign, **kwargs):
        monkeypatch.setitem(objectives, 'mine', own_objective(sign)['mine'].objective)
        return columns(run(attacks=dict(mine=PGD(.06, .03, 3, start='natural', objective='mine')), **kwargs))
    want = [measured(c) for c in (1., -1.)]
    assert not same(*want) and same([measured(c, out=tmp_path) for c in (1., -1.)], want)

def test_parts_without_answers_are_measured_again(tmp_path):
    "Those of 0.1"
    want = run(out=tmp_path)
    for f in (tmp_path/'parts').rglob('*.pt'):
        part = torch.load(f)
        del part['answer']
        torch.save(part | dict(margin=part['margin'] + 1), f)
    assert same(columns(run(out=tmp_path)), columns(want))

@pytest.mark.parametrize('keep', [0, 1, 100, .5, .99])
def test_damaged_part(tmp_path, keep):
    want = run(out=tmp_path)
    part = tmp_path/'parts'/read_evaluation(tmp_path)['files']['pgd2'][1]
    data = part.read_bytes()
    part.write_bytes(data[:int(keep*len(data)) if keep in (.5, .99) else keep])
    assert same(columns(run(out=tmp_path)), columns(want))

@pytest.mark.parametrize('below', ['', 'folder'])
def test_out_that_cannot_be_a_folder(tmp_path, below):
    (tmp_path/'file').write_text('')
    attack = Counted(.06, .02, 3)
    with pytest.raises(OSError): run(attacks=dict(natural=None, mine=attack), out=tmp_path/'file'/below)
    assert attack.calls == 0

def test_images_need_a_folder():
    attack = Counted(.06, .02, 3)
    with pytest.raises(ValueError, match='give out'): run(attacks=dict(mine=attack), images=True)
    assert attack.calls == 0

# --- files

@pytest.fixture
def weak(monkeypatch):
    from pyautoattack import autoattack as package
    before = package.AutoAttack._set_version
    def set_version(self, version='standard'):
        before(self, version)
        self.apgd.n_iter = self.apgd_targeted.n_iter = 1
        self.fab.n_iter = 2
        self.square.n_queries = 60
    monkeypatch.setattr(package.AutoAttack, '_set_version', set_version)

def test_rescore(tmp_path, weak):
    model = trained()
    model.train()
    before = everything(model)
    ev = run(model, attacks='natural,noise,pgd2,fgsm+cw2,aa', eps=.03, out=tmp_path, images=True)
    got = rescore(model, tmp_path)
    assert list(got.index) == ['noise', 'pgd2', 'fgsm+cw2', 'aa']
    assert got.table.tolist() == got.rescored.tolist() == [ev[k] for k in got.index] and got.rescored.nunique() > 1
    assert same(everything(model), before)
    other = rescore(net(5), tmp_path)
    assert other.table.tolist() == got.table.tolist() and other.rescored.tolist() != other.table.tolist()
    assert rescore(make_learner(digit_dls(), model), tmp_path).equals(got)
    x,y = (torch.cat(o) for o in zip(*saved_images(tmp_path, 'pgd2')))
    assert .01 < (x - digits('test', 24)[0]).abs().max() <= .03 + 1e-6 and torch.equal(y, digits('test', 24)[1])

def test_rescore_needs_images(tmp_path):
    with pytest.raises(FileNotFoundError, match='no evaluation.json'): rescore(net(), tmp_path)
    run(attacks='natural,pgd2', out=tmp_path)
    with pytest.raises(ValueError, match='images=True'): rescore(trained(), tmp_path)
    with pytest.raises(ValueError, match="'pgd2'"): list(saved_images(tmp_path, 'pgd'))

def test_rescore_without_weights(tmp_path):
    model = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    data = [(x, y % 12) for x,y in batches()]
    run(model, data, 'natural,noise', out=tmp_path, images=True)
    assert (rescore(model, tmp_path).table == rescore(model, tmp_path).rescored).all()

def test_per_image(tmp_path, weak):
    ev = run(attacks='natural,pgd2,fgsm+noise,aa', eps=.03, out=tmp_path)
    table = pd.read_csv(tmp_path/'per_image.csv', keep_default_na=False)
    assert table.equals(pd.read_csv(io.StringIO(ev.per_image.to_csv(index=False)), keep_default_na=False))
    assert len(table) == 24 and table.label.tolist() == digits('test', 24)[1].tolist()
    for k in ev.attacks:
        right = table[k] == table.label
        assert right.mean() == pytest.approx(ev[k], abs=1e-6)
        assert (table[f'{k} margin'][right] <= 0).all() and (table[f'{k} margin'][~right] >= 0).all()
    for k in ('fgsm+noise', 'aa'):
        by,right = table[f'{k} broken by'],table[k] == table.label
        stages = list(ev.attacks[k].stages)
        assert ((by == '') == right).all() and ((by == 'natural') == (table.natural != table.label)).all()
        assert set(by) <= {'', 'natural', *stages}
        for i,stage in enumerate(stages):
            row = next(r for r in ev.rows if r.name == f'{k} after {stage}')
            assert row.hits == (~by.isin(['natural', *stages[:i+1]])).sum()
    assert set(table['aa broken by']) >= {'apgd-ce'} and 'pgd2 broken by' not in table

def test_stages_only_fall(weak):
    ev = run(attacks='natural,aa', eps=.02)
    stages = [r for r in ev.rows if r.kind == 'stage']
    hits = [int(ev.right('natural').sum())] + [r.hits for r in stages]
    assert len(hits) == 5 and hits == sorted(hits, reverse=True) and hits[-1] == int(ev.right('aa').sum()) < hits[0]
    assert [r.eps for r in stages] == [.02]*4 and stages[0].title == 'AutoAttack after APGD-CE'

def test_json(tmp_path):
    ev = run(attacks='natural,pgd2,fgsm', out=tmp_path, standard=net(), support=batches(part='train'), checks=True)
    def strict(s): raise AssertionError(f'{s} is no JSON')
    record = json.loads((tmp_path/'evaluation.json').read_text(), parse_constant=strict)
    assert record == read_evaluation(tmp_path) and record['version'] == 2 and record['figures'] == ev.figures
    assert list(ev.figures) == ['natural', 'pgd2', 'fgsm', 'worst case', 'l_tp']
    assert record['n'] == 24 and record['notes'] == ev.notes and record['settings'] == ev.settings
    assert record['rows'] == [dataclasses.asdict(r) for r in ev.rows]
    assert [r['settings'] for r in record['rows']] == [None, *(repr(ev.attacks[k].attack) for k in ('pgd2', 'fgsm')), None]
    assert all((tmp_path/'parts'/f).is_file() for fs in record['files'].values() for f in fs)
    assert [len(fs) for fs in record['files'].values()] == [3]*3
    assert (tmp_path/'evaluation.md').read_text() == ev.text() == evaluation_text(record)

def test_read_evaluation_needs_one(tmp_path):
    with pytest.raises(FileNotFoundError, match='evaluate with out='): read_evaluation(tmp_path)

# --- scores of the representation

def by_hand(model, data, attack=None):
    "Features batch by batch"
    f = []
    for x,y in data:
        if attack is not None: x = attack(model, x, y)
        with torch.no_grad(): f.append(logits_and_features(model, x)[1])
    return torch.cat(f),torch.cat([y for _,y in data])

@pytest.mark.parametrize('explicit', [False, True])
def test_topology_is_that_by_hand(explicit):
    "With FGSM as the attack, which draws nothing"
    model,train,test = trained(),batches(40, part='train'),batches()
    dls = digit_dls(40, 8)
    ev = run(model, test if explicit else dls, 'topology,fgsm', support=train if explicit else None, ks=(5, 20, 50))
    attack = named_attack('fgsm', .06)
    (nat,y),(adv,_) = by_hand(model, train),by_hand(model, train, attack)
    (q_nat,q_y),(q_adv,_) = by_hand(model, test),by_hand(model, test, attack)
    support,labels = torch.cat([nat, adv]),torch.cat([y, y])
    def score(queries): return topology_score(support, labels, queries, q_y, (5, 20, 50))
    if explicit: assert ev.topology == dict(natural=score(q_nat), robust=score(q_adv))
    else: assert ev.topology == run(model, test, 'topology,fgsm', support=train, ks=(5, 20, 50)).topology # although they shuffle it
    assert (ev['topology_natural'], ev['topology_robust']) == (ev.topology['natural'][50], ev.topology['robust'][50])
    assert ev.topology['natural'][5] > .4
    of_30 = run(model, test, 'topology,fgsm', support=train, ks=(30,)).topology['natural'][30] # the paper's k
    assert run(model, test, 'topology,fgsm', support=train)['topology_natural'] == of_30

def test_topology_with_pgd_is_that_of_the_same_images(tmp_path):
    model,train = trained(),batches(40, part='train')
    ev = run(model, attacks='topology,pgd20,fgsm', support=train, ks=(10,), out=tmp_path, images=True)
    pgd, = measure(Batches(train), [Job(model, 'support', named_attack('pgd20', .06), True)], progress=False)
    (nat,y),(q_nat,q_y) = by_hand(model, train),by_hand(model, batches())
    q_adv,_ = by_hand(model, list(saved_images(tmp_path, 'pgd20')))
    support,labels = torch.cat([nat, pgd['features']]),torch.cat([y, pgd['y']])
    def score(queries): return topology_score(support, labels, queries, q_y, (10,))
    assert ev.topology == dict(natural=score(q_nat), robust=score(q_adv)) and ev.settings['l_tp_attack'] == 'pgd20'

def test_topology_alone_brings_its_attacks():
    ev = run(dl=digit_dls(40), attacks='topology', ks=(5,))
    assert list(ev.attacks) == ['natural', 'pgd20'] and list(ev.topology['robust']) == [5] and ev.attacks['pgd20'].eps == .06

def test_n_support():
    model,train = trained(),batches(200, part='train')
    ev = run(model, attacks='topology,fgsm', support=train, n_support=40, ks=(10,))
    subset = list(Batches(train, 40))
    assert torch.cat([y for _,y in subset]).bincount(minlength=10).tolist() == [4]*10
    def of(support): return run(model, attacks='topology,fgsm', support=support, ks=(10,)).topology
    assert ev.topology == of(subset) != of(train)
    with pytest.raises(ValueError, match='n_support=201, but there are only 200'):
        run(model, attacks='topology,fgsm', support=train, n_support=201)

def test_topology_needs_training_images():
    attack = Counted(.06, .02, 3)
    with pytest.raises(ValueError, match='need training images: give DataLoaders, or support'):
        run(attacks=dict(topology=None, mine=attack))
    assert attack.calls == 0
    with pytest.raises(ValueError, match='need training images'): run(dl=digit_dls().valid, attacks='topology')

def test_ks_beyond_the_support_are_left_out():
    assert list(run(attacks='topology,fgsm', support=batches(8, part='train')).topology['natural']) == [5, 10]

def test_too_small_a_support():
    with pytest.raises(ValueError, match='support|neighbours|k=5'): run(attacks='topology,fgsm', support=batches(2, part='train'))

def test_support_of_dataloaders_is_their_training_set():
    dls = digit_dls(40)
    def of(**kwargs): return run(dl=dls, attacks='topology,fgsm', ks=(1,), **kwargs).topology
    assert of(support=dls) == of()

@pytest.mark.parametrize('bs', [None, 6, 128])
@pytest.mark.parametrize('loader', [False, True])
def test_l_tp_is_that_by_hand(bs, loader):
    model,standard,attack = trained(),net(3).eval(),named_attack('fgsm', .06)
    ev = run(model, digit_dls().valid if loader else batches(), 'natural,fgsm', standard=standard, bs=bs)
    (f,_),(g,_) = by_hand(standard, batches()),by_hand(model, batches(), attack)
    assert ev['l_tp'] == l_tp_score(f, g, bs or 8) > 0 and 'l_tp' not in run(model).figures
    assert run(model, attacks='natural,fgsm', standard=model.eval(), l_tp_attack='natural')['l_tp'] == pytest.approx(0, abs=1e-5)

def test_which_attack_l_tp_is_on():
    on = lambda attacks, **kwargs: run(attacks=attacks, standard=net(), **kwargs).settings['l_tp_attack']
    assert on('natural,pgd20,fgsm') == 'pgd20' and on('natural,pgd2,fgsm') == 'fgsm' and on('natural,pgd20-las,fgsm') == 'pgd20-las'
    assert on('natural,pgd2,fgsm', l_tp_attack='pgd2') == 'pgd2' and on('natural,pgd,fgsm') == 'pgd' # which has 20 steps
    assert on('natural,pgd200,pgd2') == 'pgd2' and on(dict(pgd20=PGD(.06, .02, 1), pgd2=PGD(.06, .02, 2))) == 'pgd20'
    with pytest.raises(ValueError, match="'pgd2'"): on('natural,pgd2', l_tp_attack='pgd3')

def test_standard_and_model_may_differ_in_width():
    a,b = (run(standard=net(3, width=w), attacks='natural,fgsm')['l_tp'] for w in (4, 12))
    assert a != b and min(a, b) > 0

# --- the record

def test_any_name_keeps_its_figure():
    "Also those of other columns of a record"
    names = ('n', 'seconds', 'rows', 'settings', 'version', 'natural')
    ev = run(attacks={name: PGD(.06, .02, i) for i,name in enumerate(names)})
    record = read_record(ev.record())
    assert list(record['figures']) == [*names, 'worst case'] and record['n'] == 24 and ev['n'] == ev.figures['n'] == record['figures']['n']
    assert list(results_table([dict(method='at', last=record)]).columns) == [*names, 'worst case', 's/epoch', 'epoch']

def test_names_of_other_figures_are_refused():
    for name in ('worst case', 'worst case@4/255', 'l_tp', 'topology', 'topology_robust'):
        with pytest.raises(ValueError, match='name of another figure'): run(attacks={name: PGD(.06, .02, 1)})

def test_nothing_changes_a_finished_evaluation():
    ev = run()
    for name in ('figures', 'rows', 'notes', 'topology'):
        with pytest.raises(dataclasses.FrozenInstanceError): setattr(ev, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError): ev.rows[0].accuracy = 1.
    before,record = ev.record(),ev.record()
    record['figures']['pgd2'] = record['rows'][0]['accuracy'] = 2.
    record['settings']['seed'] = 7
    record['notes'].append('else')
    assert ev.record() == before and ev['pgd2'] <= 1

def test_rows_know_what_they_are(weak):
    ev = run(attacks='natural,aa,fgsm,pgd2@0.1', eps=.03)
    assert [(r.kind, r.base, r.size, r.norm) for r in ev.rows] == [
        ('natural', 'natural', '', None), ('attack', 'aa', '', 'linf'),
        *(('stage', f'aa after {s}', '', 'linf') for s in ('apgd-ce', 'apgd-t', 'fab-t', 'square')),
        ('attack', 'fgsm', '', 'linf'), ('attack', 'pgd2', '0.1', 'linf'), ('worst case', 'worst case', '', None)]

def old_record(ev):
    "As fastrain 0.1 wrote it: figures among everything else, rows that know no more than their name"
    always = ('accuracy', 'low', 'high', 'hits', 'n', 'settings', 'seconds')
    table = []
    for r in map(dataclasses.asdict, ev.rows):
        if_known = [k for k in ('eps', 'alpha', 'steps') if r[k] is not None]
        table.append(dict(attack=r['name']) | {k: r[k] for k in (*always, *if_known)})
    return dict(ev.figures, n=ev.n, seconds=ev.seconds, table=table, topology=ev.topology, notes=ev.notes, settings=ev.settings)

@pytest.mark.parametrize('attacks, eps', [('natural,aa,fgsm,pgd2+cw2,pgd20-las', .03), ('natural,fgsm,pgd2', '4/255,8/255')])
def test_old_records(weak, attacks, eps):
    ev = run(attacks=attacks, eps=eps, standard=net())
    new = read_record(json.loads(json.dumps(old_record(ev) | dict(epoch=3))))
    assert new == ev.record() | dict(epoch=3) and read_record(new) is new
    assert evaluation_text(new) == ev.text()

def test_old_records_without_a_table():
    new = read_record(dict(natural=.9, pgd20=.5, l_tp=.1, topology_robust=.7, n=100, seconds=3., epoch=2))
    assert new['figures'] == dict(natural=.9, pgd20=.5, topology_robust=.7, l_tp=.1) and new['epoch'] == 2
    assert [(r['title'], r['kind'], r['hits'], r['low']) for r in new['rows']] == [
        ('natural', 'natural', 90, wilson(90, 100)[0]), ('PGD-20', 'attack', 50, wilson(50, 100)[0])]
    with pytest.raises(ValueError, match='newer fastrain'): read_record(dict(version=3))

# --- measures by name

@pytest.fixture
def own_measure():
    class MedianMargin(Measure):
        key,title,format = 'median_margin','median margin','.1f'
        def measure(self, evidence): return evidence.columns[evidence.on]['margin'].median().item()
    yield MedianMargin
    del Measure.registry['median_margin']

def test_own_measure_works_by_name(own_measure, tmp_path):
    ev = run(attacks='natural,median_margin,pgd2', standard=net(), out=tmp_path)
    margin = ev.columns['pgd2']['margin'].median().item()
    assert ev['median_margin'] == margin and list(ev.attacks) == ['natural', 'pgd2'] and list(ev.figures)[-2:] == ['l_tp', 'median_margin']
    assert f'L_TP {ev["l_tp"]:.3f}, median margin {margin:.1f}.' in (tmp_path/'evaluation.md').read_text()
    table = results_table([dict(method='a', last=run().record()), dict(method='b', last=read_evaluation(tmp_path))])
    assert list(table.columns) == ['natural', 'PGD-2', 'L_TP', 'median margin', 's/epoch', 'epoch']
    assert table['median margin'].tolist() == ['', f'{margin:.1f}']
    assert 'median_margin' not in run().figures

def test_what_is_asked_for():
    attacks,measures = parse_figures('pgd2,topology', eps='4/255,8/255')
    assert list(attacks) == ['natural', 'pgd2@4/255', 'pgd2@8/255'] and [m.key for m in measures] == ['topology_natural', 'topology_robust']
    attacks,measures = parse_figures('topology_robust', eps='4/255,8/255')
    assert list(attacks) == ['natural', 'pgd20'] and attacks['pgd20'].eps == 8/255 and [m.key for m in measures] == ['topology_robust']
    with pytest.raises(ValueError, match='need the standard model'): run(attacks='natural,l_tp')
    assert run(attacks='natural,l_tp', standard=net())['l_tp'] == run(attacks='natural', standard=net())['l_tp']

@pytest.mark.slow # a process of its own
def test_imports():
    "The evaluation does without training, runs and most pieces"
    code = 'import sys, fastrain.evaluation.evaluate; print(*(m for m in sys.modules if m.startswith("fastrain.")))'
    names = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    wings = {f'fastrain.{w}' for w in ('attacks', 'data', 'evaluation', 'models', 'pieces')}
    beside = {'fastrain.names', 'fastrain.processes'} # parts of `core`: what the command line needs before torch, and what needs others
    assert len({*names} - wings - beside) <= 13
    assert not any(n.startswith(('fastrain.training', 'fastrain.runs', 'fastrain.pieces')) for n in names)

@pytest.mark.slow # a process of its own
def test_star_import():
    "Everything public, without what only pictures and pages need, and without hiding fastai's names"
    code = ('import sys; from fastai.vision.all import *; before = dict(globals()); from fastrain.all import *; '
            'print([m for m in ("sklearn.manifold", "markdown_it") if m in sys.modules], '
            '[n for n in before if n != "before" and globals()[n] is not before[n]])')
    shown = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()
    assert shown == '[] []'
