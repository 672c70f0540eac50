"""What a launcher's variables mean: all of them, none of them, and half of them."""

import pytest

from llm.environment import Place, alone, place, ranks_here
from llm.errors import UserError

WHOLE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
TORCHRUN = {**WHOLE, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
LEFT_OVER = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "gone.example", "MASTER_PORT": "0"}


def test_a_launcher_gives_the_place() -> None:
    assert place(TORCHRUN) == Place(rank=1, size=4, local_rank=1, launched=True)


def test_without_a_launcher_a_process_is_alone_also_beside_an_address_that_a_job_script_exports() -> None:
    assert place({}) == place({"MASTER_ADDR": "node1", "MASTER_PORT": "29500", "SLURM_PROCID": "0"}) == Place()


def test_whole_variables_of_one_process_are_one_process() -> None:
    assert place(LEFT_OVER) == Place(launched=True)


def test_one_process_a_machine_needs_no_local_rank_and_several_do_not_share_one() -> None:
    assert place(WHOLE).local_rank is None  # for whoever knows how many GPUs there are


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name} is missing in the environment, beside "):
        place({key: value for key, value in WHOLE.items() if key != name})


@pytest.mark.parametrize("only", ["RANK", "WORLD_SIZE", "LOCAL_RANK"])
def test_the_advice_about_one_alone_works_when_typed(only: str) -> None:
    environment = {only: "1"}
    with pytest.raises(UserError, match=f"type `unset {only}`"):
        place(environment)
    del environment[only]
    assert place(environment) == Place()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": ""}, "RANK is empty"),
        ({"RANK": "x"}, "RANK=x in the environment: expected a whole number, 0 or more"),
        ({"RANK": "-1"}, "RANK=-1 in"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0 in the environment: expected a whole number, 1 or more"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0 in"),
        ({"MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
        ({"MASTER_PORT": ""}, "MASTER_PORT is empty"),
        ({"MASTER_PORT": "tcp://10.0.0.1:80"}, "MASTER_PORT=tcp://10.0.0.1:80 in"),  # as Kubernetes names services
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: expected a port"),
        ({"RANK": "4"}, "RANK=4 and WORLD_SIZE=4 contradict each other: ranks count from 0 to 3"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 and WORLD_SIZE=4 contradict"),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 and LOCAL_WORLD_SIZE=2 contradict"),
        ({"LOCAL_RANK": "a"}, "LOCAL_RANK=a in"),
        ({"LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8: there are only WORLD_SIZE=4 processes"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, str], words: str) -> None:
    with pytest.raises(UserError) as refused:
        place(WHOLE | change)
    assert str(refused.value).startswith(words)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_processes_that_nobody_numbered_are_refused_and_one_is_not(name: str) -> None:
    with pytest.raises(UserError, match=f"^{name}=8: "):
        place({name: "8"})
    assert place({name: "1"}) == Place()
    assert place({name: "8"} | TORCHRUN).rank == 1, "each of them started a torchrun"


def test_the_share_of_a_machines_cores_is_one_whatever_is_left_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, ranks in (("4", 4), ("", 1), ("x", 1), ("0", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
        assert ranks_here() == ranks


def test_a_job_of_its_own_inherits_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {**TORCHRUN, "TORCHELASTIC_RUN_ID": "job"}.items():
        monkeypatch.setenv(key, value)
    assert place(alone()) == Place()
    assert not any(key.startswith("TORCHELASTIC") for key in alone())
