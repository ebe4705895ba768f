"What is drawn: lines, marks, panels, legends and images, and what is refused"
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.text import Text
from sklearn.manifold import TSNE

from conftest import digits, net, quick, same, snapshot
from fastrain.evaluation.scores import wilson
from fastrain.runs.curves import plot_curves, plot_relation
from fastrain.runs.features import plot_strength, plot_topology, plot_tsne
from fastrain.runs.figures import save_figure, styles_of, wrapped
from fastrain.runs.images import plot_images
from fastrain.runs.mistakes import class_accuracies, confusion, plot_classes, plot_confusion, plot_margins, plot_worst_images, worst_images
from fastrain.runs.plots import plot_eps, plot_stages, plot_steps, plot_tradeoff

def run(method, natural, robust, **columns):
    return pd.DataFrame(dict(method=method, epoch=range(len(natural)), accuracy=natural, pgd10_accuracy=robust, robust_loss=2., **columns))

def history():
    lam = {'lambda': [0., 2., 5.]}
    return pd.concat([
        run('standard', [.5, .9, .8], [.1, .0, .0]), run('at', [.4, .5, .6], [.2, .4, .3]),
        run('at+train', [.4, .6, .7], [.3, .4, .45], l_tp=[.5, .4, .3], **lam),
        run('trades+lbgat+train', [.4, .5, .6], [.3, .4, .5], l_tp=[.6, .5, .4], lbgat=[.3, .2, .1], **lam)])

def legend(fig): return [t.get_text() for t in fig.legends[0].get_texts()]
def line(ax, **props): return [o for o in ax.lines if all(getattr(o, f'get_{k}')() == v for k,v in props.items())]
def xy(o): return [tuple(map(float, p)) for p in np.round(o.get_xydata().astype(float), 6)]

def texts(fig):
    "All texts that are seen"
    return [t for t in fig.findobj(Text) if t.get_visible() and t.get_text()]

def inside(fig):
    "Nothing is cut off: every text lies in the figure, is large enough to read, and the legend is below the panels"
    fig.draw_without_rendering()
    below = fig.legends[0].get_window_extent() if fig.legends else None
    if below: assert below.x0 >= 0 and below.x1 <= fig.bbox.x1 and below.y0 >= 0
    for ax in fig.axes:
        box = ax.get_tightbbox()
        assert box.x0 >= 0 and box.x1 <= fig.bbox.x1 + 1 and box.y0 >= (below.y1 if below else 0) and box.y1 <= fig.bbox.y1 + 1
    assert all(t.get_fontsize() >= 9 for t in texts(fig))

LONG = 'trades:beta=6+lbgat+train:weight=20,detach=False+awp:gamma=.005+ema:decay=.999'

# -- training ----------------------------------------------------------------------------------------------------------------

def test_curves():
    fig = plot_curves(history())
    left,right = fig.axes
    solid = [o for o in line(left, linestyle='-')]
    assert [xy(o) for o in solid] == [
        [(1, 50), (2, 90), (3, 80)], [(1, 40), (2, 50), (3, 60)], [(1, 40), (2, 60), (3, 70)], [(1, 40), (2, 50), (3, 60)]]
    assert xy(line(left, linestyle='--')[1]) == [(1, 20), (2, 40), (3, 30)] and len(right.lines) == 4
    assert len({(o.get_color(), o.get_marker()) for o in solid}) == len({o.get_marker() for o in solid}) == 4
    stars,dots = line(left, marker='*'),line(left, marker='o')
    # standard: natural; at: robust
    assert [xy(o)[0] for o in stars] == [(2, 90), (2, 0), (2, 50), (2, 40), (3, 70), (3, 45), (3, 60), (3, 50)]
    assert [xy(o)[0] for o in dots] == [(3, 80), (3, 0), (3, 60), (3, 30), (3, 70), (3, 45), (3, 60), (3, 50)]
    assert legend(fig) == ['standard', 'at', 'at+train', 'trades+lbgat+train', 'natural', 'pgd10', 'best epoch', 'last epoch']
    inside(fig)

def test_best_epochs_given():
    stars = line(plot_curves(history(), best=dict(at=1)).axes[0], marker='*')
    assert [xy(o)[0] for o in stars[2:6]] == [(1, 40), (1, 20), (3, 70), (3, 45)]
    for best,match in ((dict(at=4), 'at has no epoch 4, only 1 to 3'), (dict(att=1), "'at'")):
        with pytest.raises(ValueError, match=match): plot_curves(history(), best=best)

def test_curves_without_robust_accuracy():
    fig = plot_curves(run('mine', [.5, .9, .8], None).drop(columns='pgd10_accuracy').assign(std_accuracy=.9, ema_accuracy=.8))
    assert not line(fig.axes[0], linestyle='--') and legend(fig) == ['mine', 'natural', 'best epoch', 'last epoch']
    mixed = plot_curves(pd.concat([run('mine', [.5, .9, .8], None), run('at', [.4, .5, .6], [.2, .4, .3])])).axes[0]
    assert [xy(o)[0] for o in line(mixed, marker='*')][::2] == [(2, 90), (2, 50)]

@pytest.mark.parametrize('plot', [plot_curves, plot_relation])
def test_one_epoch_of_many_methods(plot):
    names = [f'trades+lbgat+train:{i}' for i in range(9)]
    fig = plot(pd.concat([run(n, [.5], [.3], l_tp=[.2], **{'lambda': [5.]}) for n in names]))
    assert legend(fig)[:9] == names and len({(o.get_color(), o.get_marker()) for o in fig.axes[0].lines if o.get_marker() not in '*o'}) == 9
    low,high = fig.axes[0].get_xlim()
    assert [t for t in fig.axes[0].get_xticks() if low <= t <= high] == [1]
    inside(fig)

def test_relation():
    fig = plot_relation(history())
    ax,lbgat,lam = fig.axes
    assert [xy(o) for o in ax.lines] == [[(1, .5), (2, .4), (3, .3)], [(1, .6), (2, .5), (3, .4)]]
    assert [xy(o) for o in lbgat.lines] == [[(1, .3), (2, .2), (3, .1)]] and lbgat.get_ylabel().startswith('lbgat')
    assert lbgat.lines[0].get_color() == ax.lines[1].get_color()
    assert [xy(o) for o in lam.lines] == [[(1, 0), (2, 2), (3, 5)]] # a course that both share
    assert legend(fig) == ['at+train', 'trades+lbgat+train', 'λ']
    inside(fig)

def test_relation_with_two_courses():
    h = history()
    h.loc[h.method == 'at+train', 'lambda'] = 5.
    fig = plot_relation(h)
    assert len(fig.axes[2].lines) == 2 and len({o.get_linestyle() for o in fig.axes[2].lines}) == 2
    assert legend(fig)[2:] == ['λ of at+train', 'λ of trades+lbgat+train']

@pytest.mark.parametrize('methods, match', [(['standard', 'at'], 'None of the methods standard, at has an L_TP'), ([], 'nothing to draw')])
def test_no_relation(methods, match):
    h = history()
    for rows in (h[h.method.isin(methods)], h[h.method.isin(methods)].drop(columns=['l_tp', 'lambda'])):
        with pytest.raises(ValueError, match=match): plot_relation(rows)

def test_history_without_methods():
    with pytest.raises(ValueError, match="history: there is no 'method' and no 'robust_loss' among epoch, accuracy"):
        plot_curves(history().drop(columns=['method', 'robust_loss']))

# -- accuracies --------------------------------------------------------------------------------------------------------------

def points(eps): return [dict(eps=e, accuracy=.8 - 5*e, low=.78 - 5*e, high=.82 - 5*e) for e in eps]

def test_eps():
    rows = points([8/255, 0, 4/255])
    fig = plot_eps(dict(at=rows, mine=pd.DataFrame(rows)))
    ax, = fig.axes
    curve = [(0, 80), (round(4/255, 6), round(80 - 2000/255, 6)), (round(8/255, 6), round(80 - 4000/255, 6))]
    assert [xy(o) for o in ax.lines] == [curve]*2
    bars = ax.collections[0].get_segments()
    assert [(b[0,0], b[0,1], b[1,1]) for b in bars][0] == pytest.approx((0, 78, 82)) and len(bars) == 3
    assert [t.get_text() for t in ax.get_xticklabels()] == ['0', '2/255', '4/255', '6/255', '8/255']
    assert list(ax.get_xticks()) == pytest.approx([k/255 for k in (0, 2, 4, 6, 8)])
    inside(fig)

def test_colour_is_the_model_and_line_style_the_attack():
    rows = [dict(r, attack=a) for a in ('PGD-20', 'AutoAttack') for r in points([0, 4/255, 8/255])]
    fig = plot_eps({'at': rows, LONG: rows}, trained=8/255, among=['standard', 'at', LONG])
    ax, = fig.axes
    curves = [o for o in ax.lines if len(o.get_xdata()) == 3]
    assert [o.get_color() for o in curves] == [styles_of(['standard', 'at', LONG])[m]['color'] for m in ('at', 'at', LONG, LONG)]
    assert [o.get_linestyle() for o in curves] == ['-', '--']*2
    assert legend(fig)[0] == 'at' and legend(fig)[2:] == ['PGD-20', 'AutoAttack']
    assert [o.get_xdata()[0] for o in ax.lines if len(o.get_xdata()) == 2] == [8/255] and ax.texts[0].get_text() == 'ε of training'
    inside(fig)

def test_steps():
    rows = [dict(steps=s, accuracy=a, low=a - .02, high=a + .02, attack='PGD') for s,a in ((20, .5), (0, .8), (5, .6))]
    fig = plot_steps(dict(at=rows))
    ax, = fig.axes
    assert xy(ax.lines[0]) == [(0, 80), (5, 60), (20, 50)] and [t.get_text() for t in ax.get_xticklabels()] == ['0', '5', '20']
    assert ax.get_ylabel() == 'accuracy under PGD, %'
    inside(fig)

def test_stages():
    stages = [dict(stage=s, accuracy=a) for s,a in (('natural', .9), ('APGD-CE', .5), ('APGD-T', .45), ('Square', .45))]
    stages[-1] |= dict(low=.4, high=.5)
    fig = plot_stages({'at': stages, LONG: stages})
    bars = [(b.get_x(), b.get_width()) for b in fig.axes[0].patches]
    assert bars == [pytest.approx(b) for b in ((0, 90), (50, 40), (45, 5), (45, 0), (0, 45))] # what is left, what each one broke
    assert [t.get_text() for t in fig.axes[0].texts] == ['90.0', '−40.0', '−5.0', '0.0', '45.0']
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['natural', 'APGD-CE', 'APGD-T', 'Square', 'left']
    inside(fig)
    for bad,match in (({}, 'nothing to draw'), (dict(at=[]), 'nothing to draw'), (dict(at=[dict(stage='x')]), "no 'accuracy'")):
        with pytest.raises(ValueError, match=f'stages.*{match}'): plot_stages(bad)

@pytest.mark.parametrize('levels, ticks', [
    ((0, 7), ['0', '2/255', '4/255', '6/255']), ((0, 1, 2, 32), ['0', '8/255', '16/255', '24/255', '32/255']), ((0,), ['0'])])
def test_eps_ticks(levels, ticks):
    assert [t.get_text() for t in plot_eps(dict(at=points([k/255 for k in levels]))).axes[0].get_xticklabels()] == ticks

def test_eps_of_other_units():
    ax, = plot_eps(dict(at=[dict(eps=e, accuracy=a) for e,a in ((0, .8), (.031, .5))])).axes
    assert not any('255' in t.get_text() for t in ax.get_xticklabels()) and not ax.collections

def test_tradeoff_over_seeds():
    rows = [('at', .7, .4), ('at', .8, .5), ('at+train', .8, .5), ('at+train', .9, .5), ('mart', .6, .4)]
    df = pd.DataFrame(rows, columns=['method', 'natural', 'robust'])
    fig = plot_tradeoff(df)
    ax, = fig.axes
    marks = {c.lines[0].get_marker(): xy(c.lines[0])[0] for c in ax.containers}
    assert list(marks.values()) == [(75, 45), (85, 50), (60, 40)]
    bar = ax.containers[0].lines[2][0].get_segments()[0][:,0]
    assert bar[1] - bar[0] == pytest.approx(2*100*df.natural[:2].std()) and 'seeds' in ax.get_title()
    arrow, = [t for t in ax.texts if not t.get_text()]
    assert arrow.xyann == pytest.approx((75, 45)) and arrow.xy == pytest.approx((85, 50)) # from at to at+train, and no other
    assert labels(ax) == ['at', 'at+train', 'mart'] and not fig.legends
    inside(fig)

def labels(ax): return [t.get_text() for t in ax.texts if t.get_text()]

def test_points_do_not_hide_each_other():
    names = ['standard', LONG, *(f'at+train+method{i}' for i in range(7))]
    df = pd.DataFrame([dict(method=m, natural=.8 + .01*(i % 2), robust=.4 + .01*(i % 3)) for i,m in enumerate(names)])
    fig = plot_tradeoff(df)
    ax, = fig.axes
    assert labels(ax) == [wrapped(n, 26) for n in names]
    fig.draw_without_rendering()
    boxes = [t.get_window_extent() for t in ax.texts]
    assert not any(a.overlaps(b) for i,a in enumerate(boxes) for b in boxes[:i])
    sizes = {}
    for c in ax.containers: sizes.setdefault(xy(c.lines[0])[0], []).append(c.lines[0].get_markersize())
    assert all(of == sorted(set(of)) for of in sizes.values()) and max(map(len, sizes.values())) > 1 # one around the other
    assert all(c.lines[0].get_markerfacecolor() == 'none' for c in ax.containers)
    inside(fig)

def test_no_label_stands_on_an_arrow():
    rows = [('at', .91, .21), ('at+train', .88, .27), ('trades', .83, .15), ('standard', .87, .04)]
    df = pd.DataFrame(rows, columns=['method', 'natural', 'robust'])
    ax, = plot_tradeoff(df).axes
    ax.figure.draw_without_rendering()
    line = ax.transData.transform(np.linspace((91, 21), (88, 27), 50)[3:-3])
    assert not any(t.get_window_extent().contains(*place) for t in ax.texts if t.get_text() for place in line)

def test_tradeoff_with_intervals():
    df = pd.DataFrame([dict(method='at', natural=.7, robust=.4, natural_low=.68, natural_high=.71)])
    ax, = plot_tradeoff(df).axes
    bars = ax.containers[0].lines[2]
    assert bars[0].get_segments()[0][:,0] == pytest.approx([68, 71]) and len(bars) == 1 and 'intervals' in ax.get_title()
    assert plot_tradeoff(df[['method', 'natural', 'robust']]).axes[0].get_title() == ''

# -- topology ----------------------------------------------------------------------------------------------------------------

scores = {b: dict(natural={5: .6 - b/100, 30: .5}, robust={5: .3, 30: .2 - b/100}) for b in (6, 1)}

as_json = {str(b): {kind: {str(k): v for k,v in by.items()} for kind,by in s.items()} for b,s in scores.items()}

@pytest.mark.parametrize('scores', [scores, as_json])
def test_topology(scores):
    fig = plot_topology({f'β = {b}': s for b,s in scores.items()})
    nat,adv = fig.axes
    assert [xy(o) for o in nat.lines] == [[(5, 54), (30, 50)], [(5, 59), (30, 50)]] and xy(adv.lines[0]) == [(5, 30), (30, 14)]
    assert legend(fig) == ['β = 6', 'β = 1'] and list(nat.get_xticks()) == [5, 30] and not nat.collections
    inside(fig)

def test_intervals_of_topology_scores():
    fig = plot_topology({'at': dict(scores[6], n=100), LONG: dict(scores[1], n=50)}, ['standard', 'at', LONG])
    nat,adv = fig.axes
    assert nat.get_ylim() == adv.get_ylim()
    first = nat.collections[0].get_segments()[0]
    assert tuple(first[:,1]) == pytest.approx([100*v for v in wilson(54, 100)]) and len(nat.collections) == 2
    assert nat.lines[0].get_color() == styles_of(['standard', 'at'])['at']['color']
    assert len(plot_strength({b: dict(s, n=50) for b,s in scores.items()}).axes[0].collections) == 2
    inside(fig)

@pytest.mark.parametrize('scores', [scores, as_json])
def test_strength(scores):
    fig = plot_strength(scores)
    nat,adv = fig.axes
    assert [xy(o) for o in nat.lines] == [[(1, 59), (6, 54)], [(1, 50), (6, 50)]] and xy(adv.lines[1]) == [(1, 19), (6, 14)]
    assert legend(fig) == ['k = 5', 'k = 30'] and nat.get_xlabel() == 'β'

def features(n=60, n_classes=4, d=8, shift=.1, **kwargs):
    y = torch.arange(n) % n_classes
    natural = 5*torch.randn(n_classes, d)[y] + torch.randn(n, d)
    return dict(natural=natural, adversarial=natural + shift, y=y, **kwargs)

def test_tsne(monkeypatch):
    fitted = []
    class Spy(TSNE):
        def fit_transform(self, x):
            fitted.append(x)
            return super().fit_transform(x)
    monkeypatch.setattr('sklearn.manifold.TSNE', Spy)
    first = features(n_classes=12, natural_accuracy=.604, robust_accuracy=.281)
    second = dict(first, natural=first['natural'] + 100, adversarial=first['adversarial'] + 100)
    state = torch.get_rng_state()
    fig = plot_tsne({'trades+lbgat+train': first, 'b': second}, [f'class {i}' for i in range(12)], n=12, n_classes=3)
    assert torch.equal(torch.get_rng_state(), state)
    a,b = fitted
    assert len(a) == 24 and np.allclose(a + 100, b, atol=1e-4) # one fit to both kinds, of the same images in each panel
    rows = [int((first['natural'] == torch.tensor(f)).all(1).nonzero()) for f in a[:12]]
    assert np.allclose(first['adversarial'][rows].numpy(), a[12:])
    shown = sorted({int(first['y'][i]) for i in rows})
    assert len(shown) == 3 and legend(fig) == [*(f'class {c}' for c in shown), 'natural', 'adversarial']
    for ax in fig.axes:
        nat,adv = ax.collections
        assert len(nat.get_offsets()) == len(adv.get_offsets()) == 12
        assert nat.get_paths()[0].vertices.shape != adv.get_paths()[0].vertices.shape
        color = {c: tuple(nat.get_facecolors()[i][:3]) for i,c in enumerate(first['y'][rows].tolist())}
        assert [tuple(f[:3]) for f in nat.get_facecolors()] == [color[c] for c in first['y'][rows].tolist()]
        assert len(set(color.values())) == 3
    assert fig.axes[0].get_title() == 'trades+lbgat+train\nnatural 60.4 %, PGD-20 28.1 %'
    assert {t.get_color() for t in texts(fig)} == {'black'}
    inside(fig)

def test_tsne_of_few_images_and_many_models():
    fig = plot_tsne({str(i): features(n=2, n_classes=2) for i in range(5)})
    assert sum(ax.axison for ax in fig.axes) == 5 and all(len(c.get_offsets()) == 2 for ax in fig.axes[:5] for c in ax.collections)

def test_refused_features():
    good = features(8)
    broken = dict(good, adversarial=good['adversarial'].clone().index_fill_(0, torch.tensor([3]), float('inf')))
    for f,error,match in (
        (broken, FloatingPointError, 'features of at: there are adversarial ones that are not finite'),
        (dict(good, y=good['y'][1:]), ValueError, '7 labels'),
        (dict(natural=good['natural'], y=good['y']), ValueError, "no 'adversarial'"), (features(1), ValueError, 'at least 2 images')):
        with pytest.raises(error, match=match): plot_tsne(dict(at=f))
    with pytest.raises(ValueError, match='n_classes=11'): plot_tsne(dict(at=good), n_classes=11)

@pytest.mark.parametrize('plot, what', [
    (plot_eps, 'points'), (plot_topology, 'scores'), (plot_strength, 'scores'), (plot_tsne, 'features')])
def test_nothing(plot, what):
    with pytest.raises(ValueError, match=f'{what}: there is nothing to draw'): plot({})

def test_missing_entries():
    with pytest.raises(ValueError, match="points of at: there is no 'accuracy' among eps"): plot_eps(dict(at=[dict(eps=0)]))
    with pytest.raises(ValueError, match="points: there is no 'robust' among method, natural"):
        plot_tradeoff(pd.DataFrame([dict(method='at', natural=.5)]))
    with pytest.raises(ValueError, match="scores of at: there is no 'robust' among natural"): plot_topology(dict(at=dict(natural={5: .5})))

# -- images ------------------------------------------------------------------------------------------------------------------

def test_images():
    x,y = digits('test', 3)
    models = {'at': net(0, drop=.5).train(), 'trades+lbgat+train': net(1).eval()}
    models['at'].bn1.eval() # a mixed state
    modes = {m: [o.training for o in model.modules()] for m,model in models.items()}
    before,state = {m: snapshot(model) for m,model in models.items()},torch.get_rng_state()
    noise = dict(at=8/255, other=2/255)
    def attack(model, x, y): return (x + (noise['at'] if model is models['at'] else noise['other'])*torch.randn_like(x).sign()).clamp(0, 1)
    fig = plot_images(models, x, y, attack, vocab=[f'class {i}' for i in range(10)])
    assert {m: [o.training for o in model.modules()] for m,model in models.items()} == modes
    assert same({m: snapshot(model) for m,model in models.items()}, before) and torch.equal(torch.get_rng_state(), state)
    rows = np.array(fig.axes).reshape(5, 3)
    label = 'trades+lbgat\n+train' # long names go on in another line
    assert [r[0].get_ylabel() for r in rows] == [
        'natural', 'at\nadversarial', 'at\nadded, ×15.9', f'{label}\nadversarial', f'{label}\nadded, ×15.9']
    assert [ax.get_title() for ax in rows[0]] == [f'class {int(i)}' for i in y]
    nat,adv,delta,adv2,delta2 = (np.stack([ax.images[0].get_array() for ax in r]) for r in rows)
    assert np.allclose(nat, x.permute(0, 2, 3, 1))
    for d,a in ((delta, adv), (delta2, adv2)): assert np.allclose(d, .5 + (a - nat)*255/16, atol=1e-5)
    assert delta.max() == pytest.approx(1, abs=1e-4) and delta2.max() == pytest.approx(.625, abs=1e-3) # the same scale for both
    for r,model in ((rows[1], models['at']), (rows[3], models['trades+lbgat+train'])):
        x_adv = torch.stack([torch.as_tensor(ax.images[0].get_array()).permute(2, 0, 1) for ax in r])
        for place,kind,images in ((0, 'nat', x), (1, 'adv', x_adv)):
            with torch.no_grad(): p,pred = model.eval()(images).softmax(1).max(1)
            told = [f'{"✓" if i == t else "✗"} {kind} class {int(i)}, {100*q:.0f} %' for i,q,t in zip(pred, p, y)]
            assert [ax.texts[place].get_text() for ax in r] == told
            assert [ax.texts[place].get_color() for ax in r] == ['#009E73' if i == t else '#D55E00' for i,t in zip(pred, y)]
    heading = fig.get_suptitle()
    assert heading.startswith('attack. ') and 'green ✓ right' in heading
    inside(fig)

def test_colours_of_predictions():
    x,y = digits('test', 2)
    with torch.no_grad(): pred = net().eval()(x).argmax(1)
    y = torch.stack([pred[0], (pred[1] + 1) % 10])
    fig = plot_images({LONG: net()}, x, y, lambda m, x, y: x) # an attack that does nothing: mid-grey
    assert [ax.texts[1].get_color() for ax in fig.axes[2:4]] == ['#009E73', '#D55E00'] and (fig.axes[4].images[0].get_array() == .5).all()
    inside(fig)

def test_attack_is_written():
    x,y = digits('test', 2)
    said = plot_images(dict(at=net()), x, y, quick(1, 8/255, .01)).get_suptitle()
    assert said.startswith('PGD, 1 steps of 0.01, ε = 8/255 (L∞). ')
    assert plot_images(dict(at=net()), x, y, quick(1), title='PGD-1').get_suptitle().startswith('PGD-1. ')

# -- mistakes ----------------------------------------------------------------------------------------------------------------

def table(n=40, n_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(dict(image=range(n), label=np.arange(n) % n_classes))
    for attack,mean in (('natural', -2), ('pgd20', 0)):
        margin = mean + rng.standard_normal(n)
        rows[attack] = np.where(margin > 0, (rows.label + 1) % n_classes, rows.label)
        rows[f'{attack} margin'] = margin
    return rows

TABLES = {'at': table(), LONG: table(seed=1)}

def test_confusion_matrix():
    from sklearn.metrics import confusion_matrix
    t = table()
    assert (confusion(t.label, t.pgd20, 4) == confusion_matrix(t.label, t.pgd20)).all()
    assert confusion([0, 2], [2, 2], 4).tolist() == [[0, 0, 1, 0], [0]*4, [0, 0, 1, 0], [0]*4]

def test_confusion():
    fig = plot_confusion(TABLES, 'pgd20', ['automobile', 'b', 'c', 'd'], 'PGD-20')
    nat,adv = fig.axes[:2]
    assert [ax.get_title() for ax in (nat, adv)] == ['at\nnatural', 'at\nPGD-20']
    t = TABLES['at']
    share = 100*(t.pgd20[t.label == 1] == 2).mean()
    assert adv.images[0].get_array()[1, 2] == pytest.approx(share) and f'{share:.0f}' in [t.get_text() for t in adv.texts]
    inside(fig)
    inside(plot_confusion({f'{LONG}{i}': table() for i in range(8)}))
    assert not plot_confusion(dict(at=table(100, 50))).axes[0].texts # no numbers where there is no room

def test_accuracy_of_classes():
    rows = class_accuracies(table(), ('natural', 'pgd20'), 'abcd')
    t = table()
    hits = int((t.pgd20[t.label == 2] == 2).sum())
    row = rows[(rows['class'] == 'c') & (rows.attack == 'pgd20')].iloc[0]
    assert (row.n, row.accuracy) == (10, hits/10) and (row.low, row.high) == pytest.approx(wilson(hits, 10))

def test_classes():
    fig = plot_classes(TABLES, 'pgd20', ['automobile', 'b', 'c', 'd'], 'PGD-20')
    robust = fig.axes[0].lines[1].get_xdata()
    t = TABLES['at']
    assert list(robust) == pytest.approx([100*(t.pgd20[t.label == c] == c).mean() for c in range(4)])
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ['automobile', 'b', 'c', 'd']
    inside(fig)
    few = plot_classes(dict(at=table(200, 50)), most=5)
    shown = [int(t.get_text()) for t in few.axes[0].get_yticklabels()]
    t = table(200, 50)
    means = (t.pgd20 == t.label).groupby(t.label).mean()
    assert shown == sorted(shown) and len(shown) == 5 and means[shown].max() <= means.drop(shown).min()

def test_margins():
    fig = plot_margins(TABLES, 'pgd20', 'PGD-20')
    bars = [p for p in fig.axes[0].patches if hasattr(p, 'get_height')]
    assert sum(b.get_height() for b in bars) == 40 and 0 in np.round([b.get_x() for b in bars], 9)
    wrong = 100*(TABLES['at']['pgd20 margin'] > 0).mean()
    assert f'{wrong:.1f} % attacked' in fig.axes[0].get_title() and legend(fig) == ['natural', 'PGD-20']
    inside(fig)

def test_worst_images():
    t = table()
    worst = worst_images(t, 'pgd20', 3)
    assert list(worst['pgd20 margin']) == sorted(t['pgd20 margin'], reverse=True)[:3]
    images = {i: np.full((4, 4, 3), i/40) for i in worst.image}
    fig = plot_worst_images({LONG: worst}, images, 'pgd20', 'abcd', 'PGD-20')
    first = worst.iloc[0]
    assert fig.axes[0].get_title() == f'{"abcd"[int(first.label)]} → {"abcd"[int(first.pgd20)]}\nmargin {first["pgd20 margin"]:.1f}'
    assert fig.axes[0].images[0].get_array()[0, 0, 0] == pytest.approx(first.image/40)
    inside(fig)

@pytest.mark.parametrize('plot', [plot_confusion, plot_classes, plot_margins])
def test_attack_that_was_not_measured(plot):
    match = "results by image of at: there is no 'aa( margin)?' among image, label"
    with pytest.raises(ValueError, match=match): plot(dict(at=table()), 'aa')
    with pytest.raises(ValueError, match='nothing to draw'): plot({})

# -- files -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, lines', [('at', ['at']), ('at+train', ['at+train']), ('', ['']), ('x'*30, ['x'*20, 'x'*10]),
                                         (LONG[:48], ['trades:beta=6+lbgat', '+train:weight=20,', 'detach=False'])])
def test_long_names_are_broken(name, lines): assert wrapped(name).split('\n') == lines

def test_same_seed_same_images():
    x,y = digits('test', 2)
    a,b,c = (np.stack([ax.images[0].get_array() for ax in plot_images(dict(at=net()), x, y, quick(1), seed=s).axes]) for s in (0, 0, 1))
    assert (a == b).all() and (a != c).any()

def test_saved_by_suffix(tmp_path):
    fig = plot_eps(dict(at=points([0, 1/255])))
    for suffix,start in (('png', b'\x89PNG'), ('pdf', b'%PDF'), ('svg', b'<?xml')):
        save_figure(fig, tmp_path/'new'/f'eps.{suffix}')
        assert (tmp_path/'new'/f'eps.{suffix}').read_bytes().startswith(start)
    assert sorted(p.name for p in (tmp_path/'new').iterdir()) == ['eps.pdf', 'eps.png', 'eps.svg']
    from matplotlib.image import imread
    assert imread(tmp_path/'new'/'eps.png').shape[1] == round(200*fig.get_figwidth())
