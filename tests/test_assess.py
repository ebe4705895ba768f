"Evaluation of runs, checkpoints and anybody's models; comparisons; pictures and reports; and all of it from the shell"
import json, re, shlex, shutil, sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastprogress import fastprogress
from torch import nn

import fastrain.runs.evaluate
from fastrain import cli
from fastrain.core import save_tensors
from fastrain.evaluation.record import read_evaluation
from fastrain.evaluation.scores import mcnemar
from fastrain.models.backbone import create_backbone
from fastrain.runs.compare import _figures, _measured, _pairs, compare_runs, paired
from fastrain.runs.evaluate import evaluate_any, evaluate_run, load_any, rescore_run
from fastrain.runs.gallery import Exhibits, draw_pictures, picture, pictures
from fastrain.runs.recipe import make_recipe
from fastrain.runs.report import ReportSection, html_page, sort_tables, write_report
from fastrain.runs.run import Run, checkpoint_in_run
from fastrain.runs.train import train_run

METHODS = 'standard', 'at', 'at+train'
TINY = dict(epochs=1, steps=1, warmup=1, n_train=100, n_test=40, bs=32, n_valid=10, seed=3)
def tiny(**kwargs): return make_recipe(**TINY | kwargs)

@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Two runs that differ in the seed"
    folder = tmp_path_factory.mktemp('runs')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastprogress, 'NO_BAR', True)
        train_run(folder/'seed3', tiny(seed=3), METHODS, 'cpu')
        m.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None) # they take most of the time
        train_run(folder/'seed4', tiny(seed=4), METHODS, 'cpu')
    return folder

@pytest.fixture
def run(runs, tmp_path):
    "A copy to work on"
    shutil.copytree(runs/'seed3', tmp_path/'run')
    return tmp_path/'run'

def shell(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['fastrain', *map(str, args)])
    monkeypatch.setattr(fastprogress, 'NO_BAR', True)
    cli.main()

# --- runs

PICTURES = [f'{name}.png' for name in ('curves', 'relation', 'tradeoff', 'images', 'confusion', 'classes', 'margins', 'top_losses')]

def test_training_leaves_everything(runs):
    run = Run(runs/'seed3')
    assert {f.name for f in run.out.iterdir()} == {
        'checkpoints', 'evaluation', *PICTURES,
        'history.csv', 'report.html', 'report.md', 'results.json', 'settings.json', 'recipe.toml', '.lock'}
    for m in METHODS: assert len(pd.read_csv(run.evaluation_folder(m)/'per_image.csv')) == 40

def test_evaluate_run(run):
    "More attacks, subsets and sizes; the record, the table by image and the report say the same"
    results = evaluate_run(run, ['natural', 'pgd3', 'cw2+fgsm'], device='cpu', n=30, methods=['at'], which=['last'],
                           images=True, progress=False)
    assert [r['method'] for r in results] == ['at'] and 'best' not in results[0]
    e = results[0]['last']
    by_image = pd.read_csv(Run(run).evaluation_folder('at')/f'per_image-{e["settings"]["subset"]}.csv')
    for name in ('natural', 'pgd3', 'cw2+fgsm'):
        assert e['figures'][name] == pytest.approx((by_image[name] == by_image.label).mean())
    assert e['n'] == len(by_image) == 30 and sorted(by_image.label.value_counts()) == [3]*10
    assert e['settings']['subset'].startswith('balanced-30-')
    text = (run/'report.md').read_text()
    assert 'C&W-2+FGSM (30 images)' in text and f'| PGD-3 | {100*e["figures"]["pgd3"]:.2f} |' in text and '## On fewer images' in text
    again = rescore_run(run, 'cpu')
    assert list(again.table) == list(again.rescored) and len(again) == 2

def test_l_tp_of_a_curve(run):
    "On the images of the recipe's own size"
    results = evaluate_run(run, ['natural', 'pgd20'], device='cpu', n=30, methods=['at'], which=['last'],
                           eps='0.05,0.15,0.3', pictures=['eps'], progress=False)
    assert results[0]['l_tp_attack'] == 'pgd20@0.15' and (run/'eps.png').exists()
    figures = results[0]['last']['figures']
    assert figures['pgd20@0.3'] <= figures['pgd20@0.05']

def test_bad_requests(run):
    before = sorted(str(f) for f in run.rglob('*'))
    for kwargs,match in (
            (dict(attacks=['pdg20']), 'pdg'), (dict(eps='300'), 'larger than the whole range'), (dict(pictures=['tnse']), 'tsne'),
            (dict(methods=['mart']), 'not in this run, which has standard'), (dict(n=10**6), 'only 40')):
        with pytest.raises(ValueError, match=match): evaluate_run(run, device='cpu', progress=False, **kwargs)
    with pytest.raises(FileNotFoundError, match='--images'): rescore_run(run, 'cpu')
    with pytest.raises(ValueError, match='averaged weights'): evaluate_run(run, device='cpu', which=['average'], progress=False)
    assert [f for f in before if not Path(f).exists()] == [] and not (run/'evaluation.json').exists()

def test_checkpoint_in_run(run):
    assert checkpoint_in_run(run/'checkpoints'/'at+train'/'best.pt') == (run, 'at+train', 'best')
    assert checkpoint_in_run(run/'settings.json') is None and checkpoint_in_run('digits') is None

# --- anybody's models

MINE = '''
from torch import nn

class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.m = make()
    def forward(self, x): return self.m(x),x

def make(): return nn.Sequential(nn.Flatten(), nn.Linear(3*32*32, 10))
def pair(): return Pair()
def soft(): return nn.Sequential(make(), nn.Softmax(1))
def few(): return nn.Linear(1, 3)
def text(): return 'model'
'''

@pytest.fixture
def mine(tmp_path):
    (tmp_path/'mine.py').write_text(MINE)
    return f'{tmp_path/"mine.py"}'

def test_load_any(mine, tmp_path, run):
    model = load_any(f'{mine}:make', 10)
    assert not model.training
    save_tensors(tmp_path/'w.pt', dict(state_dict={f'module.{k}': v for k,v in model.state_dict().items()}))
    again = load_any(f'{mine}:make', 10, tmp_path/'w.pt')
    assert all(torch.equal(a, b) for a,b in zip(model.state_dict().values(), again.state_dict().values()))
    net = create_backbone('resnet10t_16', 10)
    save_tensors(tmp_path/'net.pt', net.state_dict())
    assert torch.equal(load_any(tmp_path/'net.pt', 10, backbone='resnet10t_16').get_classifier().weight, net.get_classifier().weight)
    assert load_any(run/'checkpoints'/'at'/'last.pt', 10).settings['name'] == 'resnet10t_16'

@pytest.mark.parametrize('spec, match', [
    ('mine.py:none', 'no none'), ('mine.py:text', 'returns a str'), ('mine.py:few', '3 classes'),
    ('nowhere.py:make', 'no such file'), ('no_such_package:make', 'no_such_package')])
def test_load_any_errors(mine, spec, match):
    with pytest.raises(ValueError, match=match): load_any(spec.replace('mine.py', mine), 10)

def test_load_weights_alone(tmp_path):
    save_tensors(tmp_path/'net.pt', create_backbone('resnet10t_16', 10).state_dict())
    with pytest.raises(ValueError, match='--backbone'): load_any(tmp_path/'net.pt', 10)
    with pytest.raises(FileNotFoundError): load_any(tmp_path/'none.pt', 10)

def test_evaluate_any(mine, tmp_path):
    ev = evaluate_any(f'{mine}:make', 'digits', tmp_path/'out', 'natural,pgd2', eps=.1, n=40, standard=f'{mine}:make',
                      pictures='images,tsne', device='cpu', progress=False)
    assert {f.name for f in (tmp_path/'out').iterdir()} == {
        'evaluation.json', 'evaluation.md', 'per_image.csv', 'report.md', 'report.html', 'images.png', 'tsne.png', 'parts', '.lock'}
    record = read_evaluation(tmp_path/'out')
    assert record['figures'] == ev.figures and record['environment']['torch'] and record['figures']['l_tp'] > 0
    for spec,match in (('pair', 'tuple'), ('soft', 'probabilities')):
        with pytest.raises(ValueError, match=match):
            evaluate_any(f'{mine}:{spec}', 'digits', tmp_path/spec, n=40, device='cpu', progress=False)

# --- comparisons

def test_compare(runs, tmp_path):
    table = compare_runs([runs/'seed3', runs/'seed4'], tmp_path/'both')
    df = _figures(_measured([Run(runs/'seed3'), Run(runs/'seed4')]))
    natural = df[df.method == 'at'].natural
    assert list(table.index) == list(METHODS) and set(table.seeds) == {2}
    assert table.loc['at', 'natural'] == f'{natural.mean():.2f} ± {natural.std():.2f}'
    text = (tmp_path/'both'/'report.md').read_text()
    a,b = (pd.read_csv(Run(runs/'seed4').evaluation_folder(m)/'per_image.csv') for m in ('at', 'at+train'))
    test = mcnemar(list(a.pgd20 == a.label), list(b.pgd20 == b.label))
    assert f'| seed4 | 4 | at | at+train | PGD-20 | {test["only_first"]} | {test["only_second"]} |' in text
    assert '| seed | 3 | 4 |' in text
    assert (tmp_path/'both'/'report.html').exists() and (tmp_path/'both'/'tradeoff.png').exists()

def test_compare_other_experiments(runs, run, tmp_path):
    "Runs with other settings are rows of their own"
    saved = json.loads((run/'settings.json').read_text())
    saved['recipe']['lam'] = 7.
    (run/'settings.json').write_text(json.dumps(saved))
    table = compare_runs([runs/'seed3', run, runs/'seed4'], tmp_path/'both', against='standard')
    assert list(table.index) == [f'{r}: {m}' for r in ('seed3', 'run') for m in METHODS] and list(table.seeds) == [2]*3 + [1]*3
    assert '| lam | 5.0 | 7.0 | 5.0 |' in (tmp_path/'both'/'report.md').read_text()

def test_compare_other_images(run, tmp_path):
    other = pd.read_csv(Run(run).evaluation_folder('at')/'per_image.csv')[:30]
    other.to_csv(Run(run).evaluation_folder('at')/'per_image.csv', index=False)
    with pytest.raises(ValueError, match='other images'): paired(Run(run), 'at', 'at+train')
    for runs,error in (([], ValueError), ([tmp_path/'none'], FileNotFoundError)):
        with pytest.raises(error): compare_runs(runs, tmp_path/'out')

def test_compare_what_is_not_there(run, tmp_path):
    "Damaged results by image, and a run of which only the best epochs are known"
    table = Run(run).evaluation_folder('at')/'per_image.csv'
    table.write_text('x\n')
    with pytest.raises(ValueError, match='per_image.csv is damaged'): compare_runs([run], tmp_path/'out')
    table.unlink()
    with pytest.raises(FileNotFoundError, match='no results by image for at: evaluate it, fastrain evaluate'):
        compare_runs([run], tmp_path/'out')
    saved = json.loads((run/'results.json').read_text())
    for r in saved: r['best'] = r.pop('last')
    (run/'results.json').write_text(json.dumps(saved))
    with pytest.raises(ValueError, match='run: nothing was evaluated after the last epoch'): compare_runs([run], tmp_path/'out')
    assert not (tmp_path/'out').exists()

def copied(run, folder, change=None):
    "A copy of a run, with other settings"
    shutil.copytree(run, folder)
    saved = json.loads((folder/'settings.json').read_text())
    saved['recipe'].update(change or {})
    (folder/'settings.json').write_text(json.dumps(saved))
    return folder

def rewrite(run, change):
    "The records of a run, changed as if it had been evaluated otherwise"
    saved = json.loads((run/'results.json').read_text())
    for r in saved: change(r['last'])
    (run/'results.json').write_text(json.dumps(saved))

def other_eps(record):
    for row in record['rows']:
        if row['name'] == 'pgd20': row.update(eps=1/255, alpha=.1/255, settings='PGD(eps=0.0039)')

def other_images(record): record.update(n=30, settings=record['settings'] | dict(subset='balanced-30-abc'))

def other_steps(record):
    for row in record['rows']:
        if row['name'] == 'pgd20': row.update(steps=7)

def test_compare_a_copy(runs, tmp_path):
    "A folder that was copied is no second seed, and a run given twice is one"
    copy = copied(runs/'seed3', tmp_path/'copy')
    with pytest.raises(ValueError, match='seed3 and copy have the same settings and the same seed, 3, so that standard would count twice'):
        compare_runs([runs/'seed3', copy], tmp_path/'out')
    assert not (tmp_path/'out').exists()
    assert set(compare_runs([runs/'seed3', runs/'seed4'/'..'/'seed3'], tmp_path/'out').seeds) == {1}

@pytest.mark.parametrize('change, match', [
    (other_eps, 'PGD-20 of standard in seed3 and of standard in run differs in more than the seed: '
                'ε 0.15 and 0.003922, step 0.015 and 0.0003922'),
    (other_steps, 'differs in more than the seed: steps 20 and 7. Evaluate both in the same way'),
    (other_images, r'standard of seed3 was evaluated on 40 test images \(all\), standard of run on 30 test images \(balanced-30-abc\)')])
def test_compare_what_was_measured_otherwise(runs, tmp_path, change, match):
    run = copied(runs/'seed4', tmp_path/'run')
    rewrite(run, change)
    with pytest.raises(ValueError, match=match): compare_runs([runs/'seed3', run], tmp_path/'out')
    assert not (tmp_path/'out').exists()

def test_compare_experiments_that_were_attacked_otherwise(runs, tmp_path):
    "Each ε has a column"
    run = copied(runs/'seed4', tmp_path/'run', dict(lam=7.))
    rewrite(run, other_eps)
    table = compare_runs([runs/'seed3', run], tmp_path/'out')
    assert {'PGD-20 (ε = 0.15)', 'PGD-20 (ε = 0.003922)'} <= {*table.columns} and 'PGD-20' not in table
    assert table.loc['seed3: at', 'PGD-20 (ε = 0.003922)'] == table.loc['run: at', 'PGD-20 (ε = 0.15)'] == ''

def test_compare_a_figure_of_some_seeds(runs, tmp_path):
    run = copied(runs/'seed4', tmp_path/'run')
    def fewer(record):
        record['rows'] = [row for row in record['rows'] if row['name'] != 'pgd20']
        del record['figures']['pgd20'], record['figures']['l_tp']
    rewrite(run, fewer)
    table = compare_runs([runs/'seed3', run], tmp_path/'out')
    assert table.loc['at', 'PGD-20'].endswith(' (of 1)') and '±' in table.loc['at', 'natural']
    assert 'of so many of the seeds' in (tmp_path/'out'/'report.md').read_text()

def test_compare_runs_of_one_name(runs, tmp_path):
    "They are told apart by their folders"
    a,b = copied(runs/'seed3', tmp_path/'a'/'run'),copied(runs/'seed4', tmp_path/'b'/'run', dict(lam=7.))
    table = compare_runs([a, b], tmp_path/'out')
    assert set(table.seeds) == {1} and f'{b}: at' in table.index and '| lam | 5.0 | 7.0 |' in (tmp_path/'out'/'report.md').read_text()

def test_compare_writes_over_nothing(runs, run, tmp_path):
    before = (run/'report.md').read_text()
    with pytest.raises(FileExistsError, match='holds a run or an evaluation.*choose another folder'):
        compare_runs([runs/'seed3', runs/'seed4'], run)
    assert (run/'report.md').read_text() == before

def test_paired_under_other_attacks(runs, tmp_path):
    run = copied(runs/'seed4', tmp_path/'run')
    saved = json.loads((run/'results.json').read_text())
    other_eps(saved[1]['last'])
    (run/'results.json').write_text(json.dumps(saved))
    with pytest.raises(ValueError, match='PGD-20 of at in run and of at\\+train in run differs .* ε 0.003922 and 0.15'):
        paired(Run(run), 'at', 'at+train')

def test_pairs():
    assert _pairs(['at', 'trades', 'at+train', 'trades+lbgat', 'trades+lbgat+train']) == [
        ('at', 'at+train'), ('trades', 'trades+lbgat'), ('trades+lbgat', 'trades+lbgat+train')]
    assert _pairs(['standard', 'at', 'Vanilla AT + TRAIN'], 'at+train') == [
        ('Vanilla AT + TRAIN', 'standard'), ('Vanilla AT + TRAIN', 'at')]

# --- pictures and pages

def test_every_picture_says_what_is_missing(tmp_path):
    nothing = Exhibits(dict(m=dict(rows=[], topology={})), None, None, None)
    for name in pictures:
        with pytest.raises(ValueError, match=f'Picture {name}: '): draw_pictures([name], nothing, tmp_path)
    assert draw_pictures('all', nothing, tmp_path) == [] == list(tmp_path.iterdir())

def test_own_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure
    monkeypatch.setitem(pictures, 'mine', None)
    del pictures['mine'] # and it is gone again after the test
    @picture
    def mine(e): return Figure()
    assert draw_pictures('mine', None, tmp_path) == [tmp_path/'mine.png'] and (tmp_path/'mine.png').stat().st_size > 0

def test_topology_pictures(run):
    "And the strength of methods that differ in β"
    results = evaluate_run(run, ['natural', 'pgd2', 'topology'], device='cpu', n=20, n_support=30, which=['last'],
                           methods=['standard', 'at'], pictures=['topology', 'tsne'], progress=False)
    assert (run/'topology.png').exists() and (run/'tsne.png').exists()
    assert 0 <= results[0]['last']['figures']['topology_robust'] <= 1
    records = {f'trades:beta={b}': r['last'] for b,r in zip((1, 6), results)}
    assert draw_pictures(['strength'], Exhibits(records, None, None, None), run) == [run/'strength.png']
    assert 'topology score, %' in (run/'report.md').read_text()

def test_page_is_self_contained(runs):
    page = (runs/'seed3'/'report.html').read_text()
    assert page.startswith('<!doctype html>') and '<title>digits: standard' in page and '<table>' in page
    assert page.count('data:image/png;base64,') == len(PICTURES) and not re.search(r'(src|href)="(?!data:)', page)
    script = '<script>alert(1)</script>'
    assert script not in html_page(ReportSection(script, script, [ReportSection(script)]), runs)

def test_page_is_folded_and_sorts(tmp_path):
    "Settings behind their title, two parts beside each other, the script that the site has, too"
    pictures = ReportSection('Pictures', parts=[ReportSection('', 'a'), ReportSection('', 'b')])
    parts = [ReportSection('Settings', '`bs` is 3.', folded=True), None, pictures]
    page = ReportSection('at & more', 'Text.', parts)
    text = html_page(page, tmp_path)
    assert '<title>at &amp; more</title>' in text and '<summary><h2>Settings</h2></summary>' in text and sort_tables in text
    assert text.count('<div class="parts">') == 1 and 'http' not in text
    assert page.markdown() == '# at & more\n\nText.\n\n## Settings\n\n`bs` is 3.\n\n## Pictures\n\na\n\nb\n'

def test_report_says_what_made_it(run, monkeypatch):
    "The commands of training and evaluation, each once; runs that kept none show none"
    assert '```sh' not in (run/'report.md').read_text()
    made_by = [f'fastrain evaluate {run} --attacks {name} --method at --which last --device cpu' for name in ('fgsm', 'noise')]
    for command in made_by: shell(monkeypatch, *shlex.split(command)[1:])
    assert '\n'.join(['```sh', *made_by, '```']) in (run/'report.md').read_text()
    assert Run(run).evaluations[1]['last']['settings']['commands'] == made_by

def test_shell_trains_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None)
    typed = (f'fastrain train --method \'at+train*\' --out {tmp_path/"run"} --epochs 1 --bs 16 --steps 1 --warmup 1 '
             '--n-train 48 --n-test 20 --device cpu')
    shell(monkeypatch, *shlex.split(typed)[1:])
    saved = json.loads((tmp_path/'run'/'settings.json').read_text())
    assert saved['command'] == typed and f'```sh\n{typed}\n```' in (tmp_path/'run'/'report.md').read_text()

def test_report_without_evaluation(run):
    (run/'report.md').unlink()
    write_report(Run(run))
    text = (run/'report.md').read_text()
    assert '## Best epoch' in text and 'As evaluated after training' not in text and all(f'### {m}\n' in text for m in METHODS)

# --- from the shell

def test_shell_evaluates_a_run(run, monkeypatch, capsys):
    shell(monkeypatch, 'evaluate', run, '--attacks', 'natural,pgd2,noise', '--n', 20, '--images', '--which', 'last',
          '--method', 'at,at+train', '--device', 'cpu', '--pictures', 'tradeoff')
    out = capsys.readouterr().out
    assert re.search(r'at\+train +natural', out) and 'PGD-2' in out and 'balanced-20-' in out and 'report.html' in out
    shell(monkeypatch, 'evaluate', run, '--rescore', '--device', 'cpu')
    assert 'exactly' in capsys.readouterr().out
    shell(monkeypatch, 'evaluate', run/'checkpoints'/'at'/'last.pt', '--attacks', 'fgsm', '--device', 'cpu')
    out = capsys.readouterr().out
    assert re.search(r'^at +FGSM', out, re.M) and 'standard' not in out

def test_shell_evaluates_any_model(mine, tmp_path, monkeypatch, capsys):
    args = ('evaluate', f'{mine}:make', '--data', 'digits', '--attacks', 'natural,pgd2', '--eps', '.05,.1', '--n', 20,
            '--out', tmp_path/'out', '--device', 'cpu', '--images')
    save_tensors(tmp_path/'w.pt', load_any(f'{mine}:make', 10).state_dict())
    shell(monkeypatch, *args, '--weights', tmp_path/'w.pt')
    assert 'PGD-2@.05' in capsys.readouterr().out
    shell(monkeypatch, *args, '--weights', tmp_path/'w.pt', '--rescore')
    assert 'exactly' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='--data'): shell(monkeypatch, 'evaluate', f'{mine}:make')
    with pytest.raises(SystemExit, match='another figure'): shell(monkeypatch, *args, '--rescore') # other random weights

def test_shell_interrupted(run, monkeypatch, capsys):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(fastrain.runs.evaluate, 'evaluate_run', stop)
    with pytest.raises(SystemExit, match='130'): shell(monkeypatch, 'evaluate', run)
    assert 'The same command goes on' in capsys.readouterr().err

@pytest.mark.slow
def test_shell_with_own_pieces(run, tmp_path, monkeypatch, capsys):
    "Models are evaluated and compared without what they were trained with"
    (tmp_path/'own.py').write_text('from fastrain.pieces.losses import AT\nclass Mine(AT): key = "mine_of_the_shell"\n')
    monkeypatch.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None)
    shell(monkeypatch, 'train', '--resume', '--out', run, '--load', tmp_path/'own.py',
          '--method', 'mine_of_the_shell', '--device', 'cpu')
    from fastrain.pieces.losses import RobustLoss
    RobustLoss.registry.pop('mine_of_the_shell') # as in a new process, and for the tests after this one
    shell(monkeypatch, 'evaluate', run, '--attacks', 'natural', '--n', 20, '--which', 'last',
          '--method', 'at,mine_of_the_shell', '--device', 'cpu')
    shell(monkeypatch, 'compare', run, '--out', tmp_path/'compared')
    assert 'mine_of_the_shell' in capsys.readouterr().out

def test_compare_after_an_evaluation_of_the_best_alone(run, tmp_path):
    evaluate_run(run, ['natural'], device='cpu', n=20, methods=['at'], which=['best'], progress=False)
    assert list(compare_runs([run], tmp_path/'out').index) == list(METHODS)

def test_shell_compares(runs, tmp_path, monkeypatch, capsys):
    shell(monkeypatch, 'compare', runs/'seed3', runs/'seed4', '--out', tmp_path/'both')
    assert '±' in capsys.readouterr().out and (tmp_path/'both'/'report.html').exists()

OWN_ATTACK = '''
import torch
from fastrain.attacks.named import AttackKind
from fastrain.evaluation.scores import Measure
from fastrain.runs.gallery import picture
from matplotlib.figure import Figure

class Halve(AttackKind):
    key,title = 'halve-of-the-shell','Halving'
    def make(self, **_): return lambda model, x, y: x/2

class Sure(Measure):
    key,title,unit,format = 'sure-of-the-shell','sure','%','.1f'
    def measure(self, evidence): return .25

@picture
def blank_of_the_shell(e):
    "Nothing at all."
    return Figure()
'''

def test_shell_with_own_attack_measure_and_picture(run, tmp_path, monkeypatch, capsys):
    "In tables, reports and titles, and compared in a process that is told of them"
    from fastrain.attacks.named import AttackKind
    from fastrain.evaluation.scores import Measure
    (tmp_path/'own.py').write_text(OWN_ATTACK)
    try:
        shell(monkeypatch, 'evaluate', run, '--attacks', 'natural,halve-of-the-shell,sure-of-the-shell', '--which', 'last',
              '--method', 'at,at+train', '--pictures', 'tradeoff,blank_of_the_shell', '--device', 'cpu', '--load', tmp_path/'own.py')
        shell(monkeypatch, 'compare', run, '--out', tmp_path/'compared', '--load', tmp_path/'own.py')
        assert 'Halving' in capsys.readouterr().out
        page,compared = (run/'report.md').read_text(),(tmp_path/'compared'/'report.md').read_text()
        assert '| method | natural | PGD-20 | Halving | worst case | AutoAttack | L_TP | sure |' in page
        assert '*Nothing at all.*' in page and '| Halving |' in page
        assert '| at | at+train | Halving |' in compared and '| 25.00 |' in compared
    finally:
        AttackKind.registry.pop('halve-of-the-shell', None)
        Measure.registry.pop('sure-of-the-shell', None)
        pictures.pop('blank_of_the_shell', None)

@pytest.mark.parametrize('args, match', [
    (['--attacks', 'pdg20'], 'pdg'), (['--n', '0'], 'n=0'), (['--which', 'first'], 'first'), (['--pictures', 'x'], 'picture'),
    (['--bs', '3'], '--bs: a run has its own'), (['--data', 'digits', '--method', 'at'], '--method: they choose'),
    (['--method', 'at,mart'], 'mart')])
def test_shell_refuses(run, monkeypatch, args, match):
    with pytest.raises(SystemExit, match=match) as e: shell(monkeypatch, 'evaluate', run, '--device', 'cpu', *args)
    assert str(e.value).count('\n') == 0
