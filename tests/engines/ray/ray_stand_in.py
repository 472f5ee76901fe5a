"""A stand-in for Ray: everything happens in this process, one call after the other, and is pickled as Ray would."""

import pickle
import random
import sys
from types import SimpleNamespace


class RayError(Exception):
    pass


class RayTaskError(RayError):
    def __init__(self, cause):
        self.cause = cause


class Answer:
    def __init__(self, value):
        self.value = value


class StandIn:
    """What the pool calls of `ray`; `lost` says which calls lose their worker, by the worker's number and method."""

    def __init__(self, lost=lambda number, method, arguments: False):
        self.lost, self.num_workers, self.killed, self.calls = lost, 0, [], []
        self.random = random.Random(0)
        self.exceptions = SimpleNamespace(RayError=RayError, RayTaskError=RayTaskError)
        self.util = SimpleNamespace(get_node_ip_address=lambda: "10.0.0.1")

    def remote(self, kind):
        def make():
            worker, number = kind(), self.num_workers
            self.num_workers += 1
            methods = {name: self.make_method(worker, number, name) for name in ("start", "run", "count")}
            return SimpleNamespace(number=number, **methods)

        return SimpleNamespace(options=lambda **resources: SimpleNamespace(remote=make))

    def make_method(self, worker, number, name):
        def call(*arguments):
            if name == "run":
                self.calls.append((number, arguments[1]))
            if number in self.killed or self.lost(number, name, arguments):
                return Answer(RayError("the node is gone"))
            try:
                answer = getattr(worker, name)(*pickle.loads(pickle.dumps(arguments)))
                return Answer(pickle.loads(pickle.dumps(answer)))
            except Exception as error:
                return Answer(RayTaskError(pickle.loads(pickle.dumps(error))))

        return SimpleNamespace(remote=call)

    def wait(self, answers, num_returns=1, timeout=None):
        chosen = self.random.choice(answers)
        return [chosen], [answer for answer in answers if answer is not chosen]

    def get(self, answer):
        if isinstance(answer.value, Exception):
            raise answer.value
        return answer.value

    def kill(self, actor):
        self.killed.append(actor.number)

    def cluster_resources(self):
        return {"CPU": 4.0}

    def is_initialized(self):
        return True

    def install(self, monkeypatch):
        """Takes Ray's place until the test ends."""
        monkeypatch.setitem(sys.modules, "ray", self)
        monkeypatch.setitem(sys.modules, "ray.exceptions", self.exceptions)
