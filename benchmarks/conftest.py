"One thread for everybody; versions beside the machine in every result file, and no raw timings."
from importlib.metadata import version

import torch

torch.set_num_threads(1)


def pytest_benchmark_update_machine_info(config, machine_info):
    for private in ("node", "release", "python_build"): machine_info.pop(private, None)
    machine_info["torch_threads"] = torch.get_num_threads()
    machine_info["versions"] = {name: version(name) for name in ["fairbook", "torch", "numpy", "scipy", "cvxpy", "cvxpylayers", "diffcp", "clarabel"]}
    if torch.cuda.is_available(): machine_info["gpu"] = torch.cuda.get_device_name()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    for b in output_json["benchmarks"]: b["stats"].pop("data", None)
