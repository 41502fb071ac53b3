"""A run that ends itself by SIGKILL: python -m tests.training.killed PHASE COUNT DELAY moon-jax's arguments…

DELAY seconds after it entered PHASE (data, device, checkpoint or evaluation) for the COUNT-th time; for the phase "any"
after its start. A save works on in the background, so a delay after "checkpoint" strikes in the middle of it.
"""

import contextlib
import os
import signal
import sys
import threading

from moon_jax import cli
from moon_jax.training import metrics as metrics_lib

phase, count, delay = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
of, entered = metrics_lib.Times.of, 0


def strike():
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


@contextlib.contextmanager
def deadly(self, name):
    global entered
    entered += name == phase
    if name == phase and entered == count:
        strike()
    with of(self, name):
        yield


metrics_lib.Times.of = deadly
if phase == "any":
    strike()
sys.exit(cli.main(sys.argv[4:]))
