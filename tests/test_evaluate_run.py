"What an evaluation adds to its folder, what it leaves there, and what a run's report says of sizes, steps and numbers of images"
import json, re, shutil

import pandas as pd
import pytest
import torch
from fastprogress import fastprogress

import fastrain.runs.evaluate
from conftest import digits
from fastrain.attacks.named import parse_attacks
from fastrain.attacks.pgd import PGD
from fastrain.evaluation.evaluate import rescore, saved_images
from fastrain.evaluation.record import read_evaluation, read_evaluations
from fastrain.evaluation.tables import attack_table, sizes_text, steps_text
from fastrain.runs.evaluate import evaluate_any, evaluate_run, recipe_attacks, rescore_run
from fastrain.runs.gallery import Exhibits, check_pictures, pictures
from fastrain.runs.recipe import make_recipe
from fastrain.runs.report import write_report
from fastrain.runs.run import Run
from fastrain.runs.train import train_run
from test_evaluation import batches, columns, hooked, inverts, keeps, run, trained, without_features
from conftest import net, same

# --- what was measured before

def folder(out): return {f.name for f in out.iterdir()}

def test_a_later_call_keeps_what_was_measured(tmp_path):
    first = run(attacks='natural,fgsm,pgd2+cw2', out=tmp_path)
    second = run(attacks='natural,noise', out=tmp_path)
    assert list(second.attacks) == ['natural', 'noise'] # what comes back is what was asked for
    record,table = read_evaluation(tmp_path),pd.read_csv(tmp_path/'per_image.csv', keep_default_na=False)
    alone = run(attacks='natural,fgsm,pgd2+cw2,noise')
    seconds = lambda rows: [{k: v for k,v in r.items() if k != 'seconds'} for r in rows]
    assert seconds(record['rows']) == seconds(alone.record()['rows']) # the worst case of all, too
    assert record['figures'] == alone.figures and record['notes'] == []
    assert table.equals(pd.read_csv(_csv(alone, tmp_path), keep_default_na=False))
    assert [r for r in record['rows'] if r['name'] == 'fgsm'] == [r for r in first.record()['rows'] if r['name'] == 'fgsm']

def _csv(ev, out):
    (out/'alone.csv').write_text(ev.per_image.to_csv(index=False))
    return out/'alone.csv'

def test_kept_figures_are_not_measured_again(tmp_path):
    calls = []
    def mine(model, x, y): calls.append(1); return x
    run(attacks=dict(natural=None, mine=mine), out=tmp_path)
    run(attacks='natural,fgsm', out=tmp_path)
    assert len(calls) == 3 and list(read_evaluation(tmp_path)['files']) == ['natural', 'mine', 'fgsm']

def test_what_is_named_again_is_replaced(tmp_path):
    run(attacks='natural,pgd2,fgsm', out=tmp_path)
    ev = run(attacks='pgd2', eps=.03, out=tmp_path)
    record = read_evaluation(tmp_path)
    assert record['figures']['pgd2'] == ev['pgd2'] and set(record['figures']) == {'natural', 'pgd2', 'fgsm'}
    assert record['notes'] == ['earlier figures: PGD-2 (ε = 0.06) in this folder had other settings, and are replaced']
    run(attacks='fgsm', eps=.06, out=tmp_path)
    assert read_evaluation(tmp_path)['notes'] == [] and sizes_text([read_evaluation(tmp_path)]) == 'ε = 0.03 (PGD-2), 0.06 (FGSM)'

def other_weights():
    model = trained()
    model.fc.bias.data[3:4].add_(3)
    return model

@pytest.mark.parametrize('change, why', [
    (dict(seed=1), 'with seed 0'), (dict(model=other_weights), 'on another model'),
    (dict(model=lambda: hooked(inverts)), 'on another model, on other images or in other batches'),
    (dict(dl=lambda: [(1 - x, y) for x,y in batches()]), 'on another model, on other images or in other batches')])
def test_what_does_not_hold_is_left_out(tmp_path, change, why):
    make = change.pop('model', None) or (lambda: hooked(keeps))
    data = change.pop('dl', batches)()
    run(hooked(keeps) if why != 'on another model' else trained(), attacks='natural,fgsm', out=tmp_path)
    ev = run(make(), data, attacks='natural,pgd2', out=tmp_path, **change)
    record = read_evaluation(tmp_path)
    assert record['figures'] == ev.figures and record['notes'] == [
        f'earlier figures: FGSM (ε = 0.06) in this folder had been measured {why}, and are left out. '
        'Ask for them again to have them in the table']
    assert 'fgsm' not in pd.read_csv(tmp_path/'per_image.csv') and ev.notes == []

def as_an_older_version(out):
    "Which kept no answers"
    for f in (out/'parts').rglob('*.pt'):
        part = torch.load(f)
        del part['answer']
        torch.save(part, f)

@pytest.mark.parametrize('attacks, change, kept, why', [
    ('natural,fgsm', keeps, True, ''), ('natural,fgsm', inverts, False, 'on another model'),
    ('fgsm', keeps, False, 'by an older fastrain')])
def test_figures_of_an_older_version(tmp_path, attacks, change, kept, why):
    "Natural images tell whether the model is the same; without them nothing does"
    run(hooked(keeps), attacks=attacks, out=tmp_path)
    as_an_older_version(tmp_path)
    run(hooked(change), attacks='natural,pgd2', out=tmp_path)
    record = read_evaluation(tmp_path)
    assert ('fgsm' in record['figures']) == kept and len(record['notes']) == (not kept)
    if why: assert f'FGSM (ε = 0.06) in this folder had been measured {why}' in record['notes'][0]

def test_measures_stay_on_their_attack(tmp_path):
    "An attack that is added does not turn L_TP under PGD-20 into another"
    before = run(attacks='natural,pgd20', standard=net(), out=tmp_path)
    alone = run(attacks='natural,fgsm', standard=net(), out=tmp_path)
    record = read_evaluation(tmp_path)
    assert record['figures']['l_tp'] == before['l_tp'] != alone['l_tp'] and record['settings']['l_tp_attack'] == 'pgd20'
    run(attacks='natural,topology,pgd20', support=batches(part='train'), ks=(5,), out=tmp_path) # without a standard model
    record = read_evaluation(tmp_path)
    assert record['figures']['l_tp'] == before['l_tp'] and 'topology_robust' in record['figures'] and record['topology']
    run(attacks='natural,noise', out=tmp_path)
    assert 'topology_robust' in read_evaluation(tmp_path)['figures']

@pytest.mark.parametrize('text', ['[1, 2]', '{}', '{"version": 2', '{"version": 2, "rows": [5], "settings": {}, "files": {}}', 'null'])
def test_a_damaged_record_is_replaced(tmp_path, text):
    run(out=tmp_path)
    (tmp_path/'evaluation.json').write_text(text)
    ev = run(attacks='natural,fgsm', out=tmp_path)
    assert read_evaluation(tmp_path)['figures'] == ev.figures

def test_damaged_records_are_named(tmp_path):
    run(out=tmp_path)
    for text in ('[1, 2]', '{"version": 2', '{"version": 1, "table": [5]}'):
        (tmp_path/'evaluation.json').write_text(text)
        with pytest.raises(ValueError, match='evaluation.json is damaged') as e: read_evaluation(tmp_path)
        assert '\n' not in str(e.value)

# --- numbers of images

def test_few_images_stand_beside_many(tmp_path):
    full = run(attacks='natural,fgsm', out=tmp_path)
    few = run(attacks='natural,pgd2', n=10, out=tmp_path)
    assert read_evaluation(tmp_path)['figures'] == full.figures and few.n == 10
    name = few.settings['subset']
    assert folder(tmp_path) == {'parts', 'evaluation.json', 'evaluation.md', 'per_image.csv',
                                f'evaluation-{name}.json', f'evaluation-{name}.md', f'per_image-{name}.csv'}
    assert read_evaluation(tmp_path, name)['figures'] == few.figures
    assert [r['n'] for r in read_evaluations(tmp_path)] == [24, 10]
    run(attacks='natural,noise', n=10, out=tmp_path) # which adds to its like
    assert list(read_evaluation(tmp_path, name)['files']) == ['natural', 'pgd2', 'noise'] and read_evaluation(tmp_path)['n'] == 24

def test_many_images_come_before_few(tmp_path):
    few = run(attacks='natural,pgd2', n=10, out=tmp_path)
    full = run(attacks='natural,fgsm', out=tmp_path)
    assert [r['n'] for r in read_evaluations(tmp_path)] == [24, 10]
    assert read_evaluation(tmp_path)['figures'] == full.figures
    assert read_evaluation(tmp_path, few.settings['subset'])['figures'] == few.figures

@pytest.mark.parametrize('change', [other_weights, lambda: hooked(inverts)])
def test_few_images_of_another_model(tmp_path, change):
    "Nothing of the former model stays beside them"
    run(attacks='natural,fgsm', out=tmp_path)
    run(attacks='natural,fgsm', n=16, out=tmp_path)
    ev = run(change(), attacks='natural', n=10, out=tmp_path)
    assert [r['figures'] for r in read_evaluations(tmp_path)] == [ev.figures]

def test_rescore_finds_the_images_of_few(tmp_path):
    run(attacks='natural,fgsm', out=tmp_path)
    few = run(attacks='natural,pgd2', n=10, out=tmp_path, images=True)
    table = rescore(trained(), tmp_path)
    assert list(table.index) == ['pgd2'] and table.n.tolist() == [10] and table.table.tolist() == table.rescored.tolist() == [few['pgd2']]
    assert sum(len(y) for _,y in saved_images(tmp_path, 'pgd2')) == 10

# --- what stands above a table

def test_sizes_and_steps_as_they_were(tmp_path):
    of = lambda attacks, **kwargs: run(attacks=attacks, **kwargs).record()
    assert sizes_text([of('natural,pgd2,fgsm')]) == 'ε = 0.06' and steps_text([of('natural,pgd2,fgsm')]) == 'step 0.006'
    several = of('natural,pgd2', eps='0.05,0.1')
    assert sizes_text([several]) == 'ε as the columns say' and steps_text([several]) == 'step 0.005 (PGD-2@0.05), 0.01 (PGD-2@0.1)'
    mixed = of(dict(natural=None, a=PGD(.1, .02, 2), b=PGD(.2, .02, 3)))
    assert sizes_text([mixed]) == 'ε = 0.1 (a), 0.2 (b)' and steps_text([mixed]) == 'step 0.02'
    assert sizes_text([of('natural,pgd2,fgsm@0.1')]) == 'ε = 0.06 where a column does not say otherwise'
    assert 'step' in steps_text([of('natural,fgsm+pgd2')]) and sizes_text([of('natural')]) == steps_text([of('natural,fgsm')]) == ''

def test_norms_in_a_table():
    one = attack_table(run(attacks='natural,pgd2').record())
    two = attack_table(run(attacks=dict(natural=None, a=PGD(.1, .1, 1), b=PGD(1., 1., 1, norm='l2'))).record())
    assert 'norm' not in one and two.norm.tolist() == ['', 'linf', 'l2']

def test_worst_cases_know_their_size():
    rows = {r.name: r for r in run(attacks='natural,fgsm,noise', eps='0.05,0.1').rows}
    assert rows['worst case@0.05'].eps == .05 and rows['worst case@0.1'].eps == .1

# --- runs

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp('made')/'run'
    recipe = make_recipe(epochs=1, steps=1, warmup=1, n_train=100, n_test=40, bs=32, n_valid=10, seed=3)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastprogress, 'NO_BAR', True)
        m.setattr(fastrain.runs.evaluate, 'draw_pictures', lambda *args: None)
        train_run(out, recipe, ('standard', 'at'), 'cpu')
    return out

@pytest.fixture
def out(made, tmp_path):
    shutil.copytree(made, tmp_path/'run')
    return tmp_path/'run'

def again(out, attacks, **kwargs): return evaluate_run(out, attacks, device='cpu', progress=False, **kwargs)
def accuracy_line(out): return re.search(r'In % on .*', (out/'report.md').read_text())[0]
def known(out): return {r['method']: r for r in json.loads((out/'evaluation.json').read_text())}

def test_sizes_that_are_not_the_recipes_are_in_the_names():
    r = make_recipe()
    names = lambda eps: list(recipe_attacks(r, 'natural,pgd20,fgsm@0.1,cw2', eps))
    assert names(None) == names('0.15') == names(.15) == ['natural', 'pgd20', 'fgsm@0.1', 'cw2']
    assert names('1/255') == ['natural', 'pgd20@1/255', 'fgsm@0.1', 'cw2@1/255']
    assert names('0.1,0.2') == ['natural', 'pgd20@0.1', 'pgd20@0.2', 'fgsm@0.1', 'cw2@0.1', 'cw2@0.2']
    las = make_recipe('las')
    assert recipe_attacks(las, 'pgd20', '8/255')['pgd20'].alpha == recipe_attacks(las, 'pgd20')['pgd20'].alpha == las.eval_alpha
    assert recipe_attacks(las, 'pgd20', '4/255')['pgd20@4/255'].alpha == pytest.approx(.4/255)

def test_another_size_is_another_column(out):
    results = again(out, ['natural', 'pgd20'], eps='1/255', which=['last'])
    assert [list(r['last']['figures'])[:2] for r in results] == [['natural', 'pgd20@1/255']]*2
    r = known(out)['at']
    assert {'pgd20', 'pgd20@1/255'} <= {*r['last']['figures']}
    assert r['l_tp_attack'] == 'pgd20' and 'best' in r
    text = (out/'report.md').read_text()
    assert 'ε = 0.15; step 0.015. ' in accuracy_line(out) and '| natural | PGD-20 | AutoAttack | L_TP |' in text
    assert '### Other sizes of ε\n\nε as the columns say; step 0.000392.\n\n| method | PGD-20@1/255 |\n' in text

def test_methods_and_checkpoints_stay(out):
    again(out, ['natural', 'fgsm'], methods=['at'], which=['last'])
    before = known(out)
    assert list(before) == ['standard', 'at']
    assert 'fgsm' in before['at']['last']['figures'] and 'pgd20' in before['standard']['last']['figures']
    again(out, ['natural', 'noise'], methods=['standard'])
    now = known(out)
    assert now['at'] == before['at'] and {'pgd20', 'noise'} <= {*now['standard']['last']['figures']}
    assert 'As evaluated after training' not in (out/'report.md').read_text() # nothing of it is missing above

def test_few_images_of_a_run(out):
    before = Run(out).results
    results = again(out, ['natural', 'pgd2'], n=20, images=True)
    assert [r['last']['n'] for r in results] == [20, 20]
    r = known(out)['at']
    assert r['last']['figures'] == next(b for b in before if b['method'] == 'at')['last']['figures'] and r['last']['n'] == 40
    assert [few['n'] for few in r['fewer']['last']] == [20]
    text = (out/'report.md').read_text()
    assert accuracy_line(out).startswith('In % on 40 test images') and '| natural | PGD-20 | PGD-2 (20 images) | AutoAttack |' in text
    assert '## On fewer images' in text and '### at, last epoch, 20 images' in text
    table = rescore_run(out, 'cpu')
    assert list(table.table) == list(table.rescored) and set(table.n) == {20}
    assert read_evaluation(Run(out).evaluation_folder('at'))['n'] == 40

def test_report_of_many_images_after_few(out):
    for f in (out/'evaluation').rglob('evaluation.json'): f.unlink()
    again(out, ['natural', 'pgd2'], n=20, methods=['at'], which=['last'])
    assert accuracy_line(out).startswith('In % on 20 to 40 test images')

def test_evaluated_by_todays_main_with_a_size(out):
    "An `evaluation.json` whose column does not say its size"
    results = json.loads((out/'results.json').read_text())
    for r in results:
        for row in r['last']['rows']:
            if row['name'] == 'pgd20': row['eps'],row['alpha'] = 1/255,.1/255
    (out/'evaluation.json').write_text(json.dumps(results))
    write_report(Run(out))
    assert 'ε = 0.003922; step 0.000392' in accuracy_line(out)

def test_l_tp_says_whose_images(out):
    results = json.loads((out/'results.json').read_text())
    of = results[1]['last']
    of['settings']['l_tp_attack'] = 'natural'
    (out/'evaluation.json').write_text(json.dumps(results))
    write_report(Run(out))
    assert 'against the PGD-20 (standard) or natural (at) features' in accuracy_line(out)

def test_one_at_a_time(out):
    with Run(out).lock(): pass
    seen = []
    def look(*args, **kwargs):
        seen.append((out/'.holder').exists())
        raise KeyboardInterrupt
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fastrain.runs.evaluate, 'assess', look)
        with pytest.raises(KeyboardInterrupt): again(out, ['natural'])
    assert seen == [True] and not (out/'.holder').exists()

# --- pictures

@pytest.mark.parametrize('name, match', [('eps', 'evaluate with several sizes'), ('topology', 'evaluate with topology'),
                                         ('strength', 'evaluate with topology')])
def test_pictures_are_checked_before_any_work(out, tmp_path, monkeypatch, name, match):
    def work(*args, **kwargs): raise AssertionError('it began to work')
    monkeypatch.setattr(fastrain.runs.evaluate, 'assess', work)
    monkeypatch.setattr(fastrain.runs.evaluate, 'load_for', work)
    with pytest.raises(ValueError, match=f'Picture {name}: {match}'): again(out, ['natural', 'pgd20'], pictures=[name])
    with pytest.raises(ValueError, match=f'Picture {name}: {match}'): evaluate_any('a.py:f', 'digits', tmp_path/'o', pictures=[name])
    for other in ('curves', 'relation'):
        with pytest.raises(ValueError, match='only runs have one'): evaluate_any('a.py:f', 'digits', tmp_path/'o', pictures=other)

def test_sizes_measured_before_make_the_curve(out):
    "And that of the recipe, which its name does not say"
    again(out, ['natural', 'pgd20'], eps='0.05', which=['last'], methods=['at'])
    again(out, ['natural', 'pgd20'], which=['last'], methods=['at'], pictures=['eps'])
    assert (out/'eps.png').exists()
    check_pictures('eps', parse_attacks('natural,pgd20', '0.1,0.2'), [])
    with pytest.raises(ValueError, match='several sizes'): check_pictures('eps', parse_attacks('natural,pgd20,cw20'), [])

def test_tradeoff_is_at_the_runs_size():
    attack = PGD(.15, .015, 20)
    def drawn(attacks, attack=attack):
        record = run(attacks=attacks).record()
        return pictures['tradeoff'](Exhibits(dict(at=record), None, None, attack)).axes[0].get_ylabel()
    assert drawn('natural,pgd2@0.15,pgd2@0.2,noise@0.2') == 'accuracy under PGD-2@0.15, %'
    assert drawn('natural,pgd2@0.15,cw2@0.15,pgd2@0.2,cw2@0.2').startswith('accuracy under worst case@0.15')
    assert drawn('natural,pgd2@0.2') == 'accuracy under PGD-2@0.2, %'
