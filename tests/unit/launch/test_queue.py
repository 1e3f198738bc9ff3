"""Who may go and who waits in the queue of a cluster, as pure arithmetic."""

from dataclasses import replace

import pytest

from diffsynth_ray.config.load import load_job
from diffsynth_ray.config.resolve import Resources, resolve
from diffsynth_ray.data import nodes
from diffsynth_ray.launch.queue import Need, Queue, Turns, need_to_train

TOTAL = {"CPU": 32.0, "GPU": 4.0}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def need(run, *, gpus=1.0, least=1, most=None, priority=0, cpus=2.0):
    return Need(run=run, priority=priority, per_worker={"CPU": cpus, "GPU": gpus}, least=least, most=most or least)


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def turns(clock):
    return Turns(clock)


def test_runs_that_fit_beside_each_other_go_at_once(turns):
    assert turns.ask("a", need("a", least=2), TOTAL) is None
    assert turns.ask("b", need("b", least=2), TOTAL) is None
    assert turns.wanted() == []


def test_a_run_that_does_not_fit_waits_and_says_for_what_and_whom(turns):
    turns.ask("a", need("a", least=3), TOTAL)
    reason = turns.ask("b", need("b", least=2), TOTAL)
    assert reason == "1 of 2 GPU free; held by a"
    turns.leave("a")
    assert turns.ask("b", need("b", least=2), TOTAL) is None


def test_cpus_for_decoding_count_too(turns):
    turns.ask("a", need("a", gpus=0, cpus=20), TOTAL)
    assert "12 of 20 CPU free" in turns.ask("b", need("b", gpus=0, cpus=20), TOTAL)


def test_who_came_first_goes_first_and_a_later_one_takes_nothing_from_it(turns):
    turns.ask("a", need("a", least=3), TOTAL)
    assert turns.ask("big", need("big", least=4), TOTAL) is not None
    reason = turns.ask("small", need("small", least=1), TOTAL)
    assert reason is not None, "the free GPU is one of those that `big` waits for"
    assert "before it in the queue: big" in reason
    assert turns.ask("on cpus", need("on cpus", gpus=0), TOTAL) is None, "it takes no GPU"
    turns.leave("a")
    assert turns.ask("small", need("small", least=1), TOTAL) is not None
    assert turns.ask("big", need("big", least=4), TOTAL) is None


def test_priority_comes_before_arrival(turns):
    turns.ask("a", need("a", least=4), TOTAL)
    turns.ask("early", need("early", least=4), TOTAL)
    turns.ask("urgent", need("urgent", least=4, priority=5), TOTAL)
    turns.leave("a")
    assert turns.ask("early", need("early", least=4), TOTAL) is not None
    assert turns.ask("urgent", need("urgent", least=4, priority=5), TOTAL) is None


def test_a_run_whose_driver_is_silent_no_longer_counts(turns, clock):
    turns.ask("a", need("a", least=4), TOTAL)
    clock.now = 40
    turns.keep("a", need("a", least=4))
    clock.now = 90
    assert turns.ask("b", need("b", least=4), TOTAL) is not None
    clock.now = 101
    assert turns.ask("b", need("b", least=4), TOTAL) is None


def test_a_new_attempt_does_not_wait_for_the_one_before_whose_driver_was_killed(turns):
    turns.ask("run-a1", need("run", least=4), TOTAL)
    assert turns.ask("run-a2", need("run", least=4), TOTAL) is None
    assert "held by run" in turns.ask("other-a1", need("other", least=4), TOTAL)


def test_a_queue_that_was_made_anew_learns_who_holds_what(clock):
    anew = Turns(clock)
    anew.keep("a", need("a", least=4))
    assert anew.ask("b", need("b", least=4), TOTAL) == "0 of 4 GPU free; held by a"


def test_the_next_stage_of_a_run_gives_back_what_the_one_before_held(turns):
    turns.ask("a", need("a", least=4), TOTAL)
    turns.ask("b", need("b", least=4), TOTAL)
    assert turns.ask("a", need("a", least=2), TOTAL) is None, "it came first"
    turns.leave("a")
    turns.ask("a2", need("a2", least=4), TOTAL)
    assert turns.ask("b", need("b", least=4), TOTAL) is None
    assert turns.ask("b", need("b", least=1), TOTAL) is None
    turns.keep("b", need("b", least=4))
    assert turns.ask("c", need("c", least=3), TOTAL) is not None, "a2 waits before it"


def test_an_elastic_run_goes_with_its_fewest_workers_and_then_holds_all_it_can_take(turns):
    turns.ask("a", need("a", least=3), TOTAL)
    assert turns.ask("elastic", need("elastic", least=1, most=8), TOTAL) is None
    turns.leave("a")
    assert turns.ask("b", need("b", least=1), TOTAL) == "0 of 1 GPU free; held by elastic"


def test_a_run_larger_than_the_cluster_goes_when_nobody_is_in_its_way(turns):
    """An autoscaler may make room for it; without one Ray Train says what is missing."""
    turns.ask("a", need("a"), TOTAL)
    assert turns.ask("large", need("large", least=8), TOTAL) is not None
    turns.leave("a")
    assert turns.ask("large", need("large", least=8), TOTAL) is None


def test_an_autoscaler_is_asked_for_room_only_while_someone_waits(turns):
    turns.ask("a", need("a", least=3), TOTAL)
    assert turns.wanted() == []
    turns.ask("b", need("b", least=2), TOTAL)
    assert turns.wanted() == [{"CPU": 2.0, "GPU": 1.0}] * 5
    turns.leave("a")
    turns.ask("b", need("b", least=2), TOTAL)
    assert turns.wanted() == []


def test_what_a_training_stage_takes(tmp_path):
    """Two such runs leave no CPU to decode with on a machine of two, so that they must not both go."""
    job = load_job("quickstart", [f"output.path={tmp_path}"])
    found = need_to_train(resolve(job, Resources(cpus=2, gpus=0)))
    assert found.amounts(1) == pytest.approx({"CPU": 1.6})
    turns = Turns(Clock())
    assert turns.ask("a", found, {"CPU": 2.0}) is None
    assert turns.ask("b", replace(found, run="b"), {"CPU": 2.0}) is not None


def test_a_node_that_is_being_drained_makes_no_room_for_a_run(monkeypatch):
    """Ray starts nothing on it any more, so that a run that goes for its sake takes the CPUs that another one decodes with."""
    found = [{"NodeID": name, "Alive": name != "dead", "Resources": TOTAL} for name in ("a", "b", "dead")]
    draining = {"b": 1_795_523_230_169}
    monkeypatch.setattr(nodes.ray, "nodes", lambda: found)
    monkeypatch.setattr(nodes.ray, "cluster_resources", lambda: {name: 2 * amount for name, amount in TOTAL.items()})
    monkeypatch.setattr(nodes, "_draining_nodes", lambda: draining)
    queue = Queue()
    monkeypatch.setattr(queue, "_tell_autoscaler", lambda: None)
    assert queue.ask("a", need("a", least=3)) is None
    assert queue.ask("b", need("b", least=2)) == "1 of 2 GPU free; held by a"
    draining.clear()
    assert queue.ask("b", need("b", least=2)) is None
