"""A run of mask learning whose batches kill the process: ``python killed_run.py FOLDER METHOD STEP``."""

import os
import signal
import sys

import optax
from masking import batch, loss, mlp_params

from jaxinfer import autoinfer

METHODS = {"L0": autoinfer.L0(), "Taylor": autoinfer.Taylor(autoinfer.Cubic(every=3))}
STEPS, EVERY = 30, 4


def run(folder, method, batches=batch, **options):
    return autoinfer.learn_masks(
        loss,
        mlp_params(),
        batches,
        0.3,
        optax.adam(1e-2),
        method=METHODS[method],
        **({"steps": STEPS, "checkpoint": folder, "checkpoint_every": EVERY, "progress": False} | options),
    )


def killing(at):
    """Batches that end the process at a step as no handler can prevent."""

    def batches(step):
        if step == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return batch(step)

    return batches


if __name__ == "__main__":
    run(sys.argv[1], sys.argv[2], killing(int(sys.argv[3])))
