"What a user gets wrong: each is a clear error before a weight has changed"
import json, subprocess, sys

import pytest
import torch
from fastai.data.core import DataLoaders, TfmdDL
from fastai.data.transforms import Normalize
from fastai.optimizer import OptimWrapper
from torch import nn

from conftest import digit_dls, digits, make_learner, net, plain_dls, quick, quietly, same, snapshot
from fastrain import cli
from fastrain.attacks.autoattack import AutoAttack
from fastrain.attacks.named import named_attack
from fastrain.attacks.pgd import PGD
from fastrain.core import lookup, parse_eps, read_json
from fastrain.data.sources import get_dls
from fastrain.evaluation.evaluate import evaluate
from fastrain.evaluation.record import read_per_image
from fastrain.models.backbone import create_backbone, load_weights
from fastrain.pieces.losses import AT, TRADES
from fastrain.pieces.relations import Topology
from fastrain.runs import train
from fastrain.runs.evaluate import evaluate_run
from fastrain.runs.recipe import make_recipe, recipe_callback, recipe_dls
from fastrain.runs.run import load_run_model, read_run
from fastrain.runs.train import resume_run, train_run
from fastrain.training.callback import TRAINCallback
from fastrain.training.checkpoint import Checkpoint, standard_state
from fastrain.training.methods import parse_method
from fastrain.training.metrics import RobustAccuracy
from fastrain.training.schedules import LambdaSchedule, as_lambda
from fastrain.training.standard import CoTrained, Frozen

def refused(match, dls=None, main=None, std=None, cb=None, error=ValueError, n_epoch=1):
    "`fit` raises, with the models, the metrics and the random numbers of the loaders as before"
    main,std = net(1) if main is None else main,net(2) if std is None else std
    cb = TRAINCallback(CoTrained(std, warmup=1), attack=quick()) if cb is None else cb # a warm-up must not come before the error either
    learn = make_learner(digit_dls() if dls is None else dls, main, cb)
    models = [m for m in (main, std) if isinstance(m, nn.Module)]
    before = [snapshot(m) for m in models]
    with pytest.raises(error, match=match) as e: quietly(learn, n_epoch)
    assert same(before, [snapshot(m) for m in models])
    assert list(learn.metrics.attrgot('name')) == ['accuracy']
    assert not any(m._forward_pre_hooks for o in models for m in o.modules())
    return learn

# --- images and labels

@pytest.mark.parametrize('change', [lambda x: x*255, lambda x: (x - .13)/.3, lambda x: x*2 - 1, lambda x: x + .01])
def test_images_out_of_range(change):
    x,y = digits('train', 32)
    refused(r'expected \[0, 1\].*divide 0..255', plain_dls(change(x), y))

def test_images_of_bytes():
    x,y = digits('train', 32)
    refused('uint8.*255', plain_dls((x*255).to(torch.uint8), y))

def test_images_not_a_number():
    x,y = digits('train', 32)
    x[:,0,0,0] = float('nan')
    refused('not numbers', plain_dls(x, y))

def test_rounding_is_tolerated():
    x,y = digits('train', 32)
    quietly(make_learner(plain_dls(x*(1 + 1e-6) + 1e-6, y), net(1), TRAINCallback(net(2), attack=quick())))

def test_normalize_in_the_transforms():
    dls = get_dls('digits', bs=8, n_train=40, n_test=20, device='cpu')
    dls.add_tfms([Normalize.from_stats([.5]*3, [.3]*3, cuda=False)], 'after_batch')
    refused(r'Normalize.*create_backbone\(name, n_classes, mean=..., std=...\)', dls)

@pytest.mark.parametrize('label', [10, 57, -1, -100])
def test_label_without_output(label):
    x,y = digits('train', 32)
    y[::2] = label
    refused(f'{label}', plain_dls(x, y))

@pytest.mark.parametrize('change', [
    lambda y: y.float(), lambda y: nn.functional.one_hot(y, 10), lambda y: nn.functional.one_hot(y, 10).float()])
def test_labels_of_another_kind(change):
    x,y = digits('train', 32)
    refused('expected class indices', plain_dls(x, change(y)))

def test_two_inputs():
    x,y = digits('train', 32)
    items = list(zip(x, x, y))
    dls = DataLoaders(*[TfmdDL(items, bs=8, num_workers=0)]*2, device='cpu')
    dls.n_inp = 2
    refused('2 inputs', dls)

# --- sizes of batches and sets

def test_tiny_batches(): refused('bs=2.*at least 3', digit_dls(bs=2))
@pytest.mark.parametrize('rest', [1, 2])
def test_tiny_last_batch(rest): refused(f'last training batch has {rest} .*drop_last=True', digit_dls(n=16 + rest, drop_last=False))
def test_small_last_batch_is_fine(): quietly(make_learner(digit_dls(n=19, drop_last=False), net(1), TRAINCallback(net(2), attack=quick())))
def test_tiny_set(): refused('7 images, fewer than one batch of 8', digit_dls(n=7))
def test_library_loaders():
    for kwargs in (dict(bs=2), dict(bs=64, n_train=40)):
        with pytest.raises(ValueError, match=f'bs={kwargs["bs"]}'): get_dls('digits', device='cpu', **kwargs)

# --- models

class Headless(nn.Module):
    "No linear layer to take features from"
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 3)
    def forward(self, x): return self.conv(x).mean((2, 3))

def test_no_classifier():
    refused('Headless has no classifier', main=Headless())
    refused('Headless has no classifier', std=Headless())

def test_no_classifier_without_train(): # nothing needs features
    quietly(make_learner(digit_dls(), Headless(), TRAINCallback(None, attack=quick())))

@pytest.mark.parametrize('n', [9, 11, 1000])
def test_classes_disagree(n):
    dls = digit_dls()
    dls.c = 10
    refused(f'adversarial model has {n} outputs.*10 classes', dls, main=net(1, n_classes=n))
    refused(f'standard model has {n} outputs.*10 classes', dls, std=net(2, n_classes=n))
    # of the adversarial model's, if the data do not tell
    refused(f'standard model has {n} outputs.*10 classes', digit_dls(), std=net(2, n_classes=n))

def test_same_module():
    m = net(1)
    refused('same module', main=m, std=m)
    refused('same module', main=m, cb=TRAINCallback(Frozen(m), attack=quick()), std=m)

def test_same_module_in_a_learner():
    m = net(1)
    refused('same module', main=m, std=m, cb=TRAINCallback(make_learner(digit_dls(), m), attack=quick()))

@pytest.mark.parametrize('standard', [3, 2.5, True, [1], dict(a=1), nn.Module])
def test_no_standard_model(standard):
    refused('expected the name of a backbone, an nn.Module or a Learner', cb=TRAINCallback(standard, attack=quick()))

def test_unknown_names():
    refused("resnet18", cb=TRAINCallback('resent18', attack=quick()))
    with pytest.raises(ValueError, match="backbone 'resent18'.*resnet18"): create_backbone('resent18', 10)
    with pytest.raises(ValueError, match="data set 'cifar11'.*'cifar10'"): get_dls('cifar11')
    with pytest.raises(ValueError, match="method 'tardes'.*'trades'"): parse_method('tardes')
    with pytest.raises(ValueError, match="method 'trian'.*'train'"): parse_method('at+trian')
    with pytest.raises(ValueError, match="attack 'pdg'.*'pgd'"): named_attack('pdg20')
    with pytest.raises(ValueError, match="schedule 'rmap'.*'ramp'"): LambdaSchedule(5., 'rmap')
    with pytest.raises(ValueError, match="reduction 'batch_mean'.*'batchmean'"): Topology('batch_mean')
    with pytest.raises(ValueError, match="norm 'L1'.*'l2'"): PGD(norm='L1')
    with pytest.raises(ValueError, match="profile 'lbgta'.*'lbgat'"): make_recipe('lbgta')
    with pytest.raises(ValueError, match="setting 'epoch'.*'epochs'"): make_recipe(epoch=3)
    with pytest.raises(ValueError, match='Choose one of at, trades'): lookup('qqqqqq', dict(trades=1, at=2))

def test_frozen_by_name():
    with pytest.raises(ValueError, match='untrained model'): Frozen('resnet18')

def test_built_optimizer():
    main = net(1)
    built = OptimWrapper(opt=torch.optim.SGD(main.parameters(), .1))
    learn = make_learner(digit_dls(), main, TRAINCallback(net(2), attack=quick()), opt_func=built)
    before = snapshot(main)
    with pytest.raises(ValueError, match='opt_func'): quietly(learn)
    assert same(before, snapshot(main))

# --- numbers

@pytest.mark.parametrize('kwargs, match', [
    (dict(eps=0), 'eps=0'), (dict(eps=-1), 'eps=-1'), (dict(alpha=0), 'alpha=0'),
    (dict(eps=8), 'write 8/255'), (dict(eps=float('nan')), 'eps=nan')])
def test_sizes(kwargs, match):
    with pytest.raises(ValueError, match=match): PGD(**kwargs)
    with pytest.raises(ValueError, match=match): make_recipe(**kwargs)
    if 'eps' in kwargs:
        with pytest.raises(ValueError, match=match): AutoAttack(**kwargs)
        with pytest.raises(ValueError, match=match): named_attack('pgd20', **kwargs)

@pytest.mark.parametrize('s', ['8/0', 'eight', '', '8/255/2', '8//255', None])
def test_unreadable_sizes(s):
    with pytest.raises(ValueError, match='8/255'): parse_eps(s)

@pytest.mark.parametrize('lam', [-1, float('nan'), float('inf'), 'five', [5], None])
def test_lambda(lam):
    with pytest.raises(ValueError, match='lam'): TRAINCallback('resnet18', lam=lam)

def test_lambda_settings():
    with pytest.raises(ValueError, match='epoch'): LambdaSchedule(5., by='epochs')
    with pytest.raises(ValueError, match='lam_max=-2'): as_lambda(-2.)
    with pytest.raises(ValueError, match='lam'): make_recipe(lam=-1)

@pytest.mark.parametrize('kwargs, match', [
    (dict(epochs=0), 'epochs=0'), (dict(epochs=1.5), 'epochs=1.5'), (dict(lr=0), 'lr=0'), (dict(lr=-1), 'lr=-1'),
    (dict(precision='fp8'), 'precision')])
def test_recipe(kwargs, match):
    with pytest.raises(ValueError, match=match): make_recipe(**kwargs)

def test_others():
    with pytest.raises(ValueError, match='beta=-1'): TRADES(-1)
    with pytest.raises(ValueError, match='beta=nan'): TRADES(float('nan'))
    for w in (-1, .5):
        with pytest.raises(ValueError, match=f'warmup={w}'): CoTrained('resnet18', warmup=w)
    with pytest.raises(ValueError, match='n=0'): RobustAccuracy(n=0)

# --- methods

@pytest.mark.parametrize('method, match', [
    ('standard+train', 'makes none'), ('at+trades', 'two pieces'), ('train+train', 'two pieces'), ('at+', "method ''"),
    ('', "method ''"), ('trades:beta', 'name=value'), ('trades:beat=3', 'beat'), ('trades:beta=-1', 'beta=-1'),
    ('at:beta=3', 'beta|argument'), ('train:reduction=mean', 'batchmean')])
def test_methods(method, match):
    with pytest.raises(ValueError, match=match): parse_method(method)

def test_method_alone():
    assert isinstance(parse_method('train').robust, AT) and parse_method('trades:beta=3+train').robust.beta == 3

# --- losses that are not finite

class Breaks(AT):
    "Becomes `value` in batch 2 of epoch 1"
    def __init__(self, value): self.value,self.calls = value,0
    def __call__(self, v):
        self.calls += 1
        loss = super().__call__(v)['ce']
        return dict(ce=loss*self.value if self.calls == 4 + 3 else loss)

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
@pytest.mark.parametrize('relation', [None, False])
def test_loss_not_finite(tmp_path, value, relation):
    learn = make_learner(digit_dls(), net(1), TRAINCallback(net(2), robust=Breaks(value), attack=quick(), relation=relation))
    ckpt = Checkpoint(tmp_path/'ckpt')
    with pytest.raises(FloatingPointError, match=r'epoch 1, batch 2 \(ce = (nan|inf)') as e: quietly(learn, 3, 1e-3, cbs=ckpt)
    assert str(tmp_path/'ckpt'/'last.pt') in str(e.value) and ('l_tp = ' in str(e.value)) == (relation is None)
    state = torch.load(tmp_path/'ckpt'/'last.pt', weights_only=True)
    assert state['epoch'] == 1
    for weights in (state['model'], standard_state(state)['model']): assert all(v.isfinite().all() for v in weights.values())
    mended = Breaks(value)
    mended.calls = 100 # past the batch that breaks
    learn = make_learner(digit_dls(), net(5), TRAINCallback(net(6), robust=mended, attack=quick(), relation=relation))
    quietly(learn, 3, 1e-3, cbs=Checkpoint(tmp_path/'ckpt', resume=True)) # and the run goes on from there
    assert len(learn.recorder.values) == 3

def test_loss_not_finite_without_a_checkpoint(tmp_path):
    learn = make_learner(digit_dls(), net(1), TRAINCallback(net(2), robust=Breaks(float('nan')), attack=quick()))
    with pytest.raises(FloatingPointError, match='Nothing was saved: add `Checkpoint'): quietly(learn, 3, 1e-3)

def test_loss_not_finite_in_the_first_epoch(tmp_path):
    "No checkpoint was written yet, so none may be promised"
    robust = Breaks(float('nan'))
    robust.calls = 4
    learn = make_learner(digit_dls(), net(1), TRAINCallback(net(2), robust=robust, attack=quick()))
    with pytest.raises(FloatingPointError, match='epoch 0, batch 2') as e: quietly(learn, 3, 1e-3, cbs=Checkpoint(tmp_path/'ckpt'))
    assert not (tmp_path/'ckpt'/'last.pt').exists() and 'last good checkpoint is' not in str(e.value)

@pytest.mark.parametrize('layer', ['conv1', 'fc'])
def test_standard_model_not_finite(layer):
    "Its loss is not in the loss that is shown, and features that are not numbers must not pass for zeros: M is the anchor"
    std = net(2)
    getattr(std, layer).weight.data.fill_(float('nan'))
    learn = make_learner(digit_dls(), net(1), TRAINCallback(std, attack=quick()))
    with pytest.raises(FloatingPointError): quietly(learn)

def test_evaluate_not_finite():
    m = net(1)
    m.fc.weight.data.fill_(float('nan'))
    with pytest.raises(FloatingPointError, match='natural'): evaluate(m, [digits('test', 8)], progress=False)

def test_evaluate_bad_data():
    x,y = digits('test', 8)
    for dl,match in (
        ([(x*255, y)], r'expected \[0, 1\]'), ([(x, y + 5)], 'no output'), ([], 'no images'), ([(x, y.float())], 'class indices')):
        with pytest.raises(ValueError, match=match): evaluate(net(1), dl, dict(natural=None), progress=False)

# --- runs

def tiny(**kwargs): return make_recipe('digits', **{**dict(epochs=1, n_train=64, n_test=20, bs=16, steps=1, n_valid=5, warmup=0), **kwargs})

def test_existing_folder(tmp_path):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'notes.txt').write_text('mine')
    with pytest.raises(FileExistsError, match='exists already.*--resume'): train_run(tmp_path/'run', tiny(), ['at'], 'cpu')
    assert [f.name for f in (tmp_path/'run').iterdir()] == ['notes.txt']
    (tmp_path/'file').write_text('mine')
    with pytest.raises(FileExistsError): train_run(tmp_path/'file', tiny(), ['at'], 'cpu')

@pytest.mark.parametrize('kwargs, methods, error', [
    (dict(), ['at', 'tardes'], "'trades'"), (dict(data='cifar11'), ['at'], "'cifar10'"), (dict(backbone='resent18'), ['at'], 'resnet18'),
    (dict(standard='resent18'), ['at', 'at+train'], 'resnet18'), (dict(bs=100), ['at'], 'bs=100'),
    (dict(), ['at', 'at+train+frozen'], 'frozen needs a standard model')])
def test_no_folder_for_a_mistake(tmp_path, kwargs, methods, error):
    "Whatever is mistyped is found before anything is trained or written"
    with pytest.raises(ValueError, match=error): train_run(tmp_path/'run', tiny(**kwargs), methods, 'cpu')
    assert not (tmp_path/'run').exists()

def test_no_run(tmp_path):
    for f in (resume_run, evaluate_run, read_run):
        for path in (tmp_path, tmp_path/'nothing'):
            with pytest.raises(FileNotFoundError, match='is no run'): f(path)
    with pytest.raises(FileNotFoundError): load_run_model(tmp_path, 'at')

@pytest.mark.parametrize('text', ['', '{', '{}', '[]', '{"recipe": {"epochs": 1, "colour": 3}, "methods": ["at"]}'])
def test_damaged_settings(tmp_path, text):
    (tmp_path/'settings.json').write_text(text)
    with pytest.raises(ValueError, match='settings.json'): resume_run(tmp_path)

def test_evaluate_before_any_result(tmp_path):
    (tmp_path/'settings.json').write_text(json.dumps(dict(recipe=tiny().settings(), methods=['at'])))
    with pytest.raises((ValueError, FileNotFoundError), match='resume|results'): evaluate_run(tmp_path)

def test_standard_from_a_damaged_file(tmp_path):
    (tmp_path/'std.pt').write_text('<html>')
    r = tiny(standard=str(tmp_path/'std.pt'))
    with pytest.raises(ValueError, match='std.pt'): recipe_callback(r, 'at+train', recipe_dls(r, 'cpu'))

def test_standard_from_a_file_of_something_else(tmp_path):
    torch.save(net(1).state_dict(), tmp_path/'std.pt') # weights alone, without the name of their backbone
    r = tiny(standard=str(tmp_path/'std.pt'))
    with pytest.raises(ValueError, match='std.pt'): recipe_callback(r, 'at+train', recipe_dls(r, 'cpu'))

# --- the command line

def in_a_process(*args, cwd):
    command = [sys.executable, '-c', 'from fastrain.cli import main; main()', *map(str, args)]
    res = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=120)
    return res.returncode,[l for l in res.stderr.strip().splitlines() if 'Warning' not in l and 'warn' not in l]

def one_line(code, lines): return code == 1 and len(lines) == 1 and lines[0].startswith('fastrain') and 'Traceback' not in lines[0]

@pytest.mark.slow
def test_command_line(tmp_path):
    "Each call imports everything anew, which takes seconds"
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'x').write_text('')
    for args,match in ((('train', '--out', 'run', '--epochs', 1), 'run exists already'), (('evaluate', 'nowhere'), 'nowhere is no run')):
        code,lines = in_a_process(*args, cwd=tmp_path)
        assert one_line(code, lines) and match in lines[0], lines

@pytest.mark.parametrize('argv, match', [
    (['trian'], "'train'"), (['train', '--eps', '8'], '8/255'), (['train', '--eps', 'big'], '8/255'),
    (['train', '--method', 'tardes'], "'trades'"), (['train', '--method', 'standard+train'], 'makes none'),
    (['train', '--data', 'cifar11'], "'cifar10'"), (['train', '--backbone', 'resent18'], 'resnet18'),
    (['train', '--drops', '5,x'], 'drops'), (['train', '--out', 'new', '--resume'], 'no run'),
    (['train', '--path', 'nowhere', '--data', 'cifar10'], 'nowhere'), (['train', '--device', 'gpu'], '(?i)device'),
    (['train', '--img-size', '4'], 'img_size'), (['train', '--n-train', '10000000'], '(?i)n_train|images'),
    (['train', '--holdout', '-0.5'], 'holdout'), (['train', '--lam', 'nan'], 'lam'), (['train', '--data', 'nodir/x'], 'nodir'),
    (['evaluate', 'nowhere'], 'nowhere is no run'), (['evaluate', 'nowhere', '--load', 'own.txt'], 'own.txt')])
def test_commands(argv, match, tmp_path, monkeypatch):
    "The same in this process: `sys.exit` with one line, which Python prints and returns 1 for"
    def trains(*args): raise AssertionError('it trains')
    monkeypatch.setattr(train, 'train_method', trains) # so that a mistake that is not found fails at once
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['fastrain', *argv])
    with pytest.raises(SystemExit, match=match) as e: cli.main()
    assert isinstance(e.value.code, str) and '\n' not in e.value.code.strip() and e.value.code.startswith('fastrain')
    assert not any(tmp_path.iterdir())

# --- every setting of a recipe, before anything is loaded

NAN,INF = float('nan'),float('inf')
BAD_SETTINGS = dict(
    data=[5, 'a'*300, '', 'a\0b'], path=['x'*300, 'a\0b'], backbone=['b'*300, 5], standard=['b'*2000, 5],
    epochs=[0, -1, 1.5, '3', NAN, True], bs=[0, 2, 2.5], lr=[0, -1, NAN, INF], drops=[(-1,), (0,), (90, 75), (75, 75), 75, '75', (1.5,)],
    warmup_lr=[0, NAN], wd=[-1, NAN, INF, 'a'], mom=[-1, 1, NAN], eps=[0, -1, 255, NAN, '8/255'], alpha=[0, 2, NAN], steps=[0, -1, 1.5],
    norm=['l3', 5], lam=[-1, NAN, INF], lam_schedule=['x', 5], warmup=[-1, .5], eval_eps=[255, 0, NAN], eval_alpha=[9, 0],
    holdout=[-.5, NAN], n_train=[0, -1, .5], n_test=[0], n_valid=[0, NAN], img_size=[0, 4, 10**6], small_images=[5, 'no'],
    seed=[2**64, -2**70, 1.5, '1', 10**5000], precision=['fp8', 5], fast=['x', 5], channels_last=['x', 5], fold=['x', 5],
    chunk=[0, -1, 1.5, 'x', True], compile=['x', 5], strict=['x', 5, None])

def test_all_settings_are_tried():
    from fastrain.runs.recipe import Recipe
    assert {*Recipe.__dataclass_fields__} == {*BAD_SETTINGS}

@pytest.mark.parametrize('name, value', [(name, value) for name,values in BAD_SETTINGS.items() for value in values],
                         ids=lambda v: str(v)[:20] if not isinstance(v, int) or v < 2**80 else 'huge')
def test_settings(name, value):
    "The line names the setting or its kind, and is short"
    from fastrain.runs.recipe import Recipe
    kind = dict(lam_schedule='schedule').get(name, name)
    with pytest.raises(ValueError, match=rf'^(Unknown )?{kind}[= ]') as e: Recipe(**{name: value})
    assert '\n' not in str(e.value) and len(str(e.value)) < 300

def test_sound_settings():
    from fastrain.runs.recipe import Recipe
    r = Recipe(epochs=12.0, bs=8, drops=[5, 9], seed=-3, holdout=100., wd=0, mom=0, lam=0, warmup=0, n_valid=5, warmup_lr=.02,
               small_images=False)
    assert (r.epochs, r.drops, r.seed) == (12, (5, 9), -3) and isinstance(r.epochs, int)
    assert Recipe(seed=2**63 - 1).seed == 2**63 - 1 and Recipe(drops=()).drops == ()

def test_local_copy_of_the_digits(tmp_path):
    for path in ('nowhere', tmp_path):
        with pytest.raises(ValueError, match=r'path=.*digits comes with scikit-learn and needs no local copy: leave it out'):
            get_dls('digits', path=path, device='cpu')

def test_names_too_long_for_folders(tmp_path):
    "Of methods, and of the run's own folder"
    method = 'at+' + '+'.join(f'fat:breaks=({",".join(map(str, range(n)))})' for n in (90,))
    with pytest.raises(ValueError, match='its folder would have a name of more than 200 bytes'):
        train_run(tmp_path/'run', tiny(), [method], 'cpu')
    with pytest.raises(OSError, match="cannot be a folder: File name too long. Choose another one") as e:
        train_run(tmp_path/('x'*300), tiny(), ['at'], 'cpu')
    assert '\n' not in str(e.value) and not any(tmp_path.iterdir())
    (tmp_path/'file').write_text('mine')
    with pytest.raises(OSError, match='(cannot be made|cannot be a folder): Not a directory'):
        train_run(tmp_path/'file'/'run', tiny(), ['at'], 'cpu')

@pytest.mark.parametrize('argv, match', [
    (['--eval-eps', '255'], 'eval_eps=255 is larger'), (['--wd', '-1'], 'wd=-1'), (['--wd', 'nan'], 'wd=nan'),
    (['--drops', '9,5'], r'drops=\(9, 5\)'),
    (['--drops=-5,9'], r'drops=\(-5, 9\)'), (['--steps', '0'], 'steps=0'), (['--seed', str(2**64)], 'at most 64 bits'),
    (['--path', 'nowhere'], 'scikit-learn'), (['--backbone', 'b'*300], 'no part is longer than 255'),
    (['--standard', 'b'*300], 'no part is longer than 255'), (['--out', 'o'*300], 'File name too long')])
def test_training_is_checked_before_it_begins(argv, match, tmp_path, monkeypatch):
    def trains(*args): raise AssertionError('it trains')
    monkeypatch.setattr(train, 'train_method', trains)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['fastrain', 'train', '--device', 'cpu', *argv])
    with pytest.raises(SystemExit, match=match) as e: cli.main()
    assert '\n' not in e.value.code.strip() and not any(tmp_path.iterdir())

# --- what names the thing, and leaves what is there

def test_no_evaluation_into_the_folder_of_a_run(tmp_path):
    (tmp_path/'settings.json').write_text('{}')
    with pytest.raises(FileExistsError, match=r'holds a run \(settings.json\), whose evaluation would be replaced: choose another'):
        evaluate(net(1), digit_dls(), 'natural', out=tmp_path)
    assert [f.name for f in tmp_path.iterdir()] == ['settings.json']

def test_model_for_images_of_another_size():
    model = nn.Sequential(nn.Flatten(), nn.Linear(5, 10))
    with pytest.raises(RuntimeError, match=r'^The model cannot take images of shape \(\d+, 3, \d+, \d+\): .*mat1'):
        evaluate(model, digit_dls())

def test_size_of_the_support_is_named():
    for n,match in ((0, 'n_support=0: expected'), (10**6, 'n_support=1000000, but there are only')):
        with pytest.raises(ValueError, match=match): evaluate(net(1), digit_dls(), 'topology', n_support=n)

def test_a_file_of_no_weights_is_named_once(tmp_path):
    (tmp_path/'x.json').write_text('[]')
    with pytest.raises(ValueError, match='is not a checkpoint that can be loaded safely') as e: load_weights(net(1), tmp_path/'x.json')
    assert str(e.value).count('x.json') == 1

def test_a_folder_for_a_backbone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'mine').mkdir()
    (tmp_path/'resnet18').mkdir()
    with pytest.raises(ValueError, match='mine is neither an architecture of timm nor a run'): create_backbone('mine', 10)
    create_backbone('resnet18', 10)

def test_json_that_an_editor_has_marked(tmp_path):
    (tmp_path/'a.json').write_text('{"a": 1}', encoding='utf-8-sig')
    assert read_json(tmp_path/'a.json') == dict(a=1)

@pytest.mark.parametrize('text', ['', 'x,y\n1,2\n'])
def test_damaged_results_by_image(tmp_path, text):
    evaluate(net(1), digit_dls(), 'natural', out=tmp_path, checks=False)
    assert len(read_per_image(tmp_path))
    (tmp_path/'per_image.csv').write_text(text)
    with pytest.raises(ValueError, match='per_image.csv is damaged: expected a table with the columns image and label. Remove it'):
        read_per_image(tmp_path)
