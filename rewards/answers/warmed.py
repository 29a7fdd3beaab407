"""What the server of the workers preloads before it forks them: the algebra, warmed up. Elsewhere it does nothing."""

import os

from rewards.pool import SERVER_VARIABLE

if os.environ.get(SERVER_VARIABLE):
    import gc

    import pebble.pool.process  # noqa: F401

    from rewards.answers.expression import warm_up

    warm_up()
    gc.collect()
    gc.freeze()  # collections in the workers leave these pages alone, and so shared
