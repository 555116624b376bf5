from .observers import Observer as Observer
from .pipeline import run as run
