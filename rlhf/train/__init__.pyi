from .observers import Observer as Observer
from .pipeline import run as run
from .stage import STAGES as STAGES
from .stage import Stage as Stage
from .stage import StageProgram as StageProgram
from .stage import StageResult as StageResult
from .stage import register as register
