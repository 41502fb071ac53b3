"""A run that kills itself with SIGKILL: python -m tests.training.killed PHASE COUNT DELAY ARGUMENTS-OF-MOON-JAX…

The kill comes DELAY seconds after it entered PHASE (data, device, checkpoint or evaluation) for the COUNT-th time; for
the phase "any" DELAY seconds after the start. Saves run in the background, so a delay after "checkpoint" hits one.
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


def kill_later():
    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()


@contextlib.contextmanager
def killing(self, name):
    global entered
    entered += name == phase
    if name == phase and entered == count:
        kill_later()
    with of(self, name):
        yield


metrics_lib.Times.of = killing
if phase == "any":
    kill_later()
sys.exit(cli.main(sys.argv[4:]))
