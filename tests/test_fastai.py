"The callback among fastai's tools: each does what it does with a plain learner"
import contextlib, copy, warnings

import numpy as np
import pytest
import torch
from fastai.callback import fp16
from fastai.callback.core import Callback, CancelBatchException, CancelEpochException
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.hook import * # noqa: F403  Learner.summary
from fastai.callback.mixup import CutMix, MixUp
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import * # noqa: F403  fit_one_cycle, lr_find
from fastai.callback.tracker import EarlyStoppingCallback, SaveModelCallback, TerminateOnNaNCallback
from fastai.callback.training import BnFreeze, GradientAccumulation, GradientClip, ShortEpochCallback
from fastai.interpret import ClassificationInterpretation, Interpretation
from fastai.learner import Learner, load_learner
from fastai.losses import BCEWithLogitsLossFlat, CrossEntropyLossFlat, FocalLossFlat, LabelSmoothingCrossEntropyFlat, MSELossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam, OptimWrapper
from torch import nn

from conftest import Call, digit_dls, digits, hooks, make_learner, net, quick, quietly, same, snapshot
from fastrain.training.callback import Column, TRAINCallback
from fastrain.core import seed_all
from fastrain.data.sources import get_dls
from fastrain.training.metrics import RobustAccuracy
from fastrain.pieces.losses import AT, RobustLoss, TRADES, Natural
from fastrain.models.backbone import backbone_splitter, create_backbone
from fastrain.training.schedules import torch_sgd
from fastrain.training.standard import CoTrained, Frozen

pytestmark = pytest.mark.filterwarnings('ignore:load_learner', 'ignore:.*torch.cuda.amp', 'ignore:User provided device_type',
                                        'ignore:.*GradScaler.*', 'ignore:.*CUDA is not available')

def learner(cb=True, main=None, std=None, cbs=(), n=32, bs=8, metrics=accuracy, **kwargs):
    "A learner on digits with TRAIN, or without"
    cb = TRAINCallback(net(2) if std is None else std, attack=quick()) if cb is True else cb
    return make_learner(digit_dls(n, bs), net(1) if main is None else main, [*([cb] if cb else []), *cbs], metrics, **kwargs)

def pixels(cb=True, **kwargs):
    "The same on the library's own loaders, which can decode and show"
    dls = get_dls('digits', bs=8, n_train=40, n_test=20, device='cpu')
    return Learner(dls, net(1), CrossEntropyLossFlat(), cbs=TRAINCallback(net(2), attack=quick()) if cb else None, metrics=accuracy,
                   **kwargs)

def models(learn): return dict(main=snapshot(learn.model), std=snapshot(learn.train_cb.standard_learner.model))
def opts(learn): # fastai itself leaves another lr in the main optimizer's settings after a search
    return dict(main=copy.deepcopy(learn.opt.state_dict()['state']), std=copy.deepcopy(learn.train_cb.standard_learner.opt.state_dict()))
def column(learn, name): return [v[learn.recorder.metric_names.index(name) - 1] for v in learn.recorder.values]

@contextlib.contextmanager
def unchanged(learn):
    "Models, optimizers, modes, metrics and hooks stay as they are"
    def state():
        return dict(models(learn), opts=opts(learn), metrics=list(learn.metrics.attrgot('name')), cbs=[cb.name for cb in learn.cbs],
                             hooks=hooks(learn.model) + hooks(learn.train_cb.standard_learner.model))
    before = state()
    yield
    after = state()
    for k in before: assert same(before[k], after[k]), k

# --- training

@pytest.mark.parametrize('method', ['fit', 'fit_one_cycle', 'fit_flat_cos'])
def test_fits(method):
    learn = learner()
    quietly(learn, 2, 3e-3, method)
    assert len(learn.recorder.values) == 2 and np.isfinite(learn.recorder.values).all()
    assert list(learn.metrics.attrgot('name')) == ['accuracy'] and hooks(learn.model) == 0

def test_learns():
    learn = learner(n=640, bs=32)
    quietly(learn, 5, 1e-2, 'fit_one_cycle')
    assert column(learn, 'robust_loss')[-1] < .75*column(learn, 'robust_loss')[0]
    assert column(learn, 'accuracy')[-1] > .5 and column(learn, 'std_accuracy')[-1] > .8

@pytest.mark.parametrize('fresh', [True, False])
@pytest.mark.parametrize('opt_func', [Adam, torch_sgd])
def test_lr_find(tmp_path, fresh, opt_func):
    learn = learner(path=tmp_path, opt_func=opt_func, std=CoTrained(net(2), warmup=0))
    before_fit = snapshot(learn.model)
    if fresh: # M and its optimizer are made by the search itself
        with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False, stop_div=False)
        assert same(before_fit, snapshot(learn.model)) and same(snapshot(learn.train_cb.standard_learner.model), snapshot(net(2)))
    else:
        quietly(learn, 1, 3e-3)
        with unchanged(learn), learn.no_bar(): found = learn.lr_find(num_it=6, show_plot=False, stop_div=False)
        assert found.valley > 0
    assert len(learn.recorder.losses) == 6
    quietly(learn, 1, 3e-3)
    assert not same(before_fit, snapshot(learn.model))

def test_lr_find_then_fit_equals_fit(tmp_path):
    def run(search):
        learn = learner(path=tmp_path)
        if search:
            with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
        learn.dls = digit_dls() # a search shuffles the loaders, in plain fastai too
        seed_all(1)
        return models(quietly(learn, 1, 3e-3))
    assert same(run(True), run(False))

def test_lr_find_does_not_warm_up(tmp_path):
    std = net(2)
    learn = learner(std=CoTrained(std, warmup=1), path=tmp_path)
    with learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    assert same(snapshot(std), snapshot(net(2))) and not learn.train_cb.policy._warm

def test_freeze_and_discriminative_rates():
    main = create_backbone('resnet10t_16', 10, small_images=False)
    learn = learner(main=main, splitter=backbone_splitter, std='resnet10t_16')
    learn.freeze()
    before = {n: p.clone() for n,p in main.named_parameters()}
    quietly(learn, 1, 3e-3)
    changed = {n for n,p in main.named_parameters() if not torch.equal(p, before[n])}
    # fastai trains frozen norms
    norms = {f'{n}.{k}' for n,m in main.named_modules() if isinstance(m, nn.BatchNorm2d) for k in ('weight', 'bias')}
    head = {n for n,_ in main.named_parameters() if '.fc.' in n}
    assert head and head <= changed <= head | norms
    learn.unfreeze()
    seen = []
    def keep(l): seen.append(([h['lr'] for h in l.opt.hypers], l.train_cb.standard_learner.opt.hypers[0]['lr']))
    quietly(learn, 1, slice(1e-4, 1e-2), cbs=Call('after_step', keep, 90))
    groups,std_lr = seen[0]
    assert groups == pytest.approx([1e-4, 1e-2]) and std_lr == pytest.approx(1e-2)
    assert all(not torch.equal(p, before[n]) for n,p in main.named_parameters())

class Steps:
    "Counts the steps of an optimizer"
    def __init__(self, opt):
        self.n,step = 0,opt.step
        def counted(*args, **kwargs):
            self.n += 1
            return step(*args, **kwargs)
        opt.step = counted

@pytest.mark.parametrize('robust', [None, TRADES()])
def test_accumulation_equals_a_larger_batch(robust):
    def run(bs, cbs):
        main,std = net(1, bn=False),net(2, bn=False)
        # a draw would differ with the size of the batch; and a relation does not add up, being of the pairs of one batch
        cb = TRAINCallback(std, robust=robust, attack=quick(start='natural', objective='ce'), relation=False)
        learn = make_learner(digit_dls(32, bs, shuffle=False), main, [cb, *cbs], opt_func=torch_sgd)
        learn.create_opt()
        quietly(learn, 2, .05)
        return models(learn)
    a,b = run(16, []),run(4, [GradientAccumulation(16)])
    for k in a:
        for n in a[k]: torch.testing.assert_close(a[k][n], b[k][n], rtol=1e-4, atol=1e-5)
    assert not same(a['main'], snapshot(net(1, bn=False)))

def test_accumulation_steps_both():
    steps = {}
    def watch(learn): steps.update(main=Steps(learn.opt), std=Steps(learn.train_cb.standard_learner.opt))
    quietly(learner(cbs=[GradientAccumulation(16), Call('before_train', watch, 90)]))
    assert steps['main'].n == steps['std'].n == 2 # 4 batches of 8

def test_accumulated_relation_is_scaled():
    "The topology loss is divided like all the rest: two batches of 8 give the mean of their gradients"
    grads = {}
    def run(name, cbs):
        learn = make_learner(digit_dls(16, 8, shuffle=False), net(1, bn=False),
                             [TRAINCallback(net(2, bn=False), attack=quick(start='natural'), lam=50.), *cbs], opt_func=torch_sgd)
        def keep(l):
            grads.setdefault(name, []).append([p.grad.clone() for p in (l.model.fc.weight, l.train_cb.standard_learner.model.fc.weight)])
        quietly(learn, 1, 1e-30, cbs=Call('before_step', keep, 90)) # too small a step to move a weight
    run('each', [])
    run('both', [GradientAccumulation(16)])
    for i in range(2): torch.testing.assert_close(grads['both'][0][i], (grads['each'][0][i] + grads['each'][1][i])/2, rtol=1e-4, atol=1e-6)

def test_clips_each_model_by_its_own_norm():
    norms = []
    class AfterClip(torch.optim.SGD):
        def step(self, *args):
            norms.append(torch.stack([p.grad.norm() for g in self.param_groups for p in g['params']]).norm().item())
            return super().step(*args)
    def opt_func(params, lr=.1, **kwargs): return OptimWrapper(params, AfterClip, lr=lr)
    quietly(learner(opt_func=opt_func, cbs=[GradientClip(1e-3)]), 1, .01)
    assert norms == pytest.approx([1e-3]*8, rel=1e-2) # M' and M, batch by batch

def test_clipped_standard_model_is_that_trained_alone():
    learn = learner(cbs=[GradientClip(.05)])
    quietly(learn, 2, 3e-3, 'fit_one_cycle')
    alone = quietly(learner(None, net(2), cbs=[GradientClip(.05)]), 2, 3e-3, 'fit_one_cycle')
    assert same(models(learn)['std'], snapshot(alone.model))

def test_accumulated_standard_model_is_that_trained_alone():
    learn = quietly(learner(cbs=[GradientAccumulation(16)]), 2, 3e-3, 'fit_one_cycle')
    alone = quietly(learner(None, net(2), cbs=[GradientAccumulation(16)]), 2, 3e-3, 'fit_one_cycle')
    got = models(learn)['std']
    for k,v in snapshot(alone.model).items(): torch.testing.assert_close(got[k], v, rtol=1e-5, atol=1e-6)

# --- watching and stopping

def test_save_best_robust_model(tmp_path, capsys):
    robust = RobustAccuracy(quick(), n=16)
    kept = []
    learn = learner(metrics=[accuracy, robust], path=tmp_path,
                    cbs=[SaveModelCallback('pgd2_accuracy', fname='best'),
                         Call('after_epoch', lambda l: kept.append(snapshot(l.model)), 90)])
    quietly(learn, 4, 3e-3)
    best = int(np.argmax(column(learn, 'pgd2_accuracy')))
    assert same(snapshot(learn.model), kept[best]) and (tmp_path/'models'/'best.pth').is_file()

@pytest.mark.parametrize('monitor', ['robust_loss', 'l_tp', 'std_accuracy', 'pgd2_accuracy'])
def test_early_stopping(monitor, tmp_path, capsys):
    learn = learner(metrics=[accuracy, RobustAccuracy(quick(), n=8)], cbs=[EarlyStoppingCallback(monitor, min_delta=100, patience=2)])
    quietly(learn, 6, 1e-4)
    assert len(learn.recorder.values) == 3 and list(learn.metrics.attrgot('name')) == ['accuracy', 'pgd2_accuracy']

class EMA(Callback):
    "Validates with an average of the weights, as averaging callbacks do"
    order = 80
    def before_fit(self): self.mean = snapshot(self.learn.model)
    def after_step(self):
        for k,v in self.learn.model.state_dict().items(): self.mean[k] = .5*self.mean[k] + .5*v if v.is_floating_point() else v.clone()
    def before_validate(self):
        self.raw = snapshot(self.learn.model)
        self.learn.model.load_state_dict(self.mean)
    def after_validate(self): self.learn.model.load_state_dict(self.raw)

def test_averaged_weights():
    plain,ema = learner(metrics=[accuracy, RobustAccuracy(quick())]),learner(metrics=[accuracy, RobustAccuracy(quick())], cbs=[EMA()])
    for learn in (plain, ema):
        seed_all(0)
        quietly(learn, 2, 3e-3)
    assert same(models(plain), models(ema)) # training is not touched
    assert column(plain, 'robust_loss') == column(ema, 'robust_loss') and column(plain, 'valid_loss') != column(ema, 'valid_loss')
    x,y = digits('test', 24)
    ema.model.load_state_dict(ema.ema.mean)
    with torch.no_grad(): assert column(ema, 'accuracy')[-1] == pytest.approx((ema.model.eval()(x).argmax(1) == y).float().mean().item())

def test_batch_norm_of_frozen_layers():
    main = net(1)
    for p in main.bn1.parameters(): p.requires_grad_(False)
    learn = learner(main=main, cbs=[BnFreeze()])
    before = snapshot(main.bn1)
    quietly(learn)
    assert same(before, snapshot(main.bn1))

# --- cancels and interrupts

def test_short_epoch():
    learn = learner(cbs=[ShortEpochCallback(.3)])
    quietly(learn, 2)
    assert learn.train_cb.standard_learner.model.bn1.num_batches_tracked == 2*3
    assert list(learn.metrics.attrgot('name')) == ['accuracy'] and hooks(learn.model) == 0
    learn.remove_cb(ShortEpochCallback)
    quietly(learn)
    assert len(learn.recorder.values[-1]) == 7

@pytest.mark.parametrize('event, order', [('before_batch', 0), ('before_batch', 7), ('after_pred', 0), ('after_loss', 0),
                                          ('after_loss', 90)])
def test_cancelled_batches(event, order):
    def cancel(learn):
        if learn.training and learn.iter % 2: raise CancelBatchException
    learn = learner(cbs=[Call(event, cancel, order)])
    quietly(learn, 2)
    assert hooks(learn.model) == hooks(learn.train_cb.standard_learner.model) == 0
    std = learn.train_cb.standard_learner
    assert learn.opt.state[learn.model.fc.weight]['step'] == std.opt.state[std.model.fc.weight]['step'] == 4

def test_cancelled_epoch():
    def cancel(learn):
        if learn.epoch == 0: raise CancelEpochException
    learn = learner(cbs=[Call('before_epoch', cancel, 90)])
    quietly(learn, 2)
    assert learn.train_cb.standard_learner.model.bn1.num_batches_tracked == 4

def interrupt(event, order, batch=2):
    def stop(learn):
        if learn.training and learn.iter == batch: raise KeyboardInterrupt
    return Call(event, stop, order)

places = [('before_batch', 0), ('before_batch', 7), ('after_pred', 0), ('after_loss', 0), ('after_loss', 90), ('before_step', 90),
          ('after_step', 90)]

@pytest.mark.parametrize('event, order', places)
def test_interrupted_then_fitted_again(event, order):
    learn = learner()
    with pytest.raises(KeyboardInterrupt): quietly(learn, 1, cbs=interrupt(event, order))
    with learn.no_bar(), learn.no_logging(): assert len(learn.validate()) == 2
    quietly(learn)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'robust_loss', 'l_tp', 'lambda',
                                                 'std_accuracy', 'time']
    assert list(learn.metrics.attrgot('name')) == ['accuracy']
    assert hooks(learn.model) == hooks(learn.train_cb.standard_learner.model) == 0
    assert learn.model.training == learn.train_cb.standard_learner.model.training

def test_interrupted_attack():
    class Stops(type(quick())):
        calls = 0
        def __call__(self, model, x, y, **kwargs):
            self.calls += 1
            if self.calls == 2: model.register_forward_pre_hook(self._stop)
            return super().__call__(model, x, y, **kwargs)
        def _stop(self, *args): raise KeyboardInterrupt
    main = net(1, drop=.5)
    learn = learner(TRAINCallback(net(2), attack=Stops(.1, .05, 2)), main)
    with pytest.raises(KeyboardInterrupt): quietly(learn)
    assert all(m.training for m in main.modules())

@pytest.mark.parametrize('event, order', places)
def test_interrupted_callback_of_one_fit(event, order):
    "With `fit(cbs=)` the callback is gone after an interrupt, and so must be all that it added"
    learn = learner(None)
    with pytest.raises(KeyboardInterrupt): quietly(learn, 1, cbs=[TRAINCallback(net(2), attack=quick()), interrupt(event, order)])
    assert not any(isinstance(m, Column) for m in learn.metrics)
    assert hooks(learn.model) == 0
    quietly(learn)
    assert list(learn.recorder.metric_names) == ['epoch', 'train_loss', 'valid_loss', 'accuracy', 'time']

def test_error_in_a_batch_of_one_fit():
    def fail(learn): raise RuntimeError('out of memory')
    learn = learner(None)
    with pytest.raises(RuntimeError, match='out of memory'):
        quietly(learn, 1, cbs=[TRAINCallback(net(2), attack=quick()), Call('after_pred', fail, 0)])
    assert list(learn.metrics.attrgot('name')) == ['accuracy'] and hooks(learn.model) == 0

def test_interrupted_lr_find_then_fit(tmp_path):
    learn = learner(path=tmp_path, cbs=[])
    learn.add_cb(stop := interrupt('after_loss', 90))
    with pytest.raises(KeyboardInterrupt), learn.no_bar(): learn.lr_find(num_it=6, show_plot=False)
    learn.remove_cb(stop)
    quietly(learn)
    assert len(learn.recorder.values[-1]) == 7

def test_non_finite_search_ends(tmp_path):
    learn = learner(path=tmp_path, opt_func=torch_sgd)
    with learn.no_bar(): learn.lr_find(start_lr=1., end_lr=1e30, num_it=12, show_plot=False, stop_div=False, suggest_funcs=())
    assert all(v.isfinite().all() for m in models(learn).values() for v in m.values())

# --- precision

def test_float16_without_a_gpu():
    "Without CUDA fastai's mixed precision disables itself; both models must train as without it"
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    learn = learner(cbs=[GradientClip(.05)])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        seed_all(0)
        quietly(learn.to_fp16(), 2, 3e-3)
    plain = learner(cbs=[GradientClip(.05)])
    seed_all(0)
    assert same(models(learn), models(quietly(plain, 2, 3e-3)))

@pytest.fixture
def cpu_amp(monkeypatch):
    "fastai's mixed precision with a scaler that works on the CPU, and bfloat16 for float16"
    scalers,settings = [],dict(init_scale=2.**10)
    def scaler(device, **kwargs):
        scalers.append(torch.amp.GradScaler('cpu', **{**kwargs, **settings}))
        return scalers[-1]
    monkeypatch.setattr(fp16, 'GradScaler', scaler)
    monkeypatch.setattr(fp16, 'autocast', lambda device, dtype: torch.autocast('cpu', dtype=torch.bfloat16))
    scalers.append(settings)
    return scalers

def test_scaled_gradients(cpu_amp):
    "M follows the scale: its optimizer sees plain gradients"
    learn = learner(cbs=[GradientClip(.05), MixedPrecision()], opt_func=torch_sgd, wd=0.)
    grads,lr = [],.05
    def keep(l): grads.append(torch.stack([p.grad.norm() for p in l.train_cb.standard_learner.model.parameters()]).norm().item())
    before = snapshot(net(2))
    quietly(learn, 1, lr, cbs=Call('before_step', keep, 3))
    moved = torch.stack([(p - before[n]).norm() for n,p in learn.train_cb.standard_learner.model.named_parameters()]).norm().item()
    assert max(grads) > 100 # they were scaled by 1024
    assert 0 < moved < .05*lr*4*4 # four clipped steps, with momentum

def test_overflow_skips_a_step(cpu_amp):
    cpu_amp[0]['init_scale'] = 2.**127
    learn = learner(cbs=[MixedPrecision()], n=8)
    quietly(learn, 1, 3e-3)
    for m in models(learn).values(): assert all(v.isfinite().all() for v in m.values())
    assert 'step' not in learn.opt.state[learn.model.fc.weight]
    cpu_amp[0]['init_scale'] = 2.**10
    quietly(learn, 1, 3e-3) # no left-over infinities in the gradients
    assert not same(models(learn)['std'], snapshot(net(2))) and all(v.isfinite().all() for v in models(learn)['std'].values())

def test_autocast_covers_both_models_and_the_attack(cpu_amp):
    dtypes = {}
    main,std = net(1),net(2)
    for name,m in (('main', main), ('std', std)):
        m.conv2.register_forward_hook(lambda m, i, o, name=name: dtypes.setdefault(name, set()).add(o.dtype)
                                      if torch.is_grad_enabled() else None)
    losses = []
    learn = learner(TRAINCallback(std, attack=quick()), main,
                    cbs=[MixedPrecision(), Call('after_loss',
                                                lambda l: losses.append(l.train_cb.terms['l_tp'].dtype) if l.training else None, 6)])
    quietly(learn, 1, 3e-3)
    assert dtypes == dict(main={torch.bfloat16}, std={torch.bfloat16}) and set(losses) == {torch.float32}
    assert not torch.is_autocast_enabled('cpu')

def test_attack_sees_the_weights_of_this_step(cpu_amp):
    "Autocast keeps the weights it has cast as long as its region is open; each attack must see those after the last step"
    starts = []
    class Watch(type(quick())):
        def __call__(self, model, x, y, **kwargs):
            with torch.no_grad(): starts.append(model(x[:1]).float())
            return super().__call__(model, x, y, **kwargs)
    learn = learner(TRAINCallback(net(2), attack=Watch(.1, .05, 2)), cbs=[MixedPrecision()], opt_func=torch_sgd)
    quietly(learn, 1, .5)
    assert len({tuple(s.flatten().tolist()) for s in starts}) == 4

# --- inference

def test_validate():
    learn = learner(metrics=[accuracy, RobustAccuracy(quick())])
    want = quietly(learn).recorder.values[-1][1:4]
    with unchanged(learn), learn.no_bar(): assert list(learn.validate()) == pytest.approx(want)

def test_validate_before_fit():
    learn = learner()
    before = snapshot(learn.model)
    with learn.no_bar(): assert len(learn.validate()) == 2
    assert same(before, snapshot(learn.model)) and hooks(learn.model) == 0

def test_get_preds():
    learn = quietly(learner())
    x,y = digits('test', 24)
    with unchanged(learn), learn.no_bar(): p,t,loss = learn.get_preds(with_loss=True)
    with torch.no_grad(): z = learn.model.eval()(x)
    torch.testing.assert_close(p, z.softmax(1))
    torch.testing.assert_close(loss, nn.functional.cross_entropy(z, y, reduction='none'))
    assert torch.equal(t, y)

def test_predict_and_show():
    learn = quietly(pixels())
    image = np.full((32, 32, 3), 100, np.uint8)
    with unchanged(learn), learn.no_bar():
        label,i,p = learn.predict(image)
        learn.show_results(max_n=4)
        interp = ClassificationInterpretation.from_learner(learn)
        assert interp.confusion_matrix().sum() == 20
        interp.plot_top_losses(2)
        assert len(Interpretation.from_learner(learn).top_losses(3)[0]) == 3
    with torch.no_grad(): want = learn.model.eval()(torch.full((1, 3, 32, 32), 100/255)).softmax(1)[0]
    torch.testing.assert_close(p, want)
    assert label == learn.dls.vocab[want.argmax()]

def test_summary():
    learn = quietly(learner())
    with unchanged(learn), learn.no_bar(): assert 'Conv2d' in str(learn.summary())

def test_summary_before_fit(): # the first thing that many do with a learner
    learn = learner(std=CoTrained(net(2), warmup=1))
    with learn.no_bar(): assert 'Conv2d' in str(learn.summary())
    assert same(snapshot(learn.train_cb.policy.standard), snapshot(net(2))) # a summary trains nothing
    assert list(learn.metrics.attrgot('name')) == ['accuracy'] and hooks(learn.model) == 0
    quietly(learn)

@pytest.mark.parametrize('fitted', [True, False])
def test_time_augmentation(fitted):
    learn,plain = pixels(),pixels(cb=False)
    if fitted:
        quietly(learn)
        plain.model.load_state_dict(learn.model.state_dict())
    with learn.no_bar(), plain.no_bar():
        seed_all(3)
        want = plain.tta(n=2)[0]
        seed_all(3)
        got = learn.tta(n=2)[0]
    torch.testing.assert_close(got, want)
    if not fitted: assert same(snapshot(learn.train_cb.policy.standard), snapshot(net(2)))

def test_show_training_loop(capsys):
    learner().show_training_loop()
    assert 'TRAINCallback' in capsys.readouterr().out

# --- files

@pytest.mark.parametrize('fitted', [True, False])
def test_export(tmp_path, fitted):
    plain = pixels(cb=False, path=tmp_path)
    plain.export('plain.pkl')
    big = create_backbone('resnet10t_16', 10)
    learn = Learner(plain.dls, plain.model, CrossEntropyLossFlat(), cbs=TRAINCallback(big, attack=quick()), metrics=accuracy, path=tmp_path)
    if fitted: quietly(learn)
    learn.export('train.pkl')
    exported,plain = ((tmp_path/name).stat().st_size for name in ('train.pkl', 'plain.pkl'))
    assert exported < 1.2*plain + 2e4 < 4*sum(p.numel() for p in big.parameters())
    loaded = load_learner(tmp_path/'train.pkl')
    image = np.full((32, 32, 3), 100, np.uint8)
    with learn.no_bar(), loaded.no_bar(): assert torch.equal(loaded.predict(image)[2], learn.predict(image)[2])
    assert not any('standard' in k for cb in loaded.cbs for k in vars(cb)) and list(loaded.metrics.attrgot('name')) == ['accuracy']
    with learn.no_bar(): learn.predict(image)
    if fitted: quietly(learn) # exporting leaves the learner as it was

def test_save_and_load(tmp_path):
    learn = quietly(learner(path=tmp_path))
    learn.save('m')
    before = models(learn)
    quietly(learn)
    learn.load('m')
    assert same(snapshot(learn.model), before['main'])
    plain = learner(None, net(7), path=tmp_path).load('m') # without the callback too
    assert same(snapshot(plain.model), before['main'])

def test_csv_logger(tmp_path):
    learn = learner(cbs=[CSVLogger()], path=tmp_path)
    quietly(learn, 2)
    log = learn.csv_logger.read_log()
    assert list(log.columns) == list(learn.recorder.metric_names) and len(log) == 2
    assert log.robust_loss.tolist() == pytest.approx(column(learn, 'robust_loss'))

# --- refused

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_mixup_is_refused(mix):
    learn = learner(cbs=[mix()])
    before = snapshot(learn.model)
    with pytest.raises(ValueError, match='MixUp'): quietly(learn)
    assert same(before, snapshot(learn.model)) and list(learn.metrics.attrgot('name')) == ['accuracy']

def test_mixup_alone_is_fine(): quietly(learner(None, cbs=[MixUp()]))

def test_terminate_on_nan():
    "fastai's own callback ends the run before this one raises; whichever, the run ends"
    learn = learner(cbs=[TerminateOnNaNCallback()], opt_func=torch_sgd)
    with contextlib.suppress(FloatingPointError): quietly(learn, 3, 1e30)
    assert list(learn.metrics.attrgot('name')) == ['accuracy']

# --- the learner's loss function

def with_loss(loss_func, robust=None, std=None, n_epoch=1):
    "Weights of both models, trained with a loss function"
    seed_all(0)
    cb = TRAINCallback(net(2) if std is None else std, robust=robust, attack=quick())
    learn = Learner(digit_dls(), net(1), loss_func, cbs=cb, metrics=accuracy)
    return models(quietly(learn, n_epoch, 3e-3))

weights = torch.arange(1., 11)

@pytest.mark.parametrize('robust', ['at', 'trades', 'mart', 'alp', 'gairat', 'mca'])
def test_class_weights_and_smoothing_train(robust):
    plain = with_loss(CrossEntropyLossFlat(), robust)
    assert same(plain, with_loss(nn.CrossEntropyLoss(), robust)) and same(plain, with_loss(nn.functional.cross_entropy, robust))
    for kwargs in (dict(label_smoothing=.3), dict(weight=weights)):
        other = with_loss(CrossEntropyLossFlat(**kwargs), robust)
        assert not same(plain['main'], other['main']) and not same(plain['std'], other['std'])

def test_label_smoothing_of_fastai_and_torch_agree():
    a,b = with_loss(LabelSmoothingCrossEntropyFlat(eps=.1)),with_loss(CrossEntropyLossFlat(label_smoothing=.1))
    assert same(a, b)

def test_natural_training_is_the_plain_learner():
    "With its weights and smoothing, too"
    def train(cb):
        seed_all(0)
        learn = Learner(digit_dls(), net(1), CrossEntropyLossFlat(weight=weights, label_smoothing=.1), cbs=cb, metrics=accuracy)
        return snapshot(quietly(learn, 1, 3e-3).model)
    assert same(train(TRAINCallback(None, robust=Natural())), train(None))

def test_standard_model_of_ones_own_keeps_its_loss():
    def own(loss_func): return Learner(digit_dls(), net(2), loss_func, metrics=accuracy)
    plain = with_loss(CrossEntropyLossFlat())
    got = with_loss(CrossEntropyLossFlat(), std=own(CrossEntropyLossFlat(label_smoothing=.3)))
    assert not same(got['std'], plain['std'])
    assert same(with_loss(CrossEntropyLossFlat(label_smoothing=.3), std=own(CrossEntropyLossFlat()))['std'], plain['std'])
    with pytest.raises(ValueError, match="standard learner's loss function FocalLoss"):
        with_loss(CrossEntropyLossFlat(), std=own(FocalLossFlat()))

class Sure(nn.CrossEntropyLoss):
    "Not cross-entropy, whatever it descends from"
    def forward(self, z, y): return super().forward(2*z, y)

@pytest.mark.parametrize('loss_func, match', [
    (FocalLossFlat(), 'FocalLoss is no cross-entropy'), (MSELossFlat(), 'MSELoss is no'),
    (BCEWithLogitsLossFlat(), 'BCEWithLogitsLoss is no'),
    (Sure(), 'Sure is no'), (lambda z, y: z.sum(), 'lambda> is no'), (CrossEntropyLossFlat(ignore_index=3), 'ignores the label 3'),
    (LabelSmoothingCrossEntropyFlat(weight=weights), 'weighs classes'), (nn.CrossEntropyLoss(reduction='sum'), "reduction='sum'"),
    (CrossEntropyLossFlat(weight=torch.ones(3)), '3 class weights, but the data have 10 classes'),
    (CrossEntropyLossFlat(weight=-weights), 'expected numbers > 0')])
def test_other_loss_functions_are_refused(loss_func, match):
    main = net(1)
    learn = Learner(digit_dls(), main, loss_func, cbs=TRAINCallback(net(2), attack=quick()), metrics=accuracy)
    with pytest.raises(ValueError, match=match): quietly(learn)
    assert same(snapshot(main), snapshot(net(1))) and list(learn.metrics.attrgot('name')) == ['accuracy']

def test_doubly_smoothed_labels_are_refused():
    with pytest.raises(ValueError, match='smooths labels, and so does'):
        with_loss(CrossEntropyLossFlat(label_smoothing=.1), 'at:confidence=.7')
    with_loss(CrossEntropyLossFlat(weight=weights), 'at:confidence=.7')

class Own(RobustLoss):
    "A loss that does not look at the learner's"
    def __call__(self, v): return dict(own=v.adv.logits.square().mean())

def test_own_robust_loss_says_what_the_loss_function_does():
    with pytest.warns(UserWarning, match=r'Own\(\) is a loss of its own: FocalLoss, the loss function of the learner, only validates'):
        with_loss(FocalLossFlat(), Own())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with_loss(CrossEntropyLossFlat(), Own())

def test_settings_name_the_loss_function():
    def said(loss_func): return Learner(digit_dls(), net(1), loss_func, cbs=TRAINCallback(None)).train_cb.settings()['loss_func']
    assert said(CrossEntropyLossFlat()) == said(nn.CrossEntropyLoss()) == dict(kind='cross-entropy', weight=None, label_smoothing=0.)
    assert said(CrossEntropyLossFlat(weight=weights))['weight'] == weights.tolist() and said(FocalLossFlat()) == dict(kind='FocalLoss')

# --- one callback, compiled and distributed models

def test_second_callback_is_refused():
    for learn,cbs in ((learner(cbs=[TRAINCallback(None)]), None), (learner(), TRAINCallback(None))):
        before = snapshot(learn.model)
        with pytest.raises(ValueError, match='two TRAINCallbacks'): quietly(learn, cbs=cbs)
        assert same(before, snapshot(learn.model)) and list(learn.metrics.attrgot('name')) == ['accuracy']

@pytest.mark.parametrize('where', ['main', 'standard', 'in place'])
def test_compiled_model_whose_features_are_needed_is_refused(where):
    main,std = net(1),net(2)
    if where == 'in place': main.compile(backend='eager')
    if where == 'main': main = torch.compile(main, backend='eager')
    if where == 'standard': std = torch.compile(std, backend='eager')
    learn = learner(TRAINCallback(std, attack=quick()), main)
    before = snapshot(main)
    with pytest.raises(ValueError, match=r'model is compiled.*_orig_mod'): quietly(learn)
    assert same(before, snapshot(main))

@pytest.mark.parametrize('robust', ['at', 'trades'])
def test_compiled_model_trains(robust):
    def train(main):
        seed_all(0)
        model = quietly(learner(TRAINCallback(None, robust=robust, attack=quick()), main), 1, 3e-3).model
        return snapshot(getattr(model, '_orig_mod', model))
    assert same(train(net(1)), train(torch.compile(net(1), backend='eager')))

class Lookalike(type(net(1))):
    "Attributes that callbacks are called by, as DistributedDataParallel has `mixed_precision`"
    mixed_precision = gradient_clip = channels_last = lr_finder = progress = checkpoint = None

def lookalike():
    m = net(1)
    m.__class__ = Lookalike
    return m

@pytest.mark.parametrize('standard', [lambda: net(2), lambda: CoTrained(net(2), warmup=1), lambda: Frozen(net(2))])
def test_attributes_of_the_model_are_no_callbacks(standard):
    def train(main): return models(quietly(learner(TRAINCallback(standard(), attack=quick()), main), 1, 3e-3))
    assert same(train(net(1)), train(lookalike()))

@pytest.fixture
def one_process():
    "Distributed training in a group of one"
    import torch.distributed as dist
    store = dist.HashStore()
    dist.init_process_group('gloo', store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()

@pytest.mark.parametrize('robust', ['at', 'trades'])
@pytest.mark.parametrize('std', [True, False])
def test_distributed_model(one_process, robust, std):
    "As fastai's `DistributedTrainer`: wrapped when `fit` begins"
    from torch.nn.parallel import DistributedDataParallel
    def wrap(learn): learn.model = DistributedDataParallel(learn.model)
    def unwrap(learn): learn.model = learn.model.module
    def train(*cbs):
        seed_all(0)
        learn = learner(TRAINCallback(net(2) if std else None, robust=robust, attack=quick()), cbs=cbs)
        return snapshot(quietly(learn, 1, 3e-3).model)
    assert same(train(), train(Call('before_fit', wrap, -20, 'a'), Call('after_fit', unwrap, 20, 'b')))

def test_mixed_precision_without_a_gpu_says_so():
    if torch.cuda.is_available(): pytest.skip('there is a GPU')
    with pytest.warns(UserWarning, match='works on CUDA GPUs alone.*computes in float32'): quietly(learner().to_fp16())
