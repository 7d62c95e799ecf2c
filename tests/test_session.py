"""What a Ray that is started here is given."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.ray

IDLES = """
import os, time, ray
from vlmo_ray.session import ray_session

@ray.remote(num_cpus=0)
def process():
    time.sleep(2)
    return os.getpid()

def processes():
    return set(ray.get([process.remote() for _ in range(4)]))

with ray_session():
    before = processes()
    time.sleep(3)
    print(len(before), processes() == before)
"""


def test_data_processes_outlive_a_pause_between_windows():
    alone = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    env = alone | {"RAY_num_workers_soft_limit": "1"}  # as if on one CPU
    out = subprocess.run([sys.executable, "-c", IDLES], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines()[-1] == "4 True"
