"""Processes of a test that use torch, forked: they have all that the test has, and import nothing again."""

import multiprocessing

import torch

FORK = multiprocessing.get_context("fork")


def fork(target, *arguments):
    """A started process that calls `target` with the arguments."""
    process = FORK.Process(target=_call, args=(target, *arguments))
    process.start()
    return process


def _call(target, *arguments):
    # A fork has torch's pool of threads without its threads. The first who asks for the pool builds it anew, and two
    # threads that ask at once find none ("Invalid thread pool!"): here only one asks.
    torch.set_num_threads(1)
    target(*arguments)
