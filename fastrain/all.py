"Every public name of fastrain: `from fastrain.all import *`"
from fastrain.names import *
from fastrain.core import *
from fastrain.data.pixels import *
from fastrain.data.parts import *
from fastrain.data.folders import *
from fastrain.data.cifar import *
from fastrain.data.sources import *
from fastrain.models.preact import *
from fastrain.models.stems import *
from fastrain.models.features import *
from fastrain.models.loading import *
from fastrain.models.backbone import *
from fastrain.models.stored import *
from fastrain.attacks.pgd import *
from fastrain.attacks.worst import *
from fastrain.attacks.autoattack import *
from fastrain.attacks.named import *
from fastrain.attacks.checks import *
from fastrain.pieces.base import *
from fastrain.pieces.losses import *
from fastrain.pieces.strategies import *
from fastrain.pieces.relations import *
from fastrain.pieces.crd import *
from fastrain.pieces.weights import *
from fastrain.pieces.las import *
from fastrain.speed.options import *
from fastrain.speed.replica import *
from fastrain.speed.fast import *
from fastrain.training.schedules import *
from fastrain.training.standard import *
from fastrain.training.objective import *
from fastrain.training.preconditions import *
from fastrain.training.metrics import *
from fastrain.training.callback import *
from fastrain.training.checkpoint import *
from fastrain.training.methods import *
from fastrain.evaluation.scores import *
from fastrain.evaluation.measure import *
from fastrain.evaluation.record import *
from fastrain.evaluation.evaluate import *
from fastrain.evaluation.tables import *
from fastrain.runs.own import *
from fastrain.runs.recipe import *
from fastrain.runs.figures import *
from fastrain.runs.curves import *
from fastrain.runs.plots import *
from fastrain.runs.features import *
from fastrain.runs.images import *
from fastrain.runs.mistakes import *
from fastrain.runs.interpret import *
from fastrain.runs.report import *
from fastrain.runs.recipe_file import *
from fastrain.runs.run import *
from fastrain.runs.evaluate import *
from fastrain.runs.train import *
from fastrain.runs.compare import *
from fastrain.studies.experiment import *
from fastrain.studies.paper import paper_row, paper_table, paper_tables, printed_number # not Row, which is that of an evaluation
from fastrain.studies.rows import *
from fastrain.studies.ledger import Ledger, find_ledger, read_ledger
from fastrain.studies.reproduce import asked_experiments, reproduce
from fastrain.studies.cost import Cost, StudyCost, experiment_cost, measure_step, study_cost
from fastrain.studies.study_report import study_report
from fastrain.studies.pareto import Family, family_experiments, pareto_report
