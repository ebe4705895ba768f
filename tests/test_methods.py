"Methods by name: the rows of the papers' tables, what is refused, what is listed, and a step of each"
import inspect, json, re

import pytest
import torch

from conftest import net, same, snapshot
from fastrain import cli
from fastrain.pieces.crd import CRD
from fastrain.core import load_tensors
from fastrain.data.sources import get_dls
from fastrain.pieces.las import LAS
from fastrain.pieces.losses import ALP, AT, GAIRAT, MART, MCA, Natural, RobustLoss, TRADES
from fastrain.training.methods import canonical, list_pieces, methods_text, parse_method, piece_families, table_rows
from fastrain.runs.recipe import make_recipe, recipe_fit, recipe_learner
from fastrain.pieces.relations import AbsoluteCosine, LBGAT, Relation, Topology
from fastrain.training.standard import CoTrained, Frozen
from fastrain.pieces.strategies import ECAS, FAT, SAT
from fastrain.pieces.weights import AWP, EMA

# --- the rows, as they are printed, with the pieces that they stand for

printed = { # marks of quotation, of references and of mathematics included
    # Tables 1 and 2
    'Vanilla AT* [□]': [AT()], 'MART* [□]': [MART()], 'FAT* [♥]': [AT(), FAT()], 'GAIRAT* [III]': [GAIRAT()],
    'AWP* [██]': [AT(), AWP()], 'SAT* [四]': [AT(), SAT()],
    'ECAS [15]': [AT(.7), ECAS()], 'ECAS+TRAIN': [AT(.7), ECAS(), Topology()], 'TRADES* [₩]': [TRADES()],
    'LAS-TRADES* [□]': [TRADES(), LAS()], 'TRADES + TRAIN': [TRADES(), Topology()],
    'TRADES + LBGAT [1]': [TRADES(), LBGAT()], 'TRADES + LBGAT* [1]': [TRADES(), LBGAT()],
    'TRADES + LBGAT +TRAIN': [TRADES(), LBGAT(), Topology()],
    'TRADES + LBGAT+ TRAIN': [TRADES(), LBGAT(), Topology()],
    # Table 3
    'MCA [□]': [MCA()], 'Vanilla AT + RKD [43]': [AT(), AbsoluteCosine()], 'Vanilla AT + CRD [111]': [AT(), CRD()],
    "Vanilla AT + TRAIN'": [AT(), Topology(detach=False)],
    'Vanilla AT + TRAIN': [AT(), Topology()],
    # Tables 5 and 6
    'Standard Training': [Natural()], 'Vanilla AT [□]': [AT()], 'Vanilla AT + LBGAT [1]': [AT(), LBGAT()],
    'Vanilla AT + LBGAT + TRAIN': [AT(), LBGAT(), Topology()],
    'TRADES + LBGAT + TRAIN': [TRADES(), LBGAT(), Topology()],
    # Table 7
    'Vanilla AT + LBGAT* [■]': [AT(), LBGAT()], 'ALP* [□]': [ALP()], 'LBGAT + ALP* [■]': [ALP(), LBGAT()],
    r'TRADES $(\beta = 6.0)$ * [53]': [TRADES(6)],
    r'TRADES $(\beta = 6.0) + LBGAT^*$': [TRADES(6), LBGAT()],
    r'TRADES ( $\beta = 6.0$ ) + Ours': [TRADES(6), Topology()],
    r'TRADES ( $\beta = 6.0$ ) + LBGAT+ Ours': [TRADES(6), LBGAT(), Topology()],
    # Tables 11 and 12
    'Vanilla AT': [AT()], 'Vanilla AT + TRAIN*': [AT(), Topology(), Frozen], 'Vanilla AT+ TRAIN': [AT(), Topology()],
    'TRADES': [TRADES()], 'TRADES +TRAIN': [TRADES(), Topology()],
    # FRPAT, an earlier version
    'Vanilla AT + Ours': [AT(), Topology()], 'Vanilla AT + LBGAT + Ours': [AT(), LBGAT(), Topology()],
    'TRADES + LBGAT +Ours': [TRADES(), LBGAT(), Topology()],
    r'Vanilla AT + $LBGAT_{detach}$': [AT(), LBGAT(detach=True)],
    r'TRADES ($\beta = 0$) + LBGAT': [TRADES(0), LBGAT()], r'TRADES ($\beta = 0$) + LBGAT+Ours': [TRADES(0), LBGAT(), Topology()],
    '$TRADES + LBGAT* [4]$': [TRADES(), LBGAT()],
    # the tables of others
    'LBGAT0': [TRADES(0), LBGAT()], 'LBGAT6': [TRADES(6), LBGAT()], 'FAT-TRADES': [TRADES(), FAT()], 'FAT-MART': [MART(), FAT()],
    'AT-AWP': [AT(), AWP()], 'TRADES-AWP': [TRADES(), AWP()],
    'LAS-AT': [AT(.7), LAS()], 'LAS-AWP': [AT(), LAS('awp'), AWP()], 'ECAS-AT': [AT(.7), ECAS()], 'ECAS-TRADES': [TRADES(), ECAS()],
    'ECAS-AWP': [AT(), ECAS('awp'), AWP()]}

def made(m):
    "The pieces of a method as plain values"
    return [(type(p).__name__, p.settings()) for p in m.pieces] + ([m.policy.__name__] if m.policy else [])

@pytest.mark.parametrize('row', printed)
def test_printed_row(row):
    m,want = parse_method(row),printed[row]
    assert made(m) == [p.__name__ if inspect.isclass(p) else (type(p).__name__, p.settings()) for p in want]
    assert isinstance(m.robust, RobustLoss) and all(isinstance(r, Relation) for r in m.relations) and m.policy_args == {}
    assert m.needs_standard == bool(m.relations)
    assert bool(m.approximate) == any(isinstance(p, (ECAS, SAT, MCA, AbsoluteCosine)) for p in m.pieces)

@pytest.mark.parametrize('method', [*printed, *table_rows, *table_rows.values(), 'train', 'awp',
                                    'trades:beta=3+train:weight=10,reduction=batchmean'])
def test_canonical_is_final(method):
    name = canonical(method)
    assert canonical(name) == name == parse_method(method).name and made(parse_method(name)) == made(parse_method(method))
    assert not re.search(r"[\s*'$\\(){}\[\]]", name) # to be typed in any shell

variants = {'at+train+frozen': ['at+train*', 'AT+TRAIN*', ' Vanilla AT  +  TRAIN* ', r'vanilla AT+TRAIN\*', 'Vanilla AT* + TRAIN*',
                                'Vanilla AT + TRAIN* [7]', 'Vanilla\u00a0AT + TRAIN*',
                                'Vanilla AT + TRAIN∗'],
            'at+train:detach=false': ["at+train'", 'Vanilla AT + TRAIN’', 'Vanilla AT + TRAIN′', "vanilla at +\tTrain'",
                                      "Vanilla AT + TRAIN'*"],
            'trades:beta=6.0+lbgat': ['TRADES (β = 6.0) + LBGAT', 'TRADES(β=6.0)+LBGAT*', r'TRADES $(\beta=6.0)$ + LBGAT',
                                      'trades (beta = 6.0) + lbgat', 'TRADES:beta=6.0 + LBGAT'],
            'at+lbgat:detach=true': ['at+lbgat_detach', r'Vanilla AT + $LBGAT_{detach}$', r'Vanilla AT + $\LBGAT_{detach}^*$',
                                     'Vanilla AT + LBGAT_detach*']}

@pytest.mark.parametrize('variant, name', [(v, name) for name,vs in variants.items() for v in vs])
def test_typographic_variant(variant, name): assert canonical(variant) == name

# --- parameters

typed = {'trades:beta=3': TRADES(3.), 'trades:beta=.5': TRADES(.5), 'trades:beta=1e-1': TRADES(.1),
         'train:weight=10,reduction=batchmean': Topology('batchmean', weight=10), 'train:weight=none': Topology(),
         'train:detach_rho=true': Topology(detach_rho=True), 'train:detach_rho=True': Topology(detach_rho=True),
         'lbgat:ce=false,weight=None': LBGAT(ce=False, weight=None),
         'sat:shape=steps,start=-.2': SAT(shape='steps', start=-.2),
         'las:net=resnet10t_16,r2=1': LAS(net='resnet10t_16', r2=1), 'awp:gamma=.01,of=none': AWP(.01, of=None),
         'ema:decay=.9,warmup=false': EMA(.9, False), 'mca:queue=64': MCA(queue=64),
         'crd:k=64,T=.1': CRD(64, T=.1),
         'fat:breaks=(50,90),of=120': FAT((50,90), 120), 'gairat:begin=0,lam=inf': GAIRAT(0, lam=float('inf'))}

@pytest.mark.parametrize('method', typed)
def test_parameters(method):
    want = typed[method]
    assert (type(want).__name__, want.settings()) in made(parse_method(method))

defaults = [(p['key'], n, d) for p in list_pieces() for n,(d,_) in p['parameters'].items()]

@pytest.mark.parametrize('key, name, default', defaults)
def test_default_can_be_typed(key, name, default):
    "As `methods_text` prints it"
    m = parse_method(f'{"train+" if piece_families["policy"].registry.get(key) else ""}{key}:{name}={default}')
    if m.policy: assert m.policy_args == {name: default}
    else: assert made(m) == made(parse_method(key))

def test_parameters_of_a_policy():
    m = parse_method('at+train+cotrained:warmup=3,follow=false')
    assert m.policy is CoTrained and m.policy_args == dict(warmup=3, follow=False)
    assert parse_method('train+frozen:seed=5').policy_args == dict(seed=5)

lines = {None: [], 'at': ['at'], 'standard,at,at+train': ['standard', 'at', 'at+train'],
         'Vanilla AT, Vanilla AT + TRAIN*': ['at', 'at+train+frozen'],
         'at,trades:beta=3+las:lr=.1,r2=1': ['at', 'trades:beta=3+las:lr=.1,r2=1'],
         'lbgat:detach=true,ce=false,at,ema:decay=.9,warmup=false': ['lbgat:detach=true,ce=false', 'at', 'ema:decay=.9,warmup=false'],
         'las:lr=.1, r2=1, at': ['las:lr=.1,r2=1', 'at'],
         'TRADES (β = 6.0) + LBGAT,TRADES (β = 0)': ['trades:beta=6.0+lbgat', 'trades:beta=0'],
         'trades+fat:breaks=(50,90),of=120,at': ['trades+fat:breaks=(50,90),of=120', 'at'],
         'fat:of=120,breaks=(50,90),at': ['fat:of=120,breaks=(50,90)', 'at']}

@pytest.mark.parametrize('line', lines)
def test_methods_of_a_command_line(line): assert [parse_method(m).name for m in cli.split_methods(line)] == lines[line]

# --- a method that was parsed before

def test_parsed_once():
    m = parse_method('Vanilla AT + TRAIN*')
    assert parse_method(m) is m and canonical(m) == m.name == 'at+train+frozen'

def test_pieces_of_a_training_are_its_own():
    m = parse_method('trades+las+train+ema')
    a,b = m.callback_args(),m.callback_args()
    assert made(parse_method(m)) == made(m) and a['robust'] is not b['robust'] and a['average'] is not m.average
    assert [repr(p) for p in a['relation']] == [repr(p) for p in m.relations] and repr(a['strategy']) == repr(m.strategy)

# --- what is refused, with the reason

refused = {'at+trades': r'\(robust\): at and trades', 'trades+LAS-AT': r'\(robust\)', 'fat+sat': r'\(strategy\): fat and sat',
           'at+las+ecas': r'\(strategy\)', 'awp+awp': r'\(perturb\)',
           'ema+at+ema:decay=.9': r'\(average\)',
           'train+train': r'\(relations\): train and train', "train+train'": r'\(relations\)',
           'train+frozen+cotrained': r'\(policy\): frozen and cotrained', 'train*+cotrained': r'\(policy\)',
           'standard+train': r'Topology.*adversarial images, but Natural \(standard\) makes none', 'standard+lbgat': r'LBGAT.*makes none',
           'standard+fat': r'FAT.*makes none',
           'gairat+fat': r'GAIRAT.*strategy of its own, which FAT',
           'at+frozen': 'frozen is about the standard model, but no piece',
           'mart+cotrained+awp': 'cotrained is about the standard model', 'standard+frozen': 'frozen',
           "train'+frozen": 'Topology.*would train the standard model',
           'tarin': "'train'", 'at+tardes': "'trades'", 'at+awpp:gamma=1': "'awp'", 'trades:beta=-1': 'beta=-1',
           'trades:beta=big': 'beta|big', 'trades:gamma=3': 'gamma',
           'train:reduction=mean': 'batchmean', 'ema:decay=1': 'decay=1',
           'trades:beta': 'name=value', 'trades:beta=': 'name=value', 'trades:=3': 'name=value', 'trades:3': 'name=value',
           'train+cotrained:colour=3': 'colour',
           'train+frozen:colour=3': 'colour', 'train+frozen:follow=true': 'follow',
           '': "method ''", 'at+': "method ''", '+at': "method ''", 'at++train': "method ''", 'vanilla': "method ''"}

@pytest.mark.parametrize('method', refused)
def test_refused(method):
    with pytest.raises(ValueError, match=refused[method]): parse_method(method)

@pytest.mark.parametrize('method', ['standard+awp+ema', 'gairat+train', 'train+absolute+rkd-d+rkd-a+pkt+crd+lbgat', 'lbgat+frozen',
                                    "train'+cotrained", 'trades+fat+lbgat+train+awp+ema+cotrained', 'mca+las:variant=at+train*'])
def test_not_refused(method): assert made(parse_method(method))

# --- what is listed

pieces = list_pieces()

def test_every_piece_has_a_name_of_its_own():
    assert len({p['key'] for p in pieces}) == len(pieces) == sum(len(f.registry) for f in piece_families.values())
    assert {f for f in piece_families} == {p['family'] for p in pieces} and not {p['key'] for p in pieces} & table_rows.keys()

@pytest.mark.parametrize('p', pieces, ids=[p['key'] for p in pieces])
def test_piece(p):
    "One line about it, its source, the meaning of each parameter; made by default, and written down as plain values"
    cls = piece_families[p['family']].registry[p['key']]
    assert p['doc'] and '\n' not in p['doc'] and not p['doc'].endswith('.') and p['paper']
    for n,(_,meaning) in p['parameters'].items(): assert meaning, n
    piece = cls(net()) if p['family'] == 'policy' else cls()
    settings = piece.settings()
    assert json.loads(json.dumps(settings)) == settings and p['parameters'].keys() <= settings.keys()
    assert all(settings[n] == d for n,(d,_) in p['parameters'].items() if d is not None)
    assert repr(piece).startswith(f'{cls.__name__}(') and all(f'{n}=' in repr(piece) for n in p['parameters'])

def test_text():
    text = methods_text()
    for p in pieces: assert re.search(rf'^  {p["key"]} +{re.escape(p["doc"])}', text, re.M), p['key']
    for name,stands_for in table_rows.items(): assert re.search(rf'^  {re.escape(name)} +{re.escape(stands_for)}$', text, re.M), name

@pytest.mark.parametrize('p', pieces, ids=[p['key'] for p in pieces])
def test_text_of_a_piece(p):
    text = methods_text(p['key'])
    head,*args = [l.strip() for l in text.splitlines() if l.strip() != p['paper']]
    assert head.startswith(p['key']) and p['doc'] in head and p['approximate'] in head
    assert args == [f'{n}={d!r}: {meaning}' for n,(d,meaning) in p['parameters'].items()]

def test_text_of_nothing():
    with pytest.raises(ValueError, match="'train'"): methods_text('tarin')

own = '''from fastrain.pieces.losses import RobustLoss

class Mine(RobustLoss):
    "A loss of my own"
    key,paper = 'mine','nowhere'
    def __init__(self,
        size:float=2. # How much of it
    ): self.size = size
    def __call__(self, v): return dict(ce=self.size*v.adv.logits.mean())
'''

def test_piece_of_ones_own(tmp_path, capsys):
    "Found and listed once its file is loaded, and as unknown as before when it is removed"
    file = tmp_path/'own.py'
    file.write_text(own)
    try:
        cli.methods('mine', str(file))
        assert 'mine' in (out := capsys.readouterr().out) and 'A loss of my own' in out
        assert 'size=2.0: How much of it' in out and 'nowhere' in out
        m = parse_method('mine:size=3+train+fat')
        assert type(m.robust).__name__ == 'Mine' and m.robust.size == 3 and 'mine' in methods_text()
        with pytest.raises(ValueError, match=r'\(robust\): at and mine'): parse_method('at+mine')
    finally: RobustLoss.registry.pop('mine', None)
    with pytest.raises(ValueError, match="Unknown method 'mine'"): parse_method('mine')
    assert 'mine ' not in methods_text()
    with pytest.raises(ValueError, match='no such file'): cli.load_pieces(f'{file},{tmp_path/"other.py"}')
    RobustLoss.registry.pop('mine')

def test_printed_on_the_command_line(capsys):
    cli.methods()
    assert capsys.readouterr().out.rstrip('\n') == methods_text()

# --- an epoch of each on the digits

robust,strategies = [p['key'] for p in pieces if p['family'] == 'robust'],[p['key'] for p in pieces if p['family'] == 'strategy']
# columns in the recorder
terms = {'train': 'l_tp', 'absolute': 'absolute', 'rkd-d': 'rkd_d', 'rkd-a': 'rkd_a', 'pkt': 'pkt', 'lbgat': 'lbgat', 'crd': 'crd'}
every = [*robust, *(f'{r}+train' for r in robust if r != 'standard'), *(f'at+{t}' for t in terms),
         *(f'trades+{s}+train' for s in strategies), *map(canonical, [*printed, *table_rows]),
         'standard+awp+ema', 'at+awp:of=none+train', 'trades+awp:warmup=0+lbgat', 'at+ema+train', 'at+train+cotrained',
         'at+lbgat+frozen', 'trades+lbgat+train+awp+ema', 'at+train:weight=3',
         'at+absolute+pkt+train']
# without what goes without saying, so that none comes twice
every = sorted({re.sub(r'^at\+(?!las|ecas)|:beta=6(\.0)?', '', canonical(m)) for m in every})
# each piece and each place of a piece at least once
quick_ones = {'standard', 'alp+train', 'mart+fat', 'gairat', 'mca', 'trades+sat+train', 'at:confidence=.7+ecas',
              'at:confidence=.7+las', 'crd', 'absolute+pkt+train', 'rkd-d', 'rkd-a', 'lbgat:detach=true', 'train+frozen',
              'train:detach=false', 'train:weight=3', 'trades+lbgat+train+awp+ema'}
assert quick_ones <= set(every)
every = [m if m in quick_ones else pytest.param(m, marks=pytest.mark.slow) for m in every]

def small(method):
    "The same with a small strategy network"
    return '+'.join(re.sub('^las(:|$)', 'las:net=resnet10t_16,', p).rstrip(',') for p in method.split('+'))

@pytest.fixture(scope='module')
def recipe(): return make_recipe('digits', epochs=1, warmup=1, bs=8, steps=1, n_valid=4, lr=.05)

@pytest.fixture(scope='module')
def dls(): return get_dls('digits', bs=8, holdout=4, n_train=20, n_test=4, device='cpu')

@pytest.fixture(scope='module')
def warm(tmp_path_factory): return tmp_path_factory.mktemp('warm')/'warm.pt'

@pytest.mark.parametrize('method', every)
def test_epoch(method, recipe, dls, warm):
    learn = recipe_learner(recipe, small(method), dls, keep=warm)
    before = snapshot(learn.model)
    with learn.no_bar(), learn.no_logging(): recipe_fit(recipe, learn)
    cb,keys = learn.train_cb,[p.partition(':')[0] for p in method.split('+')]
    assert len(learn.recorder.losses) == len(dls.train) >= 1 and all(torch.tensor(learn.recorder.losses).isfinite())
    changed = [n for n,p in learn.model.named_parameters() if not torch.equal(p, before[n])]
    assert len(changed) == len([*learn.model.parameters()])
    relations = [terms[k] for k in keys if k in terms]
    shown = ['robust_loss', *relations]
    if {'train', 'absolute'} & set(keys) and 'weight=3' not in method: shown.append('lambda')
    if relations: shown.append('std_accuracy')
    if 'ema' in keys: shown.append('ema_accuracy')
    assert list(learn.recorder.metric_names)[5:-1] == shown
    assert torch.tensor(learn.recorder.values[0]).isfinite().all()
    if relations:
        grown_together = 'lbgat' in keys and not {'frozen', 'lbgat:detach=true'} & {*keys, *method.split('+')}
        assert type(cb.policy) is (Frozen if 'frozen' in keys else CoTrained) and cb.policy.warmup == (not grown_together)
        if cb.policy.warmup: assert same(snapshot(cb.policy.model), load_tensors(warm)['model']) == ('frozen' in keys)
    else: assert cb.policy is None

# --- what is typed wrong

@pytest.mark.parametrize('method, match', [
    ('trades:', 'trades: there is no parameter where one was expected: .*trades:beta=6.0'),
    ('trades:beta=3,', 'trades: there is no parameter'), ('trades:,beta=3', 'trades: there is no parameter'), ('standard:', 'has none'),
    ('lbgat0:', 'lbgat: there is no parameter'), ('trades:beta=', "'beta=' is no parameter"), ('trades:=3', "'=3' is no parameter"),
    ('trades:beta=3,beta=4', 'trades is given beta twice'), ('trades:beta=3,Beta=4', 'trades is given beta twice'),
    ("at+train':detach=true", 'train is given detach twice'), ('trades:beta=abc', "trades: beta='abc': expected a number"),
    ('trades:beta=true', 'trades: beta=True: expected a number'), ('trades:beta=none', 'trades: beta=None: expected a number ≥ 0'),
    ('trades:beta=(1,2)', r'trades: beta=\(1, 2\): expected a number'),
    ('at+train:detach=maybe', "train: detach='maybe': expected true or false"),
    ('at+train:weight=abc', "train: weight='abc': expected a number"), ('at+ema:warmup=yes', "ema: warmup='yes': expected true or false"),
    ('at+train+cotrained:follow=3', 'cotrained: follow=3: expected true or false'),
    ('fat:breaks=("a",)', "fat: breaks=.'a',.: expected full epochs"),
    ('at+train+cotrained:warmup=abc', "cotrained: warmup='abc': expected a number"),
    ('at+train+cotrained:warmup=-1', 'cotrained: warmup=-1: expected a whole number'),
    ('at+train+cotrained:warmup_lr=0', 'cotrained: warmup_lr=0: expected a learning rate > 0'),
    ('at+train+cotrained:seed=1.5', 'cotrained: seed=1.5: expected a whole seed'),
    ('at+train+cotrained:opt_func=3', "no parameter 'opt_func'"), ('sat:shape=[1]', "'shape=' is no parameter")])
def test_typed_wrong(method, match):
    with pytest.raises(ValueError, match=match) as e: parse_method(method)
    assert '\n' not in str(e.value) and repr(method) in str(e.value)

def test_own_piece_is_checked_by_its_annotations(monkeypatch):
    monkeypatch.setattr(RobustLoss, 'registry', dict(RobustLoss.registry))
    class Own(RobustLoss):
        key = 'own'
        def __init__(self, beta:float=1., on:'bool'=True, mode:str='a'): self.beta,self.on,self.mode = beta,on,mode
    assert parse_method('own:beta=2,on=false,mode=b').robust.settings() == dict(beta=2, on=False, mode='b')
    for wrong in ('beta=x', 'beta=false', 'on=2', 'on=x'):
        with pytest.raises(ValueError, match=f'own: {wrong[:2]}'): parse_method(f'own:{wrong}')

@pytest.mark.parametrize('make', [lambda: Topology(detach='no'), lambda: Topology(detach_rho=1), lambda: LBGAT(detach='true'),
                                  lambda: EMA(warmup='no'), lambda: CoTrained(follow='no')])
def test_flags(make):
    with pytest.raises(ValueError, match='expected True or False'): make()
