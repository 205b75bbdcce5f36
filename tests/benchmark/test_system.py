import json
import platform

import torch

from lightspine.benchmark import describe_system


def test_description_is_plain_json() -> None:
    description = describe_system()
    assert json.loads(json.dumps(description)) == description


def test_versions_are_those_of_the_running_packages() -> None:
    versions = describe_system()["versions"]
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == torch.__version__.partition("+")[0]


def test_threads_are_those_of_torch() -> None:
    assert describe_system()["torch_threads"] == torch.get_num_threads()
