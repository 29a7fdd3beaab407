"""The workers' fork server preloads this module to warm up the algebra. In any other process it does nothing."""

import os

from rewards.pool import SERVER_VARIABLE

if os.environ.get(SERVER_VARIABLE):
    import gc

    import pebble.pool.process  # noqa: F401

    from rewards.answers.expression import warm_up

    warm_up()
    gc.collect()
    gc.freeze()  # garbage collection in the workers then does not touch these pages, so they stay shared
