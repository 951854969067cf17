"""The shipped config files, and what is refused of others."""

from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from spkit.errors import SpkitError
from spkit.system.accelerate_file import read

FILES = Path(__file__).parents[2] / "profiles" / "accelerate"
EXPECTED = {  # processes, sharded, on_cpu
    "2-gpus": (2, False, False),
    "8-gpus": (8, False, False),
    "8-gpus-fsdp": (8, True, False),
    "2-processes-cpu": (2, False, True),
}


def test_the_shipped_files_are_known_here_and_to_accelerate():
    assert {path.stem for path in FILES.glob("*.yaml")} == set(EXPECTED)
    for name, expected in EXPECTED.items():
        path = FILES / f"{name}.yaml"
        found = read("derivation.accelerate", path)
        assert (found.processes, found.sharded, found.on_cpu) == expected
        assert found.machines == 1
        theirs = load_config_from_file(str(path))  # an unknown key is an error there
        assert theirs.num_processes == expected[0] and theirs.mixed_precision == "no"


REFUSED = [
    ({"distributed_type": "DEEPSPEED"}, "distributed_type is 'DEEPSPEED' there, allowed are MULTI"),
    ({"num_processes": 0}, "num_processes is 0 there, must be a number of 1 or more"),
    ({"num_processes": True}, "num_processes is True there"),
    ({"mixed_precision": "bf16"}, "must be 'no': backbone.compute_dtype is the precision"),
    ({"compute_environment": "AMAZON_SAGEMAKER"}, "must be LOCAL_MACHINE"),
    ({"distributed_type": "NO"}, "must be MULTI_GPU for several processes"),
    ({"distributed_type": "FSDP"}, "fsdp_config.fsdp_version is None there, must be 2"),
    (
        {
            "distributed_type": "FSDP",
            "fsdp_config": {"fsdp_version": 2, "fsdp_offload_params": True},
        },
        "fsdp_config.fsdp_offload_params is True there, must be false",
    ),
]


@pytest.mark.parametrize("changes, said", REFUSED)
def test_one_sentence_for_what_is_not_known_here(tmp_path, changes, said):
    values = yaml.safe_load((FILES / "2-gpus.yaml").read_text()) | changes
    path = tmp_path / "file.yaml"
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(SpkitError, match="^importance.accelerate is '.*file.yaml'") as caught:
        read("importance.accelerate", path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text, said", [(None, "cannot be read"), ("a: [", "no YAML"), ("", "must")]
)
def test_a_file_that_is_missing_or_broken(tmp_path, text, said):
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SpkitError, match=said):
        read("derivation.accelerate", path)
