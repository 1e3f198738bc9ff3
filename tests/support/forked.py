"""Processes of a test that use torch and do not import it anew: forked from the test, or from a process that only imports."""

import multiprocessing

import torch

FORK = multiprocessing.get_context("fork")
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["diffsynth_ray.train.trainer", "diffsynth_ray.models.qwen_image"])


def fork(target, *arguments):
    """A started process that calls `target` with the arguments, and has all that the test has.

    What another thread held when it was forked, it waits for for ever: no place for a process group.
    """
    process = FORK.Process(target=_call, args=(target, *arguments))
    process.start()
    return process


def start_clean(target, *arguments):
    """A started process that calls `target`, a function of a module of tests/support, and has nothing of the tests before."""
    process = SERVER.Process(target=target, args=arguments)
    process.start()
    return process


def _call(target, *arguments):
    # A fork has torch's pool of threads without its threads. The first who asks for the pool builds it anew, and two
    # threads that ask at once find none ("Invalid thread pool!"): here only one asks.
    torch.set_num_threads(1)
    target(*arguments)
