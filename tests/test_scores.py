"Intervals and paired tests against enumeration, spread over seeds, and the two scores of a representation against scikit-learn and NumPy"
import math
from fractions import Fraction
from statistics import NormalDist, stdev

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastrain.evaluation import scores
from fastrain.evaluation.scores import Evidence, Measure, l_tp_score, mcnemar, mean_spread, nearest_labels, topology_score, wilson
from fastrain.pieces import relations

KS = (5, 10, 20, 30, 40, 50)

# --- intervals

@pytest.mark.parametrize('confidence', [.95, .8])
@pytest.mark.parametrize('hits, n', [(0, 1), (1, 1), (0, 50), (50, 50), (1, 50), (31, 50), (4711, 10_000)])
def test_wilson_is_the_closed_formula(hits, n, confidence):
    z,p = NormalDist().inv_cdf(.5 + confidence/2),hits/n
    mid,half = (p + z*z/(2*n))/(1 + z*z/n),z/(1 + z*z/n)*math.sqrt(p*(1-p)/n + z*z/(4*n*n))
    low,high = wilson(hits, n, confidence)
    assert (low, high) == pytest.approx((mid - half, mid + half), abs=1e-12)
    assert 0 <= low <= p <= high <= 1 and low < high and type(low) is type(high) is float

@pytest.mark.parametrize('hits, n', [(-1, 5), (6, 5), (0, 0)])
def test_wilson_of_impossible_counts(hits, n):
    with pytest.raises(ValueError, match=f'{hits} hits among {n} images'): wilson(hits, n)

# --- paired comparison

def enumerated(first, second):
    "Two-sided, exact: the probability of all counts that are no more likely than the one seen, if each image tosses a coin"
    n = first + second
    ways = [math.comb(n, k) for k in range(n + 1)]
    return float(Fraction(sum(w for w in ways if w <= ways[first]), 2**n))

@pytest.mark.parametrize('first, second', [(0, 0), (1, 0), (0, 1), (1, 1), (5, 0), (2, 9), (9, 2), (7, 8), (3, 40)])
def test_mcnemar_is_the_enumeration(first, second):
    a = [True]*first + [False]*second + [True]*4 + [False]*3
    b = [False]*first + [True]*second + [True]*4 + [False]*3
    for wrap in (list, torch.tensor, np.array):
        res = mcnemar(wrap(a), wrap(b))
        assert (res['only_first'], res['only_second']) == (first, second)
        assert res['p_value'] == pytest.approx(enumerated(first, second), abs=1e-12)

def test_mcnemar_without_discordant_pairs():
    assert mcnemar([True, False], [True, False]) == dict(only_first=0, only_second=0, p_value=1.)

@pytest.mark.parametrize('a, b', [([True], [True, False]), ([[True]], [[True]])])
def test_mcnemar_needs_the_same_images(a, b):
    with pytest.raises(ValueError, match='the same images'): mcnemar(a, b)

# --- spread over seeds

def test_mean_spread():
    df = pd.DataFrame(dict(method=['train', 'at', 'train', 'at', 'train', 'trades'], data='digits',
                           accuracy=[50, 40.123, 52, 40.129, 57, 44.], loss=[1, 2, 3, 4, 8, 5.], note=list('abcdef')))
    res = mean_spread(df, 'method')
    assert list(res.index) == ['train', 'at', 'trades'] # in their order of appearance
    assert list(res.columns) == ['accuracy', 'loss', 'seeds'] # words have no mean
    assert res.loc['train', 'accuracy'] == f'53.00 ± {stdev([50, 52, 57]):.2f}'
    assert res.loc['at', 'accuracy'] == f'40.13 ± {stdev([40.123, 40.129]):.2f}'
    assert res.loc['trades', 'loss'] == '5.00' # one seed has no spread
    assert res.seeds.tolist() == [3, 2, 1]
    assert list(mean_spread(df, ['method', 'data']).index) == [('train', 'digits'), ('at', 'digits'), ('trades', 'digits')]

# --- neighbours

def sample(n_support=300, n_queries=80, dim=12, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    y,y2 = rng.integers(0, classes, n_support),rng.integers(0, classes, n_queries)
    centres = rng.normal(size=(classes, dim))
    def around(c): # of all lengths: the cosine ignores them
        return centres[c] + rng.normal(size=(len(c), dim))*rng.uniform(.5, 20, (len(c), 1))
    f,f2 = around(y),around(y2)
    return [torch.tensor(o) for o in (f, y, f2, y2)]

def sklearn_predictions(f, y, f2, k):
    knn = KNeighborsClassifier(k, metric='cosine', algorithm='brute').fit(f.numpy(), y.numpy())
    return knn.predict(f2.numpy())

@pytest.mark.parametrize('seed', range(3))
def test_topology_score_is_that_of_scikit_learn(seed):
    f,y,f2,y2 = sample(seed=seed)
    got = topology_score(f, y, f2, y2, KS)
    assert list(got) == list(KS)
    for k in KS: assert got[k] == pytest.approx((sklearn_predictions(f, y, f2, k) == y2.numpy()).mean(), abs=1e-6)
    assert len(set(got.values())) > 1

def test_each_prediction_is_that_of_scikit_learn():
    "Not only the share of right ones: each query is scored by itself, for each class that it could have"
    f,y,f2,_ = sample()
    for k in (1, 2, 4, 5, 30):
        want = sklearn_predictions(f, y, f2, k)
        for i in range(0, 80, 4):
            got = [topology_score(f, y, f2[i:i+1], torch.tensor([c]), (k,))[k] for c in range(7)]
            assert got == [float(c == want[i]) for c in range(7)]

def test_neighbours_come_nearest_first():
    f,y,f2,_ = sample(n_support=40)
    near = nearest_labels(f, y, f2, 40)
    sims = (f2/f2.norm(dim=1, keepdim=True))@(f/f.norm(dim=1, keepdim=True)).T
    assert torch.equal(near, y[sims.argsort(1, descending=True)])

def test_chunks_change_nothing():
    f,y,f2,_ = sample()
    want = nearest_labels(f, y, f2, 50)
    for chunk in (1, 7, 80, 1000): assert torch.equal(nearest_labels(f, y, f2, 50, chunk), want)

def test_one_search_serves_all_ks(monkeypatch):
    f,y,f2,y2 = sample()
    alone = {k: topology_score(f, y, f2, y2, (k,))[k] for k in KS}
    calls,search = [],scores.nearest_labels
    monkeypatch.setattr(scores, 'nearest_labels', lambda *args: calls.append(args[3]) or search(*args))
    assert topology_score(f, y, f2, y2, KS[::-1]) == alone and calls == [50]

def test_vote_ties_go_to_the_lower_class():
    angles = torch.tensor([.1, .2, .3, .4], dtype=torch.float64)
    f,y = torch.stack([angles.cos(), angles.sin()], 1),torch.tensor([5, 2, 2, 5])
    query = torch.tensor([[1., 0.]], dtype=torch.float64)
    wins = {k: next(c for c in range(6) if topology_score(f, y, query, torch.tensor([c]), (k,))[k] == 1) for k in (1, 2, 3, 4)}
    assert wins == {1: 5, 2: 2, 3: 2, 4: 2} # the nearest is of class 5, yet with as many votes 2 is first
    assert wins == {k: sklearn_predictions(f, y, query, k)[0] for k in wins}

def test_zero_features():
    "A feature of zeros is at a right angle to all: behind those that point the same way, before those that point away"
    f = torch.tensor([[1., 0], [0, 0], [-1, .1], [0, 0]])
    assert nearest_labels(f, torch.tensor([0, 1, 2, 1]), torch.tensor([[2., .1]]), 4).tolist() == [[0, 1, 1, 2]]
    got = nearest_labels(f, torch.tensor([0, 1, 2, 1]), torch.zeros(1, 2), 4)
    assert sorted(got[0].tolist()) == [0, 1, 1, 2] # in no order
    assert topology_score(f, torch.tensor([0, 1, 2, 1]), torch.zeros(1, 2), torch.tensor([1]), (4,)) == {4: 1.}
    f,y,f2,y2 = sample()
    f[::10],y[::10] = 0,3
    got = topology_score(f, y, f2, y2, (5, 50))
    for k in got: assert got[k] == pytest.approx((sklearn_predictions(f, y, f2, k) == y2.numpy()).mean(), abs=1e-6)

def test_classes_that_have_no_support_are_never_right():
    f,y,f2,_ = sample()
    assert topology_score(f, y, f2, torch.full((80,), 99), (5,)) == {5: 0.}

def _case(**changes):
    f,y,f2,y2 = sample(60, 10)
    return {**dict(support=f, support_labels=y, queries=f2, k=5), **{k: v(dict(f=f, y=y, f2=f2)) for k,v in changes.items()}}

@pytest.mark.parametrize('changes, error, match', [
    (dict(k=lambda d: 61), ValueError, 'k=61: expected 1 to 60'), (dict(k=lambda d: 0), ValueError, 'k=0'),
    (dict(queries=lambda d: d['f2'][:,:5]), ValueError, r'\(60, 12\) and \(10, 5\)'),
    (dict(support=lambda d: d['f'][0], queries=lambda d: d['f2'][0]), ValueError, r'\(S,D\)'),
    (dict(support_labels=lambda d: d['y'][:5]), ValueError, '5 labels for 60 supports'),
    (dict(queries=lambda d: d['f2'][:0]), ValueError, '60 supports and 0 queries'),
    (dict(support=lambda d: d['f'][:0], support_labels=lambda d: d['y'][:0]), ValueError, '0 supports'),
    (dict(queries=lambda d: d['f2'].index_fill(0, torch.tensor([3]), float('nan'))), FloatingPointError, 'query features'),
    (dict(support=lambda d: d['f'].index_fill(0, torch.tensor([3]), float('inf'))), FloatingPointError, 'support features')])
def test_bad_searches(changes, error, match):
    with pytest.raises(error, match=match): nearest_labels(**_case(**changes))
    c = _case(**changes)
    labels = torch.zeros(len(c['queries']), dtype=torch.long)
    with pytest.raises(error, match=match): topology_score(c['support'], c['support_labels'], c['queries'], labels, (c['k'],))

# --- L_TP

def numpy_l_tp(f, g):
    "The five lines of spec.md, pair by pair, in float64"
    def p(f):
        n,d = len(f),np.zeros((len(f),)*2)
        for i in range(n):
            for j in range(n): d[i,j] = 1 - f[i]@f[j]/np.sqrt((f[i]@f[i])*(f[j]@f[j]))
        k = np.zeros((n, n))
        for j in range(n):
            rho = min(d[i,j] for i in range(n) if i != j)
            for i in range(n): k[i,j] = 2 - (d[i,j] - rho) if i != j else 0
        return k/k.sum(0)
    p,q = p(f),p(g)
    pairs = [(p[i,j], q[i,j]) for i in range(len(f)) for j in range(len(f)) if i != j]
    return sum(a*np.log(a/b) + (1-a)*np.log((1-a)/(1-b)) for a,b in pairs)

def features(n, dims=(6, 9), seed=0):
    rng = np.random.default_rng(seed)
    return [np.maximum(rng.normal(size=(n, d)), 0) + .01 for d in dims]

@pytest.mark.parametrize('n, bs, seed', [(30, 10, 0), (30, 10, 5), (33, 10, 0), (29, 30, 0), (12, 3, 1)])
def test_l_tp_is_that_of_numpy(n, bs, seed):
    f,g = features(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    full = [order[i:i+bs] for i in range(0, n, bs) if i + bs <= n] or [order] # fewer images than a batch are one of their own
    want = np.mean([numpy_l_tp(f[b], g[b]) for b in full])
    assert l_tp_score(torch.tensor(f), torch.tensor(g), bs, seed) == pytest.approx(want, rel=1e-9) and want > .01
    assert l_tp_score(torch.tensor(f).float(), torch.tensor(g).float(), bs, seed) == pytest.approx(want, rel=1e-3)

def test_incomplete_batch_counts_for_nothing():
    f,g = map(torch.tensor, features(33))
    last = torch.randperm(33, generator=torch.Generator().manual_seed(0))[30:]
    other = g.clone()
    other[last] = torch.rand(3, 9, dtype=g.dtype)*100
    assert l_tp_score(f, other, 10) == l_tp_score(f, g, 10)
    other[torch.randperm(33, generator=torch.Generator().manual_seed(0))[0]] = torch.rand(9, dtype=g.dtype)
    assert l_tp_score(f, other, 10) != l_tp_score(f, g, 10)

def test_two_models_are_measured_on_the_same_batches(monkeypatch):
    seen = []
    monkeypatch.setattr(relations, 'topology_loss', lambda f, g: seen.append((f[:,0].tolist(), g[:,0].tolist())) or torch.tensor(1.))
    number = torch.arange(40.)[:,None]
    def batches(width, **kwargs):
        seen.clear(); torch.rand(1) # the global generator has no say
        l_tp_score(number.expand(-1, width), number, 8, **kwargs)
        return list(seen)
    first = batches(3)
    assert batches(5) == first and all(f == g for f,g in first) and sorted(sum((f for f,_ in first), [])) == number[:,0].tolist()
    assert first[0][0] != sorted(first[0][0]) and batches(3, seed=1) != first

def test_same_features_have_no_l_tp():
    f,_ = map(torch.tensor, features(40))
    assert l_tp_score(f, f, 10) == pytest.approx(0, abs=1e-12)
    assert l_tp_score(f, 3*f, 10) == pytest.approx(0, abs=1e-10)

def test_l_tp_needs_three_images_in_a_batch():
    f,g = map(torch.tensor, features(10))
    for n,bs in ((2, 128), (10, 2), (0, 128)):
        with pytest.raises(ValueError, match='at least 3 images'): l_tp_score(f[:n], g[:n], bs)

def test_l_tp_needs_the_same_images():
    f,g = map(torch.tensor, features(20))
    with pytest.raises(ValueError): l_tp_score(f[:12], g, 4)

# --- measures

def test_measures():
    assert list(Measure.registry) == ['topology_natural', 'topology_robust', 'l_tp'] # their order in tables
    assert [Measure.of(k).title for k in Measure.registry] == ['natural topology', 'robust topology', 'L_TP']
    assert Measure.of('topology_robust').text(.58333) == '58.33' and Measure.of('l_tp').text(.02468) == '0.025'
    unknown = Measure.of('of_another_file')
    assert (unknown.title, unknown.text(1/3), unknown.unit) == ('of_another_file', '0.3333', '') and Measure.title is None

def test_measures_are_the_scores():
    f,y,f2,y2 = sample()
    g2 = f2 + .1*torch.randn_like(f2)
    columns = dict(natural=dict(features=f2, y=y2), pgd20=dict(features=g2, y=y2))
    evidence = Evidence(columns, 'pgd20', standard=dict(features=f2), support=dict(features=f, y=y), bs=16, ks=(5, 30, 50, 400))
    want = dict(natural=topology_score(f, y, f2, y2, (5, 30, 50)), robust=topology_score(f, y, g2, y2, (5, 30, 50)))
    assert evidence.topology == want # there are no 400 neighbours
    assert Measure.of('topology_natural').measure(evidence) == want['natural'][30]
    assert Measure.of('topology_robust').measure(evidence) == want['robust'][30]
    assert Measure.of('l_tp').measure(evidence) == l_tp_score(f2, g2, 16)
    few = Evidence(columns, 'pgd20', support=dict(features=f, y=y), ks=(5, 20))
    assert Measure.of('topology_natural').measure(few) == few.topology['natural'][20] # the largest
    assert Evidence(columns, 'pgd20').topology == {}
