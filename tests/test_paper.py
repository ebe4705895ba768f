"The paper's tables as data, their rows as recipes, and recipes as text files"
import sys
from dataclasses import fields, replace

import pytest

from fastrain import cli
from fastrain.evaluation.evaluate import parse_figures
from fastrain.runs.gallery import pictures
from fastrain.runs.recipe import Recipe, make_recipe
from fastrain.runs.recipe_file import parse_recipe, read_recipe, recipe_toml
from fastrain.runs.run import read_run
from fastrain.studies.experiment import SCALES, Experiment
from fastrain.studies.paper import paper_row, paper_table, paper_tables, printed_number, table_text
from fastrain.studies.rows import row_experiment, row_method, table_attacks, table_experiments, table_methods
from fastrain.training.methods import parse_method

TABLES = paper_tables()
ROWS = [(t, r) for t in TABLES for r in t.rows]

# --- the tables

@pytest.mark.parametrize('key,column,cell', [
    ('1/FAT*', 'Natural Acc.', '87.97'), ('1/ECAS+TRAIN', 'AA Acc.', '52.22 (↑0.12)'),
    ('2/TRADES + TRAIN', 'Natural Acc.', '67.47 (↑8.86)'), ('2/SAT*', 'PGD-20 Acc.', '27.17'),
    ('3/MCA', 'C&W-20 Acc', '27.23'), ('4/TRADES + LBGAT', 'Seconds', '1,106'),
    ('5/TRADES + LBGAT + TRAIN', 'Topology Robust', '57.98 (↑0.19)'), ('5/Standard Training', 'Topology Robust', '-'),
    ('6/TRADES*', 'Topology Natural', '52.57'), ('7/ALP*', 'PGD-20 Acc.', '8.01'), ('8/TRADES + Ours, WideResNet34-10', 'AA Acc.', '28.76'),
    ('9/384', 'PGD-20 Acc.', '30.60'), ('10/50a', 'L_TP', '0.24'), ('11/Vanilla AT + TRAIN*', 'Clean Acc', '65.15'),
    ('12/TRADES +TRAIN', 'Clean Acc', '43.64'), ('E3/CIFAR-100, LBGAT+Ours', 'AA Acc', '27.59'),
    ('E4/TRADES + LBGAT*', 'PGD-20 GAP (↓)', '0.30'), ('E5/Vanilla AT + LBGAT + Ours', 'PGD-20 GAP (↓)', '1.9'),
    ('E6/Vanilla AT + LBGAT_detach', 'Clean Acc', '71.30'), ('F2/TRAIN', 'PGD-20', '33.97%')])
def test_cells(key, column, cell):
    table,row = paper_row(key)
    assert table.cell(row, next(c for c in table.columns if c.name == column)) == cell

def test_tables_are_whole():
    assert [t.id for t in TABLES] == [*map(str, range(1, 13)), 'E3', 'E4', 'E5', 'E6', 'F2', 'F3', 'F4']
    for t in TABLES:
        names = [r.name for r in t.rows]
        assert len(names) == len({*names}) and t.title and t.caption and t.texts
        assert all(len(r.cells) == len(t.columns) for r in t.rows)
        assert {c.which for c in t.columns} <= {'best', 'last', 'gap'}

def test_gains_are_differences():
    "A gain is that over the row which the method builds on; the one that is not is in a note"
    wrong = []
    for t,r in ROWS:
        base = next((b for b in t.rows if parsed(b) + '+train' == parsed(r)), None)
        for c,cell in zip(t.columns, r.cells):
            if '(' not in cell: continue
            gain = float(cell.split('(')[1].strip('↑↓)'))*(-1 if '↓' in cell else 1)
            found = printed_number(cell) - printed_number(t.cell(base, c))
            if abs(found - gain) > .0051: wrong.append(f'{t.id}/{r.name}, {c.name}')
    assert wrong == ['5/TRADES + LBGAT + TRAIN, Topology Natural']
    assert any('89.50 - 84.57' in n for n in paper_table('5').notes)

def parsed(row): return row_method(row).replace('trades:beta=6.0', 'trades')

def test_quoted_rows():
    assert [r.quoted for r in paper_table('11').rows] == [False]*3
    assert sum(r.quoted for r in paper_table('1').rows) == 7

@pytest.mark.parametrize('id', ['6', 'Table 6', ' table 6'])
def test_a_table_by_its_names(id): assert paper_table(id).id == '6'

def test_wrong_names():
    with pytest.raises(ValueError, match="row of Table 6 'TRADES . TRANE'. Did you mean 'TRADES . TRAIN'"): paper_row('6/TRADES + TRANE')
    with pytest.raises(ValueError, match="row '13/TRADES': Unknown table '13'"): paper_row('13/TRADES')
    for key in ('TRADES', '6/', ''):
        with pytest.raises(ValueError, match='expected a table and a row of it'): paper_row(key)
    with pytest.raises(ValueError, match="Unknown table 'F9'. Did you mean '9' or 'F4'"): paper_table('F9')

def test_text_of_a_table():
    lines = table_text(paper_table('10'), table_methods(paper_table('10'))).splitlines()
    assert lines[2].split() == ['λ', '0', '5a', '10a', '20a', '50a'] and lines[6].split() == ['fastrain', *['trades+train']*5]
    assert '33.97 in Table 6' in ' '.join(lines)

# --- rows as experiments

@pytest.mark.parametrize('scale', SCALES)
def test_every_row_is_an_experiment(scale):
    for t,r in ROWS:
        e = row_experiment(f'{t.id}/{r.name}', scale, seed=3)
        assert (e.key, e.scale, e.seed, e.changed) == (f'{t.id}/{r.name}', scale, 3, {})
        assert {*e.pictures} <= {*pictures} and parse_method(e.method).name == e.method

def test_columns_are_measured():
    "Every figure of a table is among what its rows are evaluated under"
    for t in TABLES:
        attacks,measures = parse_figures(list(table_attacks(t)))
        known = {*attacks} | {m.key for m in measures} | {'seconds_per_epoch', 'l_tp', ''}
        assert {c.figure for c in t.columns} <= known

def test_settings_of_the_profiles():
    las,lbgat = (row_experiment(k).recipe for k in ('1/TRADES + TRAIN', '6/TRADES + TRAIN'))
    assert (las.epochs, las.drops, las.wd, las.eps, las.eval_eps, las.eval_alpha, las.lam) == (110, (99, 104), 5e-4, .031, 8/255, 2/255, 5)
    assert (lbgat.epochs, lbgat.drops, lbgat.wd, lbgat.eval_eps, lbgat.eval_alpha) == (100, (75, 90), 2e-4, .031, .003)
    assert (lbgat.lam, lbgat.lam_schedule, lbgat.holdout) == (20, 'printed', 0)
    assert (lbgat.backbone, lbgat.standard) == ('wide_resnet34_10', 'resnet18')
    assert row_experiment('1/FAT*').recipe.eps == .062

@pytest.mark.parametrize('scale', SCALES)
def test_what_a_row_is_about_goes_through_all_scales(scale):
    sizes = [row_experiment(f'9/{n}', scale).recipe.bs for n in (128, 256, 384)]
    assert [s/sizes[0] for s in sizes] == [1, 2, 3]
    assert [e.recipe.lam for e in table_experiments('10', scale)] == [0, 5, 10, 20, 50]
    assert [e.method for e in table_experiments('F3', scale)] == [f'trades:beta={b}' for b in range(1, 7)]
    assert row_experiment('1/FAT*', scale).recipe.eps == pytest.approx(2*row_experiment('1/TRADES*', scale).recipe.eps)
    assert 'mobilenetv3' in row_experiment('12/TRADES', scale).recipe.backbone
    other = row_experiment('8/TRADES + Ours, WideResNet34-10', scale).recipe.standard
    assert other != row_experiment('8/TRADES + Ours, ResNet-18', scale).recipe.standard

def test_overrides():
    e = row_experiment('6/TRADES + TRAIN', epochs=20, n_train=500)
    assert e.changed == dict(epochs=20, drops=(15, 18), n_train=500) and e.recipe.drops == (15, 18)
    assert row_experiment('6/TRADES + TRAIN', epochs=1).recipe.drops == ()
    assert row_experiment('11/at + train*', epochs=20).recipe.warmup == 20
    assert row_experiment('6/TRADES + TRAIN', 'tiny', epochs=7).recipe.warmup == 7
    assert row_experiment('6/TRADES + TRAIN', attacks=['natural']).attacks == ('natural',)
    for name,wrong in [('epoch', 3), ('epochs', 0), ('epochs', '3'), ('data', 'nowhere'), ('backbone', 'nowhere'), ('standard', 'nowhere')]:
        with pytest.raises(ValueError, match=name): row_experiment('6/TRADES + TRAIN', **{name: wrong})

def test_seeds():
    seeds = [(e.key, e.seed) for e in table_experiments('11', 'tiny', (1, 2))]
    assert len({*seeds}) == 6 and [s for _,s in seeds] == [1, 1, 1, 2, 2, 2]

# --- text files

def test_experiments_are_read_as_written():
    for t in TABLES:
        for e in (row_experiment(f'{t.id}/{t.rows[0].name}', 'tiny'), row_experiment(f'{t.id}/{t.rows[-1].name}', epochs=7)):
            assert Experiment.from_toml(e.to_toml()) == e

def test_every_field_is_written():
    text = recipe_toml(Recipe())
    for f in fields(Recipe): assert f'\n{f.name} = ' in text or f'\n# {f.name} = ' in text
    assert parse_recipe(text).recipe == Recipe()

def test_sizes_as_fractions():
    r = replace(make_recipe('everyday', data='cifar10'), eps=4/255, alpha=1/255)
    text = recipe_toml(r, ['at'])
    assert 'eps = "4/255"' in text and parse_recipe(text).recipe == r

RECIPE = row_experiment('6/TRADES + TRAIN', 'tiny').to_toml()

@pytest.mark.parametrize('old,new,told', [
    ('epochs =', 'epoch =', "Unknown setting 'epoch'. Did you mean 'epochs'"),
    ('[recipe]', '[recipes]', "Unknown table 'recipes'. Did you mean 'recipe'"),
    ('attacks =', 'attack =', "Unknown key 'attack'. Did you mean 'attacks'"),
    ('scale =', 'scales =', "Unknown key 'scales'. Did you mean 'scale'"),
    ('"tiny"', '"tini"', "Unknown scale 'tini'. Did you mean 'tiny'"), ('key = "6/TRADES + TRAIN"\n', '', 'there is no key in'),
    ('trades+train', 'trades+trane', "Unknown method 'trane'. Did you mean 'train'"), ('pgd20-lbgat', 'pgd20-lgbat', 'lgbat'),
    ('epochs = 4', 'epochs = "four"', "epochs='four': expected a whole number of epochs"),
    ('eps = 0.15', 'eps = "0,15"', 'eps: .* is not a size'),
    ('bs = 32', 'bs = 32\nbs = 64', 'this is no TOML'), ('bs = 32', 'bs = [', 'this is no TOML: .* at line'),
    ('methods = ["trades+train"]', 'methods = "trades+train"', 'expected a list of names'), ('fast = false', 'fast = 1', 'fast'),
    ('methods = ["trades+train"]', 'methods = []', 'an experiment has one method')])
def test_mistakes_in_a_file(old, new, told, tmp_path):
    assert old in RECIPE
    (tmp_path/'r.toml').write_text(RECIPE.replace(old, new))
    with pytest.raises(ValueError, match=told) as e: Experiment.read(tmp_path/'r.toml')
    assert str(tmp_path/'r.toml') in str(e.value) and '\n' not in str(e.value)

def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match='nowhere.toml.* cannot be read'): read_recipe(tmp_path/'nowhere.toml')
    with pytest.raises(OSError, match='cannot be read'): read_recipe(tmp_path)
    (tmp_path/'r.toml').write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match='is no text'): read_recipe(tmp_path/'r.toml')
    (tmp_path/'r.toml').write_text('a = ' + '['*5000)
    with pytest.raises(ValueError, match='this is no TOML'): read_recipe(tmp_path/'r.toml')

# --- the command line

def shell(monkeypatch, *args):
    monkeypatch.setattr(sys, 'argv', ['fastrain', *map(str, args)])
    cli.main()

def test_print_a_recipe_edit_it_and_train_it(tmp_path, monkeypatch, capsys):
    shell(monkeypatch, 'recipe', '6/Vanilla AT + TRAIN', '--scale', 'tiny', '--n-train', 40, '--attacks', 'natural')
    text = capsys.readouterr().out
    assert Experiment.from_toml(text).changed == dict(n_train=40)
    (tmp_path/'r.toml').write_text(text.replace('epochs = 4', 'epochs = 1').replace('n_test = 100', 'n_test = 20'))
    more = '--warmup', 0, '--steps', 1, '--device', 'cpu'
    monkeypatch.setattr('fastrain.runs.train.show_run', lambda *args: None) # pictures
    shell(monkeypatch, 'train', '--recipe', tmp_path/'r.toml', '--out', tmp_path/'run', *more)
    assert f'steps: 1 instead of 3 in {tmp_path}' in capsys.readouterr().out
    recipe,methods = read_run(tmp_path/'run')
    assert (recipe.epochs, recipe.steps, recipe.warmup, recipe.n_test, recipe.lam, methods) == (1, 1, 0, 20, 20, ['at+train'])
    kept = read_recipe(tmp_path/'run'/'recipe.toml')
    assert (kept.recipe, kept.methods, kept.attacks) == (recipe, ('at+train',), ('natural',))
    shell(monkeypatch, 'train', '--recipe', tmp_path/'run'/'recipe.toml', '--out', tmp_path/'run', '--resume', '--device', 'cpu')
    with pytest.raises(SystemExit, match='steps: 1 there, 3 now'):
        shell(monkeypatch, 'train', '--recipe', tmp_path/'r.toml', '--out', tmp_path/'run', '--resume', '--device', 'cpu')
    with pytest.raises(SystemExit, match='--profile: a recipe has all settings'):
        shell(monkeypatch, 'train', '--recipe', tmp_path/'r.toml', '--profile', 'las', '--out', tmp_path/'new')
    assert not (tmp_path/'new').exists()

def test_tables_are_printed(monkeypatch, capsys):
    shell(monkeypatch, 'tables')
    assert len([line for line in capsys.readouterr().out.splitlines() if ' rows  ' in line]) == len(TABLES)
    shell(monkeypatch, 'table', '6')
    assert '65.78 (↑13.21)' in capsys.readouterr().out

@pytest.mark.slow # it trains
@pytest.mark.parametrize('key', ['12/TRADES', '11/Vanilla AT + TRAIN*', '8/TRADES + Ours, WideResNet34-10'])
def test_rows_with_other_models_train(key, tmp_path):
    from fastrain.runs.train import train_run
    e = row_experiment(key, 'tiny', epochs=1, n_train=50, n_test=20, attacks=['natural', 'pgd2'])
    assert train_run(tmp_path/'run', e.recipe, [e.method], 'cpu', e.attacks)[0]['last']['n'] == 20
