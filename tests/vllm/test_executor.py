"""The executor by itself, on ranks without a model: what vLLM's engine relies on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from ranks import Model, Tools
from vllm.platforms import current_platform
from vllm.v1.outputs import AsyncModelRunnerOutput

import rankwise.vllm
from rankwise import GroupBroken, _vllm_options
from rankwise._options import DEFAULTS
from rankwise._vllm_options import group_options
from rankwise._vllm_rank import Rank
from rankwise.vllm import RankwiseExecutor

pytestmark = pytest.mark.limit(300)


def config(world_size=4, **options):
    """As much of vLLM's as an executor reads: two pipeline stages. `options`: WorkerGroup's."""
    parallel = SimpleNamespace(
        world_size=world_size,
        local_world_size=world_size,
        tensor_parallel_size=world_size // 2,
        pipeline_parallel_size=2,
        prefill_context_parallel_size=1,
        data_parallel_size=1,
        data_parallel_size_local=1,
        data_parallel_rank_local=None,
        data_parallel_index=0,
        _api_process_count=1,
        enable_elastic_ep=False,
        numa_bind=False,
        worker_cls="ranks.Model",
        distributed_executor_backend="rankwise.vllm.RankwiseExecutor",
    )
    return SimpleNamespace(
        parallel_config=parallel, kv_transfer_config=None, additional_config={"rankwise": options}
    )


@pytest.fixture
def start(monkeypatch):
    """`start(config)`: an executor of ranks without a model, started as vLLM starts one."""
    made = []

    def start(config):
        monkeypatch.setattr(rankwise.vllm, "Rank", Model)
        executor = object.__new__(RankwiseExecutor)
        executor.vllm_config = config
        executor.kv_output_aggregator = executor.ec_output_aggregator = None
        made.append(executor)
        executor._init_executor()
        return executor

    yield start
    for executor in made:
        if hasattr(executor, "_group"):
            executor._group.kill()


@pytest.fixture
def executor(start):
    """Four ranks, two pipeline stages of two: the first rank of the last one has the output."""
    return start(config(logs="off"))


# -- what the group is given ---------------------------------------------------------------------


def test_ranks_that_are_spawned_are_not_given_what_a_launcher_imports(start):
    executor = start(config(2, start_method="spawn", logs="off", env={"MINE": "1"}))
    assert executor.collective_rpc(Model.variable, args=("MINE",)) == ["1", "1"]


def test_what_the_user_says_wins():
    options = group_options(config(), "ranks")
    assert options["start_method"] == "forkserver"
    assert options["preload"] == ("ranks", "ranks")
    options = group_options(config(start_method="spawn", preload=["json"], name="mine"), "ranks")
    assert (options["start_method"], options["preload"]) == ("spawn", ["json"]), "refused later"
    assert options["name"] == "mine"
    ours = SimpleNamespace(**vars(config()) | {"additional_config": object()})
    assert group_options(ours, "ranks")["name"] == "vllm", "a platform's own class"


@pytest.mark.parametrize(
    ("replicas", "index", "name"),
    [(1, 0, "vllm"), (2, 0, "vllm-dp0"), (2, 1, "vllm-dp1"), (1, 1, "vllm-dp1")],
)
def test_the_groups_of_several_replicas_have_names_of_their_own(replicas, index, name):
    """Also where vLLM tells a replica that it is the only one, its model having no experts."""
    made = config()
    made.parallel_config.data_parallel_size = replicas
    made.parallel_config.data_parallel_index = index
    assert group_options(made, "ranks")["name"] == name


def test_the_users_variables_are_added_to_ours(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1-2")
    assert [one["OMP_NUM_THREADS"] for one in group_options(config(2), "ranks")["env"]] == [
        "1",
        "2",
    ]
    for env in ({"MINE": "1"}, [{"MINE": "1"}, {"MINE": "1"}]):
        assert group_options(config(2, env=env), "ranks")["env"] == [
            {"OMP_NUM_THREADS": "1", "MINE": "1"},
            {"OMP_NUM_THREADS": "2", "MINE": "1"},
        ]
    his = {"OMP_NUM_THREADS": "3"}
    assert group_options(config(2, env=his), "ranks")["env"] == [his, his]
    assert "env" not in group_options(config(2, threads=3), "ranks"), "they would clash"
    assert group_options(config(2, env="MINE"), "ranks")["env"] == "MINE", "refused later"


def test_threads_are_counted_as_vllm_counts_them(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setattr(_vllm_options, "startup_omp_num_threads", lambda ranks: 100 // ranks)
    two = config(2)
    assert group_options(two, "ranks")["env"] == [{"OMP_NUM_THREADS": "50"}] * 2
    two.parallel_config.data_parallel_size_local = 2
    assert group_options(two, "ranks")["env"] == [{"OMP_NUM_THREADS": "25"}] * 2
    monkeypatch.setattr(_vllm_options.current_platform, "is_cpu", lambda: False)
    mark = {_vllm_options.OMP_NUM_THREADS_SET_BY_VLLM: "1"}
    assert group_options(two, "ranks")["env"] == [{"OMP_NUM_THREADS": "25"} | mark] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert "env" not in group_options(two, "ranks"), "it is inherited"


def test_cpus_are_split_only_where_numa_nodes_are_too_few(monkeypatch):
    def refuses(words):
        def manager(config):
            raise AssertionError(words)

        monkeypatch.setattr(_vllm_options, "OMPProcessManager", manager)

    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "auto")
    refuses("Not enough allowed NUMA nodes to bind threads of 4 local CPUWorkers.")
    assert group_options(config(), "ranks")["cpus"] == "split"
    refuses("")
    with pytest.raises(AssertionError):
        group_options(config(), "ranks")


def test_ranks_and_scheduler_read_the_name_mp(start):
    """What vLLM does for this name alone: it expects a report of every rank that loads, say."""
    made = config(2, logs="off")
    executor = start(made)
    assert made.parallel_config.distributed_executor_backend == "mp"
    assert executor.collective_rpc("get_backend") == ["mp"] * 2


@pytest.mark.parametrize("option", ["enable_elastic_ep", "numa_bind"])
def test_what_we_cannot_do_is_refused_with_what_to_do(start, option):
    made = config(2)
    setattr(made.parallel_config, option, True)
    with pytest.raises(ValueError, match=f"{option} needs distributed_executor_backend='mp'"):
        start(made)


# -- calls -----------------------------------------------------------------------------------------


def test_the_output_rank_alone_answers_a_step(executor):
    assert executor.execute_model("a") == "a by 2"
    assert executor.sample_tokens("g") == (2, "g")
    assert executor.take_draft_token_ids() == 2
    executor.execute_dummy_batch()
    assert executor.collective_rpc("get_steps") == [["a", "dummy"]] * 4


def test_steps_that_are_not_waited_for_come_in_order(executor):
    futures = [executor.execute_model(step, non_block=True) for step in range(50)]
    assert [future.result() for future in futures] == [f"{step} by 2" for step in range(50)]
    assert executor.collective_rpc("get_steps") == [list(range(50))] * 4


def test_a_function_has_the_rank_first(executor):
    assert executor.collective_rpc(lambda rank, n: rank.rank * n, args=(3,)) == [0, 3, 6, 9]
    assert executor.collective_rpc("sample_tokens", kwargs={"grammar": 1}, unique_reply_rank=3) == (
        3,
        1,
    )


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (Tools.doubled, [0, 2, 4, 6]),
        (Tools.get_steps, ["not the worker's own"] * 4),
        (lambda rank: 2 * rank.rank, [0, 2, 4, 6]),
        (Model.take_draft_token_ids, [0, 1, 2, 3]),
    ],
    ids=["static", "of-a-class", "lambda", "of-the-workers-class"],
)
def test_a_function_travels_by_value(executor, function, value):
    assert executor.collective_rpc(function) == value


def test_a_users_call_that_fails_on_one_rank_ends_no_engine(executor, monkeypatch):
    """However long the others take: they are given 30 seconds after a step's failure."""
    monkeypatch.setattr(DEFAULTS, "grace", 0.05)
    with pytest.raises(KeyError, match="nothing of that name"):
        executor.collective_rpc("fails_on_rank_1")  # the others take half a second
    assert executor.collective_rpc("get_steps") == [[]] * 4
    assert not executor.is_failed


def test_a_step_that_fails_on_one_rank_ends_the_engine(executor, monkeypatch):
    """The others may wait for it in a collective for ever."""
    monkeypatch.setattr(DEFAULTS, "grace", 0.05)
    told = threading.Event()
    executor.register_failure_callback(told.set)
    with pytest.raises(KeyError, match="nothing of that name"):
        executor.execute_model("hangs but on rank 1")
    assert told.wait(20)
    assert executor.is_failed


class Joins:
    def __init__(self, mark):
        self.mark = mark
        self.threads = set()

    def aggregate(self, outputs, output_rank=0):
        self.threads.add(threading.current_thread())
        outputs[output_rank] = (outputs[output_rank], self.mark, len(outputs))
        return outputs[output_rank]


@pytest.mark.parametrize("non_block", [False, True])
def test_aggregators_have_what_every_rank_returns(executor, non_block):
    executor.kv_output_aggregator, executor.ec_output_aggregator = Joins("kv"), Joins("ec")
    value = executor.execute_model("a", non_block=non_block)
    value = value.result(20) if non_block else value
    assert value == (("a by 2", "kv", 4), "ec", 4)
    assert len(executor.kv_output_aggregator.threads) == 1


def test_an_aggregator_that_fails_fails_the_step(executor):
    executor.kv_output_aggregator = object()
    future = executor.execute_model("a", non_block=True)
    with pytest.raises(AttributeError, match="aggregate"):
        future.result(20)


def test_health_is_told_without_asking_a_rank(executor):
    executor.check_health()
    executor._group.submit(Model.pause)
    began = time.monotonic()
    executor.check_health()
    assert time.monotonic() - began < 0.05, "a rank that is stopped does not answer"
    assert not executor.is_failed
    told = threading.Event()
    executor.register_failure_callback(told.set)
    os.kill(executor._group.pids[1], signal.SIGKILL)
    assert told.wait(20)
    assert executor.is_failed
    with pytest.raises(GroupBroken, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"):
        executor.check_health()
    late = []
    executor.register_failure_callback(lambda: late.append(True))
    assert late == [True], "also who comes when it has failed already"


def test_a_timeout_is_the_builtin_one(executor):
    with pytest.raises(TimeoutError, match="pause"):
        executor.collective_rpc("pause", timeout=0.2)


# -- the rank ------------------------------------------------------------------------------------


class Promise(AsyncModelRunnerOutput):
    def get_output(self):
        return "fetched"


def test_the_device_is_set_once_and_not_for_each_output(monkeypatch):
    rank = object.__new__(Rank)
    rank.worker = SimpleNamespace(device="the device")
    devices = []
    monkeypatch.setattr(type(current_platform), "set_device", devices.append)
    promises = [rank._late(Promise()) for _ in range(3)]
    assert devices == [], "on the thread that fetches"
    assert [promise.get() for promise in promises] == ["fetched"] * 3
    assert devices == ["the device"]


def test_a_rank_whose_output_nobody_asks_for_does_not_fetch_it():
    rank = object.__new__(Rank)
    rank._answers = False
    assert rank._late(Promise()) is None
    assert rank._late("of the host") == "of the host"


# -- releases ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def releases():
    """What importing rankwise.vllm says under each: that a module is missing, if it goes on."""
    code = (
        "import sys, vllm.version\n"
        "sys.modules['vllm.config'] = None\n"
        "for name, parts in ("
        "('0.32.1', (0, 32, 1)), ('0.32.0.post1', (0, 32, 0, 'post1')), ('0.33.0', (0, 33, 0))):\n"
        "    vllm.version.__version__, vllm.version.__version_tuple__ = name, parts\n"
        "    try: import rankwise.vllm\n"
        "    except ImportError as error: print(f'{name}: {error}')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return dict(line.split(": ", 1) for line in run.stdout.splitlines())


@pytest.mark.parametrize("release", ["0.32.1", "0.32.0.post1"])
def test_a_release_of_the_tested_line_is_taken(releases, release):
    assert releases[release] == "import of vllm.config halted; None in sys.modules"


def test_an_unknown_release_is_refused_in_words(releases):
    assert releases["0.33.0"].startswith("rankwise.vllm is made for vLLM 0.32, and this is 0.33.0:")
    assert "RANKWISE_VLLM_UNTESTED=1" in releases["0.33.0"]
