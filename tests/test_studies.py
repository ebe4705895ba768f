"Fronts against plain examples, families, costs against what is counted by hand, and the report of the paper's tables"
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from fastrain.pieces.base import Output, Views
from fastrain.pieces.losses import RobustLoss
from fastrain.runs.recipe import make_recipe
from fastrain.studies.cost import StudyCost, check_room, count_flops, experiment_cost, measure_step, study_cost
from fastrain.studies.ledger import Ledger
from fastrain.studies.paper import paper_table, paper_tables
from fastrain.studies.pareto import Family, area_between, compare_fronts, dominated, family_experiments, family_points, front, natural_at
from fastrain.studies.pareto import pareto_report, verdict
from fastrain.studies.rows import row_experiment
from fastrain.studies.study_report import compared_table, measured, read_study, study_report

# --- geometry

def test_dominated_by_the_definition():
    g = np.random.default_rng(0)
    points = g.integers(0, 6, (40, 2)) # with many ties
    def beaten(p): return any((q >= p).all() and (q > p).any() for q in points)
    assert dominated(points).tolist() == [beaten(p) for p in points]
    f = front(points)
    assert not dominated(f).any() and (np.diff(f[:,1]) > 0).all() and (np.diff(f[:,0]) < 0).all()

def test_equal_points_do_not_beat_each_other():
    assert not dominated([(1, 2), (1, 2)]).any() and len(front([(1, 2), (1, 2)])) == 1

def test_natural_accuracy_on_the_line_between_neighbours():
    points = [(60, 20), (50, 30), (44, 32), (40, 25)]
    assert natural_at(points, [20, 22, 30, 31, 32]).tolist() == [60, 58, 50, 47, 44]
    assert np.isnan(natural_at(points, [19.9, 32.1])).all()

def test_area_of_shapes_that_are_known():
    flat,slope = [(60, 20), (50, 30)],[(64, 20), (50, 30)]
    assert area_between(slope, flat) == (20., 10.) # a triangle
    assert area_between(flat, slope) == (-20., 10.)
    assert area_between(flat, flat) == (0., 10.)
    shifted = [(60, 25), (50, 35)]
    assert area_between(shifted, flat) == (25., 5.) # five points beyond, over the range that both have
    cross = [(56, 20), (54, 30)]
    assert area_between(cross, flat) == (0., 10.)
    area,width = area_between([(60, 40), (50, 50)], flat)
    assert math.isnan(area) and width == 0

def test_a_corner_of_either_front_is_a_corner_of_the_area():
    bent = [(60, 20), (59, 25), (50, 30)]
    assert area_between(bent, [(60, 20), (50, 30)])[0] == pytest.approx(4*10/2)

# --- families

def made_up(shifts, seeds=(1, 2, 3), noise=.2):
    g = np.random.default_rng(0)
    rows = [dict(family=f, member=f'{f} {i}', seed=s, natural=60 - 10*i + shift + noise*g.standard_normal(), robust=20 + 5*i, seconds=1.)
            for f,shift in shifts.items() for s in seeds for i in range(3)]
    return pd.DataFrame(rows)

def test_verdicts():
    families = [Family.parse(f) for f in ('mix', 'trades', 'at+train', 'mart+train')]
    names = [f.name for f in families]
    points = made_up(dict(zip(names, (0, 0, 3, -3))))
    words = [verdict(row) for _,row in compare_fronts(points, families).iterrows()]
    assert words[2].startswith('is beyond the front of the others: +3.') and words[3].startswith('is behind the front of the others: -')
    one = compare_fronts(points[points.seed == 1], families)
    assert all('cannot tell it from chance' in verdict(row) for _,row in one.iterrows())
    apart = points.assign(robust=np.where(points.family == names[2], points.robust + 50, points.robust))
    assert 'cannot be compared' in verdict(compare_fronts(apart, families).loc[names[2]])

def test_chance_alone_is_no_front():
    families = [Family.parse(f) for f in ('mix', 'trades', 'at+train')]
    points = made_up({f.name: 0 for f in families}, noise=1.)
    assert 'lies along' in verdict(compare_fronts(points, families).iloc[2])

WRONG = ['trade', 'at+train lam=', 'at+train lam=a', 'at+train lamb=1', 'nothing lam=1', 'trades:beta={} x', '']

@pytest.mark.parametrize('text', WRONG)
def test_wrong_families(text):
    with pytest.raises(ValueError) as e: Family.parse(text)
    assert '\n' not in str(e.value)

def test_members_have_one_key_and_the_settings_that_they_are_named_after():
    families = [Family.parse(f) for f in ('at-eps', 'trades', 'at+train+ema lam=1,5', 'at+train warmup=0,3')]
    found = family_experiments(families, 'tiny', seeds=(1, 2))
    assert len({(e.key, e.seed) for e in found}) == len(found) == 2*(4 + 4 + 2 + 2)
    by_key = {e.key: e for e in found}
    assert by_key['pareto/at+train+ema lam=5'].recipe.lam == 5 and by_key['pareto/at+train warmup=3'].recipe.warmup == 3
    half,whole = by_key['pareto/at eps_share=.5'].recipe,by_key['pareto/at eps_share=1'].recipe
    assert half.eps == whole.eps/2 and half.alpha == whole.alpha/2 and half.eval_eps == whole.eval_eps

def test_mix_is_at_or_natural_at_its_ends():
    g = torch.Generator().manual_seed(0)
    adv,nat = (Output(torch.randn(3, 4, generator=g), None) for _ in range(2))
    v = Views(None, torch.tensor([0, 1, 2]), adv=adv, nat=nat)
    total = {n: sum(RobustLoss.named('mix', natural=n)(v).values()) for n in (0., .3, 1.)}
    torch.testing.assert_close(total[.3], .3*total[1.] + .7*total[0.])
    torch.testing.assert_close(total[0.], RobustLoss.named('at')(v)['ce'])
    with pytest.raises(ValueError, match='natural=1.5: expected a share'): RobustLoss.named('mix', natural=1.5)

# --- costs

SMALL = dict(n_train=60, n_test=20, bs=16, backbone='test_byobnet', standard='test_byobnet', n_valid=10)

def test_flops_are_linear_in_steps_and_none_of_what_is_counted_is_lost():
    r = make_recipe('digits', **SMALL)
    one,three = (measure_step(replace(r, steps=s), 'at', 'cpu') for s in (1, 3))
    a_step = (three.flops - one.flops)/2
    assert 1.9 < a_step/one.forward < 3.1 # forward, and backward to the images
    assert one.memory == pytest.approx(three.memory, rel=.2) # graphs of steps are freed

def test_a_standard_model_costs_what_it_adds():
    r = make_recipe('digits', **SMALL)
    at,train = (measure_step(r, m, 'cpu') for m in ('at', 'at+train'))
    assert train.weights == 2*at.weights and train.flops > at.flops and train.standard > 0 == at.standard

def test_rows_share_the_cost_of_a_standard_model():
    rows = [row_experiment(f'6/{n}', 'tiny', attacks=('natural',), epochs=1, **SMALL) for n in ('TRADES + TRAIN', 'Vanilla AT + TRAIN')]
    cost = study_cost(rows, 'cpu')
    assert cost.flops == pytest.approx(sum(c.flops for c in cost.costs) - cost.costs[0].alone)
    assert '2 experiments: ' in cost.text()

def test_too_small_a_disk(tmp_path):
    e = row_experiment('6/AT', 'tiny', attacks=('natural',), epochs=1, **SMALL)
    cost = experiment_cost(e, measure_step(e.recipe, e.method, 'cpu'), 'cpu')
    check_room(StudyCost([cost]), tmp_path/'new')
    with pytest.raises(OSError, match='are needed. Make space'): check_room(StudyCost([replace(cost, disk=1e18)]), tmp_path/'new')

def test_counting_changes_nothing():
    x,w = torch.randn(4, 5, requires_grad=True),torch.randn(5, 3, requires_grad=True)
    with count_flops() as counter: grad = torch.autograd.grad((x@w).sum(), x)[0]
    assert counter.get_total_flops() == 2*2*4*5*3 and torch.equal(grad, w.sum(1).expand(4, 5))

# --- the report

def enter(ledger, e, **values):
    ids = ledger.enter([e])
    figures = [dict(which=w, figure=k, title=k, value=v, low=None, high=None, n=10) for w in ('best', 'last') for k,v in values.items()]
    ledger.finish(ledger.take(ids), figures, 1., dict(torch='2'), 'abc', 'data')

def less(key, seed=1, **changed): return row_experiment(key, 'tiny', seed, ('natural', 'pgd20-lbgat'), **changed)

def test_what_was_not_run_stays_and_what_was_changed_is_said(tmp_path):
    ledger = Ledger(tmp_path/'ledger.sqlite')
    for seed,natural in ((1, .5), (2, .54)): enter(ledger, less('6/TRADES + TRAIN', seed), **{'natural': natural, 'pgd20-lbgat': .3})
    enter(ledger, less('6/TRADES + TRAIN', epochs=1), natural=.1)
    failing = ledger.enter([less('6/Vanilla AT')])
    ledger.fail(ledger.take(failing), 'no space')
    lines = study_report([tmp_path])
    text = (tmp_path/'report.md').read_text()
    assert lines == [f'Table 6: 1 of {len(paper_table("6").rows)} rows are done (3 done, 1 failed)']
    assert '52.00 ± 2.83' in text and 'not run' in text and 'Changed by hand: epochs = 1' in text and 'no space' in text
    assert 'No row of Table 1 ' in text and (tmp_path/'report.html').is_file()
    row = next(r for r in paper_table('6').rows if r.name == 'TRADES + TRAIN')
    printed = float(row.cells[0].split()[0])
    assert f'{52 - printed:+.2f}' in text

def test_a_report_of_several_ledgers(tmp_path):
    for i in (1, 2): enter(Ledger(tmp_path/str(i)/'ledger.sqlite'), less('6/Vanilla AT', i), natural=.4 + .1*i)
    study_report([tmp_path/'1', tmp_path/'2'], tmp_path/'both')
    assert '55.00 ± 7.07' in (tmp_path/'both'/'report.md').read_text()

def test_every_table_can_be_reported():
    for t in paper_tables():
        table = compared_table(t, [])
        assert len(table) == len(t.rows) and set(table.seeds) <= {'not run', 'no such method here'}

def test_units():
    e = dict(figures={('best', 'natural'): dict(value=.5), ('last', 'natural'): dict(value=.4), ('best', 'l_tp'): dict(value=.3),
                      ('run', 'seconds_per_epoch'): dict(value=7.)})
    assert measured(e, 'natural', 'gap') == pytest.approx(10) and measured(e, 'l_tp', 'best') == .3
    assert measured(e, 'seconds_per_epoch', 'best') == 7 and measured(e, 'pgd20', 'best') is None

def test_a_report_of_fronts(tmp_path):
    families = [Family.parse('trades:beta={} 1,6'), Family.parse('at+train lam=1,5')]
    ledger = Ledger(tmp_path/'ledger.sqlite')
    values = iter([(.6, .2), (.5, .3), (.62, .2), (.52, .3)]*2)
    for e in family_experiments(families, 'tiny', seeds=(1, 2)): enter(ledger, e, **dict(zip(('natural', 'pgd20'), next(values))))
    assert len(family_points(read_study([tmp_path]), families)) == 8
    lines = pareto_report([tmp_path], families, tmp_path, scale='tiny')
    told = '+2.0 points of natural accuracy at equal robust accuracy (+2.0 to +2.0 at 95 %, 2 seeds)'
    assert lines[1] == f'at+train lam is beyond the front of the others: {told}'
    assert lines[0].startswith('trades:beta has no range')
    assert (tmp_path/'pareto.html').is_file() and (tmp_path/'pareto.png').is_file()
    with pytest.raises(ValueError, match='no member'): pareto_report([tmp_path], families, tmp_path, scale='small')
