"""Guards against a call that stops other threads, or that cannot be interrupted."""

import os
import signal
import threading
import time

import gradclip
import numpy as np
import pytest


def test_other_threads_run_meanwhile():
    array = np.ones(1 << 25, np.float32)
    # What the call takes, measured with the pages there.
    begin = time.perf_counter()
    for _ in range(4):
        gradclip.norm(array)
    alone = time.perf_counter() - begin
    counted, done = [0], threading.Event()

    def count():
        while not done.is_set():
            counted[0] += 1
            time.sleep(alone / 1000)

    thread = threading.Thread(target=count)
    thread.start()
    for _ in range(4):
        gradclip.norm(array)
    done.set()
    thread.join()
    # Under the GIL it would run between the calls alone.
    assert counted[0] > 8


def test_threads_clip_at_once():
    arrays = [np.full(10000, i + 1, np.float32) for i in range(8)]
    threads = [threading.Thread(target=gradclip.clip, args=([a],), kwargs={"max_norm": 1.0}) for a in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.linalg.norm(a.astype(np.float64)) == pytest.approx(1.0, rel=1e-5) for a in arrays)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_an_interrupt_comes_through_and_nothing_is_half_clipped():
    array = np.ones(1 << 22, np.float32)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            for _ in range(100000):
                array[:] = 1.0
                gradclip.clip(array, max_norm=1.0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(np.unique(array)) == 1
