"The benchmarks at tiny sizes: they run, compare what is the same, and go on where they stopped"
import importlib.util, json, math, shutil, tarfile
from pathlib import Path

import pytest, torch
from PIL import Image

from fastrain.core import load_tensors
from fastrain.runs.recipe import make_recipe
from fastrain.training.checkpoint import standard_state

def script(name):
    spec = importlib.util.spec_from_file_location(f'bench_{name}', Path(__file__).parents[1]/'bench'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

step,gpu,gpu_speed = script('step'),script('gpu'),script('gpu_speed')
pytestmark = pytest.mark.slow # whole trainings, if small ones
NETS = dict(backbone='resnet10t_16', standard='resnet10t_16', device='cpu')
TINY = dict(NETS, data='digits', methods='at,at+train', epochs=2, chunk=2, bs=20, steps=1, warmup=1,
            n_train=60, n_test=10, n_valid=10, timed_steps=1)

# -- step.py -----------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def timed(tmp_path_factory):
    out = tmp_path_factory.mktemp('step')/'step.json'
    return step.main(**NETS, bs=8, steps=2, repeats=2, out=out), json.loads(out.read_text())

def test_step_writes_what_it_returns(timed): assert timed[0] == timed[1]

def test_plain_and_fastrain_are_the_same(timed):
    assert set(timed[0]['difference']) == set(step.METHODS)
    assert all(d < 1e-9 for d in timed[0]['difference'].values())

def test_every_step_is_timed(timed):
    assert all(len(times) == 2 for forms in timed[0]['seconds'].values() for times in forms.values())

def test_targets(timed):
    targets = timed[0]['targets']
    assert [t['target'] for t in targets[-2:]] == ['at+train / at', 'trades+train / trades'] and len(targets) == 6
    for t in targets:
        assert t['verdict'] == ('pass' if t['ratio'] <= t['limit'] else 'fail')
        assert t['pairs']['min'] <= t['pairs']['median'] <= t['pairs']['max']
    at,trades = 2*2 + 3,1 + 2*2 + 6 # passes of a net; M and M' are alike
    assert [t['arithmetic'] for t in targets[-2:]] == pytest.approx([(at + 3)/at, (trades + 3)/trades])

def test_macs(): # a 3x3 convolution of 3 to 5 channels on 4x4 pixels, then a linear layer
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(80, 7))
    assert step.count_macs(net, torch.rand(6, 3, 4, 4)) == 4*4*5*3*9 + 80*7

def break_step(monkeypatch, broken):
    "Let the steps in plain PyTorch be made by `broken(step, plain, x, y)`"
    whole = step.Plain.step
    monkeypatch.setattr(step.Plain, 'step', lambda self, x, y: broken(lambda: whole(self, x, y), self, x, y))

@pytest.fixture(scope='module')
def nets():
    "A batch, and two models by which the steps are the same as long as nothing is broken"
    torch.manual_seed(0)
    batch = torch.rand(8, 3, 32, 32),torch.arange(8)
    models = [step.create_backbone('resnet10t_16', 10) for _ in range(2)]
    assert step.check('trades+train', batch, models, 2) < 1e-9
    return batch,models

def constant(name, value):
    def broken(whole, plain, x, y):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(step, name, value)
            whole()
    return broken

def other_order(whole, plain, x, y): # the running statistics of batch norm see x' first
    plain.model(x + .1)
    whole()

def train_mode(whole, plain, x, y):
    plain.model.eval = plain.model.train
    whole()

@pytest.mark.parametrize('broken', [constant('BETA', 5.9), constant('LAM', 4.9), constant('ALPHA', 2.1/255), other_order, train_mode])
def test_another_algorithm_is_found_out(broken, nets, monkeypatch):
    break_step(monkeypatch, broken)
    with pytest.raises(RuntimeError, match='differ'): step.check('trades+train', *nets, 2)

# -- gpu_speed.py, which is `gpu.py speed` -------------------------------------------------------------------------------------
def test_table_of_speed(tmp_path):
    out = tmp_path/'speed.json'
    gpu_speed.call(f'--cases resnet10t_16:4 --standard resnet10t_16 --steps 1 --img-size 16 --matmul 64 --repeats 1 --choice .1 '
                   f'--device cpu --result {out}'.split())
    res = json.loads(out.read_text())
    assert [r['method'] for r in res['rows']] == list(step.METHODS) and not res['left_out'] and not res['aims']
    assert all(r['images_per_second'] > 0 and r['gain'] > 0 and r['share'] > 0 for r in res['rows'])

def test_aims_are_judged_by_the_worst():
    def row(backbone, method, **kwargs): return dict(backbone=backbone, method=method, gain=6., share=.5, epoch=5.) | kwargs
    rows = [row('wide_resnet34_10', 'at+train', gain=4.), row('wide_resnet34_10', 'trades+train'), row('resnet18', 'at')]
    assert [a['verdict'] for a in gpu_speed.verdicts(rows)] == ['fail', 'pass', 'pass']

# -- gpu.py ------------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp('whole')
    assert gpu.main(**TINY, out=out, seconds=1e6)
    return out

@pytest.fixture(scope='module')
def pieces(whole, tmp_path_factory):
    "The same in calls that end at every other question whether there is time"
    out,calls = tmp_path_factory.mktemp('pieces'),0
    shutil.copy(whole/'speed.json', out)
    assert not gpu.main(**TINY, out=out, seconds=0) and not (out/'records.jsonl').exists()
    with pytest.MonkeyPatch.context() as m:
        finished = False
        while not finished:
            left = iter([True]*2)
            m.setattr(gpu.Clock, 'fits', lambda self, seconds: next(left, False))
            finished,calls = gpu.main(**TINY, out=out),calls + 1
    assert calls == 5 # two methods of two epochs, each stopped after one
    return out

def timeless(o):
    "A record but for the time that it took"
    if isinstance(o, dict): return {k: timeless(v) for k,v in o.items() if k != 'seconds'}
    return [timeless(v) for v in o] if isinstance(o, list) else o

def records(out): return [json.loads(line) for line in (out/'records.jsonl').read_text().splitlines()]

def test_records(whole):
    rows = records(whole)
    assert [(r['method'], r['epoch']) for r in rows] == [('at', 1), ('at', 2), ('at+train', 1), ('at+train', 2)]
    assert all(r['seed'] == 1 and r['seconds'] > 0 and r['lr'] > 0 and {'accuracy', 'pgd10_accuracy'} <= set(r) for r in rows)
    assert all(r['lambda'] == 5 and math.isfinite(r['l_tp']) and 'std_accuracy' in r for r in rows[2:])

def test_results(whole):
    res = json.loads((whole/'results.json').read_text())
    assert res['finished'] and [r['method'] for r in res['results']] == ['at', 'at+train']
    assert all(set(r['last']['figures']) >= {'natural', 'cw20', 'pgd20'} and r['last']['n'] == 10 for r in res['results'])
    assert res['results'][0]['last']['epoch'] == 2 and 'l_tp' in res['results'][1]['last']['figures']
    assert all(s['ms'] > 0 for s in res['speed']['steps'].values())
    text = (whole/'results.md').read_text()
    assert '| at+train |' in text and 'C&W-20' in text and 'Not finished' not in text

@pytest.mark.slow
@pytest.mark.parametrize('method', ['at', 'at+train'])
def test_pieces_give_the_same_weights(whole, pieces, method):
    a,b = (load_tensors(out/'seed1'/'checkpoints'/method/'last.pt') for out in (whole, pieces))
    def models(state): return [state['model']] + ([standard_state(state)['model']] if 'train' in method else [])
    for m,n in zip(models(a), models(b)): assert all(torch.equal(m[k], n[k]) for k in m)

@pytest.mark.slow
def test_pieces_give_the_same_results(whole, pieces):
    def results(out): return [[timeless(r['last']), timeless(r['best'])] for r in json.loads((out/'results.json').read_text())['results']]
    def rows(out): return sorted((timeless(r) for r in records(out)), key=lambda r: (r['method'], r['epoch']))
    assert results(whole) == results(pieces)
    assert rows(whole) == rows(pieces)

def test_finished_is_left_alone(whole):
    before = (whole/'records.jsonl').read_text()
    assert gpu.main(**TINY, out=whole, seconds=0) and (whole/'records.jsonl').read_text() == before

def test_other_settings_are_refused(whole):
    with pytest.raises(ValueError, match='lam=5'): gpu.main(**TINY, out=whole, lam=3.)

def test_unfinished_results_say_so(whole):
    res,recipe = json.loads((whole/'results.json').read_text()),make_recipe()
    assert 'Not finished' in gpu.text(recipe, [], res['speed'], False)
    seeds = gpu.table([dict(r, seed=s) for s in (1, 2) for r in res['results']], 'last')
    assert list(seeds.index) == ['at, seed 1', 'at+train, seed 1', 'at, seed 2', 'at+train, seed 2', 'at', 'at+train']
    assert '± 0' in seeds.loc['at', 'natural']

def test_epochs_that_fit():
    cost = dict(epoch={'at': 10, 'at+train': 12}, warmup_epoch=1, evaluation=20)
    fit = lambda seconds, n=1: gpu.epochs_that_fit(None, ['at', 'at+train'], cost, seconds, n)
    assert fit(1.1*(2*20 + 4*23 + 1)) == 4 and fit(2*1.1*(2*20 + 4*23 + 1), 2) == 4
    assert fit(1) == 1 and fit(1e6) == 30

def test_archive_of_images(tmp_path):
    for part in ('train', 'test'):
        for c in 'ab':
            (tmp_path/'images'/part/c).mkdir(parents=True)
            Image.new('RGB', (8, 8)).save(tmp_path/'images'/part/c/'0.png')
    with tarfile.open(tmp_path/'images.tar.xz', 'w:xz') as tar: tar.add(tmp_path/'images', 'images')
    for _ in range(2): folder = gpu.image_folder(str(tmp_path/'images.tar.xz'), tmp_path)
    found = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*.png'))
    assert found == ['test/a/0.png', 'test/b/0.png', 'train/a/0.png', 'train/b/0.png']
    assert gpu.image_folder('digits', tmp_path) == 'digits'
