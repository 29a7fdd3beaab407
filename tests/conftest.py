"""Collects 6,000 tests, and imports the stack for them, without garbage collection; later collections skip all that."""

import gc

gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()
