"Every public name of fastrain: `from fastrain.all import *`"
from fastrain.core import *
from fastrain.data import *
from fastrain.backbones import *
from fastrain.models import *
from fastrain.attacks import *
from fastrain.losses import *
from fastrain.relations import *
from fastrain.schedules import *
from fastrain.standard import *
from fastrain.callback import *
from fastrain.checkpoint import *
from fastrain.evaluate import *
from fastrain.recipes import *
from fastrain.report import *
from fastrain.run import *
