"A run that was interrupted and continued in a new learner ends bit for bit as one that was not"
import copy, shutil

import numpy as np
import pytest
import torch
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import * # noqa: F403  fit_one_cycle
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam

from conftest import Call, Net, net, quick, quietly, same, snapshot
from fastrain.training.callback import TRAINCallback
from fastrain.training.checkpoint import Checkpoint, averaged_weights, read_state, standard_state
from fastrain.core import seed_all
from fastrain.data.sources import get_dls
from fastrain.training.metrics import RobustAccuracy
from fastrain.pieces.crd import CRD
from fastrain.pieces.losses import AT, TRADES, Natural
from fastrain.pieces.relations import Topology
from fastrain.pieces.weights import EMA
from fastrain.models.backbone import load_weights
from fastrain.training.schedules import LambdaSchedule, MultiStep, torch_sgd
from fastrain.training.standard import CoTrained, Frozen

def at_train(): return TRAINCallback(CoTrained(net(2, drop=.2), warmup=1), attack=quick(), lam=LambdaSchedule(5., 'ramp'))
def trades_train(): return TRAINCallback(CoTrained(net(2, drop=.2), warmup=1), robust=TRADES(), attack=quick())
def by_name(): return TRAINCallback('resnet10t_16', attack=quick())
def frozen(): return TRAINCallback(Frozen(net(2)), attack=quick())
def at(): return TRAINCallback(None, attack=quick())
def standard(): return TRAINCallback(None, robust=Natural())

def build(path, cb, opt_func=Adam, cbs=(), seed=1, metrics=None, main=None):
    "A learner from scratch: augmented and shuffled data, dropout, random starts, so that every generator counts"
    path.mkdir(exist_ok=True)
    seed_all(seed)
    dls = get_dls('digits', bs=16, n_train=64, n_test=24, device='cpu')
    return Learner(dls, net(seed, drop=.3) if main is None else main, CrossEntropyLossFlat(), opt_func=opt_func, path=path,
                   cbs=[cb(), *cbs],
                   metrics=[accuracy, RobustAccuracy(quick(), n=10)] if metrics is None else metrics)

def final(learn):
    std = learn.train_cb.standard_learner
    return dict(main=snapshot(learn.model), opt=copy.deepcopy(learn.opt.state_dict()),
                values=[list(v) for v in learn.recorder.values], losses=[float(l) for l in learn.recorder.losses[-4:]],
                std=std and dict(model=snapshot(std.model), opt=std.opt and copy.deepcopy(std.opt.state_dict())))

def stop_after(epoch):
    def stop(learn):
        if learn.epoch == epoch: raise KeyboardInterrupt
    return Call('after_epoch', stop, 99)

def run(learn, ckpt, n_epoch=4, method='fit_one_cycle', cbs=()): return quietly(learn, n_epoch, 3e-3, method, cbs=[ckpt, *cbs])

def interrupted(path, cb, stops=(1,), make_cbs=lambda: [], n_epoch=4, method='fit_one_cycle', fit_cbs=lambda: [], **kwargs):
    "Stopped after each of the epochs `stops`, and continued each time in a learner of other random weights"
    for i,epoch in enumerate([*stops, None]):
        learn = build(path, cb, cbs=make_cbs(), seed=i + 1, **kwargs)
        extra = [] if epoch is None else [stop_after(epoch)]
        try: run(learn, Checkpoint(path/'ckpt', 'pgd2_accuracy', resume=i > 0), n_epoch, method, [*fit_cbs(), *extra])
        except KeyboardInterrupt: assert epoch is not None
    return learn

def check(tmp_path, cb, make_cbs=lambda: [], fit_cbs=lambda: [], n_epoch=4, method='fit_one_cycle', stops=(1,), **kwargs):
    whole = run(build(tmp_path/'a', cb, cbs=make_cbs(), **kwargs), Checkpoint(tmp_path/'a'/'ckpt', 'pgd2_accuracy'), n_epoch,
                method, fit_cbs())
    parts = interrupted(tmp_path/'b', cb, stops, make_cbs, n_epoch, method, fit_cbs, **kwargs)
    a,b = final(whole),final(parts)
    for k in a: assert same(a[k], b[k]), k
    for f in ('last.pt', 'best.pt'):
        x,y = (torch.load(tmp_path/p/'ckpt'/f, weights_only=True) for p in 'ab')
        assert same(x['model'], y['model']) and x['epoch'] == y['epoch'] and x['values'] == y['values']
    return whole,parts

slow = pytest.mark.slow

@pytest.mark.parametrize('cb, opt_func', [(at_train, Adam), (trades_train, torch_sgd), pytest.param(at_train, torch_sgd, marks=slow),
                                          pytest.param(trades_train, Adam, marks=slow)])
def test_resumed(tmp_path, cb, opt_func): check(tmp_path, cb, opt_func=opt_func)

@pytest.mark.parametrize('cb', [at, pytest.param(standard, marks=slow), pytest.param(by_name, marks=slow)])
def test_resumed_other_methods(tmp_path, cb): check(tmp_path, cb)

@slow
def test_resumed_frozen(tmp_path): check(tmp_path, frozen)

def test_resumed_twice(tmp_path): check(tmp_path, at_train, stops=(0, 2))

@slow
def test_resumed_with_drops(tmp_path):
    check(tmp_path, at_train, fit_cbs=lambda: [MultiStep(.05, 4, (2, 3))], method='fit', opt_func=torch_sgd)

@pytest.mark.parametrize('stops', [(2,), pytest.param((0,), marks=slow)])
def test_resumed_with_trackers(tmp_path, stops, capsys):
    def trackers():
        return [SaveModelCallback('pgd2_accuracy'), EarlyStoppingCallback('robust_loss', min_delta=.05, patience=2), CSVLogger()]
    whole,parts = check(tmp_path, at_train, make_cbs=trackers, stops=stops, n_epoch=5)
    logs = [learn.csv_logger.read_log().drop(columns='time') for learn in (whole, parts)]
    assert logs[0].equals(logs[1])

@slow
def test_resumed_early_stopping_counts_on(tmp_path, capsys):
    "Patience that was half used up when the run stopped"
    whole,parts = check(tmp_path, at, make_cbs=lambda: [EarlyStoppingCallback('accuracy', min_delta=10, patience=3)], stops=(1,), n_epoch=8)
    assert len(whole.recorder.values) == len(parts.recorder.values) == 4

def test_interrupted_within_an_epoch(tmp_path):
    whole = run(build(tmp_path/'a', at_train), Checkpoint(tmp_path/'a'/'ckpt'))
    def stop(learn):
        if learn.training and learn.epoch == 2 and learn.iter == 1: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        run(build(tmp_path/'b', at_train), Checkpoint(tmp_path/'b'/'ckpt'), cbs=[Call('after_loss', stop, 90)])
    resumed = run(build(tmp_path/'b', at_train, seed=5), Checkpoint(tmp_path/'b'/'ckpt', resume=True))
    a,b = final(whole),final(resumed)
    for k in a: assert same(a[k], b[k]), k

def test_checkpoint_changes_nothing(tmp_path):
    a = quietly(build(tmp_path, at_train), 2, 3e-3, 'fit_one_cycle')
    b = run(build(tmp_path, at_train), Checkpoint(tmp_path/'ckpt'), 2)
    assert same(final(a), final(b))

def test_resume_without_a_checkpoint_starts(tmp_path):
    a,b = (run(build(tmp_path, at_train), Checkpoint(tmp_path/str(resume), resume=resume), 2) for resume in (True, False))
    assert same(final(a), final(b))

def test_finished_run_is_not_trained_again(tmp_path):
    a = run(build(tmp_path, at_train), Checkpoint(tmp_path/'ckpt'), 2)
    file = (tmp_path/'ckpt'/'last.pt').read_bytes()
    b = run(build(tmp_path, at_train, seed=4), Checkpoint(tmp_path/'ckpt', resume=True), 2)
    assert same(snapshot(a.model), snapshot(b.model)) and same([list(v) for v in a.recorder.values], [list(v) for v in b.recorder.values])
    assert same(snapshot(a.train_cb.standard_learner.model), snapshot(b.train_cb.standard_learner.model))
    assert file == (tmp_path/'ckpt'/'last.pt').read_bytes()

def test_best_is_the_best(tmp_path):
    kept = []
    learn = run(build(tmp_path, at_train), Checkpoint(tmp_path/'ckpt', 'accuracy'), 4,
                cbs=[Call('after_epoch', lambda l: kept.append((snapshot(l.model), snapshot(l.train_cb.standard_learner.model))), 98)])
    col = [v[learn.recorder.metric_names.index('accuracy') - 1] for v in learn.recorder.values]
    best = torch.load(tmp_path/'ckpt'/'best.pt', weights_only=True)
    i = int(np.argmax(col))
    assert best['epoch'] == i + 1 and same(best['model'], dict(kept[i][0]))
    assert same(best['callbacks']['train_cb']['standard']['model'], dict(kept[i][1]))

def test_checkpoints_load_safely_and_into_a_plain_model(tmp_path):
    learn = run(build(tmp_path, by_name), Checkpoint(tmp_path/'ckpt'), 1)
    for f in ('last.pt', 'best.pt'): assert same(torch.load(tmp_path/'ckpt'/f, weights_only=True)['model'], dict(snapshot(learn.model)))
    assert same(snapshot(load_weights(Net(drop=.3), tmp_path/'ckpt'/'last.pt')), snapshot(learn.model))

def test_two_learners_share_nothing(tmp_path):
    "`validate` and `lr_find` neither save nor resume"
    ckpt = Checkpoint(tmp_path/'ckpt')
    learn = build(tmp_path, at_train, cbs=[ckpt])
    with learn.no_bar(), learn.no_logging():
        learn.validate()
        learn.lr_find(num_it=6, show_plot=False)
        assert not (tmp_path/'ckpt').exists()
        learn.fit(1)
        before = (tmp_path/'ckpt'/'last.pt').read_bytes()
        learn.validate(); learn.get_preds()
        assert before == (tmp_path/'ckpt'/'last.pt').read_bytes()
        learn.fit(1) # its own file may be written again
    assert before != (tmp_path/'ckpt'/'last.pt').read_bytes()

# --- refused

@pytest.fixture(scope='module')
def stopped_once(tmp_path_factory):
    path = tmp_path_factory.mktemp('stopped')
    with pytest.raises(KeyboardInterrupt): run(build(path, at_train), Checkpoint(path/'ckpt'), cbs=[stop_after(1)])
    return path

@pytest.fixture
def stopped(stopped_once, tmp_path):
    "A copy to work on"
    shutil.copytree(stopped_once, tmp_path/'stopped')
    return tmp_path/'stopped'

def refused(learn, ckpt, error, match, **kwargs):
    "The error, the file as before, and the models as before"
    before = ckpt.last.read_bytes()
    main = snapshot(learn.model)
    std = snapshot(learn.train_cb.policy.standard) if learn.train_cb.policy else None
    with pytest.raises(error, match=match): run(learn, ckpt, **kwargs)
    assert ckpt.last.read_bytes() == before
    assert same(main, snapshot(learn.model)) and (std is None or same(std, snapshot(learn.train_cb.policy.standard)))

def test_other_number_of_epochs(stopped):
    refused(build(stopped, at_train), Checkpoint(stopped/'ckpt', resume=True), ValueError, '4 epochs, not 6', n_epoch=6)
def test_other_architecture(stopped):
    refused(build(stopped, at_train, main=net(1, width=6)), Checkpoint(stopped/'ckpt', resume=True), ValueError, 'does not fit Net')
def test_other_columns(stopped):
    refused(build(stopped, at_train, metrics=[accuracy]), Checkpoint(stopped/'ckpt', resume=True), ValueError, 'same metrics')
def test_other_method(stopped): refused(build(stopped, at), Checkpoint(stopped/'ckpt', resume=True), ValueError, 'has the columns')

def test_other_standard_model(stopped):
    def other(): return TRAINCallback(CoTrained(net(2, width=6), warmup=1), attack=quick(), lam=LambdaSchedule(5., 'ramp'))
    refused(build(stopped, other), Checkpoint(stopped/'ckpt', resume=True), ValueError, 'does not fit Net')

def test_other_optimizer(stopped):
    refused(build(stopped, at_train, opt_func=torch_sgd), Checkpoint(stopped/'ckpt', resume=True), ValueError, '(?i)optimizer')

def test_existing_run(stopped): refused(build(stopped, at_train), Checkpoint(stopped/'ckpt'), FileExistsError, 'resume=True')

@pytest.mark.parametrize('damage', [lambda b: b[:len(b)//2], lambda b: b[:100], lambda b: b'',
                                    lambda b: b'<!DOCTYPE html><html>404 Not Found</html>', lambda b: b[:2000] + bytes(2000) + b[4000:]])
def test_damaged(stopped, damage):
    last = stopped/'ckpt'/'last.pt'
    last.write_bytes(damage(last.read_bytes()))
    refused(build(stopped, at_train), Checkpoint(stopped/'ckpt', resume=True), ValueError, 'last.pt is not a checkpoint')

def test_unsafe(stopped):
    torch.save(dict(epoch=1, model=Net()), stopped/'ckpt'/'last.pt') # a pickled class
    refused(build(stopped, at_train), Checkpoint(stopped/'ckpt', resume=True), ValueError, 'safely')

def test_not_of_a_run(stopped):
    torch.save(Net().state_dict(), stopped/'ckpt'/'last.pt')
    refused(build(stopped, at_train), Checkpoint(stopped/'ckpt', resume=True), ValueError, 'last.pt')

def test_unknown_column(tmp_path):
    learn = build(tmp_path, at_train)
    main,std = snapshot(learn.model),snapshot(learn.train_cb.policy.standard)
    with pytest.raises(ValueError, match="monitor='pgd20_accuracy' is no column.*pgd2_accuracy"):
        run(learn, Checkpoint(tmp_path/'ckpt', 'pgd20_accuracy'))
    assert same(main, snapshot(learn.model)) and same(std, snapshot(learn.train_cb.policy.standard)) and not (tmp_path/'ckpt').exists()

def test_full_disk_keeps_the_last_checkpoint(stopped, monkeypatch):
    before = (stopped/'ckpt'/'last.pt').read_bytes()
    save = torch.save
    def fails(o, f, *args, **kwargs):
        save(o, f, *args, **kwargs)
        raise OSError(28, 'No space left on device')
    monkeypatch.setattr(torch, 'save', fails)
    with pytest.raises(OSError, match='disk full'): run(build(stopped, at_train), Checkpoint(stopped/'ckpt', resume=True))
    assert (stopped/'ckpt'/'last.pt').read_bytes() == before and {f.name for f in (stopped/'ckpt').iterdir()} == {'last.pt', 'best.pt'}

def at_train_with(**kwargs):
    return TRAINCallback(CoTrained(net(2, drop=.2), warmup=1), **dict(attack=quick(), lam=LambdaSchedule(5., 'ramp')) | kwargs)

@pytest.mark.parametrize('kwargs, match', [
    (dict(attack=quick(eps=.3)), r'training: attack.eps: 0.1 in the checkpoint, 0.3 now\. Resume with the same settings'),
    (dict(attack=quick(steps=3, eps=.1, alpha=.02)), r'attack.alpha: 0.05 in the checkpoint, 0.02 now; attack.steps: 2'),
    (dict(lam=LambdaSchedule(7., 'ramp')), r'lam.lam_max: 5.0 in the checkpoint, 7.0 now'),
    (dict(robust=AT(confidence=.7)), r'robust.confidence: 1.* in the checkpoint, 0.7 now'),
    (dict(average=EMA()), r'average: None in the checkpoint, EMA now|has the columns')])
def test_other_settings(stopped, kwargs, match):
    "What trains now is not what trained the weights"
    refused(build(stopped, lambda: at_train_with(**kwargs)), Checkpoint(stopped/'ckpt', resume=True), ValueError, match)

def test_other_loss_function(stopped):
    learn = build(stopped, at_train)
    learn.loss_func = CrossEntropyLossFlat(weight=torch.ones(10)*2)
    refused(learn, Checkpoint(stopped/'ckpt', resume=True), ValueError, r'loss_func.weight: None in the checkpoint, \[2.0, 2.0')

def test_other_learning_rate(stopped):
    "Scheduled, and constant"
    def again(**kwargs):
        learn = build(stopped, at_train)
        with pytest.raises(ValueError, match=r'lr: \[0.00012, 0.003, .*\] in the checkpoint, \[0.0004, 0.01, '):
            quietly(learn, 4, 1e-2, 'fit_one_cycle', cbs=[Checkpoint(stopped/'ckpt', resume=True)], **kwargs)
    again()
    learn = build(stopped, at_train)
    with pytest.raises(ValueError, match='wd: 0.01 in the checkpoint, 0.1 now'):
        quietly(learn, 4, 3e-3, 'fit_one_cycle', cbs=[Checkpoint(stopped/'ckpt', resume=True)], wd=.1)

def test_file_that_does_not_say_what_trained_it(stopped):
    "As of earlier versions: it goes on as before"
    state = torch.load(stopped/'ckpt'/'last.pt', weights_only=True)
    del state['training']
    torch.save(state, stopped/'ckpt'/'last.pt')
    assert len(run(build(stopped, at_train), Checkpoint(stopped/'ckpt', resume=True)).recorder.values) == 4

# --- longer runs, lost files

def test_a_run_becomes_longer(tmp_path):
    "With a constant learning rate, bit for bit what it would have been"
    whole = run(build(tmp_path/'a', at), Checkpoint(tmp_path/'a'/'ckpt', longer=True), 3, 'fit')
    run(build(tmp_path/'b', at), Checkpoint(tmp_path/'b'/'ckpt'), 2, 'fit')
    refused(build(tmp_path/'b', at), Checkpoint(tmp_path/'b'/'ckpt', resume=True), ValueError, '2 epochs, not 3', n_epoch=3, method='fit')
    again = run(build(tmp_path/'b', at, seed=2), Checkpoint(tmp_path/'b'/'ckpt', resume=True, longer=True), 3, 'fit')
    a,b = final(whole),final(again)
    for k in a: assert same(a[k], b[k]), k
    refused(build(tmp_path/'b', at), Checkpoint(tmp_path/'b'/'ckpt', resume=True, longer=True), ValueError, '3 epochs, not 2', n_epoch=2)

def test_the_best_is_written_first(stopped, monkeypatch):
    "A disk that is full at `last.pt`: the epoch is trained again, and nothing is missing"
    whole = run(build(stopped/'whole', at_train), Checkpoint(stopped/'whole'/'ckpt', 'pgd2_accuracy'))
    part = stopped/'part'
    from fastrain.training import checkpoint
    save = checkpoint.save_tensors
    def fails(path, o):
        if path.name == 'last.pt' and o['epoch'] == 2: raise OSError(28, 'No space left on device')
        save(path, o)
    with monkeypatch.context() as m:
        m.setattr(checkpoint, 'save_tensors', fails)
        with pytest.raises(OSError): run(build(part, at_train), Checkpoint(part/'ckpt', 'pgd2_accuracy'))
    again = run(build(part, at_train, seed=2), Checkpoint(part/'ckpt', 'pgd2_accuracy', resume=True))
    a,b = final(whole),final(again)
    for k in a: assert same(a[k], b[k]), k
    x,y = (torch.load(p/'ckpt'/'best.pt', weights_only=True) for p in (stopped/'whole', part))
    assert x['epoch'] == y['epoch'] and same(x['model'], y['model'])

def better(learn):
    "Makes each epoch better than the one before"
    learn.recorder.values[-1][1] = -float(learn.epoch)

def worse(learn): learn.recorder.values[-1][1] = float(learn.epoch)

@pytest.mark.parametrize('damage', [lambda f: f.unlink(), lambda f: f.write_bytes(b'PK'), lambda f: torch.save([1, 2], f)])
def test_best_is_written_again(tmp_path, damage):
    "From `last.pt`, where the last epoch is the best"
    run(build(tmp_path, at), Checkpoint(tmp_path/'ckpt'), 2, cbs=[Call('after_epoch', better, 64)])
    before = torch.load(tmp_path/'ckpt'/'best.pt', weights_only=True)
    damage(tmp_path/'ckpt'/'best.pt')
    run(build(tmp_path, at), Checkpoint(tmp_path/'ckpt', resume=True), 2)
    after = torch.load(tmp_path/'ckpt'/'best.pt', weights_only=True)
    assert after.keys() == before.keys() and after['epoch'] == 2 and same(after['model'], before['model'])

def test_best_is_lost(tmp_path):
    "It is said, and training goes on; what is no better is not called the best"
    with pytest.raises(KeyboardInterrupt):
        run(build(tmp_path, at), Checkpoint(tmp_path/'ckpt'), 4, cbs=[Call('after_epoch', worse, 64), stop_after(1)])
    (tmp_path/'ckpt'/'best.pt').unlink()
    with pytest.warns(UserWarning, match='best.pt is not there or not of epoch 1, which was the best: its weights are lost'):
        run(build(tmp_path, at), Checkpoint(tmp_path/'ckpt', resume=True), 4, cbs=[Call('after_epoch', worse, 64)])
    assert not (tmp_path/'ckpt'/'best.pt').exists()

@pytest.mark.parametrize('state', [[1, 2], {}, dict(epoch=1), 5, None])
def test_files_of_another_kind(stopped, state):
    torch.save(state, stopped/'ckpt'/'last.pt')
    refused(build(stopped, at_train), Checkpoint(stopped/'ckpt', resume=True), ValueError,
            'last.pt is not a checkpoint to resume from: it has no .*Remove it, and training starts anew')

def test_only_callbacks_with_a_state_of_their_own_are_saved(tmp_path):
    "fastai's callbacks pass what they lack on to the learner and its model, whose `state_dict` is not theirs"
    run(build(tmp_path, at), Checkpoint(tmp_path/'ckpt'), 1)
    assert list(torch.load(tmp_path/'ckpt'/'last.pt', weights_only=True)['callbacks']) == ['train_cb']

def test_resumed_with_another_logger(stopped):
    learn = run(build(stopped, at_train, cbs=[CSVLogger()]), Checkpoint(stopped/'ckpt', resume=True))
    assert len(learn.csv_logger.read_log()) == 4

# --- files of version 0.1

def as_of_0_1(file):
    "The layout of version 0.1: relations by their term alone"
    state = torch.load(file, weights_only=True)
    del state['version']
    cb = state['callbacks']['train_cb']
    for part in ('pieces', 'modules'): cb[part] = {n.removeprefix('relations.'): s for n,s in cb[part].items()}
    torch.save(state, file)

def with_state(): return TRAINCallback(net(2, drop=.2), relation=[Topology(), CRD(k=8, dim=4)], attack=quick(), average=EMA())

def test_resumed_from_a_file_of_0_1(tmp_path):
    whole = run(build(tmp_path/'a', with_state), Checkpoint(tmp_path/'a'/'ckpt'), 2)
    with pytest.raises(KeyboardInterrupt): run(build(tmp_path/'b', with_state), Checkpoint(tmp_path/'b'/'ckpt'), 2, cbs=[stop_after(0)])
    for name in ('last.pt', 'best.pt'): as_of_0_1(tmp_path/'b'/'ckpt'/name)
    old = torch.load(tmp_path/'b'/'ckpt'/'last.pt', weights_only=True)
    assert set(old['callbacks']['train_cb']['pieces']) == {'crd', 'average'}
    resumed = run(build(tmp_path/'b', with_state, seed=3), Checkpoint(tmp_path/'b'/'ckpt', resume=True), 2)
    a,b = final(whole),final(resumed)
    for k in a: assert same(a[k], b[k]), k
    assert same(whole.train_cb.state_dict(), resumed.train_cb.state_dict())

def test_what_is_in_a_file(tmp_path):
    "The averaged weights and the standard model, whatever the version"
    learn = run(build(tmp_path, with_state), Checkpoint(tmp_path/'ckpt'), 1)
    std = learn.train_cb.policy.model
    for _ in range(2):
        for name in ('last.pt', 'best.pt'):
            state = torch.load(tmp_path/'ckpt'/name, weights_only=True)
            assert same(dict(averaged_weights(state)), dict(snapshot(learn.train_cb.average.model)))
            assert same(dict(standard_state(state)['model']), dict(snapshot(std)))
            assert set(read_state(state)['callbacks']['train_cb']['pieces']) == {'relations.crd', 'average'}
            if 'version' in state: as_of_0_1(tmp_path/'ckpt'/name)
    run(build(tmp_path/'plain', at), Checkpoint(tmp_path/'plain'/'ckpt'), 1)
    state = torch.load(tmp_path/'plain'/'ckpt'/'last.pt', weights_only=True)
    assert averaged_weights(state) is standard_state(state) is None
    assert averaged_weights(dict(model={})) is standard_state(dict(model={}, callbacks={})) is None
